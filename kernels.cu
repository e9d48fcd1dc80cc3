// kernels.cu: the stages of kernels.c on a Hopper GPU (sm_90a), under the same names. What a stage
// means stands there; here stands what makes it fast.
//
// The one idea: a step of R1 is bound by memory, so memory holds everything as the multiprocessors
// want to have it. Weights are repacked once, while they are loaded, into strips of 16 rows whose
// 128-byte pieces lie swizzled as the tensor cores read them; activations and cache pages are
// written that way at once. A tile then comes with plain bulk copies and is used as it is.
//
// A decoding step is some thousand small kernels. They are recorded as a CUDA graph for each number
// of rows, so that starting them costs the host nothing; and each one may begin before the last one
// has ended (programmatic launch): what it does before grid_wait must not depend on the others.
#include <assert.h>
#include <cooperative_groups.h>
#include <dlfcn.h>
#include <limits.h>
#include <math.h>
#include <nccl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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
    MAX_SHARED = 227 << 10,   // bytes that a block can have
    ROW_BYTES = 128,          // of a row that lie together: the width of the swizzle
    STRIP = 16,               // rows of a weight matrix that lie together
    CHUNK = 8,                // bf16 values of a 16-byte load
    MAX_COLS = 1024 * CHUNK,  // of a row that a block norms
    TOKEN_PAD = 128,          // an Act has room for whole tiles of tokens
    PAGE_BYTES = PAGE * CACHE_DIM * 2,
};

static __host__ __device__ int min_int(int a, int b) { return a < b ? a : b; }
static __host__ __device__ int max_int(int a, int b) { return a > b ? a : b; }
static __host__ __device__ int units(size_t n, int per_unit) {
    return (n + per_unit - 1) / per_unit;
}

// ---- The device ---------------------------------------------------------------------------------
// A rank is a thread with a GPU of its own: what is static belongs to one, and is thread_local. One
// stream takes all work in order, so nothing but the host ever waits.

static thread_local cudaStream_t stream;
static thread_local int n_sms, local_rank, n_local_ranks;
static thread_local float *scratch;  // between the kernels of one stage

static thread_local int comm_rank, comm_size;  // of how many

static void step_forget(void);

static void check(cudaError_t error, const char *what) {
    if (error != cudaSuccess)
        die("rank %d: CUDA: %s: %s", comm_rank, what, cudaGetErrorString(error));
}

void device_init(int local, int n_local) {
    int major = 0, minor = 0, n = 0;
    if (stream) return;
    local_rank = comm_rank = local, n_local_ranks = n_local;
    // All kernels are loaded now, and NCCL makes all connections when ranks meet: while a graph is
    // recorded, a first call could do neither.
    if (!local) setenv("CUDA_MODULE_LOADING", "EAGER", 0), setenv("NCCL_RUNTIME_CONNECT", "0", 0);
    check(cudaGetDeviceCount(&n), "GPUs");
    if (n < n_local) die("CUDA: got %d GPUs, want %d, one for each rank of this node", n, n_local);
    check(cudaSetDevice(local), "the rank's GPU");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, local), "attributes");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, local), "attributes");
    if (major != 9)
        die("CUDA: got a GPU of compute capability %d.%d, want 9.0; make CUDA=0 builds for the CPU",
            major, minor);
    check(cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, local), "attributes");
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
}

bool device_memory(size_t *available, size_t *total) {
    check(cudaMemGetInfo(available, total), "memory");
    return true;
}

void device_copy(void *to, const void *from, size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "copy");
    check(cudaStreamSynchronize(stream), "copy");
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

// ---- Ranks --------------------------------------------------------------------------------------
// NCCL sums in an order of its own, in bf16 from rank to rank, and gives all ranks the same bits.
// Its calls are recorded like kernels.

static thread_local ncclComm_t comm;  // NULL: this rank is alone

static void check_nccl(ncclResult_t result, const char *what) {
    if (result != ncclSuccess && result != ncclInProgress)
        die("rank %d: NCCL: %s: %s: %s", comm_rank, what, ncclGetErrorString(result),
            ncclGetLastError(comm));
}

void group_id(uint8_t id[GROUP_ID]) {
    static_assert(sizeof(ncclUniqueId) == GROUP_ID, "what the nodes exchange is NCCL's id");
    check_nccl(ncclGetUniqueId((ncclUniqueId *)id), "id");
}

void group_leave(void) {
    step_forget();
    check_nccl(ncclCommDestroy(comm), "end");
    comm = NULL;
}

void all_reduce(bf16 *x, size_t n) {
    if (comm) check_nccl(ncclAllReduce(x, x, n, ncclBfloat16, ncclSum, comm, stream), "all_reduce");
}

void all_gather(float *out, float *in, int cols, int n) {
    size_t size = (size_t)n * cols, width = cols * sizeof *in;
    if (!comm) return;
    check_nccl(ncclGroupStart(), "all_gather");
    for (int r = 1; r < comm_size && !comm_rank; r++)
        check_nccl(ncclRecv(in + r * size, size, ncclFloat, r, comm, stream), "all_gather");
    if (comm_rank) check_nccl(ncclSend(in, size, ncclFloat, 0, comm, stream), "all_gather");
    check_nccl(ncclGroupEnd(), "all_gather");
    for (int r = 0; r < comm_size && !comm_rank; r++)
        check(cudaMemcpy2DAsync(out + r * cols, comm_size * width, in + r * size, width, width, n,
                                cudaMemcpyDeviceToDevice, stream), "all_gather");
}

// Waits for the stream; where NCCL says that a rank has failed, it never would end.
static void stream_wait(const char *what) {
    cudaError_t state;
    while ((state = cudaStreamQuery(stream)) == cudaErrorNotReady) {
        ncclResult_t failed = ncclSuccess;
        if (comm) check_nccl(ncclCommGetAsyncError(comm, &failed), what), check_nccl(failed, what);
    }
    check(state, what);
}

// The connections between ranks are made now: while a step is recorded, a first call could not.
// Which NCCL is at work, since an image has one and a node's network plugin brings another; and a
// warning where the plugin is missing, without which nodes speak plain TCP.
static void log_nccl(const Group *g) {
    int version = 0, found = 0;
    Dl_info library = {};
    check_nccl(ncclGetVersion(&version), "version");
    dladdr((void *)ncclGetVersion, &library);
    log_line(g->rank, "NCCL %d.%d.%d of %s", version / 10000, version / 100 % 100, version % 100,
             library.dli_fname ? library.dli_fname : "this program");
    const char *path = getenv("LD_LIBRARY_PATH");
    for (size_t n; path && *path; path += n + !!path[n]) {
        n = strcspn(path, ":");
        char *plugin = format_string("%.*s/libnccl-net.so", (int)n, path);
        found |= access(plugin, R_OK) == 0;
        free(plugin);
    }
    if (g->size > g->n_local && !found)
        log_line(g->rank, "NCCL: no folder of LD_LIBRARY_PATH has a network plugin, "
                 "libnccl-net.so: nodes exchange rows over what NCCL has built in");
}

void group_join(const Group *g) {
    ncclUniqueId id;
    if (!g->local) log_nccl(g);
    memcpy(&id, g->id, sizeof id);
    comm_rank = g->rank, comm_size = g->size;
    check_nccl(ncclCommInitRank(&comm, g->size, id, g->rank), "group");
    float *room = (float *)device_alloc(2 * g->size * sizeof *room);
    all_reduce((bf16 *)room, 1);
    all_gather(room, room + g->size, 1, 1);
    stream_wait("group");
    device_free(room);
}

void device_wait(void) { stream_wait("step"); }

// Starts a kernel that may begin while the one before it ends.
template <typename... Wanted, typename... Given>
static void launch(void (*kernel)(Wanted...), dim3 grid, int threads, size_t shared,
                   Given... args) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {grid, dim3(threads), shared, stream, &early, 1};
    if (shared > 48 << 10) {  // what a kernel gets without asking
        cudaFuncAttributes a;
        check(cudaFuncGetAttributes(&a, kernel), "kernel");
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   MAX_SHARED - (int)a.sharedSizeBytes), "shared memory");
    }
    check(cudaLaunchKernelEx(&config, kernel, (Wanted)args...), "kernel");
}

// ---- PTX ----------------------------------------------------------------------------------------

// What earlier kernels wrote is there behind grid_wait, and every kernel calls it: one that did not
// would let the next but one run too early. launch_dependents lets the next kernel's blocks come
// up; a kernel that calls it behind its own wait gives them more, since what was written before it
// is then there for them from the start.
static __device__ void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

static __device__ void launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

static __device__ uint32_t smem_address(const void *p) { return __cvta_generic_to_shared(p); }

// A number that is the same in the whole warp, so that the compiler knows it, too: it then keeps
// it, and what is made of it, in registers of the warp, where wgmma and barriers want them.
static __device__ int even(int i) { return __shfl_sync(~0u, i, 0); }

// Has a number worked out here, and not where the compiler sees it used.
static __device__ void settle(int &v) { asm volatile("" : "+r"(v)); }
static __device__ void settle(uint32_t &v) { asm volatile("" : "+r"(v)); }
template <typename T> static __device__ void settle(const T *&v) { asm volatile("" : "+l"(v)); }

static __device__ void bar_init(uint64_t *bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(bar)), "r"(count));
}

// The copy engine must see the barriers that one thread has made; then all threads may.
static __device__ void bar_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// An arrival that also announces `bytes` of copies: the phase ends when they have come, too.
static __device__ void bar_expect(uint64_t *bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(bar)),
                 "r"(bytes) : "memory");
}

// How many lanes arrive for their warp; a barrier counts that many for each. One is enough, since
// __syncwarp puts before it what the others did. compute-sanitizer's racecheck does not know that
// and sees races; so tests/gpu.sh gives it a copy of this file in which all 32 arrive.
enum { ARRIVING = 1 };

// The whole warp has done what the barrier stands for.
static __device__ void warp_arrive(uint64_t *bar) {
    __syncwarp();
    if (threadIdx.x % WARP < ARRIVING)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(bar))
                     : "memory");
}

static __device__ void bar_wait(uint64_t *bar, int parity) {
    asm volatile("{ .reg .pred p;\n"
                 "W%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra D%=;\n bra W%=;\n D%=: }" ::"r"(smem_address(bar)),
                 "r"(parity) : "memory");
}

static __device__ void bulk_load(void *dst_smem, const void *src, uint32_t bytes, uint64_t *bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(smem_address(dst_smem)), "l"(src), "r"(bytes),
                 "r"(smem_address(bar)) : "memory");
}

static __device__ void copy_16(void *dst_smem, const void *src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(dst_smem)),
                 "l"(src) : "memory");
}

static __device__ void copy_4(void *dst_smem, const void *src) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(dst_smem)),
                 "l"(src) : "memory");
}

// Each lane arrives when all copies that it asked for so far have come; it does not wait itself.
static __device__ void copies_arrive(uint64_t *bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(bar))
                 : "memory");
}

static __device__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
static __device__ void copies_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// wgmma reads shared memory past the ordinary path: what ordinary stores wrote must be fenced.
static __device__ void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

static __device__ void sync_threads(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

static __device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

static __device__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N> static __device__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// A tile of rows of 128 bytes for wgmma, swizzled in atoms of 8 rows, 1 KB; it starts at a multiple
// of that. Rows are along M (or N) with K inside, or with wgmma's transpose bit the other way.
static __device__ uint64_t smem_desc(const void *p) {
    return (uint64_t)((smem_address(p) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// The same, where the compiler would not know that it is one for the whole warp.
static __device__ uint64_t warp_desc(const void *p) {
    return (uint32_t)even(smem_address(p) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

static __device__ uint64_t desc_at(uint64_t desc, int bytes) {  // no carry: half the instructions
    return desc & ~0xffffffffull | (uint32_t)desc + (bytes >> 4);
}

// c [64][128] (+)= a [64][32] b [128][32]^T in e4m3, or of 16 columns in bf16: 32 bytes of each
// row. TRANS: b lies as two tiles of [16][64], as far apart as the descriptor says. Thread (warp,
// g = lane / 4, t = lane % 4) holds in c[4 j + i] row 16 warp + g + i / 2 * 8, column 8 j + 2 t +
// i % 2.
#define C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define WGMMA_128(types, operands, ...)                                                            \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %64, 0;\n"                                        \
                 "wgmma.mma_async.sync.aligned.m64n128" types " {"                                 \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "\
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "\
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"\
                 operands "; }"                                                                    \
                 : C4(0), C4(4), C4(8), C4(12), C4(16), C4(20), C4(24), C4(28), C4(32), C4(36),    \
                   C4(40), C4(44), C4(48), C4(52), C4(56), C4(60)                                  \
                 : "r"(add), __VA_ARGS__)
template <bool FP8, int TRANS = 0>
static __device__ void wgmma_128(float c[64], uint64_t a, uint64_t b, int add) {
    if (FP8) WGMMA_128("k32.f32.e4m3.e4m3", " %65, %66, p, 1, 1", "l"(a), "l"(b));
    else WGMMA_128("k16.f32.bf16.bf16", " %65, %66, p, 1, 1, 0, %67", "l"(a), "l"(b), "n"(TRANS));
}

// The same for such a b, with a in registers, which hold pairs of elements as c's do.
static __device__ void wgmma_rows(float c[64], const uint32_t a[4], uint64_t b) {
    const int add = 1;
    WGMMA_128("k16.f32.bf16.bf16", " {%65, %66, %67, %68}, %69, p, 1, 1, 1", "r"(a[0]), "r"(a[1]),
              "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef WGMMA_128

// c [64][N] likewise, bf16, of 16 columns. TRANS: a lies as [16][64].
template <int TRANS> static __device__ void wgmma(float (&c)[8], uint64_t a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %10, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, %11, 0; }"
                 : C4(0), C4(4) : "l"(a), "l"(b), "r"(add), "n"(TRANS));
}

template <int TRANS> static __device__ void wgmma(float (&c)[16], uint64_t a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "%16, %17, p, 1, 1, %19, 0; }"
                 : C4(0), C4(4), C4(8), C4(12) : "l"(a), "l"(b), "r"(add), "n"(TRANS));
}

// c [64][N] likewise, of 32 bytes of each row: 32 columns in e4m3, 16 in bf16.
#define WGMMA_8(types, operands)                                                                   \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %6, 0;\n"                                         \
                 "wgmma.mma_async.sync.aligned.m64n8" types " {%0, %1, %2, %3}, %4, %5, p"         \
                 operands "; }" : C4(0) : "l"(a), "l"(b), "r"(add))
template <bool FP8>
static __device__ void wgmma_32(float (&c)[4], uint64_t a, uint64_t b, int add) {
    if (FP8) WGMMA_8("k32.f32.e4m3.e4m3", ", 1, 1");
    else WGMMA_8("k16.f32.bf16.bf16", ", 1, 1, 0, 0");
}
#undef WGMMA_8

template <bool FP8>
static __device__ void wgmma_32(float (&c)[16], uint64_t a, uint64_t b, int add) {
    if (!FP8) return wgmma<0>(c, a, b, add);
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "%16, %17, p, 1, 1; }"
                 : C4(0), C4(4), C4(8), C4(12) : "l"(a), "l"(b), "r"(add));
#undef C4
}

static __device__ uint32_t bf16_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

static __device__ uint32_t e4m3_pair(float low, float high) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

static __device__ float round_bf16(float f) { return __uint_as_float(bf16_pair(f, 0) << 16); }
static __device__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
static __device__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000); }

// d [16][8] += a [16][16] b [16][8], bf16.
static __device__ void mma_bf16(float (&d)[4], const uint4 &a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Blocks of a cluster: all have begun behind team_wait, what they did before team_arrive is done.
static __device__ void team_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
static __device__ void team_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

static __device__ uint32_t team_address(const void *p, int rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(smem_address(p)), "r"(rank));
    return there;
}

// Writes v to where the block has `to`, and its `bar` counts four bytes.
static __device__ void team_tell(float *to, uint64_t *bar, int rank, float v) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                 :: "r"(team_address(to, rank)), "r"(__float_as_uint(v)),
                    "r"(team_address(bar, rank)) : "memory");
}

// An 8x8 tile of bf16 over a warp, transposed: registers to registers, and registers to rows.
static __device__ uint32_t transpose_8x8(uint32_t v) {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(v));
    return v;
}

static __device__ void store_transposed(uint32_t row, uint32_t a, uint32_t b, uint32_t c,
                                        uint32_t d) {  // row: an smem_address
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1,%2,%3,%4};" ::
                 "r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

static __device__ void store_8x8(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1,%2,%3,%4};" ::"r"(row),
                 "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Of four words of each of four neighbouring lanes: lane t's word i becomes lane i's word t.
static __device__ void transpose_quad(uint32_t w[4]) {
    for (int d = 1; d < 4; d *= 2)
        for (int i = 0; i < 4; i++) {
            if (i & d) continue;
            bool high = threadIdx.x & d;
            uint32_t other = __shfl_xor_sync(~0u, high ? w[i] : w[i + d], d);
            w[i] = high ? other : w[i], w[i + d] = high ? w[i + d] : other;
        }
}

static __device__ float exp2_fast(float x) {  // 2 ulp; -infinity gives 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ float warp_sum(float v) {
    for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    return v;
}

static __device__ float warp_max(float v) {
    for (int i = 16; i > 0; i /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, i));
    return v;
}

// The 16-byte chunk at which chunk c of row r stands.
static __device__ int swizzle_chunk(int r, int c) { return c ^ (r & 7); }

// ---- Numbers ------------------------------------------------------------------------------------
// Everything is computed in f32 and rounded where kernels.c rounds. Where bits must be equal,
// products and sums that follow each other are kept from becoming one fused operation.

// 1 / b and a / b, correctly rounded (Markstein 1990), for b and quotients that are neither very
// large nor very small. It is what the compiler makes of a division, but for its branch to all
// other cases, which would stand between what can be computed side by side.
static __device__ float inverse(float b) {
    float guess;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(b));
    return fmaf(fmaf(-guess, b, 1), guess, guess);
}

static __device__ float quotient(float a, float b, float inverse_of_b) {
    float guess = a * inverse_of_b;
    return fmaf(fmaf(-guess, b, a), inverse_of_b, guess);
}

// 1 + e^-v; beyond e^64 it may be any number that large.
static __device__ float sigmoid_divisor(float v) { return 1 + expf(fminf(-v, 64)); }

static __device__ void unpack8(float v[CHUNK], uint4 chunk) {
    const uint32_t pair[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    for (int i = 0; i < 4; i++) v[2 * i] = bf16_low(pair[i]), v[2 * i + 1] = bf16_high(pair[i]);
}

static __device__ uint4 pack8(const float v[CHUNK]) {
    return make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]),
                      bf16_pair(v[6], v[7]));
}

// The sum of all threads' v, for all threads, always in the same order. Once in a kernel.
static __device__ float block_sum(float v) {
    __shared__ float warp[WARP];
    v = warp_sum(v);
    if (threadIdx.x % WARP == 0) warp[threadIdx.x / WARP] = v;
    __syncthreads();
    return warp_sum(threadIdx.x % WARP < blockDim.x / WARP ? warp[threadIdx.x % WARP] : 0);
}

// ---- Rows on their way into a linear ------------------------------------------------------------
// Quantised values lie as the tensor cores read them, [cols/128][tokens][128 bytes] with chunk c of
// token t at c ^ (t mod 8), and the scales beside: [cols/128][tokens]. The unquantised values that
// bf16 matrices want are plain rows.

struct Act {
    int cols, stride;  // stride: tokens, those of a step and a few
    bf16 *x;           // [stride][cols]
    uint8_t *q;        // [cols / 128][stride][128]
    float *scale;      // [cols / 128][stride]
};

