// The end of a mixture-of-experts layer: what its experts say is added to the residual stream.

#include "team.h"
#include "vectors.h"

namespace l4d {
namespace {

constexpr int64_t PART = 16384;  // values that a thread takes at a time

template <typename T>
void add_outputs(float* x, const float* shared, const T* routed, int64_t num_values, int num_threads) {
    const int64_t num_parts = (num_values + PART - 1) / PART;
    together(num_parts > 1 ? num_threads : 1, [&](Member& member) {
        member.each(num_parts, [&](int64_t part) {
            const int64_t end = std::min(num_values, (part + 1) * PART);
            for (int64_t i = part * PART; i < end; ++i) x[i] += shared[i] + to_float(routed[i]);
        });
    });
}

}  // namespace
}  // namespace l4d

// x += shared + routed
extern "C" void l4d_add_outputs_float32(float* x, const float* shared, const float* routed, int64_t num_values,
                                        int num_threads) {
    l4d::add_outputs(x, shared, routed, num_values, num_threads);
}

extern "C" void l4d_add_outputs_bfloat16(float* x, const float* shared, const l4d::Bfloat16* routed,
                                         int64_t num_values, int num_threads) {
    l4d::add_outputs(x, shared, routed, num_values, num_threads);
}
