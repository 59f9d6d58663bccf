/* Products of few tokens with 4-bit matrices: a decoding step, which is as fast as the packed bytes are read.

   A code's value and the token are integers of 16 bits here: the values of the codebook are scaled so that the largest is
   16384, each block of 64 numbers of x so that its largest is 16383. Codes are looked up as they lie in the bytes, x is
   laid out to match once for all matrices, and a block is summed in integers, exactly; float32 are the blocks' scales and
   what they are summed in. So weights keep 15 bits below the largest of the codebook, and x below the largest of its
   block: more than bfloat16 has. Each output is summed by one thread in one order, whatever the number of threads. */
#include "sigmoid.h"

#include <math.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

#define GROUP 128         /* numbers of x that are laid out together: two blocks */
#define ITEM 32           /* output features that a thread takes at once */
#define TOGETHER 4        /* tokens that share what was looked up */
#define MOST_ROUTED 256   /* routed tokens of a call */
#define AHEAD 2048        /* bytes of W that are brought nearer before their use */
#define SMALL (1 << 16)   /* packed bytes that one thread reads sooner than a second one wakes up */

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* One low-rank update of one part: y += scaling * B @ (A @ x). */
typedef struct {
    const float *a, *b;        /* of each slot [rank, columns] and [rows, rank] */
    const int64_t *slots;      /* which matrices are each expert's, negative for none; NULL: those of its number */
    int64_t rank, part;
    float scaling;
} LowRank;

/* A product of routed tokens with the matrices of their experts. */
typedef struct {
    const Nf4 *w;              /* `parts` matrices for each expert */
    const void *x;             /* rows of as many numbers as w has columns */
    void *y;
    const int64_t *experts;    /* of each routed token; NULL: the first one's */
    const float *weights;      /* of each routed token: `top_k` of them are weighted and summed; NULL: none are */
    const float *bias;         /* [experts, parts * rows], or NULL */
    const LowRank *updates;
    float *scratch;            /* see scratch_floats of gemv.py */
    int64_t x_stride, y_stride;
    int64_t routed;
    int64_t sharing;           /* routed tokens that read the same row of x, one behind the other */
    int64_t top_k;
    int32_t x_kind, y_kind, parts, num_updates;
    int32_t swiglu;            /* y = silu(part 0) * part 1 */
} Gemv;

/* A row of x: as float32; as integers in the order in which codes are looked up; and the scales of their blocks. */
typedef struct {
    float *values;
    int16_t *numbers;
    float *scales;
} Row;

/* Routed tokens by expert. */
typedef struct {
    int64_t order[MOST_ROUTED];      /* routed tokens, those of an expert side by side */
    int64_t expert[MOST_ROUTED];
    int64_t start[MOST_ROUTED + 1];  /* where each expert's begin */
    int64_t groups;
} Grouped;

/* out[i * stride + j] = <row `first + j` of a matrix, x[i]>, j < count, i < num_x <= TOGETHER. */
typedef void Dots(
    const Gemv *g, int64_t matrix, int64_t first, int64_t count, int num_x, const Row *x, const int16_t *table, float *out,
    int64_t stride);

/* How an instruction set lays out x, and its inner loop. */
typedef struct {
    Dots *dots;
    uint8_t order[GROUP];      /* which number of a group each place holds */
} Machine;

INLINE int64_t up_to(int64_t count, int64_t step)
{
    return (count + step - 1) / step * step;
}

/* ---- x ----------------------------------------------------------------------------------------------------------- */

