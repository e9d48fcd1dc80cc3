// bench.c: a client that measures a server and prints SGLang's table. It is a file of its own since
// it knows nothing of the model: it has prompts, sockets and a clock. (r1 bench --offline, which is
// about the model and has no server, stands in r1.c; here are its flags.)
//
// The one idea: a client that is slow measures itself. So one thread waits for all connections at
// once, prompts are made and answers counted while no clock runs, and a stream's bytes are little
// more than read. /generate repeats the whole text in each event, and to parse them all would cost
// the square of an answer's length: of all but the first and the last, only the count of tokens is
// looked for, near the event's end.
#include "r1.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    MOST = 1 << 20,        // tokens of an answer, or what the server counts is no count
    TEST_TOKENS = 32,      // of the test run's answer
    READ_BYTES = 1 << 16,
    MAX_BYTES = 64 << 20,  // of a line, and of a body without lines
    TAIL_BYTES = 256,      // of an event, where its count of tokens stands
    READY = 256,           // connections that one call of epoll_wait reports
};

static struct {  // the flags by their long names
    const char *backend, *host, *base_url, *model, *tokenizer, *dataset_name, *dataset_path;
    const char *output_file, *extra_request_body;
    int port, num_prompts, max_concurrency, random_input_len, random_output_len;
    int sharegpt_output_len, sharegpt_context_len, gsp_num_groups, gsp_prompts_per_group;
    int gsp_system_prompt_len, gsp_question_len, gsp_output_len;
    double request_rate, random_range_ratio;
    uint64_t seed;
    bool apply_chat_template, disable_stream, disable_ignore_eos, return_logprob, disable_tqdm;
    bool offline;
    ShareOptions share;
} o;

#define AT(field) (size_t)((char *)&o.field - (char *)&o)
static const Flag flags[] = {
    {"--backend", 1, WORD, AT(backend), 0, 0, "sglang",
     "sglang sglang-native sglang-oai vllm sglang-oai-chat: /generate, or OpenAI's endpoints"},
    {"--host", 1, TEXT, AT(host), 0, 0, "0.0.0.0", "the server's; 0.0.0.0 is this machine"},
    {"--port", 1, INTEGER, AT(port), 1, 65535, NULL, "default: 30000, for vllm 8000"},
    {"--base-url", 1, TEXT, AT(base_url), 0, 0, NULL, "http://HOST[:PORT][/PATH] instead"},
    {"--model", 1, TEXT, AT(model), 0, 0, NULL, "the name to send; default: the server's first"},
    {"--tokenizer", 1, TEXT, AT(tokenizer), 0, 0, NULL, "its directory; default: as the model"},
    {"--dataset-name", 1, WORD, AT(dataset_name), 0, 0, "random",
     "random sharegpt generated-shared-prefix: what the prompts are"},
    {"--dataset-path", 1, TEXT, AT(dataset_path), 0, 0, NULL, "a JSON file of conversations"},
    {"--num-prompts", 1, INTEGER, AT(num_prompts), 1, MOST, "1000", "requests"},
    {"--seed", 1, LONG, AT(seed), -0x1p63, 0x1.fffffffffffffp63, "1", "of all draws"},
    {"--random-input-len", 1, INTEGER, AT(random_input_len), 1, MOST, "1024", "prompt tokens"},
    {"--random-output-len", 1, INTEGER, AT(random_output_len), 1, MOST, "1024", "answer tokens"},
    {"--random-range-ratio", 1, REAL, AT(random_range_ratio), 0, 1, "0.0", "shortest to longest"},
    {"--sharegpt-output-len", 1, INTEGER, AT(sharegpt_output_len), 2, MOST, NULL, "answer tokens"},
    {"--sharegpt-context-len", 1, INTEGER, AT(sharegpt_context_len), 4, MOST, NULL, "at most"},
    {"--apply-chat-template", 1, SWITCH, AT(apply_chat_template), 0, 0, NULL, "for sharegpt"},
    {"--gsp-num-groups", 1, INTEGER, AT(gsp_num_groups), 1, 1024, "64", "shared prefixes"},
    {"--gsp-prompts-per-group", 1, INTEGER, AT(gsp_prompts_per_group), 1, 1024, "16", "prompts"},
    {"--gsp-system-prompt-len", 1, INTEGER, AT(gsp_system_prompt_len), 1, MOST, "2048", "tokens"},
    {"--gsp-question-len", 1, INTEGER, AT(gsp_question_len), 1, MOST, "128", "tokens"},
    {"--gsp-output-len", 1, INTEGER, AT(gsp_output_len), 1, MOST, "256", "answer tokens"},
    {"--request-rate", 1, REAL, AT(request_rate), 1e-6, INFINITY, "inf", "Poisson arrivals, per s"},
    {"--max-concurrency", 1, INTEGER, AT(max_concurrency), 1, MOST, NULL, "requests open at once"},
    {"--output-file", 1, TEXT, AT(output_file), 0, 0, NULL,
     "gets a line of JSON; default: {backend}_{MMDD}_{num}_{input}_{output}.jsonl"},
    {"--extra-request-body", 1, TEXT, AT(extra_request_body), 0, 0, NULL,
     "a JSON object, whose members are sent in addition or instead"},
    {"--disable-stream", 1, SWITCH, AT(disable_stream), 0, 0, NULL, "answers in one piece"},
    {"--disable-ignore-eos", 1, SWITCH, AT(disable_ignore_eos), 0, 0, NULL, "EOS ends an answer"},
    {"--return-logprob", 1, SWITCH, AT(return_logprob), 0, 0, NULL, "asks /generate for logprobs"},
    {"--disable-tqdm", 1, SWITCH, AT(disable_tqdm), 0, 0, NULL, "no progress on stderr"},
    {"--offline", 3, SWITCH, AT(offline), 0, 0, NULL,
     "no server, but one rank's share of a model: r1 bench --offline --help"},
    {"--model-path", 2, TEXT, AT(share.model_path), 0, 0, NULL,
     "a directory with config.json; default: the tiny-r1 beside r1"},
    {"--tensor-parallel-size --tp --tp-size", 2, INTEGER, AT(share.tp), 1, 4096, "1",
     "ranks that share the model; this is the first"},
    {"--batch", 2, TEXT, AT(share.batch), 0, 0, "1,8,64,256", "sequences that decode"},
    {"--context", 2, TEXT, AT(share.context), 0, 0, "1024,8192,32768", "each one's tokens"},
    {"--prefill", 2, TEXT, AT(share.prefill), 0, 0, "1024,4096", "tokens of a prompt"},
    {"--layers", 2, INTEGER, AT(share.layers), 1, 4096, NULL, "the first so many only"},
    {"--profile", 2, SWITCH, AT(share.profile), 0, 0, NULL, "time each stage by itself, too"},
    {"--output-file", 2, TEXT, AT(share.output_file), 0, 0, NULL, "gets a line of JSON a step"},
};
#undef AT
static const Command command = {
    "bench", "bench [flags]: measures a server", 1, false, flags, sizeof flags / sizeof *flags};
