// 16 lanes of 32 bits in two AVX2 registers. The same names in lanes_avx512.h are one register: kernels are
// written once, against these.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace trireme {
namespace {

struct Bits {
    __m256i low, high;
};
struct Reals {
    __m256 low, high;
};
struct Same {  // in both registers: a constant, a table, or a broadcast value
    __m256i half;
};

constexpr int kChains = 2;       // independent sums of one row that hide the latency of `dot`
constexpr int kFloatChains = 1;  // of minifloats, whose decoding needs the registers
constexpr int kRowsInRegisters = 6;
constexpr int kFewRows = 5;  // that are multiplied as weights are decoded, in registers
constexpr int kFewFloatRows = 3;
constexpr int kMostTiles = 2;  // of bfloat16 weights, side by side

#define TRIREME_BOTH(call_low, call_high) \
    { call_low, call_high }

inline __m256i load_half(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

inline Bits load(const void* at) { return TRIREME_BOTH(load_half(at), load_half(static_cast<const char*>(at) + 32)); }
inline void store(void* at, Bits a) {
    _mm256_storeu_si256(static_cast<__m256i*>(at), a.low);
    _mm256_storeu_si256(static_cast<__m256i*>(at) + 1, a.high);
}
inline Bits load_signed_bytes(const void* at) {  // 32 int8 to int16
    const __m128i* from = static_cast<const __m128i*>(at);
    return TRIREME_BOTH(_mm256_cvtepi8_epi16(_mm_loadu_si128(from)), _mm256_cvtepi8_epi16(_mm_loadu_si128(from + 1)));
}
inline Bits load_unsigned_bytes(const void* at) {  // 16 uint8 to int32
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(at));
    return TRIREME_BOTH(_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)));
}
inline Bits all32(int32_t value) { return TRIREME_BOTH(_mm256_set1_epi32(value), _mm256_set1_epi32(value)); }
inline Same same8(int8_t value) { return {_mm256_set1_epi8(value)}; }
inline Same same16(int16_t value) { return {_mm256_set1_epi16(value)}; }
inline Same same32(int32_t value) { return {_mm256_set1_epi32(value)}; }
inline Same load_pair(const int16_t* at) {  // two int16 to every lane
    int32_t both;
    __builtin_memcpy(&both, at, 4);
    return same32(both);
}
inline Same load_table(const void* at) {  // 16 bytes to every 128 bits
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(at)))};
}
inline Bits look_up(Same table, Bits index) {
    return TRIREME_BOTH(_mm256_shuffle_epi8(table.half, index.low), _mm256_shuffle_epi8(table.half, index.high));
}
inline Bits bit_and(Bits a, Same b) {
    return TRIREME_BOTH(_mm256_and_si256(a.low, b.half), _mm256_and_si256(a.high, b.half));
}
inline Bits bit_and_not(Bits a, Same b) {
    return TRIREME_BOTH(_mm256_andnot_si256(b.half, a.low), _mm256_andnot_si256(b.half, a.high));
}
inline Bits bit_or(Bits a, Bits b) {
    return TRIREME_BOTH(_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high));
}
template <int kCount>
inline Bits shift_right16(Bits a) {
    return TRIREME_BOTH(_mm256_srli_epi16(a.low, kCount), _mm256_srli_epi16(a.high, kCount));
}
template <int kCount>
inline Bits shift_left32(Bits a) {
    return TRIREME_BOTH(_mm256_slli_epi32(a.low, kCount), _mm256_slli_epi32(a.high, kCount));
}
inline Bits subtract16(Bits a, Bits b) {
    return TRIREME_BOTH(_mm256_sub_epi16(a.low, b.low), _mm256_sub_epi16(a.high, b.high));
}
inline Bits add32(Bits a, Bits b) {
    return TRIREME_BOTH(_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high));
}
inline Bits multiply32(Bits a, Same b) {
    return TRIREME_BOTH(_mm256_mullo_epi32(a.low, b.half), _mm256_mullo_epi32(a.high, b.half));
}
inline Bits multiply_bytes(Bits a, Bits b) {  // uint8 times int8, neighbours added: int16
    return TRIREME_BOTH(_mm256_maddubs_epi16(a.low, b.low), _mm256_maddubs_epi16(a.high, b.high));
}
inline Bits dot(Bits sum, Bits a, Same b) {  // int16 times int16, neighbours added, added to int32
    return TRIREME_BOTH(_mm256_add_epi32(sum.low, _mm256_madd_epi16(a.low, b.half)),
                        _mm256_add_epi32(sum.high, _mm256_madd_epi16(a.high, b.half)));
}

inline Reals all(float value) { return TRIREME_BOTH(_mm256_set1_ps(value), _mm256_set1_ps(value)); }
inline Reals load_reals(const float* at) { return TRIREME_BOTH(_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)); }
inline void store_reals(float* at, Reals a) {
    _mm256_storeu_ps(at, a.low);
    _mm256_storeu_ps(at + 8, a.high);
}
inline Reals to_reals(Bits a) { return TRIREME_BOTH(_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)); }
inline Reals as_reals(Bits a) { return TRIREME_BOTH(_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)); }
inline Reals multiply(Reals a, Reals b) {
    return TRIREME_BOTH(_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high));
}
inline Reals multiply_add(Reals a, Reals b, Reals sum) {
    return TRIREME_BOTH(_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high));
}

// Nothing that reads memory moves across: with it, compilers keep the sums of many rows in registers.
inline void settle(Bits& sum) { asm volatile("" : "+x"(sum.low), "+x"(sum.high) : : "memory"); }
inline void settle(Reals& sum) { asm volatile("" : "+x"(sum.low), "+x"(sum.high) : : "memory"); }

#undef TRIREME_BOTH

}  // namespace
}  // namespace trireme
