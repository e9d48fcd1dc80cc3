// tests/test_gemm.cu: the products of kernels.cu against the C twin, and beside them what a kernel
// that only reads the same bytes takes.
//
// Both twins get the same e4m3 codes and scales, so that only the order of sums in f32 differs:
// results may lie on two sides of a rounding to bf16. Behind a gate the quantised hidden values can
// differ, too, each by one step of e4m3.
#include "test_cuda.h"

// At most so far beyond a rounding to bf16, in units of a row's root mean square. The tensor cores'
// sums of e4m3 products keep 14 bits.
static const double EXACT_LIMIT = 1e-4, WGMMA_LIMIT = 4e-3, GATED_LIMIT = 6e-2;

enum { N_QUICK = 4 };
static const int QUICK[N_QUICK] = {1, 8, 9, 33};  // rows, one number for each kernel

// ---- Data ---------------------------------------------------------------------------------------

static double bell(void) { return noise() + noise() + noise(); }  // of size 1

static uint8_t e4m3_code(double v) {  // nearest; ties don't matter here
    double a = fabs(v);
    int sign = v < 0 ? 0x80 : 0, e = 0;
    if (a >= 448) return sign | 0x7e;
    if (a < 0x1p-6) return sign | (int)rint(a * 512);
    frexp(a, &e);
    return sign | ((e + 6) * 8 + (int)rint((a * exp2(1 - e) - 1) * 8));
}

// Codes as files of weights have them, drawn from a table, or bf16.
static Linear linear_noise(int out, int in, DType dtype) {
    static uint8_t table[65536];
    static bool made;
    size_t n = (size_t)out * in, blocks = (size_t)units(out, BLOCK) * (in / BLOCK);
    if (dtype == DTYPE_BF16)
        return (Linear){out, in, dtype, (uint8_t *)bf16_noise(n, sqrt(3.0 / in)), NULL};
    for (int i = 0; i < 65536 && !made; i++) table[i] = e4m3_code(60 * bell());
    made = true;
    uint8_t *data = (uint8_t *)xmalloc(n);
    float *scale = (float *)xmalloc(blocks * sizeof *scale);
    for (size_t i = 0; i < n; i += 4) {
        uint64_t bits = random_bits();
        for (int k = 0; k < 4; k++) data[i + k] = table[bits >> 16 * k & 0xffff];
    }
    for (size_t i = 0; i < blocks; i++) scale[i] = (1 + 0.5 * noise()) / (60 * sqrt(in));
    return (Linear){out, in, dtype, data, (uint8_t *)scale};
}

// n normed rows, quantised by the C twin, and the same for the GPU. What lies behind them is NaN.
static Act *rows_noise(Act **ref, int n, int cols) {
    Act *a = act_poisoned(n, cols);
    size_t size = (size_t)a->stride * cols;
    bf16 *x = bf16_noise((size_t)n * cols, 1);
    float *ones = (float *)xmalloc(cols * sizeof *ones);
    for (size_t i = 0; i < (size_t)n * cols; i++)  // groups of several sizes
        x[i] = round_half(bf16_value(x[i]) * (1 + i / BLOCK % 5) + 0.1 * bell());
    for (int i = 0; i < cols; i++) ones[i] = 1;
    Vector gain = {cols, DTYPE_F32, (uint8_t *)ones};
    *ref = ref_act_new(n, cols);
    ref_add_norm(x, *ref, NULL, &gain, 1e-6f, n);
    const RefAct *r = (const RefAct *)*ref;
    uint8_t *q = (uint8_t *)fetch(a->q, size);
    float *scale = (float *)fetch(a->scale, size / BLOCK * 4);
    for (int row = 0; row < n; row++)
        for (int i = 0; i < cols; i++) {
            size_t from = (size_t)row * cols + i, line = (size_t)(i / BLOCK) * a->stride + row;
            size_t to = line * ROW_BYTES + ((i % BLOCK / 16 ^ row % 8) << 4) + i % 16;
            q[to] = e4m3_code(r->q[from]);
            scale[line] = r->scale[from / BLOCK];
            x[from] = round_half(r->x[from]);
        }
    put(a->x, x, (size_t)n * cols * 2), put(a->q, q, size), put(a->scale, scale, size / BLOCK * 4);
    free(x), free(ones), free(q), free(scale);
    return a;
}

