"""Give every training sample its content: lanes over an index.

A run has a fixed number of lanes. Global sample ``i`` belongs to lane ``i mod num_lanes`` and comes from the source
that the mix draws for it. In each source, lane ``l`` takes the chunks ``l, l + num_lanes, l + 2 num_lanes, ...``
of an endless sequence: epoch after epoch, each a fresh permutation. So a sample is a function of the data, the
mix, the seed and ``i`` alone, whatever process reads it, and a lane's place in a source is three integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .errors import DataConfigError, DataError
from .lengths import RowLengths
from .mixing import Mix
from .order import hash_integers, permute_all, permute_index
from .packing import CURSOR_COLUMNS, Cursor, Packer, SplitPacker, Windows, window_chunks
from .parts import PartCutter
from .passages import WINDOW_PACKINGS, SentenceCutter, window_packer
from .quarantine import Quarantine
from .shards import ShardSet
from .tokenizer import Tokenizer

DOCUMENT_ORDER = 1  # sets the keys of document orders apart from those of chunk orders
SEQUENCE_ORDER = 3  # and those of a window's sequences
ROW_ARRAYS = ("ids", "sources", "cursors", "lengths", "num_starts", "tokens")  # of a group of samples
USUAL_TOKEN_BYTES = 4  # of text, where only its size is known
PACKINGS = ("split", *WINDOW_PACKINGS)


class Source:
    """Order the chunks of some shard sets, endlessly, and read their documents as tokens.

    A chunk that cannot be read is an error, or is passed over and remembered: see quarantine.py.
    """

    def __init__(
        self,
        shard_sets: Sequence[ShardSet],
        tokenizer: Tokenizer,
        seed: int,
        *,
        number: int = 0,
        quarantine: Quarantine | None = None,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        """Check that token blocks were made with this tokenizer; raises DataConfigError where not.

        ``number`` is that of the source for ``quarantine``, without which what cannot be read is an error. ``pool``
        reads chunks ahead that lie behind a network.
        """
        for shard_set in shard_sets:
            check_tokenizer(shard_set, tokenizer)
        self._shard_sets, self._seed = shard_sets, seed
        self._number, self.quarantine = number, quarantine
        self.parts = PartCutter(tokenizer)
        self.sentences = SentenceCutter(tokenizer)
        self._pool = pool if any(shard_set.is_remote for shard_set in shard_sets) else None
        self._ahead: dict[int, Future[bytes]] = {}
        self._ends = np.cumsum([shard_set.num_chunks for shard_set in shard_sets])
        self.num_chunks = int(self._ends[-1])

    @property
    def num_tokens(self) -> int | None:
        """Return the tokens of all chunks, None where some hold text."""
        counts = [shard_set.num_tokens for shard_set in self._shard_sets]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def text_bytes(self) -> int | None:
        """Return the bytes of text of all chunks, None where some do not tell."""
        sizes = [shard_set.text_bytes for shard_set in self._shard_sets]
        return sum(sizes) if all(sizes) else None

    @property
    def tokens_per_chunk(self) -> float:
        """Return the mean, from the counts of the manifests."""
        tokens = sum(
            shard_set.num_tokens or shard_set.text_bytes / USUAL_TOKEN_BYTES for shard_set in self._shard_sets
        )
        return tokens / self.num_chunks

    def expect(self, ordinal: int) -> None:
        """Begin to read the chunk at a place of the endless sequence that will be asked for."""
        if self._pool is not None and ordinal not in self._ahead:
            shard_set, chunk = self._locate(self._chunk_at(ordinal))
            self._ahead[ordinal] = self._pool.submit(shard_set.read_chunk, chunk)

    def read(self, ordinal: int) -> Sequence[str] | Sequence[np.ndarray]:
        """Return the documents of the chunk at a place of the endless sequence, in training order.

        Raises DataError for damage, and where too much is in quarantine already.
        """
        number = self._chunk_at(ordinal)
        shard_set, chunk = self._locate(number)
        ahead = self._ahead.pop(ordinal, None)
        try:
            content = shard_set.read_chunk(chunk) if ahead is None else ahead.result()
            documents = shard_set.documents_of(chunk, content)
        except DataConfigError:
            raise
        except DataError as error:
            if self.quarantine is None:
                raise
            self.quarantine.add(self._number, number, int(shard_set.chunks[chunk, 2]), error)
            return []
        epoch = ordinal // self.num_chunks
        order = permute_all(len(documents), hash_integers(self._seed, epoch, number, DOCUMENT_ORDER))
        return [documents[index] for index in order]  # type: ignore[return-value]

    def _chunk_at(self, ordinal: int) -> int:
        epoch, place = divmod(ordinal, self.num_chunks)
        return permute_index(place, self.num_chunks, hash_integers(self._seed, epoch))

    def _locate(self, number: int) -> tuple[ShardSet, int]:
        place = int(np.searchsorted(self._ends, number, side="right"))
        shard_set = self._shard_sets[place]
        return shard_set, number - int(self._ends[place]) + shard_set.num_chunks


class LaneDocuments:
    """The chunks of a source that one lane takes: see packing.Documents."""

    def __init__(self, source: Source, lane: int, num_lanes: int) -> None:
        self._source, self._lane, self._num_lanes = source, lane, num_lanes
        self.cut, self.tokenize, self.num_chunks = source.parts.cut, source.parts.tokenize, source.num_chunks

    def read(self, chunk: int) -> Sequence[str] | Sequence[np.ndarray]:
        """Return the documents of the lane's chunk with this number, in training order."""
        return self._source.read(self._lane + chunk * self._num_lanes)

    def expect(self, chunk: int) -> None:
        """Begin to read a chunk that will be asked for."""
        self._source.expect(self._lane + chunk * self._num_lanes)


