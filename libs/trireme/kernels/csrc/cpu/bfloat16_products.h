// Products of float activations and bfloat16 weights: a weight is a float whose lower half is 0.
//
// Each output is one chain of fused multiply-adds over its inputs in order, whatever else is computed.
#pragma once

#include "linear.h"

namespace trireme {
namespace {

constexpr int kRealPanelBlocks = 4;  // 16 KiB of floats

// One row, `kTiles` tiles side by side: as many chains hide each other's latency.
template <int kTiles>
inline void multiply_real_row(const uint8_t* words, int64_t tile_bytes, const float* x, int64_t inputs, float* totals) {
    Reals total[kTiles];
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile) total[tile] = all(0.0f);
    const Same upper = same32(static_cast<int32_t>(0xFFFF0000));
    for (int64_t i = 0; i < inputs; i += 2) {
#pragma GCC unroll 4
        for (int tile = 0; tile < kTiles; ++tile) {
            const uint8_t* from = words + tile * tile_bytes + 32 * i;
            __builtin_prefetch(from + 2048);
            const Bits pair = load(from);
            total[tile] = multiply_add(as_reals(shift_left32<16>(pair)), all(x[i]), total[tile]);
            total[tile] = multiply_add(as_reals(bit_and(pair, upper)), all(x[i + 1]), total[tile]);
        }
    }
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile) store_reals(totals + tile * kTile, total[tile]);
}

// While it computes, it fetches what is to be decoded next: `next_bytes` for each input from `next` on.
template <int kRows>
inline void multiply_real_panel(const float* panel, int64_t inputs, const float* x, int64_t stride, float* totals,
                                const uint8_t* next, int64_t next_bytes) {
    Reals total[kRows];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) total[row] = load_reals(totals + row * kTile);
#pragma GCC unroll 1
    for (int64_t i = 0; i < inputs; ++i) {
        __builtin_prefetch(next);
        next += next_bytes;
        Reals weight = load_reals(panel + kTile * i);
        settle(weight);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            total[row] = multiply_add(weight, all(x[row * stride + i]), total[row]);
            settle(total[row]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) store_reals(totals + row * kTile, total[row]);
}

template <int kRows>
inline void multiply_real_rows(int64_t rows, const float* panel, int64_t inputs, const float* x, int64_t stride,
                               float* totals, const uint8_t* next, int64_t next_bytes) {
    if constexpr (kRows > 0) {
        if (rows == kRows) {
            multiply_real_panel<kRows>(panel, inputs, x, stride, totals, next, next_bytes);
        } else {
            multiply_real_rows<kRows - 1>(rows, panel, inputs, x, stride, totals, next, next_bytes);
        }
    }
}

// Totals (rows, 16) of one tile; `panel` has room for kRealPanelBlocks.
inline void bfloat16_totals(const Weight& weight, int64_t tile, const Activations& x, int64_t first_row,
                            int64_t last_row, float* panel, float* totals) {
    const int64_t padded = blocks_of(weight.inputs) * kBlock;
    const uint8_t* words = weight.words + tile * padded * kTile * 2;
    for (int64_t i = 0; i < (last_row - first_row) * kTile; i += kTile) store_reals(totals + i, all(0.0f));
    const Same upper = same32(static_cast<int32_t>(0xFFFF0000));
    for (int64_t first = 0; first < padded; first += kRealPanelBlocks * kBlock) {
        const int64_t inputs = least(kRealPanelBlocks * kBlock, padded - first);
        for (int64_t i = 0; i < inputs; i += 2) {
            const uint8_t* from = words + 32 * (first + i);
            __builtin_prefetch(from + 2048);
            const Bits pair = load(from);
            store_reals(panel + kTile * i, as_reals(shift_left32<16>(pair)));
            store_reals(panel + kTile * (i + 1), as_reals(bit_and(pair, upper)));
        }
        for (int64_t row = first_row; row < last_row; row += kRowsInRegisters) {
            multiply_real_rows<kRowsInRegisters>(least(kRowsInRegisters, last_row - row), panel, inputs,
                                                 x.reals + row * x.stride + first, x.stride,
                                                 totals + (row - first_row) * kTile, words + 32 * (first + inputs),
                                                 row == first_row ? 32 : 0);
        }
    }
}

}  // namespace
}  // namespace trireme
