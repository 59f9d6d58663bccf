/* Panels of the GEMMs in integers: weights of 4 bits, looked up as integers. */
#include "grouped_gemm_int16.h"

#include <math.h>

/* The low and the high bytes of a codebook's 16 values as integers of which 1 is `unit`. */
typedef struct {
    __m256i low, high;
} Bytes;

/* What 1 is as an integer: the largest power of two with which no value of the codebook exceeds `most`. */
INLINE float unit_of(const Nf4 *w, float most)
{
    float largest = 0.0f, unit = most;
    for (int i = 0; i < 16; i++)
        largest = fabsf(w->values[i]) > largest ? fabsf(w->values[i]) : largest;
    while (largest * unit > most)
        unit /= 2;
    return unit;
}

INLINE Bytes bytes_of(const Nf4 *w, float unit)
{
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; i++) {
        long value = lrintf(w->values[i] * unit);
        value = value > INT16_MAX ? INT16_MAX : value;
        low[i] = (uint8_t)(value & 255), high[i] = (uint8_t)(value >> 8 & 255);
    }
    return (Bytes){_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                   _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high))};
}

/* Bytes of 16 rows, 32 of each -> 16 vectors that hold bytes i and 16 + i of each row: four perfect shuffles. */
INLINE void transpose_bytes(__m256i v[16])
{
    for (int round = 0; round < 4; round++) {
        __m256i out[16];
        for (int i = 0; i < 8; i++) {
            out[2 * i] = _mm256_unpacklo_epi8(v[i], v[i + 8]);
            out[2 * i + 1] = _mm256_unpackhi_epi8(v[i], v[i + 8]);
        }
        for (int i = 0; i < 16; i++)
            v[i] = out[i];
    }
}

INLINE void look_up_rows_of(
    int kind, const Nf4 *w, int64_t first_matrix, int64_t row, int64_t end, int64_t k, int64_t depth, IntegerPanel to)
{
    const int halves = kind == HALVES ? 2 : 1;
    const int64_t blocks = w->columns / BLOCK;
    Matrix m[NR];
    int64_t local[NR];
    for (int i = 0; i < NR; i++) {
        int64_t at = row + i < end ? row + i : end - 1;
        m[i] = matrix_of(w, kind, first_matrix + at / w->rows);
        local[i] = at % w->rows * blocks;
    }
    const float unit = unit_of(w, MOST_WEIGHT), worth = 1.0f / unit;
    const Bytes table = bytes_of(w, unit);
    const __m256i low_half = _mm256_set1_epi8(15);
    __m256i *pairs = (__m256i *)to.pairs;
    for (int64_t block = k / BLOCK; block < (k + depth) / BLOCK; block++, pairs += BLOCK / 2 * 2) {
        for (int half = 0; half < halves; half++, to.scales += NR)
            for (int i = 0; i < NR; i++)
                to.scales[i] = row + i < end ? scale_in(&m[i], kind, local[i] + block, half) * worth : 0.0f;
        __m256i v[16];
        for (int i = 0; i < NR; i++) {
            const uint8_t *packed = m[i].packed + (local[i] + block) * BLOCK_BYTES;
            v[i] = _mm256_loadu_si256((const __m256i *)packed);
            if (block % 2 == 0)   /* of the next panel: a row's part is too short for the processor to see it coming */
                _mm_prefetch((const char *)packed + NR * blocks * BLOCK_BYTES, _MM_HINT_T0);
        }
        transpose_bytes(v);
        for (int j = 0; j < 16; j++) {
            __m256i even = _mm256_and_si256(_mm256_srli_epi16(v[j], 4), low_half), odd = _mm256_and_si256(v[j], low_half);
            __m256i even_low = _mm256_shuffle_epi8(table.low, even), even_high = _mm256_shuffle_epi8(table.high, even);
            __m256i odd_low = _mm256_shuffle_epi8(table.low, odd), odd_high = _mm256_shuffle_epi8(table.high, odd);
            __m256i a = _mm256_unpacklo_epi8(even_low, even_high), b = _mm256_unpackhi_epi8(even_low, even_high);
            __m256i c = _mm256_unpacklo_epi8(odd_low, odd_high), d = _mm256_unpackhi_epi8(odd_low, odd_high);
            __m256i ac = _mm256_unpacklo_epi16(a, c), ac_high = _mm256_unpackhi_epi16(a, c);
            __m256i bd = _mm256_unpacklo_epi16(b, d), bd_high = _mm256_unpackhi_epi16(b, d);
            _mm256_store_si256(pairs + 2 * j, _mm256_permute2x128_si256(ac, ac_high, 0x20));
            _mm256_store_si256(pairs + 2 * j + 1, _mm256_permute2x128_si256(bd, bd_high, 0x20));
            _mm256_store_si256(pairs + 2 * (j + 16), _mm256_permute2x128_si256(ac, ac_high, 0x31));
            _mm256_store_si256(pairs + 2 * (j + 16) + 1, _mm256_permute2x128_si256(bd, bd_high, 0x31));
        }
    }
}

