// tests/test_json.c: what json.c takes, refuses, finds and writes, and the small things beside it.
//
// Every document is parsed in a malloc'ed buffer of exactly its size, so that under ASan one byte
// read behind the end is a failure, and every accepted document's node array is walked and checked.
#include "../r1.h"
#include "test.h"

#include <float.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
enum { SANITIZED = true };
#else
enum { SANITIZED = false };
#endif

typedef struct {  // a document in its own buffer, with what became of it
    char *text, err[160];
    Json *root;
} Doc;

static Doc doc_parse(const char *text, size_t len) {
    Doc d = {.text = xmalloc(len)};
    if (len) memcpy(d.text, text, len);
    d.root = json_parse(d.text, len, d.err, sizeof d.err);
    return d;
}

static Doc doc_of(const char *text) { return doc_parse(text, strlen(text)); }

static void doc_free(Doc *d) {
    free(d->root);
    free(d->text);
}

static uint64_t random_state = 0x9E3779B97F4A7C15;

static uint64_t random_next(void) {  // xorshift64*, always the same numbers
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545F4914F6CDD1D;
}

// Writes a value back as compact JSON. False when the nodes contradict each other.
static bool write_value(Buf *out, const Json *v) {
    const Json *k = v + 1;
    bool ok = v->skip >= 1;
    switch (v->type) {
    case JSON_NULL: buf_str(out, "null"); break;
    case JSON_BOOL: buf_str(out, v->boolean ? "true" : "false"); break;
    case JSON_NUMBER: buf_printf(out, "%.17g", v->number); break;
    case JSON_STRING: json_write_string(out, v->string); break;
    case JSON_ARRAY:
        buf_str(out, "[");
        for (uint32_t i = 0; i < v->count; i++, k = json_next(k)) {
            if (i) buf_str(out, ",");
            ok &= write_value(out, k);
        }
        buf_str(out, "]");
        break;
    case JSON_OBJECT:
        buf_str(out, "{");
        for (uint32_t i = 0; i < v->count; i++, k = json_next(k + 1)) {
            ok &= k->type == JSON_STRING;
            if (i) buf_str(out, ",");
            json_write_string(out, k->string);
            buf_str(out, ":");
            ok &= write_value(out, k + 1);
        }
        buf_str(out, "}");
        break;
    }
    return ok && (v->type >= JSON_ARRAY ? k == json_next(v) : v->skip == 1);
}

// -------------------------------------------------------------------------------------------------

static void test_accept(void) {
    static const struct { const char *text, *compact; } rows[] = {
        {"null", "null"}, {"true", "true"}, {"false", "false"}, {"\"\"", "\"\""},
        {"0", "0"}, {"-0", "-0"}, {"-1.5e-3", "-0.0015"}, {" \t\r\n1\n", "1"}, {"[]", "[]"},
        {"{}", "{}"}, {"[ ]", "[]"}, {"{\n}", "{}"}, {"[[],[[]],{}]", "[[],[[]],{}]"},
        {"[1 , 2,3 ]", "[1,2,3]"}, {"[null,true,false]", "[null,true,false]"},
        {"{\"\":0}", "{\"\":0}"}, {"{\"a\":{\"b\":[1]}}", "{\"a\":{\"b\":[1]}}"},
        {"{ \"a\" : 1 , \"b\" : [ ] }", "{\"a\":1,\"b\":[]}"},
        {"{\"a\":1,\"a\":2}", "{\"a\":1,\"a\":2}"},
        {"[1E+2,1e2,1.0E-2,0e1,0.0,0E+1]", "[100,100,0.01,0,0,0]"}, {"1e-999", "0"},
        {"\"\\u00e9\\n\\/\"", "\"\303\251\\n/\""}, {"\"\x7f\"", "\"\x7f\""},
        {"\"\xF0\x9F\x98\x80\xEF\xBF\xBF\"", "\"\xF0\x9F\x98\x80\xEF\xBF\xBF\""},
        {"\"/*no comment*/\"", "\"/*no comment*/\""},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Doc d = doc_of(rows[i].text);
        Buf out = {0};
        CHECK(d.root, "%s: %s", rows[i].text, d.err);
        if (d.root) {
            CHECK(write_value(&out, d.root), "%s", rows[i].text);
            CHECK(!strcmp(out.data, rows[i].compact), "%s became %s", rows[i].text, out.data);
        }
        buf_free(&out);
        doc_free(&d);
    }
}

