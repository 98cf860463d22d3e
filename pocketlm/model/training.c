/* What a training step on a CPU does beside its matmuls: one pass over memory for each part.

kernels.py compiles this file and names its functions; block.py and loss.py use them. Each function
takes float32 tensors, or bfloat16 ones where `half` is 1, and computes in float32. Every row, or
attention head, is computed by one thread, so the results do not depend on the number of threads.

Letters: B batch, T tokens, C d_model, H query heads, K key/value heads, D head_dim, F d_ff,
V vocab_size, N tokens of all rows. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* ---- numbers ---- */

static inline float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* Read n values from position `at` of a tensor. */
static void read_row(float *restrict row, const void *tensor, int64_t at, int64_t n, int half)
{
    if (half) {
        const uint16_t *x = (const uint16_t *)tensor + at;
        for (int64_t i = 0; i < n; i++)
            row[i] = float_of((uint32_t)x[i] << 16);
    } else {
        memcpy(row, (const float *)tensor + at, n * sizeof(float));
    }
}

/* Write n values to position `at` of a tensor; bfloat16 is rounded to nearest, ties to even. */
static void write_row(void *tensor, int64_t at, const float *restrict row, int64_t n, int half)
{
    if (half) {
        uint16_t *x = (uint16_t *)tensor + at;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = bits_of(row[i]);
            x[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        }
    } else {
        memcpy((float *)tensor + at, row, n * sizeof(float));
    }
}

/* e^x with a relative error of 2e-7, between e^-87 and e^88: Cephes' expf, without branches. */
static inline float exponential(float x)
{
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    const float to_integer = 12582912; /* 1.5 * 2^23: adding it rounds to an integer */
    float shifted = x * 1.44269504f + to_integer, n = shifted - to_integer;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* x - n ln 2 */
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    return float_of(bits_of(p) + (bits_of(shifted) << 23)); /* p 2^n */
}

static float largest(const float *x, int64_t n)
{
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++)
        top = x[i] > top ? x[i] : top;
    return top;
}

/* Replace x by e^(x - top); return the sum. */
static float exponentials(float *x, int64_t n, float top)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += x[i] = exponential(x[i] - top);
    return sum;
}

static void scale(float *x, int64_t n, float factor)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        x[i] *= factor;
}

static float dot(const float *a, const float *b, int64_t n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* ---- the loss ---- */

/* Replace logits (N, V), whose rows are `stride` apart, by the gradient of the summed loss.

losses (N): nats, 0 for a target below 0, which has no gradient. Values after the V-th are set to 0. */
void cross_entropy(int64_t N, int64_t V, int64_t stride, int half, void *logits,
                   const int64_t *targets, float *losses, int threads)
{
    const int64_t size = half ? 2 : 4, part = 4096; /* float32 sums of a part lose little */
#pragma omp parallel num_threads(threads)
    {
        float *copy = half ? malloc(V * sizeof(float)) : NULL;
#pragma omp for
        for (int64_t row = 0; row < N; row++) {
            char *start = (char *)logits + row * stride * size;
            float *x = half ? copy : (float *)start;
            int64_t target = targets[row];
            memset(start + V * size, 0, (stride - V) * size);
            losses[row] = 0;
            if (target < 0) {
                memset(start, 0, V * size);
                continue;
            }
            if (half)
                read_row(x, start, 0, V, half);
            float top = largest(x, V), target_logit = x[target];
            double total = 0;
            for (int64_t i = 0; i < V; i += part)
                total += exponentials(x + i, V - i < part ? V - i : part, top);
            losses[row] = log(total) + top - target_logit;
            scale(x, V, 1 / total);
            x[target] -= 1;
            if (half)
                write_row(start, 0, x, V, half);
        }
        free(copy);
    }
}
