#include "decoder_layers.h"

#include <atomic>

#include "multiply.h"
#include "room.h"
#include "thread_pool.h"

namespace trireme {
namespace {

constexpr int64_t kFewElements = 16 * 1024;  // less than this is done before another thread has heard of it

thread_local Room buffers;
thread_local Room scores_room;

struct Job {
    const DecoderShape& shape;
    const DecoderLayer* layer;
    const DecoderStep& step;
    float* normed;   // (rows, hidden); also what is to be normalised before it joins x
    float* fused;    // (rows, (heads + 2 * kv_heads) * head_dim)
    float* seen;     // (rows, heads * head_dim)
    float* gate_up;  // (rows, 2 * inner)
    float* gated;    // (rows, inner)
    const float* norm;
    void* k_cache;
    void* v_cache;
    int64_t rows_per_piece;
    int64_t pieces;
    std::atomic<bool> is_out_of_memory{false};

    int64_t row_width() const { return (shape.heads + 2 * shape.kv_heads) * shape.head_dim; }
    int64_t first_row(int64_t index) const { return index * rows_per_piece; }
    int64_t last_row(int64_t index) const { return least(first_row(index) + rows_per_piece, step.rows); }
};

void normalise_piece(void* context, int64_t index) {
    Job& job = *static_cast<Job*>(context);
    const int64_t first = job.first_row(index), width = job.shape.hidden;
    normalise_rows(job.step.x + first * width, job.norm, job.shape.eps, width, job.last_row(index) - first,
                   job.normed + first * width);
}

void place_piece(void* context, int64_t index) {
    Job& job = *static_cast<Job*>(context);
    place_rows(job.shape, *job.layer, job.step, job.fused, job.k_cache, job.v_cache, job.first_row(index),
               job.last_row(index));
}

void gate_piece(void* context, int64_t index) {
    Job& job = *static_cast<Job*>(context);
    const int64_t first = job.first_row(index), inner = job.shape.inner;
    gate_rows(job.shape.activation, job.gate_up + first * 2 * inner, inner, job.last_row(index) - first,
              job.gated + first * inner);
}

void add_piece(void* context, int64_t index) {
    Job& job = *static_cast<Job*>(context);
    const int64_t first = job.first_row(index), width = job.shape.hidden;
    add_normalised_rows(job.normed + first * width, job.norm, job.shape.eps, width, job.last_row(index) - first,
                        job.step.x + first * width);
}

// Which rows of which sequence; pieces are counted sequence by sequence, the latest rows, which see most, first.
struct Place {
    int64_t sequence, first, count, row;
};

Place place_of(const DecoderStep& step, int64_t index) {
    int64_t row = 0;
    for (int64_t sequence = 0;; ++sequence) {
        const int64_t length = step.query_lens[sequence], pieces = (length + kQueryRows - 1) / kQueryRows;
        if (index < pieces) {
            const int64_t first = (pieces - 1 - index) * kQueryRows;
            return {sequence, first, least(kQueryRows, length - first), row + first};
        }
        index -= pieces;
        row += length;
    }
}

void attend_piece(void* context, int64_t index) {
    Job& job = *static_cast<Job*>(context);
    const DecoderShape& shape = job.shape;
    const Place place = place_of(job.step, index / shape.kv_heads);
    const int64_t head = index % shape.kv_heads, shared = shape.heads / shape.kv_heads, width = shape.head_dim;
    const int64_t row_bytes = kv_row(shape) * kv_bytes(shape);
    const int64_t context_len = job.step.context_lens[place.sequence], length = job.step.query_lens[place.sequence];
    AttentionPiece piece{};
    piece.queries = job.fused + place.row * job.row_width() + head * shared * width;
    piece.out = job.seen + place.row * shape.heads * width + head * shared * width;
    piece.keys = static_cast<const char*>(job.k_cache) + head * row_bytes;
    piece.values = static_cast<const char*>(job.v_cache) + head * row_bytes;
    piece.table = job.step.tables + place.sequence * job.step.table_width;
    piece.position = context_len - length + place.first;
    piece.count = place.count;
    piece.shared = shared;
    piece.query_stride = job.row_width();
    piece.out_stride = shape.heads * width;
    piece.window = job.layer->window;
    if (job.step.trees && job.step.trees[place.sequence].tokens) {
        const TokenTree& tree = job.step.trees[place.sequence];
        piece.parents = tree.parents;
        piece.tree_tokens = tree.tokens;
        piece.tree_place = tree.tokens - length + place.first;
        piece.position = context_len - tree.tokens;
    }
    char* room = scores_room.at_least(score_room(piece) * piece.count * shared * 4);
    if (!room) {
        job.is_out_of_memory.store(true, std::memory_order_relaxed);
        return;
    }
    attend(shape, piece, reinterpret_cast<float*>(room));
}

struct CapJob {
    float* scores;  // (rows, width)
    int64_t width;
    float cap;
};

void cap_piece(void* context, int64_t index) {
    const CapJob& job = *static_cast<CapJob*>(context);
    cap_values(job.scores + index * job.width, job.width, job.cap);
}

void over_rows(Piece piece, Job& job, int64_t width, int threads) {
    const int64_t rows = job.step.rows;
    if (rows == 0) return;
    const int used = rows * width < kFewElements ? 1 : threads;
    job.rows_per_piece = (rows + 4 * used - 1) / (4 * used);
    run_pieces(piece, &job, (rows + job.rows_per_piece - 1) / job.rows_per_piece, used);
}

int64_t rounded(int64_t elements) { return (elements + 15) / 16 * 16; }

}  // namespace

int run_layers(const DecoderShape& shape, const DecoderLayer* layers, int64_t first, int64_t last, const DecoderStep& step,
               const Kernels& kernels, int threads) {
    const int64_t rows = step.rows;
    if (rows == 0) return kDone;
    Job job{shape, layers, step, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 0};
    const int64_t sizes[] = {rounded(rows * shape.hidden), rounded(rows * job.row_width()),
                             rounded(rows * shape.heads * shape.head_dim), rounded(rows * 2 * shape.inner),
                             rounded(rows * shape.inner)};
    int64_t total = 0;
    for (const int64_t size : sizes) total += size;
    float* at = reinterpret_cast<float*>(buffers.at_least(total * 4));
    if (!at) return kNoMemory;
    float** parts[] = {&job.normed, &job.fused, &job.seen, &job.gate_up, &job.gated};
    for (int i = 0; i < 5; ++i) {
        *parts[i] = at;
        at += sizes[i];
    }
    int64_t tiles = 0, keys = 0;
    for (int64_t sequence = 0; sequence < step.sequences; ++sequence) {
        tiles += (step.query_lens[sequence] + kQueryRows - 1) / kQueryRows;
        keys += step.query_lens[sequence] * step.context_lens[sequence];
    }
    const int attention_threads = keys * shape.heads * shape.head_dim < 4 * kFewElements ? 1 : threads;
    const auto product = [&](const Weight* weight, const float* x, int64_t inputs, const float* bias,
                             const float* residual, float* out) {
        return multiply(Call{weight, x, bias, residual, out, rows, inputs, kFloat32}, kernels, threads);
    };
    // A product that joins the residual stream: as it is, or normalised by `norm`.
    const auto join = [&](const Weight* weight, const float* from, int64_t inputs, const float* bias, const float* norm) {
        if (!norm) return product(weight, from, inputs, bias, step.x, step.x);
        const int outcome = product(weight, from, inputs, bias, nullptr, job.normed);
        if (outcome) return outcome;
        job.norm = norm;
        over_rows(add_piece, job, shape.hidden, threads);
        return static_cast<int>(kDone);
    };
    for (int64_t index = first; index < last; ++index) {
        const DecoderLayer& layer = layers[index];
        job.layer = &layer;
        job.k_cache = step.k_caches[index];
        job.v_cache = step.v_caches[index];
        job.norm = layer.input_norm;
        over_rows(normalise_piece, job, shape.hidden, threads);
        int outcome = product(layer.qkv, job.normed, shape.hidden, layer.qkv_bias, nullptr, job.fused);
        if (outcome) return outcome;
        over_rows(place_piece, job, job.row_width(), threads);
        run_pieces(attend_piece, &job, tiles * shape.kv_heads, attention_threads);
        if (job.is_out_of_memory.load(std::memory_order_relaxed)) return kNoMemory;
        outcome = join(layer.out, job.seen, shape.heads * shape.head_dim, layer.out_bias, layer.post_attention_norm);
        if (outcome) return outcome;
        job.norm = layer.mlp_norm;
        over_rows(normalise_piece, job, shape.hidden, threads);
        if (layer.mixture) {
            outcome = run_mixture(*layer.mixture, job.normed, shape.hidden, rows, step.x, kernels, threads);
            if (outcome) return outcome;
            continue;
        }
        outcome = product(layer.gate_up, job.normed, shape.hidden, layer.gate_up_bias, nullptr, job.gate_up);
        if (outcome) return outcome;
        over_rows(gate_piece, job, shape.inner, threads);
        outcome = join(layer.down, job.gated, shape.inner, layer.down_bias, layer.post_mlp_norm);
        if (outcome) return outcome;
    }
    return kDone;
}

int run_head(const DecoderShape& shape, const DecoderHead& head, const DecoderStep& step, const Kernels& kernels,
             int threads) {
    const int64_t width = shape.hidden;
    Job job{shape, nullptr, step, step.states, nullptr, nullptr, nullptr, nullptr, head.norm, nullptr, nullptr, 0, 0};
    over_rows(normalise_piece, job, width, threads);
    if (!head.weight || !step.num_scored) return kDone;
    const float* states = step.states;
    if (step.scored) {
        float* gathered = reinterpret_cast<float*>(buffers.at_least(step.num_scored * width * 4));
        if (!gathered) return kNoMemory;
        for (int64_t i = 0; i < step.num_scored; ++i) {
            __builtin_memcpy(gathered + i * width, step.states + step.scored[i] * width, width * sizeof(float));
        }
        states = gathered;
    }
    const Call call{head.weight, states, nullptr, nullptr, step.scores, step.num_scored, width, kFloat32};
    const int outcome = multiply(call, kernels, threads);
    if (outcome || head.cap == 0.0f) return outcome;
    const int64_t vocabulary = head.weight->outputs;
    CapJob capping{step.scores, vocabulary, head.cap};
    run_pieces(cap_piece, &capping, step.num_scored, step.num_scored * vocabulary < kFewElements ? 1 : threads);
    return kDone;
}

}  // namespace trireme
