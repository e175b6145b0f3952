// adjust_logits: bias and penalties, in place, before a token is sampled; the rule of libs/trireme/engine/sampling.py.
//
// bias_logits adds values to single scores:
//   logits    [rows, vocab]   float, rows `stride` elements apart
//   rows, ids [count]         int32, distinct pairs
//   values    [count]         float; -infinity makes a token impossible
//
// penalise_logits changes whole rows:
//   logits    [.., vocab]     float, rows `stride` elements apart
//   rows      [count]         int32, which of them
//   counts    [count, vocab]  float, how often each token is in the answer
//   in_prompt [count, vocab]  bool, whether it is in the prompt
//   penalties [count, 3]      float: repetition, frequency, presence
//
// Launch      256 threads a block; bias: a thread an entry; penalties: grid (pieces of 1024 tokens, count).
// Cost        memory bound: 13 bytes a token of a penalised row.
// Reference   tests/cuda/test_sampling.py, engine/sampling.py, equal bit for bit.

#include "prim.cuh"

__global__ void __launch_bounds__(256)
    bias_logits(float* logits, const int* rows, const int* ids, const float* values, int count, i64 stride) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count) logits[rows[at] * stride + ids[at]] += values[at];
}

__global__ void __launch_bounds__(256)
    penalise_logits(float* logits, const int* rows, const float* counts, const bool* in_prompt, const float* penalties,
                    int vocab, i64 stride) {
    const i64 entry = blockIdx.y;
    const float repetition = penalties[3 * entry], frequency = penalties[3 * entry + 1];
    const float presence = penalties[3 * entry + 2];
    float* row = logits + rows[entry] * stride;
    for (int i = 0; i < 4; ++i) {
        const int token = (4 * blockIdx.x + i) * blockDim.x + threadIdx.x;
        if (token >= vocab) return;
        const float count = counts[entry * vocab + token];
        float score = row[token];
        if (count > 0.0f || in_prompt[entry * vocab + token])
            score = score > 0.0f ? prim_divide(score, repetition) : score * repetition;
        // Two roundings each, as where products and differences are separate operations.
        score = prim_subtract(score, prim_multiply(frequency, count));
        row[token] = prim_subtract(score, count > 0.0f ? presence : 0.0f);
    }
}
