/* SwiGLU between the GEMMs, and its gradient in place: out = gate * sigmoid(gate) * up. */
#include "common.h"

/* exp to about one unit in the last place: 2**n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes, expf). */
INLINE __m256 exponential(__m256 x)
{
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.3f)), _mm256_set1_ps(88.3f));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), x);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(x, x), x), _mm256_set1_ps(1.0f));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

INLINE __m256 sigmoid(__m256 x)
{
    const __m256 one = _mm256_set1_ps(1.0f);
    return _mm256_div_ps(one, _mm256_add_ps(one, exponential(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

/* gate_up [rows, 2 * size] -> out [rows, size]; size is a multiple of 8. */
EXPORT void expertune_swiglu(const float *gate_up, int64_t rows, int64_t size, float *out, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > 16384)
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int64_t f = 0; f < size; f += 8) {
            __m256 g = _mm256_loadu_ps(gate + f);
            __m256 activated = _mm256_mul_ps(g, sigmoid(g));
            _mm256_storeu_ps(out + row * size + f, _mm256_mul_ps(activated, _mm256_loadu_ps(up + f)));
        }
    }
}

/* In place: gate_up [rows, 2 * size] becomes its gradient, and dinter [rows, size], the gradient of out before the
   router's weight, becomes out. dweight[row] = <out, dinter>. */
EXPORT void expertune_swiglu_backward(
    float *gate_up, float *dinter, const float *weight, float *dweight, int64_t rows, int64_t size, int threads)
{
    const __m256 one = _mm256_set1_ps(1.0f);
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > 16384)
    for (int64_t row = 0; row < rows; row++) {
        float *gate = gate_up + row * 2 * size, *up = gate + size, *inner = dinter + row * size;
        __m256 w = _mm256_set1_ps(weight[row]), total = _mm256_setzero_ps();
        for (int64_t f = 0; f < size; f += 8) {
            __m256 g = _mm256_loadu_ps(gate + f), u = _mm256_loadu_ps(up + f), d = _mm256_loadu_ps(inner + f);
            __m256 s = sigmoid(g), activated = _mm256_mul_ps(g, s), out = _mm256_mul_ps(activated, u);
            total = _mm256_fmadd_ps(out, d, total);
            d = _mm256_mul_ps(d, w);
            __m256 slope = _mm256_mul_ps(s, _mm256_fmadd_ps(g, _mm256_sub_ps(one, s), one));
            _mm256_storeu_ps(gate + f, _mm256_mul_ps(_mm256_mul_ps(d, u), slope));
            _mm256_storeu_ps(up + f, _mm256_mul_ps(d, activated));
            _mm256_storeu_ps(inner + f, out);
        }
        float lanes[8], sum = 0.0f;
        _mm256_storeu_ps(lanes, total);
        for (int i = 0; i < 8; i++)
            sum += lanes[i];
        dweight[row] = sum;
    }
}
