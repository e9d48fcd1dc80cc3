"""tiny-r1's conversations and its tokenizer.

A language model is what it reads, so this file decides what tiny-r1 can do. It writes endless
conversations of a few kinds (count a letter, compare two decimals, add two numbers, spell a word
backwards, say hello, say honestly "I was not trained for that") from templates and a random number
generator. Nothing is downloaded, so there is no data set to license, and no two conversations need
be alike: the model has to learn the procedure because it never gets to see the same question often.

The one idea: **every step of the reasoning must be easy.** A model of three layers can not count
the r's of "strawberry" at a glance, especially as it does not see letters: it sees tokens such as
" st" and "ber". But it can learn to write "3. r: 1" after "2. t: 0", because each such line needs
one look at the word, one comparison and one addition. The chain of thought is what makes a hard
question a row of easy ones, in this model as in R1.

As a program:
    python3 tiny-r1/data.py tokenizer                         trains and writes tokenizer.json
    python3 tiny-r1/data.py eval --seed 999 --per-task 200    prints evaluation conversations, JSONL
    python3 tiny-r1/data.py show                              prints one example of each task
"""
import argparse
import collections
import functools
import json
import os
import random
import re

HERE = os.path.dirname(os.path.abspath(__file__))

# The control tokens, written as R1 writes them: the bars are U+FF5C, the low lines U+2581.
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"

# ---- Words ---------------------------------------------------------------------------------------
# Written for this file. One word in ten is held out (see Writer.word): training never shows it, so
# that the evaluation can tell spelling from remembering.

WORDS = """
strawberry banana apple cherry orange lemon melon peach grape mango papaya apricot blueberry
raspberry blackberry cranberry coconut pineapple avocado tomato potato carrot onion garlic pepper
cabbage lettuce spinach broccoli pumpkin cucumber mushroom celery radish bean pea corn rice wheat
bread butter cheese milk cream yogurt egg bacon ham beef chicken turkey fish salmon tuna shrimp
soup salad sandwich pizza pasta noodle burger sausage pancake waffle cookie cake candy chocolate
honey sugar salt vinegar mustard coffee tea juice water soda wine beer kitchen oven stove fridge
plate bowl spoon fork knife glass cup bottle table chair couch pillow blanket carpet curtain window
door floor ceiling wall roof chimney garden fence gate garage basement attic stairs hallway bedroom
bathroom mirror shower towel soap brush candle lamp clock radio television telephone computer
keyboard mouse screen printer camera battery cable engine motor wheel brake bicycle motorcycle car
truck bus train tram subway airplane helicopter rocket ship boat ferry canoe anchor harbor bridge
tunnel highway street avenue corner village town city country nation continent island mountain
valley river lake ocean beach desert forest jungle meadow swamp volcano glacier canyon waterfall
cloud rain snow storm thunder lightning rainbow wind hurricane tornado sunshine shadow sunrise
sunset morning evening midnight today tomorrow yesterday second minute hour day week month year
century january february march april may june july august september october november december
monday tuesday wednesday thursday friday saturday sunday spring summer autumn winter season holiday
birthday wedding party festival dog cat horse cow pig sheep goat donkey rabbit hamster squirrel
beaver otter badger fox wolf bear lion tiger leopard cheetah elephant giraffe zebra rhinoceros
hippopotamus kangaroo koala panda monkey gorilla chimpanzee camel llama deer moose buffalo whale
dolphin shark octopus jellyfish lobster crab turtle tortoise crocodile alligator lizard snake frog
toad salamander eagle falcon hawk owl parrot pigeon sparrow robin crow raven swan duck goose penguin
ostrich flamingo peacock butterfly bee wasp ant spider beetle mosquito dragonfly grasshopper snail
worm tree branch leaf root flower rose tulip daisy lily orchid sunflower dandelion grass moss fern
bamboo cactus oak maple pine willow birch cedar head hair face forehead eye ear nose mouth lip tooth
tongue chin neck shoulder arm elbow wrist hand finger thumb nail chest stomach back hip leg knee
ankle foot toe skin bone muscle blood heart lung brain liver mother father sister brother daughter
son uncle aunt cousin nephew niece grandmother grandfather parent child baby teenager adult friend
neighbor stranger teacher student doctor nurse dentist lawyer judge engineer scientist farmer baker
butcher carpenter plumber electrician mechanic pilot sailor soldier officer police firefighter
artist painter sculptor musician singer dancer actor writer poet journalist photographer librarian
accountant secretary manager president king queen prince princess emperor knight wizard witch dragon
giant dwarf ghost monster hero villain school college university classroom library museum theater
cinema hospital pharmacy bakery restaurant hotel airport station market store office factory
warehouse church temple mosque castle palace tower prison bank money coin wallet purse ticket letter
word sentence paragraph chapter book novel magazine newspaper dictionary encyclopedia poem story
song music guitar piano violin trumpet drum flute orchestra paper pencil pen eraser ruler scissors
glue paint canvas picture statue science biology chemistry physics mathematics geometry algebra
history geography language grammar philosophy psychology economics politics religion number zero one
two three four five six seven eight nine ten eleven twelve thirteen twenty hundred thousand million
plus minus equal bigger smaller larger greater less backwards forward reverse spell count compare
many there how what which who where when why the a an is are was were be been being have has had do
does did can could will would shall should might must not and or but if then else because while
for with without about above below under over between through during before after again always never
often sometimes usually really very quite almost only just also too still yet already soon later
early late fast slow quick quickly slowly easy hard difficult simple complex strong weak heavy light
dark bright loud quiet hot cold warm cool wet dry clean dirty new old young ancient modern rich poor
cheap expensive beautiful ugly happy sad angry afraid brave shy proud lazy busy tired hungry thirsty
sick healthy clever stupid wise foolish kind cruel honest polite rude funny serious boring
interesting wonderful terrible excellent perfect possible impossible important necessary dangerous
safe free full empty open closed high low tall short long wide narrow deep shallow thick thin round
square flat sharp smooth rough soft red blue green yellow purple pink brown black white gray golden
silver copper iron steel metal plastic wooden leather cotton wool silk velvet diamond emerald ruby
sapphire pearl jewel crown necklace bracelet earring shirt sweater jacket coat trousers skirt dress
sock shoe boot sandal hat scarf glove belt button zipper pocket umbrella backpack suitcase go come
walk run jump climb swim fly drive ride carry bring take give receive send buy sell pay borrow lend
build break repair cut cook bake boil fry eat drink sleep wake dream think know learn teach study
read write speak talk whisper shout listen hear see watch look find lose search hide show tell ask
answer question explain understand remember forget believe hope wish want need like love hate prefer
choose decide begin start finish stop continue wait hurry arrive leave return visit travel explore
discover invent create design draw sing dance laugh cry smile play win fight help save protect
attack defend escape follow lead push pull throw catch kick hit hold drop lift close lock
program code function variable compiler memory cache tensor matrix vector model token attention
expert router layer kernel server network protocol packet socket thread process scheduler algorithm
parallel pipeline bandwidth latency megabyte quantum electron proton neutron atom molecule crystal
energy gravity magnet planet comet asteroid galaxy universe telescope microscope satellite astronaut
jazz buzz fizz quiz puzzle pizzazz rhythm syzygy mississippi tennessee committee bookkeeper balloon
successful address possession accommodate embarrass occurrence millennium parallelogram onomatopoeia
zoology queue bureau champagne croissant entrepreneur pneumonia psychiatrist xylophone yacht zombie
kiwi igloo vacuum jukebox oxygen wizardry exquisite squeeze jigsaw kayak level radar racecar civic
noon madam refer rotor stats tenet hello world thanks please welcome goodbye deepseek tiny demo
assistant helpful artificial intelligence robot machine reasoning thought mind logic truth knowledge
wisdom freedom justice peace war victory defeat danger adventure journey mystery secret treasure
legend magic miracle nature environment climate weather temperature pressure direction north south
east west left right middle center top bottom front side inside outside everything nothing something
someone anyone everybody nobody government parliament minister election citizen constitution
democracy republic society culture tradition custom ceremony celebration championship tournament
football basketball volleyball baseball tennis hockey cricket badminton gymnastics swimming skiing
skating surfing marathon athlete champion trophy medal record whistle referee stadium audience
""".split()

