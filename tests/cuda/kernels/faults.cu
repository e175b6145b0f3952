// faults: kernels with one mistake each, and their right twins, for the emulator's own tests.

#include "prim.cuh"

DEVICE float* shared_floats() { return reinterpret_cast<float*>(prim_shared()); }

// Each thread writes its own float of shared memory and reads that of another. HAS_BARRIER 0: none between,
// 1: a __syncwarp, 2: a barrier of the block.
template <int HAS_BARRIER, int DISTANCE>
__global__ void neighbours(float* out) {
    const int thread = threadIdx.x, other = thread ^ DISTANCE;
    shared_floats()[thread] = thread;
    if (HAS_BARRIER == 1) prim_sync_warp();
    if (HAS_BARRIER == 2) prim_sync_block();
    out[thread] = shared_floats()[other];
}

// A buffer of shared memory is filled again while others may still read it.
template <bool HAS_BARRIER>
__global__ void refilled(float* out) {
    const int thread = threadIdx.x;
    float sum = 0.0f;
    for (int round = 0; round < 3; ++round) {
        shared_floats()[thread] = thread + round;
        prim_sync_block();
        sum += shared_floats()[(thread + 32) % blockDim.x];
        if (HAS_BARRIER) prim_sync_block();
    }
    out[thread] = sum;
}

// The first warp writes anew what the second may still read.
__global__ void overtaken(float* out) {
    const int thread = threadIdx.x;
    shared_floats()[thread] = thread;
    prim_sync_block();
    if (thread < 32) shared_floats()[thread] = 0.0f;
    else out[thread] = shared_floats()[thread - 32];
}

template <int ABSENT_LANE>
__global__ void shuffles(float* out) {
    float value = threadIdx.x;
    if (threadIdx.x != ABSENT_LANE) value = prim_shuffle_xor(value, 1);
    out[threadIdx.x] = value;
}

template <bool LEAVES>
__global__ void leaves(float* out) {
    if (LEAVES && threadIdx.x == 40) return;
    prim_sync_block();
    out[threadIdx.x] = 1.0f;
}

// WAITS: groups that may still be in flight; 0 is right for the last of two.
template <int WAITS>
__global__ void copies(const float* in, float* out) {
    float* shared = shared_floats();
    for (int half = 0; half < 2; ++half) {
        prim_copy_async(shared + 128 * half + 4 * threadIdx.x, in + 128 * half + 4 * threadIdx.x, half == 0);
        prim_copy_commit();
    }
    prim_copy_wait<WAITS>();
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
    for (int i = 0; WAITS == 0 && i < 4; ++i) out[128 + 4 * threadIdx.x + i] = shared[128 + 4 * threadIdx.x + i];
    if (WAITS == 2) prim_copy_wait<0>();
}

template <int OFFSET>
__global__ void beyond(float* out) {
    out[static_cast<int>(threadIdx.x) + OFFSET] = 1.0f;
}

__global__ void misaligned(float* out) { *reinterpret_cast<u64*>(out + 1) = threadIdx.x; }

__global__ void unwritten(float* out) { out[threadIdx.x] = shared_floats()[threadIdx.x]; }

// What is there depends on which block comes last.
__global__ void last_wins(float* out) { out[threadIdx.x] = blockIdx.x; }

// Whichever block counts last reads what the others wrote. HANDS_OVER 0: without counting; 1: a block counts itself
// before all its threads have written; 2: after.
template <int HANDS_OVER>
__global__ void handovers(float* parts, float* out, u32* counter) {
    auto* arrived = reinterpret_cast<u32*>(prim_shared());
    parts[blockIdx.x * blockDim.x + threadIdx.x] = 1.0f;
    if (HANDS_OVER == 2) prim_sync_block();
    if (threadIdx.x == 0) *arrived = HANDS_OVER ? prim_atomic_add(counter, 1u) : gridDim.x - 1;
    prim_sync_block();
    if (*arrived != gridDim.x - 1) return;
    float sum = 0.0f;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += parts[block * blockDim.x + (threadIdx.x ^ 1)];
    out[threadIdx.x] = sum;
}

// A thread reads from global memory what its neighbour wrote there.
template <bool HAS_BARRIER>
__global__ void passes_on(float* out) {
    out[threadIdx.x] = 1.0f;
    if (HAS_BARRIER) prim_sync_block();
    const float value = out[threadIdx.x ^ 32];
    prim_sync_block();
    out[threadIdx.x] = value + 1.0f;
}

__global__ void counts(u32* out) {
    auto* shared = reinterpret_cast<u32*>(prim_shared());
    if (threadIdx.x < 2) shared[threadIdx.x] = 0;
    prim_sync_block();
    prim_atomic_add(shared + threadIdx.x % 2, threadIdx.x);
    prim_sync_block();
    if (threadIdx.x < 2) prim_atomic_add(out + threadIdx.x, shared[threadIdx.x]);
    if (threadIdx.x < 32) out[2] = prim_ballot(threadIdx.x % 3 == 0);
}
