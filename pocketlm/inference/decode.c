/* Tokens into rows of a cache: what model.py computes, over the same weights and the same cache; and the draw of the next ones.

A step of a small model is so short that torch spends most of it between its operations. This is all of them in one call,
which reads each weight once, at the speed of the memory. native.py compiles it and fills the structures.

Activations are float. Weights are float, bfloat16, int8 (a scale for each output) or int4 (a scale and an offset for each 32
inputs). Against bfloat16 the input of a matmul is rounded to that, as torch does, and against integers to 16 bits, which is
finer. Sums run in the same order whatever the number of rows: a row's logits are the same to the last bit alone and in a batch.

B rows, D head_dim, S tokens of a row with the new one; x[b][i] is written x[b * width + i]. */

#include <math.h>
#include <stdint.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum { FLOAT, BFLOAT16, INT8, INT4 };            /* kinds of numbers */
enum { ROPE, LEARNED };                          /* kinds of positions */
enum { SWIGLU, GELU, RELU, RELU2 };              /* kinds of MLP */
enum { TILE = 8, GROUP = 32 };                   /* outputs of a matmul that a thread takes at a time; inputs that share an int4 scale */
enum { LINE = 64 };                              /* bytes that a cache takes from the memory at a time */
#ifdef __AVX512F__
enum { ROWS = 4, OUTS = 4 };                     /* rows and outputs whose sums are in registers at the same time */
#else
enum { ROWS = 4, OUTS = 2 };
#endif

typedef float F16 __attribute__((vector_size(64)));    /* compilers make two or four of them where registers are shorter */
typedef float F8 __attribute__((vector_size(32)));
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t W16 __attribute__((vector_size(64)));
typedef int16_t S32 __attribute__((vector_size(64)));
typedef uint16_t U32 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef int8_t B32 __attribute__((vector_size(32)));
#define EACH _Pragma("GCC unroll 4")
#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__                               /* gcc would rather load a number again for every product */
#define KEEP(x) __asm__("" : "+v"(x))
#else
#define KEEP(x)
#endif
#define LOAD(type, from) ({ type loaded; memcpy(&loaded, from, sizeof loaded); loaded; })

typedef struct { int64_t kind, in, out; const void *weight, *scale; const float *bias; } Linear;   /* weight 0: not there */
typedef struct { int64_t there; const float *weight, *bias; } Norm;                                      /* weight 0: no gain */
typedef struct { Norm norm1; Linear q, k, v, o; Norm norm2; Linear gate, up, down; } Layer;
typedef struct {
    int64_t n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size, mlp, position, layernorm, cache_kind, weights;
    double norm_eps;
    Linear embed, places, head;
    Norm embed_norm, norm;
    const float *cos, *sin;  /* (max_seq_len, D) */
    const Layer *layers;
} Model;

/* The input of a matmul: as floats; as bfloat16; or for integer weights as int16 with a scale for each row and the sums of its groups. */
typedef struct { int64_t width; float *x, *scale, *sums; int16_t *q; } Input;

