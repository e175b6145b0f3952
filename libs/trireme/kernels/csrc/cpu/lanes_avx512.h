// 16 lanes of 32 bits in one AVX-512 register; see lanes_avx2.h. Needs F, BW, VL, DQ and VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace trireme {
namespace {

using Bits = __m512i;
using Reals = __m512;
using Same = __m512i;

constexpr int kChains = 4;
constexpr int kFloatChains = 4;
constexpr int kRowsInRegisters = 12;
constexpr int kFewRows = 6;
constexpr int kFewFloatRows = 6;
constexpr int kMostTiles = 4;  // of bfloat16 weights, side by side

inline Bits load(const void* at) { return _mm512_loadu_si512(at); }
inline void store(void* at, Bits a) { _mm512_storeu_si512(at, a); }
inline Bits load_signed_bytes(const void* at) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
}
inline Bits load_unsigned_bytes(const void* at) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(at)));
}
inline Bits all32(int32_t value) { return _mm512_set1_epi32(value); }
inline Same same8(int8_t value) { return _mm512_set1_epi8(value); }
inline Same same16(int16_t value) { return _mm512_set1_epi16(value); }
inline Same same32(int32_t value) { return _mm512_set1_epi32(value); }
inline Same load_pair(const int16_t* at) {
    int32_t both;
    __builtin_memcpy(&both, at, 4);
    return same32(both);
}
inline Same load_table(const void* at) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(at)));
}
inline Bits look_up(Same table, Bits index) { return _mm512_shuffle_epi8(table, index); }
inline Bits bit_and(Bits a, Same b) { return _mm512_and_si512(a, b); }
inline Bits bit_and_not(Bits a, Same b) { return _mm512_andnot_si512(b, a); }
inline Bits bit_or(Bits a, Bits b) { return _mm512_or_si512(a, b); }
template <int kCount>
inline Bits shift_right16(Bits a) {
    return _mm512_srli_epi16(a, kCount);
}
template <int kCount>
inline Bits shift_left32(Bits a) {
    return _mm512_slli_epi32(a, kCount);
}
inline Bits subtract16(Bits a, Bits b) { return _mm512_sub_epi16(a, b); }
inline Bits add32(Bits a, Bits b) { return _mm512_add_epi32(a, b); }
inline Bits multiply32(Bits a, Same b) { return _mm512_mullo_epi32(a, b); }
inline Bits multiply_bytes(Bits a, Bits b) { return _mm512_maddubs_epi16(a, b); }
inline Bits dot(Bits sum, Bits a, Same b) { return _mm512_dpwssd_epi32(sum, a, b); }

inline Reals all(float value) { return _mm512_set1_ps(value); }
inline Reals load_reals(const float* at) { return _mm512_loadu_ps(at); }
inline void store_reals(float* at, Reals a) { _mm512_storeu_ps(at, a); }
inline Reals to_reals(Bits a) { return _mm512_cvtepi32_ps(a); }
inline Reals as_reals(Bits a) { return _mm512_castsi512_ps(a); }
inline Reals multiply(Reals a, Reals b) { return _mm512_mul_ps(a, b); }
inline Reals multiply_add(Reals a, Reals b, Reals sum) { return _mm512_fmadd_ps(a, b, sum); }

inline void settle(Bits& sum) { asm volatile("" : "+v"(sum) : : "memory"); }
inline void settle(Reals& sum) { asm volatile("" : "+v"(sum) : : "memory"); }

}  // namespace
}  // namespace trireme
