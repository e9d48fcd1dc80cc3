# make          builds ./r1: for the GPU where there are a Hopper GPU and nvcc, else for the CPU, for
#               which gcc and make are enough; make CUDA=1 and make CUDA=0 decide by hand
# make test     runs every test and adds up what they say; make test SAN=1 under ASan and UBSan
# make soak     minutes of load on the real server; needs Python 3
# make test-web tries chat.html in a headless Chromium (see tests/test_web.py for what it needs)
# make bench    prints how near the CPU's matrix product comes to the memory's speed
#
# ARCH chooses the processor: the machine's own by default, ARCH=-march=x86-64-v3 for a binary that
# runs on others.
ifeq ($(origin CC),default)
CC := gcc
endif
ARCH ?= -march=native
SAN ?= 0
NVCC ?= nvcc
HOPPER := nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -qx 9.0
CUDA ?= $(shell $(HOPPER) && command -v $(NVCC) >/dev/null && echo 1 || echo 0)
TWIN := kernels
LINK = $(CC) $(CFLAGS)
LIBS := -lm -lpthread
ifeq ($(SAN),1)
BUILD := build/san
OPT := -O2 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
else ifeq ($(CUDA),1)
BUILD := build/cuda
OPT := -O3
TWIN := kernels_cuda
LINK = $(NVCC) $(NVCCFLAGS)
LIBS += -lnccl
else
BUILD := build
OPT := -O3
endif
# -ffp-contract=off: a product and a sum round one by one, the same on every processor.
CFLAGS := -std=gnu11 -g $(OPT) $(ARCH) -ffp-contract=off -Wall -Wextra -Wno-missing-field-initializers \
    -Wshadow -Wstrict-prototypes
NVCCFLAGS := -gencode arch=compute_90a,code=sm_90a -O3 -std=c++17 -lineinfo \
    -Xcompiler -Wall,-Wextra,-Wno-missing-field-initializers,-Wshadow

# Other flags or another compiler make everything anew: objects depend on a file that holds them.
FLAGS := $(BUILD)/flags
$(shell mkdir -p $(BUILD); echo '$(CC) $(CFLAGS) $(NVCCFLAGS)' | cmp -s - $(FLAGS) || \
    echo '$(CC) $(CFLAGS) $(NVCCFLAGS)' >$(FLAGS))

SOURCES := r1 $(TWIN) tokenizer json http bench
TESTS := json tokenizer kernels checkpoint reading slices slices_exact sample scheduler http bench \
    share ranks oracle oracle_exact end_to_end
# In Python, where there is one: the manifests, the fetch of the weights, two nodes on one machine.
SCRIPTS := k8s fetch group
ifeq ($(TWIN),kernels_cuda)
TESTS += cuda gemm mla slices_cuda oracle_cuda
endif

ifeq ($(SAN),1)
r1: build/san/r1
else
# Compared each time: the other twin's may lie there, and be newer.
r1: $(BUILD)/r1 FORCE
	@cmp -s $< $@ || cp $< $@
endif

$(BUILD)/r1: $(SOURCES:%=$(BUILD)/%.o)
	$(LINK) $^ -o $@ $(LIBS)

$(BUILD)/%.o: %.c r1.h Makefile $(FLAGS)
	$(CC) $(CFLAGS) -c $< -o $@

$(BUILD)/http.o: chat.html

$(BUILD)/kernels_cuda.o: kernels.cu r1.h Makefile $(FLAGS)
	$(NVCC) $(NVCCFLAGS) -c $< -o $@

# r1.c without its main, for test programs; and the twin without any rounding.
$(BUILD)/r1_test.o: r1.c r1.h Makefile $(FLAGS)
	$(CC) $(CFLAGS) -Dmain=r1_main -c $< -o $@

$(BUILD)/%_exact.o: %.c r1.h Makefile $(FLAGS)
	$(CC) $(CFLAGS) -DEXACT -Dmain=r1_main -c $< -o $@

PARTS := $(BUILD)/r1_test.o $(patsubst %,$(BUILD)/%.o,kernels tokenizer json http bench)

