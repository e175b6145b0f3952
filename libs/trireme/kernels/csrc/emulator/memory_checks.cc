// Every load and store of a kernel: g++ -fsanitize=thread emits these calls, and no runtime but this answers.

#include <string>

#include "machine.h"

namespace emulator {

void Machine::touch(const void* address, std::size_t size, Access access) {
    if (!is_running()) return;
    if (on_stack(address)) {
        Warpgroup& group = warpgroups[current / warpgroup_threads];
        const std::string wrong = group.touch(current % warpgroup_threads, address, size, access != Access::read);
        if (!wrong.empty()) fail(wrong);
        return;
    }
    const auto* first = static_cast<const std::uint8_t*>(address);
    const char* verb = access == Access::read ? "reads " : "writes ";
    if (size <= 16 && reinterpret_cast<std::uintptr_t>(address) % size)
        fail(verb + std::to_string(size) + " bytes at an address that is no multiple of that");
    if (shared.holds(address, size)) {
        const std::string wrong = shared.touch(address, size, access, now());
        if (!wrong.empty()) fail(verb + std::string("what it must not: ") + wrong);
        return;
    }
    for (Buffer& buffer : buffers) {
        if (!buffer.holds(address, size)) continue;
        if (access == Access::atomic) handovers[block_number] = {now(), true};
        if (access == Access::write) buffer.note_write(address, size, block_number, now());
        if (access != Access::read) return;
        const std::string wrong = buffer.check_read(address, size, block_number, now(), handovers);
        if (!wrong.empty()) fail("reads what it must not: " + wrong);
        return;
    }
    std::string where;
    for (std::size_t index = 0; index < buffers.size(); ++index) {
        const auto distance = buffers[index].offset(address), length = buffers[index].size();
        if (distance > -4096 && distance < length + 4096)
            where += ", byte " + std::to_string(distance) + " of buffer " + std::to_string(index) + " with " +
                     std::to_string(length);
    }
    const auto offset = first - shared.base();
    if (offset > -4096 && offset < (1 << 18)) where += ", byte " + std::to_string(offset) + " of shared memory";
    fail(verb + std::to_string(size) + " bytes out of bounds" + where);
}

}  // namespace emulator

using emulator::Access;
using emulator::machine;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* address, std::size_t size) { machine.touch(address, size, Access::read); }
void __tsan_write_range(void* address, std::size_t size) { machine.touch(address, size, Access::write); }

#define EMULATOR_ACCESS(SIZE)                                                                         \
    void __tsan_read##SIZE(void* address) { machine.touch(address, SIZE, Access::read); }             \
    void __tsan_write##SIZE(void* address) { machine.touch(address, SIZE, Access::write); }           \
    void __tsan_unaligned_read##SIZE(void* address) { machine.touch(address, SIZE, Access::read); }   \
    void __tsan_unaligned_write##SIZE(void* address) { machine.touch(address, SIZE, Access::write); } \
    void __tsan_volatile_read##SIZE(void* address) { machine.touch(address, SIZE, Access::read); }    \
    void __tsan_volatile_write##SIZE(void* address) { machine.touch(address, SIZE, Access::write); }

EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
}
