// The product of 64 rows of codes a warpgroup and TILE_N tokens, which all warpgroups of a block share.
//
// Codes are decoded to the A fragments in registers, activations are B in shared memory. Sums are those of
// multiply_tiles: a warpgroup takes the tiles of columns of its first warp one after the other, then those of the
// second, and so on, and adds the four sums in that order. So a token has the same sums by either kernel.

#pragma once

#include "gemm_tiles.cuh"
#include "prim_sm90.cuh"

constexpr int block_groups = 3, block_rows = block_groups * tile_rows, block_threads = block_groups * warpgroup_threads;

// The tiles of columns from `begin` up to `end`: each fourth of them from the first on, then from the second, ...
struct TilesInTurn {
    int begin, end, turn, tile;

    static DEVICE TilesInTurn over(int begin, int end) { return {begin, end, 0, begin}; }
    DEVICE bool is_done() const { return tile >= end; }
    DEVICE void next() {
        tile += gemm_warps;
        if (tile >= end && turn + 1 < gemm_warps) tile = begin + ++turn;
    }
};

// A ring of stages that all threads of a block fill together: the activations of TILE_N tokens, 128 bytes each,
// swizzled, then a tile of codes of each warpgroup.
//
// A stage is filled again two tiles after it was used: by then its products are finished, though those of the tile
// between may not be.
template <class T, class Codes, int TILE_N>
struct SharedStages {
    static constexpr int count = 4, ahead = count - 2, x_bytes = TILE_N * 2 * tile_columns;
    static constexpr int head_words = tile_slices * Codes::head_words * warp_lanes;
    static constexpr int tail_words = tile_slices * Codes::tail_words * warp_lanes;
    static constexpr int code_bytes = 4 * (head_words + tail_words);
    static constexpr int bytes = count * (x_bytes + block_groups * code_bytes);

    u8* base;
    int group, thread;  // of the warpgroup

    DEVICE u8* x(int stage) const { return base + stage * x_bytes; }
    DEVICE u32* codes(int stage) const {
        return reinterpret_cast<u32*>(base + count * x_bytes + (stage * block_groups + group) * code_bytes);
    }

    // Start to copy a tile of columns, zeros where there are no tokens or columns: one group of copies.
    template <class Rows>
    DEVICE void fetch(int stage, const GemmOperands<T, Rows>& operands, int tile) const {
        const i64 at = i64(operands.row_tile) * operands.column_tiles + tile;
        const i64 all = i64(operands.row_tiles) * operands.column_tiles;
        copy_words<head_words>(codes(stage), operands.words + at * head_words);
        copy_words<tail_words>(codes(stage) + head_words, operands.words + all * head_words + at * tail_words);
        const int piece = thread % 8, column = tile * tile_columns + piece * 8;
        for (int token = (group * warpgroup_threads + thread) / 8; token < TILE_N; token += block_threads / 8) {
            const int row = operands.row_of(token);
            const bool is_there = row >= 0 && column < operands.columns;
            const i64 offset = is_there ? row * operands.x_stride + column : 0;
            prim_copy_async(x(stage) + token * 128 + (piece ^ token % 8) * 16, operands.x + offset, is_there);
        }
    }

    // The fragment of A of a slice, for the 16 rows of the warp.
    DEVICE void read_weights(int stage, int slice, const u32 (&offset)[2], u32 (&a)[4]) const {
        const int block = thread / warp_lanes, lane = thread % warp_lanes;
        const u32* head = codes(stage) + (slice * Codes::head_words + Codes::head_of(block)) * warp_lanes + lane;
        const u32* tail = codes(stage) + head_words + lane;
        u32 words[Codes::block_words];
#pragma unroll
        for (int i = 0; i < Codes::block_words; ++i)
            words[i] = tail[(slice * Codes::tail_words + block * Codes::block_words + i) * warp_lanes];
        Codes::decode(Codes::head_words ? *head : 0, words, block, offset, a);
    }

private:
    template <int WORDS>
    DEVICE void copy_words(u32* to, const u32* from) const {
#pragma unroll
        for (int at = 0; at < WORDS; at += 4 * warpgroup_threads)
            if (at + 4 * thread < WORDS) prim_copy_async(to + at + 4 * thread, from + at + 4 * thread, true);
    }
};

// Sums of [token TILE_N][row 192] in shared memory behind the stages; rows are padded against bank conflicts.
template <class Stages, int TILE_N>
struct BlockSums {
    static constexpr int padded_rows = block_rows + 4;