static const Command offline_command = {
    "bench", "bench --offline [flags]: times one rank's share of a model", 2, false, flags,
    sizeof flags / sizeof *flags};

typedef struct {  // a prompt, its way to the server, and what came back
    Buf prompt;
    int input_len, output_len;  // tokens
    double due;                 // seconds after the run's start
    // What is expected: any body; one object; events with new text; events with all text so far.
    enum { PLAIN, WHOLE, DELTAS, CUMULATIVE } kind;
    int fd;                     // -1: not open
    Buf out;                    // what is sent
    size_t sent;
    enum { HEAD, SIZE, BODY } part;  // of the response, where SIZE is a line in front of a chunk
    int status;
    bool chunked;
    size_t left;                // bytes of the body or chunk; SIZE_MAX: until the server closes
    Buf in, body;               // what is not looked at yet: of all bytes, and of the body's
    double start, first, latest, end;  // times: first: of text, latest: of tokens; 0: not yet
    int64_t tokens, reported;   // counted so far; as the server said, -1: it didn't
    Buf text, last;             // the answer; CUMULATIVE: the last event, not parsed yet
    Buf gaps;                   // doubles: the seconds that each token but the first took
    Buf error;                  // no data: none
} Request;

static Tokenizer *tokenizer;
static int bos;              // tokens that the server puts in front of a prompt
static Json *extra;          // --extra-request-body
static const char *path, *prefix;  // of the requests; --base-url's, in front of every path
static char authority[300];  // HOST:PORT
static struct addrinfo *address;
static int poller;           // epoll's
static uint32_t draws;       // random numbers so far
static Ids ids;              // of the text that tokens_of counted last

// ---- One request --------------------------------------------------------------------------------

// It is over: failed where there is an error, which may hold anything that a server said.
static void request_end(Request *r, double now, const char *error) {
    if (error) buf_str(&r->error, error);
    for (size_t i = 0; i < r->error.len; i++)
        if (iscntrl((uint8_t)r->error.data[i])) r->error.data[i] = ' ';
    r->end = now;
    if (!r->first) r->first = now;
    if (r->fd >= 0) close(r->fd);  // and epoll forgets it
    r->fd = -1;
}

static void request_free(Request *r) {
    buf_free(&r->prompt), buf_free(&r->out), buf_free(&r->in), buf_free(&r->body);
    buf_free(&r->text), buf_free(&r->last), buf_free(&r->gaps), buf_free(&r->error);
}

// json_get() of what has the type, too; NULL: there is none.
static const Json *member(const Json *object, const char *key, JsonType type) {
    const Json *v = json_get(object, key);
    return v && v->type == type ? v : NULL;
}

// Takes text and count from an object of an answer, which is overwritten. There are four shapes:
// {"text","meta_info"}, and {"choices":[{"text" or "delta" or "message"}],"usage"}, whose last
// event may have no choice. False: it is no such thing, and the request is over.
static bool object_read(Request *r, char *json, size_t len, double now) {
    static const char *const keys[] = {"text", "reasoning_content", "content"};
    char why[128] = "got an object without text";
    Json *root = json_parse(json, len, why, sizeof why);
    const Json *list = member(root, "choices", JSON_ARRAY), *error = json_get(root, "error"), *v;
    const Json *from = !list ? root : list->count ? list + 1 : NULL;
    bool ok = list || json_get(root, "text");
    if ((v = json_get(from, "delta")) || (v = json_get(from, "message"))) from = v;
    for (int i = 0; ok && i < 3; i++)
        if ((v = member(from, keys[i], JSON_STRING)))
            buf_add(&r->text, v->string.data, v->string.len);
    v = json_get(json_get(root, list ? "usage" : "meta_info"), "completion_tokens");
    json_int(v, 0, MOST, &r->reported);
    v = member(error ? error : root, "message", JSON_STRING);
    if (!ok && v) buf_add(&r->error, v->string.data, v->string.len);
    if (!ok) request_end(r, now, r->error.data ? NULL : why);
    free(root);
    return ok;
}

