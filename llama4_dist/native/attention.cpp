// The attention half of a decoder layer: norm, projections, rotation, cache, attention, projection back, residual.

#include "attention.h"
#include "norm.h"
#include "team.h"

namespace l4d {

struct AttentionLayer {
    int64_t width, num_heads, num_kv_heads, head_dim;
    int64_t has_rope, has_qk_norm, has_temperature;
    double eps;
    const float* norm;
    const void *qkv, *o;  // packed
};

// What the layers of a group share in a step.
struct AttentionStep {
    int64_t num_tokens;
    const float* rotation;     // [T, C]: cosine and sine of each pair
    const float* temperature;  // [T]
    const int64_t* slots;      // [T]
    int64_t num_blocks;
    const QueryBlock* blocks;
};

namespace {

thread_local Scratch normed_scratch, qkv_scratch, attended_scratch, out_scratch;
thread_local Scratch q_scratch, scores_scratch, running_scratch, gathered_scratch, o_scratch;
thread_local std::vector<Piece> qkv_pieces, o_pieces;

inline void rotate(float* head, const float* rotation, int64_t head_dim) {
    for (int64_t c = 0; c < head_dim; c += 2) {
        const float real = head[c], imaginary = head[c + 1], cosine = rotation[c], sine = rotation[c + 1];
        head[c] = real * cosine - imaginary * sine;
        head[c + 1] = real * sine + imaginary * cosine;
    }
}

// Finish queries and keys of a token and put its keys and values into the cache.
template <typename T>
void finish_token(const AttentionLayer& layer, const AttentionStep& step, const Cache<T>& cache, int64_t token,
                  float* qkv) {
    const int64_t head_dim = layer.head_dim;
    const float scale = (layer.has_temperature ? step.temperature[token] : 1.0f) / std::sqrt(float(head_dim));
    for (int64_t h = 0; h < layer.num_heads + layer.num_kv_heads; ++h) {
        float* head = qkv + h * head_dim;
        if (layer.has_rope) rotate(head, step.rotation + token * head_dim, head_dim);
        if (layer.has_qk_norm) rms_norm(head, nullptr, head_dim, float(layer.eps), head);
        if (h < layer.num_heads)
            for (int64_t c = 0; c < head_dim; ++c) head[c] *= scale;
    }
    const float* keys = qkv + layer.num_heads * head_dim;
    const float* values = keys + layer.num_kv_heads * head_dim;
    for (int64_t g = 0; g < layer.num_kv_heads; ++g)
        cache.write(step.slots[token], g, keys + g * head_dim, values + g * head_dim);
}

// The queries that share a key/value head, of all queries of a block.
template <typename T>
void attend_head(const AttentionLayer& layer, const Cache<T>& cache, const QueryBlock& block, int64_t kv_head,
                 const float* qkv, int64_t qkv_width, float* attended) {
    const int64_t head_dim = layer.head_dim, heads = layer.num_heads / layer.num_kv_heads;
    const int64_t num_rows = block.num_queries * heads;
    float* q = q_scratch.take(num_rows * head_dim);
    float* out = o_scratch.take(num_rows * head_dim);
    const Workplace<T> at{scores_scratch.take(num_rows * BLOCK_KEYS),
                          reinterpret_cast<Running*>(running_scratch.take(2 * num_rows)),
                          reinterpret_cast<T*>(gathered_scratch.take(BLOCK_KEYS * head_dim))};
    const int64_t width = heads * head_dim;  // of one query, contiguous in both buffers
    for (int64_t i = 0; i < block.num_queries; ++i)
        std::memcpy(q + i * width, qkv + (block.row + i) * qkv_width + kv_head * width, width * sizeof(float));
    attend(cache, block, kv_head, q, heads, at, out);
    for (int64_t i = 0; i < block.num_queries; ++i)
        std::memcpy(attended + (block.row + i) * layer.num_heads * head_dim + kv_head * width, out + i * width,
                    width * sizeof(float));
}

template <typename W, typename T>
void attention(const AttentionLayer& layer, const AttentionStep& step, const Cache<T>& cache, const float* x, float* to,
               int num_threads) {
    const int64_t num_tokens = step.num_tokens, width = layer.width, head_dim = layer.head_dim;
    const int64_t q_width = layer.num_heads * head_dim, qkv_width = q_width + 2 * layer.num_kv_heads * head_dim;
    float* normed = normed_scratch.take(num_tokens * width);
    float* qkv = qkv_scratch.take(num_tokens * qkv_width);
    float* attended = attended_scratch.take(num_tokens * q_width);
    float* out = out_scratch.take(num_tokens * width);
    const Matrix<W> qkv_weight = packed<W>(layer.qkv, width, qkv_width), o_weight = packed<W>(layer.o, q_width, width);
    const int64_t first_row = 0;
    auto &projections = qkv_pieces, &outputs = o_pieces;
    cut(projections, 1, &first_row, &num_tokens, qkv_width, true, num_threads);
    cut(outputs, 1, &first_row, &num_tokens, width, true, num_threads);
    together(num_threads, [&](Member& member) {
        member.each(num_tokens, [&](int64_t t) {
            rms_norm(x + t * width, layer.norm, width, float(layer.eps), normed + t * width);
        });
        member.each(projections.size(),
                    [&](int64_t i) { multiply_piece(qkv_weight, projections[i], normed, width, qkv); });
        member.each(num_tokens, [&](int64_t t) { finish_token(layer, step, cache, t, qkv + t * qkv_width); });
        member.each(step.num_blocks * layer.num_kv_heads, [&](int64_t i) {
            attend_head(layer, cache, step.blocks[i / layer.num_kv_heads], i % layer.num_kv_heads, qkv, qkv_width,
                        attended);
        });
        member.each(outputs.size(), [&](int64_t i) {
            const Piece& p = outputs[i];
            multiply_piece(o_weight, p, attended, q_width, out);
            const int64_t end = p.first_column + p.num_columns;
            for (int64_t r = p.first_row; r < p.first_row + p.num_rows; ++r)
                for (int64_t c = p.first_column; c < end; ++c) to[r * width + c] += out[r * width + c];
        });
    });
}

}  // namespace
}  // namespace l4d

