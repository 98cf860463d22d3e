/* The decoding step of a batch and the sampling of its tokens, for a CPU.

   This is what model.py and sampling.py compute. torch spends most of a small model's step between
   its operations. Here a step is one call, which reads each weight once, as fast as the memory can.
   native.py compiles this file and fills its structures with pointers to the model's weights.

   Vectors are as long as the registers of the instruction set that the compiler is told to use.
   Activations are float. Weights are float, bfloat16, int8 (a scale per output) or int4 (a scale
   and an offset per 32 inputs). The input of a matmul is rounded to 16 bits for integer weights,
   and to bfloat16 for bfloat16 weights where the CPU multiplies them; elsewhere bfloat16 weights
   become floats. Sums run in the same order whatever the batch size: the logits of a row are the
   same to the last bit alone and in a batch.

   Letters: B rows of a batch, one token each; C d_model, D head_dim, H heads, K key/value heads,
   V vocabulary size, S tokens of a sequence up to the row's own. x[b][i] is at x[b * width + i]. */

#include <sched.h>
#include <stdlib.h>
#include "../numbers.h"
#ifdef _OPENMP
#include <omp.h>
#define THREADS omp_get_num_threads()
#else
#define THREADS 1
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* ---- types ---------------------------------------------------------------- */

/* Kinds of numbers, positions and MLPs: the same values as in native_library.py */
enum { FLOAT, BFLOAT16, INT8, INT4 };
enum { ROPE, LEARNED };
enum { SWIGLU, GELU, RELU, RELU2, GELU_EXACT };

/* BYTES of a vector; ROWS x OUTS sums, and what they are made of, fit the registers; TILE outputs
   are what a thread computes at a time. */
#if defined(__AVX512BW__)
enum { BYTES = 64, ROWS = 4, OUTS = 4, TILE = 8 };
#elif defined(__AVX2__)
enum { BYTES = 32, ROWS = 4, OUTS = 3, TILE = 12 };
#elif defined(__aarch64__)
enum { BYTES = 16, ROWS = 4, OUTS = 4, TILE = 8 };
#else
enum { BYTES = 16, ROWS = 4, OUTS = 2, TILE = 8 };
#endif
enum { LANES = BYTES / 4 };                      /* floats of a vector */
enum { GROUP = 32 };                             /* inputs that share an int4 scale */
enum { LINE = 64 };                              /* bytes of a cache line */
enum { CACHE = 1 << 19 };                        /* bytes of the second cache, or less */
enum { LARGEST = 127 * 256 + 127 };              /* input of integer weights: two signed bytes */

/* Vectors of floats, of ints and unsigned words of 32 bits, of shorts and unsigned ones of 16; and
   those that become one when their elements are widened to twice the size. */
typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef int16_t Shorts __attribute__((vector_size(BYTES)));
typedef uint16_t UShorts __attribute__((vector_size(BYTES)));
typedef uint16_t HalfUShorts __attribute__((vector_size(BYTES / 2)));
typedef int8_t HalfBytes __attribute__((vector_size(BYTES / 2)));
typedef float Quad __attribute__((vector_size(16)));

#define EACH _Pragma("GCC unroll 8")
#define EACH_SUM EACH for (int r = 0; r < R; r++) EACH for (int n = 0; n < N; n++)
#define LOAD(type, from) ({ type loaded; memcpy(&loaded, from, sizeof loaded); loaded; })
/* Keep a vector in a register: gcc would rather load it again for every product. */
#if defined(__SSE2__)
#define KEEP(x) __asm__("" : "+v"(x))
#else
#define KEEP(x)
#endif

/* The model, as native.py describes it */
typedef struct {
    int64_t kind, in, out;
    const void *weight, *scale;                  /* weight 0: there is no such matrix */
    const float *bias;                           /* 0: no bias */
} Linear;

typedef struct {
    int64_t present;                             /* 0: the identity */
    int64_t centred;                             /* 1: LayerNorm; 0: RMSNorm */
    const float *weight, *bias;                  /* weight 0: no gain; bias 0: no bias */
} Norm;

typedef struct {
    Norm norm1;
    Linear q, k, v, o;
    Norm q_norm, k_norm, norm2;                  /* those of q and k: of each head */
    Linear gate, up, down;
} Layer;

typedef struct {
    int64_t n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size;
    int64_t mlp, position, cache_kind, weights_kind;
    double norm_eps;
    Linear embed, embed_positions, head;
    Norm embed_norm, norm;
    const float *cos, *sin;                      /* (max_seq_len, D) */
    const Layer *layers;
} Model;

