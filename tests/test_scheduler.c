// tests/test_scheduler.c: many at once. The main claim is that nothing of it can be seen: every
// request's tokens and logprobs have the same bits alone and beside 63 others, in any chunks, with
// and without the prefix cache, and after it was put back for want of memory. Includes r1.c, to
// reach the engine without its thread.
#define main r1_main
#include "../r1.c"
#undef main
#include "test.h"

static Options options = {.load_format = "dummy", .chunked_prefill_size = 8192,
                          .max_prefill_tokens = 16384, .decode_log_interval = 40,
                          .tensor_parallel_size = 1};

// A model of two layers with tiny-r1's vocabulary, in a directory of its own; and one that two
// ranks can share.
static void write_model(const char *dir, bool shared) {
    size_t len;
    char *text = read_file("tests/golden/nasty/config.json", &len);
    if (!text) die("tests/golden/nasty/config.json: run this from the top of the tree");
    char *size = strstr(text, "\"vocab_size\": 256");
    memcpy(size + strlen("\"vocab_size\": "), "512", 3);
    char *heads = strstr(text, "\"num_attention_heads\": 2");
    char *width = strstr(text, "\"moe_intermediate_size\": 128");
    if (shared) heads[strlen("\"num_attention_heads\": ")] = '4';
    if (shared) memcpy(width + strlen("\"moe_intermediate_size\": "), "256", 3);
    char *path = format_string("%s/config.json", dir);
    FILE *f = fopen(path, "w");
    if (!f || fwrite(text, 1, len, f) != len || fclose(f)) die("%s: can't write", path);
    free(text), free(path);
}

// A fresh engine with an empty cache.
static void boot(int max_tokens, int chunk, int max_running, bool cache) {
    memset((void *)&engine, 0, sizeof engine);
    engine.waiting_end = &engine.waiting, engine.events_end = &engine.events;
    engine.quiet = true;
    options.max_total_tokens = max_tokens, options.chunked_prefill_size = chunk;
    options.disable_radix_cache = !cache;
    server.options = options;
    server.preempted = server.cached_tokens = server.prompt_tokens = 0;
    server.context_len = 4096;
    server_size(&options);
    engine_open();
    engine_load(max_running);
}

static Seq *request(uint64_t number, int prompt, int shared, int max_tokens) {
    Seq *s = seq_new();
    uint32_t word[4];
    for (int i = 0; i < prompt; i++) {
        // Prompts begin alike, in families of eight, and differ from `shared` on.
        uint64_t key = i < shared ? 1000 + number % 8 : number;
        philox(word, key, (uint32_t[4]){i, 0, 0, 0});
        ids_add(&s->tokens, 3 + word[0] % 500);
    }
    s->n_prompt = prompt, s->max_tokens = max_tokens;
    s->arrival = now_seconds();
    s->has_seed = true, s->sampling.seed = number, s->sampling.temperature = 1;
    snprintf(s->rid, sizeof s->rid, "%lu", number);
    return s;
}

// One of 64 requests: all kinds of lengths and parameters.
static Seq *any_request(int i) {
    static const int shared[] = {0, 64, 70, 64, 130};
    static const int bias_id[] = {5, 6, 7};
    static const float bias[] = {2, -1, 0.5f};
    int common = shared[i % 5];
    int answer = i % 9 == 8 ? 0 : i % 6 == 3 ? 80 : 1 + (i * 7) % 12;
    Seq *s = request(i, 1 + common + (i * 37) % 50, common, answer);
    Sampling *p = &s->sampling;
    if (i % 3 == 0) p->temperature = 0;
    if (i % 4 == 1) p->top_p = 0.8f, p->top_k = 50;
    if (i % 4 == 2) p->min_p = 0.02f, p->repetition_penalty = 1.2f;
    if (i % 5 == 3) p->frequency_penalty = 0.5f, p->presence_penalty = 0.25f;
    if (i % 7 == 2) p->bias_id = bias_id, p->bias = bias, p->n_bias = 3;
    if (i % 2) p->top_logprobs = i % 6;
    if (i % 6 == 4 || s->max_tokens == 0) s->score_from = 1 + i % 40;
    if (i % 8 == 5) s->min_tokens = s->max_tokens / 2, s->stop_id[s->n_stop_id++] = 40 + i;
    s->ignore_eos = i % 3 == 0;
    return s;
}

