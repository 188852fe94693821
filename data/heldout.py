"""Load a held-out set whole, for a loss that is the same in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import DataConfigError
from .lanes import check_tokenizer
from .reading.reader import RangeReader
from .shards import ShardSet, open_filled_shard_set
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOutSet:
    """Hold whole documents, end to end, cut into sequences.

    ``tokens`` int32 [num_sequences, sequence_length + 1], the last one padded; ``weights`` uint8
    [num_sequences, sequence_length]: every token but the very first is predicted once; ``starts`` bool
    [num_sequences, sequence_length], true where a document begins. ``num_bytes`` is the
    size of the documents' text in UTF-8, for bits per byte.
    """

    tokens: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    num_bytes: int
    num_documents: int


def load_heldout(
    directory: Path | str,
    tokenizer: Path,
    *,
    sequence_length: int,
    max_tokens: int,
    reader: RangeReader | None = None,
) -> HeldOutSet:
    """Load documents in file order up to ``max_tokens`` tokens; ones longer than that alone are passed over.

    Raises DataConfigError where nothing fits, DataError for damaged shards.
    """
    if sequence_length < 1 or max_tokens < 2:
        raise DataConfigError(
            f"sequence length is {sequence_length} and the most tokens {max_tokens}; at least 1 and 2 are needed"
        )
    taken: list[np.ndarray] = []
    num_tokens = num_bytes = 0
    for tokens, size in _documents(open_filled_shard_set(directory, reader), Tokenizer(tokenizer)):
        if len(tokens) > max_tokens:
            continue
        if num_tokens + len(tokens) > max_tokens:
            break
        taken.append(tokens)
        num_tokens += len(tokens)
        num_bytes += size
    if not taken:
        raise DataConfigError(f"{directory}: no document fits into {max_tokens} tokens; allow more tokens")
    pad = Tokenizer(tokenizer).pad
    num_sequences = -(-(num_tokens - 1) // sequence_length)
    stream = np.full(num_sequences * sequence_length + 1, pad, np.int32)
    stream[:num_tokens] = np.concatenate(taken)
    starts = np.arange(num_sequences)[:, None] * sequence_length
    targets = starts + np.arange(1, sequence_length + 1)
    return HeldOutSet(
        tokens=stream[starts + np.arange(sequence_length + 1)],
        weights=(targets < num_tokens).astype(np.uint8),
        starts=np.isin(starts + np.arange(sequence_length), np.cumsum([0, *map(len, taken)])),
        num_bytes=num_bytes,
        num_documents=len(taken),
    )


def _documents(shard_set: ShardSet, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """Yield each document's framed tokens and the size of its text in bytes."""
    check_tokenizer(shard_set, tokenizer)
    for chunk in range(shard_set.num_chunks):
        for document in shard_set.read_documents(chunk):
            if isinstance(document, str):
                yield tokenizer.encode_document(document), len(document.encode())
            else:
                yield document.astype(np.int32), len(tokenizer.decode(document).encode())
