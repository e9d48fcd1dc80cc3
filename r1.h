// r1.h: the map of r1, DeepSeek R1 inference in plain C.
//
// One section per file that implements it, in the order in which a reader wants them: json.c and
// tokenizer.c turn bytes into ids, r1.c turns a checkpoint into a model and ids into tokens,
// kernels.c does the arithmetic, http.c speaks to the world, bench.c measures.
//
// Conventions: outputs first, then inputs, then dims. [n][hidden] is row-major. Sizes are in
// elements unless a name says bytes. A function that can fail on a user's input returns false or
// NULL and says why in `err`; a function that can fail on the machine or the checkpoint calls
// die().
#ifndef R1_H
#define R1_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE  // asprintf, sched_getaffinity, accept4: every file includes this one first
#endif

#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define R1_VERSION "0.1.0"

// -------------------------------------------------------------------------------------------------
// Numbers that belong to R1 and not to a size of it. config.json is checked against them.

enum {
    BLOCK = 128,       // side of a weight's scale block, and columns of an activation's scale group
    NOPE_DIM = 128,    // qk_nope_head_dim: the part of a head's query and key without position
    ROPE_DIM = 64,     // qk_rope_head_dim: the part that is rotated
    V_DIM = 128,       // v_head_dim
    LATENT_DIM = 512,  // kv_lora_rank: what all heads' keys and values are made from
    QK_DIM = NOPE_DIM + ROPE_DIM,       // one head of q_b_proj's output
    KV_DIM = NOPE_DIM + V_DIM,          // one head of kv_b_proj's output
    CACHE_DIM = LATENT_DIM + ROPE_DIM,  // one row of the latent cache: c (512), then k_pe (64)
    PAGE = 64,                          // tokens in a page of the cache
    MAX_EXPERTS_PER_TOK = 16,
    MAX_TOP_LOGPROBS = 64,
    MAX_STOPS = 64,  // stop strings of a request, and stop ids of a request
};

// -------------------------------------------------------------------------------------------------
// json.c: small things that every file needs, and JSON

typedef struct {  // borrowed bytes, any value, not terminated
    const char *data;
    size_t len;
} Str;

typedef struct {  // a growing byte string; data is NUL-terminated whenever it is not NULL
    char *data;
    size_t len, cap;
} Buf;

#define STR(literal) ((Str){literal, sizeof(literal) - 1})

// One line on stderr ("r1: ...") and exit(1): boot, configuration, checkpoint, CUDA, NCCL.
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
// One log line on stderr: "[2025-02-19 16:24:01 TP0] text"; rank < 0 leaves " TP0" out. Control
// characters of the text are escaped, so that nothing from outside can forge a second line.
void log_line(int rank, const char *format, ...) __attribute__((format(printf, 2, 3)));
double now_seconds(void);                        // monotonic clock
void *xmalloc(size_t bytes);                     // never NULL: no memory means die()
void *xcalloc(size_t count, size_t bytes);       // zeroed; the product is checked
void *xrealloc(void *old, size_t bytes);
char *format_string(const char *format, ...) __attribute__((format(printf, 1, 2)));  // malloc'ed
bool str_equal(Str a, const char *b);            // b is a C string
// The whole file as a NUL-terminated malloc'ed string, *len its bytes; NULL where it can't be read.
char *read_file(const char *path, size_t *len);

// Code points behind the last one, for bytes that aren't UTF-8, and for a text's last bytes where
// more of them could make a character.
enum { UTF8_INVALID = 0x110000, UTF8_PARTIAL };
size_t utf8_decode(uint32_t *code, const char *s, size_t len);  // len > 0; bytes of the character

