// tests/test_cuda.cu: kernels.cu against the C twin, the small stages one by one and then whole
// steps. Where the order of a sum differs, a bf16 result may be the next one; then what was made of
// it is compared for the values that are equal, and those must be nearly all.
#include "test_cuda.h"

#include <unistd.h>

static Vector vector_noise(int dim, DType dtype, double middle, double spread) {
    uint8_t *data = (uint8_t *)xmalloc((size_t)dim * 4 + 1) + 1;  // at an odd address
    for (int i = 0; i < dim; i++) {
        float f = middle + spread * noise();
        bf16 rounded = round_half(f);
        if (dtype == DTYPE_BF16)
            memcpy(data + 2 * i, &rounded, 2);
        else
            memcpy(data + 4 * i, &f, 4);
    }
    return (Vector){dim, dtype, data};
}

// How far apart two bf16 are, in steps; huge where one is NaN and the other not.
static int bf16_steps(bf16 a, bf16 b) {
    if (isnan(bf16_value(a)) || isnan(bf16_value(b)))
        return isnan(bf16_value(a)) && isnan(bf16_value(b)) ? 0 : 1 << 20;
    int x = a & 0x8000 ? -(a & 0x7fff) : a, y = b & 0x8000 ? -(b & 0x7fff) : b;
    return abs(x - y);
}

// An Act of n rows against the C twin's: values at most a bf16 step apart and in 99.8 % of cases
// equal; in groups of equal values scale and e4m3 are equal. Tokens behind n stay poisoned.
static void check_act(const char *name, const Act *a, const Act *want, int n) {
    const RefAct *r = (const RefAct *)want;
    size_t size = (size_t)a->stride * a->cols, values = (size_t)n * a->cols, equal_groups = 0;
    bf16 *x = (bf16 *)fetch(a->x, size * 2);
    uint8_t *q = (uint8_t *)fetch(a->q, size);
    float *scale = (float *)fetch(a->scale, size / BLOCK * 4);
    size_t far = 0, unequal = 0, wrong = 0, touched = 0;
    for (int row = 0; row < n; row++)
        for (int g = 0; g < a->cols / BLOCK; g++) {
            bool same = true;
            for (int i = 0; i < BLOCK; i++) {
                size_t at = (size_t)row * a->cols + g * BLOCK + i;
                int steps = bf16_steps(x[at], round_half(r->x[at]));
                far += steps > 1, unequal += steps > 0;
                same &= steps == 0;
            }
            equal_groups += same;
            size_t line = (size_t)g * a->stride + row;
            float ref_scale = r->scale[(size_t)row * (a->cols / BLOCK) + g];
            wrong += same && memcmp(&scale[line], &ref_scale, 4) != 0;
            for (int i = 0; same && i < BLOCK; i++) {
                float got = e4m3_value(q[line * ROW_BYTES + ((i / 16 ^ row % 8) << 4) + i % 16]);
                float ref = r->q[(size_t)row * a->cols + g * BLOCK + i];
                wrong += !(got == ref || (isnan(got) && isnan(ref)));
            }
        }
    for (int g = 0; g < a->cols / BLOCK; g++)
        touched += !poisoned(q + ((size_t)g * a->stride + n) * ROW_BYTES,
                             (size_t)(a->stride - n) * ROW_BYTES);
    touched += !poisoned(x + values, (size - values) * 2);
    CHECK(far == 0 && unequal * 500 <= values,
          "%s, %d rows: %zu of %zu differ, %zu by more than a "
          "step",
          name, n, unequal, values, far);
    CHECK(wrong == 0 && equal_groups * 10 >= values / BLOCK * 5,
          "%s, %d rows: %zu wrong in %zu of "
          "%zu groups",
          name, n, wrong, equal_groups, values / BLOCK);
    CHECK(touched == 0, "%s, %d rows: %zu groups written behind them", name, n, touched);
    free(x), free(q), free(scale);
}

// ---- Placing ------------------------------------------------------------------------------------

static uint8_t *bytes_noise(size_t n) {  // at an odd address
    uint8_t *p = (uint8_t *)xmalloc(n + 1) + 1;
    for (size_t i = 0; i < n; i += 8) {
        uint64_t v = noise() * 0x1p62;
        memcpy(p + i, &v, n - i < 8 ? n - i : 8);
    }
    return p;
}

// Where a byte of a row stands in a placed matrix.
static size_t strip_at(int row, int byte, int row_bytes) {
    return (size_t)(row / 16) * 16 * row_bytes + byte / 128 * 2048 + row % 16 * 128 +
           ((byte % 128 / 16 ^ row % 8) << 4) + byte % 16;
}

static void test_place_matrix(int out, int in, DType dtype) {
    int size = dtype == DTYPE_F8_E4M3 ? 1
               : dtype == DTYPE_BF16  ? 2
                                      : 4,
        row_bytes = in * (size > 1 ? 2 : 1);
    int blocks = units(out, BLOCK) * (in / BLOCK);
    Linear w = {out, in, dtype, bytes_noise((size_t)out * in * size), bytes_noise(blocks * 4)},
           p = w;
    size_t told = place_linear(&p, PLACE_MATRIX), wrong = 0;
    uint8_t *got = (uint8_t *)fetch(p.data, matrix_bytes(&p));
    for (int row = 0; row < out; row++)
        for (int b = 0; b < row_bytes; b++) {
            uint8_t want = w.data[(size_t)row * row_bytes + b];
            if (size == 4) {
                float value;
                memcpy(&value, w.data + 4 * ((size_t)row * in + b / 2), 4);
                bf16 rounded = round_half(value);
                want = rounded >> 8 * (b % 2);
            }
            wrong += got[strip_at(row, b, row_bytes)] != want;
        }
    CHECK(wrong == 0, "placing %d x %d, dtype %d: %zu bytes", out, in, dtype, wrong);
    CHECK(told == (size_t)out * in * size + (size == 1 ? blocks * 4 : 0), "%zu bytes", told);
    if (size == 1) {
        uint8_t *scale = (uint8_t *)fetch(p.scale, blocks * 4);
        CHECK(memcmp(scale, w.scale, blocks * 4) == 0, "scales");
        free(scale);
    }
    free(got);
    place_free();
}

static void test_place_mlp(void) {
    enum { N = 3, WIDTH = 256, HIDDEN = 384 };
    Mlp m[N + 1], p[N + 1];
    for (int e = 0; e <= N; e++)
        for (int i = 0; i < 3; i++) {
            int out = i < 2 ? WIDTH : HIDDEN, in = i < 2 ? HIDDEN : WIDTH;
            (&m[e].gate_proj)[i] = (Linear){out, in, DTYPE_F8_E4M3, bytes_noise(out * in),
                                            bytes_noise(out / BLOCK * (in / BLOCK) * 4)};
        }
    memcpy(p, m, sizeof p);
    place_mlp(p, N, &p[N]);
    size_t wrong = 0;
    for (int e = 0; e <= N; e++) {
        const uint8_t *up = p[0].up_proj.data + (size_t)e * 2 * WIDTH * HIDDEN;
        wrong += p[e].gate_proj.data != up || p[e].up_proj.data != up;
        wrong += p[e].down_proj.data != p[0].down_proj.data + (size_t)e * WIDTH * HIDDEN;
        uint8_t *got = (uint8_t *)fetch(up, 2 * WIDTH * HIDDEN);
        for (int i = 0; i < 2; i++)
            for (int row = 0; row < WIDTH; row++)
                for (int b = 0; b < HIDDEN; b++)
                    wrong += got[strip_at(row / 8 * 16 + row % 8 + 8 * i, b, HIDDEN)] !=
                             (&m[e].gate_proj)[i].data[row * HIDDEN + b];
        free(got);
        got = (uint8_t *)fetch(p[e].down_proj.data, WIDTH * HIDDEN);
        for (int row = 0; row < HIDDEN; row++)
            for (int b = 0; b < WIDTH; b++)
                wrong += got[strip_at(row, b, WIDTH)] != m[e].down_proj.data[row * WIDTH + b];
        free(got);
        for (int i = 0; i < 3; i++) {
            uint8_t *scale =
                (uint8_t *)fetch((&p[e].gate_proj)[i].scale, WIDTH / BLOCK * (HIDDEN / BLOCK) * 4);
            wrong += memcmp(scale, (&m[e].gate_proj)[i].scale,
                            WIDTH / BLOCK * (HIDDEN / BLOCK) * 4) != 0;
            free(scale);
        }
    }
    CHECK(wrong == 0, "experts: %zu", wrong);
    place_free();
}

