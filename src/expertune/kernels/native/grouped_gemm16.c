/* Grouped GEMMs of bfloat16 with sums in float32: what grouped_gemm.c does, where the CPU multiplies 16 bits.

   Weights are dequantized into tiles of 16 x 32 numbers that stay in the first two levels of cache, and x is rounded into
   tiles once for all columns of an item. A tile holds the pairs of the contraction side by side, as AMX and VDPBF16PS
   read them. Where W's rows are the output (`transposed`) W's tiles are the left factor and the result is y's transpose:
   neither the packed bytes nor the weights are ever transposed. Each element of y is summed in the contraction's order,
   whatever the number of threads and the size of an item. */
#include "grouped_gemm16.h"
#include "sigmoid.h"

#ifndef WITHOUT_AVX512
#include <omp.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,amx-tile,amx-bf16")))

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

/* ---- SwiGLU --------------------------------------------------------------------------------------------------------- */

/* As `exponential` of sigmoid.h, 16 at a time. */
AVX512 INLINE __m512 exponential16(__m512 x)
{
    x = _mm512_min_ps(_mm512_set1_ps(EXP_MOST), _mm512_max_ps(_mm512_set1_ps(EXP_LEAST), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN_2_HIGH), x);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN_2_LOW), x);
    __m512 p = _mm512_set1_ps(EXP_FIRST);
#define TERM(constant) p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(constant));
    EXP_OTHERS(TERM)
#undef TERM
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(x, x), x), _mm512_set1_ps(1.0f));
    __m512i power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_mul_ps(p, _mm512_castsi512_ps(power));
}

/* gate = silu(gate) * up, `count` numbers each; a multiple of 16. */
AVX512 static void activate(float *gate, const float *up, int64_t count)
{
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t i = 0; i < count; i += 16) {
        __m512 g = _mm512_load_ps(gate + i);
        __m512 s = _mm512_div_ps(one, _mm512_add_ps(one, exponential16(_mm512_sub_ps(_mm512_setzero_ps(), g))));
        _mm512_store_ps(gate + i, _mm512_mul_ps(_mm512_mul_ps(g, s), _mm512_load_ps(up + i)));
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

/* sums of `width` columns of W's output from n on, as y or its transpose: updates included. */
static void sum_columns(
    Block *block, const Product *p, const Scratch *s, int64_t e, int64_t start, int64_t rows, int64_t n, int64_t width,
    int64_t end, float *sums)
{
    int64_t blocks = (rows + TILE - 1) / TILE, height = blocks * TILE, steps = (p->depth + DEPTH - 1) / DEPTH;
    int64_t wide = (width + SPAN - 1) / SPAN * SPAN;
    for (int64_t k = 0; k < p->depth; k += PASS) {
        int64_t here = steps - k / DEPTH < PASS / DEPTH ? steps - k / DEPTH : PASS / DEPTH;
        dequantize_panel(p, e, n, wide, end, k, here * DEPTH, s->w);
        for (int64_t b = 0; b < blocks; b += 2)
            for (int64_t at = 0; at < wide; at += SPAN) {
                const Bfloat *x = s->x + (b * steps + k / DEPTH) * TILE_SIZE;
                const Bfloat *w = s->w + at / TILE * here * TILE_SIZE;
                int several = blocks - b > 1 ? 2 : 1;
                if (p->transposed)
                    block(w, here * TILE_SIZE, x, steps * TILE_SIZE, here, sums + at * height + b * TILE, height, k > 0, 2,
                          several);
                else
                    block(x, steps * TILE_SIZE, w, here * TILE_SIZE, here, sums + b * TILE * WIDE + at, WIDE, k > 0,
                          several, 2);
            }
    }
    for (int i = 0; i < p->num_updates; i++) {
        const Update *update = p->updates + i;
        int64_t own = slot_of(update->slots, e);
        int64_t first = n > update->column ? n : update->column;
        int64_t last = n + width < update->column_end ? n + width : update->column_end;
        if (own < 0 || first >= last)
            continue;
        const float *b = update->b + own * update->b_expert_stride;
        if (p->transposed)
            update_transposed(update, b, start, rows, n, width, sums, height);
        else
            add_update(update, b, start, rows, first, last, sums + first - n, WIDE);
    }
}

static void multiply_item(Block *block, const Product *p, int64_t e, int64_t start, int64_t rows, int64_t column, int64_t column_end)
{
    int64_t height = (rows + TILE - 1) / TILE * TILE, steps = (p->depth + DEPTH - 1) / DEPTH;
    int64_t most = p->swiglu ? WIDE / 2 : WIDE;
    Scratch s = scratch_of(p);
    pack_x(p, start, rows, steps, p->transposed, s.x);
    for (int64_t n = column; n < column_end; n += most) {
        int64_t width = column_end - n < most ? column_end - n : most;
        float *y = p->y + start * p->y_stride + n, *up = s.sums + most * height;
        sum_columns(block, p, &s, e, start, rows, n, width, column_end, s.sums);
        if (p->swiglu) {
            sum_columns(block, p, &s, e, start, rows, n + p->columns, width, column_end + p->columns, up);
            activate(s.sums, up, width * height);
        }
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
