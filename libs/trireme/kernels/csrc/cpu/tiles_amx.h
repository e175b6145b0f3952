// The eight tile registers of AMX: up to 16 rows of 64 bytes each. tests/tile_model/tiles_model.h has the same names in
// plain C++: kernels are written once, against these.
#pragma once

#include "tile_shapes.h"

namespace trireme {
namespace {

// Give the registers their shapes, and 0 for content.
inline void configure_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }

inline void release_tiles() { asm volatile("tilerelease"); }

template <int kAt>
inline void clear_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kAt));
}

// Rows are `stride` bytes apart.
template <int kAt>
inline void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kAt), "r"(from), "r"(stride) : "memory");
}

template <int kAt>
inline void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kAt), "r"(to), "r"(stride) : "memory");
}

// Each of the three adds to the int32 or float at (m, n) of kSum the product of row m of kA and lane n of all rows of kB.
// A lane of a row has 4 bytes, or 2 bfloat16; row k of kB meets lane k of kA.
template <int kSum, int kA, int kB>
inline void dot_signed_tiles() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

template <int kSum, int kA, int kB>
inline void dot_unsigned_tiles() {  // kA has unsigned bytes, kB signed ones
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

template <int kSum, int kA, int kB>
inline void dot_bfloat16_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace trireme
