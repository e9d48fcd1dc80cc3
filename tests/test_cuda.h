// tests/test_cuda.h: what the tests of kernels.cu share. kernels.cu is included, so that its
// layouts can be looked at; the C twin is linked with "ref_" before its names.
//
// Everything that a kernel may write lies between guards and is poisoned first: with NaN, so that
// what is read and never written shows, too. What is exact by nature is compared bit by bit.
#ifndef TEST_CUDA_H
#define TEST_CUDA_H

#include "../kernels.cu"
#include "test.h"

enum { GUARD = 256, POISON = 0xff, MARK = 0xa5 };

extern "C" {
decltype(device_init) ref_device_init;
decltype(act_new) ref_act_new;
decltype(act_free) ref_act_free;
decltype(routing_new) ref_routing_new;
decltype(routing_free) ref_routing_free;
decltype(rope_angles) ref_rope_angles;
decltype(embed) ref_embed;
decltype(add_norm) ref_add_norm;
decltype(linear) ref_linear;
decltype(linear_pair) ref_linear_pair;
decltype(mla_latent) ref_mla_latent;
decltype(mla_query) ref_mla_query;
decltype(mla_attend) ref_mla_attend;
decltype(mla_value) ref_mla_value;
decltype(mla_attention) ref_mla_attention;
decltype(moe_route) ref_moe_route;
decltype(moe_experts) ref_moe_experts;
decltype(mlp) ref_mlp;
decltype(logits) ref_logits;
decltype(sample) ref_sample;
decltype(philox) ref_philox;
decltype(model_load) ref_model_load;
decltype(model_free) ref_model_free;
decltype(model_step) ref_model_step;
}

typedef struct {
    int rows, cols;
    float *x, *q, *scale;
} RefAct;  // kernels.c's

enum { N_COUNTS = 13, MAX_ROWS = 200 };
static const int ROWS[N_COUNTS] = {1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 128, MAX_ROWS};
static int n_counts = N_COUNTS;  // of these; fewer where a checker makes everything slow

static inline bool quick(void) { return n_counts < N_COUNTS; }

// ---- Data ---------------------------------------------------------------------------------------

static inline uint64_t random_bits(void) {  // always the same ones
    static uint64_t state = 0x9e3779b97f4a7c15;
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545f4914f6cdd1d;
}

static inline double noise(void) {  // even in -1..1
    return (double)(int64_t)random_bits() * 0x1p-63;
}

