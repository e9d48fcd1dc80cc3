// http.c: sockets, HTTP/1.1, SSE and the endpoints. It knows requests and text, and no tensors.
//
// The idea: a connection is a small machine between two buffers. What came lies in `in`, what must
// go lies in `out`, and a state says what the next byte means. conn_run() sends what is in `out`,
// then lets the state take one step, until it has to wait for the client or the engine. Nothing
// blocks: one poll() waits for all sockets, the engine's events and http_stop().
//
// A request that generates has a Call: one Seq for each choice, and an Answer that gathers what
// comes of it. A Seq that the engine has can only be freed after its last event, so a connection
// stays in the list until then, even when its client has left. All of this runs in one thread, so
// there is no lock.
#include "r1.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

HttpLimits http_limits = {
    .connections = 4096, .header_bytes = 32 << 10, .header_fields = 100, .body_bytes = 32 << 20,
    .all_bodies_bytes = 1 << 30, .header_s = 10, .body_gap_s = 30, .idle_s = 75, .stall_s = 300,
    .linger_s = 2, .probe_s = 20,
};

enum {
    READ_BYTES = 64 << 10,     // taken from a socket at once: no client keeps the others waiting
    CHUNK_LINE = 4096,         // a chunk's size with its extensions
    SPARE_FDS = 64,            // files beside the connections: checkpoint, engine, log
    GOODBYES = 32,             // connections above the limit that are still told so
    EVENT_TEXT = 24 << 10,     // text in one event, counted as JSON, and
    EVENT_ENTRIES = 32 << 10,  // logprobs in one event: together they stay below 64 KiB
    LISTS = 4,                 // of logprobs, in one choice
    SHOWN = 64, LINE = 1024,   // bytes repeated of a wrong value; of a target or a model's name
    STOP_BYTES = 1024, MAX_BIAS = 1024, MAX_SEQS = 1024, MAX_RID = 128,
};

typedef enum {
    IDLE,       // nothing of a request is there yet
    HEADER,     // a part of its header is
    BODY,       // the header is understood, the body comes
    COMPUTING,  // the engine works and the answer has not begun
    STREAMING,  // the answer's head is out, events follow
    WRITING,    // the answer is complete and lies in `out`
    LINGER,     // said goodbye; what the client still sends is thrown away
    DEAD,       // closed; freed behind the round, or behind its call's last event
} ConnState;

typedef struct Conn Conn;
typedef struct Call Call;

typedef struct {
    const char *path;         // with a slash at its end: all that begins so
    const char *method, *also;  // what it takes; `also` may be NULL
    enum { OPENAI, GENERATE, HEALTH } shape;  // of its errors' JSON
    bool (*handler)(Conn *c);                 // false when it refused
    bool always;              // answers before the server is ready, too
    bool quiet;               // comes every few seconds: a 200 shows in the log only at debug
} Route;

typedef struct {  // what a header said; its strings lie in Conn.head
    Str method, target, path;  // path: the target without its query and last slash
    Str authorization, origin, cors_headers;
    bool http10, chunked, has_length, expects, body_done;
    bool close;              // the connection ends with this answer
    enum { CHUNK_SIZE, CHUNK_END, CHUNK_TRAILER } line;  // what a chunked body's next line is
    uint64_t left, trailer;  // bytes of the body or its chunk still to come; of trailers so far
    const Route *route;      // NULL: none
    const Json *json;        // the body of a POST: an object
    const char *extra;       // header fields for the answer, or NULL
} Request;

struct Conn {
    Conn *next;
    int fd;
    char peer[INET6_ADDRSTRLEN], port[8];  // as the log shows them
    ConnState state;
    double since;          // when the state began or bytes last moved: timeouts count from here
    Buf in, out, head, body;
    size_t in_at, out_at;  // how much of `in` is used up, how much of `out` is sent
    bool blocked;          // the socket takes no more for now
    Request request;
    Call *call;            // of a request that generates
    int n_live;            // its sequences that the engine has: until 0 the Conn must stay
    bool touched;          // got events in this round, and has not run since
};

static Conn *conns;
static int n_open;              // connections, without the dead ones
static int max_files;           // RLIMIT_NOFILE, as high as http_listen() could set it
static size_t bodies_held;      // bytes, of all requests
static double now;              // of this round
static int stops;               // of server.stops, what http_serve() has acted upon

#define ARG(s) (int)(s).len, (s).data  // a Str for %.*s

// Passing texts: an empty buffer, a string as JSON, a formatted text. Nobody has to free them; they
// are good until their place in the ring is taken again, fifteen calls later.
static Buf *scratch(void) {
    static Buf ring[16];
    static unsigned turn;
    Buf *b = &ring[turn++ % 16];
    if (b->cap > READ_BYTES) buf_free(b);
    b->len = 0;
    buf_str(b, "");
    return b;
}

static const char *quoted(Str s) {
    Buf *b = scratch();
    json_write_string(b, s);
    return b->data;
}

__attribute__((format(printf, 1, 2))) static const char *at(const char *format, ...) {
    va_list args;
    va_start(args, format);
    Buf *b = scratch();
    buf_vprintf(b, format, args);
    va_end(args);
    return b->data;
}

static Str str_of(const char *text) { return (Str){text, strlen(text)}; }
static Str buf_text(const Buf *b) { return (Str){b->data ? b->data : "", b->len}; }
static Str str_cut(Str s, size_t most) { return (Str){s.data, s.len < most ? s.len : most}; }
static bool str_begins(Str s, Str a) { return s.len >= a.len && !memcmp(s.data, a.data, a.len); }
static bool str_is(Str s, const char *lower) {  // letters of either case
    return s.len == strlen(lower) && !strncasecmp(s.data, lower, s.len);
}
static Str text_cut(Str s, size_t most) {  // between two characters
    while (most && most < s.len && (s.data[most] & 0xC0) == 0x80) most--;
    return str_cut(s, most);
}
static void conn_state(Conn *c, ConnState state) { c->state = state, c->since = now; }

// -------------------------------------------------------------------------------------------------
// Answers. respond() is the only way to a complete answer, refuse() the only way to an error.

typedef struct { int code; const char *reason, *type; } Status;  // type: in an error's JSON

static const Status statuses[] = {
    {200, "OK", ""}, {204, "No Content", ""}, {401, "Unauthorized", ""},
    {400, "Bad Request", "BadRequestError"}, {404, "Not Found", "NotFoundError"},
    {405, "Method Not Allowed", "MethodNotAllowedError"},
    {408, "Request Timeout", "RequestTimeoutError"},
    {413, "Payload Too Large", "PayloadTooLargeError"},
    {415, "Unsupported Media Type", "UnsupportedMediaTypeError"},
    {431, "Request Header Fields Too Large", "HeaderTooLargeError"},
    {500, "Internal Server Error", "InternalServerError"},
    {501, "Not Implemented", "NotImplementedError"},
    {503, "Service Unavailable", "ServiceUnavailableError"},
    {505, "HTTP Version Not Supported", "HTTPVersionError"},
};
enum { STATUSES = sizeof statuses / sizeof *statuses };
static uint64_t responses[STATUSES];  // sent with each of them

static const Status *status_find(int code) {
    const Status *s = statuses;
    while (s->code != code) s++;
    return s;
}

// Status line and header. length -1: a stream, chunked in HTTP/1.1, up to the end in HTTP/1.0.
static void respond_head(Conn *c, int code, const char *type, long length) {
    Request *r = &c->request;
    const Status *s = status_find(code);
    const Options *o = &server.options;
    const char *level = o->log_level_http ? o->log_level_http : o->log_level;
    bool quiet = code == 200 && r->route->quiet;
    responses[s - statuses]++;
    if (!strcmp(level, "debug") || (!strcmp(level, "info") && !quiet))  // SGLang's form
        log_line(-1, "INFO:     %s:%s - \"%.*s %.*s HTTP/1.1\" %d %s", c->peer, c->port,
                 ARG(r->method), ARG(str_cut(r->target, LINE)), code, s->reason);
    // Behind a body that was not read to its end nobody could tell where the next request begins.
    r->close |= r->http10 || !r->body_done || stops;
    buf_printf(&c->out, "HTTP/1.1 %d %s\r\n", code, s->reason);
    if (length) buf_printf(&c->out, "Content-Type: %s\r\n", type);
    // A 204 must not have a length (RFC 9110, 8.6).
    if (length >= 0 && code != 204) buf_printf(&c->out, "Content-Length: %ld\r\n", length);
    if (length < 0 && !r->http10) buf_str(&c->out, "Transfer-Encoding: chunked\r\n");
    if (r->close) buf_str(&c->out, "Connection: close\r\n");
    if (r->origin.len)
        buf_printf(&c->out, "Access-Control-Allow-Origin: %.*s\r\n"
                   "Access-Control-Allow-Credentials: true\r\nVary: Origin\r\n", ARG(r->origin));
    buf_printf(&c->out, "%s\r\n", r->extra ? r->extra : "");
}

// Answers with what the handler has written into `out`: the head goes in front of it. HEAD gets its
// length and not its bytes. Always true, so that a handler can say `return respond(...)`.
static bool respond_as(Conn *c, int code, const char *type) {
    Buf body = c->out;
    c->out = (Buf){0};
    respond_head(c, code, type, (long)body.len);
    if (!str_equal(c->request.method, "HEAD")) buf_add(&c->out, body.data, body.len);
    buf_free(&body);
    conn_state(c, WRITING);
    return true;
}

static bool respond(Conn *c, int code) { return respond_as(c, code, "application/json"); }

static const char *const state_names[] = {"starting", "connecting", "loading", "warmup",
                                          "ready",    "draining",   "failed"};

static Str served_name(void) {
    const Options *o = &server.options;
    return str_of(o->served_model_name ? o->served_model_name : o->model_path);
}

// Draining is this thread's to decide; the engine may still report progress of its own.
static int server_state(void) {
    if (server.failure) return STATE_FAILED;
    return stops && server.state != STATE_FAILED ? STATE_DRAINING : server.state;
}

double rank_loaded(int rank) {
    const Progress *p = &server.ranks[rank].progress;
    return (double)p->loaded_bytes / fmax(1, (double)p->total_bytes);
}

int rank_slowest(int first, int n) {
    int slowest = first;
    for (int i = first; i < first + n; i++)
        if (rank_loaded(i) < rank_loaded(slowest)) slowest = i;
    return slowest;
}

static void group_loaded(uint64_t *loaded, uint64_t *total) {
    *loaded = *total = 0;
    for (int i = 0; i < server.n_ranks; i++) {
        *loaded += server.ranks[i].progress.loaded_bytes;
        *total += server.ranks[i].progress.total_bytes;
    }
}

// A rank that has loaded is where the group is.
static void ranks_write(Buf *b, int state) {
    bool serving = state >= STATE_WARMUP && state < STATE_FAILED;
    for (int i = 0; i < server.n_ranks; i++) {
        const RankStatus *r = &server.ranks[i];
        buf_printf(b, "%s{\"rank\":%d,\"node\":%d,\"state\":\"%s\",\"loaded_bytes\":%lu,"
                   "\"total_bytes\":%lu}", i ? "," : "", i, i / server.n_local,
                   state_names[serving ? state : r->state], r->progress.loaded_bytes,
                   r->progress.total_bytes);
    }
}

// The JSON of /health. It asks no other thread and waits for nothing.
static const char *health_json(void) {
    int state = server_state();
    uint64_t loaded, total;
    group_loaded(&loaded, &total);
    const double giga = 1e9, instant = 1e-3;
    double uptime = fmax(now - server.boot, instant), rate = (double)loaded / uptime;
    const char *eta = loaded ? at("%.1f", (double)(total - loaded) / rate) : "null";
    const char *work = state == STATE_READY || state == STATE_DRAINING ?
        at("\"steps\":%lu,\"running\":%d,\"queued\":%d", server.steps, server.running,
           server.queued) :
        at("\"loaded_bytes\":%lu,\"total_bytes\":%lu,\"gb_per_s\":%.2f,\"eta_s\":%s", loaded, total,
           rate / giga, eta);
    const char *failure = server.failure;
    const char *reason = failure ? at(",\"reason\":%s", quoted(str_of(failure))) : "";
    Buf *ranks = scratch();
    ranks_write(ranks, state);
    return at("{\"status\":\"%s\",\"ready\":%s,\"version\":\"%s\",\"uptime_s\":%.1f,%s%s,"
              "\"ranks\":[%s]}", state_names[state], state == STATE_READY ? "true" : "false",
              R1_VERSION, uptime, work, reason, ranks->data);
}

// One event of a stream, which is a chunk by itself.
static void stream_event(Conn *c, const char *json) {
    bool chunked = !c->request.http10;
    if (chunked) buf_printf(&c->out, "%zx\r\n", strlen(json) + strlen("data: \n\n"));
    buf_printf(&c->out, "data: %s\n\n%s", json, chunked ? "\r\n" : "");
}

static void stream_end(Conn *c) {
    stream_event(c, "[DONE]");
    if (!c->request.http10) buf_str(&c->out, "0\r\n\r\n");
    conn_state(c, WRITING);
}

// Answers with an error, in the route's shape. The text begins with the
// field's path, where there is one (else param is NULL). Behind a stream's head it is a last event.
// Always false, so that whoever parses can say `return refuse(...)`.
#define refuse(c, code, param, ...) refuse_text(c, code, param, at(__VA_ARGS__))

