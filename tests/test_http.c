// tests/test_http.c: http.c over real sockets on 127.0.0.1, with the real json.c and tokenizer.c
// and a fake engine: a thread that repeats the last user message, or the prompt where there is
// none, one byte and one token a step, then EOS. A message may also be an order: "many N" gives N
// times 'x', "hang" gives nothing until it is cancelled, "nan" gives two tokens and then a value
// that is not a number.
//   gcc -std=gnu11 -O2 -o test_http tests/test_http.c http.c tokenizer.c json.c -lpthread -lm &&
// ./test_http
#define _GNU_SOURCE
#include "../r1.h"

#include "test.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BOS, EOS, USER, ASSISTANT, THINK, THINK_END, BYTES, VOCAB = BYTES + 256 };

static const char *const added[] = {"<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>",
                                    "<｜Assistant｜>", "<think>", "</think>"};

// ---- The fake engine ----------------------------------------------------------------------------

Server server = {.n_ranks = 1, .n_local = 1};

typedef struct Job {
    struct Job *next;
    Seq *seq;
    Buf script;
    size_t at;
    bool hang, nan;
} Job;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Seq *inbox;
static Event *outbox, **outbox_end = &outbox;
static atomic_bool abort_all, quit;
static atomic_int step_us, cancelled_seen, submitted, steps_done;
static float last_temperature, last_bias, biases[4];
static uint64_t last_seed[4];
static atomic_int flushes;
static int cached;  // tokens of each prompt that the engine says it had

void engine_flush(void) { flushes++; }
void options_json(Buf *b) { buf_str(b, "\"host\":\"0.0.0.0\",\"port\":30000"); }
void engine_cancel(Seq *s) { s->cancelled = true; }

void engine_submit(Seq *s) {
    last_temperature = s->sampling.temperature;
    last_seed[s->index % 4] = s->sampling.seed;
    biases[s->index % 4] = last_bias = s->sampling.n_bias ? s->sampling.bias[0] : 0;
    pthread_mutex_lock(&mutex);
    Seq **end = &inbox;
    while (*end) end = &(*end)->next;
    s->next = NULL;
    *end = s;
    pthread_mutex_unlock(&mutex);
    submitted++;
}

void engine_stop(bool all) { if (all) abort_all = true; }

Event *engine_events(void) {
    pthread_mutex_lock(&mutex);
    Event *list = outbox;
    outbox = NULL, outbox_end = &outbox;
    pthread_mutex_unlock(&mutex);
    return list;
}

long max_req_len(void) {
    int pool = server.max_total_tokens;
    return server.context_len < pool ? server.context_len : pool;
}

Seq *seq_new(void) { return xcalloc(1, sizeof(Seq)); }

void seq_free(Seq *s) {
    free(s->tokens.data);
    text_free(&s->text);
    free(s);
}

void event_free(Event *e) {
    buf_free(&e->text);
    free(e);
}

static void post(Event *e) {
    pthread_mutex_lock(&mutex);
    *outbox_end = e, outbox_end = &e->next;
    pthread_mutex_unlock(&mutex);
    if (write(server.wake_fd, &(uint64_t){1}, 8) < 0) die("eventfd");
}

static Job *job_new(Seq *s) {
    Job *j = xcalloc(1, sizeof *j);
    int user = s->n_prompt;
    j->seq = s;
    buf_str(&j->script, "");
    while (user > 0 && s->tokens.data[user - 1] != USER) user--;
    if (!user && s->n_prompt && s->tokens.data[0] == BOS) user++;
    s->n_cached = cached;
    s->n_scored = s->score_from;
    for (int i = user; i < s->n_prompt && s->tokens.data[i] != ASSISTANT; i++) {
        Str text = tokenizer_bytes(server.tokenizer, s->tokens.data[i]);
        buf_add(&j->script, text.data, text.len);
    }
    j->hang = !strcmp(j->script.data, "hang");
    j->nan = !strcmp(j->script.data, "nan");
    if (!strncmp(j->script.data, "many ", 5)) {
        int n = atoi(j->script.data + 5);
        j->script.len = 0;
        for (int i = 0; i < n; i++) buf_str(&j->script, "x");
    }
    return j;
}

static void choose(Choice *c, const Seq *s, int id, float logprob) {
    *c = (Choice){.id = id, .logprob = logprob};
    for (int i = 0; i < s->sampling.top_logprobs; i++, c->n_top++)
        c->top_id[i] = (id + i) % VOCAB, c->top_logprob[i] = logprob - (float)i;
}

// One token of one sequence, in the engine's order of checks, behind those of the prompt that are
// to be scored. True when it was the last.
static bool job_step(Job *j) {
    Seq *s = j->seq;
    for (; s->n_scored && s->n_scored < s->n_prompt; s->n_scored++) {
        Event *e = xcalloc(1, sizeof *e);
        *e = (Event){.seq = s, .has_token = true, .prompt = true, .stop_id = -1, .stop_string = -1};
        choose(&e->choice, s, s->tokens.data[s->n_scored], -0.25f * (float)s->n_scored);
        post(e);
    }
    Event *e = xcalloc(1, sizeof *e);
    *e = (Event){.seq = s, .stop_id = -1, .stop_string = -1};
    if (s->cancelled || abort_all) {
        cancelled_seen += s->cancelled;
        e->finish = FINISH_ABORT;
    } else if (j->hang) {
        free(e);
        return false;
    } else if (!s->max_tokens) {
        e->finish = FINISH_LENGTH;
    } else if (j->nan && j->at == 2) {
        e->has_token = true, e->choice.id = -1, e->finish = FINISH_ERROR;
    } else {
        int id = j->at < j->script.len ? BYTES + (uint8_t)j->script.data[j->at] : EOS, n, stop = 0;
        j->at++;
        ids_add(&s->tokens, id);
        n = (int)s->tokens.len - s->n_prompt;
        e->has_token = true;
        choose(&e->choice, s, id, -0.5f);
        if (id == EOS && !s->ignore_eos) stop = 1;
        for (int i = 0; i < s->n_stop_id; i++) stop |= s->stop_id[i] == id;
        if (stop) e->finish = FINISH_STOP, e->stop_id = id;
        if (!stop || s->text.no_stop_trim)
            if (text_push(&s->text, &e->text, id, !stop && n > s->min_tokens))
                e->finish = FINISH_STOP, e->stop_string = s->text.matched;
        if (!e->finish && n >= s->max_tokens) e->finish = FINISH_LENGTH;
    }
    bool last = e->finish;
    if (last && e->stop_string < 0) text_flush(&s->text, &e->text);
    post(e);  // from here on the sequence may be gone
    return last;
}

static void *engine_run(void *unused) {
    Job *jobs = NULL;
    while (!quit || jobs) {
        pthread_mutex_lock(&mutex);
        Seq *taken = inbox;
        inbox = NULL;
        pthread_mutex_unlock(&mutex);
        Job **end = &jobs;
        while (*end) end = &(*end)->next;
        for (Seq *s = taken, *next; s; s = next) {
            next = s->next;
            *end = job_new(s), end = &(*end)->next;
        }
        for (Job **link = &jobs, *j; (j = *link);) {
            if (!job_step(j)) {
                link = &j->next;
                continue;
            }
            *link = j->next;
            buf_free(&j->script);
            free(j);
        }
        steps_done++;
        usleep(jobs && step_us ? (useconds_t)step_us : 200);
    }
    return unused;
}

// ---- The server under test ----------------------------------------------------------------------

static pthread_t serve_thread;
static int port, listen_fd;
static HttpLimits default_limits;

static void *serve_run(void *unused) {
    http_serve(listen_fd);
    return unused;
}

static void server_start(void) {
    struct sockaddr_in a;
    abort_all = false;
    server.state = STATE_READY;
    server.stops = 0;
    server.failure = NULL;
    listen_fd = http_listen("127.0.0.1", 0);
    getsockname(listen_fd, (struct sockaddr *)&a, &(socklen_t){sizeof a});
    port = ntohs(a.sin_port);
    pthread_create(&serve_thread, NULL, serve_run, NULL);
}

static void server_wait(void) {
    pthread_join(serve_thread, NULL);
    close(listen_fd);
}

static void symbol_add(Buf *b, int byte) {
    int other = 0;  // GPT-2's printable stand-ins
    for (int i = 0; i < byte; i++) other += !((i >= 33 && i <= 126) || (i >= 161 && i != 173));
    bool plain = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
    int code = plain ? byte : 256 + other;
    if (code == '"' || code == '\\') buf_str(b, "\\");
    if (code < 128) buf_printf(b, "%c", code);
    else buf_printf(b, "%c%c", 0xC0 | code >> 6, 0x80 | (code & 63));
}

static void write_file(const char *dir, const char *name, const char *text) {
    char path[200];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f)) die("can't write %s", path);
}

static void tokenizer_make(void) {
    char dir[] = "/tmp/r1_test_http_XXXXXX", path[100];
    if (!mkdtemp(dir)) die("mkdtemp");
    Buf b = {0};
    buf_str(&b, "{\"added_tokens\":[");
    for (int i = 0; i < BYTES; i++)
        buf_printf(
            &b,
            "%s{\"id\":%d,\"content\":\"%s\",\"single_word\":false,\"lstrip\":false,\"rstrip\":"
            "false,\"normalized\":false,\"special\":%s}",
            i ? "," : "", i, added[i], i < 2 ? "true" : "false");
    buf_str(
        &b,
        "],\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[]},\"pre_tokenizer\":{\"type\":"
        "\"Sequence\",\"pretokenizers\":[");
    static const char *const patterns[] = {
        "\\\\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
        "[!\\\"#$%&'()*+,\\\\-./:;<=>?@\\\\[\\\\\\\\\\\\]^_`{|}~][A-Za-z]+|"
        "[^\\r\\n\\\\p{L}\\\\p{P}\\\\p{S}]?[\\\\p{L}\\\\p{M}]+| ?[\\\\p{P}\\\\p{S}]+[\\r\\n]*|"
        "\\\\s*[\\r\\n]+|\\\\s+(?!\\\\S)|\\\\s+"};
    for (int i = 0; i < 3; i++)
        buf_printf(
            &b,
            "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"%s\"},\"behavior\":\"Isolated\","
            "\"invert\":false},",
            patterns[i]);
    buf_str(
        &b,
        "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,"
        "\"use_regex\":false}]},\"post_processor\":{\"type\":\"ByteLevel\"},"
        "\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"vocab\":{");
    for (int i = 0; i < 256; i++) {
        buf_str(&b, i ? ",\"" : "\"");
        symbol_add(&b, i);
        buf_printf(&b, "\":%d", BYTES + i);
    }
    buf_str(&b, "},\"merges\":[]}}");
    write_file(dir, "tokenizer.json", b.data);
    write_file(dir, "tokenizer_config.json",
               "{\"add_bos_token\":true,\"bos_token\":\"<｜begin▁of▁sentence｜>\"}");
    server.tokenizer = tokenizer_load(dir);
    buf_free(&b);
    snprintf(path, sizeof path, "%s/tokenizer.json", dir), unlink(path);
    snprintf(path, sizeof path, "%s/tokenizer_config.json", dir), unlink(path);
    rmdir(dir);
}

// ---- The client ---------------------------------------------------------------------------------

typedef struct {
    int status;
    char head[4096];
    Buf body, raw;      // raw: the body with its chunk lengths
    bool ended;         // the connection was closed
} Reply;

static int dial_small(int receive) {  // with so many bytes of the kernel's; 0: as it likes
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (receive) setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive, sizeof receive);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd, (struct sockaddr *)&a, sizeof a)) die("connect: %s", strerror(errno));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){.tv_sec = 10},
               sizeof(struct timeval));
    return fd;
}

static int dial(void) { return dial_small(0); }

static void send_all(int fd, const char *data, size_t len) {
    for (ssize_t n; len; data += n, len -= (size_t)n)
        if ((n = send(fd, data, len, MSG_NOSIGNAL)) <= 0) return;
}

static void send_text(int fd, const char *text) { send_all(fd, text, strlen(text)); }

// Reads one byte after the other, so that what belongs to the next answer stays in the socket.
static bool read_byte(int fd, char *c) { return recv(fd, c, 1, 0) == 1; }

static bool read_line(int fd, Buf *line) {
    char c;
    for (line->len = 0; read_byte(fd, &c);) {
        buf_add(line, &c, 1);
        if (c == '\n') return true;
    }
    return false;
}

static void reply_free(Reply *r) {
    buf_free(&r->body);
    buf_free(&r->raw);
}

// One answer; `head`: it has no body in any case.
static Reply reply_read(int fd, bool head) {
    Reply r = {0};
    Buf line = {0};
    long length = -1;
    bool chunked = false;
    char c;
    buf_str(&r.body, "");
    while (read_line(fd, &line)) {
        if (!r.status) r.status = atoi(line.data + 9);
        if (strlen(r.head) + line.len < sizeof r.head) strcat(r.head, line.data);
        if (!strncmp(line.data, "Content-Length: ", 16)) length = atol(line.data + 16);
        if (!strncmp(line.data, "Transfer-Encoding: chunked", 26)) chunked = true;
        if (!strcmp(line.data, "\r\n")) break;
    }
    if (r.status == 100 || r.status == 204 || head) length = 0;
    while (r.status && chunked && !head && read_line(fd, &line)) {
        long n = strtol(line.data, NULL, 16);
        buf_str(&r.raw, line.data);
        for (long i = 0; i < n && read_byte(fd, &c); i++)
            buf_add(&r.body, &c, 1), buf_add(&r.raw, &c, 1);
        read_line(fd, &line);
        buf_str(&r.raw, line.data);
        if (!n) break;
    }
    while (r.status && !chunked && length && read_byte(fd, &c)) buf_add(&r.body, &c, 1), length--;
    r.ended = !r.status;
    if (strstr(r.head, "Connection: close")) r.ended = recv(fd, &c, 1, 0) == 0;
    buf_free(&line);
    return r;
}

static Reply ask(const char *request) {
    int fd = dial();
    send_text(fd, request);
    Reply r = reply_read(fd, !strncmp(request, "HEAD", 4));
    close(fd);
    return r;
}

// A whole stream with its chunk lengths, in large reads.
static Buf read_stream(int fd) {
    static char buffer[1 << 16];
    Buf all = {0};
    buf_str(&all, "");
    for (ssize_t n; (n = recv(fd, buffer, sizeof buffer, 0)) > 0;) {
        buf_add(&all, buffer, (size_t)n);
        if (all.len > 7 && !memcmp(all.data + all.len - 7, "\r\n0\r\n\r\n", 7)) break;
    }
    return all;
}

// Waits up to twenty seconds for another thread's counter.
static bool reaches(atomic_int *counter, int value) {
    for (int i = 0; i < 20000 && *counter < value; i++) usleep(1000);
    return *counter == value;
}

static const char *post_text(const char *path, const char *body) {
    static Buf b;
    b.len = 0;
    buf_printf(&b, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %zu\r\n\r\n%s", path,
               strlen(body), body);
    return b.data;
}

static Reply chat(const char *body) { return ask(post_text("/v1/chat/completions", body)); }

#define HELLO "\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}]"
#define SAY(text) "\"messages\":[{\"role\":\"user\",\"content\":\"" text "\"}]"

// Ids of 32 hex digits and times become fixed ones.
static char *normal(Buf *b) {
    for (char *s = b->data; (s = strstr(s, "\"id\":\""));) {
        s += 6;
        if (strspn(s, "0123456789abcdef") == 32) memset(s, 'i', 32);
    }
    for (char *s = b->data; (s = strstr(s, "\"created\":"));)
        for (s += 10; *s >= '0' && *s <= '9'; s++) *s = '0';
    return b->data;
}

