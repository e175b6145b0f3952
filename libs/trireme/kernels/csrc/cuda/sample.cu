// sample: choose the next token of every row; the rule is that of libs/trireme/engine/sampling.py.
//
//   logits        [rows, vocab]   float, rows `stride` elements apart; bias and penalties applied
//   temperatures  [rows]          float; 0 chooses the likeliest token, of several the smallest id
//   top_k         [rows]          int32; 0: all
//   top_p         [rows]          double; 1: all
//   min_log       [rows]          float, the logarithm of min_p; -infinity: all
//   seeds         [rows]          uint64
//   indices       [rows]          int64, the token's index in the answer: (seed, index) is the draw
//   tokens        [rows]          int64; -1: the row has a NaN, +infinity, or nothing above -infinity
//
// A row with a filter goes through its tokens by falling score and rising id, one without by rising id. Each filter
// keeps a head of them. The token is the first whose running sum of weights exceeds draw * total. All of that is
// selecting: which token brings the running sum over a threshold? It is found digit by digit, with a histogram of the
// weights of each digit's values, as in a radix sort that sorts only the part that matters.
//
// Weights are whole numbers of 2**-40 of the likeliest token's, so sums do not depend on their order.
//
// Requires    vocab <= 2**22; temperatures not negative; top_p from 0 to 1.
// Launch      one block of 512 threads a row; shared memory 16448 bytes.
// Cost        up to 1 + 3 * 6 passes over the row, which L2 serves after the first.
// Reference   tests/cuda/test_sampling.py, engine/sampling.py.

#include "philox.cuh"
#include "prim.cuh"
#include "warp_reductions.cuh"

constexpr int sample_warps = 16, digit_bits = 11, digits = 1 << digit_bits, id_bits = 2 * digit_bits;
constexpr float one = 1099511627776.0f;  // 2**40, the weight of the likeliest token

struct SampleScratch {
    u64 histogram[digits];
    u64 warp_sums[sample_warps];
    u64 least_key, digit, threshold;
    u32 is_bad;
};

// One row's tokens as the choice sees them.
struct Candidates {
    const float* logits;
    int vocab;
    float temperature, highest, min_log;
    u64 last_key;  // tokens with larger keys are filtered out
    bool is_by_id;

    DEVICE float score(int token) const { return prim_divide(logits[token], temperature) + 0.0f; }  // -0 becomes 0

    // Rises as the order of choice goes.
    DEVICE u64 key(int token, float score) const {
        if (is_by_id) return token;
        const u32 bits = prim_float_bits(score);
        const u32 rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        return u64(~rising) << id_bits | static_cast<u32>(token);
    }
    DEVICE u64 weight(int token, u64 key, float score) const {
        constexpr float log2_e = 1.4426950408889634f;
        const float relative = score - highest;
        if (key > last_key || relative < min_log) return 0;
        return static_cast<u64>(prim_exp2(relative * log2_e) * one + 0.5f);
    }
};

DEVICE u64 block_sum(u64 value, SampleScratch& scratch) {
    for (int mask = warp_lanes / 2; mask > 0; mask /= 2) value += prim_shuffle_xor(value, mask);
    if (threadIdx.x % warp_lanes == 0) scratch.warp_sums[threadIdx.x / warp_lanes] = value;
    prim_sync_block();
    value = 0;
    for (int warp = 0; warp < sample_warps; ++warp) value += scratch.warp_sums[warp];
    prim_sync_block();
    return value;
}

// Find the digit whose values bring the sum of the histogram to `threshold`, and what is left of that.
DEVICE void find_digit(SampleScratch& scratch, u64 threshold) {
    constexpr int own = digits / (sample_warps * warp_lanes);
    const int thread = threadIdx.x, lane = thread % warp_lanes;
    u64 sum = 0;
    for (int i = 0; i < own; ++i) sum += scratch.histogram[own * thread + i];
    u64 through = sum;  // of the warp's lanes up to this one
    for (int distance = 1; distance < warp_lanes; distance *= 2) {
        const u64 before = prim_shuffle(through, max(lane - distance, 0));
        if (lane >= distance) through += before;
    }
    if (lane == warp_lanes - 1) scratch.warp_sums[thread / warp_lanes] = through;
    prim_sync_block();
    u64 before = through - sum;
    for (int warp = 0; warp < thread / warp_lanes; ++warp) before += scratch.warp_sums[warp];
    if (before < threshold && threshold <= before + sum) {
        int i = 0;
        for (; threshold > before + scratch.histogram[own * thread + i]; ++i)
            before += scratch.histogram[own * thread + i];
        scratch.digit = own * thread + i;
        scratch.threshold = threshold - before;
    }
    prim_sync_block();
}