static void test_place(void) {
    test_place_matrix(576, 7168, DTYPE_F8_E4M3);
    test_place_matrix(6000, 7168, DTYPE_F8_E4M3);  // more than one buffer
    test_place_matrix(256, 7168, DTYPE_BF16);
    test_place_matrix(130, 256, DTYPE_F32);
    test_place_mlp();
}

// ---- A step's arrays, and its recording ---------------------------------------------------------

static int get_int(const int *device) {
    int *p = (int *)fetch(device, sizeof *p), v = *p;
    free(p);
    return v;
}

// Three rows in two sequences: each row's page must be found by the formula that kernels use.
static void test_batch(void) {
    enum { WIDE = 5 };
    int id[] = {7, 8, 9}, position[] = {130, 0, 64}, seq[] = {2, 1, 1}, out[] = {0, 2};
    int pages[3 * WIDE];
    for (int i = 0; i < 3 * WIDE; i++) pages[i] = 100 + i;
    Batch b = {3, id, position, seq, pages, WIDE, out, 2}, p;
    CHECK(step_begin(&p, &b), "steps with few logits are not recorded");
    for (int i = 0; i < 3; i++) {
        int page = get_int(p.pages + (size_t)get_int(p.seq + i) * p.max_pages + position[i] / PAGE);
        CHECK(page == pages[seq[i] * WIDE + position[i] / PAGE], "row %d: page %d", i, page);
        CHECK(get_int(p.id + i) == id[i] && get_int(p.position + i) == position[i], "row %d", i);
    }
    CHECK(p.n == 3 && p.n_out == 2 && get_int(p.out + 1) == 2, "wanted rows");
    step_end();
}

// A recorded step must see each time what lies in the batch then, and follow a moved buffer.
static void test_recording(void) {
    enum { N = 5, WIDE = 3000 };
    float frequency[ROPE_DIM / 2], *rope = (float *)room(NULL, N * ROPE_DIM * 4);
    static float want[N * ROPE_DIM];
    static int pages[N * WIDE];
    int id[N] = {0}, position[N], seq[N] = {0, 1, 2, 3, 4}, out[N] = {0}, recorded = 0;
    for (int i = 0; i < ROPE_DIM / 2; i++) frequency[i] = powf(10000, -i / 32.f);
    for (int round = 0; round < 6; round++) {
        for (int i = 0; i < N; i++) position[i] = 100 * round + i + (round > 3 ? 150000 : 0);
        Batch b = {N, id, position, seq, pages, WIDE, out, N}, p;
        bool run = step_begin(&p, &b);
        recorded += !run;
        if (run) rope_angles(rope, frequency, p.position, N);
        step_end();
        ref_rope_angles(want, frequency, position, N);
        float *got = (float *)fetch(rope, sizeof want);
        float worst = 0;
        for (int i = 0; i < N * ROPE_DIM; i++) worst = fmaxf(worst, fabsf(got[i] - want[i]));
        CHECK(worst <= 1e-6f, "round %d: %g", round, worst);
        free(got);
    }
    CHECK(recorded == 4, "%d of 6 rounds came from a recording", recorded);
    CHECK(rooms_close(), "guards");
    place_free();
}

// ---- The small stages ---------------------------------------------------------------------------

static void test_rope(int n) {
    float frequency[ROPE_DIM / 2], *want = (float *)xmalloc(n * ROPE_DIM * 4);
    int *position = (int *)xmalloc(n * 4);
    for (int i = 0; i < ROPE_DIM / 2; i++) frequency[i] = powf(10000, -i / 32.f);
    for (int i = 0; i < n; i++) position[i] = i < 3 ? i : (noise() + 1) * 81919;
    float *rope = (float *)room(NULL, n * ROPE_DIM * 4);
    rope_angles(rope, frequency, (int *)room(position, n * 4), n);
    ref_rope_angles(want, frequency, position, n);
    float *got = (float *)fetch(rope, n * ROPE_DIM * 4);
    int unequal = 0, far = 0;
    for (int i = 0; i < n * ROPE_DIM; i++) {
        unequal += got[i] != want[i];
        far += !(fabsf(got[i] - want[i]) <= 1.2e-7f * fmaxf(fabsf(want[i]), 1e-3f));
    }
    CHECK(far == 0 && unequal * 20 <= n * ROPE_DIM,
          "rope, %d rows: %d differ, %d by more than an "
          "ulp",
          n, unequal, far);
    CHECK(rooms_close(), "guards");
    free(position), free(want), free(got);
}

static void test_embed(int n, int hidden) {
    enum { VOCAB = 300 };
    Linear w = {VOCAB, hidden, DTYPE_BF16, (uint8_t *)bf16_noise((size_t)VOCAB * hidden, 1), NULL},
           p = w;
    bf16 *want = (bf16 *)xmalloc((size_t)n * hidden * 2);
    int *id = (int *)xmalloc(n * 4);
    for (int i = 0; i < n; i++) id[i] = (noise() + 1) / 2 * VOCAB;
    place_linear(&p, PLACE_TABLE);
    bf16 *x = (bf16 *)room(NULL, (size_t)n * hidden * 2);
    embed(x, &p, 0, (int *)room(id, n * 4), n);
    ref_embed(want, &w, 0, id, n);
    bf16 *got = (bf16 *)fetch(x, (size_t)n * hidden * 2);
    CHECK(memcmp(got, want, (size_t)n * hidden * 2) == 0, "embed, %d rows of %d", n, hidden);
    CHECK(rooms_close(), "guards");
    place_free();
    free(id), free(want), free(got), free((void *)w.data);
}

static void test_add_norm(int n, int cols, DType dtype, bool add, double size) {
    size_t bytes = (size_t)n * cols * 2;
    bf16 *x = bf16_noise((size_t)n * cols, size), *y = bf16_noise((size_t)n * cols, size);
    for (int i = 0; i < cols; i++) x[i] = 0, y[i] = i < BLOCK ? 0 : y[i];  // groups of zeros
    Vector gain = vector_noise(cols, dtype, 1, 0.5), p = gain;
    place_vector(&p);
    Act *a = act_poisoned(n, cols), *ref = ref_act_new(n, cols);
    bf16 *dx = (bf16 *)room(x, bytes), *dy = (bf16 *)room(y, bytes);
    add_norm(dx, a, add ? dy : NULL, &p, 1e-6f, n);
    ref_add_norm(x, ref, add ? y : NULL, &gain, 1e-6f, n);
    bf16 *got = (bf16 *)fetch(dx, bytes);
    CHECK(memcmp(got, x, bytes) == 0, "add_norm, %d rows of %d: the sum", n, cols);
    check_act("add_norm", a, ref, n);
    CHECK(rooms_close(), "guards");
    place_free();
    act_free(a), ref_act_free(ref);
    free(x), free(y), free(got), free((void *)(gain.data - 1));
}