#define ID "\"id\":\"iiiiiiiiiiiiiiiiiiiiiiiiiiiiiiii\""

static void check_reply(const char *what, Reply *r, int status, const char *body) {
    CHECK(r->status == status, "%s: got %d, want %d: %s", what, r->status, status, r->body.data);
    if (body)
        CHECK(!strcmp(normal(&r->body), body), "%s:\n got %s\nwant %s", what, r->body.data, body);
}

static void check_ask(const char *request, int status, const char *body) {
    Reply r = ask(request);
    check_reply(request, &r, status, body);
    reply_free(&r);
}

// ---- Tests: transport ---------------------------------------------------------------------------

#define MODELS                                                                                     \
    "{\"object\":\"list\",\"data\":[{\"id\":\"test/model\",\"object\":\"model\","                  \
    "\"created\":0000000000,\"owned_by\":\"sglang\",\"root\":\"test/model\",\"parent\":null,"      \
    "\"max_model_len\":1000}]}"
#define ERROR_F(code, type, message)                                                               \
    "{\"object\":\"error\",\"message\":\"" message "\",\"type\":\"" type "\",\"param\":null,"      \
    "\"code\":" #code "}"

static void test_split(void) {
    const char *request = "POST /tokenize HTTP/1.1\r\nHost: x\r\ntransfer-encoding: Chunked\r\n\r\n"
                          "5\r\n{\"pro\r\nA;x=y\r\nmpt\":\"Hi\"}\r\n0\r\nTrailer: 1\r\n\r\n";
    const char *want = "{\"tokens\":[0,78,111],\"count\":3,\"max_model_len\":1000}";
    size_t n = strlen(request);
    int fd = dial();
    for (size_t cut = 0; cut <= n; cut++) {  // in two parts, all on one connection
        send_all(fd, request, cut);
        if (cut % 8 == 0) usleep(200);
        send_all(fd, request + cut, n - cut);
        Reply r = reply_read(fd, false);
        check_reply("split", &r, 200, want);
        reply_free(&r);
    }
    for (size_t i = 0; i < n; i++) {
        send_all(fd, request + i, 1);
        usleep(100);
    }
    Reply r = reply_read(fd, false);
    check_reply("bytewise", &r, 200, want);
    reply_free(&r);
    close(fd);
}

static void test_pipelining(void) {
    Buf b = {0};
    int fd = dial();
    for (int i = 0; i < 300; i++) {
        buf_str(&b, post_text("/v1/chat/completions", "{\"max_tokens\":1," HELLO "}"));
        buf_str(&b, "\r\nGET /v1/models/ HTTP/1.1\r\n\r\n");
        buf_str(&b, post_text("/v1/detokenize/?x=1", "{\"tokens\":[78,111]}"));
    }
    send_all(fd, b.data, b.len);
    int good = 0;
    for (int i = 0; i < 300; i++) {
        Reply x = reply_read(fd, false), y = reply_read(fd, false), z = reply_read(fd, false);
        good += strstr(x.body.data, "<think>\\nH\"") && !strcmp(normal(&y.body), MODELS) &&
                !strcmp(z.body.data, "{\"text\":\"Hi\"}");
        reply_free(&x), reply_free(&y), reply_free(&z);
    }
    CHECK(good == 300, "%d", good);
    buf_free(&b);
    close(fd);
}

static void test_versions(void) {
    Reply r = ask("GET /v1/models HTTP/1.0\r\n\r\n");
    check_reply("1.0", &r, 200, MODELS);
    CHECK(r.ended && !strstr(r.head, "chunked"));
    reply_free(&r);
    r = ask(
        "POST /v1/chat/completions HTTP/1.0\r\nContent-Length: 80\r\n\r\n"
        "{\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}],"
        "\"max_tokens\":1      }");
    CHECK(r.status == 200 && strstr(r.head, "Connection: close") && !strstr(r.head, "chunked"),
          "%s", r.head);
    CHECK(strstr(r.body.data, "data: [DONE]\n\n") && !strncmp(r.body.data, "data: {", 7), "%s",
          r.body.data);
    reply_free(&r);
    r = ask("HEAD /v1/models HTTP/1.1\r\n\r\n");
    CHECK(r.status == 200 && strstr(r.head, "Content-Length: 159\r\n") && !strstr(r.head, "close"),
          "%s", r.head);
    reply_free(&r);
    r = ask("GET /v1/models HTTP/1.1\r\nConnection: Keep-Alive, Close\r\n\r\n");
    CHECK(r.ended && r.status == 200);
    reply_free(&r);
}

static void test_expect(void) {
    int fd = dial();
    send_text(fd, "POST /tokenize HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 14\r\n\r\n");
    Reply r = reply_read(fd, false);
    CHECK(r.status == 100 && !strcmp(r.head, "HTTP/1.1 100 Continue\r\n\r\n"), "%s", r.head);
    reply_free(&r);
    send_text(fd, "{\"prompt\":\"\"} ");
    r = reply_read(fd, false);
    check_reply("expect", &r, 200, "{\"tokens\":[0],\"count\":1,\"max_model_len\":1000}");
    reply_free(&r);
    close(fd);
    // What would be refused anyway is refused before the body is sent.
    check_ask("POST /nope HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 13\r\n\r\n", 404,
              ERROR_F(404, "NotFoundError", "POST /nope: no such route"));
}

static void test_transport_errors(void) {
    static const struct {
        const char *request;
        int status;
        const char *body;
        bool close;
    } rows[] = {
#define BAD(what) 400, ERROR_F(400, "BadRequestError", "malformed HTTP request: " what), true
        {"GET\r\n\r\n", BAD("request line")},
        {"GET /health\r\n\r\n", BAD("request line")},
        {"GET  /health HTTP/1.1\r\n\r\n", BAD("request line")},
        {"GET /health HTTP/1.1 \r\n\r\n", BAD("request line")},
        {"GET health HTTP/1.1\r\n\r\n", BAD("request line")},
        {"G@T /health HTTP/1.1\r\n\r\n", BAD("request line")},
        {"GET /h\xC3\xA9 HTTP/1.1\r\n\r\n", BAD("request line")},
        {"GET /health HTTP/x.1\r\n\r\n", BAD("request line")},
        {"GET /health HTTP/1.1\r\nA : b\r\n\r\n", BAD("header field")},
        {"GET /health HTTP/1.1\r\nA: b\r\n c\r\n\r\n", BAD("header field")},
        {"GET /health HTTP/1.1\r\nnothing\r\n\r\n", BAD("header field")},
        {"GET /health HTTP/1.1\r\n: b\r\n\r\n", BAD("header field")},
        {"GET /health HTTP/1.1\r\nA: b\rc\r\n\r\n", BAD("control character")},
        {"GET /health HTTP/1.1\r\nA: b\nc: d\r\n\r\n", BAD("control character")},
        {"GET /health HTTP/1.1\nA: b\r\n\r\n", BAD("control character")},
        {"GET /health HTTP/1.1\r\nA: \x01\r\n\r\n", BAD("control character")},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
         BAD("two lengths")},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
         BAD("two lengths")},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
         BAD("two lengths")},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 4\r\n\r\n",
         BAD("two lengths")},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: +3\r\n\r\n", BAD("Content-Length")},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 0x3\r\n\r\n", BAD("Content-Length")},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 3, 3\r\n\r\n", BAD("Content-Length")},
        {"POST /tokenize HTTP/1.1\r\nContent-Length:\r\n\r\n", BAD("Content-Length")},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: -1\r\n\r\n", BAD("Content-Length")},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
         BAD("Content-Length")},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: "
         "chunked\r\n\r\n",
         BAD("Transfer-Encoding")},
        {"POST /tokenize HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", BAD("Transfer-Encoding")},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\n", BAD("chunk")},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", BAD("chunk")},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\r\n", BAD("chunk")},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\nx", BAD("chunk")},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxy\r\n", BAD("chunk")},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n11111111111111111\r\n",
         BAD("chunk")},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\n", 413,
         ERROR_F(413, "PayloadTooLargeError",
                 "body: got more than 33554432 bytes, want at most 33554432"),
         true},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501,
         ERROR_F(501, "NotImplementedError", "Transfer-Encoding: got gzip, want chunked"), true},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501,
         ERROR_F(501, "NotImplementedError", "Transfer-Encoding: got gzip, chunked, want chunked"),
         true},
        {"POST /tokenize HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n", 415,
         ERROR_F(415, "UnsupportedMediaTypeError", "Content-Encoding: got gzip, want identity"),
         true},
        {"GET /health HTTP/2.0\r\n\r\n", 505,
         ERROR_F(505, "HTTPVersionError", "HTTP/2.0: want HTTP/1.1"), true},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 41943040\r\n\r\n", 413,
         ERROR_F(413, "PayloadTooLargeError", "body: got 41943040 bytes, want at most 33554432"),
         true},
        {"GET /v1/foo?a=b HTTP/1.1\r\n\r\n", 404,
         ERROR_F(404, "NotFoundError", "GET /v1/foo: no such route"), false},
        {"GET /v1/ HTTP/1.1\r\n\r\n", 404, ERROR_F(404, "NotFoundError", "GET /v1: no such route"),
         false},
        {"POST /v1/foo HTTP/1.1\r\nContent-Length: 2\r\n\r\nxx", 404,
         ERROR_F(404, "NotFoundError", "POST /v1/foo: no such route"), false},
        {"GET /tokenize HTTP/1.1\r\n\r\n", 405,
         ERROR_F(405, "MethodNotAllowedError", "GET /tokenize: method not allowed, want POST"),
         false},
        {"get /v1/models HTTP/1.1\r\n\r\n", 405,
         ERROR_F(405, "MethodNotAllowedError",
                 "get /v1/models: method not allowed, want GET or HEAD"),
         false},
        {"or /v1/models HTTP/1.1\r\n\r\n", 405,
         ERROR_F(405, "MethodNotAllowedError",
                 "or /v1/models: method not allowed, want GET or HEAD"),
         false},
        {"GE /v1/models HTTP/1.1\r\n\r\n", 405,
         ERROR_F(405, "MethodNotAllowedError",
                 "GE /v1/models: method not allowed, want GET or HEAD"),
         false},
        {"DELETE /get_model_info HTTP/1.1\r\n\r\n", 405,
         "{\"error\":{\"message\":\"DELETE /get_model_info: method not allowed, want GET or "
         "HEAD\"}}",
         false},
        {"GET /v1/models/nope HTTP/1.1\r\n\r\n", 404,
         "{\"error\":{\"message\":\"The model 'nope' does not exist\","
         "\"type\":\"invalid_request_error\",\"param\":\"model\",\"code\":\"model_not_found\"}}",
         false},
        {"GET /v1/models/a%22%2fb%zz%C3 HTTP/1.1\r\n\r\n", 404,
         "{\"error\":{\"message\":\"The model 'a\\\"/b%zz\xEF\xBF\xBD' does not exist\",\"type\":"
         "\"invalid_request_error\",\"param\":\"model\",\"code\":\"model_not_found\"}}",
         false},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Reply r = ask(rows[i].request);
        check_reply(rows[i].request, &r, rows[i].status, rows[i].body);
        CHECK(r.ended == rows[i].close, "%s", rows[i].request);
        reply_free(&r);
    }
    Reply r = ask("PUT /v1/chat/completions HTTP/1.1\r\n\r\n");
    CHECK(r.status == 405 && strstr(r.head, "Allow: POST\r\n"), "%s", r.head);
    reply_free(&r);
    r = ask("PUT /v1/models HTTP/1.1\r\n\r\n");
    CHECK(r.status == 405 && strstr(r.head, "Allow: GET, HEAD\r\n"), "%s", r.head);
    reply_free(&r);
    // Equal lengths are one length.
    check_ask(
        "POST /detokenize HTTP/1.1\r\nContent-Length: 13\r\ncontent-length: "
        "13\r\n\r\n{\"tokens\":[]}",
        200, "{\"text\":\"\"}");
    check_ask(
        "GET /model_info/ HTTP/1.1\r\n\r\n", 200,
        "{\"model_path\":\"/models/r1\",\"tokenizer_path\":\"/models/r1\",\"is_generation\":true}");
    check_ask(
        "GET /v1/models/test%2Fmodel HTTP/1.1\r\n\r\n", 200,
        "{\"id\":\"test/model\",\"object\":\"model\",\"created\":0000000000,"
        "\"owned_by\":\"sglang\",\"root\":\"test/model\",\"parent\":null,\"max_model_len\":1000}");
    check_ask("GET /v1/models/test/model HTTP/1.1\r\n\r\n", 200, NULL);
    check_ask("GET /v1/models/test/mode HTTP/1.1\r\n\r\n", 404, NULL);
}

static void test_limits(void) {
    Buf b = {0};
    buf_str(&b, "GET /v1/models HTTP/1.1\r\nA: ");
    while (b.len < 32769) buf_str(&b, "x");
    Reply r = ask(b.data);  // no end yet, and one byte too many
    CHECK(r.status == 431, "%d", r.status);
    reply_free(&r);
    b.len = 32768 - 4;
    b.data[b.len] = 0;
    buf_str(&b, "\r\n\r\n");
    check_ask(b.data, 200, MODELS);
    b.len = 32768 - 3;
    buf_str(&b, "\r\n\r\n");
    check_ask(b.data, 431,
              ERROR_F(431, "HeaderTooLargeError", "header: got more than 32768 bytes"));
    for (int fields = 100; fields <= 101; fields++) {
        b.len = 0;
        buf_str(&b, "GET /v1/models HTTP/1.1\r\n");
        for (int i = 0; i < fields; i++) buf_str(&b, "A: b\r\n");
        buf_str(&b, "\r\n");
        check_ask(b.data, fields == 100 ? 200 : 431,
                  fields == 100
                      ? MODELS
                      : ERROR_F(431, "HeaderTooLargeError", "header: got more than 100 fields"));
    }
    http_limits.body_bytes = 1000, http_limits.all_bodies_bytes = 1500;
    check_ask(
        "POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n \r\n3e8\r\n", 413,
        ERROR_F(413, "PayloadTooLargeError", "body: got more than 1000 bytes, want at most 1000"));
    int first = dial();
    b.len = 0;
    buf_str(&b, "POST /tokenize HTTP/1.1\r\nContent-Length: 1000\r\n\r\n");
    for (int i = 0; i < 999; i++) buf_str(&b, " ");
    send_all(first, b.data, b.len);
    usleep(200000);
    check_ask(b.data, 503, ERROR_F(503, "ServiceUnavailableError", "too many request bodies"));
    close(first);
    usleep(200000);
    first = dial();  // what the others held is free again
    send_all(first, b.data, b.len);
    send_text(first, "x");
    r = reply_read(first, false);
    CHECK(r.status == 400 && !r.ended, "%d", r.status);
    reply_free(&r);
    close(first);
    http_limits = default_limits;
    // Limits on connections: idle ones make room; where none is idle, 503.
    http_limits.connections = 3;
    int fds[3];
    for (int i = 0; i < 3; i++) fds[i] = dial(), usleep(50000);
    check_ask("GET /v1/models HTTP/1.1\r\n\r\n", 200, MODELS);
    char c;
    CHECK(recv(fds[0], &c, 1, 0) == 0, "the longest idle one is closed");
    for (int i = 0; i < 3; i++) close(fds[i]);
    usleep(100000);
    for (int i = 0; i < 3; i++) fds[i] = dial(), send_text(fds[i], "GET");
    usleep(200000);
    check_ask("GET /v1/models HTTP/1.1\r\n\r\n", 503,
              ERROR_F(503, "ServiceUnavailableError", "too many connections"));
    for (int i = 0; i < 3; i++) close(fds[i]);
    http_limits = default_limits;
    buf_free(&b);
}

