// tests/test_mla.cu: the attention of kernels.cu against the C twin, the absorbed stage by stage,
// the prompts' as a whole, and how fast they are.
//
// Queries and the cache lie swizzled on the GPU, so both twins' forms are made here. Pages are
// scrambled, and what a batch doesn't use of them is NaN.
#include "test_cuda.h"
#include <limits.h>

static const float SCALE = 0.1352f;  // R1's: 192^-0.5, times YaRN's mscale twice

// ---- Data ---------------------------------------------------------------------------------------

static Linear kv_b_noise(int heads) {
    size_t n = (size_t)heads * KV_DIM * LATENT_DIM;
    uint8_t *data = (uint8_t *)xmalloc(n);
    float *scale = (float *)xmalloc(heads * 2 * LATENT_SCALES * sizeof *scale);
    for (size_t i = 0; i < n; i++) data[i] = (int)((noise() + 1) * 63.4) | (noise() < 0 ? 0x80 : 0);
    for (int i = 0; i < heads * 2 * LATENT_SCALES; i++) scale[i] = (1 + 0.5 * noise()) / 2048;
    return (Linear){heads * KV_DIM, LATENT_DIM, DTYPE_F8_E4M3, data, (uint8_t *)scale};
}

// The worst |a - b| over its bound, at most 1 where all is well; NaN if any is NaN.
static float worst(float error, float bound, float so_far) {
    float ratio = error == 0 ? 0 : error / bound;
    return so_far != so_far || ratio <= so_far ? so_far : ratio;
}

static size_t query_at(size_t row, int head, int dim, int heads) {  // in the swizzled query
    return ((row * CACHE_BLOCKS + dim / 64) * heads + head) * 64 + (dim % 64 / 8 ^ head % 8) * 8 +
           dim % 8;
}

static size_t cache_at(size_t page, int token, int dim) {  // in the swizzled cache
    return page * PAGE * CACHE_DIM + dim / 64 * PAGE * 64 + token * 64 +
           (dim % 64 / 8 ^ token % 8) * 8 + dim % 8;
}

// ---- mla_query, mla_value -----------------------------------------------------------------------

// Products and sum round one by one.
static bf16 rotated(const bf16 *x, const float *rope, int i) {
    volatile float a = bf16_value(x[i]) * rope[i / 2 * 2];
    volatile float b = bf16_value(x[i ^ 1]) * rope[i / 2 * 2 + 1];
    return round_half(i % 2 ? a + b : a - b);
}

static void try_query(int heads, int n) {
    size_t size = (size_t)n * heads * CACHE_DIM, q_size = (size_t)n * heads * QK_DIM;
    Linear w = kv_b_noise(heads), p = w;
    bf16 *q = bf16_noise(q_size, 4), *want = (bf16 *)xmalloc(size * 2);
    float *rope = (float *)xmalloc(n * ROPE_DIM * 4), frequency[ROPE_DIM / 2], bad = 0;
    int position[MAX_ROWS], wrong = 0;
    for (int i = 0; i < ROPE_DIM / 2; i++) frequency[i] = powf(10000, -i / 32.f);
    for (int i = 0; i < n; i++) position[i] = i * 37;
    ref_rope_angles(rope, frequency, position, n);
    ref_mla_query(want, q, &w, rope, heads, n);
    place_linear(&p, PLACE_KV_B);
    bf16 *out = (bf16 *)room(NULL, size * 2);
    float *angles = (float *)room(rope, n * ROPE_DIM * 4);
    mla_query(out, (bf16 *)room(q, q_size * 2), &p, angles, heads, n);
    bf16 *got = (bf16 *)fetch(out, size * 2);
    for (int i = 0; i < n * heads; i++) {
        const bf16 *row = want + (size_t)i * CACHE_DIM;
        float most = 0;
        for (int d = 0; d < LATENT_DIM; d++) most = fmaxf(most, fabsf(bf16_value(row[d])));
        for (int d = 0; d < CACHE_DIM; d++) {
            bf16 g = got[query_at(i / heads, i % heads, d, heads)];
            float r = bf16_value(row[d]);
            if (d < LATENT_DIM)
                bad = worst(fabsf(bf16_value(g) - r), 0x1p-7f * fabsf(r) + 0x1p-18f * most, bad);
            else
                wrong += g != rotated(q + (size_t)i * QK_DIM + NOPE_DIM,
                                      rope + i / heads * ROPE_DIM, d - LATENT_DIM);
        }
    }
    CHECK(bad <= 1 && wrong == 0, "query, %d heads, %d rows: %g of bound, %d of q_pe differ", heads,
          n, bad, wrong);
    CHECK(rooms_close(), "guards");
    place_free();
    linear_free(&w), free(q), free(want), free(rope), free(got);
}

