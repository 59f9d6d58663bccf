/* What the files of the GEMMs in integers of 16 bits share: sizes of panels, limits of integers, and who makes them. */
#ifndef EXPERTUNE_GROUPED_GEMM_INT16_H
#define EXPERTUNE_GROUPED_GEMM_INT16_H

#include "panels.h"

#define DEEP 512 /* contraction of one pass: as many bytes of a panel as KC floats */

/* With these 64 products, each of a weight and a number of x, stay within 32 bits: 8192 * (2 ** 18 - 1) < 2 ** 31. */
#define MOST_WEIGHT 8192
#define MOST_SUM ((1 << 18) - 1)
#define MULHRS_ONE 32768 /* VPMULHRSW divides products by it */

/* A pair of the contraction, one beside the other, as VPMADDWD multiplies and adds them. */
typedef struct {
    int16_t even, odd;
} Pair;

INLINE float largest_of(__m256 v)
{
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

INLINE float sum_of(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* Tokens of a pass in panels of MR: pairs [tokens / MR][DEEP / 2][MR], and what their integers are multiples of,
   [tokens / MR][DEEP / BLOCK][MR]. */
typedef struct {
    Pair *pairs;
    float *scales;
} IntegerRows;

/* A panel of W of a pass: pairs [DEEP / 2][NR] and scales [DEEP / BLOCK or twice that][NR]. */
typedef struct {
    Pair *pairs;
    float *scales;
} IntegerPanel;

/* Of a pass's rows of W. */
typedef struct {
    float *each, *inverse;
} Magnitudes;

/* The largest scale of each of W's rows k .. k + depth: what tokens are multiplied with, and rows divided by, before both
   are rounded, where the contraction runs along W's rows. */
void magnitudes(const Nf4 *w, int64_t first_matrix, int64_t k, int64_t depth, Magnitudes to);

void round_rows(const Product *p, int64_t row, int64_t rows, int64_t k, int64_t depth, const float *magnitude, IntegerRows to);

/* 16 matrix rows from `row` on, contraction k .. k + depth. Rows beyond `end` give zeros. */
void look_up_rows(const Nf4 *w, int64_t first_matrix, int64_t row, int64_t end, int64_t k, int64_t depth, IntegerPanel to);

/* Matrix rows k .. k + depth, 64 columns from `column` on -> four panels. Rows from k + depth on to the end of their block of
   64 give zeros. */
void look_up_columns(
    const Nf4 *w, int64_t first_matrix, int64_t k, int64_t depth, int64_t column, Magnitudes magnitude, const IntegerPanel to[4]);

/* The same of a matrix in bfloat16. Each 64 numbers of the contraction have a scale of their own, and what lies beyond it, or
   beyond the columns' `end`, gives zeros. */
void round_dense_rows(
    const uint16_t *w, int64_t stride, int64_t row, int64_t end, int64_t k, int64_t depth, IntegerPanel to);

void round_dense_columns(
    const uint16_t *w, int64_t stride, int64_t k, int64_t depth, int64_t column, int64_t end, const IntegerPanel to[4]);

#endif
