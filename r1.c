// r1.c: the book of r1, to be read from top to bottom: the config, the checkpoint, one layer, one
// step, many at once, the commands. What a stage computes stands in kernels.c; what a token or a
// socket is, in tokenizer.c and http.c.
#include "r1.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

// ==== Config =====================================================================================
// config.json says which member of the DeepSeek-V3 family this is. Sizes may vary; what is built
// into the stages (attention's 512 + 64, sigmoid scores, 128x128 scale blocks) must be as R1 has
// it, and anything else is refused here by name. After config_load every number is in a range that
// later products of two or three of them can't overflow.

// An integer in low..high, which is how a size is asked for; low = high: just that one.
static int config_int(const char *file, const Json *root, const char *key, int64_t low,
                      int64_t high) {
    const Json *v = json_want(file, root, key, JSON_NUMBER);
    int64_t n = 0;
    if (!json_int(v, low, high, &n))
        die("%s: %s: got %g, want an integer in %ld..%ld", file, key, v->number, (long)low,
            (long)high);
    return (int)n;
}

static double config_number(const char *file, const Json *root, const char *key, double low,
                            double high) {
    double v = json_want(file, root, key, JSON_NUMBER)->number;
    if (!(v >= low && v <= high))
        die("%s: %s: got %g, want a number in %g..%g", file, key, v, low, high);
    return v;
}

// An integer in BLOCK..high that is a multiple of BLOCK.
static int config_blocks(const char *file, const Json *root, const char *key, int64_t high) {
    int value = config_int(file, root, key, BLOCK, high);
    if (value % BLOCK) die("%s: %s: got %d, want a multiple of %d", file, key, value, BLOCK);
    return value;
}

// Scales of other blocks, or e5m2, would load without a complaint and give nonsense.
static void config_quantization(Config *c, const char *file, const Json *root) {
    const Json *q = json_get(root, "quantization_config");
    int64_t side;
    if (!q || q->type == JSON_NULL) return;  // a bf16 copy of the weights
    json_want(file, root, "quantization_config", JSON_OBJECT);
    json_expect(file, root, "quantization_config.quant_method", "fp8");
    json_expect(file, root, "quantization_config.fmt", "e4m3");
    q = json_want(file, root, "quantization_config.weight_block_size", JSON_ARRAY);
    if (q->count != 2 || !json_int(q + 1, BLOCK, BLOCK, &side) ||
        !json_int(q + 2, BLOCK, BLOCK, &side))
        die("%s: weight_block_size: got other numbers, want [%d, %d]", file, BLOCK, BLOCK);
    c->fp8 = true;
}

// YaRN's parameters. R1 was trained on 4,096 tokens and stretched to 163,840 by them.
static void config_rope(Config *c, const char *file, const Json *root) {
    const Json *r = json_want(file, root, "rope_scaling", JSON_OBJECT);
    json_expect(file, r, json_get(r, "rope_type") ? "rope_type" : "type", "yarn");
    c->rope_theta = config_number(file, root, "rope_theta", 1, 1e12);
    c->rope_scaling.factor = config_number(file, r, "factor", 1, 1e6);
    c->rope_scaling.beta_fast = config_number(file, r, "beta_fast", 0.001, 1e6);
    c->rope_scaling.beta_slow = config_number(file, r, "beta_slow", 0.001, 1e6);
    c->rope_scaling.mscale_all_dim = config_number(file, r, "mscale_all_dim", 0, 1e3);
    c->rope_scaling.original_max_position_embeddings =
        config_int(file, r, "original_max_position_embeddings", 1, 1 << 30);
    // cos and sin are scaled by the quotient of the two mscales: 1 in R1, and here always.
    double mscale = config_number(file, r, "mscale", 0, 1e3), all = c->rope_scaling.mscale_all_dim;
    if (mscale != all)
        die("%s: mscale: got %g, want the value of mscale_all_dim, %g", file, mscale, all);
}

// Bounds that choose_experts relies on: groups of at least two experts, and enough of them kept.
static void config_experts(Config *c, const char *file, const Json *root) {
    c->n_group = config_int(file, root, "n_group", 1, 1024);
    c->topk_group = config_int(file, root, "topk_group", 1, c->n_group);
    c->n_routed_experts = config_int(file, root, "n_routed_experts", 2 * c->n_group, 1024);
    if (c->n_routed_experts % c->n_group)
        die("%s: n_routed_experts: got %d, want a multiple of n_group, %d", file,
            c->n_routed_experts, c->n_group);
    int kept = c->topk_group * (c->n_routed_experts / c->n_group);
    c->num_experts_per_tok = config_int(file, root, "num_experts_per_tok", 1,
                                        kept < MAX_EXPERTS_PER_TOK ? kept : MAX_EXPERTS_PER_TOK);
    config_int(file, root, "n_shared_experts", 1, 1);
    config_int(file, root, "moe_layer_freq", 1, 1);
    json_expect(file, root, "scoring_func", "sigmoid");
    json_expect(file, root, "topk_method", "noaux_tc");
    json_expect(file, root, "norm_topk_prob", "true");
    c->routed_scaling_factor = config_number(file, root, "routed_scaling_factor", 0, 1e3);
    c->moe_intermediate_size = config_blocks(file, root, "moe_intermediate_size", 1 << 20);
}

// generation_config.json holds the makers' advice for sampling; it may be absent.
static void config_generation(Config *c, const char *dir) {
    char *text, *file = format_string("%s/generation_config.json", dir);
    Json *root = json_load(&text, file, true);
    c->temperature = c->top_p = 1;
    if (json_get(root, "temperature"))
        c->temperature = config_number(file, root, "temperature", 0, 1e6);
    if (json_get(root, "top_p")) c->top_p = config_number(file, root, "top_p", 1e-9, 1);
    free(root), free(text), free(file);
}

Config config_load(const char *dir) {
    Config c = {0};
    char *text, *file = format_string("%s/config.json", dir);
    Json *root = json_load(&text, file, false);
    json_expect(file, root, "model_type", "deepseek_v3");
    json_expect(file, root, "hidden_act", "silu");
    c.vocab_size = config_int(file, root, "vocab_size", 1, 1 << 24);
    c.hidden_size = config_blocks(file, root, "hidden_size", 1 << 20);
    c.num_hidden_layers = config_int(file, root, "num_hidden_layers", 1, 4096);
    c.num_nextn_predict_layers = config_int(file, root, "num_nextn_predict_layers", 0, 1);
    c.first_k_dense_replace =
        config_int(file, root, "first_k_dense_replace", 0, c.num_hidden_layers);
    c.intermediate_size = config_blocks(file, root, "intermediate_size", 1 << 20);
    c.num_attention_heads = config_int(file, root, "num_attention_heads", 1, 4096);
    c.q_lora_rank = config_blocks(file, root, "q_lora_rank", 1 << 20);
    config_int(file, root, "kv_lora_rank", LATENT_DIM, LATENT_DIM);
    config_int(file, root, "qk_nope_head_dim", NOPE_DIM, NOPE_DIM);
    config_int(file, root, "qk_rope_head_dim", ROPE_DIM, ROPE_DIM);
    config_int(file, root, "v_head_dim", V_DIM, V_DIM);
    c.max_position_embeddings = config_int(file, root, "max_position_embeddings", PAGE, 1 << 24);
    config_int(file, root, "bos_token_id", 0, c.vocab_size - 1);
    c.eos_token_id = config_int(file, root, "eos_token_id", 0, c.vocab_size - 1);
    c.rms_norm_eps = config_number(file, root, "rms_norm_eps", 0, 1);
    json_expect(file, root, "?tie_word_embeddings", "false");
    json_expect(file, root, "?attention_bias", "false");
    config_experts(&c, file, root);
    config_rope(&c, file, root);
    config_quantization(&c, file, root);
    config_generation(&c, dir);
    free(root), free(text), free(file);
    return c;
}

// Whole scale blocks and whole heads go to a rank, so that its part is quantised as the whole is.
static bool ranks_fit(const Config *c, int size) {
    int block = c->fp8 ? BLOCK : 1, heads = c->num_attention_heads;
    return heads % size == 0 && heads / size * QK_DIM % block == 0 && c->vocab_size % size == 0 &&
           c->intermediate_size % (size * BLOCK) == 0 &&
           c->moe_intermediate_size % (size * BLOCK) == 0;
}

void config_check_ranks(char *err, size_t err_size, const Config *c, int size) {
    *err = 0;
    if (ranks_fit(c, size)) return;
    Buf b = {0};
    for (int i = 1; i <= c->num_attention_heads; i++)
        if (ranks_fit(c, i)) buf_printf(&b, "%s%d", b.len ? ", " : "", i);
    snprintf(err, err_size, "got %d, want one of %s: each rank needs whole heads and whole scale "
             "blocks of 128", size, b.len ? b.data : "none");
    buf_free(&b);
}

// ==== Checkpoint =================================================================================
// A checkpoint is a directory of safetensors files and an index that says which file holds which
// tensor. A file is eight bytes of length, a JSON header of names, dtypes, shapes and offsets, and
// then the bytes themselves. R1 has 91,991 tensors in 163 files. The files are mapped, not read: a
// tensor is a pointer into the mapping. They are hostile input: after checkpoint_open every tensor
// lies inside its file, in the size that its dtype and shape ask for.

enum { MAX_HEADER = 100 << 20, MAX_RANK = 8 };  // bytes, as the format demands; dimensions

typedef struct {
    char *name, *header;    // file name; the header's text, into which tensor names point
    const uint8_t *map;
    size_t size;
    int fd;                 // while weights are read
} File;

typedef struct {
    Str name, dtype;
    File *file;             // NULL: an empty slot
    const uint8_t *data;    // NULL: only the index spoke of it yet
    size_t bytes;
    int rank;
    int64_t shape[MAX_RANK];
    atomic_bool used;
} Tensor;

typedef struct Made {  // values that dummy tensors of a kind share, or a dummy vector
    struct Made *next;
    int kind;
    int64_t columns;
    uint8_t data[];
} Made;

struct Checkpoint {
    const char *dir;
    bool dummy;
    File *files;
    int n_files;
    Tensor *slots;          // open addressing by the name's hash, at most half full
    size_t n_slots;
    char *index_text;
    pthread_mutex_t mutex;  // of the following: all ranks bind from one checkpoint
    Made *made;             // values of dummy tensors
};

static uint64_t hash_bytes(const char *data, size_t len) {  // FNV-1a
    uint64_t h = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < len; i++) h = (h ^ (uint8_t)data[i]) * 0x100000001b3ull;
    return h;
}

// The slot of a name, or the empty slot where it belongs.
static Tensor *checkpoint_slot(const Checkpoint *c, Str name) {
    size_t i = hash_bytes(name.data, name.len) & (c->n_slots - 1);
    while (c->slots[i].file &&
           (c->slots[i].name.len != name.len || memcmp(c->slots[i].name.data, name.data, name.len)))
        i = (i + 1) & (c->n_slots - 1);
    return &c->slots[i];
}

static void checkpoint_reserve(Checkpoint *c, size_t tensors) {
    for (c->n_slots = 64; c->n_slots < 2 * tensors; c->n_slots *= 2) {}
    c->slots = xcalloc(c->n_slots, sizeof *c->slots);
}

// Mapped and never read here: the pages come when they are looked at, and all processes share them.
static void file_map(Checkpoint *c, File *f) {
    char *path = format_string("%s/%s", c->dir, f->name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) != 0) die("%s: %s", path, strerror(errno));
    f->size = st.st_size;
    if (f->size < 8) die("%s: got %zu bytes, want a safetensors file", path, f->size);
    f->map = mmap(NULL, f->size, PROT_READ, MAP_SHARED, fd, 0);
    if (f->map == MAP_FAILED) die("%s: mmap: %s", path, strerror(errno));
    close(fd);
    free(path);
}

// Bytes of an element; 0: not a dtype. Those that no R1 tensor has are only measured.
static size_t dtype_size(Str name) {
    static const struct { const char *name; size_t size; } known[] = {
        {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"BF16", 2}, {"F16", 2}, {"F32", 4},  {"F64", 8}, {"I8", 1},
        {"U8", 1},      {"BOOL", 1},    {"I16", 2},  {"I32", 4}, {"I64", 8}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (str_equal(name, known[i].name)) return known[i].size;
    return 0;
}

// Reads one header entry into t; `end` is the size of the file's byte buffer.
static void tensor_parse(Tensor *t, const File *f, const Json *v, size_t end) {
#define TENSOR_DIE(...)                                                                            \
    die("%s: tensor %.*s: %s", f->name, (int)t->name.len, t->name.data, format_string(__VA_ARGS__))
    if (v->type != JSON_OBJECT) TENSOR_DIE("got %s, want an object", json_type_name(v));
    const Json *dtype = json_get(v, "dtype"), *shape = json_get(v, "shape");
    const Json *offsets = json_get(v, "data_offsets");
    if (!dtype || dtype->type != JSON_STRING) TENSOR_DIE("dtype: missing, want a string");
    if (!shape || shape->type != JSON_ARRAY) TENSOR_DIE("shape: missing, want an array");
    if (shape->count > MAX_RANK)
        TENSOR_DIE("shape: got %u dimensions, want at most 8", shape->count);
    t->dtype = dtype->string;
    t->bytes = dtype_size(t->dtype);
    if (!t->bytes)
        TENSOR_DIE("dtype: got \"%.*s\", which is unknown", (int)t->dtype.len, t->dtype.data);
    t->rank = shape->count;
    for (int i = 0; i < t->rank; i++) {
        if (!json_int(shape + 1 + i, 0, INT64_MAX, &t->shape[i]))
            TENSOR_DIE("shape: got other values, want whole numbers");
        if (__builtin_mul_overflow(t->bytes, (size_t)t->shape[i], &t->bytes))
            TENSOR_DIE("shape: got more bytes than can be counted");
    }
    int64_t from, to;
    if (!offsets || offsets->type != JSON_ARRAY || offsets->count != 2 ||
        !json_int(offsets + 1, 0, INT64_MAX, &from) || !json_int(offsets + 2, 0, INT64_MAX, &to))
        TENSOR_DIE("data_offsets: got other values, want two whole numbers");
    if (from > to || (size_t)to > end)
        TENSOR_DIE("data_offsets: got [%ld, %ld], want them inside the file's %zu bytes of data",
                   (long)from, (long)to, end);
    if ((size_t)(to - from) != t->bytes)
        TENSOR_DIE("data_offsets: got %ld bytes, want %zu for its dtype and shape",
                   (long)(to - from), t->bytes);
    t->data = f->map + (f->size - end) + from;
#undef TENSOR_DIE
}

static int by_data(const void *a, const void *b) {
    const Tensor *x = a, *y = b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);  // empty tensors first
}

// The format knows neither holes nor overlaps: sorted by place, each tensor begins where the last
// ended.
static void file_check_layout(const File *f, Tensor *tensors, size_t n, size_t end) {
    size_t at = 0;  // where the next one must begin; `end` is the size of the file's byte buffer
    qsort(tensors, n, sizeof *tensors, by_data);
    for (size_t i = 0; i < n; at += tensors[i++].bytes) {
        size_t begin = tensors[i].data - (f->map + f->size - end);
        if (begin != at)
            die("%s: tensor %.*s: data_offsets: got a begin of %zu, want %zu: %s", f->name,
                (int)tensors[i].name.len, tensors[i].name.data, begin, at,
                begin < at ? "it overlaps another tensor" : "there is a hole before it");
    }
    if (at != end) die("%s: got %zu bytes of data, want the %zu of its tensors", f->name, end, at);
}

// Reads a file's header. With an index a tensor counts only in the file that the index names.
static void file_open(Checkpoint *c, File *f, bool indexed) {
    file_map(c, f);
    uint64_t len = 0;
    char err[256];
    memcpy(&len, f->map, 8);
    if (len > MAX_HEADER || len > f->size - 8)
        die("%s: header: got a length of %llu bytes, want at most %zu", f->name,
            (unsigned long long)len, f->size - 8 < MAX_HEADER ? f->size - 8 : (size_t)MAX_HEADER);
    f->header = xmalloc(len + 1);
    memcpy(f->header, f->map + 8, len);
    Json *root = json_parse(f->header, len, err, sizeof err);
    if (!root) die("%s: header: %s", f->name, err);
    if (root->type != JSON_OBJECT)
        die("%s: header: got %s, want an object", f->name, json_type_name(root));
    const Json *twice = json_duplicate_key(root);
    if (twice)
        die("%s: tensor %.*s: stands twice in the header", f->name, (int)twice->string.len,
            twice->string.data);
    if (!indexed) checkpoint_reserve(c, root->count);
    Tensor *tensors = xcalloc(root->count + 1, sizeof *tensors);
    size_t n = 0, end = f->size - 8 - len;
    const Json *key = root + 1;
    for (uint32_t i = 0; i < root->count; i++, key = json_next(key + 1)) {
        if (str_equal(key->string, "__metadata__")) continue;
        Tensor *t = &tensors[n++];
        t->name = key->string;
        tensor_parse(t, f, key + 1, end);
        t->file = f;
        Tensor *slot = checkpoint_slot(c, t->name);
        if (!indexed || slot->file == f) *slot = *t;
    }
    file_check_layout(f, tensors, n, end);
    free(tensors);
    free(root);
}

// Takes names and file names from model.safetensors.index.json. False where there is none.
static bool index_read(Checkpoint *c) {
    char *path = format_string("%s/model.safetensors.index.json", c->dir);
    Json *root = json_load(&c->index_text, path, true);
    if (!root) return free(path), false;
    const Json *map = json_want(path, root, "weight_map", JSON_OBJECT);
    checkpoint_reserve(c, map->count);
    c->files = xcalloc(map->count + 1, sizeof *c->files);
    const Json *key = map + 1;
    File *f = c->files;  // neighbours mostly lie in one file
    for (uint32_t i = 0; i < map->count; i++, key = json_next(key + 1)) {
        if (key[1].type != JSON_STRING)
            die("%s: weight_map: %.*s: got %s, want a file name", path, (int)key->string.len,
                key->string.data, json_type_name(key + 1));
        Str name = key[1].string;
        if (memchr(name.data, '/', name.len) || memchr(name.data, 0, name.len))
            die("%s: weight_map: %.*s: want a plain file name", path, (int)key->string.len,
                key->string.data);
        if (!f->name || !str_equal(name, f->name))
            for (f = c->files; f->name && !str_equal(name, f->name);) f++;
        if (!f->name) f->name = format_string("%.*s", (int)name.len, name.data), c->n_files++;
        Tensor *slot = checkpoint_slot(c, key->string);
        if (slot->file)
            die("%s: weight_map: %.*s: stands twice", path, (int)key->string.len, key->string.data);
        *slot = (Tensor){.name = key->string, .file = f};
    }
    free(root);
    free(path);
    return true;
}

Checkpoint *checkpoint_open(const char *dir, bool dummy) {
    Checkpoint *c = xcalloc(1, sizeof *c);
    *c = (Checkpoint){.dir = dir, .dummy = dummy, .mutex = PTHREAD_MUTEX_INITIALIZER};
    if (dummy) return c;
    bool indexed = index_read(c);
    if (!indexed) {
        c->files = xcalloc(1, sizeof *c->files);
        c->files[0].name = format_string("model.safetensors");
        c->n_files = 1;
    }
    for (int i = 0; i < c->n_files; i++) file_open(c, &c->files[i], indexed);
    for (size_t i = 0; i < c->n_slots; i++)
        if (c->slots[i].file && !c->slots[i].data)
            die("tensor %.*s: the index says that it is in %s, which does not hold it",
                (int)c->slots[i].name.len, c->slots[i].name.data, c->slots[i].file->name);
    return c;
}

void checkpoint_close(Checkpoint *c) {
    if (!c) return;
    for (Made *made = c->made, *next; made; made = next) next = made->next, free(made);
    for (int i = 0; i < c->n_files; i++) {
        munmap((void *)c->files[i].map, c->files[i].size);
        free(c->files[i].name);
        free(c->files[i].header);
    }
    free(c->files);
    free(c->slots);
    free(c->index_text);
    free(c);
}

// ---- Reading: each byte once, for all ranks of a node -------------------------------------------
// What a GPU wants is not copied out of the maps: page faults are slow, and a file that is cut
// meanwhile would end in a signal. Instead each rank says which spans of the maps it wants. They
// are sorted and cut into pieces, which threads read past the page cache into a ring of buffers,
// and every rank goes through the pieces in the files' order and takes what it wants. So what
// several ranks want leaves the disk once, and no order of tensors has to be agreed on.

enum { READERS = 16 };     // requests in flight

typedef struct { const uint8_t *from, *end; } Span;

static struct {
    Checkpoint *_Atomic files;
    pthread_mutex_t mutex;
    pthread_cond_t change;
    Span *spans;            // of all ranks
    size_t n_spans;
    Piece *pieces;          // NULL: not all ranks have come
    int n_pieces, next;     // next: the first one that no thread has taken
    uint8_t *ring;          // piece i is read into buffer i mod READ_AHEAD
    int ranks;              // that have come and not left
    bool cached;            // a file system refused O_DIRECT
    double start;
    pthread_t thread[READERS];
} reading = {.mutex = PTHREAD_MUTEX_INITIALIZER, .change = PTHREAD_COND_INITIALIZER};

static File *file_of(const uint8_t *p) {  // in whose map it lies, or NULL
    Checkpoint *c = reading.files;
    for (int i = 0; c && i < c->n_files; i++)
        if (p >= c->files[i].map && p < c->files[i].map + c->files[i].size) return &c->files[i];
    return NULL;
}

bool reading_want(const uint8_t *from, size_t bytes) {
    if (!file_of(from)) return false;
    pthread_mutex_lock(&reading.mutex);
    if (!reading.n_spans) reading.start = now_seconds();
    reading.spans = xrealloc(reading.spans, (reading.n_spans + 1) * sizeof *reading.spans);
    reading.spans[reading.n_spans++] = (Span){from, from + bytes};
    pthread_mutex_unlock(&reading.mutex);
    return true;
}

static int by_from(const void *a, const void *b) {
    const Span *x = a, *y = b;
    return (x->from > y->from) - (x->from < y->from);
}

// What of a span no piece has yet goes on the last one, where that has room and ends near enough.
static void pieces_cut(int n_local) {
    enum { NEAR = 8 * SECTOR };
    const File *f = NULL;
    Piece *p = NULL;
    qsort(reading.spans, reading.n_spans, sizeof *reading.spans, by_from);
    for (const Span *s = reading.spans; s < reading.spans + reading.n_spans; s++) {
        const uint8_t *at = p && p->end > s->from ? p->end : s->from;
        for (; at < s->end; at = p->from + PIECE_BYTES) {
            const uint8_t *full = p ? p->from + PIECE_BYTES : NULL;
            if (at >= full || at > p->end + NEAR || at >= f->map + f->size) {
                reading.pieces = xrealloc(reading.pieces, (reading.n_pieces + 1) * sizeof *p);
                f = file_of(at), p = &reading.pieces[reading.n_pieces++];
                *p = (Piece){.from = at - (at - f->map) % SECTOR, .left = n_local};
            }
            p->end = s->end < p->from + PIECE_BYTES ? s->end : p->from + PIECE_BYTES;
        }
    }
}

