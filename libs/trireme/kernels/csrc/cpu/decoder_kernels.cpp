// What a decoder layer does between its products, for AVX2, FMA and F16C.
//
// Sums over a row run in 8 lanes, in order, and the lanes are added in one fixed way at the end, so they do not
// depend on how the work is cut.
#include <immintrin.h>

#include <cmath>
#include <initializer_list>

#include "decoder_layers.h"

namespace trireme {
namespace {

inline __m256 load_reals(const float* at) { return _mm256_loadu_ps(at); }
inline __m256 load_reals(const uint16_t* at) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline void store_reals(float* at, __m256 a) { _mm256_storeu_ps(at, a); }
inline void store_reals(uint16_t* at, __m256 a) {  // to nearest, ties to even; NaN stays NaN
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), packed);
}

inline __m256 load_reals(const int8_t* at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
}
// Floats of 8 bits (e4m3) but for their NaN, which the row's scale then is: as half floats 2^8 too small.
inline __m256 load_reals(const uint8_t* at) {
    const __m128i codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x80)), 8);
    const __m128i rest = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x7F)), 7);
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, rest)), _mm256_set1_ps(256.0f));
}

inline float sum_lanes(__m256 a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// The sums of four: each as `sum_lanes` would add it.
inline __m128 sum_lanes(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m128 a4 = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 b4 = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 c4 = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
    const __m128 d4 = _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
    const __m128 ab = _mm_add_ps(_mm_movelh_ps(a4, b4), _mm_movehl_ps(b4, a4));
    const __m128 cd = _mm_add_ps(_mm_movelh_ps(c4, d4), _mm_movehl_ps(d4, c4));
    return _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xDD));
}

// e to the x within 2 units in the last place; 0 below -87, NaN stays NaN.
inline __m256 exponential(__m256 x) {
    const __m256 is_small = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ);
    x = _mm256_max_ps(_mm256_set1_ps(-87.0f), _mm256_min_ps(_mm256_set1_ps(88.0f), x));
    const __m256 power =
        _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 rest = _mm256_fnmadd_ps(power, _mm256_set1_ps(0.693359375f), x);
    rest = _mm256_fnmadd_ps(power, _mm256_set1_ps(-2.12194440e-4f), rest);
    __m256 sum = _mm256_set1_ps(1.0f / 5040.0f);
    for (const float term : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) {
        sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(term));
    }
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(is_small, _mm256_mul_ps(sum, _mm256_castsi256_ps(bits)));
}

// The hyperbolic tangent within 3 units in the last place; NaN stays NaN. Near 0, where the exponential's form
// cancels, it is Lambert's continued fraction, cut at the ninth term.
inline __m256 hyperbolic_tangent(__m256 x) {
    const __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f)), magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 shrunk = exponential(_mm256_mul_ps(magnitude, _mm256_set1_ps(-2.0f)));
    const __m256 far = _mm256_div_ps(_mm256_sub_ps(one, shrunk), _mm256_add_ps(one, shrunk));
    const __m256 square = _mm256_mul_ps(magnitude, magnitude);
    const __m256 upper =
        _mm256_fmadd_ps(_mm256_add_ps(square, _mm256_set1_ps(105.0f)), square, _mm256_set1_ps(945.0f));
    const __m256 lower = _mm256_fmadd_ps(_mm256_fmadd_ps(square, _mm256_set1_ps(15.0f), _mm256_set1_ps(420.0f)), square,
                                         _mm256_set1_ps(945.0f));
    const __m256 near = _mm256_mul_ps(magnitude, _mm256_div_ps(upper, lower));
    const __m256 is_near = _mm256_cmp_ps(magnitude, _mm256_set1_ps(0.5f), _CMP_LT_OQ);
    return _mm256_or_ps(_mm256_blendv_ps(far, near, is_near), sign);
}

// What the codes of a row are worth.
inline float row_scale(const float*, int64_t) { return 1.0f; }
inline float row_scale(const uint16_t*, int64_t) { return 1.0f; }
template <class Code>
inline float row_scale(const Code* row, int64_t width) {
    float scale;
    __builtin_memcpy(&scale, row + width, sizeof scale);
    return scale;
}
template <class Element>
constexpr bool kIsCoded = sizeof(Element) == 1;