void buf_add(Buf *b, const void *data, size_t len);
void buf_str(Buf *b, const char *text);
void buf_printf(Buf *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
void buf_vprintf(Buf *b, const char *format, va_list args);
void buf_shift(Buf *b, Buf *out, size_t n);      // moves the first n bytes to out; NULL: nowhere
void buf_free(Buf *b);                           // and zeroes it, so that it can be used again

typedef enum { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

// A document is an array of these in reading order: a container is followed by its elements, an
// object's by key, value, key, value. `skip` nodes further stands what follows the whole value.
typedef struct {
    JsonType type;
    uint32_t skip;      // nodes of this value, itself included
    uint32_t count;     // elements of an array, pairs of an object
    bool integer;       // a number that is exactly the integer `sign` x `magnitude`
    bool negative;
    union {
        bool boolean;
        struct { double number; uint64_t magnitude; };  // magnitude only if `integer`
        Str string;     // unescaped in place; may hold NUL bytes
    };
} Json;

// Parses strict RFC 8259 in place: strings of the result point into `text` (len bytes, which are
// overwritten and must outlive the result). One malloc'ed array, to be freed with free(). On an
// error NULL, and in err a text like: invalid JSON at byte 17: got 'x', want ',' or '}'
Json *json_parse(char *text, size_t len, char *err, size_t err_size);
const Json *json_get(const Json *object, const char *key);  // the LAST of equal keys; NULL: none
const Json *json_next(const Json *value);                   // the node behind a whole value
const Json *json_duplicate_key(const Json *object);  // the second of two equal keys' nodes, or NULL
// True and *out when the value is an integer in lo..hi; 16.0 counts as 16.
bool json_int(const Json *value, int64_t lo, int64_t hi, int64_t *out);
// "null", "bool", "number", "string", "array" or "object"
const char *json_type_name(const Json *value);

// Appends where a value stands in the document: messages[2].content[0].text
void json_path(Buf *b, const Json *root, const Json *value);

// The object that a file holds; its strings lie in *text, to be freed, too. Dies where there is
// none; NULL where `optional` and the file can't be read.
Json *json_load(char **text, const char *path, bool optional);
// The value at a path of keys and indices with dots between them, or NULL.
const Json *json_at(const Json *value, const char *path);
char *json_show(const Json *v);  // in words, malloc'ed: 0.5, true, a string's own text, array
// The value there; dies where it has another type, naming file and path.
const Json *json_want(const char *file, const Json *root, const char *path, JsonType type);
// Dies unless the value there is shown as `want`. Behind a '?' it may also be absent.
void json_expect(const char *file, const Json *root, const char *path, const char *want);

void json_write_string(Buf *b, Str s);           // with quotes; escapes only ", \ and below U+0020
void json_write_float(Buf *b, float f);  // fewest digits that read back as f; f must be finite

// -------------------------------------------------------------------------------------------------
// tokenizer.c: byte-level BPE, the chat templates, text that streams

typedef struct Tokenizer Tokenizer;

typedef struct {  // a growing list of token ids
    int *data;
    size_t len, cap;
} Ids;

void ids_add(Ids *ids, int id);

// tokenizer.json and tokenizer_config.json of `dir`; dies on what it can't do exactly.
Tokenizer *tokenizer_load(const char *dir);
void tokenizer_free(Tokenizer *t);
int tokenizer_vocab(const Tokenizer *t);         // ids 0..this-1 may have a token
// Appends the ids of any bytes (invalid UTF-8 too). Added tokens' texts are matched. Adds no BOS.
void tokenizer_encode(const Tokenizer *t, Ids *out, Str text);
Str tokenizer_bytes(const Tokenizer *t, int id);  // a token's own bytes; {NULL, 0}: none
bool tokenizer_special(const Tokenizer *t, int id);  // dropped by skip_special_tokens
int tokenizer_bos(const Tokenizer *t);  // the BOS id where tokenizer_config.json wants it, else -1

typedef enum { TEMPLATE_R1, TEMPLATE_R1_0528 } ChatTemplate;

typedef enum { ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL } Role;

typedef struct {
    Role role;
    Str content;            // data NULL: the message's content was null
    const Json *tool_calls; // an array of {type, function: {name, arguments}} or NULL
} Message;

// Which of R1's two templates tokenizer_config.json holds; dies where it is neither.
ChatTemplate tokenizer_template(const Tokenizer *t);
// True when the template's own generation prompt ends in <think>\n.
bool template_forces_think(ChatTemplate kind);
// Appends the rendered text, BOS first. With generation_prompt the answer's head follows: where
// `think`, "<think>\n" after <Assistant>. (The original's quirks are kept.)
void chat_render(Buf *out, ChatTemplate kind, const Message *messages, int n,
                 bool generation_prompt, bool think);

// From tokens to text: bytes, whole code points, stop strings. What can't be decided yet is held
// back. The joined deltas never depend on where tokens were cut.
typedef struct {
    const Tokenizer *tokenizer;
    bool skip_special, no_stop_trim;
    Str stop[MAX_STOPS];    // borrowed
    int n_stop;
    Buf bytes;              // not yet whole code points: at most 3 bytes
    Buf held;               // text that may be the head of a stop string
    int matched;            // index of the stop string that ended the text, or -1
} TextStream;

void text_init(TextStream *s, const Tokenizer *t, bool skip_special);
// Appends to `out` the text that token id makes certain. True when a stop string matched: the text
// is over. `match` false: this token's text takes no part in stop matching (min_tokens).
bool text_push(TextStream *s, Buf *out, int id, bool match);
void text_flush(TextStream *s, Buf *out);  // the end of the sequence: everything that was held
void text_free(TextStream *s);

// -------------------------------------------------------------------------------------------------
// r1.c, chapters "Config" and "Checkpoint"

typedef struct {  // config.json's keys
    int vocab_size, hidden_size, num_hidden_layers, num_nextn_predict_layers, first_k_dense_replace;
    int intermediate_size, moe_intermediate_size, n_routed_experts;
    int num_experts_per_tok, n_group, topk_group, num_attention_heads, q_lora_rank;
    int max_position_embeddings, eos_token_id;
    double rms_norm_eps, routed_scaling_factor, rope_theta;
    struct {
        double factor, beta_fast, beta_slow, mscale_all_dim;
        int original_max_position_embeddings;
    } rope_scaling;
    bool fp8;               // quantization_config is there: linears are e4m3 with block scales
    double temperature, top_p;  // generation_config.json's defaults; 1.0 where it is silent
} Config;

typedef enum { DTYPE_F8_E4M3, DTYPE_BF16, DTYPE_F32 } DType;

typedef struct {  // a vector of a checkpoint, as it lies there (perhaps not aligned)
    int dim;
    DType dtype;            // BF16 or F32
    const uint8_t *data;
} Vector;

typedef struct {  // elements that no file holds: one at (row, column) of a matrix's part is
    const void *value;      // value[dummy_index()], one of DUMMY_VALUES of its dtype
    uint64_t key;           // the hash of the tensor's name
    size_t origin, stride;  // in the whole tensor: which element the part begins with; of a row
} Dummy;

enum { DUMMY_VALUES = 4096 };

typedef struct {  // a matrix of a checkpoint, or the part that a rank has of it: y = x W^T
    int out, in;
    DType dtype;
    const uint8_t *data;    // [out][in], the twin's own layout
    const uint8_t *scale;   // F8_E4M3 only: f32 [ceil(out/128)][ceil(in/128)], multiplies
    int gap;                // elements of other ranks between two rows of data; a 128th in scale
    Dummy dummy[2];         // where data and scale come from while data is NULL
} Linear;

typedef struct {
    Linear gate_proj, up_proj, down_proj;
} Mlp;

typedef struct {  // the checkpoint's names behind "model.layers.{i}."
    Vector input_layernorm, post_attention_layernorm;
    struct {
        Linear q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj;
        Vector q_a_layernorm, kv_a_layernorm;
    } self_attn;
    bool moe;               // one of the following two is filled
    Mlp mlp;
    struct {
        Linear gate;        // the router
        Vector e_score_correction_bias;
        Mlp *experts;       // [n_routed_experts]
        Mlp shared_experts;
    } moe_mlp;
    struct {                // layer num_hidden_layers only: multi-token prediction
        Vector enorm, hnorm, shared_head_norm;
        Linear eh_proj, embed_tokens, shared_head;
    } mtp;
} Layer;

// Dies with one line, naming the key, what was got and what is wanted.
Config config_load(const char *dir);

// "": a group of `size` ranks can hold this model; else what is wrong, and which sizes it can have.
void config_check_ranks(char *err, size_t err_size, const Config *c, int size);

typedef struct Checkpoint Checkpoint;

typedef struct {  // of one rank; watched by other threads while it reads its part of a checkpoint
    _Atomic uint64_t loaded_bytes, total_bytes;
} Progress;

// Opens the tensors in `dir`: through model.safetensors.index.json where there is one, else one
// model.safetensors. Checks every offset and length; maps the files and copies nothing. `dummy`:
// every tensor is made from a hash of its name and the element's index instead; reads no file.
Checkpoint *checkpoint_open(const char *dir, bool dummy);
void checkpoint_close(Checkpoint *c);

// Reading, for a twin that does not compute from the maps: the same bytes from the disk, once for
// all ranks of a node. A rank says what it wants, then goes through all pieces in their order:
// waits for one, takes what it wants from it, releases it; or releases it at once.

enum {
    PIECE_BYTES = 8 << 20,  // at most
    SECTOR = 4096,          // O_DIRECT wants multiples of it: addresses, offsets, lengths
    READ_AHEAD = 32,        // pieces that are read and not yet released, or being read
};

typedef struct {
    const uint8_t *from, *end;  // where it lies in a file's map
    const uint8_t *data;    // what lies there, and SECTOR bytes more where the file has them
    int left;               // ranks that have not released it
} Piece;

// False where no file holds it. What several ranks want may overlap.
bool reading_want(const uint8_t *from, size_t bytes);
// Waits for all n_local ranks. One has ring [READ_AHEAD][PIECE_BYTES + SECTOR], others NULL.
Piece *reading_begin(int *n, uint8_t *ring, int n_local);
const uint8_t *reading_wait(const Piece *p);     // its data
void reading_release(void *piece);
uint8_t *reading_end(void);      // the last rank to leave gets the ring, to free it; others NULL

// -------------------------------------------------------------------------------------------------
// kernels.c: the stages. What is declared here is all that a version for a GPU has to implement.

#ifdef __CUDACC__
#define HOST_AND_DEVICE __host__ __device__
#else
#define HOST_AND_DEVICE
#endif

HOST_AND_DEVICE static inline uint64_t mix(uint64_t x) {  // splitmix64's finaliser
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

// Depends on the element's place in the whole tensor, so all ranks and twins make the same ones.
HOST_AND_DEVICE static inline size_t dummy_index(const Dummy *d, size_t row, size_t column) {
    size_t i = d->origin + row * d->stride + column;
    return mix(d->key + i * 0x9e3779b97f4a7c15ull) % DUMMY_VALUES;
}

// A bf16 in memory. Built with -DEXACT (tests only) it is a float and nothing is rounded or
// quantised, so that the maths can be compared with an oracle in f32 to 2e-5.
#ifdef EXACT
typedef float bf16;
#else
typedef uint16_t bf16;
#endif

// n rows on their way into a linear: normed or gated values, and their e4m3 form with one scale per
// row and 128 columns. The format is the twin's own.
typedef struct Act Act;

typedef struct {  // one step: n rows, each a token at a position of a sequence
    int n;
    const int *id;          // [n] token ids
    const int *position;    // [n] index in the sequence, 0 first
    const int *seq;         // [n] which row of `pages`
    const int *pages;  // [sequences][max_pages] the page that holds positions 64 i .. 64 i + 63
    int max_pages;
    const int *out;         // [n_out] the rows whose logits are wanted
    int n_out;
} Batch;

typedef struct {  // where a step's rows go in a MoE layer
    int *expert;            // [n][num_experts_per_tok] the likeliest choice first
    float *weight;          // [n][num_experts_per_tok] sum to routed_scaling_factor
    // The same as lists, one for each expert: entries start[e] .. start[e+1] - 1 of `pair` are
    // row x num_experts_per_tok + k, ascending.
    int *start;             // [n_routed_experts + 1]
    int *pair;              // [n x num_experts_per_tok]
    float *sum;             // [n][hidden] the twin's scratch
} Routing;

typedef struct {  // how one row's token is chosen
    float temperature, top_p, min_p;
    int top_k;              // -1: all
    float repetition_penalty, frequency_penalty, presence_penalty;
    uint64_t seed;
    const int *tokens;      // [n_tokens] prompt, then output: what the penalties count
    int n_prompt, n_tokens;
    const int *banned;      // [n_banned] ids that can't be chosen yet (min_tokens)
    int n_banned;
    const int *bias_id;     // [n_bias]
    const float *bias;      // [n_bias]
    int n_bias;
    int top_logprobs;  // how many of the likeliest ids are wanted with their logprobs; -1: none
    // NULL: draw; else no draw: this id's logprob is wanted (a prompt's token), and top_logprobs is
    // 0 or more.
    const int *given;
} Sampling;

typedef struct {
    int id;                 // -1: the logits held a NaN or nothing finite
    float logprob;          // of id, before penalties and temperature
    int n_top;
    int top_id[MAX_TOP_LOGPROBS];
    float top_logprob[MAX_TOP_LOGPROBS];
} Choice;

// Every rank is a thread, and calls device_init before anything else: it takes GPU `local` of this
// node, or its part of the cores. With n_local ranks here, local is 0 .. n_local - 1.
void device_init(int local, int n_local);
bool device_memory(size_t *available, size_t *total);  // bytes; true: a GPU's own
void *device_alloc(size_t bytes);                // zeroed; dies where there is none
void device_free(void *p);
// Returns when all that this rank's stages were told to do is done; dies where it can't be.
void device_wait(void);
void device_copy(void *to, const void *from, size_t bytes);  // to and from anywhere; waits

// Weights are placed before a stage reads them: the twin takes them to where its stages want them,
// in its own layout, and turns the pointers there. Returns the bytes that it took; what it has to
// read comes later, with place_next.
typedef enum {
    PLACE_MATRIX,
    PLACE_TABLE,  // rows are taken one by one: the embedding
    PLACE_KV_B,   // kv_b_proj, of which mla_query and mla_value take a half each
} Place;

size_t place_vector(Vector *v);
size_t place_linear(Linear *w, Place as);
size_t place_mlp(Mlp *m, int n, Mlp *shared);    // n of equal size and perhaps one more
size_t place_next(void);         // takes more of what was placed; 0: all of it is there
void place_free(void);           // gives back all that was placed, and what was reserved

enum { GROUP_ID = 128 };

typedef struct {            // who computes together: ranks, the same number on each node
    int rank, size;         // this one; of how many
    int local, n_local;     // the same among those of this node
    const uint8_t *id;      // [GROUP_ID] rank 0's group_id()
    const int *peer;        // sockets: node 0 has one to each other node, those have one to it
    int n_peers;
} Group;

// What others need to find rank 0 (NCCL's id; nothing on the CPU).
void group_id(uint8_t id[GROUP_ID]);
// All ranks at the same time, each in its thread. Before that, and with one rank, the collectives
// do nothing. They don't return where a peer is gone: the process ends.
void group_join(const Group *g);
void group_leave(void);

// What the stages of a step of so many rows keep to themselves. c: of a rank.
void step_reserve(int rows, const Config *c);
// A step's arrays are placed, too. Between the two calls stand the stages of one step, always the
// same ones; false where they need not be called, since the twin has recorded them at an equal
// step.
bool step_begin(Batch *placed, const Batch *b);
void step_end(void);
// From now on steps of at most so many rows are recorded, on all ranks; returns how many the twin
// can do, 0 where it needs no recording.
int step_record(int most);

Act *act_new(int rows, int cols);
void act_free(Act *a);
Routing routing_new(int rows, const Config *c);
void routing_free(Routing *r);

// cos, sin [n][32][2] f32 of the rows' rotary angles: f32(position) x inv_freq. (YaRN's inv_freq)
void rope_angles(float *rope, const float *inv_freq, const int *position, int n);

// x [n][hidden] = table[id - first], or 0 where the id is in another rank's rows. (model.py
// ParallelEmbedding)
void embed(bf16 *x, const Linear *table, int first, const int *id, int n);

// x [n] = the sum of all ranks' x, the same bits on all of them. On the CPU in f32, rounded once;
// NCCL has its own order and rounds to bf16 on the way. (Megatron-LM, section 3)
void all_reduce(bf16 *x, size_t n);

// out [n][ranks x cols] f32, on rank 0, of each rank's in [n][cols]. Behind its own, rank 0 has
// room for the others'.
void all_gather(float *out, float *in, int cols, int n);

// x [n][hidden] += y (NULL: nothing), rounded; a = quant(x rsqrt(mean x^2 + eps) gain). (RMSNorm)
void add_norm(bf16 *x, Act *a, const bf16 *y, const Vector *gain, float eps, int n);

// y [n][out] = a W^T: e4m3 x e4m3 summed over 128 columns, times both scales, summed in f32; with a
// bf16 W the unquantised a. (V3 report 3.3.2; DeepGEMM)
void linear(bf16 *y, const Act *a, const Linear *w, int n);
// The same for two matrices of one input. (q_a_proj and kv_a_proj_with_mqa)
void linear_pair(bf16 *y0, bf16 *y1, const Act *a, const Linear *w0, const Linear *w1, int n);

// q [n][q_lora_rank] is normed and quantised into qa; kv [n][576]'s latent part is normed, its k_pe
// rotated, and both go to the row's place in cache [pages][64][576]. (V2 paper 2.1.2; V3 eq. 1-5)
void mla_latent(Act *qa, bf16 *cache, const bf16 *q, const bf16 *kv, const Vector *q_gain,
                const Vector *kv_gain, float eps, const float *rope, const Batch *b);

// query [n][heads][576] = [ q_nope W_UK (512) | rotated q_pe (64) ] of q [n][heads][192]: the keys'
// up-projection absorbed into the query, so that attention reads latents only. (V2 paper, appendix
// C)
void mla_query(bf16 *query, const bf16 *q, const Linear *kv_b_proj, const float *rope, int heads,
               int n);

// u [n][heads][512] = softmax(scale query . cache) cache[:512] over the row's own sequence up to
// its own position. Scores, softmax and sums in f32.
void mla_attend(bf16 *u, const bf16 *query, const bf16 *cache, float scale, int heads,
                const Batch *b);

// o = quant(u W_UV^T) per head: [n][heads*128], the input of o_proj.
void mla_value(Act *o, const bf16 *u, const Linear *kv_b_proj, int heads, int n);

// All three, of q and rope as in mla_query. A twin may take another way that gives the same o: a
// GPU makes keys and values of a prompt's tokens again. query, u: room for what is between.
void mla_attention(Act *o, bf16 *query, bf16 *u, const bf16 *q, const bf16 *cache,
                   const Linear *kv_b_proj, const float *rope, float scale, int heads,
                   const Batch *b);

// The 8 (num_experts_per_tok) experts of each row and their weights: sigmoid scores of the
// unquantised row; bias only for choosing; the best groups by the sum of their two best. (V3 eq.
// 13-16)
void moe_route(Routing *r, const Act *a, const Linear *gate, const Vector *bias, const Config *c,
               int n);

// y [n][hidden] = sum over chosen experts of weight x expert(a), plus shared(a); summed in f32,
// rounded once. h: room for n x (num_experts_per_tok + 1) rows of moe_intermediate_size. (V3 eq.
// 12)
void moe_experts(bf16 *y, Act *h, const Act *a, const Routing *r, const Mlp *experts,
                 const Mlp *shared, const Config *c, int n);

// y [n][hidden] = down(silu(gate(a)) * up(a)); h: room for n rows of intermediate_size.
void mlp(bf16 *y, Act *h, const Act *a, const Mlp *m, int n);

// out [n_rows][vocab] f32 = a[rows] lm_head^T, a unquantised.
void logits(float *out, const Act *a, const Linear *lm_head, const int *rows, int n_rows);

// Philox4x32-10: four random words, a pure function of key and counter. (Salmon et al. 2011)
void philox(uint32_t out[4], uint64_t key, const uint32_t counter[4]);

// Chooses one token for each row of l [n][stride] (overwritten), of whose entries the first `vocab`
// are tokens. In this order: logprobs of the model's own l; banned ids; repetition, frequency and
// presence penalty; bias; greedy where temperature is 0 or top_k 1; temperature; top_k, top_p and
// min_p, all on the same probabilities; argmax of l + Gumbel noise of (seed, n_tokens, id). Ties go
// to the lowest id.
void sample(Choice *out, float *l, const Sampling *s, int vocab, int stride, int n);

typedef struct {            // the most that the machine can do, as measured
    char name[64];
    double read, copy;      // bytes/s of memory; copy: read and written
    double fp8, bf16;       // operations/s of matrix products
} Ceilings;

Ceilings device_ceilings(void);
// Seconds that work(arg) takes, whose stages must not wait for the host: the median of some runs.
double device_seconds(void (*work)(void *), void *arg);

// -------------------------------------------------------------------------------------------------
// r1.c, chapters "One step" and "Many at once"

typedef struct {  // one rank's part
    int rank, size;
    Config config;          // as a rank has it: heads and intermediate sizes are divided by size
    Linear embed_tokens, lm_head;
    Vector norm;
    Layer *layers;          // [num_hidden_layers + num_nextn_predict_layers]
    float inv_freq[ROPE_DIM / 2];
    float softmax_scale;
    // Everything that a step writes, allocated once.
    int max_rows, max_out;
    Batch batch;            // as the twin placed it
    bf16 **cache;           // [layers] of [n_pages][64][576]
    float *rope;
    float *logits;          // [max_out][vocab_size], on rank 0 only
    float *part;            // [max_out][vocab_size / size] where there are several; rank 0: of all
    bf16 *x, *y, *q_a, *kv_a, *q, *query, *u;
    Act *normed, *q_latent, *heads_out, *dense_hidden, *expert_hidden;
    Routing routing;
} Model;

// Places a rank's part of the checkpoint and allocates for steps of max_rows rows, max_out of them
// with logits, and a cache of n_pages pages. The checkpoint must stay open. progress may be NULL.
Model *model_load(const Config *c, Checkpoint *files, int rank, int size, int max_rows, int max_out,
                  int n_pages, Progress *p);
void model_free(Model *m);
void model_embed(Model *m, const Batch *b);              // x = the tokens' embeddings
void model_layer(Model *m, int layer, const Batch *b);   // x, y: one decoder layer
void model_logits(Model *m, const Batch *b);  // m->logits [n_out][vocab_size], of max_out at most
void model_step(Model *m, const Batch *b);               // all of them
// m->logits of n of the last step's wanted rows, from the first-th on.
void model_more_logits(Model *m, int first, int n);

typedef enum { FINISH_NONE, FINISH_STOP, FINISH_LENGTH, FINISH_ABORT, FINISH_ERROR } Finish;

// One prompt and its answer. The HTTP thread fills the first part, hands it over with engine_submit
// and gets events until one has a finish; then it is the HTTP thread's again, and is freed with
// seq_free.
typedef struct Seq {
    struct Seq *next;
    char rid[136];          // at most 128 given characters, and "_1023" where there are several
    void *owner;            // the HTTP thread's own, as is index: which choice of the request
    int index;
    Ids tokens;             // the prompt; the engine appends the answer
    int n_prompt;
    Sampling sampling;      // its tokens, n_tokens, n_prompt, banned and given are the engine's
    int max_tokens, min_tokens;
    int score_from;         // prompt tokens from here on are events, too, with logprobs; 0: none
    bool ignore_eos, has_seed;
    bool probe;             // /health_generate's: ahead of the queue, neither logged nor counted
    int stop_id[MAX_STOPS + 1], n_stop_id;  // one more for the engine
    TextStream text;
    atomic_bool cancelled;  // set by engine_cancel: the next step is without it
    double arrival;
    // The engine's.
    uint64_t request;       // its number since boot; its choices share it
    int n_computed;         // tokens whose latents are in the cache
    int n_cached;           // prompt tokens that it found there when it first ran
    int n_scored;           // prompt tokens whose events are out, or need none
    int n_rows;             // in this step
    int row, n_pages;       // of the page table; pages in it
    uint64_t chain;         // the name of its last full page
    bool admitted;          // it has run before
    double first_token;     // when it came; 0: not yet
} Seq;

typedef struct Event {  // one token of one sequence, or its end, or both
    struct Event *next;
    Seq *seq;
    bool has_token;
    bool prompt;            // has_token, and it is the prompt's: in order, before all of the answer
    Choice choice;          // with has_token
    Finish finish;
    int stop_id;            // FINISH_STOP: the token id that ended it, or -1 and
    int stop_string;        // the index of the stop string
    Buf text;               // what became certain; owned
} Event;

typedef enum {  // /health's status; failed: Server.failure says why
    STATE_STARTING, STATE_CONNECTING, STATE_LOADING, STATE_WARMUP, STATE_READY, STATE_DRAINING,
    STATE_FAILED
} State;

enum { MAX_RANKS = 64 };

typedef struct {  // what is known of a rank, of this node or another
    _Atomic int state;      // State; ready once it has loaded
    Progress progress;
} RankStatus;

typedef struct {  // a flag that may be repeated
    const char *text[MAX_STOPS];
    int n;
} TextList;

typedef struct {  // the flags by their long names
    const char *model_path, *tokenizer_path, *served_model_name, *load_format, *host, *api_key;
    const char *chat_template, *think, *gpu, *reasoning_parser, *log_level, *log_level_http;
    const char *schedule_policy;
    int port, context_length, max_total_tokens, max_running_requests, max_queued_requests;
    int chunked_prefill_size, max_prefill_tokens, random_seed, stream_interval;
    int decode_log_interval, watchdog_timeout;
    int tensor_parallel_size, nnodes, node_rank, dist_timeout, cuda_graph_max_bs;
    const char *dist_init_addr;
    double mem_fraction_static;
    bool allow_auto_truncate, disable_radix_cache, enable_cache_report, log_requests;
    bool skip_server_warmup, disable_cuda_graph;
    // r1 run and r1 tokenize
    const char *system;
    TextList stop;
    int max_tokens, top_k;
    double temperature, top_p, min_p;
    uint64_t seed;
    bool raw, no_bos, ids, chat, decode;
} Options;

typedef struct {  // what both threads see; no lock but the two queues'
    Options options;
    const char *model_dir;  // where --model-path is
    Config config;
    Tokenizer *tokenizer;
    ChatTemplate template_kind;
    bool think;             // the generation prompt ends in <think>\n
    int context_len, max_total_tokens;   // tokens: the longest sequence; what the cache holds
    double boot;            // now_seconds() at start
    long created;           // Unix time at start
    int port;               // that HTTP is served at
    int node, n_local;      // which node of the group this is, 0 leads; ranks on each node
    int n_ranks;            // of the whole group
    RankStatus ranks[MAX_RANKS];
    _Atomic int state;      // State, of the whole group
    const char *_Atomic failure;    // why it can't go on; NULL while it can
    _Atomic int stops;      // 1: it drains; 2: it aborts what runs
    _Atomic bool over;      // a worker's: the leader has ended
    const char *_Atomic leader;     // a worker's: where the leader serves HTTP
    uint64_t fingerprint;   // of config.json, the weight index and r1's version
    // What the engine tells of itself. Probes and the warm-up don't count, but for their steps.
    _Atomic uint64_t steps, preempted;      // since boot
    _Atomic uint64_t prompt_tokens, cached_tokens;  // prefilled; those that were in the cache
    _Atomic int running, queued;            // sequences
    _Atomic int used_tokens;                // of the cache, in pages that live sequences hold
    _Atomic double cache_hit_rate;          // 0..1, since boot or flush
    _Atomic double gen_throughput;          // tokens/s, of the last "Decode batch" line
    _Atomic double step_start;              // now_seconds() of the running step; 0: none runs
    int wake_fd;            // the HTTP thread polls it: readable when events wait
} Server;

extern Server server;
// Moves n bytes to or from the node at a socket's other end. Where that is gone the group is told,
// and this thread waits for the process' end, which comes soon.
void peer_move(int fd, int node, bool out, void *data, size_t n);
long max_req_len(void);  // tokens of the longest sequence: the model's limit, or the cache's
void engine_submit(Seq *s);          // any thread; ownership passes until its finish event
Event *engine_events(void);  // the waiting events, oldest first, a list to free; never blocks
// The HTTP thread no longer wants s, which it has submitted: no step after the running one is for
// it. Its last event comes.
void engine_cancel(Seq *s);
// Finishes what runs and waits, or aborts it; then the engine's thread ends.
void engine_stop(bool abort_all);
void engine_flush(void);  // forgets all cached prefixes, before anything that is submitted later
// The flags of serve, but for the API key, as members of a JSON object: "host":"0.0.0.0",...
void options_json(Buf *b);
Seq *seq_new(void);                  // with the API's defaults
void seq_free(Seq *s);
void event_free(Event *e);

// -------------------------------------------------------------------------------------------------
// r1.c, chapter "Commands": what a command's table of flags is made of

typedef enum {
    TEXT, WORD, INTEGER, LONG, REAL, SWITCH, LIST,  // WORD: one of those before the help's colon
    ONLY,           // one value, which must be one of `fallback`
    IGNORED,        // no value, no effect
    IGNORED_VALUE,  // one value, no effect
    REFUSED,        // would change what is served
} FlagKind;

typedef struct {
    const char *names;  // the long name, then others, with blanks between
    int commands;       // a set of the bits of the commands that take it
    FlagKind kind;
    size_t offset;      // in the command's options
    double low, high;
    const char *fallback, *help;  // the default as text, NULL: none
} Flag;

typedef struct {
    const char *name, *synopsis;
    int bit;
    bool takes_text;
    const Flag *flags;
    size_t n_flags;
} Command;

// Reads a command's flags into its options, which hold what flags without a fallback default to.
// What is no flag is the text, at most one; NULL: none. On --help and on mistakes it exits.
const char *flags_parse(const Command *c, void *options, char **argv);
// One line on stderr, "r1 serve: ...", and exit code 2.
_Noreturn void usage_die(const Command *c, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

typedef struct {  // r1 bench --offline: lists are text, with commas
    const char *model_path, *batch, *context, *prefill, *output_file;
    int tp, layers;
    bool profile;
} ShareOptions;

int share_main(const Command *c, const ShareOptions *o);

// -------------------------------------------------------------------------------------------------
// bench.c: a client that measures any server

int bench_main(char **argv);  // the arguments behind "bench"; the exit code

// -------------------------------------------------------------------------------------------------
// http.c: sockets, HTTP/1.1, SSE, the endpoints

typedef struct {  // the tests make them smaller
    int connections, header_bytes, header_fields;
    size_t body_bytes, all_bodies_bytes;     // of one request; of all that are held at once
    double header_s, body_gap_s, idle_s, stall_s, linger_s, probe_s;
} HttpLimits;

extern HttpLimits http_limits;
// Binds host:port and returns the listening socket; dies with one line where it can't.
int tcp_listen(const char *host, int port);
int http_listen(const char *host, int port);  // the same for HTTP, and says so in the log
// Serves until http_stop() was called and all requests are answered. Runs in the calling thread.
void http_serve(int listen_fd);
// 1 drains, 2 aborts; less than before changes nothing. Any thread, or a signal handler.
void http_stop(int level);
// How much of its weights a rank has, 0..1, and which of n ranks is furthest behind. Any thread.
double rank_loaded(int rank);
int rank_slowest(int first, int n);
// Any thread: the group can't go on. All who wait are told why, then http_serve ends. The first
// reason stays; false for others. Takes the malloc'ed text.
bool http_fail(char *reason);

#endif
