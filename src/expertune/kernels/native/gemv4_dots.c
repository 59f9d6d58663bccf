/* The inner loops of products of few tokens: rows of packed codes times tokens as integers, by AVX2 and by AVX-512. */
#include "gemv4.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define AHEAD 2048        /* bytes of W that are brought nearer before their use */

/* ---- AVX2: a block of 64 weights at a time ------------------------------------------------------------------------- */

/* Codes of 8 bits are looked up twice, for either byte of their value, and unpacked; the low halves of bytes come first. */
static void order_avx2(uint8_t order[GROUP])
{
    for (int i = 0; i < GROUP; i++) {
        int block = i / BLOCK, vector = i % BLOCK / 16, lane = i % 16 / 8, place = i % 8;
        int byte = 16 * lane + 8 * (vector % 2) + place;
        order[i] = (uint8_t)(block * BLOCK + 2 * byte + (vector < 2));
    }
}

/* Scales of up to 8 blocks of a matrix from number `at` on; of MXFP4 two to a block. */
INLINE void scales_avx2(int kind, const Matrix *m, int64_t at, int64_t blocks, float *to)
{
    if (kind == PLAIN_ABSMAX)
        memcpy(to, m->absmax + at, sizeof(float) * (size_t)blocks);
    else if (kind == HALVES)
        for (int64_t i = 0; i < 2 * blocks; i++)
            to[i] = power_of_two(m->codes[2 * at + i]);
    else if (at / NESTED_BLOCK == (at + 7) / NESTED_BLOCK && blocks == 8) {
        const uint8_t *codes = m->codes + at;
        for (int64_t i = 0; i < 8; i++)
            to[i] = m->codebook[codes[i]];
        __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(to), _mm256_set1_ps(m->nested[at / NESTED_BLOCK]));
        _mm256_storeu_ps(to, _mm256_add_ps(scaled, _mm256_set1_ps(m->offset)));
    } else
        for (int64_t i = 0; i < blocks; i++)
            to[i] = scale_in(m, kind, at + i, 0);
}

/* 32 codes twice looked up, for either byte of their value: 16 of them to a vector. */
INLINE void look_up_16(__m256i low, __m256i high, __m256i odd, __m256i even, __m256i weights[4])
{
    __m256i odd_low = _mm256_shuffle_epi8(low, odd), odd_high = _mm256_shuffle_epi8(high, odd);
    __m256i even_low = _mm256_shuffle_epi8(low, even), even_high = _mm256_shuffle_epi8(high, even);
    weights[0] = _mm256_unpacklo_epi8(odd_low, odd_high), weights[1] = _mm256_unpackhi_epi8(odd_low, odd_high);
    weights[2] = _mm256_unpacklo_epi8(even_low, even_high), weights[3] = _mm256_unpackhi_epi8(even_low, even_high);
}

INLINE __m256i sum_of_products(const __m256i weights[4], const int16_t *numbers)
{
    const __m256i *x = (const __m256i *)numbers;
    __m256i first = _mm256_add_epi32(
        _mm256_madd_epi16(weights[0], _mm256_loadu_si256(x)), _mm256_madd_epi16(weights[1], _mm256_loadu_si256(x + 1)));
    __m256i second = _mm256_add_epi32(
        _mm256_madd_epi16(weights[2], _mm256_loadu_si256(x + 2)),
        _mm256_madd_epi16(weights[3], _mm256_loadu_si256(x + 3)));
    return _mm256_add_epi32(first, second);
}