static void test_reject(void) {
    static const struct { const char *text, *err; } rows[] = {
        {"", "invalid JSON at byte 0: got the end, want a value"},
        {"  ", "invalid JSON at byte 2: got the end, want a value"},
        {"{\"model\":\"r1\",\"n\":2x", "invalid JSON at byte 19: got 'x', want ',' or '}'"},
        {"[1 2]", "invalid JSON at byte 3: got '2', want ',' or ']'"},
        {"[1", "invalid JSON at byte 2: got the end, want ',' or ']'"},
        {"[", "invalid JSON at byte 1: got the end, want a value or ']'"},
        {"[1,]", "invalid JSON at byte 3: got ']', want a value"},
        {"[,1]", "invalid JSON at byte 1: got ',', want a value or ']'"},
        {"{", "invalid JSON at byte 1: got the end, want '\"' or '}'"},
        {"{,}", "invalid JSON at byte 1: got ',', want '\"' or '}'"},
        {"{\"a\":1,}", "invalid JSON at byte 7: got '}', want '\"'"},
        {"{\"a\" 1}", "invalid JSON at byte 5: got '1', want ':'"},
        {"{\"a\":}", "invalid JSON at byte 5: got '}', want a value"},
        {"{1:2}", "invalid JSON at byte 1: got '1', want '\"' or '}'"},
        {"{a:2}", "invalid JSON at byte 1: got 'a', want '\"' or '}'"},
        {"{'a':2}", "invalid JSON at byte 1: got ''', want '\"' or '}'"},
        {"[1}", "invalid JSON at byte 2: got '}', want ',' or ']'"},
        {"{\"a\":1]", "invalid JSON at byte 6: got ']', want ',' or '}'"},
        {"1 2", "invalid JSON at byte 2: got '2', want the end"},
        {"{}}", "invalid JSON at byte 2: got '}', want the end"},
        {"null\f", "invalid JSON at byte 4: got '\\x0c', want the end"},
        {"\xEF\xBB\xBF{}", "invalid JSON at byte 0: got '\\xef', want a value"},
        {"tru", "invalid JSON at byte 3: got the end, want true"},
        {"nan", "invalid JSON at byte 1: got 'a', want null"},
        {"True", "invalid JSON at byte 0: got 'T', want a value"},
        {"truex", "invalid JSON at byte 4: got 'x', want the end"},
        {"falsy", "invalid JSON at byte 4: got 'y', want false"},
        {"NaN", "invalid JSON at byte 0: got 'N', want a value"},
        {"Infinity", "invalid JSON at byte 0: got 'I', want a value"},
        {"-Infinity", "invalid JSON at byte 1: got 'I', want a digit"},
        {"inf", "invalid JSON at byte 0: got 'i', want a value"},
        {"01", "invalid JSON at byte 1: got '1', want the end"},
        {"-01", "invalid JSON at byte 2: got '1', want the end"},
        {"[012]", "invalid JSON at byte 2: got '1', want ',' or ']'"},
        {"+1", "invalid JSON at byte 0: got '+', want a value"},
        {".5", "invalid JSON at byte 0: got '.', want a value"},
        {"-", "invalid JSON at byte 1: got the end, want a digit"},
        {"--1", "invalid JSON at byte 1: got '-', want a digit"},
        {"1.", "invalid JSON at byte 2: got the end, want a digit"},
        {"1.e1", "invalid JSON at byte 2: got 'e', want a digit"},
        {"1e", "invalid JSON at byte 2: got the end, want a digit"},
        {"1e+", "invalid JSON at byte 3: got the end, want a digit"},
        {"1e+-2", "invalid JSON at byte 3: got '-', want a digit"},
        {"1e2.5", "invalid JSON at byte 3: got '.', want the end"},
        {"0x10", "invalid JSON at byte 1: got 'x', want the end"},
        {"1_000", "invalid JSON at byte 1: got '_', want the end"},
        {"1,5", "invalid JSON at byte 1: got ',', want the end"},
        {"[1e999]", "invalid JSON at byte 1: got '1', want a number that fits a double"},
        {"-1.8e308", "invalid JSON at byte 0: got '-', want a number that fits a double"},
        {"\"", "invalid JSON at byte 1: got the end, want '\"'"},
        {"\"abc", "invalid JSON at byte 4: got the end, want '\"'"},
        {"'a'", "invalid JSON at byte 0: got ''', want a value"},
        {"\"a\nb\"",
         "invalid JSON at byte 2: got '\\x0a', want '\"' or a character from U+0020 on"},
        {"\"\x1f\"",
         "invalid JSON at byte 1: got '\\x1f', want '\"' or a character from U+0020 on"},
        {"\"\\", "invalid JSON at byte 2: got the end, want one of \"\\/bfnrtu"},
        {"\"\\a\"", "invalid JSON at byte 2: got 'a', want one of \"\\/bfnrtu"},
        {"\"\\'\"", "invalid JSON at byte 2: got ''', want one of \"\\/bfnrtu"},
        {"\"\\U0041\"", "invalid JSON at byte 2: got 'U', want one of \"\\/bfnrtu"},
        {"\"\\x41\"", "invalid JSON at byte 2: got 'x', want one of \"\\/bfnrtu"},
        {"\"\\u00g0\"", "invalid JSON at byte 5: got 'g', want a hex digit"},
        {"\"\\u12\"", "invalid JSON at byte 5: got '\"', want a hex digit"},
        {"\"\\u123", "invalid JSON at byte 6: got the end, want a hex digit"},
        {"\"\\uD800\"", "invalid JSON at byte 7: got '\"', want \\u and a low surrogate"},
        {"\"\\uD800\\n\"", "invalid JSON at byte 8: got 'n', want \\u and a low surrogate"},
        {"\"a\\uD800\\u0041\"", "invalid JSON at byte 2: got '\\', want surrogates in pairs"},
        {"\"\\uDBFF\\uDBFF\"", "invalid JSON at byte 1: got '\\', want surrogates in pairs"},
        {"\"\\uDC00\"", "invalid JSON at byte 1: got '\\', want surrogates in pairs"},
        {"\"\\uDFFF\\uD800\"", "invalid JSON at byte 1: got '\\', want surrogates in pairs"},
        {"/*c*/1", "invalid JSON at byte 0: got '/', want a value"},
        {"1//c", "invalid JSON at byte 1: got '/', want the end"},
        {"[1\xC2\xA0]", "invalid JSON at byte 2: got '\\xc2', want ',' or ']'"},
        {"[1\v]", "invalid JSON at byte 2: got '\\x0b', want ',' or ']'"},
        {"\\u0031", "invalid JSON at byte 0: got '\\', want a value"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Doc d = doc_of(rows[i].text);
        CHECK(!d.root, "accepted %s", rows[i].text);
        CHECK(!strcmp(d.err, rows[i].err), "%s: %s", rows[i].text, d.err);
        doc_free(&d);
    }
    // NUL bytes: one in a string, one behind a value, one alone; and the escape, which is fine.
    static const struct { const char *text; size_t len; bool ok; } nul[] = {
        {"\"a\0b\"", 5, false}, {"1\0", 2, false}, {"\0", 1, false}, {"[\0]", 3, false},
        {"\"\\\0\"", 4, false}, {"{\"a\"\0:1}", 8, false}, {"\"a\\u0000b\"", 10, true},
    };
    for (size_t i = 0; i < sizeof nul / sizeof *nul; i++) {
        Doc d = doc_parse(nul[i].text, nul[i].len);
        CHECK(!!d.root == nul[i].ok, "row %zu: %s", i, d.err);
        if (d.root)
            CHECK(d.root->string.len == 3 && !memcmp(d.root->string.data, "a\0b", 3), "NUL");
        doc_free(&d);
    }
    char text[] = "x", err[9];
    CHECK(!json_parse(text, 1, err, sizeof err) && !strcmp(err, "invalid "), "a short err is cut");
    CHECK(!json_parse(text, 1, NULL, 0), "err may be absent");
    char huge[64];  // refused by its length alone: no byte is looked at
    CHECK(!json_parse(text, (size_t)UINT32_MAX + 1, huge, sizeof huge), "4 GiB");
    CHECK(!strcmp(huge, "JSON of 4294967296 bytes, want less than 4 GiB"), "%s", huge);
}

static void test_numbers(void) {
    static const struct {
        const char *text;
        bool integer, negative;
        uint64_t magnitude;
    } whole[] = {
        {"0", true, false, 0},
        {"-0", true, true, 0},
        {"-0.0", true, true, 0},
        {"0e9", true, false, 0},
        {"16.0", true, false, 16},
        {"1e3", true, false, 1000},
        {"12.50e1", true, false, 125},
        {"1200e-2", true, false, 12},
        {"1201e-2", false, false, 0},
        {"0.5", false, false, 0},
        {"0.001e3", true, false, 1},
        {"9007199254740993", true, false, 9007199254740993},
        {"9007199254740993.000", true, false, 9007199254740993},
        {"90071992547409930e-1", true, false, 9007199254740993},
        {"9223372036854775807", true, false, INT64_MAX},
        {"9223372036854775808", true, false, 1ULL << 63},
        {"-9223372036854775808", true, true, 1ULL << 63},
        {"-9223372036854775809", false, true, 0},
        {"18446744073709551615", true, false, UINT64_MAX},
        {"18446744073709551616", false, false, 0},
        {"18446744073709551615.0000", true, false, UINT64_MAX},
        {"1844674407370955161.5e1", true, false, UINT64_MAX},
        {"1e19", true, false, 10000000000000000000u},
        {"1e20", false, false, 0},
        {"-1e19", false, true, 0},
        {"1.00000000000000000001", false, false, 0},
        {"0.99999999999999999999", false, false, 0},
        {"0e99999999999999999999", true, false, 0},
        {"1e-99999999999999999999", false, false, 0},
        {"0e-99999999999999999999", true, false, 0},
        {"99999999999999999999999999999999999999999999", false, false, 0},
    };
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++) {
        Doc d = doc_of(whole[i].text);
        CHECK(d.root && d.root->type == JSON_NUMBER, "%s: %s", whole[i].text, d.err);
        if (d.root) {
            CHECK(d.root->integer == whole[i].integer, "%s", whole[i].text);
            CHECK(d.root->negative == whole[i].negative, "%s", whole[i].text);
            if (whole[i].integer)
                CHECK(d.root->magnitude == whole[i].magnitude, "%s", whole[i].text);
            CHECK(d.root->number == strtod(whole[i].text, NULL), "%s", whole[i].text);
            CHECK(!signbit(d.root->number) == !whole[i].negative, "%s", whole[i].text);
        }
        doc_free(&d);
    }
    static const double doubles[] = {
        0.1, 1.0 / 3, 2.2250738585072011e-308, DBL_MIN, DBL_MAX, -DBL_MAX, DBL_EPSILON, 0x1p-1074,
        0x1.fffffffffffffp-1023, 123456789.123456789, 1e22, 1e23, 9007199254740993.0, 0x1p64, M_PI,
    };
    for (size_t i = 0; i < sizeof doubles / sizeof *doubles; i++) {
        char text[64];
        snprintf(text, sizeof text, "%.17g", doubles[i]);
        Doc d = doc_of(text);
        CHECK(d.root && d.root->number == doubles[i], "%s: %s", text, d.err);
        doc_free(&d);
    }
    // 2^53 + 1 lies between two doubles; 1,000 digits later a last one decides to round up.
    char text[1100] = "9007199254740993.";
    memset(text + strlen(text), '0', 1000);
    Doc tie = doc_of(text);
    text[strlen(text) - 1] = '1';
    Doc above = doc_of(text);
    CHECK(tie.root && tie.root->number == 9007199254740992, "tie to even");
    CHECK(above.root && above.root->number == 9007199254740994 && !above.root->integer,
          "above the tie");
    doc_free(&tie);
    doc_free(&above);
}

