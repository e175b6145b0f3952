// warpgroup: one product of a warpgroup, right and with one mistake each, for the emulator's own tests.

#include "prim_sm90.cuh"

enum Mistake {
    none,
    no_proxy_fence,
    no_barrier,
    no_fence,
    fence_before_writing,
    absent_warp,
    other_descriptor,
    plain_layout,
    misplaced,
    reads_sums,
    waits_for_too_few,
    changes_weights,
    changes_tokens,
    leaves
};

// out [64, N] = a [64, 64] b [N, 64]^T.
template <class T, int N, int MISTAKE>
__global__ void warpgroup_multiply(const T* a, const T* b, float* out) {
    const int thread = threadIdx.x, lane = thread % warp_lanes, row = thread / warp_lanes * 16 + lane / 4;
    u8* shared = prim_shared();
    for (int at = thread; at < 8 * N; at += warpgroup_threads)
        *reinterpret_cast<Words4*>(shared + at / 8 * 128 + (at % 8 ^ at / 8 % 8) * 16) =
            *reinterpret_cast<const Words4*>(b + 8 * at);
    if (MISTAKE != no_proxy_fence) prim_fence_proxy();
    if (MISTAKE != no_barrier) prim_sync_block();

    u32 weights[4][4];
    const auto load = [&] {
        for (int i = 0; i < 16; ++i) {
            const int column = i / 4 * 16 + i / 2 % 2 * 8 + lane % 4 * 2;
            weights[i / 4][i % 4] = *reinterpret_cast<const u32*>(a + (row + i % 2 * 8) * 64 + column);
        }
    };
    if (MISTAKE == fence_before_writing) prim_wgmma_fence(weights[0]);
    load();
    if (MISTAKE != no_fence && MISTAKE != fence_before_writing) prim_wgmma_fence(weights[0]);
    float sums[N / 2];
    u64 tokens = swizzled_matrix(prim_shared_address(shared));
    if (MISTAKE == other_descriptor && thread == 77) tokens += 2;
    if (MISTAKE == plain_layout) tokens &= ~(u64{3} << 62);
    if (MISTAKE == misplaced) tokens += 7;
    if (MISTAKE != absent_warp || thread < 96)
        for (int slice = 0; slice < 4; ++slice) {
            prim_wgmma(sums, weights[slice], tokens + 2 * slice, slice > 0, T{});
            if (slice % 2) prim_wgmma_commit();
        }
    if (MISTAKE == reads_sums) out[thread] = sums[3];
    if (MISTAKE == changes_weights) weights[2][1] = 0;
    if (MISTAKE == changes_tokens) shared[thread] = 0;
    if (MISTAKE == waits_for_too_few) prim_wgmma_wait<1>();
    else if (MISTAKE != leaves) prim_wgmma_wait<0>();
    if (MISTAKE == leaves) return;
    prim_wgmma_take(sums);
    for (int i = 0; i < N / 2; ++i)
        out[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
}
