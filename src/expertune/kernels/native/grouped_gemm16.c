/* Grouped GEMMs of bfloat16 with sums in float32: what grouped_gemm.c does, where the CPU multiplies 16 bits.

   Weights are dequantized into tiles of 16 x 32 numbers that stay in the first two levels of cache, and x is rounded into
   tiles once for all columns of an item. A tile holds the pairs of the contraction side by side, as AMX and VDPBF16PS
   read them. Where W's rows are the output (`transposed`) W's tiles are the left factor and the result is y's transpose:
   neither the packed bytes nor the weights are ever transposed. Each element of y is summed in the contraction's order,
   whatever the number of threads and the size of an item. */
#include "grouped_gemm.h"

#ifndef WITHOUT_BFLOAT16
#include <omp.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")))
#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,amx-tile,amx-bf16")))

#define TILE 16              /* rows of a tile */
#define PAIRS 16             /* pairs of the contraction in a tile */
#define DEPTH (2 * PAIRS)    /* contraction of a tile */
#define TILE_SIZE (TILE * DEPTH)
#define SPAN 32              /* rows, or columns, of a block of 2 x 2 tiles */
#define PASS 512             /* contraction of one pass: so much of W is dequantized at once */
#define WIDE 256             /* columns of y that are summed at once */

#define AHEAD 12             /* rows of W that bytes are brought nearer before their use */

typedef uint16_t Bfloat;

/* What a thread works in: its part of the caller's scratch memory. */
typedef struct {
    Bfloat *w;       /* [WIDE / 16][PASS / DEPTH] tiles */
    float *sums;     /* y, or y's transpose: BFLOAT_ROWS x WIDE */
    Bfloat *x;       /* [blocks of 16 tokens][contraction / DEPTH] tiles */
} Scratch;

static Scratch scratch_of(const Product *p)
{
    char *own = p->scratch + omp_get_thread_num() * p->scratch_stride;
    const size_t w = sizeof(Bfloat) * WIDE * PASS, sums = sizeof(float) * WIDE * BFLOAT_ROWS;
    return (Scratch){(Bfloat *)own, (float *)(own + w), (Bfloat *)(own + w + sums)};
}

/* c[2 x 2 tiles] (+)= a[2][steps] @ b[2][steps]; tiles of one step adjoin where `apart` is one tile. */
typedef void Block(
    const Bfloat *a, int64_t a_apart, const Bfloat *b, int64_t b_apart, int64_t steps, float *c, int64_t stride, int add,
    int rows, int columns);

/* ---- x ----------------------------------------------------------------------------------------------------------- */

/* 32 numbers of a row of x from k on, rounded; zeros beyond `depth`, and where there is no row. */
AVX512 INLINE __m512i rounded(const float *from, int64_t k, int64_t depth)
{
    if (from == NULL || k >= depth)
        return _mm512_setzero_si512();
    if (k + DEPTH <= depth)
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + k + 16), _mm512_loadu_ps(from + k));
    int64_t left = depth - k;
    __mmask16 low = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    __mmask16 high = left <= 16 ? 0 : (__mmask16)((1u << (left - 16)) - 1);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, from + k + 16), _mm512_maskz_loadu_ps(low, from + k));
}

