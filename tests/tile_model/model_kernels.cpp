// The kernels for tile registers on a model of them, beside AVX2.
#include "lanes_avx2.h"
#include "tiles_model.h"
// The lanes and tiles come first: the kernels are written against them.
#include "tile_kernels.h"

namespace trireme {
extern const Kernels kModelKernels;
const Kernels kModelKernels = {prepare_tiles, multiply_with_tiles, kFloatParts * sizeof(uint16_t), kSpareRows};
}  // namespace trireme

#if __STDC_HOSTED__
#include "multiply.h"

// As trireme_linear, without a level.
extern "C" int model_linear(const trireme::Call* call, int threads) {
    return trireme::multiply(*call, trireme::kModelKernels, threads);
}

// Tile products since the last call.
extern "C" int64_t model_products() { return __atomic_exchange_n(&trireme::model_products, 0, __ATOMIC_RELAXED); }
#endif
