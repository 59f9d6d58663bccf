/* SwiGLU between the GEMMs, and its gradient: out = gate * sigmoid(gate) * up. */
#include "sigmoid.h"

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

/* dgate_up [rows, 2 * size], the gradient of gate_up, which it may be itself. In place: dinter [rows, size], the
   gradient of out before the router's weight, becomes out. dweight[row] = <out, dinter>. */
EXPORT void expertune_swiglu_backward(const float *gate_up, float *dinter, const float *weight, float *dgate_up,
    float *dweight, int64_t rows, int64_t size, int threads)
{
    const __m256 one = _mm256_set1_ps(1.0f);
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > 16384)
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * size, *up = gate + size;
        float *dgate = dgate_up + row * 2 * size, *dup = dgate + size, *inner = dinter + row * size;
        __m256 w = _mm256_set1_ps(weight[row]), total = _mm256_setzero_ps();
        for (int64_t f = 0; f < size; f += 8) {
            __m256 g = _mm256_loadu_ps(gate + f), u = _mm256_loadu_ps(up + f), d = _mm256_loadu_ps(inner + f);
            __m256 s = sigmoid(g), activated = _mm256_mul_ps(g, s), out = _mm256_mul_ps(activated, u);
            total = _mm256_fmadd_ps(out, d, total);
            d = _mm256_mul_ps(d, w);
            __m256 slope = _mm256_mul_ps(s, _mm256_fmadd_ps(g, _mm256_sub_ps(one, s), one));
            _mm256_storeu_ps(dgate + f, _mm256_mul_ps(_mm256_mul_ps(d, u), slope));
            _mm256_storeu_ps(dup + f, _mm256_mul_ps(d, activated));
            _mm256_storeu_ps(inner + f, out);
        }
        dweight[row] = total_of(total);
    }
}
