// json.c: small things that every file needs, and JSON.
//
// The one idea: a document becomes one flat array of nodes in reading order, and each node says how
// many nodes its whole value takes. Walking is pointer arithmetic: `value + 1` is a container's
// first element, `value + value->skip` what follows the value. Nothing is linked, so nothing but
// the array has to be freed. Strings are unescaped where they stand: an escape is never shorter
// than what it means, so the place of writing can't overtake the place of reading.
#define _GNU_SOURCE  // vasprintf
#include "r1.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_DEPTH = 64,     // nested containers; so the parser's recursion has a limit, too
    LINE_BYTES = 4096,  // Linux' PIPE_BUF: a write of up to this many bytes to a pipe is atomic
};

// The letters behind a backslash, and what they mean.
static const char escape_letter[] = "\"\\/bfnrt", escape_byte[] = "\"\\/\b\f\n\r\t";

// The code point at s (len > 0) and how many bytes it takes. Bytes that can't begin one, or begin
// one and break off, are UTF8_INVALID, or UTF8_PARTIAL where the text ends first: as many as a
// valid sequence could begin with, which become one U+FFFD. The second byte's bounds leave out
// overlong forms, surrogates and all beyond U+10FFFF. (Unicode, table 3-7)
size_t utf8_decode(uint32_t *code, const char *s, size_t len) {
    const uint8_t *p = (const uint8_t *)s;
    *code = p[0];
    if (p[0] < 0x80) return 1;
    size_t n = p[0] < 0xC2 || p[0] > 0xF4 ? 1 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : 4;
    uint8_t low = p[0] == 0xE0 ? 0xA0 : p[0] == 0xF0 ? 0x90 : 0x80;
    uint8_t high = p[0] == 0xED ? 0x9F : p[0] == 0xF4 ? 0x8F : 0xBF;
    *code = n == 1 ? UTF8_INVALID : p[0] & 0x7Fu >> n;
    for (size_t i = 1; i < n; i++, low = 0x80, high = 0xBF) {
        if (i == len) return *code = UTF8_PARTIAL, i;
        if (p[i] < low || p[i] > high) return *code = UTF8_INVALID, i;
        *code = *code << 6 | (p[i] & 0x3F);
    }
    return n;
}

// Bytes of the character at s, 1..4, or 0 where no valid UTF-8 stands.
static size_t utf8_length(const char *s, size_t left) {
    uint32_t code;
    size_t n = utf8_decode(&code, s, left);
    return code < UTF8_INVALID ? n : 0;
}

// ------------------------------------------------------------------------------------------------
// Lines for the operator, memory, strings, files

// One line to stderr in one write, so that lines of different threads never interleave. Nothing is
// allocated, because running out of memory is reported here too; a line that is too long is cut.
// A request can put anything into the text, so controls (U+0080 to U+009F, too, which terminals
// obey) and what isn't UTF-8 are escaped.
static void write_line(const char *prefix, const char *format, va_list args) {
    char text[LINE_BYTES], line[LINE_BYTES];
    vsnprintf(text, sizeof text, format, args);
    size_t n = (size_t)snprintf(line, sizeof line, "%s", prefix);
    const char *s = text, *end = text + strlen(text);
    while (s < end && n + 5 < sizeof line) {  // 5: the most that one turn adds, and the newline
        uint8_t c = (uint8_t)*s;
        size_t bytes = utf8_length(s, (size_t)(end - s));
        bool plain = bytes && !iscntrl(c) && !(c == 0xC2 && (uint8_t)s[1] < 0xA0);
        if (!plain) {
            n += (size_t)sprintf(line + n, c == '\n' ? "\\n" : "\\x%02x", c);
            s++;
        }
        for (; plain && bytes; bytes--) line[n++] = *s++;
    }
    line[n++] = '\n';
    while (write(STDERR_FILENO, line, n) < 0 && errno == EINTR) {}
}

