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

#include "gemm_stages.cuh"
#include "weight_codes.cuh"

constexpr int gemm_warps = 4;

// Scales and zero points of a lane's eight rows, for the columns of one tile that share them.
template <class T, class Codes>
struct RowFactors {
    float scale[4][2];
    u32 offset[4][2];

    DEVICE void load(const float* scales, const u8* zeros, i64 first_row, i64 groups, i64 group) {
#pragma unroll
        for (int block = 0; block < 4; ++block)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const i64 at = (first_row + 16 * block + 8 * half) * groups + group;
                scale[block][half] = scales[at];
                if constexpr (Codes::has_zeros) offset[block][half] = Codes::offset(zeros ? zeros[at] : 8, T{});
            }
    }
};

template <class T, class Codes, int GROUP, int TILE_N>
__global__ void __launch_bounds__(gemm_warps* warp_lanes)
    low_bit_gemm(const u32* words, const float* scales, const u8* zeros, const T* x, const T* bias, const T* residual,
                 T* out, float* partial, u32* counters, int tokens, int rows, int columns, i64 x_stride) {
    constexpr bool has_groups = GROUP != 0;
    constexpr int groups_a_tile = GROUP == 32 ? 2 : 1, halves_a_group = 2 / groups_a_tile;
    using Stages = GemmStages<T, Codes, TILE_N>;
    const int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes;
    const int tiles = ceil_div(columns, tile_columns), first_token = blockIdx.y * TILE_N;
    const int end = static_cast<int>(i64(tiles) * (blockIdx.z + 1) / gridDim.z);
    const int begin = static_cast<int>(i64(tiles) * blockIdx.z / gridDim.z) + warp;
    const i64 groups = has_groups ? ceil_div(tiles * tile_columns, has_groups ? GROUP : 1) : 1;
    const GemmOperands<T> operands = {
        words,   x,           x_stride, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), tiles,
        columns, first_token, tokens};
    const Stages stages = {prim_shared() + warp * Stages::count * Stages::stage_bytes, lane};

    float sums[4][TILE_N / 8][4] = {};
#pragma unroll
    for (int ahead = 0; ahead < Stages::count - 1; ++ahead) {
        if (begin + ahead * gemm_warps < end) stages.fetch(ahead, operands, begin + ahead * gemm_warps);
        prim_copy_commit();
    }
    for (int tile = begin, stage = 0; tile < end; tile += gemm_warps, stage = (stage + 1) % Stages::count) {
        RowFactors<T, Codes> factors[groups_a_tile];  // asked for before the wait
#pragma unroll
        for (int group = 0; has_groups && group < groups_a_tile; ++group)
            factors[group].load(scales, zeros, i64(blockIdx.x) * tile_rows + lane / 4, groups,
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
                        u32 a[4];
                        Codes::decode(codes, block, factors[group].offset[block], a);
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

    // Sum the warps in their order, through shared memory: [warp][token][row], rows padded against bank conflicts.
    constexpr int padded_rows = tile_rows + 4;
    float* shared = reinterpret_cast<float*>(prim_shared());
#pragma unroll
    for (int i = 0; i < 2 * TILE_N; ++i) {
        const int block = i / (TILE_N / 2), n = i / 4 % (TILE_N / 8);
        const int row = 16 * block + lane / 4 + i % 4 / 2 * 8, token = 8 * n + lane % 4 * 2 + i % 2;
        shared[(warp * TILE_N + token) * padded_rows + row] = sums[block][n][i % 4];
    }
    prim_sync_block();
    const i64 tile_at = i64(blockIdx.y) * gridDim.x + blockIdx.x, all_tiles = i64(gridDim.x) * gridDim.y;
    const auto finish = [&](int at, float total) {
        const int row = blockIdx.x * tile_rows + at % tile_rows, token = first_token + at / tile_rows;
        if (row >= rows || token >= tokens) return;
        if (!has_groups) total *= scales[row] * Codes::unit(T{});
        if (bias) total += to_float(bias[row]);
        if (residual) total += to_float(residual[i64(token) * rows + row]);
        out[i64(token) * rows + row] = rounded<T>(total);
    };
    for (int at = threadIdx.x; at < TILE_N * tile_rows; at += blockDim.x) {
        float total = 0.0f;
        for (int other = 0; other < gemm_warps; ++other)
            total += shared[(other * TILE_N + at / tile_rows) * padded_rows + at % tile_rows];
        if (gridDim.z == 1) finish(at, total);
        else partial[(blockIdx.z * all_tiles + tile_at) * TILE_N * tile_rows + at] = total;
    }
    if (gridDim.z == 1) return;

    // Whoever comes last sums the splits. The fence makes this block's part visible before it counts itself.
    prim_fence();
    prim_sync_block();
    u32* arrived = reinterpret_cast<u32*>(prim_shared());
    if (threadIdx.x == 0) *arrived = prim_atomic_add(counters + tile_at, 1u);
    prim_sync_block();
    if (*arrived != gridDim.z - 1) return;
    prim_fence();
    for (int at = threadIdx.x; at < TILE_N * tile_rows; at += blockDim.x) {
        float total = 0.0f;
        for (unsigned split = 0; split < gridDim.z; ++split)
            total += prim_load_past_l1(partial + (split * all_tiles + tile_at) * TILE_N * tile_rows + at);
        finish(at, total);
    }
    if (threadIdx.x == 0) counters[tile_at] = 0;
}
