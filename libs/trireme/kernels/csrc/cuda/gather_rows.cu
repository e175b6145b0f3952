// gather_rows: rows of a table by index; the table may lie in pinned host memory, where it is read in place.
//
//   table     [rows, pieces]      16 bytes each, contiguous; on the device, or host memory that is mapped for it
//   indices   [tokens]            int64
//   out       [tokens, pieces]    16 bytes each, contiguous; of an index that is out of range all bits are set, which
//                                 is NaN in float16, bfloat16 and float32
//
// Launch      a warp for each 2 KiB of a row, four a block of 128 threads; a lane asks for its four pieces before it
//             stores the first, since an answer over the link takes longer than one from memory.
// Cost        link bound: 16 * tokens * pieces bytes, whatever the table's size; at 55 GB/s (16 lanes of PCIe 5) a row
//             of 8192 elements of 16 bits takes 0.3 us beside the link's latency. Copying the table first is worth it
//             only for as many tokens as it has rows.
// Reference   tests/cuda/test_host_memory.py, torch.index_select, equal bit for bit.
// Source      Jeong et al., DeepPlan, EuroSys 2023 (direct host access).

#include "prim.cuh"

constexpr int lane_pieces = 4;

__global__ void __launch_bounds__(128)
    gather_rows(const Words4* table, const i64* indices, Words4* out, i64 tokens, i64 rows, int pieces) {
    const int lane = threadIdx.x % warp_lanes, chunks = ceil_div(pieces, lane_pieces * warp_lanes);
    const i64 item = i64(blockIdx.x) * (blockDim.x / warp_lanes) + threadIdx.x / warp_lanes;
    if (item >= tokens * chunks) return;
    const i64 token = item / chunks, row = indices[token];
    const int first = static_cast<int>(item % chunks) * lane_pieces * warp_lanes + lane;
    const bool is_row = 0 <= row && row < rows;

    Words4 found[lane_pieces];
#pragma unroll
    for (int i = 0; i < lane_pieces; ++i) {
        const int piece = first + i * warp_lanes;
        found[i] = {{0xFFFFFFFFu, 0xFFFFFFFFu, 0xFFFFFFFFu, 0xFFFFFFFFu}};
        if (is_row && piece < pieces) found[i] = table[row * pieces + piece];
    }
#pragma unroll
    for (int i = 0; i < lane_pieces; ++i) {
        const int piece = first + i * warp_lanes;
        if (piece < pieces) out[token * pieces + piece] = found[i];
    }
}
