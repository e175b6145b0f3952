// The tile registers of tiles_amx.h in plain C++: the same kernels run, and give the same bits, on any CPU.
//
// What the instructions refuse ends the program: registers that were not configured, shapes that do not fit each other,
// a register that is both sum and factor. What configuration or an instruction leaves undefined or sets to 0 is 0.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, the pages of the instructions.
#pragma once

#include "tile_shapes.h"

namespace trireme {
namespace {

struct ModelTile {
    int rows;
    int row_bytes;
    uint8_t content[16][64];
};

#if __STDC_HOSTED__
thread_local
#else
static
#endif
    ModelTile model_tiles[8];

static int64_t model_products;  // instructions that multiplied, of all threads

inline void require(bool holds) {
    if (!holds) __builtin_trap();
}

inline void configure_tiles(const TileShapes& shapes) {
    require(shapes.palette == 1 && shapes.start_row == 0);
    for (const uint8_t byte : shapes.reserved) require(byte == 0);
    for (int at = 8; at < 16; ++at) require(shapes.row_bytes[at] == 0 && shapes.rows[at] == 0);
    for (int at = 0; at < 8; ++at) {
        require(shapes.rows[at] <= 16 && shapes.row_bytes[at] <= 64);
        require((shapes.rows[at] == 0) == (shapes.row_bytes[at] == 0));
        __builtin_memset(&model_tiles[at], 0, sizeof(ModelTile));
        model_tiles[at].rows = shapes.rows[at];
        model_tiles[at].row_bytes = shapes.row_bytes[at];
    }
}

inline void release_tiles() { __builtin_memset(model_tiles, 0, sizeof model_tiles); }

inline ModelTile& model_tile(int at) {
    require(model_tiles[at].rows > 0 && model_tiles[at].row_bytes % 4 == 0);
    return model_tiles[at];
}

template <int kAt>
inline void clear_tile() {
    __builtin_memset(model_tile(kAt).content, 0, sizeof(ModelTile::content));
}

template <int kAt>
inline void load_tile(const void* from, int64_t stride) {
    ModelTile& tile = model_tile(kAt);
    clear_tile<kAt>();
    for (int row = 0; row < tile.rows; ++row) {
        __builtin_memcpy(tile.content[row], static_cast<const uint8_t*>(from) + row * stride,
                         static_cast<unsigned long>(tile.row_bytes));
    }
}

template <int kAt>
inline void store_tile(void* to, int64_t stride) {
    const ModelTile& tile = model_tile(kAt);
    for (int row = 0; row < tile.rows; ++row) {
        __builtin_memcpy(static_cast<uint8_t*>(to) + row * stride, tile.content[row],
                         static_cast<unsigned long>(tile.row_bytes));
    }
}

// `dot(sums, row of a, lane of b in each of its rows, count)` for each row and lane of the sum.
template <int kSum, int kA, int kB, class Dot>
inline void dot_model_tiles(Dot&& dot) {
    static_assert(kSum != kA && kSum != kB && kA != kB, "three registers");
    ModelTile& sum = model_tile(kSum);
    const ModelTile &a = model_tile(kA), &b = model_tile(kB);
    __atomic_fetch_add(&model_products, 1, __ATOMIC_RELAXED);
    require(sum.rows == a.rows && sum.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows);
    for (int row = 0; row < sum.rows; ++row) {
        for (int lane = 0; lane < sum.row_bytes / 4; ++lane) {
            uint8_t factors[64];
            for (int k = 0; k < b.rows; ++k) __builtin_memcpy(factors + 4 * k, b.content[k] + 4 * lane, 4);
            dot(sum.content[row] + 4 * lane, a.content[row], factors, b.rows);
        }
    }
}

template <class Left>
inline void dot_bytes(uint8_t* sum, const uint8_t* a, const uint8_t* b, int count) {
    uint32_t total;
    __builtin_memcpy(&total, sum, 4);
    for (int i = 0; i < 4 * count; ++i) {
        total += static_cast<uint32_t>(static_cast<int32_t>(static_cast<Left>(a[i])) * static_cast<int8_t>(b[i]));
    }
    __builtin_memcpy(sum, &total, 4);
}

template <int kSum, int kA, int kB>
inline void dot_signed_tiles() {
    dot_model_tiles<kSum, kA, kB>(dot_bytes<int8_t>);
}

template <int kSum, int kA, int kB>
inline void dot_unsigned_tiles() {
    dot_model_tiles<kSum, kA, kB>(dot_bytes<uint8_t>);
}

inline float without_denormal(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if ((bits & 0x7F800000u) == 0) bits &= 0x80000000u;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline float model_real(const uint8_t* at) {
    uint16_t upper;
    __builtin_memcpy(&upper, at, 2);
    const uint32_t bits = static_cast<uint32_t>(upper) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return without_denormal(value);
}

template <int kSum, int kA, int kB>
inline void dot_bfloat16_tiles() {
    dot_model_tiles<kSum, kA, kB>([](uint8_t* sum, const uint8_t* a, const uint8_t* b, int count) {
        float parts[2] = {};
        for (int i = 0; i < 2 * count; ++i) {
            float& part = parts[i % 2];
            part = without_denormal(__builtin_fmaf(model_real(a + 2 * i), model_real(b + 2 * i), part));
        }
        float total;
        __builtin_memcpy(&total, sum, 4);
        total = without_denormal(without_denormal(total) + without_denormal(parts[0] + parts[1]));
        __builtin_memcpy(sum, &total, 4);
    });
}

}  // namespace
}  // namespace trireme