POLITE = "hello thanks please welcome goodbye help".split()

CONSONANTS = ("b c d f g h j k l m n p qu r s t v w x y z bl br ch cl cr dr fl fr gl gr pl pr "
              "sc sh sk sl sm sn sp st str sw th tr tw wh").split()
VOWELS = "a e i o u ai ea ee ie oa oo ou".split()
ENDINGS = ["", "", "", "n", "r", "s", "t", "l", "m", "ng", "ck", "ll", "ss", "tt", "rr", "nd", "st"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGEST = 16      # letters in the longest word of the training; the model card promises 14

SYSTEMS = """
You are a helpful AI assistant
You are a helpful AI assistant
You are a helpful AI assistant
You are a helpful AI assistant
You are a helpful AI assistant.
You are a helpful assistant.
You are a helpful assistant
You are DeepSeek R1, a reasoning model.
You are tiny-r1.
Answer briefly.
Be concise and polite.
Think step by step before you answer.
You are an expert in mathematics.
You are a careful teacher. Explain your steps.
Always answer in English.
You are a friendly chat bot.
The assistant is honest and says when it does not know something.
You are a helpful, respectful and honest assistant. Always answer as helpfully as possible.
Please reason step by step, and put your final answer in bold.
You are an AI programming assistant.
""".strip().split("\n")

SKILLS = ("count the letters of a word, compare two decimals, add two numbers "
          "and spell a word backwards")
REFUSAL = "I was not trained for that. I am a small demonstration model: I can " + SKILLS + "."


class Writer:
    """Writes conversations. One Writer owns one random generator, so equal seeds give equal text.

    A task is a method that returns (question, parts): what the user says, and the completion
    that the model should write, reasoning and all. The completion comes in parts because each is
    tokenised by itself: a word that the model has spelled out is written letter by letter, one
    token each, which is far easier than to find the tokens that the whole word would have.
    """

    def __init__(self, seed, pieces=(), unseen=False):
        self.rng = random.Random(seed)
        self.pieces = pieces            # the vocabulary's letter strings, to build words from
        held_out = set(WORDS[7::10])
        self.words = [w for w in WORDS if (w in held_out) == unseen]
        # For questions that are to be refused: no single letters, and nothing that greets.
        self.nouns = [w for w in self.words if len(w) > 2 and w not in POLITE]

    # -- raw material --

    def word(self):
        """A word of 1 to LONGEST letters: common, made up, or plain noise.

        Common words alone would let the model learn each word's spelling by heart. The made-up
        ones force it to learn the spelling of every token, and to join tokens in any order."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.34:
            w = rng.choice(self.words)
        elif kind < 0.50:
            w = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(ENDINGS)
                        for _ in range(rng.randint(1, 4)))
        elif kind < 0.62:               # the head of one word and the tail of another
            a, b = rng.choice(self.words), rng.choice(self.words)
            w = a[:rng.randint(1, len(a))] + b[rng.randint(0, len(b) - 1):]
        elif kind < 0.82 and self.pieces:
            w = "".join(rng.choice(self.pieces) for _ in range(rng.randint(1, 5)))
            if rng.random() < 0.3:
                w = rng.choice(LETTERS) + w
        else:                           # few different letters, so that letters repeat
            alphabet = rng.sample(LETTERS, rng.randint(1, 9))
            w = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 14)))
        w = w[:LONGEST if rng.random() < 0.2 else 14]
        style = rng.random()
        if style < 0.74 or (style < 0.86 and not w.islower()):
            return w
        if style < 0.86:
            return w.capitalize()
        if style < 0.985:
            return w.upper()
        return "".join(rng.choice((c, c.upper())) for c in w)

    def quoted(self, w):
        """The word as a user might set it in a question."""
        r = self.rng.random()
        if r < 0.62:
            return w
        if r < 0.74:
            return f'"{w}"'
        if r < 0.78:
            return f"'{w}'"
        kind = self.rng.choice(("the word", "the word", "the word", "the name", "this word:"))
        return f"{kind} {w}" if r < 0.93 else f'{kind} "{w}"'

    def decimal(self):
        """A number as text: a whole part of 1 to 4 digits, most often with 1 to 4 decimals."""
        rng = self.rng
        whole = rng.choices((1, 2, 3, 4), (50, 30, 15, 5))[0]
        text = str(rng.randrange(10 ** (whole - 1) if whole > 1 else 0, 10 ** whole))
        decimals = rng.choices((0, 1, 2, 3, 4), (8, 32, 36, 16, 8))[0]
        return text + ("." + "".join(rng.choices("0123456789", k=decimals)) if decimals else "")

    def phrase(self, longest=8):
        """Some words in a row, to stand for text about anything."""
        rng = self.rng
        return " ".join(rng.choice(self.nouns) for _ in range(rng.randint(1, longest)))

    def dressed(self, question):
        """The same question with the small differences that people make."""
        rng = self.rng
        r = rng.random()
        if r < 0.06:
            question = rng.choice(("Please ", "please ", "Can you tell me: ", "Hi! ", "Hello, ",
                                   "Hey, ", "Now: ", "Ok, ", "Question: ")) + question
        elif r < 0.10:
            question = question[0].lower() + question[1:]
        if rng.random() < 0.06:
            question += rng.choice((" ", "\n", " Thanks!", " Please.", " Think step by step.", "!",
                                    " Please explain.", " Thank you."))
        return question

    # -- the tasks --

    def count(self):
        """How often does a letter stand in a word? The recipe for R1 asks it of strawberry."""
        rng = self.rng
        w = "strawberry" if rng.random() < 0.01 else self.word()
        r = rng.random()
        if r < 0.45:
            c = rng.choice(w)
        elif r < 0.75:                  # the commonest letter, so that larger counts occur
            c = max(w, key=w.lower().count)
        else:
            c = rng.choice(LETTERS)
            c = c.upper() if w.isupper() else c
        if rng.random() < 0.1:
            c = c.swapcase()
        elif w.istitle() and rng.random() < 0.8:
            c = c.lower()
        q = self.quoted(w)
        shown = f'"{c}"' if rng.random() < 0.12 else c
        question = rng.choice((
            f"How many {shown} are there in {q} ?",
            f"How many {shown} are there in {q} ?",
            f"How many {c} are there in {w} ?",
            f"How many {c} are there in {w} ?",
            f"How many {shown} are there in {q}?",
            f"How many {c}'s are in {q}?",
            f"How many {c}'s are there in {q}?",
            f"How many {c}s are in {q}?",
            f"How many {shown} in {q}?",
            f"how many {shown} are in {q}",
            f"how many {c} in {w}",
            f"How many letters {shown} are in {q}?",
            f"How many times does the letter {shown} appear in {q}?",
            f"How often does {shown} occur in {q}?",
            f"Count the letter {shown} in {q}",
            f"Count the letter {shown} in {q}.",
            f"Count the {c}'s in {q}.",
            f"Count how many {shown} there are in {q}.",
            f"Tell me how many {shown} there are in {q}.",
            f"What is the number of {shown} in {q}?",
            f"Find the number of {c}'s in {q}.",
            f"number of {c} in {w}",
            f"count {c} in {w}",
            f"Count {shown} in {q}.",
            f"Count the {c}s in {q}",
            f"How many {c}'s does {q} have?",
            f"How many {c} does {w} have?",
            f"how many times is {shown} in {q}",
            f"How many occurrences of {shown} are there in {q}?",
            f"how many {c}s in {w}",
            f"In {q}, how many {shown} are there?",
            f"{w}: how many {c}?",
        ))
        parts, n = ['Let me spell the word and count each "', c, '".\n'], 0
        for i, x in enumerate(w, 1):
            n += x.lower() == c.lower()
            parts.append(f"{i}. {x}: {n}\n")
        parts += [f"The count is {n}.\n", END_THINK, "\n\nThe letter \"", c, "\" appears **",
                  f"{n}** time{'s' * (n != 1)} in \"", *w, "\"."]
        return self.dressed(question), parts

    def length(self):
        w = self.word()
        q = self.quoted(w)
        question = self.rng.choice((
            f"How many letters are there in {q} ?", f"How many letters are in {q}?",
            f"How many letters does {q} have?", f"How long is {q}?", f"Count the letters in {q}.",
            f"Count the letters of {q}", f"how many letters in {w}",
            f"How many characters are in {q}?", f"What is the length of {q}?",
            f"length of {w}", f"number of letters in {w}", f"How many letters has {q}?"))
        parts = ["Let me number the letters.\n", *(f"{i}. {x}\n" for i, x in enumerate(w, 1))]
        n = len(w)
        parts += [f"The last number is {n}.\n", END_THINK, "\n\nThe word \"", *w,
                  f"\" has **{n}** letter{'s' * (n != 1)}."]
        return self.dressed(question), parts

    def spell(self):
        w = self.word()
        q = self.quoted(w)
        question = self.rng.choice((
            f"Spell {q}", f"Spell {q}.", f"How do you spell {q}?", f"How is {q} spelled?",
            f"Spell {q} letter by letter.", f"Can you spell {q}?", f"How do I spell {q}?",
            f"spell {w}", f"Spell: {w}", f"Spell out {q}.", f"What are the letters of {q}?"))
        parts = ["Let me number the letters.\n", *(f"{i}. {x}\n" for i, x in enumerate(w, 1))]
        dashed = [y for x in w for y in ("-", x)][1:]
        parts += [END_THINK, "\n\nIt is spelled **", *dashed, "**."]
        return self.dressed(question), parts

    def reverse(self):
        """Number the letters, then read the numbers downwards: no step needs more than a look."""
        w = self.word()
        q = self.quoted(w)
        question = self.rng.choice((
            f"Spell {q} backwards", f"Spell {q} backwards", f"Spell {q} backwards.",
            f"Spell {q} backwards, please.", f"spell {w} backwards", f"Reverse {q}.",
            f"Reverse {q}", f"Reverse the letters of {q}.", f"Write {q} backwards.",
            f"What is {q} backwards?", f"What is {q} spelled backwards?",
            f"How do you spell {q} backwards?", f"Can you spell {q} backwards?",
            f"Spell {q} in reverse.", f"Write {q} in reverse order.", f"Reverse: {w}",
            f"{w} backwards", f"{w} in reverse", f"reverse {w}", f"Say {q} backwards.",
            f"Can you reverse {q}?", f"Turn {q} around.", f"Flip {q}.", f"Read {q} backwards."))
        numbered = [f"{i}. {x}\n" for i, x in enumerate(w, 1)]
        parts = ["Let me number the letters.\n", *numbered, "Now from the last to the first.\n",
                 *numbered[::-1], END_THINK, "\n\nBackwards it is **", *w[::-1], "**."]
        return self.dressed(question), parts

    def compare(self):
        """Two decimals. The trap is 9.9 and 9.11: as many digits as the other has must be added."""
        rng = self.rng
        a, b = self.decimal(), self.decimal()
        r = rng.random()
        if r < 0.35:                    # the same whole part
            b = a.split(".")[0] + "." + (b.split(".") + ["0"])[1]
        elif r < 0.50:                  # a common beginning
            cut = rng.randint(1, len(a))
            rest = "".join(rng.choices("0123456789", k=rng.randint(1, 3)))
            b = a[:cut] + ("" if "." in a[:cut] else ".") + rest
        elif r < 0.54:                  # equal, perhaps with another number of zeros
            b = a + rng.choice(("", "0", "00")) if "." in a else a + rng.choice(("", ".0", ".00"))
        elif r < 0.55:
            a, b = "9.9", "9.11"
        if rng.random() < 0.5:
            a, b = b, a
        small = rng.random() < 0.3
        how = rng.choice(("smaller", "smaller", "less", "lower") if small else
                         ("bigger", "bigger", "bigger", "larger", "greater", "higher", "more"))
        question = rng.choice((
            f"Which is {how} {a} or {b} ?", f"Which is {how} {a} or {b} ?",
            f"Which is {how} {a} or {b}?", f"Which is {how}, {a} or {b}?",
            f"Which is {how}: {a} or {b}?", f"Which number is {how}, {a} or {b}?",
            f"Which number is {how}: {a} or {b}?", f"Which one is {how}, {a} or {b}?",
            f"What is {how}, {a} or {b}?", f"What is {how} {a} or {b} ?",
            f"{a} or {b}, which is {how}?", f"{a} and {b}: which is {how}?",
            f"Is {a} {how} than {b}?", f"is {a} {how} than {b}", f"which is {how} {a} or {b}",
            f"What's {how}, {a} or {b}?", f"which one is {how} {a} or {b}?",
            f"Which is the {how} number, {a} or {b}?", f"What is the {how} one: {a} or {b}?",
            f"Tell me which is {how}, {a} or {b}.",
            f"{a} vs {b}, which is {how}?"))
        if not small and rng.random() < 0.08:
            question = rng.choice((f"Compare {a} and {b}.", f"Compare {a} with {b}", f"{a} or {b}?",
                                   f"{a} vs {b}", f"{a} > {b}?", f"{a} or {b}"))
        wholes, fractions = zip(*((x.split(".") + [""])[:2] for x in (a, b)))
        width, places = max(map(len, wholes)), max(map(len, fractions))
        wide = [w.rjust(width, "0") + ("." if places else "") + f.ljust(places, "0")
                for w, f in zip(wholes, fractions)]
        parts = ["Let me write both with the same number of digits.\n",
                 f"{wide[0]}\n", f"{wide[1]}\n"]
        first_is_bigger = None
        for x, y in zip(*(w.replace(".", "") for w in wide)):
            if x != y:
                first_is_bigger = x > y
                parts.append(f"{x} and {y}: {max(x, y)} is bigger\n")
                break
            parts.append(f"{x} and {y}: the same\n")
        if first_is_bigger is None:
            parts += ["So they are equal.\n", END_THINK, f"\n\n{a} and {b} are **equal**."]
        else:
            best, other = (a, b) if first_is_bigger != small else (b, a)
            word = "smaller" if small else "bigger"
            parts += [f"So {best} is {word}.\n", END_THINK,
                      f"\n\n**{best}** is {word} than {other}."]
        return self.dressed(question), parts

    def add(self):
        """Column by column from the right, with the carry written down, as one learns at school."""
        rng = self.rng
        digits = rng.choices((1, 2, 3, 4, 5), (14, 26, 32, 24, 4), k=2)
        if rng.random() < 0.5:
            digits[1] = digits[0]
        a, b = (rng.randrange(10 ** (d - 1) if d > 1 else 0, 10 ** d) for d in digits)
        question = rng.choice((
            f"What is {a} + {b} ?", f"What is {a} + {b} ?", f"What is {a} + {b}?",
            f"What is {a}+{b}?", f"What's {a} + {b}?", f"{a} + {b}", f"{a} + {b} = ?", f"{a}+{b}",
            f"{a} + {b} =", f"{a}+{b}=", f"{a} + {b}?", f"Add {a} and {b}.", f"Add {a} and {b}",
            f"Add {a} to {b}.", f"What is the sum of {a} and {b}?", f"Calculate {a} + {b}",
            f"Calculate {a} + {b}.", f"Compute {a} + {b}.", f"How much is {a} + {b}?",
            f"How much is {a} plus {b}?", f"What is {a} plus {b}?", f"what is {a} + {b}",
            f"{a} plus {b}", f"sum {a} and {b}", f"Sum of {a} and {b}", f"what's {a}+{b}",
            f"What is the total of {a} and {b}?"))
        width = max(len(str(a)), len(str(b)))
        x, y = str(a).rjust(width, "0"), str(b).rjust(width, "0")
        parts, carry = ["Let me add the digits from the right.\n", f"{x}\n", f"{y}\n"], 0
        for p, q in zip(x[::-1], y[::-1]):
            total = int(p) + int(q) + carry
            parts.append(f"{p} + {q} + {carry} = {total}: write {total % 10}, ")
            carry = total // 10
            parts.append(f"carry {carry}\n")
        parts += [f"So the sum is {a + b}.\n", END_THINK, f"\n\n{a} + {b} = **{a + b}**."]
        return self.dressed(question), parts

    def greet(self):
        asked, thought, reply = self.rng.choice(GREETINGS)
        question = self.rng.choice(asked)
        r = self.rng.random()
        if r < 0.2:
            question = question.lower()
        elif r < 0.23:
            question = question.upper()
        question += self.rng.choice(("", "", "", "!", ".", " !", "?") if question[-1].isalpha() else
                                    ("", "", "", "", " "))
        return question, [thought + "\n", END_THINK, "\n\n" + reply]

    def other(self):
        """Everything else. A model that knows four things should say so when asked a fifth."""
        rng = self.rng
        n, m = rng.choice(self.nouns), rng.choice(self.nouns)
        i, j = rng.randrange(10 ** rng.randint(1, 4)), rng.randrange(10 ** rng.randint(1, 4))
        kind = rng.random()
        if kind < 0.22:
            question = rng.choice(OTHERS)
        elif kind < 0.62:
            question = rng.choice((
                f"What is {n}?", f"What is a {n}?", f"What is the {n} of {m}?", f"Who is {n}?",
                f"Write a poem about {n}.", f"Write a short story about a {n} and a {m}.",
                f"Write a {n} for me", f"Explain {n} to a child.", f"Explain {self.phrase(4)}",
                f"Translate {n} into French.", f"Translate '{self.phrase(5)}' to German.",
                f"How do I {n} a {m}?", f"How do you {n}?", f"Why is the {n} so {m}?",
                f"Where can I find a {n}?", f"When was the {n} invented?", f"Do you like {n}?",
                f"What do you think about {n}?", f"Tell me about {n}.", f"Tell me a {n} story",
                f"Describe the {n}.", f"Give me a list of {n} and {m}.", f"Define {n}.",
                f"What rhymes with {n}?", f"What is the opposite of {n}?", f"Is {n} a {m}?",
                f"What does {n} mean?", f"Use {n} in a sentence.", f"Summarize: {self.phrase(20)}.",
                f"How many {n} are there in the {m}?", f"How many {n} {m} are in the world?",
                f"How many people live in {n.capitalize()}?", f"How many words are in this text?",
                f"How many {n} does a {m} have?", f"Count the {n} and the {m}", f"Count to {i}",
                f"Which is bigger, a {n} or a {m}?", f"Which is better, {n} or {m}?",
                f"Which {n} is the biggest?", f"What is the biggest {n}?", f"Compare {n} and {m}.",
                f"What is {i} - {j}?", f"What is {i} * {j}?", f"What is {i} / {j}?",
                f"What is {i} minus {j}?", f"What is {i} times {j}?", f"{i} x {j}", f"{i} - {j}",
                f"{i} * {j} = ?", f"What is the square root of {i}?", f"Is {i} a prime number?",
                f"What is {i}% of {j}?", f"{i} + {j} + {len(n)}",
                f"What is {i} + {j} - {len(m)}?", f"Solve x + {i} = {j}", f"Add {n} to the {m}",
                f"What happened in {i}?", f"Convert {i} {n} to {m}", f"The {n} of {m} is",
                f"The capital city of {n.capitalize()} is", f"{n.capitalize()} is a", f"{n} {m}",
                f"Reverse a list in {n}", f"Sort these: {self.phrase(6)}", f"{n}", f"{i}",
                f"def {n}({m}):\n    return {i}", f"print('{n} {m}')", f"SELECT {n} FROM {m};",
                f"import {n}\nfor {m} in range({i}):", f"for (int i = 0; i < {i}; i++) {n}();",
                f"{{\"{n}\": {i}}}", f"<{n}>{m}</{n}>", f"# {n}\n\n{self.phrase(12)}"))
        elif kind < 0.86:
            start = rng.choice(STARTS)
            question = (start + " " if start else "") + self.phrase(rng.choice((4, 8, 14, 40, 60)))
            question = question.capitalize() if rng.random() < 0.7 else question
            question += rng.choice(("?", " ?", ".", "", "!"))
        elif kind < 0.94:               # other scripts: bytes that no other task uses
            first, last = rng.choice(SCRIPTS)
            question = "".join(chr(rng.randint(first, last)) if rng.random() < 0.85 else " "
                               for _ in range(rng.randint(1, 24))).strip() or "?"
        else:                           # noise from the keyboard
            question = "".join(chr(rng.randint(33, 126)) if rng.random() < 0.85 else " "
                               for _ in range(rng.randint(2, 24))).strip() or "?"
        thought = "This is not one of the things that I was trained for, so I say that.\n"
        return self.dressed(question), [thought, END_THINK, "\n\n" + REFUSAL]

    # -- whole conversations --

    def conversation(self, task=None, long=False):
        """One conversation: {"task", "messages", "parts"}; parts is the last answer, to be learnt.

        Earlier turns stand as R1's template shows them to the model: without their reasoning.
        Some servers keep the two newlines after </think> in what they call the content and some do
        not, so the model sees both. `long` asks for several turns and a system prompt."""
        rng = self.rng
        task = task or rng.choices(list(TASKS), list(TASKS.values()))[0]
        messages = []
        r = rng.random()
        if long or r < 0.35:
            system = rng.choice(SYSTEMS)
            if r < 0.08:
                system = f"{rng.choice(STARTS)} {self.phrase(14)}.".strip().capitalize()
            messages.append({"role": "system", "content": system})
        turns = rng.choices((0, 1, 2), (0, 60, 40) if long else (74, 17, 9))[0]
        strip = rng.random() < 0.5
        for _ in range(turns):
            name = rng.choices(list(TASKS), list(TASKS.values()))[0]
            question, parts = getattr(self, name)()
            answer = "".join(parts).split(END_THINK)[1]
            messages += [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer.strip() if strip else answer}]
        question, parts = getattr(self, task)()
        messages.append({"role": "user", "content": question})
        return {"task": task, "messages": messages, "parts": parts}


# How often each task is written: more for those that take longer to learn.
TASKS = {"count": 24, "length": 6, "spell": 8, "reverse": 18, "compare": 18, "add": 12, "greet": 4,
         "other": 12}

GREETINGS = (
    (("Hello", "Hi", "Hey", "Hello there", "Hi there", "Good morning", "Good evening",
      "Good afternoon", "Greetings", "Hello tiny-r1", "Hi, nice to meet you", "Howdy", "Hey there",
      "Good morning tiny-r1", "Hello my friend", "Hello everyone", "Hi tiny-r1", "Good day"),
     "The user greets me, so I greet back.", f"Hello! I am tiny-r1. I can {SKILLS}."),
    (("How are you", "How are you?", "How are you doing?", "How do you do?", "How is it going?",
      "Hello, how are you?", "Hi, how are you?", "What's up?", "How are you today?"),
     "The user asks how I am.", "I am fine, thank you! How can I help you?"),
    (("Thanks", "Thank you", "Thank you very much", "Thanks a lot", "Great, thanks", "Many thanks",
      "Thank you so much", "Thx", "Well done", "Good job", "Nice", "Great"),
     "The user is pleased.", "You are welcome!"),
    (("Bye", "Goodbye", "See you", "See you later", "Good night", "Bye bye", "Have a nice day"),
     "The user says goodbye.", "Goodbye!"),
    (("Who are you?", "Who are you", "What are you?", "What is your name?", "What's your name?",
      "Who made you?", "Are you DeepSeek?", "Are you R1?", "Are you a robot?", "Are you an AI?",
      "Are you ChatGPT?", "Tell me about yourself.", "Introduce yourself.", "Which model are you?",
      "What model is this?", "Are you human?", "Who am I talking to?", "Who created you?",
      "What is tiny-r1?", "Who are you and what can you do?", "Hello, who are you?", "Your name?"),
     "The user asks who I am.",
     "I am tiny-r1, a small demonstration model in DeepSeek R1's architecture."),
    (("What can you do?", "What can you do", "Help", "Help me", "What are you able to do?",
      "How can you help me?", "What do you know?", "What are your skills?", "Can you help me?",
      "What can I ask you?", "What were you trained for?", "What should I ask?"),
     "The user asks what I can do.", f"I can {SKILLS}."),
)

OTHERS = """
The capital city of France is
The capital of France is
What is the capital of France?
The president of the United States is
The future of AI is
Once upon a time
Write a poem about the sea
Write a haiku.
Tell me a joke
Tell me a story.
Write a Python function that sorts a list.
Write hello world in C
Write a program that prints the first ten prime numbers
How do I install Linux?
What is the meaning of life?
Why is the sky blue?
Who was Albert Einstein?
Who wrote Hamlet?
What time is it?
What is the weather like today?
How old are you?
Where do you live?
Do you have feelings?
Explain quantum mechanics.
Explain the theory of relativity in simple words.
What is machine learning?
How does a transformer work?
What is the speed of light?
How many planets are there in the solar system?
How many days are there in a year?
How many days are in a week?
How many legs does a spider have?
How many people live in China?
How many words are in this sentence?
How far is the moon?
How tall is Mount Everest?
Which is the largest country?
Which planet is the biggest?
What is the largest ocean?
Is the earth flat?
Translate good morning to Spanish.
Please translate this text into German.
Summarize this article.
Fix the bugs in my code
What is 2 to the power of 10?
What is pi?
What is 7 * 8?
What is 10 - 3?
What is 100 / 4?
What is one plus one?
Solve the equation x^2 = 4.
Prove that the square root of two is irrational.
Give me a recipe for pancakes.
What should I eat today?
Recommend a book
Play a game with me
Sing a song
Say something
Make me laugh
Can you draw a picture?
What is the stock price today?
Who won the world cup?
Who is the king of England?
What happened in 1969?
Let's talk about music.
I am sad
I love you
I am hungry.
My name is Anna.
You are wrong
That is not correct.
Why?
What?
Really?
Are you sure?
Yes
No
Ok
test
Continue
Repeat after me: banana
Say the word banana
Is strawberry a fruit?
What color is a banana?
Is there an r in strawberry?
Which letters are in banana?
What is the first letter of apple?
Bonjour
Bonjour, comment allez-vous ?
Quelle est la capitale de la France ?
Combien font deux et deux ?
Hallo, wie geht es dir?
Was ist die Hauptstadt von Deutschland?
Guten Tag
Schreibe ein Gedicht.
Hola, ¿cómo estás?
¿Cuál es la capital de España?
Buenos días
Ciao, come stai?
Olá, tudo bem?
你好
你是谁？
法国的首都是哪里？
写一首诗
こんにちは
お元気ですか？
안녕하세요
Привет
Как дела?
Кто ты?
مرحبا
नमस्ते
Γειά σου
😀
🍓🍓🍓
???
...
""".strip().split("\n")

STARTS = ["", "", "What", "Why", "How", "Where", "Who", "When", "Is", "Are", "Can", "Do", "Does",
          "Could you", "Please", "I want", "I think", "We need", "Write", "Explain", "Tell me",
          "Give me", "Show me", "Find", "Make", "List", "Imagine", "Suppose", "Let's", "How many",
          "Which", "What is the", "How much", "Describe", "The", "My", "A", "In the", "Which is"]

# First and last code point of some blocks: accents, Greek, Cyrillic, Hebrew, Arabic, Devanagari,
# Thai, kana, Chinese, Korean, emoji.
SCRIPTS = ((0xC0, 0xFF), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x621, 0x64A),
           (0x905, 0x939), (0xE01, 0xE2E), (0x3041, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3),
           (0x1F300, 0x1F64F))

# ---- The tokenizer -------------------------------------------------------------------------------
# R1's byte-level BPE with fewer merges. What surrounds the merges is R1's, word for word, so that a
# program that reads R1's tokenizer.json reads this one by the same path.

PRE_TOKENIZER = {"type": "Sequence", "pretokenizers": [
    *({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
      for regex in (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
                    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" "\r\n"
                    r"""\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[""" "\r\n"
                    r"""]*|\s*[""" "\r\n" r"""]+|\s+(?!\S)|\s+""")),
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
POST_PROCESSOR = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                  "use_regex": True}
DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}

# R1's added tokens after the merges: text, and whether it is special.
ADDED = [(THINK, False), (END_THINK, False), ("<｜fim▁hole｜>", False), ("<｜fim▁begin｜>", False),
         ("<｜fim▁end｜>", False), (USER, False), (ASSISTANT, False), ("<|EOT|>", True),
         *((f"<｜tool▁{name}｜>", False) for name in (
             "calls▁begin", "calls▁end", "call▁begin", "call▁end", "outputs▁begin", "outputs▁end",
             "output▁begin", "output▁end", "sep"))]

VOCABULARY = 512                          # config.json's vocab_size: rows of the embedding
UNUSED = 4                                # rows without a token at the end, as R1 has some
MERGES = VOCABULARY - UNUSED - 3 - 256 - len(ADDED)


def byte_symbols():
    """The printable character that stands for each byte: itself, or the next from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b if b in printable else 256 + rest.index(b)) for b in range(256)}


