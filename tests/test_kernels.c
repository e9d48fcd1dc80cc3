// tests/test_kernels.c: the stages of kernels.c one by one, against hand values and against
// the V3 report's formulas in naive double loops. kernels.c is included, so that what is static
// (rounding, the parts of an Act, the threads) can be reached. All weights lie at odd addresses, as
// a checkpoint may have them.
//
// A stage is compared on the inputs that it really got, rounded as they are; so the tolerances hold
// only its own errors: bf16's result is off by at most 2^-8 of itself, and a sum in f32 of up to
// some thousand terms in 16 lanes by less than 2^-20 of the sum of the terms' sizes.
#include "../kernels.c"
#include "test.h"

enum {
    MAX_N = 33,  // two full blocks of rows and one more
    HIDDEN = 256, HEADS = 3, Q_LORA = 128, VOCAB = 77, DENSE = 256,
    EXPERTS = 12, TOP_K = 4, WIDTH = 128,
};

// ---- Data ---------------------------------------------------------------------------------------

static double noise(void) {  // even in -1..1, always the same numbers
    static uint64_t state = 0x9e3779b97f4a7c15;
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (double)(int64_t)(state * 0x2545f4914f6cdd1d) * 0x1p-63;
}

static void *rooms[1024];
static int n_rooms;

static uint8_t *room(size_t bytes) {  // at an odd address, with nothing behind it
    assert(n_rooms < 1024);
    return (uint8_t *)(rooms[n_rooms++] = xmalloc(bytes + 1)) + 1;
}

static void store(uint8_t *data, size_t i, DType dtype, float v) {
    uint16_t half = to_bf16(v);
    if (dtype == DTYPE_BF16) memcpy(data + 2 * i, &half, 2);
    else memcpy(data + 4 * i, &v, 4);
}

static Vector vector_new(int dim, DType dtype, double middle, double spread) {
    Vector v = {dim, dtype, room((size_t)dim * 4)};
    for (int i = 0; i < dim; i++) store((uint8_t *)v.data, i, dtype, middle + spread * noise());
    return v;
}

// Random, with rows of about unit length. e4m3 codes are drawn from all that are no NaN, whose root
// mean square is 94; each block's scale is another.
static Linear linear_new(int out, int in, DType dtype) {
    size_t n = (size_t)out * in, blocks = (size_t)units(out, BLOCK) * (in / BLOCK);
    uint8_t *data = room(n * (dtype == DTYPE_F8_E4M3 ? 1 : dtype == DTYPE_BF16 ? 2 : 4));
    uint8_t *scale = dtype == DTYPE_F8_E4M3 ? room(blocks * 4) : NULL;
    for (size_t i = 0; i < n; i++)
        if (scale) data[i] = (int)((noise() + 1) * 63.4) | (noise() < 0 ? 0x80 : 0);
        else store(data, i, dtype, noise() * sqrt(3.0 / in));
    for (size_t i = 0; scale && i < blocks; i++)
        store(scale, i, DTYPE_F32, (1 + 0.5 * noise()) / (94 * sqrt(in)));
    return (Linear){.out = out, .in = in, .dtype = dtype, .data = data, .scale = scale};
}

static Mlp mlp_new(int width) {
    return (Mlp){linear_new(width, HIDDEN, DTYPE_F8_E4M3), linear_new(width, HIDDEN, DTYPE_F8_E4M3),
                 linear_new(HIDDEN, width, DTYPE_F8_E4M3)};
}

static void fill(bf16 *x, size_t n, double size) {
    for (size_t i = 0; i < n; i++) x[i] = to_bf16(size * noise());
}

static void act_fill(Act *a) {
    for (int row = 0; row < a->rows; row++)
        for (int i = 0; i < a->cols; i++)
            a->x[(size_t)row * a->cols + i] = round_bf16(noise() * (i % 50 ? 1 : 20));
    for (int row = 0; row < a->rows; row++)
        for (int group = 0; group < a->cols / BLOCK; group++) quantise(a, row, group);
}

// ---- The reference's numbers --------------------------------------------------------------------

// To `bits` bits of mantissa, with the smallest normal number 2^least: in double, without bit
// tricks.
static double rounded(double v, int bits, int least) {
    int e;
    if (v == 0 || !isfinite(v)) return v;
    frexp(v, &e);
    int step = (e - 1 < least ? least : e - 1) - bits;
    return ldexp(rint(ldexp(v, -step)), step);
}

static double rounded_bf16(double v) {
    double r = rounded(v, 7, -126);
    return fabs(r) > 0x1.fep127 ? copysign(INFINITY, r) : r;
}

static double rounded_e4m3(double v) {
    double r = rounded(v, 3, -6);
    return fabs(r) > 448 ? copysign(448, r) : r;
}

static double e4m3(int code) {
    int e = code >> 3 & 15, m = code & 7;
    double v = e ? ldexp(1 + m / 8.0, e - 7) : ldexp(m, -9);
    return code & 0x80 ? -v : v;
}

static double e4m3_table[256];  // decoding is most of what a reference does

