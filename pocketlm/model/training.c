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

/* Return 32 bits that look random and depend on x (Wellons 2018, lowbias32). */
INLINE uint32_t hash(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

/* Dropout: each element is dropped with the same probability, the others are divided by that of
   being kept. Which ones depends on the seed, the row and the column only, so that the
   backward pass drops the same. */
struct dropout {
    uint32_t seed, kept_from; /* an element is kept if its hash is at least `kept_from` */
    float factor;             /* of those kept: 1 without dropout */
};

INLINE uint32_t row_seed(const struct dropout *d, int64_t row)
{
    return hash(d->seed + hash(row));
}

/* Return the factor of column i of a row: 0, or that of those kept. */
INLINE float kept(const struct dropout *d, uint32_t seed, uint32_t i)
{
    return hash(seed + i) >= d->kept_from ? d->factor : 0;
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

/* ---- dropout, norm and activation ---- */

/* Drop elements of x (N, C). */
void drop(int64_t N, int64_t C, int half, void *x, const struct dropout *d, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        float *row = malloc(C * sizeof(float));
#pragma omp for
        for (int64_t n = 0; n < N; n++) {
            uint32_t seed = row_seed(d, n);
            read_row(row, x, n * C, C, half);
#pragma omp simd
            for (int64_t i = 0; i < C; i++)
                row[i] *= kept(d, seed, i);
            write_row(x, n * C, row, C, half);
        }
        free(row);
    }
}

/* normed = x / rms(x) * weight; return 1 / rms(x). */
static float norm_row(float *normed, const float *x, const float *weight, int64_t n, float eps)
{
    float inverse_rms = 1 / sqrtf(dot(x, x, n) / n + eps);
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        normed[i] = x[i] * inverse_rms * weight[i];
    return inverse_rms;
}

/* Replace dy, the gradient by `normed`, by that by x; add that by the weight to d_weight. */
static void norm_row_backward(float *restrict dy, const float *restrict x,
                              const float *restrict weight, float inverse_rms,
                              float *restrict d_weight, int64_t n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        d_weight[i] += dy[i] * x[i] * inverse_rms;
        dy[i] *= weight[i];
        sum += dy[i] * x[i];
    }
    float along = sum * inverse_rms * inverse_rms / n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        dy[i] = inverse_rms * (dy[i] - x[i] * along);
}

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
            inverse_rms[n] = norm_row(row, at, weight, C, eps);
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
            float *dw = d_weight + part * C;
            memset(dw, 0, C * sizeof(float));
            for (int64_t n = part * NORM_ROWS; n < N && n < (part + 1) * NORM_ROWS; n++) {
                read_row(dy, d_normed, n * C, C, half);
                norm_row_backward(dy, x + n * C, weight, inverse_rms[n], dw, C);
#pragma omp simd
                for (int64_t i = 0; i < C; i++)
                    dx[n * C + i] = d_sum[n * C + i] + dy[i];
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

/* A matrix whose neighbours in a column are `row` apart, and in a row `col`. */
struct matrix {
    float *at;
    int64_t row, col;
};

INLINE void block(int vecs, int add, float *c, int64_t c_row, struct matrix a, const float *b,
                  int64_t b_row, int64_t inner)
{
    vec sum[BLOCK][2];
    for (int r = 0; r < BLOCK; r++)
        for (int j = 0; j < vecs; j++)
            sum[r][j] = add ? *(vec *)(c + r * c_row + j * WIDTH) : (vec){0};
    for (int64_t k = 0; k < inner; k++)
        for (int r = 0; r < BLOCK; r++)
            for (int j = 0; j < vecs; j++)
                sum[r][j] += a.at[r * a.row + k * a.col] * *(vec *)(b + k * b_row + j * WIDTH);
    for (int r = 0; r < BLOCK; r++)
        for (int j = 0; j < vecs; j++)
            *(vec *)(c + r * c_row + j * WIDTH) = sum[r][j];
}

/* c (rows, cols) = a (rows, inner) b (inner, cols), or += if `add`. In b and c, columns are 1 apart. */
INLINE void multiply(int add, float *c, int64_t c_row, struct matrix a, const float *b,
                     int64_t b_row, int64_t rows, int64_t inner, int64_t cols)
{
    for (int64_t i = 0; i < rows; i += BLOCK, a.at += BLOCK * a.row) {
        int64_t j = 0;
        for (; j + 2 * WIDTH <= cols; j += 2 * WIDTH)
            block(2, add, c + i * c_row + j, c_row, a, b + j, b_row, inner);
        for (; j < cols; j += WIDTH)
            block(1, add, c + i * c_row + j, c_row, a, b + j, b_row, inner);
    }
}

/* ---- attention with RoPE, QK-norm and value residual ---- */

/* The arguments of both passes. A token's row of qkv has its H queries, K keys and K values.

Without QK-norm, q_norm and k_norm are NULL; without a value residual, value_mix is. */
struct attention {
    int64_t B, T, H, K, D, half;
    const void *qkv;              /* (B, T, H + 2 K, D) */
    const float *cos, *sin;       /* (positions, D) */
    const int64_t *starts;        /* (B, T): index of the first token of each token's document */
    const float *q_norm, *k_norm; /* (D): weights of the norms of each query and key */
    double eps;                   /* of these norms */
    const float *value_mix;       /* (2): factors of a token's own values and of first_values */
    const void *first_values;     /* (B, T, K, D) */
    struct dropout dropout;       /* of the attention weights */
    float *log_sums;              /* (B, H, T): log of the sum of e^score, kept for backward */
    void *y;                      /* (B, T, H, D) */
    const void *dy;               /* as y */
    void *d_qkv;                  /* as qkv */
    float *d_norms;               /* (B, K, 2, D): by q_norm and k_norm, a sum for each task */
    float *d_value_mix;           /* (B, K, 2) */
    void *d_first_values;         /* as first_values */
};

/* The float32 copies that a thread needs for a key/value head; sizes are padded with zeros. */
struct scratch {
    int64_t d;                     /* padded D */
    float *k, *v, *dk, *dv;        /* (T, d) */
    float *q, *dq, *y, *q_t, *y_t; /* of a tile: (TILE, d) and transposed (d, TILE) */
    float *p, *ds;                 /* of a tile: (T, TILE), a column for each query */
    float *raw;                    /* (d) */
};

/* A tile: the query rows [start, end) of a head, and the keys [from, to) that any of them sees.

The i-th query sees keys [first[i], last[i]]; those after `end` see none. */
struct tile {
    int64_t b, head, start, end, from, to;
    int32_t first[TILE], last[TILE];
    uint32_t seed[TILE]; /* of dropout */
};

/* Return 1 if the i-th query sees a key, else 0: a factor, since branches are not vectorised. */
INLINE float sees(const struct tile *tile, int64_t i, int32_t key)
{
    return (tile->first[i] <= key) & (key <= tile->last[i]);
}

static int64_t round_up(int64_t n)
{
    return (n + PAD - 1) / PAD * PAD;
}

static struct scratch allocate(const struct attention *a)
{
    struct scratch s = {.d = round_up(a->D)};
    int64_t t = round_up(a->T), rows = t * s.d, tile = TILE * s.d;
    float *at = calloc(4 * rows + 5 * tile + 2 * TILE * t + s.d, sizeof(float));
    float **of_rows[] = {&s.k, &s.v, &s.dk, &s.dv};
    float **of_tile[] = {&s.q, &s.dq, &s.y, &s.q_t, &s.y_t};
    for (int i = 0; i < 4; i++, at += rows)
        *of_rows[i] = at;
    for (int i = 0; i < 5; i++, at += tile)
        *of_tile[i] = at;
    s.p = at, s.ds = at + TILE * t, s.raw = s.ds + TILE * t;
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

static int64_t first_value_at(const struct attention *a, int64_t b, int64_t t, int64_t head)
{
    return ((b * a->T + t) * a->K + head) * a->D;
}

static int64_t y_at(const struct attention *a, const struct tile *tile, int64_t t)
{
    return ((tile->b * a->T + t) * a->H + tile->head) * a->D;
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

/* Read a query or key (D), and norm and rotate it. */
static void read_head(const struct attention *a, float *x, const float *norm, int64_t b, int64_t t,
                      int64_t head)
{
    read_row(x, a->qkv, qkv_at(a, b, t, head), a->D, a->half);
    if (norm)
        norm_row(x, x, norm, a->D, a->eps);
    rotate(a, x, b, t, 1);
}

/* Write the gradient by a query or key from that by what `read_head` made of it; raw: scratch. */
static void write_head_gradient(const struct attention *a, float *d, float *raw, const float *norm,
                                float *d_norm, int64_t b, int64_t t, int64_t head)
{
    rotate(a, d, b, t, -1);
    if (norm) {
        read_row(raw, a->qkv, qkv_at(a, b, t, head), a->D, a->half);
        float inverse_rms = 1 / sqrtf(dot(raw, raw, a->D) / a->D + (float)a->eps);
        norm_row_backward(d, raw, norm, inverse_rms, d_norm, a->D);
    }
    write_row(a->d_qkv, qkv_at(a, b, t, head), d, a->D, a->half);
}

static void read_keys_and_values(const struct attention *a, const struct scratch *s, int64_t b,
                                 int64_t head)
{
    for (int64_t t = 0; t < a->T; t++) {
        float *k = s->k + t * s->d, *v = s->v + t * s->d;
        read_head(a, k, a->k_norm, b, t, a->H + head);
        read_row(v, a->qkv, qkv_at(a, b, t, a->H + a->K + head), a->D, a->half);
        if (a->value_mix) {
            read_row(s->raw, a->first_values, first_value_at(a, b, t, head), a->D, a->half);
            for (int64_t i = 0; i < a->D; i++)
                v[i] = a->value_mix[0] * v[i] + a->value_mix[1] * s->raw[i];
        }
    }
}

static void write_key_and_value_gradients(const struct attention *a, const struct scratch *s,
                                          int64_t b, int64_t head)
{
    float *d_norm = a->d_norms + ((b * a->K + head) * 2 + 1) * a->D;
    float *d_mix = a->d_value_mix + (b * a->K + head) * 2;
    for (int64_t t = 0; t < a->T; t++) {
        float *dk = s->dk + t * s->d, *dv = s->dv + t * s->d;
        int64_t value = qkv_at(a, b, t, a->H + a->K + head), first = first_value_at(a, b, t, head);
        write_head_gradient(a, dk, s->raw, a->k_norm, d_norm, b, t, a->H + head);
        if (a->value_mix) {
            read_row(s->raw, a->qkv, value, a->D, a->half);
            d_mix[0] += dot(dv, s->raw, a->D);
            read_row(s->raw, a->first_values, first, a->D, a->half);
            d_mix[1] += dot(dv, s->raw, a->D);
            memcpy(s->raw, dv, a->D * sizeof(float));
            scale(s->raw, a->D, a->value_mix[1]);
            write_row(a->d_first_values, first, s->raw, a->D, a->half);
            scale(dv, a->D, a->value_mix[0]);
        }
        write_row(a->d_qkv, value, dv, a->D, a->half);
    }
}

static struct tile tile_at(const struct attention *a, int64_t b, int64_t head, int64_t start)
{
    int64_t end = start + TILE < a->T ? start + TILE : a->T;
    struct tile tile = {.b = b, .head = head, .start = start, .end = end};
    tile.from = start_of(a, b, start) / PAD * PAD, tile.to = round_up(end);
    for (int64_t i = 0; i < TILE; i++) {
        int within = start + i < end;
        tile.first[i] = within ? start_of(a, b, start + i) : 0;
        tile.last[i] = within ? start + i : -1;
        tile.seed[i] = row_seed(&a->dropout, (b * a->H + head) * a->T + start + i);
    }
    return tile;
}

/* Set x_t (d, TILE) to the transpose of x (TILE, d). */
static void transpose(const float *x, float *x_t, int64_t d)
{
    for (int64_t i = 0; i < d; i++)
        for (int64_t r = 0; r < TILE; r++)
            x_t[i * TILE + r] = x[r * d + i];
}

/* Set s->q to the tile's rotated and scaled queries, and s->p to their products with the keys. */
static void score_keys(const struct attention *a, const struct scratch *s, const struct tile *tile)
{
    for (int64_t t = tile->start; t < tile->end; t++) {
        float *q = s->q + (t - tile->start) * s->d;
        read_head(a, q, a->q_norm, tile->b, t, tile->head);
        scale(q, a->D, 1 / sqrtf(a->D));
    }
    transpose(s->q, s->q_t, s->d);
    struct matrix k = {s->k + tile->from * s->d, s->d, 1};
    multiply(0, s->p, TILE, k, s->q_t, TILE, tile->to - tile->from, a->D, TILE);
}

static void attend(const struct attention *a, const struct scratch *s, const struct tile *tile)
{
    float top[TILE], sum[TILE] = {0};
    score_keys(a, s, tile);
    for (int64_t i = 0; i < TILE; i++)
        top[i] = -INFINITY;
    for (int32_t key = tile->from; key < tile->to; key++) {
        const float *p = s->p + (key - tile->from) * TILE;
#pragma omp simd
        for (int64_t i = 0; i < TILE; i++) {
            float x = sees(tile, i, key) ? p[i] : -INFINITY;
            top[i] = larger(x, top[i]);
        }
    }
    for (int32_t key = tile->from; key < tile->to; key++) {
        float *p = s->p + (key - tile->from) * TILE;
#pragma omp simd
        for (int64_t i = 0; i < TILE; i++) {
            p[i] = exponential(p[i] - top[i]) * sees(tile, i, key);
            sum[i] += p[i];
        }
        if (a->dropout.kept_from)
#pragma omp simd
            for (int64_t i = 0; i < TILE; i++)
                p[i] *= kept(&a->dropout, tile->seed[i], key);
    }
    struct matrix p_t = {s->p, 1, TILE};
    multiply(0, s->y, s->d, p_t, s->v + tile->from * s->d, s->d, TILE, tile->to - tile->from, s->d);
    float *log_sums = a->log_sums + (tile->b * a->H + tile->head) * a->T;
    for (int64_t t = tile->start, i = 0; t < tile->end; t++, i++) {
        log_sums[t] = top[i] + logf(sum[i]);
        scale(s->y + i * s->d, a->D, 1 / sum[i]);
        write_row(a->y, y_at(a, tile, t), s->y + i * s->d, a->D, a->half);
    }
}

/* Write the gradients of a tile's queries; add those of its keys and values to s->dk and s->dv. */
static void attend_backward(const struct attention *a, const struct scratch *s,
                            const struct tile *tile)
{
    int64_t keys = tile->to - tile->from, at = tile->from * s->d;
    float log_sums[TILE] = {0}, mean[TILE] = {0};
    int dropout = a->dropout.kept_from > 0;
    const float *forward = a->log_sums + (tile->b * a->H + tile->head) * a->T;
    score_keys(a, s, tile);
    for (int64_t t = tile->start, i = 0; t < tile->end; t++, i++) {
        log_sums[i] = forward[t];
        read_row(s->y + i * s->d, a->dy, y_at(a, tile, t), a->D, a->half);
    }
    transpose(s->y, s->y_t, s->d);
    multiply(0, s->ds, TILE, (struct matrix){s->v + at, s->d, 1}, s->y_t, TILE, keys, a->D, TILE);
    for (int32_t key = tile->from; key < tile->to; key++) {
        float *p = s->p + (key - tile->from) * TILE, *ds = s->ds + (key - tile->from) * TILE;
#pragma omp simd
        for (int64_t i = 0; i < TILE; i++) {
            p[i] = exponential(p[i] - log_sums[i]) * sees(tile, i, key);
            if (dropout)
                ds[i] *= kept(&a->dropout, tile->seed[i], key);
            mean[i] += p[i] * ds[i];
        }
    }
    for (int32_t key = tile->from; key < tile->to; key++) {
        float *p = s->p + (key - tile->from) * TILE, *ds = s->ds + (key - tile->from) * TILE;
#pragma omp simd
        for (int64_t i = 0; i < TILE; i++) {
            ds[i] = p[i] * (ds[i] - mean[i]);
            if (dropout)
                p[i] *= kept(&a->dropout, tile->seed[i], key);
        }
    }
    multiply(1, s->dv + at, s->d, (struct matrix){s->p, TILE, 1}, s->y, s->d, keys, TILE, s->d);
    multiply(1, s->dk + at, s->d, (struct matrix){s->ds, TILE, 1}, s->q, s->d, keys, TILE, s->d);
    multiply(0, s->dq, s->d, (struct matrix){s->ds, 1, TILE}, s->k + at, s->d, TILE, keys, s->d);
    int64_t task = tile->b * a->K + tile->head / (a->H / a->K);
    for (int64_t t = tile->start; t < tile->end; t++) {
        float *dq = s->dq + (t - tile->start) * s->d;
        scale(dq, a->D, 1 / sqrtf(a->D));
        write_head_gradient(a, dq, s->raw, a->q_norm, a->d_norms + task * 2 * a->D, tile->b, t,
                            tile->head);
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
            memset(s.dk, 0, a->T * s.d * sizeof(float));
            memset(s.dv, 0, a->T * s.d * sizeof(float));
            for (int64_t h = head * group; h < (head + 1) * group; h++)
                for (int64_t t = 0; t < a->T; t += TILE) {
                    struct tile tile = tile_at(a, b, h, t);
                    (backward ? attend_backward : attend)(a, &s, &tile);
                }
            if (backward)
                write_key_and_value_gradients(a, &s, b, head);
        }
        free(s.k);
    }
}