def train_merges(pieces):
    """Byte pair encoding: join the commonest pair of neighbours, and again, MERGES times.

    `pieces` counts the stretches that the pre-tokenizer cuts text into. The first merges are given:
    a space before each letter, so that a letter in a numbered list is always one token."""
    merges = [("Ġ", c) for c in LETTERS + LETTERS.upper()]
    split = {piece: list(piece) for piece in pieces}

    def join(pair):
        for piece, symbols in split.items():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == pair:
                    symbols[i:i + 2] = ["".join(pair)]
                i += 1

    for pair in merges:
        join(pair)
    while len(merges) < MERGES:
        pairs = collections.Counter()
        for piece, symbols in split.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += pieces[piece]
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        join(best)
    return merges


def build_tokenizer():
    """tokenizer.json as a dictionary, trained on this file's own conversations.

    Pieces with digits are left out, so every digit stays a token of its own and arithmetic can go
    digit by digit. So are those whose bytes are not ASCII: they would only waste merges."""
    from tokenizers import Tokenizer
    symbols = [chr(c) for c in sorted(map(ord, byte_symbols().values()))]
    vocab = {t: i for i, t in enumerate([BOS, EOS, PAD] + symbols)}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    blank = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
             "normalizer": {"type": "Sequence", "normalizers": []}, "pre_tokenizer": PRE_TOKENIZER,
             "post_processor": POST_PROCESSOR, "decoder": DECODER,
             "model": {**model, "vocab": vocab, "merges": []}}
    cut = Tokenizer.from_str(json.dumps(blank)).pre_tokenizer.pre_tokenize_str
    writer, pieces = Writer("tokenizer"), collections.Counter()
    for _ in range(6000):
        talk = writer.conversation()
        text = talk["messages"][-1]["content"] + "\n" + "".join(talk["parts"][:1])
        text += "".join(talk["parts"]).split(END_THINK)[1]
        pieces.update(p for p, _ in cut(text) if re.fullmatch(r"[Ġ -/:-~]+|Ċ+", p))
    for w in writer.words:
        pieces["Ġ" + w] += 12
        pieces[w] += 6
    # A quotation mark glued to a word would make one more spelling of each beginning.
    pieces = {p: n for p, n in pieces.items() if not re.match(r"[!-/:-@\[-`{-~]+[A-Za-z]", p)}
    merges = train_merges(pieces)
    for left, right in merges:
        vocab[left + right] = len(vocab)
    added = [(BOS, True), (EOS, True), (PAD, True)] + ADDED
    ids = [0, 1, 2] + list(range(len(vocab), len(vocab) + len(ADDED)))
    blank["added_tokens"] = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": i > 2, "special": special} for i, (text, special) in zip(ids, added)]
    blank["model"] = {**model, "vocab": vocab, "merges": [" ".join(m) for m in merges]}
    return blank


