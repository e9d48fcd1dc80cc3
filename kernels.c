// kernels.c: every stage of R1 in plain C. It runs without a GPU, and it is the definition: what a
// stage means, where it rounds and in which order it sums stands here; kernels.cu does the same,
// faster.
//
// The one idea: a matrix product is walked in blocks of 128 columns, because that is how R1's
// weights and activations are scaled. Inside a block the product of two e4m3 (or bf16) numbers is
// exact in f32; the block's sum is scaled and added in f32. Every output is summed in one fixed
// order that depends on nothing but its own row, so a token's numbers have the same bits alone, in
// a batch, and on more threads.
#include "r1.h"

#include <assert.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define E4M3_MAX 448.0f
#define MIN_AMAX 1e-4f  // a group that is smaller is scaled as if it were this large (model.py)

enum {
    TILE = 4,        // weight rows in flight: enough independent sums to hide the latency of an add
    ROWS = 16,       // activation rows that share a decoded weight block
    PAIR_HEADS = 2,  // heads that share a decoded cache page
    COLUMNS = 32,  // outputs of a unit of work: a few cache lines, so that threads don't share any
};

static int min(int a, int b) { return a < b ? a : b; }

// ---- Threads ------------------------------------------------------------------------------------
// A stage is a loop over independent units. All threads take units from a counter until none is
// left. They spin for a moment before they sleep, because the next stage follows within
// microseconds.

typedef void Task(void *arg, int unit);

enum { SPINS = 2000 };  // some tens of microseconds

typedef struct {
    int n_threads;  // the caller included
    Task *task;
    void *arg;
    int n_units;
    _Atomic int next, running;    // the next unit; other threads that have not finished this stage
    _Atomic unsigned generation;  // counts stages: a waiting thread sees it change
    pthread_mutex_t mutex;
    pthread_cond_t wake;
} Pool;

static __thread Pool *pool;       // a rank's own; NULL: it works alone

static void spin(int i) {
#ifdef __x86_64__
    _mm_pause();
#endif
    if (i % 256 == 255) sched_yield();  // somebody else may need this core to let us go on
}

static void pool_work(Pool *p) {
    for (int unit; (unit = atomic_fetch_add(&p->next, 1)) < p->n_units;) p->task(p->arg, unit);
}

static void *pool_thread(void *arg) {
    Pool *p = arg;
    for (unsigned seen = 0;; seen++) {
        for (int i = 0; i < SPINS && atomic_load(&p->generation) == seen; i++) spin(i);
        if (atomic_load(&p->generation) == seen) {
            pthread_mutex_lock(&p->mutex);
            while (atomic_load(&p->generation) == seen) pthread_cond_wait(&p->wake, &p->mutex);
            pthread_mutex_unlock(&p->mutex);
        }
        pool_work(p);
        atomic_fetch_sub(&p->running, 1);
    }
    return NULL;
}

// Runs task(arg, 0) .. task(arg, n_units - 1) on all threads and returns when all are done.
static void parallel(Task *task, void *arg, int n_units) {
    Pool *p = pool;
    if (!p || n_units == 1) {
        for (int unit = 0; unit < n_units; unit++) task(arg, unit);
        return;
    }
    p->task = task, p->arg = arg, p->n_units = n_units;
    atomic_store(&p->next, 0);
    atomic_store(&p->running, p->n_threads - 1);
    pthread_mutex_lock(&p->mutex);  // so that no thread falls asleep between its look and its wait
    atomic_fetch_add(&p->generation, 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
    pool_work(p);
    for (int i = 0; atomic_load(&p->running) > 0; i++) spin(i);
}

// The cores that we may use: those of the affinity mask, or fewer where a container has a quota.
// Threads beyond that would take turns, and each stage wait for a thread that has none.
static int core_count(void) {
    cpu_set_t cores;
    int n = sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
    long quota = 0, period = 0;  // microseconds
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r");
    if (f && fscanf(f, "%ld %ld", &quota, &period) == 2 && period > 0)
        n = min(n, (int)((quota + period - 1) / period));
    if (f) fclose(f);
    return n < 1 ? 1 : n;
}

// A rank's threads end with the program.
void device_init(int local, int n_local) {
    int n = core_count() / n_local;
    (void)local;
    if (pool || n < 2) return;
    pool = xcalloc(1, sizeof *pool);
    *pool = (Pool){.n_threads = n, .mutex = PTHREAD_MUTEX_INITIALIZER,
                   .wake = PTHREAD_COND_INITIALIZER};
    for (int i = 1; i < n; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, pool_thread, pool) != 0) die("can't start thread %d", i);
        pthread_detach(thread);
    }
}

// The system gives zeroed pages, and only those that are touched: a cache for the longest context
// costs nothing before it is used.
void *device_alloc(size_t bytes) {
    void *p = calloc(1, bytes ? bytes : 1);
    if (!p) die("out of memory: %zu bytes wanted", bytes);
    return p;
}

void device_free(void *p) { free(p); }

void device_wait(void) {}