Act *act_new(int rows, int cols) {
    assert(cols % BLOCK == 0);
    Act *a = (Act *)xmalloc(sizeof *a);
    size_t stride = (size_t)units(rows, TOKEN_PAD) * TOKEN_PAD;
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

// A stage that writes n tokens' rows says so first. Few tokens' blocks of 128 columns then lie
// close together, in a page or two of memory, and not each in one whose address must be looked up.
static void act_rows(Act *a, int n) { a->stride = units(n, TOKEN_PAD) * TOKEN_PAD; }

// By what values up to amax are divided.
static __device__ float e4m3_scale(float amax) {
    return quotient(amax, E4M3_MAX, 1.0f / E4M3_MAX);
}

// Quantises and stores eight columns of a token, chunk c of its row; sixteen neighbouring threads
// hold a scale group. A thread that is not `there` only takes part in the exchange.
static __device__ void quantise8(const Act &a, int token, int c, float v[CHUNK], bool there) {
    enum { GROUP = BLOCK / CHUNK };
    float amax = MIN_AMAX;
    for (int i = 0; i < CHUNK; i++) amax = fmaxf(amax, fabsf(v[i]));
    for (int d = GROUP / 2; d; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
    float scale = e4m3_scale(amax), by = inverse(scale);
    if (!there) return;
    for (int i = 0; i < CHUNK; i++) v[i] = quotient(v[i], scale, by);
    uint2 q = make_uint2(e4m3_pair(v[0], v[1]) | e4m3_pair(v[2], v[3]) << 16,
                         e4m3_pair(v[4], v[5]) | e4m3_pair(v[6], v[7]) << 16);
    size_t line = (size_t)(c / GROUP) * a.stride + token;
    uint8_t *to = a.q + line * ROW_BYTES + ((c % GROUP / 2 ^ token % 8) << 4) + c % 2 * CHUNK;
    *(uint2 *)to = q;
    if (c % GROUP == 0) a.scale[line] = scale;
}

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
    m->size = 2 * bytes + 4096;
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

// The same for n of a kind that the caller fills in: returns where.
template <typename T> static T *mail_room(Mailbox *m, const T **device, int n) {
    T *room = (T *)(m->host + m->used);
    *device = (T *)mail_add(m, NULL, n * sizeof *room);
    return room;
}

static void mail_send(Mailbox *m) {
    check(cudaMemcpyAsync(m->device, m->host, m->used, cudaMemcpyHostToDevice, stream), "copy");
    check(cudaEventRecord(m->copied, stream), "event");
}

// ---- One step -----------------------------------------------------------------------------------
// Steps of at most most_recorded rows, all with logits, are recorded when their number of rows
// first comes, exactly that many: rows that only fill up would be routed to experts, whose weights
// would have to be read. What else differs from step to step, lengths and pages, lies in device
// memory.
//
// A step's last rows, wherever they stand in r1.c's batch, are those of prompts for which keys and
// values are made: see mla_attention. They attend in tiles.

enum { MAX_RECORDED = 256,
       QUERIES = 128, KEYS = 128,  // rows and tokens of a tile
       HEAD_TILE = KEYS * KV_DIM * (int)sizeof(bf16) };  // bytes of its keys and values

static int most_recorded = MAX_RECORDED;  // all ranks'

typedef struct {  // rows of one sequence
    int row, rows, position;  // the first one, how many, and the first one's position
    int keys;                 // the sequence's first tile of keys
} QueryTile;

typedef struct { int table, tokens; } KeyTile;  // where its pages stand in the page table

static thread_local struct {
    Mailbox mail;
    cudaGraphExec_t recorded[MAX_RECORDED + 1], run;
    int recording;  // rows; 0: none
    int heads;      // of attention; 0: it takes no part (a test)
    int room;       // tiles of one head's keys and values that there is room for
    int expanded;   // how many rows are last and have keys and values made for them
    bool prompts;   // some sequence has several rows among the others
    int n_queries, n_keys;
    const QueryTile *queries;  // [n_queries] those that see most first
    const KeyTile *keys;       // [n_keys]
} step;

static void mla_plan(const Batch *b, int heads);

int step_record(int most) { return most_recorded = min_int(most, MAX_RECORDED); }

static void step_forget(void) {
    for (int n = 0; n <= MAX_RECORDED; n++)
        if (step.recorded[n]) check(cudaGraphExecDestroy(step.recorded[n]), "graph");
    memset(step.recorded, 0, sizeof step.recorded);
}

typedef struct {  // rows of one sequence that stand together
    int first, rows, tokens, pages;  // tokens: that the last row sees; pages: those are in
    bool expanded;
    int keys;                        // tiles of all such runs as far as this one
} Run;

// The run behind r. It is expanded where that is less work and there is room: with latents a row
// and a token are 1,088 products a head, with a key and a value 320, and to make these takes
// 131,072 for each token before the run; its own tokens' cost what absorbing its rows would.
static bool run_next(const Batch *b, Run *r) {
    enum { LEAST = 64, SAVED = CACHE_DIM + LATENT_DIM - QK_DIM - V_DIM };
    int first = r->first += r->rows;
    if (first == b->n) return false;
    for (r->rows = r->tokens = 0; first + r->rows < b->n; r->rows++) {
        if (b->seq[first + r->rows] != b->seq[first]) break;
        r->tokens = max_int(r->tokens, b->position[first + r->rows] + 1);
    }
    int before = r->tokens - r->rows, keys = r->keys + units(r->tokens, KEYS);
    r->pages = units(r->tokens, PAGE);
    r->expanded = r->rows >= LEAST && before == b->position[first] && keys <= step.room &&
                  (before + r->rows / 2.0) * r->rows * SAVED > 1.0 * before * KV_DIM * LATENT_DIM;
    if (r->expanded) r->keys = keys;
    return true;
}

static int by_sight(const void *a, const void *b) {
    const QueryTile *x = (const QueryTile *)a, *y = (const QueryTile *)b;
    return y->position + y->rows - x->position - x->rows;
}

// Of the page tables only what is used is sent, one run behind the other: on the device max_pages
// is 1, and a row's seq is where its run begins.
bool step_begin(Batch *placed, const Batch *b) {
    int n = b->n, total = 0, row = 0, page = 0, q = 0;
    size_t rows = mail_bytes(n * sizeof(int)), wanted = mail_bytes(b->n_out * sizeof(int));
    Mailbox *m = &step.mail;
    step.prompts = false, step.expanded = step.n_queries = step.n_keys = 0;
    for (Run r = {}; run_next(b, &r); total += r.pages, step.n_keys = r.keys)
        if (r.expanded) step.expanded += r.rows, step.n_queries += units(r.rows, QUERIES);
        else step.prompts |= r.rows > 1;
    if (mail_open(m, 4 * rows + wanted + mail_bytes(step.n_queries * sizeof(QueryTile)) +
                         mail_bytes(step.n_keys * sizeof(KeyTile)) +
                         mail_bytes(total * sizeof(int))))
        step_forget();
    placed->n = n, placed->max_pages = 1, placed->n_out = b->n_out;
    const int *unused;
    int *id = mail_room(m, &placed->id, n), *position = mail_room(m, &placed->position, n);
    int *seq = mail_room(m, &placed->seq, n), *out = mail_room(m, &placed->out, b->n_out);
    int *place = mail_room(m, &unused, n);
    QueryTile *query = mail_room(m, &step.queries, step.n_queries);
    KeyTile *key = mail_room(m, &step.keys, step.n_keys);
    int *table = mail_room(m, &placed->pages, total);
    for (int expanded = 0; expanded < 2; expanded++)
        for (Run r = {}; run_next(b, &r);) {
            if (r.expanded != expanded) continue;
            int first = r.keys - units(r.tokens, KEYS), at = b->position[r.first];
            for (int i = 0; expanded && i < r.rows; i += QUERIES)
                query[q++] = (QueryTile){row + i, min_int(r.rows - i, QUERIES), at + i, first};
            for (int i = 0; expanded && i < r.tokens; i += KEYS)
                key[first + i / KEYS] = (KeyTile){page + i / PAGE, min_int(r.tokens - i, KEYS)};
            memcpy(table + page, b->pages + (size_t)b->seq[r.first] * b->max_pages,
                   r.pages * sizeof(int));
            for (int i = r.first; i < r.first + r.rows; i++, row++)
                id[row] = b->id[i], position[row] = b->position[i], seq[row] = page, place[i] = row;
            page += r.pages;
        }
    for (int i = 0; i < b->n_out; i++) out[i] = place[b->out[i]];
    qsort(query, step.n_queries, sizeof *query, by_sight);
    mail_send(m);
    bool decodes = n <= most_recorded && b->n_out == n && !step.prompts && !step.expanded;
    if (decodes && (step.run = step.recorded[n])) return false;
    if (decodes) {
        step.recording = n;
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording");
    }
    Batch absorbed = *placed;
    absorbed.n -= step.expanded;
    if (step.heads && absorbed.n) mla_plan(&absorbed, step.heads);
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

// ---- W_UK and W_UV ------------------------------------------------------------------------------
// Both products are out[m] = sum_k A[m][k] x[k] with A of one head and few x. A is cut into bricks
// of 64 x 128, each inside one scale block, which lie in memory as mma.sync wants them in
// registers: 32 fragments of 16 x 16 (4 strips of rows, 8 steps along k), 16 bytes a lane, so that
// a warp loads a brick in whole lines and without shared memory. They are bf16: e4m3 is exact in
// it, and for 2 MB more per layer of 16 heads (0.15 % of a rank's weights) no kernel converts
// anything.
//
// Two orders are ours to choose. Which k a fragment's column means is free if A and x agree: lane
// (g, t) takes 16-byte chunk 4 i + t of x for steps 2 i and 2 i + 1. And rows g and g + 8 of strip
// s are m = 8 g + 2 s and the next: a lane ends up with 8 consecutive m of a token, a chunk.

enum {
    BRICK_ROWS = 64, BRICK_STRIPS = 4, BRICK_STEPS = 8, FRAGMENTS = BRICK_STRIPS * BRICK_STEPS,
    BRICKS = KV_DIM * LATENT_DIM / BRICK_ROWS / BLOCK, UK_BRICKS = BRICKS / 2,  // of a head
    HEAD_BRICKS = BRICKS * FRAGMENTS * WARP * (int)sizeof(uint4),  // bytes
    LATENT_SCALES = LATENT_DIM / BLOCK, TOKENS = 8,                // of one product
};

typedef uint4 Brick[BRICK_STRIPS][BRICK_STEPS];

// Where the value at a row (of all heads) and column of kv_b_proj stands in bricks [heads][16]: of
// each head W_UK^T's eight (brick b: latent dims 64 b ..), then W_UV's (brick 2 k + h: values 64 h
// .., latent dims 128 k ..).
static __device__ size_t brick_at(int row, int col) {
    int head = row / KV_DIM, value = row % KV_DIM - NOPE_DIM;  // below 0: W_UK's
    int brick = value < 0 ? col / BRICK_ROWS : UK_BRICKS + col / BLOCK * 2 + value / BRICK_ROWS;
    int m = (value < 0 ? col : value) % BRICK_ROWS, k = value < 0 ? value + NOPE_DIM : col % BLOCK;
    int fragment = m % 8 / 2 * BRICK_STEPS + k / 32 * 2 + k % 8 / 4;
    int lane = m / 8 * 4 + k % 32 / 8, pair = k % 4 / 2 * 2 + m % 2;
    return ((((size_t)head * BRICKS + brick) * FRAGMENTS + fragment) * WARP + lane) * CHUNK +
           pair * 2 + k % 2;
}

// ---- Placing weights ----------------------------------------------------------------------------
// What lies in a file is only noted when it is placed. Then place_next goes through the pieces that
// r1.c reads from the disk (reading_want): kernels take from pinned memory, over PCIe, just the
// bytes that this rank wants, however short the runs are, and store them where they belong.
//
// What is not read and not copied is a layout: a matrix is strips of 16 rows,
// [out/16][in bytes/128][16 rows][128 bytes], in which the 16-byte chunk c of row r stands at
// c ^ (r mod 8). That is the order in which a tensor core's operand of 8 rows by 128 bytes is free
// of bank conflicts.

typedef struct {            // a matrix' part as it lies in a file, or a dummy, and where it goes
    const uint8_t *data;    // NULL: a dummy
    size_t rows, cols, stride;  // stride: bytes from row to row
    int size, placed_size;  // bytes of an element: 4 becomes 2 (rounded), 2 becomes 4, or equal
    Dummy dummy;
    Place as;
    int group, offset;      // of a matrix: see chunk_place
    uint8_t *to;
} Source;

static thread_local struct {
    Source *want;           // in the order of the maps, from place_next on
    size_t n, first;        // want[first]: the first one that may not be complete
    Piece *pieces;
    int n_pieces, next;
} taking;

static thread_local struct { void **data; int n; uint8_t *values; } placed;  // values: a dummy's

static uint8_t *place_alloc(size_t bytes) {
    placed.data = (void **)xrealloc(placed.data, (placed.n + 1) * sizeof *placed.data);
    return (uint8_t *)(placed.data[placed.n++] = device_alloc(bytes));
}

void place_free(void) {
    check(cudaStreamSynchronize(stream), "stream");
    step_forget();
    while (placed.n) device_free(placed.data[--placed.n]);
    free(placed.data);
    placed.data = NULL, placed.values = NULL, step.heads = 0;
}

static size_t dtype_size(DType dtype) {
    return dtype == DTYPE_F8_E4M3 ? 1 : dtype == DTYPE_BF16 ? 2 : 4;
}

// To bf16 as kernels.c rounds, for the few matrices that some copies of R1 store in f32.
static inline __host__ __device__ bf16 round_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return f != f ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// 16 bytes of dummy values, from the element at (row, col) on.
static __device__ uint4 chunk_make(const Dummy *d, size_t row, size_t col, int size) {
    uint4 v;
    for (int i = 0; i < 16 / size; i++)
        memcpy((uint8_t *)&v + i * size,
               (const uint8_t *)d->value + dummy_index(d, row, col + i) * size, size);
    return v;
}

// 16 bytes from any address. Words around them are read, too.
static __device__ uint4 chunk_read(const uint8_t *data) {
    const uint32_t *word = (const uint32_t *)((uintptr_t)data & ~(uintptr_t)3);
    int bits = (uintptr_t)data % 4 * 8;
    uint32_t w[5];
    for (int i = 0; i < 5; i++) w[i] = __ldg(word + i);
    return make_uint4(__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                      __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits));
}

static __device__ uint32_t halves(uint32_t a, uint32_t b) {  // two f32
    return round_half(__uint_as_float(a)) | (uint32_t)round_half(__uint_as_float(b)) << 16;
}

// Stores chunk c of a row. In a matrix row r goes to row r / group x 16 + r mod group + offset: all
// 16 rows of a strip (group 16), or 8 rows of gate_proj (offset 0) and 8 of up_proj (offset 8), so
// that values that belong together come out side by side.
static __device__ void chunk_place(const Source *s, int row, int c, uint4 v) {
    size_t row_bytes = s->cols * s->placed_size;
    if (s->as == PLACE_MATRIX) {
        int to = row / s->group * STRIP + row % s->group + s->offset;
        uint8_t *line = s->to + (size_t)(to / STRIP) * STRIP * row_bytes +
                        (size_t)(c / 8) * STRIP * ROW_BYTES + to % STRIP * ROW_BYTES;
        ((uint4 *)line)[c % 8 ^ to % 8] = v;
    } else if (s->as == PLACE_TABLE) {
        if (row_bytes % 16 == 0) *(uint4 *)(s->to + row * row_bytes + c * 16) = v;
        else *(uint32_t *)(s->to + row * row_bytes + c * 4) = v.x;
    } else {
        // e4m3 in the place of f32's bits is the value x 2^-120, as in kernels.c.
        for (int i = 0; i < 16; i++) {
            int code = ((const int8_t *)&v)[i];
            float f = __int_as_float(code << 20 & (int)0x87f00000) * 0x1p120f;
            ((bf16 *)s->to)[brick_at(row, c * 16 + i)] = __float_as_uint(f) >> 16;
        }
    }
}

static __host__ __device__ int source_chunk(const Source *s) {  // bytes that a thread stores
    return s->cols * s->placed_size % 16 ? 4 : 16;
}

// From the row first on: what begins in `data`, `bytes` long, which lie at `from` in the map.
static __global__ void take_kernel(Source s, const uint8_t *data, const uint8_t *from, size_t bytes,
                                   size_t first, size_t n) {
    int values = source_chunk(&s) / s.placed_size, per_row = s.cols / values;
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    size_t row = first + i / per_row, c = i % per_row;
    if (i >= n * per_row) return;
    uint4 v;
    if (s.data) {
        size_t at = s.data + row * s.stride + c * values * s.size - from;
        if (at >= bytes) return;  // or it begins before: at has wrapped
        v = chunk_read(data + at);
        if (s.size < s.placed_size)
            v = make_uint4(v.x << 16, v.x & 0xffff0000, v.y << 16, v.y & 0xffff0000);
        if (s.size > s.placed_size) {
            uint4 w = chunk_read(data + at + 16);
            v = make_uint4(halves(v.x, v.y), halves(v.z, v.w), halves(w.x, w.y), halves(w.z, w.w));
        }
    } else {
        v = chunk_make(&s.dummy, row, c * values, s.size);
    }
    chunk_place(&s, row, c, v);
}

static void take(const Source *s, const uint8_t *data, const uint8_t *from, size_t bytes) {
    enum { THREADS = 256 };
    size_t first = 0, n = s->rows;
    if (s->data) {
        if (from > s->data) first = (from - s->data) / s->stride;
        size_t end = (from + bytes - s->data + s->stride - 1) / s->stride;
        n = (end < s->rows ? end : s->rows) - first;
    }
    size_t threads = n * (s->cols * s->placed_size / source_chunk(s));
    take_kernel<<<units(threads, THREADS), THREADS, 0, stream>>>(*s, data, from, bytes, first, n);
    check(cudaGetLastError(), "taking weights");
}

static const uint8_t *source_end(const Source *s) {
    return s->data + (s->rows - 1) * s->stride + s->cols * s->size;
}

// Makes a dummy, takes what lies in this process' memory, or notes what a file holds. Returns the
// bytes that it took.
static size_t source_place(Source s) {
    enum { BEHIND = 64 };   // bytes that chunk_read may reach
    size_t bytes = s.data ? source_end(&s) - s.data : DUMMY_VALUES * s.size;
    if (s.data && reading_want(s.data, bytes)) {
        taking.want = (Source *)xrealloc(taking.want, (taking.n + 1) * sizeof s);
        taking.want[taking.n++] = s;
        return 0;
    }
    if (!s.data && !placed.values) placed.values = place_alloc(DUMMY_VALUES * sizeof(float));
    uint8_t *copy = s.data ? (uint8_t *)device_alloc(bytes + BEHIND) : placed.values;
    check(cudaMemcpyAsync(copy, s.data ? s.data : s.dummy.value, bytes, cudaMemcpyHostToDevice,
                          stream), "copy");
    s.dummy.value = copy;
    take(&s, copy, s.data, bytes);
    if (s.data) check(cudaStreamSynchronize(stream), "stream"), device_free(copy);
    return s.rows * s.cols * s.size;
}

static int by_data(const void *a, const void *b) {
    const Source *x = (const Source *)a, *y = (const Source *)b;
    return (x->data > y->data) - (x->data < y->data);
}

static void taking_begin(void) {
    uint8_t *ring = NULL;
    qsort(taking.want, taking.n, sizeof *taking.want, by_data);
    if (local_rank == 0)
        check(cudaMallocHost(&ring, (size_t)READ_AHEAD * (PIECE_BYTES + SECTOR)), "pinned memory");
    taking.pieces = reading_begin(&taking.n_pieces, ring, n_local_ranks);
}

static void taking_end(void) {
    check(cudaStreamSynchronize(stream), "taking weights");
    check(cudaFreeHost(reading_end()), "free");
    free(taking.want);
    memset(&taking, 0, sizeof taking);
}

// A piece is released when the GPU has taken what it wants, in the stream's order. A matrix counts
// when its end was taken.
size_t place_next(void) {
    size_t bytes = 0;
    if (!taking.n) return 0;
    if (!taking.pieces) taking_begin();
    while (!bytes && taking.next < taking.n_pieces) {
        Piece *p = &taking.pieces[taking.next++];
        const Source *s = &taking.want[taking.first], *last = taking.want + taking.n;
        if (s == last || s->data >= p->end) {
            reading_release(p);
            continue;
        }
        const uint8_t *data = reading_wait(p);
        for (; s < last && s->data < p->end; s++) {
            take(s, data, p->from, p->end - p->from);
            if (source_end(s) > p->end) break;  // the next piece has more of it
            bytes += s->rows * s->cols * s->size, taking.first++;
        }
        check(cudaLaunchHostFunc(stream, reading_release, p), "release");
    }
    if (!bytes) taking_end();
    return bytes;
}

// Vectors are f32 on the device, whatever they were.
size_t place_vector(Vector *v) {
    size_t dim = v->dim, size = dtype_size(v->dtype);
    uint8_t *data = place_alloc(dim * sizeof(float));
    Source s = {v->data, 1, dim, dim * size, (int)size, sizeof(float)};
    s.as = PLACE_TABLE, s.to = data;
    *v = (Vector){v->dim, DTYPE_F32, data};
    return source_place(s);
}

// Bytes of a matrix on the device, whole strips, and of its scales, which stay as they are.
static size_t matrix_bytes(const Linear *w) {
    return (size_t)units(w->out, STRIP) * STRIP * w->in * (w->dtype == DTYPE_F8_E4M3 ? 1 : 2);
}

static size_t scale_bytes(const Linear *w) {
    return w->dtype == DTYPE_F8_E4M3 ? units(w->out, BLOCK) * (w->in / BLOCK) * sizeof(float) : 0;
}

// Places a matrix and its scales there, and lets w point to them.
static size_t linear_move(Linear *w, uint8_t *data, uint8_t *scale, Place as, int group,
                          int offset) {
    size_t rows = w->out, cols = w->in, all = cols + w->gap, size = dtype_size(w->dtype);
    bool fp8 = w->dtype == DTYPE_F8_E4M3, full = w->dtype == DTYPE_F32;
    int placed_size = fp8 ? 1 : 2;
    size_t bytes = source_place((Source){w->data, rows, cols, all * size, (int)size, placed_size,
                                         w->dummy[0], as, group, offset, data});
    if (fp8)
        bytes += source_place((Source){w->scale, (size_t)units(rows, BLOCK), cols / BLOCK,
                                       all / BLOCK * sizeof(float), sizeof(float), sizeof(float),
                                       w->dummy[1], PLACE_TABLE, 0, 0, scale});
    w->data = data, w->scale = scale, w->gap = 0, w->dtype = full ? DTYPE_BF16 : w->dtype;
    return bytes;
}

size_t place_linear(Linear *w, Place as) {
    if (as == PLACE_KV_B && w->dtype != DTYPE_F8_E4M3)
        die("this checkpoint is bf16, a GPU wants R1's FP8 one");
    size_t size = as == PLACE_KV_B ? w->out / KV_DIM * HEAD_BRICKS : matrix_bytes(w);
    return linear_move(w, place_alloc(size), place_alloc(scale_bytes(w)), as, STRIP, 0);
}

// A layer's experts lie side by side, so that a kernel finds number e at base + e x size, and the
// shared one is number n. Gate and up are one matrix of twice the rows, with two arrays of scales.
size_t place_mlp(Mlp *m, int n, Mlp *shared) {
    uint8_t *data = NULL;
    size_t bytes = 0, all = n + (shared != NULL);
    for (int i = 0; i < 3; i++) {
        const Linear *first = i == 0 ? &m->gate_proj : i == 1 ? &m->up_proj : &m->down_proj;
        size_t size = matrix_bytes(first) * (i < 2 ? 2 : 1), scales = scale_bytes(first);
        if (i != 1) data = place_alloc(all * size);
        uint8_t *scale = place_alloc(all * scales);
        for (size_t e = 0; e < all; e++) {
            Mlp *x = e < (size_t)n ? m + e : shared;
            Linear *w = i == 0 ? &x->gate_proj : i == 1 ? &x->up_proj : &x->down_proj;
            bytes += linear_move(w, data + e * size, scale + e * scales, PLACE_MATRIX,
                                 i < 2 ? STRIP / 2 : STRIP, i == 1 ? STRIP / 2 : 0);
        }
    }
    return bytes;
}

// ---- The products: what both kernels are given --------------------------------------------------

enum { UNIT = STRIP * ROW_BYTES };  // bytes of a block of a strip

typedef struct {  // one matrix, or one for each expert
    const uint8_t *data;
    const float *scale[2];  // of a strip's rows 0-7 and 8-15: [strip / scale_strips][blocks]
    size_t expert_bytes, expert_scales;  // from expert to expert
    int strips, blocks;  // a block is 128 columns in e4m3, 64 in bf16
    int scale_strips;
    // Strips from `split` on are a second matrix's, which lies so much further than it would as the
    // first one's rest.
    int split;
    ptrdiff_t jump, scale_jump;
} Weights;

// Products are made for slots. The first n are the rows, for the one matrix that takes every row:
// the only one, or the shared expert, number n_experts. Behind them come the pairs (row, choice)
// in the experts' order, as in Routing.pair.
typedef struct {
    int n, n_experts, top_k;
    const int *start;    // [n_experts + 1]
    const int *list;     // row x a divisor of the slots from `listed` on; slots before are rows
    int listed;
    uint64_t by_divisor; // for divide
    bool gather;         // the activations are found by a slot's row, not by the slot
} Slots;

typedef struct { int slot; short expert, rows; } Entry;  // slots that share weights: one tile

typedef struct {  // a kernel's work: y = x W^T for all slots
    Weights w;
    Slots s;
    bool fp8;
    const uint8_t *x;       // row r's 128 bytes of block k: x + k x_block + r x_row
    size_t x_block, x_row;
    const float *x_scale;   // [blocks][x_stride]
    int x_stride;
    const float *weight;    // of a pair, for the experts' second product
    void *y;                // bf16 [slots][out], or f32 [parts][slots][out]
    bf16 *y2;               // bf16 [slots][out] of the second matrix, if there is one
    bool y_f32;
    bool gated;             // y is bf16 [slots][out / 2]: gate's and up's rows as one
    int slots, parts, part_blocks;  // K is split into parts; the next kernel adds them
    // What launch_skinny works out.
    int groups, item_stages, stages, x_rows, n_sums, table;
    int tile;               // slots; and launch_wide this
    uint64_t by_groups, by_parts;   // for divide
} Product;

static __device__ const uint8_t *strip_at(const Weights &w, int expert, int strip) {
    return w.data + expert * w.expert_bytes + (size_t)strip * w.blocks * UNIT +
           (strip < w.split ? 0 : w.jump);
}

static __device__ const float *scales_at(const Weights &w, int half_of, int expert, int strip) {
    return w.scale[half_of] + expert * w.expert_scales + strip / w.scale_strips * w.blocks +
           (strip < w.split ? 0 : w.scale_jump);
}

// Where a result goes as bf16.
static __device__ bf16 *result_at(const Product &p, uint32_t slot, int column) {
    uint32_t first = p.w.split * STRIP, second = p.w.strips * STRIP - first;
    return column < (int)first ? (bf16 *)p.y + (size_t)slot * first + column
                               : p.y2 + (size_t)slot * second + column - first;
}

// How many tiles of `tile` slots there are that no list is needed for.
static __host__ __device__ int known_entries(const Slots *s, int tile) {
    return (s->n + tile - 1) / tile;
}

static int max_entries(const Slots *s, int tile) {  // of the table
    int pairs = s->n * s->top_k;
    return known_entries(s, tile) + min_int(pairs, 2 * s->n_experts + pairs / tile);
}

// They come first in the table. Returns how many they are.
static __device__ int list_known(const Slots &s, Entry *table, int tile) {
    int known = known_entries(&s, tile);
    for (int i = threadIdx.x; i < known; i += blockDim.x)
        table[i] = (Entry){i * tile, (short)s.n_experts, (short)min(tile, s.n - i * tile)};
    return known;
}

// A division takes as long as a product of a whole unit: multiply by 2^32 / divisor instead.
static uint64_t divisor(int d) { return (1ull << 32) / d + 1; }
static __device__ int divide(int i, uint64_t by) { return i * by >> 32; }

static __device__ int slot_row(const Slots &s, int slot) {
    return slot < s.listed ? slot : divide(__ldcg(s.list + slot - s.listed), s.by_divisor);
}

// Writes the experts' tiles into the table, experts ascending, and returns how many there are; and
// the slots' rows into row_of, if that is wanted. Tiles start at multiples of `align`: the first
// may begin with slots of the expert before. All threads of the block come here, at least as many
// as there are experts.
static __device__ int list_entries(const Slots &s, Entry *table, int tile, int align,
                                   uint16_t *row_of, int slots) {
    __shared__ int of_warps[WARP];
    int e = threadIdx.x, warp = e / 32, lane = e % 32, first = 0, last = 0;
    if (e < s.n_experts) first = s.n + __ldcg(s.start + e), last = s.n + __ldcg(s.start + e + 1);
#pragma unroll 4
    for (int i = threadIdx.x; row_of && i < slots; i += blockDim.x) row_of[i] = slot_row(s, i);
    int begin = first / align * align, sum = first < last ? (last - begin + tile - 1) / tile : 0;
    int tiles = sum;
    for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += other;
    }
    if (lane == 31) of_warps[warp] = sum;
    __syncthreads();
    int of_warp = lane < blockDim.x / 32 ? of_warps[lane] : 0;
    int before = __reduce_add_sync(~0u, lane < warp ? of_warp : 0);
    int total = __reduce_add_sync(~0u, of_warp);
    for (int i = 0; i < tiles; i++, begin += tile)
        table[before + sum - tiles + i] = (Entry){begin, (short)e, (short)min(tile, last - begin)};
    __syncthreads();
    return total;
}

// ---- The products: a few rows -------------------------------------------------------------------
// y = x W^T for up to some tens of rows: each weight is read once, so the memory's speed is the
// limit, and all that counts is that it never waits. Four warps of a block only ask for copies: a
// ring of stages of 16 KB, 8 units of 2 KB (one strip's 16 rows, one K block). Two warpgroups, or
// four where a stage has few columns, multiply and take stages in turns: to wait, multiply and
// scale takes one longer than a stage takes to come. Kernels overlap, so the ring fills with
// weights while the kernel before is still at work; activations follow behind grid_wait.
//
// wgmma wants 64 rows that meet the same columns, and four units of one strip are four blocks of K.
// So the activations of all four stand side by side as columns, 8 or 32: 4 blocks of 2 or 8 rows,
// and each warp keeps those that are its own block's. Three quarters of the products are thrown
// away: the tensor cores have the time. (mma.sync would need every e4m3 as an f16, and that
// conversion is slower than the memory.) With SHIFT 2 the four units are four strips, and the 8 or
// 32 columns are as many rows of activations: fewer bytes from L2 where rows are many.
//
// `parts` splits K over blocks where strips don't fill the chip; the next kernel adds. DOWN is the
// experts' second product: a block owns 4 strips of the output and walks all experts, adding weight
// x product to its rows in shared memory; while one warpgroup adds, others multiply. Nothing is
// written but y, in one order.

enum {
    PRODUCERS = 4, UNITS = 8, MAX_STAGES = 8, STAGE_WEIGHTS = UNITS * UNIT,
    SKINNY_ROWS = 32, EXPERT_ROWS = 256,  // more rows than these are `wide`'s
};

// What a stage holds: blocks of 1 << SHIFT strips, and rows as the columns of two products. And who
// multiplies it.
template <int SHIFT_, int COLUMNS_> struct Form {
    enum {
        SHIFT = SHIFT_, STRIPS = 1 << SHIFT, COLUMNS = COLUMNS_, ROWS = COLUMNS * STRIPS / 4,
        TILES = (ROWS + 7) / 8,  // of 8 columns that a lane has sums of
        BLOCKS = UNITS >> SHIFT, BYTES = STAGE_WEIGHTS + 2 * COLUMNS * ROW_BYTES,
        SCALES = 2 * UNITS + 2 * COLUMNS,  // floats: two of each unit, one of each column
        GROUPS = COLUMNS > 8 ? 2 : 4, CONSUMERS = 4 * GROUPS,
        THREADS = (CONSUMERS + PRODUCERS) * WARP,
        FEW = ROWS <= 8, SUMS = FEW ? (int)CONSUMERS : 4,  // warps with sums of their own, in DOWN
    };
};

// Of every tile, a lane has sums of this row and the next. With two rows it is one lane of four,
// where the columns are its warp's block's; the others have a row that is none.
template <class F> static __device__ int lane_row() {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    return F::ROWS >= 8 ? lane % 4 * 2 : lane % 4 == warp ? 0 : (int)F::ROWS;
}

// What a block does next: some strips of one entry's product, over the K blocks from block to end.
typedef struct { int i, entry, group, part, block, end; } Item;

// The i-th item of all; the blocks of the grid take turns.
static __device__ Item item_at(const Product &p, int i) {
    int rest = divide(i, p.by_parts), part = i - rest * p.parts, entry = divide(rest, p.by_groups);
    int block = part * p.part_blocks;
    return (Item){i, entry, rest - entry * p.groups, part, block,
                  min(block + p.part_blocks, p.w.blocks)};
}

template <bool DOWN> static __device__ Item first_item(const Product &p) {
    return DOWN ? (Item){0, 0, (int)blockIdx.x, 0, 0, p.w.blocks} : item_at(p, blockIdx.x);
}

template <bool DOWN>
static __device__ bool has_item(const Product &p, const Item &item, int entries) {
    return DOWN ? item.group < p.groups : item.entry < entries;
}

template <bool DOWN> static __device__ void next_item(const Product &p, Item *item, int entries) {
    if (!DOWN) *item = item_at(p, item->i + gridDim.x);
    else if (++item->entry == entries) item->entry = 0, item->group += gridDim.x;
}

// A block's shared memory, and what it knows of its work.
typedef struct {
    uint8_t *stages;                // of BYTES
    float *scales;                  // SCALES of each stage
    uint64_t *came, *full, *empty;  // of each stage: weights are there, and rows; it was multiplied
    uint64_t *handed;               // of each consumer: the sums that it shares are its own
    float *sums, *weight_of;        // weight_of, row_of: of each slot
    uint16_t *row_of;
    Entry *table;
    int entries, half;              // with item `half`, the next kernel may begin
    int n_stages, item_stages, crew, warp;  // crew: warpgroups that have an item together
    bool gather;                    // row_of finds the activations
} Ring;

// Where a producer is: at stage i of an item, the block's n-th stage, which goes to `slot`. A lane
// finds its part of the weights and a scale of them from w and scale on, for expert 0 and block 0.
typedef struct {
    Item item;
    int i, n, slot, parity, group;
    const uint8_t *w;
    const float *scale;
} Spot;

// No more producers than stages take turns (2 or 4, as are the warpgroups): one that was two rounds
// of the ring ahead of the consumers would take the parity of an old phase for its own.
static __device__ int producers(const Ring &r) { return min((int)PRODUCERS, r.n_stages); }

// Goes n stages on. Unit u of a stage is block u >> SHIFT of strip u % STRIPS: only with SHIFT 0 do
// a strip's blocks stay one piece. A unit's copy is a lane's, its two scales two lanes'.
template <bool DOWN, class F>
static __device__ void move(const Product &p, const Ring &r, Spot *at, int n) {
    at->i += n, at->n += n, at->slot += n;
    if (at->slot >= r.n_stages) at->slot -= r.n_stages, at->parity ^= 1;
    for (; at->i >= r.item_stages; at->i -= r.item_stages) next_item<DOWN>(p, &at->item, r.entries);
    if (at->group == at->item.group) return;
    int lane = threadIdx.x % WARP, unit = lane / 2;
    int strip = (at->group = at->item.group) * F::STRIPS;
    at->w = strip_at(p.w, 0, strip + (F::STRIPS > 1 ? lane % F::STRIPS : 0));
    if (F::STRIPS > 1) at->w += (lane >> F::SHIFT) * UNIT;
    at->scale = scales_at(p.w, lane % 2, 0, strip + unit % F::STRIPS) + (unit >> F::SHIFT);
}

// A producer's first stage, if there are so many.
template <bool DOWN, class F>
static __device__ Spot first_spot(const Product &p, const Ring &r) {
    Spot at = {first_item<DOWN>(p), 0, 0, 0, 1, -1};
    move<DOWN, F>(p, r, &at, r.warp % PRODUCERS);
    return at;
}

// One warp brings a whole stage, and four warps take turns: a copy's way is long, but they overlap.
template <bool FP8, class F>
static __device__ void load_weights(const Product &p, const Ring &r, const Spot &at, int expert) {
    int lane = threadIdx.x % WARP, block = at.item.block + at.i * F::BLOCKS;
    int strips = min((int)F::STRIPS, p.w.strips - at.group * F::STRIPS);
    int blocks = max(0, min((int)F::BLOCKS, at.item.end - block));
    uint8_t *stage = r.stages + at.slot * F::BYTES;
    const uint8_t *from = at.w + expert * p.w.expert_bytes + block * UNIT;
    uint64_t *came = &r.came[at.slot];
    if (lane == 0) bar_expect(came, strips * blocks * UNIT);
    __syncwarp();
    if (F::STRIPS == 1 && lane == 0 && blocks) bulk_load(stage, from, blocks * UNIT, came);
    if (F::STRIPS > 1 && lane >> F::SHIFT < blocks && lane % F::STRIPS < strips)
        bulk_load(stage + lane * UNIT, from, UNIT, came);
    int unit = lane / 2;
    if (FP8 && unit >> F::SHIFT < blocks && unit % F::STRIPS < strips)
        copy_4(r.scales + at.slot * F::SCALES + lane,
               at.scale + expert * p.w.expert_scales + block);
}

// Where a lane finds rows: what load_rows would else fetch and work out after the wait.
typedef struct {
    const uint8_t *x;
    const float *scale;
    uint32_t block, row, stride;  // from one to the next; of scales from block to block
} RowsFrom;

static __device__ RowsFrom find_activations(const Product &p) {
    return (RowsFrom){p.x, p.x_scale, (uint32_t)p.x_block, (uint32_t)p.x_row, (uint32_t)p.x_stride};
}

// Eight lanes bring 128 bytes of a row and swizzle them by its place in the stage: four rows at
// once, or two blocks of two.
template <bool FP8, class F>
static __device__ void load_rows(const RowsFrom &f, const Ring &r, const Spot &at,
                                 const Entry &entry) {
    enum { ROWS = F::ROWS, AT_ONCE = ROWS < 4 ? 4 / ROWS : 1, TURNS = ROWS * AT_ONCE / 4 };
    int lane = threadIdx.x % WARP, chunk = lane % 8, k0 = lane / 8 % AT_ONCE;
    int block = at.item.block + at.i * F::BLOCKS, blocks = at.item.end - block;
    uint8_t *to = r.stages + at.slot * F::BYTES + STAGE_WEIGHTS;
#pragma unroll(TURNS > 2 ? 1 : TURNS)
    for (int turn = 0; turn < TURNS; turn++) {
        int i = turn * (4 / AT_ONCE) + lane / 8 / AT_ONCE, slot = entry.slot + i;
        if (i >= entry.rows) break;
        int row = r.gather ? r.row_of[slot] : slot;
        uint32_t from = (block + k0) * f.block + row * f.row + (FP8 ? chunk ^ row & 7 : chunk) * 16;
#pragma unroll
        for (int k = k0; k < k0 + F::BLOCKS; k += AT_ONCE, from += AT_ONCE * f.block) {
            int at_row = k * ROWS + i;
            if (k < blocks)
                copy_16(to + at_row * ROW_BYTES + ((chunk ^ at_row & 7) << 4), f.x + from);
        }
    }
    float *scales = r.scales + at.slot * F::SCALES + 2 * UNITS;
#pragma unroll
    for (int c = lane; FP8 && c < 2 * F::COLUMNS; c += WARP) {
        int k = c / ROWS, i = c % ROWS, slot = entry.slot + i;
        if (k >= blocks || i >= entry.rows) continue;
        copy_4(scales + c, f.scale + (block + k) * f.stride + (r.gather ? r.row_of[slot] : slot));
    }
}

// A stage, in two halves of four units. sum[tile] is [16][8]: this warp's units times 8 columns.
template <bool FP8, class F>
static __device__ void multiply(float sum[F::TILES][4], const uint8_t *stage, const float *scales,
                                int blocks, int rows) {
    enum { HALVES = 2, TILES = F::TILES, EARLY = TILES < 2 ? TILES : 2, EACH = F::COLUMNS / 2 };
    float c[HALVES][EACH];
    float2 of_w[HALVES] = {}, of_x[HALVES][EARLY] = {};
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    int pair = F::ROWS < 8 ? 0 : lane % 4;  // of rows
    const float2 *x_scale = (const float2 *)(scales + 2 * UNITS);
    uint64_t w = smem_desc(stage), x = smem_desc(stage + STAGE_WEIGHTS);
    wgmma_fence();
    for (int h = 0; h < HALVES; h++, w += 4 * UNIT >> 4, x += F::COLUMNS * ROW_BYTES >> 4)
        for (int k = 0; k < 4; k++) wgmma_32<FP8>(c[h], w + 2 * k, x + 2 * k, k > 0);
    wgmma_commit();
#pragma unroll
    for (int h = 0; FP8 && h < HALVES; h++) {  // meanwhile, what is nearly always needed
        int unit = h * 4 + warp, x = (unit >> F::SHIFT) * (F::ROWS / 2) + pair;
        of_w[h] = ((const float2 *)scales)[unit];
        for (int tile = 0; tile < EARLY; tile++) of_x[h][tile] = x_scale[x + tile * 4];
    }
    wgmma_wait<0>();
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        int unit = h * 4 + warp;
        if (unit >> F::SHIFT >= blocks) return;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            if (tile > 0 && tile * 8 >= rows) break;
            float v[4], by[4] = {1, 1, 1, 1};
            for (int i = 0; i < 4; i++) {
                v[i] = c[h][4 * tile + i];
                if (F::STRIPS > 1 || F::COLUMNS == 8) continue;
                float even = unit & 2 ? c[h][8 % EACH + i] : v[i];
                float odd = unit & 2 ? c[h][12 % EACH + i] : c[h][4 % EACH + i];
                v[i] = unit & 1 ? odd : even;
            }
            if (FP8) {
                int of = (unit >> F::SHIFT) * (F::ROWS / 2) + tile * 4 + pair;
                float2 w = of_w[h], x = tile < EARLY ? of_x[h][tile % EARLY] : x_scale[of];
                by[0] = x.x * w.x, by[1] = x.y * w.x, by[2] = x.x * w.y, by[3] = x.y * w.y;
            }
            for (int i = 0; i < 4; i++) sum[tile][i] += v[i] * by[i];
        }
    }
}

