// tests/test_share.c: the figures of `r1 bench --offline`. Bytes and operations are computed here
// once more, from the shapes that config.json implies and not from what the program has placed, and
// compared to the last byte with the line of JSON that a step leaves. $R1 names the program.
#include "../r1.h"
#include "test.h"

#include <sys/wait.h>
#include <unistd.h>

static const char *program;
static char dir[] = "/tmp/r1-share-XXXXXX";

// The nasty checkpoint's config, changed so that two ranks can share it.
enum { RANKS = 2, LAYERS = 3, MOE_LAYERS = 2, HIDDEN = 256, VOCAB = 256, Q_LORA = 128, HEADS = 4,
       WIDTH = 256, EXPERTS = 12, TOP_K = 4 };

static void config_write(void) {
    static const char *const edits[][2] = {{"\"moe_intermediate_size\": 128", "256"},
                                           {"\"num_attention_heads\": 2", "4"},
                                           {"\"num_hidden_layers\": 2", "3"}};
    size_t len;
    char *text = read_file("tests/golden/nasty/config.json", &len);
    char *path = format_string("%s/config.json", dir);
    FILE *f = fopen(path, "w");
    if (!text || !f) die("%s: can't be written", path);
    for (int i = 0; i < 3; i++) {
        char *at = strstr(text, edits[i][0]), *value = at + strcspn(at, ":") + 2, *rest;
        if (!at) die("config.json has no %s", edits[i][0]);
        rest = value + strspn(value, "0123456789");
        char *next = format_string("%.*s%s%s", (int)(value - text), text, edits[i][1], rest);
        free(text);
        text = next;
    }
    if (fputs(text, f) < 0 || fclose(f)) die("%s: can't be written", path);
    free(text), free(path);
}

// Both outputs of `r1 bench --offline ARGS`, and the exit status.
static char *run(const char *args, int *status) {
    Buf b = {0};
    char chunk[4096], *line = format_string("%s bench --offline %s 2>&1", program, args);
    FILE *f = popen(line, "r");
    if (!f) die("can't run %s", line);
    for (size_t n; (n = fread(chunk, 1, sizeof chunk, f)) > 0;) buf_add(&b, chunk, n);
    int end = pclose(f);
    *status = WIFEXITED(end) ? WEXITSTATUS(end) : -1;
    free(line);
    buf_str(&b, "");
    return b.data;
}

static double matrix(double out, double in) {  // bytes of an e4m3 one with its scales
    return out * in + 4 * ceil(out / 128) * (in / 128);
}

typedef struct { double weights, cache, rows, fp8, bf16; } Want;

// A step of n rows, n_out with logits; together they see `seen` tokens.
static Want want_of(bool prompt, double n, double n_out, double seen, double hit) {
    const double heads = HEADS / RANKS, width = WIDTH / RANKS, vocab = VOCAB / RANKS;
    const double latent = 512, row = 1152, up = matrix(width, HIDDEN), down = matrix(HIDDEN, width);
    const double attention[] = {matrix(Q_LORA, HIDDEN), matrix(576, HIDDEN),
                                matrix(heads * 192, Q_LORA), matrix(heads * 256, latent),
                                matrix(HIDDEN, heads * 128)};
    Want w = {.weights = vocab * HIDDEN * 2 + 2 * up + down +
                         MOE_LAYERS * (EXPERTS * HIDDEN * 2 + (hit + 1) * (2 * up + down))};
    for (int i = 0; i < 5; i++) w.weights += LAYERS * attention[i];
    w.cache = LAYERS * (n + (prompt ? n : seen)) * row;
    w.fp8 = 2 * n * LAYERS * HIDDEN * (Q_LORA + 576) + 2 * n * LAYERS * heads * 192 * Q_LORA +
            2 * n * LAYERS * heads * 128 * HIDDEN + 2 * n * 3 * HIDDEN * width +
            2 * n * (TOP_K + 1) * MOE_LAYERS * 3 * HIDDEN * width;
    w.bf16 = 2 * n_out * vocab * HIDDEN + 2 * n * MOE_LAYERS * EXPERTS * HIDDEN +
             2 * n * LAYERS * heads * 256 * latent +
             2 * seen * LAYERS * heads * (prompt ? 192 + 128 : 576 + 512);
    double layer = 2 * 7 * HIDDEN                          // two norms: x, y, x; and quantised
                   + HIDDEN + 2 * (Q_LORA + 576)           // the first products
                   + 2 * (Q_LORA + 576) + Q_LORA           // what is cached, and q quantised
                   + Q_LORA + heads * 192 * 2              // q_b
                   + (prompt ? heads * (2 * 192 + 128)     // attention with keys and values
                             : heads * 2 * (192 + 576)     // absorbed
                             + heads * 2 * (576 + 512)     // attention
                             + heads * (2 * 512 + 128))    // values
                   + heads * 128 + 2 * HIDDEN              // o_proj
                   + 3 * HIDDEN;                           // the MLP
    double around = 4 * HIDDEN + 6 * HIDDEN, router = 2 * HIDDEN + 8 * TOP_K;
    w.rows = n * (LAYERS * layer + MOE_LAYERS * router + around) +
             n_out * (2 * HIDDEN + 4 * vocab + 4 * vocab);
    return w;
}

