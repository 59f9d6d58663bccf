/* The inner loops of products of few tokens by AVX2: rows of packed codes times tokens as integers, a block at a time.

   `fine` is off by about 1e-6 of a result. To the products of the integers of 16 bits it adds those of what rounding left of a
   codebook's value with x in 7 bits, and of what rounding left of x with the value in 8, both as bytes: left out is what
   that leaves of either, 2**-22 of the largest of a block times the largest value. Both are in units of two of the
   integers' products, so that they are added to those as they are. A byte of a value is held without a sign, 64 above
   what it is; what that adds is the same for all rows, and taken off by `corrections`. */
#include "gemv4.h"

#define AHEAD 2048        /* bytes of W that are brought nearer before their use */
#define CHUNK 8           /* blocks of a row that are dequantized for several tokens, and of which scales are computed */
#define ROWS 16           /* rows whose sums stay in the first-level cache meanwhile */
#define CHUNK_BYTES (CHUNK * BLOCK_BYTES)
#define STRETCH 128       /* blocks of a row, at most, whose factors are computed before their products; a multiple of CHUNK */

/* The values of a codebook by their codes: bytes of the integer, and what its rounding left. */
typedef struct {
    __m256i low, high, rest;
} Values;

/* 64 weights. */
typedef struct {
    __m256i numbers[4], bytes[4];   /* of bytes, two of rests and two of high bytes */
} Weights;

INLINE Values values_of(const int16_t *table)
{
    const __m128i byte = _mm_set1_epi16(255), a = _mm_loadu_si128((const __m128i *)table);
    const __m128i b = _mm_loadu_si128((const __m128i *)(table + 8));
    const __m128i rest = _mm_packus_epi16(
        _mm_loadu_si128((const __m128i *)(table + 16)), _mm_loadu_si128((const __m128i *)(table + 24)));
    return (Values){
        _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte))),
        _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8))),
        _mm256_broadcastsi128_si256(rest)};
}

/* Codes of 8 bits are looked up for either byte of their value, and unpacked; the low halves of bytes come first. */
INLINE Weights weights_of(int fine, const Values *v, __m256i packed)
{
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i odd = _mm256_and_si256(packed, nibble), even = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
    const __m256i odd_low = _mm256_shuffle_epi8(v->low, odd), odd_high = _mm256_shuffle_epi8(v->high, odd);
    const __m256i even_low = _mm256_shuffle_epi8(v->low, even), even_high = _mm256_shuffle_epi8(v->high, even);
    Weights w = {
        {_mm256_unpacklo_epi8(odd_low, odd_high), _mm256_unpackhi_epi8(odd_low, odd_high),
         _mm256_unpacklo_epi8(even_low, even_high), _mm256_unpackhi_epi8(even_low, even_high)},
        {odd_high, odd_high, odd_high, odd_high}};
    if (fine) {
        const __m256i above = _mm256_set1_epi8(64);
        w.bytes[0] = _mm256_shuffle_epi8(v->rest, odd), w.bytes[1] = _mm256_shuffle_epi8(v->rest, even);
        w.bytes[2] = _mm256_add_epi8(odd_high, above), w.bytes[3] = _mm256_add_epi8(even_high, above);
    }
    return w;
}

/* Copies what the code of a block's scale stands for. */
INLINE void fetch(const float *codebook, const uint8_t *code, float *to)
{
    int32_t bits;   /* in a register that the products do not need */
    memcpy(&bits, codebook + *code, sizeof bits);
    __asm__("" : "+r"(bits));
    memcpy(to, &bits, sizeof bits);
}

/* The same of blocks from number `at` of a matrix on; nothing where scales are held otherwise. What is written in parts
   waits until all of it is in the cache when it is read as a vector, so that other work has to lie between. */
INLINE void fetch_codes(int kind, const Matrix *m, int64_t at, int64_t blocks, float *to)
{
    for (int64_t i = 0; kind == DOUBLE_QUANTIZED && i < blocks; i++)
        fetch(m->codebook, m->codes + at + i, to + i);
}

