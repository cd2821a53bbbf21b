// Multiplies rows by each of several input-major weights, at the speed of reading the weights.
//
// A row's products are added in one fixed order, whatever rows go with it and however many threads share the columns:
// `summed_together` products one by one, fused, then the sums. model/few_rows.py tells for which number that order is
// the library's.

#include <cstdint>
#include <omp.h>

namespace {

constexpr int LANES = 16;
// Rows of a weight that are asked for early. A tile reads a strip of each row, a stride that no prefetcher guesses.
constexpr int64_t ROWS_AHEAD = 24;
constexpr int64_t MAX_SUMMED_TOGETHER = 1024;
// More rows than one tile has read a strip again and again, and rows of a weight often lie a power of two apart, where
// a cache keeps few of them. So the first tile leaves a copy of the strip for the others.
constexpr int ROWS_PER_TILE = 6;
constexpr int VECTORS_PER_TILE = 4;
constexpr int STRIP = VECTORS_PER_TILE * LANES;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(alignof(float)), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

// A part of a product: x rows, `width` products to add up, and where the sums go.
struct Part {
    const float* x;
    int64_t x_stride;
    const float* weight;
    int64_t weight_stride;
    int64_t width;
    float* y;
    int64_t y_stride;
    bool first;  // the sums replace what is in y, instead of being added to it
};

// R rows times VECTORS * LANES columns; the sums stay in registers. Leaves the strip it read in `copy` if there is one.
template <int R, int VECTORS, bool COPIES>
inline void tile(const Part& p, float* copy) {
    Vector sum[R][VECTORS] = {};
    for (int64_t k = 0; k < p.width; ++k) {
        const float* weight = p.weight + k * p.weight_stride;
        Vector strip[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            __builtin_prefetch(weight + ROWS_AHEAD * p.weight_stride + v * LANES);
            strip[v] = load(weight + v * LANES);
            if (COPIES) store(copy + (k * VECTORS + v) * LANES, strip[v]);
        }
        for (int r = 0; r < R; ++r) {
            const float factor = p.x[r * p.x_stride + k];
            for (int v = 0; v < VECTORS; ++v) sum[r][v] += factor * strip[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) {
            float* y = p.y + r * p.y_stride + v * LANES;
            store(y, p.first ? sum[r][v] : load(y) + sum[r][v]);
        }
}

// One column, for the few that fill no vector.
inline void single(const Part& p, int64_t num_rows) {
    for (int64_t r = 0; r < num_rows; ++r) {
        float sum = 0;
        for (int64_t k = 0; k < p.width; ++k)
            sum = __builtin_fmaf(p.x[r * p.x_stride + k], p.weight[k * p.weight_stride], sum);
        float* y = p.y + r * p.y_stride;
        *y = p.first ? sum : *y + sum;
    }
}

template <int VECTORS>
inline void tile_of(const Part& p, int64_t num_rows) {
    switch (num_rows) {
        case 1: return tile<1, VECTORS, false>(p, nullptr);
        case 2: return tile<2, VECTORS, false>(p, nullptr);
        case 3: return tile<3, VECTORS, false>(p, nullptr);
        case 4: return tile<4, VECTORS, false>(p, nullptr);
        case 5: return tile<5, VECTORS, false>(p, nullptr);
        default: return tile<6, VECTORS, false>(p, nullptr);
    }
}

inline Part moved(Part p, int64_t row, int64_t column) {
    p.x += row * p.x_stride;
    p.weight += column;
    p.y += row * p.y_stride + column;
    return p;
}

// Strips of VECTORS * LANES columns as far as they go; returns the first column that is left.
template <int VECTORS>
int64_t strips(const Part& p, int64_t num_rows, int64_t column, int64_t end) {
    for (; column + VECTORS * LANES <= end; column += VECTORS * LANES) tile_of<VECTORS>(moved(p, 0, column), num_rows);
    return column;
}

int64_t copied_strips(const Part& p, int64_t num_rows, int64_t column, int64_t end, float* copy) {
    for (; column + STRIP <= end; column += STRIP) {
        tile<ROWS_PER_TILE, VECTORS_PER_TILE, true>(moved(p, 0, column), copy);
        for (int64_t row = ROWS_PER_TILE; row < num_rows; row += ROWS_PER_TILE) {
            Part rest = moved(p, row, column);
            rest.weight = copy;
            rest.weight_stride = STRIP;
            tile_of<VECTORS_PER_TILE>(rest, num_rows - row);
        }
    }
    return column;
}

// The fewer rows, the wider the strip: 16 to 24 sums hide the latency of an addition and fit the registers.
void multiply(const Part& p, int64_t num_rows, int64_t column, int64_t end, float* copy) {
    if (num_rows == 1) column = strips<16>(p, num_rows, column, end);
    else if (num_rows <= 3) column = strips<8>(p, num_rows, column, end);
    else if (num_rows == 4) column = strips<6>(p, num_rows, column, end);
    else if (num_rows <= ROWS_PER_TILE) column = strips<VECTORS_PER_TILE>(p, num_rows, column, end);
    else column = copied_strips(p, num_rows, column, end, copy);
    for (int64_t row = 0; row < num_rows; row += ROWS_PER_TILE) {
        const int64_t rows = num_rows - row < ROWS_PER_TILE ? num_rows - row : ROWS_PER_TILE;
        int64_t rest = strips<1>(moved(p, row, 0), rows, column, end);
        for (; rest < end; ++rest) single(moved(p, row, rest), rows);
    }
}

}  // namespace

// y[first_rows[g] + i] = x[first_rows[g] + i] @ weights[g] for i < nums_rows[g]; weights are [width, num_columns].
// Strides count elements. Threads share the columns, so their number does not change a bit.
extern "C" void l4d_multiply_few_rows(
    const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t width, int64_t num_columns,
    int64_t num_groups, const int64_t* first_rows, const int64_t* nums_rows, const float* const* weights,
    int64_t weight_stride, int64_t summed_together, int num_threads) {
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        alignas(64) float copy[MAX_SUMMED_TOGETHER * STRIP];
        const int64_t num_vectors = (num_columns + LANES - 1) / LANES;
        const int64_t per_thread = (num_vectors + omp_get_num_threads() - 1) / omp_get_num_threads() * LANES;
        const int64_t column = omp_get_thread_num() * per_thread;
        const int64_t end = column + per_thread < num_columns ? column + per_thread : num_columns;
        for (int64_t g = 0; g < num_groups && column < end; ++g) {
            for (int64_t begin = 0; begin < width; begin += summed_together) {
                const int64_t rest = width - begin;
                multiply({x + first_rows[g] * x_stride + begin, x_stride, weights[g] + begin * weight_stride,
                          weight_stride, rest < summed_together ? rest : summed_together,
                          y + first_rows[g] * y_stride, y_stride, begin == 0},
                         nums_rows[g], column, end, copy);
            }
        }
    }
}