// Timeouts, with limits of tenths of seconds.
static void test_timeouts(void) {
    http_limits.header_s = 0.3, http_limits.body_gap_s = 0.3, http_limits.idle_s = 0.3;
    double start = now_seconds();
    check_ask("GET /health HTTP/1.1\r\n", 408,
              ERROR_F(408, "RequestTimeoutError", "request not complete: no header after 0.3 s"));
    check_ask("POST /tokenize HTTP/1.1\r\nContent-Length: 10\r\n\r\n{", 408,
              ERROR_F(408, "RequestTimeoutError", "request not complete: no byte for 0.3 s"));
    int fd = dial();
    char c;
    CHECK(recv(fd, &c, 1, 0) == 0, "idle");
    close(fd);
    CHECK(now_seconds() - start > 0.85 && now_seconds() - start < 4, "%f", now_seconds() - start);
    fd = dial();  // the header's time counts from its first byte, the body's from its last
    send_text(fd, "POST /detokenize HTTP/1.1\r\nContent-Length: 13\r\n\r\n");
    for (const char *s = "{\"tokens\":[]}"; *s; s++) usleep(50000), send_all(fd, s, 1);
    Reply r = reply_read(fd, false);
    check_reply("slow body", &r, 200, "{\"text\":\"\"}");
    reply_free(&r);
    for (int i = 0; i < 12; i++) usleep(50000), send_text(fd, "G");
    r = reply_read(fd, false);
    CHECK(r.status == 408, "%d", r.status);
    reply_free(&r);
    close(fd);
    http_limits = default_limits;
}

static void test_cors_and_key(void) {
    Reply r = ask("GET /v1/models HTTP/1.1\r\nOrigin: http://a.b\r\n\r\n");
    CHECK(
        strstr(
            r.head,
            "Access-Control-Allow-Origin: http://a.b\r\nAccess-Control-Allow-Credentials: true\r\n"
            "Vary: Origin\r\n"),
        "%s", r.head);
    reply_free(&r);
    server.options.api_key = "s3cret";
    r = ask(
        "OPTIONS /any HTTP/1.1\r\nOrigin: http://a.b\r\nAccess-Control-Request-Headers: "
        "X-Y\r\n\r\n");
    CHECK(!strcmp(r.head,
                  "HTTP/1.1 204 No Content\r\nAccess-Control-Allow-Origin: http://a.b\r\n"
                  "Access-Control-Allow-Credentials: true\r\nVary: Origin\r\n"
                  "Access-Control-Allow-Methods: GET, HEAD, POST, PUT, OPTIONS\r\n"
                  "Access-Control-Allow-Headers: X-Y\r\nAccess-Control-Max-Age: 600\r\n\r\n"),
          "%s", r.head);
    reply_free(&r);
    r = ask("OPTIONS * HTTP/1.1\r\n\r\n");
    CHECK(r.status == 204 && strstr(r.head, "Allow-Headers: *\r\n"));
    reply_free(&r);
    static const char *const bad[] = {"",
                                      "Authorization: Bearer s3creT\r\n",
                                      "Authorization: Bearer s3cre\r\n",
                                      "Authorization: Bearer s3cret1\r\n",
                                      "Authorization: bearer s3cret\r\n",
                                      "Authorization:\r\n",
                                      "Authorization: s3cret\r\n"};
    char request[200];
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        snprintf(request, sizeof request, "GET /v1/models HTTP/1.1\r\n%s\r\n", bad[i]);
        check_ask(request, 401, "{\"error\":\"Unauthorized\"}");
    }
    check_ask("GET /nope HTTP/1.1\r\n\r\n", 401, "{\"error\":\"Unauthorized\"}");
    check_ask("GET /v1/models HTTP/1.1\r\nAuthorization: Bearer s3cret\r\n\r\n", 200, MODELS);
    check_ask("GET /health HTTP/1.1\r\n\r\n", 200, NULL);
    check_ask("GET / HTTP/1.1\r\n\r\n", 200, NULL);  // the page asks for the key by itself
    server.options.api_key = NULL;
    check_ask("GET /v1/models HTTP/1.1\r\nAuthorization: Bearer None\r\n\r\n", 200, MODELS);
}

static void test_states(void) {
    static const struct { int state; const char *message, *status; } rows[] = {
        {STATE_STARTING, "r1 is not ready: starting", "starting"},
        {STATE_LOADING, "r1 is not ready: loading, 25.0 % (slowest: rank 0, 25.0 %)", "loading"},
        {STATE_WARMUP, "r1 is not ready: warmup", "warmup"},
        {STATE_FAILED, "r1 is not ready: failed", "failed"},
    };
    server.ranks[0].progress.loaded_bytes = 1000000000;
    server.ranks[0].progress.total_bytes = 4000000000;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char want[300];
        server.state = rows[i].state;
        snprintf(want, sizeof want, ERROR_F(503, "ServiceUnavailableError", "%s"), rows[i].message);
        Reply r = chat("{}");
        check_reply("not ready", &r, 503, want);
        CHECK(strstr(r.head, "Retry-After: 5\r\n") && !r.ended, "%s", r.head);
        reply_free(&r);
        snprintf(want, sizeof want, "{\"error\":{\"message\":\"%s\"}}", rows[i].message);
        check_ask("GET /get_model_info HTTP/1.1\r\n\r\n", 503, want);
        check_ask("GET / HTTP/1.1\r\n\r\n", 200, NULL);  // the page shows how far it is
        r = ask("GET /health_generate HTTP/1.1\r\n\r\n");
        snprintf(want, sizeof want,
                 "{\"status\":\"%s\",\"ready\":false,\"version\":\"" R1_VERSION "\",\"uptime_s\":",
                 rows[i].status);
        CHECK(r.status == 503 && !strncmp(r.body.data, want, strlen(want)), "%s", r.body.data);
        CHECK(strstr(r.body.data,
                     ",\"loaded_bytes\":1000000000,\"total_bytes\":4000000000,\"gb_per_s\":") &&
              strstr(r.body.data, ",\"eta_s\":") &&
              strstr(r.body.data, ",\"ranks\":[{\"rank\":0,\"node\":0,\"state\":\""));
        reply_free(&r);
    }
    // The group's ranks are counted together, and the last one is named.
    server.n_ranks = 4, server.n_local = 2;
    server.state = STATE_LOADING;
    for (int i = 1; i < 4; i++) {
        server.ranks[i].state = STATE_LOADING;
        server.ranks[i].progress.loaded_bytes = 1000000000 - 100000000 * (i % 3);
        server.ranks[i].progress.total_bytes = 4000000000;
    }
    Reply r = chat("{}");
    check_reply("not ready", &r, 503, ERROR_F(503, "ServiceUnavailableError",
                "r1 is not ready: loading, 23.1 % (slowest: rank 2, 20.0 %)"));
    reply_free(&r);
    r = ask("GET /health HTTP/1.1\r\n\r\n");
    CHECK(strstr(r.body.data, ",\"loaded_bytes\":3700000000,\"total_bytes\":16000000000,") &&
          strstr(r.body.data, "{\"rank\":2,\"node\":1,\"state\":\"loading\",\"loaded_bytes\":"
                              "800000000,\"total_bytes\":4000000000},{\"rank\":3,\"node\":1,"),
          "%s", r.body.data);
    reply_free(&r);
    // A worker answers no requests, but says how the group is.
    server.node = 1, server.leader = "10.0.0.5:30000";
    static const char *const closed[] = {"GET /v1/models", "GET /", "POST /generate", "GET /none"};
    for (int i = 0; i < 4; i++) {
        char *request = format_string("%s HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", closed[i]);
        r = ask(request);
        free(request);
        CHECK(r.status == 503 && strstr(r.body.data, "node 1 serves /health and /metrics only; ask "
              "the leader at 10.0.0.5:30000"), "%s", r.body.data);
        reply_free(&r);
    }
    server.state = STATE_READY;
    check_ask("GET /health_generate HTTP/1.1\r\n\r\n", 200, NULL);
    r = ask("GET /metrics HTTP/1.1\r\n\r\n");
    CHECK(strstr(r.body.data, "r1:load_bytes{model_name=\"test/model\",rank=\"3\"} 1000000000\n") &&
          !strstr(r.body.data, "sglang:"), "%s", r.body.data);
    reply_free(&r);
    server.node = 0, server.n_ranks = server.n_local = 1;
    server.steps = 7;
    r = ask("GET /health HTTP/1.1\r\n\r\n");
    CHECK(
        r.status == 200 &&
            strstr(
                r.body.data,
                ",\"steps\":7,\"running\":0,\"queued\":0,\"ranks\":[{\"rank\":0,"
                "\"node\":0,\"state\":\"ready\",\"loaded_bytes\":1000000000,"
                "\"total_bytes\":4000000000}]}"),
        "%s", r.body.data);
    reply_free(&r);
    r = ask("POST /health HTTP/1.1\r\n\r\n");
    CHECK(r.status == 405 && !strncmp(r.body.data, "{\"status\":\"ready\"", 17) &&
          strstr(r.head, "Allow: GET, HEAD"));
    reply_free(&r);
    check_ask("GET /health_generate HTTP/1.1\r\n\r\n", 200, "");
    CHECK(last_temperature == 0);
    server.options.max_queued_requests = 5, server.queued = 6;
    r = chat("{" HELLO "}");
    check_reply(
        "queue", &r, 503,
        ERROR_F(503, "ServiceUnavailableError", "the request queue is full: 6 waiting, limit 5"));
    CHECK(strstr(r.head, "Retry-After: 1\r\n"));
    reply_free(&r);
    server.options.max_queued_requests = 0, server.queued = 0;
}

// A probe that the engine does not answer in time. The fake one hangs on any prompt while it
// sleeps.
static void test_probe_timeout(void) {
    http_limits.probe_s = 0.2;
    step_us = 700000;
    int fd = dial();  // the engine sleeps between two steps of this one
    send_text(fd, post_text("/v1/chat/completions", "{" SAY("hang") "}"));
    usleep(100000);
    Reply r = ask("GET /health_generate HTTP/1.1\r\n\r\n");
    CHECK(r.status == 503 && !strncmp(r.body.data, "{\"status\":\"ready\"", 17), "%d %s", r.status,
          r.body.data);
    reply_free(&r);
    close(fd);
    step_us = 0;
    http_limits = default_limits;
    usleep(800000);
}

// ---- Tests: the endpoints -----------------------------------------------------------------------

#define REFUSED(param, message) "{\"object\":\"error\",\"message\":\"" param ": " message \
    "\",\"type\":\"BadRequestError\",\"param\":\"" param "\",\"code\":400}"

