/* What a training step on a CPU does beside its matmuls: one pass over memory for each part.

kernels.py compiles this file and names its functions; block.py and loss.py use them. Each function
takes float32 tensors, or bfloat16 ones where `half` is 1, and computes in float32. Every row, or
attention head, is computed by one thread, so the results do not depend on the number of threads.

Letters: B batch, T tokens, C d_model, H query heads, K key/value heads, D head_dim, F d_ff,
V vocab_size, N tokens of all rows. */

#include <stdlib.h>
#include "../numbers.h"

/* ---- rows of numbers ---- */

/* Read n values from position `at` of a tensor. */
static void read_row(float *restrict row, const void *tensor, int64_t at, int64_t n, int half)
{
    if (half) {
        const uint16_t *x = (const uint16_t *)tensor + at;
        for (int64_t i = 0; i < n; i++)
            row[i] = from_bf16(x[i]);
    } else {
        memcpy(row, (const float *)tensor + at, n * sizeof(float));
    }
}

/* Write n values to position `at` of a tensor. */
static void write_row(void *tensor, int64_t at, const float *restrict row, int64_t n, int half)
{
    if (half) {
        uint16_t *x = (uint16_t *)tensor + at;
        for (int64_t i = 0; i < n; i++)
            x[i] = to_bf16(row[i]);
    } else {
        memcpy((float *)tensor + at, row, n * sizeof(float));
    }
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

losses (N): nats; 0 for a target below 0, which has no gradient. Values after the V-th become 0. */
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

/* ---- norm and activation ---- */

/* normed = RMSNorm(x) = x / rms(x) * weight; if `added` is not NULL, of sum = x + added instead.

x and sum (N, C) are float32. */
void add_norm(int64_t N, int64_t C, int half, const float *x, const void *added, float *sum,
              const float *weight, void *normed, float *inverse_rms, float eps, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        float *row = malloc(C * sizeof(float));
#pragma omp for
        for (int64_t n = 0; n < N; n++) {
            const float *at = x + n * C;
            if (added) {
                read_row(row, added, n * C, C, half);
#pragma omp simd
                for (int64_t i = 0; i < C; i++)
                    sum[n * C + i] = at[i] + row[i];
                at = sum + n * C;
            }
            float inverse = inverse_rms[n] = 1 / sqrtf(dot(at, at, C) / C + eps);
#pragma omp simd
            for (int64_t i = 0; i < C; i++)
                row[i] = at[i] * inverse * weight[i];
            write_row(normed, n * C, row, C, half);
        }
        free(row);
    }
}

enum { NORM_ROWS = 64 }; /* rows whose gradients by the weight are one sum */

/* dx = d_sum + the gradient through the norm. d_weight has a sum for each NORM_ROWS rows. */
void add_norm_backward(int64_t N, int64_t C, int half, const float *x, const float *weight,
                       const float *inverse_rms, const void *d_normed, const float *d_sum,
                       float *dx, float *d_weight, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        float *dy = malloc(C * sizeof(float));
#pragma omp for
        for (int64_t part = 0; part < (N + NORM_ROWS - 1) / NORM_ROWS; part++) {
            float *restrict dw = d_weight + part * C;
            memset(dw, 0, C * sizeof(float));
            for (int64_t n = part * NORM_ROWS; n < N && n < (part + 1) * NORM_ROWS; n++) {
                const float *restrict at = x + n * C, *restrict direct = d_sum + n * C;
                float *restrict out = dx + n * C, inverse = inverse_rms[n], sum = 0;
                read_row(dy, d_normed, n * C, C, half);
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < C; i++) {
                    dw[i] += dy[i] * at[i] * inverse;
                    dy[i] *= weight[i];
                    sum += dy[i] * at[i];
                }
                float along = sum * inverse * inverse / C;
                for (int64_t i = 0; i < C; i++)
                    out[i] = direct[i] + inverse * (dy[i] - at[i] * along);
            }
        }
        free(dy);
    }
}

/* silu(x) = x sigmoid(x) */
static void sigmoids(float *restrict sigmoid, const float *restrict x, int64_t n)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        sigmoid[i] = 1 / (1 + exponential(-x[i]));
}