static bool refuse_text(Conn *c, int code, const char *param, const char *text) {
    Request *r = &c->request;
    int shape = r->route ? (int)r->route->shape : OPENAI;
    const char *message = quoted(str_of(param ? at("%s: %s", param, text) : text));
    const char *error = code == 401 ? "{\"error\":\"Unauthorized\"}" :
        shape == HEALTH ? health_json() :
        shape == GENERATE ? at("{\"error\":{\"message\":%s}}", message) :
        at("{\"object\":\"error\",\"message\":%s,\"type\":\"%s\",\"param\":%s,\"code\":%d}",
           message, status_find(code)->type, param ? quoted(str_of(param)) : "null", code);
    if (c->state == STREAMING) {
        stream_event(c, shape == OPENAI ? at("{\"error\":%s}", error) : error);
        stream_end(c);
        r->close = true;
    } else {
        c->out.len = 0;  // a handler may have begun with an answer
        buf_str(&c->out, error);
        respond(c, code);
    }
    return false;
}

// -------------------------------------------------------------------------------------------------
// Fields of a JSON body. A rule stands once, in a table that drives parsing and the error's text.

typedef struct {        // the strings lie in the request's body
    Seq seq;            // what all sequences begin as; max_tokens -1: as many as fit
    int n, top_logprobs, start_len;
    uint32_t prompt, prompts;  // which of how many these are for: /generate has some for each
    int sharers;        // sequences that get their names from `rid`
    bool stream, logprobs, echo, id_texts, include_usage, continuous_usage, add_special_tokens;
    bool separate_reasoning, stream_reasoning;  // the former: a parser acts
    bool ignored;       // must be a bool, and has no effect
    bool forced_tag;    // the prompt ends in <think>\n
    bool thinking;      // it does, or in what the model thought before
    const Json *object; // where max_tokens stood
    Str rid, model;
    Buf echoed;         // what each answer begins with: the prompt's text, or the forced tag
    int bias_id[MAX_BIAS];
    float bias[MAX_BIAS];
} Params;

typedef struct {  // one sequence's part of an answer
    Seq *seq;
    size_t stem;        // of its rid, in front of _0
    void *bias;         // what the sequences of one prompt share: the first one's
    Buf text;           // what no event had yet; all of it where events are cumulative
    Buf lists[LISTS];   // so are the logprobs, as JSON, a newline behind each entry
    Buf thought, held;  // the reasoning parser's: reasoning, and what it can't decide yet
    enum { HEAD, OPENED, THINKING, CLOSED, CONTENT } part;  // and where in the text it is
    int n_tokens;
    double first, last; // when its first and last token came
    bool started;       // the head of its stream is written
    bool waiting;       // an event is to be written as soon as `out` is empty
    enum { SHUTDOWN, DISCONNECT, ABORT_API, FAULT } why;  // it was aborted
    Finish finish;
    int stop_id, stop_string;  // as in Event
} Answer;

typedef struct {
    int where;          // which fields are its own, as in Field; PARAMS: it is /generate
    int max_tokens;     // by default
    void (*token)(Conn *c, Answer *a, const Event *e);  // its logprobs go to the lists
    void (*event)(Conn *c, Answer *a);  // writes the sequence's next event into the stream
    void (*answer)(Conn *c);            // writes everything at once
    const char *lists[LISTS];           // their names
} Api;

struct Call {
    const Api *api;
    Params params;
    Buf head;          // {"id":...,"choices":[: how each object of the answer begins
    bool list;         // /generate's answer is an array
    Answer *answers;
    int n_answers, n_prompt, n_completion;
    size_t held;       // bytes of the prompts' copies, of bodies_held
    double deadline;
};

typedef struct {
    const char *name;
    enum {
        V1 = 1, CHAT = 2, COMPLETION = 4, USAGE = 8,  // USAGE: stream_options
        PARAMS = 16, NATIVE = 32, EACH = 64,  // /generate: sampling_params, the rest, arrays of it
        TOKENIZE = 128, DETOKENIZE = 256, SHARED = V1 | PARAMS,
    } where;
    enum { INT, NONZERO, NUMBER, BOOL, STRING, SEED, RID, STOP, STOP_IDS, BIAS, LATER } kind;
    size_t offset;     // of the value in Params
    double lo, hi;     // both ends are allowed
    const char *want;  // the range in words
} Field;

static const Json *field(const Json *object, const char *name) {  // null means absent
    const Json *v = json_get(object, name);
    return v && v->type != JSON_NULL ? v : NULL;
}

static bool json_is(const Json *v, const char *text) {
    return v && v->type == JSON_STRING && str_equal(v->string, text);
}

// The path of an object's field, or of the value itself where `name` is NULL. It is only looked for
// when something is wrong.
static const char *path_of(const Conn *c, const Json *v, const char *name) {
    Buf *b = scratch();
    json_path(b, c->request.json, v);
    return !name ? b->data : at(b->len ? "%s.%s" : "%s%s", b->data, name);
}

#define refuse_at(c, v, ...) refuse(c, 400, path_of(c, v, NULL), __VA_ARGS__)

// A value as an error repeats it.
static const char *shown(const Json *v) {
    if (!v || v->type < JSON_NUMBER || v->type > JSON_STRING) return v ? json_type_name(v) : "null";
    if (v->type == JSON_STRING) return quoted(text_cut(v->string, SHOWN));
    if (!v->integer) return at("%.15g", v->number);
    return at("%s%lu", v->negative ? "-" : "", v->magnitude);
}

// The value is shown where only that is wrong, else its type is said.
static bool wrong(Conn *c, const Json *v, const char *want) {
    return refuse_at(c, v, "got %s, want %s", shown(v), want);
}

static bool wrong_type(Conn *c, const Json *v, const char *want) {
    return refuse_at(c, v, "got %s, want %s", json_type_name(v), want);
}

static bool typed(Conn *c, const Json *v, JsonType type) {
    return v->type == type || wrong_type(c, v, json_type_name(&(Json){.type = type}));
}

// A field that must be there; NULL when it was refused.
static const Json *required(Conn *c, const Json *object, const char *name, JsonType type,
                            const char *want) {
    const Json *v = field(object, name);
    if (!v) refuse(c, 400, path_of(c, object, name), "missing, want %s", want);
    return v && typed(c, v, type) ? v : NULL;
}

static bool id_parse(Conn *c, int *out, const Json *v) {
    int64_t id = 0, last = tokenizer_vocab(server.tokenizer) - 1;
    if (!typed(c, v, JSON_NUMBER)) return false;
    bool ok = json_int(v, 0, last, &id);
    *out = (int)id;
    return ok || wrong(c, v, at("a token id in 0..%ld", last));
}

// `stop`: one string or an array of them; `stop_token_ids`: an array of ids.
static bool stops_parse(Conn *c, Seq *s, const Field *f, const Json *v) {
    bool ids = f->kind == STOP_IDS, list = v->type == JSON_ARRAY;
    if (!list && (ids || v->type != JSON_STRING)) return wrong_type(c, v, f->want);
    int n = list ? (int)v->count : 1;
    if (n > MAX_STOPS)
        return refuse_at(c, v, "got %d entries, want at most %d", n, MAX_STOPS);
    *(ids ? &s->n_stop_id : &s->text.n_stop) = n;
    if (list) v++;
    for (int i = 0; i < n; i++, v = json_next(v)) {
        if (ids ? !id_parse(c, &s->stop_id[i], v) : !typed(c, v, JSON_STRING)) return false;
        if (ids) continue;
        if (!v->string.len || v->string.len > STOP_BYTES)
            return refuse_at(c, v, "got %zu bytes, want 1..%d", v->string.len, STOP_BYTES);
        s->text.stop[i] = v->string;
    }
    return true;
}

// {"decimal id": number}
static bool bias_parse(Conn *c, Params *p, const Field *f, const Json *v) {
    Sampling *s = &p->seq.sampling;
    if (!typed(c, v, JSON_OBJECT)) return false;
    if (v->count > MAX_BIAS)
        return refuse_at(c, v, "got %u entries, want at most %d", v->count, MAX_BIAS);
    s->bias_id = p->bias_id, s->bias = p->bias;
    const Json *key = v + 1;
    for (uint32_t i = 0; i < v->count; i++, key = json_next(key + 1)) {
        const Json *value = key + 1;
        const char *digits = key->string.data;
        char *end;  // a string lies in the body, where a quote at the latest ends the digits
        long id = strtol(digits, &end, 10), last = tokenizer_vocab(server.tokenizer) - 1;
        if (!isdigit((uint8_t)*digits) || end != digits + key->string.len || id > last)
            return refuse_at(c, v, "got %s, want token ids in 0..%ld", shown(key), last);
        if (!typed(c, value, JSON_NUMBER)) return false;
        if (!(value->number >= f->lo && value->number <= f->hi)) return wrong(c, value, f->want);
        int k = 0;  // the last of equal ids wins, as of all equal keys
        while (k < s->n_bias && p->bias_id[k] != id) k++;
        s->n_bias += k == s->n_bias;
        p->bias_id[k] = (int)id, p->bias[k] = (float)value->number;
    }
    return true;
}

static void answer_cancel(Answer *a, int why) {
    if (a->finish) return;
    if (!a->why) a->why = why;
    engine_cancel(a->seq);
}

// How many sequences run under this rid, or as rid_0, rid_1, ...; data NULL: under any, but for
// probes. `cancel` ends them.
static int rid_find(Str rid, bool cancel) {
    int found = 0;
    for (const Conn *o = conns; o; o = o->next)
        for (int i = 0; o->n_live && i < o->call->n_answers; i++) {
            Answer *a = &o->call->answers[i];
            const char *name = a->seq->rid;
            bool named = !rid.data ? !a->seq->probe : str_equal(rid, name) ||
                         (rid.len == a->stem && !strncmp(name, rid.data, rid.len));
            found += named && !a->finish;
            if (named && cancel) answer_cancel(a, ABORT_API);
        }
    return found;
}

// Fields that aren't implemented would change the answer. But a client may send all that it knows,
// so a value passes that asks for nothing.
static bool neutral(const Conn *c, const char *name, const Json *v) {
    bool none = json_is(field(c->request.json, "tool_choice"), "none");
    if (!strcmp(name, "tools")) return none || (v->type == JSON_ARRAY && !v->count);
    if (!strcmp(name, "response_format")) return json_is(field(v, "type"), "text");
    return !strcmp(name, "suffix") && json_is(v, "");
}

// One value into its place in Params.
static bool field_parse(Conn *c, Params *p, const Field *f, const Json *v) {
    static const JsonType types[] = {JSON_NUMBER, JSON_NUMBER, JSON_NUMBER, JSON_BOOL,
                                     JSON_STRING, JSON_NUMBER, JSON_STRING};
    void *out = (char *)p + f->offset;
    int64_t i = 0;
    bool ok = true;
    if (f->kind < STOP && !typed(c, v, types[f->kind])) return false;  // the others look themselves
    switch (f->kind) {
    case INT: case NONZERO:
        ok = json_int(v, (int64_t)f->lo, (int64_t)f->hi, &i) && (f->kind == INT || i);
        *(int *)out = (int)i;
        break;
    case NUMBER:
        ok = v->number >= f->lo && v->number <= f->hi;
        if (ok) *(float *)out = (float)v->number;
        break;
    case BOOL: *(bool *)out = v->boolean; break;
    case STRING: ok = v->string.len <= f->hi, *(Str *)out = v->string; break;  // borrowed
    case SEED:  // modulo 2^64
        ok = p->seq.has_seed = v->integer && (!v->negative || v->magnitude <= (uint64_t)1 << 63);
        *(uint64_t *)out = v->negative ? 0 - v->magnitude : v->magnitude;
        break;
    case RID:
        ok = v->string.len >= f->lo && v->string.len <= f->hi, p->rid = v->string;
        for (size_t k = 0; ok && k < p->rid.len; k++)
            ok = p->rid.data[k] >= ' ' && p->rid.data[k] <= '~';
        break;
    case STOP: case STOP_IDS: return stops_parse(c, &p->seq, f, v);
    case BIAS: return bias_parse(c, p, f, v);
    case LATER:
        return neutral(c, f->name, v) ||
               refuse_at(c, v, "not supported by this version of r1");
    }
    return ok || wrong(c, v, f->want);
}

#define AT(member) offsetof(Params, member)
#define FLAG(name, where, member) {name, where, BOOL, AT(member), 0, 0, NULL}
#define NOT_YET(name) {name, SHARED | NATIVE, LATER, 0, 0, 0, NULL}
#define COUNT "an integer in 0..2147483647"
#define SEEDS "an integer in -9223372036854775808..18446744073709551615"
#define TOP_COUNT 0, MAX_TOP_LOGPROBS, "an integer in 0..64"

