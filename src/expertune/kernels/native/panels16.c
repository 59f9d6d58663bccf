/* Panels of the GEMMs in bfloat16: tokens are rounded and weights dequantized into tiles of 16 x 32 numbers. */
#include "grouped_gemm16.h"

#ifndef WITHOUT_AVX512

#define AHEAD 12 /* rows of W that bytes are brought nearer before their use */

/* ---- x ----------------------------------------------------------------------------------------------------------- */

/* 32 numbers of a row of x from k on, rounded; zeros beyond `depth`, and where there is no row. */
AVX512 INLINE __m512i rounded(const float *from, int64_t k, int64_t depth)
{
    if (from == NULL || k >= depth)
        return _mm512_setzero_si512();
    if (k + DEPTH <= depth)
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + k + 16), _mm512_loadu_ps(from + k));
    int64_t left = depth - k;
    __mmask16 low = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    __mmask16 high = left <= 16 ? 0 : (__mmask16)((1u << (left - 16)) - 1);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, from + k + 16), _mm512_maskz_loadu_ps(low, from + k));
}

AVX512 void pack_x(const Product *p, int64_t row, int64_t rows, int64_t steps, int paired, Bfloat *to)
{
    for (int64_t first = 0; first < rows; first += TILE) {
        const float *from[TILE];
        for (int i = 0; i < TILE; i++) {
            int64_t at = row + first + i;
            from[i] = first + i < rows ? p->x + (p->index == NULL ? at : p->index[at]) * p->x_stride : NULL;
        }
        for (int64_t step = 0; step < steps; step++, to += TILE_SIZE) {
            __m512i v[16];
            for (int i = 0; i < TILE; i++)
                v[i] = rounded(from[i], step * DEPTH, p->depth);
            if (paired)
                transpose(v);
            for (int i = 0; i < TILE; i++)
                _mm512_store_si512(to + i * DEPTH, v[i]);
        }
    }
}

/* ---- W ----------------------------------------------------------------------------------------------------------- */

/* How the bytes of 32 weights become indices: which byte goes to which lane of 16 bits, and its shift there. */
typedef struct {
    __m512i byte, shift;
    __m512 values;
} Decoder;

/* In order; and `paired`: weights 4j .. 4j + 3 and 16 + 4j .. 16 + 4j + 3 share the j-th lane of 128 bits, so that
   unpacking two rows gives the pairs of 16 columns. */
static const uint8_t byte_of_weight[2][64] __attribute__((aligned(64))) = {
    {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7,
     8, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 10, 11, 11, 11, 11, 12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15, 15, 15},
    {0, 0, 0, 0, 1, 1, 1, 1, 8, 8, 8, 8, 9, 9, 9, 9, 2, 2, 2, 2, 3, 3, 3, 3, 10, 10, 10, 10, 11, 11, 11, 11,
     4, 4, 4, 4, 5, 5, 5, 5, 12, 12, 12, 12, 13, 13, 13, 13, 6, 6, 6, 6, 7, 7, 7, 7, 14, 14, 14, 14, 15, 15, 15, 15},
};

AVX512 INLINE Decoder decoder(const Nf4 *w, int paired)
{
    /* The first weight of a byte is its high half. */
    return (Decoder){_mm512_load_si512(byte_of_weight[paired]), _mm512_set1_epi32(4), _mm512_loadu_ps(w->values)};
}

/* The 16 values of a code, scaled and rounded; twice, so that an index's fifth bit does not matter. */
AVX512 INLINE __m512i table_of(Decoder d, float scale)
{
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(d.values, _mm512_set1_ps(scale))));
}

/* 16 packed bytes -> their 32 weights; of an index, vpermw reads the five lowest bits. */
AVX512 INLINE __m512i weights_of(Decoder d, const uint8_t *packed, __m512i table)
{
    __m512i bytes = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)packed));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(_mm512_permutexvar_epi8(d.byte, bytes), d.shift), table);
}

