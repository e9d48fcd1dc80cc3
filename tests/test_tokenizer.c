// tests/test_tokenizer.c: ids, text, templates and streams of tokenizer.c.
//
// Two tokenizers: a small one that this file writes into a temporary folder, whose answers can be
// worked out by hand, and R1's own with its golden vectors, where ../shared/deepseek-r1 is there.
#include "../r1.h"

#include "test.h"

#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SHARED "../shared/deepseek-r1"

static char folder[] = "/tmp/r1_test_tokenizer_XXXXXX";

static Str str(const char *s) { return (Str){s, strlen(s)}; }

static uint64_t random_state = 1;

static uint32_t random_below(uint32_t n) {
    random_state = random_state * 6364136223846793005 + 1442695040888963407;
    return (uint32_t)((random_state >> 33) % n);
}

static void write_file(const char *name, Str text) {
    char path[200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(text.data, 1, text.len, f) != text.len || fclose(f))
        die("%s: can't write", path);
}

// ---- The small tokenizer ------------------------------------------------------------------------

// Ids: bytes in their order, then what merges make, each new text once.
enum { BOS, EOS, BYTES, MERGED = BYTES + 256, HELLO = MERGED + 3, SPACE_W, NN, NNN };

// The first five become "hello" and " w", the next "99" to "9999"; the last would join "o" and ".".
static const char *const merges[] = {"h e", "l l",  "he ll", "hell o", "Ġ w",
                                     "9 9", "99 9", "99 99", "999 9",  "o .",
                                     "Ã ©", "ðŁ ĺ", ". c",   ".c o",   "a a"};
enum { N_MERGES = sizeof merges / sizeof *merges };

// Texts whose every substring of bytes is a token, so that streams can be cut anywhere.
static const char *const cuttable[] = {"ab\xC3\xA9\xF0\x9F\x98\x80\xF0\x9F", "abcabcabd",
                                       "\xE2\x82\xAC\xE2\x82z\xED\xA0", "aaaaaaaa"};
enum { N_CUTTABLE = sizeof cuttable / sizeof *cuttable };

static void add_symbol(Buf *b, uint8_t byte) {
    static const char other[] =
        "\x7F\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89\x8A\x8B\x8C\x8D\x8E\x8F\x90"
        "\x91\x92\x93\x94\x95\x96\x97\x98\x99\x9A\x9B\x9C\x9D\x9E\x9F\xA0\xAD";
    const char *at = byte ? strchr(other, (char)byte) : NULL;
    uint32_t code = byte <= 32 ? 256u + byte : at ? 256 + 33 + (uint32_t)(at - other) : byte;
    if (code < 0x80)
        buf_add(b, &(char){(char)code}, 1);
    else
        buf_add(b, (char[]){(char)(0xC0 | code >> 6), (char)(0x80 | (code & 0x3F))}, 2);
}

static void add_symbols(Buf *b, Str bytes) {
    for (size_t i = 0; i < bytes.len; i++) add_symbol(b, (uint8_t)bytes.data[i]);
}

static void add_vocab(Buf *b, Str symbols, int *id, Buf *seen) {
    Buf entry = {0};
    json_write_string(&entry, symbols);
    if (!seen->data || !strstr(seen->data, entry.data)) {
        buf_printf(b, ",\n%s: %d", entry.data, (*id)++);
        buf_add(seen, entry.data, entry.len);
    }
    buf_free(&entry);
}

