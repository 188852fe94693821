"""Cut text into words and hash runs of them, the same on every machine and in every process."""

from __future__ import annotations

import re
import unicodedata
import zlib
from functools import cache

import numpy as np

# Chinese and Japanese put no blanks between words: there each character counts as one
IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(f"[{IDEOGRAPHS}]|[^\\W{IDEOGRAPHS}]+")
UPPER_PLANE, MARKS_END = 0x10000, 0x20000  # the marks above are variants of ideographs
PLACE_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no place of an n-gram loses bits
MASK_64 = (1 << 64) - 1


def find_words(text: str) -> list[str]:
    """Return a text's words in lower case, without punctuation: letters, digits, and the marks that follow them.

    Canonically equivalent texts (NFC, NFD) have the same words.
    """
    text = text.lower()
    if text.isascii():
        return WORD.findall(text)
    text = unicodedata.normalize("NFC", text)
    perhaps_mark, marked_word = _mark_patterns()
    return (marked_word if perhaps_mark.search(text) else WORD).findall(text)  # the first is slower


@cache
def _mark_patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return what finds every combining mark, and a word that may hold some; ``re`` has no class for marks.

    Marks of the second plane are many ranges, compared one by one: only letters of that plane are.
    """
    marks, upper_marks = _mark_ranges(0, UPPER_PLANE), _mark_ranges(UPPER_PLANE, MARKS_END)
    letter = f"[^\\W{IDEOGRAPHS}]"
    mark = f"(?:[{marks}]|(?![\0-\uffff])[{upper_marks}])"
    return (
        re.compile(f"[{marks}{chr(UPPER_PLANE)}-{chr(MARKS_END - 1)}]"),
        re.compile(f"[{IDEOGRAPHS}]|{letter}+(?:{mark}+{letter}*)*"),
    )


def _mark_ranges(start: int, end: int) -> str:
    """Return the marks from ``start`` to before ``end`` as ranges of a character class."""
    ideograph = re.compile(f"[{IDEOGRAPHS}]")
    ranges: list[list[str]] = []
    for character in map(chr, range(start, end)):
        if unicodedata.category(character)[0] == "M" and not ideograph.match(character):
            if ranges and ord(ranges[-1][1]) + 1 == ord(character):
                ranges[-1][1] = character
            else:
                ranges.append([character, character])
    return "".join(f"{first}-{last}" for first, last in ranges)


def hash_ngrams(words: list[str], n: int) -> np.ndarray:
    """Hash every run of ``n`` words; uint64 [len(words) - n + 1], empty where there are fewer words."""
    if len(words) < n:
        return np.empty(0, np.uint64)
    codes = np.fromiter(map(zlib.crc32, map(str.encode, words)), np.uint64, len(words))
    codes = mix(codes)
    result = np.zeros(len(words) - n + 1, np.uint64)
    multiplier = 1
    with np.errstate(over="ignore"):
        for place in range(n):
            result += codes[place : place + len(result)] * np.uint64(multiplier)
            multiplier = multiplier * PLACE_MULTIPLIER & MASK_64
    return mix(result)


def mix(values: np.ndarray) -> np.ndarray:
    """Spread 64-bit values evenly: the finaliser of splitmix64 (Steele, Lea, Flood 2014); uint64 [n]."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(PLACE_MULTIPLIER)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
