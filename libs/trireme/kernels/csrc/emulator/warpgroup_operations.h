// What the 128 threads of a warpgroup do together: wgmma, its fence, commit and wait.
//
// Source: PTX ISA, wgmma: the register fragments of m64nNk16, the matrix descriptor, swizzled K-major layouts.

#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "machine.h"
#include "number_formats.h"

namespace emulator {

inline std::string of_thread(std::size_t thread, const char* what) {
    return "thread " + std::to_string(thread) + " " + what;
}

// The pieces of 16 bytes that a descriptor names: two of each of `rows` rows, which are eight elements each.
inline std::string find_pieces(unsigned long long descriptor, int rows, std::vector<const void*>& pieces) {
    const auto field = [descriptor](int low, int bits) {
        return static_cast<std::uint32_t>(descriptor >> low & ((1u << bits) - 1));
    };
    if (field(14, 2) || field(30, 2) || field(46, 3) || field(52, 10)) return "has bits that must be zero";
    if (field(62, 2) != 1) return "names a layout other than the swizzle of 128 bytes, which alone is emulated";
    if (field(49, 3)) return "has a base offset, which is not emulated";
    const std::uint32_t start = field(0, 14) << 4, eight_rows = field(32, 14) << 4;
    if (start % 128 + 32 > 128) return "leaves its row of 128 bytes";
    for (int row = 0; row < rows; ++row)
        for (int piece = 0; piece < 2; ++piece) {
            const std::uint32_t plain = start + row / 8 * eight_rows + row % 8 * 128 + piece * 16;
            pieces.push_back(machine.shared.base() + (plain ^ (plain >> 7 & 7) << 4));
            if (!machine.shared.holds(pieces.back(), 16)) return "reads beyond shared memory";
        }
    return {};
}

// Note that all four warps read B, and unpack it to rows of 16.
inline std::string read_b(std::size_t first_thread, const PendingProduct& product, float (*decode)(std::uint16_t),
                          std::vector<double>& b) {
    const auto fences = [](std::size_t thread) { return machine.threads[thread].proxy_fences; };
    for (int warp = 0; warp < 4; ++warp) {
        machine.current = static_cast<std::uint16_t>(first_thread + 32 * warp);
        for (const void* piece : product.b_pieces) {
            const std::string wrong = machine.shared.start_wgmma_read(piece, 16, machine.now(), fences);
            if (!wrong.empty()) return of_thread(machine.current, "has a wgmma read what it must not: ") + wrong;
        }
    }
    for (const void* piece : product.b_pieces) {
        std::uint16_t elements[8];
        std::memcpy(elements, piece, 16);
        for (const std::uint16_t element : elements) b.push_back(decode(element));
    }
    return {};
}

// The accumulators of a product: those under way already, or the threads' own, which hold poison from now on.
inline std::string hide_sums(Thread* threads, std::size_t first_thread, Warpgroup& group, HiddenSums*& found) {
    const int tokens = threads[0].exchange->argument;
    for (HiddenSums& each : group.hidden) {
        if (each.sums[0] != threads[0].exchange->sums) continue;
        found = &each;
        for (int thread = 0; thread < warpgroup_threads; ++thread)
            if (each.sums[thread] != threads[thread].exchange->sums || each.tokens != tokens)
                return of_thread(first_thread + thread, "has a wgmma of another shape under way on its accumulators");
        return {};
    }
    group.hidden.emplace_back();
    found = &group.hidden.back();
    found->tokens = tokens;
    for (int thread = 0; thread < warpgroup_threads; ++thread) {
        float* sums = threads[thread].exchange->sums;
        if (group.was_touched(thread, sums, tokens / 2, false))
            return of_thread(first_thread + thread, "has touched an accumulator with no wgmma.fence since");
        found->sums[thread] = sums;
        found->values.emplace_back(sums, sums + tokens / 2);
        std::memset(sums, SharedMemory::poison, sizeof(float) * tokens / 2);
    }
    return {};
}

// Sums in float64, rounded once to float32, as of mma.
inline void add_products(const PendingProduct& product, const std::vector<double>& b, float (*decode)(std::uint16_t),
                         bool adds, HiddenSums& hidden) {
    double a[64][16];
    for (int thread = 0; thread < warpgroup_threads; ++thread)
        for (int half = 0; half < 8; ++half) {
            const int row = thread / 32 * 16 + thread % 32 / 4 + half / 2 % 2 * 8;
            const int column = thread % 4 * 2 + half % 2 + half / 4 * 8;
            a[row][column] = decode(static_cast<std::uint16_t>(product.a_words[thread][half / 2] >> half % 2 * 16));
        }
    for (int thread = 0; thread < warpgroup_threads; ++thread)
        for (int i = 0; i < hidden.tokens / 2; ++i) {
            const double* left = a[thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8];
            const double* right = &b[16 * (i / 4 * 8 + thread % 4 * 2 + i % 2)];
            double sum = adds ? hidden.values[thread][i] : 0.0;
            for (int k = 0; k < 16; ++k) sum += left[k] * right[k];
            hidden.values[thread][i] = static_cast<float>(sum);
        }
}

inline std::string issue_product(Thread* threads, std::size_t first_thread, Warpgroup& group) {
    const Exchange& first = *threads[0].exchange;
    const auto decode = threads[0].kind == Collective::wgmma_f16 ? f16_to_float : bf16_to_float;
    if (!group.has_fenced) return of_thread(first_thread, "issues a wgmma before any wgmma.fence");
    PendingProduct product;
    product.sums = first.sums;
    for (int thread = 0; thread < warpgroup_threads; ++thread) {
        const Exchange& mine = *threads[thread].exchange;
        if (mine.descriptor != first.descriptor || mine.words[0] != first.words[0] || mine.argument != first.argument)
            return of_thread(first_thread + thread, "issues another wgmma than the first of its warpgroup");
        const auto* a = static_cast<const unsigned*>(mine.pointer);
        if (group.was_touched(thread, a, 4, true))
            return of_thread(first_thread + thread, "has written a register of A with no wgmma.fence since");
        product.a[thread] = a;
        std::copy(a, a + 4, product.a_words[thread].begin());
    }
    std::string wrong = find_pieces(first.descriptor, first.argument, product.b_pieces);
    if (!wrong.empty()) return of_thread(first_thread, "issues a wgmma whose descriptor ") + wrong;
    std::vector<double> b;
    wrong = read_b(first_thread, product, decode, b);
    HiddenSums* hidden = nullptr;
    if (wrong.empty()) wrong = hide_sums(threads, first_thread, group, hidden);
    if (!wrong.empty()) return wrong;
    add_products(product, b, decode, first.words[0] != 0, *hidden);
    ++hidden->products;
    group.open.push_back(std::move(product));
    return {};
}

// The oldest group of products has finished.
inline std::string finish_group(std::size_t first_thread, Warpgroup& group) {
    for (const PendingProduct& product : group.groups.front()) {
        for (int thread = 0; thread < warpgroup_threads; ++thread)
            if (!std::equal(product.a_words[thread].begin(), product.a_words[thread].end(), product.a[thread]))
                return of_thread(first_thread + thread,
                                 "has changed a register of A of a wgmma that it has not waited for");
        for (int warp = 0; warp < 4; ++warp) {
            machine.current = static_cast<std::uint16_t>(first_thread + 32 * warp);
            for (const void* piece : product.b_pieces) machine.shared.end_wgmma_read(piece, 16, machine.now());
        }
        const auto hidden = std::find_if(group.hidden.begin(), group.hidden.end(),
                                         [&](const HiddenSums& each) { return each.sums[0] == product.sums; });
        if (--hidden->products > 0) continue;
        for (int thread = 0; thread < warpgroup_threads; ++thread)
            std::copy(hidden->values[thread].begin(), hidden->values[thread].end(), hidden->sums[thread]);
        group.hidden.erase(hidden);
    }
    group.groups.pop_front();
    return {};
}

// Do what the 128 threads have met for; returns what is wrong with it, or nothing.
inline std::string operate_together(Thread* threads, std::size_t first_thread, Warpgroup& group) {
    switch (threads[0].kind) {
        case Collective::wgmma_fence:
            group.has_fenced = true;
            for (TouchedWords& each : group.touched) each.clear();
            return {};
        case Collective::wgmma_commit:
            group.groups.push_back(std::move(group.open));
            group.open.clear();
            return {};
        case Collective::wgmma_wait:
            while (static_cast<int>(group.groups.size()) > threads[0].exchange->argument) {
                const std::string wrong = finish_group(first_thread, group);
                if (!wrong.empty()) return wrong;
            }
            return {};
        default: return issue_product(threads, first_thread, group);
    }
}

}  // namespace emulator