inline int8_t code_of(float scaled, int8_t) { return static_cast<int8_t>(_mm_cvtss_si32(_mm_set_ss(scaled))); }
inline uint8_t code_of(float scaled, uint8_t) {  // to nearest, ties to even
    uint32_t bits;
    __builtin_memcpy(&bits, &scaled, 4);
    const uint32_t sign = bits >> 24 & 0x80;
    bits &= 0x7FFFFFFF;
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    if (magnitude < 0.015625f) return static_cast<uint8_t>(sign | _mm_cvtss_si32(_mm_set_ss(magnitude * 512.0f)));
    bits += 0x7FFFF + (bits >> 20 & 1);
    return static_cast<uint8_t>(sign | ((bits >> 20) - (120 << 3)));
}
constexpr float largest_code(int8_t) { return 127.0f; }
constexpr float largest_code(uint8_t) { return 448.0f; }

// Keys or values of one token and head into a row of the cache.
inline void store_row(const float* row, int64_t width, float* to) { __builtin_memcpy(to, row, width * sizeof(float)); }
inline void store_row(const float* row, int64_t width, uint16_t* to) {
    for (int64_t i = 0; i < width; i += 8) store_reals(to + i, load_reals(row + i));
}
template <class Code>
inline void store_row(const float* row, int64_t width, Code* to) {
    float peak = 0.0f;
    bool is_finite = true;
    for (int64_t i = 0; i < width; ++i) {
        const float magnitude = std::fabs(row[i]);
        is_finite = is_finite && magnitude < INFINITY;
        peak = magnitude > peak ? magnitude : peak;
    }
    constexpr float largest = largest_code(Code());
    const float scale = !is_finite ? NAN : peak == 0.0f ? 1.0f : peak / largest;
    for (int64_t i = 0; i < width; ++i) {
        const float scaled = row[i] / scale;
        const float held = scaled > largest ? largest : scaled < -largest ? -largest : scaled;
        to[i] = is_finite ? code_of(held, Code()) : Code(0);
    }
    __builtin_memcpy(to + width, &scale, sizeof scale);
}

inline __m256 rotated(const float* x, const float* turned, const float* cosine, const float* sine) {
    return _mm256_fmadd_ps(load_reals(turned), load_reals(sine), _mm256_mul_ps(load_reals(x), load_reals(cosine)));
}

// One head in place; `room` has its width.
inline void rotate(float* head, const float* cosine, const float* sine, int64_t width, float* room) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i += 8) {
        store_reals(room + i, rotated(head + i, head + half + i, cosine + i, sine + i));
        store_reals(room + half + i, rotated(head + half + i, head + i, cosine + half + i, sine + half + i));
    }
    __builtin_memcpy(head, room, width * sizeof(float));
}

template <class Element>
inline void place_rows_as(const DecoderShape& shape, const DecoderLayer& layer, const DecoderStep& step, float* fused,
                          Element* k_cache, Element* v_cache, int64_t first, int64_t last) {
    const int64_t width = shape.head_dim, rotated_heads = shape.heads + shape.kv_heads;
    const int64_t row_width = (rotated_heads + shape.kv_heads) * width;
    float room[1024];
    for (int64_t row = first; row < last; ++row) {
        float* heads = fused + row * row_width;
        const float* cosine = layer.cosines + step.positions[row] * width;
        const float* sine = layer.sines + step.positions[row] * width;
        for (int64_t head = 0; head < rotated_heads; ++head) {
            float* at = heads + head * width;
            if (layer.qk_norm) normalise_rows(at, layer.qk_norm + head * width, shape.eps, width, 1, at);
            rotate(at, cosine, sine, width, room);
        }
        for (int64_t head = 0; head < shape.kv_heads; ++head) {
            const int64_t to = (step.slots[row] * shape.kv_heads + head) * kv_row(shape);
            store_row(heads + (shape.heads + head) * width, width, k_cache + to);
            store_row(heads + (rotated_heads + head) * width, width, v_cache + to);
        }
    }
}

template <class Element>
inline __m256 product(const float* query, const Element* key, int64_t width) {
    __m256 sum = _mm256_mul_ps(load_reals(query), load_reals(key));
    for (int64_t i = 8; i < width; i += 8) sum = _mm256_fmadd_ps(load_reals(query + i), load_reals(key + i), sum);
    return sum;
}

