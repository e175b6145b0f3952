// combine_experts: what a token's experts made of it, weighted, plus residual.
//
//   made       [tokens, chosen, width]   T, contiguous
//   shares     [tokens, chosen]          T, contiguous
//   residual   [tokens, width]           T, contiguous
//   out        [tokens, width]           T, contiguous
//
// Requires    width % 8 == 0.
// Launch      256 threads a block, one 16-byte piece of the output a thread.
// Invariant   experts are added in the order of `made`, in float32, and rounded once.
// Cost        memory bound: 2 * (chosen + 2) bytes an element of the output.
// Reference   tests/cuda/test_experts.py, float64.

#include "prim.cuh"
#include "vectors.cuh"

template <class T>
__global__ void __launch_bounds__(256)
    combine_experts(const T* made, const T* shares, const T* residual, T* out, i64 tokens, int width, int chosen) {
    const int pieces = width / 8;
    const i64 item = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= tokens * pieces) return;
    const i64 token = item / pieces;
    const int at = 8 * static_cast<int>(item % pieces);
    const Vector<T> kept = load(residual + token * width + at);
    float sums[8];
    for (int i = 0; i < 8; ++i) sums[i] = kept.get(i);
    for (int choice = 0; choice < chosen; ++choice) {
        const i64 row = token * chosen + choice;
        const float share = to_float(shares[row]);
        const Vector<T> values = load(made + row * width + at);
        for (int i = 0; i < 8; ++i) sums[i] += share * values.get(i);
    }
    Vector<T> sum{};
    for (int i = 0; i < 8; ++i) sum.set(i, sums[i]);
    store(out + token * width + at, sum);
}
