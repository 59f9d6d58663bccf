/* What the files of the GEMMs in bfloat16 share: sizes of tiles and panels, and who makes them. */
#ifndef EXPERTUNE_GROUPED_GEMM16_H
#define EXPERTUNE_GROUPED_GEMM16_H

#include "grouped_gemm.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")))

#define TILE 16              /* rows of a tile */
#define PAIRS 16             /* pairs of the contraction in a tile */
#define DEPTH (2 * PAIRS)    /* contraction of a tile */
#define TILE_SIZE (TILE * DEPTH)
#define SPAN 32              /* rows, or columns, of a block of 2 x 2 tiles */
#define PASS 512             /* contraction of one pass: so much of W is dequantized at once */
#define WIDE 256             /* columns of y that are summed at once */

typedef uint16_t Bfloat;

/* Tokens row .. row + rows, `steps` of their contraction -> tiles [blocks of 16 tokens][steps]: [token][32], or
   [pair][token][2] where `paired`. */
void pack_x(const Product *p, int64_t row, int64_t rows, int64_t steps, int paired, Bfloat *to);

/* A panel of W for a pass of the contraction from k on, in tiles [width / 16][depth / DEPTH]: of [output][32] where W's
   rows are the output, otherwise of [pair][output][2]. Zeros beyond the matrix. A matrix of bfloat16 is copied. */
void dequantize_panel(
    const Product *p, int64_t e, int64_t n, int64_t width, int64_t end, int64_t k, int64_t depth, Bfloat *to);

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

#endif
