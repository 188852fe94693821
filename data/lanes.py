"""Give every training sample its content: lanes over an index.

A run has a fixed number of lanes. Global sample ``i`` belongs to lane ``i mod num_lanes``, and lane ``l``
takes the chunks ``l, l + num_lanes, l + 2 num_lanes, ...`` of an endless sequence: epoch after epoch, each a
fresh permutation. So a sample is a function of the data, the seed and ``i`` alone, whatever process
reads it, and a lane's place is three integers: how many chunks it has finished, the document within the
present chunk, and the token within the document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .documents import TOKENS_KIND
from .errors import DataConfigError
from .order import hash_integers, permute_all, permute_index
from .shards import ShardSet
from .tokenizer import Tokenizer

CURSOR_COLUMNS = 3
DOCUMENT_ORDER = 1  # sets the keys of document orders apart from those of chunk orders


@dataclass
class Cursor:
    """Hold the place of a lane: chunks finished, document in the chunk's order, token in the document."""

    chunk: int = 0
    document: int = 0
    token: int = 0


class ChunkSequence:
    """Order the chunks of several shard sets, endlessly, and read their documents as tokens."""

    def __init__(self, shard_sets: Sequence[ShardSet], tokenizer: Tokenizer, seed: int) -> None:
        """Check that token blocks were made with this tokenizer; raises DataConfigError where not."""
        for shard_set in shard_sets:
            check_tokenizer(shard_set, tokenizer)
        self._shard_sets = shard_sets
        self._tokenizer = tokenizer
        self._seed = seed
        self._ends = np.cumsum([shard_set.num_chunks for shard_set in shard_sets])
        self.num_chunks = int(self._ends[-1])

    def read(self, ordinal: int) -> list[str] | list[np.ndarray]:
        """Return the documents of the chunk at a place of the endless sequence, in training order."""
        epoch, place = divmod(ordinal, self.num_chunks)
        chunk = permute_index(place, self.num_chunks, hash_integers(self._seed, epoch))
        number = int(np.searchsorted(self._ends, chunk, side="right"))
        shard_set = self._shard_sets[number]
        documents = shard_set.read_documents(chunk - int(self._ends[number]) + shard_set.num_chunks)
        order = permute_all(len(documents), hash_integers(self._seed, epoch, chunk, DOCUMENT_ORDER))
        return [documents[index] for index in order]  # type: ignore[return-value]

    def tokenize(self, document: str | np.ndarray) -> np.ndarray:
        """Return a document's framed tokens; those of a block are framed already."""
        return self._tokenizer.encode_document(document) if isinstance(document, str) else document


class Lane:
    """Pack one lane's documents, end to end, into sequences that share one token with the next."""

    def __init__(self, chunks: ChunkSequence, number: int, lanes: int, cursor: Cursor) -> None:
        """Start at a cursor; nothing is read before the first sequence is asked for."""
        self._chunks = chunks
        self._number = number
        self._num_lanes = lanes
        self.cursor = cursor
        self._open_chunk: int | None = None
        self._documents: list[str] | list[np.ndarray] = []
        self._open_document: tuple[int, int] | None = None
        self._tokens: np.ndarray = np.zeros(0, np.int32)

    def fill(self, row: np.ndarray) -> None:
        """Write the next sequence into ``row`` (integers [sequence_length + 1]) and move the cursor."""
        filled, cursor = 0, self.cursor
        while True:
            tokens = self._current_document()
            count = min(len(row) - filled, len(tokens) - cursor.token)
            row[filled : filled + count] = tokens[cursor.token : cursor.token + count]
            filled += count
            cursor.token += count
            if filled == len(row):
                cursor.token -= 1  # the last token is only a target here, and the next sequence's first input
                return

    def _current_document(self) -> np.ndarray:
        """Return the tokens of the document under the cursor, moving past what is used up."""
        cursor = self.cursor
        while True:
            if self._open_chunk != cursor.chunk:
                self._documents = self._chunks.read(self._number + cursor.chunk * self._num_lanes)
                self._open_chunk = cursor.chunk
            if cursor.document >= len(self._documents):
                cursor.chunk, cursor.document, cursor.token = cursor.chunk + 1, 0, 0
                continue
            if self._open_document != (cursor.chunk, cursor.document):
                self._tokens = self._chunks.tokenize(self._documents[cursor.document])
                self._open_document = (cursor.chunk, cursor.document)
            if cursor.token < len(self._tokens):
                return self._tokens
            cursor.document, cursor.token = cursor.document + 1, 0


@dataclass(frozen=True)
class SampleGroup:
    """Hold consecutive samples of some lanes, each with the cursor that its lane has after it.

    ``ids`` int64 [num_samples]; ``cursors`` int64 [num_samples, 3]; ``tokens`` integers
    [num_samples, sequence_length + 1].
    """

    ids: np.ndarray
    cursors: np.ndarray
    tokens: np.ndarray

    def take(self, count: int) -> tuple[SampleGroup, SampleGroup]:
        """Split into the first ``count`` samples and the rest."""
        return (
            SampleGroup(self.ids[:count], self.cursors[:count], self.tokens[:count]),
            SampleGroup(self.ids[count:], self.cursors[count:], self.tokens[count:]),
        )


class LaneGroup:
    """Read some of a run's lanes in the order of the global sample ids."""

    def __init__(
        self,
        chunks: ChunkSequence,
        cursors: dict[int, Cursor],
        *,
        lanes: int,
        position: int,
        sequence_length: int,
        dtype: np.dtype,
    ) -> None:
        """Start at global sample ``position`` (a multiple of ``lanes``) with a cursor for each lane read."""
        assert position % lanes == 0 and cursors
        self._lanes = [(number, Lane(chunks, number, lanes, cursors[number])) for number in sorted(cursors)]
        self._num_lanes = lanes
        self._cycle = position // lanes
        self._next = 0
        self._sequence_length = sequence_length
        self._dtype = dtype

    def read(self, count: int) -> SampleGroup:
        """Return the next ``count`` samples of these lanes."""
        ids = np.empty(count, np.int64)
        cursors = np.empty((count, CURSOR_COLUMNS), np.int64)
        tokens = np.empty((count, self._sequence_length + 1), self._dtype)
        for row in range(count):
            number, lane = self._lanes[self._next]
            ids[row] = self._cycle * self._num_lanes + number
            lane.fill(tokens[row])
            cursors[row] = lane.cursor.chunk, lane.cursor.document, lane.cursor.token
            self._next += 1
            if self._next == len(self._lanes):
                self._next, self._cycle = 0, self._cycle + 1
        return SampleGroup(ids, cursors, tokens)


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the narrowest unsigned type that holds every token, for passing between processes."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def check_tokenizer(shard_set: ShardSet, tokenizer: Tokenizer) -> None:
    """Refuse token blocks that another tokenizer made."""
    if shard_set.kind == TOKENS_KIND and shard_set.tokenizer_sha256 != tokenizer.sha256:
        raise DataConfigError(
            f"{shard_set.directory} was tokenised with tokenizer {str(shard_set.tokenizer_sha256)[:12]}, got "
            f"{tokenizer.path} ({tokenizer.sha256[:12]}); give that one, or prepare the text again"
        )


def data_fingerprint(shard_sets: Sequence[ShardSet], tokenizer: Tokenizer) -> str:
    """Hash what decides the documents, their order and their tokens."""
    parts = [*(shard_set.fingerprint for shard_set in shard_sets), tokenizer.sha256]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
