"""Load a held-out set whole, for a loss that is the same in every layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import DataConfigError
from .lanes import check_tokenizer
from .packing import Cursor, Windows
from .parts import PartCutter
from .passages import SentenceCutter, window_packer
from .reading.reader import RangeReader
from .shards import ShardSet, open_filled_shard_set
from .stream import StreamBatch
from .tasks.causal import CausalTask
from .tasks.task import Task
from .tokenizer import Tokenizer

HELDOUT_SEED = 0


@dataclass(frozen=True)
class HeldOutSet:
    """Hold a task's fields, int32 [num_samples, columns], of whole documents, whose text has ``num_bytes``."""

    arrays: dict[str, np.ndarray]
    num_bytes: int
    num_documents: int


def load_heldout(
    directory: Path | str,
    tokenizer: Path,
    task: Task,
    *,
    max_tokens: int,
    short_fraction: float = 0.1,
    reader: RangeReader | None = None,
) -> HeldOutSet:
    """Load documents in file order up to ``max_tokens`` tokens as the arrays of a task, each document once.

    Documents longer than that alone are passed over. A causal task predicts every token but the very first once. What
    is drawn depends on a sample's place in the set alone, not on the run's seed, so every evaluation of every run hides
    the same. ``short_fraction`` is that of sentence pairs.

    Raises DataConfigError where nothing fits or nothing can be made of it, DataError for damaged shards.
    """
    opened = Tokenizer(tokenizer)
    read = _read_whole(directory, opened, max_tokens, reader)
    causal = isinstance(task, CausalTask)
    if causal or task.packing == "split":  # bits per byte are those of all text, whatever the run packs
        documents = [tokens for _, tokens in read.documents]
        if sum(map(len, documents)) <= causal:
            raise DataConfigError(f"{directory}: nothing to measure on, for it has one token; give other text")
        batch = _cut_rows(documents, task.row_tokens, opened.pad, overlap=int(causal))
    else:
        source = _Once([document for document, _ in read.documents], opened)
        packer = window_packer(
            task.packing,
            Windows(source, Cursor(), chunks_for=lambda _: 1, key=HELDOUT_SEED),
            sentences=SentenceCutter(opened),
            short_fraction=short_fraction,
        )
        sequences = packer.pack_window(task.row_tokens + 1)
        if not sequences:
            raise DataConfigError(f"{directory}: nothing to measure on, for {packer.nothing}; give other text")
        batch = _write_rows(sequences, task.row_tokens, opened.pad)
    return HeldOutSet(task.reseeded(HELDOUT_SEED).arrays(batch), read.num_bytes, len(read.documents))


@dataclass(frozen=True)
class _Read:
    """Documents as they lie in shards, each with its framed tokens, and the size of their text."""

    documents: list[tuple[str | np.ndarray, np.ndarray]]
    num_bytes: int


class _Once:
    """Documents as the one chunk of a source: see packing.Documents."""

    num_chunks = 1

    def __init__(self, documents: list[str | np.ndarray], tokenizer: Tokenizer) -> None:
        parts = PartCutter(tokenizer)
        self._documents, self.cut, self.tokenize = documents, parts.cut, parts.tokenize

    def read(self, chunk: int) -> Sequence[str] | Sequence[np.ndarray]:
        """Return all documents."""
        return self._documents  # type: ignore[return-value]

    def expect(self, chunk: int) -> None:
        """Do nothing: all is read."""


def _cut_rows(documents: Sequence[np.ndarray], row_tokens: int, pad: int, overlap: int) -> StreamBatch:
    """Lay documents end to end and cut them into rows as the stream does, the last one padded.

    No row holds the last ``overlap`` tokens alone.
    """
    flat = np.concatenate(documents)
    num_rows = -(-(len(flat) - overlap) // row_tokens)
    filled = np.full(num_rows * row_tokens + 1, pad, np.int32)
    filled[: len(flat)] = flat
    firsts = np.arange(num_rows) * row_tokens
    starts = np.zeros(num_rows * row_tokens, bool)
    begins = np.cumsum([0, *map(len, documents[:-1])])
    starts[begins[begins < len(starts)]] = True  # a document of one token may begin where the last row ends
    return _batch(
        filled[firsts[:, None] + np.arange(row_tokens + 1)],
        starts.reshape(num_rows, row_tokens),
        np.minimum(row_tokens + 1, len(flat) - firsts),
    )


def _write_rows(sequences: Sequence[Sequence[np.ndarray]], row_tokens: int, pad: int) -> StreamBatch:
    """Write sequences, each in pieces, into rows."""
    tokens = np.full((len(sequences), row_tokens + 1), pad, np.int32)
    starts = np.zeros((len(sequences), row_tokens + 1), bool)
    lengths = np.zeros(len(sequences), np.int64)
    for row, pieces in enumerate(sequences):
        ends = np.cumsum([0, *map(len, pieces)])
        tokens[row, : ends[-1]] = np.concatenate(pieces)
        starts[row, ends[:-1]] = True
        lengths[row] = ends[-1]
    return _batch(tokens, starts[:, :-1], lengths)


def _batch(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> StreamBatch:
    rows = np.arange(len(tokens))
    weights = (rows[:, None] * 0 + np.arange(1, tokens.shape[1]) < lengths[:, None]).astype(np.uint8)
    return StreamBatch(tokens, weights, starts, rows, rows * 0, lengths)


def _read_whole(
    directory: Path | str, tokenizer: Tokenizer, max_tokens: int, reader: RangeReader | None
) -> _Read:
    """Read documents in file order up to ``max_tokens`` tokens, passing over ones longer than that alone."""
    taken: list[tuple[str | np.ndarray, np.ndarray]] = []
    num_tokens = num_bytes = 0
    for document, tokens, size in _documents(open_filled_shard_set(directory, reader), tokenizer):
        if len(tokens) > max_tokens:
            continue
        if num_tokens + len(tokens) > max_tokens:
            break
        taken.append((document, tokens))
        num_tokens += len(tokens)
        num_bytes += size
    if not taken:
        raise DataConfigError(f"{directory}: no document fits into {max_tokens} tokens; allow more tokens")
    return _Read(taken, num_bytes)


def _documents(shard_set: ShardSet, tokenizer: Tokenizer) -> Iterator[tuple[str | np.ndarray, np.ndarray, int]]:
    """Yield each document, its framed tokens and the size of its text in bytes."""
    check_tokenizer(shard_set, tokenizer)
    for chunk in range(shard_set.num_chunks):
        for document in shard_set.read_documents(chunk):
            if isinstance(document, str):
                yield document, tokenizer.encode_document(document), len(document.encode())
            else:
                tokens = document.astype(np.int32)
                yield tokens, tokens, len(tokenizer.decode(tokens).encode())
