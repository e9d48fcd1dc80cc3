# Encodes random texts with tokenizer.c and with the reference, Python's `tokenizers`, and compares
# ids. Not part of `make test`, which needs no Python. Python 3.11 makes texts of Unicode 14's
# characters; the reference's tables may be newer. From the root, after `pip install tokenizers`:
#   gcc -O2 -shared -fPIC -o /tmp/tokenizer.so tokenizer.c json.c
#   python3 tests/fuzz_tokenizer.py /tmp/tokenizer.so ../shared/deepseek-r1 100000
import ctypes
import random
import sys
import unicodedata

from tokenizers import Tokenizer


class Str(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char_p), ("len", ctypes.c_size_t)]


class Ids(ctypes.Structure):
    _fields_ = [("data", ctypes.POINTER(ctypes.c_int)), ("len", ctypes.c_size_t),
                ("cap", ctypes.c_size_t)]


library, folder, count = ctypes.CDLL(sys.argv[1]), sys.argv[2], int(sys.argv[3])
library.tokenizer_load.restype = ctypes.c_void_p
library.tokenizer_encode.argtypes = [ctypes.c_void_p, ctypes.POINTER(Ids), Str]
ours = library.tokenizer_load(folder.encode())
reference = Tokenizer.from_file(folder + "/tokenizer.json")


def encode(text):
    ids, data = Ids(), text.encode()
    library.tokenizer_encode(ours, ids, Str(data, len(data)))
    return ids.data[:ids.len]


every = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
kinds = {}
for c in every:
    kinds.setdefault(unicodedata.category(c), []).append(c)
added = sorted(token.content for token in reference.get_added_tokens_decoder().values())
pools = [  # how a text's next part is chosen: most bugs live where classes meet
    lambda: random.choice(" \t\n\r\v\f\x85\u00a0\u2003\u2028\u3000\u1680\x1c\u200b"),
    lambda: random.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"),
    lambda: random.choice("abcdefgXYZ"),
    lambda: random.choice("0123456789²½٣Ⅷ〇"),
    lambda: random.choice("一龥龦ぁゟ゠ヿ゛・ー"),
    lambda: random.choice("\u0301\u0300\u093f\u20dd\ufe0f"),
    lambda: random.choice(kinds[random.choice(list(kinds))]),
    lambda: random.choice(every),
    lambda: random.choice(added),
    lambda: random.choice(added)[: random.randrange(1, 9)],
    lambda: random.choice([" the", "ing", "Hello", "\r\n", "  ", "a" * 9, "=" * 9, " " * 9]),
]
random.seed(int(sys.argv[4]) if len(sys.argv) > 4 else 1)
different = 0
for i in range(count):
    some = random.choices(pools, k=random.randrange(1, 6))
    text = "".join(random.choice(some)() for _ in range(random.randrange(1, 40)))
    got, want = encode(text), reference.encode(text, add_special_tokens=False).ids
    if got != want:
        different += 1
        if different <= 10:
            print(ascii(text), "got", got, "want", want)
print("%d texts, %d different" % (count, different))
sys.exit(different > 0)