// In this order errors are reported. A positive number is a positive f32: that the engine gets.
static const Field fields[] = {
    {"max_tokens", V1, INT, AT(seq.max_tokens), 0, INT_MAX, COUNT},
    {"max_new_tokens", PARAMS, INT, AT(seq.max_tokens), 0, INT_MAX, COUNT},
    {"min_tokens", V1, INT, AT(seq.min_tokens), 0, INT_MAX, COUNT},
    {"min_new_tokens", PARAMS, INT, AT(seq.min_tokens), 0, INT_MAX, COUNT},
    {"temperature", SHARED, NUMBER, AT(seq.sampling.temperature), 0, FLT_MAX, "a number >= 0"},
    {"top_p", SHARED, NUMBER, AT(seq.sampling.top_p), FLT_MIN, 1, "a number in (0, 1]"},
    {"top_k", SHARED, NONZERO, AT(seq.sampling.top_k), -1, INT_MAX, "-1 or an integer >= 1"},
    {"min_p", SHARED, NUMBER, AT(seq.sampling.min_p), 0, 1, "a number in [0, 1]"},
    {"frequency_penalty", SHARED, NUMBER, AT(seq.sampling.frequency_penalty), -2, 2,
     "a number in [-2, 2]"},
    {"presence_penalty", SHARED, NUMBER, AT(seq.sampling.presence_penalty), -2, 2,
     "a number in [-2, 2]"},
    {"repetition_penalty", SHARED, NUMBER, AT(seq.sampling.repetition_penalty), FLT_MIN, 2,
     "a number in (0, 2]"},
    {"logit_bias", SHARED, BIAS, 0, -100, 100, "a number in [-100, 100]"},
    {"seed", SHARED, SEED, AT(seq.sampling.seed), 0, 0, SEEDS},
    {"sampling_seed", PARAMS, SEED, AT(seq.sampling.seed), 0, 0, SEEDS},
    {"stop", SHARED, STOP, 0, 0, 0, "string or array"},
    {"stop_token_ids", SHARED, STOP_IDS, 0, 0, 0, "array"},
    FLAG("ignore_eos", SHARED, seq.ignore_eos),
    FLAG("no_stop_trim", SHARED, seq.text.no_stop_trim),
    FLAG("skip_special_tokens", SHARED | DETOKENIZE, seq.text.skip_special),
    FLAG("spaces_between_special_tokens", SHARED, ignored),
    {"n", SHARED, INT, AT(n), 1, 128, "an integer in 1..128"},
    FLAG("stream", V1 | NATIVE, stream),
    {"rid", V1 | EACH, RID, 0, 1, MAX_RID, "1..128 printable ASCII characters"},
    NOT_YET("tools"), NOT_YET("response_format"), NOT_YET("suffix"), NOT_YET("regex"),
    NOT_YET("ebnf"), NOT_YET("json_schema"), NOT_YET("structural_tag"), NOT_YET("lora_path"),
    NOT_YET("session_params"), NOT_YET("image_data"), NOT_YET("input_embeds"),
    NOT_YET("custom_logit_processor"),
    {"max_completion_tokens", CHAT, INT, AT(seq.max_tokens), 0, INT_MAX, COUNT},
    {"model", CHAT | COMPLETION, STRING, AT(model), 0, LINE, "at most 1024 bytes"},
    FLAG("logprobs", CHAT, logprobs),
    {"logprobs", COMPLETION, INT, AT(seq.sampling.top_logprobs), TOP_COUNT},
    {"top_logprobs", CHAT, INT, AT(top_logprobs), TOP_COUNT},
    FLAG("separate_reasoning", CHAT, separate_reasoning),
    FLAG("stream_reasoning", CHAT, stream_reasoning),
    FLAG("echo", COMPLETION, echo),
    FLAG("return_logprob", EACH, logprobs),
    {"logprob_start_len", EACH, INT, AT(start_len), -1, INT_MAX, "an integer >= -1"},
    {"top_logprobs_num", EACH, INT, AT(top_logprobs), TOP_COUNT},
    FLAG("return_text_in_logprobs", NATIVE, id_texts),
    FLAG("include_usage", USAGE, include_usage),
    FLAG("continuous_usage_stats", USAGE, continuous_usage),
    FLAG("add_special_tokens", TOKENIZE, add_special_tokens),
};

// A field's value for one prompt of several: where it is an array, an element for each of them.
// NULL: it was refused.
static const Json *each(Conn *c, const Params *p, const Json *v) {
    if (v->type != JSON_ARRAY) return v;
    if (v->count != p->prompts)
        return refuse_at(c, v, "got %u values, want one for each prompt, %u",
                      v->count, p->prompts), NULL;
    v++;
    for (uint32_t i = 0; i < p->prompt; i++) v = json_next(v);
    return v;
}

static bool fields_parse(Conn *c, Params *p, const Json *object, int where) {
    for (const Field *f = fields; f < fields + sizeof fields / sizeof *fields; f++) {
        const Json *v = f->where & where ? field(object, f->name) : NULL;
        if (v && (f->where & where) == EACH && !(v = each(c, p, v))) return false;
        if (v && v->type != JSON_NULL && !field_parse(c, p, f, v)) return false;
    }
    return true;
}

// -------------------------------------------------------------------------------------------------
// Metrics, as Prometheus reads them. Most belong to the engine; the times are taken here, when a
// token comes to this thread.

typedef struct {
    const char *name, *help;
    double le[24];       // the buckets' upper ends, up to a 0; then one that holds the rest
    uint64_t count[24];  // in each of them alone
    double sum;
} Histogram;

static Histogram first_token = {
    "sglang:time_to_first_token_seconds", "From a request's arrival to its first token.",
    .le = {.1, .25, .5, .75, 1, 2, 5, 10, 20, 40, 60, 80, 120, 160}};
static Histogram per_token = {
    "sglang:time_per_output_token_seconds", "A sequence's mean time between two tokens.",
    .le = {.005, .01, .015, .02, .025, .03, .04, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5}};
static Histogram between_tokens = {
    "sglang:inter_token_latency_seconds", "The time from one token to the next.",
    .le = {.002, .004, .006, .008, .01, .015, .02, .025, .03, .035, .04, .05, .075, .1, .15, .2, .3,
           .4, .5, .75, 1, 2}};
static Histogram whole_request = {
    "sglang:e2e_request_latency_seconds", "From a request's arrival to its end.",
    .le = {.1, .25, .5, 1, 2, 5, 10, 20, 40, 60, 80, 120, 160}};
static uint64_t tokens_generated, sequences_finished, aborted[FAULT + 1];

static void observe(Histogram *h, double seconds) {
    int i = 0;
    while (h->le[i] > 0 && seconds > h->le[i]) i++;
    h->count[i]++, h->sum += seconds;
}

static void event_count(Answer *a, const Event *e, bool token) {
    if (token && a->n_tokens == 1) a->first = now, observe(&first_token, now - e->seq->arrival);
    else if (token) observe(&between_tokens, now - a->last);
    if (token) a->last = now, tokens_generated++;
    if (!e->finish) return;
    sequences_finished++;
    observe(&whole_request, now - e->seq->arrival);
    if (a->n_tokens > 1) observe(&per_token, (a->last - a->first) / (a->n_tokens - 1));
    if (e->finish == FINISH_ABORT || e->finish == FINISH_ERROR)
        aborted[e->finish == FINISH_ERROR ? FAULT : a->why]++;
}

