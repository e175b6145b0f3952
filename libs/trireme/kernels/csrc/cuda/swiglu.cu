// swiglu: silu(gate) * up.
//
//   gate_up   [tokens, 2 * width]   T, contiguous, gate first
//   out       [tokens, width]       T, contiguous
//
// Requires    width % 8 == 0.
// Launch      256 threads a block, one 16-byte piece of the output a thread.
// Cost        memory bound: 6 bytes an element of the output.
// Reference   tests/cuda/test_elementwise.py, float64.
// Source      Shazeer, GLU Variants Improve Transformer, 2020.

#include "prim.cuh"
#include "vectors.cuh"

template <class T>
__global__ void __launch_bounds__(256) swiglu(const T* gate_up, T* out, i64 tokens, int width) {
    constexpr float log2_e = 1.4426950408889634f;
    const int pieces = width / 8;
    const i64 item = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= tokens * pieces) return;
    const i64 token = item / pieces;
    const int at = 8 * static_cast<int>(item % pieces);
    const Vector<T> gate = load(gate_up + 2 * token * width + at), up = load(gate_up + (2 * token + 1) * width + at);
    Vector<T> product{};
    for (int i = 0; i < 8; ++i) product.set(i, gate.get(i) / (1.0f + prim_exp2(-log2_e * gate.get(i))) * up.get(i));
    store(out + token * width + at, product);
}