// One line of a stream. The end of a cumulative event is enough once there was text: what looks
// like the key there is the key, since quotes inside of a string are escaped. OpenAI's events don't
// say how many tokens they bring, so that each with text counts as one.
static void event_take(Request *r, char *line, size_t len, double now) {
    static const char key[] = "\"completion_tokens\":";
    while (len && isspace((uint8_t)line[len - 1])) len--;
    if (len < 5 || memcmp(line, "data:", 5)) return;
    for (line += 5, len -= 5; len && *line == ' '; len--) line++;
    if (len == 6 && !memcmp(line, "[DONE]", 6)) {
        if (r->last.len) r->text.len = 0;
        if (!r->last.len || object_read(r, r->last.data, r->last.len, now))
            request_end(r, now, NULL);
        return;
    }
    size_t tail = len < TAIL_BYTES ? len : TAIL_BYTES, before = r->text.len;
    char *at = NULL;
    if (r->kind == CUMULATIVE && r->first > 0)
        at = memmem(line + len - tail, tail, key, sizeof key - 1);
    int64_t total = at ? strtol(at + sizeof key - 1, NULL, 10) : -1;
    r->last.len = 0;
    if (total >= 0 && total <= MOST) {
        buf_add(&r->last, line, len);
    } else {
        if (r->kind == CUMULATIVE) r->text.len = before = 0;
        if (!object_read(r, line, len, now)) return;
        bool grew = r->text.len > before;
        if (grew && !r->first) r->first = now;
        total = r->kind == CUMULATIVE && r->reported >= 0 ? r->reported : r->tokens + grew;
    }
    if (total <= r->tokens) return;
    // The time since the last tokens is shared among the new ones; the first have nothing to share.
    double gap = (now - r->latest) / (double)(total - r->tokens);
    for (int64_t i = total - r->tokens; r->latest > 0 && i > 0; i--)
        buf_add(&r->gaps, &gap, sizeof gap);
    r->tokens = total, r->latest = now;
}

// Bytes of the body, from which each line of a stream is taken as soon as it is whole.
static void body_feed(Request *r, const char *p, size_t n, double now) {
    buf_add(&r->body, p, n);
    if (r->kind < DELTAS || r->status != 200) return;
    char *line = r->body.data, *end = line + r->body.len, *newline;
    while (r->fd >= 0 && (newline = memchr(line, '\n', (size_t)(end - line)))) {
        event_take(r, line, (size_t)(newline - line), now);
        line = newline + 1;
    }
    buf_shift(&r->body, NULL, (size_t)(line - r->body.data));
}

// The response is complete.
static void response_end(Request *r, double now) {
    if (r->kind >= DELTAS && r->status == 200) body_feed(r, "\n", 1, now);
    if (r->fd < 0) return;
    buf_str(&r->body, "");  // from here on it is a string
    if (r->status != 200) buf_printf(&r->error, "%d %.300s", r->status, r->body.data);
    else if (r->kind >= DELTAS) buf_str(&r->error, "the answer ended without [DONE]");
    else if (r->kind == WHOLE && !object_read(r, r->body.data, r->body.len, now)) return;
    request_end(r, now, NULL);
}

// A line of the head, or in front of a chunk: of n bytes, without its newline.
static void line_take(Request *r, const char *line, size_t n, double now) {
    char *rest;
    if (n && line[n - 1] == '\r') n--;
    if (r->part == SIZE && n) {  // an empty line is the end of the chunk before
        r->left = strtoull(line, &rest, 16);
        r->part = BODY;
        if (rest == line) request_end(r, now, "got a chunk without a size");
    } else if (!r->status) {  // HTTP/1.1 200 OK
        r->status = n >= 12 && !strncmp(line, "HTTP/1.", 7) ? atoi(line + 9) : 0;
        if (r->status < 100) request_end(r, now, "got something else than HTTP/1.1");
    } else if (!strncasecmp(line, "Content-Length:", 15)) {
        r->left = strtoull(line + 15, NULL, 10);
    } else if (!strncasecmp(line, "Transfer-Encoding:", 18)) {
        r->chunked = memmem(line, n, "chunked", 7) != NULL;
    } else if (r->part == HEAD && !n) {
        r->part = r->chunked ? SIZE : BODY;
    }
}

// Any bytes of a response: its head, then the body, whole or in chunks.
static void response_feed(Request *r, const char *p, size_t n, double now) {
    buf_add(&r->in, p, n);
    char *at = r->in.data, *end = at + r->in.len, *newline;
    while (r->fd >= 0 && at < end) {
        if (r->part == BODY) {
            n = (size_t)(end - at) < r->left ? (size_t)(end - at) : r->left;
            if (r->left != SIZE_MAX) r->left -= n;
            body_feed(r, at, n, now);
            at += n;
            if (r->chunked && !r->left) r->part = SIZE;
        } else if ((newline = memchr(at, '\n', (size_t)(end - at)))) {
            line_take(r, at, (size_t)(newline - at), now);
            at = newline + 1;
        } else break;
        if (r->part == BODY && !r->left && r->fd >= 0) response_end(r, now);
    }
    buf_shift(&r->in, NULL, (size_t)(at - r->in.data));
    if (r->fd >= 0 && (r->in.len > MAX_BYTES || r->body.len > MAX_BYTES))
        request_end(r, now, "got a line that is too long");
}

