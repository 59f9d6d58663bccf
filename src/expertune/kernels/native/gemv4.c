/* Products of few tokens with 4-bit matrices: a decoding step, which is as fast as the packed bytes are read.

   A code's value and the token are integers of 16 bits here: the values of the codebook are scaled so that the largest is
   16384, each block of 64 numbers of x so that its largest is 16383. Codes are looked up as they lie in the bytes, x is
   laid out to match once for all matrices, and a block is summed in integers, exactly; float32 are the blocks' scales and
   what they are summed in.

   What that costs: a number of x is off by at most 1/32766 of the largest of its block of 64, and a value of the codebook
   by 1/32768 of its largest. Large numbers of a block so keep more bits than in bfloat16, which is off by at most 1/256 of
   each; a number below about 1/128 of its block's largest keeps fewer, and one far below becomes 0. (llama.cpp rounds x to
   8 bits below the largest of each 32 numbers.) Tokens in float32 are not to lose that: of a codebook's values and of x
   what rounding left is kept as a second integer, in units of 1/128 of the first one's, and the products of one's rest
   with the other, in 7 bits, are added. Left out is what that leaves, about 2**-22 of the largest each. Each output is summed by one thread in
   one order, whatever the number of threads. */
#include "gemv4.h"
#include "sigmoid.h"

#include <math.h>

#define SMALL (1 << 16)   /* packed bytes that one thread reads sooner than a second one wakes up */

/* ---- x ----------------------------------------------------------------------------------------------------------- */

static QuantizedToken row_of(const Gemv *g, int64_t row)
{
    const int64_t wide = up_to(g->w->columns, GROUP), scales = up_to(wide / 32, 16);
    float *own = g->scratch + row * 2 * (wide + scales);
    int16_t *numbers = (int16_t *)(own + wide);
    return (QuantizedToken){own, numbers, (int8_t *)(numbers + wide), own + 2 * wide, own + 2 * wide + scales};
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

/* 8 products of x's largest number with at most 16384 stay within 32 bits, and what `fine` adds to them. */
static void pack_row(const InstructionSet *set, const Gemv *g, int64_t row)
{
    const int64_t columns = g->w->columns, wide = up_to(columns, GROUP), halves = g->w->halves ? 2 : 1;
    const int64_t start = row * g->x_stride;
    const QuantizedToken to = row_of(g, row);
    memset(to.scales, 0, 2 * sizeof(float) * (size_t)up_to(wide / 32, 16));
    for (int64_t k = 0; k < columns; k += 8)
        _mm256_storeu_ps(to.values + k, values_at(g->x, g->x_kind, start + k));
    memset(to.values + columns, 0, sizeof(float) * (size_t)(wide - columns));
    const float unit = unit_of(g->w);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t k = 0; k < wide; k += GROUP) {
        __m256i numbers[GROUP / 8], rests[GROUP / 8];
        float scales[2];
        for (int block = 0; block < 2; block++) {
            const float *from = to.values + k + block * BLOCK;
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
            const __m256 factor = _mm256_set1_ps(counts ? set->largest / peak : 0.0f);
            scales[block] = counts ? peak / set->largest / unit : fault;
            for (int i = 0; i < BLOCK / 8; i++) {
                const __m256 v = _mm256_loadu_ps(from + 8 * i);
                const __m256i n = _mm256_cvtps_epi32(_mm256_mul_ps(v, factor));
                const __m256 left = _mm256_fmsub_ps(v, factor, _mm256_cvtepi32_ps(n));
                numbers[block * 8 + i] = n;
                rests[block * 8 + i] = _mm256_cvtps_epi32(_mm256_mul_ps(left, _mm256_set1_ps(REST)));
            }
        }
        set->place(numbers, rests, halves == 2, to, k);
        for (int64_t half = 0; half < 2 * halves; half++) {
            const int64_t at = k / BLOCK * halves + half;
            to.scales[at] = scales[half / halves];
            to.corrections[at] *= scales[half / halves];
        }
    }
}

