// paged_attention: causal attention of one step's queries over the paged KV cache, for decode, prefill and trees.
//
//   q            [tokens, heads, head_dim]                      T, tokens `q_stride` elements apart
//   k_cache, v_cache  [blocks, block_size, kv_heads, row]       contiguous, block_size = 1 << block_shift; row is
//                head_dim elements of T, or head_dim codes and a scale (kv_codes.cuh)
//   block_tables [sequences, table_width]                       int32, the blocks of each sequence in order
//   sequences    [sequences, 3]                                 int32: first token in q, tokens in q, in the cache
//   tiles        [grid.x, 2]                                    int32: sequence, the first of 16 * ROW_WARPS rows
//   tree_masks   [tokens]                                       uint64 or null: bit j of a token's mask says that it
//                sees the j-th of its sequence's tokens in q, an ancestor or itself; all see the earlier ones
//   out          [tokens, heads, head_dim]                      T, contiguous; written if grid.z is 1
//   partial      [splits, tokens, heads, head_dim]              float, not yet divided by the sums; written otherwise
//   partial_max, partial_sum  [splits, tokens, heads]           float, the maxima as exponents of 2
//
// A row is one query head of one token, token * (heads / kv_heads) + head within its group: the heads that share a
// key head share every load. With ROW_WARPS = 4 each warp has 16 rows of its own and all share the keys (prefill,
// trees); with 1 the four warps have the same 16 rows and take turns at the keys (decode).
//
// Requires    head_dim = HEAD_DIM, a multiple of 16 up to 128; q_stride % 8 == 0; trees of at most 64 tokens;
//             split_unit % 64 == 0; grid.z >= the splits of the longest sequence, and at most max_splits.
// Invariant   splits depend on a sequence's own length; tiles of keys and who takes them, on the position alone. So
//             a query's result does not depend on the batch, and prefill's not on how it is cut into chunks.
// Launch      grid (tiles, kv_heads, splits) of 128 threads; 512 * (head_dim + 8) bytes of shared memory.
// Cost        decode: memory bound, 4 (of codes 2) * keys * head_dim bytes a key head. Prefill: 4 * head_dim FLOP a
//             pair of query and key.
// Reference   tests/cuda/test_attention.py, float64.
// Source      Dao, FlashAttention-2, 2023 (online softmax); Kwon et al., SOSP 2023 (paging); Dao et al.,
//             Flash-Decoding, 2023 (splits); Miao et al., SpecInfer, ASPLOS 2024 (tree masks); Gemma 2, 2024 (soft
//             cap).

#include "attention_rows.cuh"
#include "key_tiles.cuh"

template <class T, class Stored, int HEAD_DIM, int ROW_WARPS>
__global__ void __launch_bounds__(128)
    paged_attention(const T* q, const u8* k_cache, const u8* v_cache, const int* block_tables, const int* sequences,
                    const int* tiles, const u64* tree_masks, T* out, float* partial, float* partial_max,
                    float* partial_sum, int heads, int kv_heads, int table_width, int block_shift, int window,
                    int split_unit, int max_splits, int tokens, i64 q_stride, float scale, float soft_cap) {
    const int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes;
    const int group = heads / kv_heads, kv_head = blockIdx.y, split = blockIdx.z;
    const int sequence = tiles[2 * blockIdx.x], block_row = tiles[2 * blockIdx.x + 1];
    const int first_token = sequences[3 * sequence], num_queries = sequences[3 * sequence + 1];
    const int context = sequences[3 * sequence + 2];
    const Queries queries = {first_token, num_queries * group, group, context - num_queries, window, tree_masks};

    const int split_keys = split_unit * ceil_div(context, split_unit * max_splits);
    const int end = min((split + 1) * split_keys, queries.keys_end(block_row + 16 * ROW_WARPS, context));
    const int begin = max(split * split_keys, queries.keys_begin(block_row) / keys_a_step * keys_a_step);

    const int warp_row = block_row + (ROW_WARPS == 1 ? 0 : 16 * warp);
    AttentionRows<T, HEAD_DIM> rows;
    rows.start(q + i64(first_token) * q_stride + kv_head * group * HEAD_DIM, queries, warp_row, q_stride, lane);
    const PagedKeys cache = {k_cache, v_cache, block_tables + i64(sequence) * table_width, block_shift, kv_heads,
                             kv_head, end};
    const KeyTiles<T, Stored, HEAD_DIM, ROW_WARPS> keys(prim_shared(), lane, warp);
    const ScoreScale scores = {scale, soft_cap};
    int first = begin + (ROW_WARPS == 1 ? warp * keys.tile : 0);
    keys.fetch(0, cache, first);
    for (int stage = 0; first < end; first += keys_a_step, stage ^= 1) {
        keys.fetch(stage ^ 1, cache, first + keys_a_step);
        prim_copy_wait<1>();
        keys.sync();
        rows.template attend<keys.tile>(keys.k(stage), keys.v(stage), first, queries, scores, lane);
        keys.sync();
    }
    prim_copy_wait<0>();
    prim_sync_block();

    rows.share_sums();
    if (ROW_WARPS == 1) rows.merge_warps(reinterpret_cast<float*>(prim_shared()), lane, warp);
    if (ROW_WARPS == 1 && warp != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp_row + lane / 4 + 8 * half;
        if (row >= queries.num_rows) continue;
        const i64 at = i64(first_token + row / group) * heads + kv_head * group + row % group;
        if (gridDim.z == 1) {
            rows.write(out + at * HEAD_DIM, half, lane);
            continue;
        }
        const i64 part = i64(split) * tokens * heads + at;
        rows.write_partial(partial + part * HEAD_DIM, half, lane);
        if (lane % 4 == 0) {
            partial_max[part] = rows.maximum[half];
            partial_sum[part] = rows.sum[half];
        }
    }
}

// Merge the splits of each row of out [num_rows, HEAD_DIM], in their order: when they ran does not matter. One warp
// a row, 128 threads a block.
template <class T, int HEAD_DIM>
__global__ void __launch_bounds__(128) merge_splits(const float* partial, const float* partial_max,
                                                    const float* partial_sum, T* out, i64 num_rows, int splits) {
    const i64 row = i64(blockIdx.x) * 4 + threadIdx.x / warp_lanes;
    if (row >= num_rows) return;
    float maximum = minus_infinity(), sum = 0.0f;
    for (int split = 0; split < splits; ++split) maximum = fmaxf(maximum, partial_max[split * num_rows + row]);
    for (int split = 0; split < splits; ++split)
        sum += partial_sum[split * num_rows + row] * exp2_below(partial_max[split * num_rows + row], maximum);
    for (int at = threadIdx.x % warp_lanes; at < HEAD_DIM; at += warp_lanes) {
        float total = 0.0f;
        for (int split = 0; split < splits; ++split) {
            const i64 part = split * num_rows + row;
            total += partial[part * HEAD_DIM + at] * exp2_below(partial_max[part], maximum);
        }
        out[row * HEAD_DIM + at] = rounded<T>(total / sum);
    }
}