// error: why sending failed, or 0. The server may have answered before it closed.
static void request_receive(Request *r, int error) {
    static char buffer[READ_BYTES];
    ssize_t n = recv(r->fd, buffer, sizeof buffer, 0);
    if (n < 0 && !error) error = errno;
    double now = now_seconds();
    if (n > 0) response_feed(r, buffer, (size_t)n, now);
    else if (!n && r->part == BODY && r->left == SIZE_MAX) response_end(r, now);
    else if (error != EAGAIN)
        request_end(r, now, error ? strerror(error) : "closed before the answer's end");
}

static void request_send(Request *r) {
    ssize_t n = send(r->fd, r->out.data + r->sent, r->out.len - r->sent, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) return request_receive(r, errno);
    if (n > 0) r->sent += (size_t)n;
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = r};
    if (r->sent == r->out.len) epoll_ctl(poller, EPOLL_CTL_MOD, r->fd, &e);
}

// Connecting is a part of writing: a server that is slow to accept is slow.
static void request_open(Request *r) {
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = r};
    r->start = now_seconds();
    r->fd = socket(address->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (r->fd < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, r->fd, &e) < 0 ||
        setsockopt(r->fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int)) < 0 ||
        (connect(r->fd, address->ai_addr, address->ai_addrlen) < 0 && errno != EINPROGRESS))
        request_end(r, now_seconds(), strerror(errno));
}

// Runs n requests to their ends, each at its time and at most `most` at once. Between two openings
// it looks at the open ones, or the first answers would wait for the last request.
static void requests_run(Request *r, int n, int most, bool progress) {
    double start = now_seconds(), shown = 0, now = start;
    poller = epoll_create1(EPOLL_CLOEXEC);
    for (int begun = 0, ended = 0; ended < n;) {
        struct epoll_event ready[READY];
        double wait = begun < n && begun - ended < most ? start + r[begun].due - now : HUGE_VAL;
        if (wait <= 0) request_open(&r[begun]), ended += r[begun++].fd < 0;
        // Whole milliseconds, rounded down: the rest is spun away, so that nothing is late.
        int timeout = isinf(wait) ? 1000 : wait <= 0 ? 0 : (int)fmin(wait * 1e3, 1000);
        int n_ready = epoll_wait(poller, ready, READY, timeout);
        for (int i = 0; i < n_ready; i++) {
            Request *q = ready[i].data.ptr;
            if (ready[i].events & EPOLLOUT) request_send(q);
            else request_receive(q, 0);
            ended += q->fd < 0;
        }
        now = now_seconds();
        if (!progress || (now - shown < 0.1 && ended < n)) continue;
        fprintf(stderr, "\r%d/%d requests, %.1f s%s", ended, n, now - start, ended < n ? "" : "\n");
        shown = now;
    }
    close(poller);
}

// ---- What is sent -------------------------------------------------------------------------------

static void request_write(Request *r, const char *method, const char *where, const Buf *body) {
    const char *key = getenv("OPENAI_API_KEY");
    r->fd = r->reported = -1;
    r->left = SIZE_MAX;
    buf_printf(&r->out, "%s %s%s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n", method, prefix,
               where, authority);
    if (key) buf_printf(&r->out, "Authorization: Bearer %s\r\n", key);
    buf_printf(&r->out, "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n", body->len);
    buf_add(&r->out, body->data, body->len);
}

// The request for an answer of n tokens. Members that --extra-request-body brings are left out.
static void prompt_write(Request *r, int n) {
    bool native = !strcmp(path, "/generate"), chat = !strcmp(path, "/v1/chat/completions");
    const char *stream = o.disable_stream ? "false" : "true";
    const char *ignore = o.disable_ignore_eos ? "false" : "true";
    Buf text = {0}, name = {0}, number = {0}, body = {0};
    if (chat) buf_str(&text, "[{\"role\":\"user\",\"content\":");
    json_write_string(&text, (Str){r->prompt.data, r->prompt.len});
    if (chat) buf_str(&text, "}]");
    json_write_string(&name, (Str){o.model, strlen(o.model)});
    if (!native) buf_printf(&number, "%d", n);
    else buf_printf(&number, "{\"temperature\":0.0,\"max_new_tokens\":%d,\"ignore_eos\":%s}", n,
                    ignore);
    const char *const generate[][2] = {
        {"text", text.data}, {"sampling_params", number.data}, {"stream", stream},
        {"lora_path", "null"}, {"return_logprob", o.return_logprob ? "true" : "false"},
        {"logprob_start_len", "-1"}, {NULL}};
    const char *const openai[][2] = {
        {"model", name.data}, {chat ? "messages" : "prompt", text.data}, {"temperature", "0.0"},
        {"best_of", "1"}, {"max_tokens", number.data}, {"stream", stream}, {"ignore_eos", ignore},
        {o.disable_stream ? NULL : "stream_options", "{\"include_usage\":true}"}, {NULL}};
    for (const char *const(*m)[2] = native ? generate : openai; (*m)[0]; m++)
        if (!json_get(extra, (*m)[0]))
            buf_printf(&body, "%s\"%s\":%s", body.len ? "," : "{", (*m)[0], (*m)[1]);
    if (extra && extra->count) {  // as it was typed
        const char *from = strchr(o.extra_request_body, '{') + 1;
        buf_printf(&body, "%s%.*s", body.len ? "," : "{", (int)(strrchr(from, '}') - from), from);
    }
    buf_str(&body, "}");
    r->kind = o.disable_stream ? WHOLE : native ? CUMULATIVE : DELTAS;
    request_write(r, "POST", path, &body);
    buf_free(&text), buf_free(&name), buf_free(&number), buf_free(&body);
}

