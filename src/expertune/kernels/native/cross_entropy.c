/* What a softmax over a vocabulary does beside its GEMMs, in one pass each: logits from products, and their gradients.

   Columns are taken by SLICE, whatever the number of threads: sums are the same for any. */
#include "sigmoid.h"

#include <math.h>
#include <omp.h>

#define SLICE 256 /* columns that are worked on at once */

/* A tile of logits [rows, columns] and its low-rank term h @ b.T, h [rows, rank] and b [columns, rank]. */
typedef struct {
    void *z;             /* what the GEMM gave: float32, or bfloat16 where `bfloat` */
    float *logits;       /* may be z itself */
    const float *h, *b, *bias;   /* no bias: NULL */
    int64_t rows, columns, rank;
    float scale, softcap;        /* no cap: 0 */
    int32_t bfloat, threads;
    float *log_sums;     /* [slices, rows]: of exp over a slice */
    /* Of the gradients. */
    const float *log_sum;        /* [rows]: of exp over the vocabulary */
    const int64_t *label;        /* [rows]: column of each row's label, which may lie outside */
    const float *weight;         /* [rows], or NULL: of each row's loss */
    uint16_t *rounded;   /* [rows, columns] in bfloat16, or NULL: then the gradients take the place of the logits */
    float *dh;           /* [slices, rows, rank]: gradient of h by slices */
    float *db;           /* [columns, rank]: gradient of b, added to */
} Logits;

/* b's columns first .. first + count -> [rank][SLICE]. */
static void transpose_factor(const Logits *p, int64_t first, int64_t count, float *to)
{
    for (int64_t r = 0; r < p->rank; r++) {
        for (int64_t i = 0; i < count; i++)
            to[r * SLICE + i] = p->b[(first + i) * p->rank + r];
        memset(to + r * SLICE + count, 0, sizeof(float) * (size_t)(SLICE - count));
    }
}

static void load_slice(const Logits *p, int64_t at, int64_t count, float *to)
{
    int64_t i = 0;
    if (!p->bfloat) {
        memcpy(to, (const float *)p->z + at, sizeof(float) * (size_t)count);
        return;
    }
    const uint16_t *from = (const uint16_t *)p->z + at;
    for (; i + 8 <= count; i += 8) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(from + i)));
        _mm256_storeu_ps(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
    }
    for (; i < count; i++)
        to[i] = of_bfloat16(from[i]);
}

/* softcap * tanh(z / softcap) */
INLINE __m256 capped(__m256 z, float softcap)
{
    const __m256 one = _mm256_set1_ps(1.0f), two = _mm256_set1_ps(2.0f), cap = _mm256_set1_ps(softcap);
    __m256 grown = exponential(_mm256_mul_ps(two, _mm256_div_ps(z, cap)));
    return _mm256_mul_ps(cap, _mm256_sub_ps(one, _mm256_div_ps(two, _mm256_add_ps(grown, one))));
}

