// What one thread does alone: asynchronous copies, atomics, number formats.

#include <algorithm>
#include <cstring>

#include "machine.h"
#include "number_formats.h"

using emulator::Access;
using emulator::machine;

namespace {

template <class Word, class Change>
Word atomic(Word* address, Change change) {
    machine.touch(address, sizeof(Word), Access::atomic);
    const Word old = *address;
    *address = change(old);
    return old;
}

}  // namespace

extern "C" {

void emulator_copy_async(void* shared, const void* global, bool is_valid) {
    if (is_valid) machine.touch(global, 16, Access::read);
    if (!machine.shared.holds(shared, 16)) machine.fail("copies asynchronously to where no shared memory is");
    machine.touch(shared, 16, Access::write);
    machine.shared.take_off(shared, 16);
    machine.threads[machine.current].open_group.push_back({shared, is_valid ? global : nullptr});
}

void emulator_copy_commit() {
    emulator::Thread& thread = machine.threads[machine.current];
    thread.copy_groups.push_back(std::move(thread.open_group));
    thread.open_group.clear();
}

void emulator_copy_wait(int groups_left) {
    emulator::Thread& thread = machine.threads[machine.current];
    while (static_cast<int>(thread.copy_groups.size()) > groups_left) {
        for (const emulator::PendingCopy& copy : thread.copy_groups.front()) {
            std::uint8_t data[16] = {};
            if (copy.global) std::memcpy(data, copy.global, 16);
            machine.shared.land(copy.shared, data, 16, machine.now());
        }
        thread.copy_groups.pop_front();
    }
}

void emulator_fence_proxy() { ++machine.threads[machine.current].proxy_fences; }

unsigned emulator_atomic_add_u32(unsigned* address, unsigned value) {
    return atomic(address, [value](unsigned old) { return old + value; });
}

unsigned long long emulator_atomic_add_u64(unsigned long long* address, unsigned long long value) {
    return atomic(address, [value](unsigned long long old) { return old + value; });
}

unsigned long long emulator_atomic_min_u64(unsigned long long* address, unsigned long long value) {
    return atomic(address, [value](unsigned long long old) { return std::min(old, value); });
}

unsigned short emulator_f16_from_float(float value) { return emulator::float_to_f16(value); }
float emulator_float_from_f16(unsigned short bits) { return emulator::f16_to_float(bits); }
unsigned short emulator_bf16_from_float(float value) { return emulator::float_to_bf16(value); }
float emulator_float_from_bf16(unsigned short bits) { return emulator::bf16_to_float(bits); }
}