// Positions of a piece's rows and, of a tree's, the places of each one's ancestors in it from the root on: its keys are
// then those before the tree and these, in this order, as if it were decoded behind them.
class RowViews {
  public:
    explicit RowViews(const AttentionPiece& piece) : piece_(piece) {
        if (!piece.parents) return;
        for (int64_t row = 0; row < piece.count; ++row) {
            int64_t depth = 0;
            for (int64_t at = piece.parents[piece.tree_place + row]; at >= 0; at = piece.parents[at]) ++depth;
            depths_[row] = depth;
            for (int64_t at = piece.tree_place + row; at >= 0; at = piece.parents[at]) paths_[row][depth--] = at;
        }
    }
    int64_t position(int64_t row) const { return piece_.position + (piece_.parents ? depths_[row] : row); }
    int64_t first_key(int64_t row) const {
        const int64_t end = position(row) + 1;
        return piece_.window > 0 && end > piece_.window ? end - piece_.window : 0;
    }
    // The first key that any row sees.
    int64_t begin() const {
        int64_t least_key = first_key(0);
        for (int64_t row = 1; piece_.parents && row < piece_.count; ++row) least_key = least(least_key, first_key(row));
        return least_key;
    }
    // One past the last key that is in its place for a row: for all of them where there is no tree.
    int64_t end_in_place(int64_t row) const { return piece_.parents ? piece_.position : position(row) + 1; }
    // Where the key of a position behind that lies.
    int64_t place(int64_t row, int64_t position) const {
        return piece_.position + paths_[row][position - piece_.position];
    }

  private:
    const AttentionPiece& piece_;
    int64_t depths_[kQueryRows];
    int64_t paths_[kQueryRows][kMostTreeTokens];
};

// Keys [first, last) of the sequence, of which the cache's rows lie `stride` apart.
template <class Element>
class KeyRows {
  public:
    KeyRows(const void* cache, const int64_t* table, int64_t block_size, int64_t stride)
        : cache_(static_cast<const Element*>(cache)), table_(table), block_size_(block_size), stride_(stride) {}
    // Addresses of rows [first, last), at most kKeysAtOnce.
    void find(int64_t first, int64_t last, const Element** rows) const {
        int64_t block = first / block_size_, offset = first % block_size_;
        for (int64_t key = first; key < last; ++key) {
            *rows++ = cache_ + (table_[block] * block_size_ + offset) * stride_;
            if (++offset == block_size_) {
                offset = 0;
                ++block;
            }
        }
    }
    // Those of the positions [first, last) of a row, which are a tree's.
    void find(const RowViews& views, int64_t row, int64_t first, int64_t last, const Element** rows) const {
        for (int64_t position = first; position < last; ++position) {
            const int64_t key = views.place(row, position);
            *rows++ = cache_ + (table_[key / block_size_] * block_size_ + key % block_size_) * stride_;
        }
    }

  private:
    const Element* cache_;
    const int64_t* table_;
    int64_t block_size_, stride_;
};

template <class Element>
inline void score_keys(const float* query, const Element* const* keys, int64_t count, int64_t width, float scale,
                       float* scores) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const __m128 sums = sum_lanes(product(query, keys[i], width), product(query, keys[i + 1], width),
                                      product(query, keys[i + 2], width), product(query, keys[i + 3], width));
        _mm_storeu_ps(scores + i, _mm_mul_ps(sums, _mm_set1_ps(scale)));
    }
    for (; i < count; ++i) {
        const __m256 one = product(query, keys[i], width);
        scores[i] = _mm_cvtss_f32(sum_lanes(one, one, one, one)) * scale;
    }
    if constexpr (kIsCoded<Element>) {
        for (i = 0; i < count; ++i) scores[i] *= row_scale(keys[i], width);
    }
}

// The same for two queries: a key is loaded once for both. Each sum is added as `product` does it.
template <class Element>
inline void score_keys_twice(const float* query, const float* other, const Element* const* keys, int64_t count,
                             int64_t width, float scale, float* scores, float* other_scores) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        __m256 sum[4], other_sum[4];
        const __m256 first = load_reals(query), other_first = load_reals(other);