static Request plain_run(const char *method, const char *where) {
    Request r = {.kind = PLAIN};
    request_write(&r, method, where, &(Buf){0});
    requests_run(&r, 1, 1, false);
    return r;
}

// The string at `key` of what the server says, or of the first of its "data". Where there is none
// the user has to give `flag`.
static char *server_says(const char *where, const char *key, const char *flag) {
    Request r = plain_run("GET", where);
    char why[128] = "got no such string";
    if (r.error.data) die("GET %s: %s; want %s", where, r.error.data, flag);
    Json *root = json_parse(r.body.data, r.body.len, why, sizeof why);
    const Json *list = member(root, "data", JSON_ARRAY);
    const Json *v = member(list && list->count ? list + 1 : root, key, JSON_STRING);
    if (!v) die("GET %s: %s: %s; want %s", where, key, why, flag);
    char *text = format_string("%.*s", (int)v->string.len, v->string.data);
    free(root);
    request_free(&r);
    return text;
}

// ---- Data ---------------------------------------------------------------------------------------

// The next of the seed's random numbers, in 0..below - 1.
static uint32_t draw(size_t below) {
    uint32_t word[4];
    philox(word, o.seed, (uint32_t[4]){draws++, 0, 0, 0});
    return (uint32_t)(word[0] * (uint64_t)below >> 32);
}

static int draw_length(int most) {
    int least = (int)fmax(most * o.random_range_ratio, 1);
    return least + (int)draw((size_t)(most - least + 1));
}

static void shuffle(void *array, size_t n, size_t size) {
    char *a = array, swap[size];
    for (size_t i = n; i > 1; i--) {
        char *x = a + (i - 1) * size, *y = a + draw(i) * size;
        memcpy(swap, x, size), memmove(x, y, size), memcpy(y, swap, size);
    }
}

static int tokens_of(Str text) {
    ids.len = 0;
    if (text.len) tokenizer_encode(tokenizer, &ids, text);
    return (int)ids.len;
}

// Tokens of a blank and letters that encode to themselves: a tokenizer splits in front of such a
// blank, so that any n of them in a row are n tokens.
static Ids words_find(void) {
    Ids words = {0};
    for (int id = 0; id < tokenizer_vocab(tokenizer); id++) {
        Str s = tokenizer_bytes(tokenizer, id);
        size_t n = 1;
        while (n < s.len && isalpha((uint8_t)s.data[n])) n++;
        bool word = n > 1 && n == s.len && s.data[0] == ' ';
        if (word && tokens_of(s) == 1 && ids.data[0] == id) ids_add(&words, id);
    }
    if (!words.len) die("--tokenizer: got no token of a blank and letters, want some");
    return words;
}

// Appends the text of n tokens: drawn from a list, or the list over and over.
static void tokens_write(Buf *b, const Ids *list, int n, bool drawn) {
    for (size_t i = 0; n > 0 && i < (size_t)n; i++) {
        Str s = tokenizer_bytes(tokenizer, list->data[drawn ? draw(list->len) : i % list->len]);
        buf_add(b, s.data, s.len);
    }
}

// A prompt from a conversation's first turn: for random cut or repeated to the length; sharegpt's
// answer is as long as the second turn. False: the conversation is of no use.
static bool conversation_take(Request *r, const Json *conversation) {
    const Json *list = member(conversation, "conversations", JSON_ARRAY);
    const Json *a = list && list->count > 1 ? member(list + 1, "value", JSON_STRING) : NULL;
    const Json *b = a ? member(json_next(list + 1), "value", JSON_STRING) : NULL;
    int most = o.sharegpt_context_len ? o.sharegpt_context_len : 2 * MOST;
    if (!b) return false;
    if (strcmp(o.dataset_name, "sharegpt")) {
        bool some = tokens_of(a->string) > 0;
        if (some) tokens_write(&r->prompt, &ids, r->input_len - bos, false);
        return some;
    }
    if (o.apply_chat_template) {
        ChatTemplate kind = tokenizer_template(tokenizer);
        Message message = {ROLE_USER, a->string, NULL};
        chat_render(&r->prompt, kind, &message, 1, true, template_forces_think(kind));
        if (bos)  // the server puts it there
            buf_shift(&r->prompt, NULL, tokenizer_bytes(tokenizer, tokenizer_bos(tokenizer)).len);
    } else buf_add(&r->prompt, a->string.data, a->string.len);
    r->input_len = tokens_of((Str){r->prompt.data, r->prompt.len}) + bos;
    r->output_len = o.sharegpt_output_len ? o.sharegpt_output_len : tokens_of(b->string);
    bool good = r->input_len >= 2 && r->output_len >= 2 && r->input_len <= most - r->output_len;
    if (!good) buf_free(&r->prompt);
    return good;
}