INLINE float value_at(const void *x, int kind, int64_t at)
{
    if (kind == FLOAT32)
        return ((const float *)x)[at];
    uint16_t half = ((const uint16_t *)x)[at];
    if (kind == FLOAT16)
        return _cvtsh_ss(half);
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static Row row_of(const Gemv *g, int64_t row)
{
    int64_t wide = up_to(g->w->columns, GROUP);
    float *own = g->scratch + row * (wide + wide / 2 + up_to(wide / 32, 16));
    return (Row){own, (int16_t *)(own + wide), own + wide + wide / 2};
}

/* What 1 is as an integer: the largest power of two with which no value of the codebook exceeds 16384. */
static float unit_of(const Nf4 *w)
{
    float largest = 0.0f, unit = 16384.0f;
    for (int i = 0; i < 16; i++)
        largest = fabsf(w->values[i]) > largest ? fabsf(w->values[i]) : largest;
    while (largest * unit > 16384.0f)
        unit /= 2;
    return unit;
}

/* x's largest magnitude is 16383, so that 8 products with at most 16384 stay within 32 bits. */
static void pack_row(const Machine *machine, const Gemv *g, int64_t row)
{
    const int64_t columns = g->w->columns, wide = up_to(columns, GROUP), halves = g->w->halves ? 2 : 1;
    const Row to = row_of(g, row);
    memset(to.scales, 0, sizeof(float) * (size_t)up_to(wide / 32, 16));
    for (int64_t k = 0; k < columns; k++)
        to.values[k] = value_at(g->x, g->x_kind, row * g->x_stride + k);
    memset(to.values + columns, 0, sizeof(float) * (size_t)(wide - columns));
    const float unit = unit_of(g->w);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t k = 0; k < wide; k += GROUP) {
        int16_t numbers[GROUP];
        for (int64_t block = 0; block < GROUP; block += BLOCK) {
            const float *from = to.values + k + block;
            __m256 most = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
            for (int i = 0; i < BLOCK; i += 8) {
                __m256 v = _mm256_loadu_ps(from + i);
                most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v));
                bad = _mm256_add_ps(bad, _mm256_sub_ps(v, v));   /* 0, or NaN where a number is not finite */
            }
            float lanes[8], unlike[8], peak = 0.0f, fault = 0.0f;
            _mm256_storeu_ps(lanes, most), _mm256_storeu_ps(unlike, bad);
            for (int i = 0; i < 8; i++)
                peak = lanes[i] > peak ? lanes[i] : peak, fault += unlike[i];
            /* Below 2 ** -112 the quotient would overflow, and the sum is nothing beside any other. */
            const int counts = peak > 1.9e-34f && fault == 0.0f;
            const __m256 factor = _mm256_set1_ps(counts ? 16383.0f / peak : 0.0f);
            for (int i = 0; i < BLOCK; i += 8) {
                __m256i n = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + i), factor));
                __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
                _mm_storeu_si128((__m128i *)(numbers + block + i), packed);
            }
            const int64_t at = (k + block) / BLOCK;
            for (int64_t half = 0; half < halves; half++)
                to.scales[at * halves + half] = counts ? peak / 16383.0f / unit : fault;
        }
        for (int i = 0; i < GROUP; i++)
            to.numbers[k + i] = numbers[machine->order[i]];
    }
}

/* The 16 values of the codebook as integers. */
static void integer_table(const Nf4 *w, int16_t table[16])
{
    const float unit = unit_of(w);
    for (int i = 0; i < 16; i++)
        table[i] = (int16_t)lrintf(w->values[i] * unit);
}

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