// With the sector behind it, so that a value across two pieces' border is whole in the first.
static void piece_read(const Piece *p, uint8_t *to) {
    const File *f = file_of(p->from);
    size_t offset = p->from - f->map, bytes = p->end - p->from + SECTOR, done = 0;
    if (bytes > f->size - offset) bytes = f->size - offset;
    size_t asked = (bytes + SECTOR - 1) / SECTOR * SECTOR;
    for (bool direct = true; done < bytes;) {
        ssize_t n = pread(f->fd, to + done, asked - done, offset + done);
        if (n > 0) done += n;
        else if (n < 0 && errno == EINVAL && direct) direct = fcntl(f->fd, F_SETFL, 0) != 0;
        else if (n == 0 || errno != EINTR)
            die("%s/%s: reading weights at byte %zu of %zu: %s", reading.files->dir, f->name,
                offset + done, f->size, n ? strerror(errno) : "the file ends here now");
    }
}

static void *reader_main(void *unused) {
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&reading.mutex);
        int i = reading.next++;
        while (i < reading.n_pieces && i >= READ_AHEAD && reading.pieces[i - READ_AHEAD].left)
            pthread_cond_wait(&reading.change, &reading.mutex);
        pthread_mutex_unlock(&reading.mutex);
        if (i >= reading.n_pieces) return NULL;
        uint8_t *to = reading.ring + (size_t)(i % READ_AHEAD) * (PIECE_BYTES + SECTOR);
        piece_read(&reading.pieces[i], to);
        pthread_mutex_lock(&reading.mutex);
        reading.pieces[i].data = to;
        pthread_cond_broadcast(&reading.change);
        pthread_mutex_unlock(&reading.mutex);
    }
}

static void readers_start(void) {
    for (File *f = reading.files->files; f < reading.files->files + reading.files->n_files; f++) {
        char *path = format_string("%s/%s", reading.files->dir, f->name);
        f->fd = open(path, O_RDONLY | O_CLOEXEC);
        if (f->fd < 0) die("%s: %s", path, strerror(errno));
        reading.cached |= fcntl(f->fd, F_SETFL, O_DIRECT) != 0;
        free(path);
    }
    for (int i = 0; i < READERS; i++)
        if (pthread_create(&reading.thread[i], NULL, reader_main, NULL) != 0)
            die("can't start a thread that reads weights");
}

Piece *reading_begin(int *n, uint8_t *ring, int n_local) {
    pthread_mutex_lock(&reading.mutex);
    if (ring) reading.ring = ring;
    if (++reading.ranks == n_local) {
        pieces_cut(n_local);
        readers_start();
        pthread_cond_broadcast(&reading.change);
    }
    while (!reading.pieces) pthread_cond_wait(&reading.change, &reading.mutex);
    pthread_mutex_unlock(&reading.mutex);
    *n = reading.n_pieces;
    return reading.pieces;
}

const uint8_t *reading_wait(const Piece *p) {
    pthread_mutex_lock(&reading.mutex);
    while (!p->data) pthread_cond_wait(&reading.change, &reading.mutex);
    pthread_mutex_unlock(&reading.mutex);
    return p->data;
}

void reading_release(void *piece) {
    pthread_mutex_lock(&reading.mutex);
    if (!--((Piece *)piece)->left) pthread_cond_broadcast(&reading.change);
    pthread_mutex_unlock(&reading.mutex);
}

uint8_t *reading_end(void) {
    pthread_mutex_lock(&reading.mutex);
    bool last = !--reading.ranks;
    pthread_mutex_unlock(&reading.mutex);
    if (!last) return NULL;
    double bytes = 0, seconds = now_seconds() - reading.start;
    for (int i = 0; i < READERS; i++) pthread_join(reading.thread[i], NULL);
    for (int i = 0; i < reading.files->n_files; i++) close(reading.files->files[i].fd);
    for (int i = 0; i < reading.n_pieces; i++)
        bytes += reading.pieces[i].end - reading.pieces[i].from;
    log_line(server.node * server.n_local, "Load weight: read %.2f GB in %.2f s, %.2f GB/s%s",
             bytes / 1e9, seconds, bytes / 1e9 / seconds,
             reading.cached ? ", through the page cache" : "");
    free(reading.spans), free(reading.pieces);
    reading.spans = NULL, reading.pieces = NULL, reading.n_spans = 0;
    reading.n_pieces = reading.next = 0, reading.cached = false;
    return reading.ring;
}

// ---- Dummy weights: any geometry without its 688 GB ---------------------------------------------
// A value is a pure function of the tensor's name and the element's index, so that every twin and
// every rank makes the same ones. They are spread like trained weights: normal, at a scale that
// keeps activations near 1 through all layers, with no NaN code and a router that uses all its
// experts.

// The i-th of 4,096 equally likely values of the standard normal distribution, by bisection.
static double normal_quantile(int i) {
    double p = (i + 0.5) / DUMMY_VALUES, low = -8, high = 8;
    for (int k = 0; k < 60; k++) {
        double middle = (low + high) / 2;
        if (0.5 * erfc(-middle / sqrt(2)) < p) low = middle;
        else high = middle;
    }
    return (low + high) / 2;
}

static double e4m3_size(int code) {  // of the codes 0..0x7e
    return code < 8 ? ldexp(code, -9) : ldexp(8 + (code & 7), (code >> 3) - 10);
}

static uint8_t e4m3_nearest(double v) {
    int best = 0;
    for (int code = 1; code < 0x7f; code++)
        if (fabs(e4m3_size(code) - fabs(v)) < fabs(e4m3_size(best) - fabs(v))) best = code;
    return v < 0 ? best | 0x80 : best;
}

// Of the codes: the largest of a block is then near 448, as quantisers leave it.
#define DUMMY_SIGMA 112.0

typedef enum { CODES, SCALES, MATRIX, TABLE, GAINS, BIAS } DummyKind;

// The 4,096 different values of a kind's element, as its dtype. A matrix' row has length 1, so that
// it keeps what it makes near 1; an embedding's elements are near 1.
static void dummy_values(uint8_t *data, DummyKind kind, int64_t columns) {
    for (int i = 0; i < DUMMY_VALUES; i++) {
        float normal = normal_quantile(i), uniform = 0.75 + 0.5 * i / DUMMY_VALUES, v;
        if (kind == SCALES) v = uniform / (DUMMY_SIGMA * sqrt(columns * BLOCK));
        else if (kind == GAINS) v = 1 + 0.1 * normal;
        else v = kind == BIAS ? 0.01 * normal : kind == TABLE ? normal : normal / sqrt(columns);
        uint32_t bits;
        memcpy(&bits, &v, sizeof bits);
        uint16_t half = bits >> 16;
        if (kind == CODES) data[i] = e4m3_nearest(normal * DUMMY_SIGMA);
        else if (kind == SCALES) memcpy(data + 4 * i, &v, sizeof v);
        else memcpy(data + 2 * i, &half, sizeof half);
    }
}

static DummyKind dummy_kind(const Tensor *t) {
    if (str_equal(t->dtype, "F8_E4M3")) return CODES;
    if (strstr(t->name.data, "_scale_inv")) return SCALES;
    if (strstr(t->name.data, "_bias")) return BIAS;
    return t->rank == 1 ? GAINS : strstr(t->name.data, "embed_tokens") ? TABLE : MATRIX;
}

static uint8_t *made_new(Checkpoint *c, int kind, int64_t columns, size_t bytes) {
    Made *made = xmalloc(sizeof *made + bytes);
    made->kind = kind, made->columns = columns, made->next = c->made, c->made = made;
    return made->data;
}

// How a tensor that t describes is made up. What tensors share is made once, vectors at once.
static Dummy dummy_bind(Checkpoint *c, Tensor *t) {
    DummyKind kind = dummy_kind(t);
    int64_t columns = kind == SCALES || kind == MATRIX ? t->shape[1] : 0;
    size_t size = dtype_size(t->dtype);
    pthread_mutex_lock(&c->mutex);
    const Made *made = c->made;
    while (made && (made->kind != (int)kind || made->columns != columns)) made = made->next;
    uint8_t *value = made ? (uint8_t *)made->data
                          : made_new(c, kind, columns, DUMMY_VALUES * size), *vector;
    if (!made) dummy_values(value, kind, columns);
    Dummy d = {value, hash_bytes(t->name.data, t->name.len), 0, t->shape[t->rank - 1]};
    if (t->rank == 1) {
        t->data = vector = made_new(c, -1, 0, t->bytes);
        for (int64_t i = 0; i < t->shape[0]; i++)
            memcpy(vector + size * i, value + size * dummy_index(&d, 0, i), size);
    }
    pthread_mutex_unlock(&c->mutex);
    return d;
}

// ---- The weights table: which tensor fills which field ------------------------------------------

typedef enum {
    QUANTISED,  // [out][in]: F8_E4M3 with a scale tensor; BF16 where nothing is quantised
    PLAIN,      // [out][in]: BF16, or F32 as some copies store the router
    VECTOR,     // [out]: BF16, or F32
} Kind;

// What of a matrix a rank has. A product that is cut along `out` gives each rank some columns of
// the result; the next one, cut along `in`, takes just these, and the ranks' results are summed.
// So attention and MLP need one all_reduce each. (Megatron-LM, section 3; model.py
// ColumnParallelLinear and RowParallelLinear)
typedef enum { WHOLE, OUT, IN } Split;

typedef struct {
    const char *name;  // behind the prefix; a quantised one's ".weight" is added
    Kind kind;
    void *field;       // Linear *, or Vector *
    int out, in;
    Split split;
} Weight;

typedef struct {  // what a rank binds from and for
    Checkpoint *files;
    const Config *config;   // of the whole model
    int rank, size;
} Binding;

// "[256, 128]", malloc'ed, for die().
static const char *shape_text(int rank, const int64_t *shape) {
    Buf b = {0};
    for (int i = 0; i < rank; i++) buf_printf(&b, "%s%ld", i ? ", " : "[", (long)shape[i]);
    buf_str(&b, rank ? "]" : "[]");
    return b.data;
}

// A tensor by its name, with one of two dtypes (the second may be NULL) and shape [out] or
// [out][in]. A dummy one has the first, and no data but a vector's; *dummy says how it is made.
static Tensor checkpoint_find(Checkpoint *c, Dummy *dummy, const char *name, const char *dtype,
                              const char *other, int rank, int64_t out, int64_t in) {
    int64_t shape[2] = {out, in};
    if (c->dummy) {
        Tensor t = {.name = {name, strlen(name)}, .dtype = {dtype, strlen(dtype)}, .rank = rank,
                    .shape = {out, in}};
        t.bytes = (rank == 1 ? out : out * in) * dtype_size(t.dtype);
        *dummy = dummy_bind(c, &t);
        return t;
    }
    Tensor *t = checkpoint_slot(c, (Str){name, strlen(name)});
    if (!t->file)
        die("%s: tensor %s: missing, want %s %s", c->dir, name, dtype, shape_text(rank, shape));
    bool fits = t->rank == rank && t->shape[0] == out && (rank == 1 || t->shape[1] == in);
    if (!fits || !(str_equal(t->dtype, dtype) || (other && str_equal(t->dtype, other))))
        die("%s: tensor %s: got %.*s %s, want %s%s%s %s", t->file->name, name, (int)t->dtype.len,
            t->dtype.data, shape_text(t->rank, t->shape), dtype, other ? " or " : "",
            other ? other : "", shape_text(rank, shape));
    t->used = true;
    return *t;
}

// Where in a tensor that lies in a file, or is a dummy, a part with this first element is.
static const uint8_t *part_data(const Tensor *t, Dummy *dummy, size_t first) {
    dummy->origin = first;
    return t->data ? t->data + first * dtype_size(t->dtype) : NULL;
}

// Fills w's field with this rank's part of its tensor, and a quantised one's scale with that of the
// tensor beside it. Like all of its kind it returns the bytes of what was bound.
static size_t weight_bind(const Binding *b, const char *prefix, const Weight *w) {
    bool fp8 = w->kind == QUANTISED && b->config->fp8;
    const char *dtype = fp8 ? "F8_E4M3" : "BF16", *other = w->kind == QUANTISED ? NULL : "F32";
    char *name = format_string("%s%s%s", prefix, w->name, w->kind == QUANTISED ? ".weight" : "");
    Dummy dummy = {0};
    Tensor t = checkpoint_find(b->files, &dummy, name, dtype, other, w->kind == VECTOR ? 1 : 2,
                               w->out, w->in);
    DType got = str_equal(t.dtype, "F32") ? DTYPE_F32 : fp8 ? DTYPE_F8_E4M3 : DTYPE_BF16;
    free(name);
    if (w->kind == VECTOR) {
        *(Vector *)w->field = (Vector){w->out, got, t.data};
        return t.bytes;
    }
    Linear *l = w->field;
    int out = w->split == OUT ? w->out / b->size : w->out;
    int in = w->split == IN ? w->in / b->size : w->in;
    size_t row = w->split == OUT ? (size_t)b->rank * out : 0;
    size_t column = w->split == IN ? (size_t)b->rank * in : 0;
    const uint8_t *data = part_data(&t, &dummy, row * w->in + column);
    *l = (Linear){out, in, got, data, NULL, w->in - in, {dummy}};
    size_t bytes = (size_t)out * in * dtype_size(t.dtype), blocks = w->in / BLOCK;
    if (!fp8) return bytes;
    name = format_string("%s%s.weight_scale_inv", prefix, w->name);  // perhaps in another file
    int height = (w->out + BLOCK - 1) / BLOCK;
    t = checkpoint_find(b->files, &l->dummy[1], name, "F32", NULL, 2, height, blocks);
    l->scale = part_data(&t, &l->dummy[1], row / BLOCK * blocks + column / BLOCK);
    free(name);
    return bytes + (size_t)((out + BLOCK - 1) / BLOCK) * (in / BLOCK) * sizeof(float);
}