static void test_field_errors(void) {
    static const struct { const char *body, *answer;
    } rows[] = {
        {"", ERROR_F(400, "BadRequestError", "invalid JSON at byte 0: got the end, want a value")},
        {"{\"messages\":[}",
         ERROR_F(400, "BadRequestError", "invalid JSON at byte 13: got '}', want a value or ']'")},
        {"[1]", ERROR_F(400, "BadRequestError", "body: got array, want object")},
        {"{\"max_tokens\":-1}", REFUSED("max_tokens", "got -1, want an integer in 0..2147483647")},
        {"{\"max_tokens\":1.5}",
         REFUSED("max_tokens", "got 1.5, want an integer in 0..2147483647")},
        {"{\"max_tokens\":\"5\"}", REFUSED("max_tokens", "got string, want number")},
        {"{\"temperature\":\"hot\"}", REFUSED("temperature", "got string, want number")},
        {"{\"temperature\":-0.5}", REFUSED("temperature", "got -0.5, want a number >= 0")},
        {"{\"top_p\":1.5}", REFUSED("top_p", "got 1.5, want a number in (0, 1]")},
        {"{\"top_p\":0}", REFUSED("top_p", "got 0, want a number in (0, 1]")},
        {"{\"top_k\":0}", REFUSED("top_k", "got 0, want -1 or an integer >= 1")},
        {"{\"top_k\":-2}", REFUSED("top_k", "got -2, want -1 or an integer >= 1")},
        {"{\"min_p\":1.01}", REFUSED("min_p", "got 1.01, want a number in [0, 1]")},
        {"{\"frequency_penalty\":2.1}",
         REFUSED("frequency_penalty", "got 2.1, want a number in [-2, 2]")},
        {"{\"presence_penalty\":-3}",
         REFUSED("presence_penalty", "got -3, want a number in [-2, 2]")},
        {"{\"repetition_penalty\":0}",
         REFUSED("repetition_penalty", "got 0, want a number in (0, 2]")},
        {"{\"logit_bias\":[]}", REFUSED("logit_bias", "got array, want object")},
        {"{\"logit_bias\":{\"x\":1}}",
         REFUSED("logit_bias", "got \\\"x\\\", want token ids in 0..261")},
        {"{\"logit_bias\":{\"262\":1}}",
         REFUSED("logit_bias", "got \\\"262\\\", want token ids in 0..261")},
        {"{\"logit_bias\":{\" 2\":1}}",
         REFUSED("logit_bias", "got \\\" 2\\\", want token ids in 0..261")},
        {"{\"logit_bias\":{\"2\":101}}",
         REFUSED("logit_bias.2", "got 101, want a number in [-100, 100]")},
        {"{\"logit_bias\":{\"2\":\"a\"}}", REFUSED("logit_bias.2", "got string, want number")},
        {"{\"seed\":0.5}",
         REFUSED("seed", "got 0.5, want an integer in -9223372036854775808..18446744073709551615")},
        {"{\"stop\":3}", REFUSED("stop", "got number, want string or array")},
        {"{\"stop\":\"\"}", REFUSED("stop", "got 0 bytes, want 1..1024")},
        {"{\"stop\":[\"a\",\"\"]}", REFUSED("stop[1]", "got 0 bytes, want 1..1024")},
        {"{\"stop\":[\"a\",7]}", REFUSED("stop[1]", "got number, want string")},
        {"{\"stop_token_ids\":3}", REFUSED("stop_token_ids", "got number, want array")},
        {"{\"stop_token_ids\":[1,262]}",
         REFUSED("stop_token_ids[1]", "got 262, want a token id in 0..261")},
        {"{\"stop_token_ids\":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,"
         "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]}",
         REFUSED("stop_token_ids", "got 65 entries, want at most 64")},
        {"{\"ignore_eos\":1}", REFUSED("ignore_eos", "got number, want bool")},
        {"{\"n\":0}", REFUSED("n", "got 0, want an integer in 1..128")},
        {"{\"n\":129}", REFUSED("n", "got 129, want an integer in 1..128")},
        {"{\"stream\":\"yes\"}", REFUSED("stream", "got string, want bool")},
        {"{\"rid\":\"\"}", REFUSED("rid", "got \\\"\\\", want 1..128 printable ASCII characters")},
        {"{\"rid\":\"\xC3\xA9\"}",
         REFUSED("rid", "got \\\"\xC3\xA9\\\", want 1..128 printable ASCII characters")},
        {"{\"tools\":[{}]}", REFUSED("tools", "not supported by this version of r1")},
        {"{\"response_format\":{\"type\":\"json_object\"}}",
         REFUSED("response_format", "not supported by this version of r1")},
        {"{\"regex\":\"a\"}", REFUSED("regex", "not supported by this version of r1")},
        {"{\"suffix\":\"a\"}", REFUSED("suffix", "not supported by this version of r1")},
        {"{\"lora_path\":\"a\"}", REFUSED("lora_path", "not supported by this version of r1")},
        {"{}", REFUSED("messages", "missing, want a non-empty array")},
        {"{\"messages\":\"Hi\"}", REFUSED("messages", "got string, want array")},
        {"{\"messages\":[]}", REFUSED("messages", "got an empty array, want a non-empty array")},
        {"{\"messages\":[1]}", REFUSED("messages[0]", "got number, want object")},
        {"{\"messages\":[{}]}",
         REFUSED("messages[0].role", "missing, want system, developer, user, assistant or tool")},
        {"{\"messages\":[{\"role\":3}]}", REFUSED("messages[0].role", "got number, want string")},
        {"{\"messages\":[{\"role\":\"user\"},{\"role\":\"robot\"}]}",
         REFUSED("messages[1].role",
                 "got \\\"robot\\\", want system, developer, user, assistant or tool")},
        {"{\"messages\":[{\"role\":\"user\",\"content\":3}]}",
         REFUSED("messages[0].content", "got number, want string or array")},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[3]}]}",
         REFUSED("messages[0].content[0]", "got number, want object")},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}",
         REFUSED("messages[0].content[0].type", "got \\\"image_url\\\", want \\\"text\\\"")},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]}",
         REFUSED("messages[0].content[0].text", "missing, want a string")},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":1}]}]}",
         REFUSED("messages[0].content[0].text", "got number, want string")},
        {"{\"messages\":[{\"role\":\"assistant\",\"tool_calls\":3}]}",
         REFUSED("messages[0].tool_calls", "got number, want array")},
        {"{" HELLO ",\"model\":3}", REFUSED("model", "got number, want string")},
        {"{" HELLO ",\"logprobs\":3}", REFUSED("logprobs", "got number, want bool")},
        {"{" HELLO ",\"logprobs\":true,\"top_logprobs\":65}",
         REFUSED("top_logprobs", "got 65, want an integer in 0..64")},
        {"{" HELLO ",\"top_logprobs\":2}",
         REFUSED("top_logprobs", "got 2, want 0 unless logprobs is true")},
        {"{" HELLO ",\"stream_options\":true}", REFUSED("stream_options", "got bool, want object")},
        {"{" HELLO ",\"stream_options\":{\"include_usage\":1}}",
         REFUSED("stream_options.include_usage", "got number, want bool")},
        {"{" HELLO ",\"max_tokens\":2,\"min_tokens\":3}",
         REFUSED("min_tokens", "got 3, want an integer in 0..2")},
        {"{" HELLO ",\"max_tokens\":990}",
         ERROR_F(
             400, "BadRequestError",
             "Requested token count exceeds the model's maximum "
             "context length of 1000 tokens. You requested a total of 1000 tokens: 10 in the "
             "prompt and 990 for the completion.")},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (strstr(rows[i].body, "990")) continue;  // fits exactly
        Reply r = chat(rows[i].body);
        check_reply(rows[i].body, &r, 400, rows[i].answer);
        CHECK(!r.ended);
        reply_free(&r);
    }
    Reply r = chat("{\"stream\":true," HELLO ",\"max_tokens\":991}");
    check_reply(
        "too long", &r, 400,
        ERROR_F(
            400, "BadRequestError",
            "Requested token count exceeds the model's maximum "
            "context length of 1000 tokens. You requested a total of 1001 tokens: 10 in the prompt "
            "and 991 for the completion."));
    reply_free(&r);
    server.max_total_tokens = 200;
    Buf b = {0};
    buf_str(&b, "{\"messages\":[{\"role\":\"user\",\"content\":\"");
    for (int i = 0; i < 195; i++) buf_str(&b, "y");
    buf_str(&b, "\"}],\"max_tokens\":7,\"min_tokens\":5}");
    r = chat(b.data);
    check_reply(
        "pool", &r, 400,
        ERROR_F(
            400, "BadRequestError",
            "The input (200 tokens) is longer than the model's context "
            "length (200 tokens). The KV cache of this server holds 200 tokens; the model allows "
            "1000."));
    reply_free(&r);
    server.options.allow_auto_truncate = true;
    r = chat(b.data);
    CHECK(r.status == 200 &&
              strstr(r.body.data,
                     "\"prompt_tokens\":199,\"total_tokens\":200,\"completion_tokens\":1,"),
          "%s", r.body.data);
    reply_free(&r);
    server.options.allow_auto_truncate = false;
    server.max_total_tokens = 2000;
    // Neutral and unknown fields pass; null means absent.
    r = chat(
        "{" HELLO
        ",\"tools\":[],\"response_format\":{\"type\":\"text\"},\"suffix\":\"\",\"regex\":null,"
        "\"zzz\":[{}],\"max_tokens\":null,\"stop\":null,\"user\":\"u\",\"n\":1.0,\"max_tokens\":3,"
        "\"max_tokens\":2.0}");
    CHECK(r.status == 200 && strstr(r.body.data, "\"content\":\"<think>\\nHe\""), "%s",
          r.body.data);
    reply_free(&r);
    r = chat(
        "{" HELLO
        ",\"tools\":[{}],\"tool_choice\":\"none\",\"max_completion_tokens\":1,\"max_tokens\":4}");
    CHECK(r.status == 200 && strstr(r.body.data, "\"completion_tokens\":1,"), "%s", r.body.data);
    reply_free(&r);
    buf_free(&b);
}

#define CHOICE(index, content, logprobs, reason, matched)                                          \
    "{\"index\":" #index ",\"message\":{\"role\":\"assistant\",\"content\":\"" content             \
    "\",\"tool_calls\":null},\"logprobs\":" logprobs ",\"finish_reason\":\"" reason                \
    "\",\"matched_stop\":" matched "}"
#define ANSWER(model, choices, usage)                                                              \
    "{" ID ",\"object\":\"chat.completion\",\"created\":0000000000,\"model\":\"" model             \
    "\",\"choices\":[" choices "],\"usage\":{" usage ",\"prompt_tokens_details\":null}}"
#define USAGE(p, t, c) "\"prompt_tokens\":" #p ",\"total_tokens\":" #t ",\"completion_tokens\":" #c

static void test_chat(void) {
    static const struct { const char *body, *answer;
    } rows[] = {
        {"{\"model\":\"default\"," HELLO "}",
         ANSWER("default", CHOICE(0, "<think>\\nHello", "null", "stop", "1"), USAGE(10, 16, 6))},
        {"{" HELLO ",\"max_tokens\":2}",
         ANSWER("test/model", CHOICE(0, "<think>\\nHe", "null", "length", "null"),
                USAGE(10, 12, 2))},
        {"{" HELLO ",\"max_tokens\":0}",
         ANSWER("test/model", CHOICE(0, "<think>\\n", "null", "length", "null"), USAGE(10, 10, 0))},
        {"{" HELLO ",\"max_tokens\":990}",
         ANSWER("test/model", CHOICE(0, "<think>\\nHello", "null", "stop", "1"), USAGE(10, 16, 6))},
        {"{" HELLO ",\"stop\":\"llo\"}",
         ANSWER("test/model", CHOICE(0, "<think>\\nHe", "null", "stop", "\"llo\""),
                USAGE(10, 15, 5))},
        {"{" HELLO ",\"stop\":[\"zz\",\"l\"],\"no_stop_trim\":true}",
         ANSWER("test/model", CHOICE(0, "<think>\\nHel", "null", "stop", "\"l\""),
                USAGE(10, 13, 3))},
        {"{" HELLO ",\"stop\":[\"l\"],\"min_tokens\":3}",
         ANSWER("test/model", CHOICE(0, "<think>\\nHel", "null", "stop", "\"l\""),
                USAGE(10, 14, 4))},
        {"{" HELLO ",\"stop_token_ids\":[107]}",
         ANSWER("test/model", CHOICE(0, "<think>\\nH", "null", "stop", "107"), USAGE(10, 12, 2))},
        {"{" HELLO ",\"max_tokens\":7,\"ignore_eos\":true}",
         ANSWER("test/model", CHOICE(0, "<think>\\nHello", "null", "length", "null"),
                USAGE(10, 17, 7))},
        {"{" HELLO ",\"max_tokens\":6,\"ignore_eos\":true,\"skip_special_tokens\":false}",
         ANSWER("test/model",
                CHOICE(0, "<think>\\nHello<｜end▁of▁sentence｜>", "null", "length", "null"),
                USAGE(10, 16, 6))},
        {"{" HELLO ",\"n\":3,\"max_tokens\":1}",
         ANSWER("test/model",
                CHOICE(0, "<think>\\nH", "null", "length", "null") "," CHOICE(
                    1, "<think>\\nH", "null", "length", "null") "," CHOICE(2, "<think>\\nH", "null",
                                                                           "length", "null"),
                USAGE(10, 13, 3))},
        {"{\"messages\":[{\"role\":\"developer\",\"content\":\"D\"},{\"role\":\"user\","
         "\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"text\":\"b\",\"type\":\"text\"}],"
         "\"name\":\"x\"}]}",
         ANSWER("test/model", CHOICE(0, "<think>\\na\\nb", "null", "stop", "1"), USAGE(9, 13, 4))},
        // A prefill: no tag forced, none re-emitted.
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"},{\"role\":\"assistant\","
         "\"content\":\"abc\"}]}",
         ANSWER("test/model", CHOICE(0, "Hi", "null", "stop", "1"), USAGE(8, 11, 3))},
        {"{\"messages\":[{\"role\":\"assistant\",\"content\":null}],\"max_tokens\":0}",
         ANSWER("test/model", CHOICE(0, "", "null", "length", "null"), USAGE(2, 2, 0))},
        // Half a character at the end is a U+FFFD.
        {"{" SAY("\xC3\xA9\\\"\\u0001") ",\"max_tokens\":1}",
         ANSWER("test/model", CHOICE(0, "<think>\\n\xEF\xBF\xBD", "null", "length", "null"),
                USAGE(9, 10, 1))},
        {"{" SAY("\xC3\xA9\\\"\\u0001") "}",
         ANSWER("test/model", CHOICE(0, "<think>\\n\xC3\xA9\\\"\\u0001", "null", "stop", "1"),
                USAGE(9, 14, 5))},
        {"{" SAY("\xC3\xA9") ",\"logprobs\":true,\"top_logprobs\":2}",
         ANSWER(
             "test/model",
             CHOICE(
                 0, "<think>\\n\xC3\xA9",
                 "{\"content\":["
                 "{\"token\":\"\xEF\xBF\xBD\",\"bytes\":[195],\"logprob\":-0.5,"
                 "\"top_logprobs\":[{\"token\":\"\xEF\xBF\xBD\",\"bytes\":[195],\"logprob\":-0.5},"
                 "{\"token\":\"\xEF\xBF\xBD\",\"bytes\":[196],\"logprob\":-1.5}]},"
                 "{\"token\":\"\xEF\xBF\xBD\",\"bytes\":[169],\"logprob\":-0.5,"
                 "\"top_logprobs\":[{\"token\":\"\xEF\xBF\xBD\",\"bytes\":[169],\"logprob\":-0.5},"
                 "{\"token\":\"\xEF\xBF\xBD\",\"bytes\":[170],\"logprob\":-1.5}]},"
                 "{\"token\":\"<｜end▁of▁sentence｜>\",\"bytes\":[60,239,189,156,101,110,100,226,150,"
                 "129,111,102,226,150,129,115,101,110,116,101,110,99,101,239,189,156,62],"
                 "\"logprob\":-0.5,\"top_logprobs\":[{\"token\":\"<｜end▁of▁sentence｜>\","
                 "\"bytes\":[60,239,189,156,101,110,100,226,150,129,111,102,226,150,129,115,101,"
                 "110,116,101,110,99,101,239,189,156,62],\"logprob\":-0.5},{\"token\":\"<｜User｜>\","
                 "\"bytes\":[60,239,189,156,85,115,101,114,239,189,156,62],\"logprob\":-1.5}]}]}",
                 "stop", "1"),
             USAGE(7, 10, 3))},
        {"{" HELLO ",\"logprobs\":true,\"max_tokens\":1}",
         ANSWER("test/model",
                CHOICE(0, "<think>\\nH",
                       "{\"content\":[{\"token\":\"H\",\"bytes\":[72],\"logprob\":-0.5,"
                       "\"top_logprobs\":[]}]}",
                       "length", "null"),
                USAGE(10, 11, 1))},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Reply r = chat(rows[i].body);
        check_reply(rows[i].body, &r, 200, rows[i].answer);
        reply_free(&r);
    }
    CHECK(last_temperature == 0.6f, "%g", last_temperature);
    Reply r =
        chat("{" HELLO ",\"temperature\":0,\"seed\":-1,\"n\":2,\"rid\":\"mine\",\"max_tokens\":1,"
             "\"logit_bias\":{\"5\":1,\"7\":2,\"005\":-3.5}}");
    CHECK(last_temperature == 0 && last_seed[0] == UINT64_MAX && last_seed[1] == 0 &&
          last_bias == -3.5f);
    CHECK(!strncmp(r.body.data, "{\"id\":\"mine_0\",", 15), "%s", r.body.data);
    reply_free(&r);
    server.options.enable_cache_report = true;
    r = chat("{" HELLO ",\"max_tokens\":1}");
    CHECK(strstr(r.body.data, "\"prompt_tokens_details\":{\"cached_tokens\":0}}}"), "%s",
          r.body.data);
    reply_free(&r);
    server.options.enable_cache_report = false;
    r = chat("{" SAY("nan") "}");
    check_reply("nan", &r, 500,
                ERROR_F(500, "InternalServerError",
                        "the model gave a value that is not a number at position 10"));
    CHECK(!r.ended);
    reply_free(&r);
    server.think = false;
    r = chat("{" SAY("Hi") "}");
    check_reply("no think", &r, 200,
                ANSWER("test/model", CHOICE(0, "Hi", "null", "stop", "1"), USAGE(5, 8, 3)));
    reply_free(&r);
    server.think = true;
}

#define CHUNK(index, role, content, logprobs, reason, matched, usage)                              \
    "data: {" ID ",\"object\":\"chat.completion.chunk\",\"created\":0000000000,"                   \
    "\"model\":\"test/model\",\"choices\":[{\"index\":" #index ",\"delta\":{\"role\":" role        \
    ",\"content\":\"" content "\",\"tool_calls\":null},\"logprobs\":" logprobs                     \
    ",\"finish_reason\":" reason ",\"matched_stop\":" matched "}],\"usage\":" usage "}\n\n"
#define PLAIN(content) CHUNK(0, "null", content, "null", "null", "null", "null")
#define HEADS CHUNK(0, "\"assistant\"", "", "null", "null", "null", "null") PLAIN("<think>\\n")
#define TOKEN(c, byte)                                                                             \
    "{\"content\":[{\"token\":\"" c "\",\"bytes\":[" #byte                                         \
    "],\"logprob\":-0.5,\"top_logprobs\":[]}]}"
#define DONE "data: [DONE]\n\n"

