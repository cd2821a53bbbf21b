// How a product is shared out among threads, and memory that is kept between calls.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "multiply.h"

namespace l4d {

// Memory of one purpose, of the calling thread; it grows and is never cleared.
class Scratch {
public:
    float* take(int64_t num_floats) {
        if (num_floats > size_) {
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, (num_floats * sizeof(float) + 63) / 64 * 64)));
            if (!memory_) throw std::bad_alloc();
            size_ = num_floats;
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    int64_t size_ = 0;
};

// Rows of one group times some columns of its weight.
struct Piece {
    int64_t group, first_row, num_rows, first_column, num_columns;
};

// Cut products of several groups of rows into pieces, some for each thread. Packed weights are cut as finely as can be;
// of others a thread reads long parts of rows. Many rows are cut too where columns alone would leave threads idle.
inline void cut(std::vector<Piece>& pieces, int64_t num_groups, const int64_t* first_rows, const int64_t* nums_rows,
                int64_t num_columns, bool is_packed, int num_threads) {
    pieces.clear();
    const int64_t all_strips = num_strips(num_columns);
    const int64_t strips = is_packed ? 1 : std::max<int64_t>(1, (all_strips + num_threads - 1) / num_threads);
    const int64_t columns = std::min(MAX_COLUMNS, strips * STRIP);
    const int64_t parts = (4 * num_threads + all_strips - 1) / all_strips;
    for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t rows = std::max<int64_t>(16 * ROWS_PER_TILE, (nums_rows[g] + parts - 1) / parts);
        for (int64_t row = 0; row < nums_rows[g]; row += rows)
            for (int64_t column = 0; column < num_columns; column += columns)
                pieces.push_back({g, first_rows[g] + row, std::min(rows, nums_rows[g] - row), column,
                                  std::min(columns, num_columns - column)});
    }
}

// y[rows and columns of the piece] = x @ weight.
template <typename W>
inline void multiply_piece(const Matrix<W>& m, const Piece& p, const float* x, int64_t x_stride, float* y) {
    multiply(m, p.first_column, p.num_columns, x + p.first_row * x_stride, x_stride, p.num_rows,
             y + p.first_row * m.num_columns, m.num_columns);
}

}  // namespace l4d
