/* Grouped GEMMs with NF4 weights in integers of 16 bits, where the CPU multiplies no 16-bit floats. */
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
            for (int i = 0; i < mr; i++) {
                multiply_add(x + i, low, high, &sum[i][0], &sum[i][1]);
            }
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

void multiply_integers(const Product *p, int64_t e, int64_t row, int64_t rows, int64_t column, int64_t column_end)
{
    char *memory = (char *)panels();
    IntegerPanel w[4];
    for (int i = 0; i < 4; i++, memory += sizeof(Pair) * DEEP / 2 * NR)
        w[i].pairs = (Pair *)memory;
    for (int i = 0; i < 4; i++, memory += sizeof(float) * 2 * (DEEP / BLOCK) * NR)
        w[i].scales = (float *)memory;
    Magnitudes magnitude = {(float *)memory, (float *)memory + DEEP};
    memory += sizeof(float) * 2 * DEEP;
    IntegerRows x = {.scales = (float *)memory};
    x.pairs = (Pair *)(memory + sizeof(float) * (INTEGER_ROWS + MR) * (DEEP / BLOCK));
    for (int64_t k = 0; k < p->depth; k += DEEP) {
        const int64_t depth = p->depth - k < DEEP ? p->depth - k : DEEP, blocks = (depth + BLOCK - 1) / BLOCK;
        if (!p->transposed)
            magnitudes(p->nf4, e * p->parts, k, depth, magnitude);
        round_rows(p, row, rows, k, depth, p->transposed ? NULL : magnitude.each, x);
        for (int64_t n = column; n < column_end; n += NR) {
            const int64_t at = p->transposed ? 0 : (n - column) / NR % 4;
            if (p->transposed)
                look_up_rows(p->nf4, e * p->parts, n, column_end, k, depth, w[0]);
            else if (at == 0)
                look_up_columns(p->nf4, e * p->parts, k, depth, n, magnitude, w);
            multiply_rows(p->transposed && p->nf4->halves, x, w[at], rows, blocks, p->y + row * p->y_stride + n, p->y_stride,
                          column_end - n, k > 0);
        }
    }
}
