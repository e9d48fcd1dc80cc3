// tests/test_bench.c: the benchmark's client against a fake server, a thread that answers each
// connection as the prompt in it asks for, and its figures against some that were made by hand.
#include "../bench.c"

#include "test.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sys/wait.h>

// ---- The fake server ----------------------------------------------------------------------------

static int server_port;
static char word[32];                              // a token of a blank and letters
// Answers wait until `wanted` of them were asked for, and fail from the fail_from'th on (0: never).
static atomic_int arrived, flushes, keys, wanted, fail_from;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t all_arrived = PTHREAD_COND_INITIALIZER;

static void send_all(int fd, const char *data, size_t len) {
    for (ssize_t n; len && (n = send(fd, data, len, MSG_NOSIGNAL)) > 0; data += n) len -= (size_t)n;
}

static void send_text(int fd, const char *text) { send_all(fd, text, strlen(text)); }

static void send_chunk(int fd, const Buf *b) {
    Buf chunk = {0};
    buf_printf(&chunk, "%zx\r\n%s\r\n", b->len, b->data);
    send_all(fd, chunk.data, chunk.len);
    buf_free(&chunk);
}

static void send_object(int fd, const char *status, const char *json) {
    char head[128];
    snprintf(head, sizeof head, "HTTP/1.1 %s\r\nContent-Length: %zu\r\n\r\n", status, strlen(json));
    send_text(fd, head), send_text(fd, json);
}

// An event or, with the word `n` times, a whole answer.
static void answer_write(Buf *b, const char *where, int n, bool streamed) {
    Buf text = {0};
    bool native = !strcmp(where, "/generate"), chat = strstr(where, "chat");
    for (int i = 0; i < (native || !streamed ? n : 1); i++) buf_str(&text, word);
    if (native)
        buf_printf(b,
                   "{\"text\":\"%s\",\"meta_info\":{\"id\":\"x\",\"completion_tokens\":%d,"
                   "\"cached_tokens\":0}}",
                   text.data, n);
    else if (!chat)
        buf_printf(b, "{\"choices\":[{\"text\":\"%s\"}]", text.data);
    else
        buf_printf(b, "{\"choices\":[{\"%s\":{\"content\":\"%s\"}}]",
                   streamed ? "delta" : "message", text.data);
    if (!native) buf_printf(b, streamed ? "}" : ",\"usage\":{\"completion_tokens\":%d}}", n);
    buf_free(&text);
}

static void answer(int fd, const char *where, const char *body) {
    const char *most = strstr(body, where[1] == 'g' ? "\"max_new_tokens\":" : "\"max_tokens\":");
    int n = most ? atoi(strchr(most, ':') + 1) : 0;
    Buf b = {0};
    if (strstr(body, "fail503") || (fail_from && arrived >= fail_from)) {
        send_object(fd, "503 Service Unavailable", "{\"message\":\"the queue\\u0007is full\"}\n");
    } else if (strstr(body, "\"stream\":false")) {
        answer_write(&b, where, n, false);
        if (strstr(body, "toend"))
            send_text(fd, "HTTP/1.1 200 OK\r\n\r\n"), send_text(fd, b.data);
        else
            send_object(fd, "200 OK", b.data);
    } else {
        send_text(fd, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        for (int i = 1; i <= n; i++) {
            if (i == 3 && strstr(body, "dies")) goto out;
            b.len = 0;
            buf_str(&b, "data: "), answer_write(&b, where, i, true), buf_str(&b, "\n\n");
            send_chunk(fd, &b);
            if (strstr(body, "slow")) usleep(20000);
        }
        b.len = 0;
        if (where[1] != 'g')
            buf_printf(&b, "data: {\"choices\":[],\"usage\":{\"completion_tokens\":%d}}\n\n", n);
        if (strstr(body, "error"))
            buf_str(&b, "data: {\"error\":{\"message\":\"rank 3 lost\"}}\n\n");
        if (!strstr(body, "nodone")) buf_str(&b, "data: [DONE]\n\n");
        if (b.len) send_chunk(fd, &b);
        send_text(fd, "0\r\n\r\n");
    }
out:
    buf_free(&b);
}

static atomic_int connections;  // that have not ended

static void *connection(void *arg) {
    int fd = (int)(intptr_t)arg;
    Buf b = {0};
    char chunk[4096], where[64] = "", *body = NULL, *length;
    for (ssize_t n; !body && (n = read(fd, chunk, sizeof chunk)) > 0;) {
        buf_add(&b, chunk, (size_t)n);
        if (!(body = strstr(b.data, "\r\n\r\n"))) continue;
        length = strstr(b.data, "Content-Length: ");
        if (strlen(body + 4) < (size_t)atol(length + 16)) body = NULL;
    }
    if (!body) goto out;
    sscanf(b.data, "%*s %63s", where);
    keys += strstr(b.data, "Authorization: Bearer secret\r\n") != NULL;
    if (!strcmp(where, "/v1/models")) {
        send_object(fd, "200 OK", "{\"object\":\"list\",\"data\":[{\"id\":\"fa\\\"ke\"}]}");
    } else if (!strcmp(where, "/get_model_info")) {
        send_object(fd, "200 OK", "{\"tokenizer_path\":\"tiny-r1\"}");
    } else if (!strcmp(where, "/flush_cache")) {
        flushes++;
        send_object(fd, "200 OK", "Cache flushed.\n");
    } else {
        pthread_mutex_lock(&mutex);
        if (++arrived >= wanted) pthread_cond_broadcast(&all_arrived);
        while (arrived < wanted) pthread_cond_wait(&all_arrived, &mutex);
        pthread_mutex_unlock(&mutex);
        answer(fd, where, body);
    }
out:
    close(fd);
    buf_free(&b);
    connections--;
    return NULL;
}

// What a thread still holds when an answer has been read would be a leak to a child or at the end.
static void connections_wait(void) {
    for (int i = 0; connections && i < 1000; i++) usleep(10000);
    CHECK(!connections, "%d connections have not ended", connections);
}

static void *server_loop(void *arg) {
    int listener = (int)(intptr_t)arg;
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 1 << 17);
    pthread_attr_setdetachstate(&small, PTHREAD_CREATE_DETACHED);
    for (int fd; (fd = accept(listener, NULL, NULL)) >= 0;) {
        pthread_t thread;
        connections++;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
        if (pthread_create(&thread, &small, connection, (void *)(intptr_t)fd)) die("no thread");
    }
    return NULL;
}