// As much scratch as a step of n rows reserves, poisoned and guarded.
static void scratch_open(int n, const Config *c) {
    scratch = (float *)room(NULL, products_room(n, c) * sizeof *scratch);
}

// ---- How far off --------------------------------------------------------------------------------

// The largest |got - want| beyond what rounding may make, 2^-7 of the value where `rounded`, in
// units of the row's size. A NaN is infinitely far.
static double distance(const float *got, const float *want, int n, int cols, bool rounded) {
    double most = 0;
    for (int row = 0; row < n; row++, got += cols, want += cols) {
        double square = 1e-30;
        for (int i = 0; i < cols; i++) square += (double)want[i] * want[i];
        for (int i = 0; i < cols; i++) {
            double off = fabs((double)got[i] - want[i]) - (rounded ? fabs(want[i]) * 0x1p-7 : 0);
            off /= sqrt(square / cols);
            if (!(off <= most)) most = off == off ? off : INFINITY;
        }
    }
    return most;
}

// The root mean square of a row's difference in units of the row's own, of the worst row: what a
// step of e4m3 in one hidden value makes in one result may be large, but not in all.
static double row_distance(const float *got, const float *want, int n, int cols) {
    double most = 0;
    for (int row = 0; row < n; row++, got += cols, want += cols) {
        double square = 1e-30, off = 0;
        for (int i = 0; i < cols; i++) {
            square += (double)want[i] * want[i];
            off += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        }
        off = sqrt(off / square);
        if (!(off <= most)) most = off == off ? off : INFINITY;
    }
    return most;
}

static void check_off(const char *name, int out, int in, int n, double off, double limit) {
    CHECK(off <= limit, "%s, %d x %d, %d rows: off by %g of a row's size", name, out, in, n, off);
    printf("%s, %d x %d, %d rows: off by %.2g, at most %g\n", name, out, in, n, off, limit);
}

// y on the device has room for `most` rows, of which n are right and the others untouched.
static void check_rows(const char *name, const bf16 *y, const bf16 *want, int n, int most, int out,
                       int in, double limit) {
    size_t size = (size_t)n * out;
    bf16 *all = (bf16 *)fetch(y, (size_t)most * out * 2);
    float *f = (float *)xmalloc(size * 4), *g = (float *)xmalloc(size * 4);
    for (size_t i = 0; i < size; i++) f[i] = bf16_value(all[i]), g[i] = bf16_value(want[i]);
    double off = limit == GATED_LIMIT ? row_distance(f, g, n, out) : distance(f, g, n, out, true);
    check_off(name, out, in, n, off, limit);
    CHECK(poisoned(all + size, ((size_t)most * out - size) * 2), "%s, %d rows: more were written",
          name, n);
    free(all), free(f), free(g);
}

// ---- One matrix ---------------------------------------------------------------------------------

static void try_linear(int out, int in, DType dtype, const int *rows, int n_tries) {
    Config c = config_of(in, 0, 1, 1, 0);
    int most = rows[n_tries - 1];
    Linear w = linear_noise(out, in, dtype), p = w;
    Act *ref, *a = rows_noise(&ref, most, in);
    bf16 *want = (bf16 *)xmalloc((size_t)most * out * 2);
    place_linear(&p, PLACE_MATRIX);
    ref_linear(want, ref, &w, most);
    for (int i = 0; i < n_tries; i++) {
        bf16 *y = (bf16 *)room(NULL, (size_t)most * out * 2);
        scratch_open(rows[i], &c);
        linear(y, a, &p, rows[i]);
        check_rows(dtype == DTYPE_BF16 ? "bf16" : "e4m3", y, want, rows[i], most, out, in,
                   dtype == DTYPE_BF16 ? EXACT_LIMIT : WGMMA_LIMIT);
        CHECK(rooms_close(), "guards");
    }
    place_free();
    linear_free(&w), act_free(a), ref_act_free(ref), free(want);
}