static double bf16_at(const uint8_t *data, size_t i) {
    uint32_t bits = (uint32_t)data[2 * i] << 16 | (uint32_t)data[2 * i + 1] << 24;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static double f32_at(const uint8_t *data, size_t i) {
    float f;
    memcpy(&f, data + 4 * i, 4);
    return f;
}

static double gain_at(const Vector *v, int i) {
    return v->dtype == DTYPE_BF16 ? bf16_at(v->data, i) : f32_at(v->data, i);
}

static double weight_at(const Linear *w, int row, int k) {  // its block's scale multiplies
    size_t i = (size_t)row * w->in + k;
    if (w->dtype == DTYPE_BF16) return bf16_at(w->data, i);
    if (w->dtype == DTYPE_F32) return f32_at(w->data, i);
    return e4m3_table[w->data[i]] * f32_at(w->scale, (size_t)(row / 128) * (w->in / 128) + k / 128);
}

typedef struct {
    double value, size;  // the sum of the terms, and of their sizes
} Sum;

static void add(Sum *s, double term) { s->value += term, s->size += fabs(term); }

// Row `row` of a times row `r` of w: quantised values with an e4m3 matrix, else the unquantised
// ones.
static Sum row_dot(const Act *a, int row, const Linear *w, int r) {
    Sum s = {0};
    for (int k = 0; k < w->in; k++) {
        size_t i = (size_t)row * a->cols + k;
        double x = w->dtype == DTYPE_F8_E4M3 ? (double)a->q[i] * a->scale[i / BLOCK] : a->x[i];
        add(&s, x * weight_at(w, r, k));
    }
    return s;
}

typedef struct {
    int total, wrong, first;
    double got, want, tolerance;  // of the first that is wrong
} Tally;

static void compare(Tally *t, double got, double want, double tolerance) {
    if (!(fabs(got - want) <= tolerance) && !t->wrong++)  // written so that a NaN is wrong
        t->first = t->total, t->got = got, t->want = want, t->tolerance = tolerance;
    t->total++;
}

static void compare_bf16(Tally *t, double got, Sum want) {
    compare(t, got, want.value, fabs(want.value) * 0x1p-8 + want.size * 0x1p-20);
}

#define CHECK_TALLY(t, ...)                                                                        \
    do {                                                                                           \
        char label[128];                                                                           \
        snprintf(label, sizeof label, __VA_ARGS__);                                                \
        CHECK((t).wrong == 0 && (t).total > 0,                                                     \
              "%s: %d of %d wrong, the first is %d: got %.9g, want %.9g +- %g", label, (t).wrong,  \
              (t).total, (t).first, (t).got, (t).want, (t).tolerance);                             \
    } while (0)

// ---- Numbers ------------------------------------------------------------------------------------

static bool same_number(float got, double want) {  // as a value: a NaN's bits don't count
    return want != want ? got != got : got == want;
}

// Rounding is monotone. So it is right everywhere if it is right at each value that a format has,
// at each tie between two, and at the floats next to these. For bf16 and e4m3 alike those are all
// upper halves of a float, beside lower halves that are nothing, almost nothing, a tie, and so on.
static void test_rounding(void) {
    static const uint32_t low[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
    int wrong_bf16 = 0, wrong_e4m3 = 0;
    uint32_t bad_bf16 = 0, bad_e4m3 = 0;
    for (uint32_t top = 0; top < 0x10000; top++)
        for (int i = 0; i < 6; i++) {
            uint32_t bits = top << 16 | low[i];
            float f;
            memcpy(&f, &bits, 4);
            bool value = same_number(f32(to_bf16(f)), rounded_bf16(f));
            bool sign = to_bf16(f) >> 15 == bits >> 31;  // of zeros and NaNs, too
            if (!(value && sign) && !wrong_bf16++) bad_bf16 = bits;
            if (!same_number(round_e4m3(f), rounded_e4m3(f)) && !wrong_e4m3++) bad_e4m3 = bits;
        }
    CHECK(wrong_bf16 == 0, "bf16: %d wrong, the first is %08x", wrong_bf16, bad_bf16);
    CHECK(wrong_e4m3 == 0, "e4m3: %d wrong, the first is %08x", wrong_e4m3, bad_e4m3);
    for (int code = 0; code < 0x7e; code++) {
        float tie = (e4m3(code) + e4m3(code + 1)) / 2, even = e4m3(code & 1 ? code + 1 : code);
        CHECK(round_e4m3(e4m3(code)) == (float)e4m3(code), "code %02x stays", code);
        CHECK(round_e4m3(tie) == even && round_e4m3(-tie) == -even, "tie above code %02x", code);
        CHECK(round_e4m3(nextafterf(tie, 0)) == (float)e4m3(code), "below the tie of %02x", code);
        CHECK(round_e4m3(nextafterf(tie, 500)) == (float)e4m3(code + 1), "above that of %02x",
              code);
    }
}

static void test_decode(void) {
    uint8_t codes[2 * BLOCK];
    float decoded[2 * BLOCK];
    for (int code = 0; code < 256; code++) codes[code] = code;
    decode_block(decoded, codes, DTYPE_F8_E4M3);
    decode_block(decoded + BLOCK, codes + BLOCK, DTYPE_F8_E4M3);
    for (int code = 0; code < 256; code++) {
        if ((code & 0x7f) == 0x7f) continue;  // NaN in e4m3: no checkpoint holds it
        CHECK(same_number(decoded[code], e4m3(code)), "lanes, %02x: got %g", code, decoded[code]);
    }
    uint8_t halves[2 * BLOCK + 1];
    for (int i = 0; i < BLOCK; i++) store(halves + 1, i, DTYPE_BF16, i * 1.5f - 77);
    decode_block(decoded, halves + 1, DTYPE_BF16);
    for (int i = 0; i < BLOCK; i++) CHECK(decoded[i] == i * 1.5f - 77, "bf16 element %d", i);
}

static void test_quantise(void) {
    static const struct { float amax, scale, x, q; } cases[] = {
        {0, 1e-4f / 448, 0, 0},              // all zero
        {5e-5f, 1e-4f / 448, 5e-5f, 224},    // tiny: scaled as if it were 1e-4
        {1e-4f, 1e-4f / 448, -1e-4f, -448},
        {448, 1, 448, 448},   {448, 1, 17, 16},          {448, 1, 19, 20},    {448, 1, -17, -16},
        {448, 1, 17.01f, 18}, {448, 1, 0x1p-10f, 0},     {448, 1, 0x1.8p-9f, 0x1p-8f},
        {448, 1, -0x1p-9f, -0x1p-9f},                    {448, 1, 0x1.01p-10f, 0x1p-9f},
        {448, 1, 431, 416},   {448, 1, 432, 448},        {896, 2, 34, 16},
        {3e38f, 3e38f / 448, 3e38f, 448},
        {3, 3 / 448.f, -3, -448}, {7, 7 / 448.f, 3.5f, 224}, {0.1f, 0.1f / 448, 0.1f, 448},
    };
    Act *a = act_new(2, 3 * BLOCK);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float *x = a->x + 5 * BLOCK, *q = a->q + 5 * BLOCK;  // the last group of the last row
        for (int k = 0; k < BLOCK; k++) x[k] = k == 70 ? cases[i].x : k == 100 ? -cases[i].amax : 0;
        quantise(a, 1, 2);
        CHECK(a->scale[5] == cases[i].scale, "case %zu: scale %.9g, want %.9g", i, a->scale[5],
              cases[i].scale);
        CHECK(q[70] == cases[i].q, "case %zu: got %g, want %g", i, q[70], cases[i].q);
    }
    int wrong = 0, above = 0;
    for (int i = 0; i < 100000; i++) {  // whatever the largest is, it becomes 448 and no more
        a->x[0] = round_bf16(ldexp(noise(), i % 60 - 10));
        quantise(a, 0, 0);
        float want = rounded_e4m3(a->x[0] / (fmaxf(fabsf(a->x[0]), 1e-4f) / 448));
        wrong += !(a->q[0] == want), above += !(fabsf(a->q[0]) <= 448);
    }
    CHECK(wrong == 0 && above == 0, "%d wrong, %d above 448", wrong, above);
    a->x[7] = NAN;
    quantise(a, 0, 0);
    CHECK(a->q[7] != a->q[7], "a NaN stays one: got %g", a->q[7]);
    act_free(a);
}

// ---- Products -----------------------------------------------------------------------------------

enum { MOST_THREADS = 4 };

// One thread from now on, or four, whatever cores the machine has. (All or none: each thread that
// was started takes part in a stage, and is waited for.)
static void threads(int n) {
    static Pool all = {.n_threads = MOST_THREADS, .mutex = PTHREAD_MUTEX_INITIALIZER,
                       .wake = PTHREAD_COND_INITIALIZER};
    static bool started;
    for (int i = 1; i < MOST_THREADS && !started; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, pool_thread, &all) != 0) die("can't start a thread");
        pthread_detach(thread);
    }
    started = true;
    pool = n > 1 ? &all : NULL;
}