static void test_json_int(void) {
    static const struct { const char *text; int64_t lo, hi; bool ok; int64_t out; } rows[] = {
        {"16", 0, 100, true, 16}, {"16.0", 0, 100, true, 16}, {"1e2", 0, 100, true, 100},
        {"-0", 0, 0, true, 0},
        {"101", 0, 100, false, 0}, {"-1", 0, 100, false, 0}, {"-1", -1, 1, true, -1},
        {"0.5", 0, 1, false, 0},
        {"\"1\"", 0, 100, false, 0}, {"true", 0, 100, false, 0}, {"null", 0, 100, false, 0},
        {"[1]", 0, 100, false, 0}, {"9223372036854775807", 0, INT64_MAX, true, INT64_MAX},
        {"9223372036854775808", INT64_MIN, INT64_MAX, false, 0},
        {"1e300", INT64_MIN, INT64_MAX, false, 0},
        {"-9223372036854775808", INT64_MIN, 0, true, INT64_MIN},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Doc d = doc_of(rows[i].text);
        int64_t out = 77, want = rows[i].ok ? rows[i].out : 77;
        CHECK(json_int(d.root, rows[i].lo, rows[i].hi, &out) == rows[i].ok, "%s", rows[i].text);
        CHECK(out == want, "%s: %lld", rows[i].text, (long long)out);
        doc_free(&d);
    }
    int64_t out;
    CHECK(!json_int(NULL, 0, 1, &out), "an absent value is no integer");
}