/* hidden (N, F) = silu(gate) * up, of gate_up (N, 2 F). */
void swiglu(int64_t N, int64_t F, int half, const void *gate_up, void *hidden, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        float *gate = malloc(3 * F * sizeof(float)), *up = gate + F, *sigmoid = up + F;
#pragma omp for
        for (int64_t n = 0; n < N; n++) {
            read_row(gate, gate_up, n * 2 * F, 2 * F, half);
            sigmoids(sigmoid, gate, F);
#pragma omp simd
            for (int64_t i = 0; i < F; i++)
                gate[i] *= sigmoid[i] * up[i];
            write_row(hidden, n * F, gate, F, half);
        }
        free(gate);
    }
}

void swiglu_backward(int64_t N, int64_t F, int half, const void *gate_up, const void *d_hidden,
                     void *d_gate_up, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        float *gate = malloc(4 * F * sizeof(float)), *up = gate + F, *sigmoid = up + F;
        float *d = sigmoid + F;
#pragma omp for
        for (int64_t n = 0; n < N; n++) {
            read_row(gate, gate_up, n * 2 * F, 2 * F, half);
            read_row(d, d_hidden, n * F, F, half);
            sigmoids(sigmoid, gate, F);
#pragma omp simd
            for (int64_t i = 0; i < F; i++) {
                float silu = gate[i] * sigmoid[i];
                gate[i] = d[i] * up[i] * (sigmoid[i] + silu * (1 - sigmoid[i]));
                up[i] = d[i] * silu;
            }
            write_row(d_gate_up, n * 2 * F, gate, 2 * F, half);
        }
        free(gate);
    }
}

/* ---- small matrix products, for attention ---- */

#if defined(__AVX512F__)
enum { WIDTH = 16, BLOCK = 8 }; /* floats of a register; rows whose sums are held in registers */
#elif defined(__AVX__)
enum { WIDTH = 8, BLOCK = 4 };
#else
enum { WIDTH = 4, BLOCK = 4 };
#endif
enum { TILE = 32, PAD = 16 }; /* query rows of a tile; all sizes are multiples of PAD */
typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));

INLINE void block(int vecs, float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_col,
      const float *b, int64_t b_row, int64_t inner)
{
    vec sum[BLOCK][2];
    for (int r = 0; r < BLOCK; r++)
        for (int j = 0; j < vecs; j++)
            sum[r][j] = *(vec *)(c + r * c_row + j * WIDTH);
    for (int64_t k = 0; k < inner; k++)
        for (int r = 0; r < BLOCK; r++)
            for (int j = 0; j < vecs; j++)
                sum[r][j] += a[r * a_row + k * a_col] * *(vec *)(b + k * b_row + j * WIDTH);
    for (int r = 0; r < BLOCK; r++)
        for (int j = 0; j < vecs; j++)
            *(vec *)(c + r * c_row + j * WIDTH) = sum[r][j];
}

/* c (rows, cols) += a (rows, inner) b (inner, cols). Neighbours in a are a_row and a_col apart. */
static void multiply(float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_col,
                     const float *b, int64_t b_row, int64_t rows, int64_t inner, int64_t cols)
{
    for (int64_t i = 0; i < rows; i += BLOCK) {
        int64_t j = 0;
        for (; j + 2 * WIDTH <= cols; j += 2 * WIDTH)
            block(2, c + i * c_row + j, c_row, a + i * a_row, a_row, a_col, b + j, b_row, inner);
        for (; j < cols; j += WIDTH)
            block(1, c + i * c_row + j, c_row, a + i * a_row, a_row, a_col, b + j, b_row, inner);
    }
}

/* ---- attention with RoPE ---- */

/* The arguments of both passes. A token's row of qkv has its H queries, K keys and K values. */
struct attention {
    int64_t B, T, H, K, D, half;
    const void *qkv;        /* (B, T, H + 2 K, D) */
    const float *cos, *sin; /* (positions, D) */
    const int64_t *starts;  /* (B, T): index of the first token of each token's document */
    void *y;                /* (B, T, H, D) */
    const void *dy;         /* as y */
    void *d_qkv;            /* as qkv */
};