// Only the collectives of several nodes call it, which are tested with the whole program.
void peer_move(int fd, int node_at, bool out, void *data, size_t n) {
    (void)fd, (void)out, (void)data, (void)n;
    die("node %d", node_at);
}

// One matrix with every number of rows, against the reference; and each row alone, to the bit.
static void check_linear(int out, int in, DType dtype) {
    static const int counts[] = {1, 2, 15, 16, 17, MAX_N};
    Linear w = linear_new(out, in, dtype);
    Act *a = act_new(MAX_N, in), *one = act_new(1, in);
    bf16 *y = xmalloc((size_t)MAX_N * out * sizeof *y), *row_y = xmalloc(out * sizeof *y);
    Sum *want = xmalloc((size_t)MAX_N * out * sizeof *want);
    act_fill(a);
    for (int i = 0; i < MAX_N * out; i++) want[i] = row_dot(a, i / out, &w, i % out);
    for (int c = 0; c < 6; c++)
        for (int n_threads = 1; n_threads <= MOST_THREADS; n_threads += MOST_THREADS - 1) {
            Tally t = {0};
            int differ = 0;
            threads(n_threads);
            memset(y, 0xff, (size_t)MAX_N * out * sizeof *y);
            linear(y, a, &w, counts[c]);
            for (int i = 0; i < counts[c] * out; i++) compare_bf16(&t, f32(y[i]), want[i]);
            CHECK_TALLY(t, "linear %d x %d, dtype %d, %d rows", out, in, dtype, counts[c]);
            for (int i = counts[c] * out; i < MAX_N * out; i++) differ += y[i] != 0xffff;
            threads(1);
            for (int row = 0; row < counts[c]; row++) {
                memcpy(one->x, a->x + (size_t)row * in, in * sizeof(float));
                memcpy(one->q, a->q + (size_t)row * in, in * sizeof(float));
                memcpy(one->scale, a->scale + row * (in / BLOCK), in / BLOCK * sizeof(float));
                linear(row_y, one, &w, 1);
                differ += memcmp(row_y, y + (size_t)row * out, out * sizeof *y) != 0;
            }
            CHECK(differ == 0, "%d x %d, dtype %d, %d rows, %d threads: %d rows have other bits",
                  out, in, dtype, counts[c], n_threads, differ);
        }
    free(y), free(row_y), free(want), act_free(a), act_free(one);
}

static void test_linear(void) {
    static const struct { int out, in; } shapes[] = {
        {576, 256}, {130, 384}, {7, 128}, {1, 256}, {128, 128},
    };
    for (int s = 0; s < 5; s++)
        for (DType dtype = DTYPE_F8_E4M3; dtype <= DTYPE_F32; dtype++)
            check_linear(shapes[s].out, shapes[s].in, dtype);
}

static void test_logits(void) {
    static const int rows[] = {4, 0, 4, 32, 31, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14};
    for (DType dtype = DTYPE_BF16; dtype <= DTYPE_F32; dtype++) {
        Linear w = linear_new(VOCAB, HIDDEN, dtype);
        Act *a = act_new(MAX_N, HIDDEN);
        float out[18 * VOCAB];
        Tally t = {0};
        act_fill(a);
        logits(out, a, &w, rows, 18);
        for (int i = 0; i < 18 * VOCAB; i++) {  // f32: nothing is rounded at the end
            Sum want = row_dot(a, rows[i / VOCAB], &w, i % VOCAB);
            compare(&t, out[i], want.value, want.size * 0x1p-20);
        }
        CHECK_TALLY(t, "logits, dtype %d", dtype);
        act_free(a);
    }
}

// ---- Norms, embedding, rotation -----------------------------------------------------------------

static void test_embed(void) {
    static const int id[] = {5, 0, VOCAB - 1, 5};
    for (DType dtype = DTYPE_BF16; dtype <= DTYPE_F32; dtype++) {
        Linear table = linear_new(VOCAB, HIDDEN, dtype);
        bf16 x[4 * HIDDEN];
        Tally t = {0};
        embed(x, &table, 0, id, 4);
        for (int i = 0; i < 4 * HIDDEN; i++)
            compare(&t, f32(x[i]), rounded_bf16(weight_at(&table, id[i / HIDDEN], i % HIDDEN)), 0);
        CHECK_TALLY(t, "embed, dtype %d", dtype);
    }
}

// The normed row, in double; unrounded.
static void naive_norm(double *out, const double *x, const Vector *gain, double eps, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    for (int i = 0; i < n; i++) out[i] = x[i] / sqrt(sum / n + eps) * gain_at(gain, i);
}

static int quantised_wrongly(const Act *a, int rows) {  // a->x is taken as given
    int wrong = 0;
    for (int i = 0; i < rows * a->cols; i++) {
        float amax = 1e-4f;
        for (int k = 0; k < BLOCK; k++) amax = fmaxf(amax, fabsf(a->x[i / BLOCK * BLOCK + k]));
        float scale = amax / 448;
        wrong += !(a->scale[i / BLOCK] == scale && a->q[i] == (float)rounded_e4m3(a->x[i] / scale));
    }
    return wrong;
}

static void check_add_norm(DType dtype, bool with_y, double size, float eps) {
    enum { N = 5 };
    bf16 x[N][HIDDEN], y[N][HIDDEN], old[N][HIDDEN];
    Vector gain = vector_new(HIDDEN, dtype, 1, 0.5);
    Act *a = act_new(N, HIDDEN);
    Tally sums = {0}, normed = {0};
    fill(&x[0][0], N * HIDDEN, size), fill(&y[0][0], N * HIDDEN, size);
    memset(x[2], 0, sizeof x[2]), memset(y[2], 0, sizeof y[2]);  // a row of zeros
    memcpy(old, x, sizeof old);
    add_norm(&x[0][0], a, with_y ? &y[0][0] : NULL, &gain, eps, N);
    for (int row = 0; row < N; row++) {
        double now[HIDDEN], want[HIDDEN];
        for (int i = 0; i < HIDDEN; i++) {
            now[i] = rounded_bf16((double)f32(old[row][i]) + (with_y ? f32(y[row][i]) : 0));
            compare(&sums, f32(x[row][i]), now[i], 0);
        }
        naive_norm(want, now, &gain, eps, HIDDEN);  // of the rounded sum
        for (int i = 0; i < HIDDEN; i++) {
            double got = a->x[row * HIDDEN + i];
            compare(&normed, got, want[i], fabs(want[i]) * (0x1p-8 + 0x1p-18));
            compare(&normed, got, rounded_bf16(got), 0);
        }
    }
    CHECK_TALLY(sums, "add_norm: x, dtype %d, size %g", dtype, size);
    CHECK_TALLY(normed, "add_norm: a, dtype %d, size %g", dtype, size);
    CHECK(quantised_wrongly(a, N) == 0, "add_norm quantises");
    act_free(a);
}