static void try_value(int heads, int n) {
    int cols = heads * V_DIM, wrong = 0;
    Linear w = kv_b_noise(heads), p = w;
    bf16 *u = bf16_noise((size_t)n * heads * LATENT_DIM, 1);
    Act *o = act_poisoned(n, cols), *ref = ref_act_new(n, cols);
    const RefAct *want = (const RefAct *)ref;
    size_t all = (size_t)o->stride * cols;
    float bad = 0;
    place_linear(&p, PLACE_KV_B);
    mla_value(o, (bf16 *)room(u, (size_t)n * heads * LATENT_DIM * 2), &p, heads, n);
    ref_mla_value(ref, u, &w, heads, n);
    bf16 *x = (bf16 *)fetch(o->x, all * 2);
    uint8_t *q = (uint8_t *)fetch(o->q, all);
    float *scale = (float *)fetch(o->scale, all / V_DIM * 4);
    for (int i = 0; i < n * heads; i++) {
        size_t first = (size_t)i * V_DIM, line = (size_t)(i % heads) * o->stride + i / heads;
        float most = 0, amax = MIN_AMAX;
        for (int d = 0; d < V_DIM; d++) {
            most = fmaxf(most, fabsf(want->x[first + d]));
            amax = fmaxf(amax, fabsf(bf16_value(x[first + d])));
        }
        wrong += scale[line] != amax / E4M3_MAX;
        for (int d = 0; d < V_DIM; d++) {
            float v = bf16_value(x[first + d]), r = want->x[first + d], of = v / scale[line];
            bad = worst(fabsf(v - r), 0x1p-7f * fabsf(r) + 0x1p-17f * most, bad);
            float code = e4m3_value(q[line * ROW_BYTES + (d / 16 ^ i / heads % 8) * 16 + d % 16]);
            // The nearest e4m3 to the quotient: half a step, 2^-4 of itself or 2^-10.
            wrong += !(fabsf(code - of) <= fmaxf(fabsf(code) * 0x1p-4f, 0x1p-10f));
        }
    }
    CHECK(bad <= 1 && wrong == 0, "value, %d heads, %d rows: %g of bound, %d wrong codes", heads, n,
          bad, wrong);
    CHECK(poisoned(x + (size_t)n * cols, (all - (size_t)n * cols) * 2), "rows behind the last");
    CHECK(rooms_close(), "guards");
    place_free();
    linear_free(&w), act_free(o), ref_act_free(ref), free(u), free(x), free(q), free(scale);
}

static void test_query(void) {
    for (int i = 0; i < n_counts; i++) try_query(16, ROWS[i]);
    try_query(4, 33), try_query(8, 65), try_query(128, 3);
}

static void test_value(void) {
    for (int i = 0; i < n_counts; i++) try_value(16, ROWS[i]);
    try_value(4, 33), try_value(8, 65), try_value(128, 3);
}

// ---- mla_attend ---------------------------------------------------------------------------------

typedef struct { int len, rows; } Span;  // a sequence: the last `rows` of its `len` tokens

typedef struct {  // a batch, and what the C twin makes of it; swizzled: as the GPU wants it
    int heads, n, n_seqs, max_pages, n_pages;
    int *position, *seq, *pages;
    bf16 *swizzled_cache, *swizzled_query, *want;
} Case;

static size_t cache_size(const Case *c) { return (size_t)c->n_pages * PAGE * CACHE_DIM; }
static size_t u_size(const Case *c) { return (size_t)c->n * c->heads * LATENT_DIM; }
static size_t query_size(const Case *c) { return (size_t)c->n * c->heads * CACHE_DIM; }

// The pages of all sequences in random order, among five that nobody has.
static void case_pages(Case *c, const Span *spans, bf16 *cache) {
    int *order = (int *)xmalloc(c->n_pages * sizeof *order), used = 0;
    for (int i = 0; i < c->n_pages; i++) {
        int j = random_bits() % (i + 1);
        order[i] = order[j], order[j] = i;
    }
    for (int i = 0; i < c->n_seqs * c->max_pages; i++) c->pages[i] = INT_MAX;
    memset(cache, POISON, cache_size(c) * 2);
    memset(c->swizzled_cache, POISON, cache_size(c) * 2);
    for (int s = 0; s < c->n_seqs; s++)
        for (int t = 0; t < spans[s].len; t++) {
            int *page = &c->pages[s * c->max_pages + t / PAGE];
            if (t % PAGE == 0) *page = order[used++];
            for (int d = 0; d < CACHE_DIM; d++)
                c->swizzled_cache[cache_at(*page, t % PAGE, d)] =
                    cache[((size_t)*page * PAGE + t % PAGE) * CACHE_DIM + d] = round_half(noise());
        }
    free(order);
}

