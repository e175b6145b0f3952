// Shapes of tile registers, and how the rows of a call share them.
#pragma once

#include "linear.h"

namespace trireme {
namespace {

constexpr int64_t kRowBytes = 64;   // of a tile register
constexpr int64_t kMostRows = 16;   // of one
constexpr int64_t kTileBytes = kMostRows * kRowBytes;

// What LDTILECFG reads.
struct alignas(64) TileShapes {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];  // of registers 0 to 7; the others stay 0
    uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64, "as LDTILECFG reads it");

// Rows in groups of one size, the last of which may be some short: those it lacks are computed and not used.
struct RowGroups {
    int64_t count;
    int64_t size;

    explicit RowGroups(int64_t rows)
        : count((rows + kMostRows - 1) / kMostRows), size((rows + count - 1) / count) {}
};

constexpr int kSpareRows = static_cast<int>(kRowsAtOnce / kMostRows) - 1;  // so many a last group lacks at most

// Registers 0 and 1 hold rows of activations, 2 and 3 weights, 4 to 7 sums, 16 outputs of `rows` rows each.
inline TileShapes shapes_for(int64_t rows, int64_t activation_bytes) {
    TileShapes shapes{};
    shapes.palette = 1;
    for (int at = 0; at < 8; ++at) {
        const bool is_weight = at == 2 || at == 3;
        shapes.rows[at] = static_cast<uint8_t>(is_weight ? activation_bytes / 4 : rows);
        shapes.row_bytes[at] = static_cast<uint16_t>(at < 2 ? activation_bytes : kRowBytes);
    }
    return shapes;
}

}  // namespace
}  // namespace trireme