static void test_add_norm(void) {
    static const double sizes[] = {1, 1e-3, 1e-6, 1e4};  // below 1e-3, eps counts
    for (DType dtype = DTYPE_BF16; dtype <= DTYPE_F32; dtype++)
        for (int i = 0; i < 4; i++)
            for (int with_y = 0; with_y < 2; with_y++)
                check_add_norm(dtype, with_y, sizes[i], 1e-6f);
}

static void test_rope_angles(void) {
    static const int position[] = {0, 1, 63, 4095, 131071, 163839};
    float inv_freq[ROPE_DIM / 2], rope[6][ROPE_DIM];
    Tally t = {0};
    for (int i = 0; i < ROPE_DIM / 2; i++) inv_freq[i] = pow(10000, -i / 32.0);
    rope_angles(&rope[0][0], inv_freq, position, 6);
    for (int row = 0; row < 6; row++)
        for (int i = 0; i < ROPE_DIM / 2; i++) {
            float angle = (float)position[row] * inv_freq[i];  // an f32 product, as in model.py
            compare(&t, rope[row][2 * i], cos(angle), 1e-7);   // an ulp of cosf
            compare(&t, rope[row][2 * i + 1], sin(angle), 1e-7);
        }
    CHECK_TALLY(t, "rope_angles");
}

// y[2i] = x[2i] cos - x[2i+1] sin; y[2i+1] = x[2i] sin + x[2i+1] cos
static Sum naive_rotated(const bf16 *x, const float *rope, int i) {
    double cosine = rope[i / 2 * 2], sine = rope[i / 2 * 2 + 1];
    Sum s = {0};
    add(&s, i % 2 ? f32(x[i - 1]) * sine : f32(x[i]) * cosine);
    add(&s, i % 2 ? f32(x[i]) * cosine : f32(x[i + 1]) * -sine);
    return s;
}

static void test_rotate(void) {  // by hand: pair 0 by 90 degrees, pair 1 by 180, the others by none
    bf16 x[ROPE_DIM], y[ROPE_DIM];
    float rope[ROPE_DIM], want[] = {-2, 1, -3, -4, 5, 6};
    for (int i = 0; i < ROPE_DIM; i++) x[i] = to_bf16(i + 1), rope[i] = i % 2 ? 0 : 1;
    rope[0] = 0, rope[1] = 1, rope[2] = -1;
    rotate(y, x, rope);
    for (int i = 0; i < ROPE_DIM; i++)
        CHECK(f32(y[i]) == (i < 6 ? want[i] : i + 1), "element %d: got %g", i, f32(y[i]));
}

// ---- Attention ----------------------------------------------------------------------------------

enum { SEQUENCES = 5, MAX_PAGES = 4, N_PAGES = 11, QUERY_ROWS = 8 };
enum { LATENT_ROWS = 1 + 63 + 64 + 65 + 200 };

static const int seq_length[SEQUENCES] = {1, 63, 64, 65, 200};

static struct {
    int pages[SEQUENCES][MAX_PAGES], position[LATENT_ROWS], seq[LATENT_ROWS];
    float rope[LATENT_ROWS][ROPE_DIM], inv_freq[ROPE_DIM / 2];
    bf16 cache[N_PAGES][PAGE][CACHE_DIM], query[QUERY_ROWS][HEADS][CACHE_DIM];
    bf16 q[QUERY_ROWS][HEADS][QK_DIM], u[QUERY_ROWS][HEADS][LATENT_DIM];
    Batch latents, queries;
} mla;

static const bf16 *cache_entry(int seq, int position) {
    return mla.cache[mla.pages[seq][position / PAGE]][position % PAGE];
}

static void mla_start(void) {
    int n = 0;
    for (int i = 0; i < SEQUENCES * MAX_PAGES; i++) (&mla.pages[0][0])[i] = -1;  // read by nobody
    for (int s = 0, page = 3; s < SEQUENCES; s++) {
        for (int i = 0; i * PAGE < seq_length[s]; i++, page = (page + 7) % N_PAGES)
            mla.pages[s][i] = page;
        for (int i = 0; i < seq_length[s]; i++, n++) mla.position[n] = i, mla.seq[n] = s;
    }
    for (int i = 0; i < ROPE_DIM / 2; i++) mla.inv_freq[i] = pow(10000, -i / 32.0);
    rope_angles(&mla.rope[0][0], mla.inv_freq, mla.position, n);
    for (size_t i = 0; i < sizeof mla.cache / sizeof(bf16); i++)
        (&mla.cache[0][0][0])[i] = 0x7fff;  // NaN
    mla.latents = (Batch){.n = n,
                          .position = mla.position,
                          .seq = mla.seq,
                          .pages = &mla.pages[0][0],
                          .max_pages = MAX_PAGES};
}

static void check_latent(DType dtype) {
    static bf16 q[LATENT_ROWS][Q_LORA], kv[LATENT_ROWS][CACHE_DIM];
    Vector q_gain = vector_new(Q_LORA, dtype, 1, 0.5);
    Vector kv_gain = vector_new(LATENT_DIM, dtype, 1, 0.5);
    Act *qa = act_new(LATENT_ROWS, Q_LORA);
    Tally normed = {0}, latent = {0}, k_pe = {0};
    fill(&q[0][0], sizeof q / sizeof(bf16), 2), fill(&kv[0][0], sizeof kv / sizeof(bf16), 3);
    mla_start();
    mla_latent(qa, &mla.cache[0][0][0], &q[0][0], &kv[0][0], &q_gain, &kv_gain, 1e-6f,
               &mla.rope[0][0], &mla.latents);
    for (int row = 0; row < LATENT_ROWS; row++) {
        double x[LATENT_DIM], want[LATENT_DIM];
        const bf16 *entry = cache_entry(mla.seq[row], mla.position[row]);
        for (int i = 0; i < Q_LORA; i++) x[i] = f32(q[row][i]);
        naive_norm(want, x, &q_gain, 1e-6, Q_LORA);
        for (int i = 0; i < Q_LORA; i++)
            compare_bf16(&normed, qa->x[row * Q_LORA + i], (Sum){want[i], fabs(want[i])});
        for (int i = 0; i < LATENT_DIM; i++) x[i] = f32(kv[row][i]);
        naive_norm(want, x, &kv_gain, 1e-6, LATENT_DIM);
        for (int i = 0; i < LATENT_DIM; i++)
            compare_bf16(&latent, f32(entry[i]), (Sum){want[i], fabs(want[i])});
        for (int i = 0; i < ROPE_DIM; i++)
            compare_bf16(&k_pe, f32(entry[LATENT_DIM + i]),
                         naive_rotated(kv[row] + LATENT_DIM, mla.rope[row], i));
    }
    CHECK_TALLY(normed, "mla_latent: q, dtype %d", dtype);
    CHECK_TALLY(latent, "mla_latent: c, dtype %d", dtype);
    CHECK_TALLY(k_pe, "mla_latent: k_pe, dtype %d", dtype);
    CHECK(quantised_wrongly(qa, LATENT_ROWS) == 0, "mla_latent quantises q");
    int poisoned = 0;
    for (size_t i = 0; i < sizeof mla.cache / sizeof(bf16); i++)
        poisoned += (&mla.cache[0][0][0])[i] == 0x7fff;
    CHECK(poisoned == (N_PAGES * PAGE - LATENT_ROWS) * CACHE_DIM, "no other cache row is written");
    act_free(qa);
}

