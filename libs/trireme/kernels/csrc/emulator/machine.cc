// Run a launch: blocks one after the other, in each the warps, in each the lanes, each as far as it gets.
//
// A lane runs until it must wait for others, so a warp that needs no other runs far ahead of them: what a
// missing barrier would let happen on a GPU once in a while happens here always. Launches are repeated with
// the order of blocks, warps and lanes reversed.

#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "fiber.h"
#include "warp_operations.h"
#include "warpgroup_operations.h"

namespace emulator {

Machine machine;

namespace {

constexpr std::size_t stack_bytes = 64 << 10;
constexpr int warp_lanes = 32;

std::byte* stacks = nullptr;
std::size_t num_stacks = 0;

std::string location(const Thread& thread) {
    const char* slash = std::strrchr(thread.file, '/');
    return std::string(slash ? slash + 1 : thread.file) + ":" + std::to_string(thread.line);
}

void to_scheduler() {
    Thread& thread = machine.threads[machine.current];
    emulator_switch_stack(&thread.stack_pointer, machine.scheduler_stack_pointer);
}

void thread_main() {
    machine.entry(machine.arguments);
    Thread& thread = machine.threads[machine.current];
    bool has_copies = !thread.open_group.empty();
    for (const auto& group : thread.copy_groups) has_copies |= !group.empty();
    if (has_copies) machine.fail("leaves the kernel with a cp.async that it has not waited for");
    if (!machine.warpgroups[machine.current / warpgroup_threads].is_idle())
        machine.fail("leaves the kernel with a wgmma that it has not waited for");
    thread.wait = Wait::done;
    to_scheduler();
    __builtin_unreachable();
}

void start_threads(std::size_t count) {
    if (count > num_stacks) {
        if (stacks) munmap(stacks, num_stacks * stack_bytes);
        void* mapped = mmap(nullptr, count * stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        stacks = mapped == MAP_FAILED ? nullptr : static_cast<std::byte*>(mapped);
        num_stacks = stacks ? count : 0;
    }
    if (!stacks) {
        machine.error = "no memory for the stacks of " + std::to_string(count) + " threads";
        return;
    }
    machine.threads.assign(count, Thread{});
    for (std::size_t index = 0; index < count; ++index)
        machine.threads[index].stack_pointer = new_fiber(stacks + index * stack_bytes, stack_bytes, thread_main);
}

bool meet(const Thread& a, const Thread& b) {
    return a.wait == Wait::collective && a.kind == b.kind && a.line == b.line && !std::strcmp(a.file, b.file);
}

void blame(std::size_t present, std::size_t absent) {
    const Thread& missing = machine.threads[absent];
    machine.current = static_cast<std::uint16_t>(absent);
    machine.error =
        "thread " + std::to_string(absent) +
        (missing.wait == Wait::done ? std::string(" has left the kernel") : " waits at " + location(missing)) +
        " while thread " + std::to_string(present) + " waits for it at " + location(machine.threads[present]);
}

void release(std::size_t first, std::size_t count) {
    for (std::size_t index = first; index < first + count; ++index) machine.threads[index].wait = Wait::ready;
}

// Run a warp's lanes and its collectives until none can go on.
void run_warp(std::size_t warp, bool is_reversed) {
    const std::size_t first = warp * warp_lanes;
    for (;;) {
        for (int step = 0; step < warp_lanes; ++step) {
            const std::size_t index = first + (is_reversed ? warp_lanes - 1 - step : step);
            Thread& thread = machine.threads[index];
            if (thread.wait != Wait::ready) continue;
            machine.current = static_cast<std::uint16_t>(index);
            emulator_switch_stack(&machine.scheduler_stack_pointer, thread.stack_pointer);
            if (!machine.error.empty()) return;
        }
        Thread* lanes = &machine.threads[first];
        const auto* leader = std::find_if(lanes, lanes + warp_lanes, [](const Thread& lane) {
            return lane.wait == Wait::collective && lane.kind != Collective::block_barrier &&
                   !is_of_warpgroup(lane.kind);
        });
        if (leader == lanes + warp_lanes) return;  // all wait for the block or the warpgroup, or have left
        for (int lane = 0; lane < warp_lanes; ++lane)
            if (!meet(lanes[lane], *leader)) return blame(leader - machine.threads.data(), first + lane);
        const std::string wrong = operate(lanes, first);
        if (!wrong.empty()) {
            machine.error = wrong;
            return;
        }
        if (leader->kind == Collective::warp_barrier) ++machine.warp_epochs[warp];
        release(first, warp_lanes);
    }
}

// Run the collectives for which warpgroups have met; says whether there were any.
bool run_warpgroups() {
    bool any = false;
    for (std::size_t group = 0; group < machine.warpgroups.size(); ++group) {
        const std::size_t first = group * warpgroup_threads;
        const std::size_t count = std::min<std::size_t>(warpgroup_threads, machine.threads.size() - first);
        Thread* threads = &machine.threads[first];
        const auto* leader = std::find_if(threads, threads + count, [](const Thread& thread) {
            return thread.wait == Wait::collective && is_of_warpgroup(thread.kind);
        });
        if (leader == threads + count) continue;
        for (std::size_t thread = 0; thread < count; ++thread)
            if (!meet(threads[thread], *leader)) {
                blame(leader - machine.threads.data(), first + thread);
                return true;
            }
        if (count < warpgroup_threads) machine.error = "a warpgroup has 128 threads, not " + std::to_string(count);
        else machine.error = operate_together(threads, first, machine.warpgroups[group]);
        if (!machine.error.empty()) return true;
        release(first, count);
        any = true;
    }
    return any;
}

void run_block(std::size_t shared_bytes, bool is_reversed) {
    const std::size_t count = machine.block.x, warps = count / warp_lanes;
    machine.shared.reset(shared_bytes);
    machine.warp_epochs.assign(warps, 0);
    machine.warpgroups.assign((count + warpgroup_threads - 1) / warpgroup_threads, Warpgroup{});
    machine.block_epoch = 0;
    start_threads(count);
    while (machine.error.empty()) {
        for (std::size_t step = 0; step < warps && machine.error.empty(); ++step)
            run_warp(is_reversed ? warps - 1 - step : step, is_reversed);
        if (!machine.error.empty()) return;
        if (run_warpgroups()) continue;
        const auto waiting = std::find_if(machine.threads.begin(), machine.threads.end(),
                                          [](const Thread& thread) { return thread.wait == Wait::collective; });
        if (waiting == machine.threads.end()) return;
        for (std::size_t index = 0; index < count; ++index)
            if (!meet(machine.threads[index], *waiting)) return blame(waiting - machine.threads.begin(), index);
        ++machine.block_epoch;
        release(0, count);
    }
}

}  // namespace

bool Machine::on_stack(const void* address) const {
    const auto* byte = static_cast<const std::byte*>(address);
    return byte >= stacks + current * stack_bytes && byte < stacks + (current + 1) * stack_bytes;
}

void Machine::fail(const std::string& what) {
    error = "thread " + std::to_string(current) + " " + what;
    to_scheduler();
    __builtin_unreachable();
}

}  // namespace emulator

using emulator::machine;

extern "C" {

// Launch `entry` over a grid. `bounds` has two addresses for each global buffer that the kernel may touch.
// Returns 0, or 1 with what went wrong in `message`.
int emulator_launch(void (*entry)(void**), void** arguments, const unsigned* grid, unsigned threads,
                    std::size_t shared_bytes, const void** bounds, int num_buffers, int is_reversed, char* message,
                    std::size_t message_bytes) {
    machine.grid = {grid[0], grid[1], grid[2]};
    machine.block = {threads, 1, 1};
    machine.entry = entry;
    machine.arguments = arguments;
    machine.error.clear();
    machine.buffers.clear();
    for (int index = 0; index < num_buffers; ++index)
        machine.buffers.emplace_back(bounds[2 * index], bounds[2 * index + 1]);
    if (threads == 0 || threads % 32 || threads > 1024) machine.error = "a block has 32, 64, ..., 1024 threads";
    const std::size_t blocks = std::size_t{grid[0]} * grid[1] * grid[2];
    machine.handovers.assign(blocks, {});
    for (std::size_t step = 0; step < blocks && machine.error.empty(); ++step) {
        const std::size_t block = is_reversed ? blocks - 1 - step : step;
        machine.block_number = static_cast<std::uint32_t>(block);
        machine.block_index = {static_cast<unsigned>(block % grid[0]), static_cast<unsigned>(block / grid[0] % grid[1]),
                               static_cast<unsigned>(block / grid[0] / grid[1])};
        emulator::run_block(shared_bytes, is_reversed != 0);
    }
    machine.entry = nullptr;
    if (machine.error.empty()) return 0;
    std::snprintf(message, message_bytes, "block (%u, %u, %u): %s", machine.block_index.x, machine.block_index.y,
                  machine.block_index.z, machine.error.c_str());
    return 1;
}

emulator::Index3 emulator_thread_index() { return {machine.current, 0, 0}; }
emulator::Index3 emulator_block_index() { return machine.block_index; }
emulator::Index3 emulator_block_size() { return machine.block; }
emulator::Index3 emulator_grid_size() { return machine.grid; }
unsigned char* emulator_shared() { return machine.shared.base(); }

void emulator_meet(emulator::Collective kind, emulator::Exchange* exchange, const char* file, int line) {
    emulator::Thread& thread = machine.threads[machine.current];
    thread.kind = kind;
    thread.exchange = exchange;
    thread.file = file;
    thread.line = line;
    thread.wait = emulator::Wait::collective;
    emulator::to_scheduler();
}
}
