// tests/test_reading.c: how weights are read for the ranks of a node, without a GPU. Ranks are
// threads that want whole tensors, rows of their own, or columns side by side, take what they want
// at uneven speeds, and compare it with the maps. The disk is replaced by one that is watched: it
// counts, insists on O_DIRECT's alignment, and may interrupt, stop short, refuse or fail.
#include "../r1.h"

#include <fcntl.h>
#include <unistd.h>

ssize_t disk_read(int fd, void *data, size_t bytes, off_t at);
int disk_flags(int fd, int command, ...);
#define pread disk_read
#define fcntl disk_flags
#define main r1_main
#include "../r1.c"
#undef main
#undef fcntl
#undef pread
#include "test.h"

#include <sys/syscall.h>
#include <sys/wait.h>

// ---- The disk -----------------------------------------------------------------------------------

typedef enum { CALM, INTERRUPTS, STOPS_SHORT, REFUSES_FLAG, REFUSES_READS, FAILS } Mood;

static Mood mood;
static atomic_ulong n_reads, bytes_read, n_unaligned;

static ssize_t real_read(int fd, void *data, size_t bytes, off_t at) {
    return syscall(SYS_pread64, fd, data, bytes, at);
}

ssize_t disk_read(int fd, void *data, size_t bytes, off_t at) {
    unsigned long turn = n_reads++;
    bool direct = fcntl(fd, F_GETFL) & O_DIRECT;
    bool aligned = (uintptr_t)data % SECTOR == 0 && bytes % SECTOR == 0 && at % SECTOR == 0;
    n_unaligned += direct && !aligned;
    errno = direct && (!aligned || mood == REFUSES_READS) ? EINVAL
            : mood == INTERRUPTS && turn % 3 < 2          ? EINTR
            : mood == FAILS && turn == 3                  ? EIO
                                                          : 0;
    if (errno) return -1;
    if (mood == STOPS_SHORT && bytes > 2 * SECTOR) bytes = turn % 2 ? SECTOR : bytes / 3;
    ssize_t n = real_read(fd, data, bytes, at);
    bytes_read += n > 0 ? n : 0;
    return n;
}

int disk_flags(int fd, int command, ...) {
    va_list args;
    va_start(args, command);
    int value = va_arg(args, int);
    va_end(args);
    if (mood == REFUSES_FLAG && (value & O_DIRECT)) return errno = EINVAL, -1;
    return fcntl(fd, command, value);
}

// ---- A checkpoint of random bytes ---------------------------------------------------------------

enum { FILES = 3, TENSORS = 5, ROWS = 96 };

// Columns of a tensor's rows: from bytes to several pieces, so that pieces hold many tensors and
// tensors cross pieces.
static const int columns[FILES][TENSORS] = {
    {8, 300000, 24, 1000, 8}, {7168, 64, 90000, 16, 2048}, {8, 8, 16, 8, 40}};

static const char *dir;

static void files_write(void) {
    Buf index = {0};
    uint64_t state = 1;
    buf_str(&index, "{\"weight_map\":{");
    for (int f = 0; f < FILES; f++) {
        Buf header = {0};
        char *name = format_string("%s/%d.safetensors", dir, f);
        FILE *file = fopen(name, "w");
        size_t at = 0;
        for (int t = 0; t < TENSORS; t++) {
            size_t end = at + (size_t)ROWS * columns[f][t];
            buf_printf(&header, "%s\"%d.%d\":{\"dtype\":\"U8\",\"shape\":[%d,%d],"
                       "\"data_offsets\":[%zu,%zu]}", t ? "," : "{", f, t, ROWS, columns[f][t], at,
                       end);
            buf_printf(&index, "%s\"%d.%d\":\"%d.safetensors\"", f + t ? "," : "", f, t, f);
            at = end;
        }
        buf_printf(&header, "}%*s", f, "");  // odd addresses
        uint64_t len = header.len;
        if (!file || fwrite(&len, 8, 1, file) != 1 || fwrite(header.data, len, 1, file) != 1)
            die("can't write %s", name);
        uint64_t *data = xmalloc(at + sizeof *data);
        for (size_t i = 0; i * sizeof *data < at; i++) data[i] = state = mix(state + i);
        if (fwrite(data, at, 1, file) != 1 || fclose(file)) die("can't write %s", name);
        buf_free(&header), free(name), free(data);
    }
    buf_str(&index, "}}");
    char *name = format_string("%s/model.safetensors.index.json", dir);
    FILE *file = fopen(name, "w");
    if (!file || fwrite(index.data, index.len, 1, file) != 1 || fclose(file)) die("can't write");
    buf_free(&index), free(name);
}

static const Tensor *tensor(const Checkpoint *c, int f, int t) {
    char name[16];
    Str s = {name, snprintf(name, sizeof name, "%d.%d", f, t)};
    return checkpoint_slot(c, s);
}

// ---- Ranks --------------------------------------------------------------------------------------

