// Tiles of weight codes and activations in shared memory: a ring of stages that one warp fills and reads alone.

#pragma once

#include "prim.cuh"

constexpr int tile_rows = 64, tile_columns = 64, tile_slices = tile_columns / 16;

// Where a block's tokens are in the activations: one after the other, up to `end`.
struct RowsInTurn {
    int first, end;

    // The row of a token, -1: there is none.
    DEVICE int operator()(int token) const { return first + token < end ? first + token : -1; }
};

// The operands of a block: its 64 rows of codes, its tokens' activations.
template <class T, class Rows>
struct GemmOperands {
    const u32* words;
    const T* x;
    i64 x_stride;
    int row_tile, row_tiles, column_tiles, columns;
    Rows row_of;
};

// A stage is the codes of a tile, then the activations of TILE_N tokens, rows of 64 with 8 of padding, so that the
// eight rows that ldmatrix reads at once lie in different banks. Where codes leave no room for padding, piece p of 16
// bytes of token t lies at p ^ t % 8 instead, which takes more registers.
template <class T, class Codes, int TILE_N>
struct GemmStages {
    static constexpr bool is_wide = Codes::lane_words == 16;  // has as many bytes under way with two stages
    static constexpr int count = TILE_N == 8 && !is_wide ? 4 : TILE_N == 16 && !is_wide ? 3 : 2;
    static constexpr int x_row = tile_columns + (is_wide ? 0 : 8);
    static constexpr int head_words = tile_slices * Codes::head_words * warp_lanes;
    static constexpr int tail_words = tile_slices * Codes::tail_words * warp_lanes;
    static constexpr int stage_bytes = 4 * (head_words + tail_words) + 2 * TILE_N * x_row;

    u8* base;
    int lane;

    DEVICE u32* codes(int stage) const { return reinterpret_cast<u32*>(base + stage * stage_bytes); }
    DEVICE T* x(int stage) const { return reinterpret_cast<T*>(codes(stage) + head_words + tail_words); }

    // Start to copy a tile of columns, zeros where there are no tokens or columns: one group of copies.
    template <class Rows>
    DEVICE void fetch(int stage, const GemmOperands<T, Rows>& operands, int tile) const {
        const i64 at = i64(operands.row_tile) * operands.column_tiles + tile;
        const i64 all = i64(operands.row_tiles) * operands.column_tiles;
        copy_words<head_words>(codes(stage), operands.words + at * head_words);
        copy_words<tail_words>(codes(stage) + head_words, operands.words + all * head_words + at * tail_words);
#pragma unroll
        for (int piece = 0; piece < TILE_N / 4; ++piece) {
            const int token = 4 * piece + lane / 8, column = tile * tile_columns + lane % 8 * 8;
            const int row = operands.row_of(token);
            const bool is_there = row >= 0 && column < operands.columns;
            const i64 offset = is_there ? row * operands.x_stride + column : 0;
            prim_copy_async(x(stage) + x_offset(token, lane % 8), operands.x + offset, is_there);
        }
    }

    // The lane's words of one slice.
    DEVICE void read_codes(int stage, int slice, u32 (&words)[Codes::lane_words]) const {
        const u32* head = codes(stage) + slice * Codes::head_words * warp_lanes + lane;
        const u32* tail = codes(stage) + head_words + slice * Codes::tail_words * warp_lanes + lane;
#pragma unroll
        for (int i = 0; i < Codes::head_words; ++i) words[i] = head[i * warp_lanes];
#pragma unroll
        for (int i = 0; i < Codes::tail_words; ++i) words[Codes::head_words + i] = tail[i * warp_lanes];
    }

    // Activations of tokens 8 n to 8 n + 7 and 32 columns, as B fragments of two slices.
    DEVICE void read_activations(int stage, int half, u32 (&b)[TILE_N / 8][4]) const {
#pragma unroll
        for (int n = 0; n < TILE_N / 8; ++n)
            prim_ldmatrix(b[n], x(stage) + x_offset(8 * n + lane % 8, 4 * half + lane / 8));
    }

private:
    static DEVICE int x_offset(int token, int piece) {
        return token * x_row + (is_wide ? piece ^ token % 8 : piece) * 8;
    }

    template <int WORDS>
    DEVICE void copy_words(u32* to, const u32* from) const {
#pragma unroll
        for (int at = 0; at < WORDS; at += 4 * warp_lanes)
            prim_copy_async(to + at + 4 * lane, from + at + 4 * lane, true);
    }
};