// An item's product goes to its warp's sums [rows][16].
template <class F>
static __device__ void keep_sums(const Entry &entry, float *sums, const float sum[F::TILES][4]) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int tile = 0; tile < F::TILES; tile++) {
        for (int i = 0; i < 2; i++) {
            int row = tile * 8 + lane_row<F>() + i;
            if (row >= entry.rows) return;
            float *to = sums + row * STRIP + lane / 4;
            to[0] = sum[tile][i], to[8] = sum[tile][2 + i];
        }
    }
}

// y's rows from y_row on: the sums [warps][stride][16] of the warps that shared a strip, added by
// a crew of warpgroups.
template <class F>
static __device__ void store_sums(const Product &p, uint32_t y_row, int rows, int group, int warps,
                                  const float *sums, int stride, int crew) {
    enum { WIDTH = STRIP * F::STRIPS };
    int out = p.w.strips * STRIP, threads = crew * 128;
    uint32_t i = threadIdx.x & threads - 1;
    sync_threads(1 + (threadIdx.x / 128 & -crew), threads);
    for (; i < rows * WIDTH; i += threads) {
        uint32_t row = i / WIDTH, column = i % WIDTH;
        int to = group * WIDTH + column;
        const float *from = sums + (column / STRIP * stride + row) * STRIP + column % STRIP;
        float total = 0;
#pragma unroll
        for (int k = 0; k < F::CONSUMERS; k += F::STRIPS)
            if (k < warps) total += from[k * stride * STRIP];
        if (to >= out) continue;
        if (p.y_f32) ((float *)p.y)[(size_t)(y_row + row) * (uint32_t)out + to] = total;
        else *result_at(p, y_row + row, to) = bf16_pair(total, 0);
    }
}

// Asks for the weights of the first round of the ring, as far as the entries are known. Returns how
// many of these stages are this warp's. With few rows it asks for one when the one before has come:
// what queues for memory also holds up what other kernels ask for, whose end this one waits for.
template <bool FP8, bool DOWN, class F>
static __device__ int fill_ring(const Product &p, const Ring &r, Spot at) {
    int issued = 0, step = producers(r);
    for (; at.n < r.n_stages && has_item<DOWN>(p, at.item, r.entries);
         move<DOWN, F>(p, r, &at, step), issued++) {
        if (F::FEW && issued) bar_wait(&r.came[at.slot - step], 0);
        load_weights<FP8, F>(p, r, at, r.table[at.item.entry].expert);
    }
    return issued;
}

// A producer's walk over its stages; the first `issued` ones' weights are on their way already.
template <bool FP8, bool DOWN, class F>
static __device__ void produce(const Product &p, const Ring &r, Spot at, const RowsFrom &from,
                               int issued) {
    int step = producers(r);
    for (; has_item<DOWN>(p, at.item, r.entries); move<DOWN, F>(p, r, &at, step)) {
        Entry entry = r.table[at.item.entry];
        if (at.item.i >= r.half) launch_dependents();
        if (--issued < 0) {
            bar_wait(&r.empty[at.slot], at.parity);
            load_weights<FP8, F>(p, r, at, entry.expert);
        }
        load_rows<FP8, F>(from, r, at, entry);
        copies_arrive(&r.full[at.slot]);
    }
}

// A consumer's end of an item that is a part of y of its own. Each `turn` has the other half of the
// sums, so that one barrier is enough.
template <class F>
static __device__ void finish_item(const Product &p, const Ring &r, const Item &item,
                                   const Entry &entry, int turn, const float sum[F::TILES][4]) {
    int first = r.warp & -4 * r.crew, of_warp = p.x_rows * STRIP;
    float *sums = r.sums + turn % 2 * (p.n_sums / 2);
    keep_sums<F>(entry, sums + r.warp * of_warp, sum);
    store_sums<F>(p, item.part * p.slots + entry.slot, entry.rows, item.group, 4 * r.crew,
                  sums + first * of_warp, p.x_rows, r.crew);
}

// Where DOWN's sums of a lane's slots lie, if it has so many, and by what they are weighted. Looked
// up while a stage is on its way.
template <class F> struct Targets { int at[F::TILES][2]; float by[F::TILES][2]; };

template <class F>
static __device__ void find_targets(Targets<F> *to, const Ring &r, const Entry &entry) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int tile = 0; tile < F::TILES && tile * 8 < entry.rows; tile++) {
        for (int i = 0; i < 2; i++) {
            int row = tile * 8 + lane_row<F>() + i, slot = entry.slot + min(row, entry.rows - 1);
            int of = r.row_of[slot] * STRIP + lane / 4;
            to->at[tile][i] = row < entry.rows ? of : -1, to->by[tile][i] = r.weight_of[slot];
        }
    }
}

// DOWN's. With few rows each warp has sums of its own of its strip. With more it shares them with
// one of the other warpgroup, and they add in turns, the first group's warp first. All loads stand
// before the stores, which they would wait for.
template <class F>
static __device__ void add_item(const Product &p, const Ring &r, const Targets<F> &to, int rows,
                                int turn, const float sum[F::TILES][4]) {
    float *sums = r.sums + r.warp % F::SUMS * p.s.n * STRIP, old[F::TILES][2][2];
    if (!F::FEW) bar_wait(&r.handed[r.warp], (turn + r.warp / 4 + 1) % 2);
#pragma unroll
    for (int tile = 0; tile < F::TILES && tile * 8 < rows; tile++)
        for (int i = 0; i < 2; i++) {
            if (to.at[tile][i] < 0) continue;
            const float *from = sums + to.at[tile][i];
            old[tile][i][0] = from[0], old[tile][i][1] = from[8];
        }
#pragma unroll
    for (int tile = 0; tile < F::TILES && tile * 8 < rows; tile++)
        for (int i = 0; i < 2; i++) {
            if (to.at[tile][i] < 0) continue;
            sums[to.at[tile][i]] = old[tile][i][0] + to.by[tile][i] * sum[tile][i];
            sums[to.at[tile][i] + 8] = old[tile][i][1] + to.by[tile][i] * sum[tile][2 + i];
        }
    if (F::FEW) __syncwarp();
    else warp_arrive(&r.handed[r.warp ^ 4]);
}

template <class F> static __device__ void clear_sums(const Product &p, const Ring &r) {
    sync_threads(1, F::CONSUMERS * 32);
    for (int i = threadIdx.x; i < p.n_sums; i += F::CONSUMERS * 32) r.sums[i] = 0;
    sync_threads(1, F::CONSUMERS * 32);
}

// A consumer's walk over the same items. Of all stages its warpgroup has every second or fourth:
// next the i-th from the item's first on. So an item is one warpgroup's, two neighbours' or all's.
// `turns`: items that it had a part in.
template <bool FP8, bool DOWN, class F>
static __device__ void consume(const Product &p, const Ring &r) {
    int i = r.warp / 4, slot = i, parity = 0, turns = 0;
    float sum[F::TILES][4] = {};
    if (DOWN) clear_sums<F>(p, r);
    for (Item item = first_item<DOWN>(p); has_item<DOWN>(p, item, r.entries);
         next_item<DOWN>(p, &item, r.entries)) {
        if (i < r.item_stages || r.crew == F::GROUPS) {
            Entry entry = r.table[item.entry];
            Targets<F> targets;
            if (DOWN) find_targets<F>(&targets, r, entry);
            for (; i < r.item_stages; i += F::GROUPS) {
                if (F::FEW) bar_wait(&r.came[slot], parity);
                bar_wait(&r.full[slot], parity);
                fence_async();
                multiply<FP8, F>(sum, r.stages + slot * F::BYTES, r.scales + slot * F::SCALES,
                                 item.end - item.block - i * F::BLOCKS, entry.rows);
                warp_arrive(&r.empty[slot]);
                if ((slot += F::GROUPS) >= r.n_stages) slot -= r.n_stages, parity ^= 1;
            }
            if (DOWN) add_item<F>(p, r, targets, entry.rows, turns++, sum);
            else finish_item<F>(p, r, item, entry, turns++, sum);
            memset(sum, 0, sizeof sum);
        }
        i -= r.item_stages;
        if (!DOWN || item.entry < r.entries - 1) continue;
        store_sums<F>(p, 0, p.s.n, item.group, F::SUMS, r.sums, p.s.n, F::GROUPS);
        clear_sums<F>(p, r);
    }
}

// All warps walk over the same items and stages. A stage's full barrier counts its rows' arrival
// and its weights', which have one of their own where rows are few; its empty barrier the warps
// that have multiplied it. Reads each weight once, and a row once for every group of strips, from
// L2. Up to 8 rows it leaves half of the registers to the blocks of other kernels.
template <bool FP8, bool DOWN, class F>
static __global__ void __launch_bounds__(F::THREADS, F::ROWS > 8 ? 1 : 2)
skinny(const __grid_constant__ Product p) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ uint64_t weights_came[MAX_STAGES], full[MAX_STAGES], empty[MAX_STAGES];
    __shared__ uint64_t handed[F::CONSUMERS];
    __shared__ __align__(16) float scales[MAX_STAGES * F::SCALES];
    // The whole block's numbers: even, or the compiler would fetch them anew at every use.
    int n_stages = even(p.stages), item_stages = even(p.item_stages);
    int to_table = even(n_stages * F::BYTES + p.n_sums * sizeof(float));
    int to_weights = even(to_table + p.table * sizeof(Entry));
    int to_rows = even(to_weights + (DOWN ? p.slots : 0) * sizeof(float));
    float *sums = (float *)(smem + n_stages * F::BYTES);
    float *weight_of = (float *)(smem + to_weights);
    Entry *table = (Entry *)(smem + to_table);
    uint16_t *row_of = (uint16_t *)(smem + to_rows);
    int tile = F::ROWS, entries = list_known(p.s, table, tile), warp = even(threadIdx.x / WARP);
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++)
            bar_init(&weights_came[i], 1), bar_init(&full[i], WARP + !F::FEW),
            bar_init(&empty[i], ARRIVING * 4);
        for (int i = 0; DOWN && i < F::CONSUMERS; i++) bar_init(&handed[i], ARRIVING);
        bar_init_done();
    }
    __syncthreads();
    // The experts' first product lets DOWN begin behind its own wait, when the lists are complete,
    // and halfway, so that the first loads of both don't meet. Others ask now for the weights of
    // entries that are known without lists.
    bool first_of_two = !DOWN && p.s.list, producer = warp >= F::CONSUMERS;
    if (!first_of_two) launch_dependents();
    if (DOWN) entries += list_entries(p.s, table + entries, tile, 1, row_of, p.slots);
    entries = even(entries);
    int crew = item_stages > 2 ? (int)F::GROUPS : item_stages;
    uint64_t *came = F::FEW ? weights_came : full;
    Ring r = {smem, scales, came, full, empty, handed, sums, weight_of, row_of, table, entries,
              INT_MAX, n_stages, item_stages, crew, warp, p.s.gather};
    // Whatever can be found out before the wait is: an instruction more behind it is one more in
    // the chain from kernel to kernel.
    producer &= warp % PRODUCERS < producers(r);
    Spot first = producer ? first_spot<DOWN, F>(p, r) : Spot();
    RowsFrom from = find_activations(p);
    int issued = producer ? fill_ring<FP8, DOWN, F>(p, r, first) : 0;
    settle(from.x), settle(from.scale), settle(from.block), settle(from.row), settle(from.stride);
    settle(first.w), settle(first.scale), settle(first.item.block), settle(first.item.end);
#pragma unroll 4
    for (int i = threadIdx.x; DOWN && i < p.slots; i += blockDim.x)
        weight_of[i] = i < p.s.n ? 1 : __ldcg(p.weight + __ldcg(p.s.list + i - p.s.n));
    grid_wait();
    if (first_of_two) {
        r.entries = even(entries + list_entries(p.s, table + entries, tile, 1, row_of, p.slots));
        r.half = p.groups * p.parts * r.entries / 2;
    }
    __syncthreads();
    if (producer) produce<FP8, DOWN, F>(p, r, first, from, issued);
    else if (warp < F::CONSUMERS) consume<FP8, DOWN, F>(p, r);
}

// Shares the shared memory out between ring and sums. Up to 8 rows a ring of more than half of it
// is enough: with less, two blocks might meet on one multiprocessor while another has none.
template <bool FP8, bool DOWN, class F> static void launch_skinny(Product *p) {
    int tile = F::ROWS;
    p->groups = units(p->w.strips, F::STRIPS);
    p->by_groups = divisor(p->groups), p->by_parts = divisor(p->parts);
    p->table = max_entries(&p->s, tile);
    p->x_rows = min_int(p->s.n, tile);
    p->item_stages = units(p->part_blocks, F::BLOCKS);
    p->n_sums = STRIP * (DOWN ? p->s.n * F::SUMS : 2 * F::CONSUMERS * p->x_rows);
    int rest = p->n_sums * sizeof(float) + p->table * sizeof(Entry) +
               (p->s.list ? p->slots : 0) * (sizeof(uint16_t) + (DOWN ? sizeof(float) : 0));
    int room = (p->s.n <= 8 ? 160 : 222) << 10;
    p->stages = min_int(MAX_STAGES, (room - rest) / F::BYTES);
    p->stages -= p->stages % F::GROUPS;  // so that a stage is always the same warpgroup's
    assert(p->stages >= F::GROUPS && p->s.n_experts <= 256);
    int items = p->groups * p->parts * p->table;
    launch(skinny<FP8, DOWN, F>, min_int(n_sms, DOWN ? p->groups : items), F::THREADS,
           (size_t)p->stages * F::BYTES + rest, *p);
}