// name{model_name="...",label="..."} value, behind a family's head where there is a help.
static void metric_write(Buf *b, const char *name, const char *type, const char *label,
                         const char *help, double value) {
    if (help) buf_printf(b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
    buf_printf(b, "%s{model_name=%s%s} %.16g\n", name, quoted(served_name()), label, value);
}

static void histogram_write(Buf *b, const Histogram *h) {
    double count = 0;
    buf_printf(b, "# HELP %s %s\n# TYPE %s histogram\n", h->name, h->help, h->name);
    for (int i = 0; !i || h->le[i - 1] > 0; i++) {
        const char *label = h->le[i] > 0 ? at(",le=\"%g\"", h->le[i]) : ",le=\"+Inf\"";
        metric_write(b, at("%s_bucket", h->name), NULL, label, NULL, count += (double)h->count[i]);
    }
    metric_write(b, at("%s_sum", h->name), NULL, "", NULL, h->sum);
    metric_write(b, at("%s_count", h->name), NULL, "", NULL, count);
}

static bool metrics(Conn *c) {
    static const char *const reasons[] = {"shutdown", "disconnect", "api", "error"};
    const Server *s = &server;
    const char *g = "gauge", *n = "counter";
    double usage = s->used_tokens / fmax(1, s->max_total_tokens);
    const struct { const char *name, *type, *help; double value; } rows[] = {
        {"sglang:num_running_reqs", g, "Sequences that run.", s->running},
        {"sglang:num_queue_reqs", g, "Sequences that wait.", s->queued},
        {"sglang:num_used_tokens", g, "Tokens of the cache in use.", s->used_tokens},
        {"sglang:token_usage", g, "The same as a part of the cache.", usage},
        {"sglang:cache_hit_rate", g, "Prompt tokens found in the cache.", s->cache_hit_rate},
        {"sglang:gen_throughput", g, "Tokens a second.", s->gen_throughput},
        {"sglang:spec_accept_length", g, "Tokens that speculation gains a step.", 0},
        {"sglang:prompt_tokens_total", n, "Prompt tokens prefilled.", s->prompt_tokens},
        {"sglang:cached_tokens_total", n, "Those found in the cache.", s->cached_tokens},
        {"sglang:generation_tokens_total", n, "Tokens generated.", tokens_generated},
        {"sglang:num_requests_total", n, "Sequences finished.", sequences_finished},
        {"r1:ready", g, "1 when requests are answered.", server_state() == STATE_READY},
        {"r1:steps_total", n, "Runs of the model.", s->steps},
        {"r1:preempted_total", n, "Sequences that gave their pages back.", s->preempted},
    };
    Buf *b = &c->out;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (!s->node || str_begins(str_of(rows[i].name), STR("r1:")))
            metric_write(b, rows[i].name, rows[i].type, "", rows[i].help, rows[i].value);
    for (int i = 0; i < s->n_ranks; i++)
        metric_write(b, "r1:load_bytes", g, at(",rank=\"%d\"", i),
                     i ? NULL : "Bytes of weights loaded.", s->ranks[i].progress.loaded_bytes);
    for (int i = 0; i < s->n_ranks; i++)
        metric_write(b, "r1:load_total_bytes", g, at(",rank=\"%d\"", i),
                     i ? NULL : "Bytes of weights to load.", s->ranks[i].progress.total_bytes);
    for (int i = 0; i <= FAULT; i++)
        metric_write(b, "r1:aborted_total", n, at(",reason=\"%s\"", reasons[i]),
                     i ? NULL : "Sequences that did not end by themselves.", aborted[i]);
    for (int i = 0; i < STATUSES; i++)
        metric_write(b, "r1:http_responses_total", n, at(",code=\"%d\"", statuses[i].code),
                     i ? NULL : "Answers by status.", responses[i]);
    const Histogram *h[] = {&first_token, &per_token, &between_tokens, &whole_request};
    for (int i = 0; i < 4 && !s->node; i++) histogram_write(b, h[i]);
    return respond_as(c, 200, "text/plain; version=0.0.4; charset=utf-8");
}

// -------------------------------------------------------------------------------------------------
// The reasoning parser: R1's text is [<think>] reasoning </think> content. It works on bytes, and
// holds back what may still become a tag or is white space at an end, so that it never matters
// where tokens were cut.

#define OPEN_TAG STR("<think>")
#define CLOSE_TAG STR("</think>")

// Where the tag begins in s, or what s ends in and may become it; s.len: nowhere.
static size_t tag_find(Str s, Str tag) {
    size_t i = 0;
    while (i < s.len && !str_begins(tag, str_cut((Str){s.data + i, s.len - i}, tag.len))) i++;
    return i;
}

static size_t blanks(const Buf *b) {  // white space at its head
    size_t n = 0;
    while (n < b->len && isspace((uint8_t)b->data[n])) n++;
    return n;
}

// Takes the text that follows. `thinking`: without a tag at its head it is reasoning, else content.
static void reasoning_push(Answer *a, Str text, bool thinking) {
    Buf *h = &a->held;
    bool end = a->finish;
    buf_add(h, text.data, text.len);
    if (a->part == HEAD) {
        size_t blank = blanks(h);
        Str rest = {h->data + blank, h->len - blank};
        bool tag = str_begins(rest, OPEN_TAG);
        if (!tag && !end && str_begins(OPEN_TAG, rest)) return;  // it may become one
        if (tag) buf_shift(h, NULL, blank + OPEN_TAG.len);
        a->part = tag || thinking ? OPENED : CONTENT;
    }
    if (a->part == OPENED) buf_shift(h, NULL, blanks(h)), a->part += h->len > 0;
    if (a->part == THINKING) {
        size_t tag = tag_find(buf_text(h), CLOSE_TAG), n;
        bool whole = tag + CLOSE_TAG.len <= h->len;
        if (end && !whole) tag = h->len;
        for (n = tag; n && isspace((uint8_t)h->data[n - 1]);) n--;
        buf_shift(h, &a->thought, n);
        if (whole) a->part = CLOSED, buf_shift(h, NULL, tag - n + CLOSE_TAG.len);
    }
    if (a->part == CLOSED) buf_shift(h, NULL, blanks(h)), a->part += h->len > 0;
    if (a->part == CONTENT) buf_shift(h, &a->text, h->len);
}

// -------------------------------------------------------------------------------------------------
// Calls: what the engine computes for a connection. An endpoint that generates parses into a new
// Call, adds its prompts and starts it; then its Api says how tokens, events, answers are written.

// Each prompt of /generate has parameters of its own, so that they may begin anew.
static void params_init(Params *p, const Api *api) {
    bool native = api->where == PARAMS;
    Ids tokens = p->seq.tokens;
    *p = (Params){.n = 1, .start_len = -1, .prompts = 1, .model = served_name()};
    p->seq = (Seq){.tokens = tokens, .max_tokens = api->max_tokens, .arrival = now};
    p->seq.sampling = (Sampling){
        .temperature = native ? 1 : (float)server.config.temperature,
        .top_p = native ? 1 : (float)server.config.top_p,
        .top_k = -1, .repetition_penalty = 1, .top_logprobs = -1};
    text_init(&p->seq.text, server.tokenizer, true);
}

static Call *call_new(Conn *c, const Api *api) {
    Call *call = c->call = xcalloc(1, sizeof *call);
    call->api = api, call->deadline = INFINITY;
    params_init(&call->params, api);
    call->params.object = c->request.json;
    return call;
}

// Nobody waits for what still runs: it ends with the next step.
static void call_cancel(Conn *c, int why) {
    for (int i = 0; c->n_live && i < c->call->n_answers; i++)
        answer_cancel(&c->call->answers[i], why);
}

static size_t prompt_bytes(const Conn *c) {
    const Params *p = &c->call->params;
    return (size_t)p->n * (p->seq.tokens.len * sizeof(int) + p->echoed.len);
}

// Whether P + C tokens can ever be held, and the queue has room; settles C where it was left open.
// The texts are SGLang's.
static bool call_fits(Conn *c) {
    const Params *p = &c->call->params;
    Seq *s = &c->call->params.seq;
    int64_t limit = max_req_len(), n = (int64_t)s->tokens.len;
    int waiting = server.queued, most = server.options.max_queued_requests;
    bool truncate = server.options.allow_auto_truncate;
    const char *pool = limit == server.context_len ? "" :
        at(" The KV cache of this server holds %ld tokens; the model allows %d.", limit,
           server.context_len);
    if (truncate && n >= limit) s->tokens.len = (size_t)(n = limit - 1);
    if (n >= limit)
        return refuse(c, 400, NULL, "The input (%ld tokens) is longer than the model's context "
                      "length (%ld tokens).%s", n, limit, pool);
    if (s->max_tokens < 0 || (truncate && s->max_tokens > limit - n))
        s->max_tokens = (int)(limit - n);
    if (truncate && s->min_tokens > limit - n) s->min_tokens = (int)(limit - n);
    if (n + s->max_tokens > limit)
        return refuse(c, 400, NULL, "Requested token count exceeds the model's maximum context "
                      "length of %ld tokens. You requested a total of %ld tokens: %ld in the "
                      "prompt and %d for the completion.%s", limit, n + s->max_tokens, n,
                      s->max_tokens, pool);
    if (s->min_tokens > s->max_tokens)
        return wrong(c, field(p->object, c->call->api->where == PARAMS ? "min_new_tokens" :
                              "min_tokens"), at("an integer in 0..%d", s->max_tokens));
    // Each choice has the prompt for itself: 128 of a long one are much more than their body.
    if (bodies_held + prompt_bytes(c) > http_limits.all_bodies_bytes)
        return refuse(c, 503, NULL, "too many request bodies");
    if (most <= 0 || waiting < most) return true;
    c->request.extra = "Retry-After: 1\r\n";
    return refuse(c, 503, NULL, "the request queue is full: %d waiting, limit %d", waiting, most);
}

// Adds the prompt in params.seq: n sequences, whose choice index goes on from the prompt before.
static void call_add(Conn *c) {
    Call *call = c->call;
    const Params *p = &call->params;
    const Ids *prompt = &p->seq.tokens;
    int first = call->n_answers, n_bias = p->seq.sampling.n_bias;
    size_t n = (size_t)first + (size_t)p->n;
    call->answers = xrealloc(call->answers, n * sizeof *call->answers);
    call->n_prompt += (int)prompt->len;
    call->held += prompt_bytes(c), bodies_held += prompt_bytes(c);
    float *bias = xmalloc((size_t)n_bias * (sizeof(float) + sizeof(int)));
    int *bias_id = (int *)(bias + n_bias);
    for (int i = 0; i < n_bias; i++) bias[i] = p->bias[i], bias_id[i] = p->bias_id[i];
    for (int i = 0; i < p->n; i++, call->n_answers++) {
        Answer *a = &call->answers[call->n_answers];
        Seq *s = seq_new();
        uint64_t random[2];
        if (getrandom(random, sizeof random, 0) < 0) die("getrandom: %s", strerror(errno));
        *s = p->seq;  // borrows strings of the call's body and the bias
        s->owner = c, s->index = call->n_answers;
        s->sampling.seed += (uint64_t)i;
        s->sampling.bias = bias, s->sampling.bias_id = bias_id;
        s->n_prompt = (int)prompt->len, s->tokens = (Ids){0};
        for (size_t k = 0; k < prompt->len; k++) ids_add(&s->tokens, prompt->data[k]);
        const char *rid = p->rid.len ? at("%.*s", ARG(p->rid)) :
            at("%016lx%016lx", random[0], random[1]);
        bool shared = p->rid.len && p->sharers > 1;
        snprintf(s->rid, sizeof s->rid, shared ? "%s_%d" : "%s", rid,
                 call->n_answers % (shared ? p->sharers : 1));
        *a = (Answer){.seq = s, .stem = strlen(rid), .bias = i ? NULL : bias};
        if (p->echoed.len) buf_add(&a->text, p->echoed.data, p->echoed.len);
        // Nothing stands before the first token, so that no logprob is there for it.
        Event start = {.prompt = true, .choice = {.id = *prompt->data, .logprob = NAN}};
        if (s->score_from == 1) call->api->token(c, a, &start);
    }
}

// An rid names one live sequence, or /abort_request could not tell which is meant. Those of a
// request differ from each other, too, and from all that run by the same rid or beside it.
static bool rids_free(Conn *c) {
    const Call *call = c->call;
    int n = field(c->request.json, "rid") ? call->n_answers : 0;
    for (const Answer *a = call->answers; a < call->answers + n; a++) {
        Str rid = str_of(a->seq->rid), given = str_cut(rid, a->stem);
        bool used = rid_find(rid, false) || rid_find(given, false);
        for (const Answer *b = call->answers; b < a; b++) used |= str_equal(rid, b->seq->rid);
        if (used)
            return refuse(c, 400, "rid", "got %s, which is still running", quoted(given));
    }
    return true;
}

// Hands the sequences to the engine. What can be refused was refused: a stream's head goes out now.
static bool call_start(Conn *c) {
    Call *call = c->call;
    if (!rids_free(c)) return false;
    c->n_live = call->n_answers;
    conn_state(c, call->params.stream ? STREAMING : COMPUTING);
    if (call->params.stream) {
        c->request.extra = "Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n";
        respond_head(c, 200, "text/event-stream; charset=utf-8", -1);
    }
    for (int i = 0; i < call->n_answers; i++) engine_submit(call->answers[i].seq);
    return true;
}

// Takes one event of the engine's into the answer that it belongs to. Where the client keeps up it
// is written at once, so that a stream has a chunk for each token and sequence; conn_run() sends
// what a round's events have made.
static void call_event(Conn *c, const Event *e) {
    Call *call = c->call;
    Answer *a = &call->answers[e->seq->index];
    const Params *p = &call->params;
    int interval = server.options.stream_interval > 0 ? server.options.stream_interval : 1;
    bool token = e->has_token && !e->prompt && e->finish != FINISH_ERROR;
    a->n_tokens += token, call->n_completion += token;
    a->finish = e->finish, a->stop_id = e->stop_id, a->stop_string = e->stop_string;
    if (e->finish) c->n_live--;
    if (!e->seq->probe) event_count(a, e, token);
    if (c->state != COMPUTING && c->state != STREAMING) return;  // nobody waits for it any more
    if (e->finish == FINISH_ERROR) {  // the request fails, and its other sequences are of no use
        call_cancel(c, FAULT);
        refuse(c, c->request.route->shape == HEALTH ? 503 : 500, NULL,
               "the model gave a value that is not a number at position %zu", e->seq->tokens.len);
        return;
    }
    if (e->has_token && e->seq->sampling.top_logprobs >= 0) call->api->token(c, a, e);
    if (p->separate_reasoning) reasoning_push(a, buf_text(&e->text), p->thinking);
    else if (e->text.len) buf_add(&a->text, e->text.data, e->text.len);
    // A token without text, logprobs or an end makes no event of /v1: a character may not be whole.
    if (e->finish || (token && (a->n_tokens == 1 || a->n_tokens % interval == 0)))
        a->waiting = e->finish || !a->started || a->text.len || a->thought.len ||
                     a->lists[0].len || call->api->where == PARAMS;
    if (!p->stream && !c->n_live) call->api->answer(c);
    if (!p->stream || !a->waiting || c->blocked || c->out.len > READ_BYTES) return;
    if (!c->out.len) c->since = now;
    call->api->event(c, a);
}

// Ends an object of /v1 behind its choices.
static void object_end(Buf *b, const Conn *c, bool usage) {
    const Call *call = c->call;
    int prompt = call->n_prompt, completion = call->n_completion;
    const char *details = call->params.stream ? "" : ",\"prompt_tokens_details\":null";
    if (server.options.enable_cache_report && !c->n_live) {
        int cached = 0;
        for (int i = 0; i < call->n_answers; i += call->params.n)
            cached += call->answers[i].seq->n_cached;
        details = at(",\"prompt_tokens_details\":{\"cached_tokens\":%d}", cached);
    }
    if (!usage) buf_str(b, "],\"usage\":null}");
    else buf_printf(b, "],\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%d,"
                    "\"completion_tokens\":%d%s}}", prompt, prompt + completion, completion,
                    details);
}

// Writes the events that wait, one for each sequence; called only while `out` is empty. So a client
// that reads slowly has one event of a sequence on its way and one, which grows, waiting: no step
// ever waits for it. True when there was something to write.
static bool stream_fill(Conn *c) {
    Call *call = c->call;
    bool any = false;
    for (Answer *a = call->answers; a < call->answers + call->n_answers; a++)
        if (a->waiting) call->api->event(c, a), any = true;
    c->since = now;
    if (any || c->n_live) return any;
    if (call->params.include_usage) {
        Buf *b = scratch();
        buf_str(b, call->head.data);
        object_end(b, c, true);
        stream_event(c, b->data);
    }
    stream_end(c);
    return true;
}

// -------------------------------------------------------------------------------------------------
// Prompts of /v1/completions and /generate: texts or ids, one or many. The n sequences of each have
// the parameters that the call has when they are added.

// The text of n ids by themselves.
static void ids_text(Buf *out, const int *id, size_t n, bool skip_special) {
    TextStream s;
    text_init(&s, server.tokenizer, skip_special);
    for (size_t i = 0; i < n; i++) text_push(&s, out, id[i], false);
    text_flush(&s, out);
    text_free(&s);
}

static void text_write(Buf *b, const int *id, size_t n, bool skip_special) {  // as a JSON string
    Buf text = {0};
    ids_text(&text, id, n, skip_special);
    json_write_string(b, buf_text(&text));
    buf_free(&text);
}

// BOS stands once at the head, where the checkpoint wants one at all.
static void text_encode(Ids *ids, Str text, bool special) {
    int bos = special ? tokenizer_bos(server.tokenizer) : -1;
    if (bos >= 0 && !str_begins(text, tokenizer_bytes(server.tokenizer, bos))) ids_add(ids, bos);
    tokenizer_encode(server.tokenizer, ids, text);
}

static bool ids_parse(Conn *c, Ids *ids, const Json *list) {
    const Json *v = list + 1;
    for (uint32_t i = 0; i < list->count; i++, v = json_next(v)) {
        ids_add(ids, 0);
        if (!id_parse(c, &ids->data[ids->len - 1], v)) return false;
    }
    return true;
}

// Fields of /generate that may differ from prompt to prompt.
static bool native_params(Conn *c, uint32_t prompt, uint32_t prompts) {
    Params *p = &c->call->params;
    const Json *json = c->request.json, *v = field(json, "sampling_params");
    int n = p->n;
    params_init(p, c->call->api);
    p->prompt = prompt, p->prompts = prompts;
    if (v && !(v = each(c, p, v))) return false;
    bool given = v && v->type != JSON_NULL;
    if (given && (!typed(c, v, JSON_OBJECT) || !fields_parse(c, p, v, PARAMS))) return false;
    if (prompt && p->n != n)
        return refuse(c, 400, path_of(c, v, "n"), "got %d, want %d, as for the first prompt", p->n,
                      n);
    p->object = v;
    if (!fields_parse(c, p, json, NATIVE) || !fields_parse(c, p, json, EACH)) return false;
    if (p->logprobs) p->seq.sampling.top_logprobs = p->top_logprobs;
    if (p->logprobs) p->seq.score_from = p->start_len + 1;
    return true;
}

// One prompt's ids, and whether they and its parameters go together.
static bool prompt_parse(Conn *c, const Json *v, bool as_ids) {
    Params *p = &c->call->params;
    Ids *ids = &p->seq.tokens;
    ids->len = 0;
    if (!typed(c, v, as_ids ? JSON_ARRAY : JSON_STRING)) return false;
    if (as_ids && !ids_parse(c, ids, v)) return false;
    if (!as_ids) text_encode(ids, v->string, true);
    if (!ids->len)
        return refuse_at(c, v, "got an empty %s, want at least one token id", json_type_name(v));
    if (p->start_len >= (int)ids->len)
        return wrong(c, each(c, p, field(c->request.json, "logprob_start_len")),
                     at("an integer in -1..%zu", ids->len - 1));
    p->echoed.len = 0;
    if (!call_fits(c)) return false;
    if (p->echo) ids_text(&p->echoed, ids->data, ids->len, p->seq.text.skip_special);
    return true;
}

// Adds the sequences of one prompt or of a list of them: texts, arrays of ids, or either.
static bool prompts_add(Conn *c, const Json *v, bool texts, bool ids) {
    Call *call = c->call;
    Params *p = &call->params;
    bool array = v->type == JSON_ARRAY;
    JsonType first = array && v->count ? v[1].type : JSON_NULL;
    bool as_ids = ids && array && !(texts && first == JSON_STRING);
    bool list = array && (!as_ids || first == JSON_ARRAY);
    if (!array && !(texts && v->type == JSON_STRING))
        return wrong_type(c, v, texts ? "string or array" : "array");
    if (list && !v->count)
        return refuse_at(c, v, "got an empty array, want at least one prompt");
    const Json *one = list ? v + 1 : v, *rid = field(c->request.json, "rid");
    int64_t n = list ? v->count : 1;
    for (int64_t i = 0; i < n; i++, one = json_next(one)) {
        if (call->api->where == PARAMS && !native_params(c, (uint32_t)i, (uint32_t)n)) return false;
        if (n * p->n > MAX_SEQS)
            return refuse_at(c, v, "got %ld sequences, want at most %d", n * p->n, MAX_SEQS);
        p->sharers = p->n * (rid && rid->type == JSON_ARRAY ? 1 : (int)n);
        if (!prompt_parse(c, one, as_ids)) return false;
        call_add(c);
    }
    call->list = list || p->n > 1;
    return true;
}

// -------------------------------------------------------------------------------------------------
// What /v1 answers: completions and chat differ in where the text stands and in the stream's head.

#define THINK "<think>\n"

typedef struct {  // what a chunk or the whole answer tells of one choice
    const char *role;
    Str text, thought;    // data NULL: null
    size_t lists[LISTS];  // bytes of each
    bool done;
} Part;

static void logprob_write(Buf *b, float logprob) {  // NaN: there is none
    if (isnan(logprob)) buf_str(b, "null");
    else json_write_float(b, fmaxf(logprob, -9999.0f));  // never below that, as in SGLang
}

// As much of a text as one event may hold, in whole characters.
static Str event_text(Str s) {
    size_t n = 0;
    for (size_t json = 0; n < s.len && json < EVENT_TEXT; n++)
        json += (uint8_t)s.data[n] < ' ' ? strlen("\\u0000") : strchr("\"\\", s.data[n]) ? 2 : 1;
    return text_cut(s, n);
}

// "name":[...],... of the lists' first bytes; NULL: of all.
static void lists_write(Buf *b, const Call *call, const Answer *a, const size_t *bytes, int n) {
    for (int i = 0; i < n && call->api->lists[i]; i++) {
        buf_printf(b, "%s\"%s\":[", i ? "," : "", call->api->lists[i]);
        size_t from = b->len, len = bytes ? bytes[i] : a->lists[i].len;
        if (len) buf_add(b, a->lists[i].data, len - 1);  // without the last newline
        for (; from < b->len; from++) if (b->data[from] == '\n') b->data[from] = ',';
        buf_str(b, "]");
    }
}

// What ended a sequence: a token's id or a stop string.
static const char *matched(const Answer *a) {
    return a->finish != FINISH_STOP ? "null" : a->stop_id >= 0 ? at("%d", a->stop_id) :
        quoted(a->seq->text.stop[a->stop_string]);
}

static void choice_write(Buf *b, const Call *call, const Answer *a, const Part *part) {
    static const char *const reasons[] = {"null", "\"stop\"", "\"length\"", "\"abort\""};
    const Params *p = &call->params;
    bool list = a->seq->sampling.top_logprobs >= 0 && (part->lists[0] || !p->stream);
    buf_printf(b, "{\"index\":%d,", a->seq->index);
    if (call->api->where == CHAT) {
        buf_printf(b, "\"%s\":{\"role\":%s,\"content\":%s", p->stream ? "delta" : "message",
                   part->role, part->text.data ? quoted(part->text) : "null");
        if (p->separate_reasoning)
            buf_printf(b, ",\"reasoning_content\":%s",
                       part->thought.data ? quoted(part->thought) : "null");
        buf_str(b, ",\"tool_calls\":null}");
    } else buf_printf(b, "\"text\":%s", quoted(part->text));
    buf_str(b, list ? ",\"logprobs\":{" : ",\"logprobs\":null");
    if (list) lists_write(b, call, a, part->lists, LISTS);
    buf_printf(b, "%s,\"finish_reason\":%s,\"matched_stop\":%s}", list ? "}" : "",
               reasons[part->done ? a->finish : FINISH_NONE], part->done ? matched(a) : "null");
}

// One chunk of a stream, for one choice.
static void v1_chunk(Conn *c, const Answer *a, Part part) {
    Buf *b = scratch();
    buf_str(b, c->call->head.data);
    choice_write(b, c->call, a, &part);
    object_end(b, c, c->call->params.continuous_usage);
    stream_event(c, b->data);
}

// As much of what waits as one event may hold: whole characters of text and whole entries.
static void v1_event(Conn *c, Answer *a) {
    const Params *p = &c->call->params;
    bool chat = c->call->api->where == CHAT, parse = p->separate_reasoning;
    Str none = parse ? (Str){0} : STR("");
    if (chat && !a->started) v1_chunk(c, a, (Part){.role = "\"assistant\"", .text = none});
    if (chat && !a->started && p->forced_tag && !parse)
        v1_chunk(c, a, (Part){.role = "null", .text = STR(THINK)});
    Part part = {.role = "null", .text = none};
    bool thought = a->thought.len && (p->stream_reasoning || a->part >= CLOSED || a->finish);
    if (thought) part.thought = event_text(buf_text(&a->thought));
    else if (a->text.len) part.text = event_text(buf_text(&a->text));
    for (size_t sum = 0; part.lists[0] < a->lists[0].len && sum < EVENT_ENTRIES;)
        for (int i = sum = 0; i < LISTS; sum += part.lists[i++])
            if (part.lists[i] < a->lists[i].len)
                part.lists[i] += strcspn(a->lists[i].data + part.lists[i], "\n") + 1;
    bool all = part.text.len == a->text.len && part.lists[0] == a->lists[0].len &&
               (part.thought.len == a->thought.len || !thought);
    part.done = all && a->finish;
    if (part.thought.len || part.text.len || part.lists[0] || part.done) v1_chunk(c, a, part);
    buf_shift(&a->thought, NULL, part.thought.len), buf_shift(&a->text, NULL, part.text.len);
    for (int i = 0; i < LISTS; i++) buf_shift(&a->lists[i], NULL, part.lists[i]);
    a->started = true, a->waiting = !all;
}

// The whole answer of a request that is not streamed, all choices in one object.
static void v1_answer(Conn *c) {
    const Call *call = c->call;
    bool parse = call->params.separate_reasoning;
    buf_str(&c->out, call->head.data);
    for (Answer *a = call->answers; a < call->answers + call->n_answers; a++) {
        Part part = {.role = "\"assistant\"", .done = true};
        if (!parse || a->part >= CLOSED) part.text = buf_text(&a->text);
        if (a->thought.len) part.thought = buf_text(&a->thought);
        for (int i = 0; i < LISTS; i++) part.lists[i] = a->lists[i].len;
        if (a > call->answers) buf_str(&c->out, ",");
        choice_write(&c->out, call, a, &part);
    }
    object_end(&c->out, c, true);
    respond(c, 200);
}

// The fields that chat and completions have of their own, and those of stream_options.
static bool v1_fields(Conn *c) {
    Params *p = &c->call->params;
    const Json *json = c->request.json, *options = field(json, "stream_options");
    return fields_parse(c, p, json, c->call->api->where) &&
           (!options || (typed(c, options, JSON_OBJECT) && fields_parse(c, p, options, USAGE)));
}

static bool v1_start(Conn *c, const char *object) {
    Call *call = c->call;
    buf_printf(&call->head, "{\"id\":%s,\"object\":\"%s\",\"created\":%ld,\"model\":%s,"
               "\"choices\":[", quoted(str_of(call->answers[0].seq->rid)), object,
               (long)time(NULL), quoted(call->params.model));
    return call_start(c);
}

// -------------------------------------------------------------------------------------------------
// POST /v1/chat/completions

// The parts of a content, joined by newlines where the first one lies: in the body there is more
// than a newline between any two of them.
static bool parts_join(Conn *c, Str *content, const Json *list) {
    const Json *part = list + 1;
    *content = STR("");  // no parts are no null
    for (uint32_t i = 0; i < list->count; i++, part = json_next(part)) {
        if (!typed(c, part, JSON_OBJECT)) return false;
        const Json *type = field(part, "type"), *text;
        if (!json_is(type, "text"))
            return refuse(c, 400, path_of(c, part, "type"), "got %s, want \"text\"", shown(type));
        if (!(text = required(c, part, "text", JSON_STRING, "a string"))) return false;
        if (!i) { *content = text->string; continue; }
        char *end = (char *)content->data + content->len;
        *end = '\n';
        memmove(end + 1, text->string.data, text->string.len);
        content->len += 1 + text->string.len;
    }
    return true;
}

// One message. Keys that are not looked at here (name, reasoning_content, ...) are ignored.
static bool message_parse(Conn *c, Message *m, const Json *v) {
    static const char *const names[] = {"system", "developer", "user", "assistant", "tool"};
    static const Role roles[] = {ROLE_SYSTEM, ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL};
    const char *want = "system, developer, user, assistant or tool";
    const Json *role, *content = field(v, "content"), *tools = field(v, "tool_calls");
    size_t k = 0, n = sizeof roles / sizeof *roles;
    if (!typed(c, v, JSON_OBJECT) || !(role = required(c, v, "role", JSON_STRING, want)))
        return false;
    while (k < n && !json_is(role, names[k])) k++;
    if (k == n) return wrong(c, role, want);
    m->role = roles[k];
    if (tools && !typed(c, tools, JSON_ARRAY)) return false;
    m->tool_calls = tools && tools->count ? tools : NULL;
    if (!content) return true;
    if (content->type == JSON_ARRAY) return parts_join(c, &m->content, content);
    m->content = content->string;
    return content->type == JSON_STRING || wrong_type(c, content, "string or array");
}

// The prompt's ids. A last message of the assistant's is the beginning of the answer: it follows on
// the template's <Assistant>, and then no tag is forced.
static bool chat_prompt(Conn *c, Params *p) {
    const char *want = "a non-empty array";
    const Json *list = required(c, c->request.json, "messages", JSON_ARRAY, want), *v;
    if (!list) return false;
    if (!list->count) return refuse(c, 400, "messages", "got an empty array, want %s", want);
    int n = (int)list->count, i = 0;
    Message *m = xcalloc(list->count, sizeof *m);
    for (v = list + 1; i < n && message_parse(c, &m[i], v); i++) v = json_next(v);
    if (i == n) {
        bool prefill = m[n - 1].role == ROLE_ASSISTANT, think = server.think && !prefill;
        Buf text = {0};
        chat_render(&text, server.template_kind, m, n - prefill, true, think);
        // Behind a tool's answer the template has no <Assistant>, and then no tag either.
        p->forced_tag = think && !strcmp(text.data + text.len - strlen(THINK), THINK);
        if (prefill) {
            Str s = m[n - 1].content;
            size_t open = tag_find(s, OPEN_TAG);
            size_t close = open + tag_find((Str){s.data + open, s.len - open}, CLOSE_TAG);
            p->thinking = open + OPEN_TAG.len <= s.len && close + CLOSE_TAG.len > s.len;
            buf_add(&text, s.data, s.len);
        }
        p->thinking |= p->forced_tag;
        tokenizer_encode(server.tokenizer, &p->seq.tokens, buf_text(&text));
        buf_free(&text);
    }
    free(m);
    return i == n;
}

// One token alone: {"token":"Okay","bytes":[79,107,97,121],"logprob":-0.0021
static void token_write(Buf *b, int id, float logprob) {
    Str bytes = tokenizer_bytes(server.tokenizer, id);
    buf_str(b, "{\"token\":");
    text_write(b, &id, 1, false);
    buf_str(b, ",\"bytes\":[");
    for (size_t i = 0; i < bytes.len; i++) buf_printf(b, i ? ",%u" : "%u", (uint8_t)bytes.data[i]);
    buf_str(b, "],\"logprob\":");
    logprob_write(b, logprob);
}

// A token with its rivals: one entry of logprobs.content.
static void chat_token(Conn *c, Answer *a, const Event *e) {
    (void)c;
    Buf *b = &a->lists[0];
    token_write(b, e->choice.id, e->choice.logprob);
    buf_str(b, ",\"top_logprobs\":[");
    for (int i = 0; i < e->choice.n_top; i++) {
        if (i) buf_str(b, ",");
        token_write(b, e->choice.top_id[i], e->choice.top_logprob[i]);
        buf_str(b, "}");
    }
    buf_str(b, "]}\n");
}

static bool chat_complete(Conn *c) {
    static const Api api = {CHAT, -1, chat_token, v1_event, v1_answer, {"content"}};
    Params *p = &call_new(c, &api)->params;
    p->separate_reasoning = p->stream_reasoning = true;
    if (!fields_parse(c, p, c->request.json, V1) || !chat_prompt(c, p) || !v1_fields(c))
        return false;
    if (p->top_logprobs && !p->logprobs)
        return refuse(c, 400, "top_logprobs", "got %d, want 0 unless logprobs is true",
                      p->top_logprobs);
    if (p->logprobs) p->seq.sampling.top_logprobs = p->top_logprobs;
    p->separate_reasoning &= server.options.reasoning_parser != NULL;
    p->sharers = p->n;
    if (p->forced_tag && !p->stream && !p->separate_reasoning)
        buf_str(&p->echoed, THINK);  // a stream has it in an event of its own
    if (!call_fits(c)) return false;
    call_add(c);
    return v1_start(c, p->stream ? "chat.completion.chunk" : "chat.completion");
}

// -------------------------------------------------------------------------------------------------
// POST /v1/completions

static void completion_token(Conn *c, Answer *a, const Event *e) {
    (void)c;
    const Choice *choice = &e->choice;
    Buf *top = &a->lists[3];
    size_t from = top->len;
    buf_str(&a->lists[0], "-1\n");  // text_offset
    logprob_write(&a->lists[1], choice->logprob), buf_str(&a->lists[1], "\n");
    text_write(&a->lists[2], &choice->id, 1, false), buf_str(&a->lists[2], "\n");
    if (!a->seq->sampling.top_logprobs) return;
    bool none = isnan(choice->logprob);
    if (none) buf_str(top, "null");
    for (int i = 0; i < choice->n_top; i++) {
        Buf *name = scratch();
        buf_str(name, ",");  // so that it is found whole: in a text a backslash is before quotes
        text_write(name, &choice->top_id[i], 1, false);
        buf_str(name, ":");
        if (i && strstr(top->data + from, name->data)) continue;  // of equal texts the first stays
        buf_add(top, name->data, name->len);
        logprob_write(top, choice->top_logprob[i]);
    }
    buf_str(top, none ? "\n" : "}\n");
    if (!none) top->data[from] = '{';
}

static bool complete(Conn *c) {
    static const Api api = {COMPLETION, 16, completion_token, v1_event, v1_answer,
                            {"text_offset", "token_logprobs", "tokens", "top_logprobs"}};
    Params *p = &call_new(c, &api)->params;  // 16 tokens where max_tokens does not say: OpenAI's
    const Json *prompt = field(c->request.json, "prompt");
    if (!fields_parse(c, p, c->request.json, V1)) return false;
    if (!prompt) return refuse(c, 400, "prompt", "missing, want a string or an array");
    if (!v1_fields(c)) return false;
    p->seq.score_from = p->echo && p->seq.sampling.top_logprobs >= 0;
    return prompts_add(c, prompt, true, true) && v1_start(c, "text_completion");
}

// -------------------------------------------------------------------------------------------------
// POST or PUT /generate: SGLang's own. Its events are cumulative, each one is the answer so far.

// [-1.5,23166,null]
static void entry_write(Buf *b, const Conn *c, int id, float logprob) {
    buf_str(b, "[");
    logprob_write(b, logprob);
    buf_printf(b, ",%d,", id);
    if (c->call->params.id_texts) text_write(b, &id, 1, false);
    else buf_str(b, "null");
    buf_str(b, "]");
}

static void native_token(Conn *c, Answer *a, const Event *e) {
    const Choice *choice = &e->choice;
    Buf *list = &a->lists[!e->prompt], *top = &a->lists[2 + !e->prompt];
    entry_write(list, c, choice->id, choice->logprob), buf_str(list, "\n");
    if (!a->seq->sampling.top_logprobs) return;
    bool none = isnan(choice->logprob);
    buf_str(top, none ? "null" : "[");
    for (int i = 0; i < choice->n_top; i++) {
        if (i) buf_str(top, ",");
        entry_write(top, c, choice->top_id[i], choice->top_logprob[i]);
    }
    buf_str(top, none ? "\n" : "]\n");
}

static const char *native_finish(const Answer *a) {
    switch (a->finish) {
    case FINISH_STOP: return at("{\"type\":\"stop\",\"matched\":%s}", matched(a));
    case FINISH_LENGTH: return at("{\"type\":\"length\",\"length\":%d}", a->seq->max_tokens);
    case FINISH_ABORT:
        return "{\"type\":\"abort\",\"message\":\"Aborted\",\"status_code\":null,"
               "\"err_type\":null}";
    default: return "null";
    }
}

static void native_write(Buf *b, const Conn *c, const Answer *a) {
    const Seq *s = a->seq;
    buf_str(b, "{\"text\":");
    json_write_string(b, buf_text(&a->text));
    buf_printf(b, ",\"meta_info\":{\"id\":%s,\"finish_reason\":%s,\"prompt_tokens\":%d,",
               quoted(str_of(s->rid)), native_finish(a), s->n_prompt);
    if (s->sampling.top_logprobs >= 0) {
        lists_write(b, c->call, a, NULL, s->sampling.top_logprobs ? LISTS : 2);
        buf_str(b, ",");
    }
    buf_printf(b, "\"completion_tokens\":%d,\"cached_tokens\":%d}", a->n_tokens, s->n_cached);
    if (c->call->list && c->call->params.stream) buf_printf(b, ",\"index\":%d", s->index);
    buf_str(b, "}");
}

static void native_event(Conn *c, Answer *a) {
    Buf *b = scratch();
    native_write(b, c, a);
    stream_event(c, b->data);
    a->waiting = false;
}

static void native_answer(Conn *c) {
    const Call *call = c->call;
    for (int i = 0; i < call->n_answers; i++) {
        if (call->list) buf_str(&c->out, i ? "," : "[");
        native_write(&c->out, c, &call->answers[i]);
    }
    if (call->list) buf_str(&c->out, "]");
    respond(c, 200);
}

static bool generate(Conn *c) {
    static const Api api = {PARAMS, 128, native_token, native_event, native_answer,
                            {"input_token_logprobs", "output_token_logprobs", "input_top_logprobs",
                             "output_top_logprobs"}};
    const Json *text = field(c->request.json, "text"), *ids = field(c->request.json, "input_ids");
    call_new(c, &api);
    if (!text == !ids)
        return refuse(c, 400, NULL, "text, input_ids: got %s, want exactly one",
                      text ? "both" : "neither");
    return prompts_add(c, text ? text : ids, text, ids) && call_start(c);
}

// -------------------------------------------------------------------------------------------------
// The other endpoints

static bool health(Conn *c) {
    if (server_state() != STATE_READY) return refuse(c, 503, NULL, "not ready");
    buf_str(&c->out, health_json());
    return respond(c, 200);
}

static void probe_answer(Conn *c) {
    if (c->call->answers[0].finish == FINISH_ABORT) refuse(c, 503, NULL, "aborted");
    else respond(c, 200);
}

// Proves that the engine moves: one token, within 20 s. conn_expire() answers where it doesn't.
static bool health_generate(Conn *c) {
    static const Api api = {.answer = probe_answer};
    if (server_state() != STATE_READY || server.node) return health(c);
    Call *call = call_new(c, &api);
    Seq *s = &call->params.seq;
    s->max_tokens = 1, s->sampling.temperature = 0, s->probe = true;
    ids_add(&s->tokens, 0);
    call->deadline = now + http_limits.probe_s;
    call_add(c);
    return call_start(c);
}

static Str percent_decode(Str s) {
    Buf *b = scratch();
    for (size_t i = 0; i < s.len; i++) {
        unsigned byte = (uint8_t)s.data[i];
        bool escape = byte == '%' && i + 2 < s.len && isxdigit((uint8_t)s.data[i + 1]) &&
                      isxdigit((uint8_t)s.data[i + 2]);
        if (escape) sscanf(s.data + i + 1, "%2x", &byte), i += 2;
        buf_add(b, &(char){(char)byte}, 1);
    }
    return buf_text(b);
}

// GET /v1/models, and /v1/models/{id}, whose id may hold slashes.
static bool models(Conn *c) {
    Str path = c->request.path;
    size_t n = strlen("/v1/models/");
    Str id = path.len > n ? percent_decode((Str){path.data + n, path.len - n}) : served_name();
    const char *name = quoted(served_name());
    bool found = !strcmp(name, quoted(id));
    if (found)
        buf_printf(&c->out, "%s{\"id\":%s,\"object\":\"model\",\"created\":%ld,\"owned_by\":"
                   "\"sglang\",\"root\":%s,\"parent\":null,\"max_model_len\":%ld}%s",
                   path.len > n ? "" : "{\"object\":\"list\",\"data\":[", name, server.created,
                   name, max_req_len(), path.len > n ? "" : "]}");
    else
        buf_printf(&c->out, "{\"error\":{\"message\":%s,\"type\":\"invalid_request_error\","
                   "\"param\":\"model\",\"code\":\"model_not_found\"}}",
                   quoted(str_of(at("The model '%.*s' does not exist", ARG(id)))));
    return respond(c, found ? 200 : 404);
}

static bool model_info(Conn *c) {
    const Options *o = &server.options;
    const char *tokenizer = o->tokenizer_path ? o->tokenizer_path : o->model_path;
    buf_printf(&c->out, "{\"model_path\":%s,\"tokenizer_path\":%s,\"is_generation\":true}",
               quoted(str_of(o->model_path)), quoted(str_of(tokenizer)));
    return respond(c, 200);
}

static bool server_info(Conn *c) {
    Buf *options = scratch();
    options_json(options);
    buf_printf(&c->out, "{%s,\"status\":\"%s\",\"max_total_num_tokens\":%d,"
               "\"max_req_input_len\":%ld,\"internal_states\":[{\"num_running_reqs\":%d,"
               "\"num_queue_reqs\":%d,\"num_used_tokens\":%d}],\"version\":\"%s\","
               "\"system_fingerprint\":\"r1-%016lx\"}", options->data, state_names[server_state()],
               server.max_total_tokens, max_req_len() - 1, server.running, server.queued,
               server.used_tokens, R1_VERSION, server.fingerprint);
    return respond(c, 200);
}

// Busy counts what this thread has not seen the end of: whoever has his answer may flush.
static bool flush_cache(Conn *c) {
    int live = rid_find((Str){0}, false), waiting = server.queued < live ? server.queued : live;
    const char *busy = at("Cache not flushed because there are pending requests. #queue-req: %d, "
                          "#running-req: %d", waiting, live - waiting);
    if (!live) engine_flush();
    log_line(0, "%s", live ? busy : "Cache flushed successfully!");
    buf_printf(&c->out, "%s\n", live ? busy : "Cache flushed.");
    return respond_as(c, live ? 400 : 200, "text/plain; charset=utf-8");
}

// The aborted end normally, with what they have.
static bool abort_request(Conn *c) {
    const Json *all = field(c->request.json, "abort_all"), *rid = field(c->request.json, "rid");
    if ((all && !typed(c, all, JSON_BOOL)) || (rid && !typed(c, rid, JSON_STRING))) return false;
    bool every = all && all->boolean;
    if (!every && !rid)
        return refuse(c, 400, "rid", "missing, want a string, or \"abort_all\":true");
    rid_find(every ? (Str){0} : rid->string, true);
    return respond(c, 200);
}

// The page to talk to is a part of the program: the assembler copies the file in.
__asm__(".section .rodata\n"
        "chat_html: .incbin \"chat.html\"\n"
        "chat_html_end: .byte 0\n"
        ".previous");
extern const char chat_html[], chat_html_end[];

static bool page(Conn *c) {
    buf_add(&c->out, chat_html, (size_t)(chat_html_end - chat_html));
    return respond_as(c, 200, "text/html; charset=utf-8");
}

// Arrays in give arrays out: of ids, and of their counts.
static bool tokenize(Conn *c) {
    Params p = {.add_special_tokens = true};
    const Json *json = c->request.json, *text = field(json, "prompt");
    bool messages = field(json, "messages"), list = text && text->type == JSON_ARRAY, ok = true;
    if (messages == !!text)
        return refuse(c, 400, NULL, "prompt, messages: got %s, want exactly one",
                      messages ? "both" : "neither");
    if (!fields_parse(c, &p, json, TOKENIZE)) return false;
    if (list && text->count > MAX_SEQS)
        return refuse(c, 400, "prompt", "got %u texts, want at most %d", text->count, MAX_SEQS);
    uint32_t n = list ? text++->count : 1;
    Buf counts = {0};
    buf_str(&c->out, list ? "{\"tokens\":[" : "{\"tokens\":");
    for (uint32_t i = 0; i < n; i++) {
        Ids *ids = &p.seq.tokens;
        ids->len = 0;
        ok = messages ? chat_prompt(c, &p) : typed(c, text, JSON_STRING);
        if (!ok) break;
        if (text) text_encode(ids, text->string, p.add_special_tokens), text = json_next(text);
        buf_str(&c->out, i ? ",[" : "[");
        for (size_t k = 0; k < ids->len; k++) buf_printf(&c->out, k ? ",%d" : "%d", ids->data[k]);
        buf_str(&c->out, "]");
        buf_printf(&counts, i ? ",%zu" : "%zu", ids->len);
    }
    if (ok) buf_printf(&c->out, list ? "],\"count\":[%.*s]" : ",\"count\":%.*s", ARG(counts));
    if (ok) buf_printf(&c->out, ",\"max_model_len\":%ld}", max_req_len());
    free(p.seq.tokens.data), buf_free(&counts);
    return ok && respond(c, 200);
}

// An array of ids becomes a text, an array of arrays an array of texts.
static bool detokenize(Conn *c) {
    Params p = {.seq.text.skip_special = true};
    Ids ids = {0};
    const Json *json = c->request.json, *v = required(c, json, "tokens", JSON_ARRAY, "an array");
    if (!v || !fields_parse(c, &p, json, DETOKENIZE)) return false;
    bool list = v->count && v[1].type == JSON_ARRAY, ok = true;
    if (v->skip - 1 > max_req_len())  // ids are short and their text may be long
        return refuse(c, 400, "tokens", "got %u values, want at most %ld", v->skip - 1,
                      max_req_len());
    uint32_t n = list ? v++->count : 1;
    buf_str(&c->out, list ? "{\"text\":[" : "{\"text\":");
    for (uint32_t i = 0; i < n && ok; i++, v = json_next(v)) {
        ids.len = 0;
        ok = typed(c, v, JSON_ARRAY) && ids_parse(c, &ids, v);
        if (ok && i) buf_str(&c->out, ",");
        if (ok) text_write(&c->out, ids.data, ids.len, p.seq.text.skip_special);
    }
    free(ids.data);
    if (ok) buf_str(&c->out, list ? "]}" : "}");
    return ok && respond(c, 200);
}

// -------------------------------------------------------------------------------------------------
// Routes, and what may come in

static const Route routes[] = {
    {"/v1/chat/completions", "POST", NULL, OPENAI, chat_complete, false, false},
    {"/v1/completions", "POST", NULL, OPENAI, complete, false, false},
    {"/generate", "POST", "PUT", GENERATE, generate, false, false},
    {"/v1/models", "GET", "HEAD", OPENAI, models, false, false},
    {"/v1/models/", "GET", "HEAD", OPENAI, models, false, false},
    {"/", "GET", "HEAD", OPENAI, page, true, false},
    {"/health", "GET", "HEAD", HEALTH, health, true, true},
    {"/health_generate", "GET", "HEAD", HEALTH, health_generate, true, true},
    {"/metrics", "GET", "HEAD", GENERATE, metrics, true, true},
    {"/get_model_info", "GET", "HEAD", GENERATE, model_info, false, false},
    {"/model_info", "GET", "HEAD", GENERATE, model_info, false, false},
    {"/get_server_info", "GET", "HEAD", GENERATE, server_info, false, false},
    {"/server_info", "GET", "HEAD", GENERATE, server_info, false, false},
    {"/flush_cache", "GET", "POST", GENERATE, flush_cache, false, false},
    {"/abort_request", "POST", NULL, GENERATE, abort_request, false, false},
    {"/tokenize", "POST", NULL, OPENAI, tokenize, false, false},
    {"/v1/tokenize", "POST", NULL, OPENAI, tokenize, false, false},
    {"/detokenize", "POST", NULL, OPENAI, detokenize, false, false},
    {"/v1/detokenize", "POST", NULL, OPENAI, detokenize, false, false},
};

static const Route *route_find(Str path) {
    for (const Route *r = routes; r < routes + sizeof routes / sizeof *routes; r++) {
        bool prefix = r->path[1] && r->path[strlen(r->path) - 1] == '/';
        if (prefix ? str_begins(path, str_of(r->path)) : str_equal(path, r->path)) return r;
    }
    return NULL;
}

// In constant time: how long it takes tells the length of what was sent and nothing of the key.
static bool key_matches(Str got) {
    const char *want = at("Bearer %s", server.options.api_key);
    size_t n = strlen(want);
    unsigned different = got.len != n;
    for (size_t i = 0; i < got.len; i++) different |= (uint8_t)(got.data[i] ^ want[i % n]);
    return !different;
}

// True when the request may be handled; else it is answered.
static bool request_admit(Conn *c) {
    Request *r = &c->request;
    if (str_equal(r->method, "OPTIONS")) {
        Str asked = r->cors_headers.len && r->cors_headers.len < LINE ? r->cors_headers : STR("*");
        r->extra = at("Access-Control-Allow-Methods: GET, HEAD, POST, PUT, OPTIONS\r\n"
                      "Access-Control-Allow-Headers: %.*s\r\nAccess-Control-Max-Age: 600\r\n",
                      ARG(asked));
        return !respond(c, 204);
    }
    int state = server_state();
    // The page holds no secret, and asks for the key by itself.
    bool open = !server.options.api_key || str_equal(r->path, "/") ||
                str_begins(r->path, STR("/health"));
    bool always = r->route && r->route->always;
    if (!open && !key_matches(r->authorization)) return refuse(c, 401, NULL, "Unauthorized");
    const char *failure = server.failure;
    if (server.node && !(r->route && r->route->quiet))
        return refuse(c, 503, NULL, "node %d serves /health and /metrics only; ask the leader at "
                      "%s", server.node, server.leader);
    if (!always && failure) return refuse(c, 503, NULL, "%s", failure);
    if (!always && state == STATE_DRAINING) return refuse(c, 503, NULL, "r1 is shutting down");
    if (!always && state != STATE_READY) {
        uint64_t loaded, total;
        int slowest = rank_slowest(0, server.n_ranks);
        group_loaded(&loaded, &total);
        r->extra = "Retry-After: 5\r\n";
        return refuse(c, 503, NULL, "r1 is not ready: %s%s", state_names[state],
                      state != STATE_LOADING ? "" :
                      at(", %.1f %% (slowest: rank %d, %.1f %%)",
                         100 * (double)loaded / fmax(1, (double)total), slowest,
                         100 * rank_loaded(slowest)));
    }
    if (!r->route)
        return refuse(c, 404, NULL, "%.*s %.*s: no such route", ARG(r->method),
                      ARG(str_cut(r->path, LINE)));
    const char *a = r->route->method, *b = r->route->also;
    if (str_equal(r->method, a) || (b && str_equal(r->method, b))) return true;
    r->extra = b ? at("Allow: %s, %s\r\n", a, b) : at("Allow: %s\r\n", a);
    return refuse(c, 405, NULL, "%.*s %.*s: method not allowed, want %s", ARG(r->method),
                  ARG(r->path), b ? at("%s or %s", a, b) : a);
}

// The request is complete. An error has left BODY already, so that its handler doesn't run.
static void request_handle(Conn *c) {
    if (!request_admit(c)) return;
    char err[SHOWN * 4];
    Json *json = NULL;
    if (!strcmp(c->request.route->method, "POST")) {
        buf_str(&c->body, "");  // not NULL then
        json = json_parse(c->body.data, c->body.len, err, sizeof err);
        if (!json) refuse(c, 400, NULL, "%s", err);
        else if (json->type != JSON_OBJECT)
            refuse(c, 400, NULL, "body: got %s, want object", json_type_name(json));
    }
    c->request.json = json;
    if (c->state == BODY) c->request.route->handler(c);
    free(json);
}

// -------------------------------------------------------------------------------------------------
// Requests: from bytes to Request and body. What could be read in two ways is refused.

static bool malformed(Conn *c, const char *what) {
    return refuse(c, 400, NULL, "malformed HTTP request: %s", what);
}

// A method's or a field's name (RFC 9110, 5.6.2).
static bool is_token(Str s) {
    bool ok = s.len > 0;
    for (size_t i = 0; i < s.len; i++)
        ok = ok && (isalnum((uint8_t)s.data[i]) || strchr("!#$%&'*+-.^_`|~", s.data[i]));
    return ok;
}

// GET /v1/models?x=1 HTTP/1.1
static bool request_line(Conn *c, Str line) {
    Request *r = &c->request;
    int a = 0, b = 0, end = 0;  // where the method, the target and the line end
    char major, minor;
    sscanf(line.data, "%*[^ ]%n%*1[ ]%*[!-~]%n%*1[ ]HTTP/%c.%c%n", &a, &b, &major, &minor, &end);
    if ((size_t)end != line.len || !isdigit((uint8_t)major) || !isdigit((uint8_t)minor))
        return malformed(c, "request line");
    r->method = (Str){line.data, (size_t)a};
    r->target = (Str){line.data + a + 1, (size_t)(b - a - 1)};
    // Other targets than a path (a proxy's http://..., CONNECT's host:port) are not for us.
    if (!is_token(r->method) || (*r->target.data != '/' && !str_equal(r->target, "*")))
        return malformed(c, "request line");
    if (major != '1') return refuse(c, 505, NULL, "HTTP/%c.%c: want HTTP/1.1", major, minor);
    r->http10 = minor == '0';
    const char *query = memchr(r->target.data, '?', r->target.len);
    r->path = str_cut(r->target, query ? (size_t)(query - r->target.data) : SIZE_MAX);
    if (r->path.len > 1 && r->path.data[r->path.len - 1] == '/') r->path.len--;
    return true;
}

// Authorization: Bearer K. A line that begins with white space used to go on with the field before;
// here it has no name and is refused.
static bool header_field(Conn *c, Str line) {
    Request *r = &c->request;
    const char *colon = memchr(line.data, ':', line.len);
    Str name = str_cut(line, colon ? (size_t)(colon - line.data) : 0);
    if (!is_token(name)) return malformed(c, "header field");
    Str v = {colon + 1, line.len - name.len - 1};
    while (v.len && isblank((uint8_t)*v.data)) v.data++, v.len--;
    while (v.len && isblank((uint8_t)v.data[v.len - 1])) v.len--;
    Str start = str_cut(v, SHOWN);
    if (str_is(name, "content-length")) {
        uint64_t length = strtoull(v.data, NULL, 10);
        size_t digits = strspn(v.data, "0123456789");  // the field's end is none
        if (!digits || digits != v.len || digits > 18) return malformed(c, "Content-Length");
        if (r->has_length && r->left != length) return malformed(c, "two lengths");
        r->has_length = true, r->left = length;
    }
    if (str_is(name, "transfer-encoding")) {
        if (!str_is(v, "chunked"))
            return refuse(c, 501, NULL, "Transfer-Encoding: got %.*s, want chunked", ARG(start));
        if (r->chunked || r->http10) return malformed(c, "Transfer-Encoding");
        r->chunked = true;
    }
    if (str_is(name, "content-encoding") && !str_is(v, "identity"))
        return refuse(c, 415, NULL, "Content-Encoding: got %.*s, want identity", ARG(start));
    // A list of words. Closing is always allowed, so that a longer word does no harm.
    for (size_t i = 0; str_is(name, "connection") && i + strlen("close") <= v.len; i++)
        r->close |= !strncasecmp(v.data + i, "close", strlen("close"));
    if (str_is(name, "expect")) r->expects = !r->http10 && str_is(v, "100-continue");
    if (str_is(name, "authorization")) r->authorization = v;
    if (str_is(name, "origin")) r->origin = v;
    if (str_is(name, "access-control-request-headers")) r->cors_headers = v;
    return true;
}

// The whole header lies in c->head. True when a body may follow, else it is answered.
static bool header_parse(Conn *c) {
    Request *r = &c->request;
    const char *h = c->head.data;
    // Behind this, CR and LF stand in pairs only and NUL nowhere: strings end where lines do, and
    // nothing of a request can begin a new line in an answer or in the log.
    for (size_t i = 0; i < c->head.len; i++) {
        bool pair = h[i] == '\r' ? h[i + 1] == '\n' : h[i] == '\n' && i && h[i - 1] == '\r';
        if (!pair && iscntrl((uint8_t)h[i]) && h[i] != '\t')
            return malformed(c, "control character");
    }
    int n = -1;  // fields; the request line is none
    for (const char *end; (end = strstr(h, "\r\n")) != h; h = end + 2, n++) {
        Str line = {h, (size_t)(end - h)};
        if (n == http_limits.header_fields)
            return refuse(c, 431, NULL, "header: got more than %d fields", n);
        if (n < 0 ? !request_line(c, line) : !header_field(c, line)) return false;
    }
    if (r->chunked && r->has_length) return malformed(c, "two lengths");
    r->route = route_find(r->path);  // only now: what is malformed has the plain error's shape
    r->body_done = !r->chunked && !r->left;
    size_t most = http_limits.body_bytes;
    return r->left <= most ||
           refuse(c, 413, NULL, "body: got %lu bytes, want at most %zu", r->left, most);
}

static Str unread(const Conn *c) { return (Str){c->in.data + c->in_at, c->in.len - c->in_at}; }

// These are steps of conn_run(): true when something was done, false when more must come first.
static bool header_read(Conn *c) {
    // Empty lines in front of a request are left over from sloppy clients' bodies (RFC 9112, 2.2).
    while (str_begins(unread(c), STR("\r\n"))) c->in_at += 2;
    Str s = unread(c);
    size_t most = (size_t)http_limits.header_bytes;
    if (!s.len) return c->state = IDLE, false;
    if (c->state == IDLE) conn_state(c, HEADER);
    const char *end = memmem(s.data, s.len, "\r\n\r\n", 4);
    if (end) s.len = (size_t)(end + 4 - s.data);
    if (s.len > most) return !refuse(c, 431, NULL, "header: got more than %zu bytes", most);
    if (!end) return false;
    buf_add(&c->head, s.data, s.len);
    c->in_at += s.len;
    if (!header_parse(c)) return true;
    conn_state(c, BODY);
    // Who asks before it sends a body is told of a refusal before it does.
    if (c->request.expects && !c->request.body_done && request_admit(c))
        buf_str(&c->out, "HTTP/1.1 100 Continue\r\n\r\n");
    return true;
}

// A line of a chunked body that is no data. False when it isn't whole yet, or when it was refused.
static bool chunk_line(Conn *c) {
    Request *r = &c->request;
    Str s = unread(c);
    size_t most = http_limits.body_bytes;
    if (!s.len) return false;
    const char *end = memmem(s.data, s.len, "\r\n", 2);
    if (end) s.len = (size_t)(end - s.data);
    // A bare LF would be a line's end for some proxies and none for others.
    if (s.len > CHUNK_LINE || memchr(s.data, '\n', s.len)) return malformed(c, "chunk");
    if (!end) return false;
    c->in_at += s.len + 2;
    if (r->line == CHUNK_TRAILER) {
        r->trailer += s.len, r->body_done = !s.len;
        return r->trailer <= (size_t)http_limits.header_bytes || malformed(c, "trailer");
    }
    if (r->line == CHUNK_END) { r->line = CHUNK_SIZE; return !s.len || malformed(c, "chunk"); }
    size_t digits = strspn(s.data, "0123456789abcdefABCDEF");
    bool ends = digits == s.len || s.data[digits] == ';' || isblank((uint8_t)s.data[digits]);
    if (!digits || digits > 15 || !ends) return malformed(c, "chunk");  // 15: fits 64 bits
    r->left = strtoul(s.data, NULL, 16);
    r->line = r->left ? CHUNK_END : CHUNK_TRAILER;
    return c->body.len + r->left <= most ||
           refuse(c, 413, NULL, "body: got more than %zu bytes, want at most %zu", most, most);
}

// Limits are checked on what has come, not on what was announced: a promise holds no memory.
static bool body_read(Conn *c) {
    Request *r = &c->request;
    while (c->state == BODY && !r->body_done) {
        Str s = str_cut(unread(c), r->left);
        if (r->left ? !s.len : !chunk_line(c)) return c->state != BODY;
        if (!s.len) continue;
        if (bodies_held + s.len > http_limits.all_bodies_bytes)
            return !refuse(c, 503, NULL, "too many request bodies");
        buf_add(&c->body, s.data, s.len);
        bodies_held += s.len, c->in_at += s.len, r->left -= s.len;
        r->body_done = !r->left && !r->chunked;
    }
    if (c->state == BODY) request_handle(c);
    return true;
}

// -------------------------------------------------------------------------------------------------
// Connections

// An idle connection holds no memory but itself.
static void request_end(Conn *c) {
    Call *call = c->call;
    for (int i = 0; call && i < call->n_answers; i++) {
        Answer *a = &call->answers[i];
        seq_free(a->seq), free(a->bias);
        buf_free(&a->text), buf_free(&a->thought), buf_free(&a->held);
        for (int k = 0; k < LISTS; k++) buf_free(&a->lists[k]);
    }
    if (call) bodies_held -= call->held;
    if (call) free(call->params.seq.tokens.data), free(call->answers);
    if (call) buf_free(&call->params.echoed), buf_free(&call->head);
    free(call);
    c->call = NULL;
    bodies_held -= c->body.len;
    buf_free(&c->body), buf_free(&c->head), buf_free(&c->out);
    c->request = (Request){.close = c->request.close};
}

// Closed by the client, by an error or by a limit: whatever was being computed is cancelled.
static void conn_drop(Conn *c) {
    call_cancel(c, DISCONNECT);
    close(c->fd);
    c->fd = -1;  // poll() passes over it
    n_open--;
    c->state = DEAD;
}

// Sends what is in `out`. True when all of it is gone.
static bool conn_send(Conn *c) {
    while (c->out_at < c->out.len) {
        ssize_t n = send(c->fd, c->out.data + c->out_at, c->out.len - c->out_at, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) conn_drop(c);
        if (n < 0) return c->blocked = true, false;
        c->out_at += (size_t)n, c->since = now;
    }
    c->out.len = c->out_at = 0;
    c->blocked = false;
    return true;
}

// One step of the state, with an empty `out`. False when the client or the engine must move first.
static bool conn_advance(Conn *c) {
    if (c->state == IDLE || c->state == HEADER) return header_read(c);
    if (c->state == BODY) return body_read(c);
    if (c->state == STREAMING) return stream_fill(c);
    // What was cancelled the engine still has, for one step if it moves; conns_reap() waits, too.
    if (c->state != WRITING || (c->n_live && !c->request.close)) return false;
    if (!c->n_live) request_end(c);
    // Closed at once, with bytes of the client's unread, TCP would throw away our answer too.
    if (c->request.close) shutdown(c->fd, SHUT_WR);
    conn_state(c, c->request.close ? LINGER : IDLE);
    return c->state == IDLE;
}

// Goes on until it must wait. Pipelined requests are served one by one in this loop, in order.
static void conn_run(Conn *c) {
    while (conn_send(c) && conn_advance(c)) {}
    buf_shift(&c->in, NULL, c->in_at);
    c->in_at = 0;
    if (!c->in.len) buf_free(&c->in);  // thousands of connections may be idle
}

// One read for each connection and round. The end of the stream ends the connection: in these
// states no answer is owed, except to a request that will never be complete.
static void conn_read(Conn *c) {
    static char bytes[READ_BYTES];
    ssize_t n = recv(c->fd, bytes, sizeof bytes, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) conn_drop(c);
    if (n <= 0 || c->state == LINGER) return;
    if (c->state == BODY) c->since = now;
    buf_add(&c->in, bytes, (size_t)n);
    conn_run(c);
}

// When the state has lasted too long.
static double conn_deadline(const Conn *c) {
    static const double *const seconds[] = {
        [IDLE] = &http_limits.idle_s, [HEADER] = &http_limits.header_s,
        [BODY] = &http_limits.body_gap_s, [LINGER] = &http_limits.linger_s, [DEAD] = NULL};
    if (c->state == COMPUTING) return c->call->deadline;
    if (c->state != DEAD && c->out.len) return c->since + http_limits.stall_s;
    return seconds[c->state] ? c->since + *seconds[c->state] : INFINITY;
}

static void conn_expire(Conn *c) {
    const HttpLimits *l = &http_limits;
    if (c->out.len || c->state == IDLE || c->state == LINGER) { conn_drop(c); return; }
    if (c->state == COMPUTING) {  // the engine may be stuck: nothing can follow on this connection
        call_cancel(c, FAULT);
        c->request.close = true;
        refuse(c, 503, NULL, "no token in time");
    } else if (c->state == BODY)
        refuse(c, 408, NULL, "request not complete: no byte for %g s", l->body_gap_s);
    else refuse(c, 408, NULL, "request not complete: no header after %g s", l->header_s);
    conn_run(c);
}

// What poll() said of a connection. It may have changed since, through an event of the engine's.
static void conn_ready(Conn *c, int revents) {
    if (c->state == DEAD) return;
    if (c->n_live && (revents & (POLLRDHUP | POLLHUP | POLLERR))) conn_drop(c);
    else if (revents && (c->n_live || c->out.len)) conn_run(c);
    else if (revents) conn_read(c);
    else if (now >= conn_deadline(c)) conn_expire(c);
}

// Takes what waits in the listening socket. False when there are no files left: then it must rest.
static bool conns_accept(int listen_fd) {
    int most = http_limits.connections, files = max_files - SPARE_FDS;
    if (most > files) most = files;
    for (;;) {
        struct sockaddr_storage address;
        socklen_t len = sizeof address;
        int fd = accept4(listen_fd, (void *)&address, &len, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && errno == ECONNABORTED) continue;
        if (fd < 0) return errno == EAGAIN;
        Conn *oldest = NULL;  // the one that has been idle for longest makes room
        for (Conn *i = conns; i && n_open >= most; i = i->next)
            if (i->state == IDLE && (!oldest || i->since < oldest->since)) oldest = i;
        if (oldest) conn_drop(oldest);
        bool full = n_open >= most;
        if (n_open >= most + GOODBYES) { close(fd); continue; }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));  // a token is not to wait
        Conn *c = xcalloc(1, sizeof *c);
        *c = (Conn){.fd = fd, .since = now, .next = conns};
        conns = c;
        n_open++;
        getnameinfo((void *)&address, len, c->peer, sizeof c->peer, c->port, sizeof c->port,
                    NI_NUMERICHOST | NI_NUMERICSERV);
        if (full) refuse(c, 503, NULL, "too many connections"), conn_run(c);
    }
}

