"""Stream training batches: the same samples in the same order for any number of readers and workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .division import samples_per_reader
from .errors import DataConfigError
from .lanes import SampleGroup, token_dtype
from .position import StreamPosition
from .stream_settings import OpenedSources, StreamSettings
from .worker import LaneTask, LocalReader, WorkerReader


@dataclass(frozen=True)
class StreamBatch:
    """Hold one reader's share of a global batch.

    ``tokens`` int32 [num_samples, sequence_length + 1], by the length of these samples; ``weights`` uint8 [num_samples,
    sequence_length], 1 where the prediction of ``tokens[:, 1:]`` counts; ``starts`` bool [num_samples,
    sequence_length], true where a document begins; ``ids`` int64 [num_samples], the global sample ids; ``sources``
    int64 [num_samples], the number of the source of each; ``lengths`` int64 [num_samples], how many of a row's tokens
    are there. Filler samples come last:
    id and source -1, weights and length 0.
    """

    tokens: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    ids: np.ndarray
    sources: np.ndarray
    lengths: np.ndarray


COUNTERS = ("retries", "cache_hits", "bytes_read", "bad_chunks")


class TokenStream:
    """Deliver a reader's share of each global batch, endlessly, from shards of text or token blocks.

    Global batch ``t`` is the samples ``[t * global_batch, (t + 1) * global_batch)``. A reader owns the lanes
    that are congruent to its number modulo the number of readers, and shares them among its workers.
    """

    def __init__(
        self,
        settings: StreamSettings,
        *,
        global_batch: int,
        reader: int,
        num_readers: int,
        workers: int = 1,
        state: dict[str, Any] | None = None,
        opened: OpenedSources | None = None,
    ) -> None:
        """Open the shards and start the workers, at the beginning or where ``state`` says.

        ``state`` comes from ``state()`` of the only reader or from ``position.merge_states`` of all; ``opened`` are
        the settings' sources, where they were opened already.

        Raises DataConfigError for input that the user has to change, among it a state of other data, and
        DataError for damaged shards.
        """
        if not 0 <= reader < num_readers:
            raise DataConfigError(f"reader is {reader}; it must be 0 to {num_readers - 1}")
        if workers < 0:
            raise DataConfigError(f"workers is {workers}; 0 or more are needed")
        self._settings, self._global_batch, self._num_readers = settings, global_batch, num_readers
        opened = opened or OpenedSources(settings)
        self._pad, self._dtype = opened.tokenizer.pad, token_dtype(opened.tokenizer.vocab_size)
        self.num_bytes = opened.num_bytes
        own_lanes = np.arange(reader, settings.lanes, num_readers)
        self._position = StreamPosition(
            settings, opened.fingerprints, opened.tokenizer.sha256, own_lanes, is_first=reader == 0
        )
        if state is not None:
            self._position.restore(state)
        self._samples = np.zeros(len(settings.sources), np.int64)
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._news: list[dict[str, Any]] = []
        self._readers: list[tuple[LocalReader | WorkerReader, int]] = []  # and how many lanes each has
        try:
            self._start_readers(opened, own_lanes, workers)
        except BaseException:
            self.close()
            raise

    @property
    def position(self) -> int:
        """Return the number of global samples handed out by all readers together."""
        return self._position.sample

    @property
    def samples(self) -> list[int]:
        """Return the samples of each source that were handed out: the first reader's are those of all at a resume."""
        return self._position.samples.tolist()

    @property
    def bad_chunks(self) -> dict[tuple[int, int], int]:
        """Return the chunks in quarantine that this reader knows of, (source, chunk) -> bytes."""
        return dict(self._position.bad_chunks)

    @property
    def changes(self) -> list[str]:
        """Tell what the restored state did not have, and what it had besides: sources added and left out."""
        return self._position.changes

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Return the process ids of the workers."""
        return tuple(reader.pid for reader, _ in self._readers if isinstance(reader, WorkerReader))

    def next_batch(self, global_batch: int | None = None) -> StreamBatch:
        """Return this reader's share of the next global batch, sorted by global sample id, then filler.

        ``global_batch``, a multiple of the lanes, takes the place of the stream's own for this once. A batch ends where
        rows get longer, or before.

        Raises DataConfigError for a batch over that border, and
        DataError where a chunk is damaged or a worker died; the stream cannot be used afterwards.
        """
        global_batch = self._global_batch if global_batch is None else global_batch
        lanes = self._settings.lanes
        num_samples = samples_per_reader(global_batch, self._num_readers, lanes)
        change = self._settings.row_lengths.next_change(self.position)
        if change is not None and self.position + global_batch > change:
            raise DataConfigError(
                f"a batch of {global_batch} from sample {self.position:,} on holds rows of two lengths; "
                f"end it at sample {change:,}"
            )
        length = self._settings.row_lengths.at(self.position)
        try:
            groups = [reader.read(count * (global_batch // lanes)) for reader, count in self._readers]
        except BaseException:
            self.close()
            raise
        if not groups:
            self._position.sample += global_batch
            return self._fill(None, num_samples, length)
        group = SampleGroup.join(groups)
        assert self.position <= group.ids.min() and group.ids.max() < self.position + global_batch
        batch = self._fill(group, num_samples, length)
        self._position.advance(group, global_batch)
        self._count(group)
        return batch

    def take_counts(self) -> tuple[np.ndarray, dict[str, int]]:
        """Return what was handed out and met since the last call.

        That is the samples of each source, int64 [num_sources], and by name (``COUNTERS``) the reads tried again, the
        chunks that the cache had, the bytes read from the places themselves, and the chunks put into quarantine.
        """
        samples, counts = self._samples, self._counts
        self._samples, self._counts = np.zeros_like(samples), dict.fromkeys(COUNTERS, 0)
        return samples, counts

    def take_news(self) -> list[dict[str, Any]]:
        """Return the chunks put into quarantine since the last call: source's number, chunk, bytes, problem."""
        news, self._news = self._news, []
        return news

    def state(self) -> dict[str, Any]:
        """Return what resuming needs: this reader's part, which counts only samples handed out. JSON-able."""
        return self._position.state()

    def close(self) -> None:
        """End the workers."""
        for reader, _ in self._readers:
            reader.close()
        self._readers = []

    def _fill(self, group: SampleGroup | None, num_samples: int, length: int) -> StreamBatch:
        """Lay samples out in the order of their ids, with filler after them."""
        tokens = np.full((num_samples, length + 1), self._pad, np.int32)
        weights = np.zeros((num_samples, length), np.uint8)
        starts = np.zeros((num_samples, length + 1), np.bool_)
        ids, sources = np.full(num_samples, -1, np.int64), np.full(num_samples, -1, np.int64)
        lengths = np.zeros(num_samples, np.int64)
        if group is not None:
            real = len(group.ids)
            # one worker gives them in order, and a slice spares a copy of all tokens
            sorted_already = bool((np.diff(group.ids) > 0).all())
            order = slice(None) if sorted_already else np.argsort(group.ids, kind="stable")
            ids[:real], sources[:real] = group.ids[order], group.sources[order]
            tokens[:real] = group.tokens[order]
            weights[:real] = 1
            rank = np.empty(real, np.int64)
            rank[order] = np.arange(real)
            starts[np.repeat(rank, group.num_starts), group.starts] = True
            lengths[:real] = group.lengths[order]
            for row in np.flatnonzero(lengths[:real] <= length):
                there = int(lengths[row])
                tokens[row, there:] = self._pad
                weights[row, max(0, there - 1) :] = 0
            if self._settings.mask_document_start:
                weights[:real][starts[:real, 1:]] = 0
        return StreamBatch(tokens, weights, starts[:, :-1], ids, sources, lengths)

    def _count(self, group: SampleGroup) -> None:
        self._samples += np.bincount(group.sources, minlength=len(self._samples))
        for item in group.news:
            if "chunk" not in item:
                for name, count in item.items():
                    self._counts[name] += count
                continue
            key = item["source"], item["chunk"]
            if key not in self._position.bad_chunks:  # another worker may have met it in another epoch
                self._position.bad_chunks[key] = item["bytes"]
                self._counts["bad_chunks"] += 1
                self._news.append(item)

    def _start_readers(self, opened: OpenedSources, own_lanes: np.ndarray, workers: int) -> None:
        num_groups = min(max(workers, 1), len(own_lanes))
        for number in range(num_groups):
            lanes = tuple(int(lane) for lane in own_lanes[number::num_groups])
            task = LaneTask(
                settings=self._settings,
                fingerprints=opened.fingerprints,
                position=self.position,
                own_lanes=lanes,
                cursors=self._position.cursors_of(lanes),
                bad_chunks=tuple((*key, size) for key, size in sorted(self._position.bad_chunks.items())),
                samples_per_batch=len(lanes) * (self._global_batch // self._settings.lanes),
            )
            reader = WorkerReader(task, self._dtype, number) if workers else LocalReader(opened, task)
            self._readers.append((reader, len(lanes)))