/* 16 x 16 lanes of 32 bits, transposed in place. */
AVX512 INLINE void transpose(__m512i v[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* Tokens row .. row + rows, contraction k .. k + steps * DEPTH -> tiles [blocks of 16 tokens][steps]: [token][32], or
   [pair][token][2] where `paired`. */
AVX512 static void pack_x(const Product *p, int64_t row, int64_t rows, int64_t k, int64_t steps, int paired, Bfloat *to)
{
    for (int64_t first = 0; first < rows; first += TILE) {
        const float *from[TILE];
        for (int i = 0; i < TILE; i++) {
            int64_t at = row + first + i;
            from[i] = first + i < rows ? p->x + (p->index == NULL ? at : p->index[at]) * p->x_stride : NULL;
        }
        for (int64_t step = 0; step < steps; step++, to += TILE_SIZE) {
            __m512i v[16];
            for (int i = 0; i < TILE; i++)
                v[i] = rounded(from[i], k + step * DEPTH, p->depth);
            if (paired)
                transpose(v);
            for (int i = 0; i < TILE; i++)
                _mm512_store_si512(to + i * DEPTH, v[i]);
        }
    }
}

/* ---- W ----------------------------------------------------------------------------------------------------------- */

/* How the bytes of 32 weights become indices: which byte goes to which lane of 16 bits, and its shift there. */
typedef struct {
    __m512i byte, shift;
    __m512 values;
} Decoder;

/* `paired`: weights 4j .. 4j + 3 and 16 + 4j .. 16 + 4j + 3 share the j-th lane of 128 bits, so that unpacking two rows
   gives the pairs of 16 columns; otherwise weights are in order. */
AVX512 INLINE Decoder decoder(const Nf4 *w, int paired)
{
    uint8_t byte[64];
    for (int i = 0; i < 32; i++) {
        int weight = paired ? i / 8 * 4 + i % 4 + i / 4 % 2 * 16 : i;
        byte[2 * i] = byte[2 * i + 1] = (uint8_t)(weight / 2);
    }
    /* The first weight of a byte is its high half. */
    return (Decoder){_mm512_loadu_si512(byte), _mm512_set1_epi32(4), _mm512_loadu_ps(w->values)};
}

/* The 16 values of a code, scaled and rounded; twice, so that an index's fifth bit does not matter. */
AVX512 INLINE __m512i table_of(Decoder d, float scale)
{
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(d.values, _mm512_set1_ps(scale))));
}

/* 16 packed bytes -> their 32 weights; of an index, vpermw reads the five lowest bits. */
AVX512 INLINE __m512i weights_of(Decoder d, const uint8_t *packed, __m512i table)
{
    __m512i bytes = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)packed));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(_mm512_permutexvar_epi8(d.byte, bytes), d.shift), table);
}

/* How a block's scale is held. */
enum { DOUBLE_QUANTIZED, PLAIN_ABSMAX, HALVES };

/* One matrix of an Nf4. */
typedef struct {
    const uint8_t *packed, *codes;
    const float *absmax, *nested, *codebook;
    float offset;
} Matrix;

INLINE Matrix matrix_of(const Nf4 *w, int kind, int64_t index)
{
    int64_t first = index * (w->rows * w->columns / BLOCK);
    Matrix m = {.packed = w->packed + first * BLOCK_BYTES, .codebook = w->codebook};
    if (kind == PLAIN_ABSMAX)
        m.absmax = (const float *)w->absmax + first;
    else
        m.codes = (const uint8_t *)w->absmax + first * (kind == HALVES ? 2 : 1);
    if (kind == DOUBLE_QUANTIZED)
        m.nested = w->nested + index * w->nested_stride, m.offset = w->offset[index];
    return m;
}

/* As `scale_of` of common.h. */
INLINE float scale_in(const Matrix *m, int kind, int64_t block, int half)
{
    if (kind == PLAIN_ABSMAX)
        return m->absmax[block];
    if (kind == DOUBLE_QUANTIZED)
        return m->codebook[m->codes[block]] * m->nested[block / NESTED_BLOCK] + m->offset;
    return power_of_two(m->codes[2 * block + half]);
}

/* The 64 weights of a block; brings nearer what lies `ahead` blocks behind it. */
AVX512 INLINE void weights_of_block(const Matrix *m, int kind, const Decoder *d, int64_t block, int64_t ahead, __m512i out[2])
{
    const uint8_t *packed = m->packed + block * BLOCK_BYTES;
    _mm_prefetch((const char *)(packed + ahead * BLOCK_BYTES), _MM_HINT_T0);
    _mm_prefetch(kind == PLAIN_ABSMAX ? (const char *)(m->absmax + block + ahead)
                                      : (const char *)(m->codes + (block + ahead) * (kind == HALVES ? 2 : 1)), _MM_HINT_T0);
    __m512i table = table_of(*d, scale_in(m, kind, block, 0));
    out[0] = weights_of(*d, packed, table);
    if (kind == HALVES)
        table = table_of(*d, scale_in(m, kind, block, 1));
    out[1] = weights_of(*d, packed + 16, table);
}

