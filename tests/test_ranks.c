// tests/test_ranks.c: what becomes of a group of nodes when something goes wrong: a node that dies,
// hangs, comes late or differs, and strangers at the leader's door. Nodes are the program itself
// ($R1, default ./r1) on loopback, tiny-r1 on two ranks; where one has to misbehave, this test
// speaks its part, and includes r1.c for the words. Every wait has an end. Runs from the top of the
// tree.
#define main r1_main
#include "../r1.c"
#undef main
#include "test.h"

#include <arpa/inet.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { MOST = 64 };

typedef struct {
    pid_t pid;
    int number, port;       // of HTTP
} Child;

static pid_t started[MOST];
static int n_started;
static char dir[] = "/tmp/test_ranks.XXXXXX";

static void clean_up(void) {
    char command[64];
    for (int i = 0; i < n_started; i++)
        if (started[i]) kill(started[i], SIGKILL);
    snprintf(command, sizeof command, "rm -rf %s", dir);
    if (system(command)) printf("%s: can't be removed\n", dir);
}

static char *log_text(const Child *c) {
    size_t len;
    char path[64];
    snprintf(path, sizeof path, "%s/%d.log", dir, c->number);
    char *text = read_file(path, &len);
    return text ? text : format_string("no log");
}

enum { SOON = 15 };  // seconds within which what must happen does, also on a busy machine

// True when the text is in the child's log before so many seconds have passed.
static bool log_says(const Child *c, const char *text, double seconds) {
    for (double end = now_seconds() + seconds;; usleep(10000)) {
        char *log = log_text(c);
        bool found = strstr(log, text), late = now_seconds() > end;
        if (late && !found) printf("want \"%s\" in the log:\n%s\n", text, log);
        free(log);
        if (found || late) return found;
    }
}

// Its exit code; -1: it had to be killed, since it did not end in time.
static int exit_code(Child *c, double seconds) {
    int status = 0;
    for (double end = now_seconds() + seconds; !waitpid(c->pid, &status, WNOHANG); usleep(5000)) {
        if (now_seconds() < end) continue;
        kill(c->pid, SIGKILL);
        waitpid(c->pid, &status, 0);
    }
    for (int i = 0; i < n_started; i++)
        if (started[i] == c->pid) started[i] = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static struct sockaddr_in loopback(int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return a;
}

// A listening socket at any free port.
static int listen_any(int *port) {
    struct sockaddr_in a = loopback(0);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (bind(fd, (void *)&a, sizeof a) || listen(fd, 8)) die("bind: %s", strerror(errno));
    getsockname(fd, (void *)&a, &(socklen_t){sizeof a});
    *port = ntohs(a.sin_port);
    return fd;
}

static int free_port(void) {
    int port;
    close(listen_any(&port));
    return port;
}

static int dial(int port) {
    struct sockaddr_in a = loopback(port);
    struct timeval patience = {40, 0};  // an answer under ASan, beside others
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(fd, (void *)&a, sizeof a)) printf("note: connect: %s\n", strerror(errno));
    return fd;
}

// Starts node `rank` of two, whose leader is at a port, with more flags up to NULL.
static Child node_start(int rank, int leader, const char *const *more) {
    static int number;
    const char *program = getenv("R1") ? getenv("R1") : "./r1";
    char node[12], address[32], path[64];
    Child c = {.number = number++};
    snprintf(node, sizeof node, "%d", rank);
    snprintf(address, sizeof address, "127.0.0.1:%d", leader);
    snprintf(path, sizeof path, "%s/%d.log", dir, c.number);
    const char *argv[32] = {"r1", "serve", "--host", "127.0.0.1", "--port", "0", "--model-path",
                            "tiny-r1", "--tp", "2", "--nnodes", "2", "--node-rank", node,
                            "--dist-init-addr", address};
    for (int i = 16; more && *more; more++) argv[i++] = *more;
    fflush(stdout);
    c.pid = fork();
    if (c.pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        int fd = open(path, O_CREAT | O_WRONLY | O_APPEND, 0600);
        dup2(fd, 1), dup2(fd, 2);
        execv(program, (char **)argv);
        _exit(127);
    }
    if (n_started == MOST) die("too many children");
    started[n_started++] = c.pid;
    return c;
}

