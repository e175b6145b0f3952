// Activations to fixed point: int16 in steps of a power of two, one step for 64 inputs of a row.
//
// The step is the least with which the block's largest magnitude stays below 2^15, so an element moves by at most
// 2^-15 of that magnitude, and an element of 8 significant bits (bfloat16) that is at least 2^-7 of it does
// not move at all. Below 2^-111 the step does not shrink any more. A block with an infinity or a NaN has step NaN.
#pragma once

#include <immintrin.h>

#include "linear.h"

namespace trireme {
namespace {

inline __m256 load_eight(const float* at) { return _mm256_loadu_ps(at); }
inline __m256 load_eight(const uint16_t* at) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline int32_t sum_lanes(__m256i a) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1));
    return _mm_cvtsi128_si32(sum);
}

inline uint32_t max_lanes(__m256i a) {
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4E));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(most));
}

inline float float_of(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// One block; sums[0] and sums[1] of its spans. Returns the step.
template <class Element>
inline float round_block(const Element* x, int16_t* codes, int32_t* sums) {
    __m256 values[8];
    __m256i most = _mm256_setzero_si256();
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    for (int i = 0; i < 8; ++i) {
        values[i] = load_eight(x + 8 * i);
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(values[i]), magnitude));
    }
    const uint32_t bits = max_lanes(most);
    if (bits >= 0x7F800000u) {
        __builtin_memset(codes, 0, kBlock * sizeof(int16_t));
        sums[0] = sums[1] = 0;
        return float_of(0x7FC00000u);
    }
    const uint32_t exponent = bits >> 23 < 16 ? 16 : bits >> 23;
    const __m256 per_step = _mm256_set1_ps(float_of((268 - exponent) << 23));  // 2^(14 - (exponent - 127))
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int i = 0; i < 4; ++i) {
        const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(values[2 * i], per_step));
        const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(values[2 * i + 1], per_step));
        const __m256i rounded = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes) + i, rounded);
        sum[i / 2] = _mm256_add_epi32(sum[i / 2], _mm256_madd_epi16(rounded, ones));
    }
    sums[0] = sum_lanes(sum[0]);
    sums[1] = sum_lanes(sum[1]);
    return float_of((exponent - 14) << 23);
}

template <class Element>
inline void round_row(const Element* x, int64_t inputs, int16_t* codes, float* steps, int32_t* sums) {
    const int64_t whole = inputs / kBlock;
    for (int64_t block = 0; block < whole; ++block) {
        steps[block] = round_block(x + block * kBlock, codes + block * kBlock, sums + 2 * block);
    }
    if (whole * kBlock < inputs) {
        Element last[kBlock] = {};
        __builtin_memcpy(last, x + whole * kBlock, (inputs - whole * kBlock) * sizeof(Element));
        steps[whole] = round_block(last, codes + whole * kBlock, sums + 2 * whole);
    }
}

inline float real_of(float value) { return value; }
inline float real_of(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }

template <class Element>
inline void prepare_rows(const Call& call, const Activations& to, int64_t first, int64_t last) {
    const Weight& weight = *call.weight;
    const int64_t inputs = weight.inputs, blocks = blocks_of(inputs);
    for (int64_t row = first; row < last; ++row) {
        const Element* x = static_cast<const Element*>(call.x) + row * call.stride;
        if (weight.format == kBfloat16) {
            float* reals = static_cast<float*>(to.reals) + row * to.stride;
            for (int64_t i = 0; i < inputs; ++i) reals[i] = real_of(x[i]);
            for (int64_t i = inputs; i < blocks * kBlock; ++i) reals[i] = 0.0f;
        } else {
            round_row(x, inputs, to.codes + row * to.stride, to.steps + row * blocks, to.sums + row * 2 * blocks);
        }
    }
}

inline void prepare(const Call& call, const Activations& to, int64_t first, int64_t last) {
    if (call.type == kFloat32) {
        prepare_rows<float>(call, to, first, last);
    } else {
        prepare_rows<uint16_t>(call, to, first, last);
    }
}

}  // namespace
}  // namespace trireme