// Appends the small tokenizer.json: bytes, merges' results, substrings of the cuttable texts.
static void small_json(Buf *b) {
    int id = BYTES;
    Buf seen = {0}, s = {0};
    buf_str(
        b, "{\"version\": \"1.0\", \"truncation\": null, \"padding\": null, \"added_tokens\": [\n");
    static const char *const added[] = {"<｜begin▁of▁sentence｜>",
                                        "<｜end▁of▁sentence｜>",
                                        "<think>",
                                        "</think>",
                                        "<｜User｜>",
                                        "<｜Assistant｜>",
                                        "<",
                                        "<thin"};
    for (int i = 0; i < 8; i++)
        buf_printf(b,
                   "%s{\"id\": %d, \"content\": \"%s\", \"single_word\": false, \"lstrip\": false, "
                   "\"rstrip\": false, \"normalized\": false, \"special\": %s}",
                   i ? ",\n" : "", i < 2 ? i : 1000 + i, added[i], i < 2 ? "true" : "false");
    buf_str(b, "], \"normalizer\": {\"type\": \"Sequence\", \"normalizers\": []},\n"
               "\"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": [\n");
    static const char *const splits[] = {
        "\\\\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
        "[!\\\"#$%&'()*+,\\\\-./"
        ":;<=>?@\\\\[\\\\\\\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\\\p{L}\\\\p{P}\\\\p{S}]?"
        "[\\\\p{L}\\\\p{M}]+| "
        "?[\\\\p{P}\\\\p{S}]+[\\r\\n]*|\\\\s*[\\r\\n]+|\\\\s+(?!\\\\S)|\\\\s+"};
    for (int i = 0; i < 3; i++)
        buf_printf(
            b,
            "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"%s\"}, \"behavior\": \"Isolated\", "
            "\"invert\": false},\n",
            splits[i]);
    buf_str(
        b,
        "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, "
        "\"use_regex\": "
        "false}]},\n\"post_processor\": {\"type\": \"ByteLevel\"}, \"decoder\": {\"type\": "
        "\"ByteLevel\"},\n"
        "\"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": null, "
        "\"continuing_subword_prefix\": null, \"end_of_word_suffix\": null, \"fuse_unk\": false, "
        "\"byte_fallback\": false, \"vocab\": {\"<｜begin▁of▁sentence｜>\": 0");
    for (int byte = 0; byte < 256; byte++, buf_free(&s)) {
        add_symbol(&s, (uint8_t)byte);
        add_vocab(b, (Str){s.data, s.len}, &id, &seen);
    }
    for (int i = 0; i < N_MERGES; i++, buf_free(&s)) {
        const char *space = strchr(merges[i], ' ');
        buf_add(&s, merges[i], (size_t)(space - merges[i]));
        buf_str(&s, space + 1);
        add_vocab(b, (Str){s.data, s.len}, &id, &seen);
    }
    for (int i = 0; i < N_CUTTABLE; i++)
        for (size_t from = 0; from < strlen(cuttable[i]); from++)
            for (size_t len = 1; from + len <= strlen(cuttable[i]); len++, buf_free(&s)) {
                add_symbols(&s, (Str){cuttable[i] + from, len});
                add_vocab(b, (Str){s.data, s.len}, &id, &seen);
            }
    buf_str(b, "}, \"merges\": [");
    for (int i = 0; i < N_MERGES; i++) buf_printf(b, "%s\"%s\"", i ? ", " : "", merges[i]);
    buf_str(b, "]}}\n");
    buf_free(&seen);
}

// Both of R1's templates, cut down to what tells them from each other and from others.
#define BODY "{% set content = content.split('</think>')[-1] %}"
#define R1_JINJA BODY "{{'<｜Assistant｜><think>\\\\n'}}{% endif %}"
#define R1_0528_JINJA BODY "{%- set ns.is_last_user = true -%}{{'<｜Assistant｜>'}}"
#define CONFIG(jinja)                                                                              \
    "{\"add_bos_token\": true, \"add_eos_token\": false, \"bos_token\": {\"content\": "            \
    "\"<｜begin▁of▁sentence｜>\"}, \"chat_template\": \"" jinja "\"}"

static Tokenizer *small_load(const char *config) {
    Buf json = {0};
    small_json(&json);
    write_file("tokenizer.json", (Str){json.data, json.len});
    write_file("tokenizer_config.json", str(config));
    buf_free(&json);
    return tokenizer_load(folder);
}

static int find_bytes(const Tokenizer *t, Str bytes) {
    for (int id = 0; id < tokenizer_vocab(t); id++) {
        Str token = tokenizer_bytes(t, id);
        if (token.data && token.len == bytes.len && !memcmp(token.data, bytes.data, bytes.len))
            return id;
    }
    return -1;
}

// ---- Encoding -----------------------------------------------------------------------------------

static bool encodes_to(const Tokenizer *t, Str text, const int *want, size_t n) {
    Ids ids = {0};
    tokenizer_encode(t, &ids, text);
    bool same = ids.len == n && (!n || !memcmp(ids.data, want, n * sizeof *want));
    for (size_t i = 0; !same && i < ids.len && i < 20; i++) printf("%d ", ids.data[i]);
    free(ids.data);
    return same;
}

#define ENCODES(t, text, ...)                                                                      \
    do {                                                                                           \
        const int want[] = {__VA_ARGS__};                                                          \
        CHECK(encodes_to(t, str(text), want, sizeof want / sizeof *want), "%s", text);             \
    } while (0)

static void test_small_encode(const Tokenizer *t) {
    enum { B = BYTES };
    CHECK(encodes_to(t, str(""), NULL, 0));
    ENCODES(t, "hello", HELLO);
    ENCODES(t, "hello w", HELLO, SPACE_W);
    ENCODES(t, "o.", B + 'o', B + '.');  // the merge exists, but the texts are two pieces
    ENCODES(t, "o.com", B + 'o', MERGED + 12, B + 'm');
    // Three digits at most, counted from the left; "99" "99" would go first otherwise.
    ENCODES(t, "9999", NNN, B + '9');
    ENCODES(t, "99999999", NNN, NNN, NN);
    ENCODES(t, "aaaaa", MERGED + 13, MERGED + 13, B + 'a');  // of equal ranks the leftmost
    ENCODES(t, "\xC3\xA9", MERGED + 9);
    // Added tokens: the longest at a place, the leftmost first.
    ENCODES(t, "<think>", 1002);
    ENCODES(t, "<thinkx", 1007, B + 'k', B + 'x');
    ENCODES(t, "<<think></think>", 1006, 1002, 1003);
    ENCODES(t, "a<｜begin▁of▁sentence｜>hello", B + 'a', BOS, HELLO);
    CHECK(tokenizer_vocab(t) == 1008, "%d", tokenizer_vocab(t));
    CHECK(tokenizer_special(t, BOS) && !tokenizer_special(t, 1002) && !tokenizer_special(t, -1) &&
          !tokenizer_special(t, 1008) && tokenizer_special(t, EOS));
    CHECK(str_equal(tokenizer_bytes(t, 1003), "</think>") && !tokenizer_bytes(t, 999).data &&
          !tokenizer_bytes(t, -1).data && !tokenizer_bytes(t, 1 << 30).data);
    CHECK(tokenizer_bytes(t, BYTES).len == 1 && !*tokenizer_bytes(t, BYTES).data);
    CHECK(tokenizer_bos(t) == BOS && tokenizer_template(t) == TEMPLATE_R1);
}

// Random bytes come back, and so do random characters: their tokens' joined bytes are the text.
static void test_round_trip(const Tokenizer *t, int rounds) {
    static const char *const parts[] = {"hello",
                                        " w",
                                        "99",
                                        "\r\n",
                                        "  ",
                                        "<think>",
                                        "<",
                                        "\xE4\xB8\x80",
                                        "\xF0\x9F\x98\x80",
                                        "\xCC\x81",
                                        "e",
                                        ".",
                                        "\xC2\x85",
                                        "\xEF\xBC\x81"};
    for (int round = 0; round < rounds; round++) {
        Buf text = {0}, back = {0};
        Ids ids = {0};
        for (uint32_t n = random_below(60); n > 0; n--) {
            if (random_below(3))
                buf_str(&text, parts[random_below(sizeof parts / sizeof *parts)]);
            else
                buf_add(&text, &(char){(char)random_below(256)}, 1);
        }
        tokenizer_encode(t, &ids, (Str){text.data, text.len});
        for (size_t i = 0; i < ids.len; i++) {
            Str bytes = tokenizer_bytes(t, ids.data[i]);
            buf_add(&back, bytes.data, bytes.len);
        }
        if (back.len != text.len || (text.len && memcmp(back.data, text.data, text.len))) {
            CHECK(false, "round %d: %zu bytes became %zu", round, text.len, back.len);
            return;
        }
        buf_free(&text);
        buf_free(&back);
        free(ids.data);
    }
    CHECK(true);
}

// ---- Files that must be refused -----------------------------------------------------------------

// Loads `folder` in a child (and asks for its template) and returns its stderr, "" where it lived.
static char *death(void) {
    static char line[8192];
    int pipes[2];
    if (pipe(pipes)) die("pipe");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(pipes[1], STDERR_FILENO);
        tokenizer_template(tokenizer_load(folder));
        _exit(0);
    }
    close(pipes[1]);
    size_t len = 0;
    for (ssize_t n; (n = read(pipes[0], line + len, sizeof line - 1 - len)) > 0;) len += (size_t)n;
    line[len] = 0;
    close(pipes[0]);
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        line[0] = 0;
    else if (!WIFEXITED(status) || WEXITSTATUS(status) != 1)
        strcpy(line, "not exit(1)");
    return line;
}

static char *replaced(const char *text, const char *from, const char *to) {
    const char *at = strstr(text, from);
    if (!at) die("the test looks for %s in vain", from);
    return format_string("%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
}

static void test_refused(void) {
    static const struct {
        const char *from, *to, *want;
    } cases[] = {
        {"{\"version\"", "{version", "tokenizer.json: invalid JSON at byte 1"},
        {"\"truncation\": null", "\"truncation\": {}", "truncation: got object, want null"},
        {"\"normalizers\": []", "\"normalizers\": [{\"type\": \"NFC\"}]",
         "normalizers.0: got object, want nothing"},
        {"{1,3}", "{1,4}", "pretokenizers.0.pattern.Regex: got \\p{N}{1,4}, want \\p{N}{1,3}"},
        {"\u3040", "\u3041",
         "pretokenizers.1.pattern.Regex: got [一-龥\u3041-ゟ゠-ヿ]+, want [一-龥\u3040-ゟ゠-ヿ]+"},
        {"|\\\\s+\"", "\"", "pretokenizers.2.pattern.Regex: got [!"},
        {"Isolated", "Removed", "pretokenizers.0.behavior: got Removed, want Isolated"},
        {"\"invert\": false", "\"invert\": true", "pretokenizers.0.invert: got true, want false"},
        {"\"add_prefix_space\": false, ", "",
         "pretokenizers.3.add_prefix_space: got nothing, want false"},
        {"\"use_regex\": false}", "\"use_regex\": false}, 7",
         "pretokenizers.4: got 7, want nothing"},
        {"\"pre_tokenizer\"", "\"x\"", "pre_tokenizer.type: got nothing, want Sequence"},
        {"\"BPE\"", "\"Unigram\"", "model.type: got Unigram, want BPE"},
        {"\"dropout\": null", "\"dropout\": 0.5", "model.dropout: got 0.5, want null"},
        {"\"byte_fallback\": false", "\"byte_fallback\": true",
         "model.byte_fallback: got true, want false"},
        {"\"unk_token\": null", "\"unk_token\": null, \"ignore_merges\": true",
         "model.ignore_merges: got true"},
        {"\"added_tokens\": [", "\"added_tokens\": 3, \"x\": [",
         "added_tokens: got number, want array"},
        {"\"id\": 1,", "\"id\": 1.5,", "\"<｜end▁of▁sentence｜>\": got id 1.5, want"},
        {"\"id\": 1,", "\"id\": -1,", "got id -1, want"},
        {"\"id\": 1,", "\"id\": 99999999999999999999,", "got id 1e+20, want"},
        {"\"id\": 1,", "\"id\": 1048576,", "got id 1048576, want a text with an id in 0..1048575"},
        {"\"id\": 1,", "\"id\": \"1\",", "got id 1, want"},
        {"\"id\": 1,", "\"id\": 0,", "\"<｜end▁of▁sentence｜>\": got another's id"},
        {"\"content\": \"<think>\"", "\"content\": 5", "content: got number, want string"},
        {"\"content\": \"<think>\"", "\"content\": \"\"", "token \"\": got id 1002"},
        {"\"content\": \"<think>\"", "\"content\": \"</think>\"", "\"</think>\": got ids 100"},
        {"\"special\": true", "\"special\": 1", "special: got number, want bool"},
        {"\"lstrip\": false", "\"lstrip\": true", "lstrip: got true, want false"},
        {"\"vocab\": {", "\"vocab\": [], \"x\": {", "model.vocab: got array, want object"},
        {"\"a\": 99", "\"a\": 98", "model.vocab: got id 98 twice"},
        {"\"a\": 99", "\"a\": 1", "model.vocab: got id 1 twice"},
        {"\"a\": 99", "\"a\": 99, \"a\": 990", "token \"a\": got ids 99"},
        {"\"a\": 99", "\"a\": null", "token \"a\": got id null, want"},
        {"\"a\": 99", "\"aa€\": 99", "model: got U+20AC, want a byte symbol"},
        {"\"a\": 99", "\"aAA\": 99", "model.vocab: got no token for byte 0x61"},
        {"\"merges\": [", "\"merges\": {}, \"x\": [", "model.merges: got object, want array"},
        {"\"l l\"", "\"ll\"", "model.merges.1: got ll, want 2 tokens"},
        {"\"l l\"", "[\"l\", \"l\"]", "model.merges.1: got array, want"},
        {"\"l l\"", "\"l xx\"", "model.merges.1: got ids 110 + -1 = -1, want a new pair"},
        {"\"l l\"", "\"l q\"", "model.merges.1: got ids 110 + 115 = -1, want"},
        {"\"l l\"", "\" l\"", "model.merges.1: got ids -1 + 110 = 110"},
        {"\"l l\"", "\"h e\"", "model.merges.1: got ids 106 + 103 = 258, want a new pair"},
    };
    static const struct {
        const char *config, *want;
    } configs[] = {
        {"[]", "tokenizer_config.json: got array, want an object"},
        {"{}", "chat_template: got neither"},
        {"{", "tokenizer_config.json: invalid JSON"},
        {CONFIG("{{ bos_token }}"),
         "tokenizer_config.json: chat_template: got neither R1's nor R1-0528's"},
        {CONFIG(BODY "{{'<｜Assistant｜>'}}"), "chat_template: got neither"},  // V3, R1 of January
        {CONFIG(R1_0528_JINJA "{% if thinking %}"), "chat_template: got neither"},
        {CONFIG(R1_JINJA "{{ x | tojson }}"), "chat_template: got neither"},
        {CONFIG(R1_JINJA R1_0528_JINJA), "chat_template: got neither"},
        {"{\"add_bos_token\": 1}", "add_bos_token: got number, want bool"},
        {"{\"add_bos_token\": true}", "bos_token: got nothing, want an added token"},
        {"{\"add_bos_token\": true, \"bos_token\": \"<s>\"}",
         "bos_token: got <s>, want an added token"},
        {"{\"add_eos_token\": true}", "add_eos_token: got true, want false"},
    };
    Buf json = {0};
    small_json(&json);
    write_file("tokenizer_config.json", str(CONFIG(R1_JINJA)));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *bad = replaced(json.data, cases[i].from, cases[i].to);
        write_file("tokenizer.json", str(bad));
        char *line = death();
        CHECK(!strncmp(line, "r1: ", 4) && strstr(line, "tokenizer.json: ") &&
                  strstr(line, cases[i].want) && strchr(line, '\n') == line + strlen(line) - 1,
              "%s: got %s", cases[i].want, line);
        free(bad);
    }
    write_file("tokenizer.json", (Str){json.data, json.len});
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++) {
        write_file("tokenizer_config.json", str(configs[i].config));
        char *line = death();
        CHECK(strstr(line, configs[i].want), "%s: got %s", configs[i].want, line);
    }
    // Cut off anywhere, the file is an error, never a crash.
    for (size_t len = 0; len < json.len; len += json.len / 20) {
        write_file("tokenizer.json", (Str){json.data, len});
        char *line = death();
        CHECK(strstr(line, "invalid JSON"), "%zu bytes: got %s", len, line);
    }
    char path[200];
    snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    unlink(path);
    CHECK(strstr(death(), "tokenizer.json: can't read it: No such file"));
    buf_free(&json);
}

