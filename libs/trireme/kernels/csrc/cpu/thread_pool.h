// Threads that share the pieces of one job at a time.
//
// A worker without work looks for some during kSpinPauses pauses, then sleeps: the calls of one step of a model
// follow each other within that time, and between steps the cores are free. Workers are not pinned: processes
// that share a machine would pin theirs to the same cores.
#pragma once

#include <cstdint>

namespace trireme {

// A piece of a job: (context, index of the piece).
using Piece = void (*)(void* context, int64_t index);

// Run piece 0 to count - 1, on the caller and up to `threads` - 1 others; returns when all have ended. Where another
// thread's job is running, the caller does all pieces alone. After a fork the child has workers of its own.
void run_pieces(Piece piece, void* context, int64_t count, int threads);

}  // namespace trireme
