// What Python calls: trireme_level says which kernels this CPU can run, trireme_linear runs them, trireme_read is
// their floor.
#include "decoder_layers.h"
#include "levels.h"
#include "multiply.h"
#include "thread_pool.h"

namespace trireme {
namespace {

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

}  // namespace
}  // namespace trireme

#define TRIREME_EXPORT extern "C" __attribute__((visibility("default")))

// The best level of this CPU: 0 none, 1 AVX2, 2 AVX-512, 3 AMX.
TRIREME_EXPORT int trireme_level() { return trireme::level_here(); }

// Compute call.out with the kernels of `level`, one that the CPU has, on up to `threads` threads. Returns 0, or 1
// without memory for the activations, or 2 where there are no kernels of that level.
TRIREME_EXPORT int trireme_linear(const trireme::Call* call, int level, int threads) {
    const trireme::Kernels* kernels = trireme::kernels_of(level);
    return kernels ? trireme::multiply(*call, *kernels, threads) : trireme::kNoKernels;
}

// Take step.x through layers [first, last), and then through the head unless it is null. Returns as trireme_linear.
TRIREME_EXPORT int trireme_decoder_layers(const trireme::DecoderShape* shape, const trireme::DecoderLayer* layers,
                                          int64_t first, int64_t last, const trireme::DecoderHead* head,
                                          const trireme::DecoderStep* step, int level, int threads) {
    const trireme::Kernels* kernels = trireme::kernels_of(level);
    if (!kernels) return trireme::kNoKernels;
    const int outcome = trireme::run_layers(*shape, layers, first, last, *step, *kernels, threads);
    return outcome || !head ? outcome : trireme::run_head(*shape, *head, *step, *kernels, threads);
}

// Read `bytes` bytes, a multiple of 8, on up to `threads` threads and do nothing with them: their sum.
TRIREME_EXPORT uint64_t trireme_read(const void* from, int64_t bytes, int threads) {
    trireme::Reading reading{static_cast<const uint64_t*>(from), bytes / 8, {}};
    trireme::run_pieces(trireme::read_piece, &reading, trireme::kReadingPieces, threads);
    uint64_t sum = 0;
    for (const uint64_t part : reading.sums) sum += part;
    return sum;
}