AVX512 INLINE void dequantize_rows(
    int kind, const Nf4 *w, int64_t first_matrix, int64_t row, int64_t count, int64_t end, int64_t k, int64_t depth, Bfloat *to)
{
    const Decoder d = decoder(w, 0);
    const int64_t per_row = w->columns / BLOCK, steps = depth / DEPTH, rows = w->rows;
    int64_t index = first_matrix + row / rows, local = row % rows, here = end - row < count ? end - row : count;
    Matrix m = matrix_of(w, kind, index);
    for (int64_t i = 0; i < here; i++, local++) {
        Bfloat *out = to + (i / TILE * steps * TILE + i % TILE) * DEPTH;
        if (local == rows)
            m = matrix_of(w, kind, ++index), local = 0;
        int64_t block = local * per_row + k / BLOCK, last = block + depth / BLOCK;
        for (; block < last; block++, out += 2 * TILE_SIZE) {
            __m512i v[2];
            weights_of_block(&m, kind, &d, block, AHEAD / 4 * per_row, v);
            _mm512_store_si512(out, v[0]);
            _mm512_store_si512(out + TILE_SIZE, v[1]);
        }
    }
    for (int64_t i = here; i < count; i++)
        for (int64_t step = 0; step < steps; step++)
            _mm512_store_si512(to + ((i / TILE * steps + step) * TILE + i % TILE) * DEPTH, _mm512_setzero_si512());
}

AVX512 INLINE void dequantize_columns(
    int kind, const Nf4 *w, int64_t first_matrix, int64_t k, int64_t end, int64_t depth, int64_t column, int64_t width,
    Bfloat *to)
{
    const Decoder d = decoder(w, 1);
    const int64_t per_row = w->columns / BLOCK, steps = depth / DEPTH, rows = w->rows;
    int64_t index = first_matrix + k / rows, local = k % rows;
    Matrix m = matrix_of(w, kind, index);
    for (int64_t row = 0; row < depth; row += 2) {
        Bfloat *out = to + (row / DEPTH * TILE + row % DEPTH / 2) * DEPTH;
        int64_t first = local * per_row + column / BLOCK, second = first + per_row;
        Matrix next = m;
        if (local + 1 == rows && k + row + 1 < end)
            next = matrix_of(w, kind, ++index), second = column / BLOCK, local = -1;
        for (int64_t block = 0; block < width / BLOCK; block++, out += BLOCK / TILE * steps * TILE_SIZE) {
            __m512i a[2], b[2];
            a[0] = a[1] = b[0] = b[1] = _mm512_setzero_si512();
            if (k + row < end)
                weights_of_block(&m, kind, &d, first + block, AHEAD * per_row, a);
            if (k + row + 1 < end)
                weights_of_block(&next, kind, &d, second + block, AHEAD * per_row, b);
            for (int half = 0; half < 2; half++) {
                Bfloat *tile = out + 2 * half * steps * TILE_SIZE;
                _mm512_store_si512(tile, _mm512_unpacklo_epi16(a[half], b[half]));
                _mm512_store_si512(tile + steps * TILE_SIZE, _mm512_unpackhi_epi16(a[half], b[half]));
            }
        }
        m = next, local += 2;
        if (local == rows && k + row + 2 < end)
            m = matrix_of(w, kind, ++index), local = 0;
    }
}

/* A panel of W for a pass of the contraction from k on, in tiles [width / 16][depth / DEPTH]: of [output][32] where W's
   rows are the output, otherwise of [pair][output][2]. Zeros beyond the matrix. */
AVX512 INLINE void dequantize_as(
    int kind, const Product *p, int64_t e, int64_t n, int64_t width, int64_t end, int64_t k, int64_t depth, Bfloat *to)
{
    if (p->transposed)
        dequantize_rows(kind, p->nf4, e * p->parts, n, width, end, k, depth, to);
    else
        dequantize_columns(kind, p->nf4, e * p->parts, k, p->depth, depth, n, width, to);
}