// NaN stays where it is: in its own row.
static void test_add_norm_nan(void) {
    enum { N = 3, COLS = 256 };
    bf16 *x = bf16_noise(N * COLS, 1);
    x[COLS + 5] = 0x7fc0;
    Vector gain = vector_noise(COLS, DTYPE_F32, 1, 0.5), p = gain;
    place_vector(&p);
    Act *a = act_poisoned(N, COLS);
    add_norm((bf16 *)room(x, N * COLS * 2), a, NULL, &p, 1e-6f, N);
    bf16 *got = (bf16 *)fetch(a->x, N * COLS * 2);
    int broken[N] = {0};
    for (int i = 0; i < N * COLS; i++) broken[i / COLS] += isnan(bf16_value(got[i]));
    CHECK(broken[0] == 0 && broken[1] == COLS && broken[2] == 0, "%d %d %d", broken[0], broken[1],
          broken[2]);
    CHECK(rooms_close(), "guards");
    act_free(a);
    place_free();
    free(x), free(got);
}

static void test_latent(int n, int q_lora) {
    enum { PAGES = 12, WIDE = 4 };
    int position[MAX_ROWS], seq[MAX_ROWS], pages[3 * WIDE];
    size_t cache_bytes = (size_t)PAGES * PAGE_BYTES;
    for (int i = 0; i < 3 * WIDE; i++) pages[i] = (i * 5 + 3) % PAGES;  // each once
    for (int i = 0; i < n; i++) seq[i] = i * 3 / n, position[i] = i - (seq[i] * n + 2) / 3 + 60;
    bf16 *q = bf16_noise((size_t)n * q_lora, 2), *kv = bf16_noise((size_t)n * CACHE_DIM, 2);
    float *rope = (float *)xmalloc(n * ROPE_DIM * 4), frequency[ROPE_DIM / 2];
    for (int i = 0; i < ROPE_DIM / 2; i++) frequency[i] = powf(10000, -i / 32.f);
    ref_rope_angles(rope, frequency, position, n);
    Vector q_gain = vector_noise(q_lora, DTYPE_BF16, 1, 0.5), pq = q_gain;
    Vector kv_gain = vector_noise(LATENT_DIM, DTYPE_BF16, 1, 0.5), pkv = kv_gain;
    place_vector(&pq), place_vector(&pkv);
    Batch b = {n, NULL, position, seq, pages, WIDE, NULL, 0}, d = b;
    d.position = (int *)room(position, n * 4), d.seq = (int *)room(seq, n * 4);
    d.pages = (int *)room(pages, sizeof pages);
    Act *a = act_poisoned(n, q_lora), *ref = ref_act_new(n, q_lora);
    bf16 *cache = (bf16 *)room(NULL, cache_bytes), *want = (bf16 *)xmalloc(cache_bytes);
    memset(want, POISON, cache_bytes);
    mla_latent(a, cache, (bf16 *)room(q, (size_t)n * q_lora * 2),
               (bf16 *)room(kv, (size_t)n * CACHE_DIM * 2), &pq, &pkv, 1e-6f,
               (float *)room(rope, n * ROPE_DIM * 4), &d);
    ref_mla_latent(ref, want, q, kv, &q_gain, &kv_gain, 1e-6f, rope, &b);
    uint8_t *got = (uint8_t *)fetch(cache, cache_bytes);
    size_t far = 0, unequal = 0, keys = 0;
    for (int page = 0; page < PAGES; page++)
        for (int t = 0; t < PAGE; t++)
            for (int i = 0; i < CACHE_DIM; i++) {
                size_t at = (size_t)page * PAGE_BYTES + i / 64 * 8192 + t * 128 +
                            ((i % 64 / 8 ^ t % 8) << 4) + i % 8 * 2;
                bf16 v, w = want[((size_t)page * PAGE + t) * CACHE_DIM + i];
                memcpy(&v, got + at, 2);
                int steps = v == w ? 0 : w == 0xffff ? 1 << 20 : bf16_steps(v, w);
                far += steps > 1, unequal += steps > 0, keys += steps > 0 && i >= LATENT_DIM;
            }
    CHECK(far == 0 && keys == 0 && unequal * 500 <= (size_t)n * CACHE_DIM,
          "cache, %d rows: %zu differ, %zu by more than a step, %zu of keys", n, unequal, far,
          keys);
    check_act("mla_latent", a, ref, n);
    CHECK(rooms_close(), "guards");
    place_free();
    act_free(a), ref_act_free(ref);
    free(q), free(kv), free(rope), free(want), free(got);
}

// ---- Routing ------------------------------------------------------------------------------------

// The C twin gets its router logits through a gate of ones on the diagonal, and the kernel gets
// them as they are. `coarse`: few different values, so that ties are common.
static void test_route(int n, const Config *c, bool coarse) {
    int experts = c->n_routed_experts, k = c->num_experts_per_tok, pairs = n * k, parts = 1 + n % 3;
    float *product = (float *)xcalloc((size_t)parts * n * experts, 4);  // all but one part is 0
    bf16 *gate = (bf16 *)xcalloc((size_t)experts * c->hidden_size, 2);
    for (int e = 0; e < experts; e++) gate[(size_t)e * c->hidden_size + e] = 0x3f80;
    Linear w = {experts, c->hidden_size, DTYPE_BF16, (uint8_t *)gate, NULL};
    Vector bias = vector_noise(experts, DTYPE_F32, 0, coarse ? 0 : 0.1), p = bias;
    place_vector(&p);
    Act *a = ref_act_new(n, c->hidden_size);
    for (int row = 0; row < n; row++)
        for (int e = 0; e < experts; e++) {
            float v = coarse ? (float)(int)(noise() * 3) : bf16_value(round_half(noise() * 4));
            product[((size_t)(parts - 1) * n + row) * experts + e] =
                ((RefAct *)a)->x[(size_t)row * c->hidden_size + e] = v;
        }
    Routing want = ref_routing_new(n, c), r = {};
    ref_moe_route(&want, a, &w, &bias, c, n);
    r.sum = (float *)room(product, (size_t)parts * n * experts * 4);
    r.expert = (int *)room(NULL, pairs * 4), r.weight = (float *)room(NULL, pairs * 4);
    r.start = (int *)room(NULL, (experts + 1) * 4), r.pair = (int *)room(NULL, pairs * 4);
    route(&r, &p, c, n, parts);
    int *expert = (int *)fetch(r.expert, pairs * 4), *pair = (int *)fetch(r.pair, pairs * 4);
    int *start = (int *)fetch(r.start, (experts + 1) * 4), wrong = 0, far = 0;
    float *weight = (float *)fetch(r.weight, pairs * 4);
    for (int i = 0; i < pairs; i++) {
        wrong += expert[i] != want.expert[i];
        far += !(fabsf(weight[i] - want.weight[i]) <= 1e-6f);
    }
    CHECK(wrong == 0 && far == 0, "route, %d rows, %d experts, coarse %d: %d experts, %d weights",
          n, experts, coarse, wrong, far);
    CHECK(memcmp(start, want.start, (experts + 1) * 4) == 0 &&
              memcmp(pair, want.pair, pairs * 4) == 0,
          "lists, %d rows, %d experts", n, experts);
    CHECK(rooms_close(), "guards");
    place_free();
    ref_act_free(a), ref_routing_free(&want);
    free(product), free(gate), free(expert), free(weight), free(start), free(pair);
}

// ---- Choosing a token ---------------------------------------------------------------------------

typedef struct {
    int compared, near;
} SampleTally;

static Sampling neutral(void) {
    Sampling s = {};
    s.temperature = 1, s.top_p = 1, s.top_k = -1, s.repetition_penalty = 1, s.top_logprobs = -1;
    return s;
}

