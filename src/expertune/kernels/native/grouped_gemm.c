/* Grouped GEMMs in float32: y[tokens of e] = x[tokens of e] @ B[e], dequantizing B a panel at a time inside the loop.

   The plan is that of Goto and van de Geijn (2008): B is brought into panels of 16 columns that stay in the first-level
   cache, x into panels of 6 rows that stay in the second, and a kernel of 12 accumulators runs over the contraction. What
   is dequantized is used for all rows of the expert and never written to memory. Each element of y is summed by one thread in
   one order, whatever the number of threads: two runs give identical bytes. */
#include "grouped_gemm.h"

#define MR 6      /* rows of a panel of x */
#define NR 16     /* columns of a panel of B */
#define KC 256    /* contraction of one pass; a multiple of BLOCK */
#define MC 768    /* most rows for which a dequantized panel is used at once */
#define STRIPE 64 /* columns that are dequantized together where B lies along its columns */

static _Thread_local float *scratch = NULL;

/* Panels of this thread, kept from call to call: MC x KC of x, then STRIPE x KC of B. */
static float *panels(void)
{
    if (scratch == NULL && posix_memalign((void **)&scratch, 64, sizeof(float) * (MC + MR + STRIPE) * KC) != 0)
        abort();
    return scratch;
}

/* ---- x ------------------------------------------------------------------------------------------------------- */

