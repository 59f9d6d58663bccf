/* What the files of few tokens' products share: the call, tokens as integers, and an instruction set's inner loop. */
#ifndef EXPERTUNE_GEMV4_H
#define EXPERTUNE_GEMV4_H

#include "common.h"

#define GROUP 128         /* numbers of x that are laid out together: two blocks */
#define ITEM 32           /* output features that a thread takes at once */
#define AVX2_TOGETHER 8   /* tokens that share what was looked up */
#define AVX512_TOGETHER 4
#define MOST_ROUTED 256   /* routed tokens of a call */
#define REST 128          /* what is left of a rounded number, where it counts, in units of as many to its own unit */

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* Eight numbers of a kind, in float32. */
INLINE __m256 values_at(const void *x, int kind, int64_t at)
{
    if (kind == FLOAT32)
        return _mm256_loadu_ps((const float *)x + at);
    const __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + at));
    if (kind == FLOAT16)
        return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* Rounded to the nearest of a kind. */
INLINE void put(void *to, int kind, int64_t at, float value)
{
    if (kind == FLOAT32)
        ((float *)to)[at] = value;
    else
        ((uint16_t *)to)[at] = kind == FLOAT16 ? _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT) : to_bfloat16(value);
}

/* One low-rank update of one part: y += scaling * B @ (A @ x). */
typedef struct {
    const float *a, *b;        /* of each slot [rank, columns] and [rows, rank] */
    const int64_t *slots;      /* which matrices are each expert's, negative for none; NULL: those of its number */
    int64_t rank, part;
    float scaling;
} LowRank;

/* A product of routed tokens with the matrices of their experts. */
typedef struct {
    const Nf4 *w;              /* `parts` matrices for each expert */
    const void *x;             /* rows of as many numbers as w has columns */
    void *y;
    const int64_t *experts;    /* of each routed token; NULL: the first one's */
    const float *weights;      /* of each routed token: `top_k` of them are weighted and summed; NULL: none are */
    const float *bias;         /* [experts, parts * rows], or NULL */
    const LowRank *updates;
    float *scratch;            /* see scratch_floats of gemv.py */
    int64_t x_stride, y_stride;
    int64_t routed;
    int64_t sharing;           /* routed tokens that read the same row of x, one behind the other */
    int64_t top_k;
    int32_t x_kind, y_kind, parts, num_updates;
    int32_t swiglu;            /* y = silu(part 0) * part 1 */
} Gemv;

/* A row of x: as float32; as integers in the order in which codes are looked up, and the scales of their blocks. Where
   what rounding left counts, also as bytes, of each block its numbers in 256ths and their rests in units of 1 / REST; and
   what is added to a block's sum before it is scaled by W's, because the bytes of W are held without a sign. */
typedef struct {
    float *values;
    int16_t *numbers;
    int8_t *bytes;
    float *scales, *corrections;
} QuantizedToken;

/* Routed tokens by expert. */
typedef struct {
    int64_t order[MOST_ROUTED];      /* routed tokens, those of an expert side by side */
    int64_t expert[MOST_ROUTED];
    int64_t start[MOST_ROUTED + 1];  /* where each expert's begin */
    int64_t groups;
} Grouped;

/* out[i * stride + j] = <row `first + j` of a matrix, x[i]>, j < count <= ITEM, i < num_x <= together; what lies behind
   `count` in ITEM places is overwritten too. */
typedef void Dots(
    const Gemv *g, int64_t matrix, int64_t first, int64_t count, int num_x, const QuantizedToken *x, const int16_t *table,
    float *out, int64_t stride);

/* Puts a group of x in its place: 8 numbers to a vector, and what their rounding left. */
typedef void Place(const __m256i numbers[GROUP / 8], const __m256i rests[GROUP / 8], int halves, QuantizedToken to, int64_t k);

/* How an instruction set lays out x, and its inner loop. */
typedef struct {
    Dots *dots;
    Place *place;
    float largest;             /* number that a block of x has */
    int together, fine;        /* tokens; with what rounding left */
} InstructionSet;

INLINE int64_t up_to(int64_t count, int64_t step)
{
    return (count + step - 1) / step * step;
}

Dots dots_avx2, dots_avx2_fine;
Place place_avx2, place_avx2_fine;

const InstructionSet *instruction_set(int without_avx512, int fine);

#endif
