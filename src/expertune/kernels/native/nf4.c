/* The NF4 codec: quantize and dequantize blocks of 64 weights. The bytes and values are those of bitsandbytes. */
#include "common.h"

/* The 15 bounds between neighboring codes, ascending, laid out for a search in four steps. A value's code is the number of
   bounds below it, as torch.bucketize counts. */
typedef struct {
    __m256 eighth, fourth, twelfth; /* bounds 7, 3 and 11 */
    __m256 second;                  /* bounds 1, 5, 9, 13 */
    __m256 first;                   /* bounds 0, 2, 4 .. 14 */
} Bounds;

INLINE Bounds bounds_of(const float *b)
{
    return (Bounds){
        .eighth = _mm256_set1_ps(b[7]),
        .fourth = _mm256_set1_ps(b[3]),
        .twelfth = _mm256_set1_ps(b[11]),
        .second = _mm256_setr_ps(b[1], b[5], b[9], b[13], 0.0f, 0.0f, 0.0f, 0.0f),
        .first = _mm256_setr_ps(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14]),
    };
}

/* One bit of the codes more: 2 * code + (value > bound). */
INLINE __m256i next_bit(__m256i codes, __m256 scaled, __m256 bound)
{
    __m256 above = _mm256_cmp_ps(scaled, bound, _CMP_GT_OQ);
    return _mm256_sub_epi32(_mm256_add_epi32(codes, codes), _mm256_castps_si256(above));
}

INLINE __m256i codes_of(__m256 scaled, Bounds bounds)
{
    __m256 above = _mm256_cmp_ps(scaled, bounds.eighth, _CMP_GT_OQ);
    __m256i codes = _mm256_srli_epi32(_mm256_castps_si256(above), 31);
    codes = next_bit(codes, scaled, _mm256_blendv_ps(bounds.fourth, bounds.twelfth, above));
    codes = next_bit(codes, scaled, _mm256_permutevar8x32_ps(bounds.second, codes));
    return next_bit(codes, scaled, _mm256_permutevar8x32_ps(bounds.first, codes));
}

INLINE __m256 load_source(const void *source, int64_t at, int kind)
{
    if (kind == 0)
        return _mm256_loadu_ps((const float *)source + at);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)source + at));
    if (kind == 1)
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    return _mm256_cvtph_ps(half);
}

/* Weights as multiples of a scale, within the codebook's reach. bitsandbytes multiplies by the reciprocal, of no less than
   1e-38, and clamps. */
INLINE __m256 scaled_by(__m256 values, __m256 reciprocal)
{
    __m256 scaled = _mm256_mul_ps(values, reciprocal);
    return _mm256_min_ps(_mm256_max_ps(scaled, _mm256_set1_ps(-1.0f)), _mm256_set1_ps(1.0f));
}

INLINE __m256 reciprocal_of(float scale)
{
    return _mm256_set1_ps(1.0f / (scale > -1e-38f && scale < 1e-38f ? 1e-38f : scale));
}

/* The packed codes of 64 weights, for a scale that is given. */
INLINE void encode_block(const __m256 *values, float scale, Bounds bounds, uint8_t *packed)
{
    __m256 reciprocal = reciprocal_of(scale);
    __m256i halves[2];
    for (int i = 0; i < 2; i++) {
        __m256i codes[4];
        for (int j = 0; j < 4; j++)
            codes[j] = codes_of(scaled_by(values[4 * i + j], reciprocal), bounds);
        __m256i low = _mm256_packus_epi32(codes[0], codes[1]), high = _mm256_packus_epi32(codes[2], codes[3]);
        /* 16 times the even code and the odd one: the first of two weights is in the high half of their byte. */
        halves[i] = _mm256_maddubs_epi16(_mm256_packus_epi16(low, high), _mm256_set1_epi16(0x0110));
    }
    /* Two bytes of each vector are in the low lane, its other two in the high lane. */
    __m256i bytes = _mm256_packus_epi16(halves[0], halves[1]);
    __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_storeu_si128((__m128i *)packed, _mm_unpacklo_epi16(low, high));
    _mm_storeu_si128((__m128i *)(packed + 16), _mm_unpackhi_epi16(low, high));
}

/* Returns whether all 64 weights are finite. */
INLINE int quantize_block(const void *source, int64_t at, int kind, Bounds bounds, uint8_t *packed, float *absmax)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 values[8];
    __m256 largest = _mm256_setzero_ps(), finite = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    for (int i = 0; i < 8; i++) {
        values[i] = load_source(source, at + 8 * i, kind);
        __m256 size = _mm256_andnot_ps(sign, values[i]);
        largest = _mm256_max_ps(largest, size);
        finite = _mm256_and_ps(finite, _mm256_cmp_ps(size, _mm256_set1_ps(FLT_MAX), _CMP_LE_OQ));
    }
    if (_mm256_movemask_ps(finite) != 255)
        return 0;
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    float most = _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
    *absmax = most;
    encode_block(values, most, bounds, packed);
    return 1;
}

