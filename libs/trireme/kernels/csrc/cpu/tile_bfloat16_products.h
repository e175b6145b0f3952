// Products of float activations and bfloat16 weights with tile registers.
//
// A float is the sum of three bfloat16, exactly: each takes the leading 8 bits of what the ones before left. 32 inputs at
// a time, the products of the third parts are added to the total, then those of the second, then those of the first.
// One such addition is the instruction's: even and odd inputs' products in a chain of fused multiply-adds each, both added,
// and added to the total; what is below 2^-126 is 0. Activations of type bfloat16 are first parts alone.
#pragma once

#include "activations.h"
#include "tile_shapes.h"

namespace trireme {
namespace {

constexpr int kFloatParts = 3;
constexpr int64_t kStepInputs = 32;  // of a tile register's row
constexpr int64_t kInputsInTurn = 256;  // of two tiles 16 KiB: all rows find them in a first-level cache

inline int parts_of(const Call& call) { return call.type == kFloat32 ? kFloatParts : 1; }

// What is left of x behind its first part. An infinity or a NaN is its first part alone.
inline uint16_t take_part(float& x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const bool is_finite = (bits & 0x7F800000u) != 0x7F800000u;
    const uint32_t upper = (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x00400000u : bits;  // NaN stays NaN
    const float rest = x - float_of(bits & 0xFFFF0000u);
    x = is_finite ? rest : 0.0f;
    return static_cast<uint16_t>(upper >> 16);
}

// One row to `parts`: of 32 inputs the first parts, then the second and the third.
inline void split_row(const float* x, int64_t inputs, uint16_t* parts) {
    for (int64_t first = 0; first < blocks_of(inputs) * kBlock; first += kStepInputs) {
        float rest[kStepInputs] = {};
        if (first < inputs) {
            __builtin_memcpy(rest, x + first, static_cast<size_t>(least(kStepInputs, inputs - first)) * sizeof(float));
        }
        for (int part = 0; part < kFloatParts; ++part) {
            for (int i = 0; i < kStepInputs; ++i) parts[i] = take_part(rest[i]);
            parts += kStepInputs;
        }
    }
}

inline void copy_row(const uint16_t* x, int64_t inputs, uint16_t* parts) {
    __builtin_memcpy(parts, x, static_cast<size_t>(inputs) * sizeof(uint16_t));
    __builtin_memset(parts + inputs, 0, static_cast<size_t>(blocks_of(inputs) * kBlock - inputs) * sizeof(uint16_t));
}

inline void prepare_parts(const Call& call, const Activations& to, int64_t first, int64_t last) {
    const int64_t inputs = call.weight->inputs;
    for (int64_t row = first; row < last; ++row) {
        uint16_t* parts = static_cast<uint16_t*>(to.reals) + row * to.stride * parts_of(call);
        if (call.type == kFloat32) {
            split_row(static_cast<const float*>(call.x) + row * call.stride, inputs, parts);
        } else {
            copy_row(static_cast<const uint16_t*>(call.x) + row * call.stride, inputs, parts);
        }
    }
}

// Add inputs [0, inputs) to the totals of 1 or 2 groups of rows and 1 or 2 tiles of outputs. While it computes it
// fetches what lies `ahead` bytes behind.
template <int kGroups, int kTiles>
inline void multiply_parts(const uint8_t* words, int64_t tile_bytes, const uint16_t* x, int64_t stride,
                           int64_t group_rows, int parts, int64_t inputs, float* totals, int64_t ahead) {
    float* second = totals + group_rows * kTile;
    load_tile<4>(totals, kRowBytes);
    if constexpr (kTiles == 2) load_tile<5>(totals + kTileTotals, kRowBytes);
    if constexpr (kGroups == 2) load_tile<6>(second, kRowBytes);
    if constexpr (kGroups == 2 && kTiles == 2) load_tile<7>(second + kTileTotals, kRowBytes);
    const uint16_t* other = x + group_rows * stride;
    for (int64_t i = 0; i < inputs; i += kStepInputs) {
        for (int tile = 0; tile < kTiles && ahead; ++tile) {
            for (int64_t line = 0; line < kTileBytes; line += 64) {
                __builtin_prefetch(words + tile * tile_bytes + ahead + line);
            }
        }
        load_tile<2>(words, kRowBytes);
        if constexpr (kTiles == 2) load_tile<3>(words + tile_bytes, kRowBytes);
        words += kTileBytes;
        for (int part = parts - 1; part >= 0; --part) {
            const int64_t at = i * parts + part * kStepInputs;
            load_tile<0>(x + at, stride * 2);
            if constexpr (kGroups == 2) load_tile<1>(other + at, stride * 2);
            dot_bfloat16_tiles<4, 0, 2>();
            if constexpr (kTiles == 2) dot_bfloat16_tiles<5, 0, 3>();
            if constexpr (kGroups == 2) dot_bfloat16_tiles<6, 1, 2>();
            if constexpr (kGroups == 2 && kTiles == 2) dot_bfloat16_tiles<7, 1, 3>();
        }
    }
    store_tile<4>(totals, kRowBytes);
    if constexpr (kTiles == 2) store_tile<5>(totals + kTileTotals, kRowBytes);
    if constexpr (kGroups == 2) store_tile<6>(second, kRowBytes);
    if constexpr (kGroups == 2 && kTiles == 2) store_tile<7>(second + kTileTotals, kRowBytes);
}

// Totals (tiles, rows, 16), of tiles kTileTotals apart, of 1 or 2 from `tile` on.
template <int kTiles>
inline void tile_bfloat16_totals(const Weight& weight, int64_t tile, const Activations& x, int parts, int64_t first_row,
                                 int64_t last_row, float* totals) {
    const int64_t padded = blocks_of(weight.inputs) * kBlock, tile_bytes = padded * kTile * 2;
    const int64_t rows = last_row - first_row, stride = x.stride * parts;
    const RowGroups groups(rows);
    for (int part = 0; part < kTiles; ++part) {
        __builtin_memset(totals + part * kTileTotals, 0,
                         static_cast<size_t>(groups.count * groups.size * kTile) * sizeof(float));
    }
    const int64_t inputs_in_turn = groups.count <= 2 ? padded : kInputsInTurn;
    for (int64_t first = 0; first < padded; first += inputs_in_turn) {
        const uint8_t* words = weight.words + tile * tile_bytes + 32 * first;
        const int64_t inputs = least(inputs_in_turn, padded - first);
        for (int64_t group = 0; group < groups.count; group += 2) {
            const auto add = groups.count - group > 1 ? multiply_parts<2, kTiles> : multiply_parts<1, kTiles>;
            const uint16_t* from =
                static_cast<const uint16_t*>(x.reals) + (first_row + group * groups.size) * stride + first * parts;
            add(words, tile_bytes, from, stride, groups.size, parts, inputs, totals + group * groups.size * kTile,
                group == 0 ? 4096 : 0);
        }
    }
}

}  // namespace
}  // namespace trireme
