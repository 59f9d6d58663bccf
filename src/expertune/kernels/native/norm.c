/* Root mean square normalization of few rows, for an answer: one pass where torch makes six small ones. */
#include "gemv4.h"

#include <math.h>

INLINE float number_at(const void *from, int kind, int64_t at)
{
    if (kind == FLOAT32)
        return ((const float *)from)[at];
    const uint16_t half = ((const uint16_t *)from)[at];
    return kind == FLOAT16 ? _cvtsh_ss(half) : of_bfloat16(half);
}

INLINE void norm_row(int kind, const void *x, const void *weight, int64_t columns, float eps, float beyond, void *y)
{
    __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t k = 0;
    for (; k + 16 <= columns; k += 16)
        for (int half = 0; half < 2; half++) {
            const __m256 v = values_at(x, kind, k + 8 * half);
            sums[half] = _mm256_fmadd_ps(v, v, sums[half]);
        }
    float sum = total_of(_mm256_add_ps(sums[0], sums[1]));
    for (; k < columns; k++)
        sum += number_at(x, kind, k) * number_at(x, kind, k);
    const float factor = 1.0f / sqrtf(sum / (float)columns + eps);
    for (k = 0; k + 8 <= columns; k += 8) {
        float lanes[8];
        const __m256 w = _mm256_add_ps(values_at(weight, kind, k), _mm256_set1_ps(beyond));
        _mm256_storeu_ps(lanes, _mm256_mul_ps(_mm256_mul_ps(values_at(x, kind, k), _mm256_set1_ps(factor)), w));
        for (int i = 0; i < 8; i++)
            put(y, kind, k + i, lanes[i]);
    }
    for (; k < columns; k++)
        put(y, kind, k, number_at(x, kind, k) * factor * (number_at(weight, kind, k) + beyond));
}

/* y = x / sqrt(mean(x ** 2) + eps) * (weight + beyond) for rows [rows, columns], all of one kind; computed in float32 and
   rounded once. */
EXPORT void expertune_rms_norm(
    const void *x, const void *weight, void *y, int kind, int64_t rows, int64_t columns, float eps, float beyond)
{
    const int64_t bytes = columns * (kind == FLOAT32 ? 4 : 2);
    for (int64_t row = 0; row < rows; row++) {
        const char *from = (const char *)x + row * bytes;
        char *to = (char *)y + row * bytes;
        if (kind == FLOAT32)
            norm_row(FLOAT32, from, weight, columns, eps, beyond, to);
        else if (kind == BFLOAT16)
            norm_row(BFLOAT16, from, weight, columns, eps, beyond, to);
        else
            norm_row(FLOAT16, from, weight, columns, eps, beyond, to);
    }
}