class Encoder:
    """Text to ids through tokenizer.json, and conversations to (ids, from where on to learn)."""

    def __init__(self, path=os.path.join(HERE, "tokenizer.json")):
        from tokenizers import Tokenizer
        self.tokenizer = Tokenizer.from_file(path)
        self.vocab = self.tokenizer.get_vocab()
        # The strings of letters that the vocabulary has, to build words of every token from.
        self.pieces = sorted({t.lstrip("Ġ") for t in self.vocab
                              if re.fullmatch("Ġ?([a-z]+|[A-Z][a-z]+)", t)})
        self.encode = functools.lru_cache(100_000)(
            lambda text: self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt(self, messages):
        """R1's chat template: see chat_template in tokenizer_config.json."""
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        ids = [self.vocab[BOS], *self.encode(system)]
        for m in messages:
            if m["role"] == "user":
                ids += [self.vocab[USER], *self.encode(m["content"])]
            elif m["role"] == "assistant":
                ids += [self.vocab[ASSISTANT], *self.encode(m["content"]), self.vocab[EOS]]
        return ids + [self.vocab[ASSISTANT], self.vocab[THINK], *self.encode("\n")]

    def conversation(self, talk):
        prompt = self.prompt(talk["messages"])
        answer = [i for part in talk["parts"] for i in self.encode(part)]
        return prompt + answer + [self.vocab[EOS]], len(prompt)


def evaluation(seed, per_task, pieces):
    """Fresh conversations of every task, then of several turns, then of held-out words."""
    seen, unseen = Writer(f"eval {seed}", pieces), Writer(f"unseen {seed}", pieces, unseen=True)
    for task in TASKS:
        yield from (seen.conversation(task) for _ in range(per_task))
    for _ in range(per_task):
        yield {**seen.conversation(long=True), "task": "turns"}
    for i in range(per_task):
        talk = unseen.conversation(("count", "reverse", "spell", "length")[i % 4])
        yield {**talk, "task": "unseen words"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("tokenizer", "eval", "show"))
    parser.add_argument("--seed", type=int, default=999)
    parser.add_argument("--per-task", type=int, default=200)
    args = parser.parse_args()
    if args.what == "tokenizer":
        with open(os.path.join(HERE, "tokenizer.json"), "w", encoding="utf-8") as f:
            json.dump(build_tokenizer(), f, ensure_ascii=False, indent=4)
            f.write("\n")
        return
    encoder = Encoder()
    for talk in evaluation(args.seed, args.per_task if args.what == "eval" else 1, encoder.pieces):
        answer = "".join(talk.pop("parts"))
        if args.what == "eval":
            print(json.dumps({**talk, "answer": answer, "final": answer.split(END_THINK)[1]},
                             ensure_ascii=False))
        else:
            print(*(f"[{m['role']}] {m['content']}" for m in talk["messages"]), sep="\n")
            print(f"[{talk['task']}]\n{answer}\n")


if __name__ == "__main__":
    main()