// ---- The products: many rows --------------------------------------------------------------------
// y = x W^T with tiles of up to 192 slots by 128 weight rows on wgmma. One warpgroup brings stages
// of 128 columns (64 in bf16), three multiply, 64 slots each; those that have none pass by.
//
// In e4m3, after each block of 128 columns the tensor cores' sums are scaled and added to f32 sums,
// for their own keep only about 14 bits. So the slots are the first operand: a thread then holds
// two of them and needs two scales of theirs, and two of the weights'. With the weights first it
// would read 48 scales from shared memory, which the operands have busy for most of the time. While
// one warpgroup scales, the others multiply. In bf16 the tensor cores' own sums are exact enough.
//
// The tensor cores need 768 clocks for a stage, and an instruction that waits for the one before it
// takes 4 to 6. So all that doesn't change from stage to stage is worked out once for a tile, and
// what is the same in a warp is said to be (`even`), so that the compiler keeps it out of the
// lanes' registers. tests/PERF.md says what that brought.

enum {
    WIDE_STRIPS = 8, WIDE_GROUPS = 3, WIDE_SLOTS = WIDE_GROUPS * 64, WIDE_STAGES = 4,
    STAGING = 16 * 128,  // bytes: a warp's 16 slots, 64 bf16 of each
    GATHERED = WIDE_SLOTS / 16,  // rows that a thread brings a chunk of
};

typedef struct __align__(1024) {  // as the swizzle wants it
    uint8_t w[WIDE_STRIPS * UNIT], x[WIDE_SLOTS * ROW_BYTES];
    float x_scale[WIDE_SLOTS], w_scale[2];  // of the slots; of each strip's rows 0-7 and 8-15
    uint64_t full, empty;
} WideStage;

typedef struct { Entry entry; int strip, part, block, end; } WideTile;

static __device__ WideTile wide_tile(const Product &p, const Entry *table, int i) {
    int columns = (p.w.strips + WIDE_STRIPS - 1) / WIDE_STRIPS;
    int part = i % p.parts, block = part * p.part_blocks;
    i /= p.parts;
    return (WideTile){table[i / columns], i % columns * WIDE_STRIPS, part,
                      block, min(block + p.part_blocks, p.w.blocks)};
}

// Where a thread of the producers finds its part of a tile's next block.
typedef struct {
    const uint8_t *w, *x;          // w: of a strip, if it has one
    const float *w_scale, *x_scale;
    uint32_t row[GATHERED];        // where gathered rows lie, of slots thread / 8, that + 16, ..
    uint32_t scale[2];             // their scales, of slots thread and thread + 128
} WideFrom;

// Gathered rows in e4m3 are swizzled by their own number and wanted by their place, those in bf16
// lie plain: 8 threads bring a row's chunks, each from where the one lies that it needs.
template <bool FP8>
static __device__ void find_rows(WideFrom *f, const Product &p, const WideTile &t, bool gather) {
    int thread = threadIdx.x, first = thread / 8, last = t.entry.rows - 1;
    f->x = p.x + t.block * p.x_block, f->x_scale = p.x_scale + (size_t)t.block * p.x_stride;
    if (!gather) f->x += (size_t)t.entry.slot * ROW_BYTES, f->x_scale += t.entry.slot;
#pragma unroll
    for (int k = 0; gather && k < GATHERED; k++) {
        int row = slot_row(p.s, t.entry.slot + min(first + k * 16, last));
        int chunk = (thread ^ first ^ (FP8 ? row : 0)) & 7;
        f->row[k] = row * p.x_row + chunk * 16;
    }
    for (int k = 0; FP8 && gather && k < 2; k++)
        f->scale[k] = slot_row(p.s, t.entry.slot + min(thread + k * 128, last));
}

static __device__ int strip_of(int thread) {  // in a tile: each warp has two
    return thread % WARP < 2 ? thread % WARP * 4 + thread / WARP : INT_MAX;
}

static __device__ void find_weights(WideFrom *f, const Product &p, const WideTile &t) {
    int strip = strip_of(threadIdx.x), expert = t.entry.expert;
    f->w = NULL, f->w_scale = scales_at(p.w, threadIdx.x & 1, expert, t.strip) + t.block;
    if (strip < min((int)WIDE_STRIPS, p.w.strips - t.strip))
        f->w = strip_at(p.w, expert, t.strip + strip) + (size_t)t.block * UNIT;
}

// A stage's weights, and word of all bulk copies that will come for it.
static __device__ void bring_weights(const Product &p, WideFrom *f, int bytes, WideStage *stage) {
    int thread = threadIdx.x;
    if (thread == 0) bar_expect(&stage->full, bytes);
    if (f->w) bulk_load(stage->w + strip_of(thread) * UNIT, f->w, UNIT, &stage->full), f->w += UNIT;
    if (thread < 2) {
        if (p.fp8) copy_4(&stage->w_scale[thread], f->w_scale++);
        copies_arrive(&stage->full);
    }
}

// A stage's gathered rows and their scales.
template <bool FP8>
static __device__ void gather_rows(const WideFrom &f, int rows, WideStage *stage) {
    int thread = threadIdx.x;
    uint8_t *to = stage->x + thread * 16;
#pragma unroll
    for (int k = 0; k < GATHERED; k++)
        if (thread / 8 + k * 16 < rows) copy_16(to + k * 16 * ROW_BYTES, f.x + f.row[k]);
    for (int k = 0; FP8 && k < 2; k++)
        if (thread + k * 128 < rows)
            copy_4(&stage->x_scale[thread + k * 128], f.x_scale + f.scale[k]);
    copies_arrive(&stage->full);
}

// The first weights don't wait for the kernel before, unless they need its lists. Rows that lie
// side by side come as one copy.
template <bool FP8>
static __device__ void wide_produce(const Product &p, const Entry *table, int tiles, bool gather,
                                    WideStage *ring) {
    int thread = threadIdx.x, parity = 1, issued = 0;
    WideStage *stage = ring;
    WideFrom f;
    for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
        WideTile t = wide_tile(p, table, i);
        int rows = t.entry.rows, blocks = t.end - t.block;
        int scales = (rows + 3) / 4 * 16;  // bytes, in whole chunks, as copies want them
        int bytes = min((int)WIDE_STRIPS, p.w.strips - t.strip) * UNIT;
        if (!gather) bytes += rows * ROW_BYTES + scales;
        find_weights(&f, p, t);
        if (i == (int)blockIdx.x) {
            if (!p.s.n_experts)
#pragma unroll 1
                for (; issued < min((int)WIDE_STAGES, blocks); issued++)
                    bring_weights(p, &f, bytes, &ring[issued]);
            grid_wait();
        }
        find_rows<FP8>(&f, p, t, gather);
        for (; blocks > 0; blocks--) {
            if (--issued < 0) {
                bar_wait(&stage->empty, parity);
                bring_weights(p, &f, bytes, stage);
            }
            if (gather) {
                gather_rows<FP8>(f, rows, stage);
            } else if (thread == WARP) {
                bulk_load(stage->x, f.x, rows * ROW_BYTES, &stage->full);
            } else if (thread == 2 * WARP) {
                bulk_load(stage->x_scale, f.x_scale, scales, &stage->full);
            }
            f.x += p.x_block, f.x_scale += p.x_stride;
            if (++stage == ring + WIDE_STAGES) stage = ring, parity ^= 1;
        }
    }
}

// sum += a stage's product with 64 slots, of which this thread has two: `slot` and the 8th from it.
// In e4m3 the stage is given back before its product is scaled.
template <bool FP8>
static __device__ void add_stage(float (&sum)[64], WideStage *stage, int group, int slot) {
    uint64_t x = smem_desc(stage->x + group * 64 * ROW_BYTES), w = smem_desc(stage->w);
    float c[64], (&to)[64] = FP8 ? c : sum;
    float2 of_x = {stage->x_scale[slot], stage->x_scale[slot + 8]};
    float2 of_w = *(const float2 *)stage->w_scale;
    wgmma_fence();
    for (int k = 0; k < 4; k++)
        wgmma_128<FP8>(to, desc_at(x, k * 32), desc_at(w, k * 32), !FP8 || k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    warp_arrive(&stage->empty);
    if (!FP8) return;
    float scale[] = {of_x.x * of_w.x, of_x.y * of_w.x, of_x.x * of_w.y, of_x.y * of_w.y};
#pragma unroll
    for (int i = 0; i < 64; i++) sum[i] += c[i] * scale[i / 4 % 2 * 2 + i / 2 % 2];
}

// Sums as they are, for the next kernel to add.
static __device__ void store_parts(const Product &p, const WideTile &t, int slot, int end,
                                   const float (&sum)[64]) {
    int lane = threadIdx.x % WARP, out = p.w.strips * STRIP;
    int column = t.strip * STRIP + lane % 4 * 2;
    float *y = (float *)p.y + (size_t)t.part * p.slots * out;
    slot += lane / 4;
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
        int to = slot + i / 2 % 2 * 8, at = column + i / 4 * 8;
        if (to < end && at < out) *(float2 *)(y + (size_t)to * out + at) = {sum[i], sum[i + 1]};
    }
}

// silu(gate) up, rounded where the twin rounds.
static __device__ float gated(float gate, float up) {
    float g = round_bf16(gate), d = sigmoid_divisor(g);
    return round_bf16(quotient(g, d, inverse(d)) * round_bf16(up));
}

// A strip's gate and up rows are a thread's neighbouring fours: 64 columns become 32.
static __device__ void gate_sums(float (&sum)[64]) {
#pragma unroll
    for (int i = 0; i < 32; i++) sum[i] = gated(sum[i / 4 * 8 + i % 4], sum[i / 4 * 8 + 4 + i % 4]);
}

// Sums as bf16: a warp's 16 slots go through shared memory, so that 8 lanes write 128 bytes of a
// slot at once. Slots before `first` are another expert's.
static __device__ void store_rows(const Product &p, const WideTile &t, int first, int slot, int end,
                                  uint8_t *staging, const float (&sum)[64]) {
    int lane = threadIdx.x % WARP, chunk = lane % 8;
    uint32_t to = smem_address(staging) + lane % 16 * 128;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (h && p.gated) return;
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const float *c = sum + (h * 8 + j) * 4;
            store_8x8(to + ((j + lane / 16 ^ lane % 8) << 4), bf16_pair(c[0], c[1]),
                      bf16_pair(c[2], c[3]), bf16_pair(c[4], c[5]), bf16_pair(c[6], c[7]));
        }
        __syncwarp();
        int out = p.w.strips * STRIP >> p.gated;
        int column = ((t.strip + h * 4) * STRIP >> p.gated) + chunk * 8;
        for (int row = lane / 8; row < 16 && column < out; row += 4)
            if (slot + row >= first && slot + row < end)
                *(uint4 *)(p.gated ? (bf16 *)p.y + (size_t)(slot + row) * out + column
                                   : result_at(p, slot + row, column)) =
                    *(const uint4 *)(staging + row * 128 + ((chunk ^ row % 8) << 4));
        __syncwarp();
    }
}

template <bool FP8>
static __device__ void wide_multiply(const Product &p, const Entry *table, int tiles, bool gather,
                                     WideStage *ring, uint8_t *staging) {
    int group = even(threadIdx.x / 128 - 1);
    int warp = threadIdx.x / WARP % 4, row = group * 64 + warp * 16;
    int slot = row + threadIdx.x % WARP / 4;
    unsigned n = 0;  // stages so far
    for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
        WideTile t = wide_tile(p, table, i);
        float sum[64] = {};
        bool any = even(t.entry.rows) > group * 64;
        for (int left = t.end - t.block; left > 0; left--, n++) {
            WideStage *stage = ring + n % WIDE_STAGES;
            bar_wait(&stage->full, n / WIDE_STAGES & 1);
            if (gather) fence_async();
            if (any) add_stage<FP8>(sum, stage, group, slot);
            else warp_arrive(&stage->empty);
        }
        int from = t.entry.slot + row, end = t.entry.slot + t.entry.rows;
        int first = t.entry.expert < p.s.n_experts ? p.s.n + p.s.start[t.entry.expert] : 0;
        if (from >= end) continue;
        if (p.gated) gate_sums(sum);
        if (p.y_f32) store_parts(p, t, from, end, sum);
        else store_rows(p, t, first, from, end, staging + row / 16 * STAGING, sum);
    }
}

// Blocks take tiles in turns, those of the same slots one after the other. A stage is full when its
// bulk copies have come, and the weights' scales, and gathered rows, which all threads copy.
template <bool FP8>
static __global__ void __launch_bounds__(128 * (WIDE_GROUPS + 1), 1)
wide(const __grid_constant__ Product p) {
    extern __shared__ __align__(1024) uint8_t smem[];
    WideStage *ring = (WideStage *)smem;
    uint8_t *staging = smem + WIDE_STAGES * sizeof *ring;
    Entry *table = (Entry *)(staging + WIDE_GROUPS * 4 * STAGING);
    bool gather = p.s.gather || !FP8;
    if (threadIdx.x == 0) {
        for (int i = 0; i < WIDE_STAGES; i++)
            bar_init(&ring[i].full, gather ? 3 + 128 : 3),
            bar_init(&ring[i].empty, ARRIVING * WIDE_GROUPS * 4);
        bar_init_done();
    }
    launch_dependents();
    int entries = list_known(p.s, table, p.tile);
    if (p.s.n_experts)
        grid_wait(), entries += list_entries(p.s, table + entries, p.tile, gather ? 1 : 8, NULL, 0);
    __syncthreads();
    int tiles = even(entries) * ((p.w.strips + WIDE_STRIPS - 1) / WIDE_STRIPS) * p.parts;
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        wide_produce<FP8>(p, table, tiles, gather, ring);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
        grid_wait();  // before y is written
        wide_multiply<FP8>(p, table, tiles, gather, ring, staging);
    }
}

// The size of tiles that keeps the busiest multiprocessor's tensor cores and copies the shortest.
static int wide_slots(const Product *p) {
    if (p->s.n_experts) return WIDE_SLOTS;  // an expert's own number decides
    int best = WIDE_SLOTS, least = INT_MAX;
    for (int tile = WIDE_SLOTS; tile > 0; tile -= 64) {
        int tiles = units(p->w.strips, WIDE_STRIPS) * units(p->s.n, tile) * p->parts;
        int cost = units(tiles, n_sms) * (tile + 64);
        if (cost < least) least = cost, best = tile;
    }
    return best;
}

template <bool FP8> static void launch_wide(Product *p) {
    assert(p->s.n * p->x_row <= UINT32_MAX);  // as WideFrom counts
    p->tile = wide_slots(p);
    size_t smem = WIDE_STAGES * sizeof(WideStage) + WIDE_GROUPS * 4 * STAGING +
                  max_entries(&p->s, p->tile) * sizeof(Entry);
    launch(wide<FP8>, n_sms, 128 * (WIDE_GROUPS + 1), smem, *p);
}

// ---- The products: between them -----------------------------------------------------------------

// y [rows][out] = the sum over parts of f32 [parts][rows][out], rounded. A thread makes four; the
// parts were written just before and lie in L2.
static __global__ void add_parts(const __grid_constant__ Product p, const float *from) {
    launch_dependents();
    grid_wait();
    int out = p.w.strips * STRIP, size = p.slots * out;
    int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= size) return;
    float4 sum = {};
#pragma unroll 4
    for (int part = 0; part < p.parts; part++) {
        float4 v = *(const float4 *)(from + (size_t)part * size + i);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    *(uint2 *)result_at(p, i / out, i % out) =
        make_uint2(bf16_pair(sum.x, sum.y), bf16_pair(sum.z, sum.w));
}

enum { FEW_PARTS = 7 };  // of K, of the experts' first product for one or two rows: a stage each

// h = quant(silu(gate) up) from f32 [parts][slots][2 cols], in which 8 columns of gate and 8 of up
// take turns; or, without parts, from bf16 [slots][cols], which is silu(gate) up already. A warp
// makes one scale group of one slot: a lane 4 columns of it. For `wide`, it also notes where each
// pair's slot is. Its successor may begin at once, and DOWN reads the lists before its wait: they
// are complete, since the product before this let nobody up before its own wait.
static __global__ void __launch_bounds__(256, 2)
    gate_quant(uint8_t *q, float *scale, int stride, const float *from, int parts, int cols,
               int slots, int *slot_of, const int *pair, int n) {
    enum { AT_ONCE = FEW_PARTS };  // parts whose loads are on their way together
    launch_dependents();
    grid_wait();
    int unit = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    int slot = unit / (cols / BLOCK), group = unit % (cols / BLOCK);
    if (slot >= slots) return;
    float gate[4] = {}, up[4] = {}, h[4], amax = MIN_AMAX;
    if (!parts) {
        uint2 x = ((const uint2 *)from)[(size_t)unit * WARP + lane];
        h[0] = bf16_low(x.x), h[1] = bf16_high(x.x), h[2] = bf16_low(x.y), h[3] = bf16_high(x.y);
    }
    from += (size_t)slot * 2 * cols + group * 2 * BLOCK + lane / 2 * 16 + lane % 2 * 4;
    for (int first = 0; first < parts; first += AT_ONCE) {
        float4 g[AT_ONCE], u[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++, from += (size_t)slots * 2 * cols) {
            bool there = first + k < parts;
            g[k] = there ? *(const float4 *)from : float4();
            u[k] = there ? *(const float4 *)(from + 8) : float4();
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            gate[0] += g[k].x, gate[1] += g[k].y, gate[2] += g[k].z, gate[3] += g[k].w;
            up[0] += u[k].x, up[1] += u[k].y, up[2] += u[k].z, up[3] += u[k].w;
        }
    }
    for (int i = 0; i < 4; i++) {
        if (parts) h[i] = gated(gate[i], up[i]);
        amax = fmaxf(amax, fabsf(h[i]));
    }
    float s = e4m3_scale(warp_max(amax)), by = inverse(s);
    for (int i = 0; i < 4; i++) h[i] = quotient(h[i], s, by);
    size_t row = (size_t)group * stride + slot;
    *(uint32_t *)(q + row * ROW_BYTES + ((lane / 4 ^ slot & 7) << 4) + lane % 4 * 4) =
        e4m3_pair(h[0], h[1]) | e4m3_pair(h[2], h[3]) << 16;
    if (lane == 0) scale[row] = s;
    if (slot_of && group == 0 && lane == 0 && slot >= n) slot_of[pair[slot - n]] = slot;
}

// y [n][hidden] = the weighted sum of a row's slots, and its shared slot: many rows only, where the
// slots' products went through memory in bf16.
static __global__ void combine(bf16 *y, const bf16 *from, const int *slot_of, const float *weight,
                               int top_k, int hidden, int n) {
    launch_dependents();
    grid_wait();
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    int row = i / hidden, column = i % hidden;
    if (row >= n) return;
    float sum[CHUNK] = {};
    for (int k = 0; k <= top_k; k++) {
        int slot = k < top_k ? slot_of[row * top_k + k] : row;
        float by = k < top_k ? weight[row * top_k + k] : 1;
        uint4 v = *(const uint4 *)(from + (size_t)slot * hidden + column);
        const uint32_t *pair = (const uint32_t *)&v;
        for (int j = 0; j < 4; j++)
            sum[2 * j] += by * bf16_low(pair[j]), sum[2 * j + 1] += by * bf16_high(pair[j]);
    }
    *(uint4 *)(y + i) = pack8(sum);
}

// ---- The stages: the small ones -----------------------------------------------------------------

typedef struct { float v[ROPE_DIM / 2]; } Frequencies;

// A thread makes one cosine and sine, in double, since the angles go up to 163,840 and f32's own
// reduction costs more than it saves. Once a step: its time does not matter.
static __global__ void rope_kernel(float2 *rope, Frequencies f, const int *position, int n) {
    launch_dependents();
    grid_wait();
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
    launch(rope_kernel, units(n * (ROPE_DIM / 2), THREADS), THREADS, 0, (float2 *)rope, f, position,
           n);
}

// A block copies a row in 16-byte pieces: 14 KB, read and written once.
static __global__ void embed_kernel(uint4 *x, const uint4 *table, int first, int rows,
                                    const int *id, int chunks) {
    grid_wait();
    launch_dependents();  // mla_attend reads the plan, which is older than this, without a wait
    int at = id[blockIdx.x] - first;
    bool here = at >= 0 && at < rows;
    const uint4 *row = table + (size_t)(here ? at : 0) * chunks;
    x += (size_t)blockIdx.x * chunks;
    for (int c = threadIdx.x; c < chunks; c += blockDim.x) x[c] = here ? row[c] : uint4{};
}

// A thread for each eight columns of a row, in whole warps: so a row is in registers at once.
static int row_threads(int cols) {
    if (cols > MAX_COLS) die("got rows of %d columns, a GPU wants at most %d", cols, MAX_COLS);
    return units(cols / CHUNK, WARP) * WARP;
}

void embed(bf16 *x, const Linear *table, int first, const int *id, int n) {
    launch(embed_kernel, n, row_threads(table->in), 0, (uint4 *)x, (const uint4 *)table->data,
           first, table->out, id, table->in / CHUNK);
}