// The last position of each sequence, and some inside the longest.
static void queries_start(void) {
    static int position[QUERY_ROWS] = {0, 62, 63, 64, 199, 0, 128, 100};
    static int seq[QUERY_ROWS] = {0, 1, 2, 3, 4, 4, 4, 4};
    mla.queries = (Batch){.n = QUERY_ROWS,
                          .position = position,
                          .seq = seq,
                          .pages = &mla.pages[0][0],
                          .max_pages = MAX_PAGES};
    rope_angles(&mla.rope[0][0], mla.inv_freq, position, QUERY_ROWS);
    fill(&mla.q[0][0][0], sizeof mla.q / sizeof(bf16), 3);
}

static void check_query(const Linear *kv_b) {
    Tally absorbed = {0}, q_pe = {0};
    mla_query(&mla.query[0][0][0], &mla.q[0][0][0], kv_b, &mla.rope[0][0], HEADS, QUERY_ROWS);
    for (int row = 0; row < QUERY_ROWS; row++)
        for (int head = 0; head < HEADS; head++) {
            for (int j = 0; j < LATENT_DIM; j++) {
                Sum want = {0};
                for (int d = 0; d < NOPE_DIM; d++)
                    add(&want, f32(mla.q[row][head][d]) * weight_at(kv_b, head * KV_DIM + d, j));
                compare_bf16(&absorbed, f32(mla.query[row][head][j]), want);
            }
            for (int i = 0; i < ROPE_DIM; i++)
                compare_bf16(&q_pe, f32(mla.query[row][head][LATENT_DIM + i]),
                             naive_rotated(mla.q[row][head] + NOPE_DIM, mla.rope[row], i));
        }
    CHECK_TALLY(absorbed, "mla_query: q_nope W_UK, dtype %d", kv_b->dtype);
    CHECK_TALLY(q_pe, "mla_query: q_pe, dtype %d", kv_b->dtype);
}

static double softmax(double *score, int n) {  // returns the sum that it divided by
    double best = score[0], total = 0;
    for (int t = 1; t < n; t++) best = fmax(best, score[t]);
    for (int t = 0; t < n; t++) total += score[t] = exp(score[t] - best);
    for (int t = 0; t < n; t++) score[t] /= total;
    return total;
}

static void check_attend(float scale) {
    Tally sums = {0};
    mla_attend(&mla.u[0][0][0], &mla.query[0][0][0], &mla.cache[0][0][0], scale, HEADS,
               &mla.queries);
    for (int row = 0; row < QUERY_ROWS; row++)
        for (int head = 0; head < HEADS; head++) {
            double p[200] = {0};
            int seq = mla.queries.seq[row], n = mla.queries.position[row] + 1;
            for (int t = 0; t < n; t++)
                for (int j = 0; j < CACHE_DIM; j++)
                    p[t] += scale * f32(mla.query[row][head][j]) * f32(cache_entry(seq, t)[j]);
            softmax(p, n);
            for (int j = 0; j < LATENT_DIM; j++) {
                Sum want = {0};
                for (int t = 0; t < n; t++) add(&want, p[t] * f32(cache_entry(seq, t)[j]));
                // A score of up to some hundred has an error of 1e-5 in f32, and so has its exp.
                want.size *= 32;
                compare_bf16(&sums, f32(mla.u[row][head][j]), want);
            }
        }
    CHECK_TALLY(sums, "mla_attend, scale %g", scale);
}

// One row and head as V3's equations 1 to 11 say: keys and values are made of each c, nothing is
// absorbed.
static void naive_attention(double o[V_DIM], const double *kv_b, int row, int head, double scale) {
    double p[200], (*v)[V_DIM] = xcalloc(200, sizeof *v);
    const double *key_weight = kv_b + head * KV_DIM * LATENT_DIM;
    const double *value_weight = key_weight + NOPE_DIM * LATENT_DIM;
    int seq = mla.queries.seq[row], n = mla.queries.position[row] + 1;
    for (int t = 0; t < n; t++) {
        const bf16 *entry = cache_entry(seq, t);
        p[t] = 0;
        for (int d = 0; d < NOPE_DIM; d++) {
            double key = 0;
            for (int j = 0; j < LATENT_DIM; j++)
                key += key_weight[d * LATENT_DIM + j] * f32(entry[j]);
            p[t] += f32(mla.q[row][head][d]) * key;
        }
        for (int i = 0; i < ROPE_DIM; i++)
            p[t] += naive_rotated(mla.q[row][head] + NOPE_DIM, mla.rope[row], i).value *
                    f32(entry[LATENT_DIM + i]);
        p[t] *= scale;
        for (int d = 0; d < V_DIM; d++)
            for (int j = 0; j < LATENT_DIM; j++)
                v[t][d] += value_weight[d * LATENT_DIM + j] * f32(entry[j]);
    }
    softmax(p, n);
    for (int d = 0; d < V_DIM; d++) {
        o[d] = 0;
        for (int t = 0; t < n; t++) o[d] += p[t] * v[t][d];
    }
    free(v);
}