// Rows of random parameters, each with everything on now and then. Two logarithms that differ in
// their last bit may choose another id where two ids are that near; it must be rare.
static void test_sample_rows(int n, int vocab, int stride, SampleTally *tally) {
    enum { TOKENS = 400, BIASES = 5 };
    float *l = (float *)xmalloc((size_t)n * stride * 4),
          *copy = (float *)xmalloc((size_t)n * stride * 4);
    Sampling *s = (Sampling *)xcalloc(n, sizeof *s);
    Choice *got = (Choice *)xcalloc(n, sizeof *got), *want = (Choice *)xcalloc(n, sizeof *want);
    static int tokens[TOKENS], banned[4], bias_id[BIASES], given;
    static float bias[BIASES];
    given = 7 % vocab;
    for (int i = 0; i < TOKENS; i++) tokens[i] = (noise() + 1) / 2 * vocab;
    for (int i = 0; i < BIASES; i++) bias_id[i] = i * (vocab / BIASES), bias[i] = 3 * noise();
    for (int i = 0; i < 4; i++) banned[i] = i * 3 + vocab - 5;  // the last one is no token
    for (int row = 0; row < n; row++) {
        double coarse = row % 5 == 4 ? 1 : 0, spread = row % 3 ? 3 : 12;
        for (int i = 0; i < stride; i++) {
            float v = spread * (noise() + noise() + noise());
            l[(size_t)row * stride + i] = i >= vocab ? NAN : coarse ? rintf(v) : v;
        }
        s[row] = neutral();
        s[row].seed = row * 0x123456789abcdefull, s[row].n_tokens = row % TOKENS;
        s[row].tokens = tokens, s[row].n_prompt = row % TOKENS / 2;
        if (row % 2) s[row].temperature = 0.3 + row % 7 * 0.2;
        if (row % 11 == 0) s[row].temperature = 0;
        if (row % 3 == 1) s[row].top_p = 0.05 + row % 19 * 0.05;
        if (row % 4 == 2) s[row].top_k = 1 + row * row % 300;
        if (row % 6 == 5) s[row].min_p = 0.02 * (row % 9);
        if (row % 7 == 3) s[row].repetition_penalty = 1.3, s[row].n_tokens = TOKENS;
        if (row % 8 == 6) s[row].frequency_penalty = 0.4, s[row].presence_penalty = -0.3;
        if (row % 5 == 2) s[row].banned = banned, s[row].n_banned = 4;
        if (row % 5 == 3) s[row].bias_id = bias_id, s[row].bias = bias, s[row].n_bias = BIASES;
        if (row % 4 == 1) s[row].top_logprobs = row % 21;
        if (row % 13 == 9) s[row].given = &given, s[row].top_logprobs = 3;
    }
    memcpy(copy, l, (size_t)n * stride * 4);
    float *d = (float *)room(l, (size_t)n * stride * 4);
    sample(got, d, s, vocab, stride, n);
    ref_sample(want, copy, s, vocab, stride, n);
    for (int row = 0; row < n; row++) {
        const Choice *a = &got[row], *b = &want[row];
        tally->compared++;
        if (a->id != b->id) {
            bool drawn = s[row].temperature > 0 && s[row].top_k != 1 && !s[row].given;
            tally->near++;
            CHECK(drawn && a->id >= 0 && b->id >= 0, "row %d: got %d, want %d", row, a->id, b->id);
            continue;
        }
        CHECK(fabsf(a->logprob - b->logprob) <= 2e-6f * fmaxf(1, fabsf(b->logprob)) &&
                  a->n_top == b->n_top,
              "row %d: logprob %g, want %g; %d of %d", row, a->logprob, b->logprob, a->n_top,
              b->n_top);
        for (int i = 0; i < b->n_top; i++)
            CHECK(a->top_id[i] == b->top_id[i] && fabsf(a->top_logprob[i] - b->top_logprob[i]) <=
                                                      2e-6f * fmaxf(1, fabsf(b->top_logprob[i])),
                  "row %d: top %d", row, i);
    }
    CHECK(rooms_close(), "guards");
    free(l), free(copy), free(s), free(got), free(want);
}

// What the filters leave, seen by drawing from 64 equal or stepped logits with many seeds.
static void test_sample_filters(void) {
    enum { VOCAB = 64, N = 512 };
    static const struct {
        float top_p, min_p;
        int top_k;
    } filter[] = {{1, 0, 5},    {0.5, 0, -1},   {0.3, 0, 7},
                  {1, 0.4, -1}, {0.9, 0.9, 40}, {0.01, 0, -1}};
    for (int shape = 0; shape < 3; shape++)
        for (int f = 0; f < 6; f++) {
            static float l[N][VOCAB], copy[N][VOCAB];
            static Sampling s[N];
            static Choice got[N], want[N];
            int different = 0;
            for (int row = 0; row < N; row++) {
                for (int i = 0; i < VOCAB; i++)
                    l[row][i] = shape == 0 ? 1 : shape == 1 ? -0.05f * (i * 37 % 64) : i % 4;
                s[row] = neutral();
                s[row].seed = row + 1, s[row].top_p = filter[f].top_p;
                s[row].min_p = filter[f].min_p, s[row].top_k = filter[f].top_k;
            }
            memcpy(copy, l, sizeof l);
            sample(got, (float *)room(l, sizeof l), s, VOCAB, VOCAB, N);
            ref_sample(want, &copy[0][0], s, VOCAB, VOCAB, N);
            for (int row = 0; row < N; row++) different += got[row].id != want[row].id;
            CHECK(different <= 1, "shape %d, filter %d: %d of %d draws differ", shape, f, different,
                  N);
            CHECK(rooms_close(), "guards");
        }
}

static void test_sample_broken(void) {
    enum { VOCAB = 129280 };
    static const float value[] = {NAN, INFINITY, -NAN, -INFINITY};
    float *l = (float *)xmalloc(VOCAB * 4);
    for (int v = 0; v < 4; v++)
        for (int place = 0; place < 3; place++) {
            Choice c;
            Sampling s = neutral();
            for (int i = 0; i < VOCAB; i++) l[i] = v == 3 ? -INFINITY : i % 10;
            l[place == 0 ? 0 : place == 1 ? 70000 : VOCAB - 1] = value[v];
            sample(&c, (float *)room(l, VOCAB * 4), &s, VOCAB, VOCAB, 1);
            CHECK(c.id == -1 && c.n_top == 0, "%g at place %d: id %d", value[v], place, c.id);
            CHECK(rooms_close(), "guards");
        }
    free(l);
}

static void test_sample(void) {
    SampleTally t = {};
    for (int i = 0; i < n_counts; i++) test_sample_rows(ROWS[i], 507, 512, &t);
    CHECK(t.near * 200 <= t.compared, "%d of %d draws differ", t.near, t.compared);
    uint32_t a[4], b[4], counter[4] = {1, 2, 3, 4};
    philox(a, 0x123456789abcdef, counter), ref_philox(b, 0x123456789abcdef, counter);
    CHECK(memcmp(a, b, sizeof a) == 0, "philox");
}

// The rest is a part of its own: so many logits and draws take racecheck minutes.
static void test_draws(void) {
    SampleTally t = {};
    test_sample_rows(ROWS[n_counts / 2 + 1], 128815, 129280, &t);
    CHECK(t.near * 200 <= t.compared, "%d of %d draws differ", t.near, t.compared);
    test_sample_filters();
    test_sample_broken();
}

// ---- The whole model ----------------------------------------------------------------------------

typedef struct {
    float error[1024];
    int rows, equal;
} ModelTally;  // of each row, relative rms

static int best_of(const float *l, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (!(l[i] <= l[best])) best = i;
    return best;
}

