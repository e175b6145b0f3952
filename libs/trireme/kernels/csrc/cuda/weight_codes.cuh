// Codes of low-bit weights to the fragments of mma: one struct a format, of layout direct_v1.
//
// A slice is 64 rows by 16 columns: 4 blocks of 16 rows, 4 registers a lane and block. A lane's words of a slice are
// its head_words, which all lie before the matrix's first tail_words, and then these. A block has block_words of the
// tail, and reads head word `head_of(block)`, if there are any. What decode gives times `unit` is the weight without
// its scale; `block` may be known when the kernel is compiled, or only to the warp.
//
// Source: libs/trireme/quant/direct_layout.py and integer_layout.py; Kim et al., Who Says Elephants Can't Run,
// 2022 (integers or-ed into the mantissa of a float).

#pragma once

#include "prim.cuh"

DEVICE u32 both_halves(u32 half) { return half | half << 16; }

// How many words of each kind a lane has of a slice.
template <int HEAD_WORDS, int TAIL_WORDS>
struct LaneWords {
    static constexpr int head_words = HEAD_WORDS, tail_words = TAIL_WORDS, lane_words = HEAD_WORDS + TAIL_WORDS;
    static constexpr int block_words = TAIL_WORDS / 4;

    static DEVICE int head_of(int block) { return block * HEAD_WORDS / 4; }
};

// Floats of a few bits: shifts and masks bring a code to where a float16 has its sign, exponent and mantissa. That
// float16 is 2**-12 (3 exponent bits) or 2**-14 (2) times the value; no rounding, subnormals included.
template <u32 EXPONENT_BITS>
struct MinifloatHalves {
    static DEVICE float unit(f16) { return EXPONENT_BITS == 3 ? 4096.0f : 16384.0f; }
    static DEVICE float unit(bf16) { return 1.0f; }

    static DEVICE u32 place_in(u32 halves, f16) { return halves; }
    // bfloat16 has three more exponent bits: 2**-124 or 2**-126 times the value, which float32 sums would lose, so
    // it is made good.
    static DEVICE u32 place_in(u32 halves, bf16) {
        constexpr u32 field = EXPONENT_BITS == 3 ? 0x1F80 : 0x0F80, factor = EXPONENT_BITS == 3 ? 0x7D80 : 0x7E80;
        const u32 shifted = (halves & 0x80008000u) | (halves & both_halves(field)) >> 3;
        return prim_fma2(shifted, both_halves(factor), both_halves(0x8000), bf16{});
    }
};

// Sign, 3 exponent and 2 mantissa bits.
template <class T>
struct Fp6E3M2 : MinifloatHalves<3>, LaneWords<2, 4> {
    static constexpr bool has_zeros = false, has_scales = true;

    static DEVICE void decode(u32 top, const u32 (&tail)[block_words], int block, const u32 (&)[2], u32 (&out)[4]) {
        // Left shifts that bring sign and top exponent bit to bits 15 and 12; the last register's may differ.
        const bool is_odd = block % 2 != 0;
        const int top_shift[4] = {is_odd ? 7 : 0, is_odd ? 8 : 1, is_odd ? 12 : 2, is_odd ? 13 : 6};
        const u32 last = (top << top_shift[3] & 0x80008000u) | (top << (is_odd ? 11 : 6) & 0x10001000u);
        const u32 low = tail[0], nibbles[4] = {low, low >> 4, low << 4, low << 8};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 head = i < 3 ? top << top_shift[i] & 0x90009000u : last;
            out[i] = place_in((nibbles[i] & 0x0F000F00u) | head, T{});
        }
    }
};

// Sign, 2 exponent and 3 mantissa bits.
template <class T>
struct Fp6E2M3 : MinifloatHalves<2>, LaneWords<2, 4> {
    static constexpr bool has_zeros = false, has_scales = true;