void look_up_rows(const Nf4 *w, int64_t first_matrix, int64_t row, int64_t end, int64_t k, int64_t depth, IntegerPanel to)
{
    BY_KIND(w, look_up_rows_of, w, first_matrix, row, end, k, depth, to)
}

/* The largest and the least of some bytes. */
INLINE void extremes(const uint8_t *from, int64_t count, uint8_t *largest, uint8_t *least)
{
    __m256i most = _mm256_setzero_si256(), fewest = _mm256_set1_epi8(-1);
    uint8_t lanes[64];
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)(from + i));
        most = _mm256_max_epu8(most, bytes), fewest = _mm256_min_epu8(fewest, bytes);
    }
    _mm256_storeu_si256((__m256i *)lanes, most), _mm256_storeu_si256((__m256i *)(lanes + 32), fewest);
    *largest = 0, *least = 255;
    for (int j = 0; j < 32; j++) {
        *largest = lanes[j] > *largest ? lanes[j] : *largest;
        *least = lanes[32 + j] < *least ? lanes[32 + j] : *least;
    }
    for (; i < count; i++) {
        *largest = from[i] > *largest ? from[i] : *largest;
        *least = from[i] < *least ? from[i] : *least;
    }
}

/* The largest scale of a row's blocks, whose first one is number `block`. The 8-bit codes are in their values' order; of
   small rows what quantizing scales left may be negative. */
INLINE float largest_scale(int kind, const Matrix *m, int64_t block, int64_t blocks)
{
    uint8_t most, least;
    float largest = 0.0f;
    if (kind == HALVES) {
        extremes(m->codes + 2 * block, 2 * blocks, &most, &least);
        return power_of_two(most);
    }
    if (kind == PLAIN_ABSMAX)
        for (int64_t i = 0; i < blocks; i++)
            largest = fabsf(m->absmax[block + i]) > largest ? fabsf(m->absmax[block + i]) : largest;
    for (int64_t at = block; kind == DOUBLE_QUANTIZED && at < block + blocks;) {
        int64_t end = (at / NESTED_BLOCK + 1) * NESTED_BLOCK;
        end = end < block + blocks ? end : block + blocks;
        extremes(m->codes + at, end - at, &most, &least);
        const float nested = m->nested[at / NESTED_BLOCK];
        const float high = m->codebook[most] * nested + m->offset, low = m->codebook[least] * nested + m->offset;
        largest = fmaxf(largest, fmaxf(fabsf(high), fabsf(low)));
        at = end;
    }
    return largest;
}

void magnitudes(const Nf4 *w, int64_t first_matrix, int64_t k, int64_t depth, Magnitudes to)
{
    const int kind = kind_of(w);
    const int64_t blocks = w->columns / BLOCK;
    int64_t matrix = first_matrix + k / w->rows, local = k % w->rows;
    Matrix m = matrix_of(w, kind, matrix);
    for (int64_t d = 0; d < depth; d++) {
        const float largest = largest_scale(kind, &m, local * blocks, blocks);
        to.each[d] = largest > 1e-30f && largest < 1e30f ? largest : 1.0f;
        to.inverse[d] = 1.0f / to.each[d];
        if (++local == w->rows && d + 1 < depth)
            m = matrix_of(w, kind, ++matrix), local = 0;
    }
    for (int64_t d = depth; d % BLOCK; d++)
        to.each[d] = to.inverse[d] = 0.0f;
}

/* 64 weights of a row, scaled: 16 bits, in four vectors of 0 .. 7 and 32 .. 39, 8 .. 15 and 40 .. 47, and so on. */
INLINE void scaled_weights(const uint8_t *packed, Bytes table, __m256i ratio, __m256i out[4])
{
    const __m256i low_half = _mm256_set1_epi8(15), bytes = _mm256_loadu_si256((const __m256i *)packed);
    __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half), odd = _mm256_and_si256(bytes, low_half);
    __m256i first = _mm256_unpacklo_epi8(even, odd), second = _mm256_unpackhi_epi8(even, odd);
    __m256i low = _mm256_shuffle_epi8(table.low, first), high = _mm256_shuffle_epi8(table.high, first);
    out[0] = _mm256_mulhrs_epi16(_mm256_unpacklo_epi8(low, high), ratio);
    out[1] = _mm256_mulhrs_epi16(_mm256_unpackhi_epi8(low, high), ratio);
    low = _mm256_shuffle_epi8(table.low, second), high = _mm256_shuffle_epi8(table.high, second);
    out[2] = _mm256_mulhrs_epi16(_mm256_unpacklo_epi8(low, high), ratio);
    out[3] = _mm256_mulhrs_epi16(_mm256_unpackhi_epi8(low, high), ratio);
}