#pragma GCC unroll 4
        for (int key = 0; key < 4; ++key) {
            const __m256 part = load_reals(keys[i + key]);
            sum[key] = _mm256_mul_ps(first, part);
            other_sum[key] = _mm256_mul_ps(other_first, part);
        }
        for (int64_t at = 8; at < width; at += 8) {
            const __m256 next = load_reals(query + at), other_next = load_reals(other + at);
#pragma GCC unroll 4
            for (int key = 0; key < 4; ++key) {
                const __m256 part = load_reals(keys[i + key] + at);
                sum[key] = _mm256_fmadd_ps(next, part, sum[key]);
                other_sum[key] = _mm256_fmadd_ps(other_next, part, other_sum[key]);
            }
        }
        const __m128 by = _mm_set1_ps(scale);
        _mm_storeu_ps(scores + i, _mm_mul_ps(sum_lanes(sum[0], sum[1], sum[2], sum[3]), by));
        _mm_storeu_ps(other_scores + i,
                      _mm_mul_ps(sum_lanes(other_sum[0], other_sum[1], other_sum[2], other_sum[3]), by));
    }
    if constexpr (kIsCoded<Element>) {
        for (int64_t key = 0; key < i; ++key) {
            const float worth = row_scale(keys[key], width);
            scores[key] *= worth;
            other_scores[key] *= worth;
        }
    }
    if (i == count) return;
    score_keys(query, keys + i, count - i, width, scale, scores + i);
    score_keys(other, keys + i, count - i, width, scale, other_scores + i);
}

// Weights that sum to 1 in place of the scores; behind them zeros up to a multiple of 8.
inline void weigh(float* scores, int64_t count) {
    const int64_t padded = (count + 7) / 8 * 8;
    for (int64_t i = count; i < padded; ++i) scores[i] = -INFINITY;
    __m256 most = load_reals(scores);
    for (int64_t i = 8; i < padded; i += 8) most = _mm256_max_ps(most, load_reals(scores + i));
    float lanes[8];
    store_reals(lanes, most);
    float highest = lanes[0];
    for (int i = 1; i < 8; ++i) highest = lanes[i] > highest ? lanes[i] : highest;
    const __m256 from = _mm256_set1_ps(highest);
    __m256 total = _mm256_setzero_ps();
    for (int64_t i = 0; i < padded; i += 8) {
        const __m256 weight = exponential(_mm256_sub_ps(load_reals(scores + i), from));
        store_reals(scores + i, weight);
        total = _mm256_add_ps(total, weight);
    }
    const __m256 share = _mm256_set1_ps(1.0f / sum_lanes(total));
    for (int64_t i = 0; i < padded; i += 8) store_reals(scores + i, _mm256_mul_ps(load_reals(scores + i), share));
}

// Adds `count` weighted values to 8 * kParts columns of `out`.
template <int kParts, class Element>
inline void gather_columns(const float* weights, const Element* const* values, int64_t count, float* out) {
    __m256 sums[kParts];
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) sums[part] = load_reals(out + 8 * part);
    for (int64_t i = 0; i < count; ++i) {
        const __m256 weight = _mm256_set1_ps(weights[i]);
#pragma GCC unroll 8
        for (int part = 0; part < kParts; ++part) {
            sums[part] = _mm256_fmadd_ps(weight, load_reals(values[i] + 8 * part), sums[part]);
        }
    }
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) store_reals(out + 8 * part, sums[part]);
}

template <class Element>
inline void gather_values(const float* weights, const Element* const* values, int64_t count, int64_t width, float* out) {
    const Element* shifted[kKeysAtOnce];
    float scaled[kKeysAtOnce];
    if constexpr (kIsCoded<Element>) {
        for (int64_t i = 0; i < count; ++i) scaled[i] = weights[i] * row_scale(values[i], width);
        weights = scaled;
    }
    for (int64_t column = 0; column < width;) {
        for (int64_t i = 0; i < count; ++i) shifted[i] = values[i] + column;
        if (width - column >= 64) {
            gather_columns<8>(weights, shifted, count, out + column);
            column += 64;
        } else {
            gather_columns<2>(weights, shifted, count, out + column);
            column += 16;
        }
    }
}