    static DEVICE void decode(u32 top, const u32 (&tail)[block_words], int block, const u32 (&)[2], u32 (&out)[4]) {
        const u32 low = tail[0], nibbles[4] = {low >> 1, low >> 5, low << 3, low << 7};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 head = top << (block % 2 * 8 + i) & 0x88008800u;
            out[i] = place_in((nibbles[i] & 0x07800780u) | head, T{});
        }
    }
};

// Sign, 2 exponent and 2 mantissa bits.
template <class T>
struct Fp5E2M2 : MinifloatHalves<2>, LaneWords<1, 4> {
    static constexpr bool has_zeros = false, has_scales = true;

    static DEVICE void decode(u32 top, const u32 (&tail)[block_words], int block, const u32 (&)[2], u32 (&out)[4]) {
        const u32 low = tail[0], nibbles[4] = {low, low >> 4, low << 4, low << 8};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 sign = top << (4 * block + i) & 0x80008000u;
            out[i] = place_in((nibbles[i] & 0x0F000F00u) | sign, T{});
        }
    }
};

// The weights themselves, in 16 bits.
template <class T>
struct Plain : LaneWords<0, 16> {
    static constexpr bool has_zeros = false, has_scales = false;

    static DEVICE void decode(u32, const u32 (&tail)[block_words], int, const u32 (&)[2], u32 (&out)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = tail[i];
    }
};

// 0 to 15 less a zero point.
template <class T>
struct Int4 : LaneWords<0, 4> {
    static constexpr bool has_zeros = true, has_scales = true;
    static DEVICE float unit(T) { return 1.0f; }

    // A zero point as decode takes it: -(1024 + zero) in float16, -(128 + zero) in bfloat16, in both halves.
    static DEVICE u32 offset(u32 zero, f16) { return both_halves(0xE400 + zero); }
    static DEVICE u32 offset(u32 zero, bf16) { return both_halves(0xC300 + zero); }

    // offsets: of the fragment's upper and lower eight rows.
    static DEVICE void decode(u32, const u32 (&tail)[block_words], int, const u32 (&offsets)[2], u32 (&out)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = minus((tail[0] >> 4 * i & 0x000F000Fu), offsets[i % 2], T{});
    }

private:
    static DEVICE u32 minus(u32 codes, u32 offset, f16) {
        return prim_fma2(codes | both_halves(0x6400), both_halves(0x3C00), offset, f16{});
    }
    static DEVICE u32 minus(u32 codes, u32 offset, bf16) {
        return prim_fma2(codes | both_halves(0x4300), both_halves(0x3F80), offset, bf16{});
    }
};

// 0 to 255 less 128.
template <class T>
struct Int8 : LaneWords<0, 8> {
    static constexpr bool has_zeros = false, has_scales = true;
    static DEVICE float unit(T) { return 1.0f; }

    static DEVICE void decode(u32, const u32 (&tail)[block_words], int, const u32 (&)[2], u32 (&out)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = signed_pair(tail[i / 2], i % 2, T{});
    }

private:
    // Bytes 2 * pair and 2 * pair + 1 of the word.
    static DEVICE u32 signed_pair(u32 word, int pair, f16) {
        const u32 raised = prim_permute_bytes(word, 0x64646464u, pair ? 0x4342 : 0x4140);  // 1024 + code
        return prim_fma2(raised, both_halves(0x3C00), both_halves(0xE480), f16{});         // less 1152
    }
    static DEVICE u32 signed_pair(u32 word, int pair, bf16) {
        // By way of float32, 2**23 + code: bfloat16 has too few bits to hold a code and an offset at once.
        const u32 low = prim_permute_bytes(word, 0x4B000000u, pair ? 0x7442 : 0x7440);
        const u32 high = prim_permute_bytes(word, 0x4B000000u, pair ? 0x7443 : 0x7441);
        return prim_pack(prim_bits_float(low) - 8388736.0f, prim_bits_float(high) - 8388736.0f, bf16{});
    }
};