// Prompts from a file, [{"conversations":[{"value":"..."},...]},...]. Returns how many there are:
// sharegpt runs with fewer than n.
static int data_conversations(Request *r, int n) {
    char why[128] = "got no array";
    size_t len = 0;
    int made = 0;
    char *text = read_file(o.dataset_path, &len);
    if (!text) die("--dataset-path %s: %s", o.dataset_path, strerror(errno));
    Json *root = json_parse(text, len, why, sizeof why);
    if (!root || root->type != JSON_ARRAY) die("--dataset-path %s: %s", o.dataset_path, why);
    const Json **items = xcalloc(root->count, sizeof *items), *item = root + 1;
    for (uint32_t i = 0; i < root->count; i++, item = json_next(item)) items[i] = item;
    shuffle(items, root->count, sizeof *items);
    for (uint32_t i = 0; i < root->count && made < n; i++)
        made += conversation_take(&r[made], items[i]);
    if (made < (strcmp(o.dataset_name, "sharegpt") ? n : 1))
        die("--dataset-path %s: got %d usable conversations, want %d", o.dataset_path, made, n);
    free(items), free(text), free(root);
    return made;
}

// The prompts, *n of them, and when each is due.
static Request *data_make(int *n) {
    bool shared = !strcmp(o.dataset_name, "generated-shared-prefix");
    *n = shared ? o.gsp_num_groups * o.gsp_prompts_per_group : o.num_prompts;
    Request *r = xcalloc((size_t)*n, sizeof *r);
    Ids words = {0};
    int64_t input = 0, output = 0;
    size_t prefix_len = 0;
    if (shared || !o.dataset_path) words = words_find();
    for (int i = 0; i < *n; i++) {
        Buf *prompt = &r[i].prompt;
        r[i].input_len = draw_length(o.random_input_len);
        r[i].output_len = draw_length(o.random_output_len);
        if (!shared && !o.dataset_path) tokens_write(prompt, &words, r[i].input_len - bos, true);
        if (!shared) continue;
        if (i % o.gsp_prompts_per_group) buf_add(prompt, r[i - 1].prompt.data, prefix_len);
        else tokens_write(prompt, &words, o.gsp_system_prompt_len, true);
        prefix_len = prompt->len;
        buf_str(prompt, "\n\n");
        tokens_write(prompt, &words, o.gsp_question_len, true);
        r[i].input_len = tokens_of((Str){prompt->data, prompt->len}) + bos;
        r[i].output_len = o.gsp_output_len;
    }
    if (shared) shuffle(r, (size_t)*n, sizeof *r);
    else if (o.dataset_path) *n = data_conversations(r, *n);
    for (int i = 0; i < *n; i++) {
        input += r[i].input_len, output += r[i].output_len;
        // A Poisson process' gaps are exponential: -log of a uniform number in (0, 1].
        if (i) r[i].due = r[i - 1].due - log1p(-0x1p-32 * draw(UINT32_MAX)) / o.request_rate;
    }
    printf("#Input tokens: %ld\n#Output tokens: %ld\n", input, output);
    free(words.data);
    return r;
}

// ---- What came of it ----------------------------------------------------------------------------

enum { E2E, TTFT, TPOT, ITL, N_TIMES, MEAN = 0, MEDIAN, STD, P99, N_KINDS };

typedef struct {
    int completed, failed;               // requests
    const char *failure;                 // the first failed one's error; NULL: none failed
    int64_t input, output, retokenized;  // tokens
    double duration, concurrency, requests_s, input_s, output_s, total_s;  // _s: per second
    double ms[N_TIMES][N_KINDS];
} Metrics;

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Between the two samples beside place (n - 1) q, in ms.
static double percentile(const double *sorted, size_t n, double q) {
    double place = (double)(n - 1) * q, low = sorted[(size_t)place];
    return 1e3 * (low + (sorted[(size_t)ceil(place)] - low) * (place - floor(place)));
}

static Metrics metrics_make(const Request *r, int n) {
    Metrics m = {0};
    Buf samples[N_TIMES] = {0};
    double first = INFINITY, last = 0;
    for (int i = 0; i < n; i++, r++) {
        double e2e = r->end - r->start, ttft = r->first - r->start;
        int64_t output = r->reported >= 0 ? r->reported : r->output_len;
        double tpot = (e2e - ttft) / (double)(output - 1);
        first = fmin(first, r->start), last = fmax(last, r->end);
        if (r->error.data) {
            if (!m.failed++) m.failure = r->error.data;
            continue;
        }
        m.completed++, m.input += r->input_len, m.output += output, m.concurrency += e2e;
        m.retokenized += tokens_of((Str){r->text.data, r->text.len});
        buf_add(&samples[E2E], &e2e, sizeof e2e);
        buf_add(&samples[TTFT], &ttft, sizeof ttft);
        if (output > 1) buf_add(&samples[TPOT], &tpot, sizeof tpot);
        buf_add(&samples[ITL], r->gaps.data, r->gaps.len);
    }
    m.duration = last - first;
    m.concurrency /= m.duration;
    m.requests_s = m.completed / m.duration, m.input_s = (double)m.input / m.duration;
    m.output_s = (double)m.output / m.duration, m.total_s = m.input_s + m.output_s;
    for (int k = 0; k < N_TIMES; buf_free(&samples[k++])) {
        double *x = (double *)samples[k].data, mean = 0, variance = 0;
        size_t n_x = samples[k].len / sizeof *x;
        if (!n_x) continue;
        qsort(x, n_x, sizeof *x, compare_doubles);
        for (size_t i = 0; i < n_x; i++) mean += x[i] / (double)n_x;
        for (size_t i = 0; i < n_x; i++) variance += (x[i] - mean) * (x[i] - mean) / (double)n_x;
        m.ms[k][MEAN] = 1e3 * mean, m.ms[k][STD] = 1e3 * sqrt(variance);
        m.ms[k][MEDIAN] = percentile(x, n_x, 0.5), m.ms[k][P99] = percentile(x, n_x, 0.99);
    }
    return m;
}