/* 2 ** (exponent - 127) of eight exponents; see `power_of_two`. */
INLINE __m256 powers_of_two(const uint8_t *exponents)
{
    const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)exponents));
    const __m256i least = _mm256_and_si256(_mm256_cmpeq_epi32(e, _mm256_setzero_si256()), _mm256_set1_epi32(0x00400000));
    return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(e, 23), least));
}

/* Scales of up to 8 blocks of a matrix from number `at` on, of MXFP4 two to a block; zeros behind the last block's.
   `fetched` is what their codes stand for. */
INLINE void scales_of(int kind, const Matrix *m, int64_t at, int64_t blocks, const float *fetched, __m256 to[2])
{
    if (blocks == CHUNK && kind == PLAIN_ABSMAX)
        to[0] = _mm256_loadu_ps(m->absmax + at);
    else if (blocks == CHUNK && kind == HALVES)
        to[0] = powers_of_two(m->codes + 2 * at), to[1] = powers_of_two(m->codes + 2 * at + CHUNK);
    else if (blocks == CHUNK && at % CHUNK == 0) {
        const __m256 outer = _mm256_broadcast_ss(m->nested + (uint64_t)at / NESTED_BLOCK);
        to[0] = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(fetched), outer), _mm256_broadcast_ss(&m->offset));
    } else {
        float own[2 * CHUNK] = {0};
        for (int64_t i = 0; i < (kind == HALVES ? 2 * blocks : blocks); i++)
            own[i] = kind == HALVES ? power_of_two(m->codes[2 * at + i]) : scale_in(m, kind, at + i, 0);
        to[0] = _mm256_loadu_ps(own), to[1] = _mm256_loadu_ps(own + CHUNK);
    }
}

/* Scales of a chunk's products with a token, and with `corrections` what they add to a sum. */
INLINE __m256 factors_of(int fine, int kind, const __m256 own[2], const QuantizedToken *x, int64_t at, float *to)
{
    __m256 added = _mm256_setzero_ps();
    for (int half = 0; half < (kind == HALVES ? 2 : 1); half++) {
        const int64_t from = kind == HALVES ? 2 * at + CHUNK * half : at;
        _mm256_storeu_ps(to + CHUNK * half, _mm256_mul_ps(own[half], _mm256_loadu_ps(x->scales + from)));
        if (fine)
            added = _mm256_fmadd_ps(own[half], _mm256_loadu_ps(x->corrections + from), added);
    }
    return added;
}

INLINE __m256 factor_at(int kind, const float *factors, int64_t n)
{
    if (kind != HALVES)
        return _mm256_broadcast_ss(factors + n);
    return _mm256_insertf128_ps(_mm256_broadcast_ss(factors + 2 * n), _mm_broadcast_ss(factors + 2 * n + 1), 1);
}

INLINE __m256i load(const void *from, int64_t vector)
{
    return _mm256_loadu_si256((const __m256i *)from + vector);
}

INLINE void store(void *to, int64_t vector, __m256i numbers)
{
    _mm256_storeu_si256((__m256i *)to + vector, numbers);
}

/* Lanes that add up to the product of a block with a token. */
INLINE __m256 product(int fine, const Weights *w, const int16_t *numbers, const int8_t *bytes)
{
    __m256i first = _mm256_madd_epi16(w->numbers[0], load(numbers, 0));
    __m256i second = _mm256_madd_epi16(w->numbers[1], load(numbers, 1));
    first = _mm256_add_epi32(first, _mm256_madd_epi16(w->numbers[2], load(numbers, 2)));
    second = _mm256_add_epi32(second, _mm256_madd_epi16(w->numbers[3], load(numbers, 3)));
    if (fine) {
        const __m256i twice = _mm256_set1_epi16(2);
        __m256i rest = _mm256_maddubs_epi16(w->bytes[0], load(bytes, 0));
        __m256i high = _mm256_maddubs_epi16(w->bytes[2], load(bytes, 2));
        rest = _mm256_add_epi16(rest, _mm256_maddubs_epi16(w->bytes[1], load(bytes, 1)));
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16(w->bytes[3], load(bytes, 3)));
        first = _mm256_add_epi32(first, _mm256_madd_epi16(rest, twice));
        second = _mm256_add_epi32(second, _mm256_madd_epi16(high, twice));
    }
    return _mm256_cvtepi32_ps(_mm256_add_epi32(first, second));
}

