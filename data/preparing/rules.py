"""Drop documents by published rules on length, symbols and repetition.

``gopher``: Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
section A.1.1 and table A1. ``c4``: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a
Unified Text-to-Text Transformer", section 2.2. Both are for English prose from the web. A word is what
stands between blanks; a paragraph ends at an empty line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .ngrams import MASK_64, PLACE_MULTIPLIER, mix

GOPHER_WORDS = (50, 100_000)
GOPHER_MEAN_WORD_CHARS = (3, 10)
GOPHER_SYMBOLS_PER_WORD = 0.1
GOPHER_BULLET_LINES, GOPHER_ELLIPSIS_LINES, GOPHER_ALPHABETIC_WORDS = 0.9, 0.3, 0.8
GOPHER_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
GOPHER_MIN_STOP_WORDS = 2
BULLETS, ELLIPSES = ("•", "-"), ("...", "…")
# Table A1: the largest share allowed
DUPLICATE_ELEMENTS, DUPLICATE_ELEMENT_CHARS = 0.30, 0.20
TOP_NGRAM_CHARS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAM_CHARS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

C4_MIN_WORDS_PER_LINE, C4_MIN_SENTENCES = 5, 3
C4_MAX_WORD_CHARS = (
    1000  # this, the ellipsis and the policy phrases stand in the authors' code, not in the paper
)
C4_LINE_ENDS = (".", "!", "?", '"', "”")
C4_POLICY_PHRASES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
C4_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
SENTENCE_END = re.compile("[.!?]+[\"'\u201d\u2019)\\]]*(?=\\s|$)")  # quotes and brackets may close behind it
PARAGRAPH_GAP, LINE_GAP = re.compile(r"\n{2,}"), re.compile(r"\n+")


def apply_rules(text: str, presets: Sequence[str]) -> tuple[str, str | None]:
    """Return the text that presets leave (``c4`` takes lines out), and the reason to drop it, if any.

    Presets apply in the order given; the first rule that is broken gives the reason.
    """
    for preset in presets:
        if preset == "c4":
            text, reason = c4_lines(text)
        else:
            reason = gopher_quality(text) or gopher_repetition(text)
        if reason:
            return text, reason
    return text, None


def gopher_quality(text: str) -> str | None:
    """Return the first rule of section A.1.1 on length and symbols that a text breaks."""
    words = text.split()
    if not GOPHER_WORDS[0] <= len(words) <= GOPHER_WORDS[1]:
        return "gopher_words"
    if not GOPHER_MEAN_WORD_CHARS[0] <= sum(map(len, words)) / len(words) <= GOPHER_MEAN_WORD_CHARS[1]:
        return "gopher_word_length"
    most_symbols = GOPHER_SYMBOLS_PER_WORD * len(words)
    if text.count("#") > most_symbols or sum(map(text.count, ELLIPSES)) > most_symbols:
        return "gopher_symbols"
    lines = text.splitlines()
    if sum(line.lstrip().startswith(BULLETS) for line in lines) > GOPHER_BULLET_LINES * len(lines):
        return "gopher_bullets"
    if sum(line.rstrip().endswith(ELLIPSES) for line in lines) > GOPHER_ELLIPSIS_LINES * len(lines):
        return "gopher_ellipses"
    # isalpha of a whole word answers for most; the rest are looked at letter by letter
    alphabetic = sum(word.isalpha() or any(map(str.isalpha, word)) for word in words)
    if alphabetic < GOPHER_ALPHABETIC_WORDS * len(words):
        return "gopher_alphabetic"
    if len(GOPHER_STOP_WORDS.intersection(words)) < GOPHER_MIN_STOP_WORDS:
        return "gopher_stop_words"
    return None


def gopher_repetition(text: str) -> str | None:
    """Return the first limit of table A1 that a text goes over."""
    for name, gap in (("paragraphs", PARAGRAPH_GAP), ("lines", LINE_GAP)):
        elements = gap.split(text.strip())
        repeated, chars = repeated_elements(elements)
        if repeated > DUPLICATE_ELEMENTS * len(elements) or chars > DUPLICATE_ELEMENT_CHARS * len(text):
            return f"gopher_repeated_{name}"
    words = text.split()
    codes, lengths = _word_codes(words)
    hashes = codes
    multiplier = 1
    for n in range(2, max(DUPLICATE_NGRAM_CHARS) + 1):
        if len(words) < n:
            break
        multiplier = multiplier * PLACE_MULTIPLIER & MASK_64
        with np.errstate(over="ignore"):  # one word more than the runs before
            hashes = hashes[: len(words) - n + 1] + codes[n - 1 :] * np.uint64(multiplier)
        if n in TOP_NGRAM_CHARS:
            if top_ngram_chars(hashes, lengths, n) > TOP_NGRAM_CHARS[n] * len(text):
                return f"gopher_top_{n}_gram"
        elif repeated_ngram_chars(hashes, lengths, n) > DUPLICATE_NGRAM_CHARS[n] * len(text):
            return f"gopher_repeated_{n}_grams"
    return None


def repeated_elements(elements: list[str]) -> tuple[int, int]:
    """Count the elements that stood before, and the characters in them."""
    seen: set[str] = set()
    repeated = chars = 0
    for element in elements:
        if element in seen:
            repeated += 1
            chars += len(element)
        seen.add(element)
    return repeated, chars


def top_ngram_chars(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Return the characters, blanks between words included, in all occurrences of the commonest n-gram.

    ``hashes`` is uint64 [n-grams], ``lengths`` int64 [words]. Of equally common ones the first counts.
    """
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    most = int(counts.max())
    start = int(first[counts == most].min())
    return (int(lengths[start : start + n].sum()) + n - 1) * most