/* The input of a matmul, (B, width): x in floats; q in bfloat16, or, for integer weights, in int16
   with a scale per row and the sums of each group. */
typedef struct { int64_t width; float *x, *scale, *sums; int16_t *q; } Input;

INLINE float number(const void *from, int64_t kind, int64_t at) {
    return kind == FLOAT ? ((const float *)from)[at] : from_bf16(((const uint16_t *)from)[at]);
}

INLINE Floats numbers(const void *from, int64_t kind, int64_t at) {
    if (kind == FLOAT) return LOAD(Floats, (const float *)from + at);
    HalfUShorts halves = LOAD(HalfUShorts, (const uint16_t *)from + at);
#if defined(__AVX512BW__)
    return (Floats)((Words)_mm512_cvtepu16_epi32((__m256i)halves) << 16);
#elif defined(__AVX2__)
    return (Floats)((Words)_mm256_cvtepu16_epi32((__m128i)halves) << 16);
#endif
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

/* The next n, at most LANES, and zeros */
INLINE Floats some_numbers(const void *from, int64_t kind, int64_t at, int64_t n) {
    float some[LANES] = {0};
    for (int64_t i = 0; i < n && i < LANES; i++) some[i] = number(from, kind, at + i);
    return LOAD(Floats, some);
}

/* a b + c, rounded once where the CPU can: left to itself, the compiler decides anew each time. */
INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#endif
    return a * b + c;
}

/* ---- instructions --------------------------------------------------------- */

/* STEP integer weights and as many 16-bit inputs, ready to be multiplied.
   sums[j] + a[2j] b[2j] + a[2j + 1] b[2j + 1] */
#ifdef __ARM_FEATURE_DOTPROD
/* An input is 256 high + low, each a signed byte. */
enum { STEP = 16 };
typedef int8x16_t Weights;
typedef int8x16x2_t Inputs;
typedef struct { int32x4_t low, high; } Sums;

INLINE int16_t to_input(int32_t q) { return ((q + 128) & ~255) | (q & 255); }
INLINE int32_t input(int16_t q) { return (q & ~255) + (int8_t)q; }
INLINE Inputs inputs(const int16_t *x) { return vld2q_s8((const int8_t *)x); }
INLINE Weights int8s(const int8_t *from) { return vld1q_s8(from); }
INLINE Ints total(Sums s) { return (Ints)vaddq_s32(vshlq_n_s32(s.high, 8), s.low); }

INLINE Sums add_products(Sums sums, Weights w, Inputs x) {
    sums.low = vdotq_s32(sums.low, w, x.val[0]);
    sums.high = vdotq_s32(sums.high, w, x.val[1]);
    return sums;
}

INLINE void int4s(const uint16_t *from, Weights *w) {
    uint8x16x2_t bytes = vld2q_u8((const uint8_t *)from);
    EACH for (int i = 0; i < 2; i++) {
        w[2 * i] = (int8x16_t)vandq_u8(bytes.val[i], vdupq_n_u8(15));
        w[2 * i + 1] = (int8x16_t)vshrq_n_u8(bytes.val[i], 4);
    }
}
#else
enum { STEP = BYTES / 2 };
typedef Shorts Weights, Inputs;
typedef Ints Sums;

INLINE int16_t to_input(int32_t q) { return q; }
INLINE int32_t input(int16_t q) { return q; }
INLINE Ints total(Sums sums) { return sums; }

INLINE Inputs inputs(const int16_t *from) { return LOAD(Inputs, from); }

INLINE Weights int8s(const int8_t *from) {
    HalfBytes bytes = LOAD(HalfBytes, from);
#if defined(__AVX512BW__)
    return (Weights)_mm512_cvtepi8_epi16((__m256i)bytes);
#elif defined(__AVX2__)
    return (Weights)_mm256_cvtepi8_epi16((__m128i)bytes);
#endif
    return __builtin_convertvector(bytes, Weights);
}

INLINE Sums add_products(Sums sums, Weights w, Inputs x) {
#if defined(__AVX512VNNI__)
    return (Sums)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    return sums + (Sums)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
    return (Sums)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
#elif defined(__AVX2__)
    return sums + (Sums)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#elif defined(__SSE2__)
    return sums + (Sums)_mm_madd_epi16((__m128i)w, (__m128i)x);
#elif defined(__aarch64__)
    int16x8_t a = (int16x8_t)w, b = (int16x8_t)x;
    int32x4_t low = vmlal_s16((int32x4_t)sums, vget_low_s16(a), vget_low_s16(b));
    return (Sums)vmlal_high_s16(low, a, b);
#else
    sums += ((Ints)w << 16 >> 16) * ((Ints)x << 16 >> 16);
    return sums + ((Ints)w >> 16) * ((Ints)x >> 16);
#endif
}

