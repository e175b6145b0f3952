// The primitives of compute capability 9.0 alone: products of four warps together (wgmma), as prim.cuh for all others.
//
// A warpgroup is four warps of a block, threads 128 g to 128 g + 127. All of them call each of these, at one place.
// A product is asynchronous: until prim_wgmma_wait has it finished, nobody may touch its accumulators, change its
// registers of A, or write what it reads of shared memory.
//
// Source: PTX ISA 9.0: wgmma.mma_async, wgmma.fence, wgmma.commit_group, wgmma.wait_group, fence.proxy.async, the
// register fragments of m64nNk16 and the matrix descriptor.

#pragma once

#include "prim.cuh"

constexpr int warpgroup_threads = 4 * warp_lanes;

// The descriptor of a matrix in shared memory whose rows are 128 bytes, K-major, with their pieces of 16 bytes
// swizzled: piece p of row r lies at p ^ r % 8. `rows` names the first row, or 32 bytes further for each 16 columns;
// the first row is at a multiple of 1024 bytes.
DEVICE u64 swizzled_matrix(u32 rows) {
    constexpr u64 eight_rows = 1024, leading = 16, swizzle_128_bytes = 1;  // the leading offset is not used
    return (rows & 0x3FFFF) >> 4 | leading >> 4 << 16 | eight_rows >> 4 << 32 | swizzle_128_bytes << 62;
}

#if defined(TRIREME_EMULATOR)
#include "prim_sm90_emulated.h"
#else

// What this thread wrote to shared memory, by cp.async too, is there for the tensor cores of all whom a barrier tells.
DEVICE void prim_fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before a product: that its registers of A have been written.
DEVICE void prim_wgmma_fence(u32 (&a)[4]) {
    asm volatile("wgmma.fence.sync.aligned;" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}
DEVICE void prim_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS_LEFT>
DEVICE void prim_wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS_LEFT) : "memory");
}
// After all products are finished: no use of their accumulators moves up from here.
template <int COUNT>
DEVICE void prim_wgmma_take(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d = a b, plus d where `adds`, of 64 x 16 and 16 x N: warp w of the group has rows 16 w to 16 w + 15, in its
// fragments as mma.m16n8k16 has them; b is N rows of 16 columns, by their descriptor.
#define WGMMA_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_16(i) WGMMA_4(i), WGMMA_4(i + 4), WGMMA_4(i + 8), WGMMA_4(i + 12)
#define WGMMA_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_64 \
    WGMMA_NAMES_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
    "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(TYPE, N, NAMES, A, B, ADDS, ...)                                                                    \
    DEVICE void prim_wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool adds, TYPE) {                        \
        asm volatile("{ .reg .pred adds; setp.ne.b32 adds, " ADDS ", 0; wgmma.mma_async.sync.aligned.m64n" #N     \
                     "k16.f32." #TYPE "." #TYPE " {" NAMES "}, {" A "}, " B ", adds, 1, 1, 0; }"                  \
                     : __VA_ARGS__                                                                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds))            \
                     : "memory");                                                                                 \
    }
#define WGMMA_N64(TYPE) \
    WGMMA(TYPE, 64, WGMMA_NAMES_32, "%32, %33, %34, %35", "%36", "%37", WGMMA_16(0), WGMMA_16(16))
#define WGMMA_N128(TYPE)                                                                                        \
    WGMMA(TYPE, 128, WGMMA_NAMES_64, "%64, %65, %66, %67", "%68", "%69", WGMMA_16(0), WGMMA_16(16), WGMMA_16(32), \
          WGMMA_16(48))

WGMMA_N64(f16)
WGMMA_N64(bf16)
WGMMA_N128(f16)
WGMMA_N128(bf16)

#undef WGMMA_N128
#undef WGMMA_N64
#undef WGMMA
#undef WGMMA_NAMES_64
#undef WGMMA_NAMES_32
#undef WGMMA_16
#undef WGMMA_4

#endif