@dataclass(frozen=True)
class SampleGroup:
    """Hold consecutive samples of some lanes, each with the cursor that its lane has after it in its source.

    ``ids`` int64 [num_samples]; ``sources`` int64 [num_samples]; ``cursors`` int64 [num_samples, 3]; ``lengths``
    int64 [num_samples], the tokens that are there; ``num_starts`` int64 [num_samples], how many documents begin in
    each, and ``starts`` int64 [sum of these] where; ``tokens`` integers [num_samples, tokens of a row + 1], whose rows
    are of one length. ``news`` is what reading them took, and which chunks were passed over.
    """

    ids: np.ndarray
    sources: np.ndarray
    cursors: np.ndarray
    lengths: np.ndarray
    num_starts: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    news: tuple[dict[str, Any], ...] = ()

    def take(self, count: int) -> tuple[SampleGroup, SampleGroup]:
        """Split into the first ``count`` samples, which get the news, and the rest."""
        cut = int(self.num_starts[:count].sum())
        return (
            self._rows(slice(None, count), self.starts[:cut], self.news),
            self._rows(slice(count, None), self.starts[cut:], ()),
        )

    @staticmethod
    def join(groups: Sequence[SampleGroup]) -> SampleGroup:
        """Put groups one after another."""
        if len(groups) == 1:
            return groups[0]
        arrays = {
            name: np.concatenate([getattr(group, name) for group in groups]) for name in (*ROW_ARRAYS, "starts")
        }
        return SampleGroup(**arrays, news=tuple(item for group in groups for item in group.news))

    def _rows(self, rows: slice, starts: np.ndarray, news: tuple[dict[str, Any], ...]) -> SampleGroup:
        return SampleGroup(**{name: getattr(self, name)[rows] for name in ROW_ARRAYS}, starts=starts, news=news)