static void test_stream(void) {
    static const struct { const char *body, *answer;
    } rows[] = {
        {"{\"stream\":true," SAY("Hi!") "}",
         HEADS PLAIN("H") PLAIN("i") PLAIN("!")
             CHUNK(0, "null", "", "null", "\"stop\"", "1", "null") DONE},
        {"{\"stream\":true," SAY("Hi!") ",\"max_tokens\":2}",
         HEADS PLAIN("H") CHUNK(0, "null", "i", "null", "\"length\"", "null", "null") DONE},
        {"{\"stream\":true," SAY("Hi!") ",\"max_tokens\":0}",
         HEADS CHUNK(0, "null", "", "null", "\"length\"", "null", "null") DONE},
        // Text that may be a stop string's head is held back, characters are whole.
        {"{\"stream\":true," SAY("a\xC3\xA9xyz") ",\"stop\":[\"xyq\",\"yz\"]}",
         HEADS PLAIN("a") PLAIN("\xC3\xA9")
             CHUNK(0, "null", "x", "null", "\"stop\"", "\"yz\"", "null") DONE},
        {"{\"stream\":true," SAY("\xC3\xA9") ",\"logprobs\":true,\"max_tokens\":2}",
         HEADS CHUNK(0, "null", "", TOKEN("\xEF\xBF\xBD", 195), "null", "null", "null") CHUNK(
             0, "null", "\xC3\xA9", TOKEN("\xEF\xBF\xBD", 169), "\"length\"", "null", "null") DONE},
        {"{\"stream\":true," SAY(
             "Hi") ",\"max_tokens\":2,\"stream_options\":{\"include_usage\":true}}",
         HEADS PLAIN("H") CHUNK(
             0, "null", "i", "null", "\"length\"", "null",
             "null") "data: {" ID
                     ",\"object\":\"chat.completion.chunk\",\"created\":0000000000,"
                     "\"model\":\"test/model\",\"choices\":[],"
                     "\"usage\":{" USAGE(7, 9, 2) "}}\n\n" DONE},
        {"{\"stream\":true," SAY(
             "Hi") ",\"max_tokens\":2,\"stream_options\":{\"continuous_usage_stats\":true}}",
         CHUNK(0, "\"assistant\"", "", "null", "null", "null", "{" USAGE(7, 8, 1) "}")
             CHUNK(0, "null", "<think>\\n", "null", "null", "null", "{" USAGE(7, 8, 1) "}")
                 CHUNK(0, "null", "H", "null", "null", "null", "{" USAGE(7, 8, 1) "}") CHUNK(
                     0, "null", "i", "null", "\"length\"", "null", "{" USAGE(7, 9, 2) "}") DONE},
        {"{\"stream\":true," SAY("nan") "}",
         HEADS PLAIN("n") PLAIN("a") "data: {\"error\":" ERROR_F(
             500, "InternalServerError",
             "the model gave a value that is not a number at position 10") "}\n\n" DONE},
        {"{\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"},"
         "{\"role\":\"assistant\",\"content\":\"a\"}],\"max_tokens\":1}",
         CHUNK(0, "\"assistant\"", "", "null", "null", "null", "null")
             CHUNK(0, "null", "H", "null", "\"length\"", "null", "null") DONE},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Reply r = chat(rows[i].body);
        check_reply(rows[i].body, &r, 200, rows[i].answer);
        CHECK(
            strstr(
                r.head,
                "Content-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: "
                "chunked\r\n") &&
                strstr(r.head, "Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n"),
            "%s", r.head);
        reply_free(&r);
    }
    int fd = dial();  // an error in a stream closes the connection
    send_text(fd, post_text("/v1/chat/completions", "{\"stream\":true," SAY("nan") "}"));
    Reply r = reply_read(fd, false);
    char c;
    CHECK(recv(fd, &c, 1, 0) == 0);
    reply_free(&r);
    close(fd);
    r = chat("{\"stream\":true," SAY("Hello") ",\"n\":3}");
    int roles = 0, tags = 0, ends = 0;
    for (char *s = r.body.data; (s = strstr(s, "\"role\":\"assistant\"")); s++) roles++;
    for (char *s = r.body.data; (s = strstr(s, "<think>")); s++) tags++;
    for (char *s = r.body.data; (s = strstr(s, "\"finish_reason\":\"stop\"")); s++) ends++;
    CHECK(roles == 3 && tags == 3 && ends == 3 && strstr(r.body.data, "\"index\":2"), "%s",
          r.body.data);
    reply_free(&r);
    server.options.stream_interval = 3;
    r = chat("{\"stream\":true," SAY("abcdefg") "}");
    check_reply("interval", &r, 200, HEADS PLAIN("a") PLAIN("bc") PLAIN("def")
                CHUNK(0, "null", "g", "null", "\"stop\"", "1", "null") DONE);
    reply_free(&r);
    server.options.stream_interval = 1;
}

#define TEXT(index, text, logprobs, reason, matched) "{\"index\":" #index ",\"text\":\"" text \
    "\",\"logprobs\":" logprobs ",\"finish_reason\":" reason ",\"matched_stop\":" matched "}"
#define TEXTS(id, choices, usage) "{" id ",\"object\":\"text_completion\",\"created\":0000000000," \
    "\"model\":\"test/model\",\"choices\":[" choices "],\"usage\":" usage "}"
#define COUNTED(p, t, c) "{" USAGE(p, t, c) ",\"prompt_tokens_details\":null}"
#define COUNTED_CACHED USAGE(4, 10, 6) ",\"prompt_tokens_details\":{\"cached_tokens\":4}}}"
#define PIECE(index, text, reason, matched) \
    "data: " TEXTS(ID, TEXT(index, text, "null", reason, matched), "null") "\n\n"
#define BOS_TEXT "<｜begin▁of▁sentence｜>"