// What a request said, byte by byte; and how it ended.
typedef struct {
    Buf said;
    Finish finish;
    Seq *seq;
} Record;

static Record *record_find(Record *r, const Seq *s) {
    while (r->seq != s) r++;
    return r;
}

// One step, its events taken down; how many there were.
static int step(Record *records) {
    int n = 0;
    for (Event *e = engine_step(), *next; e; e = next, n++) {
        Record *r = record_find(records, e->seq);
        if (r->finish) r->finish = 99;  // nothing may follow on an end
        if (e->has_token) {
            buf_add(&r->said, &e->prompt, 1);
            buf_add(&r->said, &e->choice.id, sizeof(int));
            bool scores = e->prompt || e->seq->sampling.top_logprobs >= 0;
            if (scores) buf_add(&r->said, &e->choice.logprob, sizeof(float));
            if (scores) buf_add(&r->said, e->choice.top_id, e->choice.n_top * sizeof(int));
            if (scores) buf_add(&r->said, e->choice.top_logprob, e->choice.n_top * sizeof(float));
        }
        if (e->finish) r->finish = e->finish;
        buf_add(&r->said, e->text.data ? e->text.data : "", e->text.len);
        next = e->next;
        event_free(e);
    }
    return n;
}

static bool idle(void) { return !engine.n_running && !engine.waiting; }

static void submit(Record *r, Seq *s) {
    r->seq = s;
    server.queued += !s->probe;
    seq_arrive(s);
}

// No page may be lost, and none be held by nobody.
static void check_all_free(const char *what) {
    CHECK(idle() && engine.n_free == engine.n_pages && server.used_tokens == 0 &&
              server.running == 0 && server.queued == 0,
          "%s: %d of %d pages are free, %d tokens used, %d running, %d queued", what,
          engine.n_free, engine.n_pages, server.used_tokens, server.running, server.queued);
}

#ifdef __SANITIZE_ADDRESS__
enum { MANY = 12 };  // the products are thirty times slower there
#else
enum { MANY = 64 };
#endif


static void records_free(Record *r) {
    for (int i = 0; i < MANY; i++) {
        if (r[i].seq) seq_free(r[i].seq);
        buf_free(&r[i].said);
        r[i] = (Record){0};
    }
}

// All 64 with others beside them; `stagger`: how many come between two steps.
static void run_many(Record *r, int stagger) {
    for (int i = 0; i < MANY || !idle();) {
        for (int k = 0; k < stagger && i < MANY; k++, i++) submit(&r[i], any_request(i));
        step(r);
    }
}

