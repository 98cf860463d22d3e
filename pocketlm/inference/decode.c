/* The decoding step of a batch and the sampling of its tokens, for a CPU.

   This is what model.py and sampling.py compute. A step of a small model is so short that torch
   spends most of it between its operations. Here the whole step is one call, which reads each
   weight once, at the speed of the memory. native.py compiles this file and fills its structures
   with pointers to the model's weights.

   Contents
     types             vectors, the model's structures, conversions of numbers
     sums of products  the dot product for each kind of weights, and matmul
     one row           what is computed between the matmuls: quantisation of activations, norms,
                       embeddings, RoPE, the KV cache, attention, the MLP's activation
     threads           the barrier
     step              exported: a decoding step, or a prefill
     sampling          choose, exported: temperature, top-k, top-p, min-p and the draw

   Activations are float. Weights are float, bfloat16, int8 (a scale per output) or int4 (a scale
   and an offset per 32 inputs). The input of a matmul is rounded to bfloat16 for bfloat16 weights,
   as in torch, and to 16 bits for integer weights, which is finer. Sums run in the same order
   whatever the batch size: the logits of a row are the same to the last bit alone and in a batch.

   Letters: B rows of a batch, one token each; C d_model, D head_dim, H heads, K key/value heads,
   V vocabulary size, S tokens of a sequence up to the row's own. x[b][i] is at x[b * width + i]. */

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

/* ---- types ---------------------------------------------------------------- */

/* The same values as in native_library.py */
enum { FLOAT, BFLOAT16, INT8, INT4 };            /* kinds of numbers */
enum { ROPE, LEARNED };                          /* kinds of positions */
enum { SWIGLU, GELU, RELU, RELU2 };              /* kinds of MLP */

enum { TILE = 8 };                               /* outputs that a thread computes at a time */
enum { GROUP = 32 };                             /* inputs that share an int4 scale */
enum { LINE = 64 };                              /* bytes of a cache line */
#ifdef __AVX512F__
enum { ROWS = 4, OUTS = 4 };                     /* rows and outputs with sums in registers */
#else
enum { ROWS = 4, OUTS = 2 };
#endif

/* Vectors of 64, 32 and 16 bytes; if registers are shorter, the compiler splits them. The letter is
   the type (Float, Int, Word of 32 bits, Short, Unsigned short, Byte), the number the length. */
typedef float F16 __attribute__((vector_size(64)));
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
/* Keep a vector in a register: gcc would rather load it again for every product. */
#ifdef __AVX512F__
#define KEEP(x) __asm__("" : "+v"(x))
#else
#define KEEP(x)
#endif
#define LOAD(type, from) ({ type loaded; memcpy(&loaded, from, sizeof loaded); loaded; })

/* The model, as native.py describes it */
typedef struct {
    int64_t kind, in, out;
    const void *weight, *scale;                  /* weight 0: there is no such matrix */
    const float *bias;                           /* 0: no bias */
} Linear;

typedef struct {
    int64_t present;                             /* 0: the identity */
    const float *weight, *bias;                  /* weight 0: no gain; bias 0: no bias */
} Norm;

typedef struct {
    Norm norm1;
    Linear q, k, v, o;
    Norm norm2;
    Linear gate, up, down;
} Layer;

typedef struct {
    int64_t n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size;
    int64_t mlp, position, layernorm, cache_kind, weights_kind;
    double norm_eps;
    Linear embed, embed_positions, head;
    Norm embed_norm, norm;
    const float *cos, *sin;                      /* (max_seq_len, D) */
    const Layer *layers;
} Model;

/* The input of a matmul, (B, width): x in floats; q in bfloat16, or, for integer weights, in int16
   with a scale per row and the sums of each group. */
typedef struct { int64_t width; float *x, *scale, *sums; int16_t *q; } Input;