static Case case_open(int heads, const Span *spans, int n_seqs, int longest, bf16 **cache) {
    Case c = {};
    c.heads = heads, c.n_seqs = n_seqs, c.max_pages = units(longest, PAGE) + 3, c.n_pages = 5;
    for (int s = 0; s < n_seqs; s++) c.n += spans[s].rows, c.n_pages += units(spans[s].len, PAGE);
    c.position = (int *)xmalloc(c.n * sizeof(int)), c.seq = (int *)xmalloc(c.n * sizeof(int));
    c.pages = (int *)xmalloc(n_seqs * c.max_pages * sizeof(int));
    c.swizzled_cache = (bf16 *)xmalloc(cache_size(&c) * 2);
    *cache = (bf16 *)xmalloc(cache_size(&c) * 2);
    case_pages(&c, spans, *cache);
    for (int s = 0, i = 0; s < n_seqs; s++)
        for (int r = 0; r < spans[s].rows; r++, i++)
            c.position[i] = spans[s].len - spans[s].rows + r, c.seq[i] = s;
    return c;
}

static Case case_new(int heads, const Span *spans, int n_seqs, int longest) {
    bf16 *cache;
    Case c = case_open(heads, spans, n_seqs, longest, &cache);
    bf16 *query = bf16_noise(query_size(&c), 3);
    c.swizzled_query = (bf16 *)xmalloc(query_size(&c) * 2);
    c.want = (bf16 *)xmalloc(u_size(&c) * 2);
    for (int i = 0; i < c.n * heads; i++)
        for (int d = 0; d < CACHE_DIM; d++)
            c.swizzled_query[query_at(i / heads, i % heads, d, heads)] =
                query[(size_t)i * CACHE_DIM + d];
    Batch b = {c.n, NULL, c.position, c.seq, c.pages, c.max_pages, NULL, 0};
    ref_mla_attend(c.want, query, cache, SCALE, heads, &b);
    free(cache), free(query);
    return c;
}

static void case_free(Case *c) {
    free(c->position), free(c->seq), free(c->pages);
    free(c->swizzled_cache), free(c->swizzled_query), free(c->want);
}

// Bound: 3 bf16 ulps of the row's largest (the weights are rounded to bf16 for the product).
static void case_compare(const Case *c, const bf16 *got, const char *name) {
    float bad = 0;
    double error = 0, size = 1e-30;
    for (int i = 0; i < c->n * c->heads; i++) {
        const bf16 *own = got + (size_t)i * LATENT_DIM, *want = c->want + (size_t)i * LATENT_DIM;
        float most = 0;
        for (int d = 0; d < LATENT_DIM; d++) most = fmaxf(most, fabsf(bf16_value(want[d])));
        for (int d = 0; d < LATENT_DIM; d++) {
            float w = bf16_value(want[d]), e = bf16_value(own[d]) - w;
            bad = worst(fabsf(e), 3 * 0x1p-8f * most, bad);
            error += (double)e * e, size += (double)w * w;
        }
    }
    double relative = sqrt(error / size);
    CHECK(bad <= 1 && relative <= 5e-3, "%s, %d heads, %d rows: %g of bound, relative %g", name,
          c->heads, c->n, bad, relative);
    printf("%s, %d heads, %d rows, %d pages: %.2g of bound, relative %.2g\n", name, c->heads, c->n,
           c->n_pages, bad, relative);
}

// As a step reserves it, poisoned, so that no part of a split tile is read that was not written.
static void plan_open(int rows, int heads) {
    size_t columns = 2 * (size_t)n_sms * MAX_COLUMNS;
    mla_reserve(rows, heads);
    check(cudaMemsetAsync(plan.part, POISON, columns * LATENT_DIM * sizeof(float), stream), "plan");
    check(cudaMemsetAsync(plan.ml, POISON, columns * sizeof(float2), stream), "plan");
}

