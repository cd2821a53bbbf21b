// Brings rows in another order in one pass: scaled on their way out, checked for NaN and infinity on their way in.
//
// Every row number is the caller's own; nothing here was read from a peer.

#include "vectors.h"

using namespace l4d;

namespace {

inline uint32_t exponent_is_full(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7f800000) == 0x7f800000;
}

inline uint32_t exponent_is_full(Bfloat16 value) { return (value.bits & 0x7f80) == 0x7f80; }

template <typename T>
void scale_in_order(const T* x, int64_t x_stride, const T* scores, int64_t num_slots, const int64_t* order,
                    int64_t num_rows, int64_t width, T* out) {
    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t copy = order[row];
        const T* from = x + copy / num_slots * x_stride;
        const float score = to_float(scores[copy]);
        T* to = out + row * width;
        for (int64_t column = 0; column < width; ++column) from_float(to_float(from[column]) * score, to[column]);
    }
}

template <typename T>
int put_if_finite(const T* rows, const int64_t* targets, int64_t num_rows, int64_t width, T* out) {
    uint32_t is_broken = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
        const T* from = rows + row * width;
        T* to = out + targets[row] * width;
        for (int64_t column = 0; column < width; ++column) {
            is_broken |= exponent_is_full(from[column]);
            to[column] = from[column];
        }
    }
    return !is_broken;
}

}  // namespace

// out[i] = x[order[i] / num_slots] * scores[order[i]] for i < num_rows; strides and widths count elements.
extern "C" void l4d_scale_in_order_float32(const float* x, int64_t x_stride, const float* scores, int64_t num_slots,
                                           const int64_t* order, int64_t num_rows, int64_t width, float* out) {
    scale_in_order(x, x_stride, scores, num_slots, order, num_rows, width, out);
}

extern "C" void l4d_scale_in_order_bfloat16(const Bfloat16* x, int64_t x_stride, const Bfloat16* scores,
                                            int64_t num_slots, const int64_t* order, int64_t num_rows, int64_t width,
                                            Bfloat16* out) {
    scale_in_order(x, x_stride, scores, num_slots, order, num_rows, width, out);
}

// out[targets[i]] = rows[i] for i < num_rows; returns whether every value is finite.
extern "C" int l4d_put_if_finite_float32(const float* rows, const int64_t* targets, int64_t num_rows, int64_t width,
                                         float* out) {
    return put_if_finite(rows, targets, num_rows, width, out);
}

extern "C" int l4d_put_if_finite_bfloat16(const Bfloat16* rows, const int64_t* targets, int64_t num_rows, int64_t width,
                                          Bfloat16* out) {
    return put_if_finite(rows, targets, num_rows, width, out);
}