static void port_read(Child *c) {
    CHECK(log_says(c, "running on http://127.0.0.1:", SOON));
    char *log = log_text(c), *at = strstr(log, "127.0.0.1:");
    c->port = at ? atoi(at + strlen("127.0.0.1:")) : 0;
    free(log);
}

// A group of two that serves.
static void group_start(Child c[2]) {
    int port = free_port();
    for (int i = 0; i < 2; i++) c[i] = node_start(i, port, NULL);
    for (int i = 0; i < 2; i++) port_read(&c[i]);
    CHECK(log_says(&c[0], "ready to roll", SOON));
}

// Sends a request, with a body if it isn't NULL; the answer comes up to the end of the connection,
// or of ten seconds.
static int ask(const Child *c, const char *line, const char *body) {
    int fd = dial(c->port);
    dprintf(fd, "%s HTTP/1.0\r\nContent-Length: %zu\r\n\r\n%s", line, body ? strlen(body) : 0,
            body ? body : "");
    return fd;
}

static char *answer(int fd) {
    Buf b = {0};
    char chunk[4096];
    for (ssize_t n; (n = read(fd, chunk, sizeof chunk)) > 0;) buf_add(&b, chunk, n);
    buf_str(&b, "");
    close(fd);
    return b.data;
}

// Whether it comes to be that /health says so.
static bool health_says(const Child *c, const char *text, double seconds) {
    for (double end = now_seconds() + seconds;; usleep(10000)) {
        char *got = answer(ask(c, "GET /health", NULL));
        bool found = strstr(got, text), late = now_seconds() > end;
        if (late && !found) printf("want %s in %s\n", text, got);
        free(got);
        if (found || late) return found;
    }
}

// A stream without an end, of which the first bytes have come.
static int stream_start(const Child *c) {
    char byte;
    int fd = ask(c, "POST /v1/chat/completions", "{\"messages\":[{\"role\":\"user\",\"content\":"
                 "\"Hello\"}],\"stream\":true,\"ignore_eos\":true,\"max_tokens\":100000}");
    CHECK(read(fd, &byte, 1) == 1);
    return fd;
}

// The stream ends with this error, /health says why for a moment, and the exit code is 1.
static void check_failure(Child *c, int stream, const char *reason, double begin,
                          const char *what) {
    Buf seen = {0};
    char chunk[4096], want[400];
    snprintf(want, sizeof want, "data: {\"error\":{\"object\":\"error\",\"message\":\"%s", reason);
    buf_str(&seen, "");
    while (!strstr(seen.data, want)) {
        ssize_t n = read(stream, chunk, sizeof chunk);
        if (n <= 0) break;
        size_t keep = seen.len < sizeof want ? seen.len : sizeof want;
        buf_shift(&seen, NULL, seen.len - keep);
        buf_add(&seen, chunk, n);
    }
    double seconds = now_seconds() - begin;
    printf("note: %s is told after %.2f s\n", what, seconds);
    CHECK(strstr(seen.data, want), "got %s", seen.data);
    CHECK(seconds < 6, "%f", seconds);
    CHECK(health_says(c, "{\"status\":\"failed\",\"ready\":false", 0.5));
    CHECK(exit_code(c, SOON) == 1);
    CHECK(log_says(c, reason, 0));
    buf_free(&seen), close(stream);
}

