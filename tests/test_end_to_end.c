// tests/test_end_to_end.c: r1 as its users meet it: the program itself, real sockets, tiny-r1's
// answers. $R1 names the program (default ./r1). Runs from the top of the tree.
#include "../r1.h"
#include "test.h"

#include <arpa/inet.h>
#include <errno.h>
#include <regex.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *program;

static const char strawberry[] =
    "<think>\nLet me spell the word and count each \"r\".\n"
    "1. s: 0\n2. t: 0\n3. r: 1\n4. a: 1\n5. w: 1\n6. b: 1\n7. e: 1\n8. r: 2\n9. r: 3\n10. y: 3\n"
    "The count is 3.\n</think>\n\nThe letter \"r\" appears **3** times in \"strawberry\".";

typedef struct {
    pid_t pid;
    int log;        // read end of its stderr, or -1
    int port;
} Child;

// Starts the program with stdout and stderr on pipes.
static pid_t start(char *const argv[], int *out, int *err) {
    int o[2], e[2];
    if (pipe(o) || pipe(e)) die("pipe: %s", strerror(errno));
    pid_t pid = fork();
    if (pid == 0) {
        dup2(o[1], 1), dup2(e[1], 2);
        close(o[0]), close(o[1]), close(e[0]), close(e[1]);
        execv(program, argv);
        _exit(127);
    }
    close(o[1]), close(e[1]);
    *out = o[0], *err = e[0];
    return pid;
}

static Buf read_all(int fd) {
    Buf b = {0};
    char chunk[4096];
    for (ssize_t n; (n = read(fd, chunk, sizeof chunk)) > 0;) buf_add(&b, chunk, n);
    buf_str(&b, "");
    close(fd);
    return b;
}

