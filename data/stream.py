"""Stream training batches: the same samples in the same order for any number of readers and workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .division import num_lanes, samples_per_reader
from .errors import DataConfigError
from .lanes import ChunkSequence, data_fingerprint, token_dtype
from .shards import open_filled_shard_set
from .tokenizer import Tokenizer
from .worker import LaneTask, LocalReader, WorkerReader

STATE_VERSION = 1
# what has to be equal for a state to be taken up, and how a message calls it
STATE_IDENTITY = {
    "version": "state version",
    "fingerprint": "data and tokenizer (fingerprint)",
    "seed": "seed",
    "sequence_length": "sequence length",
    "num_lanes": "lanes (from the global batch)",
}


@dataclass(frozen=True)
class StreamBatch:
    """Hold one reader's share of a global batch.

    ``tokens`` int32 [num_samples, sequence_length + 1]; ``weights`` uint8 [num_samples, sequence_length],
    1 where the prediction of ``tokens[:, 1:]`` counts; ``ids`` int64 [num_samples], the global sample ids.
    Filler samples come last: id -1, weights 0.
    """

    tokens: np.ndarray
    weights: np.ndarray
    ids: np.ndarray


class TokenStream:
    """Deliver a reader's share of each global batch, endlessly, from shards of text or token blocks.

    Global batch ``t`` is the samples ``[t * global_batch, (t + 1) * global_batch)``. A reader owns the lanes
    that are congruent to its number modulo the number of readers, and shares them among its workers.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        tokenizer: Path,
        *,
        sequence_length: int,
        global_batch: int,
        seed: int,
        reader: int,
        num_readers: int,
        lanes: int | None = None,
        workers: int = 1,
        mask_document_start: bool = False,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Open the shards and start the workers, at the beginning or where ``state`` says.

        ``lanes`` divides every global batch of the run; by default as many as ``global_batch`` allows.
        ``mask_document_start`` gives weight 0 to predicting a document's first token. ``state`` comes from
        ``state()`` of the only reader or from ``merge_states`` of all.

        Raises DataConfigError for input that the user has to change, among it a state of other data, and
        DataError for damaged shards.
        """
        if not directories:
            raise DataConfigError("no shard directories; give at least one in data.train")
        if not 0 <= reader < num_readers:
            raise DataConfigError(f"reader is {reader}; it must be 0 to {num_readers - 1}")
        if sequence_length < 1 or workers < 0:
            raise DataConfigError(
                f"sequence length is {sequence_length} and workers {workers}; at least 1 and 0 are needed"
            )
        self._num_lanes = num_lanes(global_batch) if lanes is None else lanes
        self._num_readers, self._global_batch = num_readers, global_batch
        self._sequence_length = sequence_length
        self._seed = seed
        self._mask_document_start = mask_document_start
        self._tokenizer = Tokenizer(tokenizer)
        shard_sets = [open_filled_shard_set(Path(directory)) for directory in directories]
        chunks = ChunkSequence(shard_sets, self._tokenizer, seed)
        self.fingerprint = data_fingerprint(shard_sets, self._tokenizer)
        self._own_lanes = np.arange(reader, self._num_lanes, num_readers)
        self._cursors = np.zeros((len(self._own_lanes), 3), np.int64)
        self._position = 0
        if state is not None:
            self._restore(state)
        self._readers: list[tuple[LocalReader | WorkerReader, int]] = []  # and how many lanes each has
        paths = tuple(str(Path(directory).resolve()) for directory in directories)
        try:
            self._start_readers(chunks, paths, str(Path(tokenizer).resolve()), workers)
        except BaseException:
            self.close()
            raise

    @property
    def position(self) -> int:
        """Return the number of global samples handed out by all readers together."""
        return self._position

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Return the process ids of the workers."""
        return tuple(reader.pid for reader, _ in self._readers if isinstance(reader, WorkerReader))

    def next_batch(self, global_batch: int | None = None) -> StreamBatch:
        """Return this reader's share of the next global batch, sorted by global sample id, then filler.

        ``global_batch``, a multiple of the lanes, takes the place of the stream's own for this once.

        Raises DataError where a chunk is damaged or a worker died; the stream cannot be used afterwards.
        """
        global_batch = self._global_batch if global_batch is None else global_batch
        num_samples = samples_per_reader(global_batch, self._num_readers, self._num_lanes)
        try:
            groups = [reader.read(lanes * (global_batch // self._num_lanes)) for reader, lanes in self._readers]
        except BaseException:
            self.close()
            raise
        tokens = np.full((num_samples, self._sequence_length + 1), self._tokenizer.pad, np.int32)
        weights = np.zeros((num_samples, self._sequence_length), np.uint8)
        ids = np.full(num_samples, -1, np.int64)
        if groups:
            found = np.concatenate([group.ids for group in groups])
            order = np.argsort(found, kind="stable")
            real = len(found)
            ids[:real] = found[order]
            tokens[:real] = np.concatenate([group.tokens for group in groups])[order]
            weights[:real] = 1
            if self._mask_document_start:
                weights[:real] = tokens[:real, 1:] != self._tokenizer.bos
            # each lane's newest cursor stands in the last cycle, which is one row for each lane, in order
            cursors = np.concatenate([group.cursors for group in groups])[order]
            self._cursors = cursors[real - len(self._own_lanes) :]
            assert np.array_equal(ids[real - len(self._own_lanes) : real] % self._num_lanes, self._own_lanes)
            assert self._position <= ids[0] and ids[real - 1] < self._position + global_batch
        self._position += global_batch
        return StreamBatch(tokens, weights, ids)

    def state(self) -> dict[str, Any]:
        """Return what resuming needs: this reader's part, which counts only samples handed out. JSON-able."""
        return {
            **self._identity(),
            "position": self._position,
            "cursors": [
                [int(lane), *map(int, cursor)]
                for lane, cursor in zip(self._own_lanes, self._cursors, strict=True)
            ],
        }

    def close(self) -> None:
        """End the workers."""
        for reader, _ in self._readers:
            reader.close()
        self._readers = []

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "seed": self._seed,
            "sequence_length": self._sequence_length,
            "num_lanes": self._num_lanes,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        differences = [
            f"{STATE_IDENTITY[key]}: the checkpoint has {_short(state.get(key))}, this run {_short(value)}"
            for key, value in self._identity().items()
            if state.get(key) != value
        ]
        if differences:
            raise DataConfigError(
                f"the data position cannot be taken up: {'; '.join(differences)}; use the same values, or start "
                "a new run"
            )
        cursors = {row[0]: row[1:] for row in state["cursors"]}
        missing = [int(lane) for lane in self._own_lanes if lane not in cursors]
        if missing or state["position"] % self._num_lanes:
            raise DataConfigError(
                f"the data position holds {len(cursors)} of {self._num_lanes} lanes (missing: {missing[:8]}); "
                "merge the states of all readers first"
            )
        self._position = int(state["position"])
        self._cursors = np.array([cursors[lane] for lane in self._own_lanes], np.int64).reshape(-1, 3)

    def _start_readers(
        self, chunks: ChunkSequence, directories: tuple[str, ...], tokenizer: str, workers: int
    ) -> None:
        dtype = token_dtype(self._tokenizer.vocab_size)
        num_groups = min(max(workers, 1), len(self._own_lanes))
        for number in range(num_groups):
            rows = range(number, len(self._own_lanes), num_groups)
            task = LaneTask(
                directories=directories,
                tokenizer=tokenizer,
                fingerprint=self.fingerprint,
                seed=self._seed,
                lanes=self._num_lanes,
                position=self._position,
                sequence_length=self._sequence_length,
                cursors=tuple((int(self._own_lanes[row]), *map(int, self._cursors[row])) for row in rows),  # type: ignore[misc]
                samples_per_batch=len(rows) * (self._global_batch // self._num_lanes),
            )
            reader = WorkerReader(task, dtype, number) if workers else LocalReader(chunks, task, dtype)
            self._readers.append((reader, len(rows)))


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the states of all readers into one that any number of readers can go on from.

    Raises DataConfigError where they are of different runs or positions, or lanes are missing.
    """
    if not states:
        raise DataConfigError("no data positions to merge; give the state of every reader")
    first = states[0]
    cursors: dict[int, list[int]] = {}
    for state in states:
        differing = [key for key in (*STATE_IDENTITY, "position") if state.get(key) != first.get(key)]
        if differing:
            key = differing[0]
            raise DataConfigError(
                f"the readers' data positions differ in {', '.join(differing)} ({key}: {_short(first.get(key))} and "
                f"{_short(state.get(key))}); merge states that were taken together"
            )
        for lane, *cursor in state["cursors"]:
            if cursors.setdefault(lane, cursor) != cursor:
                raise DataConfigError(
                    f"two readers claim lane {lane} at different places; give each state once"
                )
    missing = sorted(set(range(first["num_lanes"])) - set(cursors))
    if missing:
        raise DataConfigError(
            f"the data positions hold {len(cursors)} of {first['num_lanes']} lanes (missing: {missing[:8]}); "
            "merge the states of all readers"
        )
    return {**first, "cursors": [[lane, *cursors[lane]] for lane in sorted(cursors)]}


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 16 else repr(value)