bool device_memory(size_t *available, size_t *total) {
    *available = (size_t)sysconf(_SC_AVPHYS_PAGES) * sysconf(_SC_PAGESIZE);
    *total = (size_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    return false;
}

void device_copy(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }

// ---- Weights ------------------------------------------------------------------------------------
// They stay in the mapped files, and what is not in a file is made. Every page of a rank's part is
// touched once, so that the first answer finds it in memory.

static __thread struct { void **data; int n; } made;

static size_t dtype_size(DType dtype) {
    return dtype == DTYPE_F8_E4M3 ? 1 : dtype == DTYPE_BF16 ? 2 : 4;
}

struct MakeTask { uint8_t *data; const Dummy *dummy; size_t cols, size; };

static void make_row(void *arg, int row) {
    struct MakeTask *s = arg;
    const uint8_t *value = s->dummy->value;
    uint8_t *to = s->data + row * s->cols * s->size;
    for (size_t i = 0; i < s->cols; i++, to += s->size)
        memcpy(to, value + s->size * dummy_index(s->dummy, row, i), s->size);
}

static const uint8_t *make(const Dummy *dummy, size_t rows, size_t cols, size_t size) {
    uint8_t *data = device_alloc(rows * cols * size);
    made.data = xrealloc(made.data, (made.n + 1) * sizeof *made.data);
    made.data[made.n++] = data;
    parallel(make_row, &(struct MakeTask){data, dummy, cols, size}, rows);
    return data;
}

static void touch(const uint8_t *data, size_t rows, size_t bytes, size_t stride) {
    size_t page = sysconf(_SC_PAGESIZE), head = (uintptr_t)data % page;
    madvise((void *)(data - head), rows * stride + head, MADV_WILLNEED);
    for (size_t row = 0; row < rows; row++)
        for (size_t at = 0; at < bytes; at += page)
            *(const volatile uint8_t *)(data + row * stride + at);
}

size_t place_vector(Vector *v) {
    size_t bytes = v->dim * dtype_size(v->dtype);
    touch(v->data, 1, bytes, bytes);
    return bytes;
}

size_t place_linear(Linear *w, Place as) {
    (void)as;  // one layout for all: the checkpoint's
    size_t size = dtype_size(w->dtype), rows = w->out, cols = w->in, bytes = rows * cols * size;
    size_t blocks = cols / BLOCK, scale_rows = (rows + BLOCK - 1) / BLOCK, f = sizeof(float);
    bool fp8 = w->dtype == DTYPE_F8_E4M3, dummy = !w->data;
    if (dummy) {
        w->data = make(&w->dummy[0], rows, cols, size);
        w->scale = fp8 ? make(&w->dummy[1], scale_rows, blocks, f) : NULL;
        w->gap = 0;
    } else {
        touch(w->data, rows, cols * size, (cols + w->gap) * size);
        if (fp8) touch(w->scale, scale_rows, blocks * f, (blocks + w->gap / BLOCK) * f);
    }
    return bytes + (fp8 ? scale_rows * blocks * f : 0);
}

size_t place_mlp(Mlp *m, int n, Mlp *shared) {
    size_t bytes = shared ? place_mlp(shared, 1, NULL) : 0;
    for (int i = 0; i < n; i++)
        bytes += place_linear(&m[i].gate_proj, PLACE_MATRIX) +
                 place_linear(&m[i].up_proj, PLACE_MATRIX) +
                 place_linear(&m[i].down_proj, PLACE_MATRIX);
    return bytes;
}

size_t place_next(void) { return 0; }

void place_free(void) {
    while (made.n) device_free(made.data[--made.n]);
    free(made.data);
    made.data = NULL;
}

void step_reserve(int rows, const Config *c) { (void)rows, (void)c; }

bool step_begin(Batch *placed, const Batch *b) {
    *placed = *b;
    return true;
}

void step_end(void) {}

int step_record(int most) { return (void)most, 0; }

// ---- Numbers ------------------------------------------------------------------------------------
// Everything is computed in f32. What is stored at a stage's border is rounded to bf16 by to_bf16,
// and what enters a linear to e4m3 by round_e4m3: these two functions are all the rounding there
// is.

#ifdef EXACT
static inline float f32(bf16 v) { return v; }
static inline bf16 to_bf16(float f) { return f; }
#else
static inline float f32(bf16 v) {
    union { uint32_t bits; float f; } u = {(uint32_t)v << 16};
    return u.f;
}

static inline bf16 to_bf16(float f) {  // to nearest, ties to even; a NaN stays one
    union { float f; uint32_t bits; } u = {f};
    uint32_t rounded = (u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16;
    return f != f ? u.bits >> 16 | 0x40 : rounded;
}
#endif

static inline float round_bf16(float f) { return f32(to_bf16(f)); }

// To the nearest e4m3, ties to even: 3 bits of mantissa, steps of 2^-9 below 2^-6, at most 448.
static inline float round_e4m3(float f) {
    union { float f; uint32_t bits; } u = {f};
    u.bits = (u.bits + 0x7ffff + (u.bits >> 20 & 1)) & ~0xfffffu;
    float magic = copysignf(0x1.8p14f, f);  // an f32 of this size has steps of 2^-9
    float subnormal = (f + magic) - magic;
    float rounded = fabsf(f) < 0x1p-6f ? subnormal
                    : f != f           ? f
                                       : u.f;  // adding can wrap a NaN to 0
    return rounded > E4M3_MAX ? E4M3_MAX : rounded < -E4M3_MAX ? -E4M3_MAX : rounded;
}

// e4m3 in the place of f32's bits: the sign at the top, exponent and mantissa below 2^27. As an f32
// that is the value x 2^-120, subnormals included, because f32's exponent has a bias of 127 and
// e4m3's of 7. (The two codes that are NaN give 480: the checkpoint's makers don't write them.)
#define E4M3_BITS (int)0x87f00000
#define E4M3_UNBIAS 0x1p120f

// A checkpoint's tensors may lie at any byte, so they are read through memcpy.
static inline float load_f32(const uint8_t *p) {
    float f;
    memcpy(&f, p, sizeof f);
    return f;
}

static inline float load_bf16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    union { uint32_t bits; float f; } u = {(uint32_t)v << 16};
    return u.f;
}

static float vector_at(const Vector *v, int i) {
    return v->dtype == DTYPE_BF16 ? load_bf16(v->data + 2 * i) : load_f32(v->data + 4 * i);
}

// ---- Ranks --------------------------------------------------------------------------------------
// The ranks of a node are threads and see each other's rows. Between nodes rows travel over TCP,
// all to node 0 and sums back. A sum goes through the ranks in order, so its bits depend on nothing
// else.

static __thread Group me = {.size = 1, .n_local = 1};

static struct {
    pthread_mutex_t mutex;
    pthread_barrier_t barrier;
    int joined;             // ranks of a new group that are here already
    const void **rows;      // [size] each rank's, of this node; on node 0 of all nodes
    void **received;        // [size] node 0's room for other nodes' rows, each of
    size_t room;            // so many bytes
} node = {.mutex = PTHREAD_MUTEX_INITIALIZER};

void group_id(uint8_t id[GROUP_ID]) { memset(id, 0, GROUP_ID); }

void group_join(const Group *g) {
    me = *g;
    pthread_mutex_lock(&node.mutex);
    if (node.joined++ == 0) {
        pthread_barrier_init(&node.barrier, NULL, g->n_local);
        node.rows = xcalloc(g->size, sizeof *node.rows);
        node.received = xcalloc(g->size, sizeof *node.received);
        node.room = 0;
    }
    pthread_mutex_unlock(&node.mutex);
    pthread_barrier_wait(&node.barrier);
}

void group_leave(void) {
    pthread_mutex_lock(&node.mutex);
    if (--node.joined == 0) {
        for (int i = 0; i < me.size; i++) free(node.received[i]);
        free(node.rows), free(node.received);
    }
    pthread_mutex_unlock(&node.mutex);
    me = (Group){.size = 1, .n_local = 1};
}

static void travel(int i, bool out, void *data, size_t n) {
    peer_move(me.peer[i], me.rank ? 0 : i + 1, out, data, n);
}

// Node 0 gets the rows of all other nodes' ranks, n bytes each.
static void rows_gather(size_t n) {
    if (me.rank) {
        for (int i = 0; i < me.n_local; i++) travel(0, true, (void *)node.rows[i], n);
        return;
    }
    for (int r = me.n_local; r < me.size; r++) {
        if (n > node.room) node.received[r] = xrealloc(node.received[r], n);
        node.rows[r] = node.received[r];
        travel(r / me.n_local - 1, false, node.received[r], n);
    }
    if (n > node.room) node.room = n;
}

// Each rank of node 0 sums its part of the elements, for all.
static void rows_sum(size_t n) {
    size_t first = n * me.local / me.n_local, end = n * (me.local + 1) / me.n_local;
    for (size_t i = first; i < end; i++) {
        float sum = 0;
        for (int r = 0; r < me.size; r++) sum += f32(((const bf16 *)node.rows[r])[i]);
        for (int r = 0; r < me.n_local; r++) ((bf16 *)node.rows[r])[i] = to_bf16(sum);
    }
}

void all_reduce(bf16 *x, size_t n) {
    if (me.size == 1) return;
    bool leader = me.rank == me.local;  // node 0's
    node.rows[me.local] = x;
    pthread_barrier_wait(&node.barrier);
    if (me.local == 0 && me.n_peers) rows_gather(n * sizeof *x);
    if (leader) {
        pthread_barrier_wait(&node.barrier);
        rows_sum(n);
    } else if (me.local == 0) {
        travel(0, false, x, n * sizeof *x);
    }
    pthread_barrier_wait(&node.barrier);
    if (!leader && me.local) memcpy(x, node.rows[0], n * sizeof *x);
    for (int i = 0; me.rank == 0 && i < me.n_peers; i++) travel(i, true, x, n * sizeof *x);
    pthread_barrier_wait(&node.barrier);  // nobody's rows change before all have read them
}

void all_gather(float *out, float *in, int cols, int n) {
    size_t bytes = cols * sizeof *in;
    if (me.size == 1) return;
    node.rows[me.local] = in;
    pthread_barrier_wait(&node.barrier);
    if (me.local == 0 && me.n_peers) rows_gather(n * bytes);
    for (int r = 0; me.rank == 0 && r < me.size; r++)
        for (int i = 0; i < n; i++)
            memcpy(out + ((size_t)i * me.size + r) * cols, (const float *)node.rows[r] + i * cols,
                   bytes);
    pthread_barrier_wait(&node.barrier);
}

// ---- Sixteen lanes ------------------------------------------------------------------------------
// A dot product is summed in 16 lanes, element k in lane k % 16, and the lanes are added as a tree.
// The plain C below defines it; the AVX2 and AVX-512 forms give the same bits. (A fused
// multiply-add makes no difference where products are exact in f32: for all pairs of e4m3 and
// bf16.)

#if defined(__AVX512F__)
typedef __m512 Lanes;
static inline Lanes lanes_load(const float *p) { return _mm512_loadu_ps(p); }
static inline Lanes lanes_zero(void) { return _mm512_setzero_ps(); }
static inline Lanes lanes_dot(Lanes sum, Lanes a, Lanes b) { return _mm512_fmadd_ps(a, b, sum); }
static inline Lanes lanes_scaled(Lanes sum, Lanes block, float scale) {
    return _mm512_add_ps(sum, _mm512_mul_ps(block, _mm512_set1_ps(scale)));
}
static inline void lanes_store(float *p, Lanes a) { _mm512_storeu_ps(p, a); }
static inline Lanes lanes_e4m3(const uint8_t *w) {
    __m512i v = _mm512_slli_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)), 20);
    v = _mm512_and_si512(v, _mm512_set1_epi32(E4M3_BITS));
    return _mm512_mul_ps(_mm512_castsi512_ps(v), _mm512_set1_ps(E4M3_UNBIAS));
}
#elif defined(__AVX2__) && defined(__FMA__)
typedef struct { __m256 low, high; } Lanes;
static inline Lanes lanes_load(const float *p) {
    return (Lanes){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
static inline Lanes lanes_zero(void) { return (Lanes){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Lanes lanes_dot(Lanes sum, Lanes a, Lanes b) {
    return (Lanes){_mm256_fmadd_ps(a.low, b.low, sum.low),
                   _mm256_fmadd_ps(a.high, b.high, sum.high)};
}
static inline Lanes lanes_scaled(Lanes sum, Lanes block, float scale) {
    __m256 s = _mm256_set1_ps(scale);
    return (Lanes){_mm256_add_ps(sum.low, _mm256_mul_ps(block.low, s)),
                   _mm256_add_ps(sum.high, _mm256_mul_ps(block.high, s))};
}
static inline void lanes_store(float *p, Lanes a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
static inline __m256 half_e4m3(const uint8_t *w) {
    __m256i v = _mm256_slli_epi32(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)), 20);
    v = _mm256_and_si256(v, _mm256_set1_epi32(E4M3_BITS));
    return _mm256_mul_ps(_mm256_castsi256_ps(v), _mm256_set1_ps(E4M3_UNBIAS));
}
static inline Lanes lanes_e4m3(const uint8_t *w) { return (Lanes){half_e4m3(w), half_e4m3(w + 8)}; }
#else
typedef struct { float v[16]; } Lanes;
static inline Lanes lanes_load(const float *p) {
    Lanes a;
    memcpy(&a, p, sizeof a);
    return a;
}
static inline Lanes lanes_zero(void) { return (Lanes){{0}}; }
static inline Lanes lanes_dot(Lanes sum, Lanes a, Lanes b) {
    for (int i = 0; i < 16; i++) sum.v[i] += a.v[i] * b.v[i];
    return sum;
}
static inline Lanes lanes_scaled(Lanes sum, Lanes block, float scale) {
    for (int i = 0; i < 16; i++) sum.v[i] += block.v[i] * scale;
    return sum;
}
static inline void lanes_store(float *p, Lanes a) { memcpy(p, &a, sizeof a); }
static inline float e4m3_value(uint8_t code) {
    union {
        uint32_t bits;
        float f;
    } u = {((uint32_t)code << 24 & 0x80000000) | (uint32_t)(code & 0x7f) << 20};
    return u.f * E4M3_UNBIAS;
}
static inline Lanes lanes_e4m3(const uint8_t *w) {
    Lanes a;
    for (int i = 0; i < 16; i++) a.v[i] = e4m3_value(w[i]);
    return a;
}
#endif

static inline Lanes lanes_bf16(const uint8_t *w) {
    float v[16];
    for (int i = 0; i < 16; i++) v[i] = load_bf16(w + 2 * i);
    return lanes_load(v);
}

static inline float lanes_sum(Lanes a) {
    float v[16];
    lanes_store(v, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

static float dot(const float *a, const float *b, int n) {  // n a multiple of 16
    Lanes sum = lanes_zero();
    for (int k = 0; k < n; k += 16) sum = lanes_dot(sum, lanes_load(a + k), lanes_load(b + k));
    return lanes_sum(sum);
}

// Four at once: while one sum waits for its last add, the others go on.
static void dot_tile(float out[TILE], const float *a, const float *const b[TILE], int n) {
    Lanes sum[TILE] = {lanes_zero(), lanes_zero(), lanes_zero(), lanes_zero()};
    for (int k = 0; k < n; k += 16) {
        Lanes v = lanes_load(a + k);
        for (int t = 0; t < TILE; t++) sum[t] = lanes_dot(sum[t], v, lanes_load(b[t] + k));
    }
    for (int t = 0; t < TILE; t++) out[t] = lanes_sum(sum[t]);
}

// ---- The matrix product -------------------------------------------------------------------------

struct Act {
    int rows, cols;
    float *x;      // [rows][cols] unquantised, holding bf16 values
    float *q;      // [rows][cols] holding e4m3 values
    float *scale;  // [rows][cols / 128]
};

Act *act_new(int rows, int cols) {
    assert(cols % BLOCK == 0);
    size_t size = (size_t)rows * cols * sizeof(float);
    Act *a = xmalloc(sizeof *a);
    *a = (Act){rows, cols, device_alloc(size), device_alloc(size), device_alloc(size / BLOCK)};
    return a;
}

void act_free(Act *a) {
    if (!a) return;
    device_free(a->x), device_free(a->q), device_free(a->scale);
    free(a);
}

// Quantises 128 columns of a row: the largest becomes 448. (V3 report 3.3.2; model.py act_quant)
static void quantise(Act *a, int row, int group) {
    float *x = a->x + (size_t)row * a->cols + group * BLOCK;
    float *q = a->q + (size_t)row * a->cols + group * BLOCK;
    float *scale = a->scale + (size_t)row * (a->cols / BLOCK) + group;
#ifdef EXACT
    *scale = 1;
    memcpy(q, x, BLOCK * sizeof *q);
#else
    float amax = MIN_AMAX;
    for (int i = 0; i < BLOCK; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    *scale = amax / E4M3_MAX;
    for (int i = 0; i < BLOCK; i++) q[i] = round_e4m3(x[i] / *scale);
#endif
}

// What a product reads: rows of f32, with a scale per 128 columns or none.
typedef struct {
    const float *value;
    const float *scale;  // NULL: all 1
    size_t stride;       // elements from row to row of value
    const int *index;    // which row is the i-th; NULL: row i
} View;

// The quantised rows for an e4m3 matrix, the unquantised ones for a bf16 matrix.
static View act_view(const Act *a, const Linear *w, const int *index) {
    assert(a->cols == w->in);
    if (w->dtype == DTYPE_F8_E4M3) return (View){a->q, a->scale, a->cols, index};
    return (View){a->x, NULL, a->cols, index};
}

static size_t row_bytes(const Linear *w) {  // from one row to the next
    return (size_t)(w->in + w->gap) * dtype_size(w->dtype);
}

static size_t scale_blocks(const Linear *w) { return (w->in + w->gap) / BLOCK; }

static float block_scale(const Linear *w, int row, int block) {
    if (w->dtype != DTYPE_F8_E4M3) return 1;
    return load_f32(w->scale + 4 * (row / BLOCK * scale_blocks(w) + block));
}

static inline __attribute__((always_inline)) Lanes lanes_weights(const uint8_t *w, int k,
                                                                 DType dtype) {
    return dtype == DTYPE_F8_E4M3 ? lanes_e4m3(w + k)
           : dtype == DTYPE_BF16  ? lanes_bf16(w + 2 * k)
                                  : lanes_load((const float *)(const void *)w + k);
}

// sum[t] += scale[t] x (weight[t] . x) over one block of 128.
static inline __attribute__((always_inline)) void block_sums(Lanes sum[TILE],
                                                             const uint8_t *const weight[TILE],
                                                             DType dtype, const float *x,
                                                             const float scale[TILE]) {
    Lanes block[TILE] = {lanes_zero(), lanes_zero(), lanes_zero(), lanes_zero()};
    for (int k = 0; k < BLOCK; k += 16) {
        Lanes v = lanes_load(x + k);
        for (int t = 0; t < TILE; t++)
            block[t] = lanes_dot(block[t], v, lanes_weights(weight[t], k, dtype));
    }
    for (int t = 0; t < TILE; t++) sum[t] = lanes_scaled(sum[t], block[t], scale[t]);
}

// A call of its own, with a loop for each dtype: else the compiler mixes it with its caller's loop
// and keeps weights in registers where the running sums should be.
__attribute__((noinline)) static void block_product(Lanes sum[TILE],
                                                    const uint8_t *const weight[TILE], DType dtype,
                                                    const float *x, const float scale[TILE]) {
    if (dtype == DTYPE_F8_E4M3) block_sums(sum, weight, DTYPE_F8_E4M3, x, scale);
    else if (dtype == DTYPE_BF16) block_sums(sum, weight, DTYPE_BF16, x, scale);
    else block_sums(sum, weight, DTYPE_F32, x, scale);
}

// 128 consecutive weights as f32, without their scale.
static void decode_block(float *out, const uint8_t *w, DType dtype) {
    for (int k = 0; k < BLOCK; k += 16) lanes_store(out + k, lanes_weights(w, k, dtype));
}

// out [n][TILE] = rows first .. first + n - 1 of a, times weight rows row .. row + TILE - 1 (those
// past the last repeat it). n <= ROWS. All matrix products of this file are made of this one. A
// single row takes the weights as they lie; several rows share weights that are decoded once.
static void product(float out[ROWS][TILE], const Linear *w, int row, const View *a, int first,
                    int n) {
    float decoded[TILE][BLOCK], scale[TILE], scaled[TILE];
    const uint8_t *data[TILE], *scales[TILE], *block[TILE];
    Lanes sum[ROWS][TILE];
    int blocks = w->in / BLOCK;
    size_t bytes = row_bytes(w), block_bytes = BLOCK * dtype_size(w->dtype);
    bool fp8 = w->dtype == DTYPE_F8_E4M3, share = n > 1 && w->dtype != DTYPE_F32;
    for (int t = 0; t < TILE; t++) {
        size_t r = min(row + t, w->out - 1);
        data[t] = w->data + bytes * r;
        scales[t] = fp8 ? w->scale + r / BLOCK * scale_blocks(w) * sizeof(float) : NULL;
        for (int i = 0; i < n; i++) sum[i][t] = lanes_zero();
    }
    for (int b = 0; b < blocks; b++) {
        for (int t = 0; t < TILE; t++) {
            block[t] = data[t] + block_bytes * b;
            scale[t] = fp8 ? load_f32(scales[t] + b * sizeof(float)) : 1;
            // The next tile's block is asked for now; past the matrix's end that does no harm.
            for (size_t line = 0; line < block_bytes; line += 64)
                __builtin_prefetch(block[t] + TILE * bytes + line);
            if (!share) continue;
            decode_block(decoded[t], block[t], w->dtype);
            block[t] = (const uint8_t *)decoded[t];
        }
        for (int i = 0; i < n; i++) {
            size_t r = a->index ? a->index[first + i] : first + i;
            float x_scale = a->scale ? a->scale[r * blocks + b] : 1;
            for (int t = 0; t < TILE; t++) scaled[t] = x_scale * scale[t];
            block_product(sum[i], block, share ? DTYPE_F32 : w->dtype,
                          a->value + r * a->stride + b * BLOCK, scaled);
        }
    }
    for (int i = 0; i < n; i++)
        for (int t = 0; t < TILE; t++) out[i][t] = lanes_sum(sum[i][t]);
}

static int units(int n, int per_unit) { return (n + per_unit - 1) / per_unit; }

// ---- The stages ---------------------------------------------------------------------------------
// Each is declared in r1.h, with its equation and shapes. Most are a struct of arguments, a
// function that computes one independent unit, and a call of parallel().

void rope_angles(float *rope, const float *inv_freq, const int *position, int n) {
    for (int row = 0; row < n; row++)
        for (int i = 0; i < ROPE_DIM / 2; i++) {
            // The product is rounded to f32 on purpose: the model was trained with this rounding.
            float angle = (float)position[row] * inv_freq[i];
            rope[row * ROPE_DIM + 2 * i] = cosf(angle);
            rope[row * ROPE_DIM + 2 * i + 1] = sinf(angle);
        }
}

// Neighbours are a pair: (x[2i], x[2i+1]) turns by the i-th angle. (Where gcc 12's vectoriser sees
// this pattern, it takes an instruction that rounds product and sum as one, whatever -ffp-contract
// says.)
__attribute__((optimize("no-tree-vectorize")))
static void rotate(bf16 *out, const bf16 *x, const float *rope) {
    for (int i = 0; i < ROPE_DIM; i += 2) {
        float re = f32(x[i]), im = f32(x[i + 1]), cosine = rope[i], sine = rope[i + 1];
        out[i] = to_bf16(re * cosine - im * sine);
        out[i + 1] = to_bf16(re * sine + im * cosine);
    }
}

void embed(bf16 *x, const Linear *table, int first, const int *id, int n) {
    for (int row = 0; row < n; row++) {
        bool here = id[row] >= first && id[row] < first + table->out;
        Vector v = {table->in, table->dtype,
                    table->data + (here ? id[row] - first : 0) * row_bytes(table)};
        for (int i = 0; i < v.dim; i++)
            x[(size_t)row * v.dim + i] = to_bf16(here ? vector_at(&v, i) : 0);
    }
}

// out[i] = x[i] rsqrt(mean x^2 + eps) gain[i], rounded to bf16; cols a multiple of 16.
static void rmsnorm(float *out, const bf16 *x, const Vector *gain, float eps, int cols) {
    for (int i = 0; i < cols; i++) out[i] = f32(x[i]);
    float inverse = 1 / sqrtf(dot(out, out, cols) / cols + eps);
    for (int i = 0; i < cols; i++) out[i] = round_bf16(out[i] * inverse * vector_at(gain, i));
}

static void act_norm(Act *a, int row, const bf16 *x, const Vector *gain, float eps) {
    rmsnorm(a->x + (size_t)row * a->cols, x, gain, eps, a->cols);
    for (int group = 0; group < a->cols / BLOCK; group++) quantise(a, row, group);
}

// The sum that a layer's half left in y is added here and not where it was made: the norm reads and
// writes x anyway, and on a GPU a pass over memory is what costs.
struct AddNorm { bf16 *x; Act *a; const bf16 *y; const Vector *gain; float eps; };

static void add_norm_row(void *arg, int row) {
    struct AddNorm *s = arg;
    int cols = s->a->cols;
    bf16 *x = s->x + (size_t)row * cols;
    if (s->y)
        for (int i = 0; i < cols; i++)
            x[i] = to_bf16(f32(x[i]) + f32(s->y[(size_t)row * cols + i]));
    act_norm(s->a, row, x, s->gain, s->eps);
}

void add_norm(bf16 *x, Act *a, const bf16 *y, const Vector *gain, float eps, int n) {
    parallel(add_norm_row, &(struct AddNorm){x, a, y, gain, eps}, n);
}

// A unit makes 32 outputs for all rows. Its weights are read from memory once: for the next 16 rows
// they are still in the cache.
struct LinearTask { bf16 *y; float *logits; View a; const Linear *w; int n; };

static void linear_unit(void *arg, int unit) {
    struct LinearTask *s = arg;
    float out[ROWS][TILE];
    int end = min((unit + 1) * COLUMNS, s->w->out);
    for (int first = 0; first < s->n; first += ROWS)
        for (int row = unit * COLUMNS; row < end; row += TILE) {
            int n = min(ROWS, s->n - first);
            product(out, s->w, row, &s->a, first, n);
            for (int i = 0; i < n; i++)
                for (int t = 0; t < min(TILE, end - row); t++) {
                    size_t at = (size_t)(first + i) * s->w->out + row + t;
                    if (s->logits) s->logits[at] = out[i][t];
                    else s->y[at] = to_bf16(out[i][t]);
                }
        }
}

void linear(bf16 *y, const Act *a, const Linear *w, int n) {
    struct LinearTask task = {y, NULL, act_view(a, w, NULL), w, n};
    parallel(linear_unit, &task, units(w->out, COLUMNS));
}

void linear_pair(bf16 *y0, bf16 *y1, const Act *a, const Linear *w0, const Linear *w1, int n) {
    linear(y0, a, w0, n), linear(y1, a, w1, n);
}

// All that attention will ever know of a token: its normed latent, and one key part that all heads
// share, turned by the token's position. R1's 128 heads of 192 + 128 numbers became 576.
struct Latent {
    Act *qa;
    bf16 *cache;
    const bf16 *q, *kv;
    const Vector *q_gain, *kv_gain;
    float eps;
    const float *rope;
    const Batch *b;
};

static void latent_row(void *arg, int row) {
    struct Latent *s = arg;
    int position = s->b->position[row];
    int page = s->b->pages[(size_t)s->b->seq[row] * s->b->max_pages + position / PAGE];
    bf16 *entry = s->cache + ((size_t)page * PAGE + position % PAGE) * CACHE_DIM;
    const bf16 *kv = s->kv + (size_t)row * CACHE_DIM;
    float latent[LATENT_DIM];
    act_norm(s->qa, row, s->q + (size_t)row * s->qa->cols, s->q_gain, s->eps);
    rmsnorm(latent, kv, s->kv_gain, s->eps, LATENT_DIM);
    for (int i = 0; i < LATENT_DIM; i++) entry[i] = to_bf16(latent[i]);
    rotate(entry + LATENT_DIM, kv + LATENT_DIM, s->rope + row * ROPE_DIM);  // k_pe is not normed
}

void mla_latent(Act *qa, bf16 *cache, const bf16 *q, const bf16 *kv, const Vector *q_gain,
                const Vector *kv_gain, float eps, const float *rope, const Batch *b) {
    parallel(latent_row, &(struct Latent){qa, cache, q, kv, q_gain, kv_gain, eps, rope, b}, b->n);
}

struct HeadTask {
    bf16 *query;
    Act *o;
    const bf16 *in;
    const Linear *kv_b;
    const float *rope;
    int heads, n;
};

// A head's key is W_UK c, so its score is q . (W_UK c) = (q W_UK) . c: with W_UK on the query's
// side no key is ever made, and attention reads latents. One head's W_UK is rows head * 256 .. +
// 127 of kv_b_proj, [128][512]; its four scale blocks stand side by side, so that each quarter of
// the 512 sums is scaled once, at the end.
static void query_head(void *arg, int head) {
    struct HeadTask *s = arg;
    size_t bytes = row_bytes(s->kv_b), block_bytes = bytes / (LATENT_DIM / BLOCK);
    for (int first = 0; first < s->n; first += ROWS) {
        float sum[ROWS][LATENT_DIM] = {0}, weight[LATENT_DIM];
        int n = min(ROWS, s->n - first);
        for (int d = 0; d < NOPE_DIM; d++) {
            const uint8_t *data = s->kv_b->data + (size_t)(head * KV_DIM + d) * bytes;
            for (int b = 0; b < LATENT_DIM / BLOCK; b++)
                decode_block(weight + b * BLOCK, data + b * block_bytes, s->kv_b->dtype);
            for (int i = 0; i < n; i++) {
                float q = f32(s->in[((size_t)(first + i) * s->heads + head) * QK_DIM + d]);
                for (int j = 0; j < LATENT_DIM; j++) sum[i][j] += q * weight[j];
            }
        }
        for (int i = 0; i < n; i++) {
            size_t at = (size_t)(first + i) * s->heads + head;
            bf16 *query = s->query + at * CACHE_DIM;
            for (int j = 0; j < LATENT_DIM; j++)
                query[j] = to_bf16(sum[i][j] * block_scale(s->kv_b, head * KV_DIM, j / BLOCK));
            rotate(query + LATENT_DIM, s->in + at * QK_DIM + NOPE_DIM,
                   s->rope + (first + i) * ROPE_DIM);
        }
    }
}

void mla_query(bf16 *query, const bf16 *q, const Linear *kv_b_proj, const float *rope, int heads,
               int n) {
    parallel(query_head, &(struct HeadTask){query, NULL, q, kv_b_proj, rope, heads, n}, heads);
}

struct Attend { bf16 *u; const bf16 *query, *cache; float scale; int heads; const Batch *b; };

// Softmax page by page: sums are kept relative to the largest score so far and shrunk when a larger
// one comes. A page's place in the sequence is fixed, so the order of the sums is too.
typedef struct {
    float query[CACHE_DIM], sum[LATENT_DIM], best, total;
} Head;

// Four tokens at a time, one after the other in every sum; those past the last weigh nothing.
static void attend_page(Head *h, float page[][CACHE_DIM], int tokens, float scale) {
    float score[PAGE], best = h->best;
    for (int t = 0; t < tokens; t += TILE) {
        const float *row[TILE];
        for (int k = 0; k < TILE; k++) row[k] = page[min(t + k, tokens - 1)];
        dot_tile(score + t, h->query, row, CACHE_DIM);
        for (int k = 0; k < TILE; k++) best = fmaxf(best, score[t + k] *= scale);
    }
    float shrink = expf(h->best - best);  // 0 on the first page, where best was -infinity
    h->best = best;
    h->total *= shrink;
    for (int j = 0; j < LATENT_DIM; j++) h->sum[j] *= shrink;
    for (int t = 0; t < tokens; t += TILE) {
        float p[TILE];
        for (int k = 0; k < TILE; k++)
            h->total += p[k] = t + k < tokens ? expf(score[t + k] - best) : 0;
        for (int j = 0; j < LATENT_DIM; j++)
            for (int k = 0; k < TILE; k++) h->sum[j] += p[k] * page[min(t + k, tokens - 1)][j];
    }
}

static void attend_unit(void *arg, int unit) {
    struct Attend *s = arg;
    int per_row = units(s->heads, PAIR_HEADS), row = unit / per_row;
    int first = unit % per_row * PAIR_HEADS, n_heads = min(PAIR_HEADS, s->heads - first);
    const int *pages = s->b->pages + (size_t)s->b->seq[row] * s->b->max_pages;
    float page[PAGE][CACHE_DIM];
    Head head[PAIR_HEADS];
    for (int h = 0; h < n_heads; h++) {
        const bf16 *query = s->query + ((size_t)row * s->heads + first + h) * CACHE_DIM;
        head[h].best = -INFINITY, head[h].total = 0;
        memset(head[h].sum, 0, sizeof head[h].sum);
        for (int j = 0; j < CACHE_DIM; j++) head[h].query[j] = f32(query[j]);
    }
    for (int start = 0; start <= s->b->position[row]; start += PAGE) {
        int tokens = min(PAGE, s->b->position[row] + 1 - start);
        const bf16 *entry = s->cache + (size_t)pages[start / PAGE] * PAGE * CACHE_DIM;
        for (int i = 0; i < tokens * CACHE_DIM; i++) (&page[0][0])[i] = f32(entry[i]);
        for (int h = 0; h < n_heads; h++) attend_page(&head[h], page, tokens, s->scale);
    }
    for (int h = 0; h < n_heads; h++) {
        bf16 *u = s->u + ((size_t)row * s->heads + first + h) * LATENT_DIM;
        for (int j = 0; j < LATENT_DIM; j++) u[j] = to_bf16(head[h].sum[j] / head[h].total);
    }
}

void mla_attend(bf16 *u, const bf16 *query, const bf16 *cache, float scale, int heads,
                const Batch *b) {
    struct Attend task = {u, query, cache, scale, heads, b};
    parallel(attend_unit, &task, b->n * units(heads, PAIR_HEADS));
}

// Values are linear in the latents, too: sum_t p_t (W_UV c_t) = W_UV (sum_t p_t c_t), one product
// for each row in place of one for each token. One head's W_UV is rows head * 256 + 128 .. + 255 of
// kv_b_proj, [128][512].
static void value_head(void *arg, int head) {
    struct HeadTask *s = arg;
    for (int first = 0; first < s->n; first += ROWS) {
        float u[ROWS][LATENT_DIM], out[ROWS][TILE];
        int n = min(ROWS, s->n - first);
        for (int i = 0; i < n; i++)
            for (int j = 0; j < LATENT_DIM; j++)
                u[i][j] = f32(s->in[((size_t)(first + i) * s->heads + head) * LATENT_DIM + j]);
        View view = {&u[0][0], NULL, LATENT_DIM, NULL};
        for (int d = 0; d < V_DIM; d += TILE) {
            product(out, s->kv_b, head * KV_DIM + NOPE_DIM + d, &view, 0, n);
            for (int i = 0; i < n; i++)
                for (int t = 0; t < TILE; t++)
                    s->o->x[(size_t)(first + i) * s->o->cols + head * V_DIM + d + t] =
                        round_bf16(out[i][t]);
        }
        for (int i = 0; i < n; i++) quantise(s->o, first + i, head);  // a head is one scale group
    }
}

void mla_value(Act *o, const bf16 *u, const Linear *kv_b_proj, int heads, int n) {
    parallel(value_head, &(struct HeadTask){NULL, o, u, kv_b_proj, NULL, heads, n}, heads);
}

void mla_attention(Act *o, bf16 *query, bf16 *u, const bf16 *q, const bf16 *cache,
                   const Linear *kv_b_proj, const float *rope, float scale, int heads,
                   const Batch *b) {
    mla_query(query, q, kv_b_proj, rope, heads, b->n);
    mla_attend(u, query, cache, scale, heads, b);
    mla_value(o, u, kv_b_proj, heads, b->n);
}

Routing routing_new(int rows, const Config *c) {
    size_t pairs = (size_t)rows * c->num_experts_per_tok;
    return (Routing){
        .expert = device_alloc(pairs * sizeof(int)),
        .weight = device_alloc(pairs * sizeof(float)),
        .start = device_alloc((c->n_routed_experts + 1) * sizeof(int)),
        .pair = device_alloc(pairs * sizeof(int)),
        .sum = device_alloc((size_t)rows * c->hidden_size * sizeof(float)),
    };
}

void routing_free(Routing *r) {
    device_free(r->expert), device_free(r->weight), device_free(r->start), device_free(r->pair);
    device_free(r->sum);
}

// The index of the largest value, the lowest on a tie. Nothing but NaN or -infinity gives 0.
static int argmax(const float *v, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (v[i] > v[best] || v[best] != v[best]) best = i;
    return best;
}

// Takes one row's experts: the best groups by the sum of their two best choices, then the best
// choices inside them. The bias steers the choice and never enters a weight.
static void choose_experts(int *expert, float *weight, const float *score, const Vector *bias,
                           const Config *c) {
    int size = c->n_routed_experts / c->n_group;
    float choice[c->n_routed_experts], kept[c->n_routed_experts], group[c->n_group], total = 0;
    for (int e = 0; e < c->n_routed_experts; e++) {
        choice[e] = score[e] + vector_at(bias, e);
        kept[e] = -INFINITY;
    }
    for (int g = 0; g < c->n_group; g++) {
        float *member = choice + g * size, best = -INFINITY, second = -INFINITY;
        for (int e = 0; e < size; e++)
            if (member[e] > best) second = best, best = member[e];
            else if (member[e] > second) second = member[e];
        group[g] = best + second;
    }
    for (int k = 0; k < c->topk_group; k++) {
        int g = argmax(group, c->n_group);
        memcpy(kept + g * size, choice + g * size, size * sizeof *kept);
        group[g] = -INFINITY;
    }
    for (int k = 0; k < c->num_experts_per_tok; k++) {
        expert[k] = argmax(kept, c->n_routed_experts);
        kept[expert[k]] = -INFINITY;
        weight[k] = score[expert[k]];
        total += weight[k];
    }
    for (int k = 0; k < c->num_experts_per_tok; k++)
        weight[k] = weight[k] / (total + 1e-20f) * (float)c->routed_scaling_factor;
}

// The router sees the unquantised rows: a small error would send a token to other experts.
struct Route {
    Routing *r;
    View a;
    const Linear *gate;
    const Vector *bias;
    const Config *c;
    int n;
};

static void route_unit(void *arg, int unit) {
    struct Route *s = arg;
    int n_experts = s->c->n_routed_experts, first = unit * ROWS, n = min(ROWS, s->n - first);
    float score[ROWS][n_experts], out[ROWS][TILE];
    for (int e = 0; e < n_experts; e += TILE) {
        product(out, s->gate, e, &s->a, first, n);
        for (int i = 0; i < n; i++)
            for (int t = 0; t < min(TILE, n_experts - e); t++)
                score[i][e + t] = 1 / (1 + expf(-out[i][t]));
    }
    for (int i = 0; i < n; i++) {
        size_t at = (size_t)(first + i) * s->c->num_experts_per_tok;
        choose_experts(s->r->expert + at, s->r->weight + at, score[i], s->bias, s->c);
    }
}

void moe_route(Routing *r, const Act *a, const Linear *gate, const Vector *bias, const Config *c,
               int n) {
    int pairs = n * c->num_experts_per_tok;
    assert(gate->dtype != DTYPE_F8_E4M3);
    struct Route task = {r, act_view(a, gate, NULL), gate, bias, c, n};
    parallel(route_unit, &task, units(n, ROWS));
    // A counting sort makes the experts' lists: sizes, then starts, then entries.
    memset(r->start, 0, (c->n_routed_experts + 1) * sizeof *r->start);
    for (int p = 0; p < pairs; p++) r->start[r->expert[p] + 1]++;
    for (int e = 0; e < c->n_routed_experts; e++) r->start[e + 1] += r->start[e];
    for (int p = 0; p < pairs; p++) r->pair[r->start[r->expert[p]]++] = p;
    for (int e = c->n_routed_experts; e > 0; e--) r->start[e] = r->start[e - 1];
    r->start[0] = 0;
}

// h[slot] = quant(silu(gate(a)) up(a)) for one block of 128 of the intermediate columns: just one
// scale group, so that it is quantised as soon as it is there. The i-th of n rows is row[i] of a
// (NULL: i) and goes to row slot[i] of h (NULL: first_slot + i).
static void gate_up(Act *h, const Act *a, const Mlp *m, int block, const int *row, const int *slot,
                    int first_slot, int n) {
    float gate[ROWS][TILE], up[ROWS][TILE];
    View view = act_view(a, &m->gate_proj, row);
    for (int first = 0; first < n; first += ROWS) {
        int rows = min(ROWS, n - first);
        for (int column = block * BLOCK; column < (block + 1) * BLOCK; column += TILE) {
            product(gate, &m->gate_proj, column, &view, first, rows);
            product(up, &m->up_proj, column, &view, first, rows);
            for (int i = 0; i < rows; i++) {
                size_t to = slot ? slot[first + i] : first_slot + first + i;
                for (int t = 0; t < TILE; t++) {
                    float g = round_bf16(gate[i][t]), u = round_bf16(up[i][t]);
                    h->x[to * h->cols + column + t] = round_bf16(g / (1 + expf(-g)) * u);
                }
            }
        }
        for (int i = 0; i < rows; i++)
            quantise(h, slot ? slot[first + i] : first_slot + first + i, block);
    }
}

struct Experts {
    bf16 *y;
    Act *h;
    const Act *a;
    const Routing *r;
    const Mlp *experts, *shared;
    const Config *c;
    int n;
};

// A unit is 128 intermediate columns of one expert; the shared expert comes last and takes every
// row.
static void experts_up(void *arg, int unit) {
    struct Experts *s = arg;
    int blocks = s->c->moe_intermediate_size / BLOCK, e = unit / blocks, block = unit % blocks;
    int k = s->c->num_experts_per_tok;
    if (e == s->c->n_routed_experts) {
        gate_up(s->h, s->a, s->shared, block, NULL, NULL, s->n * k, s->n);
        return;
    }
    for (int first = s->r->start[e]; first < s->r->start[e + 1]; first += ROWS) {
        int n = min(ROWS, s->r->start[e + 1] - first), row[ROWS];
        for (int i = 0; i < n; i++) row[i] = s->r->pair[first + i] / k;
        gate_up(s->h, s->a, s->experts + e, block, row, s->r->pair + first, 0, n);
    }
}

// A unit is 32 columns of the output, over all experts in ascending order, the shared one last: a
// row's sum has one order, whatever rows stand beside it.
static void experts_down(void *arg, int unit) {
    struct Experts *s = arg;
    int hidden = s->c->hidden_size, k = s->c->num_experts_per_tok,
        n_experts = s->c->n_routed_experts;
    int begin = unit * COLUMNS, end = min(begin + COLUMNS, hidden);
    float out[ROWS][TILE];
    for (int row = 0; row < s->n; row++)
        memset(s->r->sum + (size_t)row * hidden + begin, 0, (end - begin) * sizeof(float));
    for (int e = 0; e <= n_experts; e++) {
        bool shared = e == n_experts;
        const Linear *down = shared ? &s->shared->down_proj : &s->experts[e].down_proj;
        int from = shared ? s->n * k : s->r->start[e],
            to = shared ? from + s->n : s->r->start[e + 1];
        View view = act_view(s->h, down, shared ? NULL : s->r->pair);
        for (int first = from; first < to; first += ROWS)
            for (int column = begin; column < end; column += TILE) {
                int n = min(ROWS, to - first);
                product(out, down, column, &view, first, n);
                for (int i = 0; i < n; i++) {
                    int pair = shared ? -1 : s->r->pair[first + i];
                    size_t row = shared ? first + i - from : pair / k;
                    float weight = shared ? 1 : s->r->weight[pair];
                    for (int t = 0; t < TILE; t++)
                        s->r->sum[row * hidden + column + t] += weight * out[i][t];
                }
            }
    }
    for (int row = 0; row < s->n; row++)
        for (int i = begin; i < end; i++)
            s->y[(size_t)row * hidden + i] = to_bf16(s->r->sum[(size_t)row * hidden + i]);
}

void moe_experts(bf16 *y, Act *h, const Act *a, const Routing *r, const Mlp *experts,
                 const Mlp *shared, const Config *c, int n) {
    struct Experts task = {y, h, a, r, experts, shared, c, n};
    int blocks = c->moe_intermediate_size / BLOCK;
    parallel(experts_up, &task, (c->n_routed_experts + 1) * blocks);
    parallel(experts_down, &task, units(c->hidden_size, COLUMNS));
}

// The dense layers' MLP is one expert that every row takes.
struct MlpTask { Act *h; const Act *a; const Mlp *m; int n; };

static void mlp_up(void *arg, int block) {
    struct MlpTask *s = arg;
    gate_up(s->h, s->a, s->m, block, NULL, NULL, 0, s->n);
}

void mlp(bf16 *y, Act *h, const Act *a, const Mlp *m, int n) {
    parallel(mlp_up, &(struct MlpTask){h, a, m, n}, m->gate_proj.out / BLOCK);
    linear(y, h, &m->down_proj, n);
}

void logits(float *out, const Act *a, const Linear *lm_head, const int *rows, int n_rows) {
    struct LinearTask task = {NULL, out, act_view(a, lm_head, rows), lm_head, n_rows};
    parallel(linear_unit, &task, units(lm_head->out, COLUMNS));
}

// ---- Choosing a token ---------------------------------------------------------------------------

void philox(uint32_t out[4], uint64_t key, const uint32_t counter[4]) {
    uint32_t k0 = key, k1 = key >> 32, c0 = counter[0], c1 = counter[1], c2 = counter[2],
             c3 = counter[3];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1, c3 = (uint32_t)p0, c0 = n0, c2 = n2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;  // the golden ratio, and sqrt 3 - 1
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// Gumbel noise of (seed, position, id): argmax of l + noise is an exact draw from softmax(l), and
// needs neither a sum nor a state.
static float gumbel(uint64_t seed, int position, int id) {
    uint32_t word[4];
    philox(word, seed, (uint32_t[4]){id / 4, position, 0, 0});
    float u = fminf(((float)word[id % 4] + 0.5f) * 0x1p-32f, 0x1.fffffep-1f);
    return -logf(-log1pf(-u));
}

// Room for the logits of one row at a time. It grows to the vocabulary once and stays.
typedef struct {
    int size;
    float *model;        // the logits as the model gave them
    float *probability;
    int *heap;           // ids, the likeliest on top
    int *count;          // how often an id stands in the output; all 0 between rows
    bool *seen;          // whether an id stands in prompt or output; likewise
} SampleRoom;

static void room_reserve(SampleRoom *room, int vocab) {
    if (room->size >= vocab) return;
    room->size = vocab;
    room->model = xrealloc(room->model, vocab * sizeof *room->model);
    room->probability = xrealloc(room->probability, vocab * sizeof *room->probability);
    room->heap = xrealloc(room->heap, vocab * sizeof *room->heap);
    free(room->count), free(room->seen);
    room->count = xcalloc(vocab, sizeof *room->count);
    room->seen = xcalloc(vocab, sizeof *room->seen);
}

static bool likelier(const float *p, int a, int b) {
    return p[a] > p[b] || (p[a] == p[b] && a < b);
}

static void heap_sink(int *heap, const float *p, int n, int i) {
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && likelier(p, heap[child + 1], heap[child])) child++;
        if (!likelier(p, heap[child], heap[i])) return;
        int swapped = heap[i];
        heap[i] = heap[child], heap[child] = swapped;
    }
}

static void heap_make(int *heap, const float *p, int n) {
    for (int i = 0; i < n; i++) heap[i] = i;
    for (int i = n / 2 - 1; i >= 0; i--) heap_sink(heap, p, n, i);
}

static int heap_pop(int *heap, const float *p, int *n) {
    int top = heap[0];
    heap[0] = heap[--*n];
    heap_sink(heap, p, *n, 0);
    return top;
}

static void penalise(float *l, const Sampling *s, SampleRoom *room) {
    if (s->repetition_penalty == 1 && s->frequency_penalty == 0 && s->presence_penalty == 0) return;
    for (int i = 0; i < s->n_tokens; i++) {
        int id = s->tokens[i];
        if (!room->seen[id] && s->repetition_penalty != 1)
            l[id] = l[id] > 0 ? l[id] / s->repetition_penalty : l[id] * s->repetition_penalty;
        room->seen[id] = true;
        if (i >= s->n_prompt) room->count[id]++;
    }
    for (int i = 0; i < s->n_tokens; i++) {
        int id = s->tokens[i];
        if (room->count[id])
            l[id] = l[id] - s->frequency_penalty * room->count[id] - s->presence_penalty;
        room->count[id] = 0, room->seen[id] = false;
    }
}

// Keeps the ids that top_k, top_p and min_p leave and sets the others to -infinity. All three look
// at the same probabilities; the likeliest id always stays.
static void filter(float *l, const Sampling *s, SampleRoom *room, int vocab) {
    float *p = room->probability, best = l[argmax(l, vocab)];
    double total = 0, before = 0;
    for (int id = 0; id < vocab; id++) total += p[id] = expf(l[id] - best);
    for (int id = 0; id < vocab; id++) p[id] /= total;
    int left = vocab, rank = 0;
    heap_make(room->heap, p, vocab);
    float least = s->min_p * p[room->heap[0]];
    for (; left > 0; rank++) {
        int id = heap_pop(room->heap, p, &left);
        bool keep = (s->top_k < 0 || rank < s->top_k) && (s->top_p >= 1 || before <= s->top_p) &&
                    (s->min_p <= 0 || p[id] >= least);
        if (rank > 0 && !keep) {  // what is less likely is dropped for the same reason
            l[id] = -INFINITY;
            break;
        }
        before += p[id];
    }
    for (int i = 0; i < left; i++) l[room->heap[i]] = -INFINITY;
}

static int choose(float *l, const Sampling *s, SampleRoom *room, int vocab) {
    int best = argmax(l, vocab);
    if (l[best] == -INFINITY) return -1;  // all that were finite are banned
    if (s->temperature < 1e-6f || s->top_k == 1) return best;
    for (int id = 0; id < vocab; id++) l[id] /= s->temperature;
    if ((s->top_k > 0 && s->top_k < vocab) || s->top_p < 1 || s->min_p > 0)
        filter(l, s, room, vocab);
    float highest = -INFINITY;
    for (int id = 0; id < vocab; id++) {
        if (l[id] == -INFINITY) continue;
        float v = l[id] + gumbel(s->seed, s->n_tokens, id);
        if (v > highest) best = id, highest = v;
    }
    return best;
}

static float logprob(const float *l, int id, float best, double log_total) {
    return fmaxf((float)(l[id] - best - log_total), -9999.0f);
}

static void list_logprobs(Choice *c, const Sampling *s, SampleRoom *room, int vocab) {
    float *l = room->model, best = l[argmax(l, vocab)];
    double total = 0;
    for (int id = 0; id < vocab; id++) total += exp((double)l[id] - best);
    c->logprob = logprob(l, c->id, best, log(total));
    c->n_top = min(s->top_logprobs, vocab);
    if (c->n_top > 0) heap_make(room->heap, l, vocab);
    for (int i = 0, left = vocab; i < c->n_top; i++) {
        c->top_id[i] = heap_pop(room->heap, l, &left);
        c->top_logprob[i] = logprob(l, c->top_id[i], best, log(total));
    }
}

struct Sample {
    Choice *out;
    float *l;
    const Sampling *s;
    SampleRoom *rooms;
    int vocab, stride, n, step;
};

static void sample_row(const struct Sample *task, SampleRoom *room, int row) {
    const Sampling *s = &task->s[row];
    Choice *c = &task->out[row];
    float *l = task->l + (size_t)row * task->stride;
    int vocab = task->vocab;
    c->id = -1, c->n_top = 0, c->logprob = 0;
    bool finite = false;
    for (int id = 0; id < vocab; id++) {
        if (l[id] != l[id] || l[id] == INFINITY) return;
        finite |= l[id] != -INFINITY;
    }
    if (!finite) return;
    if (s->top_logprobs >= 0) memcpy(room->model, l, vocab * sizeof *l);
    if (s->given) {
        c->id = *s->given;
        list_logprobs(c, s, room, vocab);
        return;
    }
    for (int i = 0; i < s->n_banned; i++)
        if (s->banned[i] < vocab) l[s->banned[i]] = -INFINITY;
    penalise(l, s, room);
    for (int i = 0; i < s->n_bias; i++) l[s->bias_id[i]] += s->bias[i];
    c->id = choose(l, s, room, vocab);
    if (c->id >= 0 && s->top_logprobs >= 0) list_logprobs(c, s, room, vocab);
}

static void sample_unit(void *arg, int unit) {
    const struct Sample *task = arg;
    room_reserve(&task->rooms[unit], task->vocab);
    for (int row = unit; row < task->n; row += task->step)
        sample_row(task, &task->rooms[unit], row);
}

void sample(Choice *out, float *l, const Sampling *s, int vocab, int stride, int n) {
    static SampleRoom *rooms;  // one for each thread
    static int n_rooms;
    int step = pool ? pool->n_threads : 1;
    if (n_rooms < step) rooms = xrealloc(rooms, step * sizeof *rooms);
    for (; n_rooms < step; n_rooms++) rooms[n_rooms] = (SampleRoom){0};
    parallel(sample_unit, &(struct Sample){out, l, s, rooms, vocab, stride, n, step}, min(n, step));
}

// ---- What the machine can do at most ------------------------------------------------------------
// Memory is read and copied by all threads; the products are those above, with many rows.

double device_seconds(void (*work)(void *), void *arg) {
    double best = INFINITY, worst = 0, sum = 0;
    for (int i = -1; i < 3; i++) {  // the first one is not counted; of three, the one in the middle
        double start = now_seconds();
        work(arg);
        double t = now_seconds() - start;
        if (i >= 0) sum += t, best = fmin(best, t), worst = fmax(worst, t);
    }
    return sum - best - worst;
}

enum { CEILING_PIECE = 1 << 20, CEILING_PIECES = 256, CEILING_SIDE = 1024, CEILING_ROWS = 64 };

struct CeilingTask { uint8_t *memory; Linear w; Act *a; void *y; int rows[CEILING_ROWS]; };

static void read_piece(void *arg, int piece) {
    size_t words = CEILING_PIECE / sizeof(uint64_t);
    const volatile uint64_t *p = (const uint64_t *)((struct CeilingTask *)arg)->memory;
    for (size_t i = piece * words; i < (piece + 1) * words; i++) (void)p[i];
}

static void copy_piece(void *arg, int piece) {
    uint8_t *from = ((struct CeilingTask *)arg)->memory + (size_t)piece * CEILING_PIECE;
    memcpy(from + (size_t)CEILING_PIECES / 2 * CEILING_PIECE, from, CEILING_PIECE);
}

static void read_all(void *arg) { parallel(read_piece, arg, CEILING_PIECES); }
static void copy_half(void *arg) { parallel(copy_piece, arg, CEILING_PIECES / 2); }

static void multiply_all(void *arg) {
    struct CeilingTask *t = arg;
    if (t->w.dtype == DTYPE_F8_E4M3) linear(t->y, t->a, &t->w, CEILING_ROWS);
    else logits(t->y, t->a, &t->w, t->rows, CEILING_ROWS);
}

Ceilings device_ceilings(void) {
    size_t bytes = (size_t)CEILING_PIECES * CEILING_PIECE;
    struct CeilingTask t = {.memory = memset(xmalloc(bytes), 0x38, bytes),  // 1 in e4m3
                            .a = act_new(CEILING_ROWS, CEILING_SIDE),
                            .y = xmalloc(CEILING_ROWS * CEILING_SIDE * sizeof(float))};
    double products = 2.0 * CEILING_ROWS * CEILING_SIDE * CEILING_SIDE;
    for (int i = 0; i < CEILING_ROWS * CEILING_SIDE; i++) t.a->x[i] = 1 + i % 5;
    for (int i = 0; i < CEILING_ROWS * CEILING_SIDE / BLOCK; i++)
        quantise(t.a, i / (CEILING_SIDE / BLOCK), i % (CEILING_SIDE / BLOCK));
    Ceilings c = {.name = "CPU"};
    c.read = bytes / device_seconds(read_all, &t);
    c.copy = bytes / device_seconds(copy_half, &t);
    t.w = (Linear){CEILING_SIDE, CEILING_SIDE, DTYPE_F8_E4M3, t.memory, t.memory};
    c.fp8 = products / device_seconds(multiply_all, &t);
    t.w.dtype = DTYPE_BF16;
    c.bf16 = products / device_seconds(multiply_all, &t);
    act_free(t.a), free(t.memory), free(t.y);
    return c;
}
