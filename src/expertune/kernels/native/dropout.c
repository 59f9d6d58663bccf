/* Dropout by a counter: whether an element stays is a hash of its number and a seed, so that no mask is ever kept. */
#include "grouped_gemm.h"

/* A version for wider vectors beside this one, where the compiler makes both and the loader chooses. */
#if defined(__has_attribute)
#if __has_attribute(target_clones) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "default")))
#endif
#endif
#ifndef CLONES
#define CLONES
#endif

CLONES void drop_row(const float *from, float *to, int64_t columns, const Dropout *d, int64_t row, int64_t column)
{
    uint32_t base = (uint32_t)(d->number[row] * d->stride + column);
    uint32_t seed = d->seed, seed_high = d->seed_high, threshold = d->threshold;
    float scale = d->scale;
    for (int64_t i = 0; i < columns; i++) {
        uint32_t h = (base + (uint32_t)i) ^ seed;
        h ^= h >> 16;
        h *= 0x85ebca6bu;
        h ^= h >> 13;
        h *= 0xc2b2ae35u;
        h ^= h >> 16;
        h += seed_high;
        h ^= h >> 15;
        h *= 0x2c1b3c6du;
        h ^= h >> 16;
        to[i] = h >= threshold ? from[i] * scale : 0.0f;
    }
}

/* out[row, :] = x[index[row], :], dropped as columns `first` .. of the row. */
EXPORT void expertune_dropout(
    const float *x, int64_t x_stride, const int64_t *index, const Dropout *d, int64_t rows, int64_t columns, int64_t first,
    float *out, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns > 32768)
    for (int64_t row = 0; row < rows; row++)
        drop_row(x + (index == NULL ? row : index[row]) * x_stride, out + row * columns, columns, d, row, first);
}