INLINE float bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint16_t to_bf16(float x) {               /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE float number(const void *from, int64_t kind, int64_t at) {
    return kind == FLOAT ? ((const float *)from)[at] : bf16(((const uint16_t *)from)[at]);
}

INLINE F16 numbers(const void *from, int64_t kind, int64_t at) {
    if (kind == FLOAT) return LOAD(F16, (const float *)from + at);
    return (F16)(__builtin_convertvector(LOAD(U16, (const uint16_t *)from + at), W16) << 16);
}

INLINE float larger(float a, float b) { return a > b ? a : b; }

INLINE float largest_of(const float *x, int64_t n) {
    float top = -INFINITY;
    #pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) top = larger(top, x[i]);
    return top;
}

/* e^x with an error of at most 2 units in the last place: 2^n times a polynomial over
   |r| <= ln(2) / 2 (Cephes). The compiler vectorises loops over it. */
INLINE float exp_(float x) {
    x = larger(x < 88.0f ? x : 88.0f, -87.0f);
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* ---- sums of products ----------------------------------------------------- */

/* The sum of the 16 elements of a vector, of 4 vectors or of 16. All variants add the elements in
   the same order. */
#if __has_builtin(__builtin_shufflevector)
#define PART(v, w, ...) __builtin_shufflevector(v, w, __VA_ARGS__)

INLINE F4 sum_to_4(F16 v) {
    F8 s = PART(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + PART(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return PART(s, s, 0, 1, 2, 3) + PART(s, s, 4, 5, 6, 7);
}

INLINE float sum16(F16 v) {
    F4 s = sum_to_4(v);
    return (s[0] + s[2]) + (s[1] + s[3]);
}

INLINE void sum16_of_4(const F16 *v, float *sums) {
    F4 a = sum_to_4(v[0]), b = sum_to_4(v[1]), c = sum_to_4(v[2]), d = sum_to_4(v[3]);
    F4 ab = PART(a, b, 0, 4, 1, 5) + PART(a, b, 2, 6, 3, 7);
    F4 cd = PART(c, d, 0, 4, 1, 5) + PART(c, d, 2, 6, 3, 7);
    F4 all = PART(ab, cd, 0, 1, 4, 5) + PART(ab, cd, 2, 3, 6, 7);
    memcpy(sums, &all, sizeof all);
}

/* With registers of 16 elements: each macro adds the two parts of v and of w, so that two vectors
   become one, which has half as many elements of each. */
#define HALVES(v, w) \
    PART(v, w, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) + \
    PART(v, w, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define QUARTERS(v, w) \
    PART(v, w, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) + \
    PART(v, w, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#define PAIRS(v, w) \
    PART(v, w, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) + \
    PART(v, w, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31)
#define ONES(v, w) \
    PART(v, w, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) + \
    PART(v, w, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)

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

INLINE void sum16_of_4(const F16 *v, float *sums) {
    EACH for (int n = 0; n < 4; n++) sums[n] = sum16(v[n]);
}

INLINE void sum16_of_16(const F16 *v, float *sums) {
    EACH for (int n = 0; n < 16; n += 4) sum16_of_4(v + n, sums + n);
}
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
    __m512i low = _mm512_castsi256_si512((__m256i)first);
    return (U32)_mm512_inserti64x4(low, (__m256i)second, 1);
#else
    union { U16 halves[2]; U32 whole; } both = {{first, second}};
    return both.whole;
#endif
}

/* sums[j] + a[2j] b[2j] + a[2j + 1] b[2j + 1] of bfloat16: half a word becomes a float for free */
INLINE F16 add_pairs(F16 sums, W16 a, W16 b) {
#ifdef __AVX512BF16__
    return (F16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += (F16)(a << 16) * (F16)(b << 16);
    return sums + (F16)(a & 0xffff0000) * (F16)(b & 0xffff0000);
#endif
}

/* sums[j] + a[2j] b[2j] + a[2j + 1] b[2j + 1] of integers */
INLINE I16 add_products(I16 sums, S32 a, S32 b) {
#if defined(__AVX512VNNI__)
    return (I16)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    union { I16 whole; __m256i halves[2]; } s = {sums};
    union { S32 whole; __m256i halves[2]; } x = {a}, y = {b};
    for (int i = 0; i < 2; i++) {
        s.halves[i] = _mm256_add_epi32(s.halves[i], _mm256_madd_epi16(x.halves[i], y.halves[i]));
    }
    return s.whole;
#else
    for (int i = 0; i < 16; i++) {
        sums[i] += (int32_t)a[2 * i] * b[2 * i] + (int32_t)a[2 * i + 1] * b[2 * i + 1];
    }
    return sums;
#endif
}

/* Reduce each vector of sums to a number. */
INLINE void sum_all(F16 sums[ROWS][OUTS], int R, int N, float results[ROWS][OUTS]) {
    if (R == 4 && N == 4) sum16_of_16(sums[0], results[0]);
    else EACH for (int r = 0; r < R; r++) {
        if (N == 4) sum16_of_4(sums[r], results[r]);
        else EACH for (int n = 0; n < N; n++) results[r][n] = sum16(sums[r][n]);
    }
}

/* The weights to prefetch while others are multiplied, so that neither waits: the address, and the
   number of lines to fetch at each call. */
typedef struct { const char *next; int lines; } Ahead;

INLINE void fetch(Ahead *ahead) {
    for (int i = 0; i < ahead->lines; i++, ahead->next += LINE) __builtin_prefetch(ahead->next);
}

/* In the functions dot_*, results[r][n] is row b + r of the input times output o + n. R and N are
   constants where the functions are inlined: the sums are in registers, and each vector that is
   loaded of the weights is used for all rows, each of the rows for all outputs. A single row reads
   the weights in the order of the memory, which the hardware prefetches by itself. */
INLINE void dot_floats(const Linear *l, int64_t o, int N, const float *x, int R, Ahead *ahead,
                       float results[ROWS][OUTS]) {
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
    sum_all(sums, R, N, results);
    for (; i < in; i++) {
        EACH for (int r = 0; r < R; r++) {
            EACH for (int n = 0; n < N; n++) results[r][n] += weight[n * in + i] * x[r * in + i];
        }
    }
}

INLINE void dot_bf16(const Linear *l, int64_t o, int N, const int16_t *x, int R, Ahead *ahead,
                     float results[ROWS][OUTS]) {
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
    sum_all(sums, R, N, results);
    for (; i < in; i++) {
        EACH for (int r = 0; r < R; r++) {
            EACH for (int n = 0; n < N; n++) {
                results[r][n] += bf16(weight[n * in + i]) * bf16(x[r * in + i]);
            }
        }
    }
}

/* 4,096 products of 7 and 15 bits fit 16 sums of 31 bits; then the sums are added up as floats. */
INLINE void dot_int8(const Linear *l, int64_t o, int N, const int16_t *x, int R, Ahead *ahead,
                     float results[ROWS][OUTS]) {
    const int8_t *weight = (const int8_t *)l->weight + o * l->in;
    F16 totals[ROWS][OUTS] = {0};
    for (int64_t begin = 0; begin < l->in; begin += 4096) {
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
            EACH for (int n = 0; n < N; n++) {
                totals[r][n] += __builtin_convertvector(sums[r][n], F16);
            }
        }
        for (; i < end; i++) {
            EACH for (int r = 0; r < R; r++) {
                EACH for (int n = 0; n < N; n++) {
                    totals[r][n][0] += (int32_t)weight[n * l->in + i] * x[r * l->in + i];
                }
            }
        }
    }
    sum_all(totals, R, N, results);
    EACH for (int r = 0; r < R; r++) {
        EACH for (int n = 0; n < N; n++) results[r][n] *= ((const float *)l->scale)[o + n];
    }
}

/* 64 inputs are 16 words of four nibbles: word j has inputs j, j + 16, j + 32 and j + 48, so that
   half of the nibbles are a group. A group has a scale and an offset, two bfloat16 in a word of 32
   bits: sum((q scale + offset) x) = scale sum(q x) + offset sum(x). */
INLINE void dot_int4(const Linear *l, int64_t o, int N, const int16_t *x, const float *x_sums,
                     int R, Ahead *ahead, float results[ROWS][OUTS]) {
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
            F16 s = (F16)(((W16){0} + scale[n * groups + i / GROUP]) << 16);
            F16 t = (F16)(((W16){0} + scale[n * groups + i / GROUP + 1]) << 16);
            KEEP(first);
            KEEP(second);
            EACH for (int r = 0; r < R; r++) {
                const int16_t *v = x + r * l->in + i;
                I16 p = add_products((I16){0}, first, LOAD(S32, v));
                sums[r][n] += s * __builtin_convertvector(p, F16);
                I16 p2 = add_products((I16){0}, second, LOAD(S32, v + GROUP));
                sums[r][n] += t * __builtin_convertvector(p2, F16);
            }
        }
    }
    for (; g + 16 <= groups; g += 16) {
        EACH for (int n = 0; n < N; n++) {
            F16 offset = (F16)(LOAD(W16, scale + n * groups + g) & 0xffff0000);
            EACH for (int r = 0; r < R; r++) {
                sums[r][n] += offset * LOAD(F16, x_sums + r * groups + g);
            }
        }
    }
    sum_all(sums, R, N, results);
    for (; g < groups; g++) {
        EACH for (int r = 0; r < R; r++) {
            EACH for (int n = 0; n < N; n++) {
                results[r][n] += bf16(scale[n * groups + g] >> 16) * x_sums[r * groups + g];
            }
        }
    }
}

INLINE void dot(int64_t kind, const Linear *l, int64_t o, int N, const Input *in, int64_t b, int R,
                Ahead *ahead, float results[ROWS][OUTS]) {
    if (kind == FLOAT) dot_floats(l, o, N, in->x + b * l->in, R, ahead, results);
    if (kind == BFLOAT16) dot_bf16(l, o, N, in->q + b * l->in, R, ahead, results);
    if (kind == INT8) dot_int8(l, o, N, in->q + b * l->in, R, ahead, results);
    if (kind == INT4) {
        const float *x_sums = in->sums + b * (l->in / GROUP);
        dot_int4(l, o, N, in->q + b * l->in, x_sums, R, ahead, results);
    }
    EACH for (int r = 0; r < R && kind > BFLOAT16; r++) {
        EACH for (int n = 0; n < N; n++) results[r][n] *= in->scale[b + r];
    }
}

/* A block of R rows by N outputs of y (B, out) = x weight^T + bias; with `add`, y += that. */
INLINE void block_of(int64_t kind, const Linear *l, int64_t o, int N, const Input *in, int64_t b,
                     int R, Ahead *ahead, float *y, int add) {
    float results[ROWS][OUTS];
    dot(kind, l, o, N, in, b, R, ahead, results);
    EACH for (int r = 0; r < R; r++) {
        float *at = y + (b + r) * l->out + o;
        EACH for (int n = 0; n < N; n++) {
            float value = results[r][n] + (l->bias ? l->bias[o + n] : 0);
            at[n] = add ? at[n] + value : value;
        }
    }
}

/* The threads share the outputs; there is no barrier at the end. While a tile is multiplied, the
   next one is prefetched: each step of each block fetches its part of it. A large batch has more
   steps than a tile has lines, and prefetches further; stopping at the tile's end was no faster. */
INLINE void matmul_of(int64_t kind, const Linear *l, const Input *in, int64_t B, float *y,
                      int add) {
    int64_t bytes =                              /* of the weights of an output */
        kind == FLOAT ? 4 * l->in : kind == BFLOAT16 ? 2 * l->in : kind == INT8 ? l->in : l->in / 2;
    #pragma omp for schedule(static) nowait
    for (int64_t tile = 0; tile < (l->out + TILE - 1) / TILE; tile++) {
        int64_t end = (tile + 1) * TILE < l->out ? (tile + 1) * TILE : l->out;
        Ahead ahead = {(const char *)l->weight + end * bytes,
                       B < ROWS || B >= ROWS * OUTS ? 1 : ROWS * OUTS / B};
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

/* ---- one row: what is computed between the matmuls ------------------------ */

/* Convert row b of an input for the model's kind of weights. */
static void prepare(const Model *m, const Input *in, int64_t b) {
    float *x = in->x + b * in->width, top = 1e-30f;
    int16_t *q = in->q + b * in->width;
    if (m->weights_kind == FLOAT) return;
    if (m->weights_kind == BFLOAT16) {
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
    if (!norm->present) {
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
        y[i] = (x[i] - mean) * scale * (norm->weight ? norm->weight[i] : 1) +
               (norm->bias ? norm->bias[i] : 0);
    }
}

/* x += a row of an embedding table, which is never int4 */
static void add_embedding(const Linear *table, int64_t row, float *x) {
    float scale = table->kind == INT8 ? ((const float *)table->scale)[row] : 0;
    for (int64_t i = 0, at = row * table->in; i < table->in; i++, at++) {
        x[i] += table->kind == INT8 ? scale * ((const int8_t *)table->weight)[at]
                                    : number(table->weight, table->kind, at);
    }
}

/* Apply RoPE to a head x (D). */
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

/* Scores p (N): q (D) times N keys, the first at `at`, over sqrt(D). */
INLINE void score(const void *keys, int64_t kind, int64_t at, int N, int64_t D, const float *q,
                  float *p) {
    F16 sums[4] = {0};
    float results[4];
    int64_t i = 0;
    for (; i + 16 <= D; i += 16) {
        EACH for (int n = 0; n < N; n++) {
            sums[n] += LOAD(F16, q + i) * numbers(keys, kind, at + n * D + i);
        }
    }
    if (N == 4) sum16_of_4(sums, results);
    else results[0] = sum16(sums[0]);
    for (; i < D; i++) {
        EACH for (int n = 0; n < N; n++) results[n] += q[i] * number(keys, kind, at + n * D + i);
    }
    EACH for (int n = 0; n < N; n++) p[n] = results[n] / sqrtf(D);
}

/* y (16 N): the sum of S values, which begin at `at` and are D apart, weighted by p / total. */
INLINE void mix(const void *values, int64_t kind, int64_t at, int N, int64_t S, int64_t D,
                const float *p, float total, float *y) {
    F16 sums[4] = {0};
    for (int64_t s = 0; s < S; s++) {
        EACH for (int n = 0; n < N; n++) {
            sums[n] += p[s] * numbers(values, kind, at + s * D + 16 * n);
        }
    }
    EACH for (int n = 0; n < N; n++) {
        F16 mean = sums[n] / total;
        memcpy(y + 16 * n, &mean, sizeof mean);
    }
}

/* y (D) = softmax(q k^T / sqrt(D)) v over S tokens, whose keys and values begin at `at`.
   p: working memory (S) */
INLINE void attend(const void *keys, const void *values, int64_t kind, int64_t at, int64_t S,
                   int64_t D, const float *q, float *p, float *y) {
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

/* The MLP's activation of n hidden units, into `gate`; GELU is x (1 + tanh(...)) / 2. */
INLINE void activate(int64_t kind, int64_t n, float *gate, const float *up) {
    for (int64_t i = 0; i < n; i++) {
        float x = kind == SWIGLU ? gate[i] : up[i];
        if (kind == SWIGLU) gate[i] = x / (1 + exp_(-x)) * up[i];
        else if (kind == GELU)
            gate[i] = x - x / (1 + exp_(2 * 0.7978845608f * (x + 0.044715f * x * x * x)));
        else gate[i] = kind == RELU ? larger(x, 0) : larger(x, 0) * larger(x, 0);
    }
}

/* ---- threads -------------------------------------------------------------- */

enum { SPINS = 2000 };                           /* before a thread gives way to others */

typedef struct { int threads, arrived, round; } Team;

/* A barrier, which a step passes hundreds of times. OpenMP's own either sleeps, or spins for
   milliseconds when a server's other threads need the core. */
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

/* ---- step ----------------------------------------------------------------- */

/* Memory that begins at a cache line: a vector across two lines would be loaded twice. */
static void *aligned(int64_t bytes) {
    return aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE);
}

static Input make_input(int64_t B, int64_t width) {
    Input in = {width, aligned(B * width * 4), aligned(B * 4),
                aligned(B * (width / GROUP + 1) * 4), aligned(B * width * 2)};
    return in;
}

static void free_input(Input *in) {
    free(in->x);
    free(in->scale);
    free(in->sums);
    free(in->q);
}

/* Append tokens (B) at positions (B) to slots (B) of the KV cache; write the next logits (B, V)
   unless they are 0. Tokens of the same slot are in the order of their positions.
   keys, values: (n_layers, n_slots, K, max_len, D) */
void step(const Model *m, int64_t B, const int64_t *tokens, const int64_t *slots,
          const int64_t *positions, void *keys, void *values, int64_t n_slots, int64_t max_len,
          float *logits) {
    int64_t C = m->d_model, D = m->head_dim, H = m->n_heads, K = m->n_kv_heads;
    float *x = calloc(B * C, 4), *q = malloc(B * H * D * 4);
    float *k = malloc(B * K * D * 4), *v = malloc(B * K * D * 4), *up = malloc(B * m->d_ff * 4);
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
            if (m->position == LEARNED) {
                add_embedding(&m->embed_positions, positions[b], x + b * C);
            }
            normalise(m, &m->embed_norm, x + b * C, x + b * C);
        }
        for (const Layer *l = m->layers; l < m->layers + m->n_layers; l++) {
            int64_t layer = (l - m->layers) * n_slots;

            /* Keys and values of the new tokens */
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
                    int64_t at = (((layer + slots[b]) * K + head) * max_len + positions[b]) * D;
                    int64_t new = (b * K + head) * D;
                    if (m->position == ROPE) rotate(m, positions[b], k + new);
                    write_cache(keys, m->cache_kind, at, k + new, D);
                    write_cache(values, m->cache_kind, at, v + new, D);
                }
            }

            /* Attention */
            meet(&team);
            #pragma omp for collapse(2) nowait
            for (int64_t b = 0; b < B; b++) {
                for (int64_t head = 0; head < H; head++) {
                    int64_t at = ((layer + slots[b]) * K + head / (H / K)) * max_len * D;
                    int64_t S = positions[b] + 1;
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

            /* MLP */
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
                float *mine = f.x + b * m->d_ff, *other = up + b * m->d_ff;
                if (m->mlp == SWIGLU) activate(SWIGLU, m->d_ff, mine, other);
                else if (m->mlp == GELU) activate(GELU, m->d_ff, mine, other);
                else if (m->mlp == RELU) activate(RELU, m->d_ff, mine, other);
                else activate(RELU2, m->d_ff, mine, other);
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
    free(x);
    free(q);
    free(k);
    free(v);
    free(up);
    free_input(&h);
    free_input(&a);
    free_input(&f);
}

/* ---- sampling ------------------------------------------------------------- */

enum { BLOCK = 256 };                            /* numbers that are added up in float */
enum { FEW = 128 };                              /* candidates from which quickselect is faster */

/* The part of p (n) that is at least `threshold`: its sum and its count. */
typedef struct { double mass; int64_t count; } Share;

INLINE Share share_of(const float *p, int64_t n, float threshold) {
    Share share = {0, 0};
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        float mass = 0;
        int32_t count = 0;
        int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
        #pragma omp simd reduction(+ : mass, count)
        for (int64_t i = begin; i < end; i++) {
            mass += p[i] >= threshold ? p[i] : 0;
            count += p[i] >= threshold;
        }
        share.mass += mass;
        share.count += count;
    }
    return share;
}

/* The smallest of the largest elements of v (n): of the first `need` in descending order, or, by
   mass, of the first whose sum reaches `need`. Quickselect; v is reordered. */
INLINE float least_of_few(float *v, int64_t n, double need, int by_mass) {
    for (;;) {
        float pivot = v[n / 2];
        double above = 0, equal = 0;
        int64_t n_larger = 0, i = 0, end = n;
        while (i < end) {                        /* partition: larger | equal | smaller */
            float x = v[i], weight = by_mass ? x : 1;
            if (x > pivot) {
                above += weight;
                v[i++] = v[n_larger];
                v[n_larger++] = x;
            } else if (x < pivot) {
                v[i] = v[--end];
                v[end] = x;
            } else {
                equal += weight;
                i++;
            }
        }
        if (above >= need) {
            n = n_larger;
        } else if (above + equal >= need || end == n) {
            return pivot;
        } else {
            need -= above + equal;
            v += end;
            n -= end;
        }
    }
}

/* The same for probabilities p (V) relative to the largest, at most 1, of which those below `low`
   do not count. Bisection, until few candidates are left for quickselect.
   scratch: working memory (V) */
static float least_of_largest(const float *p, int64_t V, double need, int by_mass, float low,
                              float *scratch) {
    float high = 2;
    Share upper = {0, 0}, lower = share_of(p, V, low);
    for (int halvings = 0; halvings < 32 && lower.count - upper.count > FEW; halvings++) {
        float middle = sqrtf(low * high);
        Share share = share_of(p, V, middle);
        if ((by_mass ? share.mass : share.count) >= need) {
            low = middle;
            lower = share;
        } else {
            high = middle;
            upper = share;
        }
    }
    int64_t n = 0;
    for (int64_t begin = 0; begin < V; begin += 16) {
        int64_t end = begin + 16 < V ? begin + 16 : V;
        int32_t any = 0;
        for (int64_t i = begin; i < end; i++) any |= (p[i] >= low) & (p[i] < high);
        for (int64_t i = begin; any && i < end; i++) {
            scratch[n] = p[i];
            n += p[i] >= low && p[i] < high;
        }
    }
    return n ? least_of_few(scratch, n, need - (by_mass ? upper.mass : upper.count), by_mass) : low;
}

/* The token of logits x (V) whose share of the probability contains the draw, after top-k, top-p
   and min-p. p, scratch: working memory (V) */
static int64_t choose_one(const float *x, int64_t V, float temperature, int64_t top_k, float top_p,
                          float min_p, double draw, float *p, float *scratch) {
    float top = largest_of(x, V), threshold = 1e-37f;
    for (int64_t i = 0; i < V; i++) p[i] = exp_((x[i] - top) / temperature);
    for (int64_t i = 0; i < V; i++) p[i] = p[i] > threshold ? p[i] : 0;
    if (0 < top_k && top_k < V) threshold = least_of_largest(p, V, top_k, 0, threshold, scratch);
    if (top_p < 1) {
        /* All tokens below the floor have at most half of the mass outside of the nucleus */
        double mass = share_of(p, V, threshold).mass;
        float floor = mass * (1 - top_p) / (2 * V);
        threshold = least_of_largest(p, V, top_p * mass, 1, larger(threshold, floor), scratch);
    }
    threshold = larger(threshold, min_p);
    double mass = share_of(p, V, threshold).mass, below = 0;
    int64_t i = 0, chosen = 0;
    for (; i + BLOCK < V; i += BLOCK) {          /* to the block that contains the draw */
        double in_block = share_of(p + i, BLOCK, threshold).mass;
        if (below + in_block > draw * mass) break;
        below += in_block;
    }
    for (; i < V && below <= draw * mass; i++) {
        if (p[i] >= threshold) {
            below += p[i];
            chosen = i;
        }
    }
    return chosen;
}

/* `sample_in_torch` of sampling.py: a token for each row of logits (B, V) */
void choose(int64_t B, int64_t V, const float *logits, double temperature, int64_t top_k,
            double top_p, double min_p, const double *draws, int64_t *chosen) {
    #pragma omp parallel
    {
        float *p = malloc(2 * V * sizeof *p);
        #pragma omp for
        for (int64_t b = 0; b < B; b++) {
            chosen[b] = choose_one(logits + b * V, V, temperature, top_k, top_p, min_p, draws[b],
                                   p, p + V);
        }
        free(p);
    }
}
