// kernels.cu: the stages of kernels.c on a Hopper GPU (sm_90a), under the same names and in the same
// order. What a stage means stands there; here stands what makes it fast.
//
// The one idea: a step of R1 is bound by memory, so memory holds everything as the multiprocessors
// want to have it. Weights are repacked once, while they are loaded, into strips of 16 rows whose
// 128-byte pieces lie swizzled as the tensor cores read them; activations and cache pages are
// written that way at once. A tile then comes with plain bulk copies and is used as it is.
//
// A decoding step is some thousand small kernels. They are recorded as a CUDA graph for each number
// of rows, so that starting them costs the host nothing; and each one may begin before the last one
// has ended (programmatic launch): what it does before overlap_wait must not depend on the others.
#include <assert.h>
#include <cooperative_groups.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// r1.h is C. C++ spells two of its words otherwise, and no atomic of it is used here.
#define _Noreturn [[noreturn]]
#define _Atomic
#define atomic_bool bool
extern "C" {
#include "r1.h"
}

#define E4M3_MAX 448.0f
#define MIN_AMAX 1e-4f  // a group that is smaller is scaled as if it were this large (model.py)

enum {
    WARP = 32,
    STRIP = 16,       // rows of a weight matrix that lie together
    LINE = 128,       // bytes of a row that lie together: the width of the swizzle
    CHUNK = 8,        // bf16 values of a 16-byte load
    PAGE_BYTES = PAGE * CACHE_DIM * 2,
    TOKEN_PAD = 128,  // an Act has room for whole tiles of tokens
};

static __host__ __device__ int div_up(int a, int b) { return (a + b - 1) / b; }

// ---- The device ---------------------------------------------------------------------------------
// One stream takes all work in order, so nothing but the host ever waits.

static cudaStream_t stream;

static void check(cudaError_t error, const char *what) {
    if (error != cudaSuccess) die("CUDA: %s: %s", what, cudaGetErrorString(error));
}

void device_init(void) {
    int major = 0, minor = 0;
    if (stream) return;
    // All kernels are loaded now: the first call of one could not load it while a graph is recorded.
    setenv("CUDA_MODULE_LOADING", "EAGER", 0);
    check(cudaSetDevice(0), "the first GPU");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "attributes");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "attributes");
    if (major != 9) die("CUDA: got a GPU of compute capability %d.%d, want 9.0", major, minor);
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
}

void device_memory(size_t *available, size_t *total) {
    check(cudaMemGetInfo(available, total), "memory");
}

void *device_alloc(size_t bytes) {
    void *p;
    if (cudaMalloc(&p, bytes ? bytes : 1) != cudaSuccess) {
        size_t available = 0, total = 0;
        device_memory(&available, &total);
        die("out of GPU memory: %zu bytes wanted, %zu of %zu are free", bytes, available, total);
    }
    check(cudaMemsetAsync(p, 0, bytes, stream), "memset");
    return p;
}

void device_free(void *p) { check(cudaFree(p), "free"); }

// Starts a kernel that may begin while the one before it ends.
template <typename... Wanted, typename... Given>
static void launch(void (*kernel)(Wanted...), dim3 grid, int threads, size_t shared, Given... args) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {grid, dim3(threads), shared, stream, &early, 1};
    check(cudaLaunchKernelEx(&config, kernel, args...), "kernel");
}

