// One instruction set's kernels: the right product for the weight, then scale, bias and residual.
#pragma once

#include "activations.h"
#include "bfloat16_products.h"
#include "linear.h"
#include "low_bit_products.h"

namespace trireme {
namespace {

inline uint16_t bfloat16_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
inline void assign(float& to, float value) { to = value; }
inline void assign(uint16_t& to, float value) { to = bfloat16_of(value); }

// Totals (rows, 16) to outputs: times scale, plus bias, plus residual.
template <class Element>
inline void finish(const Call& call, int64_t tile, int64_t first_row, int64_t last_row, const float* totals) {
    const Weight& weight = *call.weight;
    const int64_t first = tile * kTile, count = least(kTile, weight.outputs - first);
    const float* scales = weight.group || weight.format == kBfloat16 ? nullptr : weight.scales + first;
    for (int64_t row = first_row; row < last_row; ++row) {
        float values[kTile];
        __builtin_memcpy(values, totals + (row - first_row) * kTile, sizeof values);
        if (scales) {
            for (int i = 0; i < kTile; ++i) values[i] = values[i] * weight.unit * scales[i];
        }
        const int64_t at = row * weight.outputs + first;
        if (call.bias) {
            const Element* bias = static_cast<const Element*>(call.bias) + first;
            for (int64_t i = 0; i < count; ++i) values[i] += real_of(bias[i]);
        }
        if (call.residual) {
            const Element* residual = static_cast<const Element*>(call.residual) + at;
            for (int64_t i = 0; i < count; ++i) values[i] += real_of(residual[i]);
        }
        Element* out = static_cast<Element*>(call.out) + at;
        for (int64_t i = 0; i < count; ++i) assign(out[i], values[i]);
    }
}

inline void finish_any(const Call& call, int64_t tile, int64_t first_row, int64_t last_row, const float* totals) {
    if (call.type == kFloat32) {
        finish<float>(call, tile, first_row, last_row, totals);
    } else {
        finish<uint16_t>(call, tile, first_row, last_row, totals);
    }
}

using Totals = void (*)(const Weight&, int64_t, const Activations&, int64_t, int64_t, uint8_t*, float*);

inline Totals totals_for(const Weight& weight) {
    switch (weight.format) {
        case kInt8:
            return low_bit_totals<kInt8, kPerRow, false>;
        case kFloat6:
            return low_bit_totals<kFloat6, kPerRow, false>;
        case kFloat5:
            return low_bit_totals<kFloat5, kPerRow, false>;
        default:
            if (weight.group == kSpan) {
                return weight.zeros ? low_bit_totals<kInt4, kPerSpan, true> : low_bit_totals<kInt4, kPerSpan, false>;
            }
            return weight.zeros ? low_bit_totals<kInt4, kPerGroup, true> : low_bit_totals<kInt4, kPerGroup, false>;
    }
}

inline void multiply_tiles(const Call& call, const Activations& x, int64_t first_tile, int64_t last_tile,
                           int64_t first_row, int64_t last_row, void* work) {
    const Weight& weight = *call.weight;
    if (weight.format == kBfloat16) {
        float* totals = static_cast<float*>(work);
        for (int64_t tile = first_tile; tile < last_tile; tile += kMostTiles) {
            const int tiles = static_cast<int>(least(kMostTiles, last_tile - tile));
            bfloat16_totals(weight, tile, tiles, x, first_row, last_row, totals);
            for (int part = 0; part < tiles; ++part) {
                finish_any(call, tile + part, first_row, last_row, totals + part * kTileTotals);
            }
        }
        return;
    }
    uint8_t* panel = static_cast<uint8_t*>(work);
    float* totals = reinterpret_cast<float*>(panel + 16 * 1024);
    const Totals sum = totals_for(weight);
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        sum(weight, tile, x, first_row, last_row, panel, totals);
        finish_any(call, tile, first_row, last_row, totals);
    }
}

}  // namespace
}  // namespace trireme
