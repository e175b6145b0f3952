// The shared memory of one block, with a shadow of every byte that knows who touched it since when.
//
// Two accesses of different threads to one byte, at least one a write, need a barrier of the block between
// them, or a __syncwarp if both are of one warp; a shuffle orders no memory. The emulator runs threads one
// after the other, so a missing barrier shows here whatever the results look like. A byte must be written
// before it is read, and bytes of a cp.async belong to nobody until its thread has waited for it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace emulator {

enum class Access { read, write, atomic };

// When a thread acts: barriers that its block has passed, __syncwarps of its warp, and its own proxy fences.
struct Moment {
    std::uint16_t thread = 0;
    std::uint32_t block_epoch = 0;
    std::uint32_t warp_epoch = 0;
    std::uint32_t proxy_fences = 0;
};

// Whether nothing orders two accesses of one block: no barrier of the block, no __syncwarp of a warp both are of.
inline bool races(const Moment& then, const Moment& now) {
    if (then.thread == now.thread || then.block_epoch != now.block_epoch) return false;
    return then.thread / 32 != now.thread / 32 || then.warp_epoch == now.warp_epoch;
}

class SharedMemory {
public:
    static constexpr std::uint8_t poison = 0xFF;  // NaN in float16, bfloat16 and float32
    static constexpr std::size_t alignment = 1024;

    // A fresh block: everything is poison and belongs to nobody.
    void reset(std::size_t bytes) {
        bytes_.resize((bytes + 2 * alignment) / sizeof(Line));
        const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data());
        base_ = reinterpret_cast<std::uint8_t*>((address + alignment - 1) / alignment * alignment);
        size_ = bytes;
        std::memset(base_, poison, bytes);
        shadow_.assign(bytes, Shadow{});
    }

    std::uint8_t* base() const { return base_; }

    bool holds(const void* address, std::size_t size) const {
        const auto* first = static_cast<const std::uint8_t*>(address);
        return first >= base_ && first + size <= base_ + size_;
    }

    // Note an access; returns what is wrong with it, or nothing.
    std::string touch(const void* address, std::size_t size, Access access, const Moment& now) {
        const std::size_t first = static_cast<const std::uint8_t*>(address) - base_;
        for (std::size_t at = first; at < first + size; ++at) {
            Shadow& byte = shadow_[at];
            if (byte.in_flight) return describe(at, "is still being copied by cp.async of thread ", byte.writer.thread);
            if (access != Access::write && !byte.is_written) return describe(at, "was never written", -1);
            if (byte.is_written && !(access == Access::atomic && byte.is_atomic) && races(byte.writer, now))
                return describe(at, "was written, with no barrier since, by thread ", byte.writer.thread);
            if (access == Access::read) {
                note_read(byte, now);
                continue;
            }
            if (byte.wgmma_reads) return describe(at, "is still being read by a wgmma", -1);
            if (byte.is_read && reader_races(byte, now))
                return describe(at, "was read, with no barrier since, by thread ", byte.reader.thread);
            byte.is_written = true;
            byte.is_read = false;
            byte.is_atomic = access == Access::atomic;
            byte.writer = now;
        }
        return {};
    }

    // A wgmma of a warp starts to read; returns what is wrong with that. `fences` has the proxy fences of each thread.
    template <class Fences>
    std::string start_wgmma_read(const void* address, std::size_t size, const Moment& now, const Fences& fences) {
        const std::string wrong = touch(address, size, Access::read, now);
        if (!wrong.empty()) return wrong;
        const std::size_t first = static_cast<const std::uint8_t*>(address) - base_;
        for (std::size_t at = first; at < first + size; ++at) {
            Shadow& byte = shadow_[at];
            if (fences(byte.writer.thread) <= byte.writer.proxy_fences)
                return describe(at, "was written, with no proxy fence since, by thread ", byte.writer.thread);
            ++byte.wgmma_reads;
        }
        return {};
    }

    // It has finished: the last moment at which it may have read.
    void end_wgmma_read(const void* address, std::size_t size, const Moment& now) {
        const std::size_t first = static_cast<const std::uint8_t*>(address) - base_;
        for (std::size_t at = first; at < first + size; ++at) {
            --shadow_[at].wgmma_reads;
            note_read(shadow_[at], now);
        }
    }

    // A cp.async starts: until it lands its bytes hold poison.
    void take_off(void* address, std::size_t size) {
        mark(address, size, true);
        std::memset(address, poison, size);
    }

    // It lands, as a write of this moment.
    void land(void* address, const std::uint8_t* data, std::size_t size, const Moment& now) {
        mark(address, size, false);
        std::memcpy(address, data, size);
        const std::size_t first = static_cast<std::uint8_t*>(address) - base_;
        for (std::size_t at = first; at < first + size; ++at) shadow_[at].writer = now;
    }

private:
    struct Shadow {
        Moment writer, reader;
        bool is_written = false, is_read = false, is_atomic = false, in_flight = false;
        bool many_readers = false, many_warps = false;
        std::uint16_t wgmma_reads = 0;
    };

    static bool reader_races(const Shadow& byte, const Moment& now) {
        if (byte.reader.block_epoch != now.block_epoch) return false;
        if (byte.many_warps || byte.reader.thread / 32 != now.thread / 32) return true;
        if (byte.reader.warp_epoch != now.warp_epoch) return false;
        return byte.many_readers || byte.reader.thread != now.thread;
    }

    static void note_read(Shadow& byte, const Moment& now) {
        const bool is_fresh = !byte.is_read || byte.reader.block_epoch != now.block_epoch;
        const bool same_warp = byte.reader.thread / 32 == now.thread / 32;
        byte.many_warps = !is_fresh && (byte.many_warps || !same_warp);
        const bool same_moment = !is_fresh && same_warp && byte.reader.warp_epoch == now.warp_epoch;
        byte.many_readers = same_moment && (byte.many_readers || byte.reader.thread != now.thread);
        byte.is_read = true;
        byte.reader = now;
    }

    void mark(void* address, std::size_t size, bool in_flight) {
        const std::size_t first = static_cast<std::uint8_t*>(address) - base_;
        for (std::size_t at = first; at < first + size; ++at) shadow_[at].in_flight = in_flight;
    }

    static std::string describe(std::size_t at, const char* what, int thread) {
        std::string text = "shared byte " + std::to_string(at) + " " + what;
        return thread < 0 ? text : text + std::to_string(thread);
    }

    struct alignas(16) Line {
        std::uint8_t bytes[16];
    };
    std::vector<Line> bytes_;
    std::vector<Shadow> shadow_;
    std::uint8_t* base_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace emulator