AVX512 static void dequantize_panel(
    const Product *p, int64_t e, int64_t n, int64_t width, int64_t end, int64_t k, int64_t depth, Bfloat *to)
{
    if (p->nf4->halves)
        dequantize_as(HALVES, p, e, n, width, end, k, depth, to);
    else if (p->nf4->codebook == NULL)
        dequantize_as(PLAIN_ABSMAX, p, e, n, width, end, k, depth, to);
    else
        dequantize_as(DOUBLE_QUANTIZED, p, e, n, width, end, k, depth, to);
}

/* ---- 2 x 2 tiles ---------------------------------------------------------------------------------------------------- */

AMX static void block_amx(
    const Bfloat *a, int64_t a_apart, const Bfloat *b, int64_t b_apart, int64_t steps, float *c, int64_t stride, int add,
    int rows, int columns)
{
    const size_t line = 64, skip = sizeof(float) * (size_t)stride;
    float *below = c + TILE * stride;
    if (add) {
        _tile_loadd(0, c, skip);
        if (columns > 1) _tile_loadd(1, c + TILE, skip);
        if (rows > 1) _tile_loadd(2, below, skip);
        if (rows > 1 && columns > 1) _tile_loadd(3, below + TILE, skip);
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
    if (rows > 1 && columns > 1)
        for (int64_t step = 0; step < steps; step++, a += TILE_SIZE, b += TILE_SIZE) {
            _tile_loadd(4, a, line);
            _tile_loadd(6, b, line);
            _tile_loadd(7, b + b_apart, line);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + a_apart, line);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    else if (rows > 1)
        for (int64_t step = 0; step < steps; step++, a += TILE_SIZE, b += TILE_SIZE) {
            _tile_loadd(4, a, line);
            _tile_loadd(5, a + a_apart, line);
            _tile_loadd(6, b, line);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
        }
    else
        for (int64_t step = 0; step < steps; step++, a += TILE_SIZE, b += TILE_SIZE) {
            _tile_loadd(4, a, line);
            _tile_loadd(6, b, line);
            _tile_dpbf16ps(0, 4, 6);
            if (columns > 1) {
                _tile_loadd(7, b + b_apart, line);
                _tile_dpbf16ps(1, 4, 7);
            }
        }
    _tile_stored(0, c, skip);
    if (columns > 1) _tile_stored(1, c + TILE, skip);
    if (rows > 1) _tile_stored(2, below, skip);
    if (rows > 1 && columns > 1) _tile_stored(3, below + TILE, skip);
}

/* 8 rows and one or two tiles of columns. */
AVX512 INLINE void multiply_avx512(
    int columns, const Bfloat *a, const Bfloat *b, int64_t b_apart, int64_t steps, float *c, int64_t stride, int add)
{
    __m512 sum[8][2];
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < columns; j++)
            sum[i][j] = add ? _mm512_loadu_ps(c + i * stride + j * TILE) : _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; step++, a += TILE_SIZE, b += TILE_SIZE)
        for (int pair = 0; pair < PAIRS; pair++) {
            __m512bh right[2];
            for (int j = 0; j < columns; j++)
                right[j] = (__m512bh)_mm512_load_si512(b + j * b_apart + pair * DEPTH);
            for (int i = 0; i < 8; i++) {
                int32_t both;
                memcpy(&both, a + i * DEPTH + 2 * pair, sizeof both);
                __m512bh left = (__m512bh)_mm512_set1_epi32(both);
                for (int j = 0; j < columns; j++)
                    sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
            }
        }
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < columns; j++)
            _mm512_storeu_ps(c + i * stride + j * TILE, sum[i][j]);
}