/* 16 words of four nibbles: word j has the weights j, j + 16, j + 32 and j + 48 of 64. */
INLINE void int4s(const uint16_t *from, Weights *w) {
#ifdef __AVX512BW__
    __m256i words = LOAD(__m256i, from);
    __m512i low = _mm512_castsi256_si512(words);
    UShorts both = (UShorts)_mm512_inserti64x4(low, _mm256_srli_epi16(words, 4), 1);
    w[0] = (Weights)(both & 15);
    w[1] = (Weights)(both >> 8 & 15);
#else
    EACH for (int i = 0; i < 16 / STEP; i++) {
        UShorts words = LOAD(UShorts, from + i * STEP);
        EACH for (int k = 0; k < 4; k++) w[k * 16 / STEP + i] = (Weights)(words >> 4 * k & 15);
    }
#endif
}
#endif

/* ---- sums of products ----------------------------------------------------- */

/* The sums of the elements of four vectors. Each lane of 16 bytes is transposed and added. */
#if __has_builtin(__builtin_shufflevector)
#define PICK(v, w, ...) __builtin_shufflevector(v, w, __VA_ARGS__)
#else
#define PICK(v, w, ...) __builtin_shuffle(v, w, (Ints){__VA_ARGS__})
#endif
#define IN_LANE(at, a, b, c, d) at + a, at + b, at + LANES + c, at + LANES + d
#if defined(__AVX512BW__)
#define IN_LANES(...) \
    IN_LANE(0, __VA_ARGS__), IN_LANE(4, __VA_ARGS__), IN_LANE(8, __VA_ARGS__), \
    IN_LANE(12, __VA_ARGS__)
#elif defined(__AVX2__)
#define IN_LANES(...) IN_LANE(0, __VA_ARGS__), IN_LANE(4, __VA_ARGS__)
#else
#define IN_LANES(...) IN_LANE(0, __VA_ARGS__)
#endif

#define PART(v, w, a, b, c, d) PICK(v, w, IN_LANES(a, b, c, d))

INLINE Quad sums_of_4(Floats a, Floats b, Floats c, Floats d) {
    Floats ab = PART(a, b, 0, 1, 0, 1) + PART(a, b, 2, 3, 2, 3);
    Floats cd = PART(c, d, 0, 1, 0, 1) + PART(c, d, 2, 3, 2, 3);
    Floats all = PART(ab, cd, 0, 2, 0, 2) + PART(ab, cd, 1, 3, 1, 3);
    union { Floats whole; Quad quads[BYTES / 16]; } u = {all};
    for (int n = BYTES / 32; n; n /= 2) for (int i = 0; i < n; i++) u.quads[i] += u.quads[i + n];
    return u.quads[0];
}

