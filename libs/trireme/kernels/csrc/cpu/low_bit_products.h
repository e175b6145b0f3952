// Products of fixed-point activations and weights of 4 to 8 bits, written against the lanes of an instruction set.
//
// The codes' products are summed as integers, exactly, over a block of 64 inputs, or a span of 32 where 32 inputs
// share a scale. Each sum is then rounded to float and added to the output's total by one fused multiply-add with
// the activations' step (and the group's scale), block after block. So an output is the same bits however many
// rows, tiles, lanes or threads there are, for one row (`multiply_row`) and for many.
#pragma once

#include "decode.h"
#include "linear.h"

namespace trireme {
namespace {

template <Format kFormat>
constexpr int few_rows() {
    return kFormat == kInt4 || kFormat == kInt8 ? kFewRows : kFewFloatRows;
}

enum Scaling { kPerRow, kPerGroup, kPerSpan };  // kPerGroup: of 64 or 128 inputs

constexpr int kPanelBlocks = 4;  // 8 KiB of int16, which with the words and activations stays in a first-level cache

// Where the scales of a weight are.
struct Groups {
    int64_t per_tile;
    int shift;  // from the number of a span to that of its group

    explicit Groups(const Weight& weight) : per_tile(1), shift(0) {
        if (!weight.group) return;
        while (kSpan << shift < weight.group) ++shift;
        per_tile = (2 * blocks_of(weight.inputs) + (1 << shift) - 1) >> shift;
    }
    // Index of the 16 values of a tile's span in `scales` or `zeros`.
    int64_t at(int64_t tile, int64_t span) const { return (tile * per_tile + (span >> shift)) * kTile; }
};

inline Tables tables_of(const Weight& weight) {
    return {load_table(weight.power), load_table(weight.mantissa)};
}

// Minus the part of an int4 span's sum that zero points (8, without any) add, for `sum` of the activations.
template <bool kZeros>
inline Bits without_zeros(const uint8_t* zeros, int32_t sum) {
    if constexpr (kZeros) {
        return multiply32(load_unsigned_bytes(zeros), same32(-sum));
    } else {
        return all32(-8 * sum);
    }
}

// One row, one tile: weights go from memory through registers into the sum.
template <Format kFormat, Scaling kScaling, bool kZeros>
inline __attribute__((always_inline)) Reals multiply_row(const Weight& weight, int64_t tile, const int16_t* codes,
                                                         const float* steps, const int32_t* sums) {
    constexpr int64_t bytes = span_bytes<kFormat>();
    constexpr int kGroupsAtOnce = kScaling == kPerSpan ? 2 : 1;
    constexpr int kSums = kFormat == kFloat6 || kFormat == kFloat5 ? kFloatChains : kChains;
    const int64_t blocks = blocks_of(weight.inputs);
    const Groups groups(weight);
    const Tables tables = tables_of(weight);
    const uint8_t* words = weight.words + tile * blocks * 2 * bytes;
    const float* scales = weight.scales;
    const uint8_t* zeros = weight.zeros;
    Reals total = all(0.0f);
    for (int64_t block = 0; block < blocks; ++block) {
        const Reals step = all(steps[block]);
#pragma GCC unroll 2
        for (int part = 0; part < kGroupsAtOnce; ++part) {
            const int64_t group = groups.at(tile, 2 * block + part);
            Bits sum[kSums];
#pragma GCC unroll 4
            for (int chain = 0; chain < kSums; ++chain) sum[chain] = all32(0);
            if constexpr (kFormat == kInt4) {
                const int32_t of_part = kScaling == kPerSpan ? sums[2 * block + part] : sums[2 * block] + sums[2 * block + 1];
                sum[0] = without_zeros<kZeros>(kZeros ? zeros + group : nullptr, of_part);
            }
#pragma GCC unroll 2
            for (int span = 0; span < 2 / kGroupsAtOnce; ++span) {
                const int64_t index = 2 * block + part + span;
                const int16_t* x = codes + index * kSpan;
                const uint8_t* from = words + index * bytes;
#pragma GCC unroll 16
                for (int line = 0; line < bytes; line += 64) __builtin_prefetch(from + 2048 + line);
                decode_span<kFormat>(from, tables, [&](int pair, Bits decoded) __attribute__((always_inline)) {
                    Bits& chain = sum[pair % kSums];
                    chain = dot(chain, decoded, load_pair(x + 2 * pair));
                    settle(chain);
                });
            }
#pragma GCC unroll 4
            for (int chain = 1; chain < kSums; ++chain) sum[0] = add32(sum[0], sum[chain]);
            if constexpr (kScaling == kPerRow) {
                total = multiply_add(to_reals(sum[0]), step, total);
            } else {
                const Reals scale = multiply(load_reals(scales + group), step);
                total = multiply_add(to_reals(sum[0]), scale, total);
            }
        }
    }
    return total;
}

// Totals (rows, 16) of one tile for so few rows that decoding to memory would cost more than it saves.
template <Format kFormat, Scaling kScaling, bool kZeros, int kRows>
inline void multiply_few_rows(const Weight& weight, int64_t tile, const int16_t* codes, int64_t stride,
                              const float* steps, const int32_t* sums, float* totals) {
    constexpr int64_t bytes = span_bytes<kFormat>();
    constexpr int kGroupsAtOnce = kScaling == kPerSpan ? 2 : 1;
    const int64_t blocks = blocks_of(weight.inputs);
    const Groups groups(weight);
    const Tables tables = tables_of(weight);
    const uint8_t* words = weight.words + tile * blocks * 2 * bytes;
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) store_reals(totals + row * kTile, all(0.0f));
    for (int64_t block = 0; block < blocks; ++block) {
#pragma GCC unroll 2
        for (int part = 0; part < kGroupsAtOnce; ++part) {
            const int64_t group = groups.at(tile, 2 * block + part);
            Bits sum[kRows];
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row) {
                sum[row] = all32(0);
                if constexpr (kFormat == kInt4) {
                    const int32_t* of_row = sums + row * 2 * blocks + 2 * block;
                    const int32_t of_part = kScaling == kPerSpan ? of_row[part] : of_row[0] + of_row[1];
                    sum[row] = without_zeros<kZeros>(kZeros ? weight.zeros + group : nullptr, of_part);
                }
            }
#pragma GCC unroll 1
            for (int span = 0; span < 2 / kGroupsAtOnce; ++span) {
                const int64_t index = 2 * block + part + span;
                const int16_t* x = codes + index * kSpan;
                const uint8_t* from = words + index * bytes;
#pragma GCC unroll 16
                for (int line = 0; line < bytes; line += 64) __builtin_prefetch(from + 2048 + line);
                decode_span<kFormat>(from, tables, [&](int pair, Bits decoded) __attribute__((always_inline)) {
                    settle(decoded);
#pragma GCC unroll 8
                    for (int row = 0; row < kRows; ++row) {
                        sum[row] = dot(sum[row], decoded, load_pair(x + row * stride + 2 * pair));
                        settle(sum[row]);
                    }
                });
            }
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row) {
                Reals scale = all(steps[row * blocks + block]);
                if constexpr (kScaling != kPerRow) scale = multiply(load_reals(weight.scales + group), scale);
                float* total = totals + row * kTile;
                store_reals(total, multiply_add(to_reals(sum[row]), scale, load_reals(total)));
            }
        }
    }
}