typedef struct { const uint8_t *data; size_t rows, bytes, stride; } Part;  // what a rank wants

typedef struct {
    Checkpoint *files;
    int local, n_local, n_parts, first, step;  // tensors first, first + step, ..
    Split split;
    Part parts[FILES * TENSORS];
    size_t taken, wanted;
    int wrong;
    pthread_t thread;
} Taker;

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// Compares what of a part lies in a piece with the map.
static void part_take(Taker *r, const Part *w, const Piece *p, const uint8_t *data) {
    for (size_t row = 0; row < w->rows; row++) {
        const uint8_t *from = w->data + row * w->stride, *end = from + w->bytes;
        if (from < p->from) from = p->from;
        if (end > p->end) end = p->end;
        if (from >= end) continue;
        r->wrong += memcmp(data + (from - p->from), from, end - from) != 0;
        r->taken += end - from;
    }
}

static void *release_late(void *piece) {  // as a GPU does
    usleep(((Piece *)piece)->from[0] % 8 * 100);
    reading_release(piece);
    return NULL;
}

static void *taker_main(void *arg) {
    Taker *r = arg;
    uint8_t *ring = NULL;
    size_t ring_bytes = (size_t)READ_AHEAD * (PIECE_BYTES + SECTOR);
    for (int i = r->first; i < FILES * TENSORS; i += r->step) {
        const Tensor *t = tensor(r->files, i / TENSORS, i % TENSORS);
        size_t rows = ROWS, width = t->shape[1], bytes = width;
        const uint8_t *data = t->data;
        if (r->split == OUT) rows /= r->n_local, data += r->local * rows * width;
        if (r->split == IN) bytes /= r->n_local, data += r->local * bytes;
        r->parts[r->n_parts++] = (Part){data, rows, bytes, width};
        r->wanted += rows * bytes;
        if (!reading_want(data, (rows - 1) * width + bytes)) die("a tensor in no file");
    }
    if (!r->local && posix_memalign((void **)&ring, SECTOR, ring_bytes)) die("no ring");
    int n;
    Piece *pieces = reading_begin(&n, ring, r->n_local);
    for (Piece *p = pieces; p < pieces + n; p++) {
        bool wanted = false;
        for (Part *w = r->parts; w < r->parts + r->n_parts; w++)
            wanted |= w->data < p->end && w->data + (w->rows - 1) * w->stride + w->bytes > p->from;
        if (!wanted) {
            reading_release(p);
            continue;
        }
        const uint8_t *data = reading_wait(p);
        const File *f = file_of(p->from);
        size_t behind = smaller(SECTOR, f->map + f->size - p->end), size = p->end - p->from;
        r->wrong += memcmp(data, p->from, size + behind) != 0;
        for (Part *w = r->parts; w < r->parts + r->n_parts; w++) part_take(r, w, p, data);
        pthread_t late;
        if (pthread_create(&late, NULL, release_late, p) || pthread_detach(late)) die("no thread");
    }
    for (Piece *p = pieces; p < pieces + n; p++) {  // what is released late is the GPU's, still
        pthread_mutex_lock(&reading.mutex);
        while (p->left) pthread_cond_wait(&reading.change, &reading.mutex);
        pthread_mutex_unlock(&reading.mutex);
    }
    free(reading_end());
    return NULL;
}

static void load(const char *label, Mood m, Split split, int n_local, int first, int step) {
    Taker r[8] = {0};
    Checkpoint *files = checkpoint_open(dir, false);
    size_t union_bytes = 0;
    reading.files = files;
    mood = m;
    n_reads = 0;
    bytes_read = 0;
    n_unaligned = 0;
    for (int i = 0; i < n_local; i++) {
        r[i] = (Taker){files, i, n_local, .first = first, .step = step, .split = split};
        if (pthread_create(&r[i].thread, NULL, taker_main, &r[i])) die("no thread");
    }
    for (int i = 0; i < n_local; i++) {
        pthread_join(r[i].thread, NULL);
        CHECK(r[i].wrong == 0, "%s, rank %d: %d wrong", label, i, r[i].wrong);
        CHECK(r[i].taken == r[i].wanted, "%s, rank %d: took %zu of %zu bytes", label, i,
              r[i].taken, r[i].wanted);
        union_bytes += r[i].wanted;
    }
    if (split == WHOLE) union_bytes /= n_local;
    size_t slack = (union_bytes / PIECE_BYTES + FILES * TENSORS + 2) * 10 * SECTOR;
    CHECK(mood == STOPS_SHORT || (bytes_read >= union_bytes && bytes_read <= union_bytes + slack),
          "%s: read %lu bytes where %zu are wanted", label, bytes_read, union_bytes);
    CHECK(mood > INTERRUPTS || n_unaligned == 0, "%s: %lu unaligned reads", label, n_unaligned);
    checkpoint_close(files);
}

