// The primitives of cuda/prim.cuh, emulated: same names, same meaning.

#pragma once

#include <algorithm>
#include <cstring>

#include "emulator.h"

#define DEVICE inline __attribute__((always_inline))
#define EMULATOR_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

DEVICE u8* prim_shared() { return emulator_shared(); }

DEVICE void prim_sync_block(EMULATOR_CALLER) {
    emulator::Exchange none{};
    emulator_meet(emulator::Collective::block_barrier, &none, file, line);
}
DEVICE void prim_sync_warp(EMULATOR_CALLER) {
    emulator::Exchange none{};
    emulator_meet(emulator::Collective::warp_barrier, &none, file, line);
}
DEVICE void prim_fence() {}

template <class T>
DEVICE T prim_shuffle(T value, int lane, EMULATOR_CALLER) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "as on a GPU");
    emulator::Exchange exchange{};
    std::memcpy(exchange.words, &value, sizeof(T));
    exchange.argument = lane;
    emulator_meet(emulator::Collective::shuffle, &exchange, file, line);
    std::memcpy(&value, exchange.words, sizeof(T));
    return value;
}
template <class T>
DEVICE T prim_shuffle_xor(T value, int mask, EMULATOR_CALLER) {
    return prim_shuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask, file, line);
}
DEVICE u32 prim_ballot(bool vote, EMULATOR_CALLER) {
    emulator::Exchange exchange{};
    exchange.words[0] = vote;
    emulator_meet(emulator::Collective::ballot, &exchange, file, line);
    return exchange.words[0];
}

// Shared memory begins at 0.
DEVICE u32 prim_shared_address(const void* pointer) {
    return static_cast<u32>(static_cast<const u8*>(pointer) - emulator_shared());
}

DEVICE void prim_copy_async(void* shared, const void* global, bool is_valid) {
    emulator_copy_async(shared, global, is_valid);
}
DEVICE void prim_copy_commit() { emulator_copy_commit(); }
template <int GROUPS_LEFT>
DEVICE void prim_copy_wait() {
    emulator_copy_wait(GROUPS_LEFT);
}

DEVICE void prim_ldmatrix(u32 (&out)[4], const void* row, EMULATOR_CALLER) {
    emulator::Exchange exchange{};
    exchange.argument = 4;
    exchange.pointer = row;
    emulator_meet(emulator::Collective::ldmatrix, &exchange, file, line);
    std::memcpy(out, exchange.words, 16);
}
DEVICE void prim_ldmatrix_transposed(u32 (&out)[4], const void* row, EMULATOR_CALLER) {
    emulator::Exchange exchange{};
    exchange.argument = 4;
    exchange.pointer = row;
    emulator_meet(emulator::Collective::ldmatrix_transposed, &exchange, file, line);
    std::memcpy(out, exchange.words, 16);
}

inline void emulated_mma(emulator::Collective kind, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, const char* file,
                         int line) {
    emulator::Exchange exchange{};
    std::memcpy(exchange.words, a, 16);
    exchange.words[4] = b0;
    exchange.words[5] = b1;
    std::memcpy(exchange.words + 6, c, 16);
    emulator_meet(kind, &exchange, file, line);
    std::memcpy(c, exchange.words + 6, 16);
}
DEVICE void prim_mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, f16, EMULATOR_CALLER) {
    emulated_mma(emulator::Collective::mma_f16, c, a, b0, b1, file, line);
}
DEVICE void prim_mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16, EMULATOR_CALLER) {
    emulated_mma(emulator::Collective::mma_bf16, c, a, b0, b1, file, line);
}

DEVICE float to_float(f16 value) { return emulator_float_from_f16(value.bits); }
DEVICE float to_float(bf16 value) { return emulator_float_from_bf16(value.bits); }
DEVICE void from_float(f16& out, float value) { out.bits = emulator_f16_from_float(value); }
DEVICE void from_float(bf16& out, float value) { out.bits = emulator_bf16_from_float(value); }

template <class T>
inline u32 emulated_pack(float low, float high) {
    T parts[2];
    from_float(parts[0], low);
    from_float(parts[1], high);
    return parts[0].bits | static_cast<u32>(parts[1].bits) << 16;
}
DEVICE u32 prim_pack(float low, float high, f16) { return emulated_pack<f16>(low, high); }
DEVICE u32 prim_pack(float low, float high, bf16) { return emulated_pack<bf16>(low, high); }

template <class T>
inline u32 emulated_fma2(u32 a, u32 b, u32 c) {
    float out[2];
    for (int half = 0; half < 2; ++half) {
        const auto part = [half](u32 word) { return double{to_float(T{static_cast<u16>(word >> 16 * half)})}; };
        out[half] = static_cast<float>(part(a) * part(b) + part(c));
    }
    return emulated_pack<T>(out[0], out[1]);
}
DEVICE u32 prim_fma2(u32 a, u32 b, u32 c, f16) { return emulated_fma2<f16>(a, b, c); }
DEVICE u32 prim_fma2(u32 a, u32 b, u32 c, bf16) { return emulated_fma2<bf16>(a, b, c); }

DEVICE float prim_exp2(float value) { return std::exp2(value); }
DEVICE u32 prim_permute_bytes(u32 a, u32 b, u32 selector) {
    const u64 bytes = a | static_cast<u64>(b) << 32;
    u32 out = 0;
    for (int i = 0; i < 4; ++i) out |= static_cast<u32>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return out;
}
DEVICE float prim_multiply(float a, float b) { return a * b; }
DEVICE float prim_subtract(float a, float b) { return a - b; }
DEVICE float prim_divide(float a, float b) { return a / b; }
DEVICE float prim_load_past_l1(const float* from) { return *from; }

DEVICE u32 prim_float_bits(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
DEVICE float prim_bits_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
DEVICE u64 prim_multiply_high(u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); }
DEVICE int prim_count_ones(u64 bits) { return __builtin_popcountll(bits); }
DEVICE int prim_lowest_bit(u32 bits) { return __builtin_ctz(bits); }

DEVICE u32 prim_atomic_add(u32* address, u32 value) { return emulator_atomic_add_u32(address, value); }
DEVICE u64 prim_atomic_add(u64* address, u64 value) { return emulator_atomic_add_u64(address, value); }
DEVICE u64 prim_atomic_min(u64* address, u64 value) { return emulator_atomic_min_u64(address, value); }

using std::max;
using std::min;

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