static size_t weights_bind(const Binding *b, const char *prefix, const Weight *w, size_t n) {
    size_t bytes = 0;
    for (size_t i = 0; i < n; i++) bytes += weight_bind(b, prefix, &w[i]);
    return bytes;
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

static size_t mlp_bind(const Binding *b, const char *prefix, Mlp *m, int width) {
    int hidden = b->config->hidden_size;
    const Weight table[] = {
        {"gate_proj", QUANTISED, &m->gate_proj, width, hidden, OUT},
        {"up_proj", QUANTISED, &m->up_proj, width, hidden, OUT},
        {"down_proj", QUANTISED, &m->down_proj, hidden, width, IN},
    };
    return weights_bind(b, prefix, table, COUNT(table));
}

// The router, the routed experts by number, and the shared one, whose names differ only in a
// prefix.
static size_t moe_bind(const Binding *b, const char *prefix, Layer *l) {
    const Config *config = b->config;
    const Weight table[] = {
        {"gate.weight", PLAIN, &l->moe_mlp.gate, config->n_routed_experts, config->hidden_size,
         WHOLE},
        {"gate.e_score_correction_bias", VECTOR, &l->moe_mlp.e_score_correction_bias,
         config->n_routed_experts, 0, WHOLE},
    };
    size_t bytes = weights_bind(b, prefix, table, COUNT(table));
    l->moe_mlp.experts = xcalloc(config->n_routed_experts, sizeof *l->moe_mlp.experts);
    for (int e = 0; e <= config->n_routed_experts; e++) {
        bool shared = e == config->n_routed_experts;
        char *name = shared ? format_string("%sshared_experts.", prefix)
                            : format_string("%sexperts.%d.", prefix, e);
        bytes += mlp_bind(b, name, shared ? &l->moe_mlp.shared_experts : &l->moe_mlp.experts[e],
                          config->moe_intermediate_size);
        free(name);
    }
    return bytes;
}

// Layer num_hidden_layers is the multi-token one: a whole layer and six tensors more. It is checked
// like the others; no step uses it yet.
static size_t layer_bind(const Binding *b, int i, Layer *l) {
    const Config *config = b->config;
    int hidden = config->hidden_size, heads = config->num_attention_heads;
    int q_lora = config->q_lora_rank, vocab = config->vocab_size;
    const Weight table[] = {
        {"input_layernorm.weight", VECTOR, &l->input_layernorm, hidden, 0, WHOLE},
        {"self_attn.q_a_proj", QUANTISED, &l->self_attn.q_a_proj, q_lora, hidden, WHOLE},
        {"self_attn.q_a_layernorm.weight", VECTOR, &l->self_attn.q_a_layernorm, q_lora, 0, WHOLE},
        {"self_attn.q_b_proj", QUANTISED, &l->self_attn.q_b_proj, heads * QK_DIM, q_lora, OUT},
        {"self_attn.kv_a_proj_with_mqa", QUANTISED, &l->self_attn.kv_a_proj_with_mqa, CACHE_DIM,
         hidden, WHOLE},
        {"self_attn.kv_a_layernorm.weight", VECTOR, &l->self_attn.kv_a_layernorm, LATENT_DIM, 0,
         WHOLE},
        {"self_attn.kv_b_proj", QUANTISED, &l->self_attn.kv_b_proj, heads * KV_DIM, LATENT_DIM,
         OUT},
        {"self_attn.o_proj", QUANTISED, &l->self_attn.o_proj, hidden, heads * V_DIM, IN},
        {"post_attention_layernorm.weight", VECTOR, &l->post_attention_layernorm, hidden, 0, WHOLE},
    };
    const Weight mtp[] = {
        {"enorm.weight", VECTOR, &l->mtp.enorm, hidden, 0, WHOLE},
        {"hnorm.weight", VECTOR, &l->mtp.hnorm, hidden, 0, WHOLE},
        {"eh_proj.weight", PLAIN, &l->mtp.eh_proj, hidden, 2 * hidden, WHOLE},
        {"embed_tokens.weight", PLAIN, &l->mtp.embed_tokens, vocab, hidden, OUT},
        {"shared_head.norm.weight", VECTOR, &l->mtp.shared_head_norm, hidden, 0, WHOLE},
        {"shared_head.head.weight", PLAIN, &l->mtp.shared_head, vocab, hidden, OUT},
    };
    char *prefix = format_string("model.layers.%d.", i),
         *mlp_prefix = format_string("%smlp.", prefix);
    size_t bytes = weights_bind(b, prefix, table, COUNT(table));
    l->moe = i >= config->first_k_dense_replace;
    if (l->moe) bytes += moe_bind(b, mlp_prefix, l);
    else bytes += mlp_bind(b, mlp_prefix, &l->mlp, config->intermediate_size);
    if (i >= config->num_hidden_layers) bytes += weights_bind(b, prefix, mtp, COUNT(mtp));
    free(prefix);
    free(mlp_prefix);
    return bytes;
}

// Takes a layer's weights to the device; those of the multi-token part stay where they are.
static size_t layer_place(Layer *l, int n_experts) {
    Vector *vectors[] = {&l->input_layernorm, &l->post_attention_layernorm,
                         &l->self_attn.q_a_layernorm, &l->self_attn.kv_a_layernorm};
    Linear *matrices[] = {&l->self_attn.q_a_proj, &l->self_attn.q_b_proj,
                          &l->self_attn.kv_a_proj_with_mqa, &l->self_attn.o_proj};
    size_t bytes = place_linear(&l->self_attn.kv_b_proj, PLACE_KV_B);
    for (size_t i = 0; i < COUNT(vectors); i++) bytes += place_vector(vectors[i]);
    for (size_t i = 0; i < COUNT(matrices); i++) bytes += place_linear(matrices[i], PLACE_MATRIX);
    if (!l->moe) return bytes + place_mlp(&l->mlp, 1, NULL);
    bytes += place_linear(&l->moe_mlp.gate, PLACE_MATRIX);
    bytes += place_vector(&l->moe_mlp.e_score_correction_bias);
    return bytes + place_mlp(l->moe_mlp.experts, n_experts, &l->moe_mlp.shared_experts);
}

// Counts n loaded bytes; rank 0 tells how it goes, every few seconds.
static void progress_add(Progress *p, size_t n, double start, double *reported) {
    enum { REPORT = 5 };  // seconds
    double now = now_seconds(), done = p->loaded_bytes += n, total = p->total_bytes;
    int first = server.node * server.n_local, slowest = rank_slowest(0, server.n_ranks);
    if (now - *reported < REPORT || p != &server.ranks[first].progress) return;
    *reported = now;
    double speed = done / (now - start);
    log_line(first, "Load weight: %.1f %%, %.1f of %.1f GB, %.2f GB/s, %.0f s left; slowest rank "
             "%d at %.1f %%", 100 * done / total, done / 1e9, total / 1e9, speed / 1e9,
             (total - done) / speed, slowest, 100 * rank_loaded(slowest));
}

// What else takes memory of a GPU: recorded steps, NCCL's buffers, those of the loader.
static const double GPU_RESERVE = 3e9;

// ==== One layer, one step ========================================================================
// A step takes n rows, each one token at one position of one sequence, and needs no more than the
// cache of the positions before. Rows of many sequences, decoding and prefilling, stand side by
// side. After model_step the rows' latents are in the cache and the wanted rows' logits in
// m->logits.

// Inverse frequencies of the 32 rotary pairs: fast ones as trained, slow ones stretched by
// `factor`, with a ramp between. (YaRN, Peng et al. 2023; model.py precompute_freqs_cis)
static void yarn(Model *m) {
    const Config *c = &m->config;
    double range = c->rope_scaling.original_max_position_embeddings, log_base = log(c->rope_theta);
    double fast = ROPE_DIM * log(range / (c->rope_scaling.beta_fast * 2 * M_PI)) / (2 * log_base);
    double slow = ROPE_DIM * log(range / (c->rope_scaling.beta_slow * 2 * M_PI)) / (2 * log_base);
    double low = fmax(floor(fast), 0), high = fmin(ceil(slow), ROPE_DIM - 1);
    if (low == high) high += 0.001;
    for (int i = 0; i < ROPE_DIM / 2; i++) {
        double extrapolated = pow(c->rope_theta, -2.0 * i / ROPE_DIM);
        double ramp = fmin(fmax((i - low) / (high - low), 0), 1);
        m->inv_freq[i] = extrapolated / c->rope_scaling.factor * ramp + extrapolated * (1 - ramp);
    }
    double mscale = 0.1 * c->rope_scaling.mscale_all_dim * log(c->rope_scaling.factor) + 1;
    m->softmax_scale = mscale * mscale / sqrt(QK_DIM);
}

// What the checkpoint has beyond what the config asks for is no error, but a line in the log: it
// may be a file of another model.
static void checkpoint_log_unused(const Checkpoint *c) {
    size_t unused = 0;
    Str first = {0};
    for (size_t i = 0; i < c->n_slots; i++)
        if (c->slots[i].file && !c->slots[i].used && !unused++) first = c->slots[i].name;
    if (unused)
        log_line(0, "%zu tensors of the checkpoint have no place in this model, the first is %.*s",
                 unused, (int)first.len, first.data);
}

// Binds every tensor that the config asks for, so that all are checked before one is read, and
// places this rank's part of those that a step uses.
static void model_bind(Model *m, Checkpoint *files, const Config *c, Progress *p) {
    const Weight table[] = {
        {"model.embed_tokens.weight", PLAIN, &m->embed_tokens, c->vocab_size, c->hidden_size, OUT},
        {"model.norm.weight", VECTOR, &m->norm, c->hidden_size, 0, WHOLE},
        {"lm_head.weight", PLAIN, &m->lm_head, c->vocab_size, c->hidden_size, OUT},
    };
    const Binding b = {files, c, m->rank, m->size};
    size_t bytes = weights_bind(&b, "", table, COUNT(table));
    int layers = c->num_hidden_layers + c->num_nextn_predict_layers;
    m->layers = xcalloc(layers, sizeof *m->layers);
    for (int i = 0; i < layers; i++) {
        size_t n = layer_bind(&b, i, &m->layers[i]);
        bytes += i < c->num_hidden_layers ? n : 0;
    }
    p->total_bytes = bytes;
    if (!m->rank) checkpoint_log_unused(files);
    double start = now_seconds(), reported = start;
    reading.files = files;
    size_t n = place_linear(&m->embed_tokens, PLACE_TABLE) +
               place_linear(&m->lm_head, PLACE_MATRIX) + place_vector(&m->norm);
    progress_add(p, n, start, &reported);
    for (int i = 0; i < c->num_hidden_layers; i++)
        progress_add(p, layer_place(&m->layers[i], c->n_routed_experts), start, &reported);
    for (size_t more; (more = place_next());) progress_add(p, more, start, &reported);
}

Model *model_load(const Config *config, Checkpoint *files, int rank, int size, int max_rows,
                  int max_out, int n_pages, Progress *p) {
    Model *m = xcalloc(1, sizeof *m);
    Progress unwatched = {0};
    m->config = *config, m->rank = rank, m->size = size;
    Config *c = &m->config;
    c->num_attention_heads /= size;
    c->intermediate_size /= size, c->moe_intermediate_size /= size;
    model_bind(m, files, config, p ? p : &unwatched);
    yarn(m);
    size_t rows = max_rows, half = sizeof(bf16);
    size_t logits = (size_t)max_out * c->vocab_size * sizeof(float);
    int heads = c->num_attention_heads, k = c->num_experts_per_tok;
    m->max_rows = max_rows, m->max_out = max_out;
    m->cache = xcalloc(c->num_hidden_layers, sizeof *m->cache);
    for (int i = 0; i < c->num_hidden_layers; i++)
        m->cache[i] = device_alloc((size_t)n_pages * PAGE * CACHE_DIM * half);
    m->rope = device_alloc(rows * ROPE_DIM * sizeof(float));
    m->logits = rank ? NULL : device_alloc(logits);
    m->part = size == 1 ? NULL : device_alloc(rank ? logits / size : logits);
    m->x = device_alloc(rows * c->hidden_size * half);
    m->y = device_alloc(rows * c->hidden_size * half);
    m->q_a = device_alloc(rows * c->q_lora_rank * half);
    m->kv_a = device_alloc(rows * CACHE_DIM * half);
    m->q = device_alloc(rows * heads * QK_DIM * half);
    m->query = device_alloc(rows * heads * CACHE_DIM * half);
    m->u = device_alloc(rows * heads * LATENT_DIM * half);
    m->normed = act_new(max_rows, c->hidden_size);
    m->q_latent = act_new(max_rows, c->q_lora_rank);
    m->heads_out = act_new(max_rows, heads * V_DIM);
    m->dense_hidden = act_new(max_rows, c->intermediate_size);
    m->expert_hidden = act_new(max_rows * (k + 1), c->moe_intermediate_size);
    m->routing = routing_new(max_rows, c);
    step_reserve(max_rows, c);
    return m;
}

typedef struct {            // of a rank's memory, in bytes
    double room, weights, steps, logits, reserve, pool;  // room: all of it; pool: the cache
    int rows, tokens;       // of a step; that the pool holds, in whole pages
} MemoryPlan;

// Of a rank's part of the weights on a GPU. They are as in the checkpoint, but for kv_b_proj, whose
// halves are bf16 there, and for vectors, which are too small to count.
static double weights_plan(const Config *c, int size) {
    Checkpoint *none = checkpoint_open("", true);
    const Binding b = {none, c, 0, size};
    int layers = c->num_hidden_layers, dense = c->first_k_dense_replace;
    Layer first = {0}, last = {0};
    double bytes = (2.0 * c->vocab_size / size + 1) * c->hidden_size * 2;
    if (dense) bytes += dense * (double)layer_bind(&b, 0, &first);
    if (dense < layers) bytes += (layers - dense) * (double)layer_bind(&b, layers - 1, &last);
    free(last.moe_mlp.experts);
    checkpoint_close(none);
    return bytes + (double)layers * c->num_attention_heads / size * KV_DIM * LATENT_DIM;
}

// What model_load takes of a GPU for rank 0: its part of the weights, and all that a step writes;
// and what then is left of `room` bytes for the cache. With step_reserve of kernels.cu.
static MemoryPlan memory_plan(const Config *c, int size, int max_rows, int max_out, double room) {
    // A tile for each multiprocessor, see products_room; two attended tiles' sums, see mla_reserve.
    enum { SMS = 132, PARTS = SMS * 128 * 128, FEW = 256, SUMS = 2 * SMS * 64 * (LATENT_DIM + 2) };
    double rows = max_rows, few = fmin(rows, FEW), k = c->num_experts_per_tok, slots = k + 1;
    double heads = c->num_attention_heads / size, hidden = c->hidden_size;
    double width = c->intermediate_size / size, expert = c->moe_intermediate_size / size;
    double act = 3 + (double)sizeof(float) / BLOCK;  // of a column: bf16, e4m3, its scale
    double bytes = act * (hidden + c->q_lora_rank + heads * V_DIM + width + slots * expert) +
                   2 * (2 * hidden + c->q_lora_rank + CACHE_DIM) +
                   2 * heads * (QK_DIM + CACHE_DIM + LATENT_DIM) + 4 * (ROPE_DIM + 3 * k) +
                   4 * fmax(hidden, c->n_routed_experts);
    double products = fmax(fmax(PARTS, 2 * rows * width),
                           rows * slots + fmax(8 * few * slots * expert,
                                               rows * slots * fmax(2 * expert, hidden / 2)));
    double logits = 4.0 * max_out * c->vocab_size * (size > 1 ? 2 : 1);
    double steps = rows * bytes + 4 * (products + SUMS), weights = weights_plan(c, size);
    double pool = room - weights - steps - logits - GPU_RESERVE;
    return (MemoryPlan){room, weights, steps, logits, GPU_RESERVE, pool, max_rows, 0};
}

static double cache_bytes(const Config *c) {  // of a token
    return (double)c->num_hidden_layers * CACHE_DIM * sizeof(bf16);
}

// Makes the pool what was asked for, in whole pages, of what p leaves for it: --max-total-tokens;
// or what --mem-fraction-static of all `memory` leaves beside the weights; or all that there is.
// False: it does not fit, or there is no room for a page.
static bool memory_divide(MemoryPlan *p, const Config *c, const Options *o, double memory) {
    double left = p->pool, row = cache_bytes(c), fraction = o->mem_fraction_static;
    double want = fraction > 0 ? fraction * memory - p->weights : left;
    if (o->max_total_tokens) want = o->max_total_tokens * row;
    p->tokens = (int)fmax(1, fmin(want / row / PAGE, 1 << 24)) * PAGE;
    p->pool = p->tokens * row;
    return want >= PAGE * row && want <= left;
}

static void memory_line(Buf *b, double bytes, const char *format, int n) {
    char text[64];
    snprintf(text, sizeof text, format, n);
    if (bytes) buf_printf(b, "%-30s%8.2f GB\n", text, bytes / 1e9);
}

// The table that plan prints and serve logs, and how many requests of some lengths fit at once.
static void memory_table(Buf *b, const MemoryPlan *p, const Config *c, int n_ranks, double unused,
                         int context_len, int most) {
    int lengths[] = {2000, 8192, context_len}, pages = p->tokens / PAGE, shown = 0;
    memory_line(b, p->weights, "weights", 0);
    memory_line(b, p->steps, "activations, %d rows", p->rows);
    memory_line(b, p->logits, "logits and sampling", 0);
    memory_line(b, p->reserve, "graphs, NCCL, the rest", 0);
    memory_line(b, p->pool, "KV cache", 0);
    b->len--;
    buf_printf(b, "   %d pages of %d tokens, %.0f bytes a token\n", pages, PAGE, cache_bytes(c));
    memory_line(b, unused, "free", 0);
    memory_line(b, p->room, n_ranks > 1 ? "total, each of %d ranks" : "total", n_ranks);
    buf_printf(b, "max_total_num_tokens=%d, context_len=%d; at once:", p->tokens, context_len);
    for (int i = 0; i < 3; i++) {
        int each = (lengths[i] + PAGE - 1) / PAGE, n = pages / each < most ? pages / each : most;
        if (lengths[i] > context_len || !n || (i < 2 && lengths[i] == context_len)) continue;
        buf_printf(b, "%s %d x %d", shown++ ? "," : "", n, lengths[i]);
    }
    buf_printf(b, "%s tokens\n", shown ? "" : " no request of 2000");
}

void model_free(Model *m) {
    if (!m) return;
    for (int i = 0; i < m->config.num_hidden_layers; i++) device_free(m->cache[i]);
    for (int i = 0; i < m->config.num_hidden_layers + m->config.num_nextn_predict_layers; i++)
        free(m->layers[i].moe_mlp.experts);
    void *device[] = {m->rope, m->logits, m->part, m->x, m->y, m->q_a, m->kv_a, m->q, m->query,
                      m->u};
    for (size_t i = 0; i < COUNT(device); i++) device_free(device[i]);
    Act *acts[] = {m->normed, m->q_latent, m->heads_out, m->dense_hidden, m->expert_hidden};
    for (size_t i = 0; i < COUNT(acts); i++) act_free(acts[i]);
    routing_free(&m->routing);
    place_free();
    free(m->cache);
    free(m->layers);
    free(m);
}

void model_embed(Model *m, const Batch *b) {
    embed(m->x, &m->embed_tokens, m->rank * m->embed_tokens.out, b->id, b->n);
    all_reduce(m->x, (size_t)b->n * m->config.hidden_size);
    rope_angles(m->rope, m->inv_freq, b->position, b->n);
}

// The residual stream is x. What a half of a layer adds, y, is added by the norm that follows it,
// which reads and writes x anyway; so x is complete only after the next add_norm.
void model_layer(Model *m, int layer, const Batch *b) {
    const Layer *l = &m->layers[layer];
    const Config *c = &m->config;
    float eps = c->rms_norm_eps;
    int n = b->n, heads = c->num_attention_heads;
    bf16 *cache = m->cache[layer];

    // Attention. All heads look at one latent of 512 + 64 numbers per token: that is all that is
    // cached.
    add_norm(m->x, m->normed, layer ? m->y : NULL, &l->input_layernorm, eps, n);
    linear_pair(m->q_a, m->kv_a, m->normed, &l->self_attn.q_a_proj,
                &l->self_attn.kv_a_proj_with_mqa, n);
    mla_latent(m->q_latent, cache, m->q_a, m->kv_a, &l->self_attn.q_a_layernorm,
               &l->self_attn.kv_a_layernorm, eps, m->rope, b);
    linear(m->q, m->q_latent, &l->self_attn.q_b_proj, n);
    mla_attention(m->heads_out, m->query, m->u, m->q, cache, &l->self_attn.kv_b_proj, m->rope,
                  m->softmax_scale, heads, b);
    linear(m->y, m->heads_out, &l->self_attn.o_proj, n);
    all_reduce(m->y, (size_t)n * c->hidden_size);

    // The MLP: a plain one in the first layers, then the 8 experts that the router chooses and a
    // shared one.
    add_norm(m->x, m->normed, m->y, &l->post_attention_layernorm, eps, n);
    if (l->moe) {
        moe_route(&m->routing, m->normed, &l->moe_mlp.gate, &l->moe_mlp.e_score_correction_bias, c,
                  n);
        moe_experts(m->y, m->expert_hidden, m->normed, &m->routing, l->moe_mlp.experts,
                    &l->moe_mlp.shared_experts, c, n);
    } else {
        mlp(m->y, m->dense_hidden, m->normed, &l->mlp, n);
    }
    all_reduce(m->y, (size_t)n * c->hidden_size);
}

// Each rank makes the logits of its part of the vocabulary.
static void logits_of(Model *m, const int *rows, int n) {
    float *part = m->size > 1 ? m->part : m->logits;
    logits(part, m->normed, &m->lm_head, rows, n);
    if (m->size > 1) all_gather(m->logits, part, m->lm_head.out, n);
}

void model_logits(Model *m, const Batch *b) {
    add_norm(m->x, m->normed, m->y, &m->norm, m->config.rms_norm_eps, b->n);
    int n = b->n_out < m->max_out ? b->n_out : m->max_out;
    logits_of(m, b->out, n);
}

void model_more_logits(Model *m, int first, int n) {
    assert(first + n <= m->batch.n_out && n <= m->max_out);
    logits_of(m, m->batch.out + first, n);
}

void model_step(Model *m, const Batch *b) {
    assert(b->n <= m->max_rows);
    if (step_begin(&m->batch, b)) {
        model_embed(m, &m->batch);
        for (int i = 0; i < m->config.num_hidden_layers; i++) model_layer(m, i, &m->batch);
        model_logits(m, &m->batch);
    }
    step_end();
}

Server server = {.wake_fd = -1};

// ==== Ranks ======================================================================================
// R1 is too large for one GPU, so a group of ranks shares it: each one holds a part of every large
// matrix, all take the same steps with the same rows, and twice a layer they sum what they have
// (model_layer). A rank is a thread; what all of them do next is an order, which rank 0's thread
// gives, the engine's.

typedef struct {
    enum { ORDER_JOIN, ORDER_STEP, ORDER_MORE_LOGITS, ORDER_END } kind;
    Batch batch;            // of a step
    int first, n;           // of model_more_logits
} Order;

// ---- The threads of a node

static struct {
    Group group;            // its first rank's
    Checkpoint *files;
    int max_rows, max_out, n_pages;
    Model **model;          // [n_local]
    pthread_t *thread;      // [n_local] but for the first, which gives the orders
    pthread_mutex_t mutex;
    pthread_cond_t change;
    const Order *order;     // the last one
    unsigned given;         // how many there were
    int busy;               // ranks that have not done it
} ranks = {.group = {.size = 1, .n_local = 1},
           .mutex = PTHREAD_MUTEX_INITIALIZER,
           .change = PTHREAD_COND_INITIALIZER};

static void rank_load(int local) {
    const Group *g = &ranks.group;
    int rank = g->rank + local;
    device_init(local, g->n_local);
    ranks.model[local] = model_load(&server.config, ranks.files, rank, g->size, ranks.max_rows,
                                    ranks.max_out, ranks.n_pages, &server.ranks[rank].progress);
}

static void rank_obey(int local, const Order *o) {
    Model *m = ranks.model[local];
    Group g = ranks.group;
    g.rank += local, g.local = local;
    switch (o->kind) {
    case ORDER_JOIN: if (g.size > 1) group_join(&g); break;
    case ORDER_STEP: model_step(m, &o->batch); break;
    case ORDER_MORE_LOGITS: model_more_logits(m, o->first, o->n); break;
    case ORDER_END:
        if (g.size > 1) group_leave();
        model_free(m);
    }
}

static void rank_done(void) {
    pthread_mutex_lock(&ranks.mutex);
    ranks.busy--;
    pthread_cond_broadcast(&ranks.change);
    pthread_mutex_unlock(&ranks.mutex);
}

// Rank 0 waits for its tokens. The others' only way to learn that their GPU has failed is to wait,
// too; meanwhile rank 0 goes on.
static void *rank_main(void *local) {
    bool over = false;
    rank_load((int)(intptr_t)local);
    rank_done();
    for (unsigned seen = 0; !over; rank_done(), device_wait()) {
        pthread_mutex_lock(&ranks.mutex);
        while (ranks.given == seen) pthread_cond_wait(&ranks.change, &ranks.mutex);
        seen = ranks.given;
        const Order *o = ranks.order;  // whoever gave it may reuse its memory after rank_done()
        pthread_mutex_unlock(&ranks.mutex);
        over = o->kind == ORDER_END;
        rank_obey((int)(intptr_t)local, o);
    }
    return NULL;
}

static void ranks_wait(void) {
    pthread_mutex_lock(&ranks.mutex);
    while (ranks.busy) pthread_cond_wait(&ranks.change, &ranks.mutex);
    pthread_mutex_unlock(&ranks.mutex);
}

// Returns when all ranks of this node have done it, or on a GPU have told it to.
static void order_here(const Order *o) {
    pthread_mutex_lock(&ranks.mutex);
    ranks.order = o, ranks.given++, ranks.busy = ranks.group.n_local - 1;
    pthread_cond_broadcast(&ranks.change);
    pthread_mutex_unlock(&ranks.mutex);
    rank_obey(0, o);
    ranks_wait();
}

static void nodes_send(const Order *o);  // what follows of other nodes stands in the next part
static void nodes_loaded(void);
static void facts_write(Buf *b);

static void order_give(const Order *o) {
    nodes_send(o);
    order_here(o);
}

// Loads all ranks of this node, side by side, and lets them meet those of other nodes.
static void ranks_load(Checkpoint *files, int max_rows, int max_out, int n_pages) {
    static uint8_t id[GROUP_ID];
    int n = ranks.group.n_local;
    if (n > 1 && !ranks.group.id) group_id(id), ranks.group.id = id;
    ranks.files = files, ranks.n_pages = n_pages;
    ranks.max_rows = max_rows, ranks.max_out = max_out;
    ranks.model = xcalloc(n, sizeof *ranks.model), ranks.thread = xcalloc(n, sizeof *ranks.thread);
    ranks.busy = n - 1, ranks.given = 0;
    for (int i = 1; i < n; i++)
        if (pthread_create(&ranks.thread[i], NULL, rank_main, (void *)(intptr_t)i) != 0)
            die("can't start the thread of rank %d", ranks.group.rank + i);
    rank_load(0);
    ranks_wait();
    nodes_loaded();
    order_here(&(Order){.kind = ORDER_JOIN});
}

static void ranks_end(void) {
    order_give(&(Order){.kind = ORDER_END});
    for (int i = 1; i < ranks.group.n_local; i++) pthread_join(ranks.thread[i], NULL);
    free(ranks.model), free(ranks.thread);
}

// ---- Nodes
// Node 0 leads, the others are its workers. Each worker opens two TCP connections to the leader.
// Over "control" a thread at both ends says once a second how its node is, whatever the engines do:
// who is silent for five seconds is lost, and with it the group. Over "engine" come the leader's
// orders and, behind an order, what kernels.c sums. Everything is sent in frames, a Frame and one
// of the structs below, little-endian as both ends are:
//   worker   HELLO    first on each connection: who it is, and all that must be equal
//   leader   ANSWER   its boot's nonce, which the second HELLO repeats; or a refusal
//   both     STATUS   control: how this node is; the leader's, how the whole group is
//   leader   ORDER    engine: what to compute
// Until all are there a node may leave and come again, and strangers who knock do no harm. From
// then on nobody is let in. Nothing that comes is believed: no length and no index.

enum { FRAME_HELLO = 1, FRAME_ANSWER, FRAME_STATUS, FRAME_ORDER };
enum {
    FRAME_MAGIC = 0x646e3172,       // "r1nd"
    PROTOCOL = 1,
    GUESTS = 16,                    // connections that have not said HELLO yet
    LINES = MAX_RANKS + GUESTS,
    MAX_ORDER = 1 << 28,            // bytes
    STATE_OVER = STATE_FAILED + 1,  // the leader's last word when all went well
};
static const double beat_s = 1, silence_s = 5, report_s = 5, farewell_s = 3;

typedef struct { uint32_t magic, protocol, kind, bytes; } Frame;

typedef struct {
    uint64_t nonce;                 // of the boot that the worker takes part in; 0: of none yet
    uint32_t node, engine;          // engine: this is the second connection
    uint32_t tokens, unused;        // that the cache could hold on this node
    char facts[4096];               // lines of name=value
} Hello;

typedef struct {
    uint64_t nonce;
    uint32_t http_port;
    enum { WELCOME, NOT_NOW, NEVER } verdict;
    char why[512];
} Answer;

typedef struct {
    uint64_t steps;
    uint32_t state, stops, running, queued;
    uint32_t complete, tokens;      // the leader's: all are there; how many the cache holds
    uint8_t id[GROUP_ID];           // and what group_join() needs
    char failure[256];
    struct { uint32_t state, unused; uint64_t loaded, total; } rank[MAX_RANKS];
} NodeStatus;

// Behind it: id [rows], position [rows], seq [rows], out [n_out], pages [n_pages], all int.
typedef struct { uint32_t kind, first, n, rows, n_out, n_pages; } OrderHead;

static const uint32_t frame_bytes[] = {
    [FRAME_HELLO] = sizeof(Hello), [FRAME_ANSWER] = sizeof(Answer),
    [FRAME_STATUS] = sizeof(NodeStatus)};

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are sent as they lie in memory");

typedef struct {
    int fd;                         // -1: none
    double heard;                   // when it opened, or its last frame came
    char address[INET6_ADDRSTRLEN];
    size_t n_in;                    // how much of a frame has come
    _Alignas(8) uint8_t in[sizeof(Frame) + sizeof(Hello)];
} Line;

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    Line line[LINES];               // control, by node: a worker's [0], the leader's others; guests
    int engine[MAX_RANKS];          // the nodes' other sockets
    uint32_t tokens[MAX_RANKS];
    int listener, wake_fd;          // wake_fd: the watch is to say at once how this node is
    double beat, report;            // when it does so next, and when it says for whom it waits
    Hello hello;                    // what this node says of itself
    char host[256], port[6];        // --dist-init-addr
    char *why;                      // a worker's: why it has no leader yet
    atomic_bool complete;           // all are there
    atomic_bool closing;            // this node has done its work: nobody is missed from now on
    uint8_t id[GROUP_ID];
    Buf out, in, seq, pages;        // of orders
} nodes = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER,
           .listener = -1, .wake_fd = -1};

static void nodes_wake(void) { (void)!write(nodes.wake_fd, &(uint64_t){1}, sizeof(uint64_t)); }

// What a thread does that can only wait for the program's end.
static _Noreturn void wait_for_end(void) { for (;;) pause(); }

static const char *node_ranks(char out[24], int node) {  // "rank 8-15"
    int first = node * server.n_local, last = first + server.n_local - 1;
    snprintf(out, 24, first < last ? "rank %d-%d" : "rank %d", first, last);
    return out;
}

static void node_state(int node, int state) {
    for (int i = 0; i < server.n_local; i++) server.ranks[node * server.n_local + i].state = state;
}

// The group can't go on: the malloc'ed text goes to the log, to all who wait, and to all nodes.
static void group_fail(char *text) {
    if (http_fail(text)) log_line(-1, "%s", server.failure);
    nodes_wake();
}

// A rank of another node can't be reached: why, for the log, /health and open requests. Any thread;
// the first one counts.
static void peer_lost(int node, const char *why) {
    char name[24];
    if (nodes.closing || server.over || server.stops > 1) return;
    node_state(node, STATE_FAILED);
    group_fail(format_string("%s (node %d) was lost: %s", node_ranks(name, node), node, why));
}

// The same from a thread that computes, which goes no further.
static _Noreturn void peer_wait(int node, const char *why) {
    peer_lost(node, why);
    wait_for_end();
}

// Control frames are small and few: where one doesn't fit into the socket the other end is gone.
static bool frame_send(int fd, int kind, const void *payload) {
    uint8_t out[sizeof(Frame) + sizeof(Hello)];
    const Frame f = {FRAME_MAGIC, PROTOCOL, kind, frame_bytes[kind]};
    ssize_t n = sizeof f + f.bytes;
    memcpy(out, &f, sizeof f);
    memcpy(out + sizeof f, payload, f.bytes);
    return send(fd, out, n, MSG_NOSIGNAL | MSG_DONTWAIT) == n;
}