// ---- Tests --------------------------------------------------------------------------------------

static void test_loads(void) {
    static const struct { const char *label; Split split; int ranks, first, step; } rows[] = {
        {"one rank", WHOLE, 1, 0, 1},          {"four of all", WHOLE, 4, 0, 1},
        {"rows of four", OUT, 4, 0, 1},        {"columns of eight", IN, 8, 0, 1},
        {"columns of four", IN, 4, 1, 3},      {"every third tensor", WHOLE, 2, 2, 3},
        {"small ones", WHOLE, 3, 10, 1},       {"the last one", IN, 2, FILES * TENSORS - 1, 1},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        load(rows[i].label, CALM, rows[i].split, rows[i].ranks, rows[i].first, rows[i].step);
    load("interrupted", INTERRUPTS, IN, 4, 0, 1);
    load("short reads", STOPS_SHORT, OUT, 2, 0, 1);
    load("O_DIRECT refused", REFUSES_FLAG, WHOLE, 2, 0, 1);
    load("direct reads refused", REFUSES_READS, WHOLE, 2, 0, 1);
}

// One byte out of each stretch is a piece of its own: many more pieces than buffers.
static void test_ring(void) {
    enum { STRETCH = 64 << 10 };
    Checkpoint *files = checkpoint_open(dir, false);
    const Tensor *t = tensor(files, 0, 1);
    int n, wrong = 0, wanted = t->bytes / STRETCH;
    uint8_t *ring;
    reading.files = files;
    mood = CALM;
    for (int i = 0; i < wanted; i++) reading_want(t->data + (size_t)i * STRETCH, 1);
    if (posix_memalign((void **)&ring, SECTOR, (size_t)READ_AHEAD * (PIECE_BYTES + SECTOR)))
        die("no ring");
    Piece *p = reading_begin(&n, ring, 1);
    CHECK(n == wanted && n > 10 * READ_AHEAD, "%d pieces of %d", n, wanted);
    usleep(50000);  // they are read ahead, and no further
    for (int i = 0; i < n; i++) CHECK(i < READ_AHEAD || !p[i].data, "piece %d is there", i);
    for (int i = 0; i < n; i++) {
        const uint8_t *data = reading_wait(&p[i]), *from = t->data + (size_t)i * STRETCH;
        wrong += p[i].end != from + 1 || data[from - p[i].from] != *from;
        reading_release(&p[i]);
    }
    CHECK(wrong == 0, "%d of %d pieces", wrong, n);
    free(reading_end());
    uint8_t heap[16];
    CHECK(!reading_want(heap, sizeof heap), "memory that no file holds");
    checkpoint_close(files);
}

// In a child, which must end with one line.
static void check_dies(const char *label, Mood m, off_t cut, const char *want) {
    int fd[2], status;
    char text[1000] = "";
    if (pipe(fd)) die("no pipe");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(fd[1], 2);
        alarm(30);
        Checkpoint *files = checkpoint_open(dir, false);
        char *name = format_string("%s/0.safetensors", dir);
        if (cut && truncate(name, files->files[0].size - cut)) die("can't cut %s", name);
        Taker r = {files, 0, 1, .step = 1};
        reading.files = files;
        mood = m;
        n_reads = 0;
        taker_main(&r);
        _exit(0);
    }
    close(fd[1]);
    for (size_t n = 0; n < sizeof text - 1;) {
        ssize_t got = read(fd[0], text + n, sizeof text - 1 - n);
        if (got <= 0) break;
        n += got;
    }
    close(fd[0]);
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1 && strncmp(text, "r1: ", 4) == 0 &&
              strstr(text, want),
          "%s: status %x, want \"%s\", got: %s", label, status, want, text);
    if (cut) files_write();
}

static void test_errors(void) {
    check_dies("a broken disk", FAILS, 0, "safetensors: reading weights at byte");
    check_dies("a broken disk", FAILS, 0, "Input/output error");
    for (off_t cut = 1; cut < 20000000; cut = cut * 7 + 4096) {
        check_dies("a file that was cut", CALM, cut, "0.safetensors: reading weights at byte");
        check_dies("a file that was cut", STOPS_SHORT, cut, "the file ends here now");
    }
}

static void test_in(const char *parent) {
    char *template = format_string("%s/r1-test-reading-XXXXXX", parent);
    if (!(dir = mkdtemp(template))) {
        SKIP("%s can't be written", parent);
        free(template);
        return;
    }
    files_write();
    test_loads(), test_ring(), test_errors();
    for (int f = 0; f <= FILES; f++) {
        char *name = f < FILES ? format_string("%s/%d.safetensors", dir, f)
                               : format_string("%s/model.safetensors.index.json", dir);
        unlink(name), free(name);
    }
    rmdir(dir), free(template);
}

int main(void) {
    freopen("/dev/null", "w", stderr);  // the log
    test_in("/tmp"), test_in("/dev/shm");
    return test_end();
}
