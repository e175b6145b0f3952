// The instructions of a tiles_*.h one at a time, on registers of any shape, for same_bits.cpp to compare.
#pragma once

namespace trireme {
namespace {

// The sum of `rows` rows of `lanes` lanes after one product with `inner` lanes of a's rows: all matrices have rows of 64
// bytes, as many as their shapes say. `which` is 0 for signed bytes, 1 for unsigned ones, 2 for bfloat16.
inline void run_instruction(int which, int rows, int inner, int lanes, const uint8_t* a, const uint8_t* b, uint8_t* sum) {
    TileShapes shapes{};
    shapes.palette = 1;
    shapes.rows[0] = static_cast<uint8_t>(rows);
    shapes.row_bytes[0] = static_cast<uint16_t>(4 * inner);
    shapes.rows[2] = static_cast<uint8_t>(inner);
    shapes.row_bytes[2] = static_cast<uint16_t>(4 * lanes);
    shapes.rows[4] = static_cast<uint8_t>(rows);
    shapes.row_bytes[4] = static_cast<uint16_t>(4 * lanes);
    configure_tiles(shapes);
    load_tile<0>(a, kRowBytes);
    load_tile<2>(b, kRowBytes);
    load_tile<4>(sum, kRowBytes);
    switch (which) {
        case 0:
            dot_signed_tiles<4, 0, 2>();
            break;
        case 1:
            dot_unsigned_tiles<4, 0, 2>();
            break;
        default:
            dot_bfloat16_tiles<4, 0, 2>();
    }
    store_tile<4>(sum, kRowBytes);
    release_tiles();
}

}  // namespace
}  // namespace trireme