// ---- Streams, against a naive reference that sees the whole text at once ------------------------

// Unicode's table 3-7, well-formed byte sequences: pairs of bounds for up to four bytes.
static const uint8_t well_formed[][8] = {
    {0x00, 0x7F},
    {0xC2, 0xDF, 0x80, 0xBF},
    {0xE0, 0xE0, 0xA0, 0xBF, 0x80, 0xBF},
    {0xE1, 0xEC, 0x80, 0xBF, 0x80, 0xBF},
    {0xED, 0xED, 0x80, 0x9F, 0x80, 0xBF},
    {0xEE, 0xEF, 0x80, 0xBF, 0x80, 0xBF},
    {0xF0, 0xF0, 0x90, 0xBF, 0x80, 0xBF, 0x80, 0xBF},
    {0xF1, 0xF3, 0x80, 0xBF, 0x80, 0xBF, 0x80, 0xBF},
    {0xF4, 0xF4, 0x80, 0x8F, 0x80, 0xBF, 0x80, 0xBF},
};

// Text of bytes: whole sequences, a U+FFFD for each longest part that could begin one, or one byte.
// *open: how many bytes at the end might still become a character.
static void naive_text(Buf *text, size_t *open, Str bytes) {
    *open = 0;
    for (size_t i = 0, n; i < bytes.len; i += n) {
        bool whole = false;
        n = 0;
        for (size_t row = 0; row < sizeof well_formed / sizeof *well_formed; row++) {
            const uint8_t *r = well_formed[row];
            size_t k = 0, length = row < 1 ? 1 : row < 2 ? 2 : row < 6 ? 3 : 4;
            for (; k < length && i + k < bytes.len; k++) {
                uint8_t byte = (uint8_t)bytes.data[i + k];
                if (byte < r[2 * k] || byte > r[2 * k + 1]) break;
            }
            if (k > n) n = k, whole = k == length;
        }
        if (n && !whole && i + n == bytes.len) *open = n;
        if (!n) n = 1;
        if (whole)
            buf_add(text, bytes.data + i, n);
        else
            buf_str(text, "\xEF\xBF\xBD");
    }
}