/* Sums of the lanes of eight vectors. */
INLINE __m256 totals_of(const __m256 v[8])
{
    __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

/* ---- x ----------------------------------------------------------------------------------------------------------------- */

/* Every other one of numbers 0 to 15 and 32 to 47 on from `n`, in 16 bits. */
INLINE __m256i every_other(const __m256i n[8], int odd)
{
    __m256i halves[2];
    for (int i = 0; i < 2; i++) {
        const __m256 low = _mm256_castsi256_ps(_mm256_permute2x128_si256(n[i], n[i + 4], 0x20));
        const __m256 high = _mm256_castsi256_ps(_mm256_permute2x128_si256(n[i], n[i + 4], 0x31));
        halves[i] = _mm256_castps_si256(odd ? _mm256_shuffle_ps(low, high, 0xdd) : _mm256_shuffle_ps(low, high, 0x88));
    }
    return _mm256_packs_epi32(halves[0], halves[1]);
}

/* As `weights_of` has them: second numbers of bytes come first, and of both halves of a block their first halves. */
void place_avx2(
    const __m256i numbers[GROUP / 8], const __m256i rests[GROUP / 8], int halves, QuantizedToken to, int64_t k)
{
    for (int block = 0; block < 2; block++)
        for (int v = 0; v < 4; v++)
            store(to.numbers + k + BLOCK * block, v, every_other(numbers + 8 * block + 2 * (v % 2), v < 2));
    (void)rests, (void)halves;
}

void place_avx2_fine(
    const __m256i numbers[GROUP / 8], const __m256i rests[GROUP / 8], int halves, QuantizedToken to, int64_t k)
{
    const __m256i most = _mm256_set1_epi8(63), least = _mm256_set1_epi8(-63), ones = _mm256_set1_epi8(1);
    place_avx2(numbers, rests, halves, to, k);
    for (int block = 0; block < 2; block++) {
        __m256i sum = _mm256_setzero_si256();
        for (int v = 0; v < 4; v++) {
            const __m256i *from = (v < 2 ? numbers : rests) + 8 * block;
            __m256i some = every_other(from, v % 2 == 0), more = every_other(from + 2, v % 2 == 0);
            if (v < 2) {
                const __m256i half = _mm256_set1_epi16(128);
                some = _mm256_srai_epi16(_mm256_add_epi16(some, half), 8);
                more = _mm256_srai_epi16(_mm256_add_epi16(more, half), 8);
            }
            const __m256i bytes = _mm256_packs_epi16(some, more);
            const __m256i within = _mm256_max_epi8(_mm256_min_epi8(bytes, most), least);
            store(to.bytes + 2 * (k + BLOCK * block), v, within);
            /* What 64 more of each byte of W adds; and where a value's low byte counts for 0, it is 1/2 on average. */
            const __m256i taken = _mm256_set1_epi16(v < 2 ? -128 : -127);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, within), taken));
        }
        int32_t lanes[8];
        store(lanes, 0, sum);
        const int first = lanes[0] + lanes[1] + lanes[2] + lanes[3], second = lanes[4] + lanes[5] + lanes[6] + lanes[7];
        float *corrections = to.corrections + (k / BLOCK + block) * (halves ? 2 : 1);
        corrections[0] = (float)(halves ? first : first + second);
        if (halves)
            corrections[1] = (float)second;
    }
}

