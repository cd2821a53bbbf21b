// Makes an int8 weight of one in float or bfloat16, and says how far it is from that.
//
// An output's scale is its largest weight over 127, and its weights round to the nearest multiple, ties to the even one.
// Divisions and roundings are those of IEEE 754: every processor makes the same bytes.

#include <cmath>

#include "team.h"
#include "work.h"

namespace l4d {
namespace {

constexpr float LARGEST = 127.0f;

// Up to STRIP outputs. `errors` are relative: the root of the summed squares of what was lost over that of what was there.
template <typename W>
void quantise_strip(const W* from, int64_t row_stride, int64_t width, int64_t num_columns, Int8* __restrict values,
                    float* scales, float* errors) {
    float largest[STRIP] = {}, scale[STRIP] = {}, lost[STRIP] = {}, there[STRIP] = {};
    for (int64_t k = 0; k < width; ++k)
        for (int64_t c = 0; c < num_columns; ++c) {
            const float size = std::fabs(to_float(from[k * row_stride + c]));
            largest[c] = size > largest[c] || size != size ? size : largest[c];  // a NaN stays, and is seen in the logits
        }
    for (int64_t c = 0; c < num_columns; ++c) scale[c] = largest[c] / LARGEST;
    for (int64_t k = 0; k < width; ++k)
        for (int64_t c = 0; c < num_columns; ++c) {
            const float weight = to_float(from[k * row_stride + c]);
            float rounded = scale[c] > 0.0f ? __builtin_rintf(weight / scale[c]) : 0.0f;
            rounded = rounded > -LARGEST ? rounded : -LARGEST;  // the scale of the smallest numbers is itself rounded
            rounded = rounded < LARGEST ? rounded : LARGEST;
            values[k * STRIP + c].value = int8_t(rounded);
            const float missing = weight - rounded * scale[c];
            lost[c] += missing * missing;
            there[c] += weight * weight;
        }
    for (int64_t c = 0; c < num_columns; ++c) {
        scales[c] = scale[c];
        errors[c] = there[c] > 0.0f ? std::sqrt(lost[c] / there[c]) : 0.0f;
    }
}

template <typename W>
void quantise(const W* weight, int64_t row_stride, int64_t width, int64_t num_columns, void* packed, float* errors,
              int num_threads) {
    Int8* values = static_cast<Int8*>(packed);
    float* scales = const_cast<float*>(l4d::packed<Int8>(packed, width, num_columns).scales());
    together(num_threads, [&](Member& member) {
        member.each(num_strips(num_columns), [&](int64_t strip) {
            const int64_t c = strip * STRIP;
            quantise_strip(weight + c, row_stride, width, std::min<int64_t>(STRIP, num_columns - c), values + c * width,
                           scales + c, errors + c);
        });
    });
}

}  // namespace
}  // namespace l4d

// `weight` [inputs, columns] is input-major, its columns are contiguous; `packed` is zeroed memory for the strips and the
// scales behind them; `errors` [columns].
extern "C" void l4d_quantise_float32(const float* weight, int64_t row_stride, int64_t width, int64_t num_columns,
                                     void* packed, float* errors, int num_threads) {
    l4d::quantise(weight, row_stride, width, num_columns, packed, errors, num_threads);
}

extern "C" void l4d_quantise_bfloat16(const l4d::Bfloat16* weight, int64_t row_stride, int64_t width,
                                      int64_t num_columns, void* packed, float* errors, int num_threads) {
    l4d::quantise(weight, row_stride, width, num_columns, packed, errors, num_threads);
}