static void test_serve(void) {
    Child c[2];
    double begin = now_seconds();
    group_start(c);
    printf("note: two nodes are ready %.2f s after their start\n", now_seconds() - begin);
    CHECK(health_says(&c[1], "{\"status\":\"ready\",\"ready\":true", SOON));
    CHECK(health_says(&c[1], "\"rank\":0,\"node\":0,\"state\":\"ready\"", 0));
    CHECK(health_says(&c[0], "\"rank\":1,\"node\":1,\"state\":\"ready\",\"loaded_bytes\":5", 0));
    char *got = answer(ask(&c[1], "GET /health_generate", NULL)), want[100];
    CHECK(strstr(got, " 200 OK") && strstr(got, "{\"status\":\"ready\""), "%s", got);
    free(got);
    got = answer(ask(&c[1], "GET /v1/models", NULL));
    snprintf(want, sizeof want, "node 1 serves /health and /metrics only; ask the leader at "
             "127.0.0.1:%d\"", c[0].port);
    CHECK(strstr(got, " 503 ") && strstr(got, want), "%s", got);
    free(got);
    got = answer(ask(&c[1], "GET /metrics", NULL));
    CHECK(strstr(got, "r1:load_bytes{model_name=\"tiny-r1\",rank=\"1\"} 5") &&
          strstr(got, "r1:ready{model_name=\"tiny-r1\"} 1") && !strstr(got, "sglang:"), "%s", got);
    free(got);
    // A signal to the worker: all that runs is finished, and both end well.
    int fd = ask(&c[0], "POST /generate", "{\"text\":\"Hello\",\"sampling_params\":"
                 "{\"max_new_tokens\":300,\"ignore_eos\":true}}");
    CHECK(health_says(&c[0], "\"running\":1", SOON));
    kill(c[1].pid, SIGTERM);
    CHECK(health_says(&c[0], "\"status\":\"draining\"", SOON));
    got = answer(fd);
    CHECK(strstr(got, "\"completion_tokens\":300"), "%s", got);
    free(got);
    CHECK(exit_code(&c[0], SOON) == 0 && exit_code(&c[1], SOON) == 0);
}

// One signal to the leader; one to each at the same time, which is no second one; two to the
// worker.
static void test_signals(void) {
    enum { LEADER, BOTH, TWICE };
    for (int which = LEADER; which <= TWICE; which++) {
        Child c[2];
        int code = which == TWICE ? 130 : 0;
        group_start(c);
        int fd = stream_start(&c[0]);
        if (which != TWICE) kill(c[0].pid, SIGTERM);
        if (which != LEADER) kill(c[1].pid, SIGTERM);
        CHECK(health_says(&c[0], "\"status\":\"draining\"", SOON));
        CHECK(health_says(&c[1], "\"status\":\"draining\"", SOON));
        CHECK(health_says(&c[0], "\"running\":1", SOON));
        if (which == TWICE) kill(c[1].pid, SIGTERM);
        else close(fd);
        CHECK(exit_code(&c[0], SOON) == code);
        CHECK(exit_code(&c[1], SOON) == code);
        if (which == TWICE) close(fd);
    }
}

static void test_killed(void) {
    Child c[2];
    group_start(c);
    int fd = stream_start(&c[0]);
    double begin = now_seconds();
    kill(c[1].pid, SIGKILL);
    check_failure(&c[0], fd, "rank 1 (node 1) was lost: ", begin, "a killed worker");
    exit_code(&c[1], SOON);
    group_start(c);
    begin = now_seconds();
    kill(c[0].pid, SIGKILL);
    CHECK(health_says(&c[1], "{\"status\":\"failed\",\"ready\":false", SOON));
    CHECK(health_says(&c[1], "\"reason\":\"rank 0 (node 0) was lost: ", 0));
    printf("note: a killed leader is told after %.2f s\n", now_seconds() - begin);
    CHECK(exit_code(&c[1], SOON) == 1);
    exit_code(&c[0], SOON);
}