/* The 16 values of the codebook as integers, and what their rounding left, of which a half is 0. */
static void integer_table(const Nf4 *w, int16_t table[32])
{
    const float unit = unit_of(w);
    for (int i = 0; i < 16; i++) {
        table[i] = (int16_t)lrintf(w->values[i] * unit);
        const long rest = REST / 2 + lrintf((w->values[i] * unit - (float)table[i]) * REST);
        table[16 + i] = (int16_t)(rest < REST ? rest : REST - 1);
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
    float total = total_of(_mm256_add_ps(sum, more));
    for (; k < count; k++)
        total += a[k] * b[k];
    return total;
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
    int64_t slot = slot_of(u->slots, expert_of(g, routed));
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
        int64_t slot = slot_of(u->slots, e);
        if (u->part != part || slot < 0)
            continue;
        const float *h = low_rank_sums(g, i) + routed * u->rank, *b = u->b + (slot * rows + n) * u->rank;
        for (int64_t j = 0; j < count; j++)
            y[j] += dot(b + j * u->rank, h, u->rank);
    }
}

static void store(const Gemv *g, int64_t row, int64_t n, int64_t count, const float *from)
{
    for (int64_t j = 0; j < count; j++)
        put(g->y, g->y_kind, row * g->y_stride + n + j, from[j]);
}

static void compute_item(
    const InstructionSet *set, const Gemv *g, const Grouped *by_expert, const int16_t *table, int64_t part, int64_t n,
    int64_t count)
{
    float sums[2][MOST_ROUTED][ITEM];
    float total[MOST_ROUTED][ITEM];  /* by token, where those of a token are summed */
    const int computed = g->swiglu ? 2 : 1;
    if (g->weights != NULL)
        memset(total, 0, sizeof(float) * ITEM * (size_t)(g->routed / g->top_k));
    for (int64_t group = 0; group < by_expert->groups; group++) {
        const int64_t start = by_expert->start[group], end = by_expert->start[group + 1], e = by_expert->expert[group];
        for (int p = 0; p < computed; p++) {
            for (int64_t i = start; i < end; i += set->together) {
                int num_x = (int)(end - i < set->together ? end - i : set->together);
                QuantizedToken x[AVX2_TOGETHER];
                for (int each = 0; each < num_x; each++)
                    x[each] = row_of(g, by_expert->order[i + each] / g->sharing);
                set->dots(g, e * g->parts + part + p, n, count, num_x, x, table, sums[p][i - start], ITEM);
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
static void multiply(const InstructionSet *set, const Gemv *g, const Grouped *by_expert, int packed)
{
    int16_t table[32];
    integer_table(g->w, table);
    if (!packed) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < g->routed / g->sharing; row++)
            pack_row(set, g, row);
    }
    if (g->num_updates > 0) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < g->num_updates * g->routed; i++)
            project(g, (int)(i / g->routed), i % g->routed);
    }
    const int64_t parts = g->swiglu ? 1 : g->parts, across = (g->w->rows + ITEM - 1) / ITEM;
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t item = 0; item < parts * across; item++) {
        int64_t n = item % across * ITEM;
        compute_item(set, g, by_expert, table, item / across, n, g->w->rows - n < ITEM ? g->w->rows - n : ITEM);
    }
}

/* Products one after the other, the next one of what the last one gave; all with the same routed tokens. */
EXPORT void expertune_gemv(const Gemv *products, int count, int threads, int without_avx512, int fine)
{
    const InstructionSet *set = instruction_set(without_avx512, fine);
    Grouped by_expert;
    group_by_expert(products, &by_expert);
    int64_t bytes = 0;
    for (int i = 0; i < count; i++)
        bytes += by_expert.groups * products[i].parts * products[i].w->rows * (products[i].w->columns / 2);
    /* Packed before others are woken, the rows of a step cost no waiting for each other. */
    int few = products->routed / products->sharing <= 2;
    for (int64_t row = 0; few && row < products->routed / products->sharing; row++)
        pack_row(set, products, row);
#pragma omp parallel num_threads(threads) if (bytes > SMALL)
    for (int i = 0; i < count; i++) {
        multiply(set, products + i, &by_expert, i == 0 && few);
        if (i + 1 < count) {
#pragma omp barrier
        }
    }
}
