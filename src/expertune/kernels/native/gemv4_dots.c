/* The inner loop of products of few tokens by AVX-512, and the choice between it and those of gemv4_avx2.c. */
#include "gemv4.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define AHEAD 2048        /* bytes of W that are brought nearer before their use */

#ifndef WITHOUT_AVX512
/* ---- AVX-512: two blocks at a time ---------------------------------------------------------------------------------- */

/* vpermw looks up lanes of 16 bits by their lowest five, of which the table's second half ignores one: the four codes of a
   lane are looked up where they lie, the lane shifted by 0, 4, 8 and 12 bits. */
static void place_avx512(
    const __m256i numbers[GROUP / 8], const __m256i rests[GROUP / 8], int halves, QuantizedToken to, int64_t k)
{
    static const uint8_t weight[4] = {1, 0, 3, 2};
    int32_t all[GROUP];
    for (int i = 0; i < GROUP / 8; i++)
        _mm256_storeu_si256((__m256i *)(all + 8 * i), numbers[i]);
    for (int i = 0; i < GROUP; i++)
        to.numbers[k + i] = (int16_t)all[i % 32 * 4 + weight[i / 32]];
    (void)rests, (void)halves;
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
        __m512 sum[AVX512_TOGETHER];
        for (int i = 0; i < num_x; i++)
            sum[i] = _mm512_setzero_ps();
        for (int64_t at = 0; at < scales; at += 16) {
            const int64_t left = scales - at;
            const __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
            const __m512 own = scales_of(kind, w, matrix, (first + j) * scales + at, there);
            __m512 factor[AVX512_TOGETHER];
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

static const InstructionSet avx2 = {dots_avx2, place_avx2, 16383.0f, AVX2_TOGETHER, 0};
static const InstructionSet avx2_fine = {dots_avx2_fine, place_avx2_fine, 16128.0f, AVX2_TOGETHER, 1};
#ifndef WITHOUT_AVX512
static const InstructionSet avx512 = {dots_avx512, place_avx512, 16383.0f, AVX512_TOGETHER, 0};
#endif

const InstructionSet *instruction_set(int without_avx512, int fine)
{
    if (fine)
        return &avx2_fine;
#ifndef WITHOUT_AVX512
    __builtin_cpu_init();
    if (!without_avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return &avx512;
#endif
    (void)without_avx512;
    return &avx2;
}
