// tests/test.h: the whole test framework. A test program calls CHECK for each fact, SKIP where the
// machine lacks something, and returns test_end(), which prints the line that `make test` adds up.
#ifndef TEST_H
#define TEST_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int test_passed, test_failed, test_skipped;

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (condition) { test_passed++; break; }                                                   \
        test_failed++;                                                                             \
        printf("%s:%d: failed: %s: ", __FILE__, __LINE__, #condition);                             \
        printf(" " __VA_ARGS__);                                                                   \
        printf("\n");                                                                              \
    } while (0)

#define SKIP(...)                                                                                  \
    do {                                                                                           \
        test_skipped++;                                                                            \
        printf("skipped: " __VA_ARGS__);                                                           \
        printf("\n");                                                                              \
    } while (0)

static inline int test_end(void) {
    printf("%d passed, %d failed, %d skipped\n", test_passed, test_failed, test_skipped);
    return test_failed != 0;
}

#endif
