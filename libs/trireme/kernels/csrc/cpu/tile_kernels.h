// The kernels of a CPU with tile registers: they take the rows of a batch or a prompt, the lanes a few rows. Include the
// lanes and the tiles first.
#pragma once

#include "kernels.h"
#include "tile_bfloat16_products.h"
#include "tile_low_bit_products.h"

namespace trireme {
namespace {

constexpr int64_t kFewestRows = 8;  // of codes: fewer take the lanes, with the same bits

// With bfloat16 weights tiles round otherwise than lanes do, so they take any number of rows: a row's bits depend on no
// other row.
inline bool takes_tiles(const Call& call) { return call.weight->format == kBfloat16 || call.rows >= kFewestRows; }

inline void prepare_tiles(const Call& call, const Activations& to, int64_t first, int64_t last) {
    if (call.weight->format == kBfloat16) return prepare_parts(call, to, first, last);
    prepare(call, to, first, last);
    if (!takes_tiles(call)) return;
    for (int64_t row = first; row < last; ++row) {
        int16_t* codes = to.codes + row * to.stride;
        for (int64_t block = 0; block < blocks_of(call.weight->inputs); ++block) split_block(codes + block * kBlock);
    }
}

inline void multiply_with_tiles(const Call& call, const Activations& x, int64_t first_tile, int64_t last_tile,
                                int64_t first_row, int64_t last_row, void* work) {
    if (!takes_tiles(call)) return multiply_tiles(call, x, first_tile, last_tile, first_row, last_row, work);
    const Weight& weight = *call.weight;
    const int64_t group_rows = RowGroups(last_row - first_row).size;
    if (weight.format == kBfloat16) {
        float* totals = static_cast<float*>(work);
        configure_tiles(shapes_for(group_rows, kRowBytes));
        for (int64_t tile = first_tile; tile < last_tile; tile += 2) {
            const int tiles = static_cast<int>(least(2, last_tile - tile));
            const auto sum = tiles == 2 ? tile_bfloat16_totals<2> : tile_bfloat16_totals<1>;
            sum(weight, tile, x, parts_of(call), first_row, last_row, totals);
            for (int part = 0; part < tiles; ++part) {
                finish_any(call, tile + part, first_row, last_row, totals + part * kTileTotals);
            }
        }
    } else {
        uint8_t* room = static_cast<uint8_t*>(work);
        const TileTotals sum = tile_totals_for(weight);
        configure_tiles(shapes_for(group_rows, weight.group == kSpan ? kSpan : kBlock));
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
            sum(weight, tile, x, first_row, last_row, room);
            finish_any(call, tile, first_row, last_row, reinterpret_cast<const float*>(room + kTotalsAt));
        }
    }
    release_tiles();
}

}  // namespace
}  // namespace trireme
