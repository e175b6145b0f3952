// What the parts of the library share: the weight as Python describes it, one call, and the kernels of one
// instruction set.
//
// Layout of a weight (outputs, inputs): tiles of 16 outputs, in a tile blocks of 64 inputs, both padded with
// weights of value 0. A tile's bytes are contiguous, so a kernel reads one stream, and each of 16 lanes is an
// output, so no sum ever crosses lanes. pack in low_bit_layout.py writes it; decode.h reads it.
#pragma once

#include <cstdint>

namespace trireme {

constexpr int kTile = 16;   // outputs
constexpr int kBlock = 64;  // inputs that share a step of the fixed-point activations
constexpr int kSpan = 32;   // inputs decoded at a time; the smallest group

enum Format : int32_t { kInt8, kInt4, kFloat6, kFloat5, kBfloat16, kFormats };

// Mirrored by ctypes in cpu_library.py.
struct Weight {
    const uint8_t* words;
    const float* scales;   // (tiles, groups, 16)
    const uint8_t* zeros;  // the same shape, or null
    int64_t outputs;
    int64_t inputs;
    int32_t format;
    int32_t group;       // inputs that share a scale; 0: the row does
    int8_t power[16];    // minifloats: by the upper 4 bits of a code, the signed power of two
    uint8_t mantissa[16];  // and what the mantissa has besides the code's other bits
    float unit;          // what 1 of the decoded integers is worth before the scale
    const int32_t* input_order;  // (inputs): the input of each column, or null: they are in order
};

enum Type : int32_t { kFloat32, kHalfFloat };  // kHalfFloat: bfloat16

struct Call {
    const Weight* weight;
    const void* x;         // (rows, inputs), rows `stride` elements apart
    const void* bias;      // (outputs), or null
    const void* residual;  // (rows, outputs), contiguous, or null
    void* out;             // (rows, outputs), contiguous
    int64_t rows;
    int64_t stride;
    int32_t type;  // of all four
};

static_assert(sizeof(Weight) == 96 && sizeof(Call) == 64, "cpu_library.py has these sizes too");

// The activations of a call as the kernels read them; rows are `stride` elements apart and padded to whole
// blocks with 0.
struct Activations {
    int16_t* codes;  // fixed point, in steps of the block
    float* steps;    // (rows, blocks): what 1 is worth; NaN if the block holds an infinity or a NaN
    int32_t* sums;   // (rows, spans) of codes
    void* reals;     // instead of all three, for bfloat16 weights: float, or parts of bfloat16
    int64_t stride;
};

// Static, as all that the kernels' files share must be: the linker may not hand one instruction set another's code.
static inline int64_t blocks_of(int64_t inputs) { return (inputs + kBlock - 1) / kBlock; }
static inline int64_t tiles_of(int64_t outputs) { return (outputs + kTile - 1) / kTile; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int kRowsAtOnce = 96;  // rows that share one decoding of a tile; their activations fit a 512 KiB cache
constexpr int64_t kWorkBytes = 24 * 1024;  // 16 KiB of a tile and its totals, or the totals of 4 tiles

// One instruction set's kernels.
struct Kernels {
    // Bring rows [first, last) of call.x into `activations`.
    void (*prepare)(const Call& call, const Activations& activations, int64_t first, int64_t last);
    // Outputs of tiles [first_tile, last_tile) for rows [first_row, last_row), at most kRowsAtOnce.
    // `work` is kWorkBytes of the thread's own, aligned to 64.
    void (*multiply)(const Call& call, const Activations& activations, int64_t first_tile, int64_t last_tile,
                     int64_t first_row, int64_t last_row, void* work);
    int32_t real_bytes;  // of one element of Activations::reals
    int32_t spare_rows;  // that `multiply` may read behind the last; what they hold does not matter
};

extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;  // all null where the compiler has no AMX

}  // namespace trireme
