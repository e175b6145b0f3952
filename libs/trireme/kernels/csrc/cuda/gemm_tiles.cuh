// The product of 64 rows of codes and TILE_N tokens by one block: each warp takes every fourth tile of 64 columns,
// through stages of its own, then the warps' sums are added in their order.
//
// The order of a token's sums depends on the columns alone, so its result not on the other tokens.

#pragma once

#include "gemm_stages.cuh"
#include "weight_codes.cuh"

constexpr int gemm_warps = 4;

// Scales and zero points of a lane's rows, two of each block, for the columns of one tile that share them.
template <class T, class Codes, int BLOCKS>
struct RowFactors {
    float scale[BLOCKS][2];
    u32 offset[BLOCKS][2];

    DEVICE void load(const float* scales, const u8* zeros, i64 first_row, i64 groups, i64 group) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const i64 at = (first_row + 16 * block + 8 * half) * groups + group;
                scale[block][half] = scales[at];
                if constexpr (Codes::has_zeros) offset[block][half] = Codes::offset(zeros ? zeros[at] : 8, T{});
            }
    }
};

// Scales of one row.
template <int GROUP>
DEVICE i64 groups_of(int column_tiles) {
    return GROUP ? ceil_div(column_tiles * tile_columns, GROUP ? GROUP : 1) : 1;
}

// Sums of [row 64][token TILE_N] in shared memory, one such array a warp; rows are padded against bank conflicts.
template <int TILE_N>
struct WarpSums {
    static constexpr int padded_rows = tile_rows + 4;

    // The sum of all warps, in their order; `at` counts rows first, then tokens.
    static DEVICE float total(int at) {
        const float* sums = reinterpret_cast<const float*>(prim_shared());
        float total = 0.0f;
        for (int warp = 0; warp < gemm_warps; ++warp)
            total += sums[(warp * TILE_N + at / tile_rows) * padded_rows + at % tile_rows];
        return total;
    }
};

// Multiply the tiles of columns from `begin` up to `end` and leave the warps' sums in shared memory, as WarpSums
// reads them. With groups, codes are scaled; without, sums are left to be. All threads of the block call it.
template <class T, class Codes, int GROUP, int TILE_N, class Rows>
DEVICE void multiply_tiles(const GemmOperands<T, Rows>& operands, const float* scales, const u8* zeros, int begin,
                           int end) {
    constexpr bool has_groups = GROUP != 0;
    constexpr int groups_a_tile = GROUP == 32 ? 2 : 1, halves_a_group = 2 / groups_a_tile;
    using Stages = GemmStages<T, Codes, TILE_N>;
    const int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes;
    const i64 groups = groups_of<GROUP>(operands.column_tiles);
    const Stages stages = {prim_shared() + warp * Stages::count * Stages::stage_bytes, lane};
    begin += warp;

    float sums[4][TILE_N / 8][4] = {};
#pragma unroll
    for (int ahead = 0; ahead < Stages::count - 1; ++ahead) {
        if (begin + ahead * gemm_warps < end) stages.fetch(ahead, operands, begin + ahead * gemm_warps);
        prim_copy_commit();
    }
    for (int tile = begin, stage = 0; tile < end; tile += gemm_warps, stage = (stage + 1) % Stages::count) {
        RowFactors<T, Codes, 4> factors[groups_a_tile];  // asked for before the wait
#pragma unroll
        for (int group = 0; has_groups && group < groups_a_tile; ++group)
            factors[group].load(scales, zeros, i64(operands.row_tile) * tile_rows + lane / 4, groups,
                                (tile * tile_columns + 32 * group) / (has_groups ? GROUP : 1));
        prim_copy_wait<Stages::count - 2>();
        prim_sync_warp();
        const int next = tile + (Stages::count - 1) * gemm_warps;
        if (next < end) stages.fetch((stage + Stages::count - 1) % Stages::count, operands, next);
        prim_copy_commit();
#pragma unroll
        for (int group = 0; group < groups_a_tile; ++group) {
            float group_sums[4][TILE_N / 8][4] = {};
            float (&target)[4][TILE_N / 8][4] = has_groups ? group_sums : sums;
#pragma unroll
            for (int half = group * halves_a_group; half < (group + 1) * halves_a_group; ++half) {
                u32 b[TILE_N / 8][4];
                stages.read_activations(stage, half, b);
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    u32 codes[Codes::lane_words];
                    stages.read_codes(stage, 2 * half + side, codes);
#pragma unroll
                    for (int block = 0; block < 4; ++block) {
                        u32 tail[Codes::block_words], a[4];
#pragma unroll
                        for (int i = 0; i < Codes::block_words; ++i)
                            tail[i] = codes[Codes::head_words + block * Codes::block_words + i];
                        const u32 head = Codes::head_words ? codes[Codes::head_of(block)] : 0;
                        Codes::decode(head, tail, block, factors[group].offset[block], a);
#pragma unroll
                        for (int n = 0; n < TILE_N / 8; ++n)
                            prim_mma(target[block][n], a, b[n][2 * side], b[n][2 * side + 1], T{});
                    }
                }
            }
#pragma unroll
            for (int i = 0; has_groups && i < 2 * TILE_N; ++i) {
                const int block = i / (TILE_N / 2), n = i / 4 % (TILE_N / 8);
                sums[block][n][i % 4] += factors[group].scale[block][i % 4 / 2] * group_sums[block][n][i % 4];
            }
        }
    }
    prim_copy_wait<0>();
    prim_sync_block();

    float* shared = reinterpret_cast<float*>(prim_shared());
#pragma unroll
    for (int i = 0; i < 2 * TILE_N; ++i) {
        const int block = i / (TILE_N / 2), n = i / 4 % (TILE_N / 8);
        const int row = 16 * block + lane / 4 + i % 4 / 2 * 8, token = 8 * n + lane % 4 * 2 + i % 2;
        shared[(warp * TILE_N + token) * WarpSums<TILE_N>::padded_rows + row] = sums[block][n][i % 4];
    }
    prim_sync_block();
}
