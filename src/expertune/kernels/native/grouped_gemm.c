/* Grouped GEMMs in float32: y[tokens of e] = x[tokens of e] @ B[e], dequantizing B a panel at a time inside the loop.

   The plan is that of Goto and van de Geijn (2008): B is brought into panels of 16 columns that stay in the first-level
   cache, x into panels of 6 rows that stay in the second, and a kernel of 12 accumulators runs over the contraction. What
   is dequantized is used for all rows of the expert and never written to memory. Each element of y is summed by one thread in
   one order, whatever the number of threads: two runs give identical bytes. */
#include "panels.h"

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

/* Where row i of x lies, from column k on: in x itself, or dropped in `buffer` [MR][KC]. */
INLINE const float *row_of_x(const Product *p, int64_t row, int64_t k, int64_t depth, float *buffer)
{
    const float *x = p->x + (p->index == NULL ? row : p->index[row]) * p->x_stride + k;
    if (p->dropout == NULL)
        return x;
    drop_row(x, buffer, depth, p->dropout, row, k);
    return buffer;
}

/* The same for all rows of an item whose only panel this is: to pack what is read once would cost more than to read it. */
static void multiply_only_panel(
    const Product *p, int64_t row, int64_t rows, int64_t k, const float *panel, int64_t depth, float *y, int64_t width)
{
    float dropped[MR][KC];
    for (int64_t first = 0; first < rows; first += MR, y += MR * p->y_stride) {
        const float *x[MR];
        int mr = (int)(rows - first < MR ? rows - first : MR);
        for (int i = 0; i < mr; i++)
            x[i] = row_of_x(p, row + first + i, k, depth, dropped[i]);
        if (mr == MR)
            multiply_unpacked(MR, x, panel, depth, y, p->y_stride, width, k > 0);
        else
            for (int i = 0; i < mr; i++)
                multiply_unpacked(1, x + i, panel, depth, y + i * p->y_stride, p->y_stride, width, k > 0);
    }
}