// Two matrices of one input; the second one ends in half a block.
static void try_pair(int out0, int out1, int in, const int *rows, int n_tries) {
    Config c = config_of(in, 0, 1, 1, 0);
    int out[2] = {out0, out1}, most = rows[n_tries - 1];
    Linear w[2], p[2];
    Act *ref, *a = rows_noise(&ref, most, in);
    bf16 *want[2], *y[2];
    for (int i = 0; i < 2; i++) {
        p[i] = w[i] = linear_noise(out[i], in, DTYPE_F8_E4M3);
        want[i] = (bf16 *)xmalloc((size_t)most * out[i] * 2);
        place_linear(&p[i], PLACE_MATRIX);
    }
    ref_linear_pair(want[0], want[1], ref, &w[0], &w[1], most);
    for (int i = 0; i < n_tries; i++) {
        for (int k = 0; k < 2; k++) y[k] = (bf16 *)room(NULL, (size_t)most * out[k] * 2);
        scratch_open(rows[i], &c);
        linear_pair(y[0], y[1], a, &p[0], &p[1], rows[i]);
        for (int k = 0; k < 2; k++)
            check_rows("pair", y[k], want[k], rows[i], most, out[k], in, WGMMA_LIMIT);
        CHECK(rooms_close(), "guards");
    }
    place_free();
    for (int i = 0; i < 2; i++) linear_free(&w[i]), free(want[i]);
    act_free(a), ref_act_free(ref);
}

static void test_linear(void) {
    static const int many[] = {300, 2000};
    const int *rows = quick() ? QUICK : ROWS, n = quick() ? N_QUICK : (int)N_COUNTS;
    try_linear(256, 256, DTYPE_F8_E4M3, rows, n);
    try_linear(576, 256, DTYPE_F8_E4M3, rows, n);
    try_linear(512, 1152, DTYPE_BF16, rows, n);
    try_pair(256, 576, 256, rows, n);
    if (quick()) return;
    try_pair(1536, 576, 7168, ROWS, N_COUNTS);
    try_linear(7168, 2048, DTYPE_F8_E4M3, ROWS, N_COUNTS);
    try_linear(3072, 1536, DTYPE_F8_E4M3, ROWS, N_COUNTS);
    try_linear(3072, 1536, DTYPE_F8_E4M3, many, 2);
}

// Rows from here and there, in f32, summed over parts. (logits and the router)
static void try_product(int out, int in, int n, int parts) {
    int most = n + 5, *row = (int *)xmalloc(n * sizeof *row);
    size_t size = (size_t)n * out;
    Linear w = linear_noise(out, in, DTYPE_BF16), p = w;
    Act *ref, *a = rows_noise(&ref, most, in);
    float *want = (float *)xmalloc(size * 4);
    for (int i = 0; i < n; i++) row[i] = (i * 7 + 3) % most;
    place_linear(&p, PLACE_MATRIX);
    float *y = (float *)room(NULL, parts * size * 4);
    product_bf16(y, a, &p, (int *)room(row, n * sizeof *row), n, parts);
    ref_logits(want, ref, &w, row, n);
    float *got = (float *)fetch(y, parts * size * 4);
    for (size_t i = size; i < parts * size; i++) got[i % size] += got[i];
    check_off("rows of bf16", out, in, n, distance(got, want, n, out, false), EXACT_LIMIT);
    CHECK(rooms_close(), "guards");
    place_free();
    linear_free(&w), act_free(a), ref_act_free(ref), free(row), free(want), free(got);
}

static void test_product(void) {
    try_product(256, 256, 3, 1), try_product(768, 256, 33, 1), try_product(16, 256, 40, 4);
    if (quick()) return;
    for (int n : {1, 9, 77}) try_product(256, 7168, n, 8);
    for (int n : {1, 8, 33, 130}) try_product(16160, 7168, n, 1);
}

// ---- Gated ones ---------------------------------------------------------------------------------

static Mlp mlp_noise(int hidden, int width) {
    return (Mlp){linear_noise(width, hidden, DTYPE_F8_E4M3),
                 linear_noise(width, hidden, DTYPE_F8_E4M3),
                 linear_noise(hidden, width, DTYPE_F8_E4M3)};
}