// With two ranks some of the ways will do: ranks are handed the same steps whatever these are.
static void check_equality(bool shared) {
    static Record alone[MANY], many[MANY];
    boot(4096, 8192, 1, false);
    for (int i = 0; i < MANY; i++) {
        submit(&alone[i], any_request(i));
        while (!idle()) step(&alone[i]);
        CHECK(alone[i].finish == FINISH_LENGTH || alone[i].finish == FINISH_STOP, "request %d: %d",
              i, alone[i].finish);
        Seq *s = alone[i].seq;
        bool scores = s->score_from && s->score_from < s->n_prompt;
        size_t scored = scores ? s->n_prompt - s->score_from : 0;
        CHECK(alone[i].said.len >= 5 * (scored + s->tokens.len - s->n_prompt), "request %d: %zu", i,
              alone[i].said.len);
    }
    engine_free();
    static const struct {
        const char *name;
        int pool, chunk, running, stagger;
        bool cache, preempts;
    } ways[] = {
        {"all at once, with the cache", 1 << 15, 8192, 64, 64, true, false},
        {"little memory, with the cache", 416, 8192, 64, 64, true, true},
        {"all at once", 1 << 15, 8192, 64, 64, false, false},
        {"chunks of 1", 1 << 15, 1, 64, 64, true, false},
        {"chunks of 7, three between two steps", 1 << 15, 7, 64, 3, true, false},
        {"chunks of 64, one between two steps", 1 << 15, 64, 64, 1, true, false},
        {"five at once", 1 << 15, 100, 5, 64, true, false},
        {"little memory", 384, 8192, 64, 64, false, true},
    };
    for (size_t w = 0; w < (shared ? 2 : COUNT(ways)); w++) {
        boot(ways[w].pool, ways[w].chunk, ways[w].running, ways[w].cache);
        run_many(many, ways[w].stagger);
        for (int i = 0; i < MANY; i++) {
            bool same = many[i].said.len == alone[i].said.len &&
                        !memcmp(many[i].said.data, alone[i].said.data, alone[i].said.len) &&
                        many[i].finish == alone[i].finish;
            CHECK(same, "%s: request %d differs from itself alone", ways[w].name, i);
        }
        check_all_free(ways[w].name);
        CHECK(MANY < 64 || (server.preempted > 0) == ways[w].preempts, "%s: %lu put back",
              ways[w].name, server.preempted);
        CHECK(MANY < 64 || (server.cached_tokens > 0) == ways[w].cache, "%s: %lu tokens found",
              ways[w].name, server.cached_tokens);
        records_free(many);
        engine_free();
    }
    records_free(alone);
}

// Four choices of one prompt compute it once, with and without the prefix cache between requests.
static void check_choices_share(void) {
    for (int cache = 0; cache < 2; cache++) {
        Record r[8] = {0};
        boot(4096, 8192, 16, cache);
        for (int i = 0; i < 4; i++) {
            Seq *s = request(7, 200, 200, 4);
            s->index = i, s->sampling.seed = i;
            submit(&r[i], s);
        }
        while (!idle()) step(r);
        for (int i = 1; i < 4; i++)
            CHECK(r[i].seq->n_cached == 192, "choice %d: %d tokens were cached", i,
                  r[i].seq->n_cached);
        CHECK(engine.computed == 200 + 3 * 8, "%lu rows were computed", engine.computed);
        // A second request with the same prompt finds it only where there is a prefix cache.
        submit(&r[4], request(7, 200, 200, 1));
        while (!idle()) step(r);
        CHECK(r[4].seq->n_cached == (cache ? 192 : 0), "%d tokens were cached", r[4].seq->n_cached);
        check_all_free("choices");
        for (int i = 0; i < 5; i++) seq_free(r[i].seq), buf_free(&r[i].said);
        engine_free();
    }
}

static int cached_of(Record *r, Seq *s) {
    submit(r, s);
    while (!idle()) step(r);
    int cached = s->n_cached;
    seq_free(s), buf_free(&r->said), *r = (Record){0};
    return cached;
}