/* The 64 weights of a block; brings nearer what lies `ahead` blocks behind it. */
AVX512 INLINE void weights_of_block(const Matrix *m, int kind, const Decoder *d, int64_t block, int64_t ahead, __m512i out[2])
{
    const uint8_t *packed = m->packed + block * BLOCK_BYTES;
    _mm_prefetch((const char *)(packed + ahead * BLOCK_BYTES), _MM_HINT_T0);
    _mm_prefetch(kind == PLAIN_ABSMAX ? (const char *)(m->absmax + block + ahead)
                                      : (const char *)(m->codes + (block + ahead) * (kind == HALVES ? 2 : 1)), _MM_HINT_T0);
    __m512i table = table_of(*d, scale_in(m, kind, block, 0));
    out[0] = weights_of(*d, packed, table);
    if (kind == HALVES)
        table = table_of(*d, scale_in(m, kind, block, 1));
    out[1] = weights_of(*d, packed + 16, table);
}

AVX512 INLINE void dequantize_rows(
    int kind, const Nf4 *w, int64_t first_matrix, int64_t row, int64_t count, int64_t end, int64_t k, int64_t depth, Bfloat *to)
{
    const Decoder d = decoder(w, 0);
    const int64_t per_row = w->columns / BLOCK, steps = depth / DEPTH, rows = w->rows;
    int64_t index = first_matrix + row / rows, local = row % rows, here = end - row < count ? end - row : count;
    Matrix m = matrix_of(w, kind, index);
    for (int64_t i = 0; i < here; i++, local++) {
        Bfloat *out = to + (i / TILE * steps * TILE + i % TILE) * DEPTH;
        if (local == rows)
            m = matrix_of(w, kind, ++index), local = 0;
        int64_t block = local * per_row + k / BLOCK, last = block + depth / BLOCK;
        for (; block < last; block++, out += 2 * TILE_SIZE) {
            __m512i v[2];
            weights_of_block(&m, kind, &d, block, AHEAD / 4 * per_row, v);
            _mm512_store_si512(out, v[0]);
            _mm512_store_si512(out + TILE_SIZE, v[1]);
        }
    }
    for (int64_t i = here; i < count; i++)
        for (int64_t step = 0; step < steps; step++)
            _mm512_store_si512(to + ((i / TILE * steps + step) * TILE + i % TILE) * DEPTH, _mm512_setzero_si512());
}

AVX512 INLINE void dequantize_columns(
    int kind, const Nf4 *w, int64_t first_matrix, int64_t k, int64_t end, int64_t depth, int64_t column, int64_t width,
    Bfloat *to)
{
    const Decoder d = decoder(w, 1);
    const int64_t per_row = w->columns / BLOCK, steps = depth / DEPTH, rows = w->rows;
    int64_t index = first_matrix + k / rows, local = k % rows;
    Matrix m = matrix_of(w, kind, index);
    for (int64_t row = 0; row < depth; row += 2) {
        Bfloat *out = to + (row / DEPTH * TILE + row % DEPTH / 2) * DEPTH;
        int64_t first = local * per_row + column / BLOCK, second = first + per_row;
        Matrix next = m;
        if (local + 1 == rows && k + row + 1 < end)
            next = matrix_of(w, kind, ++index), second = column / BLOCK, local = -1;
        for (int64_t block = 0; block < width / BLOCK; block++, out += BLOCK / TILE * steps * TILE_SIZE) {
            __m512i a[2], b[2];
            a[0] = a[1] = b[0] = b[1] = _mm512_setzero_si512();
            if (k + row < end)
                weights_of_block(&m, kind, &d, first + block, AHEAD * per_row, a);
            if (k + row + 1 < end)
                weights_of_block(&next, kind, &d, second + block, AHEAD * per_row, b);
            for (int half = 0; half < 2; half++) {
                Bfloat *tile = out + 2 * half * steps * TILE_SIZE;
                _mm512_store_si512(tile, _mm512_unpacklo_epi16(a[half], b[half]));
                _mm512_store_si512(tile + steps * TILE_SIZE, _mm512_unpackhi_epi16(a[half], b[half]));
            }
        }
        m = next, local += 2;
        if (local == rows && k + row + 2 < end)
            m = matrix_of(w, kind, ++index), local = 0;
    }
}