// The same rows through both twins. Each writes its own cache, so errors may add up over steps.
static void model_compare(Model *m, Model *ref, const Batch *b, ModelTally *t) {
    int vocab = m->config.vocab_size;
    model_step(m, b), ref_model_step(ref, b);
    float *got = (float *)fetch(m->logits, (size_t)b->n_out * vocab * sizeof *got);
    for (int row = 0; row < b->n_out; row++) {
        const float *x = got + (size_t)row * vocab, *y = ref->logits + (size_t)row * vocab;
        double error = 0, size = 0;
        for (int i = 0; i < vocab; i++)
            error += (x[i] - y[i]) * (double)(x[i] - y[i]), size += y[i] * (double)y[i];
        t->error[t->rows++] = sqrt(error / size);
        t->equal += best_of(x, vocab) == best_of(y, vocab);
    }
    free(got);
}

static const char conversation[] =
    "<\uff5cUser\uff5c>How many r are there in strawberry ?<\uff5cAssistant\uff5c><think>\n"
    "Let me spell the word and count each \"r\".\n1. s: 0\n2. t: 0\n3. r: 1\n4. a: 1\n5. w: 1\n"
    "6. b: 1\n7. e: 1\n8. r: 2\n9. r: 3\n10. y: 3\nThe count is 3.\n</think>\n\nThe letter \"r\" "
    "appears **3** times in \"strawberry\".";

// tiny-r1 over a conversation that it knows, three sequences of it, each begun one token later: in
// chunks of uneven size, then in decoding steps of all numbers of rows up to three, several times,
// so that most come from a recording. A bf16 result that was rounded the other way puts some e4m3
// of the next product on the other side of a border, 6 % away, and a router's near tie may go the
// other way. That is seldom: most rows must be very near, and the tokens the same.
static void test_model(void) {
    enum { SEQUENCES = 3, PAGES = 4, TAIL = 20 };
    Config c = config_load("tiny-r1");
    Checkpoint *files = checkpoint_open("tiny-r1", false);
    Model *m = model_load(&c, files, 0, 1, 256, 256, SEQUENCES * PAGES, NULL);
    Model *ref = ref_model_load(&c, files, 0, 1, 256, 256, SEQUENCES * PAGES, NULL);
    Tokenizer *tokenizer = tokenizer_load("tiny-r1");
    int id[256], position[256], seq[256], out[256], pages[SEQUENCES * PAGES];
    int done[SEQUENCES] = {0}, turn = 0;
    Ids text = {};
    ModelTally prompt = {}, decode = {};
    ids_add(&text, tokenizer_bos(tokenizer));
    tokenizer_encode(tokenizer, &text, STR(conversation));
    for (int i = 0; i < 256; i++) out[i] = i;
    for (int i = 0; i < SEQUENCES * PAGES; i++) pages[i] = (i * 5 + 2) % (SEQUENCES * PAGES);
    for (int end = text.len - SEQUENCES, n = 1; n > 0; turn++) {
        static const int chunks[] = {64, 1, 7, 33};
        n = 0;
        for (int s = 0; s < SEQUENCES; s++)
            for (int i = 0; i < chunks[turn % 4] && done[s] < end - TAIL; i++, n++)
                id[n] = text.data[s + done[s]], position[n] = done[s]++, seq[n] = s;
        for (int s = 0, prefills = n; s <= turn % SEQUENCES && !prefills && done[s] < end; s++, n++)
            id[n] = text.data[s + done[s]], position[n] = done[s]++, seq[n] = s;
        Batch b = {n, id, position, seq, pages, PAGES, out, n};
        if (n) model_compare(m, ref, &b, done[0] <= end - TAIL ? &prompt : &decode);
    }
    for (ModelTally *t : {&prompt, &decode}) {
        qsort(t->error, t->rows, sizeof(float), ascending);
        float median = t->error[t->rows / 2], most = t->error[t->rows * 9 / 10];
        printf(
            "note: %s: logits are %.2g off in the middle of %d rows, %.2g in a tenth; %d times the "
            "same token\n",
            t == &prompt ? "prompts" : "decoding", median, t->rows, most, t->equal);
        CHECK(t->rows > 20 && median <= 0.03 && most <= 0.1, "%d rows, %g, %g", t->rows, median,
              most);
        CHECK(t->equal * 100 >= t->rows * 97, "%d of %d", t->equal, t->rows);
    }
    model_free(m), ref_model_free(ref);
    tokenizer_free(tokenizer), checkpoint_close(files), free(text.data);
}

// A question of one of the kinds that tiny-r1 learned, as a prompt's ids.
static void ask(const Tokenizer *t, Ids *ids, int i) {
    static const char *const words[] = {"strawberry", "banana", "cheese", "letter", "window",
                                        "kitchen", "summer", "pepper", "yellow", "bottle"};
    const char *word = words[i / 5 % 10];
    int a = 17 + i * 37 % 800, b = 5 + i * 53 % 900;
    char *text = i % 5 == 0   ? format_string("How many %c are there in %s ?", word[i / 50], word)
                 : i % 5 == 1 ? format_string("Which is larger, %d.%d or %d.%d ?", a % 10, b % 100,
                                              a % 10, a % 100)
                 : i % 5 == 2 ? format_string("What is %d + %d ?", a, b)
                 : i % 5 == 3 ? format_string("Spell %s backwards", word)
                              : format_string("%s %d", i % 2 ? "Hello !" : "Who was", i);
    Message m = {ROLE_USER, {text, strlen(text)}, NULL};
    Buf prompt = {};
    chat_render(&prompt, TEMPLATE_R1, &m, 1, true, true);
    tokenizer_encode(t, ids, (Str){prompt.data, prompt.len});
    free(text), buf_free(&prompt);
}

// 200 conversations, ten at a time: the C twin answers, greedily, and the GPU sees the same tokens
// and must choose the same. Where it does not, the C twin must have been of two minds: its two best
// logits are near each other.
static void test_talks(void) {
    enum { TALKS = 200, BESIDE = 10, PAGES = 5, LONGEST = PAGES * PAGE };
    Config c = config_load("tiny-r1");
    Checkpoint *files = checkpoint_open("tiny-r1", false);
    Model *m = model_load(&c, files, 0, 1, LONGEST * 4, BESIDE, BESIDE * PAGES, NULL);
    Model *ref = ref_model_load(&c, files, 0, 1, LONGEST * 4, BESIDE, BESIDE * PAGES, NULL);
    Tokenizer *tokenizer = tokenizer_load("tiny-r1");
    int tokens = 0, equal = 0, ended = 0, pages[BESIDE * PAGES];
    float widest = 0;
    for (int i = 0; i < BESIDE * PAGES; i++) pages[i] = i;
    for (int first = 0; first < TALKS; first += BESIDE) {
        Ids text[BESIDE] = {};
        int done[BESIDE] = {0}, id[LONGEST * 4], position[LONGEST * 4], seq[LONGEST * 4];
        for (int s = 0; s < BESIDE; s++) ask(tokenizer, &text[s], first + s);
        for (;;) {
            int out[BESIDE], n = 0, n_out = 0;
            for (int s = 0; s < BESIDE; s++) {
                if (text[s].len >= LONGEST || done[s] == (int)text[s].len) continue;
                for (; done[s] < (int)text[s].len; n++)
                    id[n] = text[s].data[done[s]], position[n] = done[s]++, seq[n] = s;
                out[n_out++] = n - 1;
            }
            if (!n) break;
            Batch b = {n, id, position, seq, pages, PAGES, out, n_out};
            model_step(m, &b), ref_model_step(ref, &b);
            float *got = (float *)fetch(m->logits, (size_t)n_out * c.vocab_size * sizeof *got);
            for (int i = 0; i < n_out; i++, tokens++) {
                const float *want = ref->logits + (size_t)i * c.vocab_size;
                int chosen = best_of(got + (size_t)i * c.vocab_size, c.vocab_size);
                int best = best_of(want, c.vocab_size);
                equal += chosen == best;
                widest = fmaxf(widest, want[best] - want[chosen]);
                if (best == c.eos_token_id) ended++;
                else ids_add(&text[seq[out[i]]], best);
            }
            free(got);
        }
        for (int s = 0; s < BESIDE; s++) free(text[s].data);
    }
    printf("note: 200 conversations: %d of %d tokens are the C twin's; the widest margin of "
           "another is %.3f\n", equal, tokens, widest);
    CHECK(ended >= TALKS * 9 / 10, "%d of %d answers ended", ended, TALKS);
    CHECK(equal * 100 >= tokens * 99, "%d of %d tokens", equal, tokens);
    CHECK(widest <= 1, "the C twin preferred another token by %g", widest);
    model_free(m), ref_model_free(ref);
    tokenizer_free(tokenizer), checkpoint_close(files);
}