// The key of the first token at which the running sum reaches `threshold`: of weights, or of tokens if COUNTS.
template <bool COUNTS>
DEVICE u64 select(const Candidates& candidates, u64 threshold, SampleScratch& scratch) {
    u64 prefix = 0;
    // The score's 32 bits are three digits, the last one bit short; the id is two.
    for (int left = candidates.is_by_id ? id_bits : 32 + id_bits; left > 0;) {
        const int bits = left == id_bits + 10 ? 10 : digit_bits, shift = left -= bits;
        for (int digit = threadIdx.x; digit < digits; digit += blockDim.x) scratch.histogram[digit] = 0;
        prim_sync_block();
        for (int token = threadIdx.x; token < candidates.vocab; token += blockDim.x) {
            const float score = candidates.score(token);
            const u64 key = candidates.key(token, score);
            if (key >> shift >> bits != prefix) continue;
            const u64 weight = COUNTS ? 1 : candidates.weight(token, key, score);
            if (weight) prim_atomic_add(&scratch.histogram[key >> shift & ((1 << bits) - 1)], weight);
        }
        prim_sync_block();
        find_digit(scratch, threshold);
        prefix = prefix << bits | scratch.digit;
        threshold = scratch.threshold;
        prim_sync_block();
    }
    return prefix;
}

DEVICE u64 total_weight(const Candidates& candidates, SampleScratch& scratch) {
    u64 sum = 0;
    for (int token = threadIdx.x; token < candidates.vocab; token += blockDim.x) {
        const float score = candidates.score(token);
        sum += candidates.weight(token, candidates.key(token, score), score);
    }
    return block_sum(sum, scratch);
}

__global__ void __launch_bounds__(sample_warps* warp_lanes)
    sample(const float* logits, const float* temperatures, const int* top_k, const double* top_p, const float* min_log,
           const u64* seeds, const i64* indices, i64* tokens, int vocab, i64 stride) {
    SampleScratch& scratch = *reinterpret_cast<SampleScratch*>(prim_shared());
    const int row = blockIdx.x;
    const float temperature = temperatures[row];
    const bool is_greedy = temperature == 0.0f;
    Candidates candidates = {
        logits + row * stride, vocab, is_greedy ? 1.0f : temperature, 0.0f, min_log[row], ~u64(0), false};

    if (threadIdx.x == 0) {
        scratch.least_key = ~u64(0);
        scratch.is_bad = 0;
    }
    prim_sync_block();
    u64 least = ~u64(0);
    bool is_bad = false;
    for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
        is_bad |= !(candidates.logits[token] < prim_bits_float(0x7F800000u));
        const u64 key = candidates.key(token, candidates.score(token));
        least = key < least ? key : least;
    }
    prim_atomic_min(&scratch.least_key, least);
    if (is_bad) prim_atomic_add(&scratch.is_bad, 1u);
    prim_sync_block();
    const int likeliest = static_cast<int>(scratch.least_key & ((1 << id_bits) - 1));
    candidates.highest = candidates.score(likeliest);
    const bool has_choice = scratch.is_bad == 0 && candidates.highest > prim_bits_float(0xFF800000u);
    if (!has_choice || is_greedy) {
        if (threadIdx.x == 0) tokens[row] = has_choice ? likeliest : -1;
        return;
    }

    const bool has_min = candidates.min_log > prim_bits_float(0xFF800000u);
    candidates.is_by_id = top_k[row] == 0 && top_p[row] >= 1.0 && !has_min;
    if (top_k[row] > 0 && top_k[row] < vocab) candidates.last_key = select<true>(candidates, top_k[row], scratch);
    if (top_p[row] < 1.0) {
        const u64 mass = total_weight(candidates, scratch);
        const u64 wanted = static_cast<u64>(ceil(top_p[row] * static_cast<double>(mass)));
        candidates.last_key = select<false>(candidates, wanted ? wanted : 1, scratch);
    }
    const u64 total = total_weight(candidates, scratch), draw = philox_draw(seeds[row], indices[row]);
    const u64 below = prim_multiply_high(draw, total) << 11 | draw * total >> 53;  // floor(draw * total / 2**53)
    const u64 chosen = select<false>(candidates, below + 1, scratch);
    if (threadIdx.x == 0) tokens[row] = static_cast<i64>(chosen & ((1 << id_bits) - 1));
}
