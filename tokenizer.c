// tokenizer.c: text to token ids and back, conversations to text, and text that streams.
//
// The one idea: a token is a string of bytes, and no byte is ever lost. Encoding cuts finer and
// finer: at added tokens' texts, then where the class of its characters changes (words, up to three
// digits, punctuation), at last into single bytes. Inside a piece these grow together again, those
// neighbours first that were merged first when the vocabulary was trained. Decoding only puts bytes
// side by side; its work is to hold back what isn't certain yet: half a character, or text that may
// become a stop string.
#include "r1.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_TOKENS = 1 << 20,   // eight times R1's; bounds what an id in a file makes us allocate
    CODE_POINTS = 0x110000,
};

// Classes of characters. PUNCT is \p{P} and \p{S} together: R1's regexes never tell them apart.
enum { LETTER = 1, MARK = 2, NUMBER = 4, PUNCT = 8, SPACE = 16, CJK = 32 };

#define REPLACEMENT STR("\xEF\xBF\xBD")  // U+FFFD

typedef struct {
    Str bytes;     // data NULL: no token has this id
    bool added;    // matched in the text before anything is cut
    bool special;  // skip_special_tokens drops it
} Token;

typedef struct {
    Str text;
    int id;
} Name;

typedef struct {  // two neighbours that may become one token, the lowest rank first
    int left, right, rank;  // rank -1: an empty slot
} Merge;

struct Tokenizer {
    char *text;            // tokenizer.json: the bytes of all tokens lie in it
    Token *tokens;         // [MAX_TOKENS] by id; pages that nobody touches cost nothing
    int n_tokens;          // the highest id + 1
    Name *added;           // [n_added] ascending by text
    int n_added;
    bool added_head[256];  // first bytes of added tokens
    int byte_id[256];      // the token of a single byte
    Merge *merges;         // [merge_mask + 1] hash table by left and right
    size_t merge_mask;
    int *merged;           // by rank: what left and right become
    int bos;               // goes before raw text; -1: nothing does
    char *config_path;     // tokenizer_config.json
    char *jinja;           // its chat_template
    uint8_t class_of[UTF8_PARTIAL + 1];  // by code point, UTF8_INVALID and UTF8_PARTIAL included
};

// ---- Characters ---------------------------------------------------------------------------------