/* x[row .. row + rows, k .. k + depth] -> panels [depth][MR], short panels filled with zeros. */
static void pack_rows(
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

/* u[row .. row + depth, column .. column + width], transposed -> panels [depth][MR]. */
static void pack_transposed(float *to, const float *u, int64_t stride, int64_t row, int64_t depth, int64_t column, int64_t width)
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

/* 16 matrix rows from `row` on, contraction k .. k + depth -> [depth][NR]. Rows beyond `end` give zeros. */
static void pack_nf4_rows(float *to, const Nf4 *w, int64_t first_matrix, int64_t row, int64_t end, int64_t k, int64_t depth)
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
            for (int i = 0; i < NR; i++)
                v[i] = _mm_loadu_si128((const __m128i *)(from[i] + block * BLOCK_BYTES + 16 * half));
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

/* Matrix rows k .. k + depth, 64 columns from `column` on -> four panels [depth][NR], KC rows apart. */
static void pack_nf4_columns(float *to, const Nf4 *w, int64_t first_matrix, int64_t k, int64_t depth, int64_t column)
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

/* b's rows `row` .. , transposed -> [depth][NR]. */
INLINE void pack_dense_rows(
    float *to, const void *b, int kind, int64_t stride, int64_t row, int64_t end, int64_t k, int64_t depth)
{
    for (int i = 0; i < NR; i++)
        for (int64_t d = 0; d < depth; d++)
            to[d * NR + i] = row + i < end ? dense_at(b, kind, (row + i) * stride + k + d) : 0.0f;
}

/* b's rows k .. k + depth (of sorted tokens, where there is an index) -> [depth][NR]. */
INLINE void pack_dense_columns(
    float *to, const void *b, int kind, int64_t stride, const int64_t *index, int64_t column, int64_t end, int64_t k,
    int64_t depth)
{
    for (int64_t d = 0; d < depth; d++) {
        int64_t at = (index == NULL ? k + d : index[k + d]) * stride;
        if (kind == FLOAT_WEIGHT && column + NR <= end) {
            memcpy(to + d * NR, (const float *)b + at + column, sizeof(float) * NR);
            continue;
        }
        for (int i = 0; i < NR; i++)
            to[d * NR + i] = column + i < end ? dense_at(b, kind, at + column + i) : 0.0f;
    }
}

/* ---- the kernel ------------------------------------------------------------------------------------------------ */

/* c[mr, 16] = or += a panel [depth][MR] times a panel [depth][NR]. */
INLINE void multiply(int mr, const float *a, const float *b, int64_t depth, float *c, int64_t stride, int add)
{
    __m256 sum[MR][2];
    for (int i = 0; i < mr; i++) {
        sum[i][0] = add ? _mm256_loadu_ps(c + i * stride) : _mm256_setzero_ps();
        sum[i][1] = add ? _mm256_loadu_ps(c + i * stride + 8) : _mm256_setzero_ps();
    }
    for (int64_t d = 0; d < depth; d++, a += MR, b += NR) {
        __m256 low = _mm256_load_ps(b), high = _mm256_load_ps(b + 8);
        for (int i = 0; i < mr; i++) {
            __m256 x = _mm256_broadcast_ss(a + i);
            sum[i][0] = _mm256_fmadd_ps(x, low, sum[i][0]);
            sum[i][1] = _mm256_fmadd_ps(x, high, sum[i][1]);
        }
    }
    for (int i = 0; i < mr; i++) {
        _mm256_storeu_ps(c + i * stride, sum[i][0]);
        _mm256_storeu_ps(c + i * stride + 8, sum[i][1]);
    }
}

static void multiply_tile(int mr, const float *a, const float *b, int64_t depth, float *c, int64_t stride, int add)
{
    switch (mr) {
    case 1: multiply(1, a, b, depth, c, stride, add); break;
    case 2: multiply(2, a, b, depth, c, stride, add); break;
    case 3: multiply(3, a, b, depth, c, stride, add); break;
    case 4: multiply(4, a, b, depth, c, stride, add); break;
    case 5: multiply(5, a, b, depth, c, stride, add); break;
    default: multiply(6, a, b, depth, c, stride, add);
    }
}

/* c[mr, width] = or += rows of x, as they lie, times a panel [depth][NR]. */
INLINE void multiply_unpacked(
    int mr, const float *const x[MR], const float *b, int64_t depth, float *c, int64_t stride, int64_t width, int add)
{
    __m256 sum[MR][2];
    float line[NR];
    for (int i = 0; i < mr; i++) {
        for (int64_t j = 0; j < NR; j++)
            line[j] = add && j < width ? c[i * stride + j] : 0.0f;
        sum[i][0] = _mm256_loadu_ps(line), sum[i][1] = _mm256_loadu_ps(line + 8);
    }
    for (int64_t d = 0; d < depth; d++, b += NR) {
        __m256 low = _mm256_load_ps(b), high = _mm256_load_ps(b + 8);
        for (int i = 0; i < mr; i++) {
            __m256 each = _mm256_broadcast_ss(x[i] + d);
            sum[i][0] = _mm256_fmadd_ps(each, low, sum[i][0]);
            sum[i][1] = _mm256_fmadd_ps(each, high, sum[i][1]);
        }
    }
    for (int i = 0; i < mr; i++) {
        _mm256_storeu_ps(line, sum[i][0]), _mm256_storeu_ps(line + 8, sum[i][1]);
        memcpy(c + i * stride, line, sizeof(float) * (size_t)width);
    }
}

/* The same for all rows of an item whose only panel this is: to pack what is read once would cost more than to read it. */
static void multiply_only_panel(
    const Product *p, int64_t row, int64_t rows, int64_t k, const float *panel, int64_t depth, float *y, int64_t width)
{
    for (int64_t first = 0; first < rows; first += MR, y += MR * p->y_stride) {
        const float *x[MR];
        int mr = (int)(rows - first < MR ? rows - first : MR);
        for (int i = 0; i < mr; i++)
            x[i] = p->x + (p->index == NULL ? row + first + i : p->index[row + first + i]) * p->x_stride + k;
        if (mr == MR)
            multiply_unpacked(MR, x, panel, depth, y, p->y_stride, width, k > 0);
        else
            for (int i = 0; i < mr; i++)
                multiply_unpacked(1, x + i, panel, depth, y + i * p->y_stride, p->y_stride, width, k > 0);
    }
}

/* All row panels of x against one panel of B; y's columns may end inside the panel. */
static void multiply_rows(
    const float *rows_packed, const float *panel, int64_t rows, int64_t depth, float *y, int64_t stride, int64_t width, int add)
{
    for (int64_t first = 0; first < rows; first += MR, rows_packed += MR * depth) {
        int mr = (int)(rows - first < MR ? rows - first : MR);
        float *to = y + first * stride;
        if (width >= NR) {
            multiply_tile(mr, rows_packed, panel, depth, to, stride, add);
            continue;
        }
        float edge[MR * NR];
        for (int i = 0; i < mr; i++)
            for (int64_t j = 0; j < NR; j++)
                edge[i * NR + j] = add && j < width ? to[i * stride + j] : 0.0f;
        multiply_tile(mr, rows_packed, panel, depth, edge, NR, 1);
        for (int i = 0; i < mr; i++)
            memcpy(to + i * stride, edge + i * NR, sizeof(float) * (size_t)width);
    }
}

/* ---- one item: rows of one expert, some columns of y -------------------------------------------------------------- */

static int runs_in_bfloat(const Product *p)
{
    return p->kind == NF4_WEIGHT && p->arithmetic != FLOAT_ARITHMETIC;
}

static void multiply_item(const Product *p, int64_t e, int64_t row, int64_t rows, int64_t column, int64_t column_end)
{
    if (runs_in_bfloat(p)) {
        multiply_bfloat_item(p, e, row, rows, column, column_end);
        return;
    }
    float *rows_packed = panels(), *panel = rows_packed + (MC + MR) * KC;
    const char *dense = (const char *)p->dense;
    int64_t slot = slot_of(p->slots, e), contraction = slot < 0 ? 0 : p->depth;
    if (p->kind != NF4_WEIGHT && slot >= 0)
        dense += slot * p->dense_expert_stride * (p->kind == FLOAT_WEIGHT ? 4 : 2);
    if (slot < 0)
        for (int64_t i = row; i < row + rows; i++)
            memset(p->y + i * p->y_stride + column, 0, sizeof(float) * (size_t)(column_end - column));
    for (int64_t k = 0; k < contraction; k += KC) {
        int64_t depth = contraction - k < KC ? contraction - k : KC;
        if (p->columns > NR)
            pack_rows(rows_packed, p->x, p->x_stride, p->index, row, rows, k, depth);
        for (int64_t n = column; n < column_end; n += NR) {
            float *at = panel;
            if (p->kind == NF4_WEIGHT && !p->transposed) {
                if ((n - column) % STRIPE == 0)
                    pack_nf4_columns(panel, p->nf4, e * p->parts, k, depth, n);
                at = panel + (n - column) % STRIPE * KC;
            } else if (p->kind == NF4_WEIGHT)
                pack_nf4_rows(panel, p->nf4, e * p->parts, n, column_end, k, depth);
            else if (p->kind == FLOAT_WEIGHT && p->transposed)
                pack_dense_rows(panel, dense, FLOAT_WEIGHT, p->dense_stride, n, column_end, k, depth);
            else if (p->kind == FLOAT_WEIGHT)
                pack_dense_columns(panel, dense, FLOAT_WEIGHT, p->dense_stride, NULL, n, column_end, k, depth);
            else if (p->transposed)
                pack_dense_rows(panel, dense, BFLOAT_WEIGHT, p->dense_stride, n, column_end, k, depth);
            else
                pack_dense_columns(panel, dense, BFLOAT_WEIGHT, p->dense_stride, NULL, n, column_end, k, depth);
            float *y = p->y + row * p->y_stride + n;
            if (p->columns > NR)
                multiply_rows(rows_packed, at, rows, depth, y, p->y_stride, column_end - n, k > 0);
            else
                multiply_only_panel(p, row, rows, k, at, depth, y, column_end - n);
        }
    }
    for (int u = 0; u < p->num_updates; u++) {
        const Update *update = p->updates + u;
        int64_t first = column > update->column ? column : update->column;
        int64_t last = column_end < update->column_end ? column_end : update->column_end;
        int64_t own = slot_of(update->slots, e);
        if (own < 0)
            continue;
        const float *b = update->b + own * update->b_expert_stride;
        for (int64_t k = 0; k < update->rank && first < last; k += KC) {
            int64_t depth = update->rank - k < KC ? update->rank - k : KC;
            pack_rows(rows_packed, update->h, update->h_stride, NULL, row, rows, k, depth);
            for (int64_t n = first; n < last; n += NR) {
                if (p->transposed)
                    pack_dense_rows(panel, b, FLOAT_WEIGHT, update->rank, n - update->column, last - update->column, k, depth);
                else
                    pack_dense_columns(panel, b, FLOAT_WEIGHT, update->column_end - update->column, NULL,
                                       n - update->column, last - update->column, k, depth);
                multiply_rows(rows_packed, panel, rows, depth, p->y + row * p->y_stride + n, p->y_stride, last - n, 1);
            }
        }
    }
}

/* Columns of an item: as many as leave each thread a few items, in whole stripes; x is packed again for each item. */
static int64_t item_columns(const Product *p)
{
    int64_t active = 0;
    for (int64_t e = 0, start = 0; e < p->experts; start = p->offsets[e++])
        active += p->offsets[e] > start;
    int64_t stripes = (p->columns + STRIPE - 1) / STRIPE;
    int64_t wanted = 4 * p->threads;
    int64_t each = active > 0 ? (wanted + active - 1) / active : 1;
    int64_t width = (stripes + each - 1) / each;
    int64_t most = runs_in_bfloat(p) ? 64 : 16;
    return (width < 1 ? 1 : width > most ? most : width) * STRIPE;
}

EXPORT void expertune_grouped_gemm(const Product *p)
{
    int64_t width = item_columns(p), across = (p->columns + width - 1) / width;
#pragma omp parallel num_threads(p->threads)
    for (int64_t e = 0, start = 0; e < p->experts; start = p->offsets[e++]) {
        int64_t end = p->offsets[e];
        int64_t most = runs_in_bfloat(p) ? BFLOAT_ROWS : MC, panel = runs_in_bfloat(p) ? 32 : MR;
        int64_t down = (end - start + most - 1) / most;
        /* Even chunks of rows, and more of them where the columns alone would not keep the threads busy. */
        int64_t least = (p->threads + across - 1) / across;
        down = down < least ? least : down;
        int64_t height = ((end - start + down - 1) / down + panel - 1) / panel * panel;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t item = 0; item < across * down; item++) {
            int64_t row = start + item / across * height, column = item % across * width;
            int64_t row_end = row + height < end ? row + height : end;
            int64_t column_end = column + width < p->columns ? column + width : p->columns;
            if (row < row_end)
                multiply_item(p, e, row, row_end - row, column, column_end);
        }
    }
}