AVX512 static void block_avx512(
    const Bfloat *a, int64_t a_apart, const Bfloat *b, int64_t b_apart, int64_t steps, float *c, int64_t stride, int add,
    int rows, int columns)
{
    for (int half = 0; half < 2 * rows; half++) {
        const Bfloat *left = a + half / 2 * a_apart + half % 2 * 8 * DEPTH;
        if (columns > 1)
            multiply_avx512(2, left, b, b_apart, steps, c + half * 8 * stride, stride, add);
        else
            multiply_avx512(1, left, b, b_apart, steps, c + half * 8 * stride, stride, add);
    }
}

/* ---- low-rank updates --------------------------------------------------------------------------------------------- */

/* sums [columns][height] += b [columns, rank] @ h.T, both of the columns from `column` on; float32, while the sums are in
   cache. */
AVX512 static void update_transposed(
    const Update *u, const float *b, int64_t row, int64_t rows, int64_t column, int64_t width,
    float *sums, int64_t height)
{
    int64_t first = column > u->column ? column : u->column;
    int64_t last = column + width < u->column_end ? column + width : u->column_end;
    for (int64_t at = 0; at < rows; at += TILE)
        for (int64_t r = 0; r < u->rank; r += TILE) {
            /* h's columns for 16 tokens. */
            int64_t count = u->rank - r < TILE ? u->rank - r : TILE;
            __m512i h[16];
            for (int i = 0; i < TILE; i++)
                h[i] = at + i < rows
                    ? (__m512i)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), u->h + (row + at + i) * u->h_stride + r)
                    : _mm512_setzero_si512();
            transpose(h);
            for (int64_t n = first; n < last; n++) {
                const float *factor = b + (n - u->column) * u->rank + r;
                float *to = sums + (n - column) * height + at;
                __m512 sum = _mm512_load_ps(to);
                for (int64_t i = 0; i < count; i++)
                    sum = _mm512_fmadd_ps(_mm512_set1_ps(factor[i]), (__m512)h[i], sum);
                _mm512_store_ps(to, sum);
            }
        }
}

/* sums [rows][WIDE] += h @ b [rank, columns]. */
AVX512 static void update_plain(
    const Update *u, const float *b, int64_t row, int64_t rows, int64_t column, int64_t width, float *sums)
{
    int64_t first = column > u->column ? column : u->column, wide = u->column_end - u->column;
    int64_t last = column + width < u->column_end ? column + width : u->column_end;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t n = first; n < last; n += TILE) {
            __mmask16 here = last - n < TILE ? (__mmask16)((1u << (last - n)) - 1) : 0xffff;
            float *to = sums + i * WIDE + n - column;
            __m512 sum = _mm512_maskz_loadu_ps(here, to);
            for (int64_t r = 0; r < u->rank; r++)
                sum = _mm512_fmadd_ps(_mm512_set1_ps(u->h[(row + i) * u->h_stride + r]),
                                      _mm512_maskz_loadu_ps(here, b + r * wide + n - u->column), sum);
            _mm512_mask_storeu_ps(to, here, sum);
        }
}

/* ---- an item ------------------------------------------------------------------------------------------------------- */

/* y's transpose [width][rows] -> y: tokens row .. row + rows, `width` columns. */
AVX512 static void store_transposed(const float *sums, int64_t height, float *y, int64_t stride, int64_t rows, int64_t width)
{
    for (int64_t first = 0; first < rows; first += TILE)
        for (int64_t at = 0; at < width; at += TILE) {
            __m512i v[16];
            for (int i = 0; i < TILE; i++)
                v[i] = _mm512_loadu_si512(sums + (at + i) * height + first);
            transpose(v);
            __mmask16 here = width - at >= TILE ? 0xffff : (__mmask16)((1u << (width - at)) - 1);
            for (int i = 0; i < TILE && first + i < rows; i++)
                _mm512_mask_storeu_ps(y + (first + i) * stride + at, here, (__m512)v[i]);
        }
}

