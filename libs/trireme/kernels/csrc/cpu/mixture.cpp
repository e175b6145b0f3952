#include "mixture.h"

#include "decoder_layers.h"
#include "multiply.h"
#include "room.h"
#include "thread_pool.h"

namespace trireme {
namespace {

thread_local Room buffers;
thread_local Room logits_room;

constexpr int64_t kRowsPerPiece = 16;

struct Job {
    const Mixture& mixture;
    const float* x;
    int64_t hidden;
    int64_t rows;
    int32_t* experts;  // (rows, chosen)
    float* shares;     // (rows, chosen)
    // One expert's rows.
    const int32_t* members;  // rows of x
    const float* member_shares;
    int64_t count;
    float* gathered;  // (count, hidden), then what comes of them
    float* gate_up;   // (count, 2 * inner)
    float* gated;     // (count, inner)
    float* out;
    bool is_out_of_memory;
};

void choose_piece(void* context, int64_t index) {
    Job& job = *static_cast<Job*>(context);
    const int64_t chosen = job.mixture.chosen;
    float* room = reinterpret_cast<float*>(logits_room.at_least(job.mixture.experts * 4));
    if (!room) {
        __atomic_store_n(&job.is_out_of_memory, true, __ATOMIC_RELAXED);
        return;
    }
    const int64_t last = least((index + 1) * kRowsPerPiece, job.rows);
    for (int64_t row = index * kRowsPerPiece; row < last; ++row) {
        choose_experts(job.mixture, job.x + row * job.hidden, job.hidden, room, job.experts + row * chosen,
                       job.shares + row * chosen);
    }
}

void gate_piece(void* context, int64_t index) {
    Job& job = *static_cast<Job*>(context);
    const int64_t first = index * kRowsPerPiece, inner = job.mixture.inner;
    const int64_t count = least(kRowsPerPiece, job.count - first);
    gate_rows(kSilu, job.gate_up + first * 2 * inner, inner, count, job.gated + first * inner);
}

int64_t pieces_of(int64_t rows) { return (rows + kRowsPerPiece - 1) / kRowsPerPiece; }

int64_t rounded(int64_t elements) { return (elements + 15) / 16 * 16; }

int run_expert(Job& job, int64_t expert, const Kernels& kernels, int threads) {
    const int64_t hidden = job.hidden, count = job.count;
    for (int64_t i = 0; i < count; ++i) {
        __builtin_memcpy(job.gathered + i * hidden, job.x + job.members[i] * hidden, hidden * sizeof(float));
    }
    const auto product = [&](const Weight* weight, const float* from, int64_t inputs, float* to) {
        return multiply(Call{weight, from, nullptr, nullptr, to, count, inputs, kFloat32}, kernels, threads);
    };
    int outcome = product(job.mixture.gate_up[expert], job.gathered, hidden, job.gate_up);
    if (outcome) return outcome;
    run_pieces(gate_piece, &job, pieces_of(count), threads);
    outcome = product(job.mixture.down[expert], job.gated, job.mixture.inner, job.gathered);
    if (outcome) return outcome;
    for (int64_t i = 0; i < count; ++i) {
        float* to = job.out + job.members[i] * hidden;
        const float* from = job.gathered + i * hidden;
        const float share = job.member_shares[i];
        for (int64_t column = 0; column < hidden; ++column) to[column] += share * from[column];
    }
    return kDone;
}

}  // namespace

int run_mixture(const Mixture& mixture, const float* x, int64_t hidden, int64_t rows, float* out, const Kernels& kernels,
                int threads) {
    const int64_t chosen = mixture.chosen, experts = mixture.experts, inner = mixture.inner;
    const int64_t sizes[] = {rounded(rows * chosen), rounded(rows * chosen), rounded(rows),
                             rounded(rows),          rounded(rows * hidden), rounded(rows * 2 * inner),
                             rounded(rows * inner)};
    int64_t total = 0;
    for (const int64_t size : sizes) total += size;
    float* at = reinterpret_cast<float*>(buffers.at_least(total * 4));
    if (!at) return kNoMemory;
    float* parts[7];
    for (int i = 0; i < 7; ++i) {
        parts[i] = at;
        at += sizes[i];
    }
    int32_t* members = reinterpret_cast<int32_t*>(parts[2]);
    Job job{mixture, x,        hidden, rows,     reinterpret_cast<int32_t*>(parts[0]), parts[1], members, parts[3], 0,
            parts[4], parts[5], parts[6], out, false};
    run_pieces(choose_piece, &job, pieces_of(rows), threads);
    if (job.is_out_of_memory) return kNoMemory;
    for (int64_t expert = 0; expert < experts; ++expert) {
        job.count = 0;
        for (int64_t i = 0; i < rows * chosen; ++i) {
            if (job.experts[i] != expert) continue;
            members[job.count] = static_cast<int32_t>(i / chosen);
            parts[3][job.count++] = job.shares[i];
        }
        if (!job.count) continue;
        const int outcome = run_expert(job, expert, kernels, threads);
        if (outcome) return outcome;
    }
    return kDone;
}

}  // namespace trireme
