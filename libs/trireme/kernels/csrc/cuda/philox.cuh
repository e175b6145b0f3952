// Philox4x32-10: the same draws as libs/trireme/engine/philox.py.
//
// Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.

#pragma once

#include "prim.cuh"

// 53 random bits for a seed and a token index; as a fraction of 2**53 the draw of engine/philox.py's `uniforms`.
DEVICE u64 philox_draw(u64 seed, u64 index) {
    u32 counter[4] = {static_cast<u32>(index), static_cast<u32>(index >> 32), 0, 0};
    u32 key[2] = {static_cast<u32>(seed), static_cast<u32>(seed >> 32)};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 first = u64(0xD2511F53u) * counter[0], second = u64(0xCD9E8D57u) * counter[2];
        counter[0] = static_cast<u32>(second >> 32) ^ counter[1] ^ key[0];
        counter[1] = static_cast<u32>(second);
        counter[2] = static_cast<u32>(first >> 32) ^ counter[3] ^ key[1];
        counter[3] = static_cast<u32>(first);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return u64(counter[0] >> 5) << 26 | counter[1] >> 6;
}
