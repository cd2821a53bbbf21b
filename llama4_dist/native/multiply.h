// Multiplies rows by an input-major weight. An output is one chain of fused products, added in the order of the inputs:
// how many rows go together, how a product is cut into tiles and who computes them does not change a bit.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace l4d {

constexpr int VECTORS_PER_STRIP = 4;
constexpr int STRIP = VECTORS_PER_STRIP * LANES;
#ifdef __AVX512F__  // 32 registers: 24 sums, 4 weights, a factor
constexpr int ROWS_PER_TILE = 6;
#else  // 16 registers: 12 sums, 3 factors, a weight
constexpr int ROWS_PER_TILE = 3;
#endif
constexpr int64_t BLOCK = 256;  // inputs of a strip that many rows share from a near cache
constexpr int64_t MAX_COLUMNS = 512;  // that a thread takes at a time

constexpr int64_t num_strips(int64_t num_columns) { return (num_columns + STRIP - 1) / STRIP; }

// Whether weights are numbers that their output's scale is still missing from.
template <typename W>
constexpr bool has_scales = std::is_same_v<W, Int8> || std::is_same_v<W, Float8>;

// A weight of `width` inputs and `num_columns` outputs, W = float, Bfloat16, Int8 or Float8: packed into contiguous strips
// of outputs, or as stored in a checkpoint, a row of outputs per input. One with scales is always packed, and behind its
// strips stands the scale of every output, those that fill up the last strip included.
template <typename W>
struct Matrix {
    const W* data;
    int64_t width, num_columns, row_stride;

    bool is_packed() const { return row_stride == 0; }

    const float* scales() const {
        return reinterpret_cast<const float*>(data + num_strips(num_columns) * STRIP * width);
    }
};

template <typename W>
inline Matrix<W> packed(const void* data, int64_t width, int64_t num_columns) {
    return {static_cast<const W*>(data), width, num_columns, 0};
}

// A part of a product: rows of x times `width` rows of a weight, added to what is in y, or not.
template <typename W>
struct Part {
    const float* x;
    int64_t x_stride;
    const W* weight;
    int64_t weight_stride;
    int64_t width;
    float* y;
    int64_t y_stride;
    bool first;
};

// Columns 0 to `num_columns` of a part, in one thread.
template <typename W>
void multiply_columns(const Part<W>& p, int64_t num_rows, int64_t num_columns);

// Some columns of y = x @ weight, in one thread; `begin` is a multiple of the strip.
template <typename W>
void multiply(const Matrix<W>& m, int64_t begin, int64_t num_columns, const float* x, int64_t x_stride,
              int64_t num_rows, float* y, int64_t y_stride);

}  // namespace l4d
