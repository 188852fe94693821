"""Find the pieces of a tokenizer that tasks need: masks, separators, sentinels, and what is no text at all."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from ..config import BUILTIN_SYMBOLS
from ..errors import DataConfigError
from ..tokenizer import Tokenizer
from .sentences import EncoderSpecials
from .spans import Sentinels

MASK_PIECES, CLS_PIECES, SEP_PIECES = ("[MASK]", "<mask>"), ("[CLS]", "<cls>"), ("[SEP]", "<sep>")
SENTINEL = "<extra_id_{}>"


def find_piece(tokenizer: Tokenizer, spellings: tuple[str, ...]) -> int | None:
    """Return the id of the first of some spellings that the tokenizer has, or None."""
    for spelling in spellings:
        with suppress(DataConfigError):
            return tokenizer.token_id(spelling)
    return None


def find_mask(tokenizer: Tokenizer) -> int:
    """Return the id of the mask. Raises DataConfigError where there is none."""
    found = find_piece(tokenizer, MASK_PIECES)
    if found is None:
        raise DataConfigError(
            f"tokenizer {tokenizer.path} has no {' or '.join(MASK_PIECES)}, which masked tokens need; train one with "
            f"`tokenizer train --special '{MASK_PIECES[0]}'`, or take {BUILTIN_SYMBOLS}"
        )
    return found


def find_frame(tokenizer: Tokenizer) -> EncoderSpecials:
    """Return the ids of [CLS], [SEP] and padding; bos and eos take the place of the first two where they lack."""
    cls, sep = find_piece(tokenizer, CLS_PIECES), find_piece(tokenizer, SEP_PIECES)
    return EncoderSpecials(
        tokenizer.bos if cls is None else cls, tokenizer.eos if sep is None else sep, tokenizer.pad
    )


def find_sentinels(tokenizer: Tokenizer) -> Sentinels:
    """Return the sentinels, as many as there are. Raises DataConfigError where there are none, or in another order."""
    ids = _sentinel_ids(tokenizer)
    remedy = f"train one with `tokenizer train --sentinels 100`, or take {BUILTIN_SYMBOLS}"
    if not ids:
        raise DataConfigError(
            f"tokenizer {tokenizer.path} has no sentinel {SENTINEL.format(0)}, which spans need; {remedy}"
        )
    if ids != list(range(ids[0], ids[0] - len(ids), -1)):
        raise DataConfigError(
            f"tokenizer {tokenizer.path}: the sentinels from {SENTINEL.format(0)} on have the ids "
            f"{', '.join(map(str, ids[:4]))}, ...; they must go down one by one; {remedy}"
        )
    return Sentinels(ids[0], len(ids))


def special_table(tokenizer: Tokenizer) -> np.ndarray:
    """Tell which ids are no text, bool [vocab_size]: those that stand for no bytes, and symbols for tasks."""
    special = np.array([not piece for piece in tokenizer.pieces()], bool)
    named = [tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk, *_sentinel_ids(tokenizer)]
    found = [find_piece(tokenizer, names) for names in (MASK_PIECES, CLS_PIECES, SEP_PIECES)]
    named += [token for token in found if token is not None]
    special[[token for token in named if token >= 0]] = True
    return special


def _sentinel_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the sentinels from the first on, as many as there are."""
    ids: list[int] = []
    while (found := find_piece(tokenizer, (SENTINEL.format(len(ids)),))) is not None:
        ids.append(found)
    return ids