_Noreturn void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    write_line("r1: ", format, args);
    va_end(args);
    fflush(stdout);
    _exit(1);  // without handlers: they could wait for other threads, or for a GPU that is lost
}

void log_line(int rank, const char *format, ...) {
    char prefix[64], tp[16] = "";
    time_t now = time(NULL);
    struct tm local = {0};
    localtime_r(&now, &local);
    if (rank >= 0) snprintf(tp, sizeof tp, " TP%d", rank);
    size_t n = strftime(prefix, sizeof prefix, "[%Y-%m-%d %H:%M:%S", &local);
    snprintf(prefix + n, sizeof prefix - n, "%s] ", tp);
    va_list args;
    va_start(args, format);
    write_line(prefix, format, args);
    va_end(args);
}

double now_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

void *xrealloc(void *old, size_t bytes) {
    void *p = realloc(old, bytes ? bytes : 1);  // of 0 bytes NULL would be a success
    if (!p) die("no memory for %zu bytes", bytes);
    return p;
}

void *xmalloc(size_t bytes) { return xrealloc(NULL, bytes); }

void *xcalloc(size_t count, size_t bytes) {
    void *p = calloc(count ? count : 1, bytes ? bytes : 1);
    if (!p) die("no memory for %zu times %zu bytes", count, bytes);
    return p;
}

void buf_add(Buf *b, const void *data, size_t len) {
    if (len > SIZE_MAX / 4 - b->len) die("no memory for %zu bytes more", len);
    if (b->len + len >= b->cap) {
        b->cap = 2 * (b->len + len) + 32;  // doubled, so that n bytes cost n, however they come
        b->data = xrealloc(b->data, b->cap);
    }
    if (len) memcpy(b->data + b->len, data, len);
    b->len += len;
    b->data[b->len] = 0;
}

void buf_str(Buf *b, const char *text) { buf_add(b, text, strlen(text)); }

void buf_printf(Buf *b, const char *format, ...) {
    va_list args;
    va_start(args, format);
    buf_vprintf(b, format, args);
    va_end(args);
}

void buf_vprintf(Buf *b, const char *format, va_list args) {
    char *text;
    int len = vasprintf(&text, format, args);
    if (len < 0) die("no memory for a text like \"%s\"", format);
    buf_add(b, text, (size_t)len);
    free(text);
}

void buf_shift(Buf *b, Buf *out, size_t n) {
    if (!n) return;
    if (out) buf_add(out, b->data, n);
    b->len -= n;
    memmove(b->data, b->data + n, b->len + 1);  // and the NUL
}

void buf_free(Buf *b) {
    free(b->data);
    *b = (Buf){0};
}

char *format_string(const char *format, ...) {
    va_list args;
    va_start(args, format);
    char *text;
    if (vasprintf(&text, format, args) < 0) die("no memory for a text like \"%s\"", format);
    va_end(args);
    return text;
}

static bool str_same(Str a, Str b) {
    return a.len == b.len && (!a.len || !memcmp(a.data, b.data, a.len));
}

bool str_equal(Str a, const char *b) { return str_same(a, (Str){b, strlen(b)}); }

char *read_file(const char *path, size_t *len) {
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    Buf b = {0};
    char chunk[1 << 16];
    // To the end instead of asking for the size: pipes and files of /proc have none.
    for (size_t n = 0; n || !b.data; buf_add(&b, chunk, n)) n = fread(chunk, 1, sizeof chunk, f);
    if (ferror(f)) buf_free(&b);
    fclose(f);
    *len = b.len;
    return b.data;
}

// ------------------------------------------------------------------------------------------------
// JSON in. Each parse_ function starts at its subject's first byte and stops behind the last; false
// means that `err` is written and all is over.

typedef struct {
    char *text, *at, *end;
    Json *nodes;
    size_t count, cap;
    char *err;
    size_t err_size;
} Parser;