static __device__ void load8(float v[CHUNK], const float *from) {
    const float4 low = ((const float4 *)from)[0], high = ((const float4 *)from)[1];
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

static __device__ float square8(const float v[CHUNK]) {
    float sum = 0;
    for (int i = 0; i < CHUNK; i++) sum += v[i] * v[i];
    return sum;
}

// rsqrt(mean + eps) of a row's squares, from their sum.
static __device__ float norm_factor(float square, int cols, float eps) {
    return 1 / sqrtf(quotient(square, cols, inverse(cols)) + eps);
}

// v = bf16(v factor gain); returns the same, packed.
static __device__ uint4 norm8(float v[CHUNK], const float gain[CHUNK], float factor) {
    for (int i = 0; i < CHUNK; i++) v[i] = v[i] * factor * gain[i];
    uint4 packed = pack8(v);
    unpack8(v, packed);
    return packed;
}

// The same into chunk c of a token's row, if there is one, with the quantised values.
static __device__ void act_norm(const Act &a, int token, int c, float v[CHUNK],
                                const float gain[CHUNK], float factor) {
    int chunks = a.cols / CHUNK;
    uint4 packed = norm8(v, gain, factor);
    if (c < chunks) ((uint4 *)a.x)[(size_t)token * chunks + c] = packed;
    quantise8(a, token, c, v, c < chunks);
}

// A team of blocks, a cluster, takes a row: one multiprocessor would be busy with its instructions
// for longer than it waits. A thread has one chunk; the warps tell all blocks their sums of
// squares. Many rows keep all multiprocessors busy anyway, and a block takes one. Reads 28 KB and
// writes 35 KB a row.
enum { NORM_THREADS = MAX_COLS / CHUNK, NORM_TEAM = 8, TEAM_ROWS = 16 };
template <int TEAM>
static __global__ void __cluster_dims__(TEAM) __launch_bounds__(NORM_THREADS / TEAM, 2 * TEAM)
    add_norm_kernel(uint4 *x, Act a, const uint4 *y, const float *gain, float eps) {
    __shared__ float sums[NORM_THREADS / WARP];
    __shared__ uint64_t told;
    int token = blockIdx.x / TEAM, part = blockIdx.x % TEAM;
    int lane = threadIdx.x % WARP, warps = blockDim.x / WARP, chunks = a.cols / CHUNK;
    int c = part * blockDim.x + threadIdx.x;
    size_t at = (size_t)token * chunks + c;
    float v[CHUNK] = {0}, add[CHUNK], g[CHUNK] = {0};
    bool there = c < chunks;
    if (TEAM > 1 && threadIdx.x == 0) {
        bar_init(&told, 1), bar_init_done();
        bar_expect(&told, TEAM * warps * sizeof(float));
    }
    if (TEAM > 1) team_arrive();
    launch_dependents();
    if (there) load8(g, gain + c * CHUNK);  // a weight: it can be read before the wait
    grid_wait();
    if (there) {
        uint4 own = x[at], other = y ? y[at] : own;
        unpack8(v, own);
        if (y) {
            unpack8(add, other);
            for (int i = 0; i < CHUNK; i++) v[i] += add[i];
            x[at] = own = pack8(v);
            unpack8(v, own);
        }
    }
    float square = TEAM > 1 ? warp_sum(square8(v)) : block_sum(square8(v));
    if (TEAM > 1) {
        team_wait();  // else a block's barrier might not be there yet
        if (lane < TEAM) team_tell(&sums[part * warps + threadIdx.x / WARP], &told, lane, square);
        bar_wait(&told, 0);
        square = warp_sum(lane < TEAM * warps ? sums[lane] : 0);
    }
    act_norm(a, token, c, v, g, norm_factor(square, a.cols, eps));
}

void add_norm(bf16 *x, Act *a, const bf16 *y, const Vector *gain, float eps, int n) {
    act_rows(a, n);
    int team = n <= TEAM_ROWS ? NORM_TEAM : 1, warps = row_threads(a->cols) / WARP;
    launch(team > 1 ? add_norm_kernel<NORM_TEAM> : add_norm_kernel<1>, n * team,
           units(warps, team) * WARP, 0, (uint4 *)x, *a, (const uint4 *)y,
           (const float *)gain->data, eps);
}

// ---- The stages: one product --------------------------------------------------------------------

static Weights weights(const Linear *w) {
    const float *scale = (const float *)w->scale;
    assert(w->dtype != DTYPE_F32 && w->out % STRIP == 0 && w->in % BLOCK == 0);
    return (Weights){w->data, {scale, scale}, 0, 0, w->out / STRIP,
                     w->in / (w->dtype == DTYPE_F8_E4M3 ? 128 : 64), BLOCK / STRIP, INT_MAX, 0, 0};
}

static Weights gate_up_weights(const Mlp *m) {  // interleaved: a strip holds 8 rows of each
    Weights w = weights(&m->gate_proj);
    w.scale[1] = (const float *)m->up_proj.scale;
    w.strips *= 2, w.scale_strips *= 2;
    return w;
}

static Slots all_rows(int n) { return (Slots){n, 0, 0, NULL, NULL, n, divisor(1), false}; }

static Product product_of(const Act *a, Weights w, Slots s, DType dtype) {
    Product p = {};
    p.w = w, p.s = s, p.parts = 1, p.slots = s.n * (s.top_k + 1);
    p.w.split = min_int(w.split, w.strips);
    p.fp8 = dtype == DTYPE_F8_E4M3;
    p.x = p.fp8 ? a->q : (const uint8_t *)a->x, p.x_scale = a->scale, p.x_stride = a->stride;
    p.x_block = p.fp8 ? (size_t)a->stride * ROW_BYTES : (size_t)ROW_BYTES;
    p.x_row = p.fp8 ? (size_t)ROW_BYTES : a->cols * sizeof(bf16);
    return p;
}

static bool few_rows(const Product *p) {
    return p->s.n <= (p->s.n_experts ? EXPERT_ROWS : SKINNY_ROWS);
}

// Few tiles would leave most of the chip idle: K is split, each part at least 4 blocks. For few
// rows that must be worth another kernel, and up to 8 they have small tiles anyway.
static int k_parts(const Product *p) {
    bool few = few_rows(p);
    if (p->s.n <= 8) return 1;
    int tiles = few ? units(p->w.strips, 4) * known_entries(&p->s, SKINNY_ROWS)
                    : units(p->w.strips, 8) * known_entries(&p->s, WIDE_SLOTS);
    int parts = min_int(n_sms / tiles, p->w.blocks / 4);
    return parts > (few ? 2 : 1) ? parts : 1;
}

template <bool FP8> static void run_few(Product *p) {
    if (p->s.n <= 2) launch_skinny<FP8, false, Form<0, 8>>(p);
    else if (p->s.n <= 8) launch_skinny<FP8, false, Form<0, 32>>(p);
    else launch_skinny<FP8, false, Form<2, 32>>(p);
}

static void run(Product *p) {
    p->part_blocks = units(p->w.blocks, p->parts);
    bool few = few_rows(p);
    if (few && p->weight && p->s.n <= 8) launch_skinny<true, true, Form<2, 8>>(p);
    else if (few && p->weight) launch_skinny<true, true, Form<2, 32>>(p);
    else if (few && p->fp8) run_few<true>(p);
    else if (few) run_few<false>(p);
    else if (p->fp8) launch_wide<true>(p);
    else launch_wide<false>(p);
}

// For all rows, to p->y as bf16.
static void run_rows(Product *p) {
    void *y = p->y;
    p->parts = k_parts(p), p->y_f32 = p->parts > 1;
    if (p->y_f32) p->y = scratch;
    run(p);
    if (p->parts == 1) return;
    p->y = y;
    launch(add_parts, units((size_t)p->slots * p->w.strips * STRIP, 4 * 256), 256, 0, *p, scratch);
}

void linear(bf16 *y, const Act *a, const Linear *w, int n) {
    assert(a->cols == w->in);
    Product p = product_of(a, weights(w), all_rows(n), w->dtype);
    p.y = y;
    run_rows(&p);
}

// One kernel: the second matrix's strips are the first one's further strips.
void linear_pair(bf16 *y0, bf16 *y1, const Act *a, const Linear *w0, const Linear *w1, int n) {
    assert(a->cols == w0->in && a->cols == w1->in && w0->dtype == w1->dtype);
    assert(w0->out % BLOCK == 0);
    Weights w = weights(w0), second = weights(w1);
    w.split = w.strips, w.strips += second.strips;
    w.jump = second.data - w.data - (ptrdiff_t)w.split * w.blocks * UNIT;
    w.scale_jump = second.scale[0] - w.scale[0] - w.split / w.scale_strips * w.blocks;
    Product p = product_of(a, w, all_rows(n), w0->dtype);
    p.y = y0, p.y2 = y1;
    run_rows(&p);
}

// out f32 [parts][n][w.out] = rows of a, unquantised, times a bf16 matrix, to be summed over parts.
// rows NULL: all. (The core of logits and moe_route)
static void product_bf16(float *out, const Act *a, const Linear *w, const int *rows, int n,
                         int parts) {
    assert(w->dtype == DTYPE_BF16 && a->cols == w->in);
    Slots s = all_rows(n);
    if (rows) s.list = rows, s.listed = 0, s.gather = true;
    Product p = product_of(a, weights(w), s, DTYPE_BF16);
    p.y = out, p.y_f32 = true, p.parts = parts;
    run(&p);
}

// ---- The stages: what is cached -----------------------------------------------------------------

// Neighbours are a pair, and each of the four pairs of a chunk turns by its angle; `rope` holds
// cosines and sines. Products and sums are rounded one by one, as in kernels.c.
static __device__ uint4 rotate_chunk(uint4 x, const float *rope) {
    uint32_t in[4] = {x.x, x.y, x.z, x.w}, out[4];
    for (int i = 0; i < 4; i++) {
        float re = bf16_low(in[i]), im = bf16_high(in[i]);
        float cosine = rope[2 * i], sine = rope[2 * i + 1];
        out[i] = bf16_pair(__fsub_rn(__fmul_rn(re, cosine), __fmul_rn(im, sine)),
                           __fadd_rn(__fmul_rn(re, sine), __fmul_rn(im, cosine)));
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

// Where chunk c of a row's latent and key part lies in its page: [9 blocks of 64 dims][64 tokens]
// [128 bytes], swizzled by the token, so that a page is one bulk copy and both of attention's
// operands.
static __device__ uint4 *cache_chunk(bf16 *cache, const Batch &b, int token, int c) {
    int position = b.position[token], t = position % PAGE;
    int page = b.pages[(size_t)b.seq[token] * b.max_pages + position / PAGE];
    uint8_t *line = (uint8_t *)cache + (size_t)page * PAGE_BYTES + (c / 8 * PAGE + t) * ROW_BYTES;
    return (uint4 *)line + (c % 8 ^ t % 8);
}

// Two blocks a row, which need nothing of each other: one norms and quantises q, the other makes
// the cache's entry. Some KB a row; latency is all, so what is older than the step's first kernel,
// and the weights, are read before the wait.
static __global__ void __launch_bounds__(MAX_COLS / CHUNK)
    mla_latent_kernel(Act qa, bf16 *cache, const uint4 *q, const uint4 *kv, const float *q_gain,
                      const float *kv_gain, float eps, const float *rope, Batch b) {
    enum { LATENT_CHUNKS = LATENT_DIM / CHUNK, ALL_CHUNKS = CACHE_DIM / CHUNK };
    bool is_q = blockIdx.y == 0;
    int token = blockIdx.x, c = threadIdx.x, chunks = is_q ? qa.cols / CHUNK : ALL_CHUNKS;
    int normed = is_q ? chunks : LATENT_CHUNKS;  // the others are k_pe, which is turned
    bool there = c < chunks, turned = there && c >= normed;
    float v[CHUNK] = {0}, g[CHUNK] = {0};
    uint4 x = {}, *to = NULL;
    launch_dependents();
    if (there && !turned) load8(g, (is_q ? q_gain : kv_gain) + c * CHUNK);
    if (there && !is_q) to = cache_chunk(cache, b, token, c);
    grid_wait();
    if (there) x = (is_q ? q : kv)[(size_t)token * chunks + c];
    if (turned) load8(g, rope + token * ROPE_DIM + (c - normed) * CHUNK);
    if (!turned) unpack8(v, x);
    float factor = norm_factor(block_sum(square8(v)), normed * CHUNK, eps);
    if (is_q) act_norm(qa, token, c, v, g, factor);
    else if (there) *to = turned ? rotate_chunk(x, g) : norm8(v, g, factor);
}

void mla_latent(Act *qa, bf16 *cache, const bf16 *q, const bf16 *kv, const Vector *q_gain,
                const Vector *kv_gain, float eps, const float *rope, const Batch *b) {
    act_rows(qa, b->n);
    int threads = row_threads(qa->cols), least = row_threads(CACHE_DIM);
    launch(mla_latent_kernel, dim3(b->n, 2), max_int(threads, least), 0, *qa, cache,
           (const uint4 *)q, (const uint4 *)kv, (const float *)q_gain->data,
           (const float *)kv_gain->data, eps, rope, *b);
}

// ---- Queries and values: W_UK and W_UV ----------------------------------------------------------

// Weights are constants and can be asked for before grid_wait(). Callers do so under a condition:
// the assembler moves loads past the wait, but not out of a branch.
static __device__ void brick_load(Brick &a, const uint4 *bricks, int head, int brick) {
    const uint4 *p = bricks + ((size_t)head * BRICKS + brick) * FRAGMENTS * 32 + threadIdx.x % 32;
    for (int i = 0; i < FRAGMENTS; i++) a[i / BRICK_STEPS][i % BRICK_STEPS] = __ldg(p + i * 32);
}

// Tiles of eight tokens' 128 x, `stride` apart: a lane's four chunks of token g. Zeros past the
// last.
template <int TILES>
static __device__ void rows_load(uint4 (&x)[TILES][4], const bf16 *p, size_t stride, int first,
                                 int n) {
    for (int j = 0; j < TILES; j++) {
        size_t token = first + j * TOKENS + threadIdx.x % 32 / 4;
        const uint4 *row = (const uint4 *)(p + token * stride);
        for (int i = 0; i < 4; i++)
            x[j][i] = token < n ? row[4 * i + threadIdx.x % 4] : make_uint4(0, 0, 0, 0);
    }
}

// sum [s][0, 2] and [s][1, 3]: m = 8 g + 2 s and the next of tokens 2 t and 2 t + 1.
static __device__ void brick_product(float (&sum)[BRICK_STRIPS][4], const Brick &a,
                                     const uint4 (&x)[4]) {
    for (int s = 0; s < BRICK_STRIPS; s++) sum[s][0] = sum[s][1] = sum[s][2] = sum[s][3] = 0;
    for (int i = 0; i < BRICK_STEPS; i++)  // the strips' four sums hide each other's latency
        for (int s = 0; s < BRICK_STRIPS; s++)
            mma_bf16(sum[s], a[s][i], i % 2 ? x[i / 2].z : x[i / 2].x,
                     i % 2 ? x[i / 2].w : x[i / 2].y);
}

// ---- mla_query ----------------------------------------------------------------------------------

enum { QUERY_WARPS = 4, QUERY_TILES = 4, QUERY_TOKENS = QUERY_TILES * TOKENS,
       CACHE_BLOCKS = CACHE_DIM / 64 };

// A brick times eight tokens' q_nope: a lane has a chunk of two of them.
static __device__ void query_product(uint4 *out, const Brick &a, const uint4 (&x)[4], int first,
                                     float factor, int block, int head, int heads, int n) {
    float sum[BRICK_STRIPS][4];
    int lane = threadIdx.x % 32;
    if (first >= n) return;
    brick_product(sum, a, x);
    for (int i = 0; i < 2; i++) {
        size_t token = first + lane % 4 * 2 + i;
        uint32_t v[BRICK_STRIPS];
        for (int s = 0; s < BRICK_STRIPS; s++)
            v[s] = bf16_pair(sum[s][i] * factor, sum[s][i + 2] * factor);
        if (token < n)
            out[((token * CACHE_BLOCKS + block) * heads + head) * 8 +
                swizzle_chunk(head, lane / 4)] = make_uint4(v[0], v[1], v[2], v[3]);
    }
}

// query [n][9 blocks of 64][heads][128 B], swizzled by head: block y of head x is a brick times
// q_nope, block 8 the rotated q_pe. A warp holds its brick in 128 registers and walks over tokens,
// 32 at a time, all loads coalesced and no shared memory. One token of 16 heads is 2.1 MB of
// weights for 144 blocks, latency only; many are bound by the 1,152 bytes written per head. Few
// tokens get blocks of one warp, so that mla_attend's have registers beside them and come early.
static __global__ void __launch_bounds__(QUERY_WARPS * 32)
    query_kernel(bf16 *query, const bf16 *q, const uint4 *bricks, const float *scale,
                 const float *rope, int heads, int n) {
    int head = blockIdx.x, block = blockIdx.y, lane = threadIdx.x % 32;
    int warps = blockDim.x / 32, step = gridDim.z * warps;
    int first = blockIdx.z * warps + threadIdx.x / 32;
    uint4 *out = (uint4 *)query;
    launch_dependents();
    if (block == CACHE_BLOCKS - 1) {
        grid_wait();
        for (int i = first * 32 + lane; i < n * 8; i += step * 32) {  // a thread turns one chunk
            size_t token = i / 8;
            int chunk = i % 8;
            uint4 x = ((const uint4 *)(q + (token * heads + head) * QK_DIM + NOPE_DIM))[chunk];
            out[((token * CACHE_BLOCKS + block) * heads + head) * 8 + swizzle_chunk(head, chunk)] =
                rotate_chunk(x, rope + token * ROPE_DIM + chunk * 8);
        }
        return;
    }
    Brick a;
    uint4 x[QUERY_TILES][4];
    if (first * QUERY_TOKENS < n) brick_load(a, bricks, head, block);
    float factor = scale ? scale[2 * head * LATENT_SCALES + block / 2] : 1;
    grid_wait();
    for (int token = first * QUERY_TOKENS; token < n; token += step * QUERY_TOKENS) {
        rows_load(x, q + head * QK_DIM, (size_t)heads * QK_DIM, token, n);
        for (int j = 0; j < QUERY_TILES; j++)
            query_product(out, a, x[j], token + j * TOKENS, factor, block, head, heads, n);
    }
}

void mla_query(bf16 *query, const bf16 *q, const Linear *kv_b_proj, const float *rope, int heads,
               int n) {
    dim3 grid(heads, CACHE_BLOCKS, min_int(units(n, QUERY_WARPS * QUERY_TOKENS), 16));
    int warps = n > QUERY_TOKENS ? QUERY_WARPS : 1;
    launch(query_kernel, grid, warps * 32, 0, query, q,
           (const uint4 *)kv_b_proj->data, (const float *)kv_b_proj->scale, rope, heads, n);
}

// ---- mla_attend: the plan -----------------------------------------------------------------------
// A tile is what one page load can serve: neighbouring rows of one sequence, as many as there are
// columns for. The tiles' pages, put end to end, are cut into equal chunks, one per SM; so a block
// has the end of a tile, some whole ones and the head of another, whatever the lengths. Who has
// what depends on device memory only, is worked out once per step, and serves all layers.

enum { MAX_COLUMNS = 64, BLOCK_BYTES = PAGE * 128,
       LATENT_BLOCKS = LATENT_DIM / 64, PLAN_THREADS = 1024 };

typedef struct {  // heads are padded to 8 columns; more than 64 are several slices of one row
    int columns, slices;  // of a slice; of a row
    int rows;             // slices that a tile may have
    int fixed;            // what a tile costs beside its pages, in pages: queries, store, combine
} Shape;

typedef struct {
    int start, end;  // its range of the chunks' scale: its pages, then its fixed cost
    int pages, slices;
    int table;       // where its sequence's entries of `pages` begin
} Tile;

typedef struct { int tile, begin, end, chunk; } Work;  // a block's range, and the tile it begins in

static thread_local struct {
    Tile *tile;   // [rows * slices] only those that begin a tile are filled
    Work *work;   // [n_sms]
    float *part;  // [2 n_sms][columns][512] unnormalised sums of tiles that are split, and their
    float2 *ml;   // [2 n_sms][columns] largest scores and sums of weights
} plan;

static void mla_reserve(int rows, int heads) {
    size_t columns = 2 * (size_t)n_sms * MAX_COLUMNS, slices = units(heads, MAX_COLUMNS);
    plan.tile = (Tile *)place_alloc(rows * slices * sizeof(Tile));
    plan.work = (Work *)place_alloc(n_sms * sizeof(Work));
    plan.part = (float *)place_alloc(columns * LATENT_DIM * sizeof(float));
    plan.ml = (float2 *)place_alloc(columns * sizeof(float2));
    step.room = (size_t)rows * heads * LATENT_DIM * sizeof(bf16) / HEAD_TILE;
}

static bool many_columns(int heads, bool prompts) { return prompts || heads > 16; }

static Shape shape_of(int heads, bool prompts) {
    int columns = min_int(units(heads, 8) * 8, MAX_COLUMNS);
    int most = many_columns(heads, prompts) ? 64 : 16;
    return (Shape){columns, units(heads, MAX_COLUMNS), heads > 64 ? 1 : most / columns,
                   many_columns(heads, prompts) ? 3 : 1};
}

// Slices i, i + 1, .. of one sequence as far as the next multiple of s.rows; 0 inside a tile.
static __device__ int tile_slices(int i, int total, Shape s, const int *seq) {
    int n = 1, id = seq[i / s.slices];
    if (i % s.rows && seq[(i - 1) / s.slices] == id) return 0;
    while (i + n < total && (i + n) % s.rows && seq[(i + n) / s.slices] == id) n++;
    return n;
}

// One block: a scan over the tiles' page counts, then each tile tells the blocks that begin in it.
static __global__ void __launch_bounds__(PLAN_THREADS)
    plan_kernel(Tile *tile, Work *work, const int *position, const int *seq, int max_pages, int n,
                Shape s, int blocks) {
    __shared__ int of_warps[32];
    int total = n * s.slices, each = units(total, PLAN_THREADS), pages = 0, lane = threadIdx.x % 32;
    int from = min_int(threadIdx.x * each, total), to = min_int(from + each, total);
    grid_wait();
    launch_dependents();
    for (int i = from; i < to; i++) {
        int slices = tile_slices(i, total, s, seq), most = 0;
        for (int j = 0; j < slices; j++) most = max(most, position[(i + j) / s.slices]);
        tile[i] = (Tile){0, 0, most / PAGE + 1, slices, seq[i / s.slices] * max_pages};
        if (slices) pages += tile[i].pages + s.fixed;
    }
    int before = pages;  // becomes the sum up to and with this thread
    for (int d = 1; d < 32; d *= 2) {
        int left = __shfl_up_sync(~0u, before, d);
        before += lane >= d ? left : 0;
    }
    if (lane == 31) of_warps[threadIdx.x / 32] = before;
    __syncthreads();
    int all = 0;
    for (int i = 0; i < 32; i++) {
        before += i < threadIdx.x / 32 ? of_warps[i] : 0;
        all += of_warps[i];
    }
    int start = before - pages, chunk = units(all, blocks);
    for (int i = from; i < to; i++) {
        if (tile[i].slices == 0) continue;
        tile[i].start = start;
        tile[i].end = start += tile[i].pages + s.fixed;
        for (int b = units(tile[i].start, chunk); b * chunk < start; b++)
            work[b] = (Work){i, b * chunk, min_int((b + 1) * chunk, all), chunk};
    }
    for (int b = units(all, chunk) + threadIdx.x; b < blocks; b += PLAN_THREADS)
        work[b] = (Work){0, 0, 0, chunk};
}

// Once per step. mla_attend reads the plan and the page table without waiting for its predecessors;
// embed lets what follows begin behind its own wait only, when the plan is complete.
static void mla_plan(const Batch *b, int heads) {
    launch(plan_kernel, 1, PLAN_THREADS, 0, plan.tile, plan.work, b->position, b->seq, b->max_pages,
           b->n, shape_of(heads, step.prompts), n_sms);
}

// ---- mla_attend ---------------------------------------------------------------------------------

typedef struct {  // what its two kernels get
    bf16 *u;
    const bf16 *query, *cache;
    const int *pages, *position;
    const Tile *tile;
    const Work *work;
    float *part;
    float2 *ml;
    float scale;      // for scores in base 2
    Shape shape;
    int heads;
} Attend;

enum { STAGES = 2 };

template <int N, int W> struct AttendShared {  // N columns of each of W warpgroups
    uint8_t page[STAGES][PAGE_BYTES];          // [9 blocks of 64 dims][64 tokens][128 B]
    uint8_t q[CACHE_BLOCKS][W][N][128];        // the columns' queries
    uint8_t p[W][N][128];                      // the columns' weights of a page's 64 tokens
    float largest[W][4][N], total[W][4][N];    // what a group's four warps tell each other
    uint64_t full[STAGES], empty[STAGES], q_full, q_empty;
};

// A block's walk: pages first .. last - 1 of tile `index`, one tile after the other.
typedef struct { int at, index, first, last; Tile tile; } Walk;

static __device__ bool walk_next(Walk *w, const Attend &a, const Work &work) {
    do {
        if (w->at >= work.end) return false;
        w->index += w->tile.slices;
        w->tile = a.tile[w->index];
        w->at = w->tile.end;
        w->first = max(work.begin - w->tile.start, 0);
        w->last = min_int(w->tile.pages, work.end - w->tile.start);
    } while (w->first >= w->last);  // nothing but the tile's fixed cost falls into the range
    return true;
}

// Which of a block's two parts of split tiles: the tile that it begins with, the one that it ends
// with. All others are whole.
static __device__ size_t part_slot(const Tile &tile, int block, int begin, int columns) {
    return (size_t)(2 * block + (tile.start > begin)) * columns;
}

// The producer warp: pages, and at a tile's first page its queries, as soon as there is room; the
// first tile's when the ring is full, since they wait. Where rows decode, this layer has written to
// the last page of a tile only: others don't wait for it.
template <int N, int W>
static __device__ void attend_load(AttendShared<N, W> *s, const Attend &a, const Work &work) {
    int lane = threadIdx.x % 32, k = 0, n_tiles = 0, held = min_int(a.heads, MAX_COLUMNS);
    bool waited = W > 1;
    if (waited) grid_wait();
    for (Walk w = {work.begin, work.tile}; walk_next(&w, a, work); n_tiles++)
        for (int i = w.first; i < w.last; i++, k++) {
            size_t page = a.pages[w.tile.table + i];
            uint64_t *full = &s->full[k % STAGES];
            if (!waited && i == w.tile.pages - 1) grid_wait(), waited = true;
            bar_wait(&s->empty[k % STAGES], k / STAGES % 2 ^ 1);
            if (lane == 0) {
                bar_expect(full, PAGE_BYTES);
                bulk_load(s->page[k % STAGES], a.cache + page * PAGE * CACHE_DIM, PAGE_BYTES, full);
            }
            if (i != (n_tiles ? w.first : min_int(w.first + STAGES, w.last) - 1)) continue;
            if (!waited) grid_wait(), waited = true;
            bar_wait(&s->q_empty, n_tiles % 2 ^ 1);
            if (lane == 0) bar_expect(&s->q_full, CACHE_BLOCKS * w.tile.slices * held * 128);
            __syncwarp();
            for (int j = lane; j < CACHE_BLOCKS * w.tile.slices; j += 32) {
                int block = j % CACHE_BLOCKS, slice = j / CACHE_BLOCKS, x = w.index + slice;
                size_t row = (size_t)(x / a.shape.slices) * CACHE_BLOCKS + block;
                bulk_load(s->q[block][0][slice * a.shape.columns],
                          a.query + (row * a.heads + x % a.shape.slices * MAX_COLUMNS) * 64,
                          held * 128, &s->q_full);
            }
        }
}

// What a thread of a warpgroup holds of its N columns: of each eight columns j two, 8 j + 2 t and
// the next (t = lane % 4), and in them two of its warp's 16 rows of every 64, g and g + 8.
template <int N> struct Columns {
    float o[LATENT_BLOCKS][N / 2];    // sums; element 4 j + 2 (row g + 8) + (next column)
    float best[N / 4], total[N / 4];  // [2 j + (next column)] base 2; total: of own tokens only
    int limit[N / 8];                 // [j] tokens that the columns' row sees
};

// Scores become weights: masks them, finds the columns' new largest over all four warps, leaves the
// weights as wgmma's operand in s->p, and shrinks what was summed relative to an older largest.
template <int N, int W>
static __device__ void softmax(Columns<N> &c, float (&score)[N / 2], AttendShared<N, W> *s,
                               int first, float scale) {
    int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    float base[N / 4], shrink[N / 4];
    uint32_t weight[N / 4];  // pairs of columns: [2 j + (row g + 8)]
    for (int i = 0; i < N / 2; i++) {
        bool seen = first + warp * 16 + lane / 4 + i / 2 % 2 * 8 < c.limit[i / 4];
        score[i] = seen ? score[i] * scale : -INFINITY;
    }
    for (int i = 0; i < N / 4; i++) {  // a column's largest of this warp's 16 tokens
        float most = fmaxf(score[i / 2 * 4 + i % 2], score[i / 2 * 4 + i % 2 + 2]);
        for (int d = 4; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
        if (lane < 4) s->largest[group][warp][i / 2 * 8 + lane * 2 + i % 2] = most;
    }
    sync_threads(group + 1, 128);
    for (int i = 0; i < N / 4; i++) {
        float most = c.best[i];
        for (int w = 0; w < 4; w++)
            most = fmaxf(most, s->largest[group][w][i / 2 * 8 + lane % 4 * 2 + i % 2]);
        base[i] = most == -INFINITY ? 0 : most;  // nothing seen yet: all weights are 0
        shrink[i] = exp2_fast(c.best[i] - base[i]);
        c.best[i] = most, c.total[i] *= shrink[i];
    }
    for (int i = 0; i < N / 2; i += 2) {
        int j = i / 4 * 2;
        float v[2] = {exp2_fast(score[i] - base[j]), exp2_fast(score[i + 1] - base[j + 1])};
        weight[i / 2] = bf16_pair(v[0], v[1]);
        c.total[j] += v[0], c.total[j + 1] += v[1];
    }
    // Four 8x8 tiles at once: lane / 8 is (column group, token group), lane % 8 the column.
    for (int i = 0; i < N / 4; i += 4)
        store_transposed(smem_address(&s->p[group][i * 4 + lane / 16 * 8 + lane % 8]
                                          [swizzle_chunk(lane, warp * 2 + lane / 8 % 2) * 16]),
                         weight[i], weight[i + 1], weight[i + 2], weight[i + 3]);
    fence_async();
    sync_threads(group + 1, 128);
    for (int b = 0; b < LATENT_BLOCKS; b++)
        for (int i = 0; i < N / 2; i++) c.o[b][i] *= shrink[i / 4 * 2 + i % 2];
}

// One page into the sums: S^T = page . Q^T, softmax down the columns, O^T += page^T . P.
template <int N, int W>
static __device__ void attend_page(Columns<N> &c, AttendShared<N, W> *s, uint8_t *page, int first,
                                   int valid, float scale, bool q_last) {
    int group = threadIdx.x / 128;
    float score[N / 2];
    uint64_t keys = warp_desc(page), q = warp_desc(s->q[0][group]), p = warp_desc(s->p[group]);
    wgmma_fence();
    for (int i = 0; i < CACHE_DIM / 16; i++)  // 16 dims are 32 bytes of a row
        wgmma<0>(score, keys + (i / 4 * BLOCK_BYTES + i % 4 * 32) / 16,
                 q + (i / 4 * (W * N * 128) + i % 4 * 32) / 16, i > 0);
    wgmma_commit();
    wgmma_wait<0>();
    if (q_last) warp_arrive(&s->q_empty);
    // Rows past the sequence's end may hold anything, and 0 x NaN is NaN: the values must be zero.
    // (The keys need not: their scores are replaced. Both groups write the same.)
    for (int i = valid * 8 + threadIdx.x % 128; i < PAGE * 8; i += 128)
        for (int b = 0; b < LATENT_BLOCKS; b++)
            ((uint4 *)(page + b * BLOCK_BYTES))[i] = make_uint4(0, 0, 0, 0);
    softmax(c, score, s, first, scale);
    wgmma_fence();
    for (int i = 0; i < 4; i++)  // 16 tokens are 2,048 bytes of a block
        for (int b = 0; b < LATENT_BLOCKS; b++)
            wgmma<1>(c.o[b], keys + (b * BLOCK_BYTES + i * 2048) / 16, p + i * 2, 1);
    wgmma_commit();
    wgmma_wait<0>();
}

// Columns of a range that is only a part of its tile: unnormalised, for the combine.
template <int N>
static __device__ void store_part(const Columns<N> &c, int j, float *part, float2 *ml) {
    int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    for (int e = 0; e < 2; e++) {
        int column = 8 * j + lane % 4 * 2 + e;
        float *to = part + (size_t)column * LATENT_DIM + warp * 16 + lane / 4;
        for (int b = 0; b < LATENT_BLOCKS; b++) {
            to[b * 64] = c.o[b][4 * j + e];
            to[b * 64 + 8] = c.o[b][4 * j + e + 2];
        }
        if (warp == 0 && lane < 4) ml[column] = make_float2(c.best[2 * j + e], c.total[2 * j + e]);
    }
}

// Columns of a whole tile. Transposed, a lane has two neighbouring dims of one column.
template <int N>
static __device__ void store_whole(const Columns<N> &c, int j, bf16 *u, bool there) {
    int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    float inverse[2] = {1 / c.total[2 * j], 1 / c.total[2 * j + 1]};
    for (int i = 0; i < 2 * LATENT_BLOCKS; i++) {
        const float *o = &c.o[i / 2][4 * j + i % 2 * 2];
        uint32_t pair = transpose_8x8(bf16_pair(o[0] * inverse[0], o[1] * inverse[1]));
        if (there) ((uint32_t *)u)[i / 2 * 32 + warp * 8 + i % 2 * 4 + lane % 4] = pair;
    }
}

template <int N, int W>
static __device__ void attend_store(Columns<N> &c, AttendShared<N, W> *s, const Attend &a,
                                    const Walk &w, const Work &work) {
    int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    for (int i = 0; i < N / 4; i++) {
        for (int d = 4; d < 32; d *= 2) c.total[i] += __shfl_xor_sync(~0u, c.total[i], d);
        if (lane < 4) s->total[group][warp][i / 2 * 8 + lane * 2 + i % 2] = c.total[i];
    }
    sync_threads(group + 1, 128);
    for (int i = 0; i < N / 4; i++) {
        const float *total = &s->total[group][0][i / 2 * 8 + lane % 4 * 2 + i % 2];
        c.total[i] = total[0] + total[N] + total[2 * N] + total[3 * N];
    }
    size_t slot = part_slot(w.tile, blockIdx.x, work.begin, W * N) + group * N;
    for (int j = 0; j < N / 8; j++) {
        int column = group * N + 8 * j, x = w.index + column / a.shape.columns;
        int head = x % a.shape.slices * MAX_COLUMNS + column % a.shape.columns + lane / 4;
        size_t at = (size_t)(x / a.shape.slices) * a.heads + head;
        if (column >= w.tile.slices * a.shape.columns) return;
        if (w.last - w.first == w.tile.pages)
            store_whole(c, j, a.u + at * LATENT_DIM, head < a.heads);
        else store_part(c, j, a.part + slot * LATENT_DIM, a.ml + slot);
    }
}

// A warpgroup's share of the work: its columns of each tile, over the block's range of pages.
template <int N, int W>
static __device__ void attend_compute(AttendShared<N, W> *s, const Attend &a, const Work &work) {
    int group = threadIdx.x / 128, k = 0, n_tiles = 0;
    for (Walk w = {work.begin, work.tile}; walk_next(&w, a, work); n_tiles++) {
        bool busy = group * N < w.tile.slices * a.shape.columns;
        int longest = 0;
        Columns<N> c = {};
        for (int i = 0; i < w.tile.slices; i++)
            longest = max(longest, a.position[(w.index + i) / a.shape.slices] + 1);
        for (int j = 0; j < N / 8; j++) {
            int slice = (group * N + 8 * j) / a.shape.columns;
            c.limit[j] = slice < w.tile.slices
                             ? a.position[(w.index + slice) / a.shape.slices] + 1 : 0;
            c.best[2 * j] = c.best[2 * j + 1] = -INFINITY;
        }
        bar_wait(&s->q_full, n_tiles % 2);
        for (int i = w.first; i < w.last; i++, k++) {
            bar_wait(&s->full[k % STAGES], k / STAGES % 2);
            if (busy)
                attend_page<N, W>(c, s, s->page[k % STAGES], i * PAGE,
                                  min_int(longest - i * PAGE, PAGE), a.scale, i == w.last - 1);
            else if (i == w.last - 1) warp_arrive(&s->q_empty);
            warp_arrive(&s->empty[k % STAGES]);
        }
        if (busy) attend_store(c, s, a, w, work);
    }
}

// Two warpgroups need registers of the producer's, which only a whole group can give.
static constexpr int attend_threads(int groups) { return groups * 128 + (groups > 1 ? 128 : 32); }

// u [n][heads][512] of query [n][9][heads][128 B] and cache [pages][9][64][128 B]. One block an SM:
// a producer warp keeps up to two pages of 72 KB in flight, each warpgroup takes them in turn for
// its N columns, with all 512 x N sums in registers. N = 16, W = 1 for decoding with up to 16
// heads: 68 wgmmas of 20 clocks a page, which takes 3,500 (H200) to 6,000 (H100) clocks to arrive.
// N = 32, W = 2 for prompts and many heads: a page serves 64 columns (4 rows of 16 heads), 136
// wgmmas of 24 clocks, bound by shared memory at 2/3 of the tensor cores' rate; the groups' softmax
// and products overlap as they drift apart. The products are the absorbed 1,088 per pair and head.
template <int N, int W>
static __global__ void __launch_bounds__(attend_threads(W), 1) attend_kernel(Attend a) {
    extern __shared__ __align__(1024) uint8_t shared[];  // swizzled tiles need multiples of 1,024
    AttendShared<N, W> *s = (AttendShared<N, W> *)shared;
    launch_dependents();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++)
            bar_init(&s->full[i], 1), bar_init(&s->empty[i], ARRIVING * W * 4);
        bar_init(&s->q_full, 1), bar_init(&s->q_empty, ARRIVING * W * 4);
        bar_init_done();
    }
    __syncthreads();
    Work work = a.work[blockIdx.x];
    if (threadIdx.x >= W * 128) {
        if (W > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x < W * 128 + 32) attend_load(s, a, work);
    } else {
        if (W > 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        attend_compute(s, a, work);
    }
}

// ---- mla_attend: the combine --------------------------------------------------------------------

enum { COMBINE_WARPS = 8, PARTS = 8 };  // warps of a block; parts in flight of a warp

// Adds parts to a sum; all are relative to 2^(their largest score), -infinity where empty.
static __device__ void merge(float4 &sum, float &total, float &best, const float4 (&o)[PARTS],
                             const float2 (&ml)[PARTS]) {
    float most = best;
    for (int i = 0; i < PARTS; i++) most = fmaxf(most, ml[i].x);
    float base = most == -INFINITY ? 0 : most, a = exp2_fast(best - base);
    sum.x *= a, sum.y *= a, sum.z *= a, sum.w *= a, total *= a, best = most;
    for (int i = 0; i < PARTS; i++) {
        float b = exp2_fast(ml[i].x - base);
        sum.x += o[i].x * b, sum.y += o[i].y * b, sum.z += o[i].z * b, sum.w += o[i].w * b;
        total += ml[i].y * b;
    }
}

// Sums the parts of split tiles. 128 dims of a column are an item; `share` warps divide its parts
// among them and meet in shared memory, so that a single row's many parts are read by 64 blocks,
// and many rows' few by one warp each. With few tiles block x looks at tile x; with many at the
// tile that reaches from SM x - 1 into SM x, which is where splits are. Bound by latency.
static __global__ void __launch_bounds__(COMBINE_WARPS * 32, 3)
    combine_kernel(Attend a, int columns, bool by_tile, int share) {
    __shared__ float4 sums[COMBINE_WARPS][32];
    __shared__ float2 mls[COMBINE_WARPS];
    int b = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, me = warp % share;
    int item = blockIdx.y * (COMBINE_WARPS / share) + warp / share, column = item / 4;
    int v = by_tile ? b : a.work[b].tile, chunk = a.work[0].chunk;
    Tile tile = a.tile[v];
    int from = tile.start / chunk, to = (tile.start + tile.pages - 1) / chunk;
    launch_dependents();
    grid_wait();
    if (tile.slices == 0 || from == to || (!by_tile && from != b - 1)) return;
    const float2 nothing = {-INFINITY, 0};
    float best = -INFINITY, total = 0;
    float4 sum = {}, o[PARTS];
    float2 ml[PARTS];
    for (int i = from + me; i <= to; i += share * PARTS) {
        for (int j = 0, p = i; j < PARTS; j++, p += share) {
            size_t at = part_slot(tile, p, p * chunk, columns) + column;
            const float4 *part = (const float4 *)(a.part + at * LATENT_DIM) + item % 4 * 32 + lane;
            o[j] = p <= to ? *part : float4{}, ml[j] = p <= to ? a.ml[at] : nothing;
        }
        merge(sum, total, best, o, ml);
    }
    sums[warp][lane] = sum;
    if (lane == 0) mls[warp] = make_float2(best, total);
    __syncthreads();
    int slice = column / a.shape.columns, x = v + slice;
    int head = x % a.shape.slices * MAX_COLUMNS + column % a.shape.columns;
    if (me > 0 || slice >= tile.slices || head >= a.heads) return;
    for (int j = 0; share > 1 && j < PARTS; j++) {  // the first warp adds the others' sums
        bool there = j + 1 < share;
        o[j] = there ? sums[warp + j + 1][lane] : float4{};
        ml[j] = there ? mls[warp + j + 1] : nothing;
    }
    if (share > 1) merge(sum, total, best, o, ml);
    bf16 *u = a.u + ((size_t)(x / a.shape.slices) * a.heads + head) * LATENT_DIM;
    float by = inverse(total);
    ((uint2 *)u)[item % 4 * 32 + lane] =
        make_uint2(bf16_pair(quotient(sum.x, total, by), quotient(sum.y, total, by)),
                   bf16_pair(quotient(sum.z, total, by), quotient(sum.w, total, by)));
}

template <int N, int W> static void attend(Attend a, int tiles) {
    int share = tiles > 8 ? 1 : tiles > 4 ? 2 : tiles > 1 ? 4 : 8;  // for n_sms / tiles parts
    launch(attend_kernel<N, W>, n_sms, attend_threads(W), sizeof(AttendShared<N, W>), a);
    launch(combine_kernel, dim3(min_int(tiles, n_sms), W * N * 4 * share / COMBINE_WARPS),
           COMBINE_WARPS * 32, 0, a, W * N, tiles <= n_sms, share);
}

void mla_attend(bf16 *u, const bf16 *query, const bf16 *cache, float scale, int heads,
                const Batch *b) {
    Shape shape = shape_of(heads, step.prompts);
    Attend a = {u, query, cache, b->pages, b->position, plan.tile, plan.work, plan.part, plan.ml,
                scale * (float)M_LOG2E, shape, heads};
    if (many_columns(heads, step.prompts)) attend<32, 2>(a, b->n * shape.slices);
    else attend<16, 1>(a, b->n * shape.slices);
}

// ---- mla_value ----------------------------------------------------------------------------------

enum { VALUE_WARPS = 8, VALUE_TILES = 2, VALUE_TOKENS = VALUE_TILES * TOKENS,
       VALUE_BLOCKS = LATENT_DIM / BLOCK };

typedef float4 ValueRow[V_DIM / 4 + 1];  // + 1: neighbours in other banks

// Adds the four quarters of one token's 128 values, 4 a lane, and quantises them.
static __device__ void value_store(const Act &o, const ValueRow (&part)[VALUE_BLOCKS][VALUE_TOKENS],
                                   int i, size_t token, int head) {
    int lane = threadIdx.x % 32;
    float4 v = part[0][i][lane];
    for (int k = 1; k < VALUE_BLOCKS; k++) {
        float4 p = part[k][i][lane];
        v.x += p.x, v.y += p.y, v.z += p.z, v.w += p.w;
    }
    uint2 x = make_uint2(bf16_pair(v.x, v.y), bf16_pair(v.z, v.w));
    v = make_float4(bf16_low(x.x), bf16_high(x.x), bf16_low(x.y), bf16_high(x.y));
    float amax = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
    float size = e4m3_scale(fmaxf(warp_max(amax), MIN_AMAX)), by = inverse(size);
    v = make_float4(quotient(v.x, size, by), quotient(v.y, size, by), quotient(v.z, size, by),
                    quotient(v.w, size, by));
    size_t at = (size_t)head * o.stride + token;
    ((uint2 *)(o.x + token * o.cols + head * V_DIM))[lane] = x;
    ((uint32_t *)o.q)[at * 32 + swizzle_chunk(token, lane / 4) * 4 + lane % 4] =
        e4m3_pair(v.x, v.y) | e4m3_pair(v.z, v.w) << 16;
    if (lane == 0) o.scale[at] = size;
}

// o [n][heads * 128] = W_UV u per head, rounded, and quantised: a head is one scale group. A block
// holds all of one head's W_UV, a brick per warp (two halves of the values, four quarters of the
// latent), and walks over tokens, 16 at a time; the quarters' scaled sums meet in shared memory,
// and a warp finishes two tokens while the next 16 are on their way. u is read and o written once;
// few tokens are bound by the 128 KB that a block reads.
static __global__ void __launch_bounds__(VALUE_WARPS * 32)
    value_kernel(Act o, const bf16 *u, const uint4 *bricks, const float *scale, int heads, int n) {
    __shared__ ValueRow part[VALUE_BLOCKS][VALUE_TOKENS];
    int head = blockIdx.x, step = gridDim.y * VALUE_TOKENS, warp = threadIdx.x / 32;
    int lane = threadIdx.x % 32, half = warp % 2, quarter = warp / 2;
    Brick a;
    uint4 x[VALUE_TILES][4];
    float sum[BRICK_STRIPS][4];
    const bf16 *mine = u + head * LATENT_DIM + quarter * BLOCK;
    size_t stride = (size_t)heads * LATENT_DIM;
    int first = blockIdx.y * VALUE_TOKENS;
    launch_dependents();
    if (first < n) brick_load(a, bricks, head, UK_BRICKS + warp);
    float factor = scale ? scale[(2 * head + 1) * LATENT_SCALES + quarter] : 1;
    grid_wait();
    rows_load(x, mine, stride, first, n);
    for (; first < n; first += step) {
        for (int j = 0; j < VALUE_TILES && first + j * TOKENS < n; j++) {
            brick_product(sum, a, x[j]);
            for (int i = 0; i < 4; i++) {  // two tokens' 8 values each
                const float *v = &sum[i % 2 * 2][i / 2], *w = &sum[i % 2 * 2 + 1][i / 2];
                part[quarter][j * TOKENS + lane % 4 * 2 + i / 2][half * 16 + lane / 4 * 2 + i % 2] =
                    make_float4(v[0] * factor, v[2] * factor, w[0] * factor, w[2] * factor);
            }
        }
        rows_load(x, mine, stride, first + step, n);
        __syncthreads();
        for (int i = warp; i < VALUE_TOKENS && first + i < n; i += VALUE_WARPS)
            value_store(o, part, i, first + i, head);
        __syncthreads();
    }
}

static void value(const Act *o, const bf16 *u, const Linear *kv_b_proj, int heads, int n) {
    dim3 grid(heads, min_int(units(n, VALUE_TOKENS), n_sms > heads ? n_sms / heads : 1));
    launch(value_kernel, grid, VALUE_WARPS * 32, 0, *o, u, (const uint4 *)kv_b_proj->data,
           (const float *)kv_b_proj->scale, heads, n);
}

void mla_value(Act *o, const bf16 *u, const Linear *kv_b_proj, int heads, int n) {
    act_rows(o, n);
    value(o, u, kv_b_proj, heads, n);
}

// ---- mla_attention: keys and values -------------------------------------------------------------
// For a prompt's many rows it pays to undo the absorbing: each head's keys (128 + the 64 that turn
// and are cached) and values (128) of all tokens that they see are made from the latents, once a
// layer, and a row and token then are 320 products a head and not 1,088. u is the room for that,
// until the step's other rows, which come after, want it: it holds two tokens' for each row that a
// step may have. Where prompts see more, they take some heads at a time. So nothing is reserved.
//
// In u lie tiles [heads][key tiles][4 squares of 64 dims: key, key, value, value][128 tokens][128
// bytes], swizzled by the token, each square a bulk copy and wgmma's operand.

enum {
    SQUARE = KEYS * ROW_BYTES, EXPAND_STAGES = 6, EXPAND_THREADS = 2 * 128 + WARP,
    HALF = BLOCK * LATENT_DIM * (int)sizeof(bf16),  // bytes of a head's W_UK or W_UV
};

typedef struct {
    Act o;
    uint8_t *room;
    const bf16 *q, *cache;
    const uint4 *bricks;
    const float *w_scale, *rope;
    const int *pages;
    const QueryTile *queries;
    const KeyTile *keys;
    int n_queries, n_keys;
    int heads, first, n_heads;  // of all heads those that are done at this time
    float scale;                // for scores in base 2
} Prompts;

static __device__ uint8_t *head_tile(const Prompts &p, int head, int tile) {
    return p.room + ((size_t)(head - p.first) * p.n_keys + tile) * HEAD_TILE;
}

struct ExpandShared {
    uint8_t w[HALF];                               // W_UK^T [2][512][128 B] or W_UV [8][128][128 B]
    uint8_t x[EXPAND_STAGES][2][PAGE][ROW_BYTES];  // 128 dims of a page's latents
    uint64_t full[EXPAND_STAGES], empty[EXPAND_STAGES];
};

// Bricks are for mma.sync: each of 8 warps turns one of a head's half into rows for wgmma. A lane
// has two chunks of neighbouring rows in every two fragments.
static __device__ void expand_weights(ExpandShared *s, const uint4 *bricks, bool keys) {
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint4 *brick = bricks + (warp + (keys ? 0 : UK_BRICKS)) * FRAGMENTS * 32 + g * 4 + t;
#pragma unroll 4
    for (int i = 0; i < FRAGMENTS; i += 2) {
        uint4 a = __ldg(brick + i * 32), b = __ldg(brick + (i + 1) * 32);
        int chunk = i % BRICK_STEPS * 2 + t, row = g * 8 + i / BRICK_STEPS * 2;
        int square = keys ? chunk / 8 * LATENT_DIM + warp * 64
                          : (warp / 2 * 2 + chunk / 8) * V_DIM + warp % 2 * 64;
        uint8_t *to = s->w + (square + row) * ROW_BYTES;
        *(uint4 *)(to + swizzle_chunk(row, chunk % 8) * 16) = make_uint4(a.x, a.z, b.x, b.z);
        *(uint4 *)(to + ROW_BYTES + swizzle_chunk(row + 1, chunk % 8) * 16) =
            make_uint4(a.y, a.w, b.y, b.w);
    }
}

// A tile's two pages take turns, a quarter of their latents at a time. Where there is only one it
// comes twice.
static __device__ void expand_load(ExpandShared *s, const Prompts &p) {
    enum { QUARTER = 2 * BLOCK_BYTES };
    int slot = 0, parity = 1;
    for (int i = blockIdx.y; i < p.n_keys; i += gridDim.y)
        for (int k = 0; k < 2 * LATENT_SCALES; k++) {
            int second = k % 2 && p.keys[i].tokens > PAGE;
            size_t page = p.pages[p.keys[i].table + second];
            bar_wait(&s->empty[slot], parity);
            bar_expect(&s->full[slot], QUARTER);
            bulk_load(s->x[slot], (uint8_t *)p.cache + page * PAGE_BYTES + k / 2 * QUARTER, QUARTER,
                      &s->full[slot]);
            if (++slot == EXPAND_STAGES) slot = 0, parity ^= 1;
        }
}

// A thread's parts of two tokens' 128 dims, in whole chunks. Of tokens past the last the values
// must be zeros: they weigh nothing, but 0 x NaN is NaN.
static __device__ void expand_store(uint8_t *to, const float sum[64], int tokens) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, first = threadIdx.x / 32 % 4 * 16 + g;
    for (int i = 0; i < 8; i++) {
        int token = first + i % 2 * 8, chunk = i / 2 * 4 + t;
        uint32_t w[4];
        for (int j = 0; j < 4; j++) {
            const float *c = sum + (i / 2 * 4 + j) * 4 + i % 2 * 2;
            w[j] = token < tokens ? bf16_pair(c[0], c[1]) : 0;
        }
        transpose_quad(w);
        *(uint4 *)(to + chunk / 8 * SQUARE + token * ROW_BYTES + swizzle_chunk(g, chunk % 8) * 16) =
            make_uint4(w[0], w[1], w[2], w[3]);
    }
}

// A warpgroup's page of each tile, all 128 dims. The scales are those of 128 x 128 weights: a
// quarter's sums are scaled in f32, while the other warpgroup multiplies.
template <int KEY>
static __device__ void expand_compute(ExpandShared *s, const Prompts &p, int head) {
    int group = threadIdx.x / 128, n = group;
    uint64_t w = smem_desc(s->w) + (KEY ? (LATENT_DIM * ROW_BYTES / 16 - 1ull) << 16 : 0);
    float factor[LATENT_SCALES];
    for (int i = 0; i < LATENT_SCALES; i++)
        factor[i] = p.w_scale ? p.w_scale[(2 * head + !KEY) * LATENT_SCALES + i] : 1;
    for (int i = blockIdx.y; i < p.n_keys; i += gridDim.y) {
        float sum[64] = {};
#pragma unroll
        for (int quarter = 0; quarter < LATENT_SCALES; quarter++, n += 2) {
            float c[64];
            int slot = n % EXPAND_STAGES;
            bar_wait(&s->full[slot], n / EXPAND_STAGES % 2);
            uint64_t x = warp_desc(s->x[slot]);
            wgmma_fence();
            for (int k = 0; k < 8; k++) {  // 16 latents each
                int at = KEY ? (quarter * 8 + k) * 16 * ROW_BYTES
                             : (quarter * 2 + k / 4) * SQUARE + k % 4 * 32;
                wgmma_128<false, KEY>(c, x + (k / 4 * BLOCK_BYTES + k % 4 * 32) / 16, w + at / 16,
                                      k > 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            warp_arrive(&s->empty[slot]);
            for (int j = 0; j < 64; j++) sum[j] += c[j] * factor[quarter];
        }
        expand_store(head_tile(p, head, i) + (KEY ? 0 : 2 * SQUARE) + group * PAGE * ROW_BYTES, sum,
                     KEY ? PAGE : p.keys[i].tokens - group * PAGE);
    }
}

// Keys and values of the tiles: a block holds a head's W_UK or W_UV, 128 KB, and walks over tiles.
// 262,144 operations for a token and head: bound by the tensor cores and by L2, of which a block
// then reads 32 bytes a clock.
static __global__ void __launch_bounds__(EXPAND_THREADS, 1)
    expand_kernel(const __grid_constant__ Prompts p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    ExpandShared *s = (ExpandShared *)shared;
    int head = p.first + blockIdx.x / 2;
    bool keys = blockIdx.x % 2 == 0, loads = threadIdx.x >= 2 * 128;
    launch_dependents();
    if (threadIdx.x == 0) {
        for (int i = 0; i < EXPAND_STAGES; i++)
            bar_init(&s->full[i], 1), bar_init(&s->empty[i], ARRIVING * 4);
        bar_init_done();
    }
    if (!loads) expand_weights(s, p.bricks + (size_t)head * BRICKS * FRAGMENTS * 32, keys);
    fence_async();
    __syncthreads();
    grid_wait();
    if (loads) {
        if (threadIdx.x % 32 == 0) expand_load(s, p);
    } else if (keys) {
        expand_compute<1>(s, p, head);
    } else {
        expand_compute<0>(s, p, head);
    }
}

// ---- mla_attention: prompts ---------------------------------------------------------------------

struct PromptShared {
    uint8_t k[2][QK_DIM / 64][KEYS][ROW_BYTES], v[2][V_DIM / 64][KEYS][ROW_BYTES];
    uint8_t q[QK_DIM / 64][QUERIES][ROW_BYTES];
    uint64_t k_full[2], k_empty[2], v_full[2], v_empty[2], q_full, q_empty;
};

typedef struct { int turn, head, keys; QueryTile tile; } Task;  // keys: tiles that are seen

// A block's next tile and head. They come longest first, and the blocks take them in turns, every
// other time from behind, so that all have about the same to do.
static __device__ bool task_next(Task *t, const Prompts &p) {
    int turn = t->turn++, block = turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    int i = turn * gridDim.x + block;
    if (i >= p.n_queries * p.n_heads) return false;
    t->tile = p.queries[i / p.n_heads], t->head = p.first + i % p.n_heads;
    t->keys = units(t->tile.position + t->tile.rows, KEYS);
    return true;
}

// One thread keeps two tiles of keys and two of values on their way.
static __device__ void keys_load(PromptShared *s, const Prompts &p) {
    enum { NOPE_BYTES = 2 * SQUARE };
    int k = 0;
    for (Task t = {}; task_next(&t, p);)
        for (int j = 0; j < t.keys; j++, k++) {
            KeyTile tile = p.keys[t.tile.keys + j];
            const uint8_t *from = head_tile(p, t.head, t.tile.keys + j);
            int pages = units(tile.tokens, PAGE), slot = k % 2, parity = k / 2 % 2 ^ 1;
            bar_wait(&s->k_empty[slot], parity);
            bar_expect(&s->k_full[slot], NOPE_BYTES + pages * BLOCK_BYTES);
            bulk_load(s->k[slot], from, NOPE_BYTES, &s->k_full[slot]);
            for (int i = 0; i < pages; i++)
                bulk_load(s->k[slot][NOPE_DIM / 64][i * PAGE],
                          (uint8_t *)p.cache + (size_t)p.pages[tile.table + i] * PAGE_BYTES +
                              LATENT_BLOCKS * BLOCK_BYTES, BLOCK_BYTES, &s->k_full[slot]);
            bar_wait(&s->v_empty[slot], parity);
            bar_expect(&s->v_full[slot], NOPE_BYTES);
            bulk_load(s->v[slot], from + NOPE_BYTES, NOPE_BYTES, &s->v_full[slot]);
        }
}

// Three warps bring the next tile's queries as soon as the last one's are used, and turn their
// last 64 dims. Rows past the last keep what was there: they meet no others.
static __device__ void queries_load(PromptShared *s, const Prompts &p) {
    enum { THREADS = 3 * WARP };
    int thread = threadIdx.x % 128 - WARP, n = 0;
    for (Task t = {}; task_next(&t, p); n++) {
        bar_wait(&s->q_empty, n % 2 ^ 1);
        const bf16 *q = p.q + ((size_t)t.tile.row * p.heads + t.head) * QK_DIM;
        for (int i = thread; i < t.tile.rows * 16; i += THREADS) {
            int row = i / 16, c = i % 16;
            copy_16(&s->q[c / 8][row][swizzle_chunk(row, c % 8) * 16],
                    q + (size_t)row * p.heads * QK_DIM + c * CHUNK);
        }
        copies_commit();
#pragma unroll 2
        for (int i = thread; i < t.tile.rows * 8; i += THREADS) {
            int row = i / 8, c = i % 8;
            const uint4 *from = (uint4 *)(q + (size_t)row * p.heads * QK_DIM + NOPE_DIM);
            *(uint4 *)&s->q[NOPE_DIM / 64][row][swizzle_chunk(row, c) * 16] =
                rotate_chunk(from[c], p.rope + (t.tile.row + row) * ROPE_DIM + c * CHUNK);
        }
        copies_wait();
        fence_async();
        warp_arrive(&s->q_full);
    }
}

// Of a thread's two rows, g and g + 8 of its warp's 16: the largest score so far, its own part of
// the sum of weights, and what older sums are to be shrunk by.
typedef struct { float best[2], total[2], shrink[2]; } Rows;

// A tile's scores become weights. score[4 j] is that of token 8 j + 2 t; row g sees `seen` of them.
static __device__ void weigh(float score[64], Rows *r, int seen, float scale) {
    int t = threadIdx.x % 4;
    if (__any_sync(~0u, seen < KEYS))
        for (int i = 0; i < 64; i++)
            if (i / 4 * 8 + t * 2 + i % 2 >= seen + i / 2 % 2 * 8) score[i] = -INFINITY;
    for (int k = 0; k < 2; k++) {
        float most = r->best[k], sum = 0;
        for (int i = 2 * k; i < 64; i += 4) most = fmaxf(most, fmaxf(score[i], score[i + 1]));
        for (int d = 1; d < 4; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
        r->shrink[k] = exp2_fast((r->best[k] - most) * scale);
        r->best[k] = most;
        for (int i = 2 * k; i < 64; i += i % 2 ? 3 : 1)
            sum += score[i] = exp2_fast(fmaf(score[i], scale, -most * scale));
        r->total[k] = r->total[k] * r->shrink[k] + sum;
    }
}

// score [64][128] = Q K^T, and o [64][128] += weights V, of a warpgroup's rows and the k-th tile.
static __device__ void score_keys(float score[64], PromptShared *s, uint64_t q, int k) {
    bar_wait(&s->k_full[k % 2], k / 2 % 2);
    uint64_t keys = smem_desc(s->k[k % 2]);
    wgmma_fence();
    for (int i = 0; i < QK_DIM / 16; i++) {
        int at = (i / 4 * SQUARE + i % 4 * 32) / 16;
        wgmma_128<false>(score, q + at, keys + at, i > 0);
    }
    wgmma_commit();
}

static __device__ void add_values(float o[64], const uint32_t weight[32], PromptShared *s, int k) {
    bar_wait(&s->v_full[k % 2], k / 2 % 2);
    uint64_t values = smem_desc(s->v[k % 2]) + ((uint64_t)(SQUARE / 16 - 1) << 16);
    wgmma_fence();
    for (int i = 0; i < KEYS / 16; i++)
        wgmma_rows(o, weight + i * 4, values + i * 16 * ROW_BYTES / 16);
    wgmma_commit();
}

// A thread's two rows: divided, rounded, and quantised, for a head is one scale group.
static __device__ void prompt_store(const Prompts &p, const Task &task, int first,
                                    const float o[64], const Rows &r) {
    int t = threadIdx.x % 4;
    for (int k = 0; k < 2; k++) {
        int row = first + 8 * k;
        size_t token = task.tile.row + row, line = (size_t)task.head * p.o.stride + token;
        float total = r.total[k], amax = MIN_AMAX, v[CHUNK];
        uint32_t w[32 / 2];
        for (int d = 1; d < 4; d *= 2) total += __shfl_xor_sync(~0u, total, d);
        for (int j = 0; j < 16; j++) {
            w[j] = bf16_pair(o[4 * j + 2 * k] / total, o[4 * j + 2 * k + 1] / total);
            amax = fmaxf(amax, fmaxf(fabsf(bf16_low(w[j])), fabsf(bf16_high(w[j]))));
        }
        for (int d = 1; d < 4; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
        float size = amax / E4M3_MAX;
        for (int i = 0; i < 16; i += 4) {
            transpose_quad(w + i);
            if (row >= task.tile.rows) continue;
            uint4 chunk = make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]);
            ((uint4 *)(p.o.x + token * p.o.cols + task.head * V_DIM))[i + t] = chunk;
            unpack8(v, chunk);
            *(uint2 *)(p.o.q + line * ROW_BYTES + swizzle_chunk(token, (i + t) / 2) * 16 +
                       t % 2 * 8) =
                make_uint2(e4m3_pair(v[0] / size, v[1] / size) |
                               e4m3_pair(v[2] / size, v[3] / size) << 16,
                           e4m3_pair(v[4] / size, v[5] / size) |
                               e4m3_pair(v[6] / size, v[7] / size) << 16);
        }
        if (t == 0 && row < task.tile.rows) p.o.scale[line] = size;
    }
}

// A warpgroup's 64 rows of each task. While a tile's scores become weights, the last one's values
// are being added; the other warpgroup fills what gaps there are.
static __device__ void prompt_compute(PromptShared *s, const Prompts &p) {
    int group = even(threadIdx.x / 128), k = 0, n = 0;
    int first = group * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;  // row g
    uint64_t q = smem_desc(s->q) + group * 64 * ROW_BYTES / 16;
    for (Task task = {}; task_next(&task, p); n++) {
        float score[64], o[64] = {};
        uint32_t weight[32];
        Rows r = {{-INFINITY, -INFINITY}};
        int seen = task.tile.position + first + 1;
        bar_wait(&s->q_full, n % 2);
        score_keys(score, s, q, k);
        wgmma_wait<0>();
        warp_arrive(&s->k_empty[k % 2]);
        weigh(score, &r, seen, p.scale);
        for (int i = 0; i < 32; i++) weight[i] = bf16_pair(score[2 * i], score[2 * i + 1]);
        for (int last = k++ + task.keys; k < last; k++) {
            seen -= KEYS;
            score_keys(score, s, q, k);
            add_values(o, weight, s, k - 1);
            wgmma_wait<1>();
            warp_arrive(&s->k_empty[k % 2]);
            weigh(score, &r, seen, p.scale);
            wgmma_wait<0>();
            warp_arrive(&s->v_empty[(k - 1) % 2]);
            for (int i = 0; i < 64; i++) o[i] *= r.shrink[i / 2 % 2];
            for (int i = 0; i < 32; i++) weight[i] = bf16_pair(score[2 * i], score[2 * i + 1]);
        }
        warp_arrive(&s->q_empty);
        add_values(o, weight, s, k - 1);
        wgmma_wait<0>();
        warp_arrive(&s->v_empty[(k - 1) % 2]);
        prompt_store(p, task, first, o, r);
    }
}

// Causal attention with 192 dims of keys and 128 of values. A block has 128 rows of a head at a
// time, 64 each of two warpgroups, and walks over the tokens in tiles of 128, from the first to the
// last that it sees; 80 KB a tile for 10.5 million operations, 32 bytes of L2 a clock at the tensor
// cores' full rate, which the exponentials keep it from.
static __global__ void __launch_bounds__(3 * 128, 1)
    prompt_kernel(const __grid_constant__ Prompts p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    PromptShared *s = (PromptShared *)shared;
    launch_dependents();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            bar_init(&s->k_full[i], 1), bar_init(&s->k_empty[i], ARRIVING * 8);
            bar_init(&s->v_full[i], 1), bar_init(&s->v_empty[i], ARRIVING * 8);
        }
        bar_init(&s->q_full, ARRIVING * 3), bar_init(&s->q_empty, ARRIVING * 8);
        bar_init_done();
    }
    __syncthreads();
    grid_wait();
    if (threadIdx.x >= 2 * 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 2 * 128) keys_load(s, p);
        else if (threadIdx.x >= 2 * 128 + WARP) queries_load(s, p);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        prompt_compute(s, p);
    }
}

// ---- mla_attention ------------------------------------------------------------------------------

static void attend_prompts(Prompts p) {
    int at_once = min_int(p.heads, step.room / p.n_keys), turns = units(p.heads, at_once);
    for (; p.first < p.heads; p.first += p.n_heads) {
        p.n_heads = min_int(units(p.heads, turns), p.heads - p.first);
        dim3 grid(2 * p.n_heads, min_int(p.n_keys, max_int(n_sms / (2 * p.n_heads), 1)));
        launch(expand_kernel, grid, EXPAND_THREADS, sizeof(ExpandShared), p);
        launch(prompt_kernel, min_int(n_sms, p.n_queries * p.n_heads), 3 * 128,
               sizeof(PromptShared), p);
    }
}

void mla_attention(Act *o, bf16 *query, bf16 *u, const bf16 *q, const bf16 *cache,
                   const Linear *kv_b_proj, const float *rope, float scale, int heads,
                   const Batch *b) {
    Batch absorbed = *b;
    act_rows(o, b->n);
    absorbed.n -= step.expanded;
    if (step.expanded)
        attend_prompts((Prompts){*o, (uint8_t *)u, q, cache, (const uint4 *)kv_b_proj->data,
                                 (const float *)kv_b_proj->scale, rope, b->pages, step.queries,
                                 step.keys, step.n_queries, step.n_keys, heads, 0, 0,
                                 scale * (float)M_LOG2E});
    if (!absorbed.n) return;
    mla_query(query, q, kv_b_proj, rope, heads, absorbed.n);
    mla_attend(u, query, cache, scale, heads, &absorbed);
    value(o, u, kv_b_proj, heads, absorbed.n);
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

typedef struct { int n_experts, group_size, topk_group, k, parts; float scale; } RouteDims;

// Finds the largest key of all lanes, for each of them the lowest lane that has it.
static __device__ int vote(uint32_t key) {
    return __ffs(__ballot_sync(~0u, key == __reduce_max_sync(~0u, key))) - 1;
}

// Adds up the parts of a lane's experts' scores, in order. MORE parts are loaded before the first
// is added: a load takes as long as all.
template <int EACH>
static __device__ void add_scores(float sum[EACH], const float *from, size_t stride, int parts) {
    enum { MORE = EACH == 32 ? 1 : 8, WIDE = EACH == 1 ? 1 : 4 };
    typedef struct { float v[WIDE]; } __align__(4 * WIDE) Load;
    for (int first = 0; first < parts; first += MORE) {
        Load load[MORE][EACH / WIDE];
#pragma unroll
        for (int i = 0; i < MORE; i++)
            for (int j = 0; j < EACH / WIDE; j++)
                load[i][j] = ((const Load *)(from + min(first + i, parts - 1) * stride))[j];
#pragma unroll
        for (int i = 0; i < MORE; i++)
            for (int j = 0; j < EACH && first + i < parts; j++)
                sum[j] += load[i][j / WIDE].v[j % WIDE];
    }
}

// A warp takes a row, a lane EACH neighbouring experts as order-preserving keys; a group is some
// neighbouring lanes. First each group's two best, then the best groups, then the best experts
// inside them: a dozen dependent votes. The bias steers the choice and never enters a weight. A row
// reads 1 KB; its latency is all.
template <int EACH>
static __device__ void route_row(const Routing &r, const float *product, const float *bias,
                                 const RouteDims &d, int row, int n, int *chosen, float *score) {
    const uint32_t none = order(-INFINITY);
    int lane = threadIdx.x % WARP, lanes = d.group_size / EACH, group = lane / lanes * lanes;
    uint32_t key[EACH], best = none, second = none;
    float add[EACH], sum[EACH] = {}, total = 0;
    bool open = false, there = lane * EACH < d.n_experts;
    int own = there ? lane * EACH : 0;  // so that all lanes can load
#pragma unroll
    for (int j = 0; j < EACH; j++) add[j] = bias[own + j];
    grid_wait();
    add_scores<EACH>(sum, product + (size_t)row * d.n_experts + own, (size_t)n * d.n_experts,
                     d.parts);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        int e = lane * EACH + j;
        score[e] = inverse(sigmoid_divisor(sum[j]));
        key[j] = there ? order(score[e] + add[j]) : 0;
        second = max(second, min(best, key[j])), best = max(best, key[j]);
    }
    uint32_t own_best = best, own_second = second;
    for (int i = 1, other = lane; i < lanes; i++) {  // with the group's other lanes, in a ring
        other = other + 1 < group + lanes ? other + 1 : group;
        uint32_t b = __shfl_sync(~0u, own_best, other), s = __shfl_sync(~0u, own_second, other);
        second = max(max(second, s), min(best, b)), best = max(best, b);
    }
    uint32_t group_key = order(order_value(best) + order_value(second));
    if (!there) group_key = 0;
    for (int i = 0; i < d.topk_group; i++)
        if ((unsigned)(vote(group_key) - group) < (unsigned)lanes) open = true, group_key = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++)
        if (!open) key[j] = min(key[j], none);
    for (int i = 0; i < d.k; i++) {
        uint32_t top = key[0];
        int at = 0;
#pragma unroll
        for (int j = 1; j < EACH; j++) top = max(top, key[j]);
#pragma unroll
        for (int j = EACH - 1; j >= 0; j--) at = key[j] == top ? j : at;
        bool won = lane == vote(top);
#pragma unroll
        for (int j = 0; j < EACH; j++) key[j] = won && j == at ? 0 : key[j];
        if (won) chosen[i] = lane * EACH + at;
    }
    __syncwarp();
    float weight = lane < d.k ? score[chosen[lane]] : 0;
    for (int i = 0; i < d.k; i++) total += __shfl_sync(~0u, weight, i);
    if (lane >= d.k) return;
    r.expert[row * d.k + lane] = chosen[lane];
    r.weight[row * d.k + lane] = weight / (total + 1e-20f) * d.scale;
}