static void test_completions(void) {
    static const struct { const char *body, *answer;
    } rows[] = {
        {"{\"prompt\":\"Hi\"}",
         TEXTS(ID, TEXT(0, "Hi", "null", "\"stop\"", "1"), COUNTED(3, 6, 3))},
        {"{\"prompt\":\"abcdefghijklmnopqrst\",\"model\":\"test/model\",\"best_of\":3}",
         // 16 tokens
         TEXTS(ID, TEXT(0, "abcdefghijklmnop", "null", "\"length\"", "null"), COUNTED(21, 37, 16))},
        {"{\"prompt\":\"" BOS_TEXT "Hi\",\"max_tokens\":1}",
         TEXTS(ID, TEXT(0, "H", "null", "\"length\"", "null"), COUNTED(3, 4, 1))},
        {"{\"prompt\":[78],\"max_tokens\":1,\"echo\":true}",
         TEXTS(ID, TEXT(0, "HH", "null", "\"length\"", "null"), COUNTED(1, 2, 1))},
        {"{\"prompt\":[[78],[111,78]],\"max_tokens\":1,\"n\":2}",
         TEXTS(ID, TEXT(0, "H", "null", "\"length\"", "null") ","
               TEXT(1, "H", "null", "\"length\"", "null") ","
               TEXT(2, "i", "null", "\"length\"", "null") ","
               TEXT(3, "i", "null", "\"length\"", "null"), COUNTED(3, 7, 4))},
        {"{\"prompt\":[\"a\",\"b\"],\"max_tokens\":0,\"rid\":\"r\",\"echo\":true}",
         TEXTS("\"id\":\"r_0\"", TEXT(0, "a", "null", "\"length\"", "null") ","
               TEXT(1, "b", "null", "\"length\"", "null"), COUNTED(4, 4, 0))},
        {"{\"prompt\":\"Hi\",\"max_tokens\":1,\"logprobs\":0}",
         TEXTS(ID, TEXT(0, "H", "{\"text_offset\":[-1],\"token_logprobs\":[-0.5],"
               "\"tokens\":[\"H\"],\"top_logprobs\":[]}", "\"length\"", "null"), COUNTED(3, 4, 1))},
        {"{\"prompt\":\"Hi\",\"max_tokens\":1,\"logprobs\":2,\"echo\":true}",
         TEXTS(ID, TEXT(0, "HiH", "{\"text_offset\":[-1,-1,-1,-1],\"token_logprobs\":[null,-0.25,"
               "-0.5,-0.5],\"tokens\":[\"" BOS_TEXT "\",\"H\",\"i\",\"H\"],\"top_logprobs\":[null,"
               "{\"H\":-0.25,\"I\":-1.25},{\"i\":-0.5,\"j\":-1.5},{\"H\":-0.5,\"I\":-1.5}]}",
               "\"length\"", "null"), COUNTED(3, 4, 1))},
        {"{\"prompt\":[78],\"max_tokens\":0,\"logprobs\":3,\"echo\":true}",
         TEXTS(ID, TEXT(0, "H", "{\"text_offset\":[-1],\"token_logprobs\":[null],"
               "\"tokens\":[\"H\"],\"top_logprobs\":[null]}", "\"length\"", "null"),
               COUNTED(1, 1, 0))},
        // Of ids with equal texts the likelier stays: here four bytes that are no characters.
        {"{\"prompt\":[201],\"max_tokens\":1,\"logprobs\":4}",
         TEXTS(ID, TEXT(0, "\xEF\xBF\xBD", "{\"text_offset\":[-1],\"token_logprobs\":[-0.5],"
               "\"tokens\":[\"\xEF\xBF\xBD\"],\"top_logprobs\":[{\"\xEF\xBF\xBD\":-0.5}]}",
               "\"length\"", "null"), COUNTED(1, 2, 1))},
        {"{\"prompt\":\"Hi\",\"stream\":true,\"echo\":true,"
         "\"stream_options\":{\"include_usage\":true}}",
         PIECE(0, "HiH", "null", "null") PIECE(0, "i", "null", "null")
         PIECE(0, "", "\"stop\"", "1") "data: " TEXTS(ID, "", "{" USAGE(3, 6, 3) "}") "\n\n" DONE},
        {"{\"prompt\":\"\xC3\xA9x\",\"stream\":true,\"max_tokens\":3}",
         PIECE(0, "\xC3\xA9", "null", "null") PIECE(0, "x", "\"length\"", "null") DONE},
        {"{\"prompt\":\"H\",\"stream\":true,\"max_tokens\":1,\"logprobs\":0,\"echo\":true}",
         "data: " TEXTS(ID, TEXT(0, "HH", "{\"text_offset\":[-1,-1,-1],\"token_logprobs\":[null,"
         "-0.25,-0.5],\"tokens\":[\"" BOS_TEXT "\",\"H\",\"H\"],\"top_logprobs\":[]}",
         "\"length\"", "null"),
         "null") "\n\n" DONE},
    };
    static const struct { const char *body, *answer;
    } bad[] = {
        {"{}", REFUSED("prompt", "missing, want a string or an array")},
        {"{\"prompt\":3}", REFUSED("prompt", "got number, want string or array")},
        {"{\"prompt\":[]}", REFUSED("prompt", "got an empty array, want at least one token id")},
        {"{\"prompt\":[[1],[]]}",
         REFUSED("prompt[1]", "got an empty array, want at least one token id")},
        {"{\"prompt\":[\"a\",[1]]}", REFUSED("prompt[1]", "got array, want string")},
        {"{\"prompt\":[[1],\"a\"]}", REFUSED("prompt[1]", "got string, want array")},
        {"{\"prompt\":[1,\"a\"]}", REFUSED("prompt[1]", "got string, want number")},
        {"{\"prompt\":[[1],[2,262]]}",
         REFUSED("prompt[1][1]", "got 262, want a token id in 0..261")},
        {"{\"prompt\":\"a\",\"logprobs\":true}", REFUSED("logprobs", "got bool, want number")},
        {"{\"prompt\":\"a\",\"logprobs\":65}",
         REFUSED("logprobs", "got 65, want an integer in 0..64")},
        {"{\"prompt\":\"a\",\"echo\":1}", REFUSED("echo", "got number, want bool")},
        {"{\"prompt\":[\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\",\"h\",\"i\"],\"n\":114}",
         REFUSED("prompt", "got 1026 sequences, want at most 1024")},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        check_ask(post_text("/v1/completions", rows[i].body), 200, rows[i].answer);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        check_ask(post_text("/v1/completions", bad[i].body), 400, bad[i].answer);
    // What is echoed is the prompt as it was cut.
    int pool = server.max_total_tokens;
    const char *four = "{\"prompt\":[78,79,80,81],\"max_tokens\":0,\"echo\":true}";
    server.options.allow_auto_truncate = true, server.max_total_tokens = 3;
    Reply r = ask(post_text("/v1/completions", four));
    CHECK(strstr(r.body.data, "\"text\":\"HI\","), "%s", r.body.data);
    reply_free(&r);
    server.options.allow_auto_truncate = false, server.max_total_tokens = pool;
    r = ask(post_text("/v1/completions", "{\"prompt\":[\"a\",\"b\"],\"n\":2,\"seed\":5}"));
    CHECK(last_seed[0] == 5 && last_seed[1] == 6 && last_seed[2] == 5 && last_seed[3] == 6);
    CHECK(last_temperature == 0.6f, "%g", last_temperature);
    reply_free(&r);
    server.options.enable_cache_report = true, cached = 2;  // of each prompt, once
    r = ask(post_text("/v1/completions", "{\"prompt\":[\"a\",\"b\"],\"n\":3,\"max_tokens\":1}"));
    CHECK(strstr(r.body.data, COUNTED_CACHED), "%s", r.body.data);
    server.options.enable_cache_report = false, cached = 0;
    reply_free(&r);
}

#define INFO(id, reason, p, lists, c) "\"meta_info\":{\"id\":\"" id "\",\"finish_reason\":" reason \
    ",\"prompt_tokens\":" #p "," lists "\"completion_tokens\":" #c ",\"cached_tokens\":0}"
#define HEX "iiiiiiiiiiiiiiiiiiiiiiiiiiiiiiii"
#define NATIVE(text, reason, p, c) "{\"text\":\"" text "\"," INFO(HEX, reason, p, "", c) "}"
#define LENGTH(n) "{\"type\":\"length\",\"length\":" #n "}"
#define REFUSED_G(message) "{\"error\":{\"message\":\"" message "\"}}"

static void test_native(void) {
    static const struct { const char *body, *answer;
    } rows[] = {
        {"{\"text\":\"Hi\"}", NATIVE("Hi", "{\"type\":\"stop\",\"matched\":1}", 3, 3)},
        {"{\"text\":\"Hi\",\"sampling_params\":null,\"lora_path\":null,\"return_logprob\":false,"
         "\"logprob_start_len\":-1}", NATIVE("Hi", "{\"type\":\"stop\",\"matched\":1}", 3, 3)},
        {"{\"input_ids\":[78,111],\"sampling_params\":{\"max_new_tokens\":1}}",
         NATIVE("H", LENGTH(1), 2, 1)},
        {"{\"text\":\"Hello\",\"sampling_params\":{\"stop\":[\"ll\"],\"max_tokens\":1}}",
         NATIVE("He", "{\"type\":\"stop\",\"matched\":\"ll\"}", 6, 4)},
        // An array of one is an array, and n > 1 makes one.
        {"{\"text\":[\"H\"],\"sampling_params\":{\"max_new_tokens\":0}}",
         "[" NATIVE("", LENGTH(0), 2, 0) "]"},
        {"{\"text\":\"H\",\"sampling_params\":{\"max_new_tokens\":1,\"n\":2}}",
         "[" NATIVE("H", LENGTH(1), 2, 1) "," NATIVE("H", LENGTH(1), 2, 1) "]"},
        {"{\"text\":[\"H\",\"ab\"],\"sampling_params\":[{\"max_new_tokens\":1,\"n\":1},"
         "{\"max_new_tokens\":2,\"min_new_tokens\":1}],\"rid\":[\"one\",\"two\"]}",
         "[{\"text\":\"H\"," INFO("one", LENGTH(1), 2, "", 1) "},"
         "{\"text\":\"ab\"," INFO("two", LENGTH(2), 3, "", 2) "}]"},
        {"{\"text\":[\"H\",\"a\"],\"sampling_params\":{\"max_new_tokens\":1},\"rid\":\"r\"}",
         "[{\"text\":\"H\"," INFO("r_0", LENGTH(1), 2, "", 1) "},"
         "{\"text\":\"a\"," INFO("r_1", LENGTH(1), 2, "", 1) "}]"},
        {"{\"input_ids\":[[78],[111]],\"sampling_params\":{\"max_new_tokens\":1,\"n\":2},"
         "\"rid\":[\"a\",\"b\"]}",
         "[{\"text\":\"H\"," INFO("a_0", LENGTH(1), 1, "", 1) "},"
         "{\"text\":\"H\"," INFO("a_1", LENGTH(1), 1, "", 1) "},"
         "{\"text\":\"i\"," INFO("b_0", LENGTH(1), 1, "", 1) "},"
         "{\"text\":\"i\"," INFO("b_1", LENGTH(1), 1, "", 1) "}]"},
        {"{\"input_ids\":[0,78],\"sampling_params\":{\"max_new_tokens\":1},"
         "\"return_logprob\":true}",
         "{\"text\":\"H\"," INFO(HEX, LENGTH(1), 2, "\"input_token_logprobs\":[],"
         "\"output_token_logprobs\":[[-0.5,78,null]],", 1) "}"},
        {"{\"input_ids\":[0,78,111],\"sampling_params\":{\"max_new_tokens\":1},"
         "\"return_logprob\":true,\"logprob_start_len\":0,\"top_logprobs_num\":1}",
         "{\"text\":\"H\"," INFO(HEX, LENGTH(1), 3,
         "\"input_token_logprobs\":[[null,0,null],[-0.25,78,null],[-0.5,111,null]],"
         "\"output_token_logprobs\":[[-0.5,78,null]],"
         "\"input_top_logprobs\":[null,[[-0.25,78,null]],[[-0.5,111,null]]],"
         "\"output_top_logprobs\":[[[-0.5,78,null]]],", 1) "}"},
        // Values or arrays of them: logprobs of the second prompt alone, from its last token.
        {"{\"input_ids\":[[0,78],[0,78,111]],\"sampling_params\":{\"max_new_tokens\":1},"
         "\"return_logprob\":[false,true],\"logprob_start_len\":[1,1],"
         "\"return_text_in_logprobs\":true}",
         "[" NATIVE("H", LENGTH(1), 2, 1) ",{\"text\":\"H\"," INFO(HEX, LENGTH(1), 3,
         "\"input_token_logprobs\":[[-0.5,111,\"i\"]],\"output_token_logprobs\":[[-0.5,78,"
         "\"H\"]],", 1)
         "}]"},
        {"{\"text\":\"Hi\",\"stream\":true}",
         "data: " NATIVE("H", "null", 3, 1) "\n\ndata: " NATIVE("Hi", "null", 3, 2) "\n\ndata: "
         NATIVE("Hi", "{\"type\":\"stop\",\"matched\":1}", 3, 3) "\n\n" DONE},
        // An event for each token, whether or not the text grew.
        {"{\"text\":\"\xC3\xA9\",\"stream\":true,\"sampling_params\":{\"max_new_tokens\":2},"
         "\"return_logprob\":true}",
         "data: {\"text\":\"\"," INFO(HEX, "null", 3, "\"input_token_logprobs\":[],"
         "\"output_token_logprobs\":[[-0.5,201,null]],", 1) "}\n\n"
         "data: {\"text\":\"\xC3\xA9\"," INFO(HEX, LENGTH(2), 3, "\"input_token_logprobs\":[],"
         "\"output_token_logprobs\":[[-0.5,201,null],[-0.5,175,null]],", 2) "}\n\n" DONE},
        {"{\"text\":[\"H\"],\"stream\":true,\"sampling_params\":{\"max_new_tokens\":1,\"n\":2}}",
         "data: {\"text\":\"H\"," INFO(HEX, LENGTH(1), 2, "", 1) ",\"index\":0}\n\n"
         "data: {\"text\":\"H\"," INFO(HEX, LENGTH(1), 2, "", 1) ",\"index\":1}\n\n" DONE},
        {"{\"text\":\"nan\",\"stream\":true,\"sampling_params\":{\"max_new_tokens\":3}}",
         "data: " NATIVE("n", "null", 4, 1) "\n\ndata: " NATIVE("na", "null", 4, 2) "\n\ndata: "
         REFUSED_G("the model gave a value that is not a number at position 6") "\n\n" DONE},
    };
    static const struct { const char *body, *answer;
    } bad[] = {
        {"{}", REFUSED_G("text, input_ids: got neither, want exactly one")},
        {"{\"text\":\"a\",\"input_ids\":[1]}",
         REFUSED_G("text, input_ids: got both, want exactly one")},
        {"{\"text\":1}", REFUSED_G("text: got number, want string or array")},
        {"{\"text\":[]}", REFUSED_G("text: got an empty array, want at least one prompt")},
        {"{\"text\":[\"a\",1]}", REFUSED_G("text[1]: got number, want string")},
        {"{\"text\":[[1]]}", REFUSED_G("text[0]: got array, want string")},
        {"{\"input_ids\":\"a\"}", REFUSED_G("input_ids: got string, want array")},
        {"{\"input_ids\":[\"a\"]}", REFUSED_G("input_ids[0]: got string, want number")},
        {"{\"input_ids\":[1,2,3,262]}",
         REFUSED_G("input_ids[3]: got 262, want a token id in 0..261")},
        {"{\"input_ids\":[[1],[2,-1]]}",
         REFUSED_G("input_ids[1][1]: got -1, want a token id in 0..261")},
        {"{\"text\":\"a\",\"sampling_params\":3}",
         REFUSED_G("sampling_params: got number, want object")},
        {"{\"text\":\"a\",\"sampling_params\":{\"n\":0}}",
         REFUSED_G("sampling_params.n: got 0, want an integer in 1..128")},
        {"{\"text\":\"a\",\"sampling_params\":{\"max_new_tokens\":-1}}",
         REFUSED_G("sampling_params.max_new_tokens: got -1, want an integer in 0..2147483647")},
        {"{\"text\":\"a\",\"sampling_params\":{\"min_new_tokens\":129}}",
         REFUSED_G("sampling_params.min_new_tokens: got 129, want an integer in 0..128")},
        {"{\"text\":\"a\",\"sampling_params\":{\"regex\":\"x\"}}",
         REFUSED_G("sampling_params.regex: not supported by this version of r1")},
        {"{\"text\":\"a\",\"image_data\":\"x\"}",
         REFUSED_G("image_data: not supported by this version of r1")},
        {"{\"text\":[\"a\",\"b\"],\"sampling_params\":[{}]}",
         REFUSED_G("sampling_params: got 1 values, want one for each prompt, 2")},
        {"{\"text\":[\"a\",\"b\"],\"sampling_params\":[{},{\"logit_bias\":{\"2\":101}}]}",
         REFUSED_G("sampling_params[1].logit_bias.2: got 101, want a number in [-100, 100]")},
        {"{\"text\":[\"a\",\"b\"],\"sampling_params\":[{},{\"stop\":[\"x\",\"\"]}]}",
         REFUSED_G("sampling_params[1].stop[1]: got 0 bytes, want 1..1024")},
        {"{\"text\":[\"a\",\"b\"],\"sampling_params\":[{\"n\":2},null]}",
         REFUSED_G("sampling_params[1].n: got 1, want 2, as for the first prompt")},
        {"{\"text\":[\"a\",\"b\"],\"rid\":[\"a\",3]}",
         REFUSED_G("rid[1]: got number, want string")},
        {"{\"text\":[\"a\",\"b\"],\"rid\":[\"a\",\"a\"]}",
         REFUSED_G("rid: got \\\"a\\\", which is still running")},
        {"{\"text\":\"Hi\",\"logprob_start_len\":3}",
         REFUSED_G("logprob_start_len: got 3, want an integer in -1..2")},
        {"{\"text\":[\"a\",\"b\"],\"logprob_start_len\":[0,-2]}",
         REFUSED_G("logprob_start_len[1]: got -2, want an integer >= -1")},
        {"{\"text\":\"a\",\"top_logprobs_num\":65}",
         REFUSED_G("top_logprobs_num: got 65, want an integer in 0..64")},
        {"{\"text\":\"a\",\"stream\":1}", REFUSED_G("stream: got number, want bool")},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        check_ask(post_text("/generate", rows[i].body), 200, rows[i].answer);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        check_ask(post_text("/generate", bad[i].body), 400, bad[i].answer);
    CHECK(last_temperature == 1, "%g", last_temperature);
    check_ask("PUT /generate HTTP/1.1\r\nContent-Length: 13\r\n\r\n{\"text\":\"Hi\"}", 200,
              rows[0].answer);
    check_ask("GET /generate HTTP/1.1\r\n\r\n", 405,
              REFUSED_G("GET /generate: method not allowed, want POST or PUT"));
    // Each prompt has its own bias and seed.
    Reply r = ask(post_text("/generate", "{\"text\":[\"a\",\"b\"],\"sampling_params\":[{\"n\":2,"
                            "\"sampling_seed\":7,\"logit_bias\":{\"5\":1}},{\"n\":2,\"seed\":-1,"
                            "\"logit_bias\":{\"5\":2,\"6\":3}}]}"));
    CHECK(r.status == 200 && last_seed[0] == 7 && last_seed[1] == 8 && last_seed[2] == UINT64_MAX &&
          last_seed[3] == 0);
    CHECK(biases[0] == 1 && biases[1] == 1 && biases[2] == 2 && biases[3] == 2);
    reply_free(&r);
    cached = 3;
    r = ask(post_text("/generate", "{\"text\":\"Hello\"}"));
    CHECK(strstr(r.body.data, "\"completion_tokens\":6,\"cached_tokens\":3}}"), "%s", r.body.data);
    reply_free(&r);
    cached = 0;
    server.options.stream_interval = 2;
    r = ask(post_text("/generate", "{\"stream\":true,\"text\":\"abcde\"}"));
    check_reply("interval", &r, 200, "data: " NATIVE("a", "null", 6, 1) "\n\ndata: "
                NATIVE("ab", "null", 6, 2) "\n\ndata: " NATIVE("abcd", "null", 6, 4) "\n\ndata: "
                NATIVE("abcde", "{\"type\":\"stop\",\"matched\":1}", 6, 6) "\n\n" DONE);
    reply_free(&r);
    server.options.stream_interval = 1;
}

// Appends the values of "key":"..." as they stand there; false where there is none.
static bool join(Buf *out, const char *json, const char *key) {
    char name[40];
    int n = snprintf(name, sizeof name, "\"%s\":\"", key);
    bool any = false;
    buf_str(out, "");
    for (const char *s = json; (s = strstr(s, name)); any = true) {
        const char *end = s += n;
        while (*end != '"') end += 1 + (*end == '\\');
        buf_add(out, s, (size_t)(end - s));
    }
    return any;
}

// The same fields come out in one piece, byte by byte, and held back to the end by a stop string.
static void check_reasoning(const char *text, const char *thought, const char *content) {
    static const char *const how[] = {"", ",\"stream\":true", ",\"stream\":true,\"stop\":\"%s!\"",
                                      ",\"stop\":\"%s!\"",
                                      ",\"stream\":true,\"stream_reasoning\":false"};
    for (size_t i = 0; i < sizeof how / sizeof *how; i++) {
        Buf body = {0}, got[2] = {{0}};
        buf_printf(&body, "{\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}]", text);
        buf_printf(&body, how[i], text);
        buf_str(&body, "}");
        Reply r = chat(body.data);
        bool stream = strstr(how[i], "stream");
        bool had_thought = join(&got[0], r.body.data, "reasoning_content");
        bool had_content = join(&got[1], r.body.data, "content");
        CHECK(!strcmp(got[0].data, thought ? thought : "") && had_thought == !!thought, "%s: %s",
              body.data, r.body.data);
        CHECK(!strcmp(got[1].data, content ? content : "") &&
              (stream ? had_content == (content && *content) : had_content == !!content), "%s: %s",
              body.data, r.body.data);
        int thoughts = 0;
        for (char *s = r.body.data; (s = strstr(s, "\"reasoning_content\":\"")); s++) thoughts++;
        if (strstr(how[i], "false")) CHECK(thoughts == !!thought, "%s", r.body.data);
        reply_free(&r), buf_free(&body), buf_free(&got[0]), buf_free(&got[1]);
    }
}

static void test_reasoning(void) {
    static const struct { bool think; const char *text, *thought, *content;
    } rows[] = {
        {true, "a b</think>c", "a b", "c"},
        {true, "\\n a \\n</think> \\n\\nc \\n", "a", "c \\n"},
        {true, "abc", "abc", NULL},
        {true, " abc  ", "abc", NULL},
        {true, "</think>x", NULL, "x"},
        {true, " </think> ", NULL, ""},
        {true, "a</think>", "a", ""},
        {true, "a </thin", "a </thin", NULL},
        {true, "a</think</think>b", "a</think", "b"},
        {true, "a<</think>b", "a<", "b"},
        {true, " <think>a</think>b</think>c<think>", "a", "b</think>c<think>"},
        {true, "<thin", "<thin", NULL},
        {true, "<think>", NULL, NULL},
        {false, "abc", NULL, "abc"},
        {false, "  abc ", NULL, "  abc "},
        {false, "\\n<think> a\xC3\xA9 </think> b", "a\xC3\xA9", "b"},
        {false, "<think>a", "a", NULL},
        {false, "<thin", NULL, "<thin"},
        {false, "x<think>a</think>", NULL, "x<think>a</think>"},
    };
    server.options.reasoning_parser = "deepseek-r1";
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        server.think = rows[i].think;
        check_reasoning(rows[i].text, rows[i].thought, rows[i].content);
    }
    server.think = true;
#define SPLIT(index, role, content, thought, reason, matched)                                      \
    "data: {" ID ",\"object\":\"chat.completion.chunk\",\"created\":0000000000,"                   \
    "\"model\":\"test/model\",\"choices\":[{\"index\":" #index ",\"delta\":{\"role\":" role        \
    ",\"content\":" content ",\"reasoning_content\":" thought ",\"tool_calls\":null},"             \
    "\"logprobs\":null,\"finish_reason\":" reason ",\"matched_stop\":" matched                     \
    "}],\"usage\":null}\n\n"
    Reply r = chat("{\"stream\":true," SAY("ab</think>c") "}");
    check_reply("reasoning stream", &r, 200,
                SPLIT(0, "\"assistant\"", "null", "null", "null", "null")
                SPLIT(0, "null", "null", "\"a\"", "null", "null")
                SPLIT(0, "null", "null", "\"b\"", "null", "null")
                SPLIT(0, "null", "\"c\"", "null", "null", "null")
                SPLIT(0, "null", "null", "null", "\"stop\"", "1") DONE);
    reply_free(&r);
    r = chat("{" SAY("ab</think>c") "}");
    CHECK(strstr(r.body.data, "\"message\":{\"role\":\"assistant\",\"content\":\"c\","
                 "\"reasoning_content\":\"ab\",\"tool_calls\":null}"), "%s", r.body.data);
    reply_free(&r);
    // A prefill that opened the tag goes on thinking, one that closed it does not.
    r = chat("{\"messages\":[{\"role\":\"user\",\"content\":\"a</think>b\"},"
             "{\"role\":\"assistant\",\"content\":\"<think>x\"}]}");
    CHECK(strstr(r.body.data, "\"content\":\"b\",\"reasoning_content\":\"a\""), "%s", r.body.data);
    reply_free(&r);
    r = chat("{\"messages\":[{\"role\":\"user\",\"content\":\"ab\"},{\"role\":\"assistant\","
             "\"content\":\"<think>x</think>\"}]}");
    CHECK(strstr(r.body.data, "\"content\":\"ab\",\"reasoning_content\":null"), "%s", r.body.data);
    reply_free(&r);
    r = chat("{\"separate_reasoning\":false," SAY("ab</think>c") "}");
    check_reply("not separate", &r, 200, ANSWER("test/model", CHOICE(0, "<think>\\nab</think>c",
                "null", "stop", "1"), USAGE(9, 21, 12)));
    reply_free(&r);
    server.options.reasoning_parser = NULL;
}

static double metric(const char *text, const char *name) {  // -1: it is not there
    Buf b = {0};
    buf_printf(&b, "\n%s ", name);
    const char *at = strstr(text, b.data);
    double value = at ? atof(at + b.len) : -1;
    buf_free(&b);
    return value;
}

#define LABEL "{model_name=\"test/model\"}"
#define LABELS(more) "{model_name=\"test/model\"," more "}"

static void test_metrics(void) {
    server.state = STATE_LOADING;  // it answers at all times
    server.running = 3;
    server.used_tokens = 500;
    server.prompt_tokens = 12345678;
    Reply a = ask("GET /metrics HTTP/1.1\r\n\r\n");
    CHECK(a.status == 200 &&
              strstr(a.head, "Content-Type: text/plain; version=0.0.4; charset=utf-8"),
          "%s", a.head);
    CHECK(metric(a.body.data, "r1:ready" LABEL) == 0);
    CHECK(metric(a.body.data, "sglang:num_running_reqs" LABEL) == 3);
    CHECK(metric(a.body.data, "sglang:token_usage" LABEL) == 0.25);
    CHECK(metric(a.body.data, "sglang:prompt_tokens_total" LABEL) == 12345678);
    server.state = STATE_READY;
    server.running = server.used_tokens = 0;
    server.prompt_tokens = 0;
    reply_free(&(Reply[]){chat("{" HELLO ",\"n\":2}")}[0]);
    reply_free(&(Reply[]){chat("{" SAY("nan") "}")}[0]);
    reply_free(&(Reply[]){ask("GET /health_generate HTTP/1.1\r\n\r\n")}[0]);  // does not count
    Reply b = ask("GET /metrics HTTP/1.1\r\n\r\n");
    static const struct { const char *name; double more;
    } rows[] = {
        {"r1:ready" LABEL, 1},
        {"sglang:generation_tokens_total" LABEL, 14},
        {"sglang:num_requests_total" LABEL, 3},
        {"sglang:time_to_first_token_seconds_count" LABEL, 3},
        {"sglang:inter_token_latency_seconds_count" LABEL, 11},
        {"sglang:inter_token_latency_seconds_bucket" LABELS("le=\"+Inf\""), 11},
        {"sglang:time_per_output_token_seconds_count" LABEL, 3},
        {"sglang:e2e_request_latency_seconds_count" LABEL, 3},
        {"sglang:e2e_request_latency_seconds_bucket" LABELS("le=\"160\""), 3},
        {"r1:aborted_total" LABELS("reason=\"error\""), 1},
        {"r1:aborted_total" LABELS("reason=\"disconnect\""), 0},
        {"r1:http_responses_total" LABELS("code=\"200\""), 3},  // the first /metrics, chat, a probe
        {"r1:http_responses_total" LABELS("code=\"500\""), 1},
        {"r1:http_responses_total" LABELS("code=\"404\""), 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        double before = metric(a.body.data, rows[i].name),
               after = metric(b.body.data, rows[i].name);
        CHECK(before >= 0 && after - before == rows[i].more, "%s: %g, then %g", rows[i].name,
              before, after);
    }
    CHECK(metric(b.body.data, "sglang:e2e_request_latency_seconds_sum" LABEL) >
          metric(a.body.data, "sglang:e2e_request_latency_seconds_sum" LABEL));
    reply_free(&a), reply_free(&b);
}

static void test_control(void) {
    check_ask("GET /server_info HTTP/1.1\r\n\r\n", 200,
              "{\"host\":\"0.0.0.0\",\"port\":30000,\"status\":\"ready\","
              "\"max_total_num_tokens\":2000,\"max_req_input_len\":999,"
              "\"internal_states\":[{\"num_running_reqs\":0,\"num_queue_reqs\":0,"
              "\"num_used_tokens\":0}],\"version\":\"" R1_VERSION "\","
              "\"system_fingerprint\":\"r1-00000000000000ab\"}");
    int before = flushes;
    check_ask("GET /flush_cache HTTP/1.1\r\n\r\n", 200, "Cache flushed.\n");
    Reply r = ask(post_text("/flush_cache", ""));
    CHECK(r.status == 200 && strstr(r.head, "Content-Type: text/plain"), "%s", r.head);
    reply_free(&r);
    CHECK(flushes == before + 2);
    // Three ways to name what is to be aborted; each ends normally, with what it has.
    static const char *const orders[] = {"{\"rid\":\"a1\"}", "{\"rid\":\"a1_0\"}",
                                         "{\"abort_all\":true}"};
    for (int i = 0; i < 3; i++) {
        int fd = dial(), sent = submitted, n = i == 1 ? 2 : 1;
        char body[200];
        snprintf(body, sizeof body, "{\"stream\":%s,\"rid\":\"a1\",\"text\":\"hang\","
                 "\"sampling_params\":{\"n\":%d}}", i == 2 ? "true" : "false", n);
        send_text(fd, post_text("/generate", body));
        CHECK(reaches(&submitted, sent + n));
        r = ask("GET /flush_cache HTTP/1.1\r\n\r\n");
        CHECK(r.status == 400 &&
                  strstr(r.body.data, "Cache not flushed because there are pending requests. "
                                      "#queue-req: 0, #running-req: "),
              "%s", r.body.data);
        reply_free(&r);
        check_ask(post_text("/abort_request", "{\"rid\":\"a\"}"), 200, "");
        check_ask(post_text("/abort_request", orders[i]), 200, "");
        if (n == 2) check_ask(post_text("/abort_request", "{\"rid\":\"a1_1\"}"), 200, "");
        r = reply_read(fd, false);
        CHECK(r.status == 200 && strstr(r.body.data, "\"finish_reason\":{\"type\":\"abort\","
                                                     "\"message\":"),
              "%s", r.body.data);
        reply_free(&r);
        close(fd);
    }
    CHECK(flushes == before + 2);
    check_ask(post_text("/abort_request", "{}"), 400,
              REFUSED_G("rid: missing, want a string, or \\\"abort_all\\\":true"));
    check_ask(post_text("/abort_request", "{\"abort_all\":false}"), 400, NULL);
    check_ask(post_text("/abort_request", "{\"rid\":3}"), 400,
              REFUSED_G("rid: got number, want string"));
    r = ask("GET /metrics HTTP/1.1\r\n\r\n");
    CHECK(metric(r.body.data, "r1:aborted_total" LABELS("reason=\"api\"")) == 4);
    reply_free(&r);
}

static void test_tokenizer(void) {
    static const struct { const char *path, *body; int status; const char *answer;
    } rows[] = {
        {"/tokenize", "{\"prompt\":\"Hi\"}", 200,
         "{\"tokens\":[0,78,111],\"count\":3,\"max_model_len\":1000}"},
        {"/v1/tokenize", "{\"prompt\":\"Hi\",\"add_special_tokens\":false}", 200,
         "{\"tokens\":[78,111],\"count\":2,\"max_model_len\":1000}"},
        {"/tokenize", "{\"prompt\":\"<｜begin▁of▁sentence｜>Hi\"}", 200,
         "{\"tokens\":[0,78,111],\"count\":3,\"max_model_len\":1000}"},
        {"/tokenize", "{\"prompt\":[\"H\",\"\"]}", 200,
         "{\"tokens\":[[0,78],[0]],\"count\":[2,1],\"max_model_len\":1000}"},
        {"/tokenize", "{\"prompt\":[]}", 200,
         "{\"tokens\":[],\"count\":[],\"max_model_len\":1000}"},
        {"/tokenize", "{" SAY("H") "}", 200,
         "{\"tokens\":[0,2,78,3,4,16],\"count\":6,\"max_model_len\":1000}"},
        {"/tokenize", "{}", 400,
         ERROR_F(400, "BadRequestError", "prompt, messages: got neither, want exactly one")},
        {"/tokenize", "{" HELLO ",\"prompt\":\"\"}", 400,
         ERROR_F(400, "BadRequestError", "prompt, messages: got both, want exactly one")},
        {"/tokenize", "{\"prompt\":3}", 400, REFUSED("prompt", "got number, want string")},
        {"/tokenize", "{\"prompt\":[\"a\",3]}", 400,
         REFUSED("prompt[1]", "got number, want string")},
        {"/detokenize", "{\"tokens\":[0,78,111,1]}", 200, "{\"text\":\"Hi\"}"},
        {"/detokenize", "{\"tokens\":[78,1],\"skip_special_tokens\":false}", 200,
         "{\"text\":\"H<｜end▁of▁sentence｜>\"}"},
        {"/detokenize", "{\"tokens\":[[78],[],[201]]}", 200,
         "{\"text\":[\"H\",\"\",\"\xEF\xBF\xBD\"]}"},
        {"/detokenize", "{}", 400, REFUSED("tokens", "missing, want an array")},
        {"/detokenize", "{\"tokens\":[1,262]}", 400,
         REFUSED("tokens[1]", "got 262, want a token id in 0..261")},
        {"/detokenize", "{\"tokens\":[[1],[-1]]}", 400,
         REFUSED("tokens[1][0]", "got -1, want a token id in 0..261")},
        {"/detokenize", "{\"tokens\":[[1],2]}", 400,
         REFUSED("tokens[1]", "got number, want array")},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        check_ask(post_text(rows[i].path, rows[i].body), rows[i].status, rows[i].answer);
    // Long arrays: 40 texts, 40 ids of which the last is wrong, 40 parts of which the last is
    // wrong.
    Buf body = {0}, want = {0};
    buf_str(&body, "{\"prompt\":[\"\"");
    for (int i = 1; i < 40; i++) buf_str(&body, ",\"\"");
    buf_str(&body, "]}");
    buf_str(&want, "{\"tokens\":[[0]");
    for (int i = 1; i < 40; i++) buf_str(&want, ",[0]");
    buf_str(&want, "],\"count\":[1");
    for (int i = 1; i < 40; i++) buf_str(&want, ",1");
    buf_str(&want, "],\"max_model_len\":1000}");
    check_ask(post_text("/tokenize", body.data), 200, want.data);
    body.len = 0;
    buf_str(&body, "{\"tokens\":[[],[");
    for (int i = 0; i < 39; i++) buf_str(&body, "78,");
    buf_str(&body, "-1]]}");
    check_ask(post_text("/detokenize", body.data), 400,
              REFUSED("tokens[1][39]", "got -1, want a token id in 0..261"));
    body.len = 0;  // more than any sequence can have, and more texts than a request may
    buf_str(&body, "{\"tokens\":[78");
    for (int i = 0; i < 1000; i++) buf_str(&body, ",78");
    buf_str(&body, "]}");
    check_ask(post_text("/detokenize", body.data), 400,
              REFUSED("tokens", "got 1001 values, want at most 1000"));
    body.len = 0;
    buf_str(&body, "{\"prompt\":[\"\"");
    for (int i = 0; i < 1024; i++) buf_str(&body, ",\"\"");
    buf_str(&body, "]}");
    check_ask(post_text("/tokenize", body.data), 400,
              REFUSED("prompt", "got 1025 texts, want at most 1024"));
    body.len = 0;
    buf_str(&body, "{\"messages\":[{\"role\":\"user\",\"content\":[");
    for (int i = 0; i < 39; i++) buf_str(&body, "{\"type\":\"text\",\"text\":\"x\"},");
    buf_str(&body, "{}]}]}");
    check_ask(post_text("/v1/chat/completions", body.data), 400,
              REFUSED("messages[0].content[39].type", "got null, want \\\"text\\\""));
    buf_free(&body), buf_free(&want);
    Reply r = chat("{" SAY("Hi") ",\"n\":128,\"logprobs\":true,\"stop\":[\"i\"]}");
    int stopped = 0;
    for (char *s = r.body.data; (s = strstr(s, "\"matched_stop\":\"i\"}")); s++) stopped++;
    CHECK(stopped == 128, "%d", stopped);
    reply_free(&r);
}

// ---- Tests: many clients, and bad ones ----------------------------------------------------------

static void test_disconnect(void) {
    static const char *const bodies[] = {"{" SAY("hang") "}",
                                         "{\"stream\":true," SAY("many 900") ",\"n\":4}"};
    for (int kind = 0; kind < 2; kind++) {
        for (int reset = 0; reset < 2; reset++) {
            int before = cancelled_seen, sent = submitted, fd = dial(), n = kind ? 4 : 1;
            step_us = 10000;
            send_text(fd, post_text("/v1/chat/completions", bodies[kind]));
            CHECK(reaches(&submitted, sent + n));
            usleep(30000);
            int steps = steps_done;
            if (reset)
                setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){1, 0},
                           sizeof(struct linger));
            close(fd);
            CHECK(reaches(&cancelled_seen, before + n), "kind %d, reset %d", kind, reset);
            CHECK(steps_done - steps < 50, "%d steps", steps_done - steps);
        }
    }
    // The client shuts its side down, with a pipelined request unread: still a disconnect.
    int before = cancelled_seen, sent = submitted, fd = dial();
    send_text(fd, post_text("/v1/chat/completions", bodies[0]));
    CHECK(reaches(&submitted, sent + 1));
    send_text(fd, "GET /health HTTP/1.1\r\n\r\n");
    shutdown(fd, SHUT_WR);
    CHECK(reaches(&cancelled_seen, before + 1));
    close(fd);
    // An rid is free again as soon as its sequence is over.
    fd = dial();
    send_text(fd, post_text("/v1/chat/completions", "{\"rid\":\"a_1\"," SAY("hang") "}"));
    CHECK(reaches(&submitted, sent + 2));
    Reply r = chat("{\"rid\":\"a_1\"," HELLO "}");
    check_reply("rid", &r, 400, REFUSED("rid", "got \\\"a_1\\\", which is still running"));
    reply_free(&r);
    r = chat("{\"rid\":\"a\",\"n\":2," HELLO "}");  // its second choice would be a_1, too
    check_reply("rid", &r, 400, REFUSED("rid", "got \\\"a\\\", which is still running"));
    reply_free(&r);
    int two = dial();
    send_text(two, post_text("/v1/chat/completions", "{\"rid\":\"b\",\"n\":2," SAY("hang") "}"));
    CHECK(reaches(&submitted, sent + 4));
    r = chat("{\"rid\":\"b\"," HELLO "}");
    CHECK(r.status == 400, "%d", r.status);
    reply_free(&r);
    r = chat("{\"rid\":\"b_1\"," HELLO "}");
    CHECK(r.status == 400, "%d", r.status);
    reply_free(&r);
    close(fd), close(two);
    CHECK(reaches(&cancelled_seen, before + 4));
    usleep(20000);
    step_us = 0;
    r = chat("{\"rid\":\"a_1\"," HELLO "}");
    CHECK(r.status == 200, "%d", r.status);
    reply_free(&r);
}

// A client that does not read gets the same text in fewer, larger events; nobody waits for it.
static void test_slow_reader(void) {
    server.context_len = server.max_total_tokens = 400000;
    int fd = dial_small(65536);
    step_us = 1;
    send_text(fd, post_text("/v1/chat/completions",
                            "{\"stream\":true,\"logprobs\":true,\"top_logprobs\":64," SAY(
                                "many 3000") "}"));
    usleep(100000);
    double start = now_seconds();
    for (int i = 0; i < 20; i++) {
        Reply r = chat("{" SAY("Hello, world") "}");
        CHECK(r.status == 200);
        reply_free(&r);
    }
    CHECK(now_seconds() - start < 60, "%f", now_seconds() - start);  // and not stall_s
    usleep(500000);
    Buf all = read_stream(fd);
    size_t total = 0, events = 0, longest = 0;
    // memmem and not strstr: under the address sanitizer that one takes the length of the rest each
    // time.
    for (char *s = all.data, *last = s + all.len;
         s && (s = memmem(s, (size_t)(last - s), "data: ", 6)); events++) {
        char *end = memmem(s, (size_t)(last - s), "\n\n", 2);
        if (!end) break;
        char *content = memmem(s, (size_t)(end - s), "\"content\":\"", 11);
        if ((size_t)(end - s) > longest) longest = (size_t)(end - s);
        for (char *x = content ? content + 11 : end; x < end && *x == 'x'; x++) total++;
        s = end;
    }
    CHECK(total == 3000, "%zu", total);
    CHECK(events > 100 && events < 2900 && longest > 20000 && longest < 64 << 10,
          "%zu events, longest %zu", events, longest);
    buf_free(&all);
    close(fd);
    step_us = 0;
    server.context_len = 1000, server.max_total_tokens = 2000;
}

// A /generate event replaces the one that waits: a slow client gets a few of them, whole prefixes,
// and the last one holds everything.
static void test_slow_native(void) {
    server.context_len = server.max_total_tokens = 400000;
    int fd = dial_small(65536), most = 0, events = 0, bad = 0, before = steps_done;
    step_us = 1;
    send_text(fd, post_text("/generate", "{\"stream\":true,\"text\":\"many 20000\","
                            "\"sampling_params\":{\"max_new_tokens\":30000}}"));
    for (int i = 0; i < 1000 && steps_done - before < 21000; i++) usleep(10000);
    Buf all = read_stream(fd);
    const char *start = "data: {\"text\":\"";
    for (char *s = all.data, *last = s + all.len; events >= 0; events++) {
        if (!(s = memmem(s, (size_t)(last - s), start, strlen(start)))) break;
        int n = (int)strspn(s += strlen(start), "x");
        bad += n < most || s[n] != '"';
        most = n, s += n;
    }
    CHECK(most == 20000 && !bad && events > 2 && events < 10000, "%d in %d events", most, events);
    buf_free(&all);
    close(fd);
    step_us = 0;
    server.context_len = 1000, server.max_total_tokens = 2000;
}

// A client that takes no byte of its answer is dropped.
static void test_stall(void) {
    server.context_len = server.max_total_tokens = 400000;
    http_limits.stall_s = 0.3;
    int before = cancelled_seen, fd = dial();
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &(int){2048}, sizeof(int));
    send_text(fd, post_text("/v1/chat/completions",
                            "{\"stream\":true,\"logprobs\":true,\"top_logprobs\":64,"
                            "\"max_tokens\":300000," SAY("many 300000") "}"));
    for (int i = 0; i < 600 && cancelled_seen == before; i++) usleep(50000);
    CHECK(cancelled_seen == before + 1);
    close(fd);
    http_limits = default_limits;
    server.context_len = 1000, server.max_total_tokens = 2000;
}

