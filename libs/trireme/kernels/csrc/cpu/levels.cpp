#include "levels.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace trireme {
namespace {

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, CPUID leaves 7 and 1DH, XCR0.
bool has_amx() {
    uint32_t a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr uint32_t kBfloat16Tiles = 1u << 22, kTiles = 1u << 24, kInt8Tiles = 1u << 25;
    constexpr uint32_t kAll = kBfloat16Tiles | kTiles | kInt8Tiles;
    if ((d & kAll) != kAll) return false;
    uint32_t saved, upper;  // what the system saves when it changes tasks
    asm volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    constexpr uint32_t kTileState = 3u << 17;
    if ((saved & kTileState) != kTileState) return false;
    if (!__get_cpuid_count(0x1D, 1, &a, &b, &c, &d)) return false;
    const uint32_t tile_bytes = a >> 16, row_bytes = b & 0xFFFF, registers = b >> 16, rows = c & 0xFFFF;
    return tile_bytes == 1024 && row_bytes == 64 && registers == 8 && rows == 16;
}

// Linux has a process ask before its first use of tile registers, since a signal's frame grows by 8 KiB. It refuses
// where a thread's own signal stack is too small, and before 5.16.
// Source: Linux, Documentation/arch/x86/xstate.rst.
bool may_use_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Level best_level() {
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!has_avx2) return kNone;
    if (!has_avx512()) return kAvx2;
    return kAmxKernels.multiply && has_amx() && may_use_tiles() ? kAmx : kAvx512;
}

}  // namespace

int level_here() {
    static const Level level = best_level();
    return level;
}

const Kernels* kernels_of(int level) {
    if (level > level_here()) return nullptr;
    switch (level) {
        case kAvx2:
            return &kAvx2Kernels;
        case kAvx512:
            return &kAvx512Kernels;
        case kAmx:
            return &kAmxKernels;
        default:
            return nullptr;
    }
}

}  // namespace trireme