/* out[slot of e] [width_u, width_v] = u[tokens of e].T @ v[tokens of e]: gradients of low-rank factors. Experts without
   tokens get 0, and nothing is written for those without a slot. */
EXPORT void expertune_outer(
    const float *u, int64_t u_stride, int64_t width_u, const float *v, int64_t v_stride, const int64_t *v_index,
    int64_t width_v, const int64_t *offsets, int64_t experts, const int64_t *slots, float *out, int threads)
{
    int64_t high = width_u < 96 ? width_u : 96, wide = width_v < 256 ? width_v : 256;
    int64_t down = (width_u + high - 1) / high, across = (width_v + wide - 1) / wide;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t item = 0; item < experts * down * across; item++) {
        int64_t e = item / (down * across), at_u = item / across % down * high, at_v = item % across * wide;
        int64_t start = e ? offsets[e - 1] : 0, end = offsets[e], slot = slot_of(slots, e);
        if (slot < 0)
            continue;
        int64_t u_end = at_u + high < width_u ? at_u + high : width_u;
        int64_t v_end = at_v + wide < width_v ? at_v + wide : width_v;
        float *rows_packed = panels(), *panel = rows_packed + (MC + MR) * KC;
        float *to = out + (slot * width_u + at_u) * width_v;
        if (start == end)
            for (int64_t i = at_u; i < u_end; i++)
                memset(out + (slot * width_u + i) * width_v + at_v, 0, sizeof(float) * (size_t)(v_end - at_v));
        for (int64_t k = start; k < end; k += KC) {
            int64_t depth = end - k < KC ? end - k : KC;
            pack_transposed(rows_packed, u, u_stride, k, depth, at_u, u_end - at_u);
            for (int64_t n = at_v; n < v_end; n += NR) {
                pack_dense_columns(panel, v, FLOAT_WEIGHT, v_stride, v_index, n, v_end, k, depth);
                multiply_rows(rows_packed, panel, u_end - at_u, depth, to + n, width_v, v_end - n, k > start);
            }
        }
    }
}
