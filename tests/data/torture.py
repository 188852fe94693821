"""Strings that make tokenizers disagree, from a seeded generator."""

import random
import unicodedata

SCRIPTS = [
    "The quick brown fox jumps over the lazy dog",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "敏捷的棕色狐狸跳过了懒狗",
    "いろはにほへと ちりぬるを ガギグゲゴ",
    "키스의 고유조건은 입술끼리 만나야",
    "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Zażółć gęślą jaźń đồng hồ tiếng Việt",
]
CODE = [
    "def f(x, *, y=1):\n    return x ** y  # 0x1F\n",
    'for (int i = 0; i < 10; ++i) {\n\tprintf("%d\\n", i);\n}',
    "\tif a:\n\t\tb = {'k': [1, 2.5e-10, None]}\n\n\n\n    c = `d`",
    "SELECT * FROM t WHERE id=12345678 AND name LIKE '%~_%';",
    "=== ---- //// #### **** ....... ______ !!!!!!??",
]
PIECES = [
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "e\u0301", "ﬁ", "①", "Ⅷ", "\u00a0", "\u2003", "\u200b", "\u200d",
    "\ufeff", "\u2028", "\x00", "\x01", "\x1b[0m", "\x7f", "\x85", "\r\n", "\r", "\f", "\v", "<s>", "</s>", "<unk>",
    "<pad>", "<0x0A>", "<0x41>",
    "\u2581", "\u2581\u2581a", " \u2581 ", "\U0001f9ff", "\U00013000", "\ue000", "\ufffd", "\U0001d518\U0001d52b",
    "ß", "İi", "ǅ", "<|endoftext|>", "[MASK]",
]  # fmt: skip


def torture_strings(count: int, seed: int) -> list[str]:
    """Return strings of code, scripts, emoji, control characters, blanks and literal specials."""
    rng = random.Random(seed)
    strings = ["", " ", "\n", "\t", "  ", "\n\n\n\n\n", " a", "a ", *PIECES, *CODE, *SCRIPTS]
    while len(strings) < count:
        parts = []
        for _ in range(rng.randint(1, 8)):
            kind = rng.randrange(8)
            if kind == 0:
                parts.append(rng.choice(CODE)[rng.randrange(8) :])
            elif kind == 1:
                text = rng.choice(SCRIPTS)
                form = rng.choice(["NFC", "NFD", "NFKD"])
                parts.append(unicodedata.normalize(form, text[rng.randrange(6) : rng.randint(6, 30)]))
            elif kind == 2:
                parts.append(rng.choice(PIECES) * rng.randint(1, 3))
            elif kind == 3:
                parts.append(rng.choice([" ", "\n", "\t", " \n", "\n ", "#", "=", "\n\t"]) * rng.randint(1, 40))
            elif kind == 4:
                parts.append(str(rng.randrange(10 ** rng.randint(1, 18))))
            elif kind == 5:
                parts.append("".join(chr(rng.randrange(0x20, 0x7F)) for _ in range(rng.randint(1, 40))))
            elif kind == 6:
                parts.append("".join(chr(rng.randrange(0x80, 0xD800)) for _ in range(rng.randint(1, 12))))
            else:
                parts.append("".join(chr(rng.randrange(0x10000, 0x20000)) for _ in range(rng.randint(1, 4))))
        strings.append(rng.choice(["", " ", "\n"]).join(parts))
    return strings[:count]
