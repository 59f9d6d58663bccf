/* Grouped GEMMs in integers: what grouped_gemm.c does, for tokens of 16 bits and weights that are NF4, or bfloat16
   themselves, where the CPU has AVX2 and multiplies no 16-bit floats. VPMADDWD multiplies and adds 16 pairs of integers where an FMA takes 8 floats.

   Each block of 64 numbers of a token is rounded to multiples of a scale of its own, and each value of the codebook to
   8192ths (MXFP4's are whole numbers of 1024ths). Products of a block are summed in 32 bits, exactly, and added to y in
   float32, times the block's and the weights' scales.

   No sum can overflow: a weight's integer is at most 8192 in magnitude, and those of a token's block come to less than
   2 ** 18 together, so that 64 products, in any order, stay below 2 ** 31. A token's scale is the smallest for which that
   holds and no integer is above 32767: of 64 normally distributed numbers the largest is about 13,000.

   Where the contraction runs along W's rows (input gradients) a sum meets 64 rows with scales of their own. Rows are
   divided by the largest of their scales, and tokens multiplied with it; what is left of a scale is part of the weights'
   integers, of which 8192 is as much as the largest scale among 64 rows allows. Rows, and columns of blocks, may so
   differ in size by any factor. Weights in bfloat16 have a scale for each 64 along the contraction, whichever way it runs.

   Of normally distributed numbers a token's is off by up to 1/26000 of the largest of its block, and a weight by up to
   1/16384 of its block's, or 1/8192 of its 64 rows' in input gradients; bfloat16 is off by up to 1/512 of each number. A
   token that is not finite gives NaN. Each element of y is summed in the contraction's order, whatever the number of
   threads. */
#include "grouped_gemm_int16.h"

/* sums += a pair of a token times pairs of 16 columns. In the processor's words, because compilers that are to choose an order
   hold more numbers than there are registers. */
INLINE void multiply_add(const Pair *x, __m256i low, __m256i high, __m256i *sum_low, __m256i *sum_high)
{
    __m256i each, product;
    __asm__("vpbroadcastd %[x], %[each]\n\t"
            "vpmaddwd %[low], %[each], %[product]\n\t"
            "vpmaddwd %[high], %[each], %[each]\n\t"
            "vpaddd %[product], %[sum_low], %[sum_low]\n\t"
            "vpaddd %[each], %[sum_high], %[sum_high]"
            : [each] "=&x"(each), [product] "=&x"(product), [sum_low] "+x"(*sum_low), [sum_high] "+x"(*sum_high)
            : [x] "m"(*x), [low] "x"(low), [high] "x"(high));
}

/* c[mr, NR] = or += a panel of tokens times a panel of weights, `scales` times `pairs` of them. */
INLINE void multiply(
    int mr, int pairs, const Pair *x, const float *x_scales, const Pair *w, const float *w_scales, int64_t scales, float *c,
    int64_t stride, int add)
{
    for (int64_t s = 0; s < scales; s++, w_scales += NR, add = 1) {
        __m256i sum[MR][2];
        for (int i = 0; i < mr; i++)
            sum[i][0] = sum[i][1] = _mm256_setzero_si256();
        for (int d = 0; d < pairs; d++, x += MR, w += NR) {
            __m256i low = _mm256_load_si256((const __m256i *)w), high = _mm256_load_si256((const __m256i *)(w + 8));
            for (int i = 0; i < mr; i++)
                multiply_add(x + i, low, high, &sum[i][0], &sum[i][1]);
        }
        __m256 low = _mm256_loadu_ps(w_scales), high = _mm256_loadu_ps(w_scales + 8);
        const float *own = x_scales + s * pairs / (BLOCK / 2) * MR;
        for (int i = 0; i < mr; i++) {
            float *to = c + i * stride;
            __m256 scale = _mm256_broadcast_ss(own + i);
            __m256 left = add ? _mm256_loadu_ps(to) : _mm256_setzero_ps();
            __m256 right = add ? _mm256_loadu_ps(to + 8) : _mm256_setzero_ps();
            _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][0]), scale), low, left));
            _mm256_storeu_ps(to + 8, _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][1]), scale), high, right));
        }
    }
}

INLINE void multiply_tile(
    int mr, int pairs, const Pair *x, const float *x_scales, IntegerPanel w, int64_t scales, float *c, int64_t stride, int add)
{
    switch (mr) {
    case 1: multiply(1, pairs, x, x_scales, w.pairs, w.scales, scales, c, stride, add); break;
    case 2: multiply(2, pairs, x, x_scales, w.pairs, w.scales, scales, c, stride, add); break;
    case 3: multiply(3, pairs, x, x_scales, w.pairs, w.scales, scales, c, stride, add); break;
    case 4: multiply(4, pairs, x, x_scales, w.pairs, w.scales, scales, c, stride, add); break;
    case 5: multiply(5, pairs, x, x_scales, w.pairs, w.scales, scales, c, stride, add); break;
    default: multiply(6, pairs, x, x_scales, w.pairs, w.scales, scales, c, stride, add);
    }
}

