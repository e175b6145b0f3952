// adjust_logits: constraints, bias and penalties, in place, before a token is sampled; the rule of
// libs/trireme/engine/sampling.py.
//
// forbid_logits makes tokens impossible; what is no number stays none:
//   logits    [.., vocab]     float, rows `stride` elements apart
//   rows      [count]         int32, which of them; distinct
//   bits      [count, words]  uint32, 1: allowed; the lowest of a word first, words = ceil(vocab / 32)
//
// bias_logits adds values to single scores:
//   logits    [rows, vocab]   float, rows `stride` elements apart
//   rows, ids [count]         int32, distinct pairs
//   values    [count]         float; -infinity makes a token impossible
//
// penalise_logits changes whole rows:
//   logits    [.., vocab]     float, rows `stride` elements apart
//   rows      [count]         int32, which of them
//   slots     [count]         int32, each one's row of the next two
//   counts    [slots, vocab]  float, how often each token is in the answer
//   in_prompt [slots, vocab]  bool, whether it is in the prompt
//   ahead     [count, most]   int32, drafted tokens that count as if they were in the answer; -1: none
//   penalties [count, 3]      float: repetition, frequency, presence
//
// Launch      256 threads a block; bias: a thread an entry; others: grid (pieces of 1024 tokens, count).
// Cost        memory bound: 13 bytes a token of a penalised row, 8 a token of a constrained one.
// Reference   tests/cuda/test_sampling.py, engine/sampling.py, equal bit for bit.

#include "prim.cuh"

__global__ void __launch_bounds__(256)
    bias_logits(float* logits, const int* rows, const int* ids, const float* values, int count, i64 stride) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count) logits[rows[at] * stride + ids[at]] += values[at];
}

__global__ void __launch_bounds__(256)
    forbid_logits(float* logits, const int* rows, const u32* bits, int vocab, int words, i64 stride) {
    const i64 entry = blockIdx.y;
    float* row = logits + rows[entry] * stride;
    for (int i = 0; i < 4; ++i) {
        const int token = (4 * blockIdx.x + i) * blockDim.x + threadIdx.x;
        if (token >= vocab) return;
        const bool is_allowed = bits[entry * words + token / 32] >> token % 32 & 1;
        if (!is_allowed) row[token] = prim_subtract(row[token], prim_bits_float(0x7F800000u));
    }
}

__global__ void __launch_bounds__(256)
    penalise_logits(float* logits, const int* rows, const int* slots, const float* counts, const bool* in_prompt,
                    const int* ahead, const float* penalties, int most_ahead, int vocab, i64 stride) {
    const i64 entry = blockIdx.y, slot = slots[entry];
    const float repetition = penalties[3 * entry], frequency = penalties[3 * entry + 1];
    const float presence = penalties[3 * entry + 2];
    float* row = logits + rows[entry] * stride;
    for (int i = 0; i < 4; ++i) {
        const int token = (4 * blockIdx.x + i) * blockDim.x + threadIdx.x;
        if (token >= vocab) return;
        float count = counts[slot * vocab + token];
        for (int place = 0; place < most_ahead; ++place)
            if (ahead[entry * most_ahead + place] == token) count += 1.0f;
        float score = row[token];
        if (count > 0.0f || in_prompt[slot * vocab + token])
            score = score > 0.0f ? prim_divide(score, repetition) : score * repetition;
        // Two roundings each, as where products and differences are separate operations.
        score = prim_subtract(score, prim_multiply(frequency, count));
        row[token] = prim_subtract(score, count > 0.0f ? presence : 0.0f);
    }
}
