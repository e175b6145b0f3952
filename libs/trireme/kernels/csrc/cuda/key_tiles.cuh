// Tiles of keys and values in shared memory, copied from the pages of the cache two stages deep.

#pragma once

#include "kv_codes.cuh"
#include "prim.cuh"

// Keys that a block works on between two turns: four tiles of 16, one a warp, or one of 64 for all.
constexpr int keys_a_step = 64;

// Keys and values of one sequence and one key head. Keys from `end` on are not there.
struct PagedKeys {
    const u8 *k, *v;
    const int* blocks;
    int block_shift, kv_heads, kv_head, end;

    DEVICE i64 row(int position) const {
        const i64 block = blocks[position >> block_shift];
        return ((block << block_shift) + (position & ((1 << block_shift) - 1))) * kv_heads + kv_head;
    }
};

// A warp's own tiles if ROW_WARPS is 1, else the block's. The cache has rows of Stored: T, or codes of 8 bits, which
// become T on their way. Rows of a tile are 16 bytes longer than the head, so that the eight
// rows that ldmatrix reads at once lie in different banks.
template <class T, class Stored, int HEAD_DIM, int ROW_WARPS>
struct KeyTiles {
    static constexpr int tile = ROW_WARPS == 1 ? keys_a_step / 4 : keys_a_step;
    static constexpr int row_elements = HEAD_DIM + 8;
    static constexpr int threads = ROW_WARPS * warp_lanes;

    T* base;
    int thread;

    DEVICE KeyTiles(u8* shared, int lane, int warp)
        : base(reinterpret_cast<T*>(shared) + (ROW_WARPS == 1 ? warp * 4 * tile * row_elements : 0)),
          thread(ROW_WARPS == 1 ? lane : warp * warp_lanes + lane) {}

    DEVICE T* k(int stage) const { return base + 2 * stage * tile * row_elements; }
    DEVICE T* v(int stage) const { return k(stage) + tile * row_elements; }

    static DEVICE void sync() {
        if (ROW_WARPS == 1) prim_sync_warp();
        else prim_sync_block();
    }

    // Start to copy the tile whose first key is `first`: one group of copies, empty behind the end.
    DEVICE void fetch(int stage, const PagedKeys& cache, int first) const {
        if constexpr (sizeof(Stored) == sizeof(T)) copy(stage, cache, first);
        else decode(stage, cache, first);
        prim_copy_commit();
    }

private:
    DEVICE void copy(int stage, const PagedKeys& cache, int first) const {
        constexpr int pieces = HEAD_DIM / 8;
        for (int item = thread; first < cache.end && item < tile * pieces; item += threads) {
            const int key = item / pieces, at = 8 * (item % pieces);
            const bool is_there = first + key < cache.end;
            const i64 from = (is_there ? cache.row(first + key) * HEAD_DIM + at : 0) * i64(sizeof(T));
            prim_copy_async(k(stage) + key * row_elements + at, cache.k + from, is_there);
            prim_copy_async(v(stage) + key * row_elements + at, cache.v + from, is_there);
        }
    }

    // Rows of codes start at multiples of 4 bytes only, so they go through registers, four codes at a time.
    DEVICE void decode(int stage, const PagedKeys& cache, int first) const {
        constexpr int pieces = HEAD_DIM / 4;
        for (int item = thread; first < cache.end && item < tile * pieces; item += threads) {
            const int key = item / pieces, at = 4 * (item % pieces);
            const i64 row = first + key < cache.end ? cache.row(first + key) * coded_row_bytes<HEAD_DIM> : -1;
            decode_four(cache.k, row, at, k(stage) + key * row_elements + at);
            decode_four(cache.v, row, at, v(stage) + key * row_elements + at);
        }
    }

    static DEVICE void decode_four(const u8* cache, i64 row, int at, T* to) {
        u32 codes = 0;
        float scale = 0.0f;
        if (row >= 0) {
            codes = *reinterpret_cast<const u32*>(cache + row + at);
            scale = *reinterpret_cast<const float*>(cache + row + HEAD_DIM);
        }
        u32* words = reinterpret_cast<u32*>(to);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float low = Stored{static_cast<u8>(codes >> 16 * i)}.value() * scale;
            const float high = Stored{static_cast<u8>(codes >> (16 * i + 8))}.value() * scale;
            words[i] = prim_pack(low, high, T{});
        }
    }
};