// Unicode 14.0.0's classes, run after run from U+0000 on: a letter (L M N P W in the bits' order,
// x for none), then how many code points in a row have it, 1 where no number stands. Version 14 as
// R1's regex library has it: newer tables would cut a few texts differently. Written by
// tests/unicode_table.py.
static const char class_runs[] =
    "x9W5x18WP15N10P7L26P6L26P4x6Wx26WP9LP2xP4N2PLP3NLPN3PL23PL31PL458P4L12P14L5P7LPLP17M112L5PL2"
    "x2L4PLx4P2LPL3xLxL20xL83PL139PM7L166xL38x2LP6L41P2x2P3xM45PMPM2PM2PMx8L27x4L4P2x17P10M11PxP3"
    "L43M21N10P4L2ML99PLM7xPM6L2M2PM4L2N10L3P2LP14x2LML30M27x2L89M11Lx14N10L33M9L2P4Lx2MP2L22M4L"
    "M9LM3LM5x2P15xL25M3x2PxL11x5L24PL6x9M8L42M24xM33L54M3LM18LM7L10M2P2N10PL16M3xL8x2L2x2L22xL7x"
    "Lx3L4x2MLM7x2M2x2M3Lx8Mx4L2xL3M2x2N10L2P2N6P2LPMx2M3xL6x4L2x2L22xL7xL2xL2xL2x2MxM5x4M2x2M3x3"
    "Mx7L4xLx7N10M2L3MPx10M3xL9xL3xL22xL7xL2xL5x2MLM8xM3xM3x2Lx15L2M2x2N10P2x7LM6xM3xL8x2L2x2L22x"
    "L7xL2xL5x2MLM7x2M2x2M3x7M3x4L2xL3M2x2N10PLN6x10MLxL6x3L3xL4x3L2xLxL2x3L2x3L3x3L12x4M5x3M3xM4"
    "x2Lx6Mx14N13P8x5M5L8xL3xL23xL16x2MLM7xM3xM4x7M2xL3x2Lx2L2M2x2N10x7PN7PLM3PL8xL3xL23xL10xL5x2"
    "MLM7xM3xM4x7M2x6L2xL2M2x2N10xL2x13M4L9xL3xL41M2LM7xM3xM4LPx4L3MN7L3M2x2N19PL6xM3xL18x3L24xL9"
    "xLx2L7x3Mx4M6xMxM8x6N10x2M2Px12L48ML2M7x4PL7M8PN10P2x37L2xLxL5xL24xLxL10ML2M9Lx2L5xLxM6x2N10"
    "x2L4x32LP23M2P6N20PMPMPMP4M2L8xL36x4M20PM2L5M11xM36xP8MP6xP13x37L43M20LN10P6L6M4L4M3LM3L2M7"
    "L3M4L13M12LMN10M4P2L38xLx5Lx2L43PL333xL4x2L7xLxL4x2L41xL4x2L33xL4x2L7xLxL4x2L15xL57xL4x2L67"
    "x2M3P9N20x3L16P10x6L86x2L6x2PL620P2L17WL26P2x3L75P3N3L8x7L18M4x9L19M3P2x9L18M2x12L13xL3xM2"
    "x12L52M32P3LP4LMx2N10x6N10x6P11M3xMN10x6L89x7L5M2L34MLx5L70x10L31xM12x4M12x4Px3P2N10L30x2L5"
    "x11L44x4L26x6N11x3P34L23M5x2P2L53M10xM29x2MN10x6N10x6P7LP6x2M31x49M5L47M17L8x3N10P17M9P11xM3"
    "L30M13L2N10L44M14x8P4L36M20x3P5N10x3L3N10L36P2L9x7L43x2L3P8x8M3PM21L4ML6ML2M3Lx5L192M64L278"
    "x2L6x2L38x2L6x2L8xLxLxLxL31x2L53xL7PLP3L3xL7P3L4x2L6xP3L13P3x2L3xL7P2xW11x5P24W2x5WP47Wx16NL"
    "x2N6P5LN10P5xL13x3P33x15M33x15P2LP4LP2L10PLP3L5P6LPLPLPL4PL11P2L4P5L5P4LPN51L2N5P2x4P663x25"
    "P11x21N60P78N22P630N30P992x2P32xP105L229P6L4M3L2x5P4NP2L38xLx5Lx2L56x7LPx14ML23x9L7xL7xL7xL7"
    "xL7xL7xL7xL7xM32P47LP46x34P26xP89x12P214x26P12x4WP4L2NP25N9M6PL5P2N3L2P3xL86x2M2P2L3PL90PL4"
    "x5L43xL94xP2N4P10L32P36x12L16P31xN10P30N8PN15P32N10P39N15P320L6592P64L22157x3P55x9L46P2L269"
    "P3L16N10L2x20L47M4PM10PL31M2L70N10M2P6x8P23L9P2L103P2L64x5L2xLxL5x24L16ML3ML4ML23M5P4Mx3N6P4"
    "x6L52P4x8M2L50M18x8P2N10x6M18L6P3LPL2MN10L28M8P2L23M13x11PL29x3M4L47M14P13xLN10x4P2L5ML10N10"
    "L5xL41M14x9L3ML8M2x2N10x2P4L23P3LM3L50MLM3L2M2L5M2LMLx24L3P2L11M5P2L3M2x10L6x2L6x2L6x9L7xL7x"
    "L43PL14P2x4L115M8PM2x2N10x6L11172x12L23x4L49x8452L366x2L106x38L7x12L5x5LML10PL13xL5xLxL2xL2x"
    "L108P17x16L363P18L64x2L54x7Px32L12P4M16P10x6M16P35xP19xP4x4L5xL135x4P15N10P7L26P6L26P11L89x3"
    "L6x2L6x2L6x2L3x3P7xP7x13P2x2L12xL26xL19xL2xL15x2L14x34L123x5P3x4N45x3P9N57P17N2P3xP13x3Px47"
    "P45Mx130L29x3L49x15MN27x4L32N4x9L20NL8Nx5L38M5x5L30xPL36x4L8PN5x42L158x2N10x6L36x4L36x4L40x8"
    "L52x11PL11xL15xL7xL2xL11xL15xL7xL2x67L311x9L22x10L8x24L6xL42xL9x69L6x2LxL44xL2x3Lx2L23xPN8"
    "L23P2N7L31x8N9x48L19xL2x5N5L22N6x3PL26x5Px64L56x4N2L2N16x2N46LM3xM2x5M4L4xL3xL29x2M3x4MN9x7"
    "P9x7L29N2PL29N3x32L8PL28M2x4N5P7x9L54x3P7L22x2N8L19x5N8L18x7P4x12N7x80L73x55L51x13L51x7N6L36"
    "M4x8N10x294N31xL42xM2Px2L2x78L29N10Lx8L22M11N4P5x22L18M4P4x38L21N7x20L23x9M3L53M15P7x4N30ML2"
    "M2Lx9M4L45M11P2xP4Mx13L25x7N10x6M3L36M14xN10P4LM2Lx8L35MP2Lx9M3L48M14L4P4M4PM2N10LPLP3xN20"
    "x11L18xL25M12P6Mx65L7xLxL4xL15xL10Px6L47M12x5N10x6M4xL8x2L2x2L22xL7xL2xL5xM2LM7x2M2x2M3x2Lx6"
    "Mx5L5M2x2M7x3M5x139L53M18L4P5N10P2xPML3x30L48M20L2PLx8N10x166L47M7x2M9P23L4M2x34L48M17P3Lx11"
    "N10x6P13x19L43M13LPx6N10x54L27x2M15x4N12P4L7x185L44M15Px100L64N19x12L8x2Lx2L8xL2xL24M6xM2x2"
    "M4LMLM2P3x9N10x70L8x2L39M7x2M7LPLMx27LM10L40M7LM4P8Mx8LM11L46M16P3LP5x13L73x263L9xL37M8xM8L"
    "P5x10N29x3P2L30x2M22xM14x73L7xL2xL38M6x3MxM2xM7LMx8N10x6L6xL2xL32M5xM2xM5Lx7N10x310L19M4P2"
    "x183Lx15N21P29x13PL922x102N111xP5x11L196x2636L97P2x13L1071x4049L583x8633L569x7L31xN10x4P2L79"
    "xN10x6L30x2M5Px10L48M7P9L4P2x10N10xN7xL21x5L19x688L64N23P4x101L75x4MLM55x7M4L13x64L2PLMx11M2"
    "x14L6136x8L1238x42L9x8935L4xL7xL2xL291x45L3x17L4x8L396x2308L107x5L13x3L9x7L10x2PM2Px4704M46"
    "x2M23x9P116x60P246x10P39x2P60M5P3M6x8M8P2M7P30M4P61x21P66M3Px154N20x12P87x9N25x135L85xL71xL2"
    "x2Lx2L2x2L4xL12xLxL7xL65xL4x2L8xL7xL28xL4xL5xLx3L7xL340x2L25PL25PL31PL25PL31PL25PL31PL25PL31"
    "PL25PL8x2N50P512M55P4M50P8MP14MP7x15M5xM15x1104L31x225M7xM17x2M7xM2xM5x213L45x3M7L7x2N10x4LP"
    "x320L30Mx17L44M4N10x5Px1248L7xL4xL2xL15xL197x2N9M7x41L68M7Lx4N10x4P2x785N59PN3PN4x76N45PN15"
    "x194L4xL27xL2xLx2LxL10xL4xLxLx6Lx4LxLxLxL3xL2xLx2LxLxLxLxLxL2xLx2L4xL7xL4xL4xLxL10xL17x5L3x"
    "L5xL17x52P2x270P44x4P100x12P15x2P15xP15xP37x10N13P161x56P29x13P44x4P9x7P2x14P6x154P984x5P16"
    "x3P13x3P116x12P89x7P12x4Px15P12x4P56x8P10x6P40x8P30x2P2x78P340x12P14x2P5x3P5x3P7x9P29x3P11x5"
    "P6x10P10x6P8x8P7x9P147xP55x37N10x1030L42720x32L4153x7L222x2L5762x14L7473x3103L542x1506L4939"
    "x716213M240";

