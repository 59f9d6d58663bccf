/* Attention of one token of each sequence to all that is cached of it: a decoding step. Float32 but for what is read and
   written. Heads that share keys and values read them together; each output is summed by one thread in one order. */
#include "sigmoid.h"

#define ALONE (1 << 18)   /* products that one thread computes sooner than a second one wakes up */
#define ACROSS 32         /* numbers of a value that are summed at once */

enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* Strides are in numbers; rows of queries, keys and values are each contiguous. */
typedef struct {
    const void *query, *key, *value;
    void *out;              /* [batch, heads, value_size], contiguous */
    float *scratch;         /* of each head `tokens` and `size` numbers, each rounded up to 8 */
    int64_t batch, heads, key_heads, tokens, size, value_size;
    int64_t query_strides[2], key_strides[3], value_strides[3];   /* of a sequence, a head, a token */
    float scale;
    int32_t kind, threads;
} Attention;

INLINE const char *at(const void *from, int kind, int64_t number)
{
    return (const char *)from + number * (kind == FLOAT32 ? 4 : 2);
}

INLINE float one(int kind, const char *from, int64_t i)
{
    return kind == FLOAT32 ? ((const float *)from)[i] : of_bfloat16(((const uint16_t *)from)[i]);
}

INLINE __m256 eight(int kind, const char *from, int64_t i)
{
    if (kind == FLOAT32)
        return _mm256_loadu_ps((const float *)from + i);
    const __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + i));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

INLINE float dot(int kind, const float *query, const char *key, int64_t size)
{
    __m256 sum = _mm256_setzero_ps(), more = sum;
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
        sum = _mm256_fmadd_ps(_mm256_loadu_ps(query + i), eight(kind, key, i), sum);
        more = _mm256_fmadd_ps(_mm256_loadu_ps(query + i + 8), eight(kind, key, i + 8), more);
    }
    float total = total_of(_mm256_add_ps(sum, more));
    for (; i < size; i++)
        total += query[i] * one(kind, key, i);
    return total;
}

/* Scores -> probabilities; what lies behind `tokens` in eights is 0. */
static void softmax(float *scores, int64_t tokens, int64_t wide)
{
    float largest = scores[0], total = 0.0f;
    for (int64_t t = 0; t < tokens; t++)
        largest = scores[t] > largest ? scores[t] : largest;
    for (int64_t t = tokens; t < wide; t++)
        scores[t] = 0.0f;
    for (int64_t t = 0; t < wide; t += 8)
        _mm256_storeu_ps(scores + t, exponential(_mm256_sub_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(largest))));
    for (int64_t t = 0; t < tokens; t++)
        total += scores[t];
    for (int64_t t = 0; t < tokens; t++)
        scores[t] /= total;
}

INLINE void store(int kind, void *out, int64_t to, float value)
{
    if (kind == FLOAT32)
        ((float *)out)[to] = value;
    else
        ((uint16_t *)out)[to] = to_bfloat16(value);
}

/* out += probabilities @ values. */
INLINE void sum_values(int kind, const Attention *a, const float *probabilities, const char *values, int64_t out)
{
    const int64_t step = a->value_strides[2] * (kind == FLOAT32 ? 4 : 2);
    int64_t v = 0;
    for (; v + ACROSS <= a->value_size; v += ACROSS) {
        __m256 sum[ACROSS / 8];
        float lanes[ACROSS];
        for (int i = 0; i < ACROSS / 8; i++)
            sum[i] = _mm256_setzero_ps();
        for (int64_t t = 0; t < a->tokens; t++)
            for (int i = 0; i < ACROSS / 8; i++)
                sum[i] = _mm256_fmadd_ps(_mm256_broadcast_ss(probabilities + t), eight(kind, values + t * step, v + 8 * i), sum[i]);
        for (int i = 0; i < ACROSS / 8; i++)
            _mm256_storeu_ps(lanes + 8 * i, sum[i]);
        for (int i = 0; i < ACROSS; i++)
            store(kind, a->out, out + v + i, lanes[i]);
    }
    for (; v < a->value_size; v++) {
        float sum = 0.0f;
        for (int64_t t = 0; t < a->tokens; t++)
            sum += probabilities[t] * one(kind, values + t * step, v);
        store(kind, a->out, out + v, sum);
    }
}

/* The heads of a sequence that share keys and values. */
INLINE void attend(int kind, const Attention *a, int64_t sequence, int64_t key_head)
{
    const int64_t sharing = a->heads / a->key_heads, tokens = (a->tokens + 7) / 8 * 8, size = (a->size + 7) / 8 * 8;
    const int64_t first = key_head * sharing;
    float *own = a->scratch + (sequence * a->heads + first) * (tokens + size);
    for (int64_t h = 0; h < sharing; h++) {
        const char *query =
            at(a->query, kind, sequence * a->query_strides[0] + (first + h) * a->query_strides[1]);
        for (int64_t i = 0; i < a->size; i++)
            own[h * (tokens + size) + tokens + i] = a->scale * one(kind, query, i);
    }
    const char *keys = at(a->key, kind, sequence * a->key_strides[0] + key_head * a->key_strides[1]);
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t h = 0; h < sharing; h++) {
            float *scores = own + h * (tokens + size);
            scores[t] = dot(kind, scores + tokens, at(keys, kind, t * a->key_strides[2]), a->size);
        }
    const char *values = at(a->value, kind, sequence * a->value_strides[0] + key_head * a->value_strides[1]);
    for (int64_t h = 0; h < sharing; h++) {
        float *scores = own + h * (tokens + size);
        softmax(scores, a->tokens, tokens);
        sum_values(kind, a, scores, values, (sequence * a->heads + first + h) * a->value_size);
    }
}

EXPORT void expertune_attend(const Attention *a)
{
    const int64_t products = a->batch * a->heads * a->tokens * (a->size + a->value_size);
#pragma omp parallel for schedule(static) num_threads(a->threads) if (products > ALONE)
    for (int64_t item = 0; item < a->batch * a->key_heads; item++) {
        if (a->kind == FLOAT32)
            attend(FLOAT32, a, item / a->key_heads, item % a->key_heads);
        else
            attend(BFLOAT16, a, item / a->key_heads, item % a->key_heads);
    }
}