INLINE float bf16(uint16_t half) { uint32_t bits = (uint32_t)half << 16; float x; memcpy(&x, &bits, 4); return x; }
INLINE uint16_t to_bf16(float x) {               /* to the nearest, ties to even */
    uint32_t bits; memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
INLINE float number(const void *from, int64_t kind, int64_t at) {
    return kind == FLOAT ? ((const float *)from)[at] : bf16(((const uint16_t *)from)[at]);
}

INLINE float larger(float a, float b) { return a > b ? a : b; }

INLINE float largest_of(const float *x, int64_t n) {
    float top = -INFINITY;
    #pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) top = larger(top, x[i]);
    return top;
}

/* e^x to 2 units in the last place: 2^n times a polynomial over |r| <= ln(2) / 2 (Cephes). Loops over it become vectors. */
INLINE float exp_(float x) {
    x = larger(x < 88.0f ? x : 88.0f, -87.0f);
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f; p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23; float power; memcpy(&power, &bits, 4);
    return p * power;
}

/* ---- sums of products ------------------------------------------------------------------------------------------- */

/* The 16 numbers are added in one order, whichever way it is done. */
#if __has_builtin(__builtin_shufflevector)
#define PART(v, w, ...) __builtin_shufflevector(v, w, __VA_ARGS__)

INLINE F4 sum_to_4(F16 v) {
    F8 s = PART(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + PART(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return PART(s, s, 0, 1, 2, 3) + PART(s, s, 4, 5, 6, 7);
}

INLINE float sum16(F16 v) { F4 s = sum_to_4(v); return (s[0] + s[2]) + (s[1] + s[3]); }

INLINE void sum16_of_4(const F16 *v, float *sums) {
    F4 a = sum_to_4(v[0]), b = sum_to_4(v[1]), c = sum_to_4(v[2]), d = sum_to_4(v[3]);
    F4 ab = PART(a, b, 0, 4, 1, 5) + PART(a, b, 2, 6, 3, 7), cd = PART(c, d, 0, 4, 1, 5) + PART(c, d, 2, 6, 3, 7);
    F4 all = PART(ab, cd, 0, 1, 4, 5) + PART(ab, cd, 2, 3, 6, 7);
    memcpy(sums, &all, sizeof all);
}

/* Where a register holds 16: two vectors become one at every step, which has half as much of each. */
#define HALVES(v, w) PART(v, w, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) + PART(v, w, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define QUARTERS(v, w) PART(v, w, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) + PART(v, w, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#define PAIRS(v, w) PART(v, w, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) + PART(v, w, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31)
#define ONES(v, w) PART(v, w, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) + PART(v, w, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
INLINE void sum16_of_16(const F16 *v, float *sums) {
    F16 a[8], b[4], c[2];
    _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) a[i] = HALVES(v[2 * i], v[2 * i + 1]);
    EACH for (int i = 0; i < 4; i++) b[i] = QUARTERS(a[2 * i], a[2 * i + 1]);
    EACH for (int i = 0; i < 2; i++) c[i] = PAIRS(b[2 * i], b[2 * i + 1]);
    c[0] = ONES(c[0], c[1]);
    memcpy(sums, c, sizeof *c);
}
#else
INLINE float sum16(F16 v) {
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = v[i] + v[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

INLINE void sum16_of_4(const F16 *v, float *sums) { EACH for (int n = 0; n < 4; n++) sums[n] = sum16(v[n]); }
INLINE void sum16_of_16(const F16 *v, float *sums) { EACH for (int n = 0; n < 16; n += 4) sum16_of_4(v + n, sums + n); }
#endif

INLINE S32 widen(B32 bytes) {
#ifdef __AVX512BW__
    return (S32)_mm512_cvtepi8_epi16((__m256i)bytes);
#else
    return __builtin_convertvector(bytes, S32);
#endif
}

INLINE U32 join(U16 first, U16 second) {
#ifdef __AVX512F__
    return (U32)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)first), (__m256i)second, 1);
#else
    union { U16 halves[2]; U32 whole; } both = {{first, second}};
    return both.whole;
#endif
}

/* sums of 16 += the products of 32 bfloat16, two by two. A half of a word becomes a float in no time. */
INLINE F16 add_pairs(F16 sums, W16 a, W16 b) {
#ifdef __AVX512BF16__
    return (F16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += (F16)(a << 16) * (F16)(b << 16);
    return sums + (F16)(a & 0xffff0000) * (F16)(b & 0xffff0000);
#endif
}

INLINE I16 add_products(I16 sums, S32 a, S32 b) {  /* sums[0] + a[0] b[0] + a[1] b[1], ... */
#if defined(__AVX512VNNI__)
    return (I16)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    union { I16 whole; __m256i halves[2]; } s = {sums};
    union { S32 whole; __m256i halves[2]; } x = {a}, y = {b};
    for (int i = 0; i < 2; i++) s.halves[i] = _mm256_add_epi32(s.halves[i], _mm256_madd_epi16(x.halves[i], y.halves[i]));
    return s.whole;
#else
    for (int i = 0; i < 16; i++) sums[i] += (int32_t)a[2 * i] * b[2 * i] + (int32_t)a[2 * i + 1] * b[2 * i + 1];
    return sums;
#endif
}

INLINE void sum_all(F16 sums[ROWS][OUTS], int R, int N, float found[ROWS][OUTS]) {
    if (R == 4 && N == 4) sum16_of_16(sums[0], found[0]);
    else EACH for (int r = 0; r < R; r++) {
        if (N == 4) sum16_of_4(sums[r], found[r]);
        else EACH for (int n = 0; n < N; n++) found[r][n] = sum16(sums[r][n]);
    }
}

/* What of the weights is fetched from the memory while others are multiplied, so that neither waits. */
typedef struct { const char *next; int lines; } Ahead;

INLINE void fetch(Ahead *ahead) {
    for (int i = 0; i < ahead->lines; i++, ahead->next += LINE) __builtin_prefetch(ahead->next);
}

/* found[r][n]: rows b + r of the input times outputs o + n. R and N are constants where this is inlined: then the sums are in
   registers, and what is loaded of either is used for all of the other. One row takes the weights in the order of the memory,
   which fetches ahead by itself. */
INLINE void dot_floats(const Linear *l, int64_t o, int N, const float *x, int R, Ahead *ahead, float found[ROWS][OUTS]) {
    F16 sums[ROWS][OUTS] = {0};
    const float *weight = (const float *)l->weight + o * l->in;
    int64_t i = 0, in = l->in;
    for (; i + 16 <= in; i += 16) {
        F16 w[OUTS];
        EACH for (int n = 0; n < N; n++) {
            w[n] = LOAD(F16, weight + n * in + i);
            KEEP(w[n]);
        }
        if (R > 1) fetch(ahead);
        EACH for (int r = 0; r < R; r++) {
            F16 v = LOAD(F16, x + r * in + i);
            KEEP(v);
            EACH for (int n = 0; n < N; n++) sums[r][n] += w[n] * v;
        }
    }
    sum_all(sums, R, N, found);
    for (; i < in; i++) {
        EACH for (int r = 0; r < R; r++) {
            EACH for (int n = 0; n < N; n++) found[r][n] += weight[n * in + i] * x[r * in + i];
        }
    }
}

INLINE void dot_bf16(const Linear *l, int64_t o, int N, const int16_t *x, int R, Ahead *ahead, float found[ROWS][OUTS]) {
    F16 sums[ROWS][OUTS] = {0};
    const uint16_t *weight = (const uint16_t *)l->weight + o * l->in;
    int64_t i = 0, in = l->in;
    for (; i + 32 <= in; i += 32) {
        W16 w[OUTS];
        EACH for (int n = 0; n < N; n++) {
            w[n] = LOAD(W16, weight + n * in + i);
            KEEP(w[n]);
        }
        if (R > 1) fetch(ahead);
        EACH for (int r = 0; r < R; r++) {
            W16 v = LOAD(W16, x + r * in + i);
            KEEP(v);
            EACH for (int n = 0; n < N; n++) sums[r][n] = add_pairs(sums[r][n], w[n], v);
        }
    }
    sum_all(sums, R, N, found);
    for (; i < in; i++) {
        EACH for (int r = 0; r < R; r++) {
            EACH for (int n = 0; n < N; n++) found[r][n] += bf16(weight[n * in + i]) * bf16(x[r * in + i]);
        }
    }
}

INLINE void dot_int8(const Linear *l, int64_t o, int N, const int16_t *x, int R, Ahead *ahead, float found[ROWS][OUTS]) {
    const int8_t *weight = (const int8_t *)l->weight + o * l->in;
    F16 totals[ROWS][OUTS] = {0};
    for (int64_t begin = 0; begin < l->in; begin += 4096) {  /* so many products of 7 and 15 bits fit 16 sums of 31 */
        int64_t i = begin, end = begin + 4096 < l->in ? begin + 4096 : l->in;
        I16 sums[ROWS][OUTS] = {0};
        for (; i + 32 <= end; i += 32) {
            S32 w[OUTS];
            EACH for (int n = 0; n < N; n++) {
                w[n] = widen(LOAD(B32, weight + n * l->in + i));
                KEEP(w[n]);
            }
            if (R > 1) fetch(ahead);
            EACH for (int r = 0; r < R; r++) {
                S32 v = LOAD(S32, x + r * l->in + i);
                KEEP(v);
                EACH for (int n = 0; n < N; n++) sums[r][n] = add_products(sums[r][n], w[n], v);
            }
        }
        EACH for (int r = 0; r < R; r++) {
            EACH for (int n = 0; n < N; n++) totals[r][n] += __builtin_convertvector(sums[r][n], F16);
        }
        for (; i < end; i++) {
            EACH for (int r = 0; r < R; r++) {
                EACH for (int n = 0; n < N; n++) totals[r][n][0] += (int32_t)weight[n * l->in + i] * x[r * l->in + i];
            }
        }
    }
    sum_all(totals, R, N, found);
    EACH for (int r = 0; r < R; r++) {
        EACH for (int n = 0; n < N; n++) found[r][n] *= ((const float *)l->scale)[o + n];
    }
}

/* 64 inputs are 16 words of four nibbles: word j has inputs j, j + 16, j + 32, j + 48, so that a half of the nibbles is a group. It has
   a scale and a low, two bfloat16 in a word of 32 bits: sum (q scale + low) x = scale sum(q x) + low sum(x). */
INLINE void dot_int4(const Linear *l, int64_t o, int N, const int16_t *x, const float *x_sums, int R, Ahead *ahead, float found[ROWS][OUTS]) {
    int64_t groups = l->in / GROUP, g = 0;
    const uint16_t *weight = (const uint16_t *)l->weight + o * l->in / 4;
    const uint32_t *scale = (const uint32_t *)l->scale + o * groups;
    F16 sums[ROWS][OUTS] = {0};
    for (int64_t i = 0; i < l->in; i += 64) {
        if (R > 1) fetch(ahead);
        EACH for (int n = 0; n < N; n++) {
            U16 words = LOAD(U16, weight + (n * l->in + i) / 4);
            U32 both = join(words, words >> 4);
            S32 first = (S32)(both & 15), second = (S32)(both >> 8 & 15);
            F16 s = (F16)(((W16){0} + scale[n * groups + i / GROUP]) << 16), t = (F16)(((W16){0} + scale[n * groups + i / GROUP + 1]) << 16);
            KEEP(first);
            KEEP(second);
            EACH for (int r = 0; r < R; r++) {
                const int16_t *v = x + r * l->in + i;
                sums[r][n] += s * __builtin_convertvector(add_products((I16){0}, first, LOAD(S32, v)), F16);
                sums[r][n] += t * __builtin_convertvector(add_products((I16){0}, second, LOAD(S32, v + GROUP)), F16);
            }
        }
    }
    for (; g + 16 <= groups; g += 16) {
        EACH for (int n = 0; n < N; n++) {
            F16 low = (F16)(LOAD(W16, scale + n * groups + g) & 0xffff0000);
            EACH for (int r = 0; r < R; r++) sums[r][n] += low * LOAD(F16, x_sums + r * groups + g);
        }
    }
    sum_all(sums, R, N, found);
    for (; g < groups; g++) {
        EACH for (int r = 0; r < R; r++) {
            EACH for (int n = 0; n < N; n++) found[r][n] += bf16(scale[n * groups + g] >> 16) * x_sums[r * groups + g];
        }
    }
}

INLINE void dot(int64_t kind, const Linear *l, int64_t o, int N, const Input *in, int64_t b, int R, Ahead *ahead, float found[ROWS][OUTS]) {
    if (kind == FLOAT) dot_floats(l, o, N, in->x + b * l->in, R, ahead, found);
    if (kind == BFLOAT16) dot_bf16(l, o, N, in->q + b * l->in, R, ahead, found);
    if (kind == INT8) dot_int8(l, o, N, in->q + b * l->in, R, ahead, found);
    if (kind == INT4) dot_int4(l, o, N, in->q + b * l->in, in->sums + b * (l->in / GROUP), R, ahead, found);
    EACH for (int r = 0; r < R && kind > BFLOAT16; r++) {
        EACH for (int n = 0; n < N; n++) found[r][n] *= in->scale[b + r];
    }
}

/* R rows by N outputs of y (B, out) = x weight^T + bias, or y += that. */
INLINE void block_of(int64_t kind, const Linear *l, int64_t o, int N, const Input *in, int64_t b, int R, Ahead *ahead, float *y, int add) {
    float found[ROWS][OUTS];
    dot(kind, l, o, N, in, b, R, ahead, found);
    EACH for (int r = 0; r < R; r++) {
        float *at = y + (b + r) * l->out + o;
        EACH for (int n = 0; n < N; n++) {
            float value = found[r][n] + (l->bias ? l->bias[o + n] : 0);
            at[n] = add ? at[n] + value : value;
        }
    }
}

/* The threads of the team share the outputs; there is no barrier behind it. While a tile is multiplied the next one is fetched, which
   lies behind it: each step of each block takes its part of that. Many rows have more steps than it has lines, and fetch further; to stop
   there was no faster. */
INLINE void matmul_of(int64_t kind, const Linear *l, const Input *in, int64_t B, float *y, int add) {
    int64_t bytes = kind == FLOAT ? 4 * l->in : kind == BFLOAT16 ? 2 * l->in : kind == INT8 ? l->in : l->in / 2;  /* of an output */
    #pragma omp for schedule(static) nowait
    for (int64_t tile = 0; tile < (l->out + TILE - 1) / TILE; tile++) {
        int64_t end = (tile + 1) * TILE < l->out ? (tile + 1) * TILE : l->out;
        Ahead ahead = {(const char *)l->weight + end * bytes, B < ROWS || B >= ROWS * OUTS ? 1 : ROWS * OUTS / B};
        for (int64_t b = 0; b < B;) {
            int R = B - b >= ROWS ? ROWS : B - b >= 2 ? 2 : 1;
            for (int64_t o = tile * TILE; o < end;) {
                int N = R < ROWS || end - o < OUTS ? 1 : OUTS;
                if (R == 1) block_of(kind, l, o, 1, in, b, 1, &ahead, y, add);
                else if (R == 2) block_of(kind, l, o, 1, in, b, 2, &ahead, y, add);
                else if (N == 1) block_of(kind, l, o, 1, in, b, ROWS, &ahead, y, add);
                else block_of(kind, l, o, OUTS, in, b, ROWS, &ahead, y, add);
                o += N;
            }
            b += R;
        }
    }
}

static void matmul(const Linear *l, const Input *in, int64_t B, float *y, int add) {
    switch (l->kind) {
    case FLOAT: matmul_of(FLOAT, l, in, B, y, add); break;
    case BFLOAT16: matmul_of(BFLOAT16, l, in, B, y, add); break;
    case INT8: matmul_of(INT8, l, in, B, y, add); break;
    case INT4: matmul_of(INT4, l, in, B, y, add); break;
    }
}

/* ---- what stands between the matmuls, for one row ---------------------------------------------------------------- */

/* Make row b of an input ready for weights of the model's kind. */
static void prepare(const Model *m, const Input *in, int64_t b) {
    float *x = in->x + b * in->width, top = 1e-30f;
    int16_t *q = in->q + b * in->width;
    if (m->weights == FLOAT) return;
    if (m->weights == BFLOAT16) {
        for (int64_t i = 0; i < in->width; i++) q[i] = to_bf16(x[i]);
        return;
    }
    #pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < in->width; i++) top = larger(top, fabsf(x[i]));
    float inverse = 32767 / top;
    in->scale[b] = top / 32767;
    for (int64_t i = 0; i < in->width; i++) q[i] = (int16_t)rintf(x[i] * inverse);
    for (int64_t g = 0; g < in->width / GROUP; g++) {
        int32_t sum = 0;
        for (int i = 0; i < GROUP; i++) sum += q[g * GROUP + i];
        in->sums[b * (in->width / GROUP) + g] = sum;
    }
}

static void normalise(const Model *m, const Norm *norm, const float *x, float *y) {
    float mean = 0, square = 0;
    int64_t C = m->d_model;
    if (!norm->there) {
        memmove(y, x, C * sizeof *x);
        return;
    }
    if (m->layernorm) {
        #pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < C; i++) mean += x[i];
        mean /= C;
    }
    #pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < C; i++) square += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(square / C + (float)m->norm_eps);
    for (int64_t i = 0; i < C; i++) {
        y[i] = (x[i] - mean) * scale * (norm->weight ? norm->weight[i] : 1) + (norm->bias ? norm->bias[i] : 0);
    }
}

static void add_embedding(const Linear *table, int64_t row, float *x) {
    float scale = table->kind == INT8 ? ((const float *)table->scale)[row] : 0;
    for (int64_t i = 0, at = row * table->in; i < table->in; i++, at++) {
        x[i] += table->kind == INT8 ? scale * ((const int8_t *)table->weight)[at] : number(table->weight, table->kind, at);
    }
}

static void rotate(const Model *m, int64_t position, float *x) {
    int64_t half = m->head_dim / 2;
    const float *cos = m->cos + position * m->head_dim, *sin = m->sin + position * m->head_dim;
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

static void write_cache(void *cache, int64_t kind, int64_t at, const float *x, int64_t D) {
    if (kind == FLOAT) memcpy((float *)cache + at, x, D * sizeof *x);
    else for (int64_t i = 0; i < D; i++) ((uint16_t *)cache + at)[i] = to_bf16(x[i]);
}

INLINE F16 numbers(const void *from, int64_t kind, int64_t at) {
    if (kind == FLOAT) return LOAD(F16, (const float *)from + at);
    return (F16)(__builtin_convertvector(LOAD(U16, (const uint16_t *)from + at), W16) << 16);
}

/* p[0] ... p[N - 1]: q (D) times that many keys, which begin at `at`. */
INLINE void score(const void *keys, int64_t kind, int64_t at, int N, int64_t D, const float *q, float *p) {
    F16 sums[4] = {0};
    float found[4];
    int64_t i = 0;
    for (; i + 16 <= D; i += 16) EACH for (int n = 0; n < N; n++) sums[n] += LOAD(F16, q + i) * numbers(keys, kind, at + n * D + i);
    if (N == 4) sum16_of_4(sums, found);
    else found[0] = sum16(sums[0]);
    for (; i < D; i++) EACH for (int n = 0; n < N; n++) found[n] += q[i] * number(keys, kind, at + n * D + i);
    EACH for (int n = 0; n < N; n++) p[n] = found[n] / sqrtf(D);
}

/* y (16 N): the sum of S values, which begin at `at` and are D apart, by their shares p. */
INLINE void mix(const void *values, int64_t kind, int64_t at, int N, int64_t S, int64_t D, const float *p, float total, float *y) {
    F16 sums[4] = {0};
    for (int64_t s = 0; s < S; s++) EACH for (int n = 0; n < N; n++) sums[n] += p[s] * numbers(values, kind, at + s * D + 16 * n);
    EACH for (int n = 0; n < N; n++) {
        F16 shares = sums[n] / total;
        memcpy(y + 16 * n, &shares, sizeof shares);
    }
}

/* y (D) = softmax(q k^T / sqrt(D)) v over S tokens, whose keys and values begin at `at`; p has room for S. */
INLINE void attend(const void *keys, const void *values, int64_t kind, int64_t at, int64_t S, int64_t D, const float *q, float *p, float *y) {
    int64_t s = 0, i = 0;
    for (; s + 4 <= S; s += 4) score(keys, kind, at + s * D, 4, D, q, p + s);
    for (; s < S; s++) score(keys, kind, at + s * D, 1, D, q, p + s);
    float top = largest_of(p, S), total = 0;
    for (s = 0; s < S; s++) p[s] = exp_(p[s] - top);
    for (s = 0; s < S; s++) total += p[s];
    for (; i + 64 <= D; i += 64) mix(values, kind, at + i, 4, S, D, p, total, y + i);
    for (; i + 16 <= D; i += 16) mix(values, kind, at + i, 1, S, D, p, total, y + i);
    for (; i < D; i++) {
        float sum = 0;
        for (s = 0; s < S; s++) sum += p[s] * number(values, kind, at + s * D + i);
        y[i] = sum / total;
    }
}

INLINE void activate(int64_t kind, int64_t n, float *gate, const float *up) {
    for (int64_t i = 0; i < n; i++) {
        float x = kind == SWIGLU ? gate[i] : up[i];
        if (kind == SWIGLU) gate[i] = x / (1 + exp_(-x)) * up[i];
        else if (kind == GELU) gate[i] = x - x / (1 + exp_(2 * 0.7978845608f * (x + 0.044715f * x * x * x)));  /* x (1 + tanh) / 2 */
        else gate[i] = kind == RELU ? larger(x, 0) : larger(x, 0) * larger(x, 0);
    }
}

/* ---- threads ----------------------------------------------------------------------------------------------------- */

enum { SPINS = 2000 };

typedef struct { int threads, arrived, round; } Team;

/* Hundreds of times a step. OpenMP's own barrier sleeps, or spins on for milliseconds where a server's other threads need the core. */
static void meet(Team *team) {
    int round = __atomic_load_n(&team->round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == team->threads) {
        team->arrived = 0;
        __atomic_store_n(&team->round, round + 1, __ATOMIC_RELEASE);
    }
    for (int spins = 0; __atomic_load_n(&team->round, __ATOMIC_ACQUIRE) == round; spins++) {
        if (spins > SPINS) sched_yield();
    }
}

static int n_threads(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

/* ---- the model --------------------------------------------------------------------------------------------------- */

/* Bytes that begin where a line does: a vector across two would be loaded twice. */
static void *aligned(int64_t bytes) { return aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE); }

static Input make_input(int64_t B, int64_t width) {
    Input in = {width, aligned(B * width * 4), aligned(B * 4), aligned(B * (width / GROUP + 1) * 4), aligned(B * width * 2)};
    return in;
}

static void free_input(Input *in) { free(in->x); free(in->scale); free(in->sums); free(in->q); }

/* Take tokens (B) at positions (B) into these rows (B) of the cache; logits (B, V) of what follows, where they are wanted.
   Tokens of the same row stand one behind the other. keys, values: (n_layers, cache_rows, K, max_len, D). */
void step(const Model *m, int64_t B, const int64_t *tokens, const int64_t *rows, const int64_t *positions,
          void *keys, void *values, int64_t cache_rows, int64_t max_len, float *logits) {
    int64_t C = m->d_model, D = m->head_dim, H = m->n_heads, K = m->n_kv_heads;
    float *x = calloc(B * C, 4), *q = malloc(B * H * D * 4), *k = malloc(B * K * D * 4), *v = malloc(B * K * D * 4);
    float *up = malloc(B * m->d_ff * 4);
    Input h = make_input(B, C), a = make_input(B, H * D), f = make_input(B, m->d_ff);
    Team team = {0};

    #pragma omp parallel
    {
        float *p = malloc(max_len * 4);
        #pragma omp single
        team.threads = n_threads();
        #pragma omp for nowait
        for (int64_t b = 0; b < B; b++) {
            add_embedding(&m->embed, tokens[b], x + b * C);
            if (m->position == LEARNED) add_embedding(&m->places, positions[b], x + b * C);
            normalise(m, &m->embed_norm, x + b * C, x + b * C);
        }
        for (const Layer *l = m->layers; l < m->layers + m->n_layers; l++) {
            int64_t layer = (l - m->layers) * cache_rows;
            meet(&team);
            #pragma omp for nowait
            for (int64_t b = 0; b < B; b++) {
                normalise(m, &l->norm1, x + b * C, h.x + b * C);
                prepare(m, &h, b);
            }
            meet(&team);
            matmul(&l->q, &h, B, q, 0);
            matmul(&l->k, &h, B, k, 0);
            matmul(&l->v, &h, B, v, 0);
            meet(&team);
            #pragma omp for collapse(2) nowait
            for (int64_t b = 0; b < B; b++) {
                for (int64_t head = 0; head < K; head++) {
                    int64_t at = (((layer + rows[b]) * K + head) * max_len + positions[b]) * D, new = (b * K + head) * D;
                    if (m->position == ROPE) rotate(m, positions[b], k + new);
                    write_cache(keys, m->cache_kind, at, k + new, D);
                    write_cache(values, m->cache_kind, at, v + new, D);
                }
            }
            meet(&team);
            #pragma omp for collapse(2) nowait
            for (int64_t b = 0; b < B; b++) {
                for (int64_t head = 0; head < H; head++) {
                    int64_t at = ((layer + rows[b]) * K + head / (H / K)) * max_len * D, S = positions[b] + 1;
                    float *mine = q + (b * H + head) * D, *out = a.x + (b * H + head) * D;
                    if (m->position == ROPE) rotate(m, positions[b], mine);
                    if (m->cache_kind == FLOAT) attend(keys, values, FLOAT, at, S, D, mine, p, out);
                    else attend(keys, values, BFLOAT16, at, S, D, mine, p, out);
                }
            }
            meet(&team);
            #pragma omp for nowait
            for (int64_t b = 0; b < B; b++) prepare(m, &a, b);
            meet(&team);
            matmul(&l->o, &a, B, x, 1);
            meet(&team);
            #pragma omp for nowait
            for (int64_t b = 0; b < B; b++) {
                normalise(m, &l->norm2, x + b * C, h.x + b * C);
                prepare(m, &h, b);
            }
            meet(&team);
            if (l->gate.weight) matmul(&l->gate, &h, B, f.x, 0);
            matmul(&l->up, &h, B, up, 0);
            meet(&team);
            #pragma omp for nowait
            for (int64_t b = 0; b < B; b++) {
                float *mine = f.x + b * m->d_ff, *beside = up + b * m->d_ff;
                if (m->mlp == SWIGLU) activate(SWIGLU, m->d_ff, mine, beside);
                else if (m->mlp == GELU) activate(GELU, m->d_ff, mine, beside);
                else if (m->mlp == RELU) activate(RELU, m->d_ff, mine, beside);
                else activate(RELU2, m->d_ff, mine, beside);
                prepare(m, &f, b);
            }
            meet(&team);
            matmul(&l->down, &f, B, x, 1);
        }
        meet(&team);
        #pragma omp for nowait
        for (int64_t b = 0; b < B; b++) {
            normalise(m, &m->norm, x + b * C, h.x + b * C);
            prepare(m, &h, b);
        }
        meet(&team);
        if (logits) matmul(&m->head, &h, B, logits, 0);
        free(p);
    }
    free(x); free(q); free(k); free(v); free(up);
    free_input(&h); free_input(&a); free_input(&f);
}

/* ---- the draw ---------------------------------------------------------------------------------------------------- */

enum { BLOCK = 256, FEW = 128 };

/* What of p (n) is at least `least`: how much together, and how many. */
typedef struct { double mass; int64_t count; } Share;

INLINE Share share_of(const float *p, int64_t n, float least) {
    Share share = {0, 0};
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        float mass = 0;
        int32_t count = 0;
        int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
        #pragma omp simd reduction(+ : mass, count)
        for (int64_t i = begin; i < end; i++) { mass += p[i] >= least ? p[i] : 0; count += p[i] >= least; }
        share.mass += mass;
        share.count += count;
    }
    return share;
}

/* The least of the largest of v (n) of which there are `need`, or which have that mass; v is reordered. Quickselect. */
INLINE float least_of_few(float *v, int64_t n, double need, int by_mass) {
    for (;;) {
        float pivot = v[n / 2];
        double above = 0, equal = 0;
        int64_t larger_ones = 0, i = 0, end = n;
        while (i < end) {                            /* larger | equal | smaller */
            float x = v[i], weight = by_mass ? x : 1;
            if (x > pivot) { above += weight; v[i++] = v[larger_ones]; v[larger_ones++] = x; }
            else if (x < pivot) { v[i] = v[--end]; v[end] = x; }
            else { equal += weight; i++; }
        }
        if (above >= need) n = larger_ones;
        else if (above + equal >= need || end == n) return pivot;
        else { need -= above + equal; v += end; n -= end; }
    }
}

/* The same of p (V), at most 1 each, none below `low`: between ever closer bounds, until few are between them. room: (V). */
static float least_of_largest(const float *p, int64_t V, double need, int by_mass, float low, float *room) {
    float high = 2;
    Share upper = {0, 0}, lower = share_of(p, V, low);
    for (int halvings = 0; halvings < 32 && lower.count - upper.count > FEW; halvings++) {
        float middle = sqrtf(low * high);
        Share share = share_of(p, V, middle);
        if ((by_mass ? share.mass : share.count) >= need) { low = middle; lower = share; }
        else { high = middle; upper = share; }
    }
    int64_t found = 0;
    for (int64_t begin = 0; begin < V; begin += 16) {
        int64_t end = begin + 16 < V ? begin + 16 : V;
        int32_t any = 0;
        for (int64_t i = begin; i < end; i++) any |= (p[i] >= low) & (p[i] < high);
        for (int64_t i = begin; any && i < end; i++) {
            room[found] = p[i];
            found += p[i] >= low && p[i] < high;
        }
    }
    return found ? least_of_few(room, found, need - (by_mass ? upper.mass : upper.count), by_mass) : low;
}

/* The token of logits x (V) in whose share the draw falls, among the likeliest that are left. p, room: (V). */
static int64_t choose_one(const float *x, int64_t V, float temperature, int64_t top_k, float top_p, float min_p, double draw, float *p, float *room) {
    float top = largest_of(x, V), least = 1e-37f;
    for (int64_t i = 0; i < V; i++) p[i] = exp_((x[i] - top) / temperature);
    for (int64_t i = 0; i < V; i++) p[i] = p[i] > least ? p[i] : 0;
    if (0 < top_k && top_k < V) least = least_of_largest(p, V, top_k, 0, least, room);
    if (top_p < 1) {
        double mass = share_of(p, V, least).mass;
        float floor = mass * (1 - top_p) / (2 * V);  /* what is below has half of the rest at most: the nucleus is above */
        least = least_of_largest(p, V, top_p * mass, 1, larger(least, floor), room);
    }
    least = larger(least, min_p);
    double mass = share_of(p, V, least).mass, below = 0;
    int64_t i = 0, chosen = 0;
    for (; i + BLOCK < V; i += BLOCK) {              /* to the block in which it falls */
        double in_block = share_of(p + i, BLOCK, least).mass;
        if (below + in_block > draw * mass) break;
        below += in_block;
    }
    for (; i < V && below <= draw * mass; i++) {
        if (p[i] >= least) { below += p[i]; chosen = i; }
    }
    return chosen;
}

/* sampling.py's `choose_in_torch`: a token for each row of logits (B, V). */
void choose(int64_t B, int64_t V, const float *logits, double temperature, int64_t top_k, double top_p, double min_p,
            const double *draws, int64_t *chosen) {
    #pragma omp parallel
    {
        float *p = malloc(2 * V * sizeof *p);
        #pragma omp for
        for (int64_t b = 0; b < B; b++) {
            chosen[b] = choose_one(logits + b * V, V, temperature, top_k, top_p, min_p, draws[b], p, p + V);
        }
        free(p);
    }
}
