/* Panels of the GEMMs in integers: tokens, and weights in bfloat16, rounded a block of the contraction at a time. */
#include "grouped_gemm_int16.h"

#include <math.h>

/* ---- x ----------------------------------------------------------------------------------------------------------- */

/* 64 numbers -> integers, no magnitude above `most_each` and their magnitudes together at most `most_sum`; returns what one is
   worth: NaN where a number is not finite. */
INLINE float round_block(const __m256 v[8], float most_each, float most_sum, Pair to[BLOCK / 2])
{
    const __m256 sign = _mm256_set1_ps(-0.0f), part = _mm256_set1_ps(1.0f / BLOCK);
    __m256 most = _mm256_setzero_ps(), mean = _mm256_setzero_ps();
    for (int i = 0; i < 8; i++) {
        __m256 size = _mm256_andnot_ps(sign, v[i]);
        most = _mm256_max_ps(most, size);
        mean = _mm256_fmadd_ps(size, part, mean);
    }
    const float peak = largest_of(most), average = sum_of(mean);
    const int finite = average <= FLT_MAX;
    /* Below 2 ** -112 the quotient would overflow, and the sum is nothing beside any other. */
    const int counts = finite && peak > 1.9e-34f;
    const float by_peak = most_each / peak, by_sum = most_sum / BLOCK / average;
    const float factor = counts ? (by_peak < by_sum ? by_peak : by_sum) : 0.0f;
    const __m256 each = _mm256_set1_ps(factor);
    for (int i = 0; i < 8; i += 2) {
        __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], each)), high = _mm256_cvtps_epi32(_mm256_mul_ps(v[i + 1], each));
        if (!finite)
            low = high = _mm256_setzero_si256();
        _mm256_storeu_si256((__m256i *)(to + 4 * i), _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
    }
    return counts ? 1.0f / factor : finite ? 0.0f : NAN;
}

void round_rows(const Product *p, int64_t row, int64_t rows, int64_t k, int64_t depth, const float *magnitude, IntegerRows to)
{
    for (int64_t first = 0; first < rows; first += MR, to.pairs += MR * DEEP / 2, to.scales += MR * DEEP / BLOCK) {
        const int count = (int)(rows - first < MR ? rows - first : MR);
        const float *from[MR];
        for (int i = 0; i < count; i++)
            from[i] = p->x + (p->index == NULL ? row + first + i : p->index[row + first + i]) * p->x_stride + k;
        for (int64_t at = 0; at < depth; at += BLOCK) {
            Pair integers[MR][BLOCK / 2], *pairs = to.pairs + at / 2 * MR;
            float edge[BLOCK] = {0};
            for (int i = 0; i < count; i++) {
                const float *block = from[i] + at;
                if (depth - at < BLOCK)
                    block = memcpy(edge, block, sizeof(float) * (size_t)(depth - at));
                __m256 v[8];
                for (int j = 0; j < 8; j++) {
                    v[j] = _mm256_loadu_ps(block + 8 * j);
                    if (magnitude != NULL)
                        v[j] = _mm256_mul_ps(v[j], _mm256_loadu_ps(magnitude + at + 8 * j));
                }
                /* Each number rounds by at most 1/2, and the average's own rounding is worth less than 32. */
                to.scales[at / BLOCK * MR + i] = round_block(v, 32767.0f, (float)(MOST_SUM - 64), integers[i]);
            }
            for (int64_t j = 0; j < BLOCK / 2; j++, pairs += MR)
                for (int i = 0; i < count; i++)
                    pairs[i] = integers[i][j];
        }
    }
}

/* ---- W that is bfloat16 itself ------------------------------------------------------------------------------------- */

/* Eight numbers, or `count` and zeros. */
INLINE __m256 eight_of(const uint16_t *from, int64_t count)
{
    uint16_t edge[8] = {0};
    if (count < 8) {
        if (count > 0)
            memcpy(edge, from, sizeof(uint16_t) * (size_t)count);
        from = edge;
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16));
}