static void classes_expand(uint8_t *class_of) {
    static const char letters[] = "LMNPW";  // in the order of the bits
    uint32_t at = 0;
    for (char *s = (char *)class_runs; *s;) {
        const char *letter = strchr(letters, *s++);
        unsigned long n = *s >= '0' && *s <= '9' ? strtoul(s, &s, 10) : 1;
        if (letter) memset(class_of + at, 1 << (letter - letters), n);
        at += (uint32_t)n;
    }
    assert(at <= CODE_POINTS);
    for (uint32_t c = 0x3040; c <= 0x30FF; c++) class_of[c] |= CJK;  // the second regex
    for (uint32_t c = 0x4E00; c <= 0x9FA5; c++) class_of[c] |= CJK;
}

// The class of the character at i, and in *n its bytes. The end of the text has neither.
static int class_at(const Tokenizer *t, size_t *n, Str s, size_t i) {
    uint32_t code;
    *n = i < s.len ? utf8_decode(&code, s.data + i, s.len - i) : 0;
    return *n ? t->class_of[code] : 0;
}

// Where the run of characters of these classes that begins at i ends.
static size_t class_run(const Tokenizer *t, Str s, size_t i, int classes) {
    for (size_t n; class_at(t, &n, s, i) & classes;) i += n;
    return i;
}

// ---- Loading: the shape of tokenizer.json -------------------------------------------------------
// The file describes a pipeline of parts with options. We have only R1's, written out in C, and
// make sure that it is the one described: another would not fail but quietly give wrong ids.

#define PART "pre_tokenizer.pretokenizers."

static const struct { const char *path, *want; } shape[] = {  // after a '?' it may also be absent
    {"?truncation", "null"}, {"?padding", "null"},
    {"?normalizer.type", "Sequence"}, {"normalizer.normalizers.0", "nothing"},
    {"pre_tokenizer.type", "Sequence"}, {PART "4", "nothing"},
    {PART "0.type", "Split"}, {PART "0.behavior", "Isolated"}, {PART "0.invert", "false"},
    {PART "0.pattern.Regex", "\\p{N}{1,3}"},
    {PART "1.type", "Split"}, {PART "1.behavior", "Isolated"}, {PART "1.invert", "false"},
    {PART "1.pattern.Regex", "[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+"},
    {PART "2.type", "Split"}, {PART "2.behavior", "Isolated"}, {PART "2.invert", "false"},
    {PART "2.pattern.Regex", "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|"
                             "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|"
                             "\\s*[\r\n]+|\\s+(?!\\S)|\\s+"},
    {PART "3.type", "ByteLevel"}, {PART "3.use_regex", "false"},
    {PART "3.add_prefix_space", "false"},
    {"?post_processor.type", "ByteLevel"},  // the one that adds no tokens
    {"decoder.type", "ByteLevel"},
    {"model.type", "BPE"}, {"?model.dropout", "null"}, {"?model.unk_token", "null"},
    {"?model.continuing_subword_prefix", "null"}, {"?model.end_of_word_suffix", "null"},
    {"?model.ignore_merges", "false"}, {"?model.byte_fallback", "false"},
    {"?model.fuse_unk", "false"},
};

