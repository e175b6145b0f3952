// The layers of a Llama-type model, Gemma's among them, over one step's tokens, and the scores that follow, in one
// call: what a step costs beside its products is then a few microseconds and not a Python call per operator.
//
// Activations are float32. A row's result depends on its own sequence alone, bit for bit: not on the other rows, how
// a prompt is cut into chunks, or the threads.
#pragma once

#include <cstdint>

#include "linear.h"
#include "mixture.h"

namespace trireme {

// Mirrored by ctypes in decoder_cpu.py, as the four below.
struct DecoderLayer {
    const Weight* qkv;      // queries, keys, values
    const Weight* out;
    const Weight* gate_up;  // gate, up; null where there is a mixture
    const Weight* down;
    const Mixture* mixture;  // in place of the two, or null
    const float* input_norm;    // (hidden)
    const float* mlp_norm;      // (hidden)
    const float* qk_norm;       // (heads + kv_heads, head_dim), or null
    const float* qkv_bias;      // each (outputs), or null
    const float* out_bias;
    const float* gate_up_bias;
    const float* down_bias;
    const float* post_attention_norm;  // (hidden): of what joins the residual stream, or null
    const float* post_mlp_norm;
    const float* cosines;       // (positions, head_dim)
    const float* sines;         // the same, negated in the first half
    int64_t window;             // 0: all keys are seen
};

// The last two have codes of 8 bits, and behind those of a row its scale (kernels/kv_forms.py).
enum KvType : int32_t { kKvFloat32, kKvBfloat16, kKvInt8, kKvFloat8 };

enum Activation : int32_t { kSilu, kGeluTanh };

struct DecoderShape {
    int64_t hidden;
    int64_t inner;  // of the feed-forward
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;  // a multiple of 16
    int64_t block_size;
    float eps;
    float scale;
    float cap;           // scores become cap * tanh(score / cap); 0: they stay
    int32_t kv_type;
    int32_t activation;  // of the gate
};

// Elements of a cache's row, and bytes of each.
static inline int64_t kv_row(const DecoderShape& shape) {
    return shape.head_dim + (shape.kv_type < kKvInt8 ? 0 : static_cast<int64_t>(sizeof(float)));
}
static inline int64_t kv_bytes(const DecoderShape& shape) {
    return shape.kv_type == kKvFloat32 ? 4 : shape.kv_type == kKvBfloat16 ? 2 : 1;
}

// The last tokens of a sequence where they are a tree: each sees its ancestors and all keys before the tree.
struct TokenTree {
    const int64_t* parents;  // (tokens): the place of the token before each, a smaller one; -1 of the root
    int64_t tokens;          // at most kMostTreeTokens, this step's rows being the last of them; 0: no tree
};
constexpr int64_t kMostTreeTokens = 64;

// What follows the last layer.
struct DecoderHead {
    const float* norm;      // (hidden)
    const Weight* weight;   // (vocabulary, hidden); null: scores are not made here
    float cap;              // scores become cap * tanh(score / cap); 0: they stay
};

struct DecoderStep {
    float* x;               // (rows, hidden): the residual stream, in and out
    const int64_t* positions;  // (rows)
    const int64_t* slots;   // (rows): where each row's key and value go
    const int64_t* query_lens;    // (sequences): rows of each, in order
    const int64_t* context_lens;  // (sequences): keys of each, its rows' own included
    const int64_t* tables;        // (sequences, table_width): its blocks
    void* const* k_caches;  // (layers): (blocks, block_size, kv_heads, kv_row)
    void* const* v_caches;
    float* states;          // (rows, hidden): x after the last norm
    const int64_t* scored;  // (num_scored): the rows whose tokens are scored; null: all, in order
    float* scores;          // (num_scored, vocabulary)
    int64_t rows;
    int64_t sequences;
    int64_t table_width;
    int64_t num_scored;
    const TokenTree* trees;  // (sequences), or null
};

static_assert(sizeof(DecoderLayer) == 136 && sizeof(DecoderShape) == 72 && sizeof(DecoderHead) == 24 &&
                  sizeof(DecoderStep) == 128 && sizeof(TokenTree) == 16,
              "decoder_cpu.py has these sizes too");

// Rows of one sequence that read the same keys in turn: those in a first-level cache serve all of them.
constexpr int64_t kQueryRows = 8;
constexpr int64_t kKeysAtOnce = 64;

// Queries [first, last) of one sequence, for one head of keys.
struct AttentionPiece {
    const float* queries;  // of row `first`, the first of the heads that share the keys
    float* out;            // the same place in the result
    const void* keys;      // of the whole cache, this head's
    const void* values;
    const int64_t* table;
    int64_t position;      // of row `first`; of a tree, of its root
    int64_t count;         // rows
    int64_t shared;        // heads that share the keys
    int64_t query_stride;  // elements from row to row
    int64_t out_stride;
    int64_t window;
    const int64_t* parents;  // of a tree that ends with the sequence, or null
    int64_t tree_tokens;
    int64_t tree_place;      // of row `first` in it
};

void normalise_rows(const float* x, const float* weight, float eps, int64_t width, int64_t rows, float* out);
// The same, added to `out`.
void add_normalised_rows(const float* x, const float* weight, float eps, int64_t width, int64_t rows, float* out);
// cap * tanh(x / cap), in place.
void cap_values(float* x, int64_t count, float cap);
// Normalise queries and keys per head where the layer says so, rotate them, and take keys and values to the cache.
void place_rows(const DecoderShape& shape, const DecoderLayer& layer, const DecoderStep& step, float* fused,
                void* k_cache, void* v_cache, int64_t first, int64_t last);
// `scores` has room for count * shared rows of `score_room(piece)` floats each.
int64_t score_room(const AttentionPiece& piece);
void attend(const DecoderShape& shape, const AttentionPiece& piece, float* scores);
void gate_rows(int32_t activation, const float* gate_up, int64_t inner, int64_t rows, float* out);

// Outcomes as of trireme_linear.
int run_layers(const DecoderShape& shape, const DecoderLayer* layers, int64_t first, int64_t last, const DecoderStep& step,
               const Kernels& kernels, int threads);
// Take step.x, behind the last layer, to step.states and step.scores.
int run_head(const DecoderShape& shape, const DecoderHead& head, const DecoderStep& step, const Kernels& kernels,
             int threads);

}  // namespace trireme