// Lets the next kernel be set up, and waits until all that earlier ones wrote is there. Every kernel
// calls both: one that did not wait would let the next but one run too early.
static __device__ void overlap_next(void) { asm volatile("griddepcontrol.launch_dependents;"); }
static __device__ void overlap_wait(void) { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- From the host: small things of each step ---------------------------------------------------
// Arrays of a step go through one pinned buffer and one copy. The buffer is written again only when
// its last copy is done.

typedef struct {
    uint8_t *host, *device;
    size_t size, used;
    cudaEvent_t copied;
} Mailbox;

static size_t mail_bytes(size_t bytes) { return (bytes + 15) / 16 * 16; }

// Makes room for arrays that add up to `bytes` in mail_bytes. True: the buffer moved.
static bool mail_open(Mailbox *m, size_t bytes) {
    if (!m->copied) check(cudaEventCreateWithFlags(&m->copied, cudaEventDisableTiming), "event");
    check(cudaEventSynchronize(m->copied), "copy");
    m->used = 0;
    if (bytes <= m->size) return false;
    check(cudaStreamSynchronize(stream), "stream");
    check(cudaFreeHost(m->host), "free"), check(cudaFree(m->device), "free");
    m->size = 2 * bytes;
    check(cudaMallocHost(&m->host, m->size), "pinned memory");
    m->device = (uint8_t *)device_alloc(m->size);
    return true;
}

// Adds an array (NULL: room that the caller fills) and says where it will be on the device.
static void *mail_add(Mailbox *m, const void *data, size_t bytes) {
    size_t at = m->used;
    m->used += mail_bytes(bytes);
    assert(m->used <= m->size);
    if (data) memcpy(m->host + at, data, bytes);
    return m->device + at;
}

static void mail_send(Mailbox *m) {
    check(cudaMemcpyAsync(m->device, m->host, m->used, cudaMemcpyHostToDevice, stream), "copy");
    check(cudaEventRecord(m->copied, stream), "event");
}

// ---- One step -----------------------------------------------------------------------------------
// Steps of at most MAX_RECORDED rows, all with logits, are recorded when their number of rows first
// comes, exactly that many: rows that only fill up would be routed to experts, whose weights would
// have to be read. What else differs from step to step, lengths and pages, lies in device memory.

enum { MAX_RECORDED = 256 };

static struct {
    Mailbox mail;
    cudaGraphExec_t recorded[MAX_RECORDED + 1], run;
    int recording;  // rows; 0: none
} step;

static void step_forget(void) {
    for (int n = 0; n <= MAX_RECORDED; n++)
        if (step.recorded[n]) check(cudaGraphExecDestroy(step.recorded[n]), "graph");
    memset(step.recorded, 0, sizeof step.recorded);
}

// The rows from `first` on that belong to one sequence: their end, and how many pages they see.
static int batch_run(const Batch *b, int first, int *pages) {
    int i = first;
    for (*pages = 0; i < b->n && b->seq[i] == b->seq[first]; i++)
        if (*pages <= b->position[i] / PAGE) *pages = b->position[i] / PAGE + 1;
    return i;
}

// Of the page tables only what is used is sent, one run behind the other: on the device max_pages is
// 1, and a row's seq is where its run begins.
bool step_begin(Batch *placed, const Batch *b) {
    size_t rows = mail_bytes(b->n * sizeof(int)), out = mail_bytes(b->n_out * sizeof(int));
    int pages, total = 0;
    for (int i = 0; i < b->n; total += pages) i = batch_run(b, i, &pages);
    if (mail_open(&step.mail, 3 * rows + out + mail_bytes(total * sizeof(int)))) step_forget();
    placed->n = b->n, placed->max_pages = 1, placed->n_out = b->n_out;
    placed->id = (int *)mail_add(&step.mail, b->id, b->n * sizeof(int));
    placed->position = (int *)mail_add(&step.mail, b->position, b->n * sizeof(int));
    int *seq = (int *)(step.mail.host + step.mail.used);
    placed->seq = (int *)mail_add(&step.mail, NULL, b->n * sizeof(int));
    placed->out = (int *)mail_add(&step.mail, b->out, b->n_out * sizeof(int));
    int *table = (int *)(step.mail.host + step.mail.used), at = 0;
    placed->pages = (int *)mail_add(&step.mail, NULL, total * sizeof(int));
    for (int i = 0, end; i < b->n; at += pages) {
        end = batch_run(b, i, &pages);
        memcpy(table + at, b->pages + (size_t)b->seq[i] * b->max_pages, pages * sizeof(int));
        for (; i < end; i++) seq[i] = at;
    }
    mail_send(&step.mail);
    if (b->n > MAX_RECORDED || b->n_out != b->n) return true;
    if ((step.run = step.recorded[b->n])) return false;
    step.recording = b->n;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording");
    return true;
}

void step_end(void) {
    if (step.recording) {
        cudaGraph_t graph;
        check(cudaStreamEndCapture(stream, &graph), "recording");
        check(cudaGraphInstantiate(&step.run, graph, 0), "graph");
        check(cudaGraphDestroy(graph), "graph");
        step.recorded[step.recording] = step.run;
        step.recording = 0;
    }
    if (step.run) check(cudaGraphLaunch(step.run, stream), "graph");
    step.run = NULL;
}

// ---- Placing weights ----------------------------------------------------------------------------
// A weight's bytes are read into one of two pinned buffers, copied to one on the device, and
// repacked from there, while the next ones are read into the other. What is not read and not copied
// is a layout: a matrix is strips of 16 rows, [out/16][in bytes/128][16 rows][128 bytes], in which
// the 16-byte chunk c of row r stands at c ^ (r mod 8). That is the order in which a tensor core's
// operand of 8 rows by 128 bytes is free of bank conflicts.

enum { STAGE_BYTES = 32 << 20 };

static struct {
    uint8_t *host[2], *device[2];
    cudaEvent_t used[2];
    int turn;
} stage;

static struct { void **data; int n; } placed;

static uint8_t *place_alloc(size_t bytes) {
    placed.data = (void **)xrealloc(placed.data, (placed.n + 1) * sizeof *placed.data);
    return (uint8_t *)(placed.data[placed.n++] = device_alloc(bytes));
}

void place_free(void) {
    check(cudaStreamSynchronize(stream), "stream");
    step_forget();
    while (placed.n) device_free(placed.data[--placed.n]);
    free(placed.data);
    placed.data = NULL;
}

static float vector_at(const uint8_t *data, DType dtype, size_t i) {
    uint32_t bits = 0;
    memcpy((uint8_t *)&bits + (dtype == DTYPE_BF16 ? 2 : 0), data + i * (dtype == DTYPE_BF16 ? 2 : 4),
           dtype == DTYPE_BF16 ? 2 : 4);
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

// To bf16 as kernels.c rounds, for the few matrices that some copies of R1 store in f32.
static uint16_t round_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return f != f ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Brings n values to the device, f32 ones of a matrix as bf16, and returns which buffer holds them.
// stage_done must follow when what reads the buffer is in the stream.
static int stage_load(const uint8_t *src, DType dtype, size_t n) {
    int i = stage.turn ^= 1;
    size_t bytes = n * (dtype == DTYPE_F8_E4M3 ? 1 : 2);
    if (!stage.host[i]) {
        check(cudaMallocHost(&stage.host[i], STAGE_BYTES), "pinned memory");
        stage.device[i] = (uint8_t *)device_alloc(STAGE_BYTES);
        check(cudaEventCreateWithFlags(&stage.used[i], cudaEventDisableTiming), "event");
    }
    check(cudaEventSynchronize(stage.used[i]), "copy");
    if (dtype != DTYPE_F32) memcpy(stage.host[i], src, bytes);
    for (size_t k = 0; k < n && dtype == DTYPE_F32; k++)
        ((uint16_t *)stage.host[i])[k] = round_half(vector_at(src, dtype, k));
    check(cudaMemcpyAsync(stage.device[i], stage.host[i], bytes, cudaMemcpyHostToDevice, stream),
          "copy");
    return i;
}

static void stage_done(int i) { check(cudaEventRecord(stage.used[i], stream), "event"); }

// Row r of a matrix goes to row r / group x 16 + r mod group + offset of dst: all 16 rows of a strip
// (group 16), or 8 rows of gate_proj (offset 0) and 8 of up_proj (offset 8), which SwiGLU then finds
// in one thread's registers. A thread moves 16 bytes. Cost: read and write of every byte.
static __global__ void repack_kernel(uint8_t *dst, const uint8_t *src, int first, int n,
                                     int row_bytes, int group, int offset) {
    int per_row = row_bytes / 16;
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    int row = i / per_row, c = i % per_row;
    if (row >= n) return;
    int to = (first + row) / group * STRIP + (first + row) % group + offset;
    uint8_t *line = dst + (size_t)(to / STRIP) * STRIP * row_bytes +
                    (size_t)(c / 8) * STRIP * LINE + to % STRIP * LINE;
    ((uint4 *)line)[c % 8 ^ to % 8] = ((const uint4 *)src)[i];
}

// kv_b_proj of a head is W_UK [128][512] and W_UV [128][512]. Queries are multiplied by W_UK from
// the other side, so it is placed transposed: [512][128], 32 strips, then W_UV's 8 strips. A thread
// makes 16 bytes of W_UK's part; its reads are single bytes, which the caches make good.
static __global__ void repack_key_kernel(uint8_t *dst, const uint8_t *src) {
    int j = blockIdx.x, head = blockIdx.y, c = threadIdx.x;  // row of W_UK^T, chunk of its 128
    union { uint8_t byte[16]; uint4 all; } out;
    src += (size_t)head * KV_DIM * LATENT_DIM;
    for (int i = 0; i < 16; i++) out.byte[i] = src[(c * 16 + i) * LATENT_DIM + j];
    dst += (size_t)head * KV_DIM * LATENT_DIM + j / STRIP * STRIP * LINE + j % STRIP * LINE;
    ((uint4 *)dst)[c ^ j % 8] = out.all;
}

static void repack(uint8_t *dst, const uint8_t *src, int first, int n, int row_bytes, int group,
                   int offset) {
    enum { THREADS = 256 };
    size_t chunks = (size_t)n * (row_bytes / 16);
    repack_kernel<<<(chunks + THREADS - 1) / THREADS, THREADS, 0, stream>>>(
        dst, src, first, n, row_bytes, group, offset);
    check(cudaGetLastError(), "repack");
}

// Returns the bytes that the checkpoint has for it.
static size_t place_matrix(uint8_t *dst, const Linear *w, int group, int offset) {
    size_t from = w->dtype == DTYPE_F8_E4M3 ? 1 : w->dtype == DTYPE_BF16 ? 2 : 4;
    int row_bytes = w->in * (from > 1 ? 2 : 1), most = STAGE_BYTES / row_bytes;
    assert(most > 0);
    for (int first = 0, n; first < w->out; first += n) {
        n = w->out - first < most ? w->out - first : most;
        int i = stage_load(w->data + (size_t)first * w->in * from, w->dtype, (size_t)n * w->in);
        repack(dst, stage.device[i], first, n, row_bytes, group, offset);
        stage_done(i);
    }
    return (size_t)w->out * w->in * from;
}

// As it lies in the checkpoint, but for f32 that becomes bf16.
static size_t place_rows(uint8_t *dst, const uint8_t *src, DType dtype, size_t n) {
    size_t from = dtype == DTYPE_F8_E4M3 ? 1 : dtype == DTYPE_BF16 ? 2 : 4, to = from > 1 ? 2 : 1;
    for (size_t first = 0, part; first < n; first += part) {
        part = n - first < STAGE_BYTES / to ? n - first : STAGE_BYTES / to;
        int i = stage_load(src + first * from, dtype, part);
        check(cudaMemcpyAsync(dst + first * to, stage.device[i], part * to,
                              cudaMemcpyDeviceToDevice, stream), "copy");
        stage_done(i);
    }
    return n * from;
}

static size_t place_key_value(uint8_t *dst, const Linear *w) {
    const int head = KV_DIM * LATENT_DIM, heads = w->out / KV_DIM, most = STAGE_BYTES / head;
    if (w->dtype != DTYPE_F8_E4M3) die("this checkpoint is bf16, a GPU wants R1's FP8 one");
    for (int first = 0, n; first < heads; first += n) {
        n = heads - first < most ? heads - first : most;
        size_t at = (size_t)first * head;
        int i = stage_load(w->data + at, w->dtype, (size_t)n * head);
        repack_key_kernel<<<dim3(LATENT_DIM, n), NOPE_DIM / 16, 0, stream>>>(dst + at,
                                                                             stage.device[i]);
        check(cudaGetLastError(), "repack");
        for (int h = 0; h < n; h++)
            repack(dst + at + (size_t)h * head + head / 2, stage.device[i] + h * head + head / 2, 0,
                   V_DIM, LATENT_DIM, STRIP, 0);
        stage_done(i);
    }
    return (size_t)w->out * w->in;
}

static size_t scale_count(const Linear *w) {
    return w->dtype == DTYPE_F8_E4M3 ? (size_t)div_up(w->out, BLOCK) * (w->in / BLOCK) : 0;
}

// Bytes of a placed matrix: whole strips.
static size_t matrix_bytes(const Linear *w) {
    return (size_t)div_up(w->out, STRIP) * STRIP * w->in * (w->dtype == DTYPE_F8_E4M3 ? 1 : 2);
}

// The scales stay as they are, four bytes each.
static size_t place_scales(uint8_t *dst, const Linear *w) {
    return place_rows(dst, w->scale, DTYPE_F8_E4M3, scale_count(w) * sizeof(float));
}

// Vectors are f32 on the device, whatever they were.
size_t place_vector(Vector *v) {
    size_t from = v->dtype == DTYPE_BF16 ? 2 : 4, bytes = v->dim * sizeof(float);
    float *values = (float *)xmalloc(bytes);
    uint8_t *data = place_alloc(bytes);
    for (int i = 0; i < v->dim; i++) values[i] = vector_at(v->data, v->dtype, i);
    place_rows(data, (uint8_t *)values, DTYPE_F8_E4M3, bytes);
    free(values);
    *v = (Vector){v->dim, DTYPE_F32, data};
    return v->dim * from;
}

size_t place_linear(Linear *w, Place as) {
    uint8_t *data = place_alloc(matrix_bytes(w)), *scale = NULL;
    size_t bytes = as == PLACE_MATRIX ? place_matrix(data, w, STRIP, 0)
                   : as == PLACE_KV_B
                       ? place_key_value(data, w)
                       : place_rows(data, w->data, w->dtype, (size_t)w->out * w->in);
    if (w->dtype == DTYPE_F8_E4M3) {
        scale = place_alloc(scale_count(w) * sizeof(float));
        bytes += place_scales(scale, w);
    }
    DType dtype = w->dtype == DTYPE_F8_E4M3 ? DTYPE_F8_E4M3 : DTYPE_BF16;
    *w = (Linear){w->out, w->in, dtype, data, scale};
    return bytes;
}

// A layer's experts lie side by side, so that a kernel finds number e at base + e x size, and the
// shared one is number n. Gate and up are one matrix of twice the rows; their scales are two arrays.
size_t place_mlp(Mlp *m, int n, Mlp *shared) {
    int all = n + (shared != NULL);
    size_t up_size = matrix_bytes(&m->up_proj), down_size = matrix_bytes(&m->down_proj), bytes = 0;
    size_t up_scales = scale_count(&m->up_proj) * sizeof(float);
    size_t down_scales = scale_count(&m->down_proj) * sizeof(float);
    uint8_t *up = place_alloc(2 * all * up_size), *down = place_alloc(all * down_size);
    uint8_t *scale[3] = {place_alloc(all * up_scales), place_alloc(all * up_scales),
                         place_alloc(all * down_scales)};
    for (int e = 0; e < all; e++) {
        Mlp *x = e < n ? m + e : shared;
        Linear *part[3] = {&x->gate_proj, &x->up_proj, &x->down_proj};
        for (int i = 0; i < 3; i++) {
            uint8_t *data = i < 2 ? up + e * 2 * up_size : down + e * down_size;
            bytes += place_matrix(data, part[i], i < 2 ? STRIP / 2 : STRIP, i == 1 ? STRIP / 2 : 0);
            part[i]->data = data;
            if (part[i]->dtype != DTYPE_F8_E4M3) continue;
            scale[i] += e ? i < 2 ? up_scales : down_scales : 0;
            bytes += place_scales(scale[i], part[i]);
            part[i]->scale = scale[i];
        }
    }
    return bytes;
}

// ---- Numbers ------------------------------------------------------------------------------------
// Everything is computed in f32 and rounded where kernels.c rounds. Where bits must be equal,
// products and sums that follow each other are kept from becoming one fused operation.

static __device__ uint32_t to_bf16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

static __device__ uint32_t to_e4m3x2(float low, float high) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

static __device__ void unpack8(float v[CHUNK], uint4 chunk) {
    const uint32_t pair[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    for (int i = 0; i < 4; i++)
        v[2 * i] = __uint_as_float(pair[i] << 16), v[2 * i + 1] = __uint_as_float(pair[i] & ~0xffffu);
}

static __device__ uint4 pack8(const float v[CHUNK]) {
    return make_uint4(to_bf16x2(v[0], v[1]), to_bf16x2(v[2], v[3]), to_bf16x2(v[4], v[5]),
                      to_bf16x2(v[6], v[7]));
}

// The sum of all threads' v, for all threads, always in the same order. Once in a kernel.
static __device__ float block_sum(float v) {
    __shared__ float warp[WARP];
    for (int d = WARP / 2; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    if (threadIdx.x % WARP == 0) warp[threadIdx.x / WARP] = v;
    __syncthreads();
    v = threadIdx.x % WARP < blockDim.x / WARP ? warp[threadIdx.x % WARP] : 0;
    for (int d = WARP / 2; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    return v;
}

// ---- Rows on their way into a linear ------------------------------------------------------------
// Quantised values lie as the tensor cores read them, [cols/128][tokens][128 bytes] with chunk c of
// token t at c ^ (t mod 8), and the scales beside: [cols/128][tokens]. The unquantised values that
// bf16 matrices want are plain rows.

struct Act {
    int cols, stride;  // stride: tokens that there is room for
    bf16 *x;           // [stride][cols]
    uint8_t *q;        // [cols / 128][stride][128]
    float *scale;      // [cols / 128][stride]
};

Act *act_new(int rows, int cols) {
    assert(cols % BLOCK == 0);
    Act *a = (Act *)xmalloc(sizeof *a);
    size_t stride = (size_t)div_up(rows, TOKEN_PAD) * TOKEN_PAD;
    *a = (Act){cols, (int)stride, (bf16 *)device_alloc(stride * cols * sizeof(bf16)),
               (uint8_t *)device_alloc(stride * cols),
               (float *)device_alloc(stride * (cols / BLOCK) * sizeof(float))};
    return a;
}

void act_free(Act *a) {
    if (!a) return;
    device_free(a->x), device_free(a->q), device_free(a->scale);
    free(a);
}

// Quantises and stores eight columns of a token, chunk c of its row; sixteen neighbouring threads
// hold a scale group. A thread that is not `there` only takes part in the exchange.
static __device__ void quantise8(const Act &a, int token, int c, float v[CHUNK], bool there) {
    enum { GROUP = BLOCK / CHUNK };
    float amax = MIN_AMAX;
    for (int i = 0; i < CHUNK; i++) amax = fmaxf(amax, fabsf(v[i]));
    for (int d = GROUP / 2; d; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
    float scale = amax / E4M3_MAX;
    if (!there) return;
    for (int i = 0; i < CHUNK; i++) v[i] /= scale;
    uint2 q = make_uint2(to_e4m3x2(v[0], v[1]) | to_e4m3x2(v[2], v[3]) << 16,
                         to_e4m3x2(v[4], v[5]) | to_e4m3x2(v[6], v[7]) << 16);
    size_t line = (size_t)(c / GROUP) * a.stride + token;
    uint8_t *to = a.q + line * LINE + ((c % GROUP / 2 ^ token % 8) << 4) + c % 2 * CHUNK;
    *(uint2 *)to = q;
    if (c % GROUP == 0) a.scale[line] = scale;
}

// ---- The stages: the small ones -----------------------------------------------------------------

typedef struct { float v[ROPE_DIM / 2]; } Frequencies;

// A thread makes one cosine and sine, in double, since the angles go up to 163,840 and f32's own
// reduction costs more than it saves. Once a step: its time does not matter.
static __global__ void rope_kernel(float2 *rope, Frequencies f, const int *position, int n) {
    overlap_next();
    overlap_wait();
    int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / (ROPE_DIM / 2);
    if (row >= n) return;
    double sine, cosine;
    sincos((double)((float)position[row] * f.v[i % (ROPE_DIM / 2)]), &sine, &cosine);
    rope[i] = make_float2(cosine, sine);
}

void rope_angles(float *rope, const float *inv_freq, const int *position, int n) {
    enum { THREADS = 128 };
    Frequencies f;
    memcpy(&f, inv_freq, sizeof f);
    launch(rope_kernel, div_up(n * (ROPE_DIM / 2), THREADS), THREADS, 0, (float2 *)rope, f, position,
           n);
}

// A block copies a row in 16-byte pieces: 14 KB, read and written once.
static __global__ void embed_kernel(uint4 *x, const uint4 *table, const int *id, int chunks) {
    overlap_next();
    overlap_wait();
    const uint4 *row = table + (size_t)id[blockIdx.x] * chunks;
    x += (size_t)blockIdx.x * chunks;
    for (int c = threadIdx.x; c < chunks; c += blockDim.x) x[c] = row[c];
}

// Threads for a row of `cols` columns, eight each, in whole warps.
static int row_threads(int cols) {
    int threads = div_up(cols / CHUNK, WARP) * WARP;
    return threads < 1024 ? threads : 1024;
}

void embed(bf16 *x, const Linear *table, const int *id, int n) {
    launch(embed_kernel, n, row_threads(table->in), 0, (uint4 *)x, (const uint4 *)table->data, id,
           table->in / CHUNK);
}

static __device__ float square8(const float v[CHUNK]) {
    float sum = 0;
    for (int i = 0; i < CHUNK; i++) sum += v[i] * v[i];
    return sum;
}

// v = bf16(v inverse gain[8 c ..]), rounded; returns the same, packed.
static __device__ uint4 norm8(float v[CHUNK], float inverse, const float *gain, int c) {
    const float4 *g = (const float4 *)gain + 2 * c, low = g[0], high = g[1];
    const float scale[CHUNK] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    for (int i = 0; i < CHUNK; i++) v[i] = v[i] * inverse * scale[i];
    uint4 packed = pack8(v);
    unpack8(v, packed);
    return packed;
}

// The block's row is in shared memory, and `square` this thread's part of its squares.
static __device__ void act_norm(const Act &a, int token, const uint4 *row, float square,
                                const float *gain, float eps) {
    int chunks = a.cols / CHUNK;
    float inverse = 1 / sqrtf(block_sum(square) / a.cols + eps);
    for (int first = 0; first < chunks; first += blockDim.x) {
        int c = first + threadIdx.x;
        float v[CHUNK] = {0};
        if (c < chunks) {
            unpack8(v, row[c]);
            ((uint4 *)a.x)[(size_t)token * chunks + c] = norm8(v, inverse, gain, c);
        }
        quantise8(a, token, c, v, c < chunks);
    }
}

// A block takes a row, so that one exchange gives its sum of squares; each thread keeps what it read
// in shared memory for the second pass. Moves 14 KB in twice and out 1.5 times: at few rows only the
// latency counts, which is two trips to L2 and one exchange.
static __global__ void add_norm_kernel(bf16 *x, Act a, const bf16 *y, const float *gain, float eps) {
    extern __shared__ uint4 row[];
    int token = blockIdx.x, chunks = a.cols / CHUNK;
    uint4 *to = (uint4 *)x + (size_t)token * chunks;
    const uint4 *add = (const uint4 *)y + (size_t)token * chunks;
    float square = 0;
    overlap_next();
    overlap_wait();
    for (int c = threadIdx.x; c < chunks; c += blockDim.x) {
        float v[CHUNK], w[CHUNK];
        row[c] = to[c];
        unpack8(v, row[c]);
        if (y) {
            unpack8(w, add[c]);
            for (int i = 0; i < CHUNK; i++) v[i] += w[i];
            to[c] = row[c] = pack8(v);
            unpack8(v, row[c]);
        }
        square += square8(v);
    }
    act_norm(a, token, row, square, gain, eps);
}

void add_norm(bf16 *x, Act *a, const bf16 *y, const Vector *gain, float eps, int n) {
    launch(add_norm_kernel, n, row_threads(a->cols), a->cols * sizeof(bf16), x, *a, y,
           (const float *)gain->data, eps);
}

// ---- The stages: what is cached -----------------------------------------------------------------

// Neighbours are a pair: (v[2i], v[2i+1]) turns by an angle; `angle` holds cosines and sines.
static __device__ void rotate8(float v[CHUNK], const float *angle) {
    for (int i = 0; i < CHUNK; i += 2) {
        float re = v[i], im = v[i + 1], cosine = angle[i], sine = angle[i + 1];
        v[i] = __fsub_rn(__fmul_rn(re, cosine), __fmul_rn(im, sine));
        v[i + 1] = __fadd_rn(__fmul_rn(re, sine), __fmul_rn(im, cosine));
    }
}

// Chunk c of a row's latent and key part goes into its page: [9 blocks of 64 dims][64 tokens][128
// bytes], swizzled by the token, so that a page is one bulk copy and both of attention's operands.
static __device__ void cache_store(bf16 *cache, const Batch &b, int token, int c, uint4 chunk) {
    int position = b.position[token], t = position % PAGE;
    int page = b.pages[(size_t)b.seq[token] * b.max_pages + position / PAGE];
    uint8_t *line = (uint8_t *)cache + (size_t)page * PAGE_BYTES + c / 8 * PAGE * LINE + t * LINE;
    ((uint4 *)line)[c % 8 ^ t % 8] = chunk;
}

// Two blocks a row, which need nothing of each other: one norms and quantises q, the other makes
// the cache's entry. Some KB a row; latency is all.
static __global__ void mla_latent_kernel(Act qa, bf16 *cache, const uint4 *q, const uint4 *kv,
                                         const float *q_gain, const float *kv_gain, float eps,
                                         const float *rope, Batch b) {
    extern __shared__ uint4 row[];
    int token = blockIdx.x, chunks = qa.cols / CHUNK, c = threadIdx.x;
    enum { LATENT_CHUNKS = LATENT_DIM / CHUNK, ALL_CHUNKS = CACHE_DIM / CHUNK };
    float v[CHUNK] = {0}, square = 0;
    overlap_next();
    overlap_wait();
    if (blockIdx.y == 0) {
        for (; c < chunks; c += blockDim.x) {
            row[c] = q[(size_t)token * chunks + c];
            unpack8(v, row[c]);
            square += square8(v);
        }
        act_norm(qa, token, row, square, q_gain, eps);
        return;
    }
    if (c < ALL_CHUNKS) unpack8(v, kv[(size_t)token * ALL_CHUNKS + c]);
    if (c < LATENT_CHUNKS) square = square8(v);
    float inverse = 1 / sqrtf(block_sum(square) / LATENT_DIM + eps);
    if (c < LATENT_CHUNKS) {
        cache_store(cache, b, token, c, norm8(v, inverse, kv_gain, c));
    } else if (c < ALL_CHUNKS) {  // k_pe is not normed
        rotate8(v, rope + token * ROPE_DIM + (c - LATENT_CHUNKS) * CHUNK);
        cache_store(cache, b, token, c, pack8(v));
    }
}

void mla_latent(Act *qa, bf16 *cache, const bf16 *q, const bf16 *kv, const Vector *q_gain,
                const Vector *kv_gain, float eps, const float *rope, const Batch *b) {
    int threads = row_threads(qa->cols), least = row_threads(CACHE_DIM);
    launch(mla_latent_kernel, dim3(b->n, 2), threads > least ? threads : least,
           qa->cols * sizeof(bf16), *qa, cache, (const uint4 *)q, (const uint4 *)kv,
           (const float *)q_gain->data, (const float *)kv_gain->data, eps, rope, *b);
}

// ---- The stages: routing ------------------------------------------------------------------------

Routing routing_new(int rows, const Config *c) {
    size_t pairs = (size_t)rows * c->num_experts_per_tok;
    int widest = c->hidden_size > c->n_routed_experts ? c->hidden_size : c->n_routed_experts;
    Routing r = {};
    r.expert = (int *)device_alloc(pairs * sizeof(int));
    r.weight = (float *)device_alloc(pairs * sizeof(float));
    r.start = (int *)device_alloc((c->n_routed_experts + 1) * sizeof(int));
    r.pair = (int *)device_alloc(pairs * sizeof(int));
    r.sum = (float *)device_alloc((size_t)rows * widest * sizeof(float));
    return r;
}

void routing_free(Routing *r) {
    device_free(r->expert), device_free(r->weight), device_free(r->start), device_free(r->pair);
    device_free(r->sum);
}

// Larger for a larger value; NaN is below all.
static __device__ uint32_t order(float v) {
    uint32_t bits = __float_as_uint(v + 0.0f);  // -0 becomes 0
    return v != v ? 0 : bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

static __device__ float order_value(uint32_t key) {
    return __uint_as_float(key & 0x80000000 ? key ^ 0x80000000 : ~key);
}

// The index of the largest of n values, the lowest on a tie, for all lanes of a warp.
static __device__ int warp_argmax(const float *v, int n) {
    uint32_t best = 0;
    int at = n;
    for (int i = threadIdx.x; i < n; i += WARP)
        if (at == n || order(v[i]) > best) best = order(v[i]), at = i;
    uint32_t top = __reduce_max_sync(~0u, best);
    return __reduce_min_sync(~0u, best == top ? at : n);
}

// The sum of the two largest of n values.
static __device__ float warp_best_two(const float *v, int n) {
    uint32_t best = order(-INFINITY), second = best;
    for (int i = threadIdx.x; i < n; i += WARP) {
        uint32_t key = order(v[i]);
        if (key > best) second = best, best = key;
        else if (key > second) second = key;
    }
    uint32_t top = __reduce_max_sync(~0u, best);
    // The lane that has it (of equals only one) offers its second one in the next round.
    if ((int)threadIdx.x == __ffs(__ballot_sync(~0u, best == top)) - 1) best = second;
    return order_value(top) + order_value(__reduce_max_sync(~0u, best));
}

static __device__ float sigmoid(float v) { return 1 / (1 + expf(-v)); }

typedef struct { int n_experts, n_group, topk_group, k; float scale; } RouteDims;

// A warp takes a row: scores, then the best groups by the sum of their two best, then the best
// experts inside them, each found by a vote over order-preserving keys. The bias steers the choice
// and never enters a weight. About a microsecond of dependent votes; a row reads 1 KB.
static __global__ void route_kernel(Routing r, const float *product, const float *bias,
                                    RouteDims d) {
    extern __shared__ float choice[];                      // [n_experts]
    float *kept = choice + d.n_experts, *group = kept + d.n_experts;  // [n_experts], [n_group]
    int row = blockIdx.x, lane = threadIdx.x, size = d.n_experts / d.n_group, mine = 0;
    product += (size_t)row * d.n_experts;
    overlap_next();
    overlap_wait();
    for (int e = lane; e < d.n_experts; e += WARP) {
        choice[e] = sigmoid(product[e]) + bias[e];
        kept[e] = -INFINITY;
    }
    __syncwarp();
    for (int g = 0; g < d.n_group; g++) {
        float best = warp_best_two(choice + g * size, size);
        if (lane == 0) group[g] = best;
    }
    __syncwarp();
    for (int i = 0; i < d.topk_group; i++) {
        int g = warp_argmax(group, d.n_group);
        for (int e = lane; e < size; e += WARP) kept[g * size + e] = choice[g * size + e];
        __syncwarp();
        if (lane == 0) group[g] = -INFINITY;
        __syncwarp();
    }
    for (int i = 0; i < d.k; i++) {
        int e = warp_argmax(kept, d.n_experts);
        if (lane == i) mine = e;
        __syncwarp();
        if (lane == 0) kept[e] = -INFINITY;
        __syncwarp();
    }
    float weight = sigmoid(product[mine]), total = 0;
    for (int i = 0; i < d.k; i++) total += __shfl_sync(~0u, weight, i);
    if (lane >= d.k) return;
    r.expert[row * d.k + lane] = mine;
    r.weight[row * d.k + lane] = weight / (total + 1e-20f) * d.scale;
}

// A block makes one expert's list: it counts the choices of smaller experts, which is where the list
// starts, and copies its own in order. All blocks read all choices, 32 bytes a row, from L2; that is
// less than two kernels and a scan would cost up to some thousand rows.
static __global__ void route_lists_kernel(Routing r, int pairs) {
    __shared__ int own[WARP], smaller[WARP];
    int e = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, before = 0, at = 0;
    overlap_next();
    overlap_wait();
    for (int p = threadIdx.x; p < pairs; p += blockDim.x) before += r.expert[p] < e;
    before = __reduce_add_sync(~0u, before);
    if (lane == 0) smaller[warp] = before;
    __syncthreads();
    for (int w = 0; w < (int)blockDim.x / WARP; w++) at += smaller[w];
    if (threadIdx.x == 0) r.start[e] = at;
    if (threadIdx.x == 0 && e == (int)gridDim.x - 1) r.start[e + 1] = pairs;
    for (int first = 0; first < pairs; first += blockDim.x) {
        int p = first + threadIdx.x;
        bool take = p < pairs && r.expert[p] == e;
        uint32_t lanes = __ballot_sync(~0u, take);
        if (lane == 0) own[warp] = __popc(lanes);
        __syncthreads();
        int to = at + __popc(lanes & ((1u << lane) - 1));
        for (int w = 0; w < (int)blockDim.x / WARP; w++) {
            if (w < warp) to += own[w];
            at += own[w];
        }
        if (take) r.pair[to] = p;
        __syncthreads();
    }
}

// From the router's product [n][n_experts], which r->sum holds.
static void route(Routing *r, const Vector *bias, const Config *c, int n) {
    RouteDims d = {c->n_routed_experts, c->n_group, c->topk_group, c->num_experts_per_tok,
                   (float)c->routed_scaling_factor};
    int pairs = n * d.k, threads = pairs < 512 ? div_up(pairs, WARP) * WARP : 512;
    launch(route_kernel, n, WARP, (2 * d.n_experts + d.n_group) * sizeof(float), *r, r->sum,
           (const float *)bias->data, d);
    launch(route_lists_kernel, d.n_experts, threads, 0, *r, pairs);
}

void moe_route(Routing *r, const Act *a, const Linear *gate, const Vector *bias, const Config *c,
               int n) {
    logits(r->sum, a, gate, NULL, n);
    route(r, bias, c, n);
}

// ---- Choosing a token ---------------------------------------------------------------------------
// A row of logits is 129,280 numbers, half a megabyte. A team of eight blocks, a cluster, takes it:
// every question about the row (its largest value, its sum, how many are above a threshold) is one
// pass of all its threads over L2 and one exchange through the cluster's shared memory, some two
// microseconds. Nothing is sorted: the place where top_k, top_p and min_p cut is found digit by digit.

enum { TEAM = 8, TEAM_THREADS = 1024, DIGIT = 8, BINS = 1 << DIGIT };

static __host__ __device__ void philox_rounds(uint32_t out[4], uint64_t key, uint32_t c0,
                                              uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = key, k1 = key >> 32;
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1, c3 = (uint32_t)p0, c0 = n0, c2 = n2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

void philox(uint32_t out[4], uint64_t key, const uint32_t counter[4]) {
    philox_rounds(out, key, counter[0], counter[1], counter[2], counter[3]);
}

static __device__ float gumbel(uint64_t seed, int position, int id) {
    uint32_t word[4];
    philox_rounds(word, seed, id / 4, position, 0, 0);
    uint32_t mine = id % 4 < 2 ? id % 4 < 1 ? word[0] : word[1] : id % 4 < 3 ? word[2] : word[3];
    float u = fminf(((float)mine + 0.5f) * 0x1p-32f, 0x1.fffffep-1f);
    return -logf(-log1pf(-u));
}

namespace cg = cooperative_groups;

typedef struct { int id, step, turn; } Team;  // the thread's first id of the row, and how far on

static __device__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
static __device__ double plus(double a, double b) { return a + b; }

// Combines one value of every thread of the team, always in the same order, for all of them. Two
// slots take turns: who writes one again has seen all others leave it.
template <typename T, T (*combine)(T, T)> static __device__ T team_all(Team *t, T v) {
    __shared__ T warp[WARP], block[2];
    cg::cluster_group team = cg::this_cluster();
    T *slot = &block[t->turn++ % 2];
    for (int d = WARP / 2; d; d /= 2) v = combine(v, __shfl_xor_sync(~0u, v, d));
    if (threadIdx.x % WARP == 0) warp[threadIdx.x / WARP] = v;
    __syncthreads();
    if (threadIdx.x < WARP) {
        v = warp[threadIdx.x];
        for (int d = WARP / 2; d; d /= 2) v = combine(v, __shfl_xor_sync(~0u, v, d));
        if (threadIdx.x == 0) *slot = v;
    }
    team.sync();
    v = *team.map_shared_rank(slot, 0);
    for (int i = 1; i < TEAM; i++) v = combine(v, *team.map_shared_rank(slot, i));
    return v;
}

// An id and its value as one number: the largest is the likeliest, of equals the lowest id.
static __device__ uint64_t id_key(float v, int id) { return (uint64_t)order(v) << 32 | (uint32_t)~id; }
static __device__ int key_id(uint64_t key) { return ~(uint32_t)key; }
static __device__ float key_value(uint64_t key) { return order_value(key >> 32); }

static __device__ uint64_t team_best(Team *t, const float *l, int vocab) {
    uint64_t best = 0;
#pragma unroll 8
    for (int id = t->id; id < vocab; id += t->step) best = larger(best, id_key(l[id], id));
    return team_all<uint64_t, larger>(t, best);
}

// The same for the filters, which look at probabilities: how far a logit is below the highest, in
// steps that two different probabilities are apart (2^-25), evenly spread over digits.
static __device__ uint64_t depth_key(float depth, int id) {
    return (uint64_t)~__float2uint_rz(depth * 0x1p25f) << 32 | (uint32_t)~id;
}

typedef struct { uint32_t count[BINS]; unsigned long long mass[BINS]; } Histogram;
typedef struct { uint64_t digit, before, mass; uint32_t count; } Cut;

// Warp 0 walks over the team's histograms from the largest digit down, eight bins a lane, to the last
// bin whose first entry is kept: fewer than most_ids stand before it, and no more than most_mass.
static __device__ void cut_find(Cut *cut, Histogram *h, uint64_t most_ids, uint64_t most_mass) {
    cg::cluster_group team = cg::this_cluster();
    enum { EACH = BINS / WARP };
    uint32_t count[EACH];
    uint64_t mass[EACH], ids = 0, sum = 0;
    int lane = threadIdx.x;
    for (int i = 0; i < EACH; i++) {
        int bin = BINS - 1 - (lane * EACH + i);
        count[i] = 0, mass[i] = 0;
        for (int r = 0; r < TEAM; r++) {
            count[i] += team.map_shared_rank(h, r)->count[bin];
            mass[i] += team.map_shared_rank(h, r)->mass[bin];
        }
        ids += count[i], sum += mass[i];
    }
    uint64_t own_ids = ids, own_sum = sum;
    for (int d = 1; d < WARP; d *= 2) {
        uint64_t left_ids = __shfl_up_sync(~0u, ids, d), left_sum = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) ids += left_ids, sum += left_sum;
    }
    Cut found = {0, cut->before + ids - own_ids, cut->mass + sum - own_sum, 0}, last = found;
    for (int i = 0; i < EACH; i++) {
        if (count[i] && found.before < most_ids && found.mass <= most_mass) {
            last = found;
            last.digit = BINS - 1 - (lane * EACH + i), last.count = count[i];
        }
        found.before += count[i], found.mass += mass[i];
    }
    __syncwarp();
    if (lane == 31 - __clz(__ballot_sync(~0u, last.count > 0))) *cut = last;
}

// The key of the last id that top_k, top_p and min_p leave. Probabilities are summed as integers of
// 2^-62: exactly, and in whatever order the atomics come. Each round settles one digit of the key,
// and mostly three or four leave a single id.
static __device__ uint64_t cut_key(Team *t, const float *l, const Sampling *s, float top, int vocab) {
    __shared__ Histogram h;
    __shared__ Cut cut;
    cg::cluster_group team = cg::this_cluster();
    double total = 0;
#pragma unroll 4
    for (int id = t->id; id < vocab; id += t->step) total += expf(l[id] / s->temperature - top);
    total = team_all<double, plus>(t, total);
    float least = s->min_p * (float)(1 / total);
    uint64_t most_ids = s->top_k < 0 ? UINT64_MAX : s->top_k, prefix = 0;
    uint64_t most_mass = s->top_p >= 1 ? UINT64_MAX : (uint64_t)(s->top_p * 0x1p62);
    if (threadIdx.x == 0) cut = (Cut){};
    for (int shift = 64 - DIGIT;; shift -= DIGIT) {
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) h.count[i] = 0, h.mass[i] = 0;
        __syncthreads();
        for (int id = t->id; id < vocab; id += t->step) {
            float depth = top - l[id] / s->temperature;
            uint64_t digits = depth_key(depth, id) >> shift;
            if (shift < 64 - DIGIT && digits >> DIGIT != prefix) continue;
            float p = expf(-depth) / total;
            if (s->min_p > 0 && p < least) continue;
            atomicAdd(&h.count[digits % BINS], 1);
            atomicAdd(&h.mass[digits % BINS], (unsigned long long)(p * 0x1p62));
        }
        team.sync();
        if (threadIdx.x < WARP) cut_find(&cut, &h, most_ids, most_mass);
        team.sync();
        prefix = prefix << DIGIT | cut.digit;
        if (cut.count == 1 || shift == 0) return prefix << shift;
    }
}

static __device__ bool penalised(const Sampling *s) {
    return s->repetition_penalty != 1 || s->frequency_penalty != 0 || s->presence_penalty != 0;
}

// work = the logits after penalties, bias and bans. An id's place in work first counts how often it
// stands in the output (times two) and whether it stands anywhere (one).
static __device__ void adjust(Team *t, float *work, const float *l, const Sampling *s, int vocab) {
    cg::cluster_group team = cg::this_cluster();
    uint32_t *count = (uint32_t *)work;
    bool penalise = penalised(s);
    if (penalise) {
        for (int id = t->id; id < vocab; id += t->step) count[id] = 0;
        team.sync();
        for (int i = t->id; i < s->n_tokens; i += t->step) {
            atomicOr(&count[s->tokens[i]], 1);
            if (i >= s->n_prompt) atomicAdd(&count[s->tokens[i]], 2);
        }
        team.sync();
    }
    for (int id = t->id; id < vocab; id += t->step) {
        uint32_t seen = penalise ? count[id] : 0;
        float v = l[id];
        if (seen && s->repetition_penalty != 1)
            v = v > 0 ? v / s->repetition_penalty : v * s->repetition_penalty;
        if (seen > 1)
            v = __fsub_rn(__fsub_rn(v, __fmul_rn(s->frequency_penalty, seen / 2)),
                          s->presence_penalty);
        work[id] = v;
    }
    team.sync();
    for (int i = t->id; i < s->n_bias; i += t->step) work[s->bias_id[i]] += s->bias[i];
    team.sync();
    for (int i = t->id; i < s->n_banned; i += t->step)
        if (s->banned[i] < vocab) work[s->banned[i]] = -INFINITY;
    team.sync();
}

static __device__ int choose(Team *t, float *work, const float *l, const Sampling *s, int vocab) {
    adjust(t, work, l, s, vocab);
    uint64_t best = team_best(t, work, vocab), cut = 0, chosen = 0;
    if (key_value(best) == -INFINITY) return -1;  // all that were finite are banned
    if (s->temperature < 1e-6f || s->top_k == 1) return key_id(best);
    float top = key_value(best) / s->temperature;
    if ((s->top_k > 0 && s->top_k < vocab) || s->top_p < 1 || s->min_p > 0)
        cut = cut_key(t, work, s, top, vocab);
    for (int id = t->id; id < vocab; id += t->step) {
        float v = work[id] / s->temperature;
        if (v == -INFINITY || depth_key(top - v, id) < cut) continue;
        chosen = larger(chosen, id_key(v + gumbel(s->seed, s->n_tokens, id), id));
    }
    return key_id(team_all<uint64_t, larger>(t, chosen));
}

static __device__ float logprob(float v, float best, double log_total) {
    return fmaxf((float)(v - best - log_total), -9999.0f);
}

// The chosen id's logprob by the model's own logits, and the likeliest ids: each is the largest key
// below the last one.
static __device__ void list_logprobs(Team *t, Choice *out, const float *l, int id, int n_top,
                                     uint64_t best, int vocab) {
    double total = 0;
    float top = key_value(best);
    for (int i = t->id; i < vocab; i += t->step) total += exp((double)l[i] - top);
    total = log(team_all<double, plus>(t, total));
    if (t->id == 0) out->logprob = logprob(l[id], top, total);
    for (int i = 0; i < n_top; i++) {
        if (t->id == 0) out->top_id[i] = key_id(best);
        if (t->id == 0) out->top_logprob[i] = logprob(key_value(best), top, total);
        uint64_t next = 0;
        for (int k = t->id; k < vocab; k += t->step)
            if (id_key(l[k], k) < best) next = larger(next, id_key(l[k], k));
        best = team_all<uint64_t, larger>(t, next);
    }
}

// A team takes a row. Its logits stay as they are; work [n][vocab] holds the adjusted ones.
static __global__ void __cluster_dims__(TEAM) __launch_bounds__(TEAM_THREADS)
    sample_kernel(Choice *out, float *work, const float *l, const Sampling *sampling, int vocab,
                  int stride) {
    cg::cluster_group team = cg::this_cluster();
    const Sampling *s = &sampling[blockIdx.y];
    Team t = {(int)(blockIdx.x * TEAM_THREADS + threadIdx.x), TEAM * TEAM_THREADS, 0};
    l += (size_t)blockIdx.y * stride, work += (size_t)blockIdx.y * vocab, out += blockIdx.y;
    uint64_t best = 0, broken = UINT64_MAX;
    for (int id = t.id; id < vocab; id += t.step)
        best = larger(best, l[id] != l[id] || l[id] == INFINITY ? broken : id_key(l[id], id));
    best = team_all<uint64_t, larger>(&t, best);
    bool good = best != broken && key_value(best) != -INFINITY;
    int id = !good ? -1 : s->given ? *s->given : choose(&t, work, l, s, vocab);
    int n_top = id < 0 || s->top_logprobs < 0 ? 0 : min(s->top_logprobs, vocab);
    if (t.id == 0) out->id = id, out->logprob = 0, out->n_top = n_top;
    if (id >= 0 && s->top_logprobs >= 0) list_logprobs(&t, out, l, id, n_top, best, vocab);
    team.sync();  // nobody leaves while others read its shared memory
}

// Bytes that a row's lists take on their way to the device.
static size_t sampling_bytes(const Sampling *s, bool with_tokens) {
    return mail_bytes(with_tokens ? s->n_tokens * sizeof(int) : 0) +
           mail_bytes(s->n_banned * sizeof(int)) + 2 * mail_bytes(s->n_bias * sizeof(int)) +
           mail_bytes(s->given ? sizeof(int) : 0);
}

static bool wants_tokens(const Sampling *s) {
    return !s->given && (s->repetition_penalty != 1 || s->frequency_penalty != 0 ||
                         s->presence_penalty != 0);
}

// Only the rows' parameters go there, with lists where something is on that needs them, and only
// Choices come back. The host waits here, and nowhere else in a step.
void sample(Choice *out, float *l, const Sampling *s, int vocab, int stride, int n) {
    static Mailbox asked, answered;
    static float *work;
    static size_t work_size;
    size_t bytes = mail_bytes(n * sizeof *s);
    if (work_size < (size_t)n * vocab) {
        check(cudaStreamSynchronize(stream), "stream"), device_free(work);
        work_size = (size_t)n * vocab;
        work = (float *)device_alloc(work_size * sizeof *work);
    }
    for (int i = 0; i < n; i++) bytes += sampling_bytes(&s[i], wants_tokens(&s[i]));
    mail_open(&asked, bytes), mail_open(&answered, mail_bytes(n * sizeof *out));
    Sampling *to = (Sampling *)asked.host;
    const Sampling *there = (const Sampling *)mail_add(&asked, s, n * sizeof *s);
    for (int i = 0; i < n; i++) {
        size_t bias = s[i].n_bias * sizeof(int);
        to[i].tokens = NULL;
        if (wants_tokens(&s[i]))
            to[i].tokens = (int *)mail_add(&asked, s[i].tokens, s[i].n_tokens * sizeof(int));
        to[i].banned = (int *)mail_add(&asked, s[i].banned, s[i].n_banned * sizeof(int));
        to[i].bias_id = (int *)mail_add(&asked, s[i].bias_id, bias);
        to[i].bias = (float *)mail_add(&asked, s[i].bias, bias);
        if (s[i].given) to[i].given = (int *)mail_add(&asked, s[i].given, sizeof(int));
    }
    mail_send(&asked);
    sample_kernel<<<dim3(TEAM, n), TEAM_THREADS, 0, stream>>>((Choice *)answered.device, work, l,
                                                              there, vocab, stride);
    check(cudaGetLastError(), "sample");
    check(cudaMemcpyAsync(answered.host, answered.device, n * sizeof *out, cudaMemcpyDeviceToHost,
                          stream), "copy");
    check(cudaStreamSynchronize(stream), "sample");
    memcpy(out, answered.host, n * sizeof *out);
}
