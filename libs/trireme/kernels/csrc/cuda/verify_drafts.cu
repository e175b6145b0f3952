// verify_drafts: which speculated tokens does the model confirm? One tree of drafts a sequence.
//
//   chosen     [tokens]              int64, the token that the model chose after each token of the batch
//   drafts     [tokens]              int64, the tokens of the batch; a sequence's first is its last certain token
//   parents    [tokens]              int32, place within the sequence of the token before; of the first: -1
//   starts     [sequences + 1]       int32, the sequence's first token
//   path       [sequences, longest]  int32, places of the confirmed tokens in their order, then -1
//   counts     [sequences]           int32, confirmed tokens
//   next       [sequences]           int64, the token that the model chose after the last confirmed one; -1: failed
//
// A token is confirmed if the model chose it after its confirmed parent; of equal siblings the first. The draws of
// `chosen` depend on (seed, index) alone, so what comes out is what the model says without speculation.
//
// Requires    parents lie before their children; at least one token a sequence, at most 64.
// Launch      one warp a sequence, four a block; no shared memory.
// Cost        latency bound: a step for each confirmed token.
// Reference   tests/cuda/test_sampling.py, a walk in Python.
// Source      Miao et al., SpecInfer, ASPLOS 2024 (verification of token trees).

#include "prim.cuh"

__global__ void __launch_bounds__(128)
    verify_drafts(const i64* chosen, const i64* drafts, const int* parents, const int* starts, int* path, int* counts,
                  i64* next, int sequences, int longest) {
    const int lane = threadIdx.x % warp_lanes;
    const int sequence = blockIdx.x * (blockDim.x / warp_lanes) + threadIdx.x / warp_lanes;
    if (sequence >= sequences) return;
    const int first = starts[sequence], size = starts[sequence + 1] - first;
    int place = 0, count = 0;
    for (;;) {
        const i64 wanted = chosen[first + place];
        int child = -1;
        for (int begin = 0; begin < size && child < 0; begin += warp_lanes) {
            const int candidate = begin + lane;
            const bool is_child = candidate > 0 && candidate < size && parents[first + candidate] == place &&
                                  drafts[first + candidate] == wanted;
            const u32 votes = prim_ballot(is_child);
            if (votes) child = begin + prim_lowest_bit(votes);
        }
        if (child < 0) break;
        place = child;
        if (lane == 0 && count < longest) path[i64(sequence) * longest + count] = place;
        ++count;
    }
    for (int at = count + lane; at < longest; at += warp_lanes) path[i64(sequence) * longest + at] = -1;
    if (lane == 0) {
        counts[sequence] = count;
        next[sequence] = chosen[first + place];
    }
}
