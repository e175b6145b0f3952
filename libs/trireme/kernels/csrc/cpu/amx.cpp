// The kernels for AMX with int8 and bfloat16, beside AVX-512. A compiler that has no AMX builds none.
#include "linear.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include "lanes_avx512.h"
#include "tiles_amx.h"
// The lanes and tiles come first: the kernels are written against them.
#include "tile_kernels.h"

namespace trireme {
const Kernels kAmxKernels = {prepare_tiles, multiply_with_tiles, kFloatParts * sizeof(uint16_t), kSpareRows};
}
#else
namespace trireme {
const Kernels kAmxKernels = {};
}
#endif