static void try_spans(const char *name, int heads, bool prompts, const Span *spans, int n) {
    int longest = 0;
    for (int i = 0; i < n; i++) longest = max_int(longest, spans[i].len);
    Case c = case_new(heads, spans, n, longest);
    Batch b = {c.n, NULL, (int *)room(c.position, c.n * sizeof(int)),
               (int *)room(c.seq, c.n * sizeof(int)),
               (int *)room(c.pages, n * c.max_pages * sizeof(int)), c.max_pages, NULL, 0};
    bf16 *u = (bf16 *)room(NULL, u_size(&c) * 2);
    bf16 *query = (bf16 *)room(c.swizzled_query, query_size(&c) * 2);
    bf16 *cache = (bf16 *)room(c.swizzled_cache, cache_size(&c) * 2);
    plan_open(c.n, heads);
    step.prompts = prompts;
    mla_plan(&b, heads);
    check(cudaStreamSynchronize(stream), "plan");  // else there must be a kernel in between
    mla_attend(u, query, cache, SCALE, heads, &b);
    bf16 *got = (bf16 *)fetch(u, u_size(&c) * 2);
    case_compare(&c, got, name);
    CHECK(rooms_close(), "guards");
    place_free();
    case_free(&c), free(got);
}

template <int N>
static void try_attend(const char *name, int heads, bool prompts, const Span (&spans)[N]) {
    try_spans(name, heads, prompts, spans, N);
}

static void try_decode(int heads, int n, const int *lengths, int n_lengths) {
    Span spans[MAX_ROWS];
    for (int i = 0; i < n; i++) spans[i] = (Span){lengths[i % n_lengths], 1};
    try_spans("decode", heads, false, spans, n);
}

static void test_attend(void) {
    static const int lengths[] = {65, 4097, 1, 63, 64}, shorter[] = {1, 700, 64, 65, 63};
    try_attend("decode", 4, false, {{65, 1}, {1, 1}, {130, 1}});
    try_attend("prompt", 16, true, {{65, 1}, {70, 9}, {130, 1}});
    try_attend("decode", 16, false, {{300, 1}, {70, 1}});
    if (quick()) return;
    for (int len : {1, 63, 64, 65, 4097, 20000}) try_decode(16, 1, &len, 1);
    try_attend("decode", 16, false, {{20000, 1}, {1, 1}});
    for (int n : {7, 8, 9, 33}) try_decode(16, n, lengths, 5);
    for (int n : {64, 128, 200}) try_decode(16, n, shorter, 5);
    try_attend("untold", 16, false, {{64, 64}, {200, 3}});  // several rows of a sequence
    for (int heads : {4, 8}) {
        try_decode(heads, 1, lengths + 1, 1);
        try_decode(heads, 9, lengths, 5);
        try_attend("untold", heads, false, {{64, 5}, {70, 4}, {1, 1}});
    }
    try_decode(128, 3, lengths, 3), try_decode(32, 5, shorter, 4);
    for (int heads : {4, 8, 16, 32, 128})
        try_attend("prompt", heads, true, {{33, 33}, {64, 64}, {65, 7}, {1, 1}});
    try_attend("mixed", 16, true,
               {{20000, 1}, {4097, 9}, {200, 200}, {1, 1}, {64, 1}, {63, 8}});
    try_attend("mixed", 8, true, {{4097, 1}, {4097, 33}, {65, 1}, {200, 128}});
    try_attend("mixed", 4, true, {{300, 2}, {4097, 1}, {200, 200}, {2, 2}});
    try_attend("prompt", 16, true, {{1025, 1025}});
}

// Replays a step's graph for a batch, several times: the same bits each time, or it is a race.
static void replay(cudaGraphExec_t graph, const Case *c, const Batch *b, bf16 *u, bf16 *query,
                   bf16 *cache) {
    bf16 *first = NULL;
    put((int *)b->position, c->position, c->n * sizeof(int));
    put((int *)b->seq, c->seq, c->n * sizeof(int));
    put((int *)b->pages, c->pages, c->n_seqs * c->max_pages * sizeof(int));
    put(cache, c->swizzled_cache, cache_size(c) * 2);
    put(query, c->swizzled_query, query_size(c) * 2);
    for (int again = 0; again < 20; again++) {
        check(cudaMemsetAsync(u, POISON, u_size(c) * 2, stream), "memset");
        check(cudaGraphLaunch(graph, stream), "graph");
        bf16 *got = (bf16 *)fetch(u, u_size(c) * 2);
        CHECK(!first || !memcmp(got, first, u_size(c) * 2), "replay %d differs", again);
        if (first) free(got);
        else first = got;
    }
    case_compare(c, first, "graph");
    free(first);
}