template <class Element>
inline void attend_as(const DecoderShape& shape, const AttentionPiece& piece, float* scores) {
    const int64_t width = shape.head_dim, stride = shape.kv_heads * kv_row(shape), room = score_room(piece);
    const RowViews views(piece);
    const int64_t begin = views.begin(), end = views.end_in_place(piece.count - 1);
    const KeyRows<Element> keys(piece.keys, piece.table, shape.block_size, stride);
    const KeyRows<Element> values(piece.values, piece.table, shape.block_size, stride);
    const Element* rows[kKeysAtOnce];
    // Keys [from, to) of a row, which lie at `found`.
    const auto score = [&](int64_t row, int64_t from, int64_t to, const Element* const* found) {
        const float* query = piece.queries + row * piece.query_stride;
        float* of_row = scores + row * piece.shared * room + (from - views.first_key(row));
        int64_t head = 0;
        for (; head + 2 <= piece.shared; head += 2) {
            score_keys_twice(query + head * width, query + (head + 1) * width, found, to - from, width, shape.scale,
                             of_row + head * room, of_row + (head + 1) * room);
        }
        for (; head < piece.shared; ++head) {
            score_keys(query + head * width, found, to - from, width, shape.scale, of_row + head * room);
        }
    };
    const auto gather = [&](int64_t row, int64_t from, int64_t to, const Element* const* found) {
        for (int64_t head = 0; head < piece.shared; ++head) {
            gather_values(scores + (row * piece.shared + head) * room + (from - views.first_key(row)), found, to - from,
                          width, piece.out + row * piece.out_stride + head * width);
        }
    };
    const auto over_keys = [&](const KeyRows<Element>& cached, const auto& take) {
        for (int64_t first = begin; first < end; first += kKeysAtOnce) {
            const int64_t last = least(first + kKeysAtOnce, end);
            cached.find(first, last, rows);
            for (int64_t row = 0; row < piece.count; ++row) {
                const int64_t from = first > views.first_key(row) ? first : views.first_key(row);
                const int64_t to = least(last, views.end_in_place(row));
                if (from < to) take(row, from, to, rows + (from - first));
            }
        }
        for (int64_t row = 0; piece.parents && row < piece.count; ++row) {
            const int64_t from = views.first_key(row) > piece.position ? views.first_key(row) : piece.position;
            cached.find(views, row, from, views.position(row) + 1, rows);
            take(row, from, views.position(row) + 1, rows);
        }
    };
    over_keys(keys, score);
    for (int64_t row = 0; row < piece.count; ++row) {
        const int64_t count = views.position(row) + 1 - views.first_key(row);
        for (int64_t head = 0; head < piece.shared; ++head) {
            float* of_row = scores + (row * piece.shared + head) * room;
            if (shape.cap > 0.0f) cap_values(of_row, count, shape.cap);
            weigh(of_row, count);
            float* out = piece.out + row * piece.out_stride + head * width;
            for (int64_t i = 0; i < width; i += 8) store_reals(out + i, _mm256_setzero_ps());
        }
    }
    over_keys(values, gather);
}

inline __m256 norm_factor(const float* row, float eps, int64_t width) {
    __m256 squares = _mm256_setzero_ps();
    for (int64_t i = 0; i < width; i += 8) {
        squares = _mm256_fmadd_ps(load_reals(row + i), load_reals(row + i), squares);
    }
    return _mm256_set1_ps(1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(width) + eps));
}

// x / (1 + e^-x); and GELU by its tanh, which is x / (1 + e^-2u) of u = sqrt(2 / pi) * (x + 0.044715 x^3).
inline __m256 silu(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f);
    return _mm256_div_ps(x, _mm256_add_ps(one, exponential(_mm256_xor_ps(x, _mm256_set1_ps(-0.0f)))));
}
inline __m256 gelu_tanh(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f), square = _mm256_mul_ps(x, x);
    const __m256 bent = _mm256_mul_ps(x, _mm256_fmadd_ps(square, _mm256_set1_ps(0.044715f), one));
    const __m256 turned = _mm256_mul_ps(bent, _mm256_set1_ps(-1.5957691216f));
    return _mm256_div_ps(x, _mm256_add_ps(one, exponential(turned)));
}

template <__m256 (*kActivate)(__m256)>
inline void gate_rows_by(const float* gate_up, int64_t inner, int64_t rows, float* out) {
    for (int64_t row = 0; row < rows; ++row, gate_up += 2 * inner, out += inner) {
        for (int64_t i = 0; i < inner; i += 8) {
            const __m256 open = kActivate(load_reals(gate_up + i));
            store_reals(out + i, _mm256_mul_ps(open, load_reals(gate_up + inner + i)));
        }
    }
}

}  // namespace

void normalise_rows(const float* x, const float* weight, float eps, int64_t width, int64_t rows, float* out) {
    for (int64_t row = 0; row < rows; ++row, x += width, out += width) {
        const __m256 factor = norm_factor(x, eps, width);
        for (int64_t i = 0; i < width; i += 8) {
            store_reals(out + i, _mm256_mul_ps(_mm256_mul_ps(load_reals(x + i), factor), load_reals(weight + i)));
        }
    }
}

