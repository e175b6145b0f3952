// arithmetic: primitives one by one, for the emulator's own tests.

#include "prim.cuh"

// c [16, 8] += a [16, 16] b [8, 16]^T, the fragments by ldmatrix; b as it is, or transposed from [16, 8].
template <class T, bool B_IS_TRANSPOSED>
__global__ void multiply(const T* a, const T* b, float* c) {
    T* shared = reinterpret_cast<T*>(prim_shared());
    const int lane = threadIdx.x, row = lane % 8, matrix = lane / 8;
    for (int i = 0; i < 8; ++i) shared[8 * lane + i] = a[8 * lane + i];
    for (int i = 0; i < 4; ++i) shared[256 + 4 * lane + i] = b[4 * lane + i];
    prim_sync_warp();
    u32 a_words[4], b_words[4];
    prim_ldmatrix(a_words, shared + 16 * (row + matrix % 2 * 8) + matrix / 2 * 8);
    if (B_IS_TRANSPOSED) prim_ldmatrix_transposed(b_words, shared + 256 + 8 * (row + matrix % 2 * 8));
    else prim_ldmatrix(b_words, shared + 256 + 16 * row + matrix % 2 * 8);
    const int at = lane / 4 * 8 + lane % 4 * 2;
    float sums[4] = {c[at], c[at + 1], c[at + 64], c[at + 65]};
    prim_mma(sums, a_words, b_words[0], b_words[1], T{});
    for (int i = 0; i < 4; ++i) c[at + i / 2 * 64 + i % 2] = sums[i];
}

template <class T>
__global__ void convert(const float* from, T* to, float* back, int count) {
    for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < count; at += gridDim.x * blockDim.x) {
        to[at] = rounded<T>(from[at]);
        back[at] = to_float(to[at]);
    }
}

// Both halves of a b + c.
template <class T>
__global__ void multiply_add(const u32* a, const u32* b, const u32* c, u32* out) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    out[at] = prim_fma2(a[at], b[at], c[at], T{});
}