// The kind of the next frame, whose payload then lies in l->in; 0: it is not complete; -1: there
// will be none. The latter two have a reason.
static int frame_take(Line *l, int flags, const char **why) {
    Frame f;
    for (size_t whole = sizeof f;; whole = sizeof f) {
        if (l->n_in >= sizeof f) {
            memcpy(&f, l->in, sizeof f);
            if (f.magic != FRAME_MAGIC) return *why = "it does not speak r1's protocol", -1;
            if (f.protocol != PROTOCOL) return *why = "it speaks another version's protocol", -1;
            if (f.kind < FRAME_HELLO || f.kind > FRAME_STATUS || f.bytes != frame_bytes[f.kind])
                return *why = "it sent a malformed frame", -1;
            whole += f.bytes;
        }
        if (l->n_in == whole) {
            memmove(l->in, l->in + sizeof f, f.bytes);
            return l->n_in = 0, l->heard = now_seconds(), (int)f.kind;
        }
        ssize_t n = recv(l->fd, l->in + l->n_in, whole - l->n_in, flags);
        if (n < 0 && errno == EAGAIN) return *why = "it does not answer", 0;
        if (n <= 0) return *why = n ? strerror(errno) : "connection closed", -1;
        l->n_in += n;
    }
}

static void fd_close(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

static void line_init(Line *l, int fd) {
    struct sockaddr_storage a;
    *l = (Line){.fd = fd, .heard = now_seconds()};
    getpeername(fd, (void *)&a, &(socklen_t){sizeof a});
    getnameinfo((void *)&a, sizeof a, l->address, sizeof l->address, NULL, 0, NI_NUMERICHOST);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));  // an order is not to wait
}

// Without its control connection a node is gone. Before all are there it may come again.
static void node_gone(int node, const char *why) {
    char name[24];
    fd_close(&nodes.line[node].fd);
    if (nodes.complete) peer_lost(node, why);
    if (nodes.complete || nodes.closing || server.over) return;
    log_line(-1, "node %d (%s) has left: %s", node, node_ranks(name, node), why);
    node_state(node, STATE_CONNECTING);
    fd_close(&nodes.engine[node]);
    pthread_cond_broadcast(&nodes.changed);
}

// ---- What each node knows of the others

static bool all_loaded(void) {
    for (int i = 0; i < server.n_ranks; i++)
        if (server.ranks[i].state != STATE_READY) return false;
    return true;
}

static void status_send(void) {
    const char *failure = server.failure;
    int state = failure ? STATE_FAILED : nodes.closing ? (int)STATE_OVER : server.state;
    NodeStatus s = {.steps = server.steps, .state = state, .stops = server.stops,
                    .running = server.running, .queued = server.queued,
                    .complete = nodes.complete, .tokens = server.max_total_tokens};
    memcpy(s.id, nodes.id, sizeof s.id);
    snprintf(s.failure, sizeof s.failure, "%s", failure ? failure : "");
    for (int i = 0; i < server.n_ranks; i++) {
        const RankStatus *r = &server.ranks[i];
        s.rank[i].state = r->state, s.rank[i].loaded = r->progress.loaded_bytes;
        s.rank[i].total = r->progress.total_bytes;
    }
    for (int i = 0; i < MAX_RANKS; i++)
        if (nodes.line[i].fd >= 0 && !frame_send(nodes.line[i].fd, FRAME_STATUS, &s))
            node_gone(i, strerror(errno));
}

static void leader_over(void) {
    server.over = true;
    http_stop(1);
}

// The leader believes a worker what it says of its own ranks, a worker the leader all but that.
static bool status_take(int from, NodeStatus *s) {
    s->failure[sizeof s->failure - 1] = 0;
    if (s->state > STATE_OVER) return false;
    for (int i = 0; i < server.n_ranks; i++) {
        RankStatus *r = &server.ranks[i];
        int node = i / server.n_local;
        if (s->rank[i].state > STATE_FAILED) return false;
        if (from ? node != from : node == server.node) continue;
        r->state = s->rank[i].state;
        r->progress.loaded_bytes = s->rank[i].loaded;
        r->progress.total_bytes = s->rank[i].total;
    }
    if (!from && s->complete && !nodes.complete) {
        if (s->tokens < PAGE || s->tokens > (uint32_t)server.max_total_tokens) return false;
        server.max_total_tokens = s->tokens;
        memcpy(nodes.id, s->id, sizeof nodes.id);
        nodes.complete = true;
    }
    pthread_cond_broadcast(&nodes.changed);
    if (from && s->stops && nodes.complete) http_stop(s->stops > 1 ? 2 : 1);
    if (from) return true;
    server.steps = s->steps;
    server.running = s->running;
    server.queued = s->queued;
    if (s->state == STATE_OVER) leader_over();
    else if (s->state == STATE_FAILED) group_fail(format_string("%s", s->failure));
    else server.state = s->state;
    return true;
}

static void control_take(int node) {
    Line *l = &nodes.line[node];
    const char *why = "it sent a frame out of turn";
    int kind;
    while (l->fd >= 0 && (kind = frame_take(l, MSG_DONTWAIT, &why)))
        if (kind != FRAME_STATUS || !status_take(node, (void *)l->in)) node_gone(node, why);
}

// ---- Who comes to the leader

// The first of the facts that differs: "--tp-size: got 4, want 2". NULL: none.
static char *facts_differ(const char *got, const char *want) {
    for (size_t n, m; *want; got += n + !!got[n], want += m + 1) {
        n = strcspn(got, "\n"), m = strcspn(want, "\n");
        size_t name = strcspn(want, "=") + 1;
        if (n == m && !memcmp(got, want, n)) continue;
        size_t skip = n >= name && !memcmp(got, want, name) ? name : 0;
        return format_string("%.*s: got %.*s, want %.*s", (int)name - 1, want, (int)(n - skip),
                             got + skip, (int)(m - name), want + name);
    }
    return NULL;
}

// Why a HELLO is refused, malloc'ed; NULL: it is not. Only what differs will differ again.
static char *hello_refuse(const Hello *h, bool *differs) {
    const Hello *own = &nodes.hello;
    if (h->nonce != (h->engine ? own->nonce : 0))
        return format_string("boot nonce: got %016lx, want %016lx: it belongs to another boot",
                             h->nonce, own->nonce);
    char *difference = facts_differ(h->facts, own->facts);
    *differs = difference;
    if (difference) return difference;
    if (h->node < 1 || h->node >= (uint32_t)server.options.nnodes || h->engine > 1 ||
        h->tokens < PAGE)
        return format_string("there can't be such a node");
    const Line *control = &nodes.line[h->node];
    if (control->fd < 0) return h->engine ? format_string("it is not there yet") : NULL;
    return h->engine && nodes.engine[h->node] < 0 ? NULL :
           format_string("it is there already, from %s", control->address);
}

static void guest_refuse(Line *g, const char *why) {
    log_line(-1, "Refused %s at --dist-init-addr: %s", g->address, why);
    fd_close(&g->fd);
}

static void guest_hello(Line *g) {
    Hello *h = (void *)g->in;
    Answer a = {.nonce = nodes.hello.nonce, .http_port = server.port};
    char name[24];
    bool differs = false;
    h->facts[sizeof h->facts - 1] = 0;
    char *refusal = hello_refuse(h, &differs);
    if (refusal) a.verdict = differs ? NEVER : NOT_NOW;
    if (refusal) snprintf(a.why, sizeof a.why, "node %u: %s", h->node, refusal);
    frame_send(g->fd, FRAME_ANSWER, &a);
    free(refusal);
    if (refusal) guest_refuse(g, a.why);
    if (differs) group_fail(format_string("%s", a.why));
    if (refusal) return;
    if (h->engine) {
        nodes.engine[h->node] = g->fd;
    } else {
        log_line(-1, "node %u (%s) has come from %s", h->node, node_ranks(name, h->node),
                 g->address);
        nodes.tokens[h->node] = h->tokens;
        nodes.line[h->node] = *g;
    }
    g->fd = -1;
}

static void guest_accept(void) {
    Line *g = &nodes.line[MAX_RANKS];  // an empty place, or that of who has been silent for longest
    int fd = accept4(nodes.listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) return;
    for (Line *i = g; i < nodes.line + LINES; i++)
        if (g->fd >= 0 && (i->fd < 0 || i->heard < g->heard)) g = i;
    if (g->fd >= 0) guest_refuse(g, "too many came at once");
    line_init(g, fd);
}

static void guest_take(Line *g) {
    const char *why;
    int kind = frame_take(g, MSG_DONTWAIT, &why);
    if (kind == FRAME_HELLO) guest_hello(g);
    else if (kind) guest_refuse(g, kind < 0 ? why : "it did not say HELLO");
}

// Once all are there the door closes. A node of the next boot finds it so, and tries again until
// its own leader has come. The cache is as large as all of them can hold.
static void nodes_count(void) {
    for (int i = 1; i < server.options.nnodes; i++)
        if (nodes.line[i].fd < 0 || nodes.engine[i] < 0) return;
    for (int i = 1; i < server.options.nnodes; i++)
        if (nodes.tokens[i] < (uint32_t)server.max_total_tokens)
            server.max_total_tokens = nodes.tokens[i];
    for (int i = MAX_RANKS; i < LINES; i++) fd_close(&nodes.line[i].fd);
    fd_close(&nodes.listener);
    nodes.beat = 0;
    nodes.complete = true;
    pthread_cond_broadcast(&nodes.changed);
}

// ---- The watch: a thread that never computes

// Says who is waited for, every five seconds; after --dist-timeout, that it was in vain.
static void watch_wait(double now) {
    const Options *o = &server.options;
    int waited = (int)(now - server.boot);
    bool late = waited >= o->dist_timeout;
    if (!late && now < nodes.report) return;
    nodes.report = now + report_s;
    for (int i = 0; i < o->nnodes; i++) {
        char name[24], percent[32];
        int slow = rank_slowest(i * server.n_local, server.n_local);
        int state = server.ranks[slow].state;
        if (state == STATE_READY || (i == server.node && !(late && nodes.complete))) continue;
        snprintf(percent, sizeof percent, "loading, %.1f %%", 100 * rank_loaded(slow));
        const char *why = nodes.why ? nodes.why : "not connected";
        if (state == STATE_LOADING) why = percent;
        node_ranks(name, i);
        if (!late) log_line(-1, "Waiting for node %d (%s): %s, %d s of %d s", i, name, why, waited,
                            o->dist_timeout);
        else group_fail(format_string("node %d (%s): %s after %d s (--dist-timeout)", i, name, why,
                                      waited));
        if (server.node && nodes.line[0].fd < 0) break;  // what of the others, nobody knows
    }
}

static void watch_round(double now) {
    static double failed;
    char silence[40];
    for (int i = 0; i < LINES; i++) {
        double silent = now - nodes.line[i].heard;
        if (nodes.line[i].fd < 0 || silent < silence_s) continue;
        snprintf(silence, sizeof silence, "no heartbeat for %.1f s", silent);
        if (i < MAX_RANKS) node_gone(i, silence);
        else guest_refuse(&nodes.line[i], "it said nothing");
    }
    if (nodes.listener >= 0) nodes_count();
    if (server.stops && !nodes.complete && server.node) leader_over();  // nobody misses it yet
    if (!server.failure && !all_loaded()) watch_wait(now);
    if (now >= nodes.beat) status_send(), nodes.beat = now + beat_s;
    // The HTTP thread ends the program. Should it not come to that, this one does.
    if (server.failure && !failed) failed = now;
    if (failed && now - failed > farewell_s) _exit(1);
}

static void *watch_main(void *unused) {
    uint64_t count;
    for (;;) {
        struct pollfd p[LINES + 2];
        pthread_mutex_lock(&nodes.mutex);
        double now = now_seconds(), wake = nodes.beat;
        for (int i = 0; i < LINES; i++) {
            p[i] = (struct pollfd){nodes.line[i].fd, POLLIN, 0};
            if (p[i].fd >= 0) wake = fmin(wake, nodes.line[i].heard + silence_s);
        }
        p[LINES] = (struct pollfd){nodes.wake_fd, POLLIN, 0};
        p[LINES + 1] = (struct pollfd){nodes.listener, POLLIN, 0};
        pthread_mutex_unlock(&nodes.mutex);
        poll(p, LINES + 2, (int)ceil(fmax(0, wake - now) * 1000));
        pthread_mutex_lock(&nodes.mutex);
        if (read(nodes.wake_fd, &count, sizeof count) > 0) nodes.beat = 0;
        for (int i = 0; i < LINES; i++) {
            if (!p[i].revents) continue;
            if (i < MAX_RANKS) control_take(i);
            else guest_take(&nodes.line[i]);
        }
        if (p[LINES + 1].revents) guest_accept();
        watch_round(now_seconds());
        pthread_mutex_unlock(&nodes.mutex);
    }
    return unused;
}

// ---- How a group comes together

// The leader's port is taken before anything is loaded: on all addresses, for its own name may not
// be known yet, but where that is an address of this machine alone.
static void nodes_open(const Options *o) {
    if (o->nnodes < 2 || o->node_rank) return;
    bool local = !strncmp(nodes.host, "127.", 4) || !strcmp(nodes.host, "::1");
    const char *all = strchr(nodes.host, ':') ? "::" : "0.0.0.0";
    nodes.listener = tcp_listen(local ? nodes.host : all, atoi(nodes.port));
}

static void line_patience(int fd, double seconds) {  // 0: without an end
    struct timeval t = {(time_t)seconds, 0};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);  // it holds for connect(), too
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
}

// A worker's connection, as far as ANSWER. NULL when it stands; else why not, malloc'ed.
static char *line_open(Line *l, const struct addrinfo *a, bool engine) {
    const char *why = "it sent a frame out of turn";
    int kind = 0, fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    Answer *answer = (void *)l->in;
    nodes.hello.engine = engine;
    line_patience(fd, silence_s);
    if (connect(fd, a->ai_addr, a->ai_addrlen) || !frame_send(fd, FRAME_HELLO, &nodes.hello))
        why = errno == EINPROGRESS ? "it does not answer" : strerror(errno);
    else line_init(l, fd), kind = frame_take(l, 0, &why);
    line_patience(fd, 0);
    if (kind == FRAME_ANSWER && answer->verdict == WELCOME) return NULL;
    if (kind == FRAME_ANSWER) why = answer->why, answer->why[sizeof answer->why - 1] = 0;
    if (kind == FRAME_ANSWER && answer->verdict == NEVER)
        group_fail(format_string("refused by the leader: %s", why));
    fd_close(&fd);
    return format_string("%s", why);
}

// Both connections to the leader, whose name is looked up anew each time: it may have moved.
static char *leader_open(Line *control, Line *engine) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list;
    int error = getaddrinfo(nodes.host, nodes.port, &hints, &list);
    if (error) return format_string("%s: %s", nodes.host, gai_strerror(error));
    char *why = NULL;
    for (const struct addrinfo *a = list; a; a = why && !server.failure ? a->ai_next : NULL) {
        free(why);
        nodes.hello.nonce = 0;
        if ((why = line_open(control, a, false))) continue;
        const Answer *answer = (void *)control->in;
        nodes.hello.nonce = answer->nonce;
        server.leader = format_string(strchr(control->address, ':') ? "[%s]:%u" : "%s:%u",
                                      control->address, answer->http_port);
        if ((why = line_open(engine, a, true))) fd_close(&control->fd);
    }
    freeaddrinfo(list);
    return why;
}

// A worker's way into the group: again and again, until a leader says that all are there.
static void leader_join(void) {
    static Line control, engine;
    while (!nodes.complete) {
        char *why = leader_open(&control, &engine);
        pthread_mutex_lock(&nodes.mutex);
        free(nodes.why), nodes.why = why;
        if (!why) nodes.line[0] = control, nodes.engine[0] = engine.fd;
        nodes_wake();
        while (!why && !nodes.complete && nodes.line[0].fd >= 0)
            pthread_cond_wait(&nodes.changed, &nodes.mutex);
        pthread_mutex_unlock(&nodes.mutex);
        if (server.failure) wait_for_end();
        if (!nodes.complete) sleep(1);
    }
}

// From here on the others are watched. Returns when all are there and agree.
static void nodes_connect(Group *g) {
    const Options *o = &server.options;
    Hello *h = &nodes.hello;
    Buf facts = {0};
    pthread_t watch;
    if (o->nnodes < 2) return;
    for (int i = 0; i < LINES; i++) nodes.line[i].fd = -1;
    for (int i = 0; i < o->nnodes; i++) nodes.engine[i] = -1, node_state(i, STATE_CONNECTING);
    nodes.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    nodes.report = now_seconds() + report_s;
    facts_write(&facts);
    snprintf(h->facts, sizeof h->facts, "%s", facts.data);
    buf_free(&facts);
    h->node = server.node, h->tokens = server.max_total_tokens;
    if (!server.node && getrandom(&h->nonce, sizeof h->nonce, 0) < 0)
        die("getrandom: %s", strerror(errno));
    h->nonce |= !server.node;  // 0 is nobody's
    if (!server.node) group_id(nodes.id);
    if (pthread_create(&watch, NULL, watch_main, NULL)) die("can't start the watch thread");
    if (server.node) leader_join();
    pthread_mutex_lock(&nodes.mutex);
    while (!nodes.complete) pthread_cond_wait(&nodes.changed, &nodes.mutex);
    pthread_mutex_unlock(&nodes.mutex);
    *g = (Group){g->rank, g->size, g->local, g->n_local, nodes.id, nodes.engine + !server.node,
                 server.node ? 1 : o->nnodes - 1};
}

// All ranks of this node have loaded. Waits for those of the others.
static void nodes_loaded(void) {
    node_state(server.node, STATE_READY);
    if (server.options.nnodes < 2) return;
    nodes_wake();
    pthread_mutex_lock(&nodes.mutex);
    while (!all_loaded()) pthread_cond_wait(&nodes.changed, &nodes.mutex);
    pthread_mutex_unlock(&nodes.mutex);
}

// The last word, of success or failure. The leader goes last, so that nobody misses it.
static void nodes_close(void) {
    if (server.options.nnodes < 2) return;
    nodes.closing = true;
    nodes_wake();
    for (int i = 0; i < 100 && !server.node; i++) {  // of 10 ms
        int open = 0;
        pthread_mutex_lock(&nodes.mutex);
        for (int k = 1; k < server.options.nnodes; k++) open += nodes.line[k].fd >= 0;
        pthread_mutex_unlock(&nodes.mutex);
        if (!open) break;
        usleep(10000);
    }
}

// ---- Orders

void peer_move(int fd, int node, bool out, void *data, size_t n) {
    for (ssize_t done; n; data = (char *)data + done, n -= done) {
        done = out ? send(fd, data, n, MSG_NOSIGNAL) : recv(fd, data, n, 0);
        if (done < 0 && errno == EINTR) done = 0;
        else if (done <= 0) peer_wait(node, done ? strerror(errno) : "connection closed");
    }
}

// Tells all workers what the leader orders. Of the page tables only the pages that the rows read go
// out, one run behind the other, and a row's `seq` says where its run begins: max_pages is 1 there.
static void nodes_send(const Order *o) {
    if (server.node || server.options.nnodes < 2) return;
    const Batch *b = &o->batch;
    Buf *out = &nodes.out, *seq = &nodes.seq, *pages = &nodes.pages;
    size_t size = sizeof(int), rows = b->n * size;
    out->len = seq->len = pages->len = 0;
    for (int i = 0, end; i < b->n; i = end) {
        int run = pages->len / size, last = 0;
        for (end = i; end < b->n && b->seq[end] == b->seq[i]; end++) {
            buf_add(seq, &run, size);
            if (b->position[end] > last) last = b->position[end];
        }
        buf_add(pages, b->pages + (size_t)b->seq[i] * b->max_pages, (last / PAGE + 1) * size);
    }
    OrderHead h = {o->kind, o->first, o->n, b->n, b->n_out, pages->len / size};
    size_t bytes = sizeof h + 3 * rows + b->n_out * size + pages->len;
    buf_add(out, &(Frame){FRAME_MAGIC, PROTOCOL, FRAME_ORDER, bytes}, sizeof(Frame));
    buf_add(out, &h, sizeof h);
    buf_add(out, b->id, rows), buf_add(out, b->position, rows), buf_add(out, seq->data, rows);
    buf_add(out, b->out, b->n_out * size), buf_add(out, pages->data, pages->len);
    for (int i = 1; i < server.options.nnodes; i++)
        peer_move(nodes.engine[i], i, true, out->data, out->len);
}

static bool all_below(const int *values, size_t n, size_t end) {
    for (size_t i = 0; i < n; i++)
        if (values[i] < 0 || (size_t)values[i] >= end) return false;
    return true;
}

// Makes an order of what came; its arrays stay where they are. False when it can't be one.
static bool order_read(Order *o, const OrderHead *h, const int *data) {
    static uint32_t n_out;          // of the last step
    const int *id = data, *position = id + h->rows, *seq = position + h->rows;
    const int *out = seq + h->rows, *pages = out + h->n_out;
    *o = (Order){.kind = h->kind, .first = h->first, .n = h->n,
                 .batch = {.n = h->rows, .id = id, .position = position, .seq = seq,
                           .pages = pages, .max_pages = 1, .out = out, .n_out = h->n_out}};
    if (h->kind == ORDER_END) return true;
    if (h->kind == ORDER_MORE_LOGITS)
        return h->n <= (uint32_t)ranks.max_out && h->n <= n_out && h->first <= n_out - h->n;
    n_out = h->n_out;
    bool inside = h->kind == ORDER_STEP && n_out <= h->rows &&
                  h->rows <= (uint32_t)ranks.max_rows &&
                  all_below(id, h->rows, server.config.vocab_size) &&
                  all_below(position, h->rows, server.config.max_position_embeddings) &&
                  all_below(seq, h->rows, h->n_pages) && all_below(out, n_out, h->rows) &&
                  all_below(pages, h->n_pages, ranks.n_pages);
    for (size_t i = 0; i < h->rows && inside; i++)
        inside = (size_t)seq[i] + position[i] / PAGE < h->n_pages;
    return inside;
}

// A worker's next order; a step's arrays are good until the next step. False: there are no more.
static bool nodes_receive(Order *o) {
    struct { Frame frame; OrderHead head; } f;
    const OrderHead *h = &f.head;
    Buf *in = &nodes.in;
    int fd = nodes.engine[0];
    peer_move(fd, 0, false, &f, sizeof f);
    size_t bytes = ((size_t)3 * h->rows + h->n_out + h->n_pages) * sizeof(int);
    if (f.frame.magic == FRAME_MAGIC && f.frame.kind == FRAME_ORDER &&
        f.frame.bytes == sizeof *h + bytes && bytes <= MAX_ORDER) {
        if (bytes > in->cap) in->data = xrealloc(in->data, in->cap = bytes);
        peer_move(fd, 0, false, in->data, bytes);
        if (order_read(o, h, (int *)in->data)) return o->kind != ORDER_END;
    }
    peer_wait(0, "it sent an impossible order");
}

// ==== Many at once ===============================================================================
// Steps are shared: each one takes a row of every sequence that decodes and, up to a chunk, rows of
// the prompts that are not through yet. Sequences join and leave between two steps. The cache is
// cut into pages of 64 tokens, and a sequence needs no neighbouring ones, so that nothing is
// reserved for tokens that may never come. When pages run out, the youngest sequence gives its own
// back, waits, and is computed again later. On the CPU a row's bits never depend on the rows beside
// it, so none of this can be seen in an answer.