// Frees the dead: not earlier, for the round still counts them.
static void conns_reap(void) {
    for (Conn **link = &conns, *c; (c = *link);) {
        if (c->state != DEAD || c->n_live) { link = &c->next; continue; }
        *link = c->next;
        request_end(c);
        buf_free(&c->in), free(c);
    }
}

// -------------------------------------------------------------------------------------------------
// The loop

// Takes all events before any socket: a round costs one send for each connection.
static void take_events(void) {
    char bytes[SHOWN];
    while (read(server.wake_fd, bytes, sizeof bytes) > 0) {}  // first: no event is missed so
    for (Event *e = engine_events(), *next; e; e = next) {
        Conn *c = e->seq->owner;
        next = e->next;
        c->touched = true;
        call_event(c, e);
        event_free(e);
    }
    for (Conn *c = conns; c; c = c->next) {
        if (c->touched && c->state != DEAD) conn_run(c);
        c->touched = false;
    }
}

// What has failed can't be taken back. All who wait are told; then the program ends, so that
// whoever watches it starts it anew.
bool http_fail(char *reason) {
    const char *none = NULL;
    bool first = atomic_compare_exchange_strong(&server.failure, &none, reason);
    if (!first) free(reason);
    (void)!write(server.wake_fd, &(uint64_t){1}, sizeof(uint64_t));
    return first;
}