// ---- Loading: tokens and merges -----------------------------------------------------------------

static int name_compare(const void *a, const void *b) {
    Str x = ((const Name *)a)->text, y = ((const Name *)b)->text;
    int order = memcmp(x.data, y.data, x.len < y.len ? x.len : y.len);
    return order ? order : (x.len > y.len) - (x.len < y.len);
}

static void names_sort(const char *file, Name *names, int n) {
    qsort(names, (size_t)n, sizeof *names, name_compare);
    for (int i = 1; i < n; i++)
        if (!name_compare(&names[i - 1], &names[i]))
            die("%s: token \"%.*s\": got ids %d and %d, want one", file, (int)names[i].text.len,
                names[i].text.data, names[i - 1].id, names[i].id);
}

// The longest of sorted names that s begins with, or NULL. The last name that isn't behind s in the
// alphabet is it, or any other is no longer than what both have in common: search again for that.
static const Name *names_match(const Name *names, int n, Str s) {
    for (size_t common;; s.len = common) {
        int low = 0, high = n;
        while (low < high) {
            int middle = low + (high - low) / 2;
            if (name_compare(&names[middle], &(Name){.text = s}) <= 0) low = middle + 1;
            else high = middle;
        }
        if (!low) return NULL;
        Str text = names[low - 1].text;
        for (common = 0; common < text.len && common < s.len; common++)
            if (text.data[common] != s.data[common]) break;
        if (common == text.len) return &names[low - 1];
    }
}

static int names_find(const Name *names, int n, Str s) {
    const Name *name = names_match(names, n, s);
    return name && name->text.len == s.len ? name->id : -1;
}

// The token of the id that the file gives to a text.
static Token *token_at(Tokenizer *t, const char *file, Str text, const Json *id) {
    int64_t i;
    if (!text.len || !json_int(id, 0, MAX_TOKENS - 1, &i))
        die("%s: token \"%.*s\": got id %s, want a text with an id in 0..%d", file, (int)text.len,
            text.data, json_show(id), MAX_TOKENS - 1);
    if (i >= t->n_tokens) t->n_tokens = (int)i + 1;
    return &t->tokens[i];
}

static void added_load(Tokenizer *t, const char *file, const Json *root) {
    const Json *list = json_want(file, root, "added_tokens", JSON_ARRAY), *entry = list + 1;
    t->added = xcalloc(list->count, sizeof *t->added);
    for (; t->n_added < (int)list->count; entry = json_next(entry)) {
        Str text = json_want(file, entry, "content", JSON_STRING)->string;
        Token *token = token_at(t, file, text, json_get(entry, "id"));
        if (token->added)
            die("%s: token \"%.*s\": got another's id", file, (int)text.len, text.data);
        *token = (Token){text, true, json_want(file, entry, "special", JSON_BOOL)->boolean};
        json_expect(file, entry, "lstrip", "false");
        json_expect(file, entry, "rstrip", "false");
        json_expect(file, entry, "single_word", "false");
        t->added_head[(uint8_t)text.data[0]] = true;
        t->added[t->n_added++] = (Name){text, (int)(token - t->tokens)};
    }
    names_sort(file, t->added, t->n_added);
}

// JSON's strings can't hold any bytes, so the file has a character for each: printable Latin-1 is
// itself, U+0100 and on are the other 68 in order. Turns such a text into its bytes in the place
// where it lies: they are fewer.
static Str symbols_decode(const char *file, Str symbols) {
    Str bytes = {symbols.data, 0};
    uint32_t c;
    for (size_t i = 0; i < symbols.len;) {
        i += utf8_decode(&c, symbols.data + i, symbols.len - i);
        bool printable = (c > 32 && c < 127) || (c > 160 && c < 256 && c != 173);
        if (!printable && (c < 256 || c >= 256 + 68))
            die("%s: model: got U+%04X, want a byte symbol", file, c);
        // The other 68 are 0..32, 127..160 and 173.
        if (!printable) c = c < 256 + 33 ? c - 256 : c < 256 + 67 ? c - 256 - 33 + 127 : 173;
        ((char *)bytes.data)[bytes.len++] = (char)c;
    }
    return bytes;
}

// Returns the vocabulary's names, sorted: only the merges need them.
static Name *vocab_load(Tokenizer *t, const char *file, const Json *vocab) {
    const Json *key = vocab + 1;
    Name *names = xcalloc(vocab->count, sizeof *names);
    memset(t->byte_id, -1, sizeof t->byte_id);
    for (uint32_t i = 0; i < vocab->count; i++, key = json_next(key + 1)) {
        Token *token = token_at(t, file, key->string, key + 1);
        Name *name = &names[i];
        *name = (Name){key->string, (int)(token - t->tokens)};
        // R1's first three are added tokens that stand here, too, as they are.
        bool same = token->added && !name_compare(name, &(Name){.text = token->bytes});
        if (token->bytes.data && !same) die("%s: model.vocab: got id %d twice", file, name->id);
        if (same) continue;
        token->bytes = name->text = symbols_decode(file, key->string);
        if (name->text.len == 1) t->byte_id[(uint8_t)name->text.data[0]] = name->id;
    }
    for (int b = 0; b < 256; b++)
        if (t->byte_id[b] < 0) die("%s: model.vocab: got no token for byte 0x%02x", file, b);
    names_sort(file, names, (int)vocab->count);
    return names;
}

