// Activations in the order in which a weight's columns lie, where that is not the inputs' own.
#pragma once

#include "linear.h"
#include "room.h"

namespace trireme {

template <class Element>
static inline void take_in_order(const Call& call, Element* to) {
    const int64_t inputs = call.weight->inputs;
    for (int64_t row = 0; row < call.rows; ++row, to += inputs) {
        const Element* from = static_cast<const Element*>(call.x) + row * call.stride;
        for (int64_t i = 0; i < inputs; ++i) to[i] = from[call.weight->input_order[i]];
    }
}

// The call with its activations so ordered, in `room`; its x is null without memory.
static inline Call in_order(Call call, Room& room) {
    if (!call.weight->input_order) return call;
    const int64_t inputs = call.weight->inputs;
    char* to = room.at_least(call.rows * inputs * (call.type == kFloat32 ? 4 : 2));
    if (to && call.type == kFloat32) take_in_order(call, reinterpret_cast<uint32_t*>(to));
    if (to && call.type != kFloat32) take_in_order(call, reinterpret_cast<uint16_t*>(to));
    call.x = to;
    call.stride = inputs;
    return call;
}

}  // namespace trireme