static void test_path(void) {
    static const struct { int node; const char *path; } rows[] = {
        {0, ""}, {2, "a"}, {3, "a[0]"}, {4, "a[1]"}, {6, "a[1].b"}, {7, "a[1].b[0]"},
        {8, "a[1].b[1]"}, {10, "last"},
    };
    Doc d = doc_of("{\"a\":[1,{\"b\":[[],2]}],\"last\":3}");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Buf b = {0};
        buf_str(&b, "");
        json_path(&b, d.root, d.root + rows[i].node);
        CHECK(!strcmp(b.data, rows[i].path), "node %d: %s", rows[i].node, b.data);
        buf_free(&b);
    }
    doc_free(&d);
}

static void test_strings(void) {
    static const struct { const char *text, *want; } rows[] = {
        {"\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t"}, {"\"\\u0041\\u007f\"", "A\x7f"},
        {"\"\\u0080\\u07ff\"", "\xC2\x80\xDF\xBF"},
        {"\"\\u0800\\uFFFF\"", "\xE0\xA0\x80\xEF\xBF\xBF"},
        {"\"\\uD800\\uDC00\"", "\xF0\x90\x80\x80"}, {"\"\\udbff\\uDFFF\"", "\xF4\x8F\xBF\xBF"},
        {"\"\\uD83D\\uDE00!\"", "\xF0\x9F\x98\x80!"},
        {"\"\\uD7FF\\uE000\"", "\xED\x9F\xBF\xEE\x80\x80"},
        {"\"\\\\u0041\"", "\\u0041"}, {"\"a\\u00e9b\xC3\xA9\"", "a\xC3\xA9" "b\xC3\xA9"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Doc d = doc_of(rows[i].text);
        CHECK(d.root && str_equal(d.root->string, rows[i].want), "%s: %s", rows[i].text, d.err);
        doc_free(&d);
    }
}

// The definition of valid UTF-8 by decoding, unlike json.c's, which looks at ranges of bytes.
static bool utf8_valid(const uint8_t *s, size_t len) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    for (size_t i = 0, n; i < len; i += n) {
        n = s[i] < 0x80 ? 1 : s[i] >> 5 == 6 ? 2 : s[i] >> 4 == 14 ? 3 : s[i] >> 3 == 30 ? 4 : 0;
        if (n == 0 || i + n > len) return false;
        uint32_t code = n == 1 ? s[i] : s[i] & (0x7Fu >> n);
        for (size_t j = 1; j < n; j++) {
            if (s[i + j] >> 6 != 2) return false;
            code = code << 6 | (s[i + j] & 0x3F);
        }
        if (code < least[n] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return false;
    }
    return true;
}

// All first and second bytes, and borders of the later ones; cut after one to four bytes.
static void test_utf8(void) {
    static const uint8_t tails[][2] = {
        {0x80, 0x80}, {0xBF, 0xBF}, {0x80, 'a'}, {'a', 0x80}, {0xC2, 0x80}};
    int wrong = 0, count = 0;
    for (int a = 0x80; a < 0x100; a++)
        for (int b = 0x20; b < 0x100; b++)
            for (size_t t = 0; t < sizeof tails / sizeof *tails; t++)
                for (size_t n = 1; n <= 4; n++) {
                    uint8_t s[6] = {'"', (uint8_t)a, (uint8_t)b, tails[t][0], tails[t][1], 0};
                    if ((t && n < 3) || (b != 0x41 && n == 1) || b == '"' || b == '\\') continue;
                    s[n + 1] = '"';
                    Doc d = doc_parse((char *)s, n + 2);
                    wrong += !!d.root != utf8_valid(s + 1, n);
                    count++;
                    doc_free(&d);
                }
    CHECK(wrong == 0, "%d of %d", wrong, count);
    // Code points from everywhere, written as bytes and as escapes, must be the same string.
    wrong = 0;
    for (uint32_t c = 0; c < 0x110000; c += c < 0x10000 ? 7 : 1021) {
        if (c >= 0xD800 && c < 0xE000) continue;
        char escaped[32];
        if (c < 0x10000) snprintf(escaped, sizeof escaped, "\"\\u%04X\"", c);
        else
            snprintf(escaped, sizeof escaped, "\"\\u%04x\\u%04x\"", 0xD7C0 + (c >> 10),
                     0xDC00 | (c & 0x3FF));
        Doc d = doc_of(escaped);
        Buf out = {0};
        if (d.root) json_write_string(&out, d.root->string);
        Doc again = doc_parse(out.data, out.len);
        wrong += !d.root || !again.root || again.root->string.len != d.root->string.len ||
                 memcmp(again.root->string.data, d.root->string.data, d.root->string.len) ||
                 !utf8_valid((const uint8_t *)d.root->string.data, d.root->string.len);
        buf_free(&out);
        doc_free(&d);
        doc_free(&again);
    }
    CHECK(wrong == 0, "%d code points", wrong);
}

static void test_depth(void) {
    for (int depth = 60; depth < 70; depth++)
        for (int kind = 0; kind < 2; kind++) {
            Buf text = {0};
            for (int i = 0; i < depth; i++) buf_str(&text, kind ? "{\"a\":" : "[");
            if (kind) buf_str(&text, "0");
            for (int i = 0; i < depth; i++) buf_str(&text, kind ? "}" : "]");
            Doc d = doc_parse(text.data, text.len);
            CHECK(!!d.root == (depth <= 64), "depth %d: %s", depth, d.err);
            if (depth == 65 && !kind)
                CHECK(!strcmp(d.err, "invalid JSON at byte 64: got '[', want at most 64 levels"),
                      "%s", d.err);
            doc_free(&d);
            buf_free(&text);
        }
    size_t len = 1 << 20;  // a stack that grew with the text would overflow here
    char *deep = memset(xmalloc(len), '[', len);
    Doc d = doc_parse(deep, len);
    CHECK(!d.root, "a million brackets");
    doc_free(&d);
    free(deep);
}

static const char request[] =
    " {\"model\":\"R1\",\"messages\":[{\"role\":\"user\",\"content\":\"caf\xC3\xA9 \\u00e9\\uD83D"
    "\\uDE00\\n \xE2\x82\xAC \xF0\x9F\x98\x80\"},{\"role\":\"tool\",\"content\":null}],"
    "\"temperature\":0.6,\"top_p\":9.5e-1,\"max_tokens\":2048,\"seed\":18446744073709551615,"
    "\"stream\":true,\"x\":[[],{},[{}],-0.0,false,\"\"]}";

static void test_truncated(void) {
    size_t len = sizeof request - 1;
    for (size_t cut = 0; cut <= len; cut++) {
        Doc d = doc_parse(request, cut);
        CHECK(!!d.root == (cut == len), "the first %zu bytes: %s", cut, d.err);
        if (!d.root) CHECK(!strncmp(d.err, "invalid JSON at byte ", 21), "%s", d.err);
        doc_free(&d);
    }
}

// Changes, drops and inserts bytes of the request. What is still accepted must be consistent.
static void test_mutated(void) {
    static const char bytes[] = "{}[]\",:\\u0019.eE+-tfn \xC3\xA9\xED\xF4\x01";
    int accepted = 0, wrong = 0, rounds = 100000;
    for (int round = 0; round < rounds; round++) {
        char text[2 * sizeof request];
        size_t len = sizeof request - 1;
        memcpy(text, request, len);
        for (uint64_t edits = 1 + random_next() % 3; edits; edits--) {
            size_t at = random_next() % len;
            char byte = bytes[random_next() % (sizeof bytes - 1)];
            switch (random_next() % 4) {
            case 0: text[at] = byte; break;
            case 1: text[at] = (char)random_next(); break;
            case 2: memmove(text + at, text + at + 1, len - at - 1), len--; break;
            case 3: memmove(text + at + 1, text + at, len - at), len++, text[at] = byte; break;
            }
        }
        Doc d = doc_parse(text, len);
        if (d.root) {
            Buf out = {0};
            accepted++;
            wrong += !write_value(&out, d.root);
            json_duplicate_key(d.root);
            if (accepted % 8 == 0) {
                Doc again = doc_parse(out.data, out.len);
                Buf twice = {0};
                wrong +=
                    !again.root || !write_value(&twice, again.root) || strcmp(out.data, twice.data);
                doc_free(&again);
                buf_free(&twice);
            }
            buf_free(&out);
        }
        doc_free(&d);
    }
    CHECK(wrong == 0, "%d of %d accepted ones", wrong, accepted);
    CHECK(accepted > rounds / 50 && accepted < rounds, "%d of %d were accepted", accepted, rounds);
}

static void test_lookup(void) {
    Doc d = doc_of(
        "{\"a\":1,\"b\":{\"a\":[2,[3,4],{\"a\":5}]},\"c\":null,\"a\":[6],\"\":7,\"a\\u0000\":8}");
    const Json *root = d.root, *b = json_get(root, "b");
    CHECK(root && root->count == 6 && json_get(root, "a")->type == JSON_ARRAY,
          "the last of equal keys");
    CHECK(json_get(root, "c")->type == JSON_NULL && !json_get(root, "d"),
          "null is there, d is not");
    CHECK(json_get(root, "")->number == 7, "the empty key");
    CHECK(!json_get(NULL, "a") && !json_get(json_get(root, "a"), "a"), "no object, no members");
    const Json *v = json_get(b, "a") + 1;  // 2, then [3,4], then {"a":5}
    CHECK(v->number == 2 && json_next(v)->count == 2, "over a number");
    CHECK(json_next(json_next(v))->type == JSON_OBJECT, "over an array");
    CHECK(json_get(json_next(json_next(v)), "a")->number == 5, "inside");
    CHECK(json_next(root) == root + root->skip && root->skip == 23, "%u nodes", root->skip);
    const Json *twin = json_duplicate_key(root);
    CHECK(twin && str_equal(twin->string, "a") && twin[1].count == 1, "the second a");
    CHECK(!json_duplicate_key(b) && !json_duplicate_key(json_get(root, "a")), "no duplicates");
    doc_free(&d);

    static const char *const names[] = {"null", "bool", "number", "string", "array", "object"};
    d = doc_of("[null,true,1,\"\",[],{}]");
    v = d.root + 1;
    for (int i = 0; i < 6; i++, v = json_next(v))
        CHECK(!strcmp(json_type_name(v), names[i]), "%d", i);
    doc_free(&d);

    static const struct { const char *text; int at; } rows[] = {  // at: the node of the second key
        {"{}", 0}, {"{\"a\":1}", 0}, {"{\"a\":1,\"b\":2}", 0}, {"{\"a\":1,\"a\":2}", 3},
        {"{\"a\":1,\"b\":{\"a\":1}}", 0}, {"{\"\":1,\"\":2}", 3},
        {"{\"a\":[1],\"bb\":0,\"\\u0061\":2}", 6},
        {"{\"a\":1,\"a\":2,\"a\":3}", 3}, {"{\"a\\u0000\":1,\"a\":2}", 0}, {"[\"a\",\"a\"]", 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        d = doc_of(rows[i].text);
        twin = json_duplicate_key(d.root);
        CHECK(twin == (rows[i].at ? d.root + rows[i].at : NULL), "%s", rows[i].text);
        doc_free(&d);
    }
}

static void test_header(void) {
    enum { ENTRIES = 90000 };
    Buf text = {0};
    for (int i = 0; i < ENTRIES; i++)
        buf_printf(
            &text,
            "%s\"model.layers.%d.mlp.experts.%d.%s_proj.weight\":{\"dtype\":\"F8_E4M3\",\"shape\":"
            "[2048,7168],\"data_offsets\":[%lld,%lld]}",
            i ? "," : "{", i / 768, i / 3 % 256,
            i % 3 == 0 ? "gate" : i % 3 == 1 ? "up" : "down", i * 14680064LL, (i + 1) * 14680064LL);
    buf_str(&text, "}");
    double t0 = now_seconds();
    Doc d = doc_parse(text.data, text.len);
    double t1 = now_seconds();
    const Json *twin = d.root ? json_duplicate_key(d.root) : NULL;
    double t2 = now_seconds();
    CHECK(d.root && d.root->count == ENTRIES, "%s", d.err);
    CHECK(!twin, "duplicates");
    double limit = SANITIZED ? 10 : 1;  // generous: other tests may run beside this one
    CHECK(t1 - t0 < limit && t2 - t1 < limit, "too slow");
    printf(
        "a header of %d entries, %.1f MB: parsed in %.1f ms, checked for equal keys in %.1f ms\n",
        ENTRIES, (double)text.len / 1e6, (t1 - t0) * 1e3, (t2 - t1) * 1e3);
    int64_t end = 0;
    const Json *last =
        d.root ? json_get(d.root, "model.layers.117.mlp.experts.47.down_proj.weight") : NULL;
    const Json *offsets = json_get(last, "data_offsets");
    CHECK(offsets && json_int(json_next(offsets + 1), 0, INT64_MAX, &end) &&
              end == ENTRIES * 14680064LL,
          "the last entry ends at %lld", (long long)end);
    doc_free(&d);
    buf_free(&text);
}

// -------------------------------------------------------------------------------------------------

static void test_write_string(void) {
    static const struct { const char *text, *want; } rows[] = {
        {"", "\"\""}, {"abc/", "\"abc/\""}, {"\"\\", "\"\\\"\\\\\""},
        {"\n\t\r\b\f", "\"\\n\\t\\r\\b\\f\""},
        {"\x01\x1f\x7f", "\"\\u0001\\u001f\x7f\""},
        {"\xE2\x82\xAC\xF0\x9F\x98\x80", "\"\xE2\x82\xAC\xF0\x9F\x98\x80\""},
        {"a\xFFz", "\"a\xEF\xBF\xBDz\""}, {"\xC3", "\"\xEF\xBF\xBD\""},
        {"\xC0\x80", "\"\xEF\xBF\xBD\xEF\xBF\xBD\""},
        {"\xED\xA0\x80", "\"\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\""},
        {"\xE2\x82\"", "\"\xEF\xBF\xBD\xEF\xBF\xBD\\\"\""},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Buf out = {0};
        json_write_string(&out, (Str){rows[i].text, strlen(rows[i].text)});
        CHECK(!strcmp(out.data, rows[i].want), "%s", out.data);
        buf_free(&out);
    }
    Buf out = {0};
    json_write_string(&out, STR("a\0b"));
    json_write_string(&out, (Str){NULL, 0});
    CHECK(!strcmp(out.data, "\"a\\u0000b\"\"\""), "%s", out.data);
    buf_free(&out);
    int wrong = 0;
    // Any bytes must give a document, and UTF-8 must come back.
    for (int round = 0; round < 20000; round++) {
        char bytes[8], *exact;
        size_t len = random_next() % (sizeof bytes + 1);
        for (size_t i = 0; i < len; i++) bytes[i] = (char)(random_next() >> (round % 2 ? 57 : 56));
        exact = xmalloc(len);
        memcpy(exact, bytes, len);
        json_write_string(&out, (Str){exact, len});
        Doc d = doc_parse(out.data, out.len);
        Str s = d.root ? d.root->string : (Str){0};
        wrong += !d.root;
        if (utf8_valid((uint8_t *)exact, len))
            wrong += s.len != len || memcmp(s.data, exact, len) != 0;
        free(exact);
        doc_free(&d);
        buf_free(&out);
    }
    CHECK(wrong == 0, "%d", wrong);
}

static void test_write_float(void) {
    static const struct { float f; const char *want; } rows[] = {
        {0, "0"}, {-0.0f, "-0"}, {0.6f, "0.6"}, {1e-5f, "1e-05"}, {-9999, "-9999"},
        {1.0f / 3, "0.33333334"},
        {16777216, "16777216"}, {FLT_MAX, "3.4028235e+38"}, {FLT_MIN, "1.1754944e-38"},
        {0x1p-149f, "1e-45"},
        {-0.1841f, "-0.1841"}, {123456, "123456"}, {0.95f, "0.95"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Buf out = {0};
        json_write_float(&out, rows[i].f);
        CHECK(!strcmp(out.data, rows[i].want), "%s, want %s", out.data, rows[i].want);
        buf_free(&out);
    }
    // A random pattern is nearly never subnormal or short, so a third of them are made so.
    int wrong = 0, longer = 0;
    for (int round = 0; round < 100000; round++) {
        uint32_t bits = (uint32_t)(random_next() >> 32);
        float f, back;
        if (round % 6 == 0) bits &= 0x807FFFFF;
        memcpy(&f, &bits, sizeof f);
        if (round % 6 == 1) f = (float)(int32_t)bits / 1000.0f;
        if (!isfinite(f)) continue;
        Buf out = {0};
        json_write_float(&out, f);
        back = strtof(out.data, NULL);
        Doc d = doc_parse(out.data, out.len);
        wrong += !d.root || memcmp(&f, &back, sizeof f) || (float)d.root->number != f;
        if (round % 8 < 2) {  // one digit less must not be enough
            int digits = 0;
            for (const char *s = out.data; *s && *s != 'e'; s++)
                digits += *s >= '0' && *s <= '9' && (digits || *s > '0');
            if (strpbrk(out.data, "e.")) {  // else its last zeros may be no digits
                char shorter[400];
                snprintf(shorter, sizeof shorter, "%.*g", digits - 1, (double)f);
                longer += digits > 1 && strtof(shorter, NULL) == f;
            }
        }
        doc_free(&d);
        buf_free(&out);
    }
    CHECK(wrong == 0, "%d came back changed", wrong);
    CHECK(longer == 0, "%d were longer than need be", longer);
}

// -------------------------------------------------------------------------------------------------

// Runs `say` in a child whose stderr is a pipe and returns what it wrote; *status as waitpid's.
static Buf stderr_of(void (*say)(void), int *status) {
    int ends[2];
    if (pipe(ends)) die("pipe");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        close(ends[1]);
        say();
        _exit(0);
    }
    close(ends[1]);
    Buf out = {0};
    char chunk[4096];
    ssize_t n;
    buf_add(&out, "", 0);
    while ((n = read(ends[0], chunk, sizeof chunk)) > 0) buf_add(&out, chunk, (size_t)n);
    close(ends[0]);
    waitpid(child, status, 0);
    return out;
}

static void say_lines(void) {
    log_line(0, "tokens: %d", 7);
    log_line(-1, "%s", "a\nb\tc\r\x1b[31m\x7f\xC2\x9B\xFF \xC3\xA9 \xE2\x82\xAC \"\\");
    log_line(15, "%s", "");
}

static void say_long(void) {
    char text[9000];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = 0;
    log_line(3, "%s", text);
    memset(text, 1, sizeof text - 1);
    log_line(3, "%s", text);
}

static void say_death(void) { die("tensor %s: dtype %s, want F8_E4M3", "a\nb", "F16"); }
static void say_no_memory(void) { xmalloc(SIZE_MAX / 4); }
static void say_no_product(void) { xcalloc(SIZE_MAX / 2, 3); }

static void say_together(void) {
    for (int child = 0; child < 4; child++)
        if (fork() == 0) {
            char text[2001];
            memset(text, 'a' + child, 2000);
            text[2000] = 0;
            for (int i = 0; i < 100; i++) log_line(child, "%s", text);
            _exit(0);
        }
    while (wait(NULL) > 0) {}
}

static void test_lines(void) {
    int status;
    Buf out = stderr_of(say_lines, &status);
    int year, n = 0;
    char *lines[4] = {0}, *rest = out.data;
    for (char *line; n < 4 && (line = strsep(&rest, "\n"));) lines[n++] = line;
    CHECK(n == 4 && *lines[3] == 0, "%d lines", n - 1);
    CHECK(sscanf(lines[0], "[%4d-%*2d-%*2d %*2d:%*2d:%*2d TP0] ", &year) == 1 && year >= 2024, "%s",
          lines[0]);
    CHECK(strlen(lines[0]) == 26 + 9 && !strcmp(lines[0] + 24 - 4, " TP0] tokens: 7"), "%s",
          lines[0]);
    CHECK(!strcmp(lines[1] + 20,
                  "] a\\nb\\x09c\\x0d\\x1b[31m\\x7f\\xc2\\x9b\\xff \xC3\xA9 \xE2\x82\xAC \"\\"),
          "%s", lines[1]);
    CHECK(!strcmp(lines[2] + 20, " TP15] "), "%s", lines[2]);
    buf_free(&out);

    out = stderr_of(say_long, &status);
    char *second = strchr(out.data, '\n');
    CHECK(second && second - out.data > 4000 && second - out.data < 4096, "cut");
    CHECK(second && out.data[out.len - 1] == '\n' && out.data + out.len - second <= 4097,
          "cut, escaped");
    buf_free(&out);

    out = stderr_of(say_death, &status);
    CHECK(!strcmp(out.data, "r1: tensor a\\nb: dtype F16, want F8_E4M3\n"), "%s", out.data);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1, "status %d", status);
    buf_free(&out);

    out = stderr_of(say_together, &status);
    int whole = 0;
    rest = out.data;
    for (char *line; (line = strsep(&rest, "\n"));)
        if (strlen(line) == 2026)
            whole += line[26] == 'a' + line[23] - '0' &&
                     strspn(line + 26, (char[]){line[26], 0}) == 2000;
    CHECK(whole == 400, "%d whole lines of 400", whole);
    buf_free(&out);
}

static void test_memory(void) {
    void (*const rows[])(void) = {say_no_memory, say_no_product};
    if (SANITIZED) SKIP("refused allocations: ASan aborts instead");
    for (int i = 0; i < 2 && !SANITIZED; i++) {
        int status;
        Buf out = stderr_of(rows[i], &status);
        CHECK(!strncmp(out.data, "r1: no memory for ", 18), "%s", out.data);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1, "status %d", status);
        buf_free(&out);
    }
    int *zero = xcalloc(100, sizeof *zero), sum = 0;
    for (int i = 0; i < 100; i++) sum |= zero[i];
    CHECK(sum == 0, "zeroed");
    zero = xrealloc(zero, 0);
    CHECK(zero, "never NULL");
    free(zero);

    Buf b = {0};
    for (int i = 0; i < 1000; i++) {
        buf_add(&b, "abc", 3);
        if (b.data[b.len] || b.len >= b.cap) break;
    }
    buf_printf(&b, "%0*d", 500, 7);
    CHECK(b.len == 3500 && strlen(b.data) == 3500 && b.data[3499] == '7', "%zu", b.len);
    buf_free(&b);
    CHECK(!b.data && !b.len && !b.cap, "zeroed");
    buf_add(&b, NULL, 0);
    CHECK(b.data && !*b.data, "nothing is an empty string");
    buf_free(&b);

    char *s = format_string("%s-%d", "r", 1);
    CHECK(!strcmp(s, "r-1"), "%s", s);
    free(s);
    CHECK(str_equal(STR("abc"), "abc") && !str_equal(STR("abc"), "ab") &&
              !str_equal(STR("ab"), "abc"),
          "str_equal");
    CHECK(str_equal((Str){NULL, 0}, "") && !str_equal(STR("a\0"), "a"), "str_equal");
}