static void check_value(const Linear *kv_b, float scale) {
    Act *o = act_new(QUERY_ROWS, HEADS * V_DIM);
    double *decoded = xmalloc(sizeof(double) * kv_b->out * kv_b->in);
    Tally values = {0};
    for (int i = 0; i < kv_b->out * kv_b->in; i++)
        decoded[i] = weight_at(kv_b, i / kv_b->in, i % kv_b->in);
    mla_value(o, &mla.u[0][0][0], kv_b, HEADS, QUERY_ROWS);
    for (int row = 0; row < QUERY_ROWS; row++)
        for (int head = 0; head < HEADS; head++) {
            double plain[V_DIM], error = 0, size = 0;
            naive_attention(plain, decoded, row, head, scale);
            for (int d = 0; d < V_DIM; d++) {
                double got = o->x[(row * HEADS + head) * V_DIM + d];
                Sum want = {0};
                for (int j = 0; j < LATENT_DIM; j++)
                    add(&want, weight_at(kv_b, head * KV_DIM + NOPE_DIM + d, j) *
                                   f32(mla.u[row][head][j]));
                compare_bf16(&values, got, want);
                error += (got - plain[d]) * (got - plain[d]), size += plain[d] * plain[d];
            }
            // The absorbed query and u were rounded to bf16 on the way: each an rms error of 0.2 %.
            CHECK(sqrt(error / size) <= 0.01,
                  "the plain form, dtype %d, row %d, head %d: off by %g", kv_b->dtype, row, head,
                  sqrt(error / size));
        }
    CHECK_TALLY(values, "mla_value, dtype %d", kv_b->dtype);
    CHECK(quantised_wrongly(o, QUERY_ROWS) == 0, "mla_value quantises");
    act_free(o), free(decoded);
}

static void test_attention(void) {
    for (DType dtype = DTYPE_F8_E4M3; dtype <= DTYPE_BF16; dtype++) {
        Linear kv_b = linear_new(HEADS * KV_DIM, LATENT_DIM, dtype);
        check_latent(dtype == DTYPE_BF16 ? DTYPE_F32 : DTYPE_BF16);  // its vectors have two dtypes
        queries_start();
        check_query(&kv_b);
        check_attend(10);  // scores up to hundreds: one token may take all
        check_attend(0.1352337788608801f);
        check_value(&kv_b, 0.1352337788608801f);
    }
}

// ---- Experts ------------------------------------------------------------------------------------

// Eight experts in four groups, two groups and three experts chosen; the scores are sigmoid(logit).
static void test_route_by_hand(void) {
    static const struct { float logit[8], bias[8]; int want[3]; const char *why; } cases[] = {
        {{0}, {0}, {0, 1, 2}, "ties go to the lower group and expert"},
        {{0, 1, 2, 3, 4, 5, 6, 7}, {0}, {7, 6, 5}, "the likeliest comes first"},
        {{0}, {[6] = 0.5, [7] = 0.5}, {6, 7, 0}, "the bias counts for choosing"},
        {{1, 1}, {[0] = -0.9f, [5] = 1}, {5, 2, 3}, "and may drive a group out"},
        {{0}, {-10, -10, -10, -10, -10, -10, -10, -10}, {0, 1, 2}, "masked is -infinity, not 0"},
        {{1, 1, 2, 2, 3, 3, 4, 4}, {-9, -9, -9, -9, -9, -9, -9, -9}, {6, 7, 4}, "likewise"},
        {{3, -5, 1, 1, 0.9f, 0.9f}, {0}, {2, 3, 4}, "a group is worth its two best, not its best"},
        {{9, -9, -9, 9, 9, -9, -9, 8}, {0}, {0, 3, 1}, "of equal groups the first two"},
        {{-30, -31, -32, -33, -34, -35, -36, -37}, {0}, {0, 1, 2},
         "scores near 0 still sum to 2.5"},
    };
    Config c = {.n_routed_experts = 8, .n_group = 4, .topk_group = 2, .num_experts_per_tok = 3,
                .routed_scaling_factor = 2.5, .hidden_size = BLOCK};
    Routing r = routing_new(1, &c);
    Act *a = act_new(1, BLOCK);
    a->x[0] = 1;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Linear gate = linear_new(8, BLOCK, DTYPE_F32);
        Vector bias = vector_new(8, DTYPE_F32, 0, 0);
        double score[8], total = 0, sum = 0;
        for (int e = 0; e < 8; e++) {
            store((uint8_t *)gate.data, e * BLOCK, DTYPE_F32, cases[i].logit[e]);
            store((uint8_t *)bias.data, e, DTYPE_F32, cases[i].bias[e]);
            score[e] = 1 / (1 + exp(-cases[i].logit[e]));
        }
        moe_route(&r, a, &gate, &bias, &c, 1);
        for (int k = 0; k < 3; k++) total += score[cases[i].want[k]], sum += r.weight[k];
        for (int k = 0; k < 3; k++) {
            CHECK(r.expert[k] == cases[i].want[k], "%s: choice %d is expert %d", cases[i].why, k,
                  r.expert[k]);
            double want = score[cases[i].want[k]] / total * 2.5;
            CHECK(fabs(r.weight[k] - want) <= 1e-6, "%s: got weight %g, want %g", cases[i].why,
                  r.weight[k], want);
        }
        CHECK(fabs(sum - 2.5) <= 1e-6, "the weights sum to %g", sum);
    }
    routing_free(&r), act_free(a);
}

// V3's equations 13 to 16 with groups, by counting how many stand before.
static bool group_kept(const double *choice, int g, const Config *c) {
    int size = c->n_routed_experts / c->n_group, before = 0;
    double value[EXPERTS];
    for (int h = 0; h < c->n_group; h++) {
        value[h] = -INFINITY;
        for (int i = h * size; i < (h + 1) * size; i++)
            for (int j = h * size; j < i; j++) value[h] = fmax(value[h], choice[i] + choice[j]);
    }
    for (int h = 0; h < c->n_group; h++)
        before += value[h] > value[g] || (value[h] == value[g] && h < g);
    return before < c->topk_group;
}

static int naive_rank(const double *choice, int e, const Config *c) {  // -1: not chosen
    int size = c->n_routed_experts / c->n_group, rank = 0;
    for (int f = 0; f < c->n_routed_experts; f++)
        rank += group_kept(choice, f / size, c) &&
                (choice[f] > choice[e] || (choice[f] == choice[e] && f < e));
    return group_kept(choice, e / size, c) && rank < c->num_experts_per_tok ? rank : -1;
}

typedef struct {
    Config c;
    Linear embed, q_a, kv_a, q_b, kv_b, o, gate, lm_head;
    Vector gain[4], bias;
    Mlp dense, shared, experts[EXPERTS];
} Net;

static Net net;

