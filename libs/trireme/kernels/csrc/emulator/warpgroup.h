// The wgmmas of four warps that are under way, and which registers they hold.
//
// A product is computed when it is issued, but its sums stay hidden until a wait has it finished: meanwhile the
// accumulators hold poison. Registers are what a kernel's arrays are here, memory on a thread's stack.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr int warpgroup_threads = 128;

// One product: the registers of A of each thread, as they were, and the pieces of 16 bytes of B.
struct PendingProduct {
    std::array<const unsigned*, warpgroup_threads> a;
    std::array<std::array<unsigned, 4>, warpgroup_threads> a_words;
    std::vector<const void*> b_pieces;
    const float* sums;  // of the first thread
};

// Accumulators of products under way.
struct HiddenSums {
    std::array<float*, warpgroup_threads> sums;
    int tokens = 0;                          // N
    std::vector<std::vector<float>> values;  // by thread
    int products = 0;
};

// What a thread has done to its registers since its last wgmma.fence: by word, whether it wrote.
using TouchedWords = std::unordered_map<std::uintptr_t, bool>;

struct Warpgroup {
    bool has_fenced = false;
    std::array<TouchedWords, warpgroup_threads> touched;
    std::vector<PendingProduct> open;
    std::deque<std::vector<PendingProduct>> groups;
    std::vector<HiddenSums> hidden;

    bool is_idle() const { return open.empty() && groups.empty(); }

    // Note an access of a thread to its registers; returns what is wrong with it, or nothing.
    std::string touch(int thread, const void* address, std::size_t size, bool is_write) {
        if (!has_fenced) return {};
        const auto first = reinterpret_cast<std::uintptr_t>(address), end = first + size;
        const auto meets = [first, end](const void* begin, std::size_t bytes) {
            const auto at = reinterpret_cast<std::uintptr_t>(begin);
            return first < at + bytes && at < end;
        };
        for (const HiddenSums& each : hidden)
            if (meets(each.sums[thread], sizeof(float) * each.tokens / 2))
                return "touches an accumulator of a wgmma that it has not waited for";
        const auto holds = [&](const PendingProduct& product) { return meets(product.a[thread], 16); };
        const char* const changed = "changes a register of A of a wgmma that it has not waited for";
        for (const PendingProduct& product : open)
            if (is_write && holds(product)) return changed;
        for (const auto& group : groups)
            for (const PendingProduct& product : group)
                if (is_write && holds(product)) return changed;
        for (auto word = first / 4; word < (end + 3) / 4; ++word) touched[thread][word] |= is_write;
        return {};
    }

    // Whether a thread has touched, or just written, words since its last fence.
    bool was_touched(int thread, const void* begin, std::size_t words, bool only_writes) const {
        const auto first = reinterpret_cast<std::uintptr_t>(begin) / 4;
        for (auto word = first; word < first + words; ++word) {
            const auto found = touched[thread].find(word);
            if (found != touched[thread].end() && (found->second || !only_writes)) return true;
        }
        return false;
    }
};

inline bool is_of_warpgroup(Collective kind) { return kind >= Collective::wgmma_fence; }

}  // namespace emulator
