/* Panels of the GEMMs in float32: tokens, weights that are dequantized, and dense factors, as the kernel reads them. */
#include <pthread.h>

#include "panels.h"

static _Thread_local float *scratch = NULL;
static pthread_key_t at_end_of_thread;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_key(void)
{
    if (pthread_key_create(&at_end_of_thread, free) != 0)
        abort();
}

float *panels(void)
{
    if (scratch == NULL) {
        if (posix_memalign((void **)&scratch, 64, sizeof(float) * (MC + MR + STRIPE) * KC) != 0)
            abort();
        pthread_once(&once, make_key);
        pthread_setspecific(at_end_of_thread, scratch);
    }
    return scratch;
}

/* ---- x ------------------------------------------------------------------------------------------------------- */

void pack_rows(
    float *to, const float *x, int64_t stride, const int64_t *index, int64_t row, int64_t rows, int64_t k, int64_t depth)
{
    for (int64_t first = 0; first < rows; first += MR, to += MR * depth) {
        for (int i = 0; i < MR; i++) {
            if (first + i >= rows) {
                for (int64_t d = 0; d < depth; d++)
                    to[d * MR + i] = 0.0f;
                continue;
            }
            int64_t source = index == NULL ? row + first + i : index[row + first + i];
            const float *from = x + source * stride + k;
            for (int64_t d = 0; d < depth; d++)
                to[d * MR + i] = from[d];
        }
    }
}

void pack_transposed(float *to, const float *u, int64_t stride, int64_t row, int64_t depth, int64_t column, int64_t width)
{
    for (int64_t first = 0; first < width; first += MR, to += MR * depth) {
        int64_t count = width - first < MR ? width - first : MR;
        for (int64_t d = 0; d < depth; d++) {
            const float *from = u + (row + d) * stride + column + first;
            for (int i = 0; i < MR; i++)
                to[d * MR + i] = i < count ? from[i] : 0.0f;
        }
    }
}

/* ---- B ------------------------------------------------------------------------------------------------------- */

/* Bytes of 16 rows -> 16 vectors that hold one byte of each row: four perfect shuffles. */
INLINE void transpose_bytes(__m128i v[16])
{
    for (int round = 0; round < 4; round++) {
        __m128i out[16];
        for (int i = 0; i < 8; i++) {
            out[2 * i] = _mm_unpacklo_epi8(v[i], v[i + 8]);
            out[2 * i + 1] = _mm_unpackhi_epi8(v[i], v[i + 8]);
        }
        for (int i = 0; i < 16; i++)
            v[i] = out[i];
    }
}

