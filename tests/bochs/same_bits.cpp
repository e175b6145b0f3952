// The AVX-512 kernels, or with TRIREME_AMX those for AMX, against those for AVX2, bit for bit, on a machine without an
// operating system. With AMX first the instructions against a model of them; it is the model that AMX's products with
// bfloat16 weights are compared with.
//
// Random weights of all formats, random activations, bias and residual; rows around the numbers that the kernels take
// at a time. The result goes to the first serial port, one line for each format and one for all.
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "linear.h"

namespace trireme {
extern const Kernels kModelKernels;  // tests/tile_model
void run_amx(int which, int rows, int inner, int lanes, const uint8_t* a, const uint8_t* b, uint8_t* sum);
void run_model(int which, int rows, int inner, int lanes, const uint8_t* a, const uint8_t* b, uint8_t* sum);
}  // namespace trireme

extern "C" {
void* memcpy(void* to, const void* from, size_t count) {
    for (size_t i = 0; i < count; ++i) static_cast<volatile char*>(to)[i] = static_cast<const char*>(from)[i];
    return to;
}
void* memset(void* to, int value, size_t count) {
    for (size_t i = 0; i < count; ++i) static_cast<volatile char*>(to)[i] = static_cast<char>(value);
    return to;
}
}

namespace {

using namespace trireme;

constexpr uint16_t kPort = 0x3F8;

void out(uint16_t port, uint8_t value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
uint8_t in(uint16_t port) {
    uint8_t value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

void say(const char* text) {
    for (; *text; ++text) {
        while (!(in(kPort + 5) & 0x20)) {
        }
        out(kPort, static_cast<uint8_t>(*text));
    }
}

void say(int64_t value) {
    char digits[24] = {};
    int at = 23;
    do {
        digits[--at] = static_cast<char>('0' + value % 10);
        value /= 10;
    } while (value);
    say(digits + at);
}

uint32_t draw() {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 20);
}

float draw_real() {
    return static_cast<float>(static_cast<int>(draw() % 20001) - 10000) / 3000.0f * static_cast<float>(1 << draw() % 8);
}

void draw_elements(uint8_t* to, int64_t count, int type) {
    for (int64_t i = 0; i < count; ++i) {
        const float value = draw_real();
        uint32_t bits;
        __builtin_memcpy(&bits, &value, 4);
        if (type == kFloat32) {
            __builtin_memcpy(to + 4 * i, &bits, 4);
        } else {
            const uint16_t upper = static_cast<uint16_t>(bits >> 16);
            __builtin_memcpy(to + 2 * i, &upper, 2);
        }
    }
}

alignas(64) uint8_t words[1 << 20], zeros[1 << 16], x[1 << 19], bias[1 << 12], residual[1 << 17];
alignas(64) uint8_t narrow_out[1 << 17], wide_out[1 << 17];
alignas(64) float scales[1 << 16], steps[1 << 14], reals[1 << 18];
alignas(64) int16_t codes[1 << 18];
alignas(64) int32_t sums[1 << 15];
alignas(64) char work[kWorkBytes];

struct Case {
    const char* name;
    Format format;
    int group;
    bool has_zeros;
};
constexpr Case kCases[] = {
    {"int8", kInt8, 0, false},     {"int4_g32", kInt4, 32, false},       {"int4_g64", kInt4, 64, false},
    {"int4_g128", kInt4, 128, false}, {"int4_g32_zeros", kInt4, 32, true}, {"int4_g64_zeros", kInt4, 64, true},
    {"int4_g128_zeros", kInt4, 128, true}, {"float6", kFloat6, 0, false},  {"float5", kFloat5, 0, false},
    {"bfloat16", kBfloat16, 0, false},
};
constexpr int kShapes[][2] = {{1, 128}, {17, 128}, {70, 384}, {33, 640}};
#ifdef TRIREME_AMX
constexpr int kRows[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 49, 81};
const Kernels& subject = kAmxKernels;
const Kernels& reference_for(const Weight& weight) {
    return weight.format == kBfloat16 ? kModelKernels : kAvx2Kernels;
}
#else
constexpr int kRows[] = {1, 2, 5, 6, 7, 11, 12, 13, 14, 25};
const Kernels& subject = kAvx512Kernels;
const Kernels& reference_for(const Weight&) { return kAvx2Kernels; }
#endif

Weight draw_weight(const Case& one, int64_t outputs, int64_t inputs) {
    const int64_t spans = tiles_of(outputs) * blocks_of(inputs) * 2;
    const int64_t most_bytes = spans * kTile * kSpan * 2;
    for (int64_t i = 0; i < most_bytes; ++i) words[i] = static_cast<uint8_t>(draw());
    if (one.format == kBfloat16) draw_elements(words, most_bytes / 2, kHalfFloat);
    for (int64_t i = 0; i < spans * kTile; ++i) {
        scales[i] = draw_real() / 50;
        zeros[i] = draw() % 16;
    }
    Weight weight{};
    weight.words = words;
    weight.scales = scales;
    weight.zeros = one.has_zeros ? zeros : nullptr;
    weight.outputs = outputs;
    weight.inputs = inputs;
    weight.format = one.format;
    weight.group = one.group;
    weight.unit = 0.25f;
    for (int i = 0; i < 16; ++i) {
        weight.power[i] = static_cast<int8_t>((i & 8 ? -1 : 1) * (1 << (i & 7) % 7));
        weight.mantissa[i] = i & 7 ? 4 : 0;
    }
    return weight;
}

void multiply(const Kernels& kernels, Call call, void* out) {
    const Activations activations{codes, steps, sums, reals, blocks_of(call.weight->inputs) * kBlock + 32};
    memset(codes, 0, 1 << 15);
    memset(steps, 0, 1 << 12);
    memset(sums, 0, 1 << 13);
    call.out = out;
    kernels.prepare(call, activations, 0, call.rows);
    kernels.multiply(call, activations, 0, tiles_of(call.weight->outputs), 0, call.rows, work);
}

bool is_same(const Weight& weight, int64_t rows, int type) {
    const int64_t element_bytes = type == kFloat32 ? 4 : 2, count = rows * weight.outputs;
    draw_elements(x, rows * weight.inputs, type);
    draw_elements(bias, weight.outputs, type);
    draw_elements(residual, count, type);
    memset(narrow_out, 1, static_cast<size_t>(count * element_bytes));
    memset(wide_out, 2, static_cast<size_t>(count * element_bytes));
    const Call call{&weight, x, bias, residual, nullptr, rows, weight.inputs, type};
    multiply(reference_for(weight), call, narrow_out);
    multiply(subject, call, wide_out);
    for (int64_t i = 0; i < count * element_bytes; ++i) {
        if (narrow_out[i] != wide_out[i]) return false;
    }
    return true;
}

#ifdef TRIREME_AMX
// A NaN is a NaN: which of two comes through differs.
bool is_same_lane(uint32_t a, uint32_t b, int which) {
    const bool are_nan = (a & 0x7FFFFFFF) > 0x7F800000 && (b & 0x7FFFFFFF) > 0x7F800000;
    return a == b || (which == 2 && are_nan);
}

int64_t compare_instructions(int which, int64_t times) {
    alignas(64) static uint8_t a[1024], b[1024], sum[2][1024];
    int64_t different = 0;
    for (int64_t i = 0; i < times; ++i) {
        const int rows = 1 + draw() % 16, inner = 1 + draw() % 16, lanes = 1 + draw() % 16;
        for (int at = 0; at < 1024; ++at) {
            a[at] = static_cast<uint8_t>(draw());
            b[at] = static_cast<uint8_t>(draw());
            sum[0][at] = sum[1][at] = static_cast<uint8_t>(draw());
        }
        // Random bits are floats of all magnitudes; in every second turn those of a few, whose sums round.
        for (int at = 1; which == 2 && i % 2 && at < 1024; at += 2) {
            for (uint8_t* matrix : {a, b, sum[0]}) {
                if (matrix == sum[0] && at % 4 != 3) continue;
                matrix[at] = static_cast<uint8_t>((matrix[at] & 0x80) | (i % 4 == 1 ? 0x3F : 0x20));
            }
        }
        for (int at = 0; at < 1024; ++at) sum[1][at] = sum[0][at];
        run_model(which, rows, inner, lanes, a, b, sum[0]);
        run_amx(which, rows, inner, lanes, a, b, sum[1]);
        bool is_same = true;
        for (int at = 0; at < 1024; at += 4) {
            uint32_t lane[2];
            __builtin_memcpy(&lane[0], sum[0] + at, 4);
            __builtin_memcpy(&lane[1], sum[1] + at, 4);
            is_same &= is_same_lane(lane[0], lane[1], which);
        }
        different += !is_same;
    }
    return different;
}
#endif

}  // namespace

extern "C" void run() {
    out(kPort + 3, 3);  // bytes of 8 bits
    int64_t products = 0, different = 0;
#ifdef TRIREME_AMX
    const char* const names[] = {"tdpbssd", "tdpbusd", "tdpbf16ps"};
    for (int which = 0; which < 3; ++which) {
        const int64_t failed = compare_instructions(which, 200);
        different += failed;
        say(names[which]);
        say(failed ? " DIFFERENT\n" : " the same\n");
    }
    products += 600;
#endif
    for (const Case& one : kCases) {
        const int64_t before = different;
        for (const auto& shape : kShapes) {
            const Weight weight = draw_weight(one, shape[0], shape[1]);
            for (const int rows : kRows) {
                for (int type = kFloat32; type <= kHalfFloat; ++type) {
                    ++products;
                    different += !is_same(weight, rows, type);
                }
            }
        }
        say(one.name);
        say(different == before ? " the same\n" : " DIFFERENT\n");
    }
    say(products);
    say(" products, different: ");
    say(different);
    say("\nend\n");
}
