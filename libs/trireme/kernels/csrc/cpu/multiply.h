// A product on all threads.
#pragma once

#include "linear.h"

namespace trireme {

enum Outcome { kDone, kNoMemory, kNoKernels };

// Compute call.out. `residual` may be `out` itself.
int multiply(const Call& call, const Kernels& kernels, int threads);

}  // namespace trireme