INLINE void multiply_rows_by(
    int pairs, IntegerRows x, IntegerPanel w, int64_t rows, int64_t scales, float *y, int64_t stride, int64_t width, int add)
{
    for (int64_t first = 0; first < rows; first += MR, x.pairs += MR * DEEP / 2, x.scales += MR * DEEP / BLOCK) {
        int mr = (int)(rows - first < MR ? rows - first : MR);
        float *to = y + first * stride;
        if (width >= NR) {
            multiply_tile(mr, pairs, x.pairs, x.scales, w, scales, to, stride, add);
            continue;
        }
        float edge[MR * NR];
        for (int i = 0; i < mr; i++)
            for (int64_t j = 0; j < NR; j++)
                edge[i * NR + j] = add && j < width ? to[i * stride + j] : 0.0f;
        multiply_tile(mr, pairs, x.pairs, x.scales, w, scales, edge, NR, 1);
        for (int i = 0; i < mr; i++)
            memcpy(to + i * stride, edge + i * NR, sizeof(float) * (size_t)width);
    }
}

static void multiply_rows(
    int halves, IntegerRows x, IntegerPanel w, int64_t rows, int64_t blocks, float *y, int64_t stride, int64_t width, int add)
{
    if (halves)
        multiply_rows_by(BLOCK / 4, x, w, rows, 2 * blocks, y, stride, width, add);
    else
        multiply_rows_by(BLOCK / 2, x, w, rows, blocks, y, stride, width, add);
}

/* What a thread works in: its panels of float32, whose memory is enough. */
typedef struct {
    Pair w[4][DEEP / 2 * NR];
    float w_scales[4][2 * (DEEP / BLOCK) * NR];
    float magnitude[DEEP], inverse[DEEP];
    Pair x[(INTEGER_ROWS / MR) * (DEEP / 2) * MR];
    float x_scales[(INTEGER_ROWS / MR) * (DEEP / BLOCK) * MR];
} Scratch;

_Static_assert(INTEGER_ROWS % MR == 0 && sizeof(Scratch) <= sizeof(float) * (MC + MR + STRIPE) * KC, "does not fit");

/* The panel of columns of y from n on, of a pass; where the contraction runs along W's rows four are made together. */
static IntegerPanel panel_at(
    const Product *p, int64_t e, int64_t k, int64_t depth, int64_t column, int64_t n, int64_t column_end,
    Magnitudes magnitude, const IntegerPanel w[4])
{
    const int64_t at = p->transposed ? 0 : (n - column) / NR % 4;
    if (p->kind != NF4_WEIGHT) {
        const uint16_t *dense = (const uint16_t *)p->dense + e * p->dense_expert_stride;
        if (p->transposed)
            round_dense_rows(dense, p->dense_stride, n, column_end, k, depth, w[0]);
        else if (at == 0)
            round_dense_columns(dense, p->dense_stride, k, depth, n, column_end, w);
    } else if (p->transposed)
        look_up_rows(p->nf4, e * p->parts, n, column_end, k, depth, w[0]);
    else if (at == 0)
        look_up_columns(p->nf4, e * p->parts, k, depth, n, magnitude, w);
    return w[at];
}

void multiply_integers(const Product *p, int64_t e, int64_t row, int64_t rows, int64_t column, int64_t column_end)
{
    Scratch *own = (Scratch *)panels();
    const IntegerRows x = {own->x, own->x_scales};
    const Magnitudes magnitude = {own->magnitude, own->inverse};
    const int nf4 = p->kind == NF4_WEIGHT, scaled = nf4 && !p->transposed, halves = nf4 && p->transposed && p->nf4->halves;
    IntegerPanel w[4];
    for (int i = 0; i < 4; i++)
        w[i] = (IntegerPanel){own->w[i], own->w_scales[i]};
    for (int64_t k = 0; k < p->depth; k += DEEP) {
        const int64_t depth = p->depth - k < DEEP ? p->depth - k : DEEP, blocks = (depth + BLOCK - 1) / BLOCK;
        if (scaled)
            magnitudes(p->nf4, e * p->parts, k, depth, magnitude);
        round_rows(p, row, rows, k, depth, scaled ? magnitude.each : NULL, x);
        for (int64_t n = column; n < column_end; n += NR) {
            const IntegerPanel panel = panel_at(p, e, k, depth, column, n, column_end, magnitude, w);
            float *y = p->y + row * p->y_stride + n;
            multiply_rows(halves, x, panel, rows, blocks, y, p->y_stride, column_end - n, k > 0);
        }
    }
}