static void net_new(void) {
    net.c = (Config){.n_routed_experts = EXPERTS,
                     .n_group = 4,
                     .topk_group = 2,
                     .num_experts_per_tok = TOP_K,
                     .routed_scaling_factor = 2.5,
                     .hidden_size = HIDDEN,
                     .moe_intermediate_size = WIDTH};
    net.embed = linear_new(VOCAB, HIDDEN, DTYPE_BF16);
    net.lm_head = linear_new(VOCAB, HIDDEN, DTYPE_BF16);
    net.q_a = linear_new(Q_LORA, HIDDEN, DTYPE_F8_E4M3);
    net.kv_a = linear_new(CACHE_DIM, HIDDEN, DTYPE_F8_E4M3);
    net.q_b = linear_new(HEADS * QK_DIM, Q_LORA, DTYPE_F8_E4M3);
    net.kv_b = linear_new(HEADS * KV_DIM, LATENT_DIM, DTYPE_F8_E4M3);
    net.o = linear_new(HIDDEN, HEADS * V_DIM, DTYPE_F8_E4M3);
    net.gate = linear_new(EXPERTS, HIDDEN, DTYPE_BF16);
    static const int dim[] = {HIDDEN, HIDDEN, Q_LORA, LATENT_DIM};
    for (int i = 0; i < 4; i++) net.gain[i] = vector_new(dim[i], DTYPE_BF16, 1, 0.3);
    net.bias = vector_new(EXPERTS, DTYPE_F32, 0, 0.1);
    net.dense = mlp_new(DENSE), net.shared = mlp_new(WIDTH);
    for (int e = 0; e < EXPERTS; e++) net.experts[e] = mlp_new(WIDTH);
}

static void check_route(const Routing *r, const Act *a, int n) {
    Tally weights = {0};
    int wrong = 0, listed = 0;
    for (int row = 0; row < n; row++) {
        double score[EXPERTS], choice[EXPERTS], total = 0;
        int found[TOP_K];
        for (int e = 0; e < EXPERTS; e++) {
            score[e] = 1 / (1 + exp(-row_dot(a, row, &net.gate, e).value));
            choice[e] = score[e] + gain_at(&net.bias, e);
        }
        for (int e = 0; e < EXPERTS; e++) {
            int rank = naive_rank(choice, e, &net.c);
            if (rank >= 0) found[rank] = e, total += score[e];
        }
        for (int k = 0; k < TOP_K; k++) {
            wrong += r->expert[row * TOP_K + k] != found[k];
            compare(&weights, r->weight[row * TOP_K + k], score[found[k]] / total * 2.5, 1e-5);
        }
    }
    CHECK(wrong == 0, "moe_route, %d rows: %d experts wrong", n, wrong);
    CHECK_TALLY(weights, "moe_route, %d rows: weights", n);
    CHECK(r->start[0] == 0 && r->start[EXPERTS] == n * TOP_K, "the lists hold all");
    for (int e = 0; e < EXPERTS; e++)
        for (int i = r->start[e]; i < r->start[e + 1]; i++)
            listed +=
                r->expert[r->pair[i]] == e && (i == r->start[e] || r->pair[i] > r->pair[i - 1]);
    CHECK(listed == n * TOP_K, "%d rows: %d pairs of the lists are right", n, listed);
}

// Row `slot` of h against silu(gate(a)) up(a): bf16 each, the product rounded once.
static void compare_hidden(Tally *t, const Act *h, int slot, const Act *a, int row, const Mlp *m) {
    for (int i = 0; i < m->gate_proj.out; i++) {
        Sum g = row_dot(a, row, &m->gate_proj, i), u = row_dot(a, row, &m->up_proj, i);
        double gate = rounded_bf16(g.value), up = rounded_bf16(u.value);
        double want = gate / (1 + exp(-gate)) * up;
        // gate and up may have been rounded to the neighbour, if they stood near a tie: 2^-7 of
        // each, and silu stretches gate's error by up to 2 where gate is large and negative.
        compare(t, h->x[(size_t)slot * h->cols + i], want,
                fabs(want) * 0x1p-5 + (g.size * fabs(up) + u.size * fabs(gate)) * 0x1p-20);
    }
}

static void check_experts(int n) {
    Act *a = act_new(n, HIDDEN), *h = act_new(n * (TOP_K + 1), WIDTH), *dense = act_new(n, DENSE);
    Routing r = routing_new(n, &net.c);
    bf16 *y = xmalloc((size_t)n * HIDDEN * sizeof *y);
    Tally hidden = {0}, sums = {0}, dense_hidden = {0}, dense_sums = {0};
    act_fill(a);
    moe_route(&r, a, &net.gate, &net.bias, &net.c, n);
    check_route(&r, a, n);
    moe_experts(y, h, a, &r, net.experts, &net.shared, &net.c, n);
    for (int row = 0; row < n; row++) {
        for (int k = 0; k < TOP_K; k++)
            compare_hidden(&hidden, h, row * TOP_K + k, a, row,
                           &net.experts[r.expert[row * TOP_K + k]]);
        compare_hidden(&hidden, h, n * TOP_K + row, a, row, &net.shared);
        for (int i = 0; i < HIDDEN; i++) {
            Sum want = row_dot(h, n * TOP_K + row, &net.shared.down_proj, i);
            for (int k = 0; k < TOP_K; k++) {
                int pair = row * TOP_K + k;
                Sum part = row_dot(h, pair, &net.experts[r.expert[pair]].down_proj, i);
                want.value += r.weight[pair] * part.value, want.size += r.weight[pair] * part.size;
            }
            compare_bf16(&sums, f32(y[row * HIDDEN + i]), want);
        }
    }
    CHECK_TALLY(hidden, "moe_experts: hidden, %d rows", n);
    CHECK_TALLY(sums, "moe_experts: y, %d rows", n);
    CHECK(quantised_wrongly(h, n * (TOP_K + 1)) == 0, "moe_experts quantises");
    int idle = 0;
    for (int e = 0; e < EXPERTS; e++) idle += r.start[e] == r.start[e + 1];
    CHECK(n > 1 || idle == EXPERTS - TOP_K, "experts without a row: %d", idle);

    mlp(y, dense, a, &net.dense, n);
    for (int row = 0; row < n; row++) {
        compare_hidden(&dense_hidden, dense, row, a, row, &net.dense);
        for (int i = 0; i < HIDDEN; i++)
            compare_bf16(&dense_sums, f32(y[row * HIDDEN + i]),
                         row_dot(dense, row, &net.dense.down_proj, i));
    }
    CHECK_TALLY(dense_hidden, "mlp: hidden, %d rows", n);
    CHECK_TALLY(dense_sums, "mlp: y, %d rows", n);
    free(y), routing_free(&r), act_free(a), act_free(h), act_free(dense);
}

// ---- To the bit ---------------------------------------------------------------------------------

// What all stages of a layer made of one row.
typedef struct {
    bf16 x[HIDDEN], query[HEADS][CACHE_DIM], u[HEADS][LATENT_DIM], y[HIDDEN], dense[HIDDEN];
    float logits[VOCAB], weight[TOP_K];
    int expert[TOP_K];
} RowOut;

// The rows go on behind 50 cached ones, over a page's end.
enum { FIRST_POSITION = 50, BIT_PAGES = 2 };