/* Returns how many blocks hold a weight that is not finite; such a block is left unwritten.
   kind: 0 float32, 1 bfloat16, 2 float16. bounds: float32 [15], ascending. */
EXPORT int64_t expertune_quantize(
    const void *source, int kind, int64_t blocks, const float *bounds, uint8_t *packed, float *absmax, int threads)
{
    int64_t bad = 0;
    const Bounds between = bounds_of(bounds);
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : bad)
    for (int64_t b = 0; b < blocks; b++) {
        uint8_t *out = packed + b * BLOCK_BYTES;
        if (kind == 0)
            bad += !quantize_block(source, b * BLOCK, 0, between, out, absmax + b);
        else if (kind == 1)
            bad += !quantize_block(source, b * BLOCK, 1, between, out, absmax + b);
        else
            bad += !quantize_block(source, b * BLOCK, 2, between, out, absmax + b);
    }
    return bad;
}

INLINE double sum_of(__m256d sums)
{
    double lanes[4];
    _mm256_storeu_pd(lanes, sums);
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

INLINE __m256d add_to(__m256d sums, __m256 terms)
{
    sums = _mm256_add_pd(sums, _mm256_cvtps_pd(_mm256_castps256_ps128(terms)));
    return _mm256_add_pd(sums, _mm256_cvtps_pd(_mm256_extractf128_ps(terms, 1)));
}

/* Weighted squared error of 64 weights at a scale; and the scale that is best for the same codes. Sums are in double, so
   that their order decides nothing. */
INLINE double error_at(
    const __m256 *values, const float *importance, float scale, Bounds bounds, const float *codebook, float *better)
{
    __m256 reciprocal = reciprocal_of(scale), wide = _mm256_set1_ps(scale);
    __m256 low = _mm256_loadu_ps(codebook), high = _mm256_loadu_ps(codebook + 8), ones = _mm256_set1_ps(1.0f);
    __m256d errors = _mm256_setzero_pd(), products = _mm256_setzero_pd(), squares = _mm256_setzero_pd();
    for (int i = 0; i < 8; i++) {
        __m256 unit = look_up(codes_of(scaled_by(values[i], reciprocal), bounds), low, high);
        __m256 weight = importance == NULL ? ones : _mm256_loadu_ps(importance + 8 * i);
        __m256 off = _mm256_sub_ps(values[i], _mm256_mul_ps(unit, wide));
        errors = add_to(errors, _mm256_mul_ps(_mm256_mul_ps(off, off), weight));
        if (better != NULL) {
            __m256 weighted = _mm256_mul_ps(unit, weight);
            products = add_to(products, _mm256_mul_ps(weighted, values[i]));
            squares = add_to(squares, _mm256_mul_ps(weighted, unit));
        }
    }
    if (better != NULL)
        *better = (float)(sum_of(products) / sum_of(squares));
    return sum_of(errors);
}

/* Scales of blocks by error: the best of `factors` times the largest magnitude, and then least squares for its codes,
   `rounds` times. `importance` is [columns] or NULL. scale: in, the largest magnitude of each block; out, the best. */
EXPORT void expertune_fit(
    const void *source, int kind, int64_t blocks, int64_t row_blocks, const float *importance, const float *factors,
    int64_t num_factors, int64_t rounds, const float *bounds, const float *codebook, float *scale, int threads)
{
    const Bounds between = bounds_of(bounds);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < blocks; b++) {
        const float *of_block = importance == NULL ? NULL : importance + (b % row_blocks) * BLOCK;
        __m256 values[8];
        for (int i = 0; i < 8; i++)
            values[i] = load_source(source, b * BLOCK + 8 * i, kind);
        float most = scale[b], best = most;
        double least = error_at(values, of_block, most, between, codebook, NULL);
        for (int64_t f = 0; f < num_factors; f++) {
            double error = error_at(values, of_block, most * factors[f], between, codebook, NULL);
            if (error < least) {
                least = error;
                best = most * factors[f];
            }
        }
        for (int64_t round = 0; round < rounds; round++) {
            float better;
            error_at(values, of_block, best, between, codebook, &better);
            if (!(better > 0.0f && better <= FLT_MAX))
                break;
            double error = error_at(values, of_block, better, between, codebook, NULL);
            if (!(error < least))
                break;
            least = error;
            best = better;
        }
        scale[b] = best;
    }
}

/* The packed codes of blocks whose scales are given. */
EXPORT void expertune_encode(
    const void *source, int kind, int64_t blocks, const float *bounds, const float *scale, uint8_t *packed, int threads)
{
    const Bounds between = bounds_of(bounds);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < blocks; b++) {
        __m256 values[8];
        for (int i = 0; i < 8; i++)
            values[i] = load_source(source, b * BLOCK + 8 * i, kind);
        encode_block(values, scale[b], between, packed + b * BLOCK_BYTES);
    }
}

/* Scales of the blocks of one matrix -> float32 [rows * columns / 64]. */
EXPORT void expertune_dequantize_absmax(const Nf4 *w, int64_t matrix, float *out, int threads)
{
    int64_t blocks = w->rows * w->columns / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 16384)
    for (int64_t b = 0; b < blocks; b++)
        out[b] = scale_of(w, matrix, b, 0);
}