// The merge of two neighbours, or the empty slot where it belongs.
static Merge *merge_slot(const Tokenizer *t, int left, int right) {
    // Fibonacci hashing: times 2^64 / golden ratio, whose upper half is well mixed.
    uint64_t hash = ((uint64_t)left << 32 | (uint32_t)right) * 0x9E3779B97F4A7C15;
    size_t i = hash >> 32 & t->merge_mask;
    while (t->merges[i].rank >= 0 && (t->merges[i].left != left || t->merges[i].right != right))
        i = (i + 1) & t->merge_mask;
    return &t->merges[i];
}

static void merges_load(Tokenizer *t, const char *file, const Json *root) {
    const Json *vocab = json_want(file, root, "model.vocab", JSON_OBJECT);
    const Json *list = json_want(file, root, "model.merges", JSON_ARRAY), *entry = list + 1;
    int n = (int)vocab->count;
    Name *names = vocab_load(t, file, vocab);
    t->merge_mask = 1;  // at most half of the slots are taken, so that searches are short
    while (t->merge_mask < 2 * (size_t)list->count) t->merge_mask = 2 * t->merge_mask + 1;
    t->merges = xmalloc((t->merge_mask + 1) * sizeof *t->merges);
    memset(t->merges, -1, (t->merge_mask + 1) * sizeof *t->merges);
    t->merged = xcalloc(list->count, sizeof *t->merged);
    for (int rank = 0; rank < (int)list->count; rank++, entry = json_next(entry)) {
        Str s = entry->type == JSON_STRING ? entry->string : STR("");
        const char *space = memchr(s.data, ' ', s.len);
        if (!space) die("%s: model.merges.%d: got %s, want 2 tokens", file, rank, json_show(entry));
        Str right = {space + 1, s.len - (size_t)(space + 1 - s.data)};
        Str left = symbols_decode(file, (Str){s.data, (size_t)(space - s.data)});
        right = symbols_decode(file, right);
        int a = names_find(names, n, left), b = names_find(names, n, right);
        // Decoded in place they have a gap between them; without it they are the merged token.
        memmove((char *)left.data + left.len, right.data, right.len);
        int both = names_find(names, n, (Str){left.data, left.len + right.len});
        if (a < 0 || b < 0 || both < 0 || merge_slot(t, a, b)->rank >= 0)
            die("%s: model.merges.%d: got ids %d + %d = %d, want a new pair of the vocabulary",
                file, rank, a, b, both);
        *merge_slot(t, a, b) = (Merge){a, b, rank};
        t->merged[rank] = both;
    }
    free(names);
}

// Which BOS goes before raw text, and the chat template.
static void config_read(Tokenizer *t, const char *file) {
    char *text;
    Json *root = json_load(&text, file, false);
    const Json *jinja = json_get(root, "chat_template"), *bos = json_get(root, "bos_token");
    bool add_bos = json_get(root, "add_bos_token") &&
                   json_want(file, root, "add_bos_token", JSON_BOOL)->boolean;
    if (bos && bos->type == JSON_OBJECT) bos = json_get(bos, "content");
    t->bos = -1;
    if (add_bos && bos && bos->type == JSON_STRING)
        t->bos = names_find(t->added, t->n_added, bos->string);
    if (add_bos && t->bos < 0)
        die("%s: bos_token: got %s, want an added token", file, json_show(bos));
    json_expect(file, root, "?add_eos_token", "false");
    t->jinja = json_show(jinja);
    free(root);
    free(text);
}

Tokenizer *tokenizer_load(const char *dir) {
    Tokenizer *t = xcalloc(1, sizeof *t);
    char *file = format_string("%s/tokenizer.json", dir);
    Json *root = json_load(&t->text, file, false);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        json_expect(file, root, shape[i].path, shape[i].want);
    classes_expand(t->class_of);
    t->tokens = xcalloc(MAX_TOKENS, sizeof *t->tokens);
    added_load(t, file, root);
    merges_load(t, file, root);
    free(root);
    free(file);
    t->config_path = format_string("%s/tokenizer_config.json", dir);
    config_read(t, t->config_path);
    return t;
}

void tokenizer_free(Tokenizer *t) {
    if (!t) return;
    void *parts[] = {t->text, t->tokens, t->added, t->merges, t->merged, t->config_path,
                     t->jinja, t};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free(parts[i]);
}

int tokenizer_vocab(const Tokenizer *t) { return t->n_tokens; }
int tokenizer_bos(const Tokenizer *t) { return t->bos; }

Str tokenizer_bytes(const Tokenizer *t, int id) {
    return id >= 0 && id < t->n_tokens ? t->tokens[id].bytes : (Str){NULL, 0};
}

bool tokenizer_special(const Tokenizer *t, int id) {
    return id >= 0 && id < t->n_tokens && t->tokens[id].special;
}

// ---- Encoding: byte pairs -----------------------------------------------------------------------
// A piece is a list of symbols, at first its bytes. Neighbours that may merge wait in a heap, the
// lowest rank first, of equal ones the leftmost. A merge removes a symbol and makes at most two new
// pairs, so n bytes take O(n log n): someone will send a megabyte without a space. What a merge
// makes void stays in the heap, and is known when it comes out by a rank that its symbol hasn't.