// A number as Python writes it, or `none` where it is 0 or infinite: it was not given.
static const char *number_text(char text[40], double v, const char *point, const char *none) {
    snprintf(text, 40, "%.15g%s", v, v == floor(v) && v < 1e15 ? point : "");
    return v == 0 || isinf(v) ? none : text;
}

// SGLang's table to the letter: what reads that one reads this.
static void table_write(Buf *b, const Metrics *m) {
    static const char *const names[] = {"E2E Latency", "TTFT", "TPOT", "ITL"};
    static const char *const kinds[] = {"Mean", "Median", NULL, "P99"};
    static const char *const titles[] = {"----------------End-to-End Latency----------------",
                                         "---------------Time to First Token----------------",
                                         "-----Time per Output Token (excl. 1st token)------",
                                         "---------------Inter-token Latency----------------"};
    char text[40];
    buf_str(b, "\n============ Serving Benchmark Result ============\n");
    buf_printf(b, "Backend:                                 %-10s\n", o.backend);
    buf_printf(b, "Traffic request rate:                    %-10s\n",
               number_text(text, o.request_rate, ".0", "inf"));
    buf_printf(b, "Max reqeuest concurrency:                %-10s\n",
               number_text(text, o.max_concurrency, "", "not set"));
    buf_printf(b, "Successful requests:                     %-10d\n", m->completed);
    buf_printf(b, "Benchmark duration (s):                  %-10.2f\n", m->duration);
    buf_printf(b, "Total input tokens:                      %-10ld\n", m->input);
    buf_printf(b, "Total generated tokens:                  %-10ld\n", m->output);
    buf_printf(b, "Total generated tokens (retokenized):    %-10ld\n", m->retokenized);
    buf_printf(b, "Request throughput (req/s):              %-10.2f\n", m->requests_s);
    buf_printf(b, "Input token throughput (tok/s):          %-10.2f\n", m->input_s);
    buf_printf(b, "Output token throughput (tok/s):         %-10.2f\n", m->output_s);
    buf_printf(b, "Total token throughput (tok/s):          %-10.2f\n", m->total_s);
    buf_printf(b, "Concurrency:                             %-10.2f\n", m->concurrency);
    for (int k = 0; k < N_TIMES; k++) {
        buf_printf(b, "%s\n", titles[k]);
        for (int i = MEAN; i <= P99; i++) {
            if (i == STD || (k == E2E && i == P99)) continue;
            snprintf(text, sizeof text, "%s %s (ms):", kinds[i], names[k]);
            buf_printf(b, "%-40s %-10.2f\n", text, m->ms[k][i]);
        }
    }
    buf_str(b, "==================================================\n");
}

static void jsonl_write(Buf *b, const Metrics *m) {
    static const char *const names[] = {"e2e_latency", "ttft", "tpot", "itl"};
    static const char *const kinds[] = {"mean", "median", "std", "p99"};
    char rate[40], most[40], len[40];
    buf_printf(b, "{\"backend\":\"%s\",\"dataset_name\":\"%s\",\"request_rate\":%s,"
               "\"max_concurrency\":%s,\"sharegpt_output_len\":%s,\"random_input_len\":%d,"
               "\"random_output_len\":%d,\"random_range_ratio\":%.15g,\"duration\":%.15g,",
               o.backend, o.dataset_name, number_text(rate, o.request_rate, ".0", "Infinity"),
               number_text(most, o.max_concurrency, "", "null"),
               number_text(len, o.sharegpt_output_len, "", "null"), o.random_input_len,
               o.random_output_len, o.random_range_ratio, m->duration);
    buf_printf(b, "\"completed\":%d,\"total_input_tokens\":%ld,\"total_output_tokens\":%ld,"
               "\"total_output_tokens_retokenized\":%ld,\"request_throughput\":%.15g,"
               "\"input_throughput\":%.15g,\"output_throughput\":%.15g,", m->completed, m->input,
               m->output, m->retokenized, m->requests_s, m->input_s, m->output_s);
    for (int i = 0; i < N_TIMES * N_KINDS; i++)
        buf_printf(b, "\"%s_%s_ms\":%.15g,", kinds[i % N_KINDS], names[i / N_KINDS],
                   m->ms[i / N_KINDS][i % N_KINDS]);
    buf_printf(b, "\"concurrency\":%.15g,\"total_throughput\":%.15g,\"failed\":%d}\n",
               m->concurrency, m->total_s, m->failed);
}

// ---- The run ------------------------------------------------------------------------------------