INLINE float sum_of(__m256 v)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE void dots_avx2_of(
    int num_x, const Gemv *g, int64_t matrix, int64_t first, int64_t count, const Row *x, const int16_t *table, float *out,
    int64_t stride)
{
    const Nf4 *w = g->w;
    const int64_t blocks = w->columns / BLOCK, halves = w->halves ? 2 : 1;
    const __m128i low_bytes = _mm_set1_epi16(255);
    __m128i a = _mm_loadu_si128((const __m128i *)table), b = _mm_loadu_si128((const __m128i *)(table + 8));
    const __m256i low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, low_bytes), _mm_and_si128(b, low_bytes)));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int64_t j = 0; j < count; j++) {
        const uint8_t *from = w->packed + ((matrix * w->rows + first + j) * blocks) * BLOCK_BYTES;
        __m256 sum[TOGETHER];
        for (int i = 0; i < num_x; i++)
            sum[i] = _mm256_setzero_ps();
        for (int64_t block = 0; block < blocks; block++, from += BLOCK_BYTES) {
            _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
            __m256i bytes = _mm256_loadu_si256((const __m256i *)from);
            __m256i odd = _mm256_and_si256(bytes, nibble);
            __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
            __m256i odd_low = _mm256_shuffle_epi8(low, odd), odd_high = _mm256_shuffle_epi8(high, odd);
            __m256i even_low = _mm256_shuffle_epi8(low, even), even_high = _mm256_shuffle_epi8(high, even);
            const __m256i weights[4] = {
                _mm256_unpacklo_epi8(odd_low, odd_high), _mm256_unpackhi_epi8(odd_low, odd_high),
                _mm256_unpacklo_epi8(even_low, even_high), _mm256_unpackhi_epi8(even_low, even_high)};
            float scale[2];
            for (int64_t half = 0; half < halves; half++)
                scale[half] = scale_of(w, matrix, (first + j) * blocks + block, (int)half);
            __m256 scales = _mm256_set1_ps(scale[0]);
            if (w->halves)
                scales = _mm256_insertf128_ps(scales, _mm_set1_ps(scale[1]), 1);
            for (int i = 0; i < num_x; i++) {
                const __m256i *numbers = (const __m256i *)(x[i].numbers + block * BLOCK);
                __m256i total = _mm256_madd_epi16(weights[0], _mm256_loadu_si256(numbers));
                for (int v = 1; v < 4; v++)
                    total = _mm256_add_epi32(total, _mm256_madd_epi16(weights[v], _mm256_loadu_si256(numbers + v)));
                __m256 factor = _mm256_mul_ps(scales, _mm256_set1_ps(x[i].scales[block * halves]));
                sum[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), factor, sum[i]);
            }
        }
        for (int i = 0; i < num_x; i++)
            out[i * stride + j] = sum_of(sum[i]);
    }
}

static void dots_avx2(
    const Gemv *g, int64_t matrix, int64_t first, int64_t count, int num_x, const Row *x, const int16_t *table, float *out,
    int64_t stride)
{
    switch (num_x) {
    case 1: dots_avx2_of(1, g, matrix, first, count, x, table, out, stride); break;
    case 2: dots_avx2_of(2, g, matrix, first, count, x, table, out, stride); break;
    case 3: dots_avx2_of(3, g, matrix, first, count, x, table, out, stride); break;
    default: dots_avx2_of(4, g, matrix, first, count, x, table, out, stride);
    }
}

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
    int kind, int num_x, const Gemv *g, int64_t matrix, int64_t first, int64_t count, const Row *x, const int16_t *table,
    float *out, int64_t stride)
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
                __m512i bytes = 2 * group + 1 < blocks
                    ? _mm512_loadu_si512(from) : _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)from));
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
    const Gemv *g, int64_t matrix, int64_t first, int64_t count, int num_x, const Row *x, const int16_t *table, float *out,
    int64_t stride)
{
    if (g->w->halves) {
        OF_TOKENS(HALVES)
    } else if (g->w->codebook == NULL) {
        OF_TOKENS(PLAIN_ABSMAX)
    } else {
        OF_TOKENS(DOUBLE_QUANTIZED)
    }
}

/* ---- low-rank updates ----------------------------------------------------------------------------------------------- */

INLINE float dot(const float *a, const float *b, int64_t count)
{
    __m256 sum = _mm256_setzero_ps(), more = sum;
    int64_t k = 0;
    for (; k + 16 <= count; k += 16) {
        sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + k), _mm256_loadu_ps(b + k), sum);
        more = _mm256_fmadd_ps(_mm256_loadu_ps(a + k + 8), _mm256_loadu_ps(b + k + 8), more);
    }
    if (k + 8 <= count) {
        sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + k), _mm256_loadu_ps(b + k), sum);
        k += 8;
    }
    float total = sum_of(_mm256_add_ps(sum, more));
    for (; k < count; k++)
        total += a[k] * b[k];
    return total;
}

