// One product of rows with a packed weight, and the layout of a packed weight.

#include "team.h"
#include "work.h"

namespace l4d {
namespace {

thread_local std::vector<Piece> pieces;

template <typename W>
void linear(const float* x, int64_t x_stride, int64_t num_rows, const void* weight, int64_t width, int64_t num_columns,
            float* y, int num_threads) {
    const Matrix<W> m = packed<W>(weight, width, num_columns);
    const int64_t first_row = 0;
    auto& all_pieces = pieces;
    cut(all_pieces, 1, &first_row, &num_rows, num_columns, true, num_threads);
    together(num_threads, [&](Member& member) {
        member.each(all_pieces.size(), [&](int64_t i) { multiply_piece(m, all_pieces[i], x, x_stride, y); });
    });
}

}  // namespace
}  // namespace l4d

// Columns of a strip: a packed weight is [ceil(columns / strip), width, strip].
extern "C" int64_t l4d_strip() { return l4d::STRIP; }

extern "C" void l4d_linear_float32(const float* x, int64_t x_stride, int64_t num_rows, const void* weight,
                                   int64_t width, int64_t num_columns, float* y, int num_threads) {
    l4d::linear<float>(x, x_stride, num_rows, weight, width, num_columns, y, num_threads);
}

extern "C" void l4d_linear_bfloat16(const float* x, int64_t x_stride, int64_t num_rows, const void* weight,
                                    int64_t width, int64_t num_columns, float* y, int num_threads) {
    l4d::linear<l4d::Bfloat16>(x, x_stride, num_rows, weight, width, num_columns, y, num_threads);
}

extern "C" void l4d_linear_int8(const float* x, int64_t x_stride, int64_t num_rows, const void* weight, int64_t width,
                                int64_t num_columns, float* y, int num_threads) {
    l4d::linear<l4d::Int8>(x, x_stride, num_rows, weight, width, num_columns, y, num_threads);
}

extern "C" void l4d_linear_float8(const float* x, int64_t x_stride, int64_t num_rows, const void* weight, int64_t width,
                                  int64_t num_columns, float* y, int num_threads) {
    l4d::linear<l4d::Float8>(x, x_stride, num_rows, weight, width, num_columns, y, num_threads);
}
