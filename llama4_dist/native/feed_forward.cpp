// down(silu(gate x) · up x) of several groups of rows, each by its own weights: routed experts, a shared one, a dense one.
//
// Where weights are float8, what they multiply is rounded to float8 first, x as well as silu(gate x) · up x: each row by
// itself, its largest element at float8's largest. That is what such weights were made for; a row of zeros stays one.

#include <cmath>

#include "team.h"
#include "work.h"

namespace l4d {
namespace {

thread_local Scratch rows_scratch, gate_scratch, up_scratch, out_scratch;
thread_local std::vector<Piece> wide_pieces, narrow_pieces;

// gate = silu(gate) · up
inline void activate(float* gate, const float* up, int64_t num_columns) {
    int64_t c = 0;
    for (; c + LANES <= num_columns; c += LANES) store(gate + c, silu_of(load(gate + c)) * load(up + c));
    if (c == num_columns) return;
    float rest[2][LANES] = {};
    std::memcpy(rest[0], gate + c, (num_columns - c) * sizeof(float));
    std::memcpy(rest[1], up + c, (num_columns - c) * sizeof(float));
    store(rest[0], silu_of(load(rest[0])) * load(rest[1]));
    std::memcpy(gate + c, rest[0], (num_columns - c) * sizeof(float));
}

constexpr float LARGEST_FLOAT8 = 448.0f;

// Round a row to float8 numbers times one scale.
inline void round_row(float* row, int64_t width) {
    float largest = 0.0f;
    for (int64_t c = 0; c < width; ++c) {
        const float size = std::fabs(row[c]);
        largest = size > largest || size != size ? size : largest;  // a NaN stays, and is seen in the logits
    }
    const float scale = largest / LARGEST_FLOAT8;
    if (scale == 0.0f) return std::fill(row, row + width, 0.0f);
    for (int64_t c = 0; c < width; ++c) row[c] = nearest_float8(row[c] / scale) * scale;
}

}  // namespace

struct FeedForward {
    int64_t width, hidden;
    int64_t gate_stride, down_stride;  // between rows of a weight as stored; 0 = packed
};

struct Groups {
    int64_t num_groups;
    const int64_t *first_rows, *nums_rows;
    const void *const *gates, *const *ups, *const *downs;
};

template <typename W>
inline Matrix<W> matrix(const void* data, int64_t width, int64_t num_columns, int64_t stride) {
    return {static_cast<const W*>(data), width, num_columns, stride};
}

template <typename W, typename X>
void feed_forward(const FeedForward& f, const Groups& groups, const X* x, int64_t x_stride, int64_t num_rows, X* out,
                  int num_threads) {
    constexpr bool rounds = std::is_same_v<W, Float8>, converts = !std::is_same_v<X, float>, copies = rounds || converts;
    float* gate = gate_scratch.take(num_rows * f.hidden);
    float* up = up_scratch.take(num_rows * f.hidden);
    float* rows = copies ? rows_scratch.take(num_rows * f.width) : nullptr;
    float* sums = converts ? out_scratch.take(num_rows * f.width) : reinterpret_cast<float*>(out);
    auto &wide = wide_pieces, &narrow = narrow_pieces;
    cut(wide, groups.num_groups, groups.first_rows, groups.nums_rows, f.hidden, !f.gate_stride,
        num_threads);
    cut(narrow, groups.num_groups, groups.first_rows, groups.nums_rows, f.width, !f.down_stride,
        num_threads);
    const float* in = copies ? rows : reinterpret_cast<const float*>(x);
    const int64_t in_stride = copies ? f.width : x_stride;
    together(num_threads, [&](Member& member) {
        if constexpr (copies)
            member.each(num_rows, [&](int64_t row) {
                for (int64_t c = 0; c < f.width; ++c) rows[row * f.width + c] = to_float(x[row * x_stride + c]);
                if constexpr (rounds) round_row(rows + row * f.width, f.width);
            });
        member.each(wide.size(), [&](int64_t i) {
            const Piece& p = wide[i];
            multiply_piece(matrix<W>(groups.gates[p.group], f.width, f.hidden, f.gate_stride), p, in, in_stride, gate);
            multiply_piece(matrix<W>(groups.ups[p.group], f.width, f.hidden, f.gate_stride), p, in, in_stride, up);
            for (int64_t r = p.first_row; r < p.first_row + p.num_rows; ++r)
                activate(gate + r * f.hidden + p.first_column, up + r * f.hidden + p.first_column, p.num_columns);
        });
        if constexpr (rounds)
            member.each(num_rows, [&](int64_t row) { round_row(gate + row * f.hidden, f.hidden); });
        member.each(narrow.size(), [&](int64_t i) {
            const Piece& p = narrow[i];
            multiply_piece(matrix<W>(groups.downs[p.group], f.hidden, f.width, f.down_stride), p, gate, f.hidden, sums);
        });
        if constexpr (converts)
            member.each(num_rows, [&](int64_t row) {
                for (int64_t c = 0; c < f.width; ++c) from_float(sums[row * f.width + c], out[row * f.width + c]);
            });
    });
}

}  // namespace l4d