// --base-url, or the same made of --host and --port. Linux connects 0.0.0.0 to this machine.
static void address_find(void) {
    int port = o.port ? o.port : strcmp(o.backend, "vllm") ? 30000 : 8000, n = 0;
    char *url = o.base_url ? format_string("%s", o.base_url)
                           : format_string("http://%s:%d", o.host, port);
    char name[256], service[6] = "80";
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    if (sscanf(url, "http://%255[^:/]%n:%5[0-9]%n", name, &n, service, &n) < 1 ||
        (url[n] && url[n] != '/'))
        usage_die(&command, "--base-url: got \"%s\", want http://HOST[:PORT][/PATH]", url);
    snprintf(authority, sizeof authority, "%s:%s", name, service);
    if (url[n] && url[strlen(url) - 1] == '/') url[strlen(url) - 1] = 0;
    prefix = url + n;
    int error = getaddrinfo(name, service, &hints, &address);
    if (error) die("%s: %s", authority, gai_strerror(error));
}

// What the flags mean, and what the server has to be asked for.
static void bench_setup(void) {
    bool native = !strcmp(o.backend, "sglang") || !strcmp(o.backend, "sglang-native");
    bool chat = !strcmp(o.backend, "sglang-oai-chat");
    path = native ? "/generate" : chat ? "/v1/chat/completions" : "/v1/completions";
    if (!strcmp(o.dataset_name, "sharegpt") && !o.dataset_path)
        usage_die(&command, "--dataset-name sharegpt: want --dataset-path");
    if (o.extra_request_body) {
        char why[128] = "no object", *copy = format_string("%s", o.extra_request_body);
        extra = json_parse(copy, strlen(copy), why, sizeof why);
        if (!extra || extra->type != JSON_OBJECT)
            usage_die(&command, "--extra-request-body: got \"%s\", want a JSON object: %s",
                      o.extra_request_body, why);
    }
    address_find();
    if (!o.tokenizer) o.tokenizer = o.model;
    if (!o.model) o.model = server_says("/v1/models", "id", "--model");
    if (!o.tokenizer) o.tokenizer = server_says("/get_model_info", "tokenizer_path", "--tokenizer");
    char *file = format_string("%s/tokenizer.json", o.tokenizer);
    if (access(file, R_OK) < 0)
        die("--tokenizer: got %s, want a directory with tokenizer.json", o.tokenizer);
    free(file);
    tokenizer = tokenizer_load(o.tokenizer);
    bos = tokenizer_bos(tokenizer) >= 0;
}

// A bucket has no directories before someone makes them. What can't be made fails again in fopen.
static void directories_make(const char *file) {
    char *copy = format_string("%s", file);
    for (char *slash = copy; *slash && (slash = strchr(slash + 1, '/'));) {
        *slash = '\0';
        mkdir(copy, 0777);
        *slash = '/';
    }
    free(copy);
}

static FILE *output_open(void) {
    char date[8];
    bool sharegpt = !strcmp(o.dataset_name, "sharegpt");
    strftime(date, sizeof date, "%m%d", localtime(&(time_t){time(NULL)}));
    if (!o.output_file)
        o.output_file = format_string(
            sharegpt ? "%s_%s_%d_sharegpt.jsonl" : "%s_%s_%d_%d_%d.jsonl", o.backend, date,
            o.num_prompts, o.random_input_len, o.random_output_len);
    directories_make(o.output_file);
    FILE *f = fopen(o.output_file, "a");
    if (!f) die("--output-file %s: %s", o.output_file, strerror(errno));
    return f;
}

// A short request must succeed before many are sent; then the server forgets that it saw it.
static void test_run(const Request *like) {
    Request r = {.prompt = like->prompt};
    puts("Starting initial single prompt test run...");
    prompt_write(&r, like->output_len < TEST_TOKENS ? like->output_len : TEST_TOKENS);
    requests_run(&r, 1, 1, false);
    if (r.error.data) die("initial test run failed: %s", r.error.data);
    puts("Initial test run completed. Starting main benchmark run...");
    r.prompt = (Buf){0};  // lent
    request_free(&r);
    if (strncmp(o.backend, "sglang", 6)) return;
    r = plain_run("POST", "/flush_cache");
    if (r.error.data) fprintf(stderr, "POST /flush_cache: %s\n", r.error.data);
    request_free(&r);
}

int bench_main(char **argv) {
    struct rlimit files;
    Buf text = {0};
    int n = 0;
    bool offline = false;
    for (char **a = argv; *a; a++) offline |= !strcmp(*a, "--offline");
    flags_parse(offline ? &offline_command : &command, &o, argv);
    if (offline) return share_main(&offline_command, &o.share);
    setvbuf(stdout, NULL, _IOLBF, 0);  // each line at once, to files and pipes too
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    bench_setup();
    FILE *out = output_open();
    Request *r = data_make(&n);
    test_run(r);
    for (int i = 0; i < n; i++) prompt_write(&r[i], r[i].output_len);
    sleep(1);  // the server may not be done with the test yet
    requests_run(r, n, o.max_concurrency ? o.max_concurrency : n, !o.disable_tqdm);
    Metrics m = metrics_make(r, n);
    table_write(&text, &m);
    fputs(text.data, stdout);
    if (fflush(stdout) != 0) die("can't write to stdout: %s", strerror(errno));
    text.len = 0;
    jsonl_write(&text, &m);
    if (fputs(text.data, out) < 0 || fclose(out) != 0) die("--output-file: %s", strerror(errno));
    if (m.failed)
        fprintf(stderr, "Failed requests: %d of %d; first: %s\n", m.failed, n, m.failure);
    for (int i = 0; i < n; i++) request_free(&r[i]);
    free(r), free(ids.data), buf_free(&text);
    tokenizer_free(tokenizer);
    freeaddrinfo(address);
    return m.failed > 0;
}