/* log of the sum of exp; -inf of nothing but -inf, and NaN where one is, whatever stands beside it. */
static float log_sum_of(const float *z, int64_t count)
{
    float padded[SLICE];
    float highest = -INFINITY, sum;
    __m256 total = _mm256_setzero_ps();
    int64_t full = (count + 7) / 8 * 8;
    for (int64_t i = 0; i < full; i++)
        padded[i] = i < count ? z[i] : -INFINITY;
    __m256 most = _mm256_set1_ps(-INFINITY), nans = _mm256_setzero_ps();
    for (int64_t i = 0; i < full; i += 8) {
        __m256 v = _mm256_loadu_ps(padded + i);
        most = _mm256_max_ps(v, most); /* the second where the first is NaN */
        nans = _mm256_or_ps(nans, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    if (_mm256_movemask_ps(nans))
        return NAN;
    float lanes[8];
    _mm256_storeu_ps(lanes, most);
    for (int i = 0; i < 8; i++)
        highest = lanes[i] > highest ? lanes[i] : highest;
    if (isinf(highest))
        return highest;
    for (int64_t i = 0; i < full; i += 8)
        total = _mm256_add_ps(total, exponential(_mm256_sub_ps(_mm256_loadu_ps(padded + i), _mm256_set1_ps(highest))));
    sum = total_of(total);
    return highest + logf(sum);
}

/* logits = softcap * tanh(scale * (z + h @ b.T + bias) / softcap), and the log of the sum of exp of each slice. */
EXPORT void expertune_logits(const Logits *p)
{
    int64_t slices = (p->columns + SLICE - 1) / SLICE;
#pragma omp parallel num_threads(p->threads)
    {
        float *factor = malloc(sizeof(float) * SLICE * (size_t)(p->rank + 1));
        if (factor == NULL)
            abort();
#pragma omp for schedule(static)
        for (int64_t slice = 0; slice < slices; slice++) {
            int64_t first = slice * SLICE, count = p->columns - first < SLICE ? p->columns - first : SLICE;
            transpose_factor(p, first, count, factor);
            for (int64_t row = 0; row < p->rows; row++) {
                float z[SLICE] = {0};
                const float *h = p->h + row * p->rank;
                load_slice(p, row * p->columns + first, count, z);
                for (int64_t i = 0; i < SLICE && p->rank > 0; i += 8) {
                    __m256 sum = _mm256_loadu_ps(z + i);
                    for (int64_t r = 0; r < p->rank; r++)
                        sum = _mm256_fmadd_ps(_mm256_set1_ps(h[r]), _mm256_loadu_ps(factor + r * SLICE + i), sum);
                    _mm256_storeu_ps(z + i, sum);
                }
                if (p->bias != NULL)
                    for (int64_t i = 0; i < count; i++)
                        z[i] += p->bias[first + i];
                if (p->scale != 1.0f)
                    for (int64_t i = 0; i < count; i++)
                        z[i] *= p->scale;
                for (int64_t i = 0; i < SLICE && p->softcap != 0.0f; i += 8)
                    _mm256_storeu_ps(z + i, capped(_mm256_loadu_ps(z + i), p->softcap));
                memcpy(p->logits + row * p->columns + first, z, sizeof(float) * (size_t)count);
                p->log_sums[slice * p->rows + row] = log_sum_of(z, count);
            }
        }
        free(factor);
    }
}

/* d = (exp(logit - log_sum) - [label]) * (1 - (logit / softcap)^2) * scale * weight, of a slice of a row. */
INLINE void gradient_of(const Logits *p, int64_t row, int64_t first, int64_t count, float d[SLICE])
{
    float slope[SLICE];
    const float *z = p->logits + row * p->columns + first;
    float factor = p->scale * (p->weight == NULL ? 1.0f : p->weight[row]);
    int64_t label = p->label[row] - first;
    memcpy(d, z, sizeof(float) * (size_t)count);
    memset(d + count, 0, sizeof(float) * (size_t)(SLICE - count));
    for (int64_t i = 0; i < SLICE && p->softcap != 0.0f; i += 8) {
        __m256 part = _mm256_div_ps(_mm256_loadu_ps(d + i), _mm256_set1_ps(p->softcap));
        _mm256_storeu_ps(slope + i, _mm256_fnmadd_ps(part, part, _mm256_set1_ps(1.0f)));
    }
    for (int64_t i = 0; i < SLICE; i += 8)
        _mm256_storeu_ps(d + i, exponential(_mm256_sub_ps(_mm256_loadu_ps(d + i), _mm256_set1_ps(p->log_sum[row]))));
    if (label >= 0 && label < count)
        d[label] -= 1.0f;
    for (int64_t i = 0; i < SLICE; i += 8) {
        __m256 v = _mm256_loadu_ps(d + i);
        if (p->softcap != 0.0f)
            v = _mm256_mul_ps(v, _mm256_loadu_ps(slope + i));
        _mm256_storeu_ps(d + i, _mm256_mul_ps(v, _mm256_set1_ps(factor)));
    }
    memset(d + count, 0, sizeof(float) * (size_t)(SLICE - count));
}

INLINE void store_gradient(const Logits *p, int64_t at, int64_t count, const float *d)
{
    int64_t i = 0;
    if (p->rounded == NULL) {
        memcpy(p->logits + at, d, sizeof(float) * (size_t)count);
        return;
    }
    for (; i + 8 <= count; i += 8) {
        __m256i high = _mm256_srli_epi32(round_bfloat16(_mm256_loadu_ps(d + i)), 16);
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
        _mm_storeu_si128((__m128i *)(p->rounded + at + i), _mm256_castsi256_si128(packed));
    }
    for (; i < count; i++)
        p->rounded[at + i] = to_bfloat16(d[i]);
}

/* The loss's gradient of each product z, and with it those of h and b. */
EXPORT void expertune_logit_gradients(const Logits *p)
{
    int64_t slices = (p->columns + SLICE - 1) / SLICE;
#pragma omp parallel num_threads(p->threads)
    {
        float *factor = malloc(sizeof(float) * 2 * SLICE * (size_t)(p->rank + 1)), *gradient = factor + SLICE * p->rank;
        if (factor == NULL)
            abort();
#pragma omp for schedule(static)
        for (int64_t slice = 0; slice < slices; slice++) {
            int64_t first = slice * SLICE, count = p->columns - first < SLICE ? p->columns - first : SLICE;
            transpose_factor(p, first, count, factor);
            memset(gradient, 0, sizeof(float) * SLICE * (size_t)p->rank);
            for (int64_t row = 0; row < p->rows; row++) {
                float d[SLICE];
                const float *h = p->h + row * p->rank;
                gradient_of(p, row, first, count, d);
                store_gradient(p, row * p->columns + first, count, d);
                for (int64_t r = 0; r < p->rank; r++) {
                    __m256 total = _mm256_setzero_ps(), each = _mm256_set1_ps(h[r]);
                    float *to = gradient + r * SLICE;
                    const float *with = factor + r * SLICE;
                    for (int64_t i = 0; i < SLICE; i += 8) {
                        __m256 v = _mm256_loadu_ps(d + i);
                        total = _mm256_fmadd_ps(v, _mm256_loadu_ps(with + i), total);
                        _mm256_storeu_ps(to + i, _mm256_fmadd_ps(v, each, _mm256_loadu_ps(to + i)));
                    }
                    p->dh[(slice * p->rows + row) * p->rank + r] = total_of(total);
                }
            }
            for (int64_t i = 0; i < count; i++)
                for (int64_t r = 0; r < p->rank; r++)
                    p->db[(first + i) * p->rank + r] += gradient[r * SLICE + i];
        }
        free(factor);
    }
}