static void mlp_free(Mlp *m) {
    linear_free(&m->gate_proj), linear_free(&m->up_proj), linear_free(&m->down_proj);
}

static void try_mlp(int hidden, int width, const int *rows, int n_tries) {
    Config c = config_of(hidden, 0, 1, 1, 0);
    int most = rows[n_tries - 1];
    Mlp m = mlp_noise(hidden, width), p = m;
    Act *ref, *a = rows_noise(&ref, most, hidden), *ref_h = ref_act_new(most, width);
    bf16 *want = (bf16 *)xmalloc((size_t)most * hidden * 2);
    c.intermediate_size = width;
    place_mlp(&p, 1, NULL);
    ref_mlp(want, ref_h, ref, &m, most);
    for (int i = 0; i < n_tries; i++) {
        bf16 *y = (bf16 *)room(NULL, (size_t)most * hidden * 2);
        Act *h = act_poisoned(most, width);
        scratch_open(rows[i], &c);
        mlp(y, h, a, &p, rows[i]);
        check_rows("mlp", y, want, rows[i], most, hidden, width, GATED_LIMIT);
        CHECK(rooms_close(), "guards");
        act_free(h);
    }
    place_free();
    mlp_free(&m), act_free(a), ref_act_free(ref), ref_act_free(ref_h), free(want);
}

static void test_mlp(void) {
    try_mlp(256, 256, quick() ? QUICK : ROWS, quick() ? N_QUICK : (int)N_COUNTS);
    if (!quick()) try_mlp(7168, 2304, ROWS, N_COUNTS);
}

// Routes n rows to every n_experts / used-th expert, more often to the first ones, so that lists
// are empty, short and long. `used` must not be a multiple of 3, 5 or 7.
static Routing routing_noise(const Config *c, int n, int used) {
    static const int steps[] = {1, 3, 5, 7};
    int k = c->num_experts_per_tok, apart = c->n_routed_experts / used;
    Routing r = ref_routing_new(n, c);
    int *count = (int *)xcalloc(c->n_routed_experts, sizeof *count);
    for (int row = 0; row < n; row++) {
        double u = (noise() + 1) / 2;
        int first = u * u * used, by = steps[random_bits() % 4];
        for (int i = row * k; i < (row + 1) * k; i++, first += by) {
            r.expert[i] = first % used * apart, r.weight[i] = 0.3 + 0.2 * noise();
            count[r.expert[i]]++;
        }
    }
    r.start[0] = 0;
    for (int e = 0; e < c->n_routed_experts; e++) r.start[e + 1] = r.start[e] + count[e];
    for (int i = n * k; i-- > 0;) r.pair[r.start[r.expert[i]] + --count[r.expert[i]]] = i;
    free(count);
    return r;
}

static Routing routing_copy(const Routing *r, const Config *c, int n) {
    size_t pairs = (size_t)n * c->num_experts_per_tok * 4;
    return (Routing){(int *)room(r->expert, pairs), (float *)room(r->weight, pairs),
                     (int *)room(r->start, (c->n_routed_experts + 1) * 4),
                     (int *)room(r->pair, pairs), NULL};
}

static void try_experts(const Config *c, int n_used, const int *rows, int n_tries) {
    int hidden = c->hidden_size, width = c->moe_intermediate_size, n_experts = c->n_routed_experts;
    int most = rows[n_tries - 1], slots = c->num_experts_per_tok + 1;
    Mlp *m = (Mlp *)xmalloc((n_experts + 1) * sizeof *m),
        *p = (Mlp *)xmalloc((n_experts + 1) * sizeof *p);
    for (int e = 0; e <= n_experts; e++) p[e] = m[e] = mlp_noise(hidden, width);
    Act *ref, *a = rows_noise(&ref, most, hidden), *ref_h = ref_act_new(most * slots, width);
    bf16 *want = (bf16 *)xmalloc((size_t)most * hidden * 2);
    place_mlp(p, n_experts, &p[n_experts]);
    for (int i = 0; i < n_tries; i++) {
        int n = rows[i];
        Routing r = routing_noise(c, n, n_used), d = routing_copy(&r, c, n);
        bf16 *y = (bf16 *)room(NULL, (size_t)most * hidden * 2);
        Act *h = act_poisoned(n * slots, width);
        scratch_open(n, c);
        moe_experts(y, h, a, &d, p, &p[n_experts], c, n);
        ref_moe_experts(want, ref_h, ref, &r, m, &m[n_experts], c, n);
        check_rows("experts", y, want, n, most, hidden, width, GATED_LIMIT);
        CHECK(rooms_close(), "guards");
        act_free(h), ref_routing_free(&r);
    }
    place_free();
    for (int e = 0; e <= n_experts; e++) mlp_free(&m[e]);
    act_free(a), ref_act_free(ref), ref_act_free(ref_h), free(m), free(p), free(want);
}