// One recording, replayed for other lengths, pages and queries of as many rows.
static void try_graph(int heads, bool prompts, const Span *spans, const Span *others) {
    enum { SEQS = 3, LONGEST = 5000 };
    Case a = case_new(heads, spans, SEQS, LONGEST), c = case_new(heads, others, SEQS, LONGEST);
    Linear w = kv_b_noise(4), p = w;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    size_t most = cache_size(&a) > cache_size(&c) ? cache_size(&a) : cache_size(&c);
    Batch b = {a.n, NULL, (int *)room(a.position, a.n * sizeof(int)),
               (int *)room(a.seq, a.n * sizeof(int)),
               (int *)room(a.pages, SEQS * a.max_pages * sizeof(int)), a.max_pages, NULL, 0};
    bf16 *u = (bf16 *)room(NULL, u_size(&a) * 2), *other = (bf16 *)room(NULL, 4 * CACHE_DIM * 2);
    bf16 *query = (bf16 *)room(NULL, query_size(&a) * 2), *cache = (bf16 *)room(NULL, most * 2);
    float *rope = (float *)filled(room(NULL, ROPE_DIM * 4), ROPE_DIM * 4);
    CHECK(a.n == c.n, "the test's own");
    plan_open(a.n, heads);
    place_linear(&p, PLACE_KV_B);
    put(query, a.swizzled_query, query_size(&a) * 2);
    step.prompts = prompts;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording");
    mla_plan(&b, heads);
    embed(other, &p, 0, b.seq, 1);  // the plan is read behind this
    mla_query(other, query, &p, rope, 4, 1);
    mla_attend(u, query, cache, SCALE, heads, &b);
    check(cudaStreamEndCapture(stream, &graph), "recording");
    check(cudaGraphInstantiate(&exec, graph, 0), "graph");
    replay(exec, &a, &b, u, query, cache);
    replay(exec, &c, &b, u, query, cache);
    replay(exec, &a, &b, u, query, cache);
    check(cudaGraphExecDestroy(exec), "graph"), check(cudaGraphDestroy(graph), "graph");
    CHECK(rooms_close(), "guards");
    place_free();
    case_free(&a), case_free(&c), linear_free(&w);
}

static void test_graph(void) {
    static const Span few[][3] = {{{1, 1}, {65, 1}, {4097, 1}}, {{4097, 1}, {64, 1}, {63, 1}}};
    static const Span many[][3] = {{{100, 40}, {65, 1}, {4097, 1}},
                                   {{4097, 1}, {63, 1}, {3000, 40}}};
    try_graph(16, false, few[0], few[1]);
    try_graph(16, true, many[0], many[1]);
}

// ---- mla_attention: prompts ---------------------------------------------------------------------

// Row i of o is row[i] of the twin's. The bounds are case_compare's: here keys and values are
// rounded, there queries and sums, which tells where scores are large; both are as far from what
// f64 gives.
static void prompts_compare(const Case *c, const Act *o, const RefAct *ref, const int *row) {
    int heads = c->heads, n = c->n, cols = heads * V_DIM, wrong = 0;
    size_t all = (size_t)o->stride * cols;
    bf16 *x = (bf16 *)fetch(o->x, all * 2);
    uint8_t *codes = (uint8_t *)fetch(o->q, all);
    float *scale = (float *)fetch(o->scale, all / V_DIM * 4), bad = 0;
    double error = 0, size = 1e-30;
    for (int i = 0; i < n * heads; i++) {
        const float *want = ref->x + (size_t)row[i / heads] * cols + i % heads * V_DIM;
        const bf16 *got = x + (size_t)i * V_DIM;
        size_t line = (size_t)(i % heads) * o->stride + i / heads;
        float most = 0, amax = MIN_AMAX;
        for (int d = 0; d < V_DIM; d++) {
            most = fmaxf(most, fabsf(want[d]));
            amax = fmaxf(amax, fabsf(bf16_value(got[d])));
        }
        wrong += scale[line] != amax / E4M3_MAX;
        for (int d = 0; d < V_DIM; d++) {
            float v = bf16_value(got[d]), e = v - want[d], of = v / scale[line];
            bad = worst(fabsf(e), 3 * 0x1p-8f * most, bad);
            error += (double)e * e, size += (double)want[d] * want[d];
            int chunk = d / 16 ^ i / heads % 8;
            float code = e4m3_value(codes[line * ROW_BYTES + chunk * 16 + d % 16]);
            wrong += !(fabsf(code - of) <= fmaxf(fabsf(code) * 0x1p-4f, 0x1p-10f));
        }
    }
    double relative = sqrt(error / size);
    CHECK(bad <= 1 && relative <= 5e-3 && wrong == 0,
          "prompts, %d heads, %d rows: %g of bound, relative %g, %d wrong codes", heads, n, bad,
          relative, wrong);
    printf("prompts, %d heads, %d rows, %d pages: %.2g of bound, relative %.2g\n", heads, n,
           c->n_pages, bad, relative);
    CHECK(poisoned(x + (size_t)n * cols, (all - (size_t)n * cols) * 2), "rows behind the last");
    free(x), free(codes), free(scale);
}