// The same for `rows` rows, if they are few; false, and nothing is done, if they are not.
template <Format kFormat, Scaling kScaling, bool kZeros, int kRows = few_rows<kFormat>()>
inline bool multiply_if_few(int64_t rows, const Weight& weight, int64_t tile, const int16_t* codes, int64_t stride,
                            const float* steps, const int32_t* sums, float* totals) {
    if constexpr (kRows < 2) {
        return false;
    } else {
        if (rows != kRows) {
            return multiply_if_few<kFormat, kScaling, kZeros, kRows - 1>(rows, weight, tile, codes, stride, steps,
                                                                         sums, totals);
        }
        multiply_few_rows<kFormat, kScaling, kZeros, kRows>(weight, tile, codes, stride, steps, sums, totals);
        return true;
    }
}

// Decode blocks [first, last) of a tile to int16 pairs, zero points taken off.
template <Format kFormat, bool kZeros>
inline void decode_panel(const Weight& weight, int64_t tile, int64_t first, int64_t last, uint8_t* panel) {
    constexpr int64_t bytes = span_bytes<kFormat>();
    const int64_t blocks = blocks_of(weight.inputs);
    const Groups groups(weight);
    const Tables tables = tables_of(weight);
    for (int64_t span = 2 * first; span < 2 * last; ++span) {
        const uint8_t* from = weight.words + (tile * 2 * blocks + span) * bytes;
        Bits zero = all32(0x00080008);
        if constexpr (kZeros) {
            const Bits one = load_unsigned_bytes(weight.zeros + groups.at(tile, span));
            zero = bit_or(one, shift_left32<16>(one));
        }
#pragma GCC unroll 16
        for (int line = 0; line < bytes; line += 64) __builtin_prefetch(from + 2048 + line);
        decode_span<kFormat>(from, tables, [&](int pair, Bits decoded) __attribute__((always_inline)) {
            store(panel + 64 * pair, kFormat == kInt4 ? subtract16(decoded, zero) : decoded);
        });
        panel += 64 * 16;
    }
}

