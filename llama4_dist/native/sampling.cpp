// Reads logits once: the likeliest token of each row, and whether all of the row are finite numbers.

#include "team.h"
#include "vectors.h"

namespace l4d {
namespace {

constexpr int64_t BLOCK = 1024;  // the largest is found block by block, its place in the best block afterwards

inline bool is_broken(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7f800000) == 0x7f800000;
}

// The largest of up to BLOCK values, NaN aside; sets `broken` if one is not finite.
inline float largest(const float* values, int64_t count, bool& broken) {
    Vector top = all(-__builtin_inff());
    Integers flags = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Vector v = load(values + i);
        flags |= ((Integers)v & 0x7f800000) == 0x7f800000;
        top = larger(v, top);
    }
    for (int lane = 0; lane < LANES; ++lane) broken |= flags[lane] != 0;
    float result = largest_of(top);
    for (; i < count; ++i) {
        broken |= is_broken(values[i]);
        if (values[i] > result) result = values[i];
    }
    return result;
}

}  // namespace
}  // namespace l4d

// best[r] = the first place of the largest of row r; finite[r] = whether all values of the row are finite.
extern "C" void l4d_scan_logits(const float* logits, int64_t stride, int64_t num_rows, int64_t num_columns,
                                int64_t* best, uint8_t* finite, int num_threads) {
    using namespace l4d;
    together(num_rows > 1 ? num_threads : 1, [&](Member& member) {
        member.each(num_rows, [&](int64_t r) {
            const float* row = logits + r * stride;
            float top = -__builtin_inff();
            int64_t block = 0;
            bool broken = false;
            for (int64_t b = 0; b < num_columns; b += BLOCK) {
                const float here = largest(row + b, b + BLOCK < num_columns ? BLOCK : num_columns - b, broken);
                if (here > top) top = here, block = b;
            }
            best[r] = block;
            for (int64_t i = block; i < num_columns; ++i)
                if (row[i] == top) {
                    best[r] = i;
                    break;
                }
            finite[r] = !broken;
        });
    });
}