/* Reduce each vector of R x N sums to a number. */
INLINE void sum_all(Floats sums[ROWS][OUTS], int R, int N, float results[ROWS][OUTS]) {
#define SUM(k) sums[(k) < R * N ? (k) / N : 0][(k) < R * N ? (k) % N : 0]
    EACH for (int k = 0; k < R * N; k += 4) {
        Quad four = sums_of_4(SUM(k), SUM(k + 1), SUM(k + 2), SUM(k + 3));
        for (int i = 0; i < 4 && k + i < R * N; i++) results[(k + i) / N][(k + i) % N] = four[i];
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
   loaded of the weights is used for all rows, each of the rows for all outputs. */
#define STEP_OF(Weight, weights, Row, row, product) do { \
        Weight w[OUTS]; \
        EACH for (int n = 0; n < N; n++) { w[n] = weights; KEEP(w[n]); } \
        fetch(ahead); \
        EACH for (int r = 0; r < R; r++) { \
            Row v = row; \
            KEEP(v); \
            EACH for (int n = 0; n < N; n++) sums[r][n] = product; \
        } \
    } while (0)

INLINE void dot_floats(int64_t kind, const Linear *l, int64_t o, int N, const float *x, int R,
                       Ahead *ahead, float results[ROWS][OUTS]) {
    Floats sums[ROWS][OUTS] = {0};
    int64_t i = 0, in = l->in, at = o * in;
    for (; i + LANES <= in; i += LANES) {
        STEP_OF(Floats, numbers(l->weight, kind, at + n * in + i),
                Floats, LOAD(Floats, x + r * in + i), sums[r][n] + w[n] * v);
    }
    if (i < in) {
        STEP_OF(Floats, some_numbers(l->weight, kind, at + n * in + i, in - i),
                Floats, some_numbers(x, FLOAT, r * in + i, in - i), sums[r][n] + w[n] * v);
    }
    sum_all(sums, R, N, results);
}

#ifdef __AVX512BF16__
#define WIDENED 0                                /* bfloat16 weights become floats */
#define BF16_PRODUCT \
    (Floats)_mm512_dpbf16_ps((__m512)sums[r][n], (__m512bh)w[n], (__m512bh)v)

INLINE void dot_bf16(const Linear *l, int64_t o, int N, const int16_t *x, int R, Ahead *ahead,
                     float results[ROWS][OUTS]) {
    Floats sums[ROWS][OUTS] = {0};
    int64_t i = 0, in = l->in;
    const uint16_t *weight = (const uint16_t *)l->weight + o * in;
    for (; i + 32 <= in; i += 32) {
        STEP_OF(Words, LOAD(Words, weight + n * in + i), Words, LOAD(Words, x + r * in + i),
                BF16_PRODUCT);
    }
    if (i < in) {
        __mmask32 rest = (1u << (in - i)) - 1;
        STEP_OF(__m512i, _mm512_maskz_loadu_epi16(rest, weight + n * in + i),
                __m512i, _mm512_maskz_loadu_epi16(rest, x + r * in + i), BF16_PRODUCT);
    }
    sum_all(sums, R, N, results);
}
#else
#define WIDENED 1
#define dot_bf16(...) (void)0
#endif

/* 256 products of 7 and 15 bits fit a sum of 31 bits; then the sums are added up as floats. */
INLINE void dot_int8(const Linear *l, int64_t o, int N, const int16_t *x, int R, Ahead *ahead,
                     float results[ROWS][OUTS]) {
    const int8_t *weight = (const int8_t *)l->weight + o * l->in;
    Floats totals[ROWS][OUTS] = {0};
    for (int64_t begin = 0, part = 256 * LANES; begin < l->in; begin += part) {
        int64_t i = begin, end = begin + part < l->in ? begin + part : l->in;
        Sums sums[ROWS][OUTS] = {0};
        for (; i + STEP <= end; i += STEP) {
            STEP_OF(Weights, int8s(weight + n * l->in + i), Inputs, inputs(x + r * l->in + i),
                    add_products(sums[r][n], w[n], v));
        }
        EACH_SUM totals[r][n] += __builtin_convertvector(total(sums[r][n]), Floats);
        for (; i < end; i++) {
            EACH_SUM totals[r][n][0] += weight[n * l->in + i] * input(x[r * l->in + i]);
        }
    }
    sum_all(totals, R, N, results);
}

/* Half of 64 inputs are a group. It has a scale and an offset, two bfloat16 in a word of 32 bits:
   sum((q scale + offset) x) = scale sum(q x) + offset sum(x). */
INLINE void dot_int4(const Linear *l, int64_t o, int N, const int16_t *x, const float *x_sums,
                     int R, Ahead *ahead, float results[ROWS][OUTS]) {
    enum { VECTORS = GROUP / STEP };             /* of a group */
    int64_t groups = l->in / GROUP, g = 0;
    const uint16_t *weight = (const uint16_t *)l->weight + o * l->in / 4;
    const uint32_t *scale = (const uint32_t *)l->scale + o * groups;
    Floats sums[ROWS][OUTS] = {0};
    for (int64_t i = 0; i < l->in; i += 64) {
        fetch(ahead);
        EACH for (int n = 0; n < N; n++) {
            Weights w[2 * VECTORS];
            int4s(weight + (n * l->in + i) / 4, w);
            EACH for (int half = 0; half < 2; half++) {
                Floats s = (Floats)(((Words){0} + scale[n * groups + i / GROUP + half]) << 16);
                EACH for (int k = 0; k < VECTORS; k++) KEEP(w[half * VECTORS + k]);
                EACH for (int r = 0; r < R; r++) {
                    const int16_t *v = x + r * l->in + i + half * GROUP;
                    Sums p = {0};
                    EACH for (int k = 0; k < VECTORS; k++) {
                        p = add_products(p, w[half * VECTORS + k], inputs(v + k * STEP));
                    }
                    sums[r][n] += s * __builtin_convertvector(total(p), Floats);
                }
            }
        }
    }
    for (; g + LANES <= groups; g += LANES) {
        EACH_SUM sums[r][n] += (Floats)(LOAD(Words, scale + n * groups + g) & 0xffff0000) *
                               LOAD(Floats, x_sums + r * groups + g);
    }
    sum_all(sums, R, N, results);
    for (; g < groups; g++) {
        EACH_SUM results[r][n] = multiply_add(from_bf16(scale[n * groups + g] >> 16),
                                              x_sums[r * groups + g], results[r][n]);
    }
}

/* A block of R rows by N outputs of y (B, out) = x weight^T + bias; with `add`, y += that. */
INLINE void block_of(int64_t kind, const Linear *l, int64_t o, int N, const Input *in, int64_t b,
                     int R, Ahead *ahead, float *y, int add) {
    float results[ROWS][OUTS];
    const float *x = in->x + b * l->in, *x_sums = in->sums + b * (l->in / GROUP);
    const int16_t *q = in->q + b * l->in;
    if (kind == INT8) dot_int8(l, o, N, q, R, ahead, results);
    else if (kind == INT4) dot_int4(l, o, N, q, x_sums, R, ahead, results);
    else if (kind == FLOAT || WIDENED) dot_floats(kind, l, o, N, x, R, ahead, results);
    else dot_bf16(l, o, N, q, R, ahead, results);
    EACH_SUM {
        float *at = y + (b + r) * l->out + o + n, value = results[r][n];
        float scale = in->scale[b + r], bias = l->bias ? l->bias[o + n] : 0;
        if (kind == INT8) scale *= ((const float *)l->scale)[o + n];
        value = kind > BFLOAT16 ? multiply_add(value, scale, bias) : value + bias;
        *at = add ? *at + value : value;
    }
}

/* A function of its own, since gcc would otherwise keep some of the sums in memory */
static __attribute__((noinline)) void block_of_floats(const Linear *l, int64_t o, const Input *in,
                                                      int64_t b, Ahead *ahead, float *y, int add) {
    block_of(FLOAT, l, o, OUTS, in, b, ROWS, ahead, y, add);
}

/* Rows `begin` to `end`, which the cache holds. The threads share the outputs; there is no barrier
   at the end. While a tile is multiplied, the next one is prefetched: each step of each block
   fetches its part of it. If bfloat16 weights are multiplied as FLOAT, each tile is widened once,
   into the thread's scratch (TILE, in). */
INLINE void matmul_of(int64_t kind, const Linear *l, const Input *in, int64_t begin, int64_t end,
                      float *y, int add, float *scratch) {
    int64_t rows = end - begin, bits[] = {32, 16, 8, 4}, bytes = bits[l->kind] * l->in / 8;
    #pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < l->out; first += TILE) {
        int64_t last = first + TILE < l->out ? first + TILE : l->out;
        const char *next = (const char *)l->weight + last * bytes;
        Ahead ahead = {next, rows < ROWS || rows >= ROWS * OUTS ? 1 : ROWS * OUTS / rows};
        Linear tile = *l;
        if (kind < l->kind) {
            const uint16_t *weight = (const uint16_t *)l->weight + first * l->in;
            for (int64_t i = 0; i < (last - first) * l->in; i++) scratch[i] = from_bf16(weight[i]);
            tile.weight = scratch - first * l->in;
        }
        for (int64_t b = begin; b < end;) {
            int R = end - b >= ROWS ? ROWS : end - b >= 2 ? 2 : 1;
            int few = kind > BFLOAT16 ? 2 : OUTS, N = R < ROWS ? few : OUTS;
            if (ahead.next >= next + TILE * bytes) ahead.lines = 0;
            for (int64_t o = first; o < last; o += N) {
                if (last - o < N) N = 1;
                if (R == 1 && N == 1) block_of(kind, &tile, o, 1, in, b, 1, &ahead, y, add);
                else if (R == 1) block_of(kind, &tile, o, few, in, b, 1, &ahead, y, add);
                else if (R == 2 && N == 1) block_of(kind, &tile, o, 1, in, b, 2, &ahead, y, add);
                else if (R == 2) block_of(kind, &tile, o, few, in, b, 2, &ahead, y, add);
                else if (N == 1) block_of(kind, &tile, o, 1, in, b, ROWS, &ahead, y, add);
                else if (kind == FLOAT) block_of_floats(&tile, o, in, b, &ahead, y, add);
                else block_of(kind, &tile, o, OUTS, in, b, ROWS, &ahead, y, add);
            }
            b += R;
        }
    }
}