typedef struct {
    int id;
    int rank;             // of the merge with the next symbol; -1: there is none
    uint32_t prev, next;  // indices; the last symbol's next is the piece's length
} Symbol;

typedef struct {
    const Tokenizer *t;
    Ids *out;
    size_t max;       // bytes of a piece that there is room for
    Symbol *symbols;  // [max]
    uint64_t *heap;   // [2 max] rank << 32 | index of the left symbol
    size_t n_heap;
} Encoder;

void ids_add(Ids *ids, int id) {
    if (ids->len == ids->cap) {
        ids->cap = ids->cap ? 2 * ids->cap : 64;
        ids->data = xrealloc(ids->data, ids->cap * sizeof *ids->data);
    }
    ids->data[ids->len++] = id;
}

static void heap_push(Encoder *e, uint64_t value) {
    size_t i = e->n_heap++;
    for (size_t up; i > 0 && e->heap[up = (i - 1) / 2] > value; i = up) e->heap[i] = e->heap[up];
    e->heap[i] = value;
}

static uint64_t heap_pop(Encoder *e) {
    uint64_t top = e->heap[0], last = e->heap[--e->n_heap];
    size_t i = 0;
    for (size_t down; (down = 2 * i + 1) < e->n_heap; i = down) {
        if (down + 1 < e->n_heap && e->heap[down + 1] < e->heap[down]) down++;
        if (last <= e->heap[down]) break;
        e->heap[i] = e->heap[down];
    }
    e->heap[i] = last;
    return top;
}

// Symbol i or the next one is new: what the heap has for i is void, but there may be another merge.
static void pair_update(Encoder *e, uint32_t i, uint32_t n) {
    Symbol *s = &e->symbols[i];
    s->rank = s->next < n ? merge_slot(e->t, s->id, e->symbols[s->next].id)->rank : -1;
    if (s->rank >= 0) heap_push(e, (uint64_t)s->rank << 32 | i);
}

static void encode_piece(Encoder *e, const char *data, size_t len) {
    assert(len < UINT32_MAX);
    uint32_t n = (uint32_t)len;
    if (len > e->max) {
        e->max = 2 * len;
        e->symbols = xrealloc(e->symbols, e->max * sizeof *e->symbols);
        // n - 1 pairs at first; then each merge takes one out and puts at most two in.
        e->heap = xrealloc(e->heap, 2 * e->max * sizeof *e->heap);
    }
    Symbol *s = e->symbols;
    for (uint32_t i = 0; i < n; i++)
        s[i] = (Symbol){e->t->byte_id[(uint8_t)data[i]], -1, i - 1, i + 1};
    for (uint32_t i = 0; i < n; i++) pair_update(e, i, n);
    while (e->n_heap) {
        uint64_t top = heap_pop(e);
        uint32_t i = (uint32_t)top, gone = s[i].next;
        if (s[i].rank != (int)(top >> 32)) continue;  // void
        s[i].id = e->t->merged[s[i].rank];
        s[i].next = s[gone].next;
        s[gone].rank = -1;
        if (s[i].next < n) s[s[i].next].prev = i;
        pair_update(e, i, n);
        if (i > 0) pair_update(e, s[i].prev, n);
    }
    for (uint32_t i = 0; i < n; i = s[i].next) ids_add(e->out, s[i].id);
}

// ---- Encoding: from text to pieces --------------------------------------------------------------

static bool line_end(Str s, size_t i) {
    return i < s.len && (s.data[i] == '\r' || s.data[i] == '\n');
}

// Where the third regex's match that begins at i ends; i: there is none. The first alternative that
// fits counts, and takes as much as it can; they follow in the regex's order.
static size_t word_match(const Tokenizer *t, Str s, size_t i) {
    size_t n, next_n, end = i;
    int class = class_at(t, &n, s, i), next = class_at(t, &next_n, s, i + n);
    // One of ASCII's punctuation marks and ASCII letters: ".html". One byte each is ASCII.
    if (class & PUNCT && n == 1 && next & LETTER && next_n == 1) {
        for (end = i + 1; class_at(t, &n, s, end) & LETTER && n == 1;) end++;
        return end;
    }
    // A word, with one character before it that is no letter, punctuation or line end: " word".
    if (!(class & (LETTER | PUNCT)) && !line_end(s, i) && next & (LETTER | MARK))
        return class_run(t, s, i + n, LETTER | MARK);
    if (class & (LETTER | MARK)) return class_run(t, s, i, LETTER | MARK);
    // Punctuation, with a space before it and line ends behind: " {\n".
    if (class & PUNCT || (s.data[i] == ' ' && next & PUNCT)) {
        for (end = class_run(t, s, i + n, PUNCT); line_end(s, end);) end++;
        return end;
    }
    // White space: to its last line end; else all but its last character, which a word may want.
    end = class_run(t, s, i, SPACE);
    for (size_t k = end; k > i; k--)
        if (line_end(s, k - 1)) return k;
    size_t last = end;
    while (last > i && ((uint8_t)s.data[--last] & 0xC0) == 0x80) {}  // continuation bytes
    return end == s.len || last == i ? end : last;
}

