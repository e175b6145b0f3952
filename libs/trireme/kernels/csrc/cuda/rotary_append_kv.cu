// rotary_append_kv: rotate queries and keys by their token's angles; write keys and values to the paged cache.
//
//   q           [tokens, heads, head_dim]              T, tokens `q_stride` elements apart
//   k, v        [tokens, kv_heads, head_dim]           T, tokens `k_stride` and `v_stride` elements apart
//   cos, sin    [tokens, head_dim]                     T, of each pair's angle, twice; sin negated in the first half
//   slots       [tokens]                               int64, block * block_size + offset; -1 skips
//   q_out       [tokens, heads, head_dim]              T, contiguous
//   k_cache, v_cache  [blocks, block_size, kv_heads, head_dim]  T, contiguous; not touched if kv_heads is 0
//
// Requires    head_dim % 16 == 0; strides % 8 == 0; slots distinct, or which token wins is unspecified.
// Launch      one block of 128 threads a token, 16-byte loads and stores. Pairs are (i, i + head_dim / 2).
// Cost        memory bound: each element is read and written once.
// Reference   tests/cuda/test_elementwise.py, float64.
// Source      Su et al., RoFormer, 2021; page layout after Kwon et al., SOSP 2023, section 4.

#include "prim.cuh"
#include "vectors.cuh"

// Rotate elements at .. at + 7 of one head and their partners half a head further.
template <class T>
DEVICE void rotate(const T* from, T* to, const T* cos, const T* sin, int at, int half) {
    const Vector<T> low = load(from + at), high = load(from + at + half);
    const Vector<T> cos_low = load(cos + at), cos_high = load(cos + at + half);
    const Vector<T> sin_low = load(sin + at), sin_high = load(sin + at + half);
    Vector<T> out_low{}, out_high{};
    for (int i = 0; i < 8; ++i) {
        out_low.set(i, low.get(i) * cos_low.get(i) + high.get(i) * sin_low.get(i));
        out_high.set(i, high.get(i) * cos_high.get(i) + low.get(i) * sin_high.get(i));
    }
    store(to + at, out_low);
    store(to + at + half, out_high);
}

template <class T>
__global__ void __launch_bounds__(128)
    rotary_append_kv(const T* q, const T* k, const T* v, const T* cos, const T* sin, const i64* slots, T* q_out,
                     T* k_cache, T* v_cache, int heads, int kv_heads, int head_dim, i64 q_stride, i64 k_stride,
                     i64 v_stride) {
    const i64 token = blockIdx.x;
    const int half = head_dim / 2, pieces = half / 8;
    cos += token * head_dim;
    sin += token * head_dim;
    for (int item = threadIdx.x; item < heads * pieces; item += blockDim.x) {
        const int head = item / pieces, at = 8 * (item % pieces);
        rotate(q + token * q_stride + head * head_dim, q_out + (token * heads + head) * head_dim, cos, sin, at, half);
    }
    if (kv_heads == 0) return;
    const i64 slot = slots[token];
    if (slot < 0) return;
    T* k_row = k_cache + slot * kv_heads * head_dim;
    T* v_row = v_cache + slot * kv_heads * head_dim;
    for (int item = threadIdx.x; item < kv_heads * pieces; item += blockDim.x) {
        const int head = item / pieces, at = 8 * (item % pieces);
        rotate(k + token * k_stride + head * head_dim, k_row + head * head_dim, cos, sin, at, half);
    }
    for (int at = 8 * threadIdx.x; at < kv_heads * head_dim; at += 8 * blockDim.x)
        store(v_row + at, load(v + token * v_stride + at));
}