static inline float bf16_value(bf16 v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline float e4m3_value(uint8_t code) {
    int e = code >> 3 & 15, m = code & 7;
    float v = (code & 0x7f) == 0x7f ? NAN : e ? ldexpf(8 + m, e - 10) : ldexpf(m, -9);
    return code & 0x80 ? -v : v;
}

static inline bf16 *bf16_noise(size_t n, double size) {
    bf16 *x = (bf16 *)xmalloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = round_half(size * noise());
    return x;
}

static inline void linear_free(Linear *w) { free((void *)w->data), free((void *)w->scale); }

static inline Config config_of(int hidden, int experts, int groups, int kept, int k) {
    Config c = {};
    c.hidden_size = hidden, c.n_routed_experts = experts, c.n_group = groups, c.topk_group = kept;
    c.num_experts_per_tok = k, c.routed_scaling_factor = 2.5;
    return c;
}

// ---- Device memory ------------------------------------------------------------------------------

typedef struct {  // between two guards
    uint8_t *all;
    size_t bytes;
} Room;

static Room rooms[64];
static int n_rooms;

static inline void put(void *device, const void *from, size_t bytes) {
    check(cudaMemcpyAsync(device, from, bytes, cudaMemcpyHostToDevice, stream), "copy");
}

static inline void *room(const void *from, size_t bytes) {  // NULL: poisoned
    uint8_t *all = (uint8_t *)device_alloc(bytes + 2 * GUARD), *data = all + GUARD;
    check(cudaMemsetAsync(all, MARK, bytes + 2 * GUARD, stream), "memset");
    if (from) put(data, from, bytes);
    else check(cudaMemsetAsync(data, POISON, bytes, stream), "memset");
    assert(n_rooms < 64);
    rooms[n_rooms++] = (Room){all, bytes};
    return data;
}

static inline void *fetch(const void *device, size_t bytes) {
    void *p = xmalloc(bytes);
    check(cudaMemcpyAsync(p, device, bytes, cudaMemcpyDeviceToHost, stream), "copy");
    check(cudaStreamSynchronize(stream), "kernel");
    return p;
}

static inline bool filled_with(int byte, const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        if (((const uint8_t *)data)[i] != byte) return false;
    return true;
}

static inline bool poisoned(const void *data, size_t bytes) {
    return filled_with(POISON, data, bytes);
}

// Frees all rooms; false where something wrote beside one.
static inline bool rooms_close(void) {
    bool good = true;
    while (n_rooms) {
        Room r = rooms[--n_rooms];
        uint8_t *head = (uint8_t *)fetch(r.all, GUARD),
                *tail = (uint8_t *)fetch(r.all + GUARD + r.bytes, GUARD);
        good &= filled_with(MARK, head, GUARD) && filled_with(MARK, tail, GUARD);
        free(head), free(tail);
        device_free(r.all);
    }
    return good;
}

static inline Act *act_poisoned(int rows, int cols) {
    Act *a = act_new(rows, cols);
    size_t n = (size_t)a->stride * cols;
    check(cudaMemsetAsync(a->x, POISON, n * 2, stream), "memset");
    check(cudaMemsetAsync(a->q, POISON, n, stream), "memset");
    check(cudaMemsetAsync(a->scale, POISON, n / BLOCK * 4, stream), "memset");
    return a;
}

// ---- Times --------------------------------------------------------------------------------------

static inline int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

// Microseconds of one call among `repeat` in a graph: median of several replays. A call that counts
// how often it was made can take other weights each time, which then are not in L2.
template <typename Call> static float microseconds(Call call, int repeat = 100) {
    auto all = [&] { for (int i = 0; i < repeat; i++) call(); };
    return device_seconds([](void *p) { (*(decltype(all) *)p)(); }, &all) * 1e6 / repeat;
}

// Random numbers for a bench, neither huge nor zero in e4m3, bf16 or f32.
static inline void *filled(void *p, size_t bytes, uint32_t keep = 0xbfbfbfbf,
                           uint32_t set = 0x30303030) {
    noise_kernel<<<1024, 256, 0, stream>>>((uint32_t *)p, bytes / 4, keep, set);
    check(cudaGetLastError(), "fill");
    return p;
}

static inline Act *act_filled(int rows, int cols) {
    Act *a = act_new(rows, cols);
    size_t n = (size_t)a->stride * cols;
    filled(a->x, n * 2), filled(a->q, n), filled(a->scale, n / BLOCK * 4);
    return a;
}

// Microseconds in which as many bytes are read, each time others of n_copies that lie side by side.
static inline float read_us(const uint8_t *p, size_t bytes, int n_copies) {
    int turn = 0;
    size_t pieces = bytes / PIECE;
    return microseconds([&] {
        launch(read_kernel, n_sms, WARP, RING * PIECE, p + turn++ % n_copies * bytes, pieces);
    }, n_copies < 20 ? n_copies : 20);
}

// ---- Which tests --------------------------------------------------------------------------------

typedef struct {
    const char *name;
    void (*run)(void);
} Part;

// PROGRAM [PART [COUNTS]]: one part, and only the first COUNTS numbers of rows. Benches must be
// asked for.
static inline int run_parts(const Part *parts, int n, int argc, char **argv) {
    int n_gpus = 0, known = argc < 2;
    if (cudaGetDeviceCount(&n_gpus) != cudaSuccess || !n_gpus) {
        SKIP("there is no GPU");
        return test_end();
    }
    if (argc > 2) n_counts = min_int(atoi(argv[2]), N_COUNTS);
    device_init(0, 1), ref_device_init(0, 1);
    for (int i = 0; i < n; i++) {
        if (argc < 2 ? !strncmp(parts[i].name, "bench", 5) : strcmp(argv[1], parts[i].name))
            continue;
        parts[i].run(), known = 1;
    }
    CHECK(known, "there is no part %s", argv[1]);
    return test_end();
}

#endif