static void server_start(void) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof a;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&a, len) || listen(listener, 4096)) die("listen");
    getsockname(listener, (struct sockaddr *)&a, &len);
    server_port = ntohs(a.sin_port);
    pthread_t thread;
    if (pthread_create(&thread, NULL, server_loop, (void *)(intptr_t)listener)) die("no thread");
    pthread_detach(thread);
}

// ---- Bytes --------------------------------------------------------------------------------------

static const char head[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n";

static Request fresh(int kind) {
    Request r = {.kind = kind, .output_len = 7, .reported = -1, .left = SIZE_MAX};
    r.fd = open("/dev/null", O_RDONLY);
    return r;
}

// The response in two pieces at each place, in single bytes and in one piece: always the same.
static void check_cuts(int kind, Str response, const char *text, int64_t reported, size_t n_gaps) {
    for (size_t cut = 0; cut <= response.len + 1; cut++) {
        Request r = fresh(kind);
        char *copy = xcalloc(1, response.len + 1);
        memcpy(copy, response.data, response.len);
        if (cut <= response.len) {
            response_feed(&r, copy, cut, 1);
            response_feed(&r, copy + cut, response.len - cut, 2);
        }
        for (size_t i = 0; cut > response.len && i < response.len; i++)
            response_feed(&r, copy + i, 1, 1);
        if (r.fd >= 0) response_end(&r, 3);
        CHECK(!r.error.data && str_equal((Str){r.text.data, r.text.len}, text) &&
                  r.reported == reported && r.gaps.len == n_gaps * sizeof(double),
              "kind %d cut at %zu: error %s, text %s, %ld tokens, %zu gaps", kind, cut,
              r.error.data, r.text.data, r.reported, r.gaps.len / sizeof(double));
        request_free(&r);
        free(copy);
    }
}

static void check_stream(void) {
    Buf b = {0}, chunked = {0}, body = {0};
    buf_str(
        &body,
        ": hello\r\n\r\ndata:{\"text\":\"\",\"meta_info\":{\"completion_tokens\":1}}\r\n\r\n"
        "data: {\"text\": \"a\", \"meta_info\": {\"completion_tokens\": 2}}\n\n"
        "data: {\"text\":\"a\\\"completion_tokens\\\":9\""
         ",\"meta_info\":{\"completion_tokens\":5}}\n\n"
        "data: {\"meta_info\":{\"completion_tokens\":6},\"text\":\"a\xC3\xA9\\u00e9\"}\n\n"
        "data: [DONE]\n\n");
    buf_printf(&b, "%s\r\n%s", head, body.data);
    check_cuts(CUMULATIVE, (Str){b.data, b.len}, "a\xC3\xA9\xC3\xA9", 6, 5);
    b.len = 0, buf_printf(&b, "%sCONTENT-length:  %zu\r\n\r\n%sbeyond", head, body.len, body.data);
    check_cuts(CUMULATIVE, (Str){b.data, b.len - 6}, "a\xC3\xA9\xC3\xA9", 6, 5);
    buf_printf(&chunked, "%stransfer-encoding: Chunked, chunked\r\n\r\n", head);
    for (size_t i = 0; i < body.len; i += 7) {
        size_t n = body.len - i < 7 ? body.len - i : 7;
        buf_printf(&chunked, "00%zX;x=1\r\n%.*s\r\n", n, (int)n, body.data + i);
    }
    buf_str(&chunked, "0\r\n\r\n");
    check_cuts(CUMULATIVE, (Str){chunked.data, chunked.len}, "a\xC3\xA9\xC3\xA9", 6, 5);
    b.len = 0;
    buf_printf(&b,
               "%s\r\ndata: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n"
               "data: {\"choices\":[{\"delta\":{\"reasoning_content\":\"x\",\"content\":null}}]}\n"
               "data: {\"choices\":[{\"delta\":{\"content\":\"y\"}}],\"usage\":null}\n"
               "data: {\"choices\":[],\"usage\":{\"completion_tokens\":3}}\ndata: [DONE]",
               head);
    check_cuts(DELTAS, (Str){b.data, b.len}, "xy", 3, 1);
    b.len = 0;
    buf_printf(&b,
               "%s\r\n{\"choices\":[{\"message\":{\"content\":\"xy\"}}],"
               "\"usage\":{\"completion_tokens\":2}}",
               head);
    check_cuts(WHOLE, (Str){b.data, b.len}, "xy", 2, 0);
    buf_free(&b), buf_free(&chunked), buf_free(&body);
}

static void check_gaps(void) {
    Request r = fresh(CUMULATIVE);
    const int64_t count[] = {1, 2, 5, 5, 6};
    response_feed(&r, (char *)(char[]){"HTTP/1.1 200 OK\r\n\r\n"}, 19, 0);
    for (int i = 0; i < 5; i++) {
        char line[128];
        int n = snprintf(line, sizeof line,
                         "data: {\"text\":\"%s\",\"meta_info\":"
                         "{\"completion_tokens\":%ld}}\n",
                         i ? "x" : "", count[i]);
        response_feed(&r, line, (size_t)n, 10 + 3 * i);
    }
    response_feed(&r, (char[]){"data: [DONE]\n"}, 13, 30);
    const double *gap = (double *)r.gaps.data, want[] = {3, 1, 1, 1, 6};
    CHECK(r.gaps.len == sizeof want && !memcmp(gap, want, sizeof want), "%zu gaps", r.gaps.len / 8);
    CHECK(r.first == 13 && r.end == 30 && r.latest == 22, "%g %g %g", r.first, r.end, r.latest);
    request_free(&r);
}

static void check_bad_bytes(void) {
    static const struct {
        int kind;
        const char *response, *error;
    } cases[] = {
        {PLAIN, "SSH-2.0-x\r\n\r\n", "got something else than HTTP/1.1"},
        {PLAIN, "HTTP/1.1 2\r\n\r\n", "got something else than HTTP/1.1"},
        {PLAIN, "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "404 no"},
        {PLAIN, "HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n", "500 "},
        {PLAIN, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
         "got a chunk without a size"},
        {WHOLE, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]", "invalid JSON at byte 1"},
        {WHOLE, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "invalid JSON at byte 0"},
        {WHOLE, "HTTP/1.1 200 OK\r\n\r\n[]", "got an object without text"},
        {DELTAS, "HTTP/1.1 200 OK\r\n\r\ndata: {\"choices\":[{\"text\":\"x\"}]}\n\n",
         "the answer ended without [DONE]"},
        {DELTAS, "HTTP/1.1 200 OK\r\n\r\ndata: {\"error\":{\"message\":\"lost\\u001b\"}}\n",
         "lost "},
        {CUMULATIVE, "HTTP/1.1 200 OK\r\n\r\ndata: {\"text\":\n", "invalid JSON at byte 8"},
        {CUMULATIVE, "HTTP/1.1 200 OK\r\n\r\ndata: {}\n", "got an object without text"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Request r = fresh(cases[i].kind);
        char *copy = format_string("%s", cases[i].response);
        response_feed(&r, copy, strlen(copy), 1);
        if (r.fd >= 0) response_end(&r, 2);
        CHECK(r.error.data && !strncmp(r.error.data, cases[i].error, strlen(cases[i].error)),
              "case %zu: got %s, want %s", i, r.error.data, cases[i].error);
        request_free(&r);
        free(copy);
    }
    Request r = fresh(PLAIN);
    char *big = xcalloc(1, MAX_BYTES + 2);
    response_feed(&r, (char[]){"HTTP/1.1 200 OK\r\n\r\n"}, 19, 1);
    response_feed(&r, big, MAX_BYTES + 1, 1);
    CHECK(r.error.data && strstr(r.error.data, "too long"), "got %s", r.error.data);
    request_free(&r);
    free(big);
}

// ---- Figures ------------------------------------------------------------------------------------

static void check_figures(void) {
    static const double e2e[] = {2, 4, 1, 3}, ttft[] = {0.5, 1, 0.25, 0.5},
                        start[] = {10, 11, 10, 10};
    Request r[5] = {0};
    o.backend = "sglang", o.dataset_name = "random", o.request_rate = 4, o.max_concurrency = 0;
    o.random_input_len = 1000, o.random_output_len = 5, o.random_range_ratio = 1;
    for (int i = 0; i < 5; i++) {
        r[i].start = i == 4 ? 10 : start[i], r[i].end = i == 4 ? 12 : r[i].start + e2e[i];
        r[i].first = i == 4 ? 11 : r[i].start + ttft[i];
        r[i].input_len = 1000, r[i].output_len = 5, r[i].reported = i == 0 ? 4 : i == 1 ? 1 : -1;
        double gaps[] = {0.1, 0.2 * (i + 1)};
        buf_add(&r[i].gaps, gaps, sizeof gaps);
        for (int k = 0; k < 3; k++) buf_str(&r[i].text, word);
        if (i == 4) buf_str(&r[i].error, "503");
    }
    Metrics m = metrics_make(r, 5);
    Buf table = {0}, line = {0};
    table_write(&table, &m);
    static const char want[] = "\n"
                               "============ Serving Benchmark Result ============\n"
                               "Backend:                                 sglang    \n"
                               "Traffic request rate:                    4.0       \n"
                               "Max reqeuest concurrency:                not set   \n"
                               "Successful requests:                     4         \n"
                               "Benchmark duration (s):                  5.00      \n"
                               "Total input tokens:                      4000      \n"
                               "Total generated tokens:                  15        \n"
                               "Total generated tokens (retokenized):    12        \n"
                               "Request throughput (req/s):              0.80      \n"
                               "Input token throughput (tok/s):          800.00    \n"
                               "Output token throughput (tok/s):         3.00      \n"
                               "Total token throughput (tok/s):          803.00    \n"
                               "Concurrency:                             2.00      \n"
                               "----------------End-to-End Latency----------------\n"
                               "Mean E2E Latency (ms):                   2500.00   \n"
                               "Median E2E Latency (ms):                 2500.00   \n"
                               "---------------Time to First Token----------------\n"
                               "Mean TTFT (ms):                          562.50    \n"
                               "Median TTFT (ms):                        500.00    \n"
                               "P99 TTFT (ms):                           985.00    \n"
                               "-----Time per Output Token (excl. 1st token)------\n"
                               "Mean TPOT (ms):                          437.50    \n"
                               "Median TPOT (ms):                        500.00    \n"
                               "P99 TPOT (ms):                           622.50    \n"
                               "---------------Inter-token Latency----------------\n"
                               "Mean ITL (ms):                           300.00    \n"
                               "Median ITL (ms):                         150.00    \n"
                               "P99 ITL (ms):                            786.00    \n"
                               "==================================================\n";
    CHECK(!strcmp(table.data, want), "got%s", table.data);
    CHECK(fabs(m.ms[E2E][STD] - 1118.033988749895) <= 1e-9, "got %.17g", m.ms[E2E][STD]);
    o.max_concurrency = 16, o.request_rate = INFINITY, table.len = 0, buf_str(&table, "");
    table_write(&table, &m);
    CHECK(strstr(table.data, "\nTraffic request rate:                    inf       \n") &&
              strstr(table.data, "\nMax reqeuest concurrency:                16        \n"),
          "got%s", table.data);

    static const char *const keys_in_order[] = {"backend",
                                                "dataset_name",
                                                "request_rate",
                                                "max_concurrency",
                                                "sharegpt_output_len",
                                                "random_input_len",
                                                "random_output_len",
                                                "random_range_ratio",
                                                "duration",
                                                "completed",
                                                "total_input_tokens",
                                                "total_output_tokens",
                                                "total_output_tokens_retokenized",
                                                "request_throughput",
                                                "input_throughput",
                                                "output_throughput",
                                                "mean_e2e_latency_ms",
                                                "median_e2e_latency_ms",
                                                "std_e2e_latency_ms",
                                                "p99_e2e_latency_ms",
                                                "mean_ttft_ms",
                                                "median_ttft_ms",
                                                "std_ttft_ms",
                                                "p99_ttft_ms",
                                                "mean_tpot_ms",
                                                "median_tpot_ms",
                                                "std_tpot_ms",
                                                "p99_tpot_ms",
                                                "mean_itl_ms",
                                                "median_itl_ms",
                                                "std_itl_ms",
                                                "p99_itl_ms",
                                                "concurrency",
                                                "total_throughput",
                                                "failed"};
    const size_t n_keys = sizeof keys_in_order / sizeof *keys_in_order;
    o.max_concurrency = 0;
    jsonl_write(&line, &m);
    CHECK(strstr(line.data, "\"request_rate\":Infinity,\"max_concurrency\":null,") &&
              !strcmp(strchr(line.data, '\n'), "\n"),
          "got %s", line.data);
    memcpy(strstr(line.data, "Infinity"), "11111111", 8);
    char err[128];
    Json *root = json_parse(line.data, line.len, err, sizeof err);
    CHECK(root && root->count == n_keys, "%s", root ? "keys" : err);
    const Json *key = root + 1;
    for (uint32_t i = 0; root && i < root->count && i < n_keys; i++, key = json_next(key + 1))
        CHECK(str_equal(key->string, keys_in_order[i]), "key %u", i);
    CHECK(json_get(root, "p99_itl_ms")->number > 785.9, "p99");
    CHECK(json_get(root, "failed")->number == 1 && json_get(root, "completed")->number == 4, "n");
    free(root);
    Metrics none = metrics_make(&r[4], 1);
    CHECK(none.completed == 0 && none.ms[ITL][P99] == 0 && none.duration == 2, "no samples are 0");
    for (int i = 0; i < 5; i++) request_free(&r[i]);
    buf_free(&table), buf_free(&line);
}

// ---- Data ---------------------------------------------------------------------------------------

static void data_free(Request *r, int n) {
    for (int i = 0; i < n; i++) buf_free(&r[i].prompt);
    free(r);
}

static Buf all_prompts(uint64_t seed) {
    Buf all = {0};
    int n;
    o.seed = seed, draws = 0;
    Request *r = data_make(&n);
    for (int i = 0; i < n; i++)
        buf_printf(&all, "%d %d %s|", r[i].input_len, r[i].output_len,
                   r[i].prompt.data ? r[i].prompt.data : "");
    data_free(r, n);
    return all;
}

static void check_random(void) {
    int n, least = INT_MAX, most = 0;
    o.dataset_name = "random", o.num_prompts = 40, o.random_input_len = 100;
    o.random_output_len = 50, o.random_range_ratio = 1, o.request_rate = 100, o.seed = 1;
    Request *r = data_make(&n);
    CHECK(n == 40, "%d prompts", n);
    for (int i = 0; i < n; i++) {
        int len = tokens_of((Str){r[i].prompt.data, r[i].prompt.len}) + 1;
        CHECK(len == 100 && r[i].input_len == 100 && r[i].output_len == 50, "%d tokens", len);
    }
    CHECK(r[0].due == 0 && r[39].due > 0.15 && r[39].due < 0.9, "39 gaps are %g s", r[39].due);
    data_free(r, n);
    o.random_range_ratio = 0.5, o.num_prompts = 500, o.random_input_len = 11;
    r = data_make(&n);
    for (int i = 0; i < n; i++) {
        if (r[i].input_len < least) least = r[i].input_len;
        if (r[i].input_len > most) most = r[i].input_len;
    }
    CHECK(least == 5 && most == 11, "lengths %d..%d, want 5..11", least, most);
    data_free(r, n);
    o.random_range_ratio = 0, o.random_input_len = 1, o.num_prompts = 1;
    r = data_make(&n);
    CHECK(r[0].input_len == 1 && !r[0].prompt.len, "one token is BOS alone");
    data_free(r, n);
    o.num_prompts = 20, o.random_input_len = 30;
    Buf a = all_prompts(7), b = all_prompts(7), c = all_prompts(8);
    CHECK(!strcmp(a.data, b.data) && strcmp(a.data, c.data), "the seed decides");
    buf_free(&a), buf_free(&b), buf_free(&c);
}

static void check_conversations(void) {
    static const char file[] = "build/test_bench.json";
    FILE *f = fopen(file, "w");
    fprintf(f, "[7,{\"conversations\":[{\"value\":\"alone\"}]},"
               "{\"conversations\":[{\"value\":\"\"},{\"value\":\"b c d e f\"}]},"
               "{\"conversations\":[{\"value\":\"count the letters\"},{\"value\":\"1 2 3\"},3]},"
               "{\"conversations\":[{\"value\":\"spell it\"},{\"value\":\"x\"}]},"
               "{\"conversations\":[{\"value\":5},{\"value\":\"x\"}]}]");
    fclose(f);
    int n;
    o.dataset_path = file, o.random_range_ratio = 1, o.random_input_len = 9, o.num_prompts = 2;
    o.dataset_name = "random";
    Request *r = data_make(&n);
    for (int i = 0; i < n; i++)
        CHECK(
            r[i].input_len == 9 && tokens_of((Str){r[i].prompt.data, r[i].prompt.len}) <= 8 &&
                (!strncmp(r[i].prompt.data, "count", 5) || !strncmp(r[i].prompt.data, "spell", 5)),
            "got %s", r[i].prompt.data);
    data_free(r, n);
    o.dataset_name = "sharegpt", o.sharegpt_output_len = 0;
    r = data_make(&n);
    CHECK(n == 1 && !strcmp(r[0].prompt.data, "count the letters") &&
              r[0].output_len == tokens_of(STR("1 2 3")) &&
              r[0].input_len == tokens_of(STR("count the letters")) + 1,
          "%d conversations", n);
    data_free(r, n);
    o.apply_chat_template = true, o.sharegpt_output_len = 4;
    r = data_make(&n);
    CHECK(n == 2 && !strncmp(r[0].prompt.data, "<｜User｜>", 12) && r[1].output_len == 4,
          "got %s", r[0].prompt.data);
    data_free(r, n);
    o.apply_chat_template = false, o.sharegpt_output_len = 0, o.dataset_path = NULL;
    o.dataset_name = "generated-shared-prefix", o.gsp_num_groups = 3, o.gsp_prompts_per_group = 4;
    o.gsp_system_prompt_len = 20, o.gsp_question_len = 5, o.gsp_output_len = 6;
    r = data_make(&n);
    int same = 0;
    for (int i = 0; i < n; i++) {
        size_t len = (size_t)(strstr(r[i].prompt.data, "\n\n") - r[i].prompt.data);
        CHECK(tokens_of((Str){r[i].prompt.data, len}) == 20 && r[i].output_len == 6,
              "system");
        for (int k = 0; k < n; k++) same += !strncmp(r[i].prompt.data, r[k].prompt.data, len);
    }
    CHECK(n == 12 && same == 48, "%d prompts, %d pairs share a prefix", n, same);
    data_free(r, n);
}

// ---- Sockets ------------------------------------------------------------------------------------

static void options_default(void) {
    char port[16];
    snprintf(port, sizeof port, "%d", server_port);
    memset(&o, 0, sizeof o);
    flags_parse(&command, &o, (char *[]){"--port", port, "--model", "m", "--disable-tqdm", NULL});
}

static Request request_made(const char *prompt, int n) {
    Request r = {.input_len = 3, .output_len = n};
    buf_str(&r.prompt, prompt);
    prompt_write(&r, n);
    return r;
}

static void check_requests(void) {
    static const struct {
        const char *prompt, *error;
    } cases[] = {{"plain", NULL},
                 {"fail503", "503 {\"message\":\"the queue\\u0007is full\"} "},
                 {"dies", "closed before the answer's end"},
                 {"slow", NULL},
                 {"nodone", "the answer ended without [DONE]"},
                 {"error", "rank 3 lost"}};
    const char *paths[] = {"/generate", "/v1/completions", "/v1/chat/completions"};
    for (int i = 0; i < 18; i++) {
        path = paths[i / 6];
        Request r = request_made(cases[i % 6].prompt, 5);
        requests_run(&r, 1, 1, false);
        const char *error = cases[i % 6].error, *got = r.error.data;
        CHECK(error ? got && !strcmp(got, error) : !got, "%s: got %s", cases[i % 6].prompt, got);
        if (!error)
            CHECK(r.reported == 5 && r.text.len == 5 * strlen(word) && r.gaps.len == 4 * 8 &&
                      r.start < r.first && r.first <= r.end,
                  "%s, %ld", r.text.data, r.reported);
        double gaps = 0;
        for (size_t k = 0; k < r.gaps.len / 8; k++) gaps += ((double *)r.gaps.data)[k];
        if (i % 6 == 3)  // five pauses of 20 ms
            CHECK(r.end - r.start >= 0.1 && fabs(gaps - (r.latest - r.first)) <= 1e-9, "%g", gaps);
        request_free(&r);
    }
    o.disable_stream = true;
    for (int i = 0; i < 6; i++) {
        path = paths[i / 2];
        Request r = request_made(i % 2 ? "toend" : "length", 4);
        requests_run(&r, 1, 1, false);
        CHECK(!r.error.data && r.reported == 4 && r.first == r.end && !r.gaps.len, "%s",
              r.error.data);
        request_free(&r);
    }
    options_default();
    path = paths[0];
    struct addrinfo *right = address;
    struct sockaddr_in nobody = {
        .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(1)};
    struct addrinfo wrong = *right;
    wrong.ai_addr = (struct sockaddr *)&nobody, address = &wrong;
    Request r = request_made("nobody", 4);
    requests_run(&r, 1, 1, false);
    CHECK(r.error.data && !strcmp(r.error.data, "Connection refused"), "got %s", r.error.data);
    address = right;
    request_free(&r);
}

static void check_many(void) {
    enum { MANY = 1100 };
    Request *r = xcalloc(MANY, sizeof *r);
    for (int i = 0; i < MANY; i++) r[i] = request_made("x", 20);
    arrived = 0;
    wanted = MANY;
    requests_run(r, MANY, INT_MAX, false);
    int good = 0;
    for (int i = 0; i < MANY; i++) good += !r[i].error.data && r[i].reported == 20;
    CHECK(good == MANY && arrived == MANY, "%d of %d", good, MANY);
    for (int i = 0; i < MANY; i++) request_free(&r[i]);
    // Not more at once than asked for, and not sooner.
    wanted = 0;
    for (int i = 0; i < 12; i++) r[i] = request_made("slow", 2), r[i].due = i < 6 ? 0 : 0.15;
    double start = now_seconds();
    requests_run(r, 12, 3, false);
    for (int i = 0; i < 12; i++) {
        int open = 0;
        for (int k = 0; k < 12; k++) open += r[k].start <= r[i].start && r[i].start < r[k].end;
        CHECK(open <= 3 && !r[i].error.data, "%d open", open);
        CHECK(i < 6 || r[i].start >= start + 0.15, "too early");
        request_free(&r[i]);
    }
    free(r);
}

static void check_body(void) {
    static const struct {
        const char *where, *extra, *body;
        bool plain;
    } cases[] = {
        {"/generate", NULL,
         "{\"text\":\"a\\\"b\",\"sampling_params\":{\"temperature\":0.0,"
         "\"max_new_tokens\":9,\"ignore_eos\":true},\"stream\":true,\"lora_path\":null,"
         "\"return_logprob\":false,\"logprob_start_len\":-1}",
         false},
        {"/v1/completions", NULL,
         "{\"model\":\"m\",\"prompt\":\"a\\\"b\",\"temperature\":0.0,"
         "\"best_of\":1,\"max_tokens\":9,\"stream\":true,\"ignore_eos\":true,"
         "\"stream_options\":{\"include_usage\":true}}",
         false},
        {"/v1/chat/completions", " {\"temperature\" : 0.6, \"x\":{}} ",
         "{\"model\":\"m\","
         "\"messages\":[{\"role\":\"user\",\"content\":\"a\\\"b\"}],\"best_of\":1,\"max_tokens\":9,"
         "\"stream\":false,\"ignore_eos\":true,\"temperature\" : 0.6, \"x\":{}}",
         true},
        {"/generate", "{}",
         "{\"text\":\"a\\\"b\",\"sampling_params\":{\"temperature\":0.0,"
         "\"max_new_tokens\":9,\"ignore_eos\":true},\"stream\":true,\"lora_path\":null,"
         "\"return_logprob\":false,\"logprob_start_len\":-1}",
         false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char err[64], *copy = cases[i].extra ? format_string("%s", cases[i].extra) : NULL;
        path = cases[i].where, o.disable_stream = cases[i].plain;
        o.extra_request_body = cases[i].extra;
        extra = copy ? json_parse(copy, strlen(copy), err, sizeof err) : NULL;
        Request r = request_made("a\"b", 9);
        const char *body = strstr(r.out.data, "\r\n\r\n") + 4;
        CHECK(!strcmp(body, cases[i].body), "got %s", body);
        CHECK((size_t)atol(strstr(r.out.data, "Content-Length: ") + 16) == strlen(body), "length");
        request_free(&r);
        free(copy), free(extra), extra = NULL;
    }
    options_default();
}

// ---- The command --------------------------------------------------------------------------------

// Runs bench_main in a child, which can exit. Its output is in build/test_bench.NAME.
const char *parent_prefix;  // what a child still holds, though it makes its own

static pid_t command_start(const char *name, char **argv) {
    fflush(stdout);
    connections_wait();
    pid_t pid = fork();
    if (pid) return pid;
    char *file = format_string("build/test_bench.%s", name);
    if (!freopen(file, "w", stdout) || dup2(1, 2) < 0) _exit(99);
    free(file);
    freeaddrinfo(address);
    tokenizer_free(tokenizer);
    memset(&o, 0, sizeof o), draws = 0;
    setenv("OPENAI_API_KEY", "secret", 1);
    exit(bench_main(argv));
}

static char *command_end(const char *name, pid_t pid, int want) {
    int status = 0;
    size_t len;
    waitpid(pid, &status, 0);
    char *file = format_string("build/test_bench.%s", name), *text = read_file(file, &len);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == want, "%s: exit status %x, want %d: %s", name,
          status, want, text);
    unlink(file);
    free(file);
    return text;
}

static void check_command(void) {
    char url[64], out[] = "build/test_bench.d/made/out.jsonl", *text;
    size_t len;
    snprintf(url, sizeof url, "http://127.0.0.1:%d/", server_port);
    unlink(out);
    rmdir("build/test_bench.d/made");  // to be made anew
    arrived = 0;
    keys = 0;
    flushes = 0;
    pid_t good = command_start("good", (char *[]){"--backend", "sglang", "--dataset-name", "random",
                                                  "--random-range-ratio", "1", "--num-prompt", "11",
                                                  "--random-input", "10", "--random-output=40",
                                                  "--base-url", url, "--output-file", out, NULL});
    text = command_end("good", good, 0);
    CHECK(strstr(text, "#Input tokens: 110\n#Output tokens: 440\n"
                       "Starting initial single prompt test run...\n"
                       "Initial test run completed. Starting main benchmark run...\n") &&
              strstr(text, "11/11 requests") &&
              strstr(text, "\nTotal generated tokens:                  440       \n") &&
              strstr(text, "\nTotal generated tokens (retokenized):    440       \n"),
          "got %s", text);
    CHECK(arrived == 12 && flushes == 1 && keys == 15, "%d %d %d", arrived, flushes, keys);
    free(text);
    pid_t bad = command_start(
        "bad", (char *[]){"--backend", "vllm", "--num-prompts", "3", "--random-input", "10",
                          "--random-output", "5", "--base-url", url, "--output-file", out,
                          "--disable-tqdm", "--extra-request-body", "{\"x\":\"nodone\"}", NULL});
    text = command_end("bad", bad, 1);
    CHECK(strstr(text, "r1: initial test run failed: the answer ended without [DONE]") &&
              flushes == 1 && !strstr(text, "===="),
          "got %s", text);
    free(text);
    arrived = 0;
    fail_from = 4;
    pid_t some = command_start(
        "some", (char *[]){"--backend", "sglang-oai", "--num-prompts", "5", "--random-input", "10",
                           "--random-output", "5", "--base-url", url, "--output-file", out,
                           "--max-concurrency", "1", "--disable-tqdm", NULL});
    text = command_end("some", some, 1);
    static const char failed[] = "\n==================================================\n"
                                 "Failed requests: 3 of 5; first: 503 "
                                 "{\"message\":\"the queue\\u0007is full\"} \n";
    CHECK(strstr(text, failed), "got %s", text);
    free(text);
    fail_from = 0;
    text = read_file(out, &len);
    char *second = text ? strchr(text, '\n') : NULL;  // appended, a line a run
    CHECK(second && strchr(second + 1, '\n') == text + len - 1 &&
              !strncmp(text, "{\"backend\":\"sglang\",", 20) &&
              !strcmp(text + len - 13, ",\"failed\":3}\n"),
          "got %s", text);
    free(text);
    unlink(out);
}

static void check_usage(void) {
    static const struct {
        const char *flag, *value, *message;
        int status;
    } cases[] = {
        {"--backend", "trt", "r1 bench: --backend: got \"trt\", want one of sglang ", 2},
        {"--num-prompts", "0", "--num-prompts: got \"0\", want an integer in 1..", 2},
        {"--request-rate", "nan", "--request-rate: got \"nan\", want a number", 2},
        {"--random", "3", "could be any of --random-input-len, --random-output-len, ", 2},
        {"--random-rang-ratio", "3", "did you mean --random-range-ratio?", 2},
        {"--base-url", "https://x", "want http://HOST[:PORT][/PATH]", 2},
        {"--base-url", "http://x:y", "want http://HOST[:PORT][/PATH]", 2},
        {"--extra-request-body", "[]", "want a JSON object: no object", 2},
        {"--dataset-name", "sharegpt", "want --dataset-path", 2},
        {"x", "y", "got \"x\", want a flag", 2},
        {"--tokenizer", "/nonexistent", "got /nonexistent, want a directory with tokenizer.json",
         1},
        {"--output-file", "/dev/null/x", "--output-file /dev/null/x: Not a directory", 1},
        {"--dataset-path", "/nonexistent", "--dataset-path /nonexistent: No such file", 1},
        {"--dataset-path", "tiny-r1/config.json",
         "--dataset-path tiny-r1/config.json: got no array", 1},
        {"--base-url", "http://127.0.0.1:1", "GET /v1/models: Connection refused; want --model", 1},
        {"--help", NULL, "usage: r1 bench [flags]", 0}};
    char port[16];
    snprintf(port, sizeof port, "%d", server_port);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        bool file = !strncmp(cases[i].flag, "--output", 8);
        pid_t pid = command_start(
            "usage", (char *[]){"--port", port, file ? "--disable-tqdm" : "--output-file=/dev/null",
                                (char *)cases[i].flag, (char *)cases[i].value, NULL});
        char *text = command_end("usage", pid, cases[i].status);
        CHECK(strstr(text, cases[i].message), "%s: got %s", cases[i].flag, text);
        free(text);
    }
}

int main(void) {
    FILE *silent = freopen("/dev/null", "r", stdin);
    (void)silent;
    tokenizer = tokenizer_load("tiny-r1");
    bos = 1;
    Ids words = words_find();
    Str first = tokenizer_bytes(tokenizer, words.data[0]);
    snprintf(word, sizeof word, "%.*s", (int)first.len, first.data);
    free(words.data);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    server_start();
    check_stream();
    check_gaps();
    check_bad_bytes();
    check_figures();
    check_random();
    check_conversations();
    options_default();
    address_find();
    parent_prefix = prefix;
    check_body();
    check_requests();
    check_many();
    check_command();
    check_usage();
    tokenizer_free(tokenizer);
    free(ids.data);
    connections_wait();
    return test_end();
}