// A full page has a name: a number for "these 64 tokens behind the page that has that name". So a
// name stands for everything from the first token on, and equal beginnings have equal names. Names
// are never given twice, which makes a chain that lost its head harmless: nobody gets there.
typedef struct {
    int held;               // by how many sequences; 0: it is in the free list
    int next, prev;         // there: the least recently used first
    uint64_t name;          // 0: nobody can find it, since it is not full or its content is gone
    uint64_t parent;        // the name of the page before it; 0: it holds a text's first tokens
    int token[PAGE];
    int chain;              // the next page in its hash bucket, or -1
} Page;

enum { MAX_OUT = 256 };     // rows whose logits are in memory at once

typedef struct {  // what a step does, for the log: sequences that decode; of prompts, all others
    int decoding, sequences, rows, cached, unfinished;
} Plan;

static struct {
    MemoryPlan memory;          // of each rank of this node
    int chunk, max_running;     // prompt rows in a step; sequences in a step, one probe not counted
    int recorded;               // steps of at most so many rows are recorded
    int n_pages, n_free, max_pages;  // of the cache; of one sequence
    Page *pages;                // [n_pages + 1] the last one is head and tail of the free list
    int *bucket, n_buckets;     // the first page of each hash, or -1
    uint64_t names;             // how many were given
    int *table;                 // [max_running + 1][max_pages] which pages a running sequence has
    int *free_rows, n_free_rows;     // of the table
    Seq **running;              // [max_running + 1] in order of arrival
    int n_running;
    Seq *waiting, **waiting_end;     // what came and what was put back
    int *id, *position, *seq;   // [chunk + max_running + 1] the step's rows
    Seq **out_seq;              // and the rows whose logits are wanted, at most as many: whose,
    int *out;                   // which row,
    const int **out_given;      // and which token is known to follow; NULL: it is to be chosen
    Batch batch;
    Plan plan;
    Event *events, **events_end;     // of this step
    atomic_bool abort_all, serving, flush;
    bool quiet;                 // no lines about steps: r1 run, or by --log-level
    uint64_t hit, computed;     // prompt tokens from the cache and from steps, since boot or flush
    int decode_steps;           // since the last "Decode batch" line, and
    uint64_t decode_tokens;
    double decode_start;        // when its interval began
} engine = {.waiting_end = &engine.waiting, .events_end = &engine.events};

// ---- Pages

static void page_link(int page, int before) {
    Page *p = engine.pages;
    p[page].next = before, p[page].prev = p[before].prev;
    p[p[before].prev].next = page, p[before].prev = page;
    engine.n_free++;
}

static void page_unlink(int page) {
    Page *p = engine.pages;
    p[p[page].prev].next = p[page].next, p[p[page].next].prev = p[page].prev;
    engine.n_free--;
}

static int *page_bucket(uint64_t parent, const int *token) {
    uint64_t hash = hash_bytes((const char *)token, PAGE * sizeof *token);
    return &engine.bucket[(hash + parent * 0x9E3779B97F4A7C15ull) % engine.n_buckets];
}

// The page that holds these 64 tokens behind `parent`, compared one by one; -1: none.
static int page_find(uint64_t parent, const int *token) {
    int i = *page_bucket(parent, token);
    while (i >= 0 && (engine.pages[i].parent != parent ||
                      memcmp(engine.pages[i].token, token, sizeof engine.pages[i].token)))
        i = engine.pages[i].chain;
    return i;
}

static void page_hold(int page) {
    if (!engine.pages[page].held++) page_unlink(page);
}

// What can still be found is used up last, and the longest unused first.
static void page_release(int page) {
    Page *p = &engine.pages[page];
    int end = engine.n_pages;
    if (!--p->held) page_link(page, p->name ? end : engine.pages[end].next);
}

static void page_forget(int page) {
    Page *p = &engine.pages[page];
    if (!p->name) return;
    int *link = page_bucket(p->parent, p->token);
    while (*link != page) link = &engine.pages[*link].chain;
    *link = p->chain;
    p->name = 0;
}

// The sequence's page `index` is full: from now on others find it. Where its content has a name
// already, since two sequences computed it side by side, only the name is taken over.
static void page_name(Seq *s, int index) {
    const int *token = s->tokens.data + (size_t)index * PAGE;
    int page = engine.table[s->row * engine.max_pages + index], same = page_find(s->chain, token);
    Page *p = &engine.pages[page];
    if (same < 0) {
        int *bucket = page_bucket(s->chain, token);
        *p = (Page){.held = p->held, .name = ++engine.names, .parent = s->chain, .chain = *bucket};
        memcpy(p->token, token, sizeof p->token);
        *bucket = same = page;
    }
    s->chain = engine.pages[same].name;
}

// Where a sequence's names begin. Without a prefix cache each request has a beginning of its own,
// which its choices still share; no page's name is that large.
static uint64_t chain_start(const Seq *s) {
    return server.options.disable_radix_cache ? UINT64_MAX - s->request : 0;
}

static int pages_for(int tokens) { return (tokens + PAGE - 1) / PAGE; }

// Gives the sequence pages for its first `tokens` tokens. False when there are too few. The last
// free page is a probe's, so that /health_generate never waits for an answer to end.
static bool pages_reserve(Seq *s, int tokens) {
    int *pages = engine.table + s->row * engine.max_pages, n = pages_for(tokens);
    if (n - s->n_pages > engine.n_free - !s->probe) return false;
    for (; s->n_pages < n; s->n_pages++) {
        int page = pages[s->n_pages] = engine.pages[engine.n_pages].next;
        page_forget(page);
        page_hold(page);
    }
    return true;
}

// Deeper pages go first into the free list: without those before them nobody would find them.
static void pages_release(Seq *s) {
    while (s->n_pages) page_release(engine.table[s->row * engine.max_pages + --s->n_pages]);
    engine.free_rows[engine.n_free_rows++] = s->row;
    s->n_computed = 0;
}

static void pages_flush(void) {
    for (int i = 0; i < engine.n_pages; i++) page_forget(i);
    engine.hit = engine.computed = 0;
}

// ---- Sequences

long max_req_len(void) {
    int pool = server.max_total_tokens;
    return server.context_len < pool ? server.context_len : pool;
}

Seq *seq_new(void) {
    Seq *s = xcalloc(1, sizeof *s);
    s->sampling = (Sampling){.temperature = server.config.temperature, .top_p = server.config.top_p,
                             .top_k = -1, .repetition_penalty = 1, .top_logprobs = -1};
    s->arrival = now_seconds();
    text_init(&s->text, server.tokenizer, true);
    return s;
}

void seq_free(Seq *s) {
    if (!s) return;
    free(s->tokens.data);
    text_free(&s->text);
    free(s);
}

void event_free(Event *e) {
    if (e) buf_free(&e->text);
    free(e);
}

static Event *event_add(Seq *s) {
    Event *e = *engine.events_end = xcalloc(1, sizeof *e);
    *e = (Event){.seq = s, .stop_id = -1, .stop_string = -1};
    engine.events_end = &e->next;
    return e;
}

// Rows that the sequence still needs: all its tokens but those that are cached. Who wants no answer
// needs its prompt for logprobs only, and those of the last token's row are none of the prompt's.
static int rows_left(const Seq *s) {
    int last = s->max_tokens ? (int)s->tokens.len : s->n_scored < s->n_prompt ? s->n_prompt - 1 : 0;
    return last > s->n_computed ? last - s->n_computed : 0;
}

static bool decodes(const Seq *s) { return s->n_computed >= s->n_prompt && rows_left(s) == 1; }

static void waiting_add(Seq *s, bool first) {
    if (first) {
        if (!engine.waiting) engine.waiting_end = &s->next;
        s->next = engine.waiting, engine.waiting = s;
    } else {
        s->next = NULL, *engine.waiting_end = s, engine.waiting_end = &s->next;
    }
}

static void waiting_remove(Seq **link) {
    Seq *s = *link;
    if (!(*link = s->next)) engine.waiting_end = link;
    server.queued -= !s->probe;
}

static void running_remove(Seq *s) {
    int i = 0;
    while (engine.running[i] != s) i++;
    memmove(&engine.running[i], &engine.running[i + 1],
            (--engine.n_running - i) * sizeof *engine.running);
    server.running -= !s->probe;
    pages_release(s);
}

// Whether s comes before r: probes do, then who arrived earlier.
static bool older(const Seq *s, const Seq *r) {
    return s->probe != r->probe ? s->probe : s->arrival < r->arrival;
}

static bool is_stop_id(const Seq *s, int id) {
    for (int i = 0; i < s->n_stop_id; i++)
        if (s->stop_id[i] == id) return true;
    return id == server.config.eos_token_id && !s->ignore_eos;
}

// Takes the chosen token into the sequence and says in e what it means: EOS and stop ids first,
// then stop strings, then the length.
static void seq_take(Seq *s, Event *e) {
    e->has_token = true;
    if (e->choice.id < 0) {
        e->finish = FINISH_ERROR;
        return;
    }
    if (!s->first_token) s->first_token = now_seconds();
    ids_add(&s->tokens, e->choice.id);
    int generated = (int)s->tokens.len - s->n_prompt;
    bool stop = is_stop_id(s, e->choice.id);
    if (stop) e->stop_id = e->choice.id;
    if (!stop || s->text.no_stop_trim)
        if (text_push(&s->text, &e->text, e->choice.id, !stop && generated > s->min_tokens))
            e->stop_string = s->text.matched, stop = true;
    if (stop) e->finish = FINISH_STOP;
    else if (generated >= s->max_tokens) e->finish = FINISH_LENGTH;
    if (e->finish && e->stop_string < 0) text_flush(&s->text, &e->text);
}

// Without a seed of its own a request draws one from --random-seed and its number; its i-th choice
// adds i.
static void seq_seed(Seq *s) {
    static uint32_t requests;
    uint32_t word[4];
    if (s->probe) return;
    s->request = requests += s->index == 0;
    if (s->has_seed) return;
    philox(word, server.options.random_seed, (uint32_t[4]){requests, 0, 0, 0});
    s->sampling.seed = (word[0] | (uint64_t)word[1] << 32) + s->index;
}

static void log_receive(const Seq *s) {
    const Sampling *p = &s->sampling;
    log_line(0, "Receive: rid=%s prompt_tokens=%d params={max_tokens=%d, temperature=%g, top_p=%g, "
             "top_k=%d, min_p=%g, seed=%lu}", s->rid, s->n_prompt, s->max_tokens, p->temperature,
             p->top_p, p->top_k, p->min_p, p->seed);
}

static void log_finish(const Seq *s, Finish finish) {
    static const char *const names[] = {"", "stop", "length", "abort", "error"};
    double now = now_seconds();
    log_line(0, "Finish: rid=%s finish=%s completion_tokens=%d ttft=%.3f e2e=%.3f", s->rid,
             names[finish], (int)s->tokens.len - s->n_prompt,
             (s->first_token ? s->first_token : now) - s->arrival, now - s->arrival);
}

// A sequence that comes to the engine, in order of arrival; probes go before all others.
static void seq_arrive(Seq *s) {
    seq_seed(s);
    bool scores = s->score_from && s->score_from < s->n_prompt;
    s->n_scored = scores ? s->score_from : s->n_prompt;
    if (server.options.log_requests && !s->probe) log_receive(s);
    waiting_add(s, s->probe);
}

// ---- One step for all

// True when a running sequence is about to compute the page that s needs next. Then s waits for it
// and finds it in the cache: so all choices of a prompt, and all that begin alike, compute it once.
static bool page_comes(const Seq *s) {
    int tokens = s->n_computed + PAGE;
    for (int i = 0; i < engine.n_running && tokens < (int)s->tokens.len; i++) {
        const Seq *r = engine.running[i];
        if (r->n_computed < tokens && tokens <= (int)r->tokens.len &&
            chain_start(r) == chain_start(s) &&
            !memcmp(r->tokens.data, s->tokens.data, tokens * sizeof(int)))
            return true;
    }
    return false;
}

// Tries to let a waiting sequence run. It takes what the cache has of its tokens, except the last
// one, whose row must be computed, and those whose logprobs are wanted. False when it has to wait:
// for memory, and then nobody may overtake it, or, with *later, for a page that comes.
static bool seq_admit(Seq *s, bool *later) {
    int scores = s->n_scored < s->n_prompt, page;
    int cached = scores ? s->n_scored - 1 : (int)s->tokens.len - 1;
    *later = false;
    if (engine.n_free_rows <= !s->probe) return false;
    s->row = engine.free_rows[--engine.n_free_rows];
    s->chain = chain_start(s);
    for (; s->n_computed + PAGE <= cached; s->n_computed += PAGE) {
        if ((page = page_find(s->chain, s->tokens.data + s->n_computed)) < 0) break;
        page_hold(page);
        engine.table[s->row * engine.max_pages + s->n_pages++] = page;
        s->chain = engine.pages[page].name;
    }
    // Room for its tokens, and a page more for each that runs: else it would soon be put back.
    int need = pages_for((int)s->tokens.len) - s->n_pages;
    int room = engine.n_free - (s->probe ? 0 : 1 + engine.n_running);
    *later = !scores && page_comes(s);
    if (*later || need > room) return pages_release(s), false;
    int i = engine.n_running++;
    for (; i > 0 && older(s, engine.running[i - 1]); i--) engine.running[i] = engine.running[i - 1];
    engine.running[i] = s;
    if (s->probe) return true;
    server.running++;
    engine.hit += s->n_computed;
    if (s->admitted) return true;
    s->admitted = true, s->n_cached = s->n_computed;
    server.prompt_tokens += s->n_prompt;
    server.cached_tokens += s->n_cached;
    return true;
}

// Ends a sequence without a token.
static void seq_end(Seq *s, Finish finish) {
    Event *e = event_add(s);
    e->finish = finish;
    text_flush(&s->text, &e->text);
    if (server.options.log_requests && !s->probe) log_finish(s, finish);
}

// Why a sequence needs no further step: its client has left, or it has all that it wanted.
static Finish seq_over(const Seq *s) {
    if (s->cancelled || engine.abort_all) return FINISH_ABORT;
    return rows_left(s) ? FINISH_NONE : FINISH_LENGTH;
}

static void sweep(void) {
    Finish finish;
    for (int i = engine.n_running; i-- > 0;) {
        Seq *s = engine.running[i];
        if ((finish = seq_over(s))) running_remove(s), seq_end(s, finish);
    }
    for (Seq **link = &engine.waiting, *s; (s = *link);) {
        if ((finish = seq_over(s))) waiting_remove(link), seq_end(s, finish);
        else link = &s->next;
    }
}

// Appends the sequence's next n rows to the batch, and says which of their logits are wanted.
static void batch_add(Seq *s, int n) {
    Batch *b = &engine.batch;
    s->n_rows = n;
    for (int i = 0; i < n; i++) {
        int at = s->n_computed + i, row = b->n++;
        engine.id[row] = s->tokens.data[at];
        engine.position[row] = at, engine.seq[row] = s->row;
        bool scored = at + 1 == s->n_scored && at + 1 < s->n_prompt;
        if (!scored && (at + 1 < (int)s->tokens.len || !s->max_tokens)) continue;
        engine.out[b->n_out] = row;
        engine.out_seq[b->n_out] = s;
        engine.out_given[b->n_out++] = scored ? &s->tokens.data[s->n_scored++] : NULL;
    }
}

// The rows that the sequence gets in this step: one where it decodes, else as many as are left of
// the chunk. Who finds no page makes the youngest wait, in the end itself.
static void seq_plan(Seq *s) {
    bool decode = decodes(s) || s->probe;  // a probe's prompt is one token
    int left = rows_left(s), room = engine.chunk - engine.plan.rows, put_back = 0;
    int n = decode || left < room ? left : room;
    while (n && !pages_reserve(s, s->n_computed + n)) {
        Seq *youngest = engine.running[engine.n_running - 1];
        if (youngest == s) n = 0;
        running_remove(youngest);
        waiting_add(youngest, true);
        server.queued++;
        server.preempted++;
        put_back++;
    }
    if (put_back && !engine.quiet)
        log_line(0, "Decode out of memory happened. #retracted_reqs: %d", put_back);
    if (!n) return;
    batch_add(s, n);
    if (s->probe) return;
    if (decode) engine.plan.decoding++;
    else engine.plan.rows += n, engine.plan.sequences++, engine.plan.unfinished += n < left;
}

static int tokens_held(void) { return (engine.n_pages - engine.n_free) * PAGE; }
static double usage(void) { return (double)tokens_held() / server.max_total_tokens; }

// First everything that runs goes on, the oldest first; then others may join, in order of arrival.
static void step_plan(void) {
    bool later;
    engine.batch.n = engine.batch.n_out = 0;
    engine.plan = (Plan){0};
    for (int i = 0; i < engine.n_running; i++) engine.running[i]->n_rows = 0;
    for (int i = 0; i < engine.n_running; i++) seq_plan(engine.running[i]);
    for (Seq **link = &engine.waiting, *s; (s = *link);) {
        if (engine.plan.rows >= engine.chunk && !s->probe) break;
        if (seq_admit(s, &later)) {
            waiting_remove(link);
            engine.plan.cached += s->n_computed;
            seq_plan(s);
        } else if (later) link = &s->next;
        else break;
    }
    engine.computed += engine.plan.rows;
    uint64_t tokens = engine.hit + engine.computed;
    server.cache_hit_rate = tokens ? (double)engine.hit / tokens : 0;
}

// This line and the next are SGLang's to the letter: dashboards read them.
static void log_prefill(const Plan *p) {
    if (!p->rows || engine.quiet) return;
    log_line(0, "Prefill batch. #new-seq: %d, #new-token: %d, #cached-token: %d, "
             "cache hit rate: %.2f%%, token usage: %.2f, #running-req: %d, #queue-req: %d",
             p->sequences, p->rows, p->cached, 100 * server.cache_hit_rate, usage(), p->decoding,
             server.queued + !!p->unfinished);
}

// Every --decode-log-interval steps that decode.
static void log_decode(const Plan *p) {
    double now = now_seconds();
    if (!p->decoding || engine.quiet) return;
    if (++engine.decode_steps < server.options.decode_log_interval) return;
    server.gen_throughput = engine.decode_tokens / (now - engine.decode_start);
    log_line(0, "Decode batch. #running-req: %d, #token: %d, token usage: %.2f, "
             "gen throughput (token/s): %.2f, #queue-req: %d", p->decoding, tokens_held(), usage(),
             server.gen_throughput, server.queued);
    engine.decode_steps = engine.decode_tokens = 0;
    engine.decode_start = now;
}

// After the layers the rows' latents are in the cache, so full pages can be found from now on.
static void seq_computed(Seq *s) {
    int full = s->n_computed / PAGE;
    s->n_computed += s->n_rows;
    for (; full < s->n_computed / PAGE && !s->probe; full++) page_name(s, full);
}

// What sample() is to do for one of the wanted rows.
static Sampling seq_sampling(Seq *s, const int *given) {
    Sampling p = s->sampling;
    p.tokens = s->tokens.data, p.n_tokens = s->tokens.len, p.n_prompt = s->n_prompt;
    p.given = given;
    if (given && p.top_logprobs < 0) p.top_logprobs = 0;
    if ((int)s->tokens.len - s->n_prompt < s->min_tokens) {
        s->stop_id[s->n_stop_id] = server.config.eos_token_id;  // there is room for one more
        p.banned = s->stop_id, p.n_banned = s->n_stop_id + 1;
    }
    return p;
}

// Tells what came of one of the wanted rows: a token's logprob, or a new token and perhaps the end.
static void seq_result(Seq *s, const int *given, const Choice *choice) {
    if (!s->n_rows) return;  // it ended with an earlier row
    Event *e = event_add(s);
    e->choice = *choice;
    e->prompt = e->has_token = given != NULL;
    if (!given) seq_take(s, e);
    else if (choice->id < 0) e->finish = FINISH_ERROR;
    engine.decode_tokens += !given && !s->probe;
    if (!e->finish) return;
    s->n_rows = 0;
    running_remove(s);
    if (server.options.log_requests && !s->probe) log_finish(s, e->finish);
}

// Runs the batch: the layers once, then logits and choices for as many rows as fit at once.
static void step_compute(void) {
    static Choice choice[MAX_OUT];
    Sampling sampling[MAX_OUT];
    Batch *b = &engine.batch;
    int n_out = b->n_out;
    order_give(&(Order){.kind = ORDER_STEP, .batch = *b});
    server.steps++;
    for (int i = 0; i < engine.n_running; i++) seq_computed(engine.running[i]);
    for (int first = 0; first < n_out; first += MAX_OUT) {
        int n = n_out - first < MAX_OUT ? n_out - first : MAX_OUT;
        Seq **s = engine.out_seq + first;
        const int **given = engine.out_given + first;
        if (first) order_give(&(Order){.kind = ORDER_MORE_LOGITS, .first = first, .n = n});
        for (int i = 0; i < n; i++) sampling[i] = seq_sampling(s[i], given[i]);
        sample(choice, ranks.model[0]->logits, sampling, tokenizer_vocab(server.tokenizer),
               server.config.vocab_size, n);
        for (int i = 0; i < n; i++) seq_result(s[i], given[i], &choice[i]);
    }
}

// One step for everything that runs. What happened, as a list of events.
static Event *engine_step(void) {
    if (atomic_exchange(&engine.flush, false)) pages_flush();
    if (!engine.n_running) engine.decode_steps = engine.decode_tokens = 0,
                           engine.decode_start = now_seconds();
    sweep();
    step_plan();
    log_prefill(&engine.plan);
    server.step_start = now_seconds();
    if (engine.batch.n) step_compute();
    server.step_start = 0;
    log_decode(&engine.plan);
    server.used_tokens = tokens_held();
    Event *list = engine.events;
    engine.events = NULL, engine.events_end = &engine.events;
    return list;
}

// ---- The engine's thread, and the two queues to and from it

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    Seq *first, **end;
    bool draining;
} inbox = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, &inbox.first, false};

static struct {
    pthread_mutex_t mutex;
    Event *first, **end;
} outbox = {PTHREAD_MUTEX_INITIALIZER, NULL, &outbox.first};

void engine_submit(Seq *s) {
    pthread_mutex_lock(&inbox.mutex);
    s->next = NULL;
    *inbox.end = s, inbox.end = &s->next;
    server.queued += !s->probe;
    pthread_cond_signal(&inbox.wake);
    pthread_mutex_unlock(&inbox.mutex);
}

void engine_cancel(Seq *s) { s->cancelled = true; }

void engine_flush(void) { engine.flush = true; }

void engine_stop(bool abort_all) {
    if (abort_all) engine.abort_all = true;
    if (server.node) nodes_wake();  // the leader must know
    pthread_mutex_lock(&inbox.mutex);
    inbox.draining = true;
    pthread_cond_signal(&inbox.wake);
    pthread_mutex_unlock(&inbox.mutex);
}

// Lets in what came; sleeps where there is nothing else to do. False: all is done, and no more is
// to come.
static bool inbox_take(void) {
    bool busy = engine.n_running || engine.waiting;
    pthread_mutex_lock(&inbox.mutex);
    while (!busy && !inbox.first && !inbox.draining) pthread_cond_wait(&inbox.wake, &inbox.mutex);
    Seq *list = inbox.first;
    inbox.first = NULL, inbox.end = &inbox.first;
    pthread_mutex_unlock(&inbox.mutex);
    for (Seq *s = list, *next; s; s = next) {
        next = s->next;
        seq_arrive(s);
    }
    return list || busy;
}

