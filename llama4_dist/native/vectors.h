// Vectors of as many floats as the processor's registers hold, and the functions of one vector.
//
// Every lane goes through the same operations in the same order, so a value's bits do not depend on its lane, on the
// vector width of the processor, or on what else is computed. Only a sum across lanes is of 16 on every processor. Not
// all vectors are of 16, because g++ 12 keeps those that fill several registers in memory: products took six times as long.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace l4d {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int SUMS = 16;  // side by side, until they are added up
constexpr int VECTORS_OF_SUMS = SUMS / LANES;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(alignof(float)), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(alignof(int32_t)), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(alignof(uint16_t)), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(alignof(uint32_t)), may_alias));

// bfloat16 as its 16 bits: the upper half of a float.
struct Bfloat16 {
    uint16_t bits;
};

// A weight as a small integer; what it stands for is the integer times its output's scale.
struct Int8 {
    int8_t value;
};

// A weight as the eight bits of float8 e4m3; what it stands for is that number times its output's scale.
struct Float8 {
    uint8_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(Int8 value) { return value.value; }

inline float to_float(Bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// The seven bits below the sign, where a float has them, are that number times 2^-120, for subnormal ones too. NaN does not
// come here: who packs weights sees to it.
inline float to_float(Float8 value) {
    const uint32_t bits = uint32_t(value.bits & 0x80) << 24 | uint32_t(value.bits & 0x7f) << 20;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result * 0x1p120f;
}

// The float8 number nearest to one of at most 448 and a rounding error in size, ties to even.
inline float nearest_float8(float value) {
    if (__builtin_fabsf(value) < 0x1p-6f) return __builtin_rintf(value * 512.0f) / 512.0f;  // subnormal: steps of 2^-9
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x7ffff + ((bits >> 20) & 1)) & 0xfff00000;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void from_float(float value, float& to) { to = value; }

// Rounds to nearest, ties to even, as torch does; a NaN stays one.
inline void from_float(float value, Bfloat16& to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    to.bits = is_nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

inline Vector load(const Bfloat16* from) {
    const Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16;
    return (Vector)words;
}

// Said with intrinsics because g++ 12 takes the portable words apart into single lanes.
inline Vector load(const Int8* from) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    Vector result;
    for (int i = 0; i < LANES; ++i) result[i] = from[i].value;
    return result;
#endif
}

inline Vector load(const Float8* from) {
    Words words;
#if defined(__AVX512F__)
    words = (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
    words = (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    for (int i = 0; i < LANES; ++i) words[i] = from[i].bits;
#endif
    return (Vector)((words & 0x80) << 24 | (words & 0x7f) << 20) * 0x1p120f;
}

inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

inline Vector all(float value) { return Vector{} + value; }

// The sum of all lanes, always added in this order.
inline float sum_of(const Vector (&sums)[VECTORS_OF_SUMS]) {
    float lane[SUMS];
    for (int v = 0; v < VECTORS_OF_SUMS; ++v) store(lane + v * LANES, sums[v]);
    for (int width = SUMS / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
}

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

inline float largest_of(Vector v) {
    float lane[LANES];
    store(lane, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return lane[0];
}

// e^x with an error below 2 units in the last place; exponents are held within float's normal range, a NaN stays one.
// e^x = 2^n · e^r with |r| <= ln 2 / 2, e^r by its Taylor series (Cephes' split of ln 2 keeps r exact).
inline Vector exp_of(Vector x) {
    x = x < all(-87.3f) ? all(-87.3f) : x;
    x = x > all(88.3f) ? all(88.3f) : x;
    const float to_integer = 12582912.0f;  // 1.5 · 2^23: adding it leaves the rounded integer in the low bits
    const Vector shifted = x * 1.44269504088896341f + to_integer;
    const Vector n = shifted - to_integer;
    const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector e = all(1.0f / 5040);
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    return e * (Vector)(((Integers)shifted + 127) << 23);
}

inline Vector sigmoid_of(Vector x) { return 1.0f / (exp_of(-x) + 1.0f); }

inline Vector silu_of(Vector x) { return x / (exp_of(-x) + 1.0f); }

}  // namespace l4d