// What takes its time, side by side: a worker that hangs; a worker that its leader lets wait; a
// leader whose worker never comes, and a client of its that says nothing.
static void test_slow(void) {
    Child c[2];
    int late_port = free_port(), lonely_port = free_port();
    Child worker = node_start(1, late_port, NULL);
    Child lonely = node_start(0, lonely_port, (const char *[]){"--dist-timeout", "6", NULL});
    port_read(&worker), port_read(&lonely);
    CHECK(health_says(&worker, "{\"status\":\"connecting\"", SOON));
    CHECK(health_says(&lonely, "{\"status\":\"connecting\"", SOON));
    CHECK(health_says(&lonely, "\"rank\":1,\"node\":1,\"state\":\"connecting\"", 0));
    int silent = dial(lonely_port);
    group_start(c);
    int fd = stream_start(&c[0]);
    double begin = now_seconds();
    kill(c[1].pid, SIGSTOP);
    CHECK(log_says(&lonely, "Waiting for node 1 (rank 1): not connected, 5 s of 6 s", SOON));
    CHECK(log_says(&worker, "Waiting for node 0 (rank 0): Connection refused, 5 s of 3600 s",
                   SOON));
    check_failure(&c[0], fd, "rank 1 (node 1) was lost: no heartbeat for 5.", begin,
                  "a stopped worker");
    kill(c[1].pid, SIGCONT);
    CHECK(exit_code(&c[1], SOON) == 1);
    char byte;
    CHECK(log_says(&lonely, ": it said nothing", SOON) && read(silent, &byte, 1) <= 0);
    CHECK(log_says(&lonely, "node 1 (rank 1): not connected after 6 s (--dist-timeout)", SOON));
    CHECK(exit_code(&lonely, SOON) == 1);
    Child leader = node_start(0, late_port, NULL);
    CHECK(log_says(&leader, "node 1 (rank 1) has come from 127.0.0.1", SOON));
    CHECK(log_says(&leader, "ready to roll", SOON));
    kill(leader.pid, SIGTERM);
    CHECK(exit_code(&leader, SOON) == 0 && exit_code(&worker, SOON) == 0);
    close(silent);
}

static void check_different(const char *const *more, const char *why) {
    int port = free_port();
    Child leader = node_start(0, port, NULL), worker = node_start(1, port, more);
    CHECK(exit_code(&leader, SOON) == 1 && exit_code(&worker, SOON) == 1);
    CHECK(log_says(&leader, why, 0) && log_says(&worker, why, 0));
}

static void test_different(void) {
    check_different((const char *[]){"--chunked-prefill-size", "64", NULL},
                    "node 1: --chunked-prefill-size: got 64, want 8192");
    char command[600], other[64];
    snprintf(other, sizeof other, "%s/other", dir);
    snprintf(command, sizeof command, "mkdir %s && ln -s $PWD/tiny-r1/* %s && rm %s/config.json && "
             "cp tiny-r1/config.json %s && echo >>%s/config.json", other, other, other, other,
             other);
    if (system(command)) die("can't copy tiny-r1");
    check_different((const char *[]){"--model-path", other, NULL},
                    "node 1: model fingerprint: got r1-");
}

static void test_port_taken(void) {
    int port, fd = listen_any(&port);
    Child c = node_start(0, port, NULL);
    CHECK(exit_code(&c, SOON) == 1);
    CHECK(log_says(&c, "cannot listen on 127.0.0.1:", 0));
    CHECK(log_says(&c, ": Address already in use", 0));
    close(fd);
}

static void test_flags(void) {
    static const struct { const char *flags[7], *message; } rows[] = {
        {{"--tp", "3", NULL}, "--tp: got 3, want a multiple of --nnodes, 2"},
        {{"--node-rank", "2", NULL}, "--node-rank: got 2, want less than --nnodes, 2"},
        {{"--nnodes", "0", NULL}, "--nnodes: got \"0\", want an integer in 1..64"},
        {{"--dist-init-addr", "6002", NULL},
         "--dist-init-addr: got \"6002\", want HOST:PORT or [IPV6]:PORT"},
        {{"--dist-init-addr", "a:", NULL}, "--dist-init-addr: got \"a:\""},
        {{"--dist-init-addr", ":1", NULL}, "--dist-init-addr: got \":1\""},
        {{"--dist-init-addr", "a:0", NULL}, "--dist-init-addr: got \"a:0\""},
        {{"--dist-init-addr", "a:65536", NULL}, "--dist-init-addr: got \"a:65536\""},
        {{"--dist-init-addr", "a:1x", NULL}, "--dist-init-addr: got \"a:1x\""},
        {{"--dist-init-addr", "::1:80", NULL}, "--dist-init-addr: got \"::1:80\""},
        {{"--dist-init-addr", "[]:80", NULL}, "--dist-init-addr: got \"[]:80\""},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        Child c = node_start(0, 1, rows[i].flags);
        CHECK(exit_code(&c, SOON) == 2);
        CHECK(log_says(&c, rows[i].message, 0));
    }
}