static bool fail(Parser *p, const char *want) {
    char got[16] = "the end";
    uint8_t c = p->at < p->end ? (uint8_t)*p->at : 0;
    if (p->at < p->end) snprintf(got, sizeof got, isprint(c) ? "'%c'" : "'\\x%02x'", c);
    snprintf(p->err, p->err_size, "invalid JSON at byte %zu: got %s, want %s",
             (size_t)(p->at - p->text), got, want);
    return false;
}

// The next byte, 0 at the end: a NUL byte is as wrong everywhere as the end is.
static char peek(const Parser *p) { return p->at < p->end ? *p->at : 0; }

static bool take(Parser *p, char c) {
    if (peek(p) != c) return false;
    p->at++;
    return true;
}

static void skip_space(Parser *p) {
    while (take(p, ' ') || take(p, '\n') || take(p, '\r') || take(p, '\t')) {}
}

// The pointer holds until the next call, which may move the array. A node has 32 bytes, so that
// [0,0,0... takes 16 times its text: whoever reads text from outside has to bound it.
static Json *node_add(Parser *p, JsonType type) {
    if (p->count == p->cap) {
        p->cap = 2 * p->cap + 64;
        p->nodes = xrealloc(p->nodes, p->cap * sizeof *p->nodes);
    }
    p->nodes[p->count] = (Json){.type = type, .skip = 1};
    return &p->nodes[p->count++];
}

static bool parse_hex4(Parser *p, uint32_t *code) {
    *code = 0;
    for (int i = 0; i < 4; i++, p->at++) {
        uint8_t c = (uint8_t)peek(p);
        if (!isxdigit(c)) return fail(p, "a hex digit");
        *code = 16 * *code + (uint32_t)(c <= '9' ? c - '0' : tolower(c) - 'a' + 10);
    }
    return true;
}

static bool parse_escape(Parser *p, char **out) {
    char *start = p->at++, *o = *out;
    const char *known = peek(p) ? strchr(escape_letter, peek(p)) : NULL;
    uint32_t code, low;
    if (known) {
        p->at++;
        code = (uint8_t)escape_byte[known - escape_letter];
    } else {
        if (!take(p, 'u')) return fail(p, "one of \"\\/bfnrtu");
        if (!parse_hex4(p, &code)) return false;
    }
    // Beyond U+FFFF an escape is two UTF-16 surrogates of ten bits: D800..DBFF, then DC00..DFFF.
    if ((code & 0xFC00) == 0xD800) {
        if (!take(p, '\\') || !take(p, 'u')) return fail(p, "\\u and a low surrogate");
        if (!parse_hex4(p, &low)) return false;
        if ((low & 0xFC00) == 0xDC00) code = 0x10000 + ((code & 0x3FF) << 10 | (low & 0x3FF));
    }
    if (code >= 0xD800 && code < 0xE000) {  // no pair was made of it
        p->at = start;
        return fail(p, "surrogates in pairs");
    }
    // UTF-8: the first byte's high bits say how many more follow, and each of those takes six bits.
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *o++ = (char)("\x00\xC0\xE0\xF0"[more] | code >> 6 * more);
    while (more-- > 0) *o++ = (char)(0x80 | (code >> 6 * more & 0x3F));
    *out = o;
    return true;
}

static bool parse_string(Parser *p) {
    char *start = ++p->at, *out = start;
    while (!take(p, '"')) {
        if (p->at == p->end) return fail(p, "'\"'");
        if (peek(p) == '\\') {
            if (!parse_escape(p, &out)) return false;
            continue;
        }
        if ((uint8_t)peek(p) < 0x20) return fail(p, "'\"' or a character from U+0020 on");
        // The length comes from the bytes that are there, so a character can't reach over the end.
        size_t bytes = utf8_length(p->at, (size_t)(p->end - p->at));
        if (!bytes) return fail(p, "UTF-8");
        while (bytes--) *out++ = *p->at++;
    }
    node_add(p, JSON_STRING)->string = (Str){start, (size_t)(out - start)};
    return true;
}