static bool ends_with(Str text, Str end) {
    return text.len >= end.len && !memcmp(text.data + text.len - end.len, end.data, end.len);
}

// What must be out after these tokens; the first `quiet` take no part in matching. *matched
// is the stop string that ended the text, or -1. final: the sequence is over.
static void naive_stream(Buf *out, int *matched, const TextStream *s, const int *ids, int n,
                         int quiet, bool final) {
    Buf bytes = {0}, text = {0};
    size_t open, quiet_len = 0;
    *matched = -1;
    for (int i = 0; i <= n; i++) {  // a character belongs to the token that completes it
        if (i == quiet || (i == n && quiet > n)) {
            naive_text(&text, &open, (Str){bytes.data, bytes.len});
            quiet_len = text.len - (open ? 3 : 0);
            text.len = 0;
        }
        if (i == n || (s->skip_special && tokenizer_special(s->tokenizer, ids[i]))) continue;
        Str token = tokenizer_bytes(s->tokenizer, ids[i]);
        buf_add(&bytes, token.data, token.len);
    }
    naive_text(&text, &open, (Str){bytes.data, bytes.len});
    size_t tail = open ? 3 : 0, len = text.len - tail;
    for (size_t end = quiet_len + 1; end <= len && *matched < 0; end++) {
        Str head = {text.data + quiet_len, end - quiet_len};
        for (int k = 0; k < s->n_stop; k++)
            if (ends_with(head, s->stop[k]) &&
                (*matched < 0 || s->stop[k].len > s->stop[*matched].len))
                *matched = k, len = end - (s->no_stop_trim ? 0 : s->stop[k].len);
    }
    size_t keep = 0;
    for (size_t k = 1; *matched < 0 && !final && k <= len - quiet_len; k++)
        for (int i = 0; i < s->n_stop; i++)
            if (k < s->stop[i].len && !memcmp(text.data + len - k, s->stop[i].data, k)) keep = k;
    if (final && *matched < 0) len = text.len;
    buf_add(out, text.data, len - keep);
    buf_free(&bytes);
    buf_free(&text);
}

