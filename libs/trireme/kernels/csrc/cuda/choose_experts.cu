// choose_experts: the experts that a router likes best, and their shares; softmax and selection in one pass.
//
//   logits    [tokens, experts]   T, contiguous
//   shares    [tokens, chosen]    T, contiguous; of a softmax over all experts, or over the chosen ones
//   indices   [tokens, chosen]    int64, contiguous; best first, of equals the lower index first
//
// Requires    chosen <= experts <= 32 * PER_LANE; chosen <= 32.
// Launch      one warp a token, four a block of 128 threads; no shared memory.
// Invariant   indices are distinct and in range whatever the logits are: NaN counts as the largest, and makes the
//             token's shares NaN.
// Cost        latency bound: 2 * experts bytes a token, `chosen` rounds of a warp's maximum.
// Reference   tests/cuda/test_experts.py, float64.
// Source      Rajbhandari et al., DeepSpeed-MoE, ICML 2022 (gating without one-hot masks).

#include "prim.cuh"
#include "warp_reductions.cuh"

// A float's place among all floats, as an unsigned integer; both zeros are equal, NaN is above all.
DEVICE u32 order_of(float value) {
    if (!(value == value)) return 0xFFC00000u;
    const u32 bits = prim_float_bits(value + 0.0f);
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}
DEVICE float of_order(u32 order) { return prim_bits_float(order ^ (order >> 31 ? 0x80000000u : 0xFFFFFFFFu)); }

template <class T, int PER_LANE>
__global__ void __launch_bounds__(128) choose_experts(const T* logits, T* shares, i64* indices, int tokens,
                                                      int num_experts, int chosen, int renormalises) {
    constexpr float log2_e = 1.4426950408889634f;
    const int lane = threadIdx.x % warp_lanes;
    const int token = blockIdx.x * (blockDim.x / warp_lanes) + threadIdx.x / warp_lanes;
    if (token >= tokens) return;

    u64 keys[PER_LANE];  // by logit, then by lower index; 0: no expert
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int expert = warp_lanes * i + lane;
        keys[i] = 0;
        if (expert < num_experts)
            keys[i] = u64(order_of(to_float(logits[i64(token) * num_experts + expert]))) << 32 | u32(~expert);
    }
    u64 mine = 0, last = ~u64(0);
    float largest = 0.0f;
    for (int round = 0; round < chosen; ++round) {
        u64 best = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) best = keys[i] < last && keys[i] > best ? keys[i] : best;
        for (int mask = warp_lanes / 2; mask > 0; mask /= 2) {
            const u64 other = prim_shuffle_xor(best, mask);
            best = other > best ? other : best;
        }
        if (round == 0) largest = of_order(static_cast<u32>(best >> 32));
        if (round == lane) mine = best;
        last = best;
    }
    const auto power = [&](u64 key) { return prim_exp2((of_order(static_cast<u32>(key >> 32)) - largest) * log2_e); };
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) sum += !renormalises && keys[i] ? power(keys[i]) : 0.0f;
    const float weight = lane < chosen ? power(mine) : 0.0f;
    sum = warp_sum(renormalises ? weight : sum);
    if (lane < chosen) {
        shares[i64(token) * chosen + lane] = rounded<T>(prim_divide(weight, sum));
        indices[i64(token) * chosen + lane] = static_cast<int>(~static_cast<u32>(mine));
    }
}