static void test_experts(void) {
    static const int few[] = {2, 8, 9, 257};
    static const int all[] = {1, 2, 3, 8, 9, 32, 33, 200, 220, 256, 257, 300};
    static const int large[] = {1, 2, 8, 31, 64, 256}, many[] = {300, 1001};
    Config tiny = config_of(256, 16, 4, 2, 4), odd = config_of(256, 11, 1, 1, 3);
    Config r1 = config_of(7168, 32, 4, 2, 8), deep = config_of(2048, 64, 4, 2, 8);
    tiny.moe_intermediate_size = 256, odd.moe_intermediate_size = 128;
    r1.moe_intermediate_size = 256, deep.moe_intermediate_size = 384;
    for (int used : {16, 8}) try_experts(&tiny, used, quick() ? few : all, quick() ? 4 : 12);
    if (quick()) return;
    try_experts(&odd, 11, all, 12);
    for (int used : {32, 16}) try_experts(&r1, used, large, 6);
    try_experts(&deep, 64, many, 2);
}

// ---- Times --------------------------------------------------------------------------------------
// Sizes are one of 8 ranks' of R1. Weights take turns, so that they come from memory.

static const size_t POOL_BYTES = (size_t)3000 << 20;
enum { HIDDEN = 7168, WIDTH = 256, EXPERTS = 256, TOP_K = 8 };

static uint8_t *pool, *pool_scales;

static int pool_copies(size_t bytes) { return min_int(POOL_BYTES / bytes, 100); }

static void bench_linear(const char *name, int out, int in, DType dtype, int n, int parts) {
    size_t bytes = (size_t)out * in * (dtype == DTYPE_BF16 ? 2 : 1);
    int copies = pool_copies(bytes), turn = 0;
    Act *a = act_filled(n, in);
    void *y = device_alloc((size_t)n * out * 4 * parts);
    float read = read_us(pool, bytes, copies), us = microseconds([&] {
        Linear w = {out, in, dtype, pool + turn++ % copies * bytes, pool_scales};
        if (dtype == DTYPE_BF16) product_bf16((float *)y, a, &w, NULL, n, parts);
        else linear((bf16 *)y, a, &w, n);
    }, n > 256 ? 10 : 100);
    printf("note: %-9s %5d x %4d, %4d rows: %7.2f us, %4.0f GB/s, reading takes %3.0f %%, "
           "%4.0f TFLOPS\n", name, out, in, n, us, bytes / us * 1e-3, 100 * read / us,
           2.0 * n * out * in / us * 1e-6);
    device_free(y), act_free(a);
}