// Pushes the tokens and compares what is out after each one with the reference.
static bool stream_agrees(const TextStream *like, const int *ids, int n, int quiet) {
    TextStream s;
    Buf out = {0}, want = {0}, delta = {0};
    bool good = true, over = false;
    int matched = -1;
    text_init(&s, like->tokenizer, like->skip_special);
    memcpy(s.stop, like->stop, sizeof s.stop);
    s.n_stop = like->n_stop, s.no_stop_trim = like->no_stop_trim;
    for (int i = 0; i <= n && good; i++, buf_free(&want), buf_free(&delta)) {
        if (i < n)
            over = text_push(&s, &delta, ids[i], i >= quiet);
        else
            text_flush(&s, &delta);
        // No event splits a character: each delta alone is valid.
        Buf valid = {0};
        size_t open;
        naive_text(&valid, &open, (Str){delta.data, delta.len});
        good = valid.len == delta.len && (!valid.len || !memcmp(valid.data, delta.data, valid.len));
        buf_free(&valid);
        buf_add(&out, delta.data, delta.len);
        naive_stream(&want, &matched, &s, ids, i < n ? i + 1 : n, quiet, i == n);
        good = good && out.len == want.len && !memcmp(out.data, want.data, out.len);
        good = good && over == (matched >= 0) && s.matched == matched;
        if (over) i = n;
    }
    buf_free(&out);
    text_free(&s);
    return good;
}

static void test_stream_cuts(const Tokenizer *t) {
    static const char *const stops[][4] = {{NULL},
                                           {"b"},
                                           {"ab", "bc"},
                                           {"abcabd"},
                                           {"cabd", "abcab"},
                                           {"\xC3\xA9"},
                                           {"b\xC3\xA9\xF0\x9F\x98\x80"},
                                           {"\xEF\xBF\xBD"},
                                           {"aaa", "aaaaa"},
                                           {"aa", "a"},
                                           {"\xE2\x82\xAC", "z"},
                                           {"ab", "ab", "bcab", "cabcab"},
                                           {"abx", "bca"},
                                           {"aaaaaaaaa"}};
    int bad = 0, count = 0;
    for (size_t k = 0; k < sizeof stops / sizeof *stops; k++)
        for (int c = 0; c < N_CUTTABLE; c++)
            for (unsigned cut = 0; cut < 1u << (strlen(cuttable[c]) - 1); cut++) {
                TextStream like = {.tokenizer = t, .no_stop_trim = (k + cut) % 3 == 0};
                for (; like.n_stop < 4 && stops[k][like.n_stop]; like.n_stop++)
                    like.stop[like.n_stop] = str(stops[k][like.n_stop]);
                static int id_of[N_CUTTABLE][16][16];  // [from][len] + 1; 0: not looked up yet
                int ids[16], n = 0;
                for (size_t from = 0, len; from < strlen(cuttable[c]); from += len) {
                    for (len = 1;
                         from + len < strlen(cuttable[c]) && !(cut >> (from + len - 1) & 1);)
                        len++;
                    int *id = &id_of[c][from][len];
                    if (!*id) *id = 1 + find_bytes(t, (Str){cuttable[c] + from, len});
                    ids[n++] = *id - 1;
                }
                count++;
                if (!stream_agrees(&like, ids, n, 0) && ++bad == 1)
                    CHECK(false, "stops %zu, text %d, cut %x", k, c, cut);
            }
    CHECK(bad == 0, "%d of %d", bad, count);
    printf("streams: %d cuts\n", count);
}