// ---- Weights from files -------------------------------------------------------------------------
// What place_next takes from pieces that were read, at odd addresses, across pieces' borders and
// out of rows that several ranks share, is what placing the C twin's weights from memory gives.

static uint8_t *rows_copy(const uint8_t *data, size_t rows, size_t bytes, size_t stride) {
    uint8_t *copy = (uint8_t *)xmalloc(rows * bytes);
    for (size_t i = 0; i < rows; i++) memcpy(copy + i * bytes, data + i * stride, bytes);
    return copy;
}

static Linear linear_copy(const Linear *w) {
    Linear p = *w;
    size_t size = dtype_size(w->dtype), all = w->in + w->gap, blocks = w->in / BLOCK * 4;
    p.data = rows_copy(w->data, w->out, w->in * size, all * size);
    if (w->dtype == DTYPE_F8_E4M3)
        p.scale = rows_copy(w->scale, units(w->out, BLOCK), blocks, all / BLOCK * 4);
    p.gap = 0;
    return p;
}

static size_t compared, unequal;  // arrays

static void compare(const void *data, const void *want, size_t bytes) {
    void *a = fetch(data, bytes), *b = fetch(want, bytes);
    compared++, unequal += memcmp(a, b, bytes) != 0;
    free(a), free(b);
}

static void compare_vector(const Vector *v, const Vector *ref) {
    Vector p = *ref;
    p.data = rows_copy(ref->data, 1, ref->dim * dtype_size(ref->dtype), 0);
    const uint8_t *copy = p.data;
    place_vector(&p);
    compare(v->data, p.data, v->dim * sizeof(float));
    free((void *)copy);
}

static void compare_linear(const Linear *w, const Linear *ref, Place as) {
    Linear copy = linear_copy(ref), p = copy;
    place_linear(&p, as);
    compare(w->data, p.data, as == PLACE_KV_B    ? w->out / KV_DIM * HEAD_BRICKS
                             : as == PLACE_TABLE ? (size_t)w->out * w->in * 2
                                                 : matrix_bytes(w));
    if (scale_bytes(w)) compare(w->scale, p.scale, scale_bytes(w));
    linear_free(&copy);
}

static void compare_mlp(const Mlp *m, const Mlp *ref, int n, const Mlp *shared,
                        const Mlp *ref_shared) {
    Mlp *copy = (Mlp *)xcalloc(n + 1, sizeof *copy), *p = (Mlp *)xcalloc(n + 1, sizeof *p);
    int all = n + (shared != NULL);
    for (int e = 0; e < all; e++)
        for (int i = 0; i < 3; i++)
            (&copy[e].gate_proj)[i] = linear_copy(&(e < n ? ref + e : ref_shared)->gate_proj + i);
    memcpy(p, copy, (n + 1) * sizeof *p);
    place_mlp(p, n, shared ? &p[n] : NULL);
    for (int e = 0; e < all; e++)
        for (int i = 0; i < 3; i++) {
            const Linear *w = &(e < n ? m + e : shared)->gate_proj + i, *want = &p[e].gate_proj + i;
            if (i != 1) compare(w->data, want->data, matrix_bytes(w) * (i == 0 ? 2 : 1));
            compare(w->scale, want->scale, scale_bytes(w));
            linear_free(&copy[e].gate_proj + i);
        }
    free(copy), free(p);
}

static void test_files_of(const char *dir, int rank, int size) {
    Config c = config_load(dir);
    Checkpoint *files = checkpoint_open(dir, false);
    Progress told = {};
    compared = unequal = 0;
    Model *m = model_load(&c, files, rank, size, 4, 4, 1, &told);
    Model *ref = ref_model_load(&c, files, rank, size, 4, 4, 1, NULL);
    compare_linear(&m->embed_tokens, &ref->embed_tokens, PLACE_TABLE);
    compare_linear(&m->lm_head, &ref->lm_head, PLACE_MATRIX);
    compare_vector(&m->norm, &ref->norm);
    for (int i = 0; i < c.num_hidden_layers; i++) {
        const Layer *l = &m->layers[i], *r = &ref->layers[i];
        compare_vector(&l->input_layernorm, &r->input_layernorm);
        compare_vector(&l->self_attn.kv_a_layernorm, &r->self_attn.kv_a_layernorm);
        compare_linear(&l->self_attn.kv_b_proj, &r->self_attn.kv_b_proj, PLACE_KV_B);
        compare_linear(&l->self_attn.q_a_proj, &r->self_attn.q_a_proj, PLACE_MATRIX);
        compare_linear(&l->self_attn.q_b_proj, &r->self_attn.q_b_proj, PLACE_MATRIX);
        compare_linear(&l->self_attn.o_proj, &r->self_attn.o_proj, PLACE_MATRIX);
        if (l->moe) {
            compare_linear(&l->moe_mlp.gate, &r->moe_mlp.gate, PLACE_MATRIX);
            compare_mlp(l->moe_mlp.experts, r->moe_mlp.experts, c.n_routed_experts,
                        &l->moe_mlp.shared_experts, &r->moe_mlp.shared_experts);
        } else {
            compare_mlp(&l->mlp, &r->mlp, 1, NULL, NULL);
        }
    }
    CHECK(unequal == 0, "%s, rank %d of %d: %zu of %zu arrays differ", dir, rank, size, unequal,
          compared);
    CHECK(told.loaded_bytes == told.total_bytes, "%s, rank %d of %d: told %zu of %zu bytes", dir,
          rank, size, (size_t)told.loaded_bytes, (size_t)told.total_bytes);
    printf("note: %s, rank %d of %d: %zu arrays, %.2f GB\n", dir, rank, size, compared,
           told.loaded_bytes / 1e9);
    model_free(m), ref_model_free(ref);
    checkpoint_close(files);
}

static void test_files(void) {
    test_files_of("tiny-r1", 0, 1), test_files_of("tiny-r1", 1, 2);
    test_files_of("tests/golden/nasty", 0, 1);
    if (access("build/load/config.json", R_OK) != 0)
        SKIP("R1's own sizes: tests/load.py write build/load makes them");
    else test_files_of("build/load", 5, 8), test_files_of("build/load", 0, 1);
}

// ---- Times --------------------------------------------------------------------------------------