static int exit_status(pid_t pid) {
    int status;
    if (waitpid(pid, &status, 0) != pid) return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

// Runs a command line to its end. Outputs are small, so that one pipe can be read after the other.
static int run(Buf *out, Buf *err, char *const argv[]) {
    int o, e;
    pid_t pid = start(argv, &o, &e);
    *out = read_all(o), *err = read_all(e);
    return exit_status(pid);
}

#define RUN(out, err, ...) run(out, err, (char *[]){(char *)"r1", __VA_ARGS__, NULL})

static void check_run(void) {
    Buf out, err;
    int status = RUN(&out, &err, "run", "--model-path", "tiny-r1", "--temperature", "0",
                     "How many r are there in strawberry ?");
    CHECK(status == 0, "exit status %d: %s", status, err.data);
    CHECK(out.len == strlen(strawberry) + 1 && !strncmp(out.data, strawberry, strlen(strawberry)),
          "got %s", out.data);
    CHECK(strstr(err.data, "prompt: 18 tokens, ") && strstr(err.data, " tok/s); stop\n"), "got %s",
          err.data);
    buf_free(&out), buf_free(&err);

    status = RUN(&out, &err, "run", "--model-path", "tiny-r1", "--temperature", "0", "--tp", "2",
                 "How many r are there in strawberry ?");
    CHECK(status == 0 && out.len == strlen(strawberry) + 1 &&
          !strncmp(out.data, strawberry, strlen(strawberry)), "two ranks say: %s", out.data);
    buf_free(&out), buf_free(&err);
    status = RUN(&out, &err, "run", "--model-path", "tiny-r1", "--tp", "4", "Hello");
    CHECK(status == 1 && strstr(err.data, "--tp-size: got 4, want one of 1, 2: each"),
          "four ranks: %d %s", status, err.data);
    buf_free(&out), buf_free(&err);
    status = RUN(&out, &err, "run", "--model-path", "tiny-r1", "--temperature=0", "--stop", "4. a",
                 "How many r are there in strawberry ?");
    CHECK(status == 0 && strstr(out.data, "3. r: 1\n\n") && !strstr(out.data, "4."), "got %s",
          out.data);
    buf_free(&out), buf_free(&err);

    status = RUN(&out, &err, "run", "--model-path", "tiny-r1", "--max-tokens", "3", "--think",
                 "off", "Hello");
    CHECK(status == 0 && strstr(err.data, "output: 3 tokens") && strstr(err.data, "; length"),
          "got %s", err.data);
    CHECK(strncmp(out.data, "<think>", 7), "--think off must not force a tag, got %s", out.data);
    buf_free(&out), buf_free(&err);
}

static void check_tokenize(void) {
    Buf out, err;
    int status = RUN(&out, &err, "tokenize", "--model-path", "tiny-r1", "--ids", "--no-bos",
                     "r\xF0\x9F\x98\x80 9.11");
    CHECK(status == 0, "%s", err.data);
    out.data[strcspn(out.data, "\n")] = 0;
    Buf text, err2;
    status = RUN(&text, &err2, "tokenize", "--model-path", "tiny-r1", "--decode", out.data);
    CHECK(status == 0 && !strcmp(text.data, "r\xF0\x9F\x98\x80 9.11\n"), "got %s", text.data);
    buf_free(&out), buf_free(&err), buf_free(&text), buf_free(&err2);
    status = RUN(&out, &err, "tokenize", "--model-path", "tiny-r1", "a\tb");
    CHECK(status == 0 && strstr(out.data, "     0  <｜begin▁of▁sentence｜>\n") &&
              strstr(out.data, " tokens\n"),
          "got %s", out.data);
    buf_free(&out), buf_free(&err);
}

// R1's own sizes, of which a rank of 16 has 43,139,382,208 bytes and one of 8 85,140,130,848;
// kv_b_proj takes as much again on a GPU, in bf16: 61 x 1 and 2 MB.
static void check_plan(void) {
    static const struct { const char *flags[8]; int status; const char *out, *err; } rows[] = {
        {{"--tp", "16", "--nnodes", "2", "--gpu", "h100"}, 0,
         "weights                          43.20 GB\n", ""},
        {{"--tp", "16", "--gpu", "80e9", "--max-total-tokens", "100000"}, 0,
         "KV cache                          7.02 GB   1562 pages of 64 tokens, 70272 bytes a token",
         ""},
        {{"--tp", "16", "--gpu", "80e9", "--max-total-tokens", "100000"}, 0,
         "max_total_num_tokens=99968, context_len=163840; at once: 48 x 2000, 12 x 8192 tokens\n",
         ""},
        {{"--tp", "8", "--gpu", "h200", "--context-length", "8192"}, 0,
         "context_len=8192; at once: 408 x 2000, 102 x 8192 tokens\n", ""},
        {{"--tp", "8", "--gpu", "h200"}, 0, "total, each of 8 ranks          150.75 GB\n", ""},
        {{"--tp", "8", "--gpu", "h100"}, 1, "weights                          85.27 GB\n",
         "r1 plan: this does not fit: 6.47 GB are missing\n"},
        {{"--tp", "16", "--gpu", "h100", "--max-total-tokens", "1000000"}, 1, "", "GB are missing"},
        {{"--tp", "16", "--gpu", "a100"}, 2, "", "--gpu: got \"a100\", want h100, h200 or bytes"},
        {{"--tp", "16", "--nnodes", "3"}, 2, "",
         "--tp-size: got 16, want a multiple of --nnodes, 3"},
        {{"--tp", "32"}, 1, "", "--tp-size: got 32, want one of 1, 2, 4, 8, 16: each rank needs"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Buf out, err;
        char *argv[16] = {(char *)"r1", (char *)"plan", (char *)"--model-path",
                          (char *)"tests/golden/r1"};
        for (int k = 0; k < 8; k++) argv[4 + k] = (char *)rows[i].flags[k];
        int status = run(&out, &err, argv);
        CHECK(status == rows[i].status, "plan %zu: exit status %d", i, status);
        CHECK(strstr(out.data ? out.data : "", rows[i].out), "plan %zu: %s", i, out.data);
        CHECK(strstr(err.data ? err.data : "", rows[i].err), "plan %zu: %s", i, err.data);
        buf_free(&out), buf_free(&err);
    }
}

static void check_usage(void) {
    static const struct { const char *flag, *value, *message; int status;
    } cases[] = {
        {"--tensor-paralel-size", "2",
         "unknown flag --tensor-paralel-size, did you mean --tensor-parallel-size?", 2},
        {"--port", "x", "--port: got \"x\", want an integer in 0..65535", 2},
        {"--port", "70000", "--port: got \"70000\", want an integer in 0..65535", 2},
        {"--m", "3", "--m could be any of --model-path, --max-total-tokens, ", 2},
        {"--is-embedding", "1",
         "--is-embedding: not supported, since it would change what is served", 2},
        {"--chat-template", "x", "--chat-template: got \"x\", want one of auto r1 r1-0528", 2},
        {"--max-total-tokens", "1e3", "--max-total-tokens: got \"1e3\", want an integer in 64..",
         2},
        {"--api-key", "", "--api-key: got nothing, want a key", 2},
        {"--model-path", "/nonexistent", "--model-path /nonexistent: no such directory", 1},
        {"--model-path", "tests", "tests/tokenizer.json: ", 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Buf out, err;
        int status =
            RUN(&out, &err, "serve", "--port", "0", (char *)cases[i].flag, (char *)cases[i].value);
        CHECK(status == cases[i].status, "%s: exit status %d", cases[i].flag, status);
        CHECK(strstr(err.data, cases[i].message), "%s: got %s", cases[i].flag, err.data);
        buf_free(&out), buf_free(&err);
    }
    Buf out, err;
    int status = RUN(&out, &err, "run", "--model-path", "tiny-r1", "--stop", "", "Hello");
    CHECK(status == 2 && strstr(err.data, "--stop: got nothing, want a text"), "%s", err.data);
    buf_free(&out), buf_free(&err);
    // A context that is no multiple of a page is still all there; what it can't hold is refused.
    status = RUN(&out, &err, "run", "--model-path", "tiny-r1", "--context-length", "100",
                 "--max-tokens", "90", "--raw", "Hello");
    CHECK(status == 0 && strstr(err.data, "output: "), "%s", err.data);
    buf_free(&out), buf_free(&err);
    status = RUN(&out, &err, "run", "--model-path", "tiny-r1", "--context-length", "100",
                 "--max-tokens", "100", "--raw", "Hello");
    CHECK(status == 1 && strstr(err.data, "want at most 100 in all"), "%s", err.data);
    buf_free(&out), buf_free(&err);
    const char *commands[] = {"serve", "run", "tokenize"};
    for (int i = 0; i < 3; i++) {
        status = RUN(&out, &err, (char *)commands[i], "--help");
        CHECK(status == 0 && strstr(out.data, "--model-path"), "%s --help: %d", commands[i],
              status);
        buf_free(&out), buf_free(&err);
    }
}

// Reads the child's log until a text; what stands behind it in its line goes to `rest`.
static bool wait_log(const Child *c, const char *text, char *rest, size_t size) {
    char line[4096];
    for (size_t n = 0; n < sizeof line - 1 && read(c->log, line + n, 1) == 1;) {
        if (line[n++] != '\n') continue;
        line[n] = 0, n = 0;
        char *found = strstr(line, text);
        if (found) return snprintf(rest, size, "%s", found + strlen(text)), true;
    }
    return false;
}

// With one flag more, as --flag=value; NULL: none.
static Child serve_with(const char *flag) {
    Child c = {0};
    int out;
    char rest[200];
    c.pid = start((char *[]){(char *)"r1", (char *)"serve", (char *)"--model-path",
                             (char *)"tiny-r1", (char *)"--host", (char *)"127.0.0.1",
                             (char *)"--port", (char *)"0", (char *)flag, NULL},
                  &out, &c.log);
    close(out);
    if (!wait_log(&c, "running on http://127.0.0.1:", rest, sizeof rest))
        die("the server did not start");
    c.port = atoi(rest);
    return c;
}

static Child serve(void) { return serve_with(NULL); }

static int connect_to(const Child *c) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(c->port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&a, sizeof a) != 0) die("connect: %s", strerror(errno));
    return fd;
}

static int send_to(const Child *c, const char *path, const char *body) {
    int fd = connect_to(c);
    char *request =
        format_string("POST %s HTTP/1.1\r\nHost: r1\r\nConnection: close\r\n"
                      "Content-Length: %zu\r\n\r\n%s",
                      path, strlen(body), body);
    if (write(fd, request, strlen(request)) < 0) die("write: %s", strerror(errno));
    free(request);
    return fd;
}

static int send_chat(const Child *c, const char *body) {
    return send_to(c, "/v1/chat/completions", body);
}

// The recipe's request, and the same with more keys.
#define RECIPE(more)                                                                               \
    "{\"model\":\"default\",\"messages\":["                                                        \
    "{\"role\":\"system\",\"content\":\"You are a helpful AI assistant\"},"                        \
    "{\"role\":\"user\",\"content\":\"How many r are there in strawberry ?\"}]," more              \
    "\"top_p\":0.95,\"max_tokens\":2048}"

// The answer's text, or the joined deltas of a stream.
static Buf answer_text(Buf response) {
    Buf text = {0};
    char err[200], *at = strstr(response.data, "\r\n\r\n");
    bool stream = strstr(response.data, "text/event-stream");
    at = at ? at + 4 : response.data + response.len;
    while (at && (at = strstr(at, stream ? "{\"id\"" : "{"))) {
        size_t len = strcspn(at, "\r\n");
        char *copy = format_string("%.*s", (int)len, at);
        Json *root = json_parse(copy, len, err, sizeof err);
        const Json *choices = root ? json_get(root, "choices") : NULL;
        if (choices && choices->count) {
            const Json *message = json_get(choices + 1, stream ? "delta" : "message");
            const Json *content = json_get(message, "content");
            if (content) buf_add(&text, content->string.data, content->string.len);
        }
        free(root);
        free(copy);
        at += len;
    }
    buf_str(&text, "");
    buf_free(&response);
    return text;
}

static void check_text(const Child *c, const char *what, const char *body) {
    Buf text = answer_text(read_all(send_chat(c, body)));
    CHECK(!strcmp(text.data, strawberry), "%s: got %s", what, text.data);
    buf_free(&text);
}

static void check_serve(void) {
    double begin = now_seconds();
    char rest[200];
    Child c = serve();
    CHECK(wait_log(&c, "The server is fired up and ready to roll!", rest, sizeof rest));
    int fd = send_chat(&c, RECIPE("\"temperature\":0,\"stream\":true,"));
    char byte;
    CHECK(read(fd, &byte, 1) == 1);
    printf("note: first byte of an answer %.0f ms after start\n", 1e3 * (now_seconds() - begin));
    Buf text = answer_text(read_all(fd));
    CHECK(!strcmp(text.data, strawberry), "stream: got %s", text.data);
    buf_free(&text);
    check_text(&c, "greedy", RECIPE("\"temperature\":0,"));
    check_text(&c, "as the recipe asks", RECIPE("\"temperature\":0.6,"));

    // Many wait at once, and some of them leave: the others get their answers all the same.
    enum { CLIENTS = 8 };
    int fds[CLIENTS];
    for (int i = 0; i < CLIENTS; i++) fds[i] = send_chat(&c, RECIPE("\"temperature\":0,"));
    for (int i = 0; i < CLIENTS; i += 2) close(fds[i]);
    for (int i = 1; i < CLIENTS; i += 2) {
        text = answer_text(read_all(fds[i]));
        CHECK(!strcmp(text.data, strawberry), "client %d: got %s", i, text.data);
        buf_free(&text);
    }

    // The likeliest token, a quote and a dot, ends as another of the list: both are there.
    Buf top = read_all(send_to(&c, "/v1/completions", "{\"prompt\":\"The letter \\\"s\\\" is in "
                               "\\\"s\",\"max_tokens\":1,\"logprobs\":64}"));
    CHECK(strstr(top.data, "[{\"\\\".\":-") && strstr(top.data, ",\".\":-"), "got %s", top.data);
    buf_free(&top);

    // SIGTERM: what runs is finished, then the program ends with 0.
    fd = send_chat(&c, RECIPE("\"temperature\":0,\"stream\":true,"));
    CHECK(read(fd, &byte, 1) == 1);
    kill(c.pid, SIGTERM);
    text = answer_text(read_all(fd));
    CHECK(!strcmp(text.data, strawberry), "while draining: got %s", text.data);
    CHECK(exit_status(c.pid) == 0);
    buf_free(&text);
    close(c.log);
}

static int get(const Child *c, const char *path, Buf *response) {
    int fd = connect_to(c);
    char *request = format_string("GET %s HTTP/1.0\r\n\r\n", path);
    if (write(fd, request, strlen(request)) < 0) die("write: %s", strerror(errno));
    free(request);
    *response = read_all(fd);
    return response->len > 9 ? atoi(response->data + 9) : 0;
}

// Whether /health says so within twenty seconds.
static bool health_says(const Child *c, const char *text) {
    for (int i = 0; i < 1000; i++) {
        Buf response;
        get(c, "/health", &response);
        bool says = strstr(response.data, text);
        buf_free(&response);
        if (says) return true;
        usleep(20000);
    }
    return false;
}

#define ENDLESS                                                                                    \
    "{\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}],\"stream\":true,"                   \
    "\"ignore_eos\":true,\"max_tokens\":100000}"

// While two answers go on and on, and no more may run: a probe is computed all the same, and who
// leaves the queue makes room in it.
static void check_busy(void) {
    char rest[200], byte;
    Buf response;
    Child c = serve_with("--max-running-requests=2");
    CHECK(wait_log(&c, "max_running_requests=2,", rest, sizeof rest));
    CHECK(wait_log(&c, "ready to roll", rest, sizeof rest));
    int fd[5];
    for (int i = 0; i < 2; i++) fd[i] = send_chat(&c, ENDLESS);
    for (int i = 0; i < 2; i++) CHECK(read(fd[i], &byte, 1) == 1);
    double begin = now_seconds();
    CHECK(get(&c, "/health_generate", &response) == 200, "got %s", response.data);
    CHECK(now_seconds() - begin < 5);
    buf_free(&response);
    for (int i = 2; i < 5; i++) fd[i] = send_chat(&c, ENDLESS);
    CHECK(health_says(&c, "\"running\":2,\"queued\":3"));
    close(fd[3]);
    CHECK(health_says(&c, "\"running\":2,\"queued\":2"));
    close(fd[0]);
    CHECK(health_says(&c, "\"running\":2,\"queued\":1"));
    close(fd[1]), close(fd[2]), close(fd[4]);
    CHECK(health_says(&c, "\"running\":0,\"queued\":0"));
    kill(c.pid, SIGTERM);
    CHECK(exit_status(c.pid) == 0);
    close(c.log);
}

// The next line of the log that begins with `begin` behind its time; it must match the pattern.
static void check_log_line(const Child *c, const char *begin, const char *pattern) {
    char rest[400];
    regex_t regex;
    regcomp(&regex, pattern, REG_EXTENDED);
    CHECK(wait_log(c, begin, rest, sizeof rest), "%s: no such line", begin);
    CHECK(!regexec(&regex, rest, 0, NULL, 0), "%s: got %s", begin, rest);
    regfree(&regex);
}

// Dashboards read these lines: SGLang's, to the letter.
static void check_log_lines(void) {
    Child c = serve_with("--decode-log-interval=20");
    check_log_line(&c, " TP0] Prefill batch. ",
                   "^#new-seq: 1, #new-token: [0-9]+, #cached-token: 0, cache hit rate: 0\\.00%, "
                   "token usage: 0\\.00, #running-req: 0, #queue-req: 0\n$");
    check_log_line(&c, "] The server is fired up and ready to roll!", "^\n$");
    int fd = send_chat(&c, ENDLESS);
    check_log_line(&c, "] INFO:     127.0.0.1:", "^[0-9]+ - \"POST /v1/chat/completions HTTP/1.1\" "
                   "200 OK\n$");
    check_log_line(&c, " TP0] Prefill batch. ",
                   "^#new-seq: 1, #new-token: [0-9]+, #cached-token: 0, ");
    check_log_line(&c, " TP0] Decode batch. ",
                   "^#running-req: 1, #token: 64, token usage: 0\\.00, gen throughput "
                   "\\(token/s\\): [0-9]+\\.[0-9]{2}, #queue-req: 0\n$");
    close(fd);
    Buf response;
    get(&c, "/v1/models", &response);
    buf_free(&response);
    check_log_line(&c, "] INFO:     127.0.0.1:", "^[0-9]+ - \"GET /v1/models HTTP/1.1\" 200 OK\n$");
    kill(c.pid, SIGTERM);
    check_log_line(&c, "] SIGTERM received. ", "^Draining requests and shutting down...\n$");
    CHECK(exit_status(c.pid) == 0);
    close(c.log);
}

// The recipe's client script, where the machine has what it needs.
static void check_stream_chat(void) {
    if (system("command -v bash curl jq >/dev/null")) {
        SKIP("stream_chat.sh: it needs bash, curl and jq");
        return;
    }
    Child c = serve();
    char rest[200], command[400];
    CHECK(wait_log(&c, "ready to roll", rest, sizeof rest));
    const char *ask = "R1_URL=http://127.0.0.1:%d%s k8s/stream_chat.sh '%s' 2>&1";
    snprintf(command, sizeof command, ask, c.port, "", "How many r are there in \"strawberry\" ?");
    FILE *f = popen(command, "r");
    Buf out = read_all(dup(fileno(f)));
    CHECK(pclose(f) == 0, "got %s", out.data);
    CHECK(strstr(out.data, "Streaming response:\n") && strstr(out.data, "\n<think>\n") &&
              strstr(out.data, "\nReasoning:\n") && strstr(out.data, "\nFinal Answer:\n") &&
              strstr(out.data, "\nExecution time: "), "got %s", out.data);
    buf_free(&out);
    snprintf(command, sizeof command, ask, c.port, "/nowhere", "Hi");
    f = popen(command, "r");
    out = read_all(dup(fileno(f)));
    CHECK(pclose(f) >> 8 == 1 && strstr(out.data, "answered with status 404"), "got %s", out.data);
    buf_free(&out);
    kill(c.pid, SIGTERM);
    CHECK(exit_status(c.pid) == 0);
    close(c.log);
}

// The first signal lets it finish, the second one does not wait for that.
static void check_two_signals(const Child *c) {
    char rest[200];
    kill(c->pid, SIGTERM);
    CHECK(wait_log(c, "SIGTERM", rest, sizeof rest));
    double begin = now_seconds();
    kill(c->pid, SIGTERM);
    CHECK(exit_status(c->pid) == 130);
    CHECK(now_seconds() - begin < 5);
}

// A signal while a long prompt is in its step is not waited for when a second one comes.
static void check_signal_in_prompt(void) {
    char rest[200];
    Child c = serve();
    Buf body = {0};
    CHECK(wait_log(&c, "ready to roll", rest, sizeof rest));
    buf_str(&body, "{\"messages\":[{\"role\":\"user\",\"content\":\"");
    for (int i = 0; i < 16000; i++) buf_str(&body, "a ");
    buf_str(&body, "\"}]}");
    int fd = send_chat(&c, body.data);
    CHECK(wait_log(&c, "Prefill batch", rest, sizeof rest));
    check_two_signals(&c);
    buf_free(&body);
    close(fd), close(c.log);
}

// A second signal ends an endless answer at once, with 130.
static void check_second_signal(void) {
    char rest[200], byte;
    Child c = serve();
    CHECK(wait_log(&c, "ready to roll", rest, sizeof rest));
    int fd = send_chat(&c, ENDLESS);
    CHECK(read(fd, &byte, 1) == 1);
    check_two_signals(&c);
    close(fd), close(c.log);
}

int main(void) {
    program = getenv("R1") ? getenv("R1") : "./r1";
    signal(SIGPIPE, SIG_IGN);
    alarm(240);  // whatever hangs fails
    if (access("tiny-r1/config.json", R_OK) != 0) die("want to run beside tiny-r1");
    check_run();
    check_tokenize();
    check_usage();
    check_plan();
    check_serve();
    check_busy();
    check_log_lines();
    check_stream_chat();
    check_second_signal();
    check_signal_in_prompt();
    return test_end();
}