/* ---- one token: as fast as W is read ---------------------------------------------------------------------------------- */

/* Keeps gcc from sums in another order, for which it would hold more numbers than there are registers. */
INLINE __m256i in_order(__m256i v)
{
    __asm__("" : "+x"(v));
    return v;
}

/* gcc would write out a loop of at most CHUNK steps, and keep what each needs in memory. */
#define ONE_BY_ONE _Pragma("GCC unroll 1")

INLINE __m256 multiply_block(
    int fine, int kind, const Values *v, const uint8_t *from, const int16_t *numbers, const int8_t *bytes,
    const float *factors, int64_t n, __m256 sum)
{
    if (n % 2 == 0)
        _mm_prefetch((const char *)from + AHEAD + n * BLOCK_BYTES, _MM_HINT_T0);
    const Weights w = weights_of(fine, v, load(from, n));
    const __m256 total = product(fine, &w, numbers + n * BLOCK, bytes + 2 * n * BLOCK);
    return _mm256_fmadd_ps(total, factor_at(kind, factors, n), sum);
}

/* Factors of up to STRETCH blocks of a row, from number `block` of the matrix and `at` of the token on; returns what
   `corrections` add. */
INLINE __m256 factors_of_stretch(
    int fine, int kind, const Matrix *m, int64_t block, int64_t blocks, const float *fetched, const QuantizedToken *x,
    int64_t at, float *to)
{
    __m256 added = _mm256_setzero_ps();
    ONE_BY_ONE
    for (int64_t n = 0; n < blocks; n += CHUNK) {
        __m256 own[2];
        scales_of(kind, m, block + n, blocks - n < CHUNK ? blocks - n : CHUNK, fetched + n, own);
        added = _mm256_add_ps(added, factors_of(fine, kind, own, x, at + n, to + n * (kind == HALVES ? 2 : 1)));
    }
    return added;
}

/* A stretch of a row, and what of the next one is fetched meanwhile. */
typedef struct {
    const uint8_t *from, *codes;   /* of W; of the next stretch's scales */
    const float *factors, *codebook;
    float *fetched;
    int64_t blocks, next;          /* how many; how many the next one has, at least as many */
} Stretch;

/* A stretch's products. Between two of them there is nothing that waits, and a chunk has no conditions. */
INLINE __m256 stretch_of(
    int fine, int kind, const Values *values, const Stretch *s, const int16_t *numbers, const int8_t *bytes, __m256 sum)
{
    const Values v = *values;
    const uint8_t *from = s->from, *codes = s->codes;
    const float *factors = s->factors, *codebook = s->codebook;
    float *fetched = s->fetched;
    const int64_t blocks = s->blocks, per_block = kind == HALVES ? 2 : 1;
    int64_t n = 0;
    ONE_BY_ONE
    for (; n + CHUNK <= blocks; n += CHUNK) {
        _Pragma("GCC unroll 8")
        for (int i = 0; i < CHUNK; i++) {
            if (kind == DOUBLE_QUANTIZED)
                fetch(codebook, codes + i, fetched + i);
            sum = multiply_block(fine, kind, &v, from, numbers, bytes, factors, i, sum);
        }
        from += CHUNK_BYTES, numbers += CHUNK * BLOCK, bytes += 2 * CHUNK * BLOCK;
        factors += CHUNK * per_block, codes += CHUNK, fetched += CHUNK;
    }
    ONE_BY_ONE
    for (int64_t i = 0; i < blocks - n; i++)
        sum = multiply_block(fine, kind, &v, from, numbers, bytes, factors, i, sum);
    for (int64_t i = 0; kind == DOUBLE_QUANTIZED && i < s->next - n; i++)
        fetch(codebook, codes + i, fetched + i);
    return sum;
}

#define STRETCH_OF(name, fine, kind) \
    static __attribute__((noinline)) __m256 name( \
        const Values *values, const Stretch *s, const int16_t *numbers, const int8_t *bytes, __m256 sum) \
    { \
        return stretch_of(fine, kind, values, s, numbers, bytes, sum); \
    }