// Add blocks [first, last) of one tile to the totals of `kRows` rows; all pointers are the first row's. While it
// computes, it fetches what is to be decoded next: `next_bytes` of each pair from `next` on.
template <int kRows, Scaling kScaling>
inline void multiply_panel(const Weight& weight, int64_t tile, int64_t first, int64_t last, const uint8_t* panel,
                           const int16_t* codes, int64_t stride, const float* steps, float* totals,
                           const uint8_t* next, int64_t next_bytes) {
    constexpr int kPairs = kScaling == kPerSpan ? 16 : 32;
    const int64_t blocks = blocks_of(weight.inputs);
    const Groups groups(weight);
    for (int64_t pair = 32 * first; pair < 32 * last; pair += kPairs) {
        Bits sum[kRows];
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) sum[row] = all32(0);
        const int16_t* x = codes + 2 * pair;
#pragma GCC unroll 1
        for (int i = 0; i < kPairs; ++i) {
            __builtin_prefetch(next);
            next += next_bytes;
            Bits decoded = load(panel + 64 * i);
            settle(decoded);
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row) {
                sum[row] = dot(sum[row], decoded, load_pair(x + row * stride + 2 * i));
                settle(sum[row]);
            }
        }
        panel += 64 * kPairs;
        const int64_t block = pair / 32;
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            Reals scale = all(steps[row * blocks + block]);
            if constexpr (kScaling != kPerRow) {
                scale = multiply(load_reals(weight.scales + groups.at(tile, pair / 16)), scale);
            }
            float* total = totals + row * kTile;
            store_reals(total, multiply_add(to_reals(sum[row]), scale, load_reals(total)));
        }
    }
}

template <int kRows, Scaling kScaling>
inline void multiply_rows(int64_t rows, const Weight& weight, int64_t tile, int64_t first, int64_t last,
                          const uint8_t* panel, const int16_t* codes, int64_t stride, const float* steps,
                          float* totals, const uint8_t* next, int64_t next_bytes) {
    if constexpr (kRows > 0) {
        if (rows == kRows) {
            multiply_panel<kRows, kScaling>(weight, tile, first, last, panel, codes, stride, steps, totals, next,
                                            next_bytes);
        } else {
            multiply_rows<kRows - 1, kScaling>(rows, weight, tile, first, last, panel, codes, stride, steps, totals,
                                               next, next_bytes);
        }
    }
}

// Totals (rows, 16) of one tile; `panel` has room for kPanelBlocks.
template <Format kFormat, Scaling kScaling, bool kZeros>
inline void low_bit_totals(const Weight& weight, int64_t tile, const Activations& x, int64_t first_row,
                           int64_t last_row, uint8_t* panel, float* totals) {
    const int64_t blocks = blocks_of(weight.inputs), rows = last_row - first_row;
    const int16_t* codes = x.codes + first_row * x.stride;
    const float* steps = x.steps + first_row * blocks;
    const int32_t* sums = x.sums + first_row * 2 * blocks;
    if (rows == 1) {
        store_reals(totals, multiply_row<kFormat, kScaling, kZeros>(weight, tile, codes, steps, sums));
        return;
    }
    if (multiply_if_few<kFormat, kScaling, kZeros>(rows, weight, tile, codes, x.stride, steps, sums, totals)) return;
    for (int64_t i = 0; i < rows * kTile; i += kTile) store_reals(totals + i, all(0.0f));
    for (int64_t first = 0; first < blocks; first += kPanelBlocks) {
        const int64_t last = least(first + kPanelBlocks, blocks);
        decode_panel<kFormat, kZeros>(weight, tile, first, last, panel);
        const uint8_t* next = weight.words + (tile * blocks + last) * 2 * span_bytes<kFormat>();
        for (int64_t row = first_row; row < last_row; row += kRowsInRegisters) {
            multiply_rows<kRowsInRegisters, kScaling>(least(kRowsInRegisters, last_row - row), weight, tile, first,
                                                      last, panel, x.codes + row * x.stride, x.stride,
                                                      x.steps + row * blocks, totals + (row - first_row) * kTile,
                                                      next, row == first_row ? span_bytes<kFormat>() / 16 : 0);
        }
    }
}

}  // namespace
}  // namespace trireme
