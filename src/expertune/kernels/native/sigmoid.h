/* The logistic function in vectors of 8. */
#ifndef EXPERTUNE_SIGMOID_H
#define EXPERTUNE_SIGMOID_H

#include "common.h"

/* exp(x) = 2**n * (1 + r + r**2 * p(r)), where x = n * ln 2 + r and r lies in [-ln 2 / 2, ln 2 / 2] (Cephes, expf): to
   about one unit in the last place. Vectors of any width take their constants from here, p's from the highest power. */
#define EXP_LEAST -87.3f
#define EXP_MOST 88.3f
#define LOG2_E 1.44269504088896341f
#define LN_2_HIGH 0.693359375f
#define LN_2_LOW -2.12194440e-4f
#define EXP_FIRST 1.9875691500e-4f
#define EXP_OTHERS(TERM) \
    TERM(1.3981999507e-3f) TERM(8.3334519073e-3f) TERM(4.1665795894e-2f) TERM(1.6666665459e-1f) TERM(5.0000001201e-1f)

/* NaN stays NaN. */
INLINE __m256 exponential(__m256 x)
{
    x = _mm256_min_ps(_mm256_set1_ps(EXP_MOST), _mm256_max_ps(_mm256_set1_ps(EXP_LEAST), x));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(LOG2_E)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN_2_HIGH), x);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN_2_LOW), x);
    __m256 p = _mm256_set1_ps(EXP_FIRST);
#define TERM(constant) p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(constant));
    EXP_OTHERS(TERM)
#undef TERM
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(x, x), x), _mm256_set1_ps(1.0f));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

INLINE __m256 sigmoid(__m256 x)
{
    const __m256 one = _mm256_set1_ps(1.0f);
    return _mm256_div_ps(one, _mm256_add_ps(one, exponential(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

#endif