// As a step has it: step_begin says which rows come last, and have keys and values made.
static void try_prompts(int heads, const Span *spans, int n_seqs, int expanded) {
    int longest = 0, n;
    for (int i = 0; i < n_seqs; i++) longest = max_int(longest, spans[i].len);
    bf16 *cache;
    Case c = case_open(heads, spans, n_seqs, longest, &cache);
    n = c.n;
    size_t q_size = (size_t)n * heads * QK_DIM, rope_bytes = n * ROPE_DIM * 4;
    Linear w = kv_b_noise(heads), p = w;
    Act *o = act_poisoned(n, heads * V_DIM), *ref = ref_act_new(n, heads * V_DIM);
    bf16 *q = bf16_noise(q_size, 1), *moved_q = (bf16 *)xmalloc(q_size * 2);
    bf16 *query = (bf16 *)xmalloc(query_size(&c) * 2), *u = (bf16 *)xmalloc(u_size(&c) * 2);
    float *rope = (float *)xmalloc(rope_bytes), frequency[ROPE_DIM / 2];
    int *id = (int *)xmalloc(n * sizeof(int));
    for (int i = 0; i < ROPE_DIM / 2; i++) frequency[i] = powf(10000, -i / 32.f);
    for (int i = 0; i < n; i++) id[i] = i;
    Batch b = {n, id, c.position, c.seq, c.pages, c.max_pages, NULL, 0}, there;
    ref_rope_angles(rope, frequency, c.position, n);
    ref_mla_attention(ref, query, u, q, cache, &w, rope, SCALE, heads, &b);

    place_linear(&p, PLACE_KV_B);
    plan_open(n, heads);
    step.heads = heads;
    step_begin(&there, &b);
    CHECK(step.expanded == expanded, "%d heads: %d rows are expanded, want %d", heads,
          step.expanded, expanded);
    int *row = (int *)fetch(there.id, n * sizeof(int));
    for (int i = 0; i < n; i++)
        memcpy(moved_q + (size_t)i * heads * QK_DIM, q + (size_t)row[i] * heads * QK_DIM,
               heads * QK_DIM * 2);
    float *angles = (float *)room(NULL, rope_bytes);
    rope_angles(angles, frequency, there.position, n);
    mla_attention(o, (bf16 *)room(NULL, query_size(&c) * 2), (bf16 *)room(NULL, u_size(&c) * 2),
                  (bf16 *)room(moved_q, q_size * 2),
                  (bf16 *)room(c.swizzled_cache, cache_size(&c) * 2), &p, angles, SCALE, heads,
                  &there);
    step_end();
    step.heads = step.room = step.expanded = 0;
    prompts_compare(&c, o, (const RefAct *)ref, row);
    CHECK(rooms_close(), "guards");
    place_free();
    case_free(&c), linear_free(&w), act_free(o), ref_act_free(ref);
    free(cache), free(q), free(moved_q), free(query), free(u), free(rope), free(id), free(row);
}

template <int N> static void try_prompts(int heads, const Span (&spans)[N], int expanded) {
    try_prompts(heads, spans, N, expanded);
}

static void test_prompts(void) {
    try_prompts(4, {{65, 65}, {70, 1}, {129, 128}}, 193);
    try_prompts(16, {{200, 1}, {130, 130}, {63, 63}}, 130);
    if (quick()) return;
    for (int rows : {64, 127, 128, 129, 200}) try_prompts(16, {{rows, rows}}, rows);
    for (int before : {1, 63, 64, 65, 127}) try_prompts(16, {{before + 160, 160}, {3, 1}}, 160);
    try_prompts(16, {{4497, 400}}, 400);
    try_prompts(16, {{20000, 1}, {200, 200}, {64, 1}, {65, 65}, {4297, 200}, {1, 1}, {63, 8}}, 465);
    try_prompts(4, {{200, 200}, {4097, 1}, {300, 300}, {2, 2}}, 500);
    try_prompts(8, {{1025, 1025}, {64, 1}, {700, 260}}, 1285);
    try_prompts(128, {{150, 150}, {65, 1}}, 150);
    try_prompts(4, {{2000, 180}}, 0);    // there is no room
    try_prompts(16, {{4097, 100}}, 0);   // it would be more work
    try_prompts(16, {{1025, 1025}}, 1025);
}

