// The primitives that kernels are written with: PTX on a GPU, emulator/ on a CPU. No other file has either.
//
// All collectives are of a full warp. Shared memory is dynamic. No header of CUDA is included, so NVRTC needs
// nothing but this folder.
//
// Source: PTX ISA 9.0: cp.async, ldmatrix, mma.m16n8k16, cvt, fma.rn.bf16x2, atom, membar.

#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};
// 16 bytes, moved as one.
struct alignas(16) Words4 {
    u32 word[4];
};

constexpr int warp_lanes = 32;

#if defined(TRIREME_EMULATOR)
#include "prim_emulated.h"
#else

#define DEVICE __device__ __forceinline__

DEVICE u8* prim_shared() {
    extern __shared__ __align__(1024) u8 prim_shared_bytes[];
    return prim_shared_bytes;
}

DEVICE void prim_sync_block() { __syncthreads(); }
DEVICE void prim_sync_warp() { __syncwarp(); }
DEVICE void prim_fence() { __threadfence(); }

template <class T>
DEVICE T prim_shuffle(T value, int lane) {
    return __shfl_sync(0xFFFFFFFFu, value, lane);
}

template <class T>
DEVICE T prim_shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

DEVICE u32 prim_ballot(bool vote) { return __ballot_sync(0xFFFFFFFFu, vote); }

DEVICE u32 prim_shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// Copy 16 bytes from global to shared memory, past L1; zeros if not valid, and then `global` is not read.
DEVICE void prim_copy_async(void* shared, const void* global, bool is_valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(prim_shared_address(shared)), "l"(global),
                 "r"(is_valid ? 16 : 0)
                 : "memory");
}
DEVICE void prim_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS_LEFT>
DEVICE void prim_copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane 8 i + r names row r of matrix i.
DEVICE void prim_ldmatrix(u32 (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(prim_shared_address(row))
                 : "memory");
}
DEVICE void prim_ldmatrix_transposed(u32 (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(prim_shared_address(row))
                 : "memory");
}

// c += a b of 16x16 and 16x8.
DEVICE void prim_mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, f16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void prim_mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE float to_float(f16 value) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
    return out;
}
DEVICE float to_float(bf16 value) { return __uint_as_float(static_cast<u32>(value.bits) << 16); }
DEVICE void from_float(f16& out, float value) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value)); }
DEVICE void from_float(bf16& out, float value) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value)); }

// Two values to one word, the first in the low half.
DEVICE u32 prim_pack(float low, float high, f16) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
DEVICE u32 prim_pack(float low, float high, bf16) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

// a b + c in both halves, rounded once.
DEVICE u32 prim_fma2(u32 a, u32 b, u32 c, f16) {
    u32 out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}
DEVICE u32 prim_fma2(u32 a, u32 b, u32 c, bf16) {
    u32 out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// To 2 ulp, without the detour of subnormal results.
DEVICE float prim_exp2(float value) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(value));
    return out;
}

// Byte i of the result is byte (selector >> 4 i & 7) of b:a.
DEVICE u32 prim_permute_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// A load that L1, which does not see what other blocks write, does not answer.
DEVICE float prim_load_past_l1(const float* from) { return __ldcg(from); }

// Rounded to nearest, and never fused with what is around them.
DEVICE float prim_multiply(float a, float b) { return __fmul_rn(a, b); }
DEVICE float prim_subtract(float a, float b) { return __fsub_rn(a, b); }
DEVICE float prim_divide(float a, float b) { return __fdiv_rn(a, b); }

DEVICE u32 prim_float_bits(float value) { return __float_as_uint(value); }
DEVICE float prim_bits_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u64 prim_multiply_high(u64 a, u64 b) { return __umul64hi(a, b); }
DEVICE int prim_count_ones(u64 bits) { return __popcll(bits); }
DEVICE int prim_lowest_bit(u32 bits) { return __ffs(static_cast<int>(bits)) - 1; }

DEVICE u32 prim_atomic_add(u32* address, u32 value) { return atomicAdd(address, value); }
DEVICE u64 prim_atomic_add(u64* address, u64 value) { return atomicAdd(address, value); }
DEVICE u64 prim_atomic_min(u64* address, u64 value) { return atomicMin(address, value); }

#endif

template <class T>
DEVICE T rounded(float value) {
    T out;
    from_float(out, value);
    return out;
}

DEVICE float to_float(float value) { return value; }
DEVICE void from_float(float& out, float value) { out = value; }

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