static void test_stream_random(const Tokenizer *t, int rounds) {
    int bad = 0;
    for (int round = 0; round < rounds; round++) {
        static const char letters[][5] = {"a",           "b", "c", "\xC3\xA9", "\xF0\x9F\x98\x80",
                                          "\xEF\xBF\xBD"};
        TextStream like = {
            .tokenizer = t, .skip_special = random_below(2), .no_stop_trim = random_below(2)};
        char text[4][40] = {{0}};
        int ids[24], n = (int)random_below(24), quiet = random_below(3) ? 0 : (int)random_below(6);
        like.n_stop = (int)random_below(5);
        for (int k = 0; k < like.n_stop; k++) {
            for (uint32_t i = 1 + random_below(5); i > 0; i--)
                strcat(text[k], letters[random_below(6)]);
            like.stop[k] = str(text[k]);
        }
        for (int i = 0; i < n; i++) {
            uint32_t kind = random_below(10);
            static const uint8_t bytes[] = {'a',  'b',  'c',  0xC3, 0xA9, 0xF0,
                                            0x9F, 0x98, 0x80, 0xE2, 0xED, 0xA0};
            ids[i] = kind < 6   ? BYTES + bytes[random_below(kind < 3 ? 3 : sizeof bytes)]
                     : kind < 9 ? MERGED + (int)random_below(130)
                                : (int)random_below(1100);
        }
        if (!stream_agrees(&like, ids, n, quiet) && ++bad == 1) CHECK(false, "round %d", round);
    }
    CHECK(bad == 0, "%d of %d", bad, rounds);
}

static void test_stream_by_hand(const Tokenizer *t) {
    TextStream s;
    Buf out = {0};
    text_init(&s, t, true);
    s.stop[s.n_stop++] = STR("hello w");
    CHECK(!text_push(&s, &out, BOS, true) && out.len == 0);
    CHECK(!text_push(&s, &out, HELLO, true) && out.len == 0);  // it may become the stop string
    CHECK(!text_push(&s, &out, HELLO, true) && !strcmp(out.data, "hello"));
    CHECK(text_push(&s, &out, SPACE_W, true) && !strcmp(out.data, "hello") && s.matched == 0);
    text_flush(&s, &out);
    CHECK(!strcmp(out.data, "hello"));
    text_free(&s);
    buf_free(&out);
    text_init(&s, t, false);
    text_push(&s, &out, BOS, true);
    text_push(&s, &out, BYTES + 0xE2, true);
    text_push(&s, &out, BYTES + 0x82, true);
    CHECK(!strcmp(out.data, "<｜begin▁of▁sentence｜>") && s.bytes.len == 2);
    text_flush(&s, &out);
    CHECK(!strcmp(out.data, "<｜begin▁of▁sentence｜>\xEF\xBF\xBD"));
    text_free(&s);
    buf_free(&out);
}

// ---- Templates ----------------------------------------------------------------------------------

static bool renders(ChatTemplate kind, const Message *m, int n, bool prompt, bool think,
                    const char *want) {
    Buf out = {0};
    chat_render(&out, kind, m, n, prompt, think);
    bool same = !strcmp(out.data, want);
    if (!same) printf("rendered %s\n", out.data);
    buf_free(&out);
    return same;
}

#define B "<｜begin▁of▁sentence｜>"
#define E "<｜end▁of▁sentence｜>"
#define U "<｜User｜>"
#define A "<｜Assistant｜>"

