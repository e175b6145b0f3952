// Products of fixed-point activations and weights of 4 to 8 bits with tile registers: the same sums, so the same bits, as
// low_bit_products.h.
//
// A tile instruction multiplies bytes. A code of 16 bits is 256 * high + low, high signed and low not, and the two sums
// of their products are exact, so 256 * the one + the other is the sum of the codes' products. Weights have 8 bits,
// but for fp6_e3m2 (multiples of its unit up to 448), whose own high and low bytes, both signed, take four products.
//
// Four inputs of an output share a lane. They lie in the order 0, 2, 1, 3, in which two decoded pairs give them.
#pragma once

#include "low_bit_products.h"
#include "tile_shapes.h"

namespace trireme {
namespace {

constexpr int64_t kSumsAt = 8 * 1024;     // in the thread's room: behind the panel of weights
constexpr int64_t kTotalsAt = 16 * 1024;  // behind two blocks' sums, of 3 tiles at most

// The 64 codes of a block in place to 64 upper bytes, then 64 lower ones.
inline void split_block(int16_t* codes) {
    const __m256i order = _mm256_setr_epi8(0, 4, 2, 6, 8, 12, 10, 14, 1, 5, 3, 7, 9, 13, 11, 15,  //
                                           0, 4, 2, 6, 8, 12, 10, 14, 1, 5, 3, 7, 9, 13, 11, 15);
    __m256i* at = reinterpret_cast<__m256i*>(codes);
    __m256i parts[4];
    for (int i = 0; i < 4; ++i) {
        parts[i] = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(_mm256_loadu_si256(at + i), order), 0xD8);
    }
    for (int i = 0; i < 2; ++i) {
        _mm256_storeu_si256(at + i, _mm256_permute2x128_si256(parts[2 * i], parts[2 * i + 1], 0x31));
        _mm256_storeu_si256(at + 2 + i, _mm256_permute2x128_si256(parts[2 * i], parts[2 * i + 1], 0x20));
    }
}

// Whether decoded weights can be beyond 8 bits; those of int4 and int8 cannot.
inline bool is_wide(const Weight& weight) {
    if (weight.format != kFloat6 && weight.format != kFloat5) return false;
    const int others = weight.format == kFloat6 ? 3 : 1;  // the bits of a code that the tables do not see
    for (int i = 0; i < 16; ++i) {
        const int power = weight.power[i] < 0 ? -weight.power[i] : weight.power[i];
        if (power * (weight.mantissa[i] | others) > 127) return true;
    }
    return false;
}

template <bool kWide>
constexpr int64_t block_bytes() {
    return kWide ? 2 * kTileBytes : kTileBytes;
}

// Decode blocks [first, last) of a tile to bytes, zero points taken off: of each block a tile register's content, and
// where weights are wide one more, of their upper bytes.
template <Format kFormat, bool kZeros, bool kWide>
inline void decode_bytes(const Weight& weight, int64_t tile, int64_t first, int64_t last, uint8_t* panel) {
    constexpr int64_t bytes = span_bytes<kFormat>();
    const int64_t blocks = blocks_of(weight.inputs);
    const Groups groups(weight);
    const Tables tables = tables_of(weight);
    const Same lower = same16(0x00FF);
    for (int64_t span = 2 * first; span < 2 * last; ++span) {
        const uint8_t* from = weight.words + (tile * 2 * blocks + span) * bytes;
        uint8_t* to = panel + (span / 2 - first) * block_bytes<kWide>() + span % 2 * (kTileBytes / 2);
        Bits zero = all32(0x00080008);
        if constexpr (kZeros) {
            const Bits one = load_unsigned_bytes(weight.zeros + groups.at(tile, span));
            zero = bit_or(one, shift_left32<16>(one));
        }
#pragma GCC unroll 16
        for (int line = 0; line < bytes; line += 64) __builtin_prefetch(from + 2048 + line);
        Bits even;
        decode_span<kFormat>(from, tables, [&](int pair, Bits decoded) __attribute__((always_inline)) {
            const Bits odd = kFormat == kInt4 ? subtract16(decoded, zero) : decoded;
            if (pair % 2 == 0) {
                even = odd;
                return;
            }
            uint8_t* row = to + kRowBytes * (pair / 2);
            store(row, bit_or(bit_and(even, lower), shift_left32<8>(bit_and(odd, lower))));
            if constexpr (kWide) {
                // The lower byte is signed, so half of 256 more before the upper one is taken.
                const Bits less = all32(static_cast<int32_t>(0xFF80FF80));
                store(row + kTileBytes, bit_or(shift_right16<8>(subtract16(even, less)),
                                               bit_and_not(subtract16(odd, less), lower)));
            }
        });
    }
}

// Sums of one block's products, or one span's, to `sums`: 256 times the first tile plus the second one; where weights
// are wide, 2^16 times the first, 256 times the second, plus the third. `kTurn` changes from one to the next, so that
// they find other registers.
template <bool kWide, int kTurn>
inline void sum_products(const uint8_t* panel, const uint8_t* codes, int64_t stride, uint8_t* sums) {
    load_tile<2>(panel, kRowBytes);
    load_tile<0>(codes, stride);
    load_tile<1>(codes + kBlock, stride);
    if constexpr (kWide) {
        load_tile<3>(panel + kTileBytes, kRowBytes);
        clear_tile<4>();
        clear_tile<5>();
        clear_tile<6>();
        dot_signed_tiles<4, 0, 3>();
        dot_signed_tiles<5, 0, 2>();
        dot_unsigned_tiles<6, 1, 2>();
        dot_unsigned_tiles<5, 1, 3>();
        store_tile<4>(sums, kRowBytes);
        store_tile<6>(sums + 2 * kTileBytes, kRowBytes);
        store_tile<5>(sums + kTileBytes, kRowBytes);
    } else {
        clear_tile<4 + 2 * kTurn>();
        clear_tile<5 + 2 * kTurn>();
        dot_signed_tiles<4 + 2 * kTurn, 0, 2>();
        dot_unsigned_tiles<5 + 2 * kTurn, 1, 2>();
        store_tile<4 + 2 * kTurn>(sums, kRowBytes);
        store_tile<5 + 2 * kTurn>(sums + kTileBytes, kRowBytes);
    }
}

// Add a block's sums to the totals of `rows` rows. `scales` are the group's, or null.
template <bool kWide>
inline void add_sums(const uint8_t* sums, const float* steps, int64_t blocks, const float* scales, int64_t rows,
                     float* totals) {
    for (int64_t row = 0; row < rows; ++row) {
        const uint8_t* at = sums + row * kRowBytes;
        Bits sum = load(at);
        if constexpr (kWide) sum = add32(shift_left32<8>(sum), load(at + kTileBytes));
        sum = add32(shift_left32<8>(sum), load(at + (kWide ? 2 : 1) * kTileBytes));
        Reals scale = all(steps[row * blocks]);
        if (scales) scale = multiply(load_reals(scales), scale);
        float* total = totals + row * kTile;
        store_reals(total, multiply_add(to_reals(sum), scale, load_reals(total)));
    }
}

// Add blocks [first, last) of one tile to the totals of `rows` rows; all pointers are the first row's. The sums of one
// block are added while the next one's are on their way.
template <bool kWide, Scaling kScaling>
inline void multiply_bytes_panel(const Weight& weight, int64_t tile, int64_t first, int64_t last, const uint8_t* panel,
                                 const uint8_t* codes, int64_t stride, const float* steps, int64_t rows, uint8_t* sums,
                                 float* totals) {
    constexpr int64_t kParts = kScaling == kPerSpan ? 2 : 1;  // of a block, each with its own scales
    constexpr int64_t kSumsBytes = (kWide ? 3 : 2) * kTileBytes;
    const int64_t blocks = blocks_of(weight.inputs);
    const Groups groups(weight);
    const auto add = [&](int64_t part) {
        const float* scales =
            kScaling == kPerRow ? nullptr : weight.scales + groups.at(tile, part * (2 / kParts));
        add_sums<kWide>(sums + part % 2 * kSumsBytes, steps + part / kParts, blocks, scales, rows, totals);
    };
    const int64_t first_part = first * kParts, last_part = last * kParts;
    for (int64_t part = first_part; part < last_part; ++part) {
        const int64_t block = part / kParts, half = part % kParts;
        const uint8_t* weights = panel + (block - first) * block_bytes<kWide>() + half * (kTileBytes / 2);
        const uint8_t* x = codes + block * 2 * kBlock + half * kSpan;
        if (part % 2 == 0) {
            sum_products<kWide, 0>(weights, x, stride, sums);
        } else {
            sum_products<kWide, 1>(weights, x, stride, sums + kSumsBytes);
        }
        if (part > first_part) add(part - 1);
    }
    add(last_part - 1);
}

// Totals (rows, 16) of one tile for rows [first_row, last_row), whose codes are split.
template <Format kFormat, Scaling kScaling, bool kZeros, bool kWide>
inline void tile_low_bit_totals(const Weight& weight, int64_t tile, const Activations& x, int64_t first_row,
                                int64_t last_row, uint8_t* room) {
    float* totals = reinterpret_cast<float*>(room + kTotalsAt);
    const int64_t blocks = blocks_of(weight.inputs), rows = last_row - first_row;
    const RowGroups groups(rows);
    for (int64_t row = 0; row < rows; ++row) store_reals(totals + row * kTile, all(0.0f));
    for (int64_t first = 0; first < blocks; first += kPanelBlocks) {
        const int64_t last = least(first + kPanelBlocks, blocks);
        decode_bytes<kFormat, kZeros, kWide>(weight, tile, first, last, room);
        for (int64_t row = 0; row < rows; row += groups.size) {
            const uint8_t* codes = reinterpret_cast<const uint8_t*>(x.codes + (first_row + row) * x.stride);
            multiply_bytes_panel<kWide, kScaling>(weight, tile, first, last, room, codes, 2 * x.stride,
                                                  x.steps + (first_row + row) * blocks, least(groups.size, rows - row),
                                                  room + kSumsAt, totals + row * kTile);
        }
    }
}

static_assert(kPanelBlocks * block_bytes<true>() <= kSumsAt && kSumsAt + 6 * kTileBytes <= kTotalsAt &&
                  kTotalsAt + kRowsAtOnce * kTile * sizeof(float) <= kWorkBytes,
              "panel, sums and totals fit the thread's room");

using TileTotals = void (*)(const Weight&, int64_t, const Activations&, int64_t, int64_t, uint8_t*);

inline TileTotals tile_totals_for(const Weight& weight) {
    switch (weight.format) {
        case kInt8:
            return tile_low_bit_totals<kInt8, kPerRow, false, false>;
        case kFloat6:
            return is_wide(weight) ? tile_low_bit_totals<kFloat6, kPerRow, false, true>
                                   : tile_low_bit_totals<kFloat6, kPerRow, false, false>;
        case kFloat5:
            return is_wide(weight) ? tile_low_bit_totals<kFloat5, kPerRow, false, true>
                                   : tile_low_bit_totals<kFloat5, kPerRow, false, false>;
        default:
            if (weight.group == kSpan) {
                return weight.zeros ? tile_low_bit_totals<kInt4, kPerSpan, true, false>
                                    : tile_low_bit_totals<kInt4, kPerSpan, false, false>;
            }
            return weight.zeros ? tile_low_bit_totals<kInt4, kPerGroup, true, false>
                                : tile_low_bit_totals<kInt4, kPerGroup, false, false>;
    }
}

}  // namespace
}  // namespace trireme
