// host_gemv: a few tokens times a weight matrix, transposed, plus bias, plus residual; the matrix may lie in pinned
// host memory, where it is read in place, once.
//
//   weight     [rows, columns]     T, contiguous; on the device, or host memory that is mapped for it
//   x          [tokens, columns]   T, on the device, tokens `x_stride` elements apart
//   bias       [rows]              T, or null
//   residual   [tokens, rows]      T, contiguous, or null
//   out        [tokens, rows]      T, contiguous
//
// Requires    columns % 8 == 0; x_stride % 8 == 0; tokens <= TOKENS.
// Launch      a warp a row, four a block of 128 threads, no shared memory. A lane asks for four pieces of 16 bytes of
//             the matrix before it uses the first: 2 KiB a warp, so some tens of warps cover the link's latency.
// Invariant   the order of a token's sums depends on columns alone, so its result not on other tokens.
// Cost        link bound: 2 * rows * columns bytes, whatever the tokens; at 55 GB/s (16 lanes of PCIe 5) 8192 x 8192
//             takes 2.4 ms. That is what copying it takes, which is why more than TOKENS tokens, or a second use,
//             are a reason to copy.
// Reference   tests/cuda/test_host_memory.py, float64.
// Source      Jeong et al., DeepPlan, EuroSys 2023 (direct host access); DeepSpeed-Inference, SC 2022 (small batches).

#include "prim.cuh"
#include "vectors.cuh"
#include "warp_reductions.cuh"

template <class T, int TOKENS>
__global__ void __launch_bounds__(128)
    host_gemv(const T* weight, const T* x, const T* bias, const T* residual, T* out, int tokens, int rows, int columns,
              i64 x_stride) {
    constexpr int pieces = 4, step = 8 * warp_lanes;
    const int lane = threadIdx.x % warp_lanes;
    const int row = blockIdx.x * (blockDim.x / warp_lanes) + threadIdx.x / warp_lanes;
    if (row >= rows) return;
    const T* from = weight + i64(row) * columns;

    float sums[TOKENS] = {};
    for (int base = 8 * lane; base < columns; base += pieces * step) {
        Vector<T> weights[pieces];
#pragma unroll
        for (int i = 0; i < pieces; ++i) weights[i] = base + i * step < columns ? load(from + base + i * step) : Vector<T>{};
#pragma unroll
        for (int i = 0; i < pieces; ++i) {
            if (base + i * step >= columns) continue;
#pragma unroll
            for (int token = 0; token < TOKENS; ++token) {
                if (token >= tokens) continue;
                const Vector<T> values = load(x + token * x_stride + base + i * step);
                for (int k = 0; k < 8; ++k) sums[token] += weights[i].get(k) * values.get(k);
            }
        }
    }
    float total = 0.0f;
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        const float sum = warp_sum(sums[token]);
        total = token == lane ? sum : total;
    }
    if (lane >= tokens) return;
    if (bias) total += to_float(bias[row]);
    if (residual) total += to_float(residual[i64(lane) * rows + row]);
    out[i64(lane) * rows + row] = rounded<T>(total);
}
