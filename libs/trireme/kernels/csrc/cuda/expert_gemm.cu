// expert_gemm: tokens times the weights of the experts that they chose, transposed; all experts in one launch.
//
//   words     [experts]                          layout direct_v1 of (rows, columns), or fragments of 16 bits (Plain)
//   scales    [experts, rows padded, groups]     float, as of low_bit_gemm; null with Plain
//   zeros     [experts, rows padded, groups]     uint8, or null
//   x         [tokens, columns]                  T, contiguous
//   sources   [positions]                        int32, row of x; null: the position itself
//   targets   [positions]                        int32, row of out; null: the position itself
//   tiles     [grid.x, 3]                        int32, of group_by_expert: expert, begin, end; expert -1: nothing
//   out       [positions, rows]                  T, contiguous
//
// Requires    columns % 8 == 0; a tile has at most TILE_N positions; targets distinct.
// Launch      grid (tiles, rows padded / 64) of 128 threads: blocks of the same weights run beside each other, so that
//             memory is read once and the rest comes from L2. Shared memory: as low_bit_gemm; with Plain two stages
//             of 8192 + TILE_N * 128 bytes a warp; then 4 * TILE_N bytes.
// Invariant   the order of a token's sums depends on the columns alone, so its result not on other tokens.
// Cost        memory bound up to tens of tokens an expert: bits / 8 * rows * columns bytes for each expert that was
//             chosen; 2 * positions * rows * columns FLOP.
// Reference   tests/cuda/test_experts.py, float64.
// Source      Rajbhandari et al., DeepSpeed-MoE, ICML 2022; Gale et al., MegaBlocks, MLSys 2023 (ragged groups).

#include "gemm_tiles.cuh"

// Where a block's tokens are in the activations: a list in shared memory, -1 where there is none.
struct ListedRows {
    const int* rows;

    DEVICE int operator()(int token) const { return rows[token]; }
};

template <class T, class Codes, int GROUP, int TILE_N>
__global__ void __launch_bounds__(gemm_warps* warp_lanes)
    expert_gemm(const u32* words, const float* scales, const u8* zeros, const T* x, const int* sources,
                const int* targets, const int* tiles, T* out, int rows, int columns) {
    using Stages = GemmStages<T, Codes, TILE_N>;
    const int expert = tiles[3 * blockIdx.x];
    if (expert < 0) return;
    const int begin = tiles[3 * blockIdx.x + 1], end = tiles[3 * blockIdx.x + 2];
    int* listed = reinterpret_cast<int*>(prim_shared() + gemm_warps * Stages::count * Stages::stage_bytes);
    if (threadIdx.x < TILE_N) {
        const int position = begin + threadIdx.x;
        listed[threadIdx.x] = position >= end ? -1 : sources ? sources[position] : position;
    }
    prim_sync_block();

    const int column_tiles = ceil_div(columns, tile_columns);
    const i64 expert_tiles = i64(gridDim.y) * column_tiles;
    const i64 first_factor = expert * i64(gridDim.y) * tile_rows * groups_of<GROUP>(column_tiles);
    const GemmOperands<T, ListedRows> operands = {
        words + expert * expert_tiles * tile_slices * warp_lanes * Codes::lane_words, x, columns,
        static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y), column_tiles, columns, {listed}};
    if (Codes::has_scales) scales += first_factor;
    if (zeros) zeros += first_factor;
    multiply_tiles<T, Codes, GROUP, TILE_N>(operands, scales, zeros, 0, column_tiles);

    for (int at = threadIdx.x; at < TILE_N * tile_rows; at += blockDim.x) {
        const int row = blockIdx.y * tile_rows + at % tile_rows, position = begin + at / tile_rows;
        if (row >= rows || position >= end) continue;
        float total = WarpSums<TILE_N>::total(at);
        if constexpr (Codes::has_scales && GROUP == 0) total *= scales[row] * Codes::unit(T{});
        out[i64(targets ? targets[position] : position) * rows + row] = rounded<T>(total);
    }
}