INLINE int64_t slot_of_expert(const LowRank *u, int64_t e)
{
    return u->slots == NULL ? e : u->slots[e];
}

INLINE int64_t expert_of(const Gemv *g, int64_t routed)
{
    return g->experts == NULL ? 0 : g->experts[routed];
}

/* Where A @ x of each update lies: behind the rows of x, [updates][routed][rank]. */
static float *low_rank_sums(const Gemv *g, int update)
{
    float *own = row_of(g, g->routed / g->sharing).values;
    for (int u = 0; u < update; u++)
        own += g->routed * g->updates[u].rank;
    return own;
}

static void project(const Gemv *g, int update, int64_t routed)
{
    const LowRank *u = g->updates + update;
    int64_t slot = slot_of_expert(u, expert_of(g, routed));
    if (slot < 0)
        return;
    const float *x = row_of(g, routed / g->sharing).values, *a = u->a + slot * u->rank * g->w->columns;
    float *to = low_rank_sums(g, update) + routed * u->rank;
    for (int64_t r = 0; r < u->rank; r++)
        to[r] = u->scaling * dot(a + r * g->w->columns, x, g->w->columns);
}

/* ---- an item: some output features of all experts ------------------------------------------------------------------- */

/* What is added to W @ x: the bias, and the updates. */
static void add(const Gemv *g, int64_t part, int64_t e, int64_t routed, int64_t n, int64_t count, float *y)
{
    const int64_t rows = g->w->rows;
    if (g->bias != NULL)
        for (int64_t j = 0; j < count; j++)
            y[j] += g->bias[(e * g->parts + part) * rows + n + j];
    for (int i = 0; i < g->num_updates; i++) {
        const LowRank *u = g->updates + i;
        int64_t slot = slot_of_expert(u, e);
        if (u->part != part || slot < 0)
            continue;
        const float *h = low_rank_sums(g, i) + routed * u->rank, *b = u->b + (slot * rows + n) * u->rank;
        for (int64_t j = 0; j < count; j++)
            y[j] += dot(b + j * u->rank, h, u->rank);
    }
}

static void store(const Gemv *g, int64_t row, int64_t n, int64_t count, const float *from)
{
    for (int64_t j = 0; j < count; j++) {
        const int64_t at = row * g->y_stride + n + j;
        if (g->y_kind == FLOAT32)
            ((float *)g->y)[at] = from[j];
        else if (g->y_kind == FLOAT16)
            ((uint16_t *)g->y)[at] = _cvtss_sh(from[j], _MM_FROUND_TO_NEAREST_INT);
        else {
            uint32_t bits;
            memcpy(&bits, from + j, sizeof bits);
            /* Ties to even; a NaN stays one. */
            uint32_t rounded = from[j] != from[j] ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1);
            ((uint16_t *)g->y)[at] = (uint16_t)(rounded >> 16);
        }
    }
}

static void compute_item(
    const Machine *machine, const Gemv *g, const Grouped *by_expert, const int16_t *table, int64_t part, int64_t n, int64_t count)
{
    float sums[2][MOST_ROUTED][ITEM];
    float total[MOST_ROUTED][ITEM];  /* by token, where those of a token are summed */
    const int computed = g->swiglu ? 2 : 1;
    if (g->weights != NULL)
        memset(total, 0, sizeof(float) * ITEM * (size_t)(g->routed / g->top_k));
    for (int64_t group = 0; group < by_expert->groups; group++) {
        const int64_t start = by_expert->start[group], end = by_expert->start[group + 1], e = by_expert->expert[group];
        for (int p = 0; p < computed; p++) {
            for (int64_t i = start; i < end; i += TOGETHER) {
                int num_x = (int)(end - i < TOGETHER ? end - i : TOGETHER);
                Row x[TOGETHER];
                for (int each = 0; each < num_x; each++)
                    x[each] = row_of(g, by_expert->order[i + each] / g->sharing);
                machine->dots(g, e * g->parts + part + p, n, count, num_x, x, table, sums[p][i - start], ITEM);
            }
            for (int64_t i = start; i < end; i++)
                add(g, part + p, e, by_expert->order[i], n, count, sums[p][i - start]);
        }
        for (int64_t i = start; i < end; i++) {
            float *own = sums[0][i - start];
            const int64_t routed = by_expert->order[i];
            if (g->swiglu)
                for (int64_t j = 0; j < count; j += 8) {
                    __m256 gate = _mm256_loadu_ps(own + j), up = _mm256_loadu_ps(sums[1][i - start] + j);
                    _mm256_storeu_ps(own + j, _mm256_mul_ps(_mm256_mul_ps(gate, sigmoid(gate)), up));
                }
            if (g->weights == NULL)
                store(g, routed, part * g->w->rows + n, count, own);
            else
                for (int64_t j = 0; j < count; j++)
                    total[routed / g->top_k][j] += g->weights[routed] * own[j];
        }
    }
    if (g->weights != NULL)
        for (int64_t token = 0; token < g->routed / g->top_k; token++)
            store(g, token, n, count, total[token]);
}