// What these kernels read was written just before in a step, too, so it may lie in L2.
static void bench_rows(int n) {
    enum { HIDDEN = 7168, Q_LORA = 1536, VOCAB = 129280 };
    Config c = config_of(HIDDEN, 256, 8, 4, 8);
    bf16 *noisy = bf16_noise((size_t)n * HIDDEN, 1);
    bf16 *x = (bf16 *)room(noisy, (size_t)n * HIDDEN * 2),
         *y = (bf16 *)room(noisy, (size_t)n * HIDDEN * 2);
    int *id = (int *)xcalloc(n, 4), *position = (int *)xcalloc(n, 4);
    float *product = (float *)xmalloc((size_t)n * 256 * 4), frequency[ROPE_DIM / 2] = {1};
    for (int i = 0; i < n; i++) position[i] = i, id[i] = i % 64;
    for (int i = 0; i < n * 256; i++) product[i] = noise();
    Vector gain = vector_noise(HIDDEN, DTYPE_F32, 1, 0.5);
    place_vector(&gain);
    Act *a = act_new(n, HIDDEN), *qa = act_new(n, Q_LORA);
    bf16 *cache = (bf16 *)room(NULL, (size_t)(n / PAGE + 1) * PAGE_BYTES);
    Batch b = {n, (int *)room(id, n * 4), (int *)room(position, n * 4), NULL, NULL, 0, NULL, 0};
    memset(id, 0, n * 4);
    b.seq = (int *)room(id, n * 4);
    for (int i = 0; i < n / PAGE + 1; i++) position[i] = i;
    b.pages = (int *)room(position, (n / PAGE + 1) * 4);
    float *rope = (float *)room(NULL, n * ROPE_DIM * 4);
    Routing r = routing_new(n, &c);
    check(cudaMemcpy(r.sum, product, (size_t)n * 256 * 4, cudaMemcpyHostToDevice), "copy");
    Linear table = {64, HIDDEN, DTYPE_BF16,
                    (uint8_t *)room(noisy, (size_t)(n < 64 ? n : 64) * HIDDEN * 2), NULL};
    float t[5] = {
        microseconds([&] { rope_angles(rope, frequency, b.position, n); }),
        microseconds([&] { embed(x, &table, 0, b.id, n); }),
        microseconds([&] { add_norm(x, a, y, &gain, 1e-6f, n); }),
        microseconds([&] { mla_latent(qa, cache, x, y, &gain, &gain, 1e-6f, rope, &b); }),
        microseconds([&] { route(&r, &gain, &c, n, 1); }),
    };
    printf("note: %5d rows: rope %.2f us, embed %.2f, add_norm %.2f (%.0f GB/s), mla_latent %.2f, "
           "route and lists %.2f\n",
           n, t[0], t[1], t[2], 8.5 * n * HIDDEN / t[2] / 1e3, t[3], t[4]);
    check(cudaStreamSynchronize(stream), "bench");
    rooms_close();
    place_free();
    act_free(a), act_free(qa), routing_free(&r);
    free(noisy), free(id), free(position), free(product);
}

// The whole call, since it ends with the host's waiting for it.
static void bench_sample(int n, const char *name, float temperature, float top_p, int top) {
    enum { VOCAB = 129280, ROUNDS = 15 };
    float *l = (float *)xmalloc((size_t)n * VOCAB * 4), time[ROUNDS];
    Sampling *s = (Sampling *)xcalloc(n, sizeof *s);
    Choice *c = (Choice *)xcalloc(n, sizeof *c);
    for (int i = 0; i < n; i++)
        s[i] = neutral(), s[i].temperature = temperature, s[i].top_p = top_p,
        s[i].top_logprobs = top;
    for (size_t i = 0; i < (size_t)n * VOCAB; i++) l[i] = 4 * (noise() + noise() + noise());
    float *d = (float *)room(l, (size_t)n * VOCAB * 4);
    for (int i = -3; i < ROUNDS; i++) {
        double start = now_seconds();
        sample(c, d, s, VOCAB, VOCAB, n);
        if (i >= 0) time[i] = (now_seconds() - start) * 1e6;
    }
    qsort(time, ROUNDS, sizeof *time, ascending);
    printf("note: %5d rows: sample, %s: %.1f us\n", n, name, time[ROUNDS / 2]);
    rooms_close();
    free(l), free(s), free(c);
}

static void bench(void) {
    static const int rows[] = {1, 8, 64, 256, 4096}, few[] = {1, 8, 64, 256};
    for (int n : rows) bench_rows(n);
    for (int n : few) {
        bench_sample(n, "greedy", 0, 1, -1);
        bench_sample(n, "temperature 0.6, top_p 0.95", 0.6, 0.95, -1);
        bench_sample(n, "the same with 5 logprobs", 0.6, 0.95, 5);
    }
}

// ---- The time of a layer ------------------------------------------------------------------------
// MoE layers as one of eight ranks has them, 1,024 tokens into each sequence, with random weights
// that route evenly. The layer as a whole, then what it saves to leave a stage out (edges between
// kernels included, and what overlaps not), and a chain of this stage alone.

enum { LAYERS = 6, LAYER_ROWS = 256, CONTEXT = 1024, LAYER_PAGES = CONTEXT / PAGE };

static uint8_t *layer_bytes(size_t bytes, uint32_t keep, uint32_t set) {
    return (uint8_t *)filled(place_alloc(bytes), bytes, keep, set);
}

static uint8_t *scales(int out, int in) {  // 2^-7 .. 2^-6: sums over some thousands stay near 1
    return layer_bytes((size_t)units(out, BLOCK) * (in / BLOCK) * 4, 0x007fffff, 0x3c000000);
}

static Linear layer_linear(int out, int in) {
    return (Linear){out, in, DTYPE_F8_E4M3, layer_bytes((size_t)out * in, 0xbfbfbfbf, 0x30303030),
                    scales(out, in)};
}

static Vector layer_vector(int dim, uint32_t set) {
    return (Vector){dim, DTYPE_F32, layer_bytes(dim * 4, 0x007fffff, set)};
}

// Experts 0 and 1 and the shared one, number n: all that kernels.cu looks at.
static void layer_experts(Layer *l, int hidden, int width, int n) {
    l->moe_mlp.experts = (Mlp *)xcalloc(2, sizeof(Mlp));
    for (int i = 0; i < 3; i++) {
        int out = i < 2 ? width : hidden, in = i < 2 ? hidden : width;
        static Linear all;  // of all experts; gate and up are one
        size_t bytes = (size_t)width * hidden * (i < 2 ? 2 : 1);
        size_t blocks = width / BLOCK * (hidden / BLOCK) * sizeof(float);
        if (i != 1) all.data = layer_bytes((n + 1) * bytes, 0xbfbfbfbf, 0x30303030);
        all.scale = layer_bytes((n + 1) * blocks, 0x007fffff, 0x3c000000);
        for (int e : {0, 1, n}) {
            Mlp *m = e == n ? &l->moe_mlp.shared_experts : &l->moe_mlp.experts[e];
            (&m->gate_proj)[i] = (Linear){out, in, DTYPE_F8_E4M3, all.data + e * bytes,
                                          all.scale + e * blocks};
        }
    }
}

static void layer_fill(Model *m, int i) {
    const Config *c = &m->config;
    Layer *l = &m->layers[i];
    int hidden = c->hidden_size, heads = c->num_attention_heads, q_lora = c->q_lora_rank;
    l->moe = true;
    l->input_layernorm = l->post_attention_layernorm = layer_vector(hidden, 0x3f800000);
    l->self_attn.q_a_layernorm = l->self_attn.kv_a_layernorm = layer_vector(q_lora, 0x3f800000);
    l->self_attn.q_a_proj = layer_linear(q_lora, hidden);
    l->self_attn.kv_a_proj_with_mqa = layer_linear(CACHE_DIM, hidden);
    l->self_attn.q_b_proj = layer_linear(heads * QK_DIM, q_lora);
    l->self_attn.o_proj = layer_linear(hidden, heads * V_DIM);
    l->self_attn.kv_b_proj = (Linear){heads * KV_DIM, LATENT_DIM, DTYPE_F8_E4M3,
                                      layer_bytes((size_t)heads * HEAD_BRICKS, 0x807f807f,
                                                  0x3f003f00), scales(heads * KV_DIM, LATENT_DIM)};
    l->moe_mlp.gate = (Linear){c->n_routed_experts, hidden, DTYPE_BF16,  // scores of size 1
                               layer_bytes((size_t)c->n_routed_experts * hidden * 2, 0x807f807f,
                                           0x3c003c00), NULL};
    l->moe_mlp.e_score_correction_bias = layer_vector(c->n_routed_experts, 0);
    layer_experts(l, hidden, c->moe_intermediate_size, c->n_routed_experts);
    m->cache[i] = (bf16 *)layer_bytes((size_t)LAYER_ROWS * LAYER_PAGES * PAGE_BYTES, 0x807f807f,
                                      0x3f003f00);
}