static void test_many(void) {
    enum { MANY = 1100 };
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    if (files.rlim_cur < 2 * MANY + 100) {
        SKIP("1,100 connections: RLIMIT_NOFILE is %lu", (unsigned long)files.rlim_cur);
        return;
    }
    static int fds[MANY];
    const char *request =
        post_text("/v1/chat/completions", "{\"stream\":true," SAY("Hello, you") "}");
    int good = 0;
    for (int i = 0; i < MANY; i++) fds[i] = dial(), send_text(fds[i], request);
    for (int i = 0; i < MANY; i++) {
        Buf all = read_stream(fds[i]);
        good += strstr(all.data, "\"finish_reason\":\"stop\"") &&
                strstr(all.data, "data: [DONE]");
        buf_free(&all);
        close(fds[i]);
    }
    CHECK(good == MANY, "%d", good);
}

// Random bytes, and requests with random damage, never end the server.
static void test_fuzz(void) {
    srand(1);
    static const struct { const char *path, *body;
    } good[] = {
        {"/v1/chat/completions",
         "{\"max_tokens\":1,\"stop\":[\"a\"],\"logit_bias\":{\"5\":1}," HELLO "}"},
        {"/v1/completions",
         "{\"prompt\":[[1],[2,78]],\"logprobs\":2,\"echo\":true,\"stream\":true}"},
        {"/generate", "{\"text\":[\"a\",\"b\"],\"sampling_params\":[{\"n\":2},{\"n\":2,"
         "\"stop\":\"a\"}],\"rid\":[\"a\",\"b\"],\"return_logprob\":[true,false],"
         "\"logprob_start_len\":0}"},
    };
    http_limits.header_s = http_limits.body_gap_s = http_limits.linger_s = 0.02;
    for (int i = 0; i < 1500; i++) {
        char text[512];
        const char *request = post_text(good[i % 3].path, good[i % 3].body);
        size_t n = strlen(request);
        memcpy(text, request, n);
        for (int k = rand() % 4; k >= 0; k--) text[(size_t)rand() % n] = (char)rand();
        if (i % 10 == 0) for (size_t k = 0; k < n; k++) text[k] = (char)rand();
        int fd = dial();
        send_all(fd, text, n);
        if (i % 4 == 0) shutdown(fd, SHUT_WR);
        char c;
        if (i % 2) while (recv(fd, &c, 1, 0) == 1 && c != '\n') {}
        close(fd);
    }
    http_limits = default_limits;
    check_ask("GET /v1/models HTTP/1.1\r\n\r\n", 200, MODELS);
}