using l4d::AttentionLayer;
using l4d::AttentionStep;
using l4d::Bfloat16;
using l4d::Cache;
using l4d::Int8;

// to [T, D] += attention(x), where `to` may be x; the name says the type of the weights and that of the cache.
extern "C" void l4d_attention_float32_float32(const AttentionLayer* layer, const AttentionStep* step,
                                              const Cache<float>* cache, const float* x, float* to,
                                              int num_threads) {
    l4d::attention<float>(*layer, *step, *cache, x, to, num_threads);
}

extern "C" void l4d_attention_float32_bfloat16(const AttentionLayer* layer, const AttentionStep* step,
                                               const Cache<Bfloat16>* cache, const float* x, float* to,
                                               int num_threads) {
    l4d::attention<float>(*layer, *step, *cache, x, to, num_threads);
}

extern "C" void l4d_attention_bfloat16_float32(const AttentionLayer* layer, const AttentionStep* step,
                                               const Cache<float>* cache, const float* x, float* to,
                                               int num_threads) {
    l4d::attention<Bfloat16>(*layer, *step, *cache, x, to, num_threads);
}

extern "C" void l4d_attention_bfloat16_bfloat16(const AttentionLayer* layer, const AttentionStep* step,
                                                const Cache<Bfloat16>* cache, const float* x, float* to,
                                                int num_threads) {
    l4d::attention<Bfloat16>(*layer, *step, *cache, x, to, num_threads);
}

extern "C" void l4d_attention_int8_float32(const AttentionLayer* layer, const AttentionStep* step,
                                           const Cache<float>* cache, const float* x, float* to,
                                           int num_threads) {
    l4d::attention<Int8>(*layer, *step, *cache, x, to, num_threads);
}

extern "C" void l4d_attention_int8_bfloat16(const AttentionLayer* layer, const AttentionStep* step,
                                            const Cache<Bfloat16>* cache, const float* x, float* to,
                                            int num_threads) {
    l4d::attention<Int8>(*layer, *step, *cache, x, to, num_threads);
}