/* The float32 copies that a thread needs for a key/value head; sizes are padded with zeros. */
struct scratch {
    int64_t d, t;               /* padded D and T */
    float *k, *k_t, *v, *v_t;   /* (t, d) and transposed (d, t) */
    float *dk, *dv;             /* (t, d) */
    float *q, *y, *dq, *p, *ds; /* of a tile: (TILE, d) and (TILE, t) */
};

/* A tile: the query rows [start, end) of a head, and the keys [from, to) that any of them sees. */
struct tile {
    int64_t b, head, start, end, from, to;
};

static int64_t round_up(int64_t n)
{
    return (n + PAD - 1) / PAD * PAD;
}

static struct scratch allocate(const struct attention *a)
{
    /* PAD more: rows that are a power of two apart would share the same few lines of the cache. */
    struct scratch s = {.d = round_up(a->D), .t = round_up(a->T) + PAD};
    int64_t matrix = s.t * s.d, tile = TILE * s.d;
    float *at = calloc(6 * matrix + 3 * tile + 2 * TILE * s.t, sizeof(float));
    float **matrices[] = {&s.k, &s.k_t, &s.v, &s.v_t, &s.dk, &s.dv};
    for (int i = 0; i < 6; i++, at += matrix)
        *matrices[i] = at;
    s.q = at, s.y = s.q + tile, s.dq = s.y + tile, s.p = s.dq + tile, s.ds = s.p + TILE * s.t;
    return s;
}

static int64_t start_of(const struct attention *a, int64_t b, int64_t t)
{
    return a->starts[b * a->T + t];
}

static int64_t qkv_at(const struct attention *a, int64_t b, int64_t t, int64_t head)
{
    return ((b * a->T + t) * (a->H + 2 * a->K) + head) * a->D;
}

static int64_t y_at(const struct attention *a, struct tile tile, int64_t t)
{
    return ((tile.b * a->T + t) * a->H + tile.head) * a->D;
}

/* Rotate each pair (x[i], x[i + D/2]) by its angle at token t; direction -1 rotates back. */
static void rotate(const struct attention *a, float *x, int64_t b, int64_t t, float direction)
{
    int64_t table = (t - start_of(a, b, t)) * a->D;
    const float *cos = a->cos + table, *sin = a->sin + table;
    float *restrict first = x, *restrict second = x + a->D / 2;
    for (int64_t i = 0; i < a->D / 2; i++) {
        float s = direction * sin[i], old = first[i];
        first[i] = old * cos[i] - second[i] * s;
        second[i] = second[i] * cos[i] + old * s;
    }
}

static void read_keys_and_values(const struct attention *a, const struct scratch *s, int64_t b,
                                 int64_t head)
{
    for (int64_t t = 0; t < a->T; t++) {
        float *k = s->k + t * s->d, *v = s->v + t * s->d;
        read_row(k, a->qkv, qkv_at(a, b, t, a->H + head), a->D, a->half);
        read_row(v, a->qkv, qkv_at(a, b, t, a->H + a->K + head), a->D, a->half);
        rotate(a, k, b, t, 1);
        for (int64_t i = 0; i < a->D; i++) {
            s->k_t[i * s->t + t] = k[i];
            s->v_t[i * s->t + t] = v[i];
        }
    }
}

static void write_key_and_value_gradients(const struct attention *a, const struct scratch *s,
                                          int64_t b, int64_t head)
{
    for (int64_t t = 0; t < a->T; t++) {
        float *dk = s->dk + t * s->d, *dv = s->dv + t * s->d;
        rotate(a, dk, b, t, -1);
        write_row(a->d_qkv, qkv_at(a, b, t, a->H + head), dk, a->D, a->half);
        write_row(a->d_qkv, qkv_at(a, b, t, a->H + a->K + head), dv, a->D, a->half);
    }
}

