// append_kv: write one step's keys and values into the paged KV cache, in place.
//
//   k_new, v_new      [tokens, row]               T, rows `k_stride` and `v_stride` elements apart
//   slots             [tokens]                    int64, block * block_size + offset; -1 skips
//   k_cache, v_cache  [blocks, block_size, row]   T, contiguous, row = kv_heads * head_dim
//
// Requires    row % 8 == 0; strides % 8 == 0; slots distinct, or which token wins is unspecified.
// Launch      one warp a token, four a block; 16-byte loads and stores, no shared memory.
// Cost        memory bound: 8 * tokens * row bytes (K and V, read and written).
// Reference   tests/cuda/test_elementwise.py, torch.Tensor.index_copy_, equal bit for bit.

#include "prim.cuh"
#include "vectors.cuh"

template <class T>
__global__ void __launch_bounds__(128) append_kv(const T* k_new, const T* v_new, const i64* slots, T* k_cache,
                                                 T* v_cache, int tokens, int row, i64 k_stride, i64 v_stride) {
    const int token = blockIdx.x * (blockDim.x / warp_lanes) + threadIdx.x / warp_lanes;
    if (token >= tokens) return;
    const i64 slot = slots[token];
    if (slot < 0) return;
    for (int at = 8 * (threadIdx.x % warp_lanes); at < row; at += 8 * warp_lanes) {
        store(k_cache + slot * row + at, load(k_new + token * k_stride + at));
        store(v_cache + slot * row + at, load(v_new + token * v_stride + at));
    }
}
