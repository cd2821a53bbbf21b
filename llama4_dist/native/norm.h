// Root-mean-square normalisation of a row.
#pragma once

#include <cmath>

#include "vectors.h"

namespace l4d {

// out = x / sqrt(mean(x²) + eps) · weight; no weight is a weight of ones.
inline void rms_norm(const float* x, const float* weight, int64_t width, float eps, float* out) {
    Vector sums[VECTORS_OF_SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS <= width; i += SUMS)
        for (int v = 0; v < VECTORS_OF_SUMS; ++v) sums[v] += load(x + i + v * LANES) * load(x + i + v * LANES);
    float sum = sum_of(sums);
    for (int64_t j = i; j < width; ++j) sum = __builtin_fmaf(x[j], x[j], sum);
    const float scale = 1.0f / std::sqrt(sum / width + eps);
    for (int64_t j = 0; j < width; ++j) out[j] = weight ? x[j] * scale * weight[j] : x[j] * scale;
}

}  // namespace l4d