// ---- Times --------------------------------------------------------------------------------------
// One of 8 ranks' heads. Pages and weights take turns, so that they come from memory; u and the
// queries lie in L2, as in a step.

enum { HEADS = 16, POOL = 32768, LAYERS = 32, MOST = 4096 };  // pages, 2.4 GB; of weights; rows

static struct {
    bf16 *pages, *q, *query, *u;
    uint8_t *bricks;  // [LAYERS]
    float *scale, *rope;
    double ceiling;   // GB/s
} pool;

static Linear layer_kv_b(int turn) {
    return (Linear){HEADS * KV_DIM, LATENT_DIM, DTYPE_F8_E4M3,
                    pool.bricks + (size_t)(turn % LAYERS) * HEADS * HEAD_BRICKS,
                    (uint8_t *)pool.scale};
}

// n sequences of `len` tokens, or one prompt of n tokens (len 0), `turns` times in other pages.
static Batch bench_batch(int n, int len, int turns) {
    int seqs = len ? n : 1, per = units(len ? len : n, PAGE), count = turns * seqs * per;
    int *position = (int *)xmalloc(n * sizeof(int)), *seq = (int *)xmalloc(n * sizeof(int));
    int *pages = (int *)xmalloc(count * sizeof(int));
    for (int i = 0; i < n; i++) position[i] = len ? len - 1 : i, seq[i] = len ? i : 0;
    for (int i = 0; i < count; i++) pages[i] = (unsigned)i * 20021 % POOL;  // odd: each once
    Batch b = {n, NULL, (int *)room(position, n * sizeof(int)), (int *)room(seq, n * sizeof(int)),
               (int *)room(pages, count * sizeof(int)), per, NULL, 0};
    check(cudaStreamSynchronize(stream), "copy");
    free(position), free(seq), free(pages);
    step.prompts = !len;
    return b;
}

static void bench_attend(const char *name, int heads, int n, int len, const char *peer) {
    int pages = (len ? n : 1) * units(len ? len : n, PAGE);
    int turns = !len ? 3 : pages > 4096 ? 8 : 64, turn = 0;
    Batch b = bench_batch(n, len, turns), now = b;
    float plan_us = microseconds([&] { mla_plan(&b, heads); }, 20);
    float us = microseconds([&] {
        now.pages = b.pages + (size_t)(turn++ % turns) * pages;
        mla_attend(pool.u, pool.query, pool.pages, SCALE, heads, &now);
    }, turns);
    double pairs = len ? (double)n * len : (double)n * (n + 1) / 2;
    double gbs = (len ? (double)n * len : n) * CACHE_DIM * 2 / us * 1e-3;
    printf("note: %-17s %2d heads: %6.1f us, %4.0f GB/s, %3.0f %% of reading, %4.0f TFLOPS, "
           "plan %4.1f us%s\n", name, heads, us, gbs, 100 * gbs / pool.ceiling,
           pairs * heads * 2 * (CACHE_DIM + LATENT_DIM) / us * 1e-6, plan_us, peer);
    rooms_close();
}

static void bench_projections(int n) {
    int turn = 0, repeat = n > 256 ? 8 : LAYERS;
    Act *o = act_new(n, HEADS * V_DIM);
    float query_us = microseconds([&] {
        Linear w = layer_kv_b(turn++);
        mla_query(pool.query, pool.q, &w, pool.rope, HEADS, n);
    }, repeat);
    float value_us = microseconds([&] {
        Linear w = layer_kv_b(turn++);
        mla_value(o, pool.u, &w, HEADS, n);
    }, repeat);
    double half_bytes = HEADS * HEAD_BRICKS / 2;
    double query_bytes = half_bytes + (double)n * HEADS * (QK_DIM + CACHE_DIM) * 2;
    double value_bytes = half_bytes + (double)n * HEADS * (LATENT_DIM * 2 + V_DIM * 3);
    printf("note: %4d rows: mla_query %6.2f us, %4.0f GB/s; mla_value %6.2f us, %4.0f GB/s\n", n,
           query_us, query_bytes / query_us * 1e-3, value_us, value_bytes / value_us * 1e-3);
    act_free(o);
}