// The eventfd wakes the HTTP thread's poll; its count does not matter.
static void outbox_add(Event *list) {
    Event **end = &list;
    while (*end) end = &(*end)->next;
    if (end == &list) return;
    pthread_mutex_lock(&outbox.mutex);
    *outbox.end = list, outbox.end = end;
    pthread_mutex_unlock(&outbox.mutex);
    if (write(server.wake_fd, &(uint64_t){1}, 8) < 0 && errno != EAGAIN)
        die("eventfd: %s", strerror(errno));
}

Event *engine_events(void) {
    pthread_mutex_lock(&outbox.mutex);
    Event *list = outbox.first;
    outbox.first = NULL, outbox.end = &outbox.first;
    pthread_mutex_unlock(&outbox.mutex);
    return list;
}

enum { MOST_RUNNING = 4096 };

// As many sequences as may ever run beside each other, SGLang's rule; --max-running-requests says
// otherwise.
static int running_limit(const Options *o, int tokens, int context_len) {
    enum { PER_CONTEXT = 512, LEAST = 2048 };
    int64_t n = (int64_t)PER_CONTEXT * tokens / context_len;
    if (o->max_running_requests) return o->max_running_requests;
    return n < LEAST ? LEAST : n > MOST_RUNNING ? MOST_RUNNING : (int)n;
}

// What the engine takes of this rank's memory. The CPU's is others', too, and what it holds besides
// the cache is small: there --mem-fraction-static is the cache's part, a tenth by default.
static MemoryPlan memory_here(const Config *c, const Options *o, int rows, int max_out) {
    size_t available, memory;
    bool gpu = device_memory(&available, &memory);
    double fraction = o->mem_fraction_static > 0 ? o->mem_fraction_static : 0.1;
    double share = (double)memory / ranks.group.n_local;
    MemoryPlan p = {.room = share, .pool = fraction * share, .rows = rows};
    if (gpu) p = memory_plan(c, o->tensor_parallel_size, rows, max_out, available);
    Options cpu = {.max_total_tokens = o->max_total_tokens};
    if (memory_divide(&p, c, gpu ? o : &cpu, memory) || !gpu) return p;
    die("GPU memory: want %.2f GB for weights, %.2f for steps of %d rows, %.2f for other things "
        "and %.2f for the cache, of %.2f GB that are free", p.weights / 1e9,
        (p.steps + p.logits) / 1e9, rows, p.reserve / 1e9, p.pool / 1e9, p.room / 1e9);
}

static int chunk_rows(const Options *o) {
    bool chunked = o->chunked_prefill_size > 0 && o->chunked_prefill_size < o->max_prefill_tokens;
    return chunked ? o->chunked_prefill_size : o->max_prefill_tokens;
}

// The most rows that a step can have. How many sequences run depends on the cache's size in turn.
static int most_rows(const Options *o) {
    int running = o->max_running_requests ? o->max_running_requests : MOST_RUNNING;
    return chunk_rows(o) + running + 1;
}

// The engine's thread is the first rank's: takes its device, and how much of the memory is the
// cache's.
static void engine_open(void) {
    const Options *o = &server.options;
    device_init(0, ranks.group.n_local);
    engine.chunk = chunk_rows(o);
    engine.memory = memory_here(&server.config, o, most_rows(o), MAX_OUT);
    server.max_total_tokens = engine.memory.tokens;
}

// All memory that steps need; none is allocated later, but for tokens, texts and events.
static void engine_load(int max_running) {
    const Options *o = &server.options;
    Checkpoint *files = checkpoint_open(server.model_dir, !strcmp(o->load_format, "dummy"));
    engine.max_running = max_running;
    engine.recorded = step_record(o->disable_cuda_graph ? 0 : o->cuda_graph_max_bs);
    engine.n_pages = server.max_total_tokens / PAGE + 1;  // a probe's
    engine.max_pages = pages_for(max_req_len());
    int rows = engine.chunk + max_running + 1, seqs = max_running + 1;
    int max_out = rows < MAX_OUT ? rows : MAX_OUT;
    ranks_load(files, rows, max_out, engine.n_pages);
    engine.pages = xcalloc(engine.n_pages + 1, sizeof *engine.pages);
    engine.n_buckets = 2 * engine.n_pages;
    engine.bucket = xcalloc(engine.n_buckets, sizeof *engine.bucket);
    for (int i = 0; i < engine.n_buckets; i++) engine.bucket[i] = -1;
    engine.pages[engine.n_pages].next = engine.pages[engine.n_pages].prev = engine.n_pages;
    for (int i = 0; i < engine.n_pages; i++) page_link(i, engine.n_pages);
    engine.table = xcalloc(seqs, engine.max_pages * sizeof *engine.table);
    engine.free_rows = xcalloc(seqs, sizeof *engine.free_rows);
    while (engine.n_free_rows < seqs)
        engine.free_rows[engine.n_free_rows] = engine.n_free_rows, engine.n_free_rows++;
    engine.running = xcalloc(seqs, sizeof *engine.running);
    engine.id = xcalloc(rows, sizeof(int)), engine.position = xcalloc(rows, sizeof(int));
    engine.seq = xcalloc(rows, sizeof(int)), engine.out = xcalloc(rows, sizeof(int));
    engine.out_seq = xcalloc(rows, sizeof(Seq *)), engine.out_given = xcalloc(rows, sizeof(int *));
    engine.batch = (Batch){.id = engine.id, .position = engine.position, .seq = engine.seq,
                           .pages = engine.table, .max_pages = engine.max_pages,
                           .out = engine.out};
}

static void engine_free(void) {
    ranks_end();
    checkpoint_close(ranks.files);
    free(engine.pages), free(engine.bucket), free(engine.table), free(engine.free_rows);
    free(engine.running), free(engine.id), free(engine.position), free(engine.seq);
    free(engine.out), free(engine.out_seq), free(engine.out_given);
}

// "The capital city of France is", 8 tokens, greedily: what a first request would wait for happens
// now. Then it is as if it had never been.
static void engine_warmup(void) {
    Seq *s = seq_new();
    if (tokenizer_bos(server.tokenizer) >= 0) ids_add(&s->tokens, tokenizer_bos(server.tokenizer));
    tokenizer_encode(server.tokenizer, &s->tokens, STR("The capital city of France is"));
    s->n_prompt = s->tokens.len;
    s->max_tokens = 8;
    s->sampling.temperature = 0;
    s->has_seed = true;
    waiting_add(s, false), server.queued++;
    while (engine.waiting || engine.n_running)
        for (Event *e = engine_step(), *next; e; e = next) next = e->next, event_free(e);
    seq_free(s);
    pages_flush();
    server.prompt_tokens = 0;
}

static double free_memory(void) {  // GB
    size_t available, total;
    device_memory(&available, &total);
    return available / 1e9;
}

// On a GPU the steps of 1, 2, .. rows are recorded now, so that no request waits for that. Each is
// taken once: its rows are the first token of as many sequences, in a page that nobody has yet.
static void engine_record(void) {
    double start = now_seconds();
    if (!engine.recorded) return;
    log_line(0, "Capture cuda graph begin. avail mem=%.2f GB", free_memory());
    for (int i = 0; i < engine.recorded && i < engine.max_running; i++) {
        engine.seq[i] = engine.out[i] = i;
        engine.batch.n = engine.batch.n_out = i + 1;
        order_give(&(Order){.kind = ORDER_STEP, .batch = engine.batch});
    }
    log_line(0, "Capture cuda graph end. Time elapsed: %.2f s, avail mem=%.2f GB",
             now_seconds() - start, free_memory());
}

// The group's state goes one further, unless it is draining by now.
static bool state_advance(int from, int to) {
    return atomic_compare_exchange_strong(&server.state, &from, to);
}

// What the memory became: the plan, with the weights that were loaded and what is free now.
static void log_memory(int rank) {
    MemoryPlan p = engine.memory;
    Buf b = {0};
    p.weights = server.ranks[rank].progress.total_bytes;
    p.tokens = server.max_total_tokens, p.pool = p.tokens * cache_bytes(&server.config);
    memory_table(&b, &p, &server.config, server.n_ranks, 1e9 * free_memory(), server.context_len,
                 engine.max_running);
    for (char *line = b.data, *end; (end = strchr(line, '\n')); line = end + 1)
        log_line(rank, "%.*s", (int)(end - line), line);
    buf_free(&b);
}

static void *engine_main(void *unused) {
    (void)unused;
    Order order;
    int first = ranks.group.rank;
    state_advance(STATE_STARTING, STATE_CONNECTING);
    engine_open();
    nodes_connect(&ranks.group);
    node_state(server.node, STATE_LOADING);
    state_advance(STATE_CONNECTING, STATE_LOADING);
    log_line(first, "Load weight begin. avail mem=%.2f GB", free_memory());
    engine_load(running_limit(&server.options, server.max_total_tokens, server.context_len));
    log_line(first,
             "Load weight end. type=DeepseekV3ForCausalLM, dtype=torch.bfloat16, avail mem=%.2f GB",
             free_memory());
    log_memory(first);
    while (server.node && nodes_receive(&order)) order_here(&order);
    if (server.node) return engine_free(), NULL;
    log_line(0, "max_total_num_tokens=%d, chunked_prefill_size=%d, max_prefill_tokens=%d, "
             "max_running_requests=%d, context_len=%d", server.max_total_tokens, engine.chunk,
             server.options.max_prefill_tokens, engine.max_running, server.context_len);
    engine_record();
    if (state_advance(STATE_LOADING, STATE_WARMUP) && !server.options.skip_server_warmup)
        engine_warmup();
    if (state_advance(STATE_WARMUP, STATE_READY))
        log_line(-1, "The server is fired up and ready to roll!");
    engine.serving = true;
    while (inbox_take()) outbox_add(engine_step());
    engine_free();
    return NULL;
}

// ==== Commands ===================================================================================
// One table says every flag once: its names, where its value goes, what it may be, and the help's
// line. SGLang's other flags are known too, so that its command lines keep working: those without a
// meaning here are accepted, those that would change what is served are refused.

// AGREE: a flag that all nodes of a group must have alike.
enum {
    SERVE = 1, RUN = 2, TOKENIZE = 4, PLAN = 16, MODEL = SERVE | RUN, ALL = MODEL | TOKENIZE,
    AGREE = 8, SIZES = MODEL | PLAN | AGREE,
};

#define AT(field) offsetof(Options, field)
static const Flag flags[] = {
    {"--model-path --model", ALL | PLAN, TEXT, AT(model_path), 0, 0, NULL,
     "a directory, or a name in the local Hugging Face cache; else the tiny-r1 beside r1"},
    {"--tokenizer-path", ALL, TEXT, AT(tokenizer_path), 0, 0, NULL, "default: as --model-path"},
    {"--load-format", MODEL | AGREE, WORD, AT(load_format), 0, 0, "auto",
     "auto safetensors dummy: dummy makes up weights for config.json's geometry"},
    {"--served-model-name", SERVE, TEXT, AT(served_model_name), 0, 0, NULL, "as --model-path"},
    {"--host", SERVE, TEXT, AT(host), 0, 0, "0.0.0.0", "to listen on; :: is IPv6 and IPv4"},
    {"--port", SERVE, INTEGER, AT(port), 0, 65535, "30000", "0 takes a free one and logs it"},
    {"--api-key", SERVE, TEXT, AT(api_key), 0, 0, NULL, "Authorization: Bearer K is wanted"},
    {"--context-length", SIZES, INTEGER, AT(context_length), 2, 1 << 24, NULL,
     "config.json's"},
    {"--max-total-tokens", SIZES, INTEGER, AT(max_total_tokens), PAGE, 1 << 30, NULL,
     "tokens that the cache holds; default: what fits"},
    {"--mem-fraction-static", MODEL | PLAN, REAL, AT(mem_fraction_static), 1e-6, 1, NULL,
     "of a GPU's memory, for weights and cache; default: what fits; CPU: cache alone, 0.1"},
    {"--disable-cuda-graph", SERVE | AGREE, SWITCH, AT(disable_cuda_graph), 0, 0, NULL,
     "record no steps on a GPU"},
    {"--cuda-graph-max-bs", SERVE | AGREE, INTEGER, AT(cuda_graph_max_bs), 1, 1 << 16, "256",
     "on a GPU, steps of 1 to as many rows are recorded at the start; at most 256"},
    {"--chunked-prefill-size", SIZES, INTEGER, AT(chunked_prefill_size), -1, 1 << 20,
     "8192", "prompt tokens of a step, at most; -1: --max-prefill-tokens"},
    {"--max-prefill-tokens", SIZES, INTEGER, AT(max_prefill_tokens), 1, 1 << 20, "16384",
     "prompt tokens of a step, at most, chunked or not"},
    {"--max-running-requests", SERVE | PLAN | AGREE, INTEGER, AT(max_running_requests), 1, 1 << 16,
     NULL, "sequences in a step; default: 2048 to 4096, by what the cache holds"},
    {"--schedule-policy", SERVE, WORD, AT(schedule_policy), 0, 0, "fcfs",
     "fcfs lpm random dfs-weight: all of them mean first come, first served"},
    {"--disable-radix-cache", SERVE, SWITCH, AT(disable_radix_cache), 0, 0, NULL,
     "no request finds another's prefix in the cache"},
    {"--max-queued-requests", SERVE, INTEGER, AT(max_queued_requests), 1, 1 << 30, NULL,
     "sequences that may wait; beyond: 503"},
    {"--chat-template", ALL, WORD, AT(chat_template), 0, 0, "auto",
     "auto r1 r1-0528: auto reads tokenizer_config.json"},
    {"--think", ALL, WORD, AT(think), 0, 0, "auto",
     "auto force off: whether a prompt ends in <think>; auto as the template does"},
    {"--random-seed", SERVE, INTEGER, AT(random_seed), 0, INT_MAX, "0", "of unseeded requests"},
    {"--stream-interval", SERVE, INTEGER, AT(stream_interval), 1, 1 << 20, "1",
     "tokens of a stream's event"},
    {"--decode-log-interval", SERVE, INTEGER, AT(decode_log_interval), 1, 1 << 30, "40",
     "steps between two log lines"},
    {"--log-level", SERVE, WORD, AT(log_level), 0, 0, "info",
     "debug info warning error: lines about requests and steps; debug shows probes, too"},
    {"--log-level-http", SERVE, WORD, AT(log_level_http), 0, 0, NULL,
     "debug info warning error: default: as --log-level"},
    {"--watchdog-timeout", SERVE, INTEGER, AT(watchdog_timeout), 1, 1 << 30, "300",
     "seconds that a step may take; then r1 ends with 1"},
    {"--reasoning-parser", SERVE, WORD, AT(reasoning_parser), 0, 0, NULL,
     "deepseek-r1: gives reasoning_content beside content"},
    {"--allow-auto-truncate", SERVE, SWITCH, AT(allow_auto_truncate), 0, 0, NULL,
     "cut prompts that are too long instead of refusing them"},
    {"--enable-cache-report", SERVE, SWITCH, AT(enable_cache_report), 0, 0, NULL,
     "report cached tokens in usage"},
    {"--log-requests", SERVE, SWITCH, AT(log_requests), 0, 0, NULL,
     "a log line when a request begins and when it ends"},
    {"--skip-server-warmup", SERVE, SWITCH, AT(skip_server_warmup), 0, 0, NULL,
     "ready without a first step"},
    {"--tp-size --tensor-parallel-size --tp", SIZES, INTEGER, AT(tensor_parallel_size), 1,
     MAX_RANKS, "1", "ranks that share the model, an equal number on each node"},
    {"--gpu", PLAN, TEXT, AT(gpu), 0, 0, "h100", "h100, h200, or a GPU's bytes"},
    {"--nnodes", SERVE | PLAN | AGREE, INTEGER, AT(nnodes), 1, MAX_RANKS, "1",
     "nodes of the group"},
    {"--node-rank", SERVE, INTEGER, AT(node_rank), 0, MAX_RANKS - 1, "0",
     "which of them this is; 0 leads, and answers requests"},
    {"--dist-init-addr --nccl-init-addr", SERVE, TEXT, AT(dist_init_addr), 0, 0, NULL,
     "HOST:PORT at which the leader waits for the other nodes"},
    {"--dist-timeout", SERVE, INTEGER, AT(dist_timeout), 1, 1 << 30, "3600",
     "seconds until all nodes have come and loaded; then r1 ends with 1"},
    {"--system", RUN, TEXT, AT(system), 0, 0, NULL, "a system prompt"},
    {"--raw", RUN, SWITCH, AT(raw), 0, 0, NULL, "no template: the text itself is continued"},
    {"--max-tokens", RUN, INTEGER, AT(max_tokens), 0, 1 << 24, NULL, "what the context leaves"},
    {"--temperature", RUN, REAL, AT(temperature), 0, 1e6, NULL, "generation_config.json's"},
    {"--top-p", RUN, REAL, AT(top_p), 1e-9, 1, NULL, "generation_config.json's"},
    {"--top-k", RUN, INTEGER, AT(top_k), -1, 1 << 24, "-1", "-1: all"},
    {"--min-p", RUN, REAL, AT(min_p), 0, 1, "0", "relative to the likeliest token"},
    {"--seed", RUN, LONG, AT(seed), -0x1p63, 0x1.fffffffffffffp63, "0", "for sampling"},
    {"--stop", RUN, LIST, AT(stop), 0, 0, NULL, "a text that ends the answer; may be repeated"},
    {"--no-bos", TOKENIZE, SWITCH, AT(no_bos), 0, 0, NULL, "don't begin with the BOS token"},
    {"--ids", TOKENIZE, SWITCH, AT(ids), 0, 0, NULL, "the ids on one line"},
    {"--chat", TOKENIZE, SWITCH, AT(chat), 0, 0, NULL, "the text as a user's message"},
    {"--decode", TOKENIZE, SWITCH, AT(decode), 0, 0, NULL, "the text is ids; print their text"},
    {"--quantization", SERVE, ONLY, 0, 0, 0, "fp8", "config.json says how"},
    {"--dtype", SERVE, ONLY, 0, 0, 0, "auto bfloat16", "of activations"},
    {"--cpu-offload-gb", SERVE, ONLY, 0, 0, 0, "0", "weights off the GPU"},
    // SGLang's other flags, which need no more than their names.
    {"--trust-remote-code --enable-torch-compile --enable-mixed-chunk --enable-metrics "
     "--enable-deterministic-inference --enable-nan-detection --enable-flashinfer-mla "
     "--disable-mla --disable-overlap-schedule --disable-jump-forward "
     "--disable-cuda-graph-padding --enable-nccl-nvls --disable-outlines-disk-cache "
     "--enable-p2p-check --triton-attention-reduce-in-fp32 --enable-memory-saver "
     "--show-time-cost --prefill-only-one-req --enable-hierarchical-cache "
     "--disable-custom-all-reduce "
     "--enable-dp-attention --enable-ep-moe",
     SERVE, IGNORED, 0, 0, 0, NULL, NULL},
    {"--device --tokenizer-mode --quantization-param-path --revision --download-dir "
     "--attention-backend --sampling-backend --grammar-backend --torch-compile-max-bs "
     "--num-continuous-decode-steps --triton-attention-num-kv-splits --torchao-config "
     "--file-storage-pth --load-balance-method --constrained-json-whitespace-pattern "
     "--schedule-conservativeness --max-loras-per-batch --lora-backend --cuda-graph-bs "
     "--speculative-draft-model-path --speculative-algorithm --speculative-num-steps "
     "--speculative-eagle-topk --speculative-num-draft-tokens "
     "--base-gpu-id --kv-cache-dtype "
     "--tool-call-parser --ds- --dp-size --dp --data-parallel-size --ep-size --ep "
     "--expert-parallel-size",
     SERVE, IGNORED_VALUE, 0, 0, 0, NULL, NULL},
    {"--is-embedding --skip-tokenizer-init --lora-paths --enable-double-sparsity "
     "--json-model-override-args --return-hidden-states --enable-custom-logit-processor "
     "--delete-ckpt-after-loading --stream-output",
     SERVE, REFUSED, 0, 0, 0, NULL, NULL},
};
#undef AT

_Noreturn void usage_die(const Command *c, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "r1%s%s: ", c ? " " : "", c ? c->name : "");
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

// True when `word` (len bytes) is one of the words of a list, which ends at a colon or at its end.
static bool listed(const char *list, const char *word, size_t len) {
    for (size_t n; (n = strcspn(list, " :")) > 0; list += n, list += *list == ' ')
        if (n == len && !memcmp(list, word, len)) return true;
    return false;
}

// Levenshtein's: the fewest letters to insert, delete or change.
static int edit_distance(const char *a, size_t n, const char *b, size_t m) {
    int row[m + 1];
    for (size_t j = 0; j <= m; j++) row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            int change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = fmin(change, fmin(row[j], row[j - 1]) + 1);
        }
    }
    return row[m];
}

// The flag that `name` means: one of its names, or the only one that begins so.
static const Flag *flag_find(const Command *c, const char *name, size_t len) {
    const Flag *found = NULL;
    const char *nearest = NULL;
    Buf candidates = {0};
    int n = 0, least = INT_MAX;
    if (!strncmp(name, "--ds-", 5)) len = 5;  // DeepSpeed's, all without effect
    for (const Flag *f = c->flags; f < c->flags + c->n_flags; f++) {
        size_t n_word;
        if (!(f->commands & c->bit)) continue;
        if (listed(f->names, name, len)) return buf_free(&candidates), f;
        for (const char *word = f->names; *word; word += n_word, word += *word == ' ') {
            n_word = strcspn(word, " ");
            bool again = found == f && f->kind < IGNORED;  // another name of the same flag
            if (len > 2 && !strncmp(word, name, len) && !again) {
                buf_printf(&candidates, "%s%.*s", n++ ? ", " : "", (int)n_word, word);
                found = f;
            }
            int distance = edit_distance(name, len, word, n_word);
            if (distance < least) least = distance, nearest = word;
        }
    }
    int shown = strcspn(nearest, " ");
    if (n > 1) usage_die(c, "%.*s could be any of %s", (int)len, name, candidates.data);
    if (!n) usage_die(c, "unknown flag %.*s, did you mean %.*s?", (int)len, name, shown, nearest);
    buf_free(&candidates);
    return found;
}

// name: as the user wrote it, without its value.
static void flag_set(const Command *c, void *options, const Flag *f, const char *name,
                     const char *value) {
    void *field = (char *)options + f->offset;
    TextList *list = field;
    char *end = NULL;
    double number = f->kind < INTEGER || f->kind > REAL ? 0 : strtod(value, &end);
    bool known = f->kind == WORD && listed(f->help, value, strlen(value));
    bool whole = f->kind != REAL;  // digits alone: strtod would take 1e3 and 0x10, too
    if (end && (!*value || *end || !(number >= f->low && number <= f->high) ||
                (whole && value[strspn(value, "-0123456789")])))
        usage_die(c, "%s: got \"%s\", want %s in %.10g..%.10g", name, value,
                  whole ? "an integer" : "a number", f->low, f->high);
    switch (f->kind) {
    case WORD:
        if (!known)
            usage_die(c, "%s: got \"%s\", want one of %.*s", name, value,
                      (int)strcspn(f->help, ":"), f->help);  // fall through
    case TEXT: *(const char **)field = value; break;
    case INTEGER: *(int *)field = number; break;
    case LONG: *(uint64_t *)field = strtoull(value, NULL, 10); break;  // modulo 2^64
    case REAL: *(double *)field = number; break;
    case SWITCH: *(bool *)field = true; break;
    case LIST:
        if (!*value) usage_die(c, "%s: got nothing, want a text", name);
        if (list->n == MAX_STOPS) usage_die(c, "%s: want at most %d", name, MAX_STOPS);
        list->text[list->n++] = value;
        break;
    case ONLY:
        if (!listed(f->fallback, value, strlen(value)))
            usage_die(c, "%s %s (%s): this version of r1 can't do that; it takes only %s", name,
                      value, f->help, f->fallback);
        break;
    case IGNORED:
    case IGNORED_VALUE: log_line(-1, "%s: accepted for compatibility, no effect", name); break;
    case REFUSED: usage_die(c, "%s: not supported, since it would change what is served", name);
    }
}

