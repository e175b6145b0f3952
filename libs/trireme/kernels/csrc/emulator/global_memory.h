// One tensor of a launch, with a shadow of who wrote each byte: whoever else reads it needs an order to the write.
//
// Within a block a barrier gives that order, as for shared memory. From one block to another it takes an atomic
// that the writer's block does after the write, and one that the reader's block has done before the read, both
// with a barrier between unless the same thread does both. Fences, and what is written after it was read, are not
// looked at.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "shared_memory.h"

namespace emulator {

// What a block has done with atomics on global memory: the newest, if any.
struct Handover {
    Moment moment;
    bool is_done = false;

    bool comes_after(const Moment& other) const {
        return is_done && (moment.block_epoch > other.block_epoch ||
                           (moment.block_epoch == other.block_epoch && moment.thread == other.thread));
    }
    bool comes_before(const Moment& other) const {
        return is_done && (moment.block_epoch < other.block_epoch || moment.thread == other.thread);
    }
};

class Buffer {
public:
    Buffer(const void* begin, const void* end)
        : begin_(static_cast<const std::uint8_t*>(begin)), end_(static_cast<const std::uint8_t*>(end)) {}

    bool holds(const void* address, std::size_t size) const {
        const auto* first = static_cast<const std::uint8_t*>(address);
        return first >= begin_ && first + size <= end_;
    }
    std::ptrdiff_t offset(const void* address) const { return static_cast<const std::uint8_t*>(address) - begin_; }
    std::ptrdiff_t size() const { return end_ - begin_; }

    void note_write(const void* address, std::size_t size, std::uint32_t block, const Moment& now) {
        if (writes_.empty()) writes_.resize(end_ - begin_);
        for (std::size_t at = offset(address); size > 0; ++at, --size) writes_[at] = {now, block, true};
    }

    // What is wrong with a read, or nothing.
    std::string check_read(const void* address, std::size_t size, std::uint32_t block, const Moment& now,
                           const std::vector<Handover>& handovers) const {
        if (writes_.empty()) return {};
        for (std::size_t at = offset(address); size > 0; ++at, --size) {
            const Write& write = writes_[at];
            if (!write.is_written) continue;
            const std::string who =
                "byte " + std::to_string(at) + " was written by thread " + std::to_string(write.moment.thread);
            if (write.block == block) {
                if (races(write.moment, now)) return who + " with no barrier since";
            } else if (!handovers[write.block].comes_after(write.moment) || !handovers[block].comes_before(now)) {
                return who + " of block " + std::to_string(write.block) + ", which has not handed it over";
            }
        }
        return {};
    }

private:
    struct Write {
        Moment moment;
        std::uint32_t block = 0;
        bool is_written = false;
    };

    const std::uint8_t *begin_, *end_;
    std::vector<Write> writes_;
};

}  // namespace emulator