/* Where 64 rows of a column of blocks lie, and their scales over the rows' magnitudes; rows from `count` on are the last one,
   with scales of 0. */
INLINE void rows_of_column(
    int kind, const Nf4 *w, int64_t first_matrix, int64_t k, int64_t count, int64_t column, const float *inverse,
    const uint8_t *packed[BLOCK], float scales[2][BLOCK])
{
    const int64_t blocks = w->columns / BLOCK;
    int64_t matrix = first_matrix + k / w->rows, local = k % w->rows;
    Matrix m = matrix_of(w, kind, matrix);
    for (int64_t d = 0; d < count; d++) {
        const int64_t block = local * blocks + column / BLOCK;
        packed[d] = m.packed + block * BLOCK_BYTES;
        scales[0][d] = scale_in(&m, kind, block, 0) * inverse[d];
        if (kind == HALVES)
            scales[1][d] = scale_in(&m, kind, block, 1) * inverse[d];
        if (++local == w->rows && d + 1 < count)
            m = matrix_of(w, kind, ++matrix), local = 0;
    }
    for (int64_t d = count; d < BLOCK; d++)
        packed[d] = packed[count - 1], scales[0][d] = scales[1][d] = 0.0f;
}

/* Scales of 64 rows as integers of which MOST_WEIGHT is the largest; returns that one, or NaN where one is not finite. */
INLINE float round_scales(const float scales[BLOCK], int16_t to[BLOCK])
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
    for (int i = 0; i < BLOCK; i += 8) {
        __m256 v = _mm256_loadu_ps(scales + i);
        most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v));
        bad = _mm256_add_ps(bad, _mm256_sub_ps(v, v));   /* 0, or NaN where a scale is not finite */
    }
    const float largest = largest_of(most), fault = sum_of(bad);
    const int counts = largest > 1e-34f && fault == 0.0f;
    const __m256 each = _mm256_set1_ps(counts ? MOST_WEIGHT / largest : 0.0f);
    for (int i = 0; i < BLOCK; i += 16) {
        __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(scales + i), each));
        __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(scales + i + 8), each));
        _mm256_storeu_si256((__m256i *)(to + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
    }
    return counts ? largest : fault;
}

INLINE void look_up_columns_of(
    int kind, const Nf4 *w, int64_t first_matrix, int64_t k, int64_t depth, int64_t column, Magnitudes magnitude,
    const IntegerPanel to[4])
{
    const float unit = unit_of(w, MULHRS_ONE), worth = MULHRS_ONE / MOST_WEIGHT / unit;
    const Bytes table = bytes_of(w, unit);
    for (int64_t at = 0; at < depth; at += BLOCK) {
        const int64_t count = depth - at < BLOCK ? depth - at : BLOCK;
        const uint8_t *packed[BLOCK];
        float scales[2][BLOCK];
        int16_t ratios[2][BLOCK];
        rows_of_column(kind, w, first_matrix, k + at, count, column, magnitude.inverse + at, packed, scales);
        for (int half = 0; half < 2; half++) {
            const float most = half == 0 || kind == HALVES ? round_scales(scales[half], ratios[half]) * worth
                                                           : to[0].scales[at / BLOCK * NR];
            for (int i = 0; i < 2 * NR; i++)
                to[2 * half + i / NR].scales[at / BLOCK * NR + i % NR] = most;
        }
        for (int64_t d = 0; d < BLOCK; d += 2) {
            __m256i rows[2][4];
            for (int i = 0; i < 2; i++) {
                __m256i ratio = _mm256_set1_epi16(ratios[0][d + i]);
                if (kind == HALVES)
                    ratio = _mm256_set_m128i(_mm_set1_epi16(ratios[1][d + i]), _mm256_castsi256_si128(ratio));
                scaled_weights(packed[d + i], table, ratio, rows[i]);
            }
            for (int i = 0; i < 4; i++) {
                __m256i low = _mm256_unpacklo_epi16(rows[0][i], rows[1][i]);
                __m256i high = _mm256_unpackhi_epi16(rows[0][i], rows[1][i]);
                const int64_t place = (at + d) / 2 * 2 + i % 2;
                _mm256_store_si256((__m256i *)to[i / 2].pairs + place, _mm256_permute2x128_si256(low, high, 0x20));
                _mm256_store_si256((__m256i *)to[i / 2 + 2].pairs + place, _mm256_permute2x128_si256(low, high, 0x31));
            }
        }
    }
}

void look_up_columns(
    const Nf4 *w, int64_t first_matrix, int64_t k, int64_t depth, int64_t column, Magnitudes magnitude, const IntegerPanel to[4])
{
    BY_KIND(w, look_up_columns_of, w, first_matrix, k, depth, column, magnitude, to)
}
