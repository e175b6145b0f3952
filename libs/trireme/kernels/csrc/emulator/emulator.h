// What a kernel sees in place of CUDA when g++ compiles it for the emulator.
//
// Lanes of a warp stop at every collective until all 32 are there; `file` and `line` are where the kernel
// calls it. Everything here is implemented in machine.cc, which is compiled apart and without the
// instrumentation that turns each load and store of a kernel into a call of memory_checks.cc.

#pragma once

#include <cmath>
#include <cstddef>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__
#define __launch_bounds__(...)

namespace emulator {

struct Index3 {
    unsigned x, y, z;
};

// The collectives of a warp, those of a warpgroup, and the barrier of a block.
enum class Collective : int {
    block_barrier,
    warp_barrier,
    shuffle,
    ballot,
    ldmatrix,
    ldmatrix_transposed,
    mma_f16,
    mma_bf16,
    wgmma_fence,
    wgmma_f16,
    wgmma_bf16,
    wgmma_commit,
    wgmma_wait
};

// What a lane brings to a collective and what it takes away.
struct Exchange {
    unsigned words[12];
    int argument;         // of a shuffle: the lane to read; of ldmatrix: the number of matrices; of wgmma: N, or the
                          // groups left to a wait
    const void* pointer;  // of ldmatrix: the row that this lane names; of wgmma: the registers of A
    float* sums;          // of wgmma: the accumulators; words[0] says whether it adds to them
    unsigned long long descriptor;
};

}  // namespace emulator

extern "C" {
emulator::Index3 emulator_thread_index();
emulator::Index3 emulator_block_index();
emulator::Index3 emulator_block_size();
emulator::Index3 emulator_grid_size();
unsigned char* emulator_shared();
void emulator_meet(emulator::Collective kind, emulator::Exchange* exchange, const char* file, int line);
void emulator_copy_async(void* shared, const void* global, bool is_valid);
void emulator_copy_commit();
void emulator_copy_wait(int groups_left);
void emulator_fence_proxy();
unsigned emulator_atomic_add_u32(unsigned* address, unsigned value);
unsigned long long emulator_atomic_add_u64(unsigned long long* address, unsigned long long value);
unsigned long long emulator_atomic_min_u64(unsigned long long* address, unsigned long long value);
unsigned short emulator_f16_from_float(float value);
float emulator_float_from_f16(unsigned short bits);
unsigned short emulator_bf16_from_float(float value);
float emulator_float_from_bf16(unsigned short bits);
}

#define threadIdx (emulator_thread_index())
#define blockIdx (emulator_block_index())
#define blockDim (emulator_block_size())
#define gridDim (emulator_grid_size())

namespace emulator {

// Call a kernel with arguments behind pointers, as the driver's launch takes them.
template <class... Arguments, std::size_t... Index>
__attribute__((no_sanitize("thread"))) inline void call(void (*kernel)(Arguments...), void** arguments,
                                                        std::index_sequence<Index...>) {
    kernel(*static_cast<std::remove_cv_t<Arguments>*>(arguments[Index])...);
}

template <class... Arguments>
__attribute__((no_sanitize("thread"))) inline void call(void (*kernel)(Arguments...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<Arguments...>{});
}

}  // namespace emulator
