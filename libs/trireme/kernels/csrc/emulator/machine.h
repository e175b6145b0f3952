// The state of a launch: one block at a time, its threads as fibers, its shared memory.

#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "emulator.h"
#include "global_memory.h"
#include "shared_memory.h"
#include "warpgroup.h"

namespace emulator {

struct PendingCopy {
    void* shared;
    const void* global;  // null: zeros
};

enum class Wait { ready, collective, done };

struct Thread {
    void* stack_pointer = nullptr;
    Wait wait = Wait::ready;
    Collective kind{};
    Exchange* exchange = nullptr;
    const char* file = "";
    int line = 0;
    std::deque<std::vector<PendingCopy>> copy_groups;
    std::vector<PendingCopy> open_group;
    std::uint32_t proxy_fences = 0;
};

struct Machine {
    Index3 grid{}, block{}, block_index{};
    void (*entry)(void**) = nullptr;
    void** arguments = nullptr;
    std::vector<Buffer> buffers;
    std::vector<Handover> handovers;  // of each block
    std::uint32_t block_number = 0;
    SharedMemory shared;
    std::vector<Thread> threads;
    std::vector<Warpgroup> warpgroups;
    std::vector<std::uint32_t> warp_epochs;
    std::uint32_t block_epoch = 0;
    std::uint16_t current = 0;
    void* scheduler_stack_pointer = nullptr;
    std::string error;

    bool is_running() const { return entry != nullptr; }
    Moment now() const { return {current, block_epoch, warp_epochs[current / 32], threads[current].proxy_fences}; }
    bool on_stack(const void* address) const;

    // Check an access of the current thread to `size` bytes and note it. Does not return if it is wrong.
    void touch(const void* address, std::size_t size, Access access);

    // End the launch with an error of the current thread. Does not return.
    [[noreturn]] void fail(const std::string& what);
};

extern Machine machine;

}  // namespace emulator