def repeated_ngram_chars(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Return the characters of words in n-grams that stood before, each counted once.

    ``hashes`` is uint64 [n-grams], ``lengths`` int64 [words].
    """
    _, first = np.unique(hashes, return_index=True)
    if len(first) == len(hashes):
        return 0
    repeated = np.ones(len(hashes), np.int64)
    repeated[first] = 0
    changes = np.zeros(len(lengths) + 1, np.int64)
    changes[: len(hashes)] += repeated
    changes[n : n + len(hashes)] -= repeated
    return int(lengths[np.cumsum(changes[:-1]) > 0].sum())


def c4_lines(text: str) -> tuple[str, str | None]:
    """Return the lines that C4's rules leave, and the reason to drop the page, if any.

    Left out are the list of bad words, the language detector and the removal of repeated three-sentence
    spans between pages: a filter of one's own and the search for near-duplicates stand for them.
    """
    lowered = text.lower()
    if "lorem ipsum" in lowered:
        return text, "c4_lorem_ipsum"
    if "{" in text:
        return text, "c4_curly_bracket"
    kept = []
    for line in text.splitlines():
        words = line.split()
        line = C4_CITATION.sub("", line.strip()).strip()
        lowered = line.lower()
        if (
            len(words) >= C4_MIN_WORDS_PER_LINE
            and line.endswith(C4_LINE_ENDS)
            and not line.endswith(ELLIPSES)
            and max(map(len, words)) <= C4_MAX_WORD_CHARS
            and "javascript" not in lowered
            and not any(phrase in lowered for phrase in C4_POLICY_PHRASES)
        ):
            kept.append(line)
    if sum(len(SENTENCE_END.findall(line)) for line in kept) < C4_MIN_SENTENCES:
        return text, "c4_sentences"
    return "\n".join(kept) + "\n", None


def _word_codes(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Number words by first occurrence and spread the numbers, uint64 [words]; and lengths, int64 [words]."""
    numbers: dict[str, int] = {}
    codes = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.uint64, len(words))
    return mix(codes), np.fromiter(map(len, words), np.int64, len(words))