// ---- Nodes that this test plays

// Says HELLO as a worker; the kind of the answer.
static int hello(Line *l, int port, const Hello *h) {
    const char *why;
    *l = (Line){.fd = dial(port)};
    CHECK(frame_send(l->fd, FRAME_HELLO, h));
    return frame_take(l, 0, &why);
}

static void check_refused(const Child *leader, int port, const Hello *h, const char *text) {
    Line *l = xcalloc(1, sizeof *l);
    CHECK(hello(l, port, h) == FRAME_ANSWER);
    const Answer *a = (void *)l->in;
    CHECK(a->verdict == NOT_NOW && !strncmp(a->why, text, strlen(text)), "got %s", a->why);
    CHECK(log_says(leader, text, SOON));
    close(l->fd), free(l);
}

// None of those who knock does any harm: in the end the group of two is there.
static void test_strangers(void) {
    int port = free_port();
    Child leader = node_start(0, port, NULL);
    char garbage[] = "GET / HTTP/1.1\r\nHost: r1\r\n\r\n", byte;
    CHECK(log_says(&leader, "chat template", SOON));
    int slow = dial(port), http = dial(port);
    close(dial(port));
    CHECK(write(slow, &(uint32_t){FRAME_MAGIC}, 4) == 4);
    CHECK(write(http, garbage, sizeof garbage) > 0 && read(http, &byte, 1) <= 0);
    CHECK(log_says(&leader, ": it does not speak r1's protocol", SOON));
    CHECK(log_says(&leader, ": connection closed", SOON));
    // Another protocol; a length that is none; a frame that is none, and one out of turn.
    static const struct { Frame f; const char *why; } rows[] = {
        {{FRAME_MAGIC, PROTOCOL + 1, FRAME_HELLO, sizeof(Hello)},
         "it speaks another version's protocol"},
        {{FRAME_MAGIC, PROTOCOL, FRAME_HELLO, 0xffffffff}, "it sent a malformed frame"},
        {{FRAME_MAGIC, PROTOCOL, 99, 0}, "it sent a malformed frame"},
        {{FRAME_MAGIC, PROTOCOL, FRAME_ANSWER, sizeof(Answer)}, "it did not say HELLO"},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        char rest[sizeof(Answer)] = {0};
        int fd = dial(port);
        CHECK(write(fd, &rows[i].f, sizeof(Frame)) > 0 && write(fd, rest, sizeof rest) > 0);
        CHECK(read(fd, &byte, 1) <= 0);
        CHECK(log_says(&leader, rows[i].why, SOON));
        close(fd);
    }
    static Hello h = {.nonce = 1234, .node = 1, .engine = 1, .tokens = 64};  // of an earlier boot
    check_refused(&leader, port, &h, "node 1: boot nonce: got 00000000000004d2, want ");
    // More at once than there is room for: the first ones go.
    int crowd[GUESTS + 4];
    for (int i = 0; i < GUESTS + 4; i++) crowd[i] = dial(port);
    CHECK(log_says(&leader, ": too many came at once", SOON));
    for (int i = 0; i < GUESTS + 4; i++) close(crowd[i]);
    Child worker = node_start(1, port, NULL);
    CHECK(log_says(&leader, "ready to roll", SOON));
    kill(leader.pid, SIGTERM);
    CHECK(exit_code(&leader, SOON) == 0 && exit_code(&worker, SOON) == 0);
    close(slow), close(http);
}

