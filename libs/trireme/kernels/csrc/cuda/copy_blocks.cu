// copy_blocks: copy blocks of one array to blocks of another, to gather or scatter one layer's KV.
//
//   from, to      [blocks, block_bytes]   bytes; they do not overlap
//   from_blocks   [count]                 int64, or null: 0, 1, 2, ...
//   to_blocks     [count]                 int64, distinct, or null: 0, 1, 2, ...
//
// Requires    block_bytes % 16 == 0.
// Launch      grid (pieces of 4096 bytes, count) of 256 threads, 16 bytes a thread. One launch a layer, so that the
//             copy of a layer can start, or its reader go on, while others are still busy.
// Cost        memory bound: 2 * count * block_bytes.
// Reference   tests/cuda/test_elementwise.py, equal bit for bit.

#include "prim.cuh"

__global__ void __launch_bounds__(256)
    copy_blocks(const u8* from, u8* to, const i64* from_blocks, const i64* to_blocks, i64 block_bytes) {
    const i64 at = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * i64(sizeof(Words4));
    if (at >= block_bytes) return;
    const int pair = blockIdx.y;
    const i64 source = from_blocks ? from_blocks[pair] : pair, target = to_blocks ? to_blocks[pair] : pair;
    *reinterpret_cast<Words4*>(to + target * block_bytes + at) =
        *reinterpret_cast<const Words4*>(from + source * block_bytes + at);
}