// The stages in a row, as a layer has them.
static void bench_chain(int n, int len) {
    int turn = 0, pages = n * units(len, PAGE);
    Batch b = bench_batch(n, len, LAYERS), now = b;
    Act *o = act_new(n, HEADS * V_DIM);
    mla_plan(&b, HEADS);
    float us = microseconds([&] {
        Linear w = layer_kv_b(turn);
        now.pages = b.pages + (size_t)(turn++ % LAYERS) * pages;
        mla_query(pool.query, pool.q, &w, pool.rope, HEADS, n);
        mla_attend(pool.u, pool.query, pool.pages, SCALE, HEADS, &now);
        mla_value(o, pool.u, &w, HEADS, n);
    }, LAYERS);
    printf("note: %d x %d tokens: query, attend and value take %.1f us a layer\n", n, len, us);
    rooms_close();
    act_free(o);
}

// A prompt's stages on both ways.
static void bench_prompt(int n, const char *peer) {
    enum { TURNS = 3 };
    int turn = 0, pages = units(n, PAGE), *zeros = (int *)xcalloc(n + pages, sizeof(int));
    Batch b = bench_batch(n, 0, TURNS), now = b, there;
    Act *o = act_new(n, HEADS * V_DIM);
    auto attend = [&] {
        Linear w = layer_kv_b(turn);
        now.pages = b.pages + (size_t)(turn++ % TURNS) * pages;
        mla_attention(o, pool.query, pool.u, pool.q, pool.pages, &w, pool.rope, SCALE, HEADS, &now);
    };
    mla_plan(&b, HEADS);
    float absorbed = microseconds(attend, 2 * TURNS);
    int *position = (int *)fetch(b.position, n * sizeof(int));
    Batch host = {n, position, position, zeros, zeros, pages, NULL, 0};
    step_begin(&there, &host);
    float us = microseconds(attend, 2 * TURNS);
    double operations = (double)n * (n + 1) * HEADS * (QK_DIM + V_DIM);
    printf("note: prompt of %d: query, attend, value %.1f us; with keys and values %.1f us, %d "
           "rows, %.0f TFLOPS%s\n", n, absorbed, us, step.expanded, operations / us * 1e-6, peer);
    step.expanded = 0;
    rooms_close();
    act_free(o), free(zeros), free(position);
}

static void *pool_room(size_t bytes) { return filled(place_alloc(bytes), bytes); }

static void bench(void) {
    pool.pages = (bf16 *)pool_room((size_t)POOL * PAGE_BYTES);
    pool.q = (bf16 *)pool_room((size_t)MOST * HEADS * QK_DIM * 2);
    pool.query = (bf16 *)pool_room((size_t)MOST * HEADS * CACHE_DIM * 2);
    pool.u = (bf16 *)pool_room((size_t)MOST * HEADS * LATENT_DIM * 2);
    pool.bricks = (uint8_t *)pool_room((size_t)LAYERS * HEADS * HEAD_BRICKS);
    pool.scale = (float *)pool_room(HEADS * 2 * LATENT_SCALES * 4);
    pool.rope = (float *)pool_room(MOST * ROPE_DIM * 4);
    mla_reserve(MOST, HEADS);
    size_t bytes = (size_t)POOL * PAGE_BYTES / PIECE * PIECE;
    pool.ceiling = bytes * 1e-3 / read_us((uint8_t *)pool.pages, bytes, 1);
    printf("note: reading alone: %.0f GB/s\n", pool.ceiling);
    bench_attend("1 x 1024", 16, 1, 1024, "; FlashMLA 11.1 us on an H200");
    bench_attend("1 x 32768", 16, 1, 32768, "; FlashMLA 44.0 us");
    bench_attend("8 x 8192", 16, 8, 8192, "; FlashMLA 31.0 us");
    bench_attend("64 x 8192", 16, 64, 8192, "; FlashMLA 150.4 us");
    bench_attend("128 x 4096", 16, 128, 4096, "; FlashMLA 146.5 us");
    bench_attend("64 x 8192", 8, 64, 8192, "");
    bench_attend("prompt of 1024", 16, 1024, 0, "");
    bench_attend("prompt of 4096", 16, 4096, 0, "");
    bench_prompt(1024, "; cuDNN, attention alone, 21.7 us");
    bench_prompt(4096, "; cuDNN 183.7 us");
    for (int n : {1, 8, 64, 128, 1024, 4096}) bench_projections(n);
    bench_chain(1, 1024), bench_chain(1, 8192), bench_chain(8, 8192);
    check(cudaStreamSynchronize(stream), "bench");
    place_free();
}

int main(int argc, char **argv) {
    static const Part parts[] = {{"query", test_query},   {"value", test_value},
                                 {"attend", test_attend}, {"graph", test_graph},
                                 {"prompts", test_prompts}, {"bench", bench}};
    return run_parts(parts, 6, argc, argv);
}
