// group_by_expert: which tokens each expert works on, and the tiles of tokens that blocks of expert_gemm take.
//
//   experts   [places]             int64; place t * chosen + i is the i-th choice of token t
//   order     [places]             int32; all places, by expert, those of one expert in their order
//   tokens    [places]             int32; order / chosen
//   tiles     [most_tiles, 3]      int32; expert, begin and end in `order`; of those that are not needed -1, 0, 0
//
// Requires    0 <= experts < num_experts < 2**bits; most_tiles * tile >= places + min(num_experts, places) * (tile - 1).
// Launch      one block of whole warps, as many as the places are worth; their number does not change the result.
//             Shared memory: 4 * num_experts * (warps + 3) bytes.
// Invariant   each place has exactly one position; a tile has at most `tile` positions, all of one expert.
// Cost        latency bound: two passes over 8 * places bytes by one multiprocessor, ballots instead of atomics.
// Reference   tests/cuda/test_experts.py, a stable sort.
// Source      Rajbhandari et al., DeepSpeed-MoE, ICML 2022 (a table in place of one-hot masks; here no token is
//             dropped: an expert has room for all).

#include "prim.cuh"

// Lanes that have the same value of `bits` bits.
DEVICE u32 lanes_alike(int value, int bits) {
    u32 alike = 0xFFFFFFFFu;
    for (int bit = 0; bit < bits; ++bit) {
        const bool is_set = value >> bit & 1;
        const u32 votes = prim_ballot(is_set);
        alike &= is_set ? votes : ~votes;
    }
    return alike;
}

// The sum of lower lanes' values.
DEVICE int sum_below(int value, int lane) {
    int total = value;
    for (int distance = 1; distance < warp_lanes; distance *= 2) {
        const int other = prim_shuffle(total, lane >= distance ? lane - distance : lane);
        total += lane >= distance ? other : 0;
    }
    return total - value;
}

__global__ void __launch_bounds__(1024)
    group_by_expert(const i64* experts, int* order, int* tokens, int* tiles, int places, int num_experts, int bits,
                    int chosen, int tile, int most_tiles) {
    const int thread = threadIdx.x, lane = thread % warp_lanes, warp = thread / warp_lanes;
    const int threads = blockDim.x, warps = threads / warp_lanes;
    int* counts = reinterpret_cast<int*>(prim_shared());  // [warps, num_experts]
    int* begins = counts + warps * num_experts;           // positions, of each expert
    int* ends = begins + num_experts;
    int* first_tiles = ends + num_experts;
    const int steps = ceil_div(ceil_div(places, warp_lanes), warps);
    const int first = warp * steps * warp_lanes;

    for (int at = thread; at < warps * num_experts; at += threads) counts[at] = 0;
    prim_sync_block();
    int* mine = counts + warp * num_experts;
    for (int step = 0; step < steps; ++step) {
        const int place = first + step * warp_lanes + lane;
        const int expert = place < places ? static_cast<int>(experts[place]) : num_experts;
        const u32 alike = lanes_alike(expert, bits);
        if (place < places && prim_lowest_bit(alike) == lane) mine[expert] += prim_count_ones(alike);
        prim_sync_warp();
    }
    prim_sync_block();

    // Counts become the places of lower warps; then positions and tiles of lower experts.
    for (int expert = thread; expert < num_experts; expert += threads) {
        int total = 0;
        for (int other = 0; other < warps; ++other) {
            const int count = counts[other * num_experts + expert];
            counts[other * num_experts + expert] = total;
            total += count;
        }
        ends[expert] = total;
    }
    prim_sync_block();
    int used_positions = 0, used_tiles = 0;
    for (int base = 0; warp == 0 && base < num_experts; base += warp_lanes) {
        const int expert = base + lane, count = expert < num_experts ? ends[expert] : 0;
        const int own_tiles = ceil_div(count, tile);
        const int begin = used_positions + sum_below(count, lane), first_tile = used_tiles + sum_below(own_tiles, lane);
        if (expert < num_experts) {
            begins[expert] = begin;
            ends[expert] = begin + count;
            first_tiles[expert] = first_tile;
        }
        used_positions = prim_shuffle(begin + count, warp_lanes - 1);
        used_tiles = prim_shuffle(first_tile + own_tiles, warp_lanes - 1);
    }
    prim_sync_block();

    for (int step = 0; step < steps; ++step) {
        const int place = first + step * warp_lanes + lane;
        const int expert = place < places ? static_cast<int>(experts[place]) : num_experts;
        const u32 alike = lanes_alike(expert, bits);
        if (place < places) {
            const int position = begins[expert] + mine[expert] + prim_count_ones(alike & ((1u << lane) - 1));
            order[position] = place;
            tokens[position] = place / chosen;
        }
        prim_sync_warp();
        if (place < places && prim_lowest_bit(alike) == lane) mine[expert] += prim_count_ones(alike);
        prim_sync_warp();
    }
    for (int expert = thread; expert < num_experts; expert += threads)
        for (int at = begins[expert], to = 3 * first_tiles[expert]; at < ends[expert]; at += tile, to += 3) {
            tiles[to] = expert;
            tiles[to + 1] = at;
            tiles[to + 2] = min(at + tile, ends[expert]);
        }
    const int last = num_experts - 1;
    const int all_tiles = first_tiles[last] + ceil_div(ends[last] - begins[last], tile);
    for (int at = 3 * all_tiles + thread; at < 3 * most_tiles; at += threads) tiles[at] = at % 3 ? 0 : -1;
}