STRETCH_OF(double_quantized, 0, DOUBLE_QUANTIZED)
STRETCH_OF(plain_absmax, 0, PLAIN_ABSMAX)
STRETCH_OF(halves, 0, HALVES)
STRETCH_OF(fine_double_quantized, 1, DOUBLE_QUANTIZED)
STRETCH_OF(fine_plain_absmax, 1, PLAIN_ABSMAX)
STRETCH_OF(fine_halves, 1, HALVES)

typedef __m256 StretchOf(
    const Values *values, const Stretch *s, const int16_t *numbers, const int8_t *bytes, __m256 sum);

static StretchOf *const stretch_in[2][3] = {
    {double_quantized, plain_absmax, halves}, {fine_double_quantized, fine_plain_absmax, fine_halves}};

/* Rows in stretches of equal length, as far as that goes. The codes of a stretch's scales are fetched a stretch ahead; what
   is fetched during the last one, or before a shorter one, is of no use. */
INLINE void dots_of_one(
    int fine, int kind, const Matrix *m, const Values *values, int64_t first, int64_t count, int64_t blocks,
    const QuantizedToken *x, float *out)
{
    const int64_t most = up_to((blocks - 1) / ((blocks + STRETCH - 1) / STRETCH) + 1, CHUNK);
    const int64_t longest = blocks < most ? blocks : most;
    float fetched[2][STRETCH], factors[2 * STRETCH];
    int now = 0;
    fetch_codes(kind, m, first * blocks, longest, fetched[0]);
    for (int64_t j = 0; j < count; j += 8) {
        __m256 sums[8];
        for (int64_t i = 0; i < 8; i++) {
            sums[i] = _mm256_setzero_ps();
            for (int64_t start = 0, here; j + i < count && start < blocks; start += here, now = !now) {
                const int64_t block = (first + j + i) * blocks + start, left = blocks - start;
                here = left < longest ? left : longest;
                const int64_t after = left > here ? left - here : j + i + 1 < count ? longest : 0;
                const int64_t next = after < longest ? after : longest;
                const int enough = next >= here;
                const __m256 added = factors_of_stretch(fine, kind, m, block, here, fetched[now], x, start, factors);
                const Stretch s = {
                    m->packed + block * BLOCK_BYTES, m->codes + block + (enough ? here : 0), factors, m->codebook,
                    fetched[!now], here, enough ? next : here};
                sums[i] = stretch_in[fine][kind](
                    values, &s, x->numbers + start * BLOCK, x->bytes + 2 * start * BLOCK,
                    fine ? _mm256_add_ps(sums[i], added) : sums[i]);
                if (!enough)
                    fetch_codes(kind, m, block + here, next, fetched[!now]);
            }
        }
        _mm256_storeu_ps(out + j, totals_of(sums));
    }
}

/* ---- several tokens: W is dequantized for all of them, as integers ------------------------------------------------------ */

/* A chunk of a row. */
typedef struct {
    Weights weights[CHUNK];
    __m256 scales[2];
} Panel;