class LaneGroup:
    """Read some of a run's lanes in the order of the global sample ids."""

    def __init__(
        self,
        sources: Sequence[Source],
        mix: Mix,
        cursors: Mapping[tuple[int, int], Cursor],
        *,
        own_lanes: Sequence[int],
        num_lanes: int,
        position: int,
        lengths: RowLengths,
        packing: str,
        seed: int,
        dtype: np.dtype,
        short_fraction: float = 0.1,
    ) -> None:
        """Start at global sample ``position`` (a multiple of the lanes).

        ``cursors`` are by (source, lane); where one is missing, that lane has not begun that source.
        """
        assert position % num_lanes == 0 and own_lanes
        self._sources, self._mix, self._cursors = sources, mix, dict(cursors)
        self._own_lanes = sorted(own_lanes)
        self._num_lanes, self._packing, self._seed = num_lanes, packing, seed
        self._packers: dict[tuple[int, int], Packer] = {}
        self._cycle = position // num_lanes
        self._next = 0
        self._lengths = lengths
        self._dtype = dtype
        self._short_fraction = short_fraction
        for lane in self._own_lanes:  # over a network the first chunks come together, not one after another
            source = mix.source_of(position + lane)
            sources[source].expect(lane + self._cursor(source, lane).chunk * num_lanes)

    def read(self, count: int) -> SampleGroup:
        """Return the next ``count`` samples of these lanes, or what is left of them before rows get longer."""
        first = self._cycle * self._num_lanes
        if (change := self._lengths.next_change(first)) is not None:
            rounds = change // self._num_lanes - self._cycle
            count = min(count, rounds * len(self._own_lanes) - self._next)
        ids, sources, lengths, num_starts = (np.empty(count, np.int64) for _ in range(4))
        cursors = np.empty((count, CURSOR_COLUMNS), np.int64)
        tokens = np.empty((count, self._lengths.at(first) + 1), self._dtype)
        starts: list[int] = []
        for row in range(count):
            lane = self._own_lanes[self._next]
            sample = self._cycle * self._num_lanes + lane
            source = self._mix.source_of(sample)
            packer = self._packer(source, lane)
            length, begins = packer.fill(tokens[row])
            tokens[row, length:] = 0
            cursor = packer.cursor
            ids[row], sources[row], lengths[row], num_starts[row] = sample, source, length, len(begins)
            cursors[row] = cursor.chunk, cursor.part, cursor.token
            starts += begins
            self._next += 1
            if self._next == len(self._own_lanes):
                self._next, self._cycle = 0, self._cycle + 1
        return SampleGroup(ids, sources, cursors, lengths, num_starts, np.array(starts, np.int64), tokens)

    def _cursor(self, source: int, lane: int) -> Cursor:
        return self._cursors.setdefault((source, lane), Cursor())

    def _packer(self, source: int, lane: int) -> Packer:
        key = source, lane
        if key not in self._packers:
            documents = LaneDocuments(self._sources[source], lane, self._num_lanes)
            self._packers[key] = self._make_packer(documents, self._sources[source], lane, self._cursor(*key))
        return self._packers[key]

    def _make_packer(self, documents: LaneDocuments, source: Source, lane: int, cursor: Cursor) -> Packer:
        if self._packing == "split":
            return SplitPacker(documents, cursor)
        windows = Windows(
            documents,
            cursor,
            chunks_for=partial(window_chunks, source.tokens_per_chunk),
            key=hash_integers(self._seed, lane, SEQUENCE_ORDER),
            keep_size=bool(self._lengths.phases),
        )
        return window_packer(
            self._packing, windows, sentences=source.sentences, short_fraction=self._short_fraction
        )


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the narrowest unsigned type that holds every token, for passing between processes."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def check_tokenizer(shard_set: ShardSet, tokenizer: Tokenizer) -> None:
    """Refuse token blocks that another tokenizer made, and what holds no text."""
    if not (shard_set.holds_text or shard_set.holds_tokens):
        raise DataConfigError(
            f"{shard_set.place_shown} holds samples without text ({shard_set.kind}); a language model needs text or "
            "tokens"
        )
    if shard_set.holds_tokens and shard_set.tokenizer_sha256 != tokenizer.sha256:
        raise DataConfigError(
            f"{shard_set.place_shown} was tokenised with tokenizer {str(shard_set.tokenizer_sha256)[:12]}, got "
            f"{tokenizer.path} ({tokenizer.sha256[:12]}); give that one, or prepare the text again"
        )


def data_fingerprint(shard_sets: Sequence[ShardSet]) -> str:
    """Hash what decides the documents of a source and their order."""
    return hashlib.sha256("\n".join(shard_set.fingerprint for shard_set in shard_sets).encode()).hexdigest()
