// tests/test_sample.c: how a token is chosen, seen from outside: logits go in, a Choice
// comes out. What a step did to a logit is measured with a rival of a known logit, since the larger
// one is chosen; what a filter left is measured by drawing until everything left must have come up.
#include "../r1.h"
#include "test.h"

enum { VOCAB = 8, STRIDE = 64, ROWS = 33 };

static Sampling neutral(void) {
    return (Sampling){
        .temperature = 1, .top_p = 1, .top_k = -1, .repetition_penalty = 1, .top_logprobs = -1};
}

static Choice draw(const float *l, int vocab, const Sampling *s) {
    float copy[STRIDE];
    memcpy(copy, l, vocab * sizeof *l);
    Choice c;
    sample(&c, copy, s, vocab, vocab, 1);
    return c;
}

static bool choice_equal(const Choice *a, const Choice *b) {
    return a->id == b->id && memcmp(&a->logprob, &b->logprob, sizeof(float)) == 0 &&
           a->n_top == b->n_top && memcmp(a->top_id, b->top_id, a->n_top * sizeof(int)) == 0 &&
           memcmp(a->top_logprob, b->top_logprob, a->n_top * sizeof(float)) == 0;
}

// ---- Noise --------------------------------------------------------------------------------------

static void test_philox(void) {  // Random123's kat_vectors, philox4x32 10
    static const struct { uint64_t key; uint32_t counter[4], want[4]; } known[] = {
        {0, {0, 0, 0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {UINT64_MAX, {UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {0x299f31d0a4093822, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},  // the digits of pi
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (int i = 0; i < 3; i++) {
        uint32_t got[4];
        philox(got, known[i].key, known[i].counter);
        CHECK(memcmp(got, known[i].want, sizeof got) == 0, "vector %d: got %08x %08x %08x %08x", i,
              got[0], got[1], got[2], got[3]);
    }
}

// The draw by its formula, with logarithms in double.
static int drawn_by_definition(const float *l, int vocab, uint64_t seed, int position,
                               double *margin) {
    double best = -INFINITY, second = -INFINITY;
    int id = -1;
    for (int v = 0; v < vocab; v++) {
        uint32_t word[4], counter[4] = {v / 4, position, 0, 0};
        philox(word, seed, counter);
        float u = ((float)word[v % 4] + 0.5f) * 0x1p-32f;
        if (u >= 1) u = nextafterf(1, 0);
        double value = l[v] - log(-log1p(-(double)u));
        if (value > best) second = best, best = value, id = v;
        else if (value > second) second = value;
    }
    *margin = best - second;
    return id;
}

static void test_draw(void) {
    float l[STRIDE];
    int wrong = 0, compared = 0;
    for (int i = 0; i < STRIDE; i++) l[i] = sinf(i * 7) * 3;
    for (int i = 0; i < 2000; i++) {
        Sampling s = neutral();
        double margin;
        s.seed = 0x123456789abcdef * (uint64_t)i;
        s.n_tokens = i % 777;
        // Only the margin counts in which f32's logarithms (errors of 1e-6) can't change the order.
        int tokens[777] = {0}, want = drawn_by_definition(l, STRIDE, s.seed, s.n_tokens, &margin);
        s.tokens = tokens;
        if (margin < 1e-4) continue;
        compared++;
        wrong += draw(l, STRIDE, &s).id != want;
    }
    CHECK(wrong == 0, "%d of %d draws differ from the definition", wrong, compared);
    CHECK(compared > 1900, "%d", compared);
}

static void test_seeds(void) {
    float l[STRIDE] = {0};
    int zeros[100] = {0}, ones[100], seen_seed = 0, seen_position = 0;
    for (int i = 0; i < 100; i++) ones[i] = 1;
    for (int i = 0; i < 100; i++) {
        Sampling s = neutral();
        s.seed = i, s.tokens = zeros, s.n_tokens = 5;
        Choice a = draw(l, STRIDE, &s), again = draw(l, STRIDE, &s);
        // What the tokens are, or which are the prompt, is no matter.
        s.tokens = ones, s.n_prompt = 3;
        Choice other = draw(l, STRIDE, &s);
        CHECK(a.id == again.id && a.id == other.id, "seed %d: %d, %d, %d", i, a.id, again.id,
              other.id);
        s.seed = 1, s.n_tokens = i;
        seen_seed += a.id == 7, seen_position += draw(l, STRIDE, &s).id == 7;
    }
    // Each id has 1/64: none in 100 draws would be bad luck, ten would be a miracle.
    CHECK(seen_seed < 10 && seen_position < 10, "%d, %d", seen_seed, seen_position);
    Sampling high = neutral(), low = neutral();
    int differ = 0;
    for (int i = 0; i < 100; i++) {
        high.seed = (uint64_t)i << 32, low.seed = i;
        differ += draw(l, STRIDE, &high).id != draw(l, STRIDE, &low).id;
    }
    CHECK(differ > 50, "the seed's high half hardly matters: %d", differ);
}

// ---- Greedy, and logits that are no numbers -----------------------------------------------------

static void test_greedy(void) {
    static const struct { float temperature; int top_k; float l[VOCAB]; int want; } cases[] = {
        {0, -1, {1, 2, 3, 4, 5, 6, 7, 8}, 7},
        {0, -1, {8, 2, 3, 4, 5, 6, 7, 1}, 0},
        {9e-7, -1, {1, 2, 9, 4, 5, 6, 7, 8}, 2},
        {1, 1, {1, 2, 2.1, 2.2, 2.05, 2, 2, 2}, 3},
        {100, 1, {1, 2, 2.1, 2.2, 2.05, 2, 2, 2}, 3},
        {0, -1, {5, 5, 5, 5, 5, 5, 5, 5}, 0},                  // ties go to the lowest id
        {0, -1, {1, 2, 7, 3, 7, 7, 0, 7}, 2},
        {0, -1, {-1, -0.f, 0, 0, -1, -1, -1, -1}, 1},          // -0 and 0 are equal
        {0, -1, {-INFINITY, -INFINITY, -3, -INFINITY, -2, -5, -9, -8}, 4},
        {1, -1, {-INFINITY, -INFINITY, -3e38, -INFINITY, -3.3e38, -3.1e38, -3.2e38, -INFINITY}, 2},
        {1, -1, {0, 0, 0, 0, 0, 0, 3e38, 0}, 6},
        {1e-6, -1, {1, 2, 3, 4, 500, 6, 7, 8}, 4},             // the least that is not greedy
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Sampling s = neutral();
        s.temperature = cases[i].temperature, s.top_k = cases[i].top_k;
        for (s.seed = 0; s.seed < 20; s.seed++) {
            int got = draw(cases[i].l, VOCAB, &s).id;
            CHECK(got == cases[i].want, "case %zu: got %d, want %d", i, got, cases[i].want);
        }
    }
    float one = 3;
    Sampling s = neutral();
    CHECK(draw(&one, 1, &s).id == 0, "a vocabulary of one");
}

static void test_not_finite(void) {
    for (int greedy = 0; greedy < 2; greedy++)
        for (int at = 0; at < VOCAB; at++)
            for (int bits = 0; bits < 4; bits++) {
                float bad[] = {NAN, -NAN, INFINITY, -INFINITY}, l[VOCAB] = {3, 1, 4, 1, 5, 9, 2, 6};
                Sampling s = neutral();
                s.temperature = !greedy, s.top_logprobs = 3;
                l[at] = bad[bits];
                Choice c = draw(l, VOCAB, &s);
                if (bits == 3) CHECK(c.id >= 0 && c.id != at, "-infinity at %d: got %d", at, c.id);
                else CHECK(c.id == -1 && c.n_top == 0, "%g at %d: got %d", bad[bits], at, c.id);
            }
    float nothing[VOCAB];
    for (int i = 0; i < VOCAB; i++) nothing[i] = -INFINITY;
    Sampling s = neutral();
    CHECK(draw(nothing, VOCAB, &s).id == -1, "nothing finite");
    s.temperature = 0;
    CHECK(draw(nothing, VOCAB, &s).id == -1, "nothing finite, greedy");
}

// Logits that stand beyond `vocab` are padding: never read, chosen or written.
static void test_padding(void) {
    static const float pads[] = {NAN, INFINITY, -INFINITY, 1e30f};
    for (int p = 0; p < 4; p++) {
        float l[3][STRIDE], before[3][STRIDE];
        Choice c[3];
        Sampling s[3];
        int banned[] = {VOCAB, STRIDE - 1}, chosen = 0, intact = 0;
        for (int row = 0; row < 3; row++) {
            for (int i = 0; i < STRIDE; i++) l[row][i] = i < VOCAB ? i : pads[p];
            s[row] = neutral();
            s[row].temperature = row, s[row].top_logprobs = VOCAB + 1,
            s[row].top_p = row == 2 ? 0.9 : 1;
            // min_tokens bans stop ids: any that were given.
            s[row].banned = banned, s[row].n_banned = 2;
        }
        memcpy(before, l, sizeof l);
        sample(c, &l[0][0], s, VOCAB, STRIDE, 3);
        for (int row = 0; row < 3; row++) {
            chosen += c[row].id >= 0 && c[row].id < VOCAB && c[row].n_top == VOCAB;
            intact +=
                memcmp(l[row] + VOCAB, before[row] + VOCAB, (STRIDE - VOCAB) * sizeof(float)) == 0;
        }
        CHECK(chosen == 3 && intact == 3, "pad %g: %d chosen, %d intact", pads[p], chosen, intact);
    }
}

// ---- Filters ------------------------------------------------------------------------------------

// The ids that come up in 4,000 draws, as bits. An id of 1 % is missed with a chance of 1e-17.
static unsigned support(const float *l, Sampling s) {
    unsigned seen = 0;
    for (s.seed = 0; s.seed < 4000; s.seed++) seen |= 1u << draw(l, VOCAB, &s).id;
    return seen;
}

static void test_filters(void) {
    // Halves, quarters and eighths in no order: ids 3, 1, then 0 = 5 as a tie. Never the rest.
    static const float mixed[VOCAB] = {0.125, 0.25, 0, 0.5, 0, 0.125, 0, 0};
    static const float even[VOCAB] = {1, 1, 1, 1};
    static const struct {
        const float *p;
        float temperature;
        int top_k;
        float top_p, min_p;
        unsigned want;
    } cases[] = {
        {mixed, 1, -1, 1, 0, 0x2b},
        {mixed, 1, 2, 1, 0, 0x0a},
        {mixed, 1, 3, 1, 0, 0x0b},         // the tie goes to id 0
        {mixed, 1, VOCAB, 1, 0, 0x2b},
        {mixed, 1, 1 << 30, 1, 0, 0x2b},
        {mixed, 1, -1, 1e-9, 0, 0x08},     // the first always stays
        {mixed, 1, -1, 0.4, 0, 0x08},      // 0.5 crosses the line, and is kept
        {mixed, 1, -1, 0.6, 0, 0x0a},      // so is 0.25
        {mixed, 1, -1, 0.74, 0, 0x0a},
        {mixed, 1, -1, 0.76, 0, 0x0b},
        {mixed, 1, -1, 0.9, 0, 0x2b},
        {even, 1, -1, 0.25, 0, 0x03},      // exactly the line does not exceed it
        {even, 1, -1, 0.5, 0, 0x07},
        {even, 1, -1, 0.24, 0, 0x01},
        {even, 1, -1, 1, 1, 0x0f},         // min_p 1: all that are as likely as the first
        {mixed, 1, -1, 1, 1, 0x08},
        {mixed, 1, -1, 1, 0.6, 0x08},
        {mixed, 1, -1, 1, 0.4, 0x0a},
        {mixed, 1, -1, 1, 0.2, 0x2b},
        {mixed, 1, 2, 0.6, 0, 0x0a},       // renormalised behind top_k, 0.5 would be 0.67 > 0.6
        {mixed, 1, 3, 0.6, 0.6, 0x08},     // the strictest wins, whichever it is
        {mixed, 1, 3, 0.3, 0.2, 0x08},
        {mixed, 1, 2, 0.9, 0.2, 0x0a},
        {mixed, 0.5, -1, 0.7, 0, 0x08},    // temperature comes first: 0.5 becomes 0.73
        {mixed, 2, -1, 0.4, 0, 0x0a},      // 0.5 becomes 0.37
        {mixed, 2, -1, 1, 0.6, 0x0a},      // 0.25 / 0.5 becomes 0.71
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Sampling s = neutral();
        float l[VOCAB];
        for (int v = 0; v < VOCAB; v++) l[v] = logf(cases[i].p[v]) + 10;
        s.temperature = cases[i].temperature, s.top_k = cases[i].top_k;
        s.top_p = cases[i].top_p, s.min_p = cases[i].min_p;
        unsigned got = support(l, s);
        CHECK(got == cases[i].want, "case %zu: got ids %02x, want %02x", i, got, cases[i].want);
    }
}

// Chi-square of 100,000 draws against softmax of what the filters left. The seeds are fixed, so
// that the result is too; a right sampler exceeds the bound of five standard deviations once in
// 10^5 such tests.
static void chi_square(const char *label, const float *l, const double *want, int vocab, Sampling s,
                       bool by_position) {
    enum { DRAWS = 100000, BATCH = 1000 };
    static int tokens[DRAWS];
    static float copy[BATCH * STRIDE];
    static Sampling row[BATCH];
    static Choice c[BATCH];
    int count[STRIDE] = {0}, degrees = -1;
    double chi = 0;
    for (int first = 0; first < DRAWS; first += BATCH) {
        for (int i = 0; i < BATCH; i++) {
            memcpy(copy + i * vocab, l, vocab * sizeof *l);
            row[i] = s;
            row[i].tokens = tokens;
            if (by_position) row[i].n_tokens = first + i;
            else row[i].seed = s.seed + first + i;
        }
        sample(c, copy, row, vocab, vocab, BATCH);
        for (int i = 0; i < BATCH; i++) count[c[i].id]++;
    }
    for (int v = 0; v < vocab; v++) {
        double expected = want[v] * DRAWS;
        if (expected == 0) CHECK(count[v] == 0, "%s: id %d came %d times", label, v, count[v]);
        else chi += (count[v] - expected) * (count[v] - expected) / expected, degrees++;
    }
    CHECK(chi < degrees + 5 * sqrt(2.0 * degrees), "%s: chi-square %g, %d degrees", label, chi,
          degrees);
    CHECK(chi > degrees - 5 * sqrt(2.0 * degrees), "%s: too even: %g, %d", label, chi, degrees);
}

static void test_statistics(void) {
    enum { N = 30 };
    float l[N];
    double p[N], kept[N], total = 0, left = 0;
    for (int v = 0; v < N; v++) l[v] = 0.12f * ((v * 11) % N);  // a scrambled ladder without ties
    Sampling s = neutral();
    for (int v = 0; v < N; v++) total += p[v] = exp(l[v]);
    for (int v = 0; v < N; v++) p[v] /= total;
    s.seed = 12345;
    chi_square("by seed", l, p, N, s, false);
    chi_square("by position", l, p, N, s, true);

    // Temperature 0.7; top_k 12 is stricter than top_p 0.95 here, and both than min_p 0.05.
    total = 0;
    for (int v = 0; v < N; v++) total += p[v] = exp(l[v] / 0.7);
    for (int v = 0; v < N; v++) {
        double before = 0;
        int rank = 0;
        for (int w = 0; w < N; w++)
            if (l[w] > l[v]) rank++, before += p[w] / total;
        kept[v] =
            rank < 12 && before <= 0.95 && p[v] >= 0.05 * exp(0.12 * (N - 1) / 0.7) ? p[v] : 0;
        left += kept[v];
    }
    for (int v = 0; v < N; v++) kept[v] /= left;
    s.temperature = 0.7, s.top_k = 12, s.top_p = 0.95, s.min_p = 0.05;
    chi_square("filtered, by seed", l, kept, N, s, false);
    chi_square("filtered, by position", l, kept, N, s, true);
}

// ---- What changes a logit -----------------------------------------------------------------------

// True where id 3's logit counts as exactly `want`: a rival, id 1, with this logit wins the tie,
// and one with the next smaller float loses.
static bool counts_as(float logit, float want, Sampling s) {
    float l[VOCAB];
    s.temperature = 0;
    for (int i = 0; i < VOCAB; i++) l[i] = -1e30f;
    l[3] = logit, l[1] = want;
    bool tie = draw(l, VOCAB, &s).id == 1;
    l[1] = nextafterf(want, -INFINITY);
    return tie && draw(l, VOCAB, &s).id == 3;
}

static void test_penalties(void) {
    static const struct {
        float logit, repetition, frequency, presence;
        int in_prompt, in_output;
        float want;
    } cases[] = {
        {3, 1.5, 0, 0, 1, 0, 3 / 1.5f},          {3, 1.5, 0, 0, 0, 1, 3 / 1.5f},
        {3, 1.5, 0, 0, 4, 7, 3 / 1.5f}, 
        {-3, 1.5, 0, 0, 1, 1, -4.5},  // once, however often
        {3, 0.7f, 0, 0, 1, 0, 3 / 0.7f},         {-3, 0.7f, 0, 0, 1, 0, -3 * 0.7f},
        {0, 1.5, 0, 0, 1, 0, 0},                 {3, 1.5, 0, 0, 0, 0, 3},
        {3, 1, 0.5, 0, 4, 0, 3},                 {3, 1, 0.5, 0, 4, 1, 2.5},     // the output only
        {3, 1, 0.3f, 0, 0, 7, 3 - 0.3f * 7},     {3, 1, -0.5, 0, 0, 3, 4.5},
        {3, 1, 0, 0.7f, 5, 0, 3},                {3, 1, 0, 0.7f, 0, 5, 3 - 0.7f},
        {3, 1, 0, -0.7f, 0, 1, 3 + 0.7f},        {-3, 1, 0.1f, 0.7f, 1, 3, -3 - 0.1f * 3 - 0.7f},
        {3, 1.3f, 0.1f, 0.7f, 2, 3, 3 / 1.3f - 0.1f * 3 - 0.7f},  // in this order
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int tokens[32] = {0}, n = 0;
        Sampling s = neutral();
        s.repetition_penalty = cases[i].repetition;
        s.frequency_penalty = cases[i].frequency, s.presence_penalty = cases[i].presence;
        tokens[n++] = 5;  // others stand between, and must not be mixed up with it
        for (int k = 0; k < cases[i].in_prompt; k++) tokens[n++] = 3;
        s.n_prompt = n;
        for (int k = 0; k < cases[i].in_output; k++) tokens[n++] = 3, tokens[n++] = 6;
        s.tokens = tokens, s.n_tokens = n;
        // Twice: the counters that a row leaves behind must be those that it found.
        for (int twice = 0; twice < 2; twice++)
            CHECK(counts_as(cases[i].logit, cases[i].want, s), "case %zu: want %.9g", i,
                  cases[i].want);
    }
}

static void test_bias(void) {
    int token = 3, id[] = {3, 6};
    float bias[] = {-1.3f, 2};
    Sampling s = neutral();
    s.bias_id = id, s.bias = bias, s.n_bias = 2;
    CHECK(counts_as(3, 3 - 1.3f, s), "a bias");
    s.tokens = &token, s.n_tokens = s.n_prompt = 1, s.repetition_penalty = 1.7f;
    CHECK(counts_as(3, 3 / 1.7f - 1.3f, s), "behind the penalties");
    s.n_prompt = 0, s.frequency_penalty = 0.3f, s.presence_penalty = 0.9f;
    CHECK(counts_as(3, 3 / 1.7f - 0.3f - 0.9f - 1.3f, s), "behind all penalties");

    float l[VOCAB] = {1, 2, 3, 9, 8, 7, 6, 5}, lift = 100;
    int banned[] = {3, 4};
    s = neutral();
    s.temperature = 0, s.banned = banned, s.n_banned = 2;
    CHECK(draw(l, VOCAB, &s).id == 5, "banned ids are not chosen");
    s.bias_id = banned, s.bias = &lift, s.n_bias = 1;
    CHECK(draw(l, VOCAB, &s).id == 5, "nor with a bias");
    s.temperature = 1;
    CHECK(!(support(l, s) & 0x18), "nor drawn");

    float only[VOCAB];
    for (int i = 0; i < VOCAB; i++) only[i] = i == 3 ? 1 : -INFINITY;
    CHECK(draw(only, VOCAB, &s).id == -1, "where nothing else is there, nothing is drawn");
    s.temperature = 0;
    CHECK(draw(only, VOCAB, &s).id == -1, "nor taken greedily");
}

// ---- Logprobs -----------------------------------------------------------------------------------

static void test_logprobs(void) {
    enum { N = 40, TOP = 12 };
    float l[N], bias = 4;
    double total = 0;
    int token = 17, biased = 23, banned = 0;
    for (int i = 0; i < N; i++)
        l[i] = i % 10 == 3 ? 2.5f : cosf(i * 3) * 2;  // ids 3, 13, 23, 33 tie
    l[39] = -INFINITY, l[38] = -20000;
    for (int i = 0; i < N; i++) total += exp(l[i]);
    // All that changes logits is on; what is told are those before, so the lists stay the same.
    Sampling s = neutral();
    s.top_logprobs = TOP, s.temperature = 0.5, s.top_k = 5, s.top_p = 0.9;
    s.repetition_penalty = 1.5;
    s.presence_penalty = s.frequency_penalty = 1, s.tokens = &token, s.n_tokens = 1;
    s.bias_id = &biased, s.bias = &bias, s.n_bias = 1, s.banned = &banned, s.n_banned = 1;
    for (s.seed = 0; s.seed < 50; s.seed++) {
        Choice c = draw(l, N, &s);
        // One rounding of the difference and one of the result, each 6e-8 of a number of this size.
        double want = l[c.id] - log(total), sum = 0;
        CHECK(fabs(c.logprob - want) <= 1e-6, "id %d: got %.9g, want %.9g", c.id, c.logprob, want);
        bool sorted = c.n_top == TOP && c.top_id[0] == 3 && c.top_id[1] == 13 && c.top_id[3] == 33;
        for (int i = 0; i < c.n_top; i++) {
            sorted &= fabs(c.top_logprob[i] - (l[c.top_id[i]] - log(total))) <= 1e-6;
            if (i && l[c.top_id[i]] == l[c.top_id[i - 1]]) sorted &= c.top_id[i] > c.top_id[i - 1];
            else if (i) sorted &= c.top_logprob[i] < c.top_logprob[i - 1];
            sum += exp(c.top_logprob[i]);
        }
        CHECK(sorted && sum < 1, "the list of seed %d", (int)s.seed);
    }
    s.top_logprobs = N;
    Choice all = draw(l, N, &s);
    CHECK(all.n_top == N && all.top_id[N - 1] == 39 && all.top_id[N - 2] == 38,
          "all ids are listed");
    CHECK(all.top_logprob[N - 1] == -9999 && all.top_logprob[N - 2] == -9999,
          "none is below -9999");
    s.top_logprobs = 0;
    Choice none = draw(l, N, &s), off;
    CHECK(none.n_top == 0 && none.logprob == all.logprob && none.id == all.id,
          "logprob without a list");
    s.top_logprobs = -1;
    off = draw(l, N, &s);
    CHECK(off.n_top == 0 && off.id == all.id, "asking for logprobs changes no token");
}

// ---- Rows ---------------------------------------------------------------------------------------

// Rows with all kinds of parameters, together in two orders and alone: a row's choice is its own.
static void test_rows(void) {
    enum { N = 60 };
    static float l[ROWS][STRIDE], copy[ROWS][STRIDE];
    static Choice forward[ROWS], backward[ROWS];
    int tokens[] = {5, 9, 9, 30, 31, 9, 5, 59}, banned[] = {7, 8}, bias_id[] = {1, 30};
    float bias[] = {1.5, -2};
    Sampling s[ROWS], reversed[ROWS];
    for (int r = 0; r < ROWS; r++) {
        s[r] = (Sampling){.temperature = r % 4 * 0.6f,
                          .top_p = r % 3 ? 1 : 0.8,
                          .min_p = r % 5 ? 0 : 0.02,
                          .top_k = r % 7 ? -1 : 10,
                          .repetition_penalty = r % 2 ? 1 : 1.2f,
                          .seed = r * 1000003ull,
                          .frequency_penalty = r % 6 ? 0 : 0.4f,
                          .presence_penalty = r % 11 ? 0 : -0.3f,
                          .tokens = tokens,
                          .n_prompt = r % 3,
                          .n_tokens = 3 + r % 6,
                          .banned = banned,
                          .n_banned = r % 3,
                          .bias_id = bias_id,
                          .bias = bias,
                          .n_bias = r % 3,
                          .top_logprobs = r % 9 - 1};
        for (int i = 0; i < STRIDE; i++) l[r][i] = sinf(r * 100 + i * i) * 4;
        if (r == 12) l[r][3] = NAN;  // a broken row breaks no other
        reversed[ROWS - 1 - r] = s[r];
    }
    memcpy(copy, l, sizeof l);
    sample(forward, &copy[0][0], s, N, STRIDE, ROWS);
    for (int r = 0; r < ROWS; r++) memcpy(copy[ROWS - 1 - r], l[r], sizeof l[r]);
    sample(backward, &copy[0][0], reversed, N, STRIDE, ROWS);
    for (int r = 0; r < ROWS; r++) {
        Choice alone = draw(l[r], N, &s[r]);
        CHECK(choice_equal(&alone, &forward[r]), "row %d: alone %d, among others %d", r, alone.id,
              forward[r].id);
        CHECK(choice_equal(&alone, &backward[ROWS - 1 - r]), "row %d: the order of rows matters",
              r);
        CHECK((alone.id == -1) == (r == 12), "row %d: %d", r, alone.id);
    }
}

int main(void) {
    device_init(0, 1);
    test_philox();
    test_draw();
    test_seeds();
    test_greedy();
    test_not_finite();
    test_padding();
    test_filters();
    test_statistics();
    test_penalties();
    test_bias();
    test_logprobs();
    test_rows();
    return test_end();
}
