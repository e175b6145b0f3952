// rms_norm: scale each row to unit root mean square, times a weight; before that, add it to the residual.
//
//   x         [rows, width]          T; rows `x_stride` elements apart
//   residual  [rows, width]          T, contiguous, or null; becomes T(residual + x), which is then normalised
//   weight    [weight_rows, width]   T, contiguous; row r takes weight row r % weight_rows
//   out       [rows, width]          T, contiguous
//
// Requires    width % 8 == 0; x_stride % 8 == 0.
// Launch      WARPS warps a row, 8 / WARPS rows a block of 256 threads, 16-byte loads and stores.
// Cost        memory bound: 4 (with residual 8) bytes an element of 16 bits; the second read is served by L1 and L2.
// Reference   tests/cuda/test_elementwise.py, float64.

#include "prim.cuh"
#include "vectors.cuh"
#include "warp_reductions.cuh"

template <class T, int WARPS>
__global__ void __launch_bounds__(256) rms_norm(const T* x, T* residual, const T* weight, T* out, int rows, int width,
                                                i64 x_stride, int weight_rows, float eps) {
    constexpr int threads = WARPS * warp_lanes;
    const int row = blockIdx.x * (8 / WARPS) + threadIdx.x / threads, thread = threadIdx.x % threads;
    const bool is_row = row < rows;
    const T* from = x + row * x_stride;
    T* sums = residual ? residual + i64(row) * width : nullptr;

    float squares = 0.0f;
    for (int at = 8 * thread; is_row && at < width; at += 8 * threads) {
        Vector<T> values = load(from + at);
        if (sums) {
            const Vector<T> others = load(sums + at);
            for (int i = 0; i < 8; ++i) values.set(i, values.get(i) + others.get(i));
            store(sums + at, values);
        }
        for (int i = 0; i < 8; ++i) squares += values.get(i) * values.get(i);
    }
    squares = block_sum<WARPS>(squares, reinterpret_cast<float*>(prim_shared()));
    const float factor = rsqrtf(squares / width + eps);

    const T* normal = sums ? sums : from;
    for (int at = 8 * thread; is_row && at < width; at += 8 * threads) {
        const Vector<T> values = load(normal + at), weights = load(weight + i64(row % weight_rows) * width + at);
        Vector<T> scaled{};
        for (int i = 0; i < 8; ++i) scaled.set(i, values.get(i) * factor * weights.get(i));
        store(out + i64(row) * width + at, scaled);
    }
}