enum { LIST_ROWS = 16, LIST_EXPERTS = 512 };

// The experts' lists of up to LIST_ROWS rows, a warp for each. A thread has an expert, and of it a
// bit for each row that chose it: their number is the list's length, and how many stand below a
// row's own bit is its place in the list.
static __device__ void list_rows(const Routing &r, const int (&chosen)[LIST_ROWS][WARP],
                                 const RouteDims &d, int n) {
    __shared__ uint32_t rows_of[LIST_EXPERTS];
    __shared__ int starts[LIST_EXPERTS], of_warps[WARP];
    int e = threadIdx.x, lane = e % WARP, warp = e / WARP;
    bool there = warp < n && lane < d.k;
    rows_of[e] = 0;
    __syncthreads();
    if (there) atomicOr(&rows_of[chosen[warp][lane]], 1u << warp);
    __syncthreads();
    int count = __popc(rows_of[e]), start = count;
    for (int i = 1; i < WARP; i *= 2) {
        int other = __shfl_up_sync(~0u, start, i);
        if (lane >= i) start += other;
    }
    if (lane == WARP - 1) of_warps[warp] = start;
    __syncthreads();
    for (int w = 0; w < warp; w++) start += of_warps[w];
    starts[e] = start - count;
    if (e < d.n_experts) r.start[e + 1] = start;
    if (e == 0) r.start[0] = 0;
    __syncthreads();
    if (!there) return;
    e = chosen[warp][lane];
    r.pair[starts[e] + __popc(rows_of[e] & ((1u << warp) - 1))] = warp * d.k + lane;
}

