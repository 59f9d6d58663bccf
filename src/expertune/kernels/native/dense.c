/* Products of few tokens with a matrix that is not quantized, such as an output head: as fast as it is read. */
#include "common.h"

#define AHEAD 2048        /* bytes of W that are brought nearer before their use */
#define MOST_TOKENS 4     /* that share what was read */

enum { FLOAT32 = 1, BFLOAT16 = 2 };

INLINE __m256 eight_of(int kind, const char *row, int64_t k)
{
    if (kind == FLOAT32)
        return _mm256_loadu_ps((const float *)row + k);
    const __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + k));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* y[t] = <row, x[t]>; sums of 8 numbers each for even and for odd vectors. */
INLINE void dots(int kind, int tokens, const char *row, int64_t columns, const float *x, float *y, int64_t y_stride)
{
    __m256 sum[MOST_TOKENS][2];
    for (int t = 0; t < tokens; t++)
        sum[t][0] = sum[t][1] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 16 <= columns; k += 16) {
        _mm_prefetch(row + k * (kind == FLOAT32 ? 4 : 2) + AHEAD, _MM_HINT_T0);
        for (int half = 0; half < 2; half++) {
            const __m256 w = eight_of(kind, row, k + 8 * half);
            for (int t = 0; t < tokens; t++)
                sum[t][half] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + t * columns + k + 8 * half), sum[t][half]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        float total = total_of(_mm256_add_ps(sum[t][0], sum[t][1]));
        for (int64_t i = k; i < columns; i++)
            total += x[t * columns + i] *
                     (kind == FLOAT32 ? ((const float *)row)[i] : of_bfloat16(((const uint16_t *)row)[i]));
        y[t * y_stride] = total;
    }
}

#define OF_TOKENS(kind) \
    switch (tokens) { \
    case 1: dots(kind, 1, row, columns, x, y + n, rows); break; \
    case 2: dots(kind, 2, row, columns, x, y + n, rows); break; \
    case 3: dots(kind, 3, row, columns, x, y + n, rows); break; \
    default: dots(kind, 4, row, columns, x, y + n, rows); \
    }

/* y [tokens, rows] = x [tokens, columns] @ W.T, up to MOST_TOKENS; `stride` numbers from one row of W to the next. */
EXPORT void expertune_dense_gemv(
    const void *w, int kind, int64_t rows, int64_t columns, int64_t stride, const float *x, int tokens, float *y, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < rows; n++) {
        const char *row = (const char *)w + n * stride * (kind == FLOAT32 ? 4 : 2);
        if (kind == FLOAT32)
            OF_TOKENS(FLOAT32)
        else
            OF_TOKENS(BFLOAT16)
    }
}