using l4d::Bfloat16;
using l4d::FeedForward;
using l4d::Float8;
using l4d::Groups;
using l4d::Int8;

// Groups lie one after the other in x and out; out is contiguous. The name says the type of the weights and of the rows.
extern "C" void l4d_feed_forward_float32_float32(const FeedForward* f, const Groups* groups, const float* x,
                                                 int64_t x_stride, int64_t num_rows, float* out, int num_threads) {
    l4d::feed_forward<float>(*f, *groups, x, x_stride, num_rows, out, num_threads);
}

extern "C" void l4d_feed_forward_bfloat16_float32(const FeedForward* f, const Groups* groups, const float* x,
                                                  int64_t x_stride, int64_t num_rows, float* out, int num_threads) {
    l4d::feed_forward<Bfloat16>(*f, *groups, x, x_stride, num_rows, out, num_threads);
}

extern "C" void l4d_feed_forward_bfloat16_bfloat16(const FeedForward* f, const Groups* groups, const Bfloat16* x,
                                                   int64_t x_stride, int64_t num_rows, Bfloat16* out,
                                                   int num_threads) {
    l4d::feed_forward<Bfloat16>(*f, *groups, x, x_stride, num_rows, out, num_threads);
}

extern "C" void l4d_feed_forward_int8_float32(const FeedForward* f, const Groups* groups, const float* x,
                                              int64_t x_stride, int64_t num_rows, float* out, int num_threads) {
    l4d::feed_forward<Int8>(*f, *groups, x, x_stride, num_rows, out, num_threads);
}

extern "C" void l4d_feed_forward_int8_bfloat16(const FeedForward* f, const Groups* groups, const Bfloat16* x,
                                               int64_t x_stride, int64_t num_rows, Bfloat16* out, int num_threads) {
    l4d::feed_forward<Int8>(*f, *groups, x, x_stride, num_rows, out, num_threads);
}

extern "C" void l4d_feed_forward_float8_float32(const FeedForward* f, const Groups* groups, const float* x,
                                                int64_t x_stride, int64_t num_rows, float* out, int num_threads) {
    l4d::feed_forward<Float8>(*f, *groups, x, x_stride, num_rows, out, num_threads);
}

extern "C" void l4d_feed_forward_float8_bfloat16(const FeedForward* f, const Groups* groups, const Bfloat16* x,
                                                 int64_t x_stride, int64_t num_rows, Bfloat16* out, int num_threads) {
    l4d::feed_forward<Float8>(*f, *groups, x, x_stride, num_rows, out, num_threads);
}

extern "C" void l4d_feed_forward_float32_bfloat16(const FeedForward* f, const Groups* groups, const Bfloat16* x,
                                                  int64_t x_stride, int64_t num_rows, Bfloat16* out, int num_threads) {
    l4d::feed_forward<float>(*f, *groups, x, x_stride, num_rows, out, num_threads);
}