    // `at` counts rows first, then tokens.
    static DEVICE float& of(int at) {
        return reinterpret_cast<float*>(prim_shared() + Stages::bytes)[at / block_rows * padded_rows + at % block_rows];
    }
    // Where accumulator `i` of a thread belongs.
    static DEVICE int place(int i) {
        const int thread = threadIdx.x, lane = thread % warp_lanes;
        const int row = thread / warp_lanes * 16 + i / 2 % 2 * 8 + lane / 4;
        return (i / 4 * 8 + lane % 4 * 2 + i % 2) * block_rows + row;
    }
};

// Multiply the tiles of columns from `begin` up to `end` and leave the sums in shared memory, as BlockSums has them.
// With groups, codes are scaled; without, sums are left to be. All threads of the block call it; `operands` has the
// warpgroup's own row tile.
template <class T, class Codes, int GROUP, int TILE_N, class Rows>
DEVICE void multiply_by_warpgroups(const GemmOperands<T, Rows>& operands, const float* scales, const u8* zeros,
                                   int begin, int end) {
    constexpr bool has_groups = GROUP != 0;
    constexpr int groups_a_tile = GROUP == 32 ? 2 : 1, slices_a_group = tile_slices / groups_a_tile;
    using Stages = SharedStages<T, Codes, TILE_N>;
    using Sums = BlockSums<Stages, TILE_N>;
    const int group = threadIdx.x / warpgroup_threads, thread = threadIdx.x % warpgroup_threads;
    const i64 row = i64(operands.row_tile) * tile_rows + thread / warp_lanes * 16 + thread % warp_lanes / 4;
    const i64 groups = groups_of<GROUP>(operands.column_tiles);
    const Stages stages = {prim_shared(), group, thread};
#pragma unroll
    for (int i = 0; i < TILE_N / 2; ++i) Sums::of(Sums::place(i)) = 0.0f;

    TilesInTurn coming = TilesInTurn::over(begin, end);
#pragma unroll
    for (int ahead = 0; ahead < Stages::ahead; ++ahead, coming.next()) {
        if (!coming.is_done()) stages.fetch(ahead, operands, coming.tile);
        prim_copy_commit();
    }
    float sums[TILE_N / 2] = {}, group_sums[has_groups ? TILE_N / 2 : 1] = {};
    u32 a[2][4];
    for (int first = begin, stage = 0; first < min(begin + gemm_warps, end); ++first) {
        for (int tile = first; tile < end; tile += gemm_warps, stage = (stage + 1) % Stages::count) {
            RowFactors<T, Codes, 1> factors[groups_a_tile];  // asked for before the wait
#pragma unroll
            for (int i = 0; has_groups && i < groups_a_tile; ++i)
                factors[i].load(scales, zeros, row, groups, (tile * tile_columns + 32 * i) / (has_groups ? GROUP : 1));
            prim_copy_wait<Stages::ahead - 1>();
            prim_fence_proxy();
            prim_sync_block();
            if (!coming.is_done()) stages.fetch((stage + Stages::ahead) % Stages::count, operands, coming.tile);
            prim_copy_commit();
            coming.next();
            const u64 tokens = swizzled_matrix(prim_shared_address(stages.x(stage)));
#pragma unroll
            for (int slice = 0; slice < tile_slices; ++slice) {
                const RowFactors<T, Codes, 1>& factor = factors[slice / slices_a_group];
                const u64 columns = tokens + slice * (32 >> 4);
                u32 (&weights)[4] = a[slice % 2];
                prim_wgmma_wait<1>();  // for the product that has read these registers
                stages.read_weights(stage, slice, factor.offset[0], weights);
                prim_wgmma_fence(weights);
                if constexpr (has_groups)
                    prim_wgmma(group_sums, weights, columns, slice % slices_a_group != 0, T{});
                else prim_wgmma(sums, weights, columns, slice != 0 || tile != first, T{});
                prim_wgmma_commit();
                if constexpr (has_groups) {
                    if (slice % slices_a_group != slices_a_group - 1) continue;
                    prim_wgmma_wait<0>();
                    prim_wgmma_take(group_sums);
#pragma unroll
                    for (int i = 0; i < TILE_N / 2; ++i) sums[i] += factor.scale[0][i / 2 % 2] * group_sums[i];
                }
            }
        }
        if constexpr (!has_groups) {
            prim_wgmma_wait<0>();
            prim_wgmma_take(sums);
        }
#pragma unroll
        for (int i = 0; i < TILE_N / 2; ++i) {
            Sums::of(Sums::place(i)) += sums[i];
            if constexpr (has_groups) sums[i] = 0.0f;
        }
    }
    prim_copy_wait<0>();
    prim_sync_block();
}
