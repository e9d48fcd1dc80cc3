# Prints tokenizer.c's class_runs: the Unicode 14.0.0 general categories that R1's regexes ask for,
# run after run from U+0000 on. A letter is the category (P: P or S, W: White_Space, x: none), the
# number behind it how many code points it lasts, 1 where it is left out. Python 3.11 has 14:
#   python3 tests/unicode_table.py
import itertools
import sys
import unicodedata

WHITE_SPACE = [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029,
               0x202F, 0x205F, 0x3000]

if not unicodedata.unidata_version.startswith("14."):
    sys.exit("unicodedata %s, want 14.0.0 (Python 3.11)" % unicodedata.unidata_version)


def class_of(code):
    category = unicodedata.category(chr(code))[0].replace("S", "P")
    return "W" if code in WHITE_SPACE else category if category in "LMNP" else "x"


runs = [(c, len(list(run))) for c, run in itertools.groupby(map(class_of, range(0x110000)))]
line = ""
for c, n in runs[:-1]:  # the last one is x
    run = c + (str(n) if n > 1 else "")
    if len(line) + len(run) > 92:  # 4 of indent, 2 quotes and a semicolon make it 99
        print('    "%s"' % line)
        line = ""
    line += run
print('    "%s";' % line)
