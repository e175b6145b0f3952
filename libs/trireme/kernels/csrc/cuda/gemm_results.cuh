// What becomes of a block's sums: splits of the columns are added in their order, then come scale, bias and residual,
// then one rounding.

#pragma once

#include "prim.cuh"

// Where the results of a product go, and what is added to them; the kernel's header says what each is.
template <class T>
struct GemmResults {
    const float* scales;
    const T* bias;
    const T* residual;
    T* out;
    float* partial;
    u32* counters;
    int tokens, rows;
};

// Write the results of ROWS rows and TILE_N tokens from `first_row` and `first_token` on. `sum_of(at)` is the sum of
// this block's split, rows counted first. With grid.z splits of the columns, whoever comes last adds them. All threads
// of the block call it, after a barrier.
template <class T, class Codes, int GROUP, int TILE_N, int ROWS, class Sums>
DEVICE void write_results(const GemmResults<T>& to, int first_row, int first_token, const Sums& sum_of) {
    const i64 tile_at = i64(blockIdx.y) * gridDim.x + blockIdx.x, all_tiles = i64(gridDim.x) * gridDim.y;
    const auto row_of = [first_row](int at) { return first_row + at % ROWS; };
    const auto token_of = [first_token](int at) { return first_token + at / ROWS; };
    const auto is_there = [&](int at) { return row_of(at) < to.rows && token_of(at) < to.tokens; };
    const auto finish = [&](int at, float total) {
        const int row = row_of(at), token = token_of(at);
        if constexpr (Codes::has_scales && GROUP == 0) total *= to.scales[row] * Codes::unit(T{});
        if (to.bias) total += to_float(to.bias[row]);
        if (to.residual) total += to_float(to.residual[i64(token) * to.rows + row]);
        to.out[i64(token) * to.rows + row] = rounded<T>(total);
    };
    for (int at = threadIdx.x; at < TILE_N * ROWS; at += blockDim.x) {
        if (!is_there(at)) continue;
        const float total = sum_of(at);
        if (gridDim.z == 1) finish(at, total);
        else to.partial[(blockIdx.z * all_tiles + tile_at) * TILE_N * ROWS + at] = total;
    }
    if (gridDim.z == 1) return;

    // The fence makes this block's part visible before it counts itself.
    prim_fence();
    prim_sync_block();
    u32* arrived = reinterpret_cast<u32*>(prim_shared());
    if (threadIdx.x == 0) *arrived = prim_atomic_add(to.counters + tile_at, 1u);
    prim_sync_block();
    if (*arrived != gridDim.z - 1) return;
    prim_fence();
    for (int at = threadIdx.x; at < TILE_N * ROWS; at += blockDim.x) {
        if (!is_there(at)) continue;
        float total = 0.0f;
        for (unsigned split = 0; split < gridDim.z; ++split)
            total += prim_load_past_l1(to.partial + (split * all_tiles + tile_at) * TILE_N * ROWS + at);
        finish(at, total);
    }
    if (threadIdx.x == 0) to.counters[tile_at] = 0;
}