// True and *magnitude when the unsigned number s, say 12.50e1, is whole and below 2^64. In decimal,
// since a double would have rounded 2^53 + 1 already. 128 bits hold 38 digits, more than anybody
// needs for a whole number: with still more (zeros behind a point, say) it counts as a broken one.
static bool exact_integer(uint64_t *magnitude, const char *s) {
    __int128 m = 0, power = 0;  // m x 10^power
    int digits = 0;
    for (bool fraction = false; *s && *s != 'e' && *s != 'E'; s++) {
        if (*s == '.') { fraction = true; continue; }
        if (++digits > 38) return false;
        m = 10 * m + (*s - '0');
        power -= fraction;
    }
    if (*s) power += strtol(s + 1, NULL, 10);  // saturates, and power has bits to spare
    for (; power < 0 && m && m % 10 == 0; power++) m /= 10;
    for (; power > 0 && m && m <= UINT64_MAX; power--) m *= 10;
    *magnitude = (uint64_t)m;
    return m == 0 || (power == 0 && m <= UINT64_MAX);
}

static bool parse_digits(Parser *p) {
    if (!isdigit((uint8_t)peek(p))) return fail(p, "a digit");
    while (isdigit((uint8_t)peek(p))) p->at++;
    return true;
}

static bool parse_number(Parser *p) {
    char *start = p->at;
    bool negative = take(p, '-');
    if (!take(p, '0') && !parse_digits(p)) return false;  // so 012 ends behind its 0
    if (take(p, '.') && !parse_digits(p)) return false;
    if (take(p, 'e') || take(p, 'E')) {
        if (!take(p, '+')) take(p, '-');
        if (!parse_digits(p)) return false;
    }
    // strtod wants a NUL behind the number and, as r1 never calls setlocale, a '.' inside.
    size_t len = (size_t)(p->at - start);
    char small[64], *copy = len < sizeof small ? small : xmalloc(len + 1);
    memcpy(copy, start, len);
    copy[len] = 0;
    uint64_t magnitude = 0, limit = negative ? 1ULL << 63 : UINT64_MAX;
    Json *node = node_add(p, JSON_NUMBER);
    node->negative = negative;
    node->integer = exact_integer(&magnitude, copy + negative) && magnitude <= limit;
    node->number = strtod(copy, NULL);
    node->magnitude = magnitude;
    if (copy != small) free(copy);
    if (isfinite(node->number)) return true;
    p->at = start;
    return fail(p, "a number that fits a double");
}

// One of the three words, named as a whole when it is broken off or misspelt.
static bool parse_word(Parser *p, const char *word, JsonType type, bool value) {
    for (const char *s = word; *s; s++)
        if (!take(p, *s)) return fail(p, word);
    node_add(p, type)->boolean = value;
    return true;
}

static bool parse_value(Parser *p, int depth, const char *want);

// An array or an object: they differ in what stands in front of a value.
static bool parse_container(Parser *p, int depth, bool object) {
    if (depth == MAX_DEPTH) return fail(p, "at most 64 levels");
    size_t node = p->count;  // an index, because the array moves when it grows
    uint32_t count = 0;
    char close = object ? '}' : ']';
    node_add(p, object ? JSON_OBJECT : JSON_ARRAY);
    p->at++;
    skip_space(p);
    bool more = !take(p, close);
    for (; more; count++) {
        skip_space(p);
        if (object) {
            if (peek(p) != '"') return fail(p, count ? "'\"'" : "'\"' or '}'");
            if (!parse_string(p)) return false;
            skip_space(p);
            if (!take(p, ':')) return fail(p, "':'");
            skip_space(p);
        }
        const char *want = object || count ? "a value" : "a value or ']'";
        if (!parse_value(p, depth + 1, want)) return false;
        skip_space(p);
        more = take(p, ',');
        if (!more && !take(p, close)) return fail(p, object ? "',' or '}'" : "',' or ']'");
    }
    p->nodes[node].count = count;
    p->nodes[node].skip = (uint32_t)(p->count - node);
    return true;
}