static void test_files(void) {
    char path[] = "/tmp/test_json_XXXXXX";
    int fd = mkstemp(path);
    size_t sizes[] = {0, 1, 65535, 65536, 65537, 300000}, len = 99;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char *want = xmalloc(sizes[i]);
        for (size_t j = 0; j < sizes[i]; j++) want[j] = (char)random_next();
        CHECK(!ftruncate(fd, 0) && pwrite(fd, want, sizes[i], 0) == (ssize_t)sizes[i], "write");
        char *got = read_file(path, &len);
        CHECK(got && len == sizes[i] && !memcmp(got, want, len) && !got[len], "%zu bytes",
              sizes[i]);
        free(got);
        free(want);
    }
    close(fd);
    unlink(path);
    CHECK(!read_file(path, &len), "a file that isn't there");
    CHECK(!read_file("/tmp", &len), "a directory");
    char *status = read_file("/proc/self/status", &len);
    CHECK(status && len > 100, "a file without a size");
    free(status);
    double before = now_seconds();
    CHECK(before > 0 && now_seconds() >= before, "the clock");
}

int main(void) {
    test_lines();  // first, while there is little memory to fork
    test_memory();
    test_accept();
    test_reject();
    test_numbers();
    test_json_int();
    test_path();
    test_strings();
    test_utf8();
    test_depth();
    test_truncated();
    test_mutated();
    test_lookup();
    test_header();
    test_write_string();
    test_write_float();
    test_files();
    return test_end();
}