static double number(const Json *o, const char *key) {
    const Json *v = json_get(o, key);
    CHECK(v && v->type == JSON_NUMBER, "%s is a number", key);
    return v && v->type == JSON_NUMBER ? v->number : NAN;
}

static bool near(double got, double want) { return fabs(got - want) <= 1e-9 * fabs(want); }

static void check_step(const Json *o) {
    double n = number(o, "rows"), context = number(o, "context"), hit = number(o, "experts_hit");
    const Json *kind = json_get(o, "kind"), *device = json_get(o, "device");
    bool prompt = kind && str_equal(kind->string, "prefill");
    CHECK(kind && (prompt || str_equal(kind->string, "decode")), "kind");
    CHECK(device && str_equal(device->string, "CPU"), "device");
    CHECK(json_get(o, "date") && json_get(o, "date")->string.len == 19, "date");
    Want w = want_of(prompt, n, prompt ? 1 : n, prompt ? n * (n + 1) / 2 : n * context, hit);
    CHECK(n == 1 ? hit == TOP_K : hit > TOP_K && hit <= EXPERTS, "%g rows: %g experts", n, hit);
    CHECK(number(o, "weight_bytes") == w.weights, "%g", w.weights);
    CHECK(number(o, "cache_bytes") == w.cache, "%g", w.cache);
    CHECK(number(o, "activation_bytes") == w.rows, "%g", w.rows);
    CHECK(number(o, "fp8_ops") == w.fp8, "%g", w.fp8);
    CHECK(number(o, "bf16_ops") == w.bf16, "%g", w.bf16);
    double bytes = (w.weights + w.cache + w.rows) / number(o, "read_ceiling");
    double ops = w.fp8 / number(o, "fp8_ceiling") + w.bf16 / number(o, "bf16_ceiling");
    double floor = number(o, "floor_s"), step = number(o, "step_s");
    CHECK(floor >= bytes * 0.999999 && floor >= ops * 0.999999, "floor %g: %g, %g", floor, bytes,
          ops);
    CHECK(floor <= (bytes + ops) * 1.000001, "floor %g: %g, %g", floor, bytes, ops);
    CHECK(step > 0 && step < 60 && near(number(o, "tokens_per_s") * step, n), "step %g", step);
    CHECK(number(o, "copy_ceiling") > 1e8, "copies");
    CHECK(near(number(o, "modelled_communication_s"),
               (2 * LAYERS + 1) * (18e-6 + 2 * n * HIDDEN / 370e9)), "sums");
    CHECK(number(o, "tp") == RANKS && number(o, "layers") == LAYERS, "the group");
}

static void check_table(const char *text) {
    static const char *const stages[] = {
        "embed", "add_norm", "q_a, kv_a", "mla_latent", "q_b", "mla_query", "mla_attend",
        "mla_value", "mla_attention", "o_proj", "moe_route", "moe_experts", "mlp", "norm, logits",
        "sample"};
    static const char *const parts[] = {
        ": rank 0 of 2, 3 of 3 layers\n", "\nmeasured ceilings: memory read ",
        "\nModelled, not measured, and in no figure above: NCCL's 7 sums of a step,\n  1 rows 0.1"};
    CHECK(!strncmp(text, "CPU, 20", 7), "%s", text);
    for (int i = 0; i < 3; i++) CHECK(strstr(text, parts[i]), "%s: %s", parts[i], text);
    for (size_t i = 0; i < sizeof stages / sizeof *stages; i++) {
        char *line = format_string("\n    %s ", stages[i]);
        CHECK(strstr(text, line), "stage %s", stages[i]);
        free(line);
    }
    for (const char *p = text; *p; p += strcspn(p, "\n"), p += *p == '\n')
        CHECK(strcspn(p, "\n") <= 100 || !strncmp(p, "model: ", 7), "%.120s", p);
}