void pack_nf4_rows(float *to, const Nf4 *w, int64_t first_matrix, int64_t row, int64_t end, int64_t k, int64_t depth)
{
    const uint8_t *from[NR];
    int64_t matrix[NR], local[NR];
    int64_t blocks = w->columns / BLOCK;
    for (int i = 0; i < NR; i++) {
        int64_t at = row + i < end ? row + i : end - 1;
        matrix[i] = first_matrix + at / w->rows;
        local[i] = at % w->rows;
        from[i] = w->packed + (matrix[i] * w->rows + local[i]) * (w->columns / 2);
    }
    const __m128i low_half = _mm_set1_epi8(15);
    const __m256 table_low = _mm256_loadu_ps(w->values), table_high = _mm256_loadu_ps(w->values + 8);
    for (int64_t block = k / BLOCK; block < (k + depth) / BLOCK; block++) {
        float scales[NR];
        __m256 scale_low, scale_high;
        for (int half = 0; half < 2; half++) {
            if (half == 0 || w->halves) {
                for (int i = 0; i < NR; i++)
                    scales[i] = row + i < end ? scale_of(w, matrix[i], local[i] * blocks + block, half) : 0.0f;
                scale_low = _mm256_loadu_ps(scales), scale_high = _mm256_loadu_ps(scales + 8);
            }
            __m128i v[16];
            for (int i = 0; i < NR; i++) {
                const uint8_t *packed = from[i] + block * BLOCK_BYTES + 16 * half;
                v[i] = _mm_loadu_si128((const __m128i *)packed);
                if (half == 0 && block % 2 == 0)   /* of the next panel: a row's part is too short to be seen coming */
                    _mm_prefetch((const char *)packed + NR * blocks * BLOCK_BYTES, _MM_HINT_T0);
            }
            transpose_bytes(v);
            for (int j = 0; j < 16; j++, to += 2 * NR) {
                __m128i first = _mm_and_si128(_mm_srli_epi16(v[j], 4), low_half);
                __m128i second = _mm_and_si128(v[j], low_half);
                __m256 a = look_up(_mm256_cvtepu8_epi32(first), table_low, table_high);
                __m256 b = look_up(_mm256_cvtepu8_epi32(_mm_srli_si128(first, 8)), table_low, table_high);
                __m256 c = look_up(_mm256_cvtepu8_epi32(second), table_low, table_high);
                __m256 d = look_up(_mm256_cvtepu8_epi32(_mm_srli_si128(second, 8)), table_low, table_high);
                _mm256_store_ps(to, _mm256_mul_ps(a, scale_low));
                _mm256_store_ps(to + 8, _mm256_mul_ps(b, scale_high));
                _mm256_store_ps(to + 16, _mm256_mul_ps(c, scale_low));
                _mm256_store_ps(to + 24, _mm256_mul_ps(d, scale_high));
            }
        }
    }
}

void pack_nf4_columns(float *to, const Nf4 *w, int64_t first_matrix, int64_t k, int64_t depth, int64_t column)
{
    int64_t blocks = w->columns / BLOCK;
    for (int64_t d = 0; d < depth; d++) {
        int64_t matrix = first_matrix + (k + d) / w->rows, row = (k + d) % w->rows;
        int64_t block = row * blocks + column / BLOCK;
        const uint8_t *from = w->packed + matrix * w->rows * (w->columns / 2) + block * BLOCK_BYTES;
        dequantize_block_float(w, matrix, block, from, to + d * NR, KC * NR);
    }
}

INLINE float dense_at(const void *b, int kind, int64_t at)
{
    if (kind == FLOAT_WEIGHT)
        return ((const float *)b)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)b)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void pack_rows_of(
    float *to, const void *b, int kind, int64_t stride, int64_t row, int64_t end, int64_t k, int64_t depth)
{
    for (int i = 0; i < NR; i++)
        for (int64_t d = 0; d < depth; d++)
            to[d * NR + i] = row + i < end ? dense_at(b, kind, (row + i) * stride + k + d) : 0.0f;
}

void pack_dense_rows(
    float *to, const void *b, int kind, int64_t stride, int64_t row, int64_t end, int64_t k, int64_t depth)
{
    if (kind == FLOAT_WEIGHT)
        pack_rows_of(to, b, FLOAT_WEIGHT, stride, row, end, k, depth);
    else
        pack_rows_of(to, b, BFLOAT_WEIGHT, stride, row, end, k, depth);
}

void pack_dense_columns(
    float *to, const void *b, int kind, int64_t stride, const int64_t *index, int64_t column, int64_t end, int64_t k,
    int64_t depth)
{
    const int64_t count = end - column < NR ? end - column : NR;
    for (int64_t d = 0; d < depth; d++, to += NR) {
        int64_t at = (index == NULL ? k + d : index[k + d]) * stride + column;
        if (kind == FLOAT_WEIGHT && count == NR)
            memcpy(to, (const float *)b + at, sizeof(float) * NR);
        else if (kind == FLOAT_WEIGHT && count == NR / 2) { /* rank 8 */
            memcpy(to, (const float *)b + at, sizeof(float) * NR / 2);
            memset(to + NR / 2, 0, sizeof(float) * NR / 2);
        } else
            for (int64_t i = 0; i < NR; i++)
                to[i] = i < count ? dense_at(b, kind, at + i) : 0.0f;
    }
}