static bool parse_value(Parser *p, int depth, const char *want) {
    char c = peek(p);
    if (c == '{' || c == '[') return parse_container(p, depth, c == '{');
    if (c == '"') return parse_string(p);
    if (c == '-' || isdigit((uint8_t)c)) return parse_number(p);
    if (c == 't') return parse_word(p, "true", JSON_BOOL, true);
    if (c == 'f') return parse_word(p, "false", JSON_BOOL, false);
    if (c == 'n') return parse_word(p, "null", JSON_NULL, false);
    return fail(p, want);
}

Json *json_parse(char *text, size_t len, char *err, size_t err_size) {
    Parser p = {.text = text, .at = text, .end = text + len, .err = err, .err_size = err_size};
    // A node takes at least one byte of text, so below 4 GiB counts and skips fit their 32 bits.
    if (len > UINT32_MAX) {
        snprintf(err, err_size, "JSON of %zu bytes, want less than 4 GiB", len);
        return NULL;
    }
    skip_space(&p);
    bool ok = parse_value(&p, 0, "a value");
    skip_space(&p);
    if (ok && p.at < p.end) ok = fail(&p, "the end");
    if (ok) return p.nodes;
    free(p.nodes);
    return NULL;
}

// ------------------------------------------------------------------------------------------------
// JSON looked at

const Json *json_next(const Json *value) { return value + value->skip; }

// NULL and what is no object have no members, so that one can look through optional objects. A
// request's objects are small: a scan beats any index. Who needs each of 90,000 walks instead.
const Json *json_get(const Json *object, const char *key) {
    if (!object || object->type != JSON_OBJECT) return NULL;
    const Json *found = NULL, *k = object + 1;
    Str name = {key, strlen(key)};
    for (uint32_t i = 0; i < object->count; i++, k = json_next(k + 1))
        if (str_same(k->string, name)) found = k + 1;
    return found;
}

// By length, bytes and place: equal keys become neighbours, in reading order.
static int compare_keys(const void *a, const void *b) {
    const Json *x = *(const Json *const *)a, *y = *(const Json *const *)b;
    if (x->string.len != y->string.len) return x->string.len < y->string.len ? -1 : 1;
    int order = memcmp(x->string.data, y->string.data, x->string.len);
    return order ? order : (x > y) - (x < y);
}

// Sorted and not hashed: nobody can choose keys that make this quadratic.
const Json *json_duplicate_key(const Json *object) {
    if (object->type != JSON_OBJECT || object->count < 2) return NULL;
    const Json **keys = xmalloc(object->count * sizeof *keys), *k = object + 1, *found = NULL;
    for (uint32_t i = 0; i < object->count; i++, k = json_next(k + 1)) keys[i] = k;
    qsort(keys, object->count, sizeof *keys, compare_keys);
    for (uint32_t i = 1; i < object->count && !found; i++)
        if (str_same(keys[i - 1]->string, keys[i]->string)) found = keys[i];
    free(keys);
    return found;
}

bool json_int(const Json *value, int64_t lo, int64_t hi, int64_t *out) {
    if (!value || value->type != JSON_NUMBER || !value->integer) return false;
    if (!value->negative && value->magnitude > INT64_MAX) return false;
    // Negated before it is signed: +2^63 has no signed form.
    int64_t v = (int64_t)(value->negative ? 0 - value->magnitude : value->magnitude);
    if (v >= lo && v <= hi) *out = v;
    return v >= lo && v <= hi;
}

void json_path(Buf *b, const Json *root, const Json *value) {
    const size_t most = 64;  // a key may be as long as the document
    for (const Json *in = root, *child; in != value; in = child) {
        uint32_t i = 0, key = in->type == JSON_OBJECT;  // key: nodes in front of a child
        for (child = in + 1 + key; value >= json_next(child); i++) child = json_next(child) + key;
        Str name = key ? child[-1].string : STR("");
        int len = name.len < most ? (int)name.len : (int)most;
        if (key) buf_printf(b, b->len ? ".%.*s" : "%.*s", len, name.data);
        else buf_printf(b, "[%u]", i);
    }
}