// Many rows: a block of one warp for each. Few: all in one block, which also makes the lists.
template <int EACH>
static __global__ void __launch_bounds__(LIST_EXPERTS)
    route_kernel(Routing r, const float *product, const float *bias, RouteDims d, int n) {
    __shared__ int chosen[LIST_ROWS][WARP];
    __shared__ float score[EACH == 32 ? 4 : LIST_ROWS][EACH * WARP];
    int warp = threadIdx.x / WARP;
    launch_dependents();
    if (warp < n)
        route_row<EACH>(r, product, bias, d, blockIdx.x + warp, n, chosen[warp], score[warp]);
    else grid_wait();
    if (gridDim.x == 1) list_rows(r, chosen, d, n);
}

// Many rows' lists: a block makes one expert's, and each of its warps looks through a stretch of
// the choices. First it counts those of smaller experts, which is where the list starts, and its
// own; then it copies its own in order, behind those of the warps before it. All blocks read all
// choices, 32 bytes a row, from L2; that is less than two kernels and a scan would cost.
static __global__ void route_lists_kernel(Routing r, int pairs) {
    __shared__ int own[WARP], smaller[WARP];
    int e = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, before = 0, count = 0;
    int stretch = (pairs + blockDim.x - 1) / blockDim.x * WARP;
    int first = warp * stretch, last = min(first + stretch, pairs);
    launch_dependents();
    grid_wait();
#pragma unroll 8
    for (int p = first + lane; p < last; p += WARP) {
        int chosen = r.expert[p];
        before += chosen < e, count += chosen == e;
    }
    before = __reduce_add_sync(~0u, before), count = __reduce_add_sync(~0u, count);
    if (lane == 0) smaller[warp] = before, own[warp] = count;
    __syncthreads();
    bool there = lane < (int)blockDim.x / WARP;
    int start = __reduce_add_sync(~0u, there ? smaller[lane] : 0);
    int to = start + __reduce_add_sync(~0u, lane < warp ? own[lane] : 0);
    if (threadIdx.x == 0) r.start[e] = start;
    if (threadIdx.x == 0 && e == (int)gridDim.x - 1) r.start[e + 1] = pairs;
#pragma unroll 8
    for (int p = first + lane; p - lane < last; p += WARP) {
        bool take = p < last && r.expert[p] == e;
        uint32_t lanes = __ballot_sync(~0u, take);
        if (take) r.pair[to + __popc(lanes & ((1u << lane) - 1))] = p;
        to += __popc(lanes);
    }
}

// From the router's product [parts][n][n_experts], which r->sum holds.
static void route(Routing *r, const Vector *bias, const Config *c, int n, int parts) {
    RouteDims d = {c->n_routed_experts, c->n_routed_experts / c->n_group, c->topk_group,
                   c->num_experts_per_tok, parts, (float)c->routed_scaling_factor};
    int pairs = n * d.k, threads = min_int(units(pairs, WARP) * WARP, 1024);
    int each = d.n_experts <= WARP ? 1 : d.n_experts <= 8 * WARP ? 8 : 32;
    if (d.group_size % each)
        die("got groups of %d experts, a GPU wants a multiple of %d", d.group_size, each);
    bool few = n <= (each == 32 ? 4 : LIST_ROWS) && d.n_experts <= LIST_EXPERTS;
    int whole = max_int(n, units(d.n_experts, WARP)) * WARP;  // threads of a block for all
    launch(each == 1 ? route_kernel<1> : each == 8 ? route_kernel<8> : route_kernel<32>,
           few ? 1 : n, few ? whole : WARP, 0, *r, r->sum, (const float *)bias->data, d, n);
    if (!few) launch(route_lists_kernel, d.n_experts, threads, 0, *r, pairs);
}

// 256 rows of weights would keep 16 multiprocessors busy, so the product is cut along K, as long as
// rows leave some idle.
static int router_parts(const Config *c, int n) {
    int most = max_int(c->hidden_size, c->n_routed_experts) / c->n_routed_experts;
    int tiles = units(n, WIDE_SLOTS) * units(c->n_routed_experts, WIDE_STRIPS * STRIP);
    most = min_int(most, max_int(n_sms / tiles, 1));
    return min_int(min_int(n > SKINNY_ROWS ? 14 : 8, most), c->hidden_size / (BLOCK / 2));
}