static void test_log(void) {
    char path[] = "/tmp/r1_test_http_log_XXXXXX";
    int log = mkstemp(path), saved = dup(2);
    fflush(stderr);
    dup2(log, 2);
    server.options.log_level = "info";
    check_ask("GET /health HTTP/1.1\r\n\r\n", 200, NULL);
    check_ask("GET /v1/foo?a=%0a HTTP/1.1\r\n\r\n", 404, NULL);
    server.options.log_level = "debug";
    check_ask("GET /health HTTP/1.1\r\n\r\n", 200, NULL);
    server.options.log_level = "error";
    check_ask("GET /v1/foo HTTP/1.1\r\n\r\n", 404, NULL);
    server.options.log_level_http = "info";  // goes before the other, where it is given
    check_ask("GET /v1/bar HTTP/1.1\r\n\r\n", 404, NULL);
    check_ask("GET /metrics HTTP/1.1\r\n\r\n", 200, NULL);
    server.options.log_level_http = NULL;
    dup2(saved, 2);
    close(saved), close(log);
    size_t len;
    char *text = read_file(path, &len);
    unlink(path);
    char *first = strstr(text, "] INFO:     127.0.0.1:");
    CHECK(first && strstr(first, " - \"GET /v1/foo?a=%0a HTTP/1.1\" 404 Not Found\n"), "%s", text);
    CHECK(strstr(text, "\"GET /health HTTP/1.1\" 200 OK\n") > first, "%s", text);
    int lines = 0;
    for (size_t i = 0; i < len; i++) lines += text[i] == '\n';
    CHECK(strstr(text, "\"GET /v1/bar HTTP/1.1\" 404 Not Found\n"), "%s", text);
    CHECK(lines == 3, "%s", text);
    free(text);
}

static void test_drain(void) {
    step_us = 20000;
    int plain = dial(), stream = dial(), idle = dial(), keep = dial(), sent = submitted;
    send_text(plain, post_text("/v1/chat/completions", "{" SAY("Hello") "}"));
    send_text(stream, post_text("/v1/chat/completions",
                                "{\"stream\":true," SAY("Hello, it takes a second") "}"));
    CHECK(reaches(&submitted, sent + 2));
    send_text(keep, "GET /v1/models HTTP/1.1\r\n\r\n");
    reply_free(&(Reply[]){reply_read(keep, false)}[0]);
    double start = now_seconds();
    http_stop(1);
    usleep(50000);
    Reply r = ask("GET /v1/models HTTP/1.1\r\n\r\n");
    check_reply("drain", &r, 503, ERROR_F(503, "ServiceUnavailableError", "r1 is shutting down"));
    CHECK(r.ended);
    reply_free(&r);
    send_text(keep, "GET /health HTTP/1.1\r\n\r\n");
    r = reply_read(keep, false);
    CHECK(r.status == 503 &&
              !strncmp(r.body.data, "{\"status\":\"draining\",\"ready\":false", 34) &&
              strstr(r.body.data, "\"steps\":"),
          "%s", r.body.data);
    reply_free(&r);
    r = reply_read(plain, false);
    CHECK(r.status == 200 && strstr(r.body.data, "Hello"), "%s", r.body.data);
    reply_free(&r);
    r = reply_read(stream, false);
    CHECK(r.status == 200 && strstr(r.body.data, "[DONE]"), "%s", r.body.data);
    reply_free(&r);
    server_wait();
    CHECK(now_seconds() - start < 5, "%f", now_seconds() - start);
    char c;
    CHECK(recv(idle, &c, 1, 0) == 0);
    close(plain), close(stream), close(idle), close(keep);
    // The second stop aborts: answers end normally, with what they have.
    server_start();
    int hang = dial();
    stream = dial();
    sent = submitted;
    send_text(hang, post_text("/v1/chat/completions", "{" SAY("hang") "}"));
    send_text(stream, post_text("/v1/chat/completions", "{\"stream\":true," SAY("many 900") "}"));
    CHECK(reaches(&submitted, sent + 2));
    start = now_seconds();
    http_stop(1);
    usleep(50000);
    http_stop(2);
    r = reply_read(hang, false);
    CHECK(r.status == 200 &&
              strstr(r.body.data, "\"finish_reason\":\"abort\",\"matched_stop\":null"),
          "%s", r.body.data);
    reply_free(&r);
    r = reply_read(stream, false);
    CHECK(r.status == 200 && strstr(r.body.data, "\"finish_reason\":\"abort\"") &&
          strstr(r.body.data, "[DONE]"));
    reply_free(&r);
    server_wait();
    CHECK(now_seconds() - start < 2);
    close(hang), close(stream);
    step_us = 0;
    server_start();
}

// A step that does not end: everybody is told why, and the server ends.
static void test_watchdog(void) {
    int plain = dial(), stream = dial(), native = dial(), probe = dial(), sent = submitted;
    send_text(plain, post_text("/v1/chat/completions", "{" SAY("hang") "}"));
    send_text(stream, post_text("/v1/completions", "{\"stream\":true,\"prompt\":\"hang\"}"));
    send_text(native, post_text("/generate", "{\"stream\":true,\"text\":\"hang\"}"));
    CHECK(reaches(&submitted, sent + 3));
    step_us = 700000;  // asleep the engine answers no probe
    usleep(5000);
    send_text(probe, "GET /health_generate HTTP/1.1\r\n\r\n");
    CHECK(reaches(&submitted, sent + 4));
    server.options.watchdog_timeout = 7;
    server.step_start = now_seconds() - 5;  // not yet
    check_ask("GET /v1/models HTTP/1.1\r\n\r\n", 200, MODELS);
    server.step_start = now_seconds() - 8;
    double start = now_seconds();
    int wake = dial();  // else the server looks around once a second
#define LATE ERROR_F(503, "ServiceUnavailableError", "a step took longer than 7 s")
    Reply r = reply_read(plain, false);
    check_reply("plain", &r, 503, LATE);
    CHECK(r.ended);
    reply_free(&r);
    r = reply_read(stream, false);
    check_reply("stream", &r, 200, "data: {\"error\":" LATE "}\n\n" DONE);
    reply_free(&r);
    r = reply_read(native, false);
    check_reply("native", &r, 200, "data: " REFUSED_G("a step took longer than 7 s") "\n\n" DONE);
    reply_free(&r);
    r = reply_read(probe, false);
    CHECK(r.status == 503 && strstr(r.body.data, "{\"status\":\"failed\",\"ready\":false,") &&
          strstr(r.body.data, ",\"reason\":\"a step took longer than 7 s\",\"ranks\":"), "%s",
          r.body.data);
    reply_free(&r);
    server_wait();
    CHECK(server.state == STATE_FAILED && now_seconds() - start < 3, "%f", now_seconds() - start);
    close(plain), close(stream), close(native), close(probe), close(wake);
    step_us = 0;
    server.step_start = 0;
    server.options.watchdog_timeout = 0;
}

// With a port: serves there until it is killed, to be looked at with curl.
int main(int argc, char **argv) {
    pthread_t engine;
    setvbuf(stdout, NULL, _IOLBF, 0);
    server.options = (Options){.model_path = "/models/r1",
                               .served_model_name = "test/model",
                               .log_level = "error",
                               .stream_interval = 1};
    server.config = (Config){.eos_token_id = EOS, .temperature = 0.6, .top_p = 0.95};
    server.template_kind = TEMPLATE_R1;
    server.think = true;
    server.context_len = 1000, server.max_total_tokens = 2000;
    server.fingerprint = 0xab;
    server.boot = now_seconds();
    server.created = time(NULL);
    server.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    default_limits = http_limits;
    tokenizer_make();
    pthread_create(&engine, NULL, engine_run, NULL);
    if (argc > 1) {
        server.options.log_level = "info";
        server.state = STATE_READY;
        http_serve(http_listen("127.0.0.1", atoi(argv[1])));
        return 0;
    }
    server_start();
    static const struct { const char *name; void (*run)(void);
    } tests[] = {
        {"split", test_split},
        {"pipelining", test_pipelining},
        {"versions", test_versions},
        {"expect", test_expect},
        {"transport errors", test_transport_errors},
        {"limits", test_limits},
        {"timeouts", test_timeouts},
        {"cors and key", test_cors_and_key},
        {"states", test_states},
        {"probe timeout", test_probe_timeout},
        {"field errors", test_field_errors},
        {"chat", test_chat},
        {"stream", test_stream},
        {"completions", test_completions},
        {"native", test_native},
        {"reasoning", test_reasoning},
        {"metrics", test_metrics},
        {"control", test_control},
        {"tokenizer", test_tokenizer},
        {"disconnect", test_disconnect},
        {"slow reader", test_slow_reader},
        {"slow native", test_slow_native},
        {"stall", test_stall},
        {"many", test_many},
        {"fuzz", test_fuzz},
        {"log", test_log},
        {"drain", test_drain},
        {"watchdog", test_watchdog},
    };
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        double start = now_seconds();
        tests[i].run();
        if (getenv("VERBOSE")) printf("%-18s %6.2f s\n", tests[i].name, now_seconds() - start);
    }
    quit = true;
    pthread_join(engine, NULL);
    tokenizer_free(server.tokenizer);
    return test_end();
}
