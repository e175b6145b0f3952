// Products of float activations and bfloat16 weights: a weight is a float whose lower half is 0.
//
// Each output is one chain of fused multiply-adds over its inputs in order, whatever else is computed.
#pragma once

#include "linear.h"

namespace trireme {
namespace {

constexpr int64_t kInputsAtOnce = 256;  // of two tiles 16 KiB: all rows find them in a first-level cache
constexpr int64_t kTileTotals = kRowsAtOnce * kTile;  // from one tile's totals to the next one's
static_assert(kMostTiles * kTileTotals * sizeof(float) <= kWorkBytes, "totals fit the thread's room");

// Add inputs [0, inputs) to the totals of `kRows` rows and `kTiles` tiles: enough chains side by side hide each
// other's latency. While it computes it fetches what lies `ahead` bytes behind.
template <int kRows, int kTiles>
inline void multiply_real(const uint8_t* words, int64_t tile_bytes, const float* x, int64_t stride, int64_t inputs,
                          float* totals, int64_t ahead) {
    Reals total[kTiles][kRows];
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) total[tile][row] = load_reals(totals + tile * kTileTotals + row * kTile);
    }
    const Same upper = same32(static_cast<int32_t>(0xFFFF0000));
#pragma GCC unroll 1
    for (int64_t i = 0; i < inputs; i += 2) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
            for (int tile = 0; tile < kTiles; ++tile) {
                const uint8_t* from = words + tile * tile_bytes + 32 * i;
                if (half == 0) __builtin_prefetch(from + ahead);
                const Bits pair = load(from);
                Reals weight = as_reals(half == 0 ? shift_left32<16>(pair) : bit_and(pair, upper));
                settle(weight);
#pragma GCC unroll 16
                for (int row = 0; row < kRows; ++row) {
                    total[tile][row] = multiply_add(weight, all(x[row * stride + i + half]), total[tile][row]);
                    settle(total[tile][row]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) store_reals(totals + tile * kTileTotals + row * kTile, total[tile][row]);
    }
}

// So many tiles side by side as fill the registers, then what is left of them.
template <int kRows, int kTiles>
inline void multiply_real_tiles(int tiles, const uint8_t* words, int64_t tile_bytes, const float* x, int64_t stride,
                                int64_t inputs, float* totals, int64_t ahead) {
    int tile = 0;
    if constexpr (kTiles == 1 || kTiles * kRows < kRowsInRegisters) {
        for (; tile + kTiles <= tiles; tile += kTiles) {
            multiply_real<kRows, kTiles>(words + tile * tile_bytes, tile_bytes, x, stride, inputs,
                                         totals + tile * kTileTotals, ahead);
        }
    }
    if constexpr (kTiles > 1) {
        multiply_real_tiles<kRows, kTiles / 2>(tiles - tile, words + tile * tile_bytes, tile_bytes, x, stride, inputs,
                                               totals + tile * kTileTotals, ahead);
    }
}

template <int kRows>
inline void multiply_real_rows(int64_t rows, int tiles, const uint8_t* words, int64_t tile_bytes, const float* x,
                               int64_t stride, int64_t inputs, float* totals, int64_t ahead) {
    if constexpr (kRows > 0) {
        if (rows == kRows) {
            multiply_real_tiles<kRows, kMostTiles>(tiles, words, tile_bytes, x, stride, inputs, totals, ahead);
        } else {
            multiply_real_rows<kRows - 1>(rows, tiles, words, tile_bytes, x, stride, inputs, totals, ahead);
        }
    }
}

// Totals (tiles, rows, 16), of tiles kTileTotals apart, of up to kMostTiles from `tile` on.
inline void bfloat16_totals(const Weight& weight, int64_t tile, int tiles, const Activations& x, int64_t first_row,
                            int64_t last_row, float* totals) {
    const int64_t padded = blocks_of(weight.inputs) * kBlock, tile_bytes = padded * kTile * 2;
    const int64_t rows = last_row - first_row, groups = (rows + kRowsInRegisters - 1) / kRowsInRegisters;
    const float* reals = static_cast<const float*>(x.reals);
    for (int part = 0; part < tiles; ++part) {
        for (int64_t i = 0; i < rows; ++i) store_reals(totals + part * kTileTotals + i * kTile, all(0.0f));
    }
    const int64_t inputs_at_once = rows == 1 ? padded : kInputsAtOnce;
    for (int64_t first = 0; first < padded; first += inputs_at_once) {
        for (int64_t group = 0; group < groups; ++group) {
            // Of one size as far as possible: few rows alone would wait for their own sums.
            const int64_t row = rows * group / groups, count = rows * (group + 1) / groups - row;
            multiply_real_rows<kRowsInRegisters>(count, tiles, weight.words + tile * tile_bytes + 32 * first, tile_bytes,
                                                 reals + (first_row + row) * x.stride + first, x.stride,
                                                 least(inputs_at_once, padded - first), totals + row * kTile,
                                                 group == 0 ? 2048 : 0);
        }
    }
}

}  // namespace
}  // namespace trireme