void moe_route(Routing *r, const Act *a, const Linear *gate, const Vector *bias, const Config *c,
               int n) {
    int parts = router_parts(c, n);
    product_bf16(r->sum, a, gate, NULL, n, parts);
    route(r, bias, c, n, parts);
}

// ---- The stages: experts, gated products, logits ------------------------------------------------

// Gate and up leave [parts][slots][2 cols of h] in `products`, and h takes them up.
static void launch_gate_quant(Act *h, const float *products, int parts, int slots, int *slot_of,
                              const int *pair, int n) {
    act_rows(h, slots);
    launch(gate_quant, units(slots * (h->cols / BLOCK), 8), 256, 0, h->q, h->scale, h->stride,
           products, parts, h->cols, slots, slot_of, pair, n);
}

// Expert e's matrix e expert_bytes behind the first; the shared expert's is the last.
static Weights expert_weights(Weights w, const Linear *first, const Linear *second,
                              const Linear *shared, int n_experts) {
    w.expert_bytes = second->data - first->data;
    w.expert_scales = (second->scale - first->scale) / sizeof(float);
    assert(shared->data == first->data + n_experts * w.expert_bytes);
    assert(shared->scale == first->scale + n_experts * w.expert_scales * sizeof(float));
    return w;
}

// Gate and up: returns how many parts gate_quant has to add and gate, 0 where it is done already.
static int run_up(Product *p) {
    p->gated = !few_rows(p) && p->parts == 1, p->y_f32 = !p->gated;
    run(p);
    return p->gated ? 0 : p->parts;
}

// f32 [parts][slots][2 cols of h]; returns how many parts.
static int experts_up(float *products, const Act *a, Weights up, Slots s) {
    Product p = product_of(a, up, s, DTYPE_F8_E4M3);
    p.parts = s.n <= 2 ? FEW_PARTS : 1, p.y = products;
    return run_up(&p);
}

// Few rows: y at once. Many: the slots' products go through memory, rounded to bf16, which is half
// of the bytes that this is bound by.
static void experts_down(bf16 *y, const Act *h, Weights down, Slots s, const float *weight,
                         float *products, const int *slot_of) {
    s.gather = false;  // h lies in slots
    Product p = product_of(h, down, s, DTYPE_F8_E4M3);
    bool few = few_rows(&p);
    int hidden = down.strips * STRIP;
    p.weight = weight, p.y = few ? (void *)y : products;
    run(&p);
    if (!few)
        launch(combine, units((size_t)s.n * hidden / 8, 256), 256, 0, y, (const bf16 *)products,
               slot_of, weight, s.top_k, hidden, s.n);
}

void moe_experts(bf16 *y, Act *h, const Act *a, const Routing *r, const Mlp *experts,
                 const Mlp *shared, const Config *c, int n) {
    int n_experts = c->n_routed_experts, top_k = c->num_experts_per_tok;
    const Mlp *second = experts + 1;
    Weights up = expert_weights(gate_up_weights(experts), &experts->gate_proj, &second->gate_proj,
                                &shared->gate_proj, n_experts);
    Weights down = expert_weights(weights(&experts->down_proj), &experts->down_proj,
                                  &second->down_proj, &shared->down_proj, n_experts);
    Slots s = {n, n_experts, top_k, r->start, r->pair, n, divisor(top_k), true};
    int *slot_of = (int *)scratch;
    float *products = scratch + units(n * top_k, 64) * 64;
    int parts = experts_up(products, a, up, s);
    launch_gate_quant(h, products, parts, n + n * top_k, slot_of, r->pair, n);
    experts_down(y, h, down, s, r->weight, products, slot_of);
}

void mlp(bf16 *y, Act *h, const Act *a, const Mlp *m, int n) {
    Product p = product_of(a, gate_up_weights(m), all_rows(n), DTYPE_F8_E4M3);
    p.parts = k_parts(&p), p.y = scratch;
    launch_gate_quant(h, scratch, run_up(&p), n, NULL, NULL, 0);
    linear(y, h, &m->down_proj, n);
}

void logits(float *out, const Act *a, const Linear *lm_head, const int *rows, int n_rows) {
    if (n_rows) product_bf16(out, a, lm_head, rows, n_rows, 1);
}

// ---- What the stages reserve --------------------------------------------------------------------

// Room for what one stage's kernels leave to each other: sums of parts of K, the dense layers' gate
// and up, or all experts' products where rows are many.
static size_t products_room(int rows, const Config *c) {  // floats
    size_t few = min_int(rows, EXPERT_ROWS), slots = c->num_experts_per_tok + 1;
    size_t up = 2 * c->moe_intermediate_size, down = c->hidden_size / 2, pairs = rows * slots;
    size_t sizes[] = {(size_t)n_sms * WIDE_SLOTS * WIDE_STRIPS * STRIP,
                      2 * (size_t)rows * c->intermediate_size,
                      pairs + 64 + FEW_PARTS * few * slots * up,
                      pairs + 64 + pairs * (up > down ? up : down)}, most = 0;
    for (size_t size : sizes) most = size > most ? size : most;
    return most;
}

// What the kernels can count and hold is less than any config may ask for.
void step_reserve(int rows, const Config *c) {
    enum { MOST_HEADS = 64, MOST_EXPERTS = 256 };  // of a slice of attend; of a list of experts
    step.heads = c->num_attention_heads;
    if (rows > UINT16_MAX)
        die("CUDA: got %d rows in a step, want at most %d: lower --chunked-prefill-size", rows,
            UINT16_MAX);
    if (step.heads > MOST_HEADS && step.heads % MOST_HEADS)
        die("CUDA: num_attention_heads: got %d, want at most %d or a multiple of it", step.heads,
            MOST_HEADS);
    if (c->n_routed_experts > MOST_EXPERTS)
        die("CUDA: n_routed_experts: got %d, want at most %d", c->n_routed_experts, MOST_EXPERTS);
    mla_reserve(rows, step.heads);
    scratch = (float *)place_alloc(products_room(rows, c) * sizeof(float));
    // Recorded steps know where their arrays lie, so there is room for the largest step's from now
    // on, unless its page tables are longer than the cache could be without shared pages.
    enum { TABLES = 1 << 20 };
    if (mail_open(&step.mail, 5 * mail_bytes(rows * sizeof(int)) + TABLES)) step_forget();
}

// ---- Choosing a token ---------------------------------------------------------------------------
// A row of logits is 129,280 numbers, half a megabyte. A team of eight blocks, a cluster, takes it
// and holds it in shared memory, 64 KB a block. So every question about the row (its largest value,
// its sum, what stands above a threshold) is a short pass and one exchange inside the cluster, one
// or two microseconds. Nothing is sorted, and where top_k, top_p and min_p cut is never found out:
// an id is drawn from all, and only for this one it is asked whether they would have left it.

enum { TEAM = 8, TEAM_THREADS = 512, QUAD = 4, MOST_IDS = 50000 };  // of a block

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

static __device__ float gumbel(uint32_t word) {
    float u = fminf(((float)word + 0.5f) * 0x1p-32f, 0x1.fffffep-1f);
    return -logf(-log1pf(-u));
}

namespace cg = cooperative_groups;

typedef struct {
    float *v;         // [n] the block's part of the row, of which a thread has every 1,024th entry
    int first, n;     // ids in it
    int part;         // ids of a part, a multiple of QUAD
    bool leader;      // of all threads
    int turn;         // exchanges so far
} Team;

static __device__ void team_sync(void) { cg::this_cluster().sync(); }

static __device__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
static __device__ double plus(double a, double b) { return a + b; }

// Combines one value of every thread of the team, always in the same order, for all of them. Two
// slots take turns: who writes one again has seen all others leave it.
template <typename T, T (*combine)(T, T)> static __device__ T team_all(Team *t, T v) {
    __shared__ T warp[WARP], block[2];
    T *slot = &block[t->turn++ % 2];
    for (int d = WARP / 2; d; d /= 2) v = combine(v, __shfl_xor_sync(~0u, v, d));
    if (threadIdx.x % WARP == 0) warp[threadIdx.x / WARP] = v;
    __syncthreads();
    if (threadIdx.x < WARP) {
        v = threadIdx.x < TEAM_THREADS / WARP ? warp[threadIdx.x] : T(0);
        for (int d = WARP / 2; d; d /= 2) v = combine(v, __shfl_xor_sync(~0u, v, d));
        if (threadIdx.x == 0) *slot = v;
    }
    team_sync();
    v = *cg::this_cluster().map_shared_rank(slot, 0);
    for (int i = 1; i < TEAM; i++) v = combine(v, *cg::this_cluster().map_shared_rank(slot, i));
    return v;
}

// An id and its value as one number: the largest is the likeliest, of equals the lowest id.
static __device__ uint64_t id_key(float v, int id) {
    return (uint64_t)order(v) << 32 | (uint32_t)~id;
}
static __device__ int key_id(uint64_t key) { return ~(uint32_t)key; }
static __device__ float key_value(uint64_t key) { return order_value(key >> 32); }

// The key of the likeliest id below `limit`.
static __device__ uint64_t team_best(Team *t, uint64_t limit) {
    uint64_t best = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < t->n; i += TEAM_THREADS) {
        uint64_t key = id_key(t->v[i], t->first + i);
        if (key < limit) best = larger(best, key);
    }
    return team_all<uint64_t, larger>(t, best);
}

// The key of the id with the highest logit plus noise, of those likelier than `limit`. A thread
// takes four neighbouring ids, since one call of philox makes four numbers.
static __device__ uint64_t team_draw(Team *t, const Sampling *s, uint64_t limit) {
    uint64_t best = 0;
    for (int i = QUAD * threadIdx.x; i < t->n; i += QUAD * TEAM_THREADS) {
        uint32_t word[QUAD];
        philox_rounds(word, s->seed, (t->first + i) / QUAD, s->n_tokens, 0, 0);
#pragma unroll
        for (int k = 0; k < QUAD; k++) {
            float v = i + k < t->n ? t->v[i + k] : -INFINITY;
            if (v == -INFINITY || id_key(v, t->first + i + k) <= limit) continue;
            best = larger(best, id_key(v + gumbel(word[k]), t->first + i + k));
        }
    }
    return team_all<uint64_t, larger>(t, best);
}

// Whether top_k, top_p and min_p leave the id with this key, by the ids that are likelier.
static __device__ bool team_keeps(Team *t, const Sampling *s, uint64_t key, float top,
                                  double total) {
    double ids = 0, mass = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < t->n; i += TEAM_THREADS) {
        if (id_key(t->v[i], t->first + i) <= key) continue;
        ids++, mass += (float)(expf(t->v[i] - top) / total);
    }
    if (s->min_p > 0 && (float)(expf(key_value(key) - top) / total) < s->min_p * (float)(1 / total))
        return false;
    if (s->top_k > 0 && !(team_all<double, plus>(t, ids) < s->top_k)) return false;
    return s->top_p >= 1 || team_all<double, plus>(t, mass) <= s->top_p;
}

// Draws until the filters leave what was drawn. What is less likely than a refused id is refused
// with it, and the likeliest id is always left: so the result is the highest among those that are
// left, and mostly it is found at once.
static __device__ int draw(Team *t, const Sampling *s, uint64_t best, int vocab) {
    bool filtered = (s->top_k > 0 && s->top_k < vocab) || s->top_p < 1 || s->min_p > 0;
    float top = key_value(best) / s->temperature;
    double total = 0;
    for (int i = threadIdx.x; i < t->n; i += TEAM_THREADS) {
        t->v[i] /= s->temperature;
        total += filtered ? expf(t->v[i] - top) : 0;
    }
    if (filtered) total = team_all<double, plus>(t, total);
    team_sync();  // a thread's ids are others from here on
    for (uint64_t limit = 0;;) {
        int id = key_id(team_draw(t, s, limit)), owner = id / t->part;
        float v = *cg::this_cluster().map_shared_rank(&t->v[id - owner * t->part], owner);
        limit = id_key(v, id);
        if (!filtered || team_keeps(t, s, limit, top, total)) return id;
    }
}

// How often each id stands in the output (times two) and whether it stands anywhere (one) is
// counted in its own place in l. The logits are in t->v meanwhile, and return to l.
static __device__ void penalise(Team *t, float *l, const Sampling *s) {
    uint32_t *count = (uint32_t *)l, *own = count + t->first;
    for (int i = threadIdx.x; i < t->n; i += TEAM_THREADS) own[i] = 0;
    team_sync();
    int me = blockIdx.x * TEAM_THREADS + threadIdx.x;
    for (int i = me; i < s->n_tokens; i += TEAM * TEAM_THREADS) {
        atomicOr(&count[s->tokens[i]], 1);
        if (i >= s->n_prompt) atomicAdd(&count[s->tokens[i]], 2);
    }
    team_sync();
    for (int i = threadIdx.x; i < t->n; i += TEAM_THREADS) {
        uint32_t seen = __ldcg(&own[i]);
        float v = t->v[i];
        l[t->first + i] = v;
        if (seen && s->repetition_penalty != 1)
            v = v > 0 ? v / s->repetition_penalty : v * s->repetition_penalty;
        if (seen > 1)
            v = __fsub_rn(__fsub_rn(v, __fmul_rn(s->frequency_penalty, seen / 2)),
                          s->presence_penalty);
        t->v[i] = v;
    }
}

// Adds to one id's logit, whoever has it.
static __device__ void team_add(Team *t, int id, float add) {
    int i = id - t->first;
    if (i >= 0 && i < t->n && i % TEAM_THREADS == (int)threadIdx.x) t->v[i] += add;
}

static __host__ __device__ bool penalised(const Sampling *s) {
    return !s->given && (s->repetition_penalty != 1 || s->frequency_penalty != 0 ||
                         s->presence_penalty != 0);
}

static __device__ int choose(Team *t, float *l, const Sampling *s, uint64_t best, int vocab) {
    if (penalised(s)) penalise(t, l, s);
    for (int i = 0; i < s->n_bias; i++) team_add(t, s->bias_id[i], s->bias[i]);
    for (int i = 0; i < s->n_banned; i++) team_add(t, s->banned[i], -INFINITY);
    if (penalised(s) || s->n_bias || s->n_banned) best = team_best(t, UINT64_MAX);
    if (key_value(best) == -INFINITY) return -1;  // all that were finite are banned
    if (s->temperature < 1e-6f || s->top_k == 1) return key_id(best);
    return draw(t, s, best, vocab);
}

static __device__ float logprob(float v, float best, double log_total) {
    return fmaxf((float)(v - best - log_total), -9999.0f);
}

static __device__ void row_load(Team *t, const float *l) {
#pragma unroll 8
    for (int i = threadIdx.x; i < t->n; i += TEAM_THREADS) t->v[i] = l[t->first + i];
}

// The chosen id's logprob by the model's own logits, and the likeliest ids: each is the largest key
// below the last one.
static __device__ void list_logprobs(Team *t, Choice *out, const float *l, int id, int n_top,
                                     uint64_t best) {
    double total = 0;
    float top = key_value(best);
    team_sync();  // what penalise gave back is there
    row_load(t, l);
#pragma unroll 2
    for (int i = threadIdx.x; i < t->n; i += TEAM_THREADS) total += exp((double)t->v[i] - top);
    total = log(team_all<double, plus>(t, total));
    if (t->leader) out->logprob = logprob(l[id], top, total);
    for (int i = 0; i < n_top; i++, best = team_best(t, best)) {
        if (!t->leader) continue;
        out->top_id[i] = key_id(best);
        out->top_logprob[i] = logprob(key_value(best), top, total);
    }
}

// A team takes a row, reads it once or, for logprobs, twice, and writes what was chosen.
static __global__ void __cluster_dims__(TEAM) __launch_bounds__(TEAM_THREADS)
    sample_kernel(Choice *out, float *l, const Sampling *sampling, int vocab, int stride) {
    extern __shared__ float part[];
    const Sampling *s = &sampling[blockIdx.y];
    int n = units(vocab, TEAM * QUAD) * QUAD, first = blockIdx.x * n;
    bool leader = blockIdx.x == 0 && threadIdx.x == 0;
    Team t = {part, first, max(min(n, vocab - first), 0), n, leader, 0};
    uint64_t best = 0;
    l += (size_t)blockIdx.y * stride, out += blockIdx.y;
    row_load(&t, l);
#pragma unroll 4
    for (int i = threadIdx.x; i < t.n; i += TEAM_THREADS)  // NaN counts as infinity: an error
        best = larger(best, id_key(t.v[i] != t.v[i] ? INFINITY : t.v[i], first + i));
    best = team_all<uint64_t, larger>(&t, best);
    bool good = isfinite(key_value(best));
    int id = !good ? -1 : s->given ? *s->given : choose(&t, l, s, best, vocab);
    int n_top = id < 0 || s->top_logprobs < 0 ? 0 : min(s->top_logprobs, vocab);
    if (t.leader) out->id = id, out->logprob = 0, out->n_top = n_top;
    if (id >= 0 && s->top_logprobs >= 0) list_logprobs(&t, out, l, id, n_top, best);
    team_sync();  // nobody leaves while others read its shared memory
}

// Bytes that a row's lists take on their way to the device.
static size_t sampling_bytes(const Sampling *s) {
    return mail_bytes(penalised(s) ? s->n_tokens * sizeof(int) : 0) +
           mail_bytes(s->n_banned * sizeof(int)) + 2 * mail_bytes(s->n_bias * sizeof(int)) +
           mail_bytes(s->given ? sizeof(int) : 0);
}

// Only the rows' parameters go there, with lists where something is on that needs them, and only
// Choices come back: the kernel writes them into the host's memory. The host waits here, and
// nowhere else in a step.
void sample(Choice *out, float *l, const Sampling *s, int vocab, int stride, int n) {
    static thread_local Mailbox asked, answered;
    size_t bytes = mail_bytes(n * sizeof *s);
    size_t shared = units(vocab, TEAM * QUAD) * QUAD * sizeof(float);
    if (vocab > TEAM * MOST_IDS)
        die("got %d tokens, a GPU wants at most %d", vocab, TEAM * MOST_IDS);
    check(cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               MOST_IDS * sizeof(float)), "shared memory");
    for (int i = 0; i < n; i++) bytes += sampling_bytes(&s[i]);
    mail_open(&asked, bytes), mail_open(&answered, mail_bytes(n * sizeof *out));
    Sampling *to = (Sampling *)asked.host;
    const Sampling *there = (const Sampling *)mail_add(&asked, s, n * sizeof *s);
    for (int i = 0; i < n; i++) {
        size_t biases = s[i].n_bias * sizeof(int);
        if (penalised(&s[i]))
            to[i].tokens = (int *)mail_add(&asked, s[i].tokens, s[i].n_tokens * sizeof(int));
        to[i].banned = (int *)mail_add(&asked, s[i].banned, s[i].n_banned * sizeof(int));
        to[i].bias_id = (int *)mail_add(&asked, s[i].bias_id, biases);
        to[i].bias = (float *)mail_add(&asked, s[i].bias, biases);
        if (s[i].given) to[i].given = (int *)mail_add(&asked, s[i].given, sizeof(int));
    }
    mail_send(&asked);
    sample_kernel<<<dim3(TEAM, n), TEAM_THREADS, shared, stream>>>((Choice *)answered.host, l,
                                                                   there, vocab, stride);
    check(cudaGetLastError(), "sample");
    stream_wait("sample");
    memcpy(out, answered.host, n * sizeof *out);
}

// ---- What the device can do at most -------------------------------------------------------------

double device_seconds(void (*work)(void *), void *arg) {
    enum { RUNS = 5 };
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t from, to;
    float ms[RUNS];
    check(cudaEventCreate(&from), "event"), check(cudaEventCreate(&to), "event");
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording");
    work(arg);
    check(cudaStreamEndCapture(stream, &graph), "recording");
    check(cudaGraphInstantiate(&exec, graph, 0), "graph");
    for (int i = -1; i < RUNS; i++) {  // the first one is not counted
        check(cudaEventRecord(from, stream), "event");
        check(cudaGraphLaunch(exec, stream), "graph");
        check(cudaEventRecord(to, stream), "event");
        check(cudaEventSynchronize(to), "graph");
        float t = 0;
        check(cudaEventElapsedTime(&t, from, to), "event");
        int at = i;
        for (; at > 0 && ms[at - 1] > t; at--) ms[at] = ms[at - 1];
        if (i >= 0) ms[at] = t;
    }
    check(cudaGraphExecDestroy(exec), "graph"), check(cudaGraphDestroy(graph), "graph");
    check(cudaEventDestroy(from), "event"), check(cudaEventDestroy(to), "event");
    return ms[RUNS / 2] * 1e-3;
}

enum { RING = 6, PIECE = 16 << 10 };

// Reads everything once through a ring of bulk copies and adds nothing up.
static __global__ void __launch_bounds__(WARP) read_kernel(const uint8_t *p, size_t pieces) {
    extern __shared__ __align__(1024) uint8_t ring[];
    __shared__ uint64_t full[RING];
    launch_dependents();
    for (int i = 0; threadIdx.x == 0 && i < RING; i++) bar_init(&full[i], 1);
    bar_init_done();
    for (size_t k = 0, piece = blockIdx.x; threadIdx.x == 0 && piece < pieces + RING * gridDim.x;
         k++, piece += gridDim.x) {
        uint64_t *bar = &full[k % RING];
        if (k >= RING && piece - RING * gridDim.x < pieces) bar_wait(bar, k / RING % 2 ^ 1);
        if (piece >= pieces) continue;
        bar_expect(bar, PIECE);
        bulk_load(ring + k % RING * PIECE, p + piece * PIECE, PIECE, bar);
    }
    grid_wait();
}

// As much as 1,024 threads a multiprocessor can copy, 16 bytes each at a time, four on their way.
static __global__ void __launch_bounds__(1024)
    copy_kernel(uint4 *__restrict__ to, const uint4 *__restrict__ from, size_t n) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    grid_wait();
#pragma unroll 4
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += step)
        to[i] = from[i];
}

enum { TENSOR_GROUPS = 2, TENSOR_BYTES = (64 + 128) * ROW_BYTES };

// The tensor cores alone: each of two warpgroups multiplies [64][128 bytes] by [128][128 bytes]
// that lie in shared memory, again and again.
template <bool FP8> static __global__ void __launch_bounds__(TENSOR_GROUPS * 128)
    tensor_kernel(float *out, const uint4 *in, int rounds) {
    __shared__ __align__(1024) uint8_t tile[TENSOR_BYTES];
    float c[64] = {}, sum = 0;
    grid_wait();
    for (int i = threadIdx.x; i < TENSOR_BYTES / 16; i += blockDim.x) ((uint4 *)tile)[i] = in[i];
    fence_async();
    __syncthreads();
    uint64_t a = smem_desc(tile), b = smem_desc(tile + 64 * ROW_BYTES);
    for (int i = 0; i < rounds; i++) {
        wgmma_fence();
        for (int k = 0; k < 4; k++) wgmma_128<FP8>(c, a + 2 * k, b + 2 * k, 1);
        wgmma_commit();
        wgmma_wait<0>();
    }
    for (int i = 0; i < 64; i++) sum += c[i];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Of random bits those in `keep`, and those in `set` always.
static __global__ void noise_kernel(uint32_t *p, size_t n, uint32_t keep, uint32_t set) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        p[i] = (uint32_t)(mix(i + 1) >> 32) & keep | set;
}

enum { CEILING_BYTES = 1 << 30, TENSOR_ROUNDS = 4000 };

static void read_all(void *p) {
    launch(read_kernel, n_sms, WARP, RING * PIECE, (uint8_t *)p, (size_t)CEILING_BYTES / PIECE);
}

static void copy_half(void *p) {
    launch(copy_kernel, 2 * n_sms, 1024, 0, (uint4 *)p + CEILING_BYTES / 32, (uint4 *)p,
           (size_t)CEILING_BYTES / 32);
}

template <bool FP8> static void multiply_all(void *p) {
    launch(tensor_kernel<FP8>, n_sms, TENSOR_GROUPS * 128, 0, (float *)p + CEILING_BYTES / 8,
           (uint4 *)p, (int)TENSOR_ROUNDS);
}

Ceilings device_ceilings(void) {
    cudaDeviceProp device;
    int gpu = 0;
    Ceilings c = {};
    void *p = device_alloc(CEILING_BYTES);
    noise_kernel<<<8 * n_sms, 256, 0, stream>>>((uint32_t *)p, CEILING_BYTES / 4, 0xbfbfbfbf,
                                                0x30303030);  // 0.5 to 2 in e4m3
    check(cudaGetLastError(), "noise");
    check(cudaGetDevice(&gpu), "device"), check(cudaGetDeviceProperties(&device, gpu), "device");
    snprintf(c.name, sizeof c.name, "%.60s", device.name);
    // A multiplication and an addition for each pair; 128 bytes are 128 columns, or 64.
    double products = 2.0 * n_sms * TENSOR_GROUPS * TENSOR_ROUNDS * 64 * 128 * ROW_BYTES;
    c.read = CEILING_BYTES / device_seconds(read_all, p);
    c.copy = CEILING_BYTES / device_seconds(copy_half, p);
    c.fp8 = products / device_seconds(multiply_all<true>, p);
    c.bf16 = products / 2 / device_seconds(multiply_all<false>, p);
    device_free(p);
    return c;
}