// Routed evenly, as R1's router was trained to be; the layer's weights take turns with another's.
static void bench_experts(int n) {
    enum { LAYERS = 2, ROUTINGS = 8 };
    Config c = config_of(HIDDEN, EXPERTS, 8, 4, TOP_K);
    size_t up = (size_t)2 * WIDTH * HIDDEN, layer = (EXPERTS + 1) * up / 2 * 3;
    size_t scales = WIDTH / BLOCK * (HIDDEN / BLOCK) * sizeof(float);
    Mlp m[LAYERS][3];  // experts 0 and 1, and the shared one
    Routing r[ROUTINGS];
    Act *a = act_filled(n, HIDDEN), *h = act_new(n * (TOP_K + 1), WIDTH);
    bf16 *y = (bf16 *)device_alloc((size_t)n * HIDDEN * 2);
    int turn = 0, hit = 0;
    for (int i = 0; i < LAYERS * 3; i++) {
        int e = i % 3 == 2 ? EXPERTS : i % 3;
        uint8_t *gate = pool + i / 3 * layer + e * up, *scale = pool_scales + e * scales;
        uint8_t *down = pool + i / 3 * layer + (EXPERTS + 1) * up + e * (up / 2);
        m[i / 3][i % 3] = (Mlp){{WIDTH, HIDDEN, DTYPE_F8_E4M3, gate, scale},
                                {WIDTH, HIDDEN, DTYPE_F8_E4M3, gate, scale},
                                {HIDDEN, WIDTH, DTYPE_F8_E4M3, down, scale}};
    }
    for (int i = 0; i < ROUTINGS; i++) {
        float *score = (float *)xmalloc((size_t)n * EXPERTS * 4), none[EXPERTS] = {0};
        for (int k = 0; k < n * EXPERTS; k++) score[k] = noise();
        r[i] = routing_new(n, &c);
        put(r[i].sum, score, (size_t)n * EXPERTS * 4);
        Vector bias = {EXPERTS, DTYPE_F32, (uint8_t *)room(none, sizeof none)};
        route(&r[i], &bias, &c, n, 1);
        int *start = (int *)fetch(r[i].start, (EXPERTS + 1) * 4);
        for (int e = 0; e < EXPERTS; e++) hit += start[e + 1] > start[e];
        free(score), free(start);
    }
    float us = microseconds([&] {
        Mlp *w = m[turn % LAYERS];
        moe_experts(y, h, a, &r[turn++ / LAYERS % ROUTINGS], w, w + 2, &c, n);
    }, n > 256 ? 8 : 32);
    double bytes = ((double)hit / ROUTINGS + 1) * up * 3 / 2;
    float read = read_us(pool, (size_t)bytes / PIECE * PIECE, pool_copies(bytes));
    printf("note: experts, %3d hit, %4d rows: %7.2f us, %4.0f GB/s, reading takes %3.0f %%, "
           "%4.0f TFLOPS\n", hit / ROUTINGS, n, us, bytes / us * 1e-3, 100 * read / us,
           2.0 * n * (TOP_K + 1) * up * 3 / 2 / us * 1e-6);
    for (int i = 0; i < ROUTINGS; i++) routing_free(&r[i]);
    device_free(y), act_free(a), act_free(h), rooms_close();
}

static void bench(void) {
    Config c = config_of(HIDDEN, EXPERTS, 8, 4, TOP_K);
    c.moe_intermediate_size = WIDTH, c.intermediate_size = 18432 / 8;
    pool = (uint8_t *)filled(device_alloc(POOL_BYTES), POOL_BYTES);
    pool_scales = (uint8_t *)filled(device_alloc(4 << 20), 4 << 20);
    scratch = (float *)device_alloc(products_room(4096, &c) * sizeof *scratch);
    printf("note: reading alone: %.0f GB/s\n", 1e-3 * (1900 << 20) / read_us(pool, 1900 << 20, 1));
    for (int n : {1, 8, 32, 64, 128, 256, 512, 1024, 4096}) {
        bench_linear("qkv_a", 2112, HIDDEN, DTYPE_F8_E4M3, n, 1);
        bench_linear("q_b", 3072, 1536, DTYPE_F8_E4M3, n, 1);
        bench_linear("o", HIDDEN, 2048, DTYPE_F8_E4M3, n, 1);
        bench_linear("gate, up", 4608, HIDDEN, DTYPE_F8_E4M3, n, 1);
        bench_linear("router", EXPERTS, HIDDEN, DTYPE_BF16, n, router_parts(&c, n));
        if (n <= 256) bench_linear("lm_head", 16160, HIDDEN, DTYPE_BF16, n, 1);
    }
    for (int n : {1, 2, 8, 32, 64, 256, 512, 1024, 4096}) bench_experts(n);
    device_free(pool), device_free(pool_scales), device_free(scratch);
}

int main(int argc, char **argv) {
    static const Part parts[] = {{"linear", test_linear}, {"product", test_product},
                                 {"mlp", test_mlp},       {"experts", test_experts},
                                 {"bench", bench}};
    return run_parts(parts, 5, argc, argv);
}
