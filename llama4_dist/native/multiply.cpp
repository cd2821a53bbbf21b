// The products that multiply.h declares.

#include "multiply.h"

#include <type_traits>

namespace l4d {
namespace {

// R rows times VECTORS * LANES columns; the sums stay in registers.
template <int R, int VECTORS, typename W>
inline void tile(const Part<W>& p) {
    Vector sum[R][VECTORS];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = p.first ? Vector{} : load(p.y + r * p.y_stride + v * LANES);
    const char* ahead = static_cast<const char*>(p.ahead ? p.ahead : p.weight);  // asking for no address takes long
    for (int64_t k = 0; k < p.width; ++k) {
        const W* weight = p.weight + k * p.weight_stride;
        Vector strip[VECTORS];
        for (int v = 0; v < VECTORS; ++v) strip[v] = load(weight + v * LANES);
        __builtin_prefetch(ahead + k * p.ahead_stride, 0, 2);  // an address too far is no fault
        for (int r = 0; r < R; ++r) {
            const float factor = p.x[r * p.x_stride + k];
            for (int v = 0; v < VECTORS; ++v) sum[r][v] += factor * strip[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) store(p.y + r * p.y_stride + v * LANES, sum[r][v]);
}

template <int VECTORS, typename W>
inline void tile_of(const Part<W>& p, int64_t num_rows) {
    switch (num_rows) {
        case 1: return tile<1, VECTORS>(p);
        case 2: return tile<2, VECTORS>(p);
        case 3: return tile<3, VECTORS>(p);
        case 4: return tile<4, VECTORS>(p);
        case 5: return tile<5, VECTORS>(p);
        default: return tile<ROWS_PER_TILE, VECTORS>(p);
    }
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
            tile_of<VECTORS>(moved(p, row, column), num_rows - row);
    return column;
}

}  // namespace

template <typename W>
void multiply_columns(const Part<W>& p, int64_t num_rows, int64_t end) {
    int64_t column = tiles<VECTORS_PER_STRIP>(p, num_rows, 0, end);
    if (VECTORS_PER_STRIP > 1) column = tiles<1>(p, num_rows, column, end);
    columns_one_by_one(p, num_rows, column, end);
}

namespace {

// A few rows times some columns of a weight as stored. Its rows are read in turns, each some kilobytes long, because
// that is what memory gives fastest; the sums stay in the nearest cache. R = rows.
template <int R, typename W>
inline void stream(const Part<W>& p, int64_t num_columns) {
    constexpr int AT_ONCE = 8;
    const int64_t vectors_end = num_columns / LANES * LANES;
    int64_t k = 0;
    for (; k + AT_ONCE <= p.width; k += AT_ONCE) {
        const W* weight = p.weight + k * p.weight_stride;
        for (int64_t c = 0; c < vectors_end; c += LANES) {
            Vector row[AT_ONCE];
            for (int i = 0; i < AT_ONCE; ++i) {
                __builtin_prefetch(weight + (AT_ONCE + i) * p.weight_stride + c);
                row[i] = load(weight + i * p.weight_stride + c);
            }
            for (int r = 0; r < R; ++r) {
                float* y = p.y + r * p.y_stride + c;
                Vector sum = k ? load(y) : Vector{};
                for (int i = 0; i < AT_ONCE; ++i) sum += p.x[r * p.x_stride + k + i] * row[i];
                store(y, sum);
            }
        }
    }
    Part<W> rest = p;
    rest.x += k;
    rest.weight += k * p.weight_stride;
    rest.width -= k;
    rest.first = k == 0;
    if (rest.width) tiles<1>(rest, R, 0, vectors_end);
    columns_one_by_one(p, R, vectors_end, num_columns);
}

template <typename W>
inline void stream_rows(const Part<W>& p, int64_t num_rows, int64_t num_columns) {
    switch (num_rows) {
        case 1: return stream<1>(p, num_columns);
        case 2: return stream<2>(p, num_columns);
        case 3: return stream<3>(p, num_columns);
        case 4: return stream<4>(p, num_columns);
        case 5: return stream<5>(p, num_columns);
        default: return stream<ROWS_PER_TILE>(p, num_columns);
    }
}

template <typename W>
inline void copy_columns(const W* from, int64_t num_columns, float* to) {
    int64_t c = 0;
    for (; c + LANES <= num_columns; c += LANES) store(to + c, load(from + c));
    for (; c < num_columns; ++c) to[c] = to_float(from[c]);
}

// Many rows times some columns of a weight as stored, or of one that is not in float: block by block from a copy in
// strips. While a block is multiplied, the next one is fetched.
template <typename W>
inline void multiply_from_copies(const Part<W>& p, int64_t num_rows, int64_t num_columns) {
    alignas(64) static thread_local float copy[BLOCK * MAX_COLUMNS];
    for (int64_t begin = 0; begin < p.width; begin += BLOCK) {
        const int64_t width = std::min(BLOCK, p.width - begin);
        const W* block = p.weight + begin * p.weight_stride;
        for (int64_t k = 0; k < width; ++k)
            for (int64_t c = 0; c < num_columns; c += STRIP) {
                copy_columns(block + k * p.weight_stride + c, std::min<int64_t>(STRIP, num_columns - c),
                             copy + c * BLOCK + k * STRIP);
            }
        const W* next = block + width * p.weight_stride;
        for (int64_t c = 0; c < num_columns; c += STRIP) {
            const int64_t columns = std::min<int64_t>(STRIP, num_columns - c);
            for (int64_t row = 0, line = 0; row < num_rows; row += ROWS_PER_TILE, ++line) {
                const bool fetches = line * int64_t(64 / sizeof(W)) < columns && begin + width < p.width;
                const Part<float> part{p.x + row * p.x_stride + begin, p.x_stride, copy + c * BLOCK, STRIP, width,
                                       p.y + row * p.y_stride + c, p.y_stride, begin == 0,
                                       fetches ? next + c + line * int64_t(64 / sizeof(W)) : nullptr,
                                       fetches ? p.weight_stride * int64_t(sizeof(W)) : 0};
                multiply_columns(part, std::min<int64_t>(ROWS_PER_TILE, num_rows - row), columns);
            }
        }
    }
}

// Finish outputs of an int8 weight: one product each, after the chain, so that no cut of the chain rounds differently.
inline void scale_columns(const float* scales, int64_t num_rows, int64_t num_columns, float* y, int64_t y_stride) {
    for (int64_t r = 0; r < num_rows; ++r)
        for (int64_t c = 0; c < num_columns; ++c) y[r * y_stride + c] *= scales[c];
}

}  // namespace

template <typename W>
void multiply(const Matrix<W>& m, int64_t begin, int64_t num_columns, const float* x, int64_t x_stride,
                     int64_t num_rows, float* y, int64_t y_stride) {
    constexpr bool has_scales = std::is_same_v<W, Int8>;
    if constexpr (!has_scales) {
        if (!m.is_packed()) {
            const Part<W> part{x, x_stride, m.data + begin, m.row_stride, m.width, y + begin, y_stride, true};
            if (num_rows <= ROWS_PER_TILE) stream_rows(part, num_rows, num_columns);
            else multiply_from_copies(part, num_rows, num_columns);
            return;
        }
    }
    for (int64_t c = begin; c < begin + num_columns; c += STRIP) {
        const int64_t columns = std::min<int64_t>(STRIP, begin + num_columns - c);
        Part<W> part{x, x_stride, m.data + c * m.width, STRIP, m.width, y + c, y_stride, true};
        if (num_rows <= ROWS_PER_TILE) {
            multiply_columns(part, num_rows, columns);
        } else if constexpr (std::is_same_v<W, float>) {
            for (int64_t k = 0; k < m.width; k += BLOCK) {
                part = {x + k, x_stride, m.data + c * m.width + k * STRIP, STRIP, std::min(BLOCK, m.width - k), y + c,
                        y_stride, k == 0};
                multiply_columns(part, num_rows, columns);
            }
        } else {
            multiply_from_copies(part, num_rows, columns);
        }
        if constexpr (has_scales) scale_columns(m.scales() + c, num_rows, columns, y + c, y_stride);
    }
}

template void multiply_columns(const Part<float>&, int64_t, int64_t);
template void multiply_columns(const Part<Bfloat16>&, int64_t, int64_t);
template void multiply_columns(const Part<Int8>&, int64_t, int64_t);
template void multiply(const Matrix<float>&, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);
template void multiply(const Matrix<Bfloat16>&, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);
template void multiply(const Matrix<Int8>&, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);

}  // namespace l4d
