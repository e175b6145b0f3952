// The kernels for AVX-512 with VNNI.
#include "lanes_avx512.h"
// The lanes come first: the kernels are written against them.
#include "kernels.h"

namespace trireme {
const Kernels kAvx512Kernels = {prepare, multiply_tiles, sizeof(float), 0};
}