static void group_by_expert(const Gemv *g, Grouped *to)
{
    for (int64_t i = 0; i < g->routed; i++) {
        int64_t at = i;
        for (; at > 0 && expert_of(g, to->order[at - 1]) > expert_of(g, i); at--)
            to->order[at] = to->order[at - 1];
        to->order[at] = i;
    }
    to->groups = 0;
    for (int64_t i = 0; i < g->routed; i++) {
        int64_t e = expert_of(g, to->order[i]);
        if (i == 0 || e != to->expert[to->groups - 1]) {
            to->expert[to->groups] = e;
            to->start[to->groups++] = i;
        }
    }
    to->start[to->groups] = g->routed;
}

/* A product, by all threads of the region it is called in. */
static void multiply(const Machine *machine, const Gemv *g, const Grouped *by_expert, int packed)
{
    int16_t table[16];
    integer_table(g->w, table);
    if (!packed) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < g->routed / g->sharing; row++)
            pack_row(machine, g, row);
    }
    if (g->num_updates > 0) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < g->num_updates * g->routed; i++)
            project(g, (int)(i / g->routed), i % g->routed);
    }
    const int64_t parts = g->swiglu ? 1 : g->parts, across = (g->w->rows + ITEM - 1) / ITEM;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t item = 0; item < parts * across; item++) {
        int64_t n = item % across * ITEM;
        compute_item(machine, g, by_expert, table, item / across, n, g->w->rows - n < ITEM ? g->w->rows - n : ITEM);
    }
}

static const Machine *this_machine(int without_avx512)
{
    static Machine machines[2];
    static int made = 0;
    /* Two threads that make it at once write the same. */
    if (!made) {
        order_avx2(machines[0].order), machines[0].dots = dots_avx2;
        order_avx512(machines[1].order), machines[1].dots = dots_avx512;
        made = 1;
    }
    __builtin_cpu_init();
    int wide = !without_avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return &machines[wide];
}

/* Products one after the other, the next one of what the last one gave; all with the same routed tokens. */
EXPORT void expertune_gemv(const Gemv *products, int count, int threads, int without_avx512)
{
    const Machine *machine = this_machine(without_avx512);
    Grouped by_expert;
    group_by_expert(products, &by_expert);
    int64_t bytes = 0;
    for (int i = 0; i < count; i++)
        bytes += by_expert.groups * products[i].parts * products[i].w->rows * (products[i].w->columns / 2);
    /* Packed before others are woken, the rows of a step cost no waiting for each other. */
    int few = products->routed / products->sharing <= 2;
    for (int64_t row = 0; few && row < products->routed / products->sharing; row++)
        pack_row(machine, products, row);
#pragma omp parallel num_threads(threads) if (bytes > SMALL)
    for (int i = 0; i < count; i++) {
        multiply(machine, products + i, &by_expert, i == 0 && few);
        if (i + 1 < count) {
#pragma omp barrier
        }
    }
}
