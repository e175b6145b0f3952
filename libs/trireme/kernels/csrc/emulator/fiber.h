// Fibers: stacks that a scheduler switches between, for x86-64 under the System V ABI.
//
// A switch saves the six callee-saved registers on the old stack and takes them from the new one: no system
// call, unlike swapcontext, so a block of 128 lanes may stop at every shuffle.

#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#error "the CUDA emulator switches stacks on x86-64 only"
#endif

extern "C" void emulator_switch_stack(void** save_here, void* resume);

asm(R"(
.text
.globl emulator_switch_stack
.hidden emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch_stack, .-emulator_switch_stack
)");

namespace emulator {

// Lay out a stack so that the first switch to it enters `entry`, which must never return.
inline void* new_fiber(std::byte* stack, std::size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<std::uintptr_t>(stack + bytes) & ~std::uintptr_t{15};
    auto* slot = reinterpret_cast<std::uintptr_t*>(top);
    *--slot = 0;  // what entry would return to; keeps the ABI's alignment at its first instruction
    *--slot = reinterpret_cast<std::uintptr_t>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--slot = 0;
    return slot;
}

}  // namespace emulator