void add_normalised_rows(const float* x, const float* weight, float eps, int64_t width, int64_t rows, float* out) {
    for (int64_t row = 0; row < rows; ++row, x += width, out += width) {
        const __m256 factor = norm_factor(x, eps, width);
        for (int64_t i = 0; i < width; i += 8) {
            const __m256 normed = _mm256_mul_ps(_mm256_mul_ps(load_reals(x + i), factor), load_reals(weight + i));
            store_reals(out + i, _mm256_add_ps(load_reals(out + i), normed));
        }
    }
}

void cap_values(float* x, int64_t count, float cap) {
    const __m256 most = _mm256_set1_ps(cap);
    const auto capped = [&](__m256 values) {
        return _mm256_mul_ps(most, hyperbolic_tangent(_mm256_div_ps(values, most)));
    };
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) store_reals(x + i, capped(load_reals(x + i)));
    if (i == count) return;
    float rest[8] = {};
    __builtin_memcpy(rest, x + i, (count - i) * sizeof(float));
    store_reals(rest, capped(load_reals(rest)));
    __builtin_memcpy(x + i, rest, (count - i) * sizeof(float));
}

void place_rows(const DecoderShape& shape, const DecoderLayer& layer, const DecoderStep& step, float* fused,
                void* k_cache, void* v_cache, int64_t first, int64_t last) {
    const auto place = [&](auto* keys, auto* values) {
        place_rows_as(shape, layer, step, fused, keys, values, first, last);
    };
    switch (shape.kv_type) {
        case kKvFloat32:
            return place(static_cast<float*>(k_cache), static_cast<float*>(v_cache));
        case kKvBfloat16:
            return place(static_cast<uint16_t*>(k_cache), static_cast<uint16_t*>(v_cache));
        case kKvInt8:
            return place(static_cast<int8_t*>(k_cache), static_cast<int8_t*>(v_cache));
        default:
            return place(static_cast<uint8_t*>(k_cache), static_cast<uint8_t*>(v_cache));
    }
}

int64_t score_room(const AttentionPiece& piece) {
    const int64_t keys = piece.position + (piece.parents ? piece.tree_tokens : piece.count);
    const int64_t most = piece.window > 0 ? least(piece.window, keys) : keys;
    return (most + 7) / 8 * 8;
}

void attend(const DecoderShape& shape, const AttentionPiece& piece, float* scores) {
    switch (shape.kv_type) {
        case kKvFloat32:
            return attend_as<float>(shape, piece, scores);
        case kKvBfloat16:
            return attend_as<uint16_t>(shape, piece, scores);
        case kKvInt8:
            return attend_as<int8_t>(shape, piece, scores);
        default:
            return attend_as<uint8_t>(shape, piece, scores);
    }
}

void choose_experts(const Mixture& mixture, const float* x, int64_t hidden, float* room, int32_t* experts,
                    float* shares) {
    float highest = -INFINITY;
    for (int64_t expert = 0; expert < mixture.experts; ++expert) {
        room[expert] = sum_lanes(product(x, mixture.router + expert * hidden, hidden));
        if (room[expert] > highest) highest = room[expert];
    }
    float total = 0.0f;
    for (int64_t expert = 0; expert < mixture.experts; ++expert) {
        room[expert] = std::exp(room[expert] - highest);
        total += room[expert];
    }
    // The least probability that is chosen, found one by one: few are chosen, of few.
    bool is_chosen[kMostExperts] = {};
    float chosen_total = 0.0f;
    for (int64_t i = 0; i < mixture.chosen; ++i) {
        int64_t best = -1;
        for (int64_t expert = 0; expert < mixture.experts; ++expert) {
            if (!is_chosen[expert] && (best < 0 || room[expert] > room[best])) best = expert;
        }
        is_chosen[best] = true;
        chosen_total += room[best];
    }
    const float over = mixture.renormalises ? chosen_total : total;
    for (int64_t expert = 0, i = 0; expert < mixture.experts; ++expert) {
        if (!is_chosen[expert]) continue;
        experts[i] = static_cast<int32_t>(expert);
        shares[i++] = room[expert] / over;
    }
}

void gate_rows(int32_t activation, const float* gate_up, int64_t inner, int64_t rows, float* out) {
    if (activation == kSilu) return gate_rows_by<silu>(gate_up, inner, rows, out);
    gate_rows_by<gelu_tanh>(gate_up, inner, rows, out);
}

}  // namespace trireme
