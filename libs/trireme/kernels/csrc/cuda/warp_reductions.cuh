// Sums and maxima over a warp and over a block; every thread gets the result, always the same bits.

#pragma once

#include "prim.cuh"

DEVICE float warp_sum(float value) {
    for (int mask = warp_lanes / 2; mask > 0; mask /= 2) value += prim_shuffle_xor(value, mask);
    return value;
}

// Sum over WARPS warps; `scratch` has a float for each, is free again after the next barrier of the block.
template <int WARPS>
DEVICE float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    if (WARPS == 1) return value;
    if (threadIdx.x % warp_lanes == 0) scratch[threadIdx.x / warp_lanes] = value;
    prim_sync_block();
    value = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp) value += scratch[warp];
    return value;
}