// The cache keeps what was used last, counts what it gives, forgets on demand, and never mistakes
// one text for another.
static void check_cache(void) {
    Record r = {0};
    boot(10 * PAGE, 8192, 4, true);
    CHECK(cached_of(&r, request(1, 4 * PAGE, 0, 1)) == 0, "an empty cache");
    CHECK(cached_of(&r, request(1, 4 * PAGE, 0, 1)) == 3 * PAGE, "the last row is computed");
    CHECK(cached_of(&r, request(1, 4 * PAGE + 1, 0, 1)) == 4 * PAGE, "all full pages");
    CHECK(server.cache_hit_rate > 0.55 && server.cache_hit_rate < 0.6, "7 pages of 12: %g",
          server.cache_hit_rate);
    // The same tokens behind another beginning are another text.
    Seq *s = request(1, 4 * PAGE + 1, 0, 1);
    s->tokens.data[0] ^= 1;
    CHECK(cached_of(&r, s) == 0, "the first token differs");
    s = request(1, 4 * PAGE + 1, 0, 1);
    s->tokens.data[3 * PAGE] ^= 1;
    CHECK(cached_of(&r, s) == 3 * PAGE, "the fourth page differs");
    CHECK(cached_of(&r, request(1, 4 * PAGE + 1, 0, 1)) == 4 * PAGE, "the first is still there");
    // Others need the room: the longest unused go, its last pages first.
    CHECK(cached_of(&r, request(2, 5 * PAGE + 1, 0, 1)) == 0, "a new text");
    int left = cached_of(&r, request(1, 4 * PAGE + 1, 0, 1));
    CHECK(left == 4 * PAGE, "used last, so kept: %d", left);
    cached_of(&r, request(3, 8 * PAGE + 1, 0, 1));
    left = cached_of(&r, request(1, 4 * PAGE + 1, 0, 1));
    CHECK(left < 3 * PAGE, "gone for request 3: %d", left);
    engine_flush();
    CHECK(cached_of(&r, request(3, 8 * PAGE + 1, 0, 1)) == 0, "flushed");
    CHECK(server.cache_hit_rate == 0, "counted anew: %g", server.cache_hit_rate);
    // The answer's pages are found as well: a conversation goes on where it was.
    s = request(4, 60, 0, 70);
    s->ignore_eos = true;
    submit(&r, s);
    while (!idle()) step(&r);
    Seq *t = request(5, 1, 0, 1);
    t->tokens.len = 0;
    for (size_t i = 0; i < s->tokens.len; i++) ids_add(&t->tokens, s->tokens.data[i]);
    t->n_prompt = t->tokens.len;
    Record second = {0};
    CHECK(cached_of(&second, t) == 2 * PAGE, "the next turn");
    seq_free(s), buf_free(&r.said);
    check_all_free("cache");
    engine_free();
}

// Running streams get a token in every step, however long a prompt beside them is; a probe never
// waits; who is cancelled is out of the next step and its pages are free after it.
static void check_order(void) {
    Record r[16] = {0};
    boot(1 << 14, 32, 8, true);
    for (int i = 0; i < 4; i++) {
        Seq *s = request(i, 5, 0, 100);
        s->ignore_eos = true;
        submit(&r[i], s);
    }
    step(r);
    submit(&r[4], request(9, 1000, 0, 5));
    for (int k = 0; k < 10; k++) {
        int before = r[0].seq->tokens.len + r[3].seq->tokens.len;
        CHECK(step(r) == 4, "step %d", k);
        CHECK((int)(r[0].seq->tokens.len + r[3].seq->tokens.len) == before + 2, "step %d", k);
        CHECK(engine.batch.n == 4 + 32 && r[4].seq->n_computed == 32 * (k + 1), "step %d: %d rows",
              k, engine.batch.n);
    }
    Seq *probe = request(77, 1, 0, 1);
    probe->probe = true;
    submit(&r[5], probe);
    CHECK(step(r) == 5 && r[5].finish == FINISH_LENGTH, "a probe takes one step");
    int used = server.used_tokens, running = server.running;
    engine_cancel(r[4].seq);
    step(r);
    CHECK(r[4].finish == FINISH_ABORT, "cancelled");
    CHECK(server.running == running - 1 && used - server.used_tokens > 300, "%d of %d tokens held",
          server.used_tokens, used);
    while (!idle()) step(r);
    check_all_free("order");
    for (int i = 0; i < 6; i++) seq_free(r[i].seq), buf_free(&r[i].said);
    engine_free();
}

