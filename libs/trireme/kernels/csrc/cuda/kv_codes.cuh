// Keys and values in 8 bits: a row has head_dim codes and behind them its scale, a float32.
//
// The form is that of libs/trireme/kernels/kv_forms.py: value = code * scale, the scale the row's largest
// magnitude over the largest code's value, or 1 for a row of zeros; codes rounded to nearest, ties to even.
//
// Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022 (e4m3: bias 7, no infinity, one NaN).

#pragma once

#include "prim.cuh"

struct Int8Code {
    u8 bits;

    static constexpr float largest = 127.0f;
    DEVICE float value() const { return static_cast<float>(static_cast<i8>(bits)); }
    // Of a value from -largest to largest; NaN is 0, its row's scale says that it is none.
    static DEVICE u8 of(float value) { return value == value ? static_cast<u8>(static_cast<i8>(rintf(value))) : 0; }
};

struct Fp8Code {
    u8 bits;

    static constexpr float largest = 448.0f;
    DEVICE float value() const {
        const u32 magnitude = bits & 0x7F, sign = static_cast<u32>(bits & 0x80) << 24;
        if (magnitude == 0x7F) return prim_bits_float(0x7FFFFFFFu);
        if (magnitude < 8) return prim_bits_float(sign | prim_float_bits(magnitude * 0.001953125f));  // steps of 2**-9
        return prim_bits_float(sign | ((magnitude << 20) + (120u << 23)));
    }
    static DEVICE u8 of(float value) {
        const u32 bits = prim_float_bits(value), sign = bits >> 24 & 0x80;
        const float magnitude = fabsf(value);
        if (!(value == value)) return static_cast<u8>(sign | 0x7F);
        if (magnitude < 0.015625f) return static_cast<u8>(sign | static_cast<u32>(rintf(magnitude * 512.0f)));
        const u32 rounded_bits = (bits & 0x7FFFFFFFu) + 0x7FFFFu + (bits >> 20 & 1);
        return static_cast<u8>(sign | ((rounded_bits >> 20) - (120u << 3)));
    }
};

// Bytes of one row of HEAD_DIM numbers: codes, then the scale.
template <int HEAD_DIM>
constexpr int coded_row_bytes = HEAD_DIM + 4;
