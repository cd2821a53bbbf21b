// Attention of some queries over the cached keys of their sequence, for one key/value head: softmax(q · k) · v.
//
// Keys are taken in blocks that begin at fixed positions, with a running maximum and sum (Milakov and Gimelshein 2018,
// "Online normalizer calculation for softmax"), so a query's bits depend on its position and its keys alone.
#pragma once

#include "work.h"

namespace l4d {

constexpr int GROUP = 16;  // keys of the cache that lie side by side, one in each lane of as many vectors as it takes
constexpr int GROUPS_PER_BLOCK = 4;
constexpr int BLOCK_KEYS = GROUP * GROUPS_PER_BLOCK;
constexpr int VECTORS_PER_BLOCK = BLOCK_KEYS / LANES;

// The cache of one layer, by slots. Keys lie as [slots / 16, G, C, 16], so that vectors are full of them; values as
// [slots, G, C].
template <typename T>
struct Cache {
    T *keys, *values;
    int64_t num_kv_heads, head_dim;

    T* key_group(int64_t slot, int64_t head) const {
        return keys + (slot / GROUP * num_kv_heads + head) * head_dim * GROUP;
    }

    T* value(int64_t slot, int64_t head) const { return values + (slot * num_kv_heads + head) * head_dim; }

    void write(int64_t slot, int64_t head, const float* key, const float* value_row) const {
        T* group = key_group(slot, head) + slot % GROUP;
        T* row = value(slot, head);
        for (int64_t c = 0; c < head_dim; ++c) {
            from_float(key[c], group[c * GROUP]);
            from_float(value_row[c], row[c]);
        }
    }
};

// Consecutive queries of one sequence. The first sees `num_keys` keys from position `first_key` on, each further query
// one more; the page of position p is pages[p / page_size].
struct QueryBlock {
    int64_t row, num_queries, first_key, num_keys;
    const int64_t* pages;
    int64_t page_size;

    int64_t last_key() const { return first_key + num_keys + num_queries - 2; }
    int64_t slot(int64_t position) const { return pages[position / page_size] * page_size + position % page_size; }
    bool has_whole_groups() const { return page_size % GROUP == 0; }
};

// Find the keys of a group of positions; those that lie apart are brought together in `gathered`. Positions past the
// last key are read as another's: they are not counted.
template <typename T>
inline const T* find_keys(const Cache<T>& cache, const QueryBlock& block, int64_t head, int64_t position, T* gathered) {
    if (block.has_whole_groups()) return cache.key_group(block.slot(position), head);
    for (int lane = 0; lane < GROUP; ++lane) {
        const int64_t slot = block.slot(std::min(position + lane, block.last_key()));
        const T* from = cache.key_group(slot, head) + slot % GROUP;
        for (int64_t c = 0; c < cache.head_dim; ++c) gathered[c * GROUP + lane] = from[c * GROUP];
    }
    return gathered;
}

// R rows of scores against V vectors of keys.
template <int R, int V, typename T>
inline void score_tile(const float* q, int64_t head_dim, const T* const* keys, float* scores) {
    Vector sum[R][V] = {};
    for (int64_t c = 0; c < head_dim; ++c) {
        Vector key[V];
        for (int v = 0; v < V; ++v) key[v] = load(keys[v] + c * GROUP);
        for (int r = 0; r < R; ++r) {
            const float factor = q[r * head_dim + c];
            for (int v = 0; v < V; ++v) sum[r][v] += factor * key[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(scores + r * BLOCK_KEYS + v * LANES, sum[r][v]);
}

// R rows, or all where there are fewer, against a block.
template <int R, typename T>
inline void score_rows(const float* q, int64_t num_rows, int64_t head_dim, const T* const* groups, float* scores) {
    if constexpr (R > 1)
        if (num_rows < R) return score_rows<R - 1>(q, num_rows, head_dim, groups, scores);
    const T* keys[VECTORS_PER_BLOCK];
    for (int v = 0; v < VECTORS_PER_BLOCK; ++v) keys[v] = groups[v * LANES / GROUP] + v * LANES % GROUP;
    for (int v = 0; v < VECTORS_PER_BLOCK; v += VECTORS_PER_STRIP)
        score_tile<R, VECTORS_PER_STRIP>(q, head_dim, keys + v, scores + v * LANES);
}

template <typename T>
inline void score(const float* q, int64_t num_rows, int64_t head_dim, const T* const* groups, float* scores) {
    for (int64_t r = 0; r < num_rows; r += ROWS_PER_TILE, q += ROWS_PER_TILE * head_dim,
                 scores += ROWS_PER_TILE * BLOCK_KEYS)
        score_rows<ROWS_PER_TILE>(q, num_rows - r, head_dim, groups, scores);
}

// What is known of a row's softmax after some blocks.
struct Running {
    float largest, sum;
};

// Turn the scores of keys [begin, end) of a block into weights, those of other keys into 0; rescale what was summed up.
inline void weigh(float* scores, int64_t begin, int64_t end, Running& running, float* out, int64_t head_dim) {
    Integers lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    const Vector none = all(-__builtin_inff());
    Vector s[VECTORS_PER_BLOCK];
    Vector largest = none;
    for (int v = 0; v < VECTORS_PER_BLOCK; ++v) {
        const Integers key = lane + v * LANES;
        s[v] = ((key >= int32_t(begin)) & (key < int32_t(end))) ? load(scores + v * LANES) : none;
        largest = larger(s[v], largest);
    }
    const float largest_here = largest_of(largest);
    if (largest_here > running.largest) {
        const float factor = exp_of(all(running.largest - largest_here))[0];
        for (int64_t c = 0; c < head_dim; ++c) out[c] *= factor;
        running = {largest_here, running.sum * factor};
    }
    Vector sums[VECTORS_OF_SUMS] = {};
    for (int v = 0; v < VECTORS_PER_BLOCK; ++v) {
        const Integers key = lane + v * LANES;
        const Vector weight = exp_of(s[v] - running.largest);
        const Vector kept = ((key >= int32_t(begin)) & (key < int32_t(end))) ? weight : Vector{};
        store(scores + v * LANES, kept);
        sums[v % VECTORS_OF_SUMS] += kept;
    }
    running.sum += sum_of(sums);
}

// out += weights of keys [base + from, base + to) times their values.
template <typename T>
inline void add_values(const Cache<T>& cache, const QueryBlock& block, int64_t head, int64_t base, int64_t from,
                       int64_t to, const float* weights, int64_t num_rows, float* out) {
    const int64_t stride = cache.num_kv_heads * cache.head_dim;
    while (from < to) {
        const int64_t next = block.has_whole_groups() ? std::min(to, (from / GROUP + 1) * GROUP) : from + 1;
        const T* values = cache.value(block.slot(base + from), head);
        multiply_columns(
            Part<T>{weights + from, BLOCK_KEYS, values, stride, next - from, out, cache.head_dim, false}, num_rows,
            cache.head_dim);
        from = next;
    }
}

// Memory for one call of `attend`.
template <typename T>
struct Workplace {
    float* scores;  // [rows, BLOCK_KEYS]
    Running* running;  // [rows]
    T* gathered;  // [GROUPS_PER_BLOCK, C, GROUP]
};

// q and out are [num_queries * rows_per_query, head_dim], q already scaled.
template <typename T>
void attend(const Cache<T>& cache, const QueryBlock& block, int64_t head, const float* q, int64_t rows_per_query,
            const Workplace<T>& at, float* out) {
    const int64_t head_dim = cache.head_dim, num_rows = block.num_queries * rows_per_query;
    const int64_t last_key = block.last_key();
    std::memset(out, 0, num_rows * head_dim * sizeof(float));
    for (int64_t r = 0; r < num_rows; ++r) at.running[r] = {-__builtin_inff(), 0.0f};
    for (int64_t base = block.first_key / GROUP * GROUP; base <= last_key; base += BLOCK_KEYS) {
        const T* keys[GROUPS_PER_BLOCK];
        for (int v = 0; v < GROUPS_PER_BLOCK; ++v) {
            const bool is_past = base + v * GROUP > last_key;
            keys[v] = is_past ? keys[0]
                              : find_keys(cache, block, head, base + v * GROUP, at.gathered + v * head_dim * GROUP);
        }
        score(q, num_rows, head_dim, keys, at.scores);
        const int64_t begin = std::max<int64_t>(0, block.first_key - base);
        for (int64_t r = 0; r < num_rows; ++r) {
            const int64_t end = block.first_key + block.num_keys + r / rows_per_query - base;
            float* row = at.scores + r * BLOCK_KEYS;
            if (end > begin) weigh(row, begin, end, at.running[r], out + r * head_dim, head_dim);
            else std::memset(row, 0, BLOCK_KEYS * sizeof(float));
        }
        const int64_t end = std::min<int64_t>(BLOCK_KEYS, last_key - base + 1);
        add_values(cache, block, head, base, begin, end, at.scores, num_rows, out);
    }
    for (int64_t r = 0; r < num_rows; ++r)
        for (int64_t c = 0; c < head_dim; ++c) out[r * head_dim + c] /= at.running[r].sum;
}

}  // namespace l4d
