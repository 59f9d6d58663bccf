/* What the files of this folder share: vector width, the tables, the loop over threads. x86-64 with AVX2 and FMA. */
#ifndef EXPERTUNE_COMMON_H
#define EXPERTUNE_COMMON_H

#include <float.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 64          /* weights that share one absmax; of MXFP4, twice as many as share one exponent */
#define BLOCK_BYTES 32    /* their packed bytes */
#define NESTED_BLOCK 256  /* absmax values that share one scale */
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

/* The bytes of an Nf4Stack: M matrices [rows, columns] one behind the other (see expertune/kernels/nf4). */
typedef struct {
    const uint8_t *packed;
    const void *absmax;      /* 8-bit codes; float32 values where codebook is NULL; exponents of MXFP4 */
    const float *nested;
    const float *offset;
    const float *codebook;
    const float *values;     /* the 16 values that a code stands for */
    int64_t rows, columns, nested_stride;
    int64_t halves;          /* 1: each half of a block has an exponent of its own (MXFP4) */
} Nf4;

/* 2 ** (exponent - 127): the exponent's own bits, but for the least, whose value has no implicit bit. */
INLINE float power_of_two(uint32_t exponent)
{
    uint32_t bits = exponent == 0 ? 0x00400000u : exponent << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The number of an expert's matrix among those that some experts have; negative where it has none. */
INLINE int64_t slot_of(const int64_t *slots, int64_t e)
{
    return slots == NULL ? e : slots[e];
}

/* How a block's scale is held. */
enum { DOUBLE_QUANTIZED, PLAIN_ABSMAX, HALVES };

INLINE int kind_of(const Nf4 *w)
{
    return w->halves ? HALVES : w->codebook == NULL ? PLAIN_ABSMAX : DOUBLE_QUANTIZED;
}

/* Calls an inlined function with the kind as a constant first: compiled once for each, its loops do not ask for it. */
#define BY_KIND(w, function, ...) \
    switch (kind_of(w)) { \
    case HALVES: function(HALVES, __VA_ARGS__); break; \
    case PLAIN_ABSMAX: function(PLAIN_ABSMAX, __VA_ARGS__); break; \
    default: function(DOUBLE_QUANTIZED, __VA_ARGS__); \
    }

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

/* Scale of one block of a matrix, or of one half of it; rounded after each operation, as bitsandbytes has it. */
INLINE float scale_in(const Matrix *m, int kind, int64_t block, int half)
{
    if (kind == PLAIN_ABSMAX)
        return m->absmax[block];
    if (kind == DOUBLE_QUANTIZED)
        return m->codebook[m->codes[block]] * m->nested[block / NESTED_BLOCK] + m->offset;
    return power_of_two(m->codes[2 * block + half]);
}

/* The same by the matrix's number. */
INLINE float scale_of(const Nf4 *w, int64_t matrix, int64_t block, int half)
{
    const int kind = kind_of(w);
    Matrix m = matrix_of(w, kind, matrix);
    return scale_in(&m, kind, block, half);
}

INLINE float total_of(__m256 v)
{
    float lanes[8], sum = 0.0f;
    _mm256_storeu_ps(lanes, v);
    for (int i = 0; i < 8; i++)
        sum += lanes[i];
    return sum;
}

/* 16 packed bytes -> 32 indices in the order of the weights: the first weight of a byte is its high half. */
INLINE void nibbles(__m128i bytes, __m128i *first, __m128i *second)
{
    const __m128i low_half = _mm_set1_epi8(15);
    __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_half);
    __m128i low = _mm_and_si128(bytes, low_half);
    *first = _mm_unpacklo_epi8(high, low);
    *second = _mm_unpackhi_epi8(high, low);
}

/* 8 indices of 4 bits, one to a 32-bit lane -> their values from a table of two halves. */
INLINE __m256 look_up(__m256i index, __m256 table_low, __m256 table_high)
{
    __m256 low = _mm256_permutevar8x32_ps(table_low, index);
    __m256 high = _mm256_permutevar8x32_ps(table_high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

/* Rounded to the nearest bfloat16, ties to even, in the high half of each lane. A NaN stays one: rounded as a number, that of
   GPUs, all of whose bits are set, would become 0. */
INLINE __m256i round_bfloat16(__m256 values)
{
    __m256i bits = _mm256_castps_si256(values);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256 none = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), values, none));
}

/* The same of one number. */
INLINE uint16_t to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((value != value ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

INLINE float of_bfloat16(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The 64 weights of a block -> four runs of 16 floats, `skip` floats apart (16: one behind the other). */
INLINE void dequantize_block_float(const Nf4 *w, int64_t matrix, int64_t block, const uint8_t *packed, float *out, int64_t skip)
{
    __m256 low, high;
    for (int half = 0; half < 2; half++) {
        if (half == 0 || w->halves) {
            __m256 scale = _mm256_set1_ps(scale_of(w, matrix, block, half));
            low = _mm256_mul_ps(_mm256_loadu_ps(w->values), scale);
            high = _mm256_mul_ps(_mm256_loadu_ps(w->values + 8), scale);
        }
        __m128i index[2];
        nibbles(_mm_loadu_si128((const __m128i *)(packed + 16 * half)), &index[0], &index[1]);
        for (int i = 0; i < 2; i++) {
            float *to = out + (2 * half + i) * skip;
            _mm256_storeu_ps(to, look_up(_mm256_cvtepu8_epi32(index[i]), low, high));
            _mm256_storeu_ps(to + 8, look_up(_mm256_cvtepu8_epi32(_mm_srli_si128(index[i], 8)), low, high));
        }
    }
}

#endif