/* A block has 16 values only: they are scaled and rounded once, and then looked up a byte at a time. */
INLINE void dequantize_block_bfloat(const Nf4 *w, int64_t matrix, int64_t block, const uint8_t *packed, uint16_t *out)
{
    if (w->halves) {
        /* Four significant bits: they fit bfloat16 as they are. */
        float values[BLOCK];
        uint32_t bits[BLOCK];
        dequantize_block_float(w, matrix, block, packed, values, 16);
        memcpy(bits, values, sizeof bits);
        for (int i = 0; i < BLOCK; i++)
            out[i] = (uint16_t)(bits[i] >> 16);
        return;
    }
    __m256 scale = _mm256_set1_ps(scale_of(w, matrix, block, 0));
    __m256i low = _mm256_srli_epi32(round_bfloat16(_mm256_mul_ps(_mm256_loadu_ps(w->values), scale)), 16);
    __m256i high = _mm256_srli_epi32(round_bfloat16(_mm256_mul_ps(_mm256_loadu_ps(w->values + 8), scale)), 16);
    /* 16 words in order -> their low bytes and their high bytes, as tables for pshufb. */
    __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    __m256i low_bytes = _mm256_and_si256(words, _mm256_set1_epi16(255));
    __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi16(low_bytes, _mm256_srli_epi16(words, 8)), 0xd8);
    __m256i table_low = _mm256_permute2x128_si256(both, both, 0x00);
    __m256i table_high = _mm256_permute2x128_si256(both, both, 0x11);

    const __m256i low_half = _mm256_set1_epi8(15);
    __m256i bytes = _mm256_loadu_si256((const __m256i *)packed);
    __m256i first = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half);
    __m256i second = _mm256_and_si256(bytes, low_half);
    __m256i index[2] = {_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second)};
    for (int i = 0; i < 2; i++) {
        __m256i least = _mm256_shuffle_epi8(table_low, index[i]);
        __m256i most = _mm256_shuffle_epi8(table_high, index[i]);
        __m256i a = _mm256_unpacklo_epi8(least, most);
        __m256i b = _mm256_unpackhi_epi8(least, most);
        /* The low lane holds weights 16 i + 0..15, the high lane weights 16 i + 32..47. */
        _mm_storeu_si128((__m128i *)(out + 16 * i), _mm256_castsi256_si128(a));
        _mm_storeu_si128((__m128i *)(out + 16 * i + 8), _mm256_castsi256_si128(b));
        _mm_storeu_si128((__m128i *)(out + 16 * i + 32), _mm256_extracti128_si256(a, 1));
        _mm_storeu_si128((__m128i *)(out + 16 * i + 40), _mm256_extracti128_si256(b, 1));
    }
}

#define LINE_BYTES 64 /* of the caches */
#define ROWS_AHEAD 16

/* Ask for blocks `first` .. `last` of the row ROWS_AHEAD further on. A few columns of each row lie too far apart for the
   machine to see what comes next: without this it dequantizes them at a third of the speed. */
INLINE void fetch_ahead(const Nf4 *w, int64_t matrix, int64_t row, int64_t first, int64_t last)
{
    int64_t next = row + ROWS_AHEAD < w->rows ? row + ROWS_AHEAD : w->rows - 1;
    int64_t at = (matrix * w->rows + next) * (w->columns / BLOCK) + first;
    for (int64_t b = 0; b < last - first; b += LINE_BYTES / BLOCK_BYTES)
        __builtin_prefetch(w->packed + (at + b) * BLOCK_BYTES);
    __builtin_prefetch((const uint8_t *)w->absmax + at * (w->halves ? 2 : w->codebook == NULL ? 4 : 1));
}

/* Rows and columns of one matrix -> out [row_end - row, column_end - column]. Columns are whole blocks; strides count
   elements. kind: 0 float32, 1 bfloat16. */
EXPORT void expertune_dequantize(
    const Nf4 *w, int64_t matrix, int64_t row, int64_t row_end, int64_t column, int64_t column_end, int kind, void *out,
    int64_t out_stride, int threads)
{
    int64_t blocks = w->columns / BLOCK, first = column / BLOCK, last = column_end / BLOCK;
    const uint8_t *packed = w->packed + matrix * w->rows * (w->columns / 2);
#pragma omp parallel for schedule(static) num_threads(threads) if ((row_end - row) * (column_end - column) > 32768)
    for (int64_t r = row; r < row_end; r++) {
        if (last - first < blocks)
            fetch_ahead(w, matrix, r, first, last);
        for (int64_t b = first; b < last; b++) {
            const uint8_t *from = packed + (r * blocks + b) * BLOCK_BYTES;
            int64_t to = (r - row) * out_stride + (b - first) * BLOCK;
            if (kind == 0)
                dequantize_block_float(w, matrix, r * blocks + b, from, (float *)out + to, 16);
            else
                dequantize_block_bfloat(w, matrix, r * blocks + b, from, (uint16_t *)out + to);
        }
    }
}
