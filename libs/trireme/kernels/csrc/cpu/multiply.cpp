#include "multiply.h"

#include "input_order.h"
#include "room.h"
#include "thread_pool.h"

namespace trireme {
namespace {

constexpr int64_t kPieceBytes = 64 * 1024;  // of weights, at least; smaller ones cost more to hand out than they save
constexpr int64_t kFewProducts = 64 * 1024;  // less than this is done before another thread has heard of it
constexpr int64_t kRowsPerPiece = 8;         // of activations to prepare

thread_local Room activation_room;
thread_local Room order_room;

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Job {
    const Call& call;
    const Kernels& kernels;
    Activations activations;
    int64_t tiles_per_piece;
    int64_t tile_pieces;
};

void prepare_piece(void* context, int64_t index) {
    const Job& job = *static_cast<Job*>(context);
    const int64_t first = index * kRowsPerPiece;
    job.kernels.prepare(job.call, job.activations, first, least(first + kRowsPerPiece, job.call.rows));
}

void multiply_piece(void* context, int64_t index) {
    const Job& job = *static_cast<Job*>(context);
    alignas(64) char work[kWorkBytes];
    const int64_t tiles = tiles_of(job.call.weight->outputs);
    const int64_t first_tile = index % job.tile_pieces * job.tiles_per_piece;
    const int64_t last_tile = least(first_tile + job.tiles_per_piece, tiles);
    const int64_t first_row = index / job.tile_pieces * kRowsAtOnce;
    const int64_t last_row = least(first_row + kRowsAtOnce, job.call.rows);
    job.kernels.multiply(job.call, job.activations, first_tile, last_tile, first_row, last_row, work);
}

}  // namespace

int multiply(const Call& asked, const Kernels& kernels, int threads) {
    const Weight& weight = *asked.weight;
    const int64_t blocks = blocks_of(weight.inputs), rows = asked.rows, tiles = tiles_of(weight.outputs);
    if (rows == 0) return kDone;
    const Call call = in_order(asked, order_room);
    if (!call.x) return kNoMemory;
    Job job{call, kernels, {}, 0, 0};
    Activations& x = job.activations;
    x.stride = blocks * kBlock + 32;  // rows of a power of two would share their places in the caches
    const int64_t padded_rows = rows + kernels.spare_rows;
    const int64_t code_bytes = rounded(padded_rows * x.stride * 2), step_bytes = rounded(rows * blocks * 4);
    const bool is_real = weight.format == kBfloat16;
    char* room = activation_room.at_least(is_real ? padded_rows * x.stride * kernels.real_bytes
                                                  : code_bytes + 3 * step_bytes);
    if (!room) return kNoMemory;
    if (is_real) {
        x.reals = room;
    } else {
        x.codes = reinterpret_cast<int16_t*>(room);
        x.steps = reinterpret_cast<float*>(room + code_bytes);
        x.sums = reinterpret_cast<int32_t*>(room + code_bytes + step_bytes);
    }
    if (rows * weight.inputs * weight.outputs < kFewProducts) threads = 1;
    run_pieces(prepare_piece, &job, (rows + kRowsPerPiece - 1) / kRowsPerPiece, threads);

    const int64_t tile_bytes = blocks * kBlock * kTile * (is_real ? 2 : 1);
    const int64_t smallest = (kPieceBytes + tile_bytes - 1) / tile_bytes;
    const int64_t even = tiles / (8 * threads);
    job.tiles_per_piece = rows < kRowsPerPiece && even < smallest ? smallest : even < 1 ? 1 : even;
    job.tile_pieces = (tiles + job.tiles_per_piece - 1) / job.tiles_per_piece;
    const int64_t row_pieces = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
    run_pieces(multiply_piece, &job, row_pieces * job.tile_pieces, threads);
    return kDone;
}

}  // namespace trireme