static void test_templates(void) {
    const Message talk[] = {{ROLE_USER, STR("hi"), NULL},
                            {ROLE_SYSTEM, STR("one"), NULL},
                            {ROLE_ASSISTANT, STR("<think>x</think>\n\nyes"), NULL},
                            {ROLE_SYSTEM, STR("two"), NULL},
                            {ROLE_USER, {NULL, 0}, NULL}};
    CHECK(renders(TEMPLATE_R1, talk, 5, true, true,
                  B "one\n\ntwo" U "hi" A "\n\nyes" E U A "<think>\n"));
    CHECK(renders(TEMPLATE_R1, talk, 5, true, false, B "one\n\ntwo" U "hi" A "\n\nyes" E U A));
    CHECK(renders(TEMPLATE_R1, talk, 5, false, true, B "one\n\ntwo" U "hi" A "\n\nyes" E U));
    CHECK(renders(TEMPLATE_R1_0528, talk, 5, true, false, B "one\n\ntwo" U "hi" A "\n\nyes" E U A));
    CHECK(renders(TEMPLATE_R1_0528, talk, 5, true, true,
                  B "one\n\ntwo" U "hi" A "\n\nyes" E U A "<think>\n"));
    CHECK(renders(TEMPLATE_R1_0528, talk, 4, true, true,
                  B "one\n\ntwo" U "hi" A "\n\nyes" E A "<think>\n"));
    CHECK(renders(TEMPLATE_R1, NULL, 0, true, true, B A "<think>\n"));
    CHECK(renders(TEMPLATE_R1_0528, NULL, 0, true, false, B A));
    char calls[] =
        "[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"{}\"}},{\"type\":7}]",
         err[99];
    Json *json = json_parse(calls, strlen(calls), err, sizeof err);
#define CALL "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>"
#define EMPTY                                                                                      \
    "\n<｜tool▁call▁begin｜><｜tool▁sep｜>\n```json\n\n```<｜tool▁call▁end｜>"  // not a text: nothing
#define CALLS "<｜tool▁calls▁begin｜>" CALL EMPTY "<｜tool▁calls▁end｜>" E
#define OUTPUT(x) "<｜tool▁output▁begin｜>" x "<｜tool▁output▁end｜>"
    const Message tools[] = {{ROLE_ASSISTANT, STR("t</think>c"), json},
                             {ROLE_TOOL, STR("1"), NULL},
                             {ROLE_TOOL, STR("2"), NULL},
                             {ROLE_ASSISTANT, STR("u</think>d"), NULL},
                             {ROLE_ASSISTANT, {NULL, 0}, json},
                             {ROLE_TOOL, STR("3"), NULL}};
    CHECK(renders(TEMPLATE_R1, tools, 6, true, true,
                  B A "t</think>c" CALLS "<｜tool▁outputs▁begin｜>" OUTPUT("1")
                      OUTPUT("2") "<｜tool▁outputs▁end｜>u</think>d" E "\n" CALL EMPTY
                                  "<｜tool▁calls▁end｜>" E OUTPUT("3") "<｜tool▁outputs▁end｜>"));
    CHECK(renders(TEMPLATE_R1_0528, tools, 6, true, true,
                  B "c" CALLS "<｜tool▁outputs▁begin｜>" OUTPUT("1") "\n" OUTPUT(
                      "2") "<｜tool▁outputs▁end｜>d" E CALLS
                           "<｜tool▁outputs▁begin｜>" OUTPUT("3") "<｜tool▁outputs▁end｜>"));
    free(json);
    CHECK(template_forces_think(TEMPLATE_R1) && !template_forces_think(TEMPLATE_R1_0528));
}

// ---- R1's own files -----------------------------------------------------------------------------

static void test_known(const Tokenizer *t) {
    ENCODES(t, "Hello!", 19923, 3);
    ENCODES(t, "Hello! 毕老师！1 + 1 = 2 ĠÑĤÐ²ÑĬÑĢ", 19923, 3, 223, 5464, 5008, 1175, 19, 940, 223,
            19, 438, 223, 20, 6113, 257, 76589, 131, 100, 76032, 1628, 76589, 131, 108, 76589, 131,
            98);
    ENCODES(t, "<｜User｜>你好<｜Assistant｜><think>推理</think>答案<｜end▁of▁sentence｜>", 128803,
            30594, 128804, 128798, 36101, 128799, 7624, 1);
    CHECK(tokenizer_vocab(t) == 128815 && tokenizer_bos(t) == 0 &&
          tokenizer_template(t) == TEMPLATE_R1);
    CHECK(!tokenizer_special(t, 128798) && !tokenizer_special(t, 128803) &&
          tokenizer_special(t, 128805) && tokenizer_special(t, 2) && !tokenizer_special(t, 3));
    Ids ids = {0};
    tokenizer_encode(t, &ids, STR("The capital city of France is"));
    CHECK(ids.len == 6, "warm-up prompt: %zu and bos", ids.len);
    const Message recipe[] = {{ROLE_SYSTEM, STR("You are a helpful AI assistant"), NULL},
                              {ROLE_USER, STR("How many r are there in strawberry ?"), NULL}};
    for (int think = 0; think < 2; think++) {
        Buf text = {0};
        ids.len = 0;
        chat_render(&text, TEMPLATE_R1, recipe, 2, true, think);
        tokenizer_encode(t, &ids, (Str){text.data, text.len});
        CHECK(ids.len == (think ? 19 : 17), "recipe's prompt: %zu", ids.len);
        buf_free(&text);
    }
    free(ids.data);
}

static void test_golden_lines(const Tokenizer *t) {
    size_t len;
    char *file = read_file(SHARED "/golden_tokenizer.tsv", &len), *rest = file;
    int lines = 0, good = 0;
    for (char *line; (line = strsep(&rest, "\n"));) {
        if (*line == '#' || !strchr(line, '\t')) continue;
        char *ids = line, *hex = strsep(&ids, "\t");
        Buf text = {0};
        Ids want = {0};
        for (unsigned byte; sscanf(hex, "%2x", &byte) == 1; hex += 2)
            buf_add(&text, &(char){(char)byte}, 1);
        for (char *id; (id = strsep(&ids, " "));)
            if (*id) ids_add(&want, atoi(id));
        lines++, good += encodes_to(t, (Str){text.data, text.len}, want.data, want.len);
        buf_free(&text);
        free(want.data);
    }
    CHECK(lines == 78 && good == lines, "%d of %d", good, lines);
    free(file);
}

static void test_golden_wiki(const Tokenizer *t) {
    size_t len, ids_len;
    char *text = read_file(SHARED "/golden_wikitest_v3_text.txt", &len);
    char *ids = read_file(SHARED "/golden_wikitest_v3_ids.txt", &ids_len), *rest = ids;
    Ids want = {0};
    Buf back = {0};
    for (char *id; (id = strsep(&rest, ","));) ids_add(&want, atoi(id));
    CHECK(want.len == 8192 && encodes_to(t, (Str){text, len}, want.data + 1, want.len - 1));
    TextStream s;
    text_init(&s, t, true);
    for (size_t i = 0; i < want.len; i++) text_push(&s, &back, want.data[i], true);
    text_flush(&s, &back);
    CHECK(back.len == len && !memcmp(back.data, text, len));
    text_free(&s);
    buf_free(&back);
    free(want.data);
    free(text);
    free(ids);
}

