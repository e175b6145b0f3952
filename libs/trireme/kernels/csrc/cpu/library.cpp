// What Python calls: trireme_level says which kernels this CPU can run, trireme_linear runs them, trireme_read is
// their floor.
#include "decoder_layers.h"
#include "multiply.h"
#include "room.h"
#include "thread_pool.h"

namespace trireme {
namespace {

enum Level { kNone, kAvx2, kAvx512 };

constexpr int64_t kPieceBytes = 64 * 1024;  // of weights, at least; smaller ones cost more to hand out than they save
constexpr int64_t kFewProducts = 64 * 1024;  // less than this is done before another thread has heard of it
constexpr int64_t kRowsPerPiece = 8;         // of activations to prepare

int best_level() {
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!has_avx2) return kNone;
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vnni");
    return has_avx512 ? kAvx512 : kAvx2;
}

thread_local Room activation_room;

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Job {
    const Call& call;
    const Kernels& kernels;
    Activations activations;
    int64_t tiles_per_piece;
    int64_t tile_pieces;
};

void prepare_piece(void* context, int64_t index) {
    const Job& job = *static_cast<Job*>(context);
    const int64_t first = index * kRowsPerPiece;
    job.kernels.prepare(job.call, job.activations, first, least(first + kRowsPerPiece, job.call.rows));
}

void multiply_piece(void* context, int64_t index) {
    const Job& job = *static_cast<Job*>(context);
    alignas(64) char work[kWorkBytes];
    const int64_t tiles = tiles_of(job.call.weight->outputs);
    const int64_t first_tile = index % job.tile_pieces * job.tiles_per_piece;
    const int64_t last_tile = least(first_tile + job.tiles_per_piece, tiles);
    const int64_t first_row = index / job.tile_pieces * kRowsAtOnce;
    const int64_t last_row = least(first_row + kRowsAtOnce, job.call.rows);
    job.kernels.multiply(job.call, job.activations, first_tile, last_tile, first_row, last_row, work);
}

struct Reading {
    const uint64_t* words;
    int64_t count;
    uint64_t sums[256];
};

constexpr int64_t kReadingPieces = 256;

void read_piece(void* context, int64_t index) {
    Reading& reading = *static_cast<Reading*>(context);
    const int64_t last = reading.count * (index + 1) / kReadingPieces;
    uint64_t sum = 0;
    int64_t i = reading.count * index / kReadingPieces;
    for (; i + 8 <= last; i += 8) {
        __builtin_prefetch(reading.words + i + 256);  // as the products do
        for (int64_t word = i; word < i + 8; ++word) sum += reading.words[word];
    }
    for (; i < last; ++i) sum += reading.words[i];
    reading.sums[index] = sum;
}

int level_here() {
    static const int level = best_level();
    return level;
}

const Kernels* kernels_of(int level) {
    if (level > level_here()) return nullptr;
    return level == kAvx512 ? &kAvx512Kernels : level == kAvx2 ? &kAvx2Kernels : nullptr;
}

}  // namespace

int multiply(const Call& call, const Kernels& kernels, int threads) {
    const Weight& weight = *call.weight;
    const int64_t blocks = blocks_of(weight.inputs), rows = call.rows, tiles = tiles_of(weight.outputs);
    if (rows == 0) return kDone;
    Job job{call, kernels, {}, 0, 0};
    Activations& x = job.activations;
    x.stride = blocks * kBlock + 32;  // rows of a power of two would share their places in the caches
    const int64_t code_bytes = rounded(rows * x.stride * 2), step_bytes = rounded(rows * blocks * 4);
    const bool is_real = weight.format == kBfloat16;
    char* room = activation_room.at_least(is_real ? rows * x.stride * 4 : code_bytes + 3 * step_bytes);
    if (!room) return kNoMemory;
    if (is_real) {
        x.reals = reinterpret_cast<float*>(room);
    } else {
        x.codes = reinterpret_cast<int16_t*>(room);
        x.steps = reinterpret_cast<float*>(room + code_bytes);
        x.sums = reinterpret_cast<int32_t*>(room + code_bytes + step_bytes);
    }
    if (rows * weight.inputs * weight.outputs < kFewProducts) threads = 1;
    run_pieces(prepare_piece, &job, (rows + kRowsPerPiece - 1) / kRowsPerPiece, threads);

    const int64_t tile_bytes = blocks * kBlock * kTile * (is_real ? 2 : 1);
    const int64_t smallest = (kPieceBytes + tile_bytes - 1) / tile_bytes;
    const int64_t even = tiles / (8 * threads);
    job.tiles_per_piece = rows < kRowsPerPiece && even < smallest ? smallest : even < 1 ? 1 : even;
    job.tile_pieces = (tiles + job.tiles_per_piece - 1) / job.tiles_per_piece;
    const int64_t row_pieces = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
    run_pieces(multiply_piece, &job, row_pieces * job.tile_pieces, threads);
    return kDone;
}

}  // namespace trireme

#define TRIREME_EXPORT extern "C" __attribute__((visibility("default")))

// The best level of this CPU: 0 none, 1 AVX2, 2 AVX-512.
TRIREME_EXPORT int trireme_level() { return trireme::level_here(); }

// Compute call.out with the kernels of `level`, one that the CPU has, on up to `threads` threads. Returns 0, or 1
// without memory for the activations, or 2 where there are no kernels of that level.
TRIREME_EXPORT int trireme_linear(const trireme::Call* call, int level, int threads) {
    const trireme::Kernels* kernels = trireme::kernels_of(level);
    return kernels ? trireme::multiply(*call, *kernels, threads) : trireme::kNoKernels;
}

// Take step.x through layers [first, last). Returns as trireme_linear.
TRIREME_EXPORT int trireme_decoder_layers(const trireme::DecoderShape* shape, const trireme::DecoderLayer* layers,
                                          int64_t first, int64_t last, const trireme::DecoderStep* step, int level,
                                          int threads) {
    const trireme::Kernels* kernels = trireme::kernels_of(level);
    return kernels ? trireme::run_layers(*shape, layers, first, last, *step, *kernels, threads) : trireme::kNoKernels;
}

// Read `bytes` bytes, a multiple of 8, on up to `threads` threads and do nothing with them: their sum.
TRIREME_EXPORT uint64_t trireme_read(const void* from, int64_t bytes, int threads) {
    trireme::Reading reading{static_cast<const uint64_t*>(from), bytes / 8, {}};
    trireme::run_pieces(trireme::read_piece, &reading, trireme::kReadingPieces, threads);
    uint64_t sum = 0;
    for (const uint64_t part : reading.sums) sum += part;
    return sum;
}
