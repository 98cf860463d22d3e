/* What decode.c and training.c share: bfloat16, e^x, and the largest number of a row.

   All of it is without branches, so that the compiler vectorises loops over it. */

#ifndef NUMBERS_H
#define NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float from_bf16(uint16_t half) { return float_of((uint32_t)half << 16); }

INLINE uint16_t to_bf16(float x) {               /* to the nearest, ties to even */
    uint32_t bits = bits_of(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE float larger(float a, float b) { return a > b ? a : b; }

INLINE float largest(const float *x, int64_t n) {
    float top = -INFINITY;
    #pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) top = larger(x[i], top);
    return top;
}

/* e^x with a relative error of 2e-7 for x from -87 to 88, which bound it: 2^n times a polynomial
   over |r| <= ln(2) / 2 (Cephes' expf). */
INLINE float exponential(float x) {
    x = x < -87 ? -87 : x;
    x = x > 88 ? 88 : x;
    const float to_integer = 12582912;           /* 1.5 * 2^23: adding it rounds to an integer */
    float shifted = x * 1.44269504f + to_integer, n = shifted - to_integer;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

#endif
