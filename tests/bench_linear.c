// tests/bench_linear.c: how near `linear` comes to the speed at which this machine can read its
// weights. Prints GB/s of one [24576, 7168] e4m3 product for 1 and 8 rows beside a plain read of
// the same bytes, measured in turns in one run. Run by `make bench`; never part of `make test`.
#include "../r1.h"
#include "test.h"

#include <pthread.h>
#include <unistd.h>

enum { OUT = 24576, IN = 7168, ROUNDS = 9, MAX_THREADS = 256 };

static const uint8_t *weights;
static int n_threads;
static uint64_t sums[MAX_THREADS];

static void *read_part(void *arg) {
    size_t part = (size_t)OUT * IN / n_threads / 64 * 64, i = (intptr_t)arg;
    uint64_t sum[8] = {0};
    for (size_t k = i * part; k < (i + 1) * part; k += 64)
        for (int j = 0; j < 8; j++) {
            uint64_t word;
            memcpy(&word, weights + k + 8 * j, 8);
            sum[j] += word;
        }
    for (int j = 0; j < 8; j++) sums[i] += sum[j];
    return NULL;
}

static double read_all(void) {
    pthread_t thread[MAX_THREADS];
    double start = now_seconds();
    for (intptr_t i = 1; i < n_threads; i++) pthread_create(&thread[i], NULL, read_part, (void *)i);
    read_part(0);
    for (int i = 1; i < n_threads; i++) pthread_join(thread[i], NULL);
    return now_seconds() - start;
}

static double run_linear(bf16 *y, const Act *a, const Linear *w, int n) {
    double start = now_seconds();
    linear(y, a, w, n);
    return now_seconds() - start;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(void) {
    device_init(0, 1);
    n_threads = sysconf(_SC_NPROCESSORS_ONLN);
    if (n_threads > MAX_THREADS) n_threads = MAX_THREADS;
    uint8_t *data = device_alloc((size_t)OUT * IN);
    for (size_t i = 0; i < (size_t)OUT * IN; i++)
        data[i] =
            0x28 + (i * 2654435761u >> 13) % 0x50;  // normal numbers, as nearly all weights are
    weights = data;
    float *scale = device_alloc(OUT / BLOCK * (IN / BLOCK) * sizeof *scale);
    for (int i = 0; i < OUT / BLOCK * (IN / BLOCK); i++) scale[i] = 1e-4f;
    Linear w = {OUT, IN, DTYPE_F8_E4M3, data, (uint8_t *)scale};
    Act *a = act_new(8, IN);
    bf16 *x = device_alloc(8 * IN * sizeof *x), *y = device_alloc(8 * OUT * sizeof *y);
    for (int i = 0; i < 8 * IN; i++) x[i] = 0x3f80 + i % 100;
    uint16_t *ones = device_alloc(IN * sizeof *ones);
    for (int i = 0; i < IN; i++) ones[i] = 0x3f80;
    add_norm(x, a, NULL, &(Vector){IN, DTYPE_BF16, (uint8_t *)ones}, 1e-6f, 8);
    double time[3][ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        time[0][i] = read_all();
        time[1][i] = run_linear(y, a, &w, 1);
        time[2][i] = run_linear(y, a, &w, 8);
    }
    const char *name[] = {"plain read", "linear, 1 row", "linear, 8 rows"};
    for (int v = 0; v < 3; v++) qsort(time[v], ROUNDS, sizeof(double), ascending);
    for (int v = 0; v < 3; v++)
        printf("%-16s %6.1f GB/s, %3.0f %% of the read\n", name[v],
               (double)OUT * IN / time[v][ROUNDS / 2] / 1e9,
               100 * time[0][ROUNDS / 2] / time[v][ROUNDS / 2]);
    return sums[0] == 42;  // keeps the sums alive
}
