/* What the grouped GEMMs in float32 and in bfloat16 share. */
#ifndef EXPERTUNE_GROUPED_GEMM_H
#define EXPERTUNE_GROUPED_GEMM_H

#include "common.h"

#define INTEGER_ROWS 720 /* most tokens that weights looked up as integers are used for at once */
#define BFLOAT_ROWS 512 /* most tokens that weights dequantized to bfloat16 are used for at once */

enum { NF4_WEIGHT = 0, FLOAT_WEIGHT = 1, BFLOAT_WEIGHT = 2 };

/* Of products with NF4 weights, or those of bfloat16 that all experts have; others are in float32. */
enum { FLOAT_ARITHMETIC = 0, AVX512_BFLOAT = 1, AMX_BFLOAT = 2, INTEGER_ARITHMETIC = 3 };

/* Which elements of rows are dropped: a hash of number[row] * stride + column says so; the others are scaled. */
typedef struct {
    const int64_t *number;
    int64_t stride;
    uint32_t seed, seed_high, threshold;
    float scale;
} Dropout;

/* to = from[columns], dropped as columns `column` .. of a row. */
void drop_row(const float *from, float *to, int64_t columns, const Dropout *d, int64_t row, int64_t column);

/* One low-rank update: y[:, column .. column_end] += h @ B, dropped where it has a dropout. h is [R, rank], its scaling
   applied. */
typedef struct {
    const float *h;
    const float *b;            /* transposed: [columns of the part, rank] of each expert; otherwise [rank, columns] */
    const int64_t *slots;      /* which matrix of b is each expert's, negative for none; NULL: that of its number */
    const Dropout *dropout;    /* or NULL; only where B is not transposed */
    int64_t rank, h_stride, b_expert_stride;
    int64_t column, column_end;
} Update;

typedef struct {
    const float *x;            /* rows of `depth` floats */
    const int64_t *index;      /* source row of each sorted token, or NULL */
    const int64_t *offsets;    /* end of each expert's sorted tokens */
    const Nf4 *nf4;            /* kind NF4: `parts` matrices for each expert */
    const void *dense;         /* kinds FLOAT and BFLOAT */
    const int64_t *slots;      /* of the dense matrices, as in Update */
    const Update *updates;
    const Dropout *dropout;    /* of x, or NULL; not with NF4 weights */
    float *y;
    int64_t x_stride, y_stride, dense_stride, dense_expert_stride;
    int64_t experts, parts, depth;
    int64_t columns;           /* of y */
    int32_t kind;
    int32_t transposed;        /* 1: y = x @ B.T (contraction along B's rows); 0: y = x @ B */
    int32_t num_updates;
    int32_t threads;
    int32_t arithmetic;
    int32_t swiglu;            /* 1: y = silu(gate) * up of a transposed product's two halves of columns; in bfloat16 */
    char *scratch;             /* of GEMMs in bfloat16: `scratch_stride` bytes for each thread, aligned to 64 */
    int64_t scratch_stride;
} Product;

/* sums [rows][stride], from column `first` on, += h @ b [rank, columns of the update], dropped where it is to be. */
void add_update(
    const Update *u, const float *b, int64_t row, int64_t rows, int64_t first, int64_t last, float *sums, int64_t stride);

/* An item in bfloat16, its updates in float32; an item has at most BFLOAT_ROWS tokens. */
void multiply_bfloat_item(const Product *p, int64_t e, int64_t row, int64_t rows, int64_t column, int64_t column_end);

/* The same in integers, without its updates; it has at most INTEGER_ROWS tokens. */
void multiply_integers(const Product *p, int64_t e, int64_t row, int64_t rows, int64_t column, int64_t column_end);

#endif
