// tests/test_device.h: reads and fills what a twin has, for tests that are built for both: with
// -DCUDA, and kernels.cu instead of kernels.c, it lies in a GPU's memory.
#ifndef TEST_DEVICE_H
#define TEST_DEVICE_H

#include "../r1.h"

#include <string.h>

#ifdef CUDA
enum { ON_GPU = 1 };
int cudaGetDeviceCount(int *n);
int cudaDeviceSynchronize(void);
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind);
int cudaMemset(void *to, int value, size_t bytes);

static inline void device_fill(void *to, int value, size_t bytes) {
    if (cudaMemset(to, value, bytes) || cudaDeviceSynchronize())
        die("CUDA: can't fill %zu bytes", bytes);
}

static inline void device_read(void *to, const void *from, size_t bytes) {
    enum { DEVICE_TO_HOST = 2 };
    if (cudaDeviceSynchronize() || cudaMemcpy(to, from, bytes, DEVICE_TO_HOST))
        die("CUDA: can't read %zu bytes", bytes);
}
#else
enum { ON_GPU = 0 };
static inline void device_fill(void *to, int value, size_t bytes) { memset(to, value, bytes); }

static inline void device_read(void *to, const void *from, size_t bytes) {
    memcpy(to, from, bytes);
}
#endif

#endif