static _Noreturn void flags_help(const Command *c) {
    printf("usage: r1 %s\n\n", c->synopsis);
    for (const Flag *f = c->flags; f < c->flags + c->n_flags; f++) {
        if (!(f->commands & c->bit)) continue;
        if (f->kind == IGNORED) printf("\naccepted without effect:\n  %s\n", f->names);
        if (f->kind == IGNORED_VALUE) printf("\nthe same, with a value:\n  %s\n", f->names);
        if (f->kind >= IGNORED) continue;
        int n = printf("  %s%s", f->names, f->kind == SWITCH ? "" : " V");
        printf("%*s%s%s%s%s\n", n < 42 ? 44 - n : 2, "", f->help, f->fallback ? " (" : "",
               f->fallback ? f->fallback : "", f->fallback ? ")" : "");
    }
    exit(0);
}

const char *flags_parse(const Command *c, void *options, char **argv) {
    const char *text = NULL;
    for (const Flag *f = c->flags; f < c->flags + c->n_flags; f++)
        if (f->fallback && f->kind < ONLY) flag_set(c, options, f, f->names, f->fallback);
    const Flag *last = NULL;
    for (bool only_text = false; *argv; argv++) {
        if (!only_text && !strcmp(*argv, "--")) {
            only_text = true;
            continue;
        }
        if (!only_text && (!strcmp(*argv, "--help") || !strcmp(*argv, "-h"))) flags_help(c);
        if (only_text || strncmp(*argv, "--", 2)) {
            if (last && last->kind == IGNORED_VALUE) continue;  // --cuda-graph-bs 1 2 4
            if (text || !c->takes_text) usage_die(c, "got \"%s\", want a flag", *argv);
            text = *argv;
            continue;
        }
        size_t len = strcspn(*argv, "=");
        const Flag *f = last = flag_find(c, *argv, len);
        bool bare = f->kind == SWITCH || f->kind == IGNORED || f->kind == REFUSED;
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)len, *argv);
        const char *value = (*argv)[len] ? *argv + len + 1 : NULL;
        if (bare && value && f->kind != REFUSED)
            usage_die(c, "%s: got \"%s\", takes no value", name, value);
        if (!bare && !value && !(value = *++argv)) usage_die(c, "%s: want a value", name);
        flag_set(c, options, f, name, value);
    }
    return text;
}

// The tiny-r1 beside the executable, wherever it was called from.
static const char *default_model(void) {
    char path[PATH_MAX];
    ssize_t len = readlink("/proc/self/exe", path, sizeof path - 1);
    if (len < 0) return "tiny-r1";
    path[len] = 0;
    *strrchr(path, '/') = 0;
    return format_string("%s/tiny-r1", path);
}

// A directory as it is; else ORG/NAME in the local Hugging Face cache, which is never downloaded
// to.
static const char *model_directory(const char *path) {
    struct stat st;
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode)) return path;
    const char *home = getenv("HOME"), *hf = getenv("HF_HOME");
    char *root = hf ? format_string("%s/hub", hf)
                    : format_string("%s/.cache/huggingface/hub", home ? home : "");
    Buf name = {0};
    for (const char *p = path; *p; p++) *p == '/' ? buf_str(&name, "--") : buf_add(&name, p, 1);
    char *base = format_string("%s/models--%s", root, name.data ? name.data : "");
    size_t len = 0;
    char *main_ref = format_string("%s/refs/main", base), *revision = read_file(main_ref, &len);
    if (!revision)
        die("--model-path %s: no such directory, and not in the Hugging Face cache %s", path, root);
    revision[strcspn(revision, "\n")] = 0;
    const char *directory = format_string("%s/snapshots/%s", base, revision);
    free(root), free(base), free(main_ref), free(revision);
    buf_free(&name);
    return directory;
}

// Everything but the weights: config, tokenizer, template, sizes.
static void server_setup(Options *o) {
    if (!o->model_path) o->model_path = default_model();
    server.options = *o;
    server.model_dir = model_directory(o->model_path);
    server.tokenizer = tokenizer_load(o->tokenizer_path ? model_directory(o->tokenizer_path)
                                                        : server.model_dir);
    bool automatic = !strcmp(o->chat_template, "auto"), r1 = !strcmp(o->chat_template, "r1");
    server.template_kind = automatic ? tokenizer_template(server.tokenizer)
                           : r1      ? TEMPLATE_R1
                                     : TEMPLATE_R1_0528;
    server.think = !strcmp(o->think, "auto") ? template_forces_think(server.template_kind)
                                             : !strcmp(o->think, "force");
}

// A hash of what is served: of config.json, of the list of weights, where there is one, and of r1.
static uint64_t fingerprint(void) {
    static const char *const names[] = {"config.json", "model.safetensors.index.json"};
    uint64_t hash = hash_bytes(R1_VERSION, strlen(R1_VERSION));
    for (size_t i = 0; i < COUNT(names); i++) {
        size_t len = 0;
        char *path = format_string("%s/%s", server.model_dir, names[i]);
        char *text = read_file(path, &len);
        hash = mix(hash ^ (text ? hash_bytes(text, len) : 0));
        free(text), free(path);
    }
    return hash;
}

// The config, and what must fit it: how long a sequence can be, the tokenizer, the ranks.
static void server_size(const Options *o) {
    server.config = config_load(server.model_dir);
    int longest = server.config.max_position_embeddings, ids = tokenizer_vocab(server.tokenizer);
    if (ids > server.config.vocab_size)
        die("%s: the tokenizer has ids up to %d, want less than config.json's vocab_size, %d",
            server.model_dir, ids - 1, server.config.vocab_size);
    server.context_len =
        o->context_length && o->context_length < longest ? o->context_length : longest;
    server.fingerprint = fingerprint();
    char err[256];
    int tp = o->tensor_parallel_size;
    config_check_ranks(err, sizeof err, &server.config, tp);
    if (*err) die("--tp-size: %s", err);
    server.node = o->node_rank, server.n_ranks = tp;
    server.n_local = o->nnodes > 1 ? tp / o->nnodes : tp;
    ranks.group = (Group){.rank = server.node * server.n_local, .size = tp,
                          .n_local = server.n_local};
}

// What a flag came to: for the log as Python writes it, or as JSON.
static void flag_write(Buf *b, const Flag *f, const Options *o, bool json) {
    const void *field = (const char *)o + f->offset;
    bool on = f->kind == SWITCH && *(const bool *)field, text = f->kind == TEXT || f->kind == WORD;
    const char *value = text ? *(const char *const *)field : NULL;
    if (f->kind == SWITCH) buf_str(b, json ? on ? "true" : "false" : on ? "True" : "False");
    else if (f->kind == INTEGER && (f->fallback || *(const int *)field))
        buf_printf(b, "%d", *(const int *)field);
    else if (f->kind == REAL && (f->fallback || *(const double *)field > 0))
        buf_printf(b, "%g", *(const double *)field);
    else if (value && json) json_write_string(b, (Str){value, strlen(value)});
    else if (value) buf_printf(b, "'%s'", field == &o->api_key ? "***" : value);
    else buf_str(b, json ? "null" : "None");
}

// All flags of serve as name=value, or as JSON. The key stays secret: the log hides it, JSON leaves
// it out.
static void options_write(Buf *b, const Options *o, bool json) {
    for (const Flag *f = flags; f < flags + COUNT(flags); f++) {
        bool secret = (const char *)o + f->offset == (const char *)&o->api_key;
        if (!(f->commands & SERVE) || f->kind > SWITCH || (secret && json)) continue;
        buf_str(b, !b->len ? "" : json ? "," : ", ");
        if (json) buf_str(b, "\"");
        for (const char *p = f->names + 2; *p && *p != ' '; p++)
            buf_add(b, *p == '-' ? "_" : p, 1);
        buf_str(b, json ? "\":" : "=");
        flag_write(b, f, o, json);
    }
}

// What all nodes must have alike, a line for each: a step's shapes follow from it.
static void facts_write(Buf *b) {
    buf_printf(b, "version=%s\nmodel fingerprint=r1-%016lx\n", R1_VERSION, server.fingerprint);
    for (const Flag *f = flags; f < flags + COUNT(flags); f++) {
        if (!(f->commands & AGREE)) continue;
        buf_printf(b, "%.*s=", (int)strcspn(f->names, " "), f->names);
        flag_write(b, f, &server.options, false);
        buf_str(b, "\n");
    }
}

void options_json(Buf *b) { options_write(b, &server.options, true); }

static void log_options(const Options *o) {
    Buf b = {0};
    options_write(&b, o, false);
    log_line(-1, "server_args=ServerArgs(%s)", b.data);
    buf_free(&b);
}

static void on_stop_signal(int unused) {
    static atomic_int signals;
    (void)unused;
    http_stop(++signals);
}

// Which flags go together, and where the leader is.
static void nodes_flags(const Command *c, const Options *o) {
    if (o->tensor_parallel_size % o->nnodes)
        usage_die(c, "--tp: got %d, want a multiple of --nnodes, %d", o->tensor_parallel_size,
                  o->nnodes);
    if (o->node_rank >= o->nnodes)
        usage_die(c, "--node-rank: got %d, want less than --nnodes, %d", o->node_rank, o->nnodes);
    if (o->nnodes == 1) return;
    if (!o->dist_init_addr) usage_die(c, "--dist-init-addr: missing, want the leader's HOST:PORT");
    const char *at = o->dist_init_addr;
    char *host = nodes.host, *port = nodes.port, more;
    bool whole = sscanf(at, "[%255[^]]]:%5[0-9]%c", host, port, &more) == 2 ||
                 sscanf(at, "%255[^][:]:%5[0-9]%c", host, port, &more) == 2;
    if (!whole || atoi(port) < 1 || atoi(port) > UINT16_MAX)
        usage_die(c, "--dist-init-addr: got \"%s\", want HOST:PORT or [IPV6]:PORT", at);
    server.leader = format_string("%s:%d", nodes.host, o->port);  // until it says so itself
}

// The socket opens before anything is loaded, so that /health can tell how far it is. Then two
// threads go on: this one serves HTTP, the other loads and computes.
static int serve_main(char **argv) {
    const Command command = {"serve", "serve [flags]: serves the OpenAI API", SERVE, false, flags,
                             COUNT(flags)};
    Options o = {0};
    flags_parse(&command, &o, argv);
    if (o.api_key && !*o.api_key) usage_die(&command, "--api-key: got nothing, want a key");
    nodes_flags(&command, &o);
    server.boot = now_seconds();
    server.created = time(NULL);
    server.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (server.wake_fd < 0) die("eventfd: %s", strerror(errno));
    struct sigaction stop = {.sa_handler = on_stop_signal, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &stop, NULL);
    sigaction(SIGINT, &stop, NULL);
    nodes_open(&o);
    int listener = http_listen(o.host, o.port);
    server_setup(&o);
    server_size(&o);
    engine.quiet = strcmp(o.log_level, "info") && strcmp(o.log_level, "debug");
    log_options(&server.options);
    log_line(-1, "chat template: %s (%s), prompts %s in <think>",
             server.template_kind == TEMPLATE_R1 ? "r1" : "r1-0528",
             strcmp(o.chat_template, "auto") ? "by flag" : "recognised from tokenizer_config.json",
             server.think ? "end" : "don't end");
    pthread_t thread;
    if (pthread_create(&thread, NULL, engine_main, NULL) != 0) die("can't start the engine thread");
    http_serve(listener);
    if (server.state == STATE_FAILED) _exit(1);
    // All is answered or given up; a step or a load that still runs is not waited for.
    bool served = engine.serving && !engine.abort_all && !server.failure;
    if (served) pthread_join(thread, NULL);
    nodes_close();
    if (!served) _exit(server.failure ? 1 : engine.abort_all ? 130 : 0);
    tokenizer_free(server.tokenizer);
    return 0;
}

// The whole standard input, or the text itself where it is not "-".
static Buf text_or_stdin(const char *text) {
    Buf b = {0};
    char chunk[4096];
    if (text && strcmp(text, "-")) return buf_str(&b, text), b;
    for (size_t n; (n = fread(chunk, 1, sizeof chunk, stdin)) > 0;) buf_add(&b, chunk, n);
    while (b.len && b.data[b.len - 1] == '\n') b.data[--b.len] = 0;
    return buf_str(&b, ""), b;
}

static atomic_bool interrupted;
static void on_interrupt(int unused) {
    (void)unused;
    if (interrupted) _exit(130);  // the first one waits for the step that runs
    interrupted = true;
}

// What could not be written is lost, and the caller must know.
static void stdout_check(void) {
    if (fflush(stdout) != 0 || ferror(stdout)) die("can't write to stdout: %s", strerror(errno));
}

// The prompt's ids: the text as a user's message in the template, or as it is behind BOS.
static void encode_prompt(Ids *ids, const char *system, Str text, bool template, bool bos) {
    Buf rendered = {0};
    Message messages[] = {{ROLE_SYSTEM, {system, system ? strlen(system) : 0}, NULL},
                          {ROLE_USER, text, NULL}};
    if (template) {
        chat_render(&rendered, server.template_kind, messages + !system, 1 + !!system, true,
                    server.think);
        text = (Str){rendered.data, rendered.len};
    } else if (bos && tokenizer_bos(server.tokenizer) >= 0) {
        ids_add(ids, tokenizer_bos(server.tokenizer));
    }
    tokenizer_encode(server.tokenizer, ids, text);
    buf_free(&rendered);
}

// One answer on stdout as it comes, and its figures on stderr.
static Finish run_answer(Seq *s) {
    engine.quiet = true;
    signal(SIGINT, on_interrupt);
    double start = now_seconds(), first = 0;
    Finish finish = FINISH_NONE;
    s->has_seed = true;
    seq_arrive(s);
    while (!finish) {
        s->cancelled = interrupted;
        for (Event *e = engine_step(), *next; e; e = next) {
            if (!first) first = now_seconds();
            fwrite(e->text.data ? e->text.data : "", 1, e->text.len, stdout);
            stdout_check();
            finish = e->finish;
            next = e->next;
            event_free(e);
        }
    }
    printf("\n");
    stdout_check();
    double prefill = first - start, decode = now_seconds() - first;
    int output = (int)s->tokens.len - s->n_prompt;
    static const char *reason[] = {"", "stop", "length", "abort",
                                   "error: the model gave a value that is no number"};
    // The first token comes with the prompt's last step; the others take a step each.
    fprintf(stderr,
            "prompt: %d tokens, %.2f s (%.2f tok/s); output: %d tokens, %.2f s (%.2f tok/s); %s\n",
            s->n_prompt, prefill, output ? s->n_prompt / prefill : 0.0, output, decode,
            output > 1 ? (output - 1) / decode : 0.0, reason[finish]);
    return finish;
}

static int run_main(char **argv) {
    const Command command = {"run", "run [flags] [PROMPT|-]: answers one prompt", RUN, true, flags,
                             COUNT(flags)};
    Options o = {.max_tokens = -1, .temperature = -1, .top_p = -1};
    const char *argument = flags_parse(&command, &o, argv);
    server_setup(&o);
    server_size(&o);
    Buf text = text_or_stdin(argument);
    engine_open();
    engine_load(1);
    Seq *s = seq_new();
    encode_prompt(&s->tokens, o.system, (Str){text.data, text.len}, !o.raw, true);
    s->n_prompt = s->tokens.len;
    int room = max_req_len() - s->n_prompt;
    if (!s->n_prompt) die("the prompt is empty");
    if (room <= 0 || o.max_tokens > room)
        die("the prompt has %d tokens, and %d are to follow: want at most %d in all", s->n_prompt,
            o.max_tokens < 0 ? 1 : o.max_tokens, s->n_prompt + room);
    s->max_tokens = o.max_tokens < 0 ? room : o.max_tokens;
    if (o.temperature >= 0) s->sampling.temperature = o.temperature;
    if (o.top_p >= 0) s->sampling.top_p = o.top_p;
    if (o.top_k == 0) usage_die(&command, "--top-k: got 0, want -1 or an integer >= 1");
    s->sampling.top_k = o.top_k, s->sampling.min_p = o.min_p, s->sampling.seed = o.seed;
    for (int i = 0; i < o.stop.n; i++)
        s->text.stop[s->text.n_stop++] = (Str){o.stop.text[i], strlen(o.stop.text[i])};
    if (server.think && !o.raw) printf("<think>\n");
    Finish finish = run_answer(s);
    seq_free(s);
    engine_free();
    tokenizer_free(server.tokenizer);
    buf_free(&text);
    return finish == FINISH_ABORT ? 130 : finish == FINISH_ERROR;
}

static void print_ids(const Ids *ids) {
    for (size_t i = 0; i < ids->len; i++) printf("%s%d", i ? " " : "", ids->data[i]);
    printf("\n");
}

// A line a token: its id and its text, control characters escaped.
static void print_tokens(const Ids *ids) {
    for (size_t i = 0; i < ids->len; i++) {
        Str bytes = tokenizer_bytes(server.tokenizer, ids->data[i]);
        printf("%6d  ", ids->data[i]);
        for (size_t k = 0; k < bytes.len; k++) {
            uint8_t byte = bytes.data[k];
            if (byte == '\n') printf("\\n");
            else if (byte < ' ' || byte == 0x7f) printf("\\x%02x", byte);
            else putchar(byte);
        }
        printf("\n");
    }
    printf("%zu tokens\n", ids->len);
}

static void print_decoded(const Command *c, const char *text) {
    TextStream stream;
    Buf out = {0};
    text_init(&stream, server.tokenizer, false);
    for (const char *p = text; *(p += strspn(p, " ,\n\t"));) {
        char *end;
        long id = strtol(p, &end, 10);
        if (end == p || id < 0 || id >= tokenizer_vocab(server.tokenizer))
            usage_die(c, "--decode: got \"%.20s\", want token ids in 0..%d", p,
                      tokenizer_vocab(server.tokenizer) - 1);
        text_push(&stream, &out, id, false);
        p = end;
    }
    text_flush(&stream, &out);
    fwrite(out.data ? out.data : "", 1, out.len, stdout);
    printf("\n");
    text_free(&stream);
    buf_free(&out);
}

static int tokenize_main(char **argv) {
    const Command command = {"tokenize", "tokenize [flags] [TEXT|-]: shows a text's tokens",
                             TOKENIZE, true, flags, COUNT(flags)};
    Options o = {0};
    const char *argument = flags_parse(&command, &o, argv);
    server_setup(&o);
    Buf text = text_or_stdin(argument);
    Ids ids = {0};
    if (o.decode) {
        print_decoded(&command, text.data);
    } else {
        encode_prompt(&ids, NULL, (Str){text.data, text.len}, o.chat, !o.no_bos);
        if (o.ids) print_ids(&ids);
        else print_tokens(&ids);
    }
    stdout_check();
    free(ids.data);
    buf_free(&text);
    tokenizer_free(server.tokenizer);
    return 0;
}

// ==== One rank's share ===========================================================================
// `r1 bench --offline` times what one rank of a group does in a step, at the model's true size, and
// says how near that is to what memory and arithmetic allow. It takes one GPU where the group needs
// eight: weights are made up, and the rank is alone, so that its sums hold its own part only and no
// time for the others'. What that would add is told apart, as modelled. All this is about the
// model, which is why it stands here and not in bench.c, a client; that file only reads its flags.

typedef enum {  // what is timed by itself: the stages of model_layer, and what is around them
    EMBED, NORM, QKV_A, LATENT, Q_B, QUERY, ATTEND, VALUE, ATTENTION, OUT_PROJ, ROUTE, EXPERTS,
    DENSE, HEAD, SAMPLE, N_STAGES
} Stage;

typedef struct {  // what must be done at least, each input read once, each output written once
    double weights, cache, rows;  // bytes: weights as the checkpoint has them; rows: activations
    double fp8, bf16;             // operations
    double floor;                 // seconds of all that, stage by stage
} Cost;

typedef struct {  // steps that are alike
    bool prompt;            // the rows are one sequence's first; else each is another one's next
    int context;            // tokens that the last row sees
    Batch batch;
    double seen;            // by all rows together
} Load;

enum { MAX_LOADS = 16, SHARE_STEPS = 7, REPEATS = 2 };

typedef struct { int v[MAX_LOADS], n, most; } Numbers;  // what a flag lists; most: the largest

static struct {
    const ShareOptions *o;
    Model *m;
    Ceilings most;
    MemoryPlan plan;
    int n_pages;            // of the cache: as many as are needed
    double hit;             // experts that the rows of a step meet, on average over layers
    bool prompt;            // the step's rows are a prompt's
    Choice *choice;
    Sampling *sampling;     // [max_out]
    FILE *out;              // --output-file, or NULL
    char date[32];
} share;

// How often a step has a stage. A prompt's attention is one stage: how it is cut is the twin's own.
static int stage_calls(Stage s) {
    const Config *c = &share.m->config;
    switch (s) {
    case EMBED: case HEAD: case SAMPLE: return 1;
    case NORM: return 2 * c->num_hidden_layers;
    case ROUTE: case EXPERTS: return c->num_hidden_layers - c->first_k_dense_replace;
    case DENSE: return c->first_k_dense_replace;
    case QUERY: case ATTEND: case VALUE: return share.prompt ? 0 : c->num_hidden_layers;
    case ATTENTION: return share.prompt ? c->num_hidden_layers : 0;
    default: return c->num_hidden_layers;
    }
}

static void stage_run(Stage s, int layer) {
    Model *m = share.m;
    const Layer *l = &m->layers[layer];
    const Config *c = &m->config;
    const Batch *b = &m->batch;
    float eps = c->rms_norm_eps;
    int n = b->n, heads = c->num_attention_heads;
    const Linear *kv_b = &l->self_attn.kv_b_proj;
    switch (s) {
    case EMBED: model_embed(m, b); break;
    case NORM: add_norm(m->x, m->normed, m->y, &l->input_layernorm, eps, n); break;
    case QKV_A:
        linear_pair(m->q_a, m->kv_a, m->normed, &l->self_attn.q_a_proj,
                    &l->self_attn.kv_a_proj_with_mqa, n);
        break;
    case LATENT:
        mla_latent(m->q_latent, m->cache[layer], m->q_a, m->kv_a, &l->self_attn.q_a_layernorm,
                   &l->self_attn.kv_a_layernorm, eps, m->rope, b);
        break;
    case Q_B: linear(m->q, m->q_latent, &l->self_attn.q_b_proj, n); break;
    case QUERY: mla_query(m->query, m->q, kv_b, m->rope, heads, n); break;
    case ATTEND: mla_attend(m->u, m->query, m->cache[layer], m->softmax_scale, heads, b); break;
    case VALUE: mla_value(m->heads_out, m->u, kv_b, heads, n); break;
    case ATTENTION:
        mla_attention(m->heads_out, m->query, m->u, m->q, m->cache[layer], kv_b, m->rope,
                      m->softmax_scale, heads, b);
        break;
    case OUT_PROJ: linear(m->y, m->heads_out, &l->self_attn.o_proj, n); break;
    case ROUTE:
        moe_route(&m->routing, m->normed, &l->moe_mlp.gate, &l->moe_mlp.e_score_correction_bias, c,
                  n);
        break;
    case EXPERTS:
        moe_experts(m->y, m->expert_hidden, m->normed, &m->routing, l->moe_mlp.experts,
                    &l->moe_mlp.shared_experts, c, n);
        break;
    case DENSE: mlp(m->y, m->dense_hidden, m->normed, &l->mlp, n); break;
    case HEAD: model_logits(m, b); break;
    case SAMPLE:
        sample(share.choice, m->size > 1 ? m->part : m->logits, share.sampling, m->lm_head.out,
               m->lm_head.out, b->n_out);
    default: break;
    }
}