/* sums[r * AVX2_TOGETHER + t] += a chunk of one or two rows times one or two tokens. */
INLINE void multiply_tile(int fine, int halves, int rows, int tokens, const Panel *panels, int64_t at, int64_t here,
                          const QuantizedToken *x, __m256 *sums)
{
    const int kind = halves ? HALVES : PLAIN_ABSMAX;
    float factors[2][2][2 * CHUNK];
    __m256 sum[2][2];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            __m256 added = factors_of(fine, kind, panels[r].scales, x + t, at, factors[r][t]);
            sum[r][t] = _mm256_add_ps(sums[r * AVX2_TOGETHER + t], added);
        }
    const __m256i twice = _mm256_set1_epi16(2);
    const int16_t *numbers[2] = {x[0].numbers + at * BLOCK, x[tokens - 1].numbers + at * BLOCK};
    const int8_t *bytes[2] = {x[0].bytes + 2 * at * BLOCK, x[tokens - 1].bytes + 2 * at * BLOCK};
    const Weights *w[2] = {panels[0].weights, panels[rows - 1].weights};
    for (int64_t n = 0; n < here; n++) {
        __m256i total[2][2];
        for (int v = 0; v < 4; v++) {
            __m256i weight[2];
            for (int r = 0; r < rows; r++)
                weight[r] = in_order(w[r][n].numbers[v]);
            for (int t = 0; t < tokens; t++) {
                const __m256i number = in_order(load(numbers[t] + n * BLOCK, v));
                for (int r = 0; r < rows; r++) {
                    const __m256i both = _mm256_madd_epi16(weight[r], number);
                    total[r][t] = in_order(v == 0 ? both : _mm256_add_epi32(total[r][t], both));
                }
            }
        }
        for (int pair = 0; fine && pair < 4; pair += 2)
            for (int t = 0; t < tokens; t++) {
                const __m256i byte = in_order(load(bytes[t] + 2 * n * BLOCK, pair));
                const __m256i next = in_order(load(bytes[t] + 2 * n * BLOCK, pair + 1));
                for (int r = 0; r < rows; r++) {
                    const __m256i both = _mm256_add_epi16(
                        _mm256_maddubs_epi16(w[r][n].bytes[pair], byte), _mm256_maddubs_epi16(w[r][n].bytes[pair + 1], next));
                    total[r][t] = in_order(_mm256_add_epi32(total[r][t], _mm256_madd_epi16(both, twice)));
                }
            }
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tokens; t++)
                sum[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[r][t]), factor_at(kind, factors[r][t], n), sum[r][t]);
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            sums[r * AVX2_TOGETHER + t] = sum[r][t];
}

typedef void Tile(const Panel *panels, int64_t at, int64_t here, const QuantizedToken *x, __m256 *sums);

#define TILE(name, fine, halves, rows, tokens) \
    static __attribute__((noinline)) void name( \
        const Panel *panels, int64_t at, int64_t here, const QuantizedToken *x, __m256 *sums) \
    { \
        if (here == CHUNK) \
            multiply_tile(fine, halves, rows, tokens, panels, at, CHUNK, x, sums); \
        else \
            multiply_tile(fine, halves, rows, tokens, panels, at, here, x, sums); \
    }

