"""Tell from a vocabulary's pieces where words begin and sentences end.

The pieces are those of ``Tokenizer.pieces()``: the bytes that each token stands for, with the blank before a word.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WORD_ENDS_SENTENCE, LINE_ENDS_SENTENCE = 1, 2
SENTENCE_MARKS = tuple(mark.encode() for mark in ".!?…。！？।؟")  # noqa: RUF001
CLOSING_MARKS = b"\"')]"


def word_starts(pieces: Sequence[bytes]) -> np.ndarray:
    """Tell which tokens begin a word, those that begin with a blank, newline or tab: bool [vocab_size].

    In scripts without blanks all that lies between two of them counts as one word.
    """
    return np.array([piece[:1].isspace() for piece in pieces], bool)


def sentence_ends(pieces: Sequence[bytes]) -> np.ndarray:
    """Tell which tokens end a sentence, uint8 [vocab_size].

    2 where the piece ends with a newline; 1 where it ends with a full stop or its like, quotes and brackets after it
    allowed, which ends a sentence only if a word begins next; else 0.
    """
    ends = np.zeros(len(pieces), np.uint8)
    for number, piece in enumerate(pieces):
        if piece.endswith(b"\n"):
            ends[number] = LINE_ENDS_SENTENCE
        elif piece.rstrip(CLOSING_MARKS).endswith(SENTENCE_MARKS):
            ends[number] = WORD_ENDS_SENTENCE
    return ends


def split_sentences(tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Cut a document, int [num_tokens], into sentences by the tables of ``word_starts`` and ``sentence_ends``.

    Newlines belong to the sentence before them. Joined, the sentences are the document.
    """
    here, after = ends[tokens[:-1]], ends[tokens[1:]]
    line = here == LINE_ENDS_SENTENCE
    mark = (here == WORD_ENDS_SENTENCE) & starts[tokens[1:]]
    cuts = np.flatnonzero((line | mark) & (after != LINE_ENDS_SENTENCE)) + 1
    return [part for part in np.split(tokens, cuts) if len(part)]