static void matmul(const Linear *l, const Input *in, int64_t B, float *y, int add, float *scratch) {
    int64_t bytes = l->in * (l->kind == FLOAT ? 4 : 2), rows = ROWS * (CACHE / bytes / ROWS + 1);
    for (int64_t b = 0; b < B; b += rows) {
        int64_t end = b + rows < B ? b + rows : B;
        int widen = WIDENED && l->kind == BFLOAT16 && end - b >= 4 * ROWS;
        if (l->kind == FLOAT || widen) matmul_of(FLOAT, l, in, b, end, y, add, scratch);
        else if (l->kind == BFLOAT16) matmul_of(BFLOAT16, l, in, b, end, y, add, scratch);
        else if (l->kind == INT8) matmul_of(INT8, l, in, b, end, y, add, scratch);
        else matmul_of(INT4, l, in, b, end, y, add, scratch);
    }
}

/* ---- one row: what is computed between the matmuls ------------------------ */

/* Convert row b of an input for the model's kind of weights. */
static void prepare(const Model *m, const Input *in, int64_t b) {
    float *x = in->x + b * in->width, top = 1e-30f;
    int16_t *q = in->q + b * in->width;
    if (m->weights_kind <= BFLOAT16) {
        if (m->weights_kind == FLOAT || WIDENED) return;
        for (int64_t i = 0; i < in->width; i++) q[i] = to_bf16(x[i]);
        return;
    }
    #pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < in->width; i++) top = larger(top, fabsf(x[i]));
    float inverse = LARGEST / top;
    in->scale[b] = top / LARGEST;
    for (int64_t i = 0; i < in->width; i++) q[i] = to_input(rintf(x[i] * inverse));
    for (int64_t g = 0; g < in->width / GROUP; g++) {
        int32_t sum = 0;
        for (int i = 0; i < GROUP; i++) sum += input(q[g * GROUP + i]);
        in->sums[b * (in->width / GROUP) + g] = sum;
    }
}