// The third split. What lies between two matches is a piece, too.
static void encode_words(Encoder *e, Str s) {
    size_t start = 0, n;
    for (size_t i = 0, end; i < s.len; i = end) {
        end = word_match(e->t, s, i);
        if (end == i) {
            class_at(e->t, &n, s, i);
            end = i + n;
            continue;
        }
        encode_piece(e, s.data + start, i - start);
        encode_piece(e, s.data + i, end - i);
        start = end;
    }
    encode_piece(e, s.data + start, s.len - start);
}

// The first two splits at once, since no character is of both: up to three numbers, or CJK, or what
// is neither. Their ends are ends of the text for the third split, which finds nothing in numbers.
static void encode_text(Encoder *e, Str s) {
    for (size_t i = 0, end, n; i < s.len; i = end) {
        int class = class_at(e->t, &n, s, i) & (NUMBER | CJK), count = 1;
        for (end = i + n; end < s.len && !(class == NUMBER && count == 3); end += n, count++)
            if ((class_at(e->t, &n, s, end) & (NUMBER | CJK)) != class) break;
        encode_words(e, (Str){s.data + i, end - i});
    }
}

// Added tokens are cut out first, also those that a user typed: R1's reference does the same.
void tokenizer_encode(const Tokenizer *t, Ids *out, Str text) {
    Encoder e = {.t = t, .out = out};
    size_t start = 0;
    for (size_t i = 0; i < text.len;) {
        const Name *name = NULL;
        if (t->added_head[(uint8_t)text.data[i]])
            name = names_match(t->added, t->n_added, (Str){text.data + i, text.len - i});
        if (!name) {
            i++;
            continue;
        }
        encode_text(&e, (Str){text.data + start, i - start});
        ids_add(out, name->id);
        start = i += name->text.len;
    }
    encode_text(&e, (Str){text.data + start, text.len - start});
    free(e.symbols);
    free(e.heap);
}

// ---- Chat templates -----------------------------------------------------------------------------

// We don't run the template but know two by heart; these marks tell them from their relatives. Both
// take an answer's reasoning away with equal words. The first one's prompt ends in <think>. 0528's
// doesn't, and remembers whether the user spoke last, as it wrote <｜Assistant｜> then. V3's does
// neither, V3.1's has a switch "thinking", others write JSON: those we would render wrong.
ChatTemplate tokenizer_template(const Tokenizer *t) {
    bool known = strstr(t->jinja, "content.split('</think>')[-1]");
    bool other = strstr(t->jinja, "thinking") || strstr(t->jinja, "tojson");
    bool forces = strstr(t->jinja, "{{'<｜Assistant｜><think>\\n'}}");
    bool remembers = strstr(t->jinja, "ns.is_last_user");
    if (!known || other || forces == remembers)
        die("%s: chat_template: got neither R1's nor R1-0528's, want one or --chat-template",
            t->config_path);
    return forces ? TEMPLATE_R1 : TEMPLATE_R1_0528;
}

bool template_forces_think(ChatTemplate kind) { return kind == TEMPLATE_R1; }

// What is written so far. The first template never resets `called` and `answered`, so a second
// round of calls lacks its heads: an oversight, but it is what R1's users get, so it stays.
typedef struct {
    Buf *out;
    bool is_0528;
    bool called;     // a set of calls has begun (ns.is_first)
    bool answered;   // a set of tools' answers has begun (not ns.is_output_first)
    bool in_tool;    // it hasn't ended (ns.is_tool)
    bool last_user;  // <｜Assistant｜> is written (ns.is_last_user)
} Render;

static void put(Render *r, const char *before, Str text, const char *after) {
    buf_str(r->out, before);
    buf_add(r->out, text.data, text.len);
    buf_str(r->out, after);
}

static Str json_text(const Json *object, const char *path) {
    const Json *value = json_at(object, path);
    return value && value->type == JSON_STRING ? value->string : (Str){NULL, 0};
}

// What stands behind the last </think>, or all of it.
static Str without_reasoning(Str s) {
    for (size_t n = strlen("</think>"), i = s.len; i >= n; i--)
        if (!memcmp(s.data + i - n, "</think>", n)) return (Str){s.data + i, s.len - i};
    return s;
}

static void render_assistant(Render *r, const Message *m) {
    const Json *calls = m->tool_calls, *call = calls ? calls + 1 : NULL;
    bool after_tool = r->in_tool;
    const char *head = r->is_0528 ? "" : "<｜Assistant｜>";
    // The first template keeps the reasoning beside calls and after tools' answers.
    Str text = r->is_0528 || !(calls || after_tool) ? without_reasoning(m->content) : m->content;
    if (after_tool && (r->is_0528 || !calls)) buf_str(r->out, "<｜tool▁outputs▁end｜>");
    r->in_tool = r->last_user = false;
    if (!calls) {
        put(r, after_tool ? "" : head, text, "<｜end▁of▁sentence｜>");
        return;
    }
    if (r->is_0528) r->called = r->answered = false;
    for (uint32_t i = 0; i < calls->count; i++, call = json_next(call), r->called = true) {
        if (r->called) buf_str(r->out, "\n");
        else put(r, head, text, "<｜tool▁calls▁begin｜>");
        put(r, "<｜tool▁call▁begin｜>", json_text(call, "type"), "<｜tool▁sep｜>");
        put(r, "", json_text(call, "function.name"), "\n```json\n");
        put(r, "", json_text(call, "function.arguments"), "\n```<｜tool▁call▁end｜>");
    }
    buf_str(r->out, "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>");
}