static void test_figures(void) {
    int status, n = 0;
    char *args = format_string("--model-path %s --tp 2 --batch 1,3 --context 130,1000 "
                               "--prefill 70 --profile --output-file %s/out", dir, dir);
    char *text = run(args, &status), err[256], *path = format_string("%s/out", dir);
    CHECK(status == 0, "status %d: %s", status, text);
    check_table(text);
    size_t len;
    char *lines = read_file(path, &len);
    for (char *p = lines, *end; p && *p && (end = strchr(p, '\n')); p = end + 1, n++) {
        Json *o = json_parse(p, end - p, err, sizeof err);
        CHECK(o, "line %d: %s", n + 1, err);
        if (o) check_step(o);
        free(o);
    }
    CHECK(n == 5, "%d lines of JSON", n);
    unlink(path);
    free(args), free(text), free(lines), free(path);
}

static void test_too_large(void) {
    int status;
    char *args = format_string("--model-path %s --batch 256 --context 163840 --prefill 1 "
                               "--output-file %s/out", dir, dir);
    char *text = run(args, &status), *path = format_string("%s/out", dir);
    CHECK(status == 0, "status %d: %s", status, text);
    CHECK(strstr(text, "\ndecode     256   163840  does not fit: 41943040 tokens, "), "%s", text);
    size_t len = 0;
    char *lines = read_file(path, &len);
    CHECK(len && strchr(lines, '\n') == lines + len - 1, "what does not fit leaves no line");
    unlink(path);
    free(args), free(text), free(lines), free(path);
}

static void test_few_layers(void) {
    int status;
    char *args = format_string("--model-path %s --layers 1 --batch 2 --context 64 --prefill 1",
                               dir);
    char *text = run(args, &status);
    CHECK(status == 0 && strstr(text, ": rank 0 of 1, 1 of 3 layers\n"), "%d: %s", status, text);
    CHECK(!strstr(text, "Modelled"), "one rank has no sums: %s", text);
    free(args), free(text);
}

static void test_mistakes(void) {
    static const struct { const char *args, *want; int status; } rows[] = {
        {"--batch 1,x", "--batch: got \"1,x\", want 1 to 16 integers in 1..4096, with commas", 2},
        {"--batch 8,", "--batch: got \"8,\", want 1 to 16 integers in 1..4096, with commas", 2},
        {"--batch 4097", "--batch: got \"4097\", want 1 to 16 integers in 1..4096, with", 2},
        {"--context 0", "--context: got \"0\", want 1 to 16 integers in 1..163840, with commas", 2},
        {"--prefill -1", "--prefill: got \"-1\", want 1 to 16 integers in 1..163840, with", 2},
        {"--prefill 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1", "want 1 to 16 integers", 2},
        {"--layers 4", "--layers: got 4, want at most the model's 3", 2},
        {"--layers 0", "--layers: got \"0\", want an integer in 1..4096", 2},
        {"--tp 3", "--tp: got 3, want one of 1, 2: each rank needs whole", 2},
        {"--host here", "unknown flag --host", 2},
        {"--profile=yes", "--profile: got \"yes\", takes no value", 2},
        {"one", "got \"one\", want a flag", 2},
        {"--output-file /nowhere/at/all", "--output-file /nowhere/at/all: No such file", 1},
        {"--model-path /nowhere", "--model-path /nowhere: no such directory", 1},
        {"--model-path tests/golden/r1 --layers 61", "memory: want 674.", 1},
    };
    // The last one is only for machines on which R1 has no room: others would begin to make it up.
    double memory = (double)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    for (size_t i = 0; i < sizeof rows / sizeof *rows - (memory > 6e11); i++) {
        int status;
        char *args = format_string("--model-path %s %s", dir, rows[i].args);
        char *text = run(args, &status);
        CHECK(status == rows[i].status, "%s: status %d", rows[i].args, status);
        CHECK(strstr(text, rows[i].want), "%s: %s", rows[i].args, text);
        free(args), free(text);
    }
    int status;
    char *text = run("--help", &status);
    CHECK(status == 0 && strstr(text, "--profile") && !strstr(text, "--host"), "%s", text);
    free(text);
}

int main(void) {
    program = getenv("R1") ? getenv("R1") : "./r1";
    if (!mkdtemp(dir)) die("can't make %s", dir);
    config_write();
    test_figures();
    test_too_large();
    test_few_layers();
    test_mistakes();
    char *path = format_string("%s/config.json", dir);
    unlink(path), rmdir(dir), free(path);
    return test_end();
}
