// float16 and bfloat16 bits to float32 and back, rounding to nearest even.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

inline std::uint32_t float_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float bits_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float bf16_to_float(std::uint16_t bits) { return bits_float(std::uint32_t{bits} << 16); }

inline std::uint16_t float_to_bf16(float value) {
    const std::uint32_t bits = float_bits(value);
    if (std::isnan(value)) return 0x7FFF;
    return static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_float(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float magnitude;
    if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
    else if (exponent == 0) magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    else magnitude = bits_float(static_cast<std::uint32_t>(exponent + 112) << 23 | mantissa << 13);
    return bits & 0x8000 ? -magnitude : magnitude;
}

inline std::uint16_t float_to_f16(float value) {
    const auto sign = static_cast<std::uint16_t>(float_bits(value) >> 16 & 0x8000);
    if (std::isnan(value)) return 0x7FFF;
    const float magnitude = std::fabs(value);
    if (magnitude >= 65520.0f) return sign | 0x7C00;  // halfway between the largest value and the next
    if (magnitude == 0.0f) return sign;
    // Below 2**-14 the spacing is 2**-24 throughout; above, the eleven bits from the leading one count.
    int exponent;
    std::frexp(magnitude, &exponent);
    const int last_bit = exponent > -14 ? exponent - 11 : -24;
    const auto steps = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, -last_bit)));
    if (exponent <= -14) return sign | static_cast<std::uint16_t>(steps);  // a carry makes the smallest normal
    return sign | static_cast<std::uint16_t>(((exponent + 14) << 10) + steps - 1024);
}

}  // namespace emulator
