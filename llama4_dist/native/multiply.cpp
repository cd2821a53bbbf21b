// The products that multiply.h declares.

#include "multiply.h"
#include "work.h"

#include <type_traits>

namespace l4d {
namespace {

// Weights as stored that stay in registers while rows go by: some inputs, each for some vectors of outputs.
#ifdef __AVX512F__
constexpr int AT_ONCE = 8, ABREAST = 1;
#else  // a factor from memory serves two vectors, and a line of memory is asked for once
constexpr int AT_ONCE = 4, ABREAST = 2;
#endif
constexpr int ACROSS = ABREAST * LANES;
constexpr int FEW_ROWS = 6;            // whose sums may lie apart
constexpr int64_t STREAMED_ROWS = 64;  // that share what was read of a weight; their sums stay in a near cache
constexpr int64_t STREAMED_COLUMNS = 128;
constexpr int64_t TILED_FROM = 24;  // more rows than these keep a packed block of floats in registers and a near cache

thread_local Scratch inputs_scratch;

// R rows times VECTORS * LANES columns; the sums stay in registers.
template <int R, int VECTORS, typename W>
inline void tile(const Part<W>& p) {
    Vector sum[R][VECTORS];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = p.first ? Vector{} : load(p.y + r * p.y_stride + v * LANES);
    for (int64_t k = 0; k < p.width; ++k) {
        const W* weight = p.weight + k * p.weight_stride;
        float factor[R];
        for (int r = 0; r < R; ++r) factor[r] = p.x[r * p.x_stride + k];
        for (int v = 0; v < VECTORS; ++v) {
            const Vector outputs = load(weight + v * LANES);
            for (int r = 0; r < R; ++r) sum[r][v] += factor[r] * outputs;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) store(p.y + r * p.y_stride + v * LANES, sum[r][v]);
}

// R rows, or all where there are fewer.
template <int R, int VECTORS, typename W>
inline void tile_of(const Part<W>& p, int64_t num_rows) {
    if constexpr (R > 1)
        if (num_rows < R) return tile_of<R - 1, VECTORS>(p, num_rows);
    tile<R, VECTORS>(p);
}

template <typename W>
inline Part<W> moved(Part<W> p, int64_t row, int64_t column) {
    p.x += row * p.x_stride;
    p.weight += column;
    p.y += row * p.y_stride + column;
    return p;
}

// Columns that fill no vector, one by one.
template <typename W>
inline void columns_one_by_one(const Part<W>& p, int64_t num_rows, int64_t column, int64_t end) {
    for (; column < end; ++column)
        for (int64_t r = 0; r < num_rows; ++r) {
            float* y = p.y + r * p.y_stride + column;
            float sum = p.first ? 0.0f : *y;
            for (int64_t k = 0; k < p.width; ++k)
                sum = __builtin_fmaf(p.x[r * p.x_stride + k], to_float(p.weight[k * p.weight_stride + column]), sum);
            *y = sum;
        }
}

// VECTORS * LANES columns at a time as far as they go; returns the first column that is left.
template <int VECTORS, typename W>
inline int64_t tiles(const Part<W>& p, int64_t num_rows, int64_t column, int64_t end) {
    for (; column + VECTORS * LANES <= end; column += VECTORS * LANES)
        for (int64_t row = 0; row < num_rows; row += ROWS_PER_TILE)
            tile_of<ROWS_PER_TILE, VECTORS>(moved(p, row, column), num_rows - row);
    return column;
}

}  // namespace

template <typename W>
void multiply_columns(const Part<W>& p, int64_t num_rows, int64_t end) {
    int64_t column = tiles<VECTORS_PER_STRIP>(p, num_rows, 0, end);
    column = tiles<1>(p, num_rows, column, end);
    columns_one_by_one(p, num_rows, column, end);
}

namespace {

// A few rows times some columns of a weight as stored. Its rows are read in turns, each some kilobytes long, because
// that is what memory gives fastest; the sums stay in the nearest cache. R = rows.
template <int R, typename W>
inline void stream(const Part<W>& p, int64_t num_columns) {
    const int64_t vectors_end = num_columns / ACROSS * ACROSS;
    int64_t k = 0;
    for (; k + AT_ONCE <= p.width; k += AT_ONCE) {
        const W* weight = p.weight + k * p.weight_stride;
        for (int64_t c = 0; c < vectors_end; c += ACROSS) {
            Vector row[AT_ONCE][ABREAST];
            for (int i = 0; i < AT_ONCE; ++i) {
                __builtin_prefetch(weight + (AT_ONCE + i) * p.weight_stride + c);
                for (int v = 0; v < ABREAST; ++v) row[i][v] = load(weight + i * p.weight_stride + c + v * LANES);
            }
            for (int r = 0; r < R; ++r) {
                float* y = p.y + r * p.y_stride + c;
                Vector sum[ABREAST];
                for (int v = 0; v < ABREAST; ++v) sum[v] = k ? load(y + v * LANES) : Vector{};
                for (int i = 0; i < AT_ONCE; ++i) {
                    const float factor = p.x[r * p.x_stride + k + i];
                    for (int v = 0; v < ABREAST; ++v) sum[v] += factor * row[i][v];
                }
                for (int v = 0; v < ABREAST; ++v) store(y + v * LANES, sum[v]);
            }
        }
    }
    Part<W> rest = p;
    rest.x += k;
    rest.weight += k * p.weight_stride;
    rest.width -= k;
    rest.first = k == 0;
    if (rest.width) tiles<1>(rest, R, 0, vectors_end);
    multiply_columns(moved(p, 0, vectors_end), R, num_columns - vectors_end);
}

template <int R, typename W>
inline void stream_rows(const Part<W>& p, int64_t num_rows, int64_t num_columns) {
    if constexpr (R > 1)
        if (num_rows < R) return stream_rows<R - 1>(p, num_rows, num_columns);
    stream<R>(p, num_columns);
}

// The same for up to STREAMED_ROWS rows. What belongs together lies together: the sums of a vector of columns, and the
// inputs of a step. Where rows are a power of two apart, they would push each other out of the nearest cache.
template <typename W>
inline void stream_many(const Part<W>& p, int64_t num_rows, int64_t num_columns) {
    constexpr int TOGETHER = 4 / ABREAST;  // rows whose chains of products run side by side
    alignas(64) static thread_local float sums[STREAMED_ROWS * STREAMED_COLUMNS];
    const int64_t vectors_end = num_columns / ACROSS * ACROSS, end = p.width / AT_ONCE * AT_ONCE;
    float* inputs = inputs_scratch.take(num_rows * end);  // [width / AT_ONCE, rows, AT_ONCE]
    for (int64_t r = 0; r < num_rows; ++r)
        for (int64_t k = 0; k < end; k += AT_ONCE)
            std::memcpy(inputs + k * num_rows + r * AT_ONCE, p.x + r * p.x_stride + k, AT_ONCE * sizeof(float));
    for (int64_t first = 0; first < vectors_end; first += STREAMED_COLUMNS) {
        const int64_t columns = std::min<int64_t>(STREAMED_COLUMNS, vectors_end - first);
        std::memset(sums, 0, num_rows * columns * sizeof(float));
        for (int64_t k = 0; k < end; k += AT_ONCE) {
            const W* weight = p.weight + k * p.weight_stride + first;
            for (int64_t c = 0; c < columns; c += ACROSS) {
                Vector row[AT_ONCE][ABREAST];
                for (int i = 0; i < AT_ONCE; ++i) {
                    __builtin_prefetch(weight + (AT_ONCE + i) * p.weight_stride + c, 0, 2);
                    for (int v = 0; v < ABREAST; ++v) row[i][v] = load(weight + i * p.weight_stride + c + v * LANES);
                }
                const auto add = [&]<int R>(const float* x, float* y) {
                    Vector sum[R][ABREAST];
                    for (int r = 0; r < R; ++r)
                        for (int v = 0; v < ABREAST; ++v) sum[r][v] = load(y + r * ACROSS + v * LANES);
                    for (int i = 0; i < AT_ONCE; ++i)
                        for (int r = 0; r < R; ++r)
                            for (int v = 0; v < ABREAST; ++v) sum[r][v] += x[r * AT_ONCE + i] * row[i][v];
                    for (int r = 0; r < R; ++r)
                        for (int v = 0; v < ABREAST; ++v) store(y + r * ACROSS + v * LANES, sum[r][v]);
                };
                const float* x = inputs + k * num_rows;
                float* y = sums + c * num_rows;  // [columns / ACROSS, rows, ACROSS]
                int64_t r = 0;
                for (; r + TOGETHER <= num_rows; r += TOGETHER)
                    add.template operator()<TOGETHER>(x + r * AT_ONCE, y + r * ACROSS);
                for (; r < num_rows; ++r) add.template operator()<1>(x + r * AT_ONCE, y + r * ACROSS);
            }
        }
        for (int64_t c = 0; c < columns; c += ACROSS)
            for (int64_t r = 0; r < num_rows; ++r)
                std::memcpy(p.y + r * p.y_stride + first + c, sums + c * num_rows + r * ACROSS, ACROSS * sizeof(float));
    }
    Part<W> rest = p;
    rest.x += end;
    rest.weight += end * p.weight_stride;
    rest.width -= end;
    rest.first = end == 0;
    if (rest.width) tiles<1>(rest, num_rows, 0, vectors_end);
    multiply_columns(moved(p, 0, vectors_end), num_rows, num_columns - vectors_end);
}

// Any number of rows, as often as they need the weight read again.
template <typename W>
inline void stream_all(const Part<W>& p, int64_t num_rows, int64_t num_columns) {
    const int64_t times = (num_rows + STREAMED_ROWS - 1) / STREAMED_ROWS, rows = (num_rows + times - 1) / times;
    for (int64_t row = 0; row < num_rows; row += rows)
        stream_many(moved(p, row, 0), std::min(rows, num_rows - row), num_columns);
}

// Finish outputs of a weight with scales: one product each, after the chain, so that no cut of the chain rounds differently.
inline void scale_columns(const float* scales, int64_t num_rows, int64_t num_columns, float* y, int64_t y_stride) {
    for (int64_t r = 0; r < num_rows; ++r)
        for (int64_t c = 0; c < num_columns; ++c) y[r * y_stride + c] *= scales[c];
}

}  // namespace

template <typename W>
void multiply(const Matrix<W>& m, int64_t begin, int64_t num_columns, const float* x, int64_t x_stride,
                     int64_t num_rows, float* y, int64_t y_stride) {
    if constexpr (!has_scales<W>) {
        if (!m.is_packed()) {
            const Part<W> part{x, x_stride, m.data + begin, m.row_stride, m.width, y + begin, y_stride, true};
            if (num_rows <= FEW_ROWS) stream_rows<FEW_ROWS>(part, num_rows, num_columns);
            else stream_all(part, num_rows, num_columns);
            return;
        }
    }
    for (int64_t c = begin; c < begin + num_columns; c += STRIP) {
        const int64_t columns = std::min<int64_t>(STRIP, begin + num_columns - c);
        Part<W> part{x, x_stride, m.data + c * m.width, STRIP, m.width, y + c, y_stride, true};
        if (num_rows <= ROWS_PER_TILE) {
            multiply_columns(part, num_rows, columns);
        } else if (std::is_same_v<W, float> && num_rows > TILED_FROM) {
            for (int64_t k = 0; k < m.width; k += BLOCK) {
                part = {x + k, x_stride, m.data + c * m.width + k * STRIP, STRIP, std::min(BLOCK, m.width - k), y + c,
                        y_stride, k == 0};
                multiply_columns(part, num_rows, columns);
            }
        } else {
            stream_all(part, num_rows, columns);
        }
        if constexpr (has_scales<W>) scale_columns(m.scales() + c, num_rows, columns, y + c, y_stride);
    }
}

template void multiply_columns(const Part<float>&, int64_t, int64_t);
template void multiply_columns(const Part<Bfloat16>&, int64_t, int64_t);
template void multiply_columns(const Part<Int8>&, int64_t, int64_t);
template void multiply_columns(const Part<Float8>&, int64_t, int64_t);
template void multiply(const Matrix<float>&, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);
template void multiply(const Matrix<Bfloat16>&, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);
template void multiply(const Matrix<Int8>&, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);
template void multiply(const Matrix<Float8>&, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);

}  // namespace l4d
