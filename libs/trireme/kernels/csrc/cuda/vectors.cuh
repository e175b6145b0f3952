// Eight 16-bit elements as one 16-byte load or store.

#pragma once

#include "prim.cuh"

template <class T>
struct Vector {
    Words4 words;

    DEVICE float get(int index) const {
        const u32 word = words.word[index / 2];
        return to_float(T{static_cast<u16>(index % 2 ? word >> 16 : word & 0xFFFF)});
    }
    DEVICE void set(int index, float value) {
        const u32 bits = rounded<T>(value).bits;
        u32& word = words.word[index / 2];
        word = index % 2 ? (word & 0xFFFF) | bits << 16 : (word & 0xFFFF0000) | bits;
    }
};

template <class T>
DEVICE Vector<T> load(const T* from) {
    return {*reinterpret_cast<const Words4*>(from)};
}

template <class T>
DEVICE void store(T* to, const Vector<T>& vector) {
    *reinterpret_cast<Words4*>(to) = vector.words;
}
