// Sixteen rows of attention in the registers of a warp: which keys they see, their scores, sums and outputs.
//
// A lane has parts of two rows, lane / 4 and lane / 4 + 8, called halves; the four lanes of a quad share a row.

#pragma once

#include "prim.cuh"

DEVICE float minus_infinity() { return prim_bits_float(0xFF800000u); }

// 2**(value - maximum); 0 where nothing was seen yet, so that the maximum is still -infinity.
DEVICE float exp2_below(float value, float maximum) {
    return maximum == minus_infinity() ? 0.0f : prim_exp2(value - maximum);
}

DEVICE float quad_max(float value) {
    value = fmaxf(value, prim_shuffle_xor(value, 1));
    return fmaxf(value, prim_shuffle_xor(value, 2));
}
DEVICE float quad_sum(float value) {
    value += prim_shuffle_xor(value, 1);
    return value + prim_shuffle_xor(value, 2);
}

// From dot products to exponents of 2.
struct ScoreScale {
    float scale, soft_cap;

    DEVICE float operator()(float product) const {
        constexpr float log2_e = 1.4426950408889634f;
        const float score = product * scale;
        return log2_e * (soft_cap > 0.0f ? soft_cap * tanhf(score / soft_cap) : score);
    }
};

// The queries of one sequence: `before` tokens are in the cache from earlier steps.
struct Queries {
    int first_token, num_rows, group, before, window;
    const u64* tree_masks;

    // The j-th token's place in the text: in a tree its depth counts, not its place in the batch.
    DEVICE int position(int j) const {
        return before + (tree_masks ? prim_count_ones(tree_masks[first_token + j]) - 1 : j);
    }
    // First key that a row from `row` on may see, and one past the last that a row before `row_end` may.
    DEVICE int keys_begin(int row) const {
        const int lowest = before + (tree_masks ? 0 : row / group);
        return window > 0 ? max(0, lowest - window + 1) : 0;
    }
    DEVICE int keys_end(int row_end, int context) const {
        return tree_masks ? context : before + (min(row_end, num_rows) - 1) / group + 1;
    }
};

// What one row sees.
struct View {
    int begin, end;  // keys from begin to end - 1, all of them
    u64 tree;        // and of the sequence's tokens in this step these

    DEVICE void start(const Queries& queries, int row) {
        const int j = row / queries.group;
        const bool is_row = row < queries.num_rows, is_tree = queries.tree_masks != nullptr;
        begin = is_row && queries.window > 0 ? queries.position(j) - queries.window + 1 : 0;
        end = !is_row ? 0 : is_tree ? queries.before : queries.before + j + 1;
        tree = is_row && is_tree ? queries.tree_masks[queries.first_token + j] : 0;
    }
    DEVICE bool sees(int key, const Queries& queries) const {
        if (key < end) return key >= begin;
        const int j = key - queries.before;
        return tree && j < 64 && (tree >> j & 1) && queries.position(j) >= begin;
    }
};

template <class T, int HEAD_DIM>
struct AttentionRows {
    u32 fragments[HEAD_DIM / 16][4];
    float out[HEAD_DIM / 8][4];
    float maximum[2], sum[2];
    View views[2];

    // Read rows warp_row .. warp_row + 15; `q` is the sequence's first token and the group's first head.
    DEVICE void start(const T* q, const Queries& queries, int warp_row, i64 q_stride, int lane) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + lane / 4 + 8 * half;
            const bool is_row = row < queries.num_rows;
            const T* from = q + row / queries.group * q_stride + row % queries.group * HEAD_DIM + lane % 4 * 2;
#pragma unroll
            for (int piece = 0; piece < HEAD_DIM / 16; ++piece)
#pragma unroll
                for (int side = 0; side < 2; ++side)
                    fragments[piece][half + 2 * side] =
                        is_row ? *reinterpret_cast<const u32*>(from + 16 * piece + 8 * side) : 0;
            maximum[half] = minus_infinity();
            sum[half] = 0.0f;
            views[half].start(queries, row);
        }