INLINE void dots_avx2_of(
    int fine, int kind, int num_x, const Gemv *g, int64_t matrix, int64_t first, int64_t count, const QuantizedToken *x,
    const int16_t *table, float *out, int64_t stride)
{
    const Nf4 *w = g->w;
    const Matrix m = matrix_of(w, kind, matrix);
    const int64_t blocks = w->columns / BLOCK, halves = kind == HALVES ? 2 : 1;
    const __m128i low_bytes = _mm_set1_epi16(255);
    __m256i low[2], high[2];
    for (int part = 0; part <= fine; part++) {
        __m128i a = _mm_loadu_si128((const __m128i *)(table + 16 * part));
        __m128i b = _mm_loadu_si128((const __m128i *)(table + 16 * part + 8));
        low[part] = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, low_bytes), _mm_and_si128(b, low_bytes)));
        high[part] = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
    }
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256 rest_unit = _mm256_set1_ps(1.0f / REST);
    for (int64_t j = 0; j < count; j++) {
        const uint8_t *from = m.packed + (first + j) * blocks * BLOCK_BYTES;
        __m256 sum[TOGETHER];
        for (int i = 0; i < num_x; i++)
            sum[i] = _mm256_setzero_ps();
        for (int64_t at = 0; at < blocks; at += 8) {
            const int64_t here = blocks - at < 8 ? blocks - at : 8;
            float own[16], factor[TOGETHER][16];
            scales_avx2(kind, &m, (first + j) * blocks + at, here, own);
            for (int i = 0; i < num_x; i++)
                for (int half = 0; half < halves; half++) {
                    __m256 of_x = _mm256_loadu_ps(x[i].scales + at * halves + 8 * half);
                    _mm256_storeu_ps(factor[i] + 8 * half, _mm256_mul_ps(_mm256_loadu_ps(own + 8 * half), of_x));
                }
            for (int64_t n = 0; n < here; n++, from += BLOCK_BYTES) {
                _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
                const __m256i bytes = _mm256_loadu_si256((const __m256i *)from);
                const __m256i odd = _mm256_and_si256(bytes, nibble);
                const __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
                __m256i weights[4], rests[4];
                look_up_16(low[0], high[0], odd, even, weights);
                if (fine)
                    look_up_16(low[1], high[1], odd, even, rests);
                for (int i = 0; i < num_x; i++) {
                    const int64_t k = (at + n) * BLOCK;
                    __m256 total = _mm256_cvtepi32_ps(sum_of_products(weights, x[i].numbers + k));
                    if (fine) {
                        __m256i rest = _mm256_add_epi32(
                            sum_of_products(weights, x[i].rests + k), sum_of_products(rests, x[i].numbers + k));
                        total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(rest), rest_unit, total);
                    }
                    __m256 scale = _mm256_broadcast_ss(factor[i] + n * halves);
                    if (kind == HALVES)
                        scale = _mm256_insertf128_ps(scale, _mm_broadcast_ss(factor[i] + 2 * n + 1), 1);
                    sum[i] = _mm256_fmadd_ps(total, scale, sum[i]);
                }
            }
        }
        for (int i = 0; i < num_x; i++)
            out[i * stride + j] = total_of(sum[i]);
    }
}

#define OF_TOKENS_AVX2(fine, kind) \
    switch (num_x) { \
    case 1: dots_avx2_of(fine, kind, 1, g, matrix, first, count, x, table, out, stride); break; \
    case 2: dots_avx2_of(fine, kind, 2, g, matrix, first, count, x, table, out, stride); break; \
    case 3: dots_avx2_of(fine, kind, 3, g, matrix, first, count, x, table, out, stride); break; \
    default: dots_avx2_of(fine, kind, 4, g, matrix, first, count, x, table, out, stride); \
    }

#define DOTS_AVX2(name, fine) \
    static void name( \
        const Gemv *g, int64_t matrix, int64_t first, int64_t count, int num_x, const QuantizedToken *x, \
        const int16_t *table, float *out, int64_t stride) \
    { \
        if (g->w->halves) { \
            OF_TOKENS_AVX2(fine, HALVES) \
        } else if (g->w->codebook == NULL) { \
            OF_TOKENS_AVX2(fine, PLAIN_ABSMAX) \
        } else { \
            OF_TOKENS_AVX2(fine, DOUBLE_QUANTIZED) \
        } \
    }

DOTS_AVX2(dots_avx2, 0)
DOTS_AVX2(dots_avx2_fine, 1)

#ifndef WITHOUT_AVX512
/* ---- AVX-512: two blocks at a time ---------------------------------------------------------------------------------- */

/* vpermw looks up lanes of 16 bits by their lowest five, of which the table's second half ignores one: the four codes of a
   lane are looked up where they lie, the lane shifted by 0, 4, 8 and 12 bits. */
static void order_avx512(uint8_t order[GROUP])
{
    static const uint8_t weight[4] = {1, 0, 3, 2};
    for (int i = 0; i < GROUP; i++)
        order[i] = (uint8_t)(i % 32 * 4 + weight[i / 32]);
}

/* Scales of 16 blocks (of MXFP4: halves) from number `at` of a matrix on; zeros where the mask has none. */
AVX512 INLINE __m512 scales_of(int kind, const Nf4 *w, int64_t matrix, int64_t at, __mmask16 there)
{
    const int64_t first = matrix * (w->rows * w->columns / BLOCK);
    if (kind == PLAIN_ABSMAX)
        return _mm512_maskz_loadu_ps(there, (const float *)w->absmax + first + at);
    const uint8_t *codes = (const uint8_t *)w->absmax + first * (kind == HALVES ? 2 : 1) + at;
    __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, codes));
    if (kind == HALVES) {
        __m512i bits = _mm512_slli_epi32(code, 23);
        bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(code, code), _mm512_set1_epi32(0x00400000));
        return _mm512_maskz_mov_ps(there, _mm512_castsi512_ps(bits));
    }
    const float *nested = w->nested + matrix * w->nested_stride;
    __m512 value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, code, w->codebook, 4);
    __m512 outer;
    if (at / NESTED_BLOCK == (at + 15) / NESTED_BLOCK)
        outer = _mm512_set1_ps(nested[at / NESTED_BLOCK]);
    else {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512i number = _mm512_srli_epi32(_mm512_add_epi32(_mm512_set1_epi32((int)(at % NESTED_BLOCK)), lanes), 8);
        outer = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, number, nested + at / NESTED_BLOCK, 4);
    }
    __m512 scaled = _mm512_mul_ps(value, outer);
    return _mm512_maskz_add_ps(there, scaled, _mm512_set1_ps(w->offset[matrix]));
}

