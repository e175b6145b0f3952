// Codes of 4 to 8 bits to int16, 16 outputs by 32 inputs at a time.
//
// Two neighbouring inputs of an output are a pair: the two int16 of a lane, as `dot` wants them. A span has 16
// pairs, and `decode_span` hands them to `sink(pair, bits)` in order, pair p being inputs 2p and 2p + 1.
//
//   kInt8     16 times 32 bytes: a pair each, int8
//   kInt4     4 times 64 bytes: 4 pairs each, in the nibbles of every 16 bits from the lowest up
//   kFloat6   2 times 192 bytes, of 8 pairs: 2 registers with the upper 4 bits of each code, then 1 with the lower 2
//   kFloat5   320 bytes, of 16 pairs: 4 registers with the upper 4 bits, then 1 with the lowest
//
// In the last two, byte 4 * output + 2 * e + h has element e of pairs with p % 2 = h: nibble by nibble for
// p / 2 = 0, 1, ..., and so the lower bits from bit 0 up. A minifloat is mantissa times power of two, sign
// included; the upper 4 bits look both up, and one byte product gives an int16, exactly, as value / unit.
//
// Source: codes as in quant/minifloat.py; upper and lower bits apart after Xia et al., Quant-LLM, USENIX ATC 2024.
#pragma once

#include "linear.h"

namespace trireme {
namespace {

template <Format kFormat>
constexpr int64_t span_bytes() {
    return kFormat == kInt8      ? kTile * kSpan
           : kFormat == kInt4    ? kTile * kSpan / 2
           : kFormat == kFloat6  ? kTile * kSpan * 6 / 8
           : kFormat == kFloat5  ? kTile * kSpan * 5 / 8
                                 : kTile * kSpan * 2;
}

// The two tables of a minifloat, in registers.
struct Tables {
    Same power, mantissa;
};

template <int kLowBits, int kIndex, class Sink>
inline __attribute__((always_inline)) void decode_floats(Bits upper, Bits lower, const Tables& tables, int pair,
                                                         Sink&& sink) {
    const Same mask = same8((1 << kLowBits) - 1);
    const Bits low = bit_and(shift_right16<kLowBits * kIndex>(lower), mask);
    Bits mantissa = bit_or(look_up(tables.mantissa, upper), low);
    Bits power = look_up(tables.power, upper);
    settle(mantissa);
    settle(power);
    const Same even = same16(0x00FF);
    sink(pair, multiply_bytes(bit_and(mantissa, even), power));
    sink(pair + 1, multiply_bytes(bit_and_not(mantissa, even), power));
}

template <int kLowBits, int kIndex, class Sink>
inline __attribute__((always_inline)) void decode_float_register(Bits nibbles, Bits lower, const Tables& tables,
                                                                 int pair, Sink&& sink) {
    const Same mask = same8(0x0F);
    decode_floats<kLowBits, kIndex>(bit_and(nibbles, mask), lower, tables, pair, sink);
    decode_floats<kLowBits, kIndex + 1>(bit_and(shift_right16<4>(nibbles), mask), lower, tables, pair + 2, sink);
}

template <Format kFormat, class Sink>
inline __attribute__((always_inline)) void decode_span(const uint8_t* words, const Tables& tables, Sink&& sink) {
    if constexpr (kFormat == kInt8) {
#pragma GCC unroll 16
        for (int pair = 0; pair < 16; ++pair) sink(pair, load_signed_bytes(words + 32 * pair));
    } else if constexpr (kFormat == kInt4) {
        const Same mask = same16(0x0F);
#pragma GCC unroll 4
        for (int pair = 0; pair < 16; pair += 4) {
            Bits four = load(words + 16 * pair);
            settle(four);
            sink(pair, bit_and(four, mask));
            sink(pair + 1, bit_and(shift_right16<4>(four), mask));
            sink(pair + 2, bit_and(shift_right16<8>(four), mask));
            sink(pair + 3, shift_right16<12>(four));
        }
    } else if constexpr (kFormat == kFloat6) {
#pragma GCC unroll 2
        for (int pair = 0; pair < 16; pair += 8) {
            const uint8_t* from = words + 24 * pair;
            const Bits lower = load(from + 128);
            decode_float_register<2, 0>(load(from), lower, tables, pair, sink);
            decode_float_register<2, 2>(load(from + 64), lower, tables, pair + 4, sink);
        }
    } else {
        const Bits lower = load(words + 256);
        decode_float_register<1, 0>(load(words), lower, tables, 0, sink);
        decode_float_register<1, 2>(load(words + 64), lower, tables, 4, sink);
        decode_float_register<1, 4>(load(words + 128), lower, tables, 8, sink);
        decode_float_register<1, 6>(load(words + 192), lower, tables, 12, sink);
    }
}

}  // namespace
}  // namespace trireme