static void failure_tell(void) {
    server.state = STATE_FAILED;
    for (Conn *c = conns; c; c = c->next) {
        if (c->state != COMPUTING && c->state != STREAMING) continue;
        c->request.close = true;
        refuse(c, 503, NULL, "%s", server.failure);
        conn_run(c);
    }
}

int tcp_listen(const char *host, int port) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *a;
    int error = getaddrinfo(host, at("%d", port), &hints, &a);
    if (error) die("cannot listen on %s:%d: %s", host, port, gai_strerror(error));
    int fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    const int backlog = 4096;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));  // a restart needn't wait
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &(int){0}, sizeof(int));  // :: takes IPv4, too
    if (fd < 0 || bind(fd, a->ai_addr, a->ai_addrlen) || listen(fd, backlog))
        die("cannot listen on %s:%d: %s", host, port, strerror(errno));
    freeaddrinfo(a);
    return fd;
}

int http_listen(const char *host, int port) {
    struct rlimit files;
    const rlim_t most = 65535;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max < most ? files.rlim_max : most;
    max_files = (int)files.rlim_cur;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);  // a client that left is an error of send(), no signal
    int fd = tcp_listen(host, port);
    struct sockaddr_in6 bound;  // port 0 takes a free one; IPv4 has it in the same place
    getsockname(fd, (void *)&bound, &(socklen_t){sizeof bound});
    server.port = ntohs(bound.sin6_port);
    log_line(-1, "INFO:     r1 %s running on http://%s:%d (Press CTRL+C to quit)", R1_VERSION,
             strchr(host, ':') ? at("[%s]", host) : host, server.port);
    return fd;
}

