// The front of a mixture-of-experts layer: norm, router, the likeliest experts of each token and their scores.

#include "norm.h"
#include "team.h"
#include "work.h"

namespace l4d {

struct Router {
    int64_t width, num_experts, experts_per_token;
    double eps;
    const float* norm;
    const void* weight;  // packed
};

namespace {

thread_local Scratch logits_scratch;
thread_local std::vector<Piece> pieces;

// Whether `value` goes before `other`: a NaN goes first and so is seen; of equals the first one stays.
inline bool beats(float value, float other) { return value > other || (value != value && other == other); }

// Write the `count` largest of the logits, in falling order, equals by their number.
inline void choose(const float* logits, int64_t num_experts, int64_t count, int64_t* experts, float* scores) {
    for (int64_t slot = 0; slot < count; ++slot) {
        int64_t best = -1;
        for (int64_t e = 0; e < num_experts; ++e) {
            const bool is_taken = std::find(experts, experts + slot, e) != experts + slot;
            if (!is_taken && (best < 0 || beats(logits[e], logits[best]))) best = e;
        }
        experts[slot] = best;
        scores[slot] = sigmoid_of(all(logits[best]))[0];
    }
}

template <typename W>
void route(const Router& router, const float* x, int64_t num_tokens, float* normed, int64_t* experts, float* scores,
           int num_threads) {
    const int64_t width = router.width, num_experts = router.num_experts, count = router.experts_per_token;
    float* logits = logits_scratch.take(num_tokens * num_experts);
    const Matrix<W> weight = packed<W>(router.weight, width, num_experts);
    const int64_t first_row = 0;
    auto& all_pieces = pieces;
    cut(all_pieces, 1, &first_row, &num_tokens, num_experts, true, num_threads);
    together(num_tokens > 1 ? num_threads : 1, [&](Member& member) {
        member.each(num_tokens, [&](int64_t t) {
            rms_norm(x + t * width, router.norm, width, float(router.eps), normed + t * width);
        });
        member.each(all_pieces.size(), [&](int64_t i) { multiply_piece(weight, all_pieces[i], normed, width, logits); });
        member.each(num_tokens, [&](int64_t t) {
            choose(logits + t * num_experts, num_experts, count, experts + t * count, scores + t * count);
        });
    });
}

}  // namespace
}  // namespace l4d

// Writes norm(x) [T, D], experts [T, K] and scores [T, K].
extern "C" void l4d_route_float32(const l4d::Router* router, const float* x, int64_t num_tokens, float* normed,
                                  int64_t* experts, float* scores, int num_threads) {
    l4d::route<float>(*router, x, num_tokens, normed, experts, scores, num_threads);
}

extern "C" void l4d_route_bfloat16(const l4d::Router* router, const float* x, int64_t num_tokens, float* normed,
                                   int64_t* experts, float* scores, int num_threads) {
    l4d::route<l4d::Bfloat16>(*router, x, num_tokens, normed, experts, scores, num_threads);
}

// out [T, D] = norm(x), for a layer without experts and before the head.
extern "C" void l4d_norm(const float* x, const float* norm, int64_t num_tokens, int64_t width, double eps, float* out) {
    for (int64_t t = 0; t < num_tokens; ++t) l4d::rms_norm(x + t * width, norm, width, float(eps), out + t * width);
}
