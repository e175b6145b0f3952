// The kernels for AVX2 and FMA.
#include "lanes_avx2.h"
// The lanes come first: the kernels are written against them.
#include "kernels.h"

namespace trireme {
const Kernels kAvx2Kernels = {prepare, multiply_tiles, sizeof(float), 0};
}
