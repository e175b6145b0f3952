#include "tiles_model.h"
// The tiles come first.
#include "tile_instructions.h"

namespace trireme {
void run_model(int which, int rows, int inner, int lanes, const uint8_t* a, const uint8_t* b, uint8_t* sum) {
    run_instruction(which, rows, inner, lanes, a, b, sum);
}
}  // namespace trireme