AVX512 INLINE void dots_avx512_of(
    int kind, int num_x, const Gemv *g, int64_t matrix, int64_t first, int64_t count, const QuantizedToken *x,
    const int16_t *table, float *out, int64_t stride)
{
    const Nf4 *w = g->w;
    /* A lane of 32 bits has sums of 8 weights: 8 lanes to a block, 4 to a half of one. */
    const int64_t halves = kind == HALVES ? 2 : 1, blocks = w->columns / BLOCK, scales = blocks * halves;
    const int per_group = (int)(2 * halves), groups = 16 / per_group;
    const __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table));
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i spread = _mm512_srli_epi32(lanes, kind == HALVES ? 2 : 3), next = _mm512_set1_epi32(per_group);
    for (int64_t j = 0; j < count; j++) {
        const uint8_t *from = w->packed + (matrix * w->rows + first + j) * blocks * BLOCK_BYTES;
        __m512 sum[TOGETHER];
        for (int i = 0; i < num_x; i++)
            sum[i] = _mm512_setzero_ps();
        for (int64_t at = 0; at < scales; at += 16) {
            const int64_t left = scales - at;
            const __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
            const __m512 own = scales_of(kind, w, matrix, (first + j) * scales + at, there);
            __m512 factor[TOGETHER];
            for (int i = 0; i < num_x; i++)
                factor[i] = _mm512_mul_ps(own, _mm512_loadu_ps(x[i].scales + at));
            const int here = left >= 16 ? groups : (int)((left + per_group - 1) / per_group);
            __m512i lane = spread;
            for (int n = 0; n < here; n++, from += 2 * BLOCK_BYTES, lane = _mm512_add_epi32(lane, next)) {
                _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
                /* Of a last group that is one block, only that is there. */
                const int64_t group = at / per_group + n;
                __m512i bytes =
                    2 * group + 1 < blocks ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi64(0x0f, from);
                __m512i weights[4] = {
                    _mm512_permutexvar_epi16(bytes, values),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), values),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 8), values),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 12), values)};
                for (int i = 0; i < num_x; i++) {
                    const int16_t *numbers = x[i].numbers + group * GROUP;
                    __m512i total = _mm512_setzero_si512();
                    for (int v = 0; v < 4; v++)
                        total = _mm512_dpwssd_epi32(total, weights[v], _mm512_loadu_si512(numbers + 32 * v));
                    sum[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_permutexvar_ps(lane, factor[i]), sum[i]);
                }
            }
        }
        for (int i = 0; i < num_x; i++)
            out[i * stride + j] = _mm512_reduce_add_ps(sum[i]);
    }
}

#define OF_TOKENS(kind) \
    switch (num_x) { \
    case 1: dots_avx512_of(kind, 1, g, matrix, first, count, x, table, out, stride); break; \
    case 2: dots_avx512_of(kind, 2, g, matrix, first, count, x, table, out, stride); break; \
    case 3: dots_avx512_of(kind, 3, g, matrix, first, count, x, table, out, stride); break; \
    default: dots_avx512_of(kind, 4, g, matrix, first, count, x, table, out, stride); \
    }

AVX512 static void dots_avx512(
    const Gemv *g, int64_t matrix, int64_t first, int64_t count, int num_x, const QuantizedToken *x, const int16_t *table,
    float *out, int64_t stride)
{
    if (g->w->halves) {
        OF_TOKENS(HALVES)
    } else if (g->w->codebook == NULL) {
        OF_TOKENS(PLAIN_ABSMAX)
    } else {
        OF_TOKENS(DOUBLE_QUANTIZED)
    }
}

#endif

/* ---- choice -------------------------------------------------------------------------------------------------------- */

static InstructionSet sets[3];

/* Before the library is in use, and so before two threads may ask. */
__attribute__((constructor)) static void lay_out(void)
{
    sets[0].dots = dots_avx2;
    order_avx2(sets[0].order);
    sets[2].dots = dots_avx2_fine, sets[2].fine = 1;
    order_avx2(sets[2].order);
#ifndef WITHOUT_AVX512
    sets[1].dots = dots_avx512;
    order_avx512(sets[1].order);
#endif
}

const InstructionSet *instruction_set(int without_avx512, int fine)
{
    if (fine)
        return &sets[2];
#ifndef WITHOUT_AVX512
    __builtin_cpu_init();
    if (!without_avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return &sets[1];
#endif
    (void)without_avx512;
    return &sets[0];
}
