// What the lanes of a warp do together: shuffle, ballot, ldmatrix, mma.
//
// Source: PTX ISA, the fragments of ldmatrix and of mma.m16n8k16 with 16-bit operands.

#pragma once

#include <string>

#include "machine.h"
#include "number_formats.h"

namespace emulator {

inline void shuffle(Thread* lanes) {
    unsigned given[32][2];
    for (int lane = 0; lane < 32; ++lane) std::memcpy(given[lane], lanes[lane].exchange->words, 8);
    for (int lane = 0; lane < 32; ++lane) {
        Exchange& mine = *lanes[lane].exchange;
        std::memcpy(mine.words, given[mine.argument & 31], 8);
    }
}

inline void ballot(Thread* lanes) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= (lanes[lane].exchange->words[0] != 0 ? 1u : 0u) << lane;
    for (int lane = 0; lane < 32; ++lane) lanes[lane].exchange->words[0] = votes;
}

// Lanes 8 i to 8 i + 7 name the rows of matrix i, eight 16-bit elements each.
inline std::string ldmatrix(Thread* lanes, std::size_t first_thread, bool is_transposed) {
    const int count = lanes[0].exchange->argument;
    std::uint16_t rows[32][8];
    for (int lane = 0; lane < 8 * count; ++lane) {
        const void* row = lanes[lane].exchange->pointer;
        machine.current = static_cast<std::uint16_t>(first_thread + lane);
        const std::string who = "thread " + std::to_string(machine.current) + " names a row for ldmatrix that ";
        if (reinterpret_cast<std::uintptr_t>(row) % 16) return who + "is not at a multiple of 16 bytes";
        if (!machine.shared.holds(row, 16)) return who + "is not in shared memory";
        const std::string wrong = machine.shared.touch(row, 16, Access::read, machine.now());
        if (!wrong.empty()) return who + "it must not read: " + wrong;
        std::memcpy(rows[lane], row, 16);
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int matrix = 0; matrix < count; ++matrix) {
            const int row = lane / 4, pair = lane % 4 * 2;
            const std::uint16_t low = is_transposed ? rows[8 * matrix + pair][row] : rows[8 * matrix + row][pair];
            const std::uint16_t high =
                is_transposed ? rows[8 * matrix + pair + 1][row] : rows[8 * matrix + row][pair + 1];
            lanes[lane].exchange->words[matrix] = low | std::uint32_t{high} << 16;
        }
    return {};
}

// words: A in 0 to 3, B in 4 and 5, C and then D in 6 to 9. Sums in float64, rounded once to float32.
inline void mma(Thread* lanes, float (*decode)(std::uint16_t)) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const unsigned* words = lanes[lane].exchange->words;
        const int row = lane / 4, pair = lane % 4 * 2;
        for (int high = 0; high < 2; ++high) {
            const int shift = 16 * high;
            for (int piece = 0; piece < 4; ++piece)
                a[row + piece % 2 * 8][pair + high + piece / 2 * 8] =
                    decode(static_cast<std::uint16_t>(words[piece] >> shift));
            for (int piece = 0; piece < 2; ++piece)
                b[pair + high + 8 * piece][row] = decode(static_cast<std::uint16_t>(words[4 + piece] >> shift));
        }
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int piece = 0; piece < 4; ++piece) {
            unsigned& word = lanes[lane].exchange->words[6 + piece];
            const int row = lane / 4 + piece / 2 * 8, column = lane % 4 * 2 + piece % 2;
            double sum = bits_float(word);
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            word = float_bits(static_cast<float>(sum));
        }
}

// Do what the 32 lanes have met for; returns what is wrong with it, or nothing.
inline std::string operate(Thread* lanes, std::size_t first_thread) {
    switch (lanes[0].kind) {
        case Collective::shuffle: shuffle(lanes); break;
        case Collective::ballot: ballot(lanes); break;
        case Collective::ldmatrix: return ldmatrix(lanes, first_thread, false);
        case Collective::ldmatrix_transposed: return ldmatrix(lanes, first_thread, true);
        case Collective::mma_f16: mma(lanes, f16_to_float); break;
        case Collective::mma_bf16: mma(lanes, bf16_to_float); break;
        default: break;  // barriers; those of a warpgroup do not come here
    }
    return {};
}

}  // namespace emulator
