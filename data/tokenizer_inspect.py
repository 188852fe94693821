"""Measure a tokenizer on text: how much it packs into a token, what it never uses, what does not come back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .tokenizer import Tokenizer

HELD_BACK_ONE_IN = 50
HELD_BACK_BYTES = 4 << 20
NUM_EXAMPLES = 5
EXCERPT_CHARS = 80


def hold_back(texts: Iterable[str], held_back: list[str]) -> Iterator[str]:
    """Give texts to train on; one in fifty, chosen by its hash, is not among them.

    Of those the first 4 MiB go into ``held_back``. What is given does not depend on the order of the texts.
    """
    size = 0
    for text in texts:
        content = text.encode()
        digest = hashlib.blake2b(content, digest_size=8, person=b"held back").digest()
        if int.from_bytes(digest, "big") % HELD_BACK_ONE_IN:
            yield text
        elif size + len(content) <= HELD_BACK_BYTES:
            size += len(content)
            held_back.append(text)


def inspect_tokenizer(path: Path, texts: Iterable[str]) -> dict[str, Any]:
    """Say what a tokenizer is and measure it on texts.

    ``bytes_per_token`` and ``tokens_per_word`` are its fertility, words being what lies between blanks.
    ``byte_tokens_share`` counts tokens that are a part of a character. ``unused_pieces`` counts pieces, specials left
    out, that the texts never gave. Round-trip failures are texts that decode to something else: the examples
    show where. SentencePiece stands a blank for U+2581, so a text that holds one does not come back.
    """
    tokenizer = Tokenizer(path)
    pieces = tokenizer.pieces()
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    num_texts = num_bytes = num_words = num_failures = 0
    failures: list[dict[str, str]] = []
    for text in texts:
        ids = tokenizer.encode(text)
        counts += np.bincount(ids, minlength=len(counts))
        num_texts += 1
        num_bytes += len(text.encode())
        num_words += len(text.split())
        back = tokenizer.decode(ids)
        if back != text:
            num_failures += 1
            if len(failures) < NUM_EXAMPLES:
                failures.append(_difference(text, back))
    num_tokens = int(counts.sum())
    ordinary = np.array([bool(piece) for piece in pieces])
    partial = np.array([not _is_text(piece) for piece in pieces])
    unused = np.flatnonzero(ordinary & (counts == 0))
    return {
        "path": str(path),
        "kind": tokenizer.kind,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "specials": {"unk": tokenizer.unk, "bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad},
        "texts": num_texts,
        "bytes": num_bytes,
        "words": num_words,
        "tokens": num_tokens,
        "bytes_per_token": num_bytes / num_tokens if num_tokens else None,
        "tokens_per_word": num_tokens / num_words if num_words else None,
        "unknown_tokens": int(counts[tokenizer.unk]) if tokenizer.unk >= 0 else 0,
        "byte_tokens_share": int(counts[partial].sum()) / num_tokens if num_tokens else None,
        "pieces": int(ordinary.sum()),
        "unused_pieces": len(unused),
        "unused_examples": [pieces[token].decode(errors="backslashreplace") for token in unused[:NUM_EXAMPLES]],
        "round_trip_failures": num_failures,
        "round_trip_examples": failures,
    }


def _difference(text: str, back: str) -> dict[str, str]:
    """Return both texts from a little before the first character that differs."""
    pairs = enumerate(zip(text, back, strict=False))
    place = next((n for n, (a, b) in pairs if a != b), min(len(text), len(back)))
    start = max(0, place - EXCERPT_CHARS // 4)
    return {"text": text[start : start + EXCERPT_CHARS], "decoded": back[start : start + EXCERPT_CHARS]}


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