AVX512 INLINE void dequantize_as(
    int kind, const Product *p, int64_t e, int64_t n, int64_t width, int64_t end, int64_t k, int64_t depth, Bfloat *to)
{
    if (p->transposed)
        dequantize_rows(kind, p->nf4, e * p->parts, n, width, end, k, depth, to);
    else
        dequantize_columns(kind, p->nf4, e * p->parts, k, p->depth, depth, n, width, to);
}

/* ---- W that is bfloat16 itself ------------------------------------------------------------------------------------- */

#define NEAR 8 /* rows that are brought nearer before their use */

/* Which of 32 numbers from `at` on lie before `end`. */
INLINE __mmask32 before(int64_t at, int64_t end)
{
    return at + DEPTH <= end ? 0xffffffffu : at >= end ? 0 : (1u << (end - at)) - 1;
}

AVX512 static void copy_rows(
    const Bfloat *w, int64_t stride, int64_t row, int64_t count, int64_t end, int64_t k, int64_t depth, int64_t k_end,
    Bfloat *to)
{
    const int64_t steps = depth / DEPTH;
    for (int64_t i = 0; i < count; i++)
        for (int64_t step = 0; step < steps; step++) {
            const Bfloat *from = w + (row + i) * stride + k + step * DEPTH;
            _mm_prefetch((const char *)(from + NEAR * stride), _MM_HINT_T0);
            __mmask32 here = row + i < end ? before(k + step * DEPTH, k_end) : 0;
            _mm512_store_si512(to + ((i / TILE * steps + step) * TILE + i % TILE) * DEPTH, _mm512_maskz_loadu_epi16(here, from));
        }
}

AVX512 static void copy_columns(
    const Bfloat *w, int64_t stride, int64_t k, int64_t depth, int64_t k_end, int64_t column, int64_t width, int64_t end,
    Bfloat *to)
{
    uint16_t order[2][DEPTH];
    for (int i = 0; i < DEPTH; i++)
        order[0][i] = (uint16_t)(i / 2 + i % 2 * DEPTH), order[1][i] = (uint16_t)(order[0][i] + PAIRS);
    const __m512i low = _mm512_loadu_si512(order[0]), high = _mm512_loadu_si512(order[1]);
    const int64_t steps = depth / DEPTH;
    for (int64_t row = 0; row < depth; row += 2)
        for (int64_t at = 0; at < width; at += DEPTH) {
            const Bfloat *from = w + (k + row) * stride + column + at;
            _mm_prefetch((const char *)(from + NEAR * stride), _MM_HINT_T0);
            _mm_prefetch((const char *)(from + (NEAR + 1) * stride), _MM_HINT_T0);
            __mmask32 here = before(column + at, end);
            __m512i a = _mm512_maskz_loadu_epi16(k + row < k_end ? here : 0, from);
            __m512i b = _mm512_maskz_loadu_epi16(k + row + 1 < k_end ? here : 0, from + stride);
            Bfloat *tile = to + (at / TILE * steps * TILE + row / DEPTH * TILE + row % DEPTH / 2) * DEPTH;
            _mm512_store_si512(tile, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(tile + steps * TILE_SIZE, _mm512_permutex2var_epi16(a, high, b));
        }
}

AVX512 void dequantize_panel(
    const Product *p, int64_t e, int64_t n, int64_t width, int64_t end, int64_t k, int64_t depth, Bfloat *to)
{
    const Bfloat *dense = (const Bfloat *)p->dense + e * p->dense_expert_stride;
    if (p->kind == BFLOAT_WEIGHT && p->transposed)
        copy_rows(dense, p->dense_stride, n, width, end, k, depth, p->depth, to);
    else if (p->kind == BFLOAT_WEIGHT)
        copy_columns(dense, p->dense_stride, k, depth, p->depth, n, width, end, to);
    else
        BY_KIND(p->nf4, dequantize_as, p, e, n, width, end, k, depth, to)
}
#endif
