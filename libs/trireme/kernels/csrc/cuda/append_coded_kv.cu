// append_coded_kv: write one step's keys and values into a paged cache of 8 bits, in place.
//
//   k_new, v_new      [tokens, kv_heads, head_dim]   T, tokens `k_stride` and `v_stride` elements apart
//   slots             [tokens]                       int64, block * block_size + offset; -1 skips
//   k_cache, v_cache  [blocks, block_size, kv_heads, head_dim + 4]   bytes: codes, then the row's scale, float32
//
// Requires    head_dim % 4 == 0; slots distinct, or which token wins is unspecified.
// Launch      one warp a row of one token and head, four a block; no shared memory.
// Cost        memory bound: 3 bytes read and written an element.
// Reference   tests/cuda/test_coded_kv.py, kernels/kv_forms.py, equal bit for bit.

#include "kv_codes.cuh"
#include "prim.cuh"

template <class T, class Code>
DEVICE void append_row(const T* from, u8* to, int head_dim, int lane) {
    float peak = 0.0f;
    bool has_numbers = true;
    for (int at = lane; at < head_dim; at += warp_lanes) {
        const float magnitude = fabsf(to_float(from[at]));
        has_numbers &= magnitude == magnitude;
        peak = fmaxf(peak, magnitude);
    }
    for (int mask = warp_lanes / 2; mask > 0; mask /= 2) peak = fmaxf(peak, prim_shuffle_xor(peak, mask));
    has_numbers = prim_ballot(!has_numbers) == 0;
    float scale = peak == 0.0f ? 1.0f : prim_divide(peak, Code::largest);
    if (!has_numbers) scale = prim_bits_float(0x7FC00000u);
    for (int at = 4 * lane; at < head_dim; at += 4 * warp_lanes) {
        u32 codes = 0;
        for (int i = 0; i < 4; ++i) {
            const float scaled = prim_divide(to_float(from[at + i]), scale);
            const float clamped = scaled > Code::largest    ? Code::largest
                                  : scaled < -Code::largest ? -Code::largest
                                                            : scaled;
            codes |= static_cast<u32>(Code::of(clamped)) << 8 * i;
        }
        *reinterpret_cast<u32*>(to + at) = codes;
    }
    if (lane == 0) *reinterpret_cast<float*>(to + head_dim) = scale;
}

template <class T, class Code>
__global__ void __launch_bounds__(128)
    append_coded_kv(const T* k_new, const T* v_new, const i64* slots, u8* k_cache, u8* v_cache, int tokens,
                    int kv_heads, int head_dim, i64 k_stride, i64 v_stride) {
    const int lane = threadIdx.x % warp_lanes;
    const i64 item = i64(blockIdx.x) * (blockDim.x / warp_lanes) + threadIdx.x / warp_lanes;
    const i64 token = item / kv_heads, head = item % kv_heads;
    if (token >= tokens) return;
    const i64 slot = slots[token];
    if (slot < 0) return;
    const i64 row = (slot * kv_heads + head) * (head_dim + 4);
    append_row<T, Code>(k_new + token * k_stride + head * head_dim, k_cache + row, head_dim, lane);
    append_row<T, Code>(v_new + token * v_stride + head * head_dim, v_cache + row, head_dim, lane);
}