#pragma unroll
        for (int piece = 0; piece < HEAD_DIM / 8; ++piece)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[piece][i] = 0.0f;
    }

    // Take in the KEYS keys from `first` on. Rows of a tile behind the last key are zeros, and no view shows them.
    template <int KEYS>
    DEVICE void attend(const T* k, const T* v, int first, const Queries& queries, const ScoreScale& scale, int lane) {
        constexpr int row_elements = HEAD_DIM + 8;
        const int in_matrix = lane % 8, matrix = lane / 8;
        float scores[KEYS / 8][4] = {};
#pragma unroll
        for (int pair = 0; pair < KEYS / 16; ++pair) {
            const T* rows = k + (16 * pair + matrix / 2 * 8 + in_matrix) * row_elements + matrix % 2 * 8;
#pragma unroll
            for (int piece = 0; piece < HEAD_DIM / 16; ++piece) {
                u32 b[4];
                prim_ldmatrix(b, rows + 16 * piece);
                prim_mma(scores[2 * pair], fragments[piece], b[0], b[1], T{});
                prim_mma(scores[2 * pair + 1], fragments[piece], b[2], b[3], T{});
            }
        }
        weigh<KEYS>(scores, first, queries, scale, lane);
#pragma unroll
        for (int pair = 0; pair < KEYS / 16; ++pair) {
            const u32 weights[4] = {prim_pack(scores[2 * pair][0], scores[2 * pair][1], T{}),
                                    prim_pack(scores[2 * pair][2], scores[2 * pair][3], T{}),
                                    prim_pack(scores[2 * pair + 1][0], scores[2 * pair + 1][1], T{}),
                                    prim_pack(scores[2 * pair + 1][2], scores[2 * pair + 1][3], T{})};
            const T* rows = v + (16 * pair + matrix % 2 * 8 + in_matrix) * row_elements + matrix / 2 * 8;
#pragma unroll
            for (int piece = 0; piece < HEAD_DIM / 16; ++piece) {
                u32 b[4];
                prim_ldmatrix_transposed(b, rows + 16 * piece);
                prim_mma(out[2 * piece], weights, b[0], b[1], T{});
                prim_mma(out[2 * piece + 1], weights, b[2], b[3], T{});
            }
        }
    }

    // A lane summed its own weights; all lanes of a quad get the row's sum.
    DEVICE void share_sums() {
        sum[0] = quad_sum(sum[0]);
        sum[1] = quad_sum(sum[1]);
    }

    // Merge the four warps' results for the same rows into the first's, in their order. All threads of the block.
    DEVICE void merge_warps(float* shared, int lane, int warp) {
        constexpr int values = HEAD_DIM / 2 + 4;
        float* mine = shared + warp * values * warp_lanes + lane;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) mine[i * warp_lanes] = out[i / 4][i % 4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            mine[(HEAD_DIM / 2 + half) * warp_lanes] = maximum[half];
            mine[(HEAD_DIM / 2 + 2 + half) * warp_lanes] = sum[half];
        }
        prim_sync_block();
        if (warp != 0) return;
        for (int other = 1; other < 4; ++other) {
            const float* theirs = shared + other * values * warp_lanes + lane;
            float ours_by[2], theirs_by[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float their_maximum = theirs[(HEAD_DIM / 2 + half) * warp_lanes];
                const float merged = fmaxf(maximum[half], their_maximum);
                ours_by[half] = exp2_below(maximum[half], merged);
                theirs_by[half] = exp2_below(their_maximum, merged);
                sum[half] =
                    sum[half] * ours_by[half] + theirs[(HEAD_DIM / 2 + 2 + half) * warp_lanes] * theirs_by[half];
                maximum[half] = merged;
            }
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; ++i)
                out[i / 4][i % 4] =
                    out[i / 4][i % 4] * ours_by[i % 4 / 2] + theirs[i * warp_lanes] * theirs_by[i % 4 / 2];
        }
    }

    DEVICE void write(T* row, int half, int lane) const {
#pragma unroll
        for (int piece = 0; piece < HEAD_DIM / 8; ++piece)
            *reinterpret_cast<u32*>(row + 8 * piece + lane % 4 * 2) =
                prim_pack(out[piece][2 * half] / sum[half], out[piece][2 * half + 1] / sum[half], T{});
    }

    DEVICE void write_partial(float* row, int half, int lane) const {
#pragma unroll
        for (int piece = 0; piece < HEAD_DIM / 8; ++piece) {
            row[8 * piece + lane % 4 * 2] = out[piece][2 * half];
            row[8 * piece + lane % 4 * 2 + 1] = out[piece][2 * half + 1];
        }
    }

private:
    // Products to weights below 1, relative to the highest score so far; what went before shrinks accordingly.
    template <int KEYS>
    DEVICE void weigh(float (&scores)[KEYS / 8][4], int first, const Queries& queries, const ScoreScale& scale,
                      int lane) {
        float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
            const int key = first + i / 4 * 8 + lane % 4 * 2 + i % 2, half = i % 4 / 2;
            float& score = scores[i / 4][i % 4];
            score = views[half].sees(key, queries) ? scale(score) : minus_infinity();
            highest[half] = fmaxf(highest[half], score);
        }
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            highest[half] = quad_max(highest[half]);
            shrink[half] = exp2_below(maximum[half], highest[half]);
            maximum[half] = highest[half];
            sum[half] *= shrink[half];
        }
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
            float& score = scores[i / 4][i % 4];
            score = exp2_below(score, maximum[i % 4 / 2]);
            sum[i % 4 / 2] += score;
        }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) out[i / 4][i % 4] *= shrink[i % 4 / 2];
    }
};
