// The instruction sets that there are kernels for.
#pragma once

#include "linear.h"

namespace trireme {

// Each with all before it.
enum Level : int { kNone, kAvx2, kAvx512, kAmx };

// The best level of this CPU that was built and that the system lets this process use; asked once.
int level_here();

// Null for kNone and what is above level_here().
const Kernels* kernels_of(int level);

}  // namespace trireme