/* Pairs of four rows beside those of the four rows below them, 4 columns of them -> a column after the other. */
INLINE void transpose_pairs(const Pair from[8][BLOCK / 2], int64_t column, Pair *to)
{
    __m256i v[4];
    for (int i = 0; i < 4; i++)
        v[i] = _mm256_set_m128i(
            _mm_loadu_si128((const __m128i *)(from[4 + i] + column)), _mm_loadu_si128((const __m128i *)(from[i] + column)));
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
    const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    _mm256_store_si256((__m256i *)to, _mm256_unpacklo_epi64(a, b));
    _mm256_store_si256((__m256i *)(to + NR), _mm256_unpackhi_epi64(a, b));
    _mm256_store_si256((__m256i *)(to + 2 * NR), _mm256_unpacklo_epi64(c, d));
    _mm256_store_si256((__m256i *)(to + 3 * NR), _mm256_unpackhi_epi64(c, d));
}

void round_dense_rows(
    const uint16_t *w, int64_t stride, int64_t row, int64_t end, int64_t k, int64_t depth, IntegerPanel to)
{
    for (int64_t at = 0; at < depth; at += BLOCK, to.pairs += BLOCK / 2 * NR, to.scales += NR) {
        Pair integers[NR][BLOCK / 2];
        for (int i = 0; i < NR; i++) {
            const uint16_t *from = w + (row + i) * stride + k + at;
            const int64_t count = row + i < end ? depth - at : 0;
            __m256 v[8];
            _mm_prefetch((const char *)(from + NR * stride), _MM_HINT_T1);
            _mm_prefetch((const char *)(from + NR * stride + BLOCK / 2), _MM_HINT_T1);
            for (int j = 0; j < 8; j++)
                v[j] = eight_of(from + 8 * j, count >= BLOCK ? 8 : count - 8 * j);
            to.scales[i] = round_block(v, MOST_WEIGHT, INFINITY, integers[i]);
        }
        for (int64_t j = 0; j < BLOCK / 2; j += 4)
            for (int half = 0; half < NR; half += 8)
                transpose_pairs(integers + half, j, to.pairs + j * NR + half);
    }
}

/* 64 rows of 8 columns, each with a scale of its own. */
INLINE void round_columns(const uint16_t *w, int64_t stride, int64_t count, int64_t width, Pair *pairs, float *scales)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 v[BLOCK], most = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
    for (int64_t d = 0; d < BLOCK; d++) {
        v[d] = eight_of(w + d * stride, d < count ? width : 0);
        most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v[d]));
        bad = _mm256_add_ps(bad, _mm256_sub_ps(v[d], v[d]));   /* 0, or NaN where a number is not finite */
    }
    const __m256 large = _mm256_cmp_ps(most, _mm256_set1_ps(1.9e-34f), _CMP_GT_OQ);
    const __m256 counts = _mm256_and_ps(large, _mm256_cmp_ps(bad, bad, _CMP_ORD_Q));
    const __m256 factor = _mm256_and_ps(counts, _mm256_div_ps(_mm256_set1_ps(MOST_WEIGHT), most));
    const __m256 worth = _mm256_mul_ps(most, _mm256_set1_ps(1.0f / MOST_WEIGHT));
    _mm256_storeu_ps(scales, _mm256_blendv_ps(bad, worth, counts));
    for (int64_t d = 0; d < BLOCK; d += 2, pairs += NR) {
        /* What is not finite becomes -2 ** 31, of which 16 bits are 0. */
        __m256i even = _mm256_cvtps_epi32(_mm256_mul_ps(v[d], factor));
        __m256i odd = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(v[d + 1], factor)), 16);
        _mm256_storeu_si256((__m256i *)pairs, _mm256_blend_epi16(even, odd, 0xaa));
    }
}

void round_dense_columns(
    const uint16_t *w, int64_t stride, int64_t k, int64_t depth, int64_t column, int64_t end, const IntegerPanel to[4])
{
    for (int64_t at = 0; at < depth; at += BLOCK)
        for (int64_t n = 0; n < 4 * NR; n += 8) {
            const IntegerPanel *panel = to + n / NR;
            Pair *pairs = panel->pairs + at / 2 * NR + n % NR;
            float *scales = panel->scales + at / BLOCK * NR + n % NR;
            round_columns(w + (k + at) * stride + column + n, stride, depth - at, end - column - n, pairs, scales);
        }
}
