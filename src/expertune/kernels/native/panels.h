/* Panels of the GEMMs in float32: sizes, and who makes them. */
#ifndef EXPERTUNE_PANELS_H
#define EXPERTUNE_PANELS_H

#include "grouped_gemm.h"

#define MR 6      /* rows of a panel of x */
#define NR 16     /* columns of a panel of B */
#define KC 256    /* contraction of one pass; a multiple of BLOCK */
#define MC 768    /* most rows for which a dequantized panel is used at once */
#define STRIPE 64 /* columns that are dequantized together where B lies along its columns */

/* Panels of this thread, kept from call to call: MC x KC of x, then STRIPE x KC of B. */
float *panels(void);

/* x[row .. row + rows, k .. k + depth] -> panels [depth][MR], short panels filled with zeros. */
void pack_rows(
    float *to, const float *x, int64_t stride, const int64_t *index, int64_t row, int64_t rows, int64_t k, int64_t depth);

/* u[row .. row + depth, column .. column + width], transposed -> panels [depth][MR]. */
void pack_transposed(float *to, const float *u, int64_t stride, int64_t row, int64_t depth, int64_t column, int64_t width);

/* 16 matrix rows from `row` on, contraction k .. k + depth -> [depth][NR]. Rows beyond `end` give zeros. */
void pack_nf4_rows(float *to, const Nf4 *w, int64_t first_matrix, int64_t row, int64_t end, int64_t k, int64_t depth);

/* Matrix rows k .. k + depth, 64 columns from `column` on -> four panels [depth][NR], KC rows apart. */
void pack_nf4_columns(float *to, const Nf4 *w, int64_t first_matrix, int64_t k, int64_t depth, int64_t column);

/* b's rows `row` .. , transposed -> [depth][NR]. */
void pack_dense_rows(
    float *to, const void *b, int kind, int64_t stride, int64_t row, int64_t end, int64_t k, int64_t depth);

/* b's rows k .. k + depth (of sorted tokens, where there is an index) -> [depth][NR]. */
void pack_dense_columns(
    float *to, const void *b, int kind, int64_t stride, const int64_t *index, int64_t column, int64_t end, int64_t k,
    int64_t depth);

#endif
