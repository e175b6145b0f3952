// The primitives of cuda/prim_sm90.cuh, emulated: same names, same meaning.

#pragma once

DEVICE void prim_fence_proxy() { emulator_fence_proxy(); }

DEVICE void prim_wgmma_fence(u32 (&)[4], EMULATOR_CALLER) {
    emulator::Exchange none{};
    emulator_meet(emulator::Collective::wgmma_fence, &none, file, line);
}
DEVICE void prim_wgmma_commit(EMULATOR_CALLER) {
    emulator::Exchange none{};
    emulator_meet(emulator::Collective::wgmma_commit, &none, file, line);
}
template <int GROUPS_LEFT>
DEVICE void prim_wgmma_wait(EMULATOR_CALLER) {
    emulator::Exchange exchange{};
    exchange.argument = GROUPS_LEFT;
    emulator_meet(emulator::Collective::wgmma_wait, &exchange, file, line);
}
template <int COUNT>
DEVICE void prim_wgmma_take(float (&)[COUNT]) {}

template <int COUNT>
DEVICE void emulated_wgmma(emulator::Collective kind, float (&d)[COUNT], const u32 (&a)[4], u64 b, bool adds,
                           const char* file, int line) {
    emulator::Exchange exchange{};
    exchange.words[0] = adds;
    exchange.argument = 2 * COUNT;
    exchange.pointer = a;
    exchange.sums = d;
    exchange.descriptor = b;
    emulator_meet(kind, &exchange, file, line);
}
template <int COUNT>
DEVICE void prim_wgmma(float (&d)[COUNT], const u32 (&a)[4], u64 b, bool adds, f16, EMULATOR_CALLER) {
    emulated_wgmma(emulator::Collective::wgmma_f16, d, a, b, adds, file, line);
}
template <int COUNT>
DEVICE void prim_wgmma(float (&d)[COUNT], const u32 (&a)[4], u64 b, bool adds, bf16, EMULATOR_CALLER) {
    emulated_wgmma(emulator::Collective::wgmma_bf16, d, a, b, adds, file, line);
}
