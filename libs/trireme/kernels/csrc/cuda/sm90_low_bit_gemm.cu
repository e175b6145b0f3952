// sm90_low_bit_gemm: what low_bit_gemm computes, for many tokens, on the tensor cores of compute capability 9.0 alone.
//
//   words, scales, zeros, x, bias, residual, out    as of low_bit_gemm
//   partial    [grid.z, grid.y, grid.x, TILE_N, 192]  float; only if grid.z > 1
//   counters   [grid.y, grid.x]                       uint32, all 0 before and after; only if grid.z > 1
//
// Requires    as low_bit_gemm. TILE_N 64, or 128 without groups.
// Launch      grid (ceil(row tiles of 64 / 3), ceil(tokens / TILE_N), splits of the columns) of 384 threads: three
//             warpgroups, each with 64 rows, share the tokens. Shared memory: 4 stages * (TILE_N * 128 + 3 * bytes of
//             64 x 64 codes) + TILE_N * 784.
// Invariant   a token's sums are added in the order of low_bit_gemm with the same grid.z.
// Cost        2 * tokens * rows * columns FLOP, and b / 8 * rows * columns bytes of weights of b bits. At an H200's 990
//             TFLOP/s and 4.8 TB/s the product takes longer than reading from 52 tokens on with 4 bits, 77 with 6, 103
//             with 8; by mma.sync, at 60 % of that rate, from 31, 46 and 62 (cuda_linear.WGMMA_TOKENS).
//             To read a tile of codes and TILE_N tokens takes 3 * 512 * b + TILE_N * 128 bytes of L2 for 3 * 8192 *
//             TILE_N FLOP: with 6 bits 33 bytes a cycle and multiprocessor at the full rate, where low_bit_gemm with
//             its 32 tokens a block would ask for 112.
// Registers   of 168: 64 accumulators with TILE_N 128, 32 of a group and 32 of the columns so far with TILE_N 64.
//             TILE_N 256 would take 128 accumulators and leave no room for a third warpgroup, which saves more bytes.
//             The sums of earlier turns are in shared memory, touched four times a split.
// Reference   tests/cuda/test_warpgroup_gemm.py, float64, and the bits of low_bit_gemm.
// Source      Xia et al., Quant-LLM, USENIX ATC 2024 (decoding beside the tensor cores); PTX ISA 9.0, wgmma.

#include "gemm_results.cuh"
#include "warpgroup_tiles.cuh"

template <class T, class Codes, int GROUP, int TILE_N>
__global__ void __launch_bounds__(block_threads, 1)
    sm90_low_bit_gemm(const u32* words, const float* scales, const u8* zeros, const T* x, const T* bias,
                      const T* residual, T* out, float* partial, u32* counters, int tokens, int rows, int columns,
                      i64 x_stride) {
    const int tiles = ceil_div(columns, tile_columns), first_token = blockIdx.y * TILE_N;
    const int begin = static_cast<int>(i64(tiles) * blockIdx.z / gridDim.z);
    const int end = static_cast<int>(i64(tiles) * (blockIdx.z + 1) / gridDim.z);
    const int row_tiles = ceil_div(rows, tile_rows), own = blockIdx.x * block_groups + threadIdx.x / warpgroup_threads;
    // Where the rows end, a warpgroup repeats the last ones, so that all stay together; nobody asks for its sums.
    const GemmOperands<T, RowsInTurn> operands = {
        words, x, x_stride, min(own, row_tiles - 1), row_tiles, tiles, columns, {first_token, tokens}};
    multiply_by_warpgroups<T, Codes, GROUP, TILE_N>(operands, scales, zeros, begin, end);

    using Sums = BlockSums<SharedStages<T, Codes, TILE_N>, TILE_N>;
    write_results<T, Codes, GROUP, TILE_N, block_rows>({scales, bias, residual, out, partial, counters, tokens, rows},
                                                       blockIdx.x * block_rows, first_token,
                                                       [](int at) { return Sums::of(at); });
}