static Model layer_model(void) {
    Model m = {};
    m.config = config_of(7168, 256, 8, 4, 8);
    Config *c = &m.config;
    c->num_attention_heads = 16, c->q_lora_rank = 1536, c->rms_norm_eps = 1e-6;
    c->moe_intermediate_size = 256, c->intermediate_size = 2304, m.softmax_scale = 0.135f;
    int n = LAYER_ROWS, heads = c->num_attention_heads;
    m.layers = (Layer *)xcalloc(LAYERS, sizeof *m.layers);
    m.cache = (bf16 **)xcalloc(LAYERS, sizeof *m.cache);
    for (int i = 0; i < LAYERS; i++) layer_fill(&m, i);
    struct { bf16 **to; int cols; } rows[] = {
        {&m.x, 7168}, {&m.y, 7168}, {&m.q_a, 1536}, {&m.kv_a, CACHE_DIM}, {&m.q, heads * QK_DIM},
        {&m.query, heads * CACHE_DIM}, {&m.u, heads * LATENT_DIM}};
    for (auto r : rows)
        *r.to = (bf16 *)layer_bytes((size_t)n * r.cols * 2, 0x807f807f, 0x3f003f00);
    m.rope = (float *)layer_bytes(n * ROPE_DIM * 4, 0x807fffff, 0x3f000000);
    m.normed = act_new(n, 7168), m.q_latent = act_new(n, 1536);
    m.heads_out = act_new(n, heads * V_DIM), m.expert_hidden = act_new(n * 9, 256);
    m.routing = routing_new(n, c);
    step_reserve(n, c);
    return m;
}

static const char *const STAGE_NAMES[] = {"add_norm", "qkv_a", "mla_latent", "q_b", "mla_query",
    "mla_attend", "mla_value", "o", "add_norm", "moe_route", "moe_experts"};
enum { N_STAGES = sizeof STAGE_NAMES / sizeof *STAGE_NAMES };

static void layer_stage(Model *m, int layer, int stage, const Batch *b) {  // model_layer's
    const Layer *l = &m->layers[layer];
    const Config *c = &m->config;
    int n = b->n, heads = c->num_attention_heads;
    bf16 *cache = m->cache[layer];
    switch (stage) {
    case 0: add_norm(m->x, m->normed, m->y, &l->input_layernorm, 1e-6f, n); break;
    case 1:
        linear_pair(m->q_a, m->kv_a, m->normed, &l->self_attn.q_a_proj,
                    &l->self_attn.kv_a_proj_with_mqa, n);
        break;
    case 2:
        mla_latent(m->q_latent, cache, m->q_a, m->kv_a, &l->self_attn.q_a_layernorm,
                   &l->self_attn.kv_a_layernorm, 1e-6f, m->rope, b);
        break;
    case 3: linear(m->q, m->q_latent, &l->self_attn.q_b_proj, n); break;
    case 4: mla_query(m->query, m->q, &l->self_attn.kv_b_proj, m->rope, heads, n); break;
    case 5: mla_attend(m->u, m->query, cache, m->softmax_scale, heads, b); break;
    case 6: mla_value(m->heads_out, m->u, &l->self_attn.kv_b_proj, heads, n); break;
    case 7: linear(m->y, m->heads_out, &l->self_attn.o_proj, n); break;
    case 8: add_norm(m->x, m->normed, m->y, &l->post_attention_layernorm, 1e-6f, n); break;
    case 9:
        moe_route(&m->routing, m->normed, &l->moe_mlp.gate, &l->moe_mlp.e_score_correction_bias, c,
                  n);
        break;
    case 10:
        moe_experts(m->y, m->expert_hidden, m->normed, &m->routing, l->moe_mlp.experts,
                    &l->moe_mlp.shared_experts, c, n);
    }
}

static void bench_layer_rows(Model *m, int n) {
    int *seq = (int *)xmalloc(n * 4), *position = (int *)xmalloc(n * 4), turn = 0;
    int *pages = (int *)xmalloc(n * LAYER_PAGES * 4), repeat = n > 8 ? LAYERS : 4 * LAYERS;
    for (int i = 0; i < n; i++) seq[i] = i, position[i] = CONTEXT - 1;
    for (int i = 0; i < n * LAYER_PAGES; i++) pages[i] = i;
    Batch b = {n, NULL, (int *)room(position, n * 4), (int *)room(seq, n * 4),
               (int *)room(pages, n * LAYER_PAGES * 4), LAYER_PAGES, NULL, 0};
    mla_plan(&b, m->config.num_attention_heads);
    float whole = microseconds([&] { model_layer(m, 1 + turn++ % (LAYERS - 1), &b); }, repeat);
    int *start = (int *)fetch(m->routing.start, 257 * 4), hit = 0;
    for (int e = 0; e < 256; e++) hit += start[e + 1] > start[e];
    printf("note: layer, %3d rows, %d experts hit: %.1f us; without a stage, it alone:\n", n, hit,
           whole);
    for (int s = 0; s < N_STAGES; s++) {
        float rest = microseconds([&] {
            for (int i = 0, layer = turn++ % LAYERS; i < N_STAGES; i++)
                if (i != s) layer_stage(m, layer, i, &b);
        }, repeat);
        float alone = microseconds([&] { layer_stage(m, turn++ % LAYERS, s, &b); }, repeat);
        printf("note:     %-12s %6.1f us less, %6.1f us\n", STAGE_NAMES[s], whole - rest, alone);
    }
    free(seq), free(position), free(pages), free(start), rooms_close();
}

static void bench_layer(void) {
    Model m = layer_model();
    for (int n : {1, 8, 64, 256}) bench_layer_rows(&m, n);
    place_free();
}

// ---- Which tests --------------------------------------------------------------------------------

static void test_rows(void) {
    for (int i = 0; i < n_counts; i++) {
        int n = ROWS[i];
        test_rope(n);
        test_embed(n, 7168), test_embed(n, 256);
        for (int cols : {7168, 1536, 256, 128}) {
            test_add_norm(n, cols, DTYPE_BF16, true, 1);
            test_add_norm(n, cols, DTYPE_F32, false, 0.01);
        }
        test_latent(n, 1536), test_latent(n, 256);
    }
    test_add_norm_nan();
}

static void test_routes(void) {
    Config r1 = config_of(7168, 256, 8, 4, 8), tiny = config_of(256, 16, 4, 2, 4);
    Config odd = config_of(1024, 480, 3, 2, 16);
    for (int i = 0; i < n_counts; i++)
        for (int coarse = 0; coarse < 2; coarse++) {
            test_route(ROWS[i], &r1, coarse);
            test_route(ROWS[i], &tiny, coarse);
            test_route(ROWS[i], &odd, coarse);
        }
    test_route(5 * ROWS[n_counts - 1], &r1, false);
}

static void test_steps(void) {
    test_batch();
    test_recording();
}

int main(int argc, char **argv) {
    static const Part parts[] = {{"place", test_place},   {"steps", test_steps},
                                 {"rows", test_rows},     {"routes", test_routes},
                                 {"sample", test_sample}, {"draws", test_draws},
                                 {"model", test_model},   {"files", test_files},
                                 {"talks", test_talks},
                                 {"bench", bench},       {"bench_layer", bench_layer}};
    return run_parts(parts, 11, argc, argv);
}
