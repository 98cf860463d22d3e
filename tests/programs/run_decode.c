/* Decode the tokens of a file with decode.c: all rows together, then each row alone.

   The file is a head of 64-bit integers (see main), the structures of native_library.py with offsets
   into the file in place of pointers, and the tensors. The logits are written to the output. */

#include "../../pocketlm/inference/decode.c"
#include <stdio.h>

static char *base;

static void relocate(const void *pointer_at) {
    char **at = (char **)pointer_at;
    if (*at) *at = base + (intptr_t)*at;
}

static void relocate_linear(Linear *l) {
    relocate(&l->weight);
    relocate(&l->scale);
    relocate(&l->bias);
}

static void relocate_norm(Norm *n) {
    relocate(&n->weight);
    relocate(&n->bias);
}

static void decode(const Model *m, const int64_t *tokens, int64_t steps, int64_t B, int64_t first,
                   int64_t n) {
    int64_t slots[64], positions[64];
    int64_t size = m->n_layers * n * m->n_kv_heads * steps * m->head_dim * 4;
    void *keys = calloc(1, size), *values = calloc(1, size);
    float *logits = malloc(n * m->head.out * 4);
    for (int64_t t = 0; t < steps; t++) {
        for (int64_t b = 0; b < n; b++) {
            slots[b] = b;
            positions[b] = t;
        }
        step(m, n, tokens + t * B + first, slots, positions, keys, values, n, steps, logits);
        fwrite(logits, 4, n * m->head.out, stdout);
    }
    free(keys);
    free(values);
    free(logits);
}

int main(int argc, char **argv) {
    FILE *file = fopen(argv[argc - 1], "rb");
    fseek(file, 0, SEEK_END);
    int64_t size = ftell(file);
    rewind(file);
    base = aligned(size);
    if (fread(base, 1, size, file) != (size_t)size) return 1;
    fclose(file);
    const int64_t *head = (const int64_t *)base; /* offset of the model, B, steps, the tokens */
    Model *m = (Model *)(base + head[0]);
    Linear *linears[] = {&m->embed, &m->embed_positions, &m->head};
    for (int i = 0; i < 3; i++) relocate_linear(linears[i]);
    relocate_norm(&m->embed_norm);
    relocate_norm(&m->norm);
    relocate(&m->cos);
    relocate(&m->sin);
    relocate(&m->layers);
    for (int64_t i = 0; i < m->n_layers; i++) {
        Layer *l = (Layer *)&m->layers[i];
        Linear *of_layer[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (int k = 0; k < 7; k++) relocate_linear(of_layer[k]);
        Norm *norms[] = {&l->norm1, &l->q_norm, &l->k_norm, &l->norm2};
        for (int k = 0; k < 4; k++) relocate_norm(norms[k]);
    }
    decode(m, head + 3, head[2], head[1], 0, head[1]);
    for (int64_t b = 0; b < head[1]; b++) decode(m, head + 3, head[2], head[1], b, 1);
    return 0;
}