static bf16 bit_cache[BIT_PAGES][PAGE][CACHE_DIM];

// Rows row[0..n-1] of MAX_N as one batch; out[row] gets each one's numbers.
static void net_step(RowOut *out, const int *row, int n) {
    static const int pages[] = {1, 0}, seq[MAX_N];
    int id[MAX_N], position[MAX_N], all[MAX_N];
    static bf16 x[MAX_N][HIDDEN], y[MAX_N][HIDDEN], q_a[MAX_N][Q_LORA], kv_a[MAX_N][CACHE_DIM];
    static bf16 q[MAX_N][HEADS][QK_DIM], query[MAX_N][HEADS][CACHE_DIM],
        u[MAX_N][HEADS][LATENT_DIM];
    static bf16 dense[MAX_N][HIDDEN];
    static float rope[MAX_N][ROPE_DIM], out_logits[MAX_N][VOCAB];
    Act *a = act_new(n, HIDDEN), *qa = act_new(n, Q_LORA), *o = act_new(n, HEADS * V_DIM);
    Act *h = act_new(n * (TOP_K + 1), WIDTH), *wide = act_new(n, DENSE);
    Routing r = routing_new(n, &net.c);
    for (int i = 0; i < n; i++) id[i] = row[i], position[i] = FIRST_POSITION + row[i], all[i] = i;
    Batch b = {.n = n, .position = position, .seq = seq, .pages = pages, .max_pages = BIT_PAGES};
    embed(&x[0][0], &net.embed, 0, id, n);
    rope_angles(&rope[0][0], mla.inv_freq, position, n);
    add_norm(&x[0][0], a, NULL, &net.gain[0], 1e-6f, n);
    linear(&q_a[0][0], a, &net.q_a, n), linear(&kv_a[0][0], a, &net.kv_a, n);
    mla_latent(qa, &bit_cache[0][0][0], &q_a[0][0], &kv_a[0][0], &net.gain[2], &net.gain[3], 1e-6f,
               &rope[0][0], &b);
    linear(&q[0][0][0], qa, &net.q_b, n);
    mla_attention(o, &query[0][0][0], &u[0][0][0], &q[0][0][0], &bit_cache[0][0][0], &net.kv_b,
                  &rope[0][0], 0.135f, HEADS, &b);
    linear(&y[0][0], o, &net.o, n);
    add_norm(&x[0][0], a, &y[0][0], &net.gain[1], 1e-6f, n);
    mlp(&dense[0][0], wide, a, &net.dense, n);
    moe_route(&r, a, &net.gate, &net.bias, &net.c, n);
    moe_experts(&y[0][0], h, a, &r, net.experts, &net.shared, &net.c, n);
    logits(&out_logits[0][0], a, &net.lm_head, all, n);
    for (int i = 0; i < n; i++) {
        RowOut *to = &out[row[i]];
        memcpy(to->x, x[i], sizeof to->x), memcpy(to->y, y[i], sizeof to->y);
        memcpy(to->query, query[i], sizeof to->query), memcpy(to->u, u[i], sizeof to->u);
        memcpy(to->dense, dense[i], sizeof to->dense);
        memcpy(to->logits, out_logits[i], sizeof to->logits);
        memcpy(to->weight, r.weight + i * TOP_K, sizeof to->weight);
        memcpy(to->expert, r.expert + i * TOP_K, sizeof to->expert);
    }
    routing_free(&r), act_free(a), act_free(qa), act_free(o), act_free(h), act_free(wide);
}

static void cache_reset(void) {
    static bf16 before[FIRST_POSITION * CACHE_DIM];
    if (!before[0]) fill(before, FIRST_POSITION * CACHE_DIM, 2);
    for (int i = 0; i < BIT_PAGES * PAGE * CACHE_DIM; i++)
        (&bit_cache[0][0][0])[i] = 0x7fff;  // NaN
    memcpy(bit_cache[1], before, sizeof before);
}

// A token's numbers are the same alone, among others, in any order, on any number of threads.
static void test_bits(void) {
    static RowOut alone[MAX_N], among[MAX_N];
    static bf16 alone_cache[sizeof bit_cache / sizeof(bf16)];
    int numbers = 0;
    threads(1);
    cache_reset();
    for (int row = 0; row < MAX_N; row++) net_step(alone, &row, 1);
    memcpy(alone_cache, bit_cache, sizeof bit_cache);
    for (int row = 0; row < MAX_N; row++)
        for (int v = 0; v < VOCAB; v++)
            numbers += isfinite(alone[row].logits[v]) && alone[row].logits[v] != 0;
    CHECK(numbers == MAX_N * VOCAB, "no NaN from the cache's unused rows");
    for (int n_threads = 1; n_threads <= MOST_THREADS; n_threads += MOST_THREADS - 1)
        for (int chunk = 2; chunk <= 38; chunk += 6) {  // at last more than there are
            threads(n_threads);
            cache_reset();
            for (int first = 0; first < MAX_N; first += chunk) {
                int row[MAX_N], n = min(chunk, MAX_N - first);
                for (int i = 0; i < n; i++) row[i] = first + (n_threads == 1 ? i : n - 1 - i);
                net_step(among, row, n);
            }
            for (int row = 0; row < MAX_N; row++)
                CHECK(memcmp(&alone[row], &among[row], sizeof *alone) == 0,
                      "row %d: other bits in chunks of %d on %d threads", row, chunk, n_threads);
            CHECK(memcmp(alone_cache, bit_cache, sizeof bit_cache) == 0, "the cache's bits");
        }
    // A NaN spoils its own row, and no other.
    static const uint16_t broken = 0x7fff;
    int all[MAX_N], spoilt = 0;
    for (int i = 0; i < MAX_N; i++) all[i] = i;
    memcpy((uint8_t *)net.embed.data + 2 * ((MAX_N - 1) * HIDDEN + 9), &broken, 2);
    cache_reset();
    net_step(among, all, MAX_N);
    for (int v = 0; v < VOCAB; v++) spoilt += isnan(among[MAX_N - 1].logits[v]) != 0;
    CHECK(spoilt == VOCAB, "%d logits of a broken row are NaN", spoilt);
    CHECK(memcmp(alone, among, (MAX_N - 1) * sizeof *alone) == 0, "a broken row changes no other");
}

int main(void) {
    for (int code = 0; code < 256; code++) e4m3_table[code] = e4m3(code);
    test_rounding();
    test_decode();
    test_quantise();
    test_linear();
    test_logits();
    test_embed();
    test_add_norm();
    test_rope_angles();
    test_rotate();
    threads(1);
    test_attention();
    net_new();
    test_route_by_hand();
    for (int n = 1; n <= MAX_N; n += 8) check_experts(n);
    test_bits();
    while (n_rooms) free(rooms[--n_rooms]);
    return test_end();
}