// Of two nodes with one number the second waits, is told why, and comes when the first has gone.
static void test_twice(void) {
    static Line control;
    static Hello h = {.node = 1, .tokens = 64};
    int port = free_port();
    Child leader = node_start(0, port, NULL);
    CHECK(log_says(&leader, "chat template", SOON));
    server.model_dir = "tiny-r1";
    const char *const same[] = {"r1", "--tp", "2", "--nnodes", "2", NULL};
    const Command command = {"serve", "", SERVE, false, flags, COUNT(flags)};
    memset(&server.options, 0, sizeof server.options);
    flags_parse(&command, &server.options, (char **)same + 1);
    server.fingerprint = fingerprint();
    Buf facts = {0};
    facts_write(&facts);
    memcpy(h.facts, facts.data, facts.len);
    buf_free(&facts);
    CHECK(hello(&control, port, &h) == FRAME_ANSWER && ((Answer *)control.in)->verdict == WELCOME);
    CHECK(log_says(&leader, "node 1 (rank 1) has come from 127.0.0.1", SOON));
    check_refused(&leader, port, &h, "node 1: it is there already, from 127.0.0.1");
    Child worker = node_start(1, port, NULL);
    CHECK(log_says(&worker, "chat template", SOON));
    usleep(200000);
    CHECK(!kill(worker.pid, 0));
    close(control.fd);
    CHECK(log_says(&leader, "node 1 (rank 1) has left: connection closed", SOON));
    CHECK(log_says(&leader, "ready to roll", SOON));
    kill(worker.pid, SIGTERM);
    CHECK(exit_code(&leader, SOON) == 0 && exit_code(&worker, SOON) == 0);
}

// Plays a leader up to where all have loaded. The worker's two connections.
static void lead(int listener, Line line[2]) {
    static NodeStatus s = {.state = STATE_READY, .complete = 1, .tokens = 6400};
    const char *why;
    for (int i = 0; i < 2; i++) {
        line[i] = (Line){.fd = accept(listener, NULL, NULL)};
        CHECK(frame_take(&line[i], 0, &why) == FRAME_HELLO);
        const Hello *h = (void *)line[i].in;
        CHECK(h->node == 1 && h->engine == (uint32_t)i && h->nonce == (i ? 77u : 0));
        CHECK(strstr(h->facts, "version=" R1_VERSION "\n") && strstr(h->facts, "\n--tp-size=2\n"));
        CHECK(frame_send(line[i].fd, FRAME_ANSWER, &(Answer){77, 30000, WELCOME, ""}));
    }
    for (int i = 0; i < 2; i++) s.rank[i].state = STATE_READY;
    CHECK(frame_send(line[0].fd, FRAME_STATUS, &s));
}

// A leader that is gone in the middle of an order, and leaders that send nonsense.
static void test_cut(void) {
    static Line line[2];
    int port, listener = listen_any(&port);
    enum { ROWS = 100 };
    static const struct { OrderHead h; size_t sent; bool status; const char *why; } rows[] = {
        {{ORDER_STEP, 0, 0, ROWS, 1, ROWS}, 30, false, "onnection "},
        {{ORDER_STEP, 0, 0, ROWS, 1, ROWS}, sizeof(OrderHead) + 400, false, "onnection "},
        {{ORDER_STEP, 0, 0, 1u << 31, 1, ROWS}, 0, false, "it sent an impossible order"},
        {{99, 0, 0, 0, 0, 0}, 0, false, "it sent an impossible order"},
        {{ORDER_MORE_LOGITS, 0, 1, 0, 0, 0}, 0, false, "it sent an impossible order"},
        {{ORDER_END, 0, 0, 0, 0, 0}, 0, true, "it sent a frame out of turn"},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        const OrderHead *h = &rows[i].h;
        Frame f = {FRAME_MAGIC, PROTOCOL, FRAME_ORDER, sizeof *h};
        if (h->rows == ROWS) f.bytes += (3 * h->rows + h->n_out + h->n_pages) * sizeof(int);
        char data[4096] = {0};
        memcpy(data, h, sizeof *h);
        Child c = node_start(1, port, NULL);
        lead(listener, line);
        CHECK(log_says(&c, "Load weight end", SOON));
        double begin = now_seconds();
        if (rows[i].status) {
            CHECK(frame_send(line[0].fd, FRAME_ANSWER, data));
        } else {
            peer_move(line[1].fd, 1, true, &f, sizeof f);
            peer_move(line[1].fd, 1, true, data, rows[i].sent ? rows[i].sent : sizeof *h);
        }
        if (rows[i].sent) close(line[0].fd), close(line[1].fd);
        CHECK(log_says(&c, "rank 0 (node 0) was lost: ", SOON) && log_says(&c, rows[i].why, 0));
        if (!i) printf("note: an order cut short is told after %.2f s\n", now_seconds() - begin);
        CHECK(exit_code(&c, SOON) == 1);
        if (!rows[i].sent) close(line[0].fd), close(line[1].fd);
    }
    close(listener);
}

