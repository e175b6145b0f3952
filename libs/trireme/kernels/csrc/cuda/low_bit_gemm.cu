// low_bit_gemm: activations times a weight matrix of 4, 6 or 8 bits, transposed, plus bias, plus residual.
//
//   words      layout direct_v1 of (rows, columns), both padded to multiples of 64, uint32
//   scales     [rows padded, groups]   float; groups is 1 (GROUP 0) or ceil(columns padded / GROUP); may be negative
//   zeros      [rows padded, groups]   uint8, or null: half the range; only of Int4
//   x          [tokens, columns]       T, tokens `x_stride` elements apart
//   bias       [rows]                  T, or null
//   residual   [tokens, rows]          T, contiguous, or null
//   out        [tokens, rows]          T, contiguous
//   partial    [grid.z, grid.y, grid.x, TILE_N, 64]  float; only if grid.z > 1
//   counters   [grid.y, grid.x]        uint32, all 0 before and after; only if grid.z > 1
//
// Requires    columns % 8 == 0; x_stride % 8 == 0; GROUP 32, 64 or 128 with Int4, else 0.
// Launch      grid (rows padded / 64, ceil(tokens / TILE_N), splits of the columns) of 128 threads. Each warp takes
//             every fourth tile of 64 columns, through stages of its own: no barrier of the block before the end.
//             Shared memory: 4 warps * stages * (bytes of 64 x 64 codes + TILE_N * 144); 4, 3, 2 stages for TILE_N
//             8, 16, 32.
// Invariant   the order of a token's sums depends on columns and grid.z alone, so its result not on other tokens.
//             Splits are summed in their order by whichever block comes last.
// Cost        memory bound up to tens of tokens: bits / 8 * rows * columns bytes; 2 * tokens * rows * columns FLOP.
// Reference   tests/cuda/test_low_bit_gemm.py, float64.
// Source      Xia et al., Quant-LLM, USENIX ATC 2024 (decoding beside the tensor cores); DeepSpeed-Inference, SC 2022
//             (small batches: split over outputs first, over inputs second).

#include "gemm_results.cuh"
#include "gemm_tiles.cuh"

template <class T, class Codes, int GROUP, int TILE_N>
__global__ void __launch_bounds__(gemm_warps* warp_lanes)
    low_bit_gemm(const u32* words, const float* scales, const u8* zeros, const T* x, const T* bias, const T* residual,
                 T* out, float* partial, u32* counters, int tokens, int rows, int columns, i64 x_stride) {
    const int tiles = ceil_div(columns, tile_columns), first_token = blockIdx.y * TILE_N;
    const int begin = static_cast<int>(i64(tiles) * blockIdx.z / gridDim.z);
    const int end = static_cast<int>(i64(tiles) * (blockIdx.z + 1) / gridDim.z);
    const GemmOperands<T, RowsInTurn> operands = {
        words, x, x_stride, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), tiles, columns,
        {first_token, tokens}};
    multiply_tiles<T, Codes, GROUP, TILE_N>(operands, scales, zeros, begin, end);

    write_results<T, Codes, GROUP, TILE_N, tile_rows>({scales, bias, residual, out, partial, counters, tokens, rows},
                                                      blockIdx.x * tile_rows, first_token,
                                                      [](int at) { return WarpSums<TILE_N>::total(at); });
}