#define TILES(name, fine, halves) \
    TILE(name##_11, fine, halves, 1, 1) \
    TILE(name##_12, fine, halves, 1, 2) \
    TILE(name##_21, fine, halves, 2, 1) \
    TILE(name##_22, fine, halves, 2, 2) \
    static Tile *const name[2][2] = {{name##_11, name##_12}, {name##_21, name##_22}};

TILES(tile, 0, 0)
TILES(tile_halves, 0, 1)
TILES(tile_fine, 1, 0)
TILES(tile_fine_halves, 1, 1)

INLINE void pack_panel(int fine, int kind, const Matrix *m, const Values *values, int64_t block, int64_t here, Panel *to)
{
    const uint8_t *from = m->packed + block * BLOCK_BYTES;
    for (int64_t ahead = 0; ahead < CHUNK_BYTES; ahead += 64)
        _mm_prefetch((const char *)from + CHUNK_BYTES + ahead, _MM_HINT_T0);
    const Values v = *values;
    Weights *weights = to->weights;
    float fetched[CHUNK] = {0};
    fetch_codes(kind, m, block, here, fetched);
    ONE_BY_ONE
    for (int64_t n = 0; n < here; n++) {
        const Weights w = weights_of(fine, &v, load(from, n));
        for (int i = 0; i < 4; i++)
            weights[n].numbers[i] = w.numbers[i];
        for (int i = 0; fine && i < 4; i++)
            weights[n].bytes[i] = w.bytes[i];
    }
    scales_of(kind, m, block, here, fetched, to->scales);
}

static void dots_of_several(
    int fine, int kind, const Gemv *g, const Matrix *m, const Values *values, int64_t first, int64_t count, int num_x,
    const QuantizedToken *x, float *out, int64_t stride)
{
    Tile *const (*tiles)[2] = kind == HALVES ? fine ? tile_fine_halves : tile_halves : fine ? tile_fine : tile;
    const int64_t blocks = g->w->columns / BLOCK;
    __m256 sums[ROWS * AVX2_TOGETHER];
    Panel panels[2];
    memset(sums, 0, sizeof sums);
    for (int64_t j = 0; j < count; j++)
        for (int64_t ahead = 0; ahead < CHUNK_BYTES; ahead += 64)
            _mm_prefetch((const char *)m->packed + (first + j) * blocks * BLOCK_BYTES + ahead, _MM_HINT_T0);
    for (int64_t at = 0; at < blocks; at += CHUNK) {
        const int64_t here = blocks - at < CHUNK ? blocks - at : CHUNK;
        for (int64_t j = 0; j < count; j += 2) {
            const int rows = count - j < 2 ? 1 : 2;
            for (int r = 0; r < rows; r++) {
                const int64_t block = (first + j + r) * blocks + at;
                if (kind == DOUBLE_QUANTIZED && !fine)
                    pack_panel(0, DOUBLE_QUANTIZED, m, values, block, here, panels + r);
                else if (kind == DOUBLE_QUANTIZED)
                    pack_panel(1, DOUBLE_QUANTIZED, m, values, block, here, panels + r);
                else if (!fine)
                    pack_panel(0, kind, m, values, block, here, panels + r);
                else
                    pack_panel(1, kind, m, values, block, here, panels + r);
            }
            for (int t = 0; t < num_x; t += 2)
                tiles[rows - 1][num_x - t > 1](panels, at, here, x + t, sums + j * AVX2_TOGETHER + t);
        }
    }
    for (int64_t j = 0; j < count; j++) {
        float of_tokens[8];
        _mm256_storeu_ps(of_tokens, totals_of(sums + j * AVX2_TOGETHER));
        for (int t = 0; t < num_x; t++)
            out[t * stride + j] = of_tokens[t];
    }
}

static void dots_of(
    int fine, const Gemv *g, int64_t matrix, int64_t first, int64_t count, int num_x, const QuantizedToken *x,
    const int16_t *table, float *out, int64_t stride)
{
    const int kind = kind_of(g->w);
    const Matrix m = matrix_of(g->w, kind, matrix);
    const Values values = values_of(table);
    if (num_x == 1) {
        const int64_t blocks = g->w->columns / BLOCK;
        if (kind == DOUBLE_QUANTIZED)
            dots_of_one(fine, DOUBLE_QUANTIZED, &m, &values, first, count, blocks, x, out);
        else if (kind == PLAIN_ABSMAX)
            dots_of_one(fine, PLAIN_ABSMAX, &m, &values, first, count, blocks, x, out);
        else
            dots_of_one(fine, HALVES, &m, &values, first, count, blocks, x, out);
        return;
    }
    for (int64_t j = 0; j < count; j += ROWS) {
        const int64_t rows = count - j < ROWS ? count - j : ROWS;
        dots_of_several(fine, kind, g, &m, &values, first + j, rows, num_x, x, out + j, stride);
    }
}

void dots_avx2(
    const Gemv *g, int64_t matrix, int64_t first, int64_t count, int num_x, const QuantizedToken *x, const int16_t *table,
    float *out, int64_t stride)
{
    dots_of(0, g, matrix, first, count, num_x, x, table, out, stride);
}

void dots_avx2_fine(
    const Gemv *g, int64_t matrix, int64_t first, int64_t count, int num_x, const QuantizedToken *x, const int16_t *table,
    float *out, int64_t stride)
{
    dots_of(1, g, matrix, first, count, num_x, x, table, out, stride);
}