// ---- Orders, in this process

enum { SEQS = 256, CONTEXT = 2048 };

static Order received;

static void *receive(void *fd) {
    while (nodes_receive(&received))
        if (write((int)(intptr_t)fd, "", 1) != 1) die("write: %s", strerror(errno));
    return NULL;
}

// What a worker makes of an order is what the leader meant; and how long that takes.
static void test_orders(void) {
    static int id[SEQS], position[SEQS], seq[SEQS], out[SEQS], table[SEQS][CONTEXT / PAGE];
    int pair[2], back[2], port, listener = listen_any(&port);
    pair[0] = dial(port), pair[1] = accept(listener, NULL, NULL);
    if (pipe(back)) die("pipe: %s", strerror(errno));
    for (int i = 0; i < 2; i++)
        setsockopt(pair[i], IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    server.options.nnodes = 2, server.node = 0;
    server.config.vocab_size = 1000, server.config.max_position_embeddings = CONTEXT;
    ranks.max_rows = ranks.max_out = SEQS, ranks.n_pages = SEQS * CONTEXT / PAGE + 1;
    nodes.engine[0] = pair[0], nodes.engine[1] = pair[1];
    for (int i = 0; i < SEQS; i++) {
        for (int p = 0; p < CONTEXT / PAGE; p++) table[i][p] = (i * 37 + p * 101) % 8192;
        id[i] = i * 3, position[i] = CONTEXT - 1 - i, seq[i] = SEQS - 1 - i / 2;
    }
    Order o = {.kind = ORDER_STEP, .batch = {.n = SEQS, .id = id, .position = position, .seq = seq,
               .pages = table[0], .max_pages = CONTEXT / PAGE, .out = out, .n_out = SEQS}};
    pthread_t thread;
    pthread_create(&thread, NULL, receive, (void *)(intptr_t)back[1]);
    static const int sizes[] = {1, 64, SEQS};
    for (size_t k = 0; k < COUNT(sizes); k++) {
        enum { TIMES = 1000 };
        double begin = now_seconds(), sending = 0;
        o.batch.n = o.batch.n_out = sizes[k];
        for (int i = 0; i < sizes[k]; i++) out[i] = sizes[k] - 1 - i;
        for (int i = 0; i < TIMES; i++) {
            char byte;
            double start = now_seconds();
            nodes_send(&o);
            sending += now_seconds() - start;
            if (read(back[0], &byte, 1) != 1) die("read: %s", strerror(errno));
        }
        printf("note: an order of %d rows at %d tokens: %.1f us to send, %.1f us with its way "
               "there and an answer's back\n", sizes[k], CONTEXT, 1e6 * sending / TIMES,
               1e6 * (now_seconds() - begin) / TIMES);
        const Batch *b = &received.batch;
        CHECK(received.kind == ORDER_STEP && b->n == sizes[k] && b->n_out == sizes[k]);
        size_t bytes = b->n * sizeof(int);
        int wrong = memcmp(b->id, id, bytes) || memcmp(b->out, out, bytes) ||
                    memcmp(b->position, position, bytes);
        for (int i = 0; i < b->n; i++)
            for (int p = 0; p <= position[i] / PAGE; p++)
                wrong += b->pages[b->seq[i] * b->max_pages + p] != table[seq[i]][p];
        CHECK(wrong == 0, "%d", wrong);
        for (int i = 0; i < b->n; i++)  // rows of one sequence stay one
            wrong += i % 2 && b->seq[i] != b->seq[i - 1];
        CHECK(wrong == 0, "%d", wrong);
    }
    nodes_send(&(Order){.kind = ORDER_MORE_LOGITS, .first = 200, .n = 56});
    nodes_send(&(Order){.kind = ORDER_END});
    pthread_join(thread, NULL);
    CHECK(received.kind == ORDER_END);
    // No index of an order may point outside.
    OrderHead h = {ORDER_STEP, 0, 0, 1, 1, 2};
    const int good[] = {999, 127, 0, 0, 8192, 0};  // id, position, seq, out, two pages
    static const struct { int at, value; } bad[] = {
        {0, -1}, {0, 1000}, {1, -1}, {1, 128}, {1, CONTEXT}, {2, -1}, {2, 1}, {2, 2}, {3, -1},
        {3, 1}, {4, -1}, {4, 8193}, {5, INT_MIN}};
    CHECK(order_read(&o, &h, good));
    for (size_t i = 0; i < COUNT(bad); i++) {
        int data[COUNT(good)];
        memcpy(data, good, sizeof data);
        data[bad[i].at] = bad[i].value;
        CHECK(!order_read(&o, &h, data), "%zu", i);
    }
    CHECK(!order_read(&o, &(OrderHead){ORDER_MORE_LOGITS, 1, 1, 0, 0, 0}, good));
    CHECK(!order_read(&o, &(OrderHead){ORDER_MORE_LOGITS, UINT32_MAX, 2, 0, 0, 0}, good));
    CHECK(order_read(&o, &(OrderHead){ORDER_MORE_LOGITS, 0, 1, 0, 0, 0}, good));
    for (int i = 0; i < 2; i++) close(pair[i]), close(back[i]);
    close(listener);
}

// An order is its giver's again once all ranks have done it, and may turn into anything: a rank
// that still looked at it could take that for the end, and would be missing at the next one. On a
// single processor the giver often goes on just there.
static void test_reused(void) {
    cpu_set_t all, one = {0};
    Checkpoint *files = checkpoint_open("tiny-r1", false);
    Order o;
    CPU_SET(sched_getcpu(), &one);
    sched_getaffinity(0, sizeof all, &all), sched_setaffinity(0, sizeof one, &one);
    server.n_local = server.n_ranks = 2;
    server.options.nnodes = 1;
    ranks.group = (Group){.size = 2, .n_local = 2};
    server.config = config_load("tiny-r1");
    ranks_load(files, PAGE, PAGE, 2);
    for (int i = 0; i < 100000; i++) {
        o.kind = ORDER_MORE_LOGITS, o.first = 0, o.n = 0;
        order_here(&o);
        o.kind = ORDER_END;
    }
    ranks_end();
    checkpoint_close(files);
    sched_setaffinity(0, sizeof all, &all);
    CHECK(ranks.busy == 0, "%d ranks are busy", ranks.busy);
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);
    alarm(200);  // whatever hangs fails
    if (access("tiny-r1/config.json", R_OK) != 0) die("want to run beside tiny-r1");
    if (!mkdtemp(dir)) die("%s: %s", dir, strerror(errno));
    atexit(clean_up);
    static const struct { const char *name; void (*run)(void); } tests[] = {
        {"serve", test_serve},       {"signals", test_signals},     {"killed", test_killed},
        {"slow", test_slow},         {"different", test_different}, {"orders", test_orders},
        {"cut", test_cut},
        {"flags", test_flags},       {"port taken", test_port_taken},
        {"strangers", test_strangers}, {"twice", test_twice},
        {"reused", test_reused},
    };
    for (size_t i = 0; i < COUNT(tests); i++) {
        double begin = now_seconds();
        int failed = test_failed;
        tests[i].run();
        if (getenv("VERBOSE") || test_failed > failed)
            printf("%s: %.2f s\n", tests[i].name, now_seconds() - begin);
    }
    return test_end();
}