static void render_message(Render *r, const Message *m) {
    if (m->role == ROLE_USER) {
        put(r, "<｜User｜>", m->content, r->is_0528 ? "<｜Assistant｜>" : "");
        if (r->is_0528) r->called = false, r->last_user = true;
        r->in_tool = false;
    } else if (m->role == ROLE_ASSISTANT) {
        render_assistant(r, m);
    } else if (m->role == ROLE_TOOL) {
        if (r->answered) buf_str(r->out, r->is_0528 ? "\n" : "");
        else buf_str(r->out, "<｜tool▁outputs▁begin｜>");
        put(r, "<｜tool▁output▁begin｜>", m->content, "<｜tool▁output▁end｜>");
        r->answered = r->in_tool = true, r->last_user = false;
    }
}

void chat_render(Buf *out, ChatTemplate kind, const Message *messages, int n,
                 bool generation_prompt, bool think) {
    Render r = {.out = out, .is_0528 = kind == TEMPLATE_R1_0528};
    const char *before = "";
    buf_str(out, "<｜begin▁of▁sentence｜>");
    for (int i = 0; i < n; i++) {  // system texts go first, wherever they stand
        if (messages[i].role != ROLE_SYSTEM) continue;
        put(&r, before, messages[i].content, "");
        before = "\n\n";
    }
    for (int i = 0; i < n; i++) render_message(&r, &messages[i]);
    // After tools' answers neither template asks for an answer: the model goes on by itself.
    if (r.in_tool) buf_str(out, "<｜tool▁outputs▁end｜>");
    if (!generation_prompt || r.in_tool) return;
    if (!r.last_user) buf_str(out, "<｜Assistant｜>");
    if (think) buf_str(out, "<think>\n");
}

// ---- Text that streams --------------------------------------------------------------------------
// `bytes` has less than a character, `held` less than a stop string; all before that is gone. Text
// is looked at by characters, so it doesn't matter where tokens were cut. Stop strings come out of
// JSON and are valid UTF-8: they begin and end where characters do.

void text_init(TextStream *s, const Tokenizer *t, bool skip_special) {
    *s = (TextStream){.tokenizer = t, .skip_special = skip_special, .matched = -1};
}

// The longest stop string that ends where `held` ends, or -1.
static int stop_ending(const TextStream *s) {
    int best = -1;
    for (int k = 0; k < s->n_stop; k++) {
        Str stop = s->stop[k];
        if (stop.len > s->held.len || (best >= 0 && stop.len <= s->stop[best].len)) continue;
        if (!memcmp(s->held.data + s->held.len - stop.len, stop.data, stop.len)) best = k;
    }
    return best;
}

// Where the part of `held` begins that may still become a stop string: its longest end that is the
// head of one. What stands before that is never looked at again, so a stream's work is linear.
static size_t stop_begin(const TextStream *s) {
    for (size_t i = 0; i < s->held.len; i++)
        for (int k = 0; k < s->n_stop; k++)
            if (s->held.len - i < s->stop[k].len &&
                !memcmp(s->held.data + i, s->stop[k].data, s->held.len - i)) return i;
    return s->held.len;
}

bool text_push(TextStream *s, Buf *out, int id, bool match) {
    if (s->skip_special && tokenizer_special(s->tokenizer, id)) return false;
    Str token = tokenizer_bytes(s->tokenizer, id);
    buf_add(&s->bytes, token.data, token.len);
    size_t n, done = 0;
    for (uint32_t code; done < s->bytes.len; done += n) {
        n = utf8_decode(&code, s->bytes.data + done, s->bytes.len - done);
        if (code == UTF8_PARTIAL) break;  // the next token may complete it
        Str text = code == UTF8_INVALID ? REPLACEMENT : (Str){s->bytes.data + done, n};
        buf_add(&s->held, text.data, text.len);
        s->matched = match ? stop_ending(s) : -1;
        if (s->matched < 0) continue;
        // Over: the rest of this token is dropped, and so is the stop string, unless it was wanted.
        buf_shift(&s->held, out, s->held.len - (s->no_stop_trim ? 0 : s->stop[s->matched].len));
        buf_shift(&s->held, NULL, s->held.len);
        buf_shift(&s->bytes, NULL, s->bytes.len);
        return true;
    }
    buf_shift(&s->bytes, NULL, done);
    buf_shift(&s->held, out, match ? stop_begin(s) : s->held.len);
    return false;
}

void text_flush(TextStream *s, Buf *out) {
    buf_shift(&s->held, out, s->held.len);
    if (s->bytes.len) buf_add(out, REPLACEMENT.data, REPLACEMENT.len);
    buf_shift(&s->bytes, NULL, s->bytes.len);
}

void text_free(TextStream *s) {
    buf_free(&s->bytes);
    buf_free(&s->held);
}
