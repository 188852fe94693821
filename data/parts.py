"""Cut long texts where tokenising the parts gives the tokens of the whole.

A lane that goes on within a document has to tokenise it again, and long documents are the ones that a lane is most
often in. Where a tokenizer allows it, the lane's place is therefore counted in parts of a document.

A cut before a single blank between two words is safe for BPE where no piece of the vocabulary holds a blank behind
another letter: a merge over the cut would have to give such a piece. Nor does a user-defined symbol then span it; they
are matched first, from left to right. The text must reach the merges as it is, so models that normalise it or put a
blank before it do not qualify.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .errors import DataConfigError
from .hf_tokenizer import read_sentencepiece_model
from .tokenizer import Tokenizer
from .tokenizer_engines import META_SPACE
from .tokenizer_files import SENTENCEPIECE

PART_CHARS = 1024
SAFE_CUT = re.compile(f"(?<=[^\\s{META_SPACE}]) (?=[^\\s{META_SPACE}])")
LATE_BLANK = re.compile(f"[^{META_SPACE}]{META_SPACE}")


class DocumentPart(NamedTuple):
    """Hold a part of a document's text, and whether it is the first and the last."""

    text: str
    first: bool
    last: bool


class PartCutter:
    """Cut documents for one tokenizer, and tokenise what comes of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find out whether the tokenizer allows it; others get every document whole."""
        self._tokenizer = tokenizer
        self.cuts = tokenizer.kind == SENTENCEPIECE and _allows_cuts(tokenizer)

    def cut(self, document: str | np.ndarray) -> Sequence[DocumentPart | np.ndarray]:
        """Return the parts of a document in order; tokens are one part."""
        if not isinstance(document, str):
            return (document,)
        starts = [0]
        while self.cuts and (found := SAFE_CUT.search(document, starts[-1] + PART_CHARS)):
            starts.append(found.start())
        ends = [*starts[1:], len(document)]
        return [
            DocumentPart(document[start:end], start == 0, end == len(document))
            for start, end in zip(starts, ends, strict=True)
        ]

    def tokenize(self, part: DocumentPart | np.ndarray | str) -> np.ndarray:
        """Return a part's tokens; the first begins with bos, the last ends with eos. Tokens are framed already."""
        if isinstance(part, str):
            return self._tokenizer.encode_document(part)
        if not isinstance(part, DocumentPart):
            return part
        tokens = self._tokenizer.encode_document(part.text)
        return tokens[0 if part.first else 1 : len(tokens) if part.last else -1]


def _allows_cuts(tokenizer: Tokenizer) -> bool:
    try:
        model = read_sentencepiece_model(tokenizer.path)
    except DataConfigError:
        return False
    return (
        model.byte_fallback
        and not model.add_dummy_prefix
        and not any(LATE_BLANK.search(piece.text) for piece in model.pieces)
    )
