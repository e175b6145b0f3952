// A feed-forward of which each token uses a few experts, chosen by a router.
#pragma once

#include "linear.h"

namespace trireme {

// Mirrored by ctypes in decoder_cpu.py.
struct Mixture {
    const float* router;           // (experts, hidden)
    const Weight* const* gate_up;  // (experts)
    const Weight* const* down;     // (experts)
    int64_t experts;       // at most kMostExperts
    int64_t chosen;        // experts of one token
    int64_t inner;         // of one expert; a multiple of 8
    int64_t renormalises;  // the chosen ones' shares sum to 1
};

static_assert(sizeof(Mixture) == 56, "decoder_cpu.py has this size too");

constexpr int64_t kMostExperts = 1024;

// The experts of one row and their shares, in the order of experts: the `chosen` of the largest logits' softmax, of
// equal ones the first. `room` has place for all experts.
void choose_experts(const Mixture& mixture, const float* x, int64_t hidden, float* room, int32_t* experts, float* shares);

// Add to each row of `out` (rows, hidden) what its experts make of that row of x. Outcomes as of `multiply`.
//
// Rows are gathered by expert, so an expert's weights are read once. A row's sum runs over its experts in their order.
int run_mixture(const Mixture& mixture, const float* x, int64_t hidden, int64_t rows, float* out, const Kernels& kernels,
                int threads);

}  // namespace trireme