static Role role_of(const Json *name) {
    static const char *const names[] = {"system", "user", "assistant", "tool"};
    int role = 0;
    while (!str_equal(name->string, names[role])) role++;
    return (Role)role;
}

static void test_golden_chat(const Tokenizer *t, const char *name, ChatTemplate kind, int n_lines) {
    size_t len;
    char *file = read_file(name, &len), *rest = file, err[99];
    int lines = 0;
    for (char *line; (line = strsep(&rest, "\n"));) {
        if (!*line) continue;
        Json *root = json_parse(line, strlen(line), err, sizeof err);
        if (!root) die("%s: %s", name, err);
        const Json *list = json_get(root, "messages"), *entry = list + 1,
                   *ids = json_get(root, "ids");
        Message messages[16];
        int n = 0;
        for (; n < (int)list->count; n++, entry = json_next(entry)) {
            const Json *content = json_get(entry, "content");
            messages[n] = (Message){.role = role_of(json_get(entry, "role")),
                                    .tool_calls = json_get(entry, "tool_calls")};
            if (content->type == JSON_STRING) messages[n].content = content->string;
        }
        Buf out = {0};
        Ids want = {0};
        chat_render(&out, kind, messages, n, json_get(root, "add_generation_prompt")->boolean,
                    template_forces_think(kind));
        Str text = json_get(root, "rendered")->string;
        CHECK(out.len == text.len && !memcmp(out.data, text.data, out.len), "%s: %s", name,
              out.data);
        for (const Json *id = ids + 1; id < ids + ids->skip; id++) ids_add(&want, (int)id->number);
        CHECK(encodes_to(t, (Str){out.data, out.len}, want.data, want.len), "%s: %s", name,
              out.data);
        buf_free(&out);
        free(want.data);
        free(root);
        lines++;
    }
    CHECK(lines == n_lines, "%s: %d lines", name, lines);
    free(file);
}

// Seconds of the processor, which nobody else's work on the machine adds to.
static double encode_seconds(const Tokenizer *t, Str text, size_t *n_ids) {
    Ids ids = {0};
    clock_t start = clock();
    tokenizer_encode(t, &ids, text);
    double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    *n_ids = ids.len;
    free(ids.data);
    return seconds;
}

// Ten times the text takes some ten times as long, whatever it is made of, and not a hundred.
static void test_speed(const Tokenizer *t) {
    enum { MEGABYTE = 1000000 };
    size_t len;
    char *wiki = read_file(SHARED "/golden_wikitest_v3_text.txt", &len);
    Buf texts[5] = {{0}};
    static const char *const names[] = {"English", "'a'", "'<'", "spaces and a letter",
                                        "random bytes"};
    while (texts[0].len < MEGABYTE) buf_add(&texts[0], wiki, len);
    for (int i = 0; i < MEGABYTE; i++) {
        buf_add(&texts[1], "a", 1);
        buf_add(&texts[2], "<", 1);
        buf_add(&texts[3], i + 1 < MEGABYTE ? " " : "x", 1);
        buf_add(&texts[4], &(char){(char)random_below(256)}, 1);
    }
    for (int k = 0; k < 5; k++) {
        size_t n_ids;
        const char *end = texts[k].data + MEGABYTE;
        double tenth = encode_seconds(t, (Str){end - MEGABYTE / 10, MEGABYTE / 10}, &n_ids);
        double all = encode_seconds(t, (Str){texts[k].data, MEGABYTE}, &n_ids);
        printf("1 MB of %s: %zu ids in %.0f ms, a tenth of it in %.0f ms\n", names[k], n_ids,
               all * 1e3, tenth * 1e3);
        CHECK(all <= 0.1 + 30 * tenth, "%s: %f s and %f s", names[k], all, tenth);
        buf_free(&texts[k]);
    }
    free(wiki);
}

int main(void) {
    if (!mkdtemp(folder)) die("%s: can't make it", folder);
    Tokenizer *small = small_load(CONFIG(R1_0528_JINJA));
    CHECK(tokenizer_template(small) == TEMPLATE_R1_0528);
    tokenizer_free(small);
    small = small_load("{}");
    CHECK(tokenizer_bos(small) == -1);
    tokenizer_free(small);
    small = small_load(CONFIG(R1_JINJA));
    test_small_encode(small);
    test_round_trip(small, 2000);
    test_stream_by_hand(small);
    test_stream_cuts(small);
    test_stream_random(small, 20000);
    tokenizer_free(small);
    test_refused();
    test_templates();
    char *command = format_string("rm -r %s", folder);
    if (system(command)) printf("%s failed\n", command);
    free(command);

    if (access(SHARED "/tokenizer.json", R_OK)) {
        SKIP("R1's tokenizer, its golden vectors and its speed: no " SHARED);
        return test_end();
    }
    double start = now_seconds();
    Tokenizer *r1 = tokenizer_load(SHARED);
    printf("R1's tokenizer.json is loaded in %.0f ms\n", (now_seconds() - start) * 1e3);
    test_known(r1);
    test_golden_lines(r1);
    test_golden_wiki(r1);
    test_golden_chat(r1, SHARED "/golden_chat.jsonl", TEMPLATE_R1, 15);
    test_golden_chat(r1, SHARED "/golden_chat_r1_0528.jsonl", TEMPLATE_R1_0528, 8);
    test_round_trip(r1, 5000);
    test_speed(r1);
    tokenizer_free(r1);
    return test_end();
}