const char *json_type_name(const Json *value) {
    static const char *const names[] = {"null", "bool", "number", "string", "array", "object"};
    return names[value->type];
}

// ------------------------------------------------------------------------------------------------
// Files of JSON that must have a certain shape

Json *json_load(char **text, const char *path, bool optional) {
    char err[200];
    size_t len = 0;
    *text = read_file(path, &len);
    if (!*text && optional) return NULL;
    if (!*text) die("%s: can't read it: %s", path, strerror(errno));
    Json *root = json_parse(*text, len, err, sizeof err);
    if (!root) die("%s: %s", path, err);
    if (root->type != JSON_OBJECT)
        die("%s: got %s, want an object", path, json_type_name(root));
    return root;
}

const Json *json_at(const Json *value, const char *path) {
    for (size_t n; value && *path; path += n + (path[n] == '.')) {
        char key[64];
        n = strcspn(path, ".");
        snprintf(key, sizeof key, "%.*s", (int)n, path);
        if (value->type != JSON_ARRAY) {
            value = json_get(value, key);
            continue;
        }
        uint32_t i = (uint32_t)strtoul(key, NULL, 10);
        if (i >= value->count) return NULL;
        for (value++; i > 0; i--) value = json_next(value);
    }
    return value;
}

char *json_show(const Json *v) {
    if (!v) return format_string("nothing");
    if (v->type == JSON_STRING) return format_string("%.*s", (int)v->string.len, v->string.data);
    if (v->type == JSON_NUMBER) return format_string("%.17g", v->number);
    if (v->type == JSON_BOOL) return format_string("%s", v->boolean ? "true" : "false");
    return format_string("%s", json_type_name(v));
}

void json_expect(const char *file, const Json *root, const char *path, const char *want) {
    const Json *value = json_at(root, path + (*path == '?'));
    char *got = json_show(value);
    if ((value || *path != '?') && strcmp(got, want))
        die("%s: %s: got %s, want %s", file, path + (*path == '?'), got, want);
    free(got);
}

const Json *json_want(const char *file, const Json *root, const char *path, JsonType type) {
    const Json *value = json_at(root, path), want = {.type = type};
    if (!value || value->type != type)
        die("%s: %s: got %s, want %s", file, path, value ? json_type_name(value) : "nothing",
            json_type_name(&want));
    return value;
}

// ------------------------------------------------------------------------------------------------
// JSON out

void json_write_string(Buf *b, Str s) {
    buf_add(b, "\"", 1);
    for (size_t i = 0, bytes; i < s.len; i += bytes) {
        uint8_t c = (uint8_t)s.data[i];
        bytes = utf8_length(s.data + i, s.len - i);
        const char *known = c && c != '/' ? strchr(escape_byte, c) : NULL;
        if (known) buf_printf(b, "\\%c", escape_letter[known - escape_byte]);
        else if (c < 0x20) buf_printf(b, "\\u%04x", c);
        else if (bytes) buf_add(b, s.data + i, bytes);
        else buf_str(b, "\xEF\xBF\xBD"), bytes = 1;  // U+FFFD for each byte that isn't UTF-8
    }
    buf_add(b, "\"", 1);
}

void json_write_float(Buf *b, float f) {
    assert(isfinite(f));
    char text[32];
    // Any six digits (FLT_DIG) survive the way into a normal float and back, so where fewer are
    // enough %.6g prints just those. Subnormals hold less. Nine are enough for every float.
    int digits = fabsf(f) < FLT_MIN ? 1 : FLT_DIG;
    do snprintf(text, sizeof text, "%.*g", digits, (double)f);
    while (digits++ < FLT_DECIMAL_DIG && strtof(text, NULL) != f);
    buf_str(b, text);
}