static void normalise(const Model *m, const Norm *norm, int64_t C, const float *x, float *y) {
    float mean = 0, square = 0;
    if (!norm->present) {
        memmove(y, x, C * sizeof *x);
        return;
    }
    if (norm->centred) {
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
    Floats sums[4] = {0};
    int64_t i = 0;
    for (; i + LANES <= D; i += LANES) {
        EACH for (int n = 0; n < N; n++) {
            sums[n] += LOAD(Floats, q + i) * numbers(keys, kind, at + n * D + i);
        }
    }
    EACH for (int n = 0; n < N && i < D; n++) {
        Floats rest = some_numbers(keys, kind, at + n * D + i, D - i);
        sums[n] += some_numbers(q, FLOAT, i, D - i) * rest;
    }
    Quad results = sums_of_4(sums[0], sums[1], sums[2], sums[3]);
    EACH for (int n = 0; n < N; n++) p[n] = results[n] / sqrtf(D);
}

enum { MIX = BYTES == 64 ? 4 : 8 };              /* vectors of values that are summed at once */

/* y (LANES N): the sum of S values, which begin at `at` and are D apart, weighted by p / total. */
INLINE void mix(const void *values, int64_t kind, int64_t at, int N, int64_t S, int64_t D,
                const float *p, float total, float *y) {
    Floats sums[MIX] = {0};
    for (int64_t s = 0; s < S; s++) {
        EACH for (int n = 0; n < N; n++) {
            sums[n] += p[s] * numbers(values, kind, at + s * D + LANES * n);
        }
    }
    EACH for (int n = 0; n < N; n++) {
        Floats mean = sums[n] / total;
        memcpy(y + LANES * n, &mean, sizeof mean);
    }
}

/* y (D) = softmax(q k^T / sqrt(D)) v over S tokens, whose keys and values begin at `at`.
   p: working memory (S) */
INLINE void attend(int64_t kind, const void *keys, const void *values, int64_t at, int64_t S,
                   int64_t D, const float *q, float *p, float *y) {
    int64_t s = 0, i = 0;
    for (; s + 4 <= S; s += 4) score(keys, kind, at + s * D, 4, D, q, p + s);
    for (; s < S; s++) score(keys, kind, at + s * D, 1, D, q, p + s);
    float top = largest(p, S), total = 0;
    for (s = 0; s < S; s++) p[s] = exponential(p[s] - top);
    #pragma omp simd reduction(+ : total)
    for (s = 0; s < S; s++) total += p[s];
    for (; i + MIX * LANES <= D; i += MIX * LANES) {
        mix(values, kind, at + i, MIX, S, D, p, total, y + i);
    }
    for (; i + LANES <= D; i += LANES) mix(values, kind, at + i, 1, S, D, p, total, y + i);
    for (; i < D; i++) {
        float sum = 0;
        for (s = 0; s < S; s++) sum += p[s] * number(values, kind, at + s * D + i);
        y[i] = sum / total;
    }
}

/* The MLP's activation of n hidden units, into `gate`; GELU is x (1 + tanh(...)) / 2, and exactly
   x (1 + erf(x / sqrt 2)) / 2. */
INLINE void activate(int64_t kind, int64_t n, float *gate, const float *up) {
    for (int64_t i = 0; i < n; i++) {
        float x = kind == SWIGLU ? gate[i] : up[i];
        if (kind == SWIGLU) gate[i] = x / (1 + exponential(-x)) * up[i];
        else if (kind == GELU)
            gate[i] = x - x / (1 + exponential(2 * 0.7978845608f * (x + 0.044715f * x * x * x)));
        else if (kind == GELU_EXACT) gate[i] = x * 0.5f * (1 + erff(x * 0.7071067812f));
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

/* The input of the matmuls after a norm; the threads share the rows. */
static void normalise_rows(const Model *m, const Norm *norm, int64_t B, const float *x, Input *h) {
    #pragma omp for nowait
    for (int64_t b = 0; b < B; b++) {
        normalise(m, norm, m->d_model, x + b * m->d_model, h->x + b * m->d_model);
        prepare(m, h, b);
    }
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
        float *p = malloc(larger(max_len, TILE * larger(m->d_ff, larger(C, H * D))) * 4);
        #pragma omp single
        team.threads = THREADS;
        #pragma omp for nowait
        for (int64_t b = 0; b < B; b++) {
            add_embedding(&m->embed, tokens[b], x + b * C);
            if (m->position == LEARNED) {
                add_embedding(&m->embed_positions, positions[b], x + b * C);
            }
            normalise(m, &m->embed_norm, C, x + b * C, x + b * C);
        }
        for (const Layer *l = m->layers; l < m->layers + m->n_layers; l++) {
            int64_t layer = (l - m->layers) * n_slots;

            /* Keys and values of the new tokens */
            meet(&team);
            normalise_rows(m, &l->norm1, B, x, &h);
            meet(&team);
            matmul(&l->q, &h, B, q, 0, p);
            matmul(&l->k, &h, B, k, 0, p);
            matmul(&l->v, &h, B, v, 0, p);
            meet(&team);
            #pragma omp for collapse(2) nowait
            for (int64_t b = 0; b < B; b++) {
                for (int64_t head = 0; head < K; head++) {
                    int64_t at = (((layer + slots[b]) * K + head) * max_len + positions[b]) * D;
                    int64_t new = (b * K + head) * D;
                    normalise(m, &l->k_norm, D, k + new, k + new);
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
                    normalise(m, &l->q_norm, D, mine, mine);
                    if (m->position == ROPE) rotate(m, positions[b], mine);
                    if (m->cache_kind == FLOAT) attend(FLOAT, keys, values, at, S, D, mine, p, out);
                    else attend(BFLOAT16, keys, values, at, S, D, mine, p, out);
                }
            }
            meet(&team);
            #pragma omp for nowait
            for (int64_t b = 0; b < B; b++) prepare(m, &a, b);
            meet(&team);
            matmul(&l->o, &a, B, x, 1, p);

            /* MLP */
            meet(&team);
            normalise_rows(m, &l->norm2, B, x, &h);
            meet(&team);
            if (l->gate.weight) matmul(&l->gate, &h, B, f.x, 0, p);
            matmul(&l->up, &h, B, up, 0, p);
            meet(&team);
            #pragma omp for nowait
            for (int64_t b = 0; b < B; b++) {
                float *mine = f.x + b * m->d_ff, *other = up + b * m->d_ff;
                if (m->mlp == SWIGLU) activate(SWIGLU, m->d_ff, mine, other);
                else if (m->mlp == GELU) activate(GELU, m->d_ff, mine, other);
                else if (m->mlp == RELU) activate(RELU, m->d_ff, mine, other);
                else if (m->mlp == GELU_EXACT) activate(GELU_EXACT, m->d_ff, mine, other);
                else activate(RELU2, m->d_ff, mine, other);
                prepare(m, &f, b);
            }
            meet(&team);
            matmul(&l->down, &f, B, x, 1, p);
        }
        meet(&team);
        normalise_rows(m, &m->norm, B, x, &h);
        meet(&team);
        if (logits) matmul(&m->head, &h, B, logits, 0, p);
        free(p);
    }
    void *used[] = {x, q, k, v, up, h.x, h.scale, h.sums, h.q, a.x, a.scale, a.sums, a.q,
                    f.x, f.scale, f.sums, f.q};
    for (size_t i = 0; i < sizeof used / sizeof *used; i++) free(used[i]);
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

/* A token that may be the last one to stay: its logit and its relative probability */
typedef struct { float x, p; } Candidate;

/* The smallest of the largest logits of v (n): of the first `need` in descending order, or, by
   mass, of the first whose probabilities reach `need` > 0. Quickselect; v is reordered. */
INLINE float least_of_few(Candidate *v, int64_t n, double need, int by_mass) {
    for (;;) {
        float pivot = v[n / 2].x;
        double above = 0, equal = 0;
        int64_t n_larger = 0, i = 0, end = n;
        while (i < end) {                        /* partition: larger | equal | smaller */
            Candidate c = v[i];
            float weight = by_mass ? c.p : 1;
            if (c.x > pivot) {
                above += weight;
                v[i++] = v[n_larger];
                v[n_larger++] = c;
            } else if (c.x < pivot) {
                v[i] = v[--end];
                v[end] = c;
            } else {
                equal += weight;
                i++;
            }
        }
        if (above >= need && n_larger) {
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

/* The same for all logits x (V) with probabilities p (V), of which those below `low` do not count.
   Bisection of the probabilities, until few candidates are left for quickselect; that compares the
   logits, since a high temperature gives different ones the same probability.
   scratch: working memory (V) */
static float least_of_largest(const float *x, const float *p, int64_t V, double need, int by_mass,
                              float low, Candidate *scratch) {
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
            scratch[n] = (Candidate){x[i], p[i]};
            n += p[i] >= low && p[i] < high;
        }
    }
    if (!n) return -INFINITY;
    return least_of_few(scratch, n, need - (by_mass ? upper.mass : upper.count), by_mass);
}

/* Set the probabilities p (V) of logits x (V) below `smallest` to 0. */
static void exclude(const float *x, int64_t V, float smallest, float *p) {
    for (int64_t i = 0; i < V; i++) p[i] = x[i] >= smallest ? p[i] : 0;
}

/* The token of logits x (V) whose share of the probability contains the draw, after top-k, top-p
   and min-p. p, scratch: working memory (V) */
static int64_t choose_one(const float *x, int64_t V, float temperature, int64_t top_k,
                          double top_p, double min_p, double draw, float *p, Candidate *scratch) {
    const float least = 1e-37f;                  /* a smaller probability is 0 */
    float top = largest(x, V);
    for (int64_t i = 0; i < V; i++) {            /* no top - top, NaN if it is infinite */
        p[i] = x[i] < top ? exponential((x[i] - top) / temperature) : 1;
    }
    for (int64_t i = 0; i < V; i++) p[i] = p[i] > least ? p[i] : 0;
    if (0 < top_k && top_k < V) {
        exclude(x, V, least_of_largest(x, p, V, top_k, 0, least, scratch), p);
    }
    if (top_p < 1) {
        /* All tokens below the floor have at most half of the mass outside of the nucleus. The
           most likely one, of mass 1, is always inside */
        double mass = share_of(p, V, least).mass, need = top_p * mass > 1 ? top_p * mass : 1;
        float floor = mass * (1 - top_p) / (2 * V);
        exclude(x, V, least_of_largest(x, p, V, need, 1, larger(least, floor), scratch), p);
    }
    if (min_p > 0) {
        float gap = temperature * log(min_p);
        for (int64_t i = 0; i < V; i++) p[i] = x[i] == top || x[i] - top >= gap ? p[i] : 0;
    }
    double mass = share_of(p, V, least).mass, below = 0;
    int64_t i = 0, chosen = 0;
    for (; i + BLOCK < V; i += BLOCK) {          /* to the block that contains the draw */
        double in_block = share_of(p + i, BLOCK, least).mass;
        if (below + in_block > draw * mass) break;
        below += in_block;
    }
    for (; i < V && below <= draw * mass; i++) {
        if (p[i] >= least) {
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
        float *p = malloc(V * sizeof *p);
        Candidate *scratch = malloc(V * sizeof *scratch);
        #pragma omp for
        for (int64_t b = 0; b < B; b++) {
            chosen[b] = choose_one(logits + b * V, V, temperature, top_k, top_p, min_p, draws[b],
                                   p, scratch);
        }
        free(p);
        free(scratch);
    }
}