/* As `pack_rows`, of x as it is or dropped. */
static void pack_x_rows(const Product *p, float *to, int64_t row, int64_t rows, int64_t k, int64_t depth)
{
    float dropped[MR * KC];
    if (p->dropout == NULL) {
        pack_rows(to, p->x, p->x_stride, p->index, row, rows, k, depth);
        return;
    }
    for (int64_t first = 0; first < rows; first += MR, to += MR * depth) {
        int64_t count = rows - first < MR ? rows - first : MR;
        for (int64_t i = 0; i < count; i++)
            row_of_x(p, row + first + i, k, depth, dropped + i * depth);
        pack_rows(to, dropped, depth, NULL, 0, count, 0, depth);
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

/* ---- low-rank updates ------------------------------------------------------------------------------------------- */

/* to[columns] = or += h[rank] @ b [rank, `stride` apart]. */
static void multiply_low_rank(
    const float *h, int64_t rank, const float *b, int64_t stride, float *to, int64_t columns, int add)
{
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) {
        __m256 sum = add ? _mm256_loadu_ps(to + i) : _mm256_setzero_ps();
        for (int64_t r = 0; r < rank; r++)
            sum = _mm256_fmadd_ps(_mm256_set1_ps(h[r]), _mm256_loadu_ps(b + r * stride + i), sum);
        _mm256_storeu_ps(to + i, sum);
    }
    for (; i < columns; i++) {
        float sum = add ? to[i] : 0.0f;
        for (int64_t r = 0; r < rank; r++)
            sum = __builtin_fmaf(h[r], b[r * stride + i], sum);
        to[i] = sum;
    }
}

/* As `add_update`, and to the bit the same up to KC ranks: b as it lies has its ranks a row apart, in the same few sets of
   the cache, and one sum over many of them would wait for its own last addition. */
static void add_update_in_panels(
    const Update *u, const float *b, int64_t row, int64_t rows, int64_t first, int64_t last, float *sums, int64_t stride)
{
    float *rows_packed = panels(), *panel = rows_packed + (MC + MR) * KC, low[MR * STRIPE];
    int64_t width = u->column_end - u->column;
    for (int64_t k = 0; k < u->rank; k += KC) {
        int64_t depth = u->rank - k < KC ? u->rank - k : KC;
        pack_rows(rows_packed, u->h, u->h_stride, NULL, row, rows, k, depth);
        for (int64_t n = first; n < last; n += STRIPE) {
            int64_t count = last - n < STRIPE ? last - n : STRIPE, column = n - u->column;
            for (int64_t j = 0; j < count; j += NR)
                pack_dense_columns(panel + j * depth, b, FLOAT_WEIGHT, width, NULL, column + j, column + count, k, depth);
            for (int64_t i = 0; u->dropout == NULL && i < count; i += NR)
                multiply_rows(rows_packed, panel + i * depth, rows, depth, sums + n - first + i, stride, count - i, 1);
            for (int64_t i = 0; u->dropout != NULL && i < rows; i += MR) {
                int mr = (int)(rows - i < MR ? rows - i : MR);
                for (int64_t j = 0; j < count; j += NR)
                    multiply_tile(mr, rows_packed + i * depth, panel + j * depth, depth, low + j, STRIPE, 0);
                for (int64_t m = 0; m < mr; m++) {
                    float *to = sums + (i + m) * stride + n - first;
                    drop_row(low + m * STRIPE, low + m * STRIPE, count, u->dropout, row + i + m, column);
                    for (int64_t j = 0; j < count; j++)
                        to[j] += low[m * STRIPE + j];
                }
            }
        }
    }
}

#define PANEL_RANK 16 /* from which on panels are faster */

void add_update(
    const Update *u, const float *b, int64_t row, int64_t rows, int64_t first, int64_t last, float *sums, int64_t stride)
{
    enum { AT_ONCE = 256 };
    float low[AT_ONCE];
    if (u->rank >= PANEL_RANK && rows >= MR) {
        add_update_in_panels(u, b, row, rows, first, last, sums, stride);
        return;
    }
    for (int64_t i = row; i < row + rows; i++, sums += stride)
        for (int64_t n = first; n < last; n += AT_ONCE) {
            int64_t count = last - n < AT_ONCE ? last - n : AT_ONCE;
            const float *h = u->h + i * u->h_stride, *from = b + n - u->column;
            float *to = sums + n - first;
            if (u->dropout == NULL) {
                multiply_low_rank(h, u->rank, from, u->column_end - u->column, to, count, 1);
                continue;
            }
            multiply_low_rank(h, u->rank, from, u->column_end - u->column, low, count, 0);
            drop_row(low, low, count, u->dropout, i, n - u->column);
            for (int64_t j = 0; j < count; j++)
                to[j] += low[j];
        }
}

/* ---- one item: rows of one expert, some columns of y -------------------------------------------------------------- */

static int runs_in_bfloat(const Product *p)
{
    return p->arithmetic == AVX512_BFLOAT || p->arithmetic == AMX_BFLOAT;
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
    if (p->arithmetic == INTEGER_ARITHMETIC) {
        multiply_integers(p, e, row, rows, column, column_end);
        contraction = 0;
    }
    if (p->kind != NF4_WEIGHT && slot >= 0)
        dense += slot * p->dense_expert_stride * (p->kind == FLOAT_WEIGHT ? 4 : 2);
    if (slot < 0)
        for (int64_t i = row; i < row + rows; i++)
            memset(p->y + i * p->y_stride + column, 0, sizeof(float) * (size_t)(column_end - column));
    for (int64_t k = 0; k < contraction; k += KC) {
        int64_t depth = contraction - k < KC ? contraction - k : KC;
        if (p->columns > NR)
            pack_x_rows(p, rows_packed, row, rows, k, depth);
        for (int64_t n = column; n < column_end; n += NR) {
            float *at = panel;
            if (p->kind == NF4_WEIGHT && !p->transposed) {
                if ((n - column) % STRIPE == 0)
                    pack_nf4_columns(panel, p->nf4, e * p->parts, k, depth, n);
                at = panel + (n - column) % STRIPE * KC;
            } else if (p->kind == NF4_WEIGHT)
                pack_nf4_rows(panel, p->nf4, e * p->parts, n, column_end, k, depth);
            else if (p->transposed)
                pack_dense_rows(panel, dense, p->kind, p->dense_stride, n, column_end, k, depth);
            else
                pack_dense_columns(panel, dense, p->kind, p->dense_stride, NULL, n, column_end, k, depth);
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
        if (!p->transposed && first < last)
            add_update(update, b, row, rows, first, last, p->y + row * p->y_stride + first, p->y_stride);
        for (int64_t k = 0; p->transposed && k < update->rank && first < last; k += KC) {
            int64_t depth = update->rank - k < KC ? update->rank - k : KC;
            pack_rows(rows_packed, update->h, update->h_stride, NULL, row, rows, k, depth);
            for (int64_t n = first; n < last; n += NR) {
                pack_dense_rows(panel, b, FLOAT_WEIGHT, update->rank, n - update->column, last - update->column, k, depth);
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
    int64_t wanted = (runs_in_bfloat(p) ? 2 : 4) * p->threads;
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
        int64_t most = runs_in_bfloat(p) ? BFLOAT_ROWS : p->arithmetic == INTEGER_ARITHMETIC ? INTEGER_ROWS : MC;
        int64_t panel = runs_in_bfloat(p) ? 32 : MR;
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

#define OUTER_ROWS 96 /* of u's columns that are multiplied at once */

/* out[slot of e] [width_u, width_v] = u[tokens of e].T @ v[tokens of e], v dropped where it has a dropout: gradients of
   low-rank factors. Experts without tokens get 0, and nothing is written for those without a slot. */
EXPORT void expertune_outer(
    const float *u, int64_t u_stride, int64_t width_u, const float *v, int64_t v_stride, const int64_t *v_index,
    int64_t width_v, const Dropout *dropout, const int64_t *offsets, int64_t experts, const int64_t *slots, float *out,
    int threads)
{
    int64_t high = width_u < OUTER_ROWS ? width_u : OUTER_ROWS, wide = width_v < 256 ? width_v : 256;
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
        float *dropped = rows_packed + (OUTER_ROWS + MR) * KC;
        float *to = out + (slot * width_u + at_u) * width_v;
        if (start == end)
            for (int64_t i = at_u; i < u_end; i++)
                memset(out + (slot * width_u + i) * width_v + at_v, 0, sizeof(float) * (size_t)(v_end - at_v));
        for (int64_t k = start; k < end; k += KC) {
            int64_t depth = end - k < KC ? end - k : KC;
            pack_transposed(rows_packed, u, u_stride, k, depth, at_u, u_end - at_u);
            for (int64_t i = 0; dropout != NULL && i < depth; i++)
                drop_row(v + (v_index == NULL ? k + i : v_index[k + i]) * v_stride + at_v, dropped + i * wide, v_end - at_v,
                         dropout, k + i, at_v);
            for (int64_t n = at_v; n < v_end; n += NR) {
                if (dropout != NULL)
                    pack_dense_columns(panel, dropped, FLOAT_WEIGHT, wide, NULL, n - at_v, v_end - at_v, 0, depth);
                else
                    pack_dense_columns(panel, v, FLOAT_WEIGHT, v_stride, v_index, n, v_end, k, depth);
                multiply_rows(rows_packed, panel, u_end - at_u, depth, to + n, width_v, v_end - n, k > start);
            }
        }
    }
}