// A sequence that fills the whole cache is served among others, and the oldest is never put back.
static void check_full(void) {
    Record r[8] = {0};
    boot(8 * PAGE, 64, 8, true);
    for (int i = 0; i < 6; i++) {
        Seq *s = request(i, 2 * PAGE, 0, 6 * PAGE);
        s->ignore_eos = true;
        submit(&r[i], s);
    }
    int steps = 0;
    while (!idle() && steps++ < 10000) {
        Seq *oldest = engine.n_running ? engine.running[0] : NULL;
        int computed = oldest ? oldest->n_computed : 0;
        step(r);
        if (!oldest || !engine.n_running || engine.running[0] != oldest) continue;
        CHECK(oldest->n_computed > computed, "the oldest stands still at %d", computed);
    }
    for (int i = 0; i < 6; i++)
        CHECK(r[i].finish == FINISH_LENGTH && (int)r[i].seq->tokens.len == 8 * PAGE,
              "request %d: %d, %zu tokens", i, r[i].finish, r[i].seq->tokens.len);
    CHECK(server.preempted > 0, "none was put back");
    check_all_free("full");
    // A probe runs even then: its page is nobody else's.
    Seq *big = request(1, 2 * PAGE, 0, 6 * PAGE), *probe = request(77, 1, 0, 1);
    Seq *second = request(77, 1, 0, 1);
    Record p[3] = {0};
    big->ignore_eos = probe->probe = second->probe = true;
    submit(&p[0], big);
    while ((int)big->tokens.len < 8 * PAGE - 1) step(p);
    submit(&p[1], probe), submit(&p[2], second);
    CHECK(step(p) == 2 && p[1].finish + p[2].finish == FINISH_LENGTH, "a probe of a full cache");
    CHECK(p[0].finish == FINISH_LENGTH && (int)big->tokens.len == 8 * PAGE, "it was not put back");
    step(p);
    CHECK(p[1].finish == FINISH_LENGTH && p[2].finish == FINISH_LENGTH, "the second probe");
    while (!idle()) step(p);
    check_all_free("probe");
    for (int i = 0; i < 3; i++) seq_free(p[i].seq), buf_free(&p[i].said);
    for (int i = 0; i < 6; i++) seq_free(r[i].seq), buf_free(&r[i].said);
    engine_free();
}

// A thousand random arrivals and cancels: nothing is lost, whatever the order.
static void check_random(void) {
    static Record r[MANY];
    uint32_t word[4];
    boot(12 * PAGE, 40, 6, true);
    int done = 0;
    int rounds = MANY < 64 ? 300 : 3000;
    for (int k = 0; k < rounds || !idle(); k++) {
        philox(word, 42, (uint32_t[4]){k, 0, 0, 0});
        Record *slot = &r[word[0] % MANY];
        if (slot->finish) {
            done++;
            seq_free(slot->seq), buf_free(&slot->said);
            *slot = (Record){0};
        }
        if (!slot->seq && k < rounds) {
            int prompt = 1 + word[1] % 300;
            submit(slot, request(word[2] % 16, prompt, 200, word[3] % 40));
        } else if (slot->seq && word[1] % 3 == 0) engine_cancel(slot->seq);
        step(r);
        int held = 0;
        for (int i = 0; i < engine.n_running; i++) held += engine.running[i]->n_pages > 0;
        if (held != engine.n_running) break;
    }
    CHECK(done > rounds / 20, "%d ended", done);
    check_all_free("random");
    records_free(r);
    engine_free();
}

int main(void) {
    char dir[] = "/tmp/r1-scheduler-XXXXXX";
    if (!mkdtemp(dir)) die("%s: %s", dir, strerror(errno));
    write_model(dir, true);
    options.tensor_parallel_size = 2;
    server.model_dir = dir;
    server.tokenizer = tokenizer_load("tiny-r1");
    check_equality(true);
    write_model(dir, false);
    options.tensor_parallel_size = 1;
    check_equality(false);
    check_choices_share();
    check_cache();
    check_order();
    check_full();
    check_random();
    char *path = format_string("%s/config.json", dir);
    unlink(path), rmdir(dir), free(path);
    tokenizer_free(server.tokenizer);
    return test_end();
}