$(BUILD)/test_%: tests/test_%.c tests/test.h tests/test_device.h r1.h $(PARTS)
	$(CC) $(CFLAGS) $< $(PARTS) -o $@ $(LIBS)

$(BUILD)/test_http: tests/test_http.c tests/test.h r1.h $(patsubst %,$(BUILD)/%.o,tokenizer json http)
	$(CC) $(CFLAGS) $< $(patsubst %,$(BUILD)/%.o,tokenizer json http) -o $@ $(LIBS)

# These include r1.c and kernels.c, to reach what is static there.
$(BUILD)/test_scheduler $(BUILD)/test_ranks $(BUILD)/test_reading: $(BUILD)/test_%: tests/test_%.c \
    tests/test.h r1.c r1.h $(PARTS)
	$(CC) $(CFLAGS) $< $(filter-out %/r1_test.o,$(PARTS)) -o $@ $(LIBS)

$(BUILD)/test_kernels: tests/test_kernels.c tests/test.h kernels.c r1.h $(BUILD)/json.o
	$(CC) $(CFLAGS) $< $(BUILD)/json.o -o $@ $(LIBS)

# They include kernels.cu and compare it with r1.c on the C twin, whose names all get "ref_" before.
$(BUILD)/ref.o: $(BUILD)/r1_test.o $(BUILD)/kernels.o
	ld -r $^ -o $@
	nm -g --defined-only $@ | sed 's/.* \(.*\)/\1 ref_\1/' >$(BUILD)/ref_names
	objcopy --redefine-syms=$(BUILD)/ref_names $@

REF := $(patsubst %,$(BUILD)/%.o,ref r1_test tokenizer json http bench)

$(BUILD)/test_cuda $(BUILD)/test_gemm $(BUILD)/test_mla: $(BUILD)/test_%: tests/test_%.cu \
    tests/test_cuda.h tests/test.h kernels.cu r1.h $(REF)
	$(NVCC) $(NVCCFLAGS) $< $(REF) -o $@ $(LIBS)

$(BUILD)/test_%_cuda: tests/test_%.c tests/test.h tests/test_device.h r1.h $(BUILD)/kernels_cuda.o \
    $(PARTS)
	$(CC) $(CFLAGS) -DCUDA -c $< -o $@.o
	$(LINK) $@.o $(filter-out %/kernels.o,$(PARTS)) $(BUILD)/kernels_cuda.o -o $@ $(LIBS)

# It includes bench.c.
$(BUILD)/test_bench: tests/test_bench.c tests/test.h bench.c r1.h $(PARTS)
	$(CC) $(CFLAGS) $< $(filter-out %/bench.o,$(PARTS)) -o $@ $(LIBS)

$(BUILD)/test_%_exact: tests/test_%.c tests/test.h tests/test_device.h r1.h $(BUILD)/r1_exact.o $(BUILD)/kernels_exact.o $(PARTS)
	$(CC) $(CFLAGS) -DEXACT $< $(BUILD)/r1_exact.o $(BUILD)/kernels_exact.o \
	    $(patsubst %,$(BUILD)/%.o,tokenizer json http bench) -o $@ $(LIBS)

$(BUILD)/bench_linear: tests/bench_linear.c r1.h $(PARTS)
	$(CC) $(CFLAGS) $< $(PARTS) -o $@ $(LIBS)

test: $(BUILD)/r1 $(TESTS:%=$(BUILD)/test_%)
	@R1=$(BUILD)/r1 sh tests/run.sh $(TESTS:%=$(BUILD)/test_%) $(SCRIPTS:%=tests/test_%.py)
ifneq ($(TWIN),kernels_cuda)
	@echo "test_cuda: skipped: this build is for the CPU"
endif

test-web: $(BUILD)/r1
	@R1=$(BUILD)/r1 python3 tests/test_web.py

bench: $(BUILD)/bench_linear
	$(BUILD)/bench_linear

# Minutes of load, and Python 3.
soak: r1
	python3 tests/soak.py

clean:
	rm -rf build r1

FORCE:

.PHONY: FORCE test test-web bench soak clean
.SECONDARY:
