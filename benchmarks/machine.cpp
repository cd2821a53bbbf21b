// Reads a buffer as fast as its memory gives it: the limit that a decode step is held against.
#include <cstdint>

typedef uint64_t Words __attribute__((vector_size(64)));

// Returns the exclusive-or of all words, so that no read can be left out. `num_bytes` is a multiple of 512 per thread.
extern "C" uint64_t read_all(const uint64_t* words, int64_t num_bytes, int num_threads) {
    uint64_t result = 0;
    const int64_t lines = num_bytes / 64;
#pragma omp parallel num_threads(num_threads) reduction(^ : result)
    {
        Words sums[8] = {};
#pragma omp for schedule(static)
        for (int64_t block = 0; block < lines / 8; ++block) {
            const Words* line = reinterpret_cast<const Words*>(words) + block * 8;
            for (int i = 0; i < 8; ++i) sums[i] ^= line[i];
        }
        for (int i = 0; i < 8; ++i)
            for (int j = 0; j < 8; ++j) result ^= sums[i][j];
    }
    return result;
}