/* Set s->q to the tile's rotated and scaled queries, and s->p to their attention weights. */
static void weigh_keys(const struct attention *a, const struct scratch *s, struct tile tile)
{
    memset(s->q, 0, TILE * s->d * sizeof(float));
    memset(s->p, 0, TILE * s->t * sizeof(float));
    for (int64_t t = tile.start; t < tile.end; t++) {
        float *q = s->q + (t - tile.start) * s->d;
        read_row(q, a->qkv, qkv_at(a, tile.b, t, tile.head), a->D, a->half);
        rotate(a, q, tile.b, t, 1);
        scale(q, a->D, 1 / sqrtf(a->D));
    }
    multiply(s->p, s->t, s->q, s->d, 1, s->k_t + tile.from, s->t, TILE, a->D, tile.to - tile.from);
    for (int64_t t = tile.start; t < tile.end; t++) {
        float *row = s->p + (t - tile.start) * s->t;
        int64_t first = start_of(a, tile.b, t) - tile.from, end = t + 1 - tile.from;
        memset(row, 0, first * sizeof(float));
        memset(row + end, 0, (tile.to - tile.from - end) * sizeof(float));
        float sum = exponentials(row + first, end - first, largest(row + first, end - first));
        scale(row + first, end - first, 1 / sum);
    }
}

static void attend(const struct attention *a, const struct scratch *s, struct tile tile)
{
    weigh_keys(a, s, tile);
    memset(s->y, 0, TILE * s->d * sizeof(float));
    multiply(s->y, s->d, s->p, s->t, 1, s->v + tile.from * s->d, s->d, TILE, tile.to - tile.from,
             s->d);
    for (int64_t t = tile.start; t < tile.end; t++)
        write_row(a->y, y_at(a, tile, t), s->y + (t - tile.start) * s->d, a->D, a->half);
}

/* Write the gradients of a tile's queries; add those of its keys and values to s->dk and s->dv. */
static void attend_backward(const struct attention *a, const struct scratch *s, struct tile tile)
{
    int64_t keys = tile.to - tile.from, at = tile.from * s->d;
    weigh_keys(a, s, tile);
    memset(s->y, 0, TILE * s->d * sizeof(float));
    memset(s->dq, 0, TILE * s->d * sizeof(float));
    memset(s->ds, 0, TILE * s->t * sizeof(float));
    for (int64_t t = tile.start; t < tile.end; t++)
        read_row(s->y + (t - tile.start) * s->d, a->dy, y_at(a, tile, t), a->D, a->half);
    multiply(s->ds, s->t, s->y, s->d, 1, s->v_t + tile.from, s->t, TILE, a->D, keys);
    for (int64_t row = 0; row < TILE; row++) {
        float *p = s->p + row * s->t, *ds = s->ds + row * s->t, mean = dot(p, ds, keys);
        for (int64_t i = 0; i < keys; i++)
            ds[i] = p[i] * (ds[i] - mean);
    }
    multiply(s->dv + at, s->d, s->p, 1, s->t, s->y, s->d, keys, TILE, s->d);
    multiply(s->dk + at, s->d, s->ds, 1, s->t, s->q, s->d, keys, TILE, s->d);
    multiply(s->dq, s->d, s->ds, s->t, 1, s->k + at, s->d, TILE, keys, s->d);
    for (int64_t t = tile.start; t < tile.end; t++) {
        float *dq = s->dq + (t - tile.start) * s->d;
        rotate(a, dq, tile.b, t, -1);
        scale(dq, a->D, 1 / sqrtf(a->D));
        write_row(a->d_qkv, qkv_at(a, tile.b, t, tile.head), dq, a->D, a->half);
    }
}

/* Compute y, or, backward, d_qkv: causal attention within documents. A task is a key/value head. */
void attention(const struct attention *a, int backward, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        struct scratch s = allocate(a);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < a->B * a->K; task++) {
            int64_t b = task / a->K, head = task % a->K, group = a->H / a->K;
            read_keys_and_values(a, &s, b, head);
            memset(s.dk, 0, s.t * s.d * sizeof(float));
            memset(s.dv, 0, s.t * s.d * sizeof(float));
            for (int64_t h = head * group; h < (head + 1) * group; h++)
                for (int64_t t = 0; t < a->T; t += TILE) {
                    int64_t end = t + TILE < a->T ? t + TILE : a->T;
                    struct tile tile = {b, h, t, end, start_of(a, b, t) / PAD * PAD, round_up(end)};
                    (backward ? attend_backward : attend)(a, &s, tile);
                }
            if (backward)
                write_key_and_value_gradients(a, &s, b, head);
        }
        free(s.k);
    }
}
