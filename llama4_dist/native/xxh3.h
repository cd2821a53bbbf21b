// XXH3 with 64 bits, seed 0 and the default secret, of bytes that lie in one piece or in two. Long inputs are its
// business: shorter ones than 17 bytes are not hashed. Source: the XXH3 specification, as xxhash 0.8 has it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace xxh3 {

typedef uint64_t Lanes __attribute__((vector_size(64)));  // eight accumulators

constexpr size_t STRIPE = 64, BLOCK_STRIPES = 16, SHORTEST = 17;
constexpr uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F, PRIME64_3 = 0x165667B19E3779F9;
constexpr uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63, PRIME64_5 = 0x27D4EB2F165667C5, PRIME_MX1 = 0x165667919E3779F9;

alignas(64) constexpr uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

inline uint64_t read64(const uint8_t* from) {
    uint64_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline Lanes read_lanes(const uint8_t* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

inline uint64_t fold(uint64_t left, uint64_t right) {
    const auto product = static_cast<unsigned __int128>(left) * right;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t avalanche(uint64_t hash) {
    hash = (hash ^ hash >> 37) * PRIME_MX1;
    return hash ^ hash >> 32;
}

inline uint64_t mix16(const uint8_t* input, size_t secret) {
    return fold(read64(input) ^ read64(SECRET + secret), read64(input + 8) ^ read64(SECRET + secret + 8));
}

inline uint64_t hash_17_to_128(const uint8_t* input, size_t length) {
    uint64_t hash = length * PRIME64_1;
    for (size_t pair = 0; pair <= (length - 1) / 32; ++pair) {
        hash += mix16(input + 16 * pair, 32 * pair);
        hash += mix16(input + length - 16 * (pair + 1), 32 * pair + 16);
    }
    return avalanche(hash);
}

inline uint64_t hash_129_to_240(const uint8_t* input, size_t length) {
    uint64_t hash = length * PRIME64_1;
    for (size_t part = 0; part < 8; ++part) hash += mix16(input + 16 * part, 16 * part);
    hash = avalanche(hash);
    for (size_t part = 8; part < length / 16; ++part) hash += mix16(input + 16 * part, 16 * (part - 8) + 3);
    return avalanche(hash + mix16(input + length - 16, 136 - 17));
}

// The hash of more than 240 bytes, fed in stripes of 64.
class Stripes {
  public:
    void feed(const uint8_t* input, size_t num_stripes) {
        while (num_stripes) {
            const size_t taken = std::min(num_stripes, BLOCK_STRIPES - in_block_);
            lanes_ = taken == BLOCK_STRIPES ? take_block(lanes_, input) : take(lanes_, input, taken, in_block_);
            input += taken * STRIPE, num_stripes -= taken, in_block_ = (in_block_ + taken) % BLOCK_STRIPES;
            if (!in_block_) lanes_ = (lanes_ ^ lanes_ >> 47 ^ read_lanes(SECRET + 128)) * PRIME32_1;
        }
    }

    // `last` is the last 64 bytes of all, whether they were fed before or not.
    uint64_t finish(const uint8_t* last, size_t length) const {
        const Lanes lanes = accumulate(lanes_, last, 192 - 64 - 7);
        uint64_t hash = length * PRIME64_1;
        for (size_t pair = 0; pair < 4; ++pair) {
            const uint8_t* secret = SECRET + 11 + 16 * pair;
            hash += fold(lanes[2 * pair] ^ read64(secret), lanes[2 * pair + 1] ^ read64(secret + 8));
        }
        return avalanche(hash);
    }

  private:
    static Lanes take(Lanes lanes, const uint8_t* input, size_t num_stripes, size_t first) {
        for (size_t stripe = 0; stripe < num_stripes; ++stripe) {
            lanes = accumulate(lanes, input + stripe * STRIPE, 8 * (first + stripe));
        }
        return lanes;
    }

    static Lanes take_block(Lanes lanes, const uint8_t* input) {
#pragma GCC unroll 16
        for (size_t stripe = 0; stripe < BLOCK_STRIPES; ++stripe) {
            __builtin_prefetch(input + stripe * STRIPE + 512);
            lanes = accumulate(lanes, input + stripe * STRIPE, 8 * stripe);
        }
        return lanes;
    }

    static Lanes accumulate(Lanes lanes, const uint8_t* input, size_t secret) {
        const Lanes bytes = read_lanes(input), keyed = bytes ^ read_lanes(SECRET + secret);
        const Lanes swapped = __builtin_shuffle(bytes, Lanes{1, 0, 3, 2, 5, 4, 7, 6});
        return lanes + swapped + multiply_halves(keyed);
    }

    // The lower 32 bits of each lane times the upper 32.
    static Lanes multiply_halves(Lanes keyed) {
#ifdef __AVX512F__  // GCC multiplies all 64 bits otherwise, which takes three times as long
        return (Lanes)_mm512_mul_epu32((__m512i)keyed, (__m512i)(keyed >> 32));
#else
        return (keyed & 0xffffffff) * (keyed >> 32);
#endif
    }

    Lanes lanes_ = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    size_t in_block_ = 0;
};

inline uint64_t hash(const uint8_t* input, size_t length) {
    if (length <= 128) return hash_17_to_128(input, length);
    if (length <= 240) return hash_129_to_240(input, length);
    Stripes stripes;
    stripes.feed(input, (length - 1) / STRIPE);
    return stripes.finish(input + length - STRIPE, length);
}

// The hash of `head` followed by `tail`; only a stripe that lies in both is copied.
inline uint64_t hash(const uint8_t* head, size_t head_length, const uint8_t* tail, size_t tail_length) {
    const size_t length = head_length + tail_length;
    if (tail_length < 4 * STRIPE) {
        std::vector<uint8_t> joined(head, head + head_length);
        joined.insert(joined.end(), tail, tail + tail_length);
        return hash(joined.data(), length);
    }
    const size_t whole = head_length / STRIPE, rest = head_length % STRIPE, borrowed = rest ? STRIPE - rest : 0;
    Stripes stripes;
    stripes.feed(head, whole);
    if (rest) {
        uint8_t both[STRIPE];
        std::memcpy(both, head + whole * STRIPE, rest);
        std::memcpy(both + rest, tail, borrowed);
        stripes.feed(both, 1);
    }
    stripes.feed(tail + borrowed, (tail_length - borrowed - 1) / STRIPE);
    return stripes.finish(tail + tail_length - STRIPE, length);
}

}  // namespace xxh3