// A matrix, of which so many like it are read, and met by so many rows.
static void cost_linear(Cost *t, const Linear *w, double copies, double rows) {
    bool fp8 = w->dtype == DTYPE_F8_E4M3;
    double size = (double)w->out * w->in, scales = ceil((double)w->out / BLOCK) * (w->in / BLOCK);
    t->weights += copies * (fp8 ? size + scales * sizeof(float) : 2 * size);
    *(fp8 ? &t->fp8 : &t->bf16) += 2 * rows * size;
}

static void cost_mlp(Cost *t, const Mlp *m, double copies, double rows) {
    cost_linear(t, &m->gate_proj, copies, rows);
    cost_linear(t, &m->up_proj, copies, rows);
    cost_linear(t, &m->down_proj, copies, rows);
}

// One call's. Quantised rows are one byte a column, others two. Attention's operations are those of
// the cheaper form: for rows that decode the one with latents, for a prompt's the one with keys and
// values of each head, which must first be made from them (as many operations as absorbing takes).
static Cost stage_cost(Stage s, const Load *load) {
    const Model *m = share.m;
    const Config *c = &m->config;
    const Layer *l = &m->layers[s == DENSE ? 0 : c->num_hidden_layers - 1];  // the others are alike
    const Linear *kv_b = &l->self_attn.kv_b_proj;
    double n = load->batch.n, n_out = load->batch.n_out, hidden = c->hidden_size;
    double q_lora = c->q_lora_rank, heads = c->num_attention_heads, row = CACHE_DIM * 2;
    Cost t = {0};
    switch (s) {
    case EMBED: t.rows = n * 4 * hidden; break;
    case NORM: t.rows = n * 7 * hidden; break;
    case QKV_A:
        cost_linear(&t, &l->self_attn.q_a_proj, 1, n);
        cost_linear(&t, &l->self_attn.kv_a_proj_with_mqa, 1, n);
        t.rows = n * (hidden + 2 * (q_lora + CACHE_DIM));
        break;
    case LATENT: t.rows = n * (2 * (q_lora + CACHE_DIM) + q_lora), t.cache = n * row; break;
    case Q_B:
        cost_linear(&t, &l->self_attn.q_b_proj, 1, n);
        t.rows = n * (q_lora + 2 * heads * QK_DIM);
        break;
    case QUERY: case VALUE:  // a half of kv_b_proj each
        cost_linear(&t, kv_b, 0.5, 0);
        t.bf16 = n * kv_b->out * kv_b->in;
        t.rows = n * heads * (s == QUERY ? 2 * (QK_DIM + CACHE_DIM) : 2 * LATENT_DIM + V_DIM);
        break;
    case ATTEND:
        t.cache = load->seen * row;
        t.bf16 = 2 * load->seen * heads * (CACHE_DIM + LATENT_DIM);
        t.rows = n * heads * 2 * (CACHE_DIM + LATENT_DIM);
        break;
    case ATTENTION:
        cost_linear(&t, kv_b, 1, 0);
        t.cache = n * row;
        t.bf16 = 2 * n * kv_b->out * kv_b->in + 2 * load->seen * heads * (QK_DIM + V_DIM);
        t.rows = n * heads * (2 * QK_DIM + V_DIM);
        break;
    case OUT_PROJ:
        cost_linear(&t, &l->self_attn.o_proj, 1, n);
        t.rows = n * (heads * V_DIM + 2 * hidden);
        break;
    case ROUTE:
        cost_linear(&t, &l->moe_mlp.gate, 1, n);
        t.rows = n * (2 * hidden + c->num_experts_per_tok * 8);
        break;
    case EXPERTS:
        cost_mlp(&t, &l->moe_mlp.experts[0], share.hit, n * c->num_experts_per_tok);
        cost_mlp(&t, &l->moe_mlp.shared_experts, 1, n);
        t.rows = n * 3 * hidden;
        break;
    case DENSE: cost_mlp(&t, &l->mlp, 1, n), t.rows = n * 3 * hidden; break;
    case HEAD:
        cost_linear(&t, &m->lm_head, 1, n_out);
        t.rows = n * 6 * hidden + n_out * (2 * hidden + 4 * m->lm_head.out);
        break;
    default: t.rows = n_out * 4 * m->lm_head.out;
    }
    return t;
}

static double cost_bytes(const Cost *t) { return t->weights + t->cache + t->rows; }

// Adds all calls of a stage.
static void cost_add(Cost *sum, Stage s, const Load *load) {
    int n = stage_calls(s);
    if (!n) return;
    const Cost t = stage_cost(s, load);
    double operations = t.fp8 / share.most.fp8 + t.bf16 / share.most.bf16;
    sum->weights += n * t.weights, sum->cache += n * t.cache, sum->rows += n * t.rows;
    sum->fp8 += n * t.fp8, sum->bf16 += n * t.bf16;
    sum->floor += n * fmax(cost_bytes(&t) / share.most.read, operations);
}

// ---- Steps

// n rows, whose ids are of this rank's part of the vocabulary: others' embeddings are zeros here.
// The arrays lie behind each other; load_free() frees the first one.
static Load load_new(bool prompt, int n, int context) {
    int pages = pages_for(context), n_seqs = prompt ? 1 : n, ids = share.m->embed_tokens.out;
    int *id = xcalloc((size_t)n * 4 + (size_t)n_seqs * pages, sizeof *id), *position = id + n;
    int *seq = position + n, *out = seq + n, *table = out + n;
    Load l = {prompt, context, {n, id, position, seq, table, pages, out, n_seqs}, 0};
    for (int i = 0; i < n; i++) {
        id[i] = mix(i + 1) % ids, seq[i] = prompt ? 0 : i, out[i] = prompt ? n - 1 : i;
        position[i] = prompt ? i : context - 1;
        l.seen += position[i] + 1;
    }
    for (int i = 0; i < n_seqs * pages; i++) table[i] = i;
    return l;
}

static void load_free(Load *l) { free((void *)l->batch.id); }

// Experts that the last routed rows have met.
static int experts_hit(void) {
    int n_experts = share.m->config.n_routed_experts, start[n_experts + 1], hit = 0;
    device_copy(start, share.m->routing.start, sizeof start);
    for (int e = 0; e < n_experts; e++) hit += start[e + 1] > start[e];
    return hit;
}

// The step once, not recorded, so that each layer's routing can be looked at.
static void hits_count(const Load *load) {
    Model *m = share.m;
    int hit = 0;
    step_record(0);
    if (!step_begin(&m->batch, &load->batch)) die("a step that is not recorded was");
    model_embed(m, &m->batch);
    for (int i = 0; i < m->config.num_hidden_layers; i++) {
        model_layer(m, i, &m->batch);
        if (m->layers[i].moe) hit += experts_hit();
    }
    share.hit = hit / fmax(1, stage_calls(EXPERTS));
    model_logits(m, &m->batch);
    step_end();
    step_record(INT_MAX);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Seconds of a step and its choices, as the engine does them, or of the choices alone.
static double step_seconds(const Load *load, bool choices_only) {
    double t[SHARE_STEPS];
    for (int i = -REPEATS; i < SHARE_STEPS; i++) {  // the first ones are not counted
        double start = now_seconds();
        if (!choices_only) model_step(share.m, &load->batch);
        stage_run(SAMPLE, 0);
        if (i >= 0) t[i] = now_seconds() - start;
    }
    qsort(t, SHARE_STEPS, sizeof *t, by_value);
    return t[SHARE_STEPS / 2];
}

// What the cache holds are latents that the model has made of its first rows, over and over.
static void cache_fill(int rows) {
    Load l = load_new(true, rows, rows);
    model_step(share.m, &l.batch);
    stage_run(SAMPLE, 0);  // waits
    load_free(&l);
    for (int i = 0; i < share.m->config.num_hidden_layers; i++)
        for (int have = rows / PAGE, n; have < share.n_pages; have += n) {
            size_t page = (size_t)PAGE * CACHE_DIM * sizeof(bf16);
            n = have < share.n_pages - have ? have : share.n_pages - have;
            device_copy((char *)share.m->cache[i] + have * page, share.m->cache[i], n * page);
        }
}

// ---- What is printed

static void stage_all(void *stage) {
    Stage s = *(Stage *)stage;
    const Config *c = &share.m->config;
    int first = s == ROUTE || s == EXPERTS ? c->first_k_dense_replace : 0;
    for (int i = 0; i < stage_calls(s); i++) stage_run(s, (first + i) % c->num_hidden_layers);
}

// Each stage by itself, in all layers one after the other, so that its weights come from memory.
// The rows of all layers' experts are then routed alike, as the last layer did.
static void profile_print(const Load *load, double step) {
    static const char *const names[] = {
        "embed", "add_norm", "q_a, kv_a", "mla_latent", "q_b", "mla_query", "mla_attend",
        "mla_value", "mla_attention", "o_proj", "moe_route", "moe_experts", "mlp", "norm, logits",
        "sample"};
    double sum = 0;
    printf("    stage          calls  us a call       MB     GB/s  floor us  floor/time\n");
    for (Stage s = 0; s < N_STAGES; s++) {
        Cost t = {0};
        int calls = stage_calls(s);
        if (!calls) continue;
        if (s == EXPERTS) share.hit = experts_hit();
        cost_add(&t, s, load);
        double seconds = s == SAMPLE ? step_seconds(load, true) : device_seconds(stage_all, &s);
        sum += seconds;
        printf("    %-13s %6d %10.2f %8.2f %8.0f %9.2f %9.1f %%\n", names[s], calls,
               seconds / calls * 1e6, cost_bytes(&t) / calls / 1e6,
               cost_bytes(&t) / seconds / 1e9, t.floor / calls * 1e6, 100 * t.floor / seconds);
    }
    printf("    all stages %.2f ms, the step %.2f ms\n", sum * 1e3, step * 1e3);
}

// NCCL's time for a step's sums, fitted to what others publish, within 30 % at best: 18 us and the
// ring's bytes at 370 GB/s for each; to a second node 22 us and an eighth of the bytes at 45 GB/s.
static double sums_model(int rows) {
    const Config *c = &share.m->config;
    double size = share.m->size, n = fmin(size, 8), bytes = 2.0 * rows * c->hidden_size;
    double each = 18e-6 + 2 * (n - 1) / n * bytes / 370e9;
    if (size > 8) each += 22e-6 + bytes / 8 / 45e9;
    return size > 1 ? (2 * c->num_hidden_layers + 1) * each : 0;
}

static void json_print(const Load *load, const Cost *t, double step) {
    const Ceilings *most = &share.most;
    int n = load->batch.n;
    const struct { const char *name; double value; } figures[] = {
        {"tp", share.m->size}, {"layers", share.m->config.num_hidden_layers}, {"rows", n},
        {"context", load->context}, {"experts_hit", share.hit}, {"weight_bytes", t->weights},
        {"cache_bytes", t->cache}, {"activation_bytes", t->rows}, {"fp8_ops", t->fp8},
        {"bf16_ops", t->bf16}, {"floor_s", t->floor}, {"step_s", step}, {"tokens_per_s", n / step},
        {"modelled_communication_s", sums_model(n)}, {"read_ceiling", most->read},
        {"copy_ceiling", most->copy}, {"fp8_ceiling", most->fp8}, {"bf16_ceiling", most->bf16}};
    fprintf(share.out, "{\"device\":\"%s\",\"date\":\"%s\",\"kind\":\"%s\"", most->name, share.date,
            load->prompt ? "prefill" : "decode");
    for (size_t i = 0; i < COUNT(figures); i++)
        fprintf(share.out, ",\"%s\":%.15g", figures[i].name, figures[i].value);
    fprintf(share.out, "}\n");
}

static void load_time(bool prompt, int rows, int context) {
    long pages = (prompt ? 1L : rows) * pages_for(context);
    printf("%-7s %6d %8d ", prompt ? "prefill" : "decode", rows, context);
    if (pages > share.n_pages) {
        printf(" does not fit: %ld tokens, %d would\n", pages * PAGE, share.plan.tokens);
        return;
    }
    Load load = load_new(prompt, rows, context);
    Cost t = {0};
    share.prompt = prompt;
    hits_count(&load);
    double step = step_seconds(&load, false);
    for (Stage s = 0; s < N_STAGES; s++) cost_add(&t, s, &load);
    printf("%7.1f %7.2f %7.2f %7.2f %8.2f %8.2f %6.1f %% %8.0f\n", share.hit, t.weights / 1e9,
           t.cache / 1e9, t.rows / 1e9, t.floor * 1e3, step * 1e3, 100 * t.floor / step,
           rows / step);
    if (share.out) json_print(&load, &t, step);
    if (share.o->profile) profile_print(&load, step);
    fflush(stdout);
    load_free(&load);
}

// A list like 1,8,64.
static Numbers numbers_parse(const Command *command, const char *flag, const char *text, int high) {
    Numbers list = {0};
    for (const char *p = text;; p++) {
        char *end;
        long v = strtol(p, &end, 10);
        if (end == p || *p < '0' || *p > '9' || v < 1 || v > high || list.n == MAX_LOADS ||
            (*end && *end != ','))
            usage_die(command, "%s: got \"%s\", want 1 to %d integers in 1..%d, with commas", flag,
                      text, MAX_LOADS, high);
        list.v[list.n++] = v, list.most = v > list.most ? v : list.most;
        if (!*(p = end)) return list;
    }
}

static void share_load(const Config *c, Checkpoint *files, int size, int max_out) {
    size_t before, after, total;
    Progress progress = {0};
    const MemoryPlan *plan = &share.plan;
    int tokens = share.n_pages * PAGE;
    bool gpu = device_memory(&before, &total);
    double start = now_seconds();
    share.m = model_load(c, files, 0, size, plan->rows, max_out, share.n_pages, &progress);
    device_wait();
    printf("weights %.2f GB, made up in %.1f s; a cache of %d tokens where %d would fit\n",
           progress.total_bytes / 1e9, now_seconds() - start, tokens, plan->tokens);
    device_memory(&after, &total);
    if (gpu)
        printf("memory, planned: weights %.2f GB, steps %.2f GB, cache %.2f GB; taken: %.2f GB\n",
               plan->weights / 1e9, (plan->steps + plan->logits) / 1e9,
               tokens * cache_bytes(c) / 1e9, (before - after) / 1e9);
    share.choice = xcalloc(max_out, sizeof *share.choice);
    share.sampling = xcalloc(max_out, sizeof *share.sampling);
    for (int i = 0; i < max_out; i++)
        share.sampling[i] = (Sampling){.temperature = 0.6, .top_p = 0.95, .top_k = -1, .seed = i,
                                       .repetition_penalty = 1, .top_logprobs = -1};
}

static void table_head(const char *dir, int layers) {
    const Ceilings *most = &share.most;
    printf("%s, %s: rank 0 of %d, %d of %d layers\nmodel: %s\n", most->name, share.date,
           share.o->tp, share.o->layers ? share.o->layers : layers, layers, dir);
    printf("measured ceilings: memory read %.0f GB/s, copied %.0f GB/s; products FP8 %.4g TFLOPS, "
           "bf16 %.4g\n", most->read / 1e9, most->copy / 1e9, most->fp8 / 1e12, most->bf16 / 1e12);
}

static void table_foot(const Numbers *batch, const Numbers *prefill) {
    printf("\nhit: experts that the rows chose, counted and averaged over layers. GB: weights of "
           "these and all\nothers, read once; cache read and written; what stages give each other. "
           "floor: the sum over\nstages of the longer of bytes / read ceiling and operations / "
           "their ceiling.\n");
    if (share.o->tp == 1) return;
    printf("Modelled, not measured, and in no figure above: NCCL's %d sums of a step,",
           2 * share.m->config.num_hidden_layers + 1);
    for (int i = 0; i < batch->n + prefill->n; i++) {
        int rows = i < batch->n ? batch->v[i] : prefill->v[i - batch->n];
        printf("%s%d rows %.2f ms", i % 4 ? ", " : "\n  ", rows, sums_model(rows) * 1e3);
    }
    printf("\n");
}

// The model as --layers leaves it.
static Config share_config(const Command *command, const ShareOptions *o, const char *dir) {
    Config c = config_load(dir);
    char err[256];
    config_check_ranks(err, sizeof err, &c, o->tp);
    if (*err) usage_die(command, "--tp: %s", err);
    if (o->layers > c.num_hidden_layers)
        usage_die(command, "--layers: got %d, want at most the model's %d", o->layers,
                  c.num_hidden_layers);
    if (o->layers) c.num_hidden_layers = o->layers;
    if (c.first_k_dense_replace > c.num_hidden_layers)
        c.first_k_dense_replace = c.num_hidden_layers;
    c.num_nextn_predict_layers = 0;
    return c;
}

int share_main(const Command *command, const ShareOptions *o) {
    const char *dir = model_directory(o->model_path ? o->model_path : default_model());
    Config c = share_config(command, o, dir);
    int longest = c.max_position_embeddings;
    const Numbers batch = numbers_parse(command, "--batch", o->batch, 4096);
    const Numbers context = numbers_parse(command, "--context", o->context, longest);
    const Numbers prefill = numbers_parse(command, "--prefill", o->prefill, longest);
    if (o->output_file && !(share.out = fopen(o->output_file, "a")))
        die("--output-file %s: %s", o->output_file, strerror(errno));
    strftime(share.date, sizeof share.date, "%Y-%m-%d %H:%M:%S", localtime(&(time_t){time(NULL)}));
    share.o = o;
    device_init(0, 1);
    share.most = device_ceilings();
    table_head(dir, o->layers ? config_load(dir).num_hidden_layers : c.num_hidden_layers);
    int rows = fmax(PAGE, fmax(batch.most, prefill.most));
    const Options all = {.tensor_parallel_size = o->tp};
    share.plan = memory_here(&c, &all, rows, batch.most);
    int pool = share.plan.tokens / PAGE;
    double weights = weights_plan(&c, o->tp);  // a GPU would have refused them by now
    size_t available, memory;
    device_memory(&available, &memory);
    if (weights > available)
        die("memory: want %.2f GB for weights, of %.2f GB that are free", weights / 1e9,
            available / 1e9);
    share.n_pages = pages_for(rows);
    if (pool < share.n_pages)
        die("the cache has room for %d tokens, want %d", share.plan.tokens, rows);
    for (int i = 0; i < batch.n * context.n; i++) {
        long pages = (long)batch.v[i / context.n] * pages_for(context.v[i % context.n]);
        if (pages <= pool && pages > share.n_pages) share.n_pages = pages;
    }
    Checkpoint *files = checkpoint_open(dir, true);
    share_load(&c, files, o->tp, batch.most);
    cache_fill(rows);
    printf("\n                       experts weights   cache  activ.    floor     step   floor/\n"
           "step     rows  context     hit      GB      GB      GB       ms       ms     step "
           "tokens/s\n");
    for (int i = 0; i < batch.n * context.n; i++)
        load_time(false, batch.v[i / context.n], context.v[i % context.n]);
    for (int i = 0; i < prefill.n; i++) load_time(true, prefill.v[i], prefill.v[i]);
    table_foot(&batch, &prefill);
    if (share.out && fclose(share.out) != 0) die("--output-file: %s", strerror(errno));
    model_free(share.m), checkpoint_close(files);
    free(share.choice), free(share.sampling);
    stdout_check();
    return 0;
}

// Bytes of a GPU, by its name or as a number.
static double gpu_bytes(const Command *command, const char *text) {
    // As nvidia-smi tells them, in MiB; the rest is the driver's.
    static const struct { const char *name; double bytes; } known[] = {
        {"h100", 81559.0 * (1 << 20)}, {"h200", 143771.0 * (1 << 20)}};
    char *end;
    double bytes = strtod(text, &end);
    for (size_t i = 0; i < COUNT(known); i++)
        if (!strcmp(text, known[i].name)) return known[i].bytes;
    if (end == text || *end || !(bytes >= 1e6 && bytes <= 1e13))
        usage_die(command, "--gpu: got \"%s\", want h100, h200 or bytes in 1e6..1e13", text);
    return bytes;
}

// What serve would make of GPUs that need not be there. Reads config.json alone.
static int plan_main(char **argv) {
    const Command command = {"plan", "plan [flags]: shows how a GPU's memory would be used", PLAN,
                             false, flags, COUNT(flags)};
    Options o = {0};
    char err[256];
    flags_parse(&command, &o, argv);
    Config c = config_load(model_directory(o.model_path ? o.model_path : default_model()));
    double gpu = gpu_bytes(&command, o.gpu);
    int tp = o.tensor_parallel_size, longest = c.max_position_embeddings;
    int context_len = o.context_length && o.context_length < longest ? o.context_length : longest;
    config_check_ranks(err, sizeof err, &c, tp);
    if (*err) die("--tp-size: %s", err);
    if (tp % o.nnodes) usage_die(&command, "--tp-size: got %d, want a multiple of --nnodes, %d", tp,
                                 o.nnodes);
    MemoryPlan p = memory_plan(&c, tp, most_rows(&o), MAX_OUT, gpu);
    double left = p.pool;
    bool fits = memory_divide(&p, &c, &o, gpu);
    Buf b = {0};
    memory_table(&b, &p, &c, tp, left - p.pool, context_len,
                 running_limit(&o, p.tokens, context_len));
    fputs(b.data, stdout);
    stdout_check();
    if (!fits) fprintf(stderr, "r1 plan: this does not fit: %.2f GB are missing\n",
                       (p.pool - left) / 1e9);
    buf_free(&b);
    return !fits;
}

int main(int argc, char **argv) {
    static const char *usage = "usage: r1 COMMAND [flags]\n\n"
                               "  serve      serve the OpenAI API over HTTP\n"
                               "  run        answer one prompt on the terminal\n"
                               "  plan       show how GPUs' memory would be used\n"
                               "  tokenize   show a text's tokens\n"
                               "  bench      measure a server\n"
                               "  help       this text; r1 COMMAND --help lists a command's flags\n"
                               "  version    print the version\n";
    const char *name = argc > 1 ? argv[1] : "help";
    int fd;  // 0, 1 and 2 are taken, or a socket would get what is meant for the terminal
    while ((fd = open("/dev/null", O_RDWR)) >= 0 && fd <= 2) {}
    if (fd > 2) close(fd);
    if (!strcmp(name, "serve")) return serve_main(argv + 2);
    if (!strcmp(name, "run")) return run_main(argv + 2);
    if (!strcmp(name, "plan")) return plan_main(argv + 2);
    if (!strcmp(name, "tokenize")) return tokenize_main(argv + 2);
    if (!strcmp(name, "bench")) return bench_main(argv + 2);
    if (!strcmp(name, "version") || !strcmp(name, "--version")) return puts("r1 " R1_VERSION), 0;
    if (!strcmp(name, "help") || !strcmp(name, "--help") || !strcmp(name, "-h"))
        return fputs(usage, stdout), 0;
    usage_die(NULL, "unknown command %s, want serve, run, plan, tokenize, bench, help or version",
              name);
}