static void multiply_item(Block *block, const Product *p, int64_t e, int64_t start, int64_t rows, int64_t column, int64_t column_end)
{
    int64_t blocks = (rows + TILE - 1) / TILE, height = blocks * TILE, steps = (p->depth + DEPTH - 1) / DEPTH;
    Scratch s = scratch_of(p);
    pack_x(p, start, rows, 0, steps, p->transposed, s.x);
    for (int64_t n = column; n < column_end; n += WIDE) {
        int64_t width = column_end - n < WIDE ? column_end - n : WIDE, wide = (width + SPAN - 1) / SPAN * SPAN;
        for (int64_t k = 0; k < p->depth; k += PASS) {
            int64_t here = steps - k / DEPTH < PASS / DEPTH ? steps - k / DEPTH : PASS / DEPTH;
            dequantize_panel(p, e, n, wide, column_end, k, here * DEPTH, s.w);
            for (int64_t b = 0; b < blocks; b += 2)
                for (int64_t at = 0; at < wide; at += SPAN) {
                    const Bfloat *x = s.x + (b * steps + k / DEPTH) * TILE_SIZE;
                    const Bfloat *w = s.w + at / TILE * here * TILE_SIZE;
                    int several = blocks - b > 1 ? 2 : 1;
                    if (p->transposed)
                        block(w, here * TILE_SIZE, x, steps * TILE_SIZE, here, s.sums + at * height + b * TILE, height,
                              k > 0, 2, several);
                    else
                        block(x, steps * TILE_SIZE, w, here * TILE_SIZE, here, s.sums + b * TILE * WIDE + at, WIDE, k > 0,
                              several, 2);
                }
        }
        for (int i = 0; i < p->num_updates; i++) {
            const Update *update = p->updates + i;
            int64_t own = slot_of(update->slots, e);
            if (own < 0)
                continue;
            const float *b = update->b + own * update->b_expert_stride;
            if (p->transposed)
                update_transposed(update, b, start, rows, n, width, s.sums, height);
            else
                update_plain(update, b, start, rows, n, width, s.sums);
        }
        float *y = p->y + start * p->y_stride + n;
        if (p->transposed)
            store_transposed(s.sums, height, y, p->y_stride, rows, width);
        else
            for (int64_t i = 0; i < rows; i++)
                memcpy(y + i * p->y_stride, s.sums + i * WIDE, sizeof(float) * (size_t)width);
    }
}

/* All tiles are 16 rows of 64 bytes: palette 1, bytes of a row from offset 16 on, rows from offset 48 on. */
static const uint8_t tile_config[64] __attribute__((aligned(64))) = {
    [0] = 1,
    [16] = 64, [18] = 64, [20] = 64, [22] = 64, [24] = 64, [26] = 64, [28] = 64, [30] = 64,
    [48] = TILE, [49] = TILE, [50] = TILE, [51] = TILE, [52] = TILE, [53] = TILE, [54] = TILE, [55] = TILE,
};

AMX static void configure_tiles(void)
{
    _tile_loadconfig(tile_config);
}

AMX static void release_tiles(void)
{
    _tile_release();
}

void multiply_bfloat_item(const Product *p, int64_t e, int64_t row, int64_t rows, int64_t column, int64_t column_end)
{
    int amx = p->arithmetic == AMX_BFLOAT;
    Block *block = amx ? block_amx : block_avx512;
    if (amx)
        configure_tiles();
    multiply_item(block, p, e, row, rows, column, column_end);
    if (amx)
        release_tiles();
}

/* What of this file the CPU can run: AMX_BFLOAT, AVX512_BFLOAT or FLOAT_ARITHMETIC. AMX's tiles have to be asked for. */
EXPORT int expertune_bfloat16(void)
{
    unsigned a, b, c, d;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vbmi") ||
        !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return FLOAT_ARITHMETIC;
    int tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    if (tiles && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0)
        return AMX_BFLOAT;
    return AVX512_BFLOAT;
}
#else
/* A compiler that does not know the instructions. */
void multiply_bfloat_item(const Product *p, int64_t e, int64_t row, int64_t rows, int64_t column, int64_t column_end)
{
    (void)p, (void)e, (void)row, (void)rows, (void)column, (void)column_end;
    abort();
}

EXPORT int expertune_bfloat16(void)
{
    return FLOAT_ARITHMETIC;
}
#endif