void http_stop(int level) {
    int saved = errno;  // of what the signal interrupted
    for (int had = server.stops; had < level;)
        if (atomic_compare_exchange_weak(&server.stops, &had, level)) break;
    (void)!write(server.wake_fd, &(uint64_t){1}, sizeof(uint64_t));
    errno = saved;
}

// The second stop ends the loop after a while, the first when nobody is to get an answer any more,
// which is the leader's to say; every five seconds until then it says for how many it waits. After
// a failure /health tells of it for a second more, and nobody is waited for.
void http_serve(int listen_fd) {
    Buf polls = {0};
    const double pause = 0.1, most = 1;  // without files to accept with; between two looks around
    double give_up = INFINITY, rest = 0, report = 0;
    stops = 0;
    for (bool failed = false;;) {
        now = now_seconds();
        double step = server.step_start;
        int patience = server.options.watchdog_timeout;
        if (patience > 0 && step > 0 && now - step > patience && !server.failure &&
            http_fail(format_string("a step took longer than %d s", patience)))
            log_line(0, "Watchdog timeout (self.watchdog_timeout=%d)", patience);
        if (server.failure && !failed) failed = true, failure_tell(), give_up = now + most;
        double wake = fmin(now + most, give_up);
        bool led = server.node && !server.over;
        int left = led ? server.running + server.queued : 0, unsent = 0;
        struct pollfd first[] = {{listen_fd, now < rest ? 0 : POLLIN, 0},
                                 {server.wake_fd, POLLIN, 0}};
        polls.len = 0;
        buf_add(&polls, first, sizeof first);
        for (Conn *c = conns; c; c = c->next) {
            // While a call runs nothing is read: what the client sends ahead waits in the kernel,
            // and only its departure counts. POLLRDHUP tells of it, in front of unread bytes too.
            short wants = c->out.len ? POLLOUT : c->n_live ? 0 : POLLIN;
            if (c->n_live) wants |= POLLRDHUP;
            buf_add(&polls, &(struct pollfd){c->fd, wants, 0}, sizeof *first);
            wake = fmin(wake, conn_deadline(c));
            left += c->n_live > 0, unsent += c->state != DEAD && c->out.len;
        }
        if ((stops && !failed && !led && !left && !unsent) || now >= give_up) break;
        if (stops && now >= report) {
            log_line(-1, "Gracefully exiting... remaining number of requests %d", left);
            report = now + 5;
        }
        struct pollfd *p = (struct pollfd *)polls.data;
        if (poll(p, polls.len / sizeof *p, (int)ceil(fmax(0, wake - now) * 1000)) < 0) continue;
        now = now_seconds();
        if (p[1].revents) take_events();  // before the sockets: tokens first
        if (server.stops > stops) {  // the first drains, the second aborts
            if (!stops && !server.over)
                log_line(-1, "SIGTERM received. Draining requests and shutting down...");
            stops = server.stops;
            if (stops > 1) give_up = fmin(give_up, now + http_limits.linger_s);
            server.state = STATE_DRAINING;
            engine_stop(stops > 1);
        }
        struct pollfd *next = p + 2;
        // Until here nothing was added or freed: the list and `polls` have the same order.
        for (Conn *c = conns; c; c = c->next) conn_ready(c, next++->revents);
        if (p[0].revents && !conns_accept(listen_fd)) rest = now + pause;
        conns_reap();
    }
    for (Conn *c = conns; c; c = c->next)
        if (c->state != DEAD) conn_drop(c);
    conns_reap();
    buf_free(&polls);
}
