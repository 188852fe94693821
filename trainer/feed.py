"""A run's training data on one rank: its reader's stream, where it reads, and what all readers have met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..data.mixing import SourceSettings
from ..data.position import content_differences, merge_states
from ..data.quarantine import check_bad_bytes
from ..data.stream import COUNTERS, TokenStream
from ..data.stream_settings import OpenedSources, StreamSettings
from ..data.tasks.task import Task
from .batch import model_fields, share
from .config import ResolvedRun
from .places import DataPlaces, tasks_of
from .runtime import Runtime


class Feed:
    """Hands every rank of a model replica the same samples, and counts over all replicas."""

    def __init__(self, resolved: ResolvedRun, places: DataPlaces, runtime: Runtime) -> None:
        """Open the sources on the rank that reads for its replica; `start` comes before the first `read`."""
        self._resolved, self._runtime = resolved, runtime
        self._tasks = tasks_of(resolved.run, places.tokenizer)
        self._settings = stream_settings(resolved, places, self._tasks)
        self._names = [source.name for source in self._settings.sources]
        self._opened = OpenedSources(self._settings) if runtime.reads_data else None
        self._stream: TokenStream | None = None

    def differences(self, state: dict[str, Any]) -> list[str]:
        """List the sources whose content is not what a position (of `state()`) knows; the same on every rank."""
        found = content_differences(self._names, self._opened.fingerprints, state) if self._opened else []
        return self._runtime.broadcast(found)  # type: ignore[no-any-return]

    def start(self, state: dict[str, Any] | None = None, *, workers: int) -> None:
        """Begin to read at the beginning, or where `state` (of `state()`) says."""
        runtime = self._runtime
        if self._opened is not None:
            self._stream = TokenStream(
                self._settings,
                global_batch=max(
                    phase.global_batch for phase in self._resolved.batches.phases
                ),  # to read ahead for
                reader=runtime.dp_rank,
                num_readers=runtime.dp_size,
                workers=workers,
                state=state,
                opened=self._opened,
            )
        # The first reader's position knows sources that have another name now, and counts for all.
        known = (
            (self._stream.samples, self._stream.bad_chunks, self._stream.num_bytes) if self._stream else None
        )
        self._samples, self._bad_chunks, self._num_bytes = runtime.broadcast(known)
        self._counts = dict.fromkeys(COUNTERS, 0)

    @property
    def changes(self) -> list[str]:
        """What the restored position did not know of the sources, on the rank that reads for the first replica."""
        return self._stream.changes if self._stream is not None else []

    def read(self, step: int) -> dict[str, Tensor]:
        """Give the fields of a step's samples on this rank; see batch.py."""
        batches = self._resolved.batches
        global_batch, task = batches.global_batch(step), self._tasks[batches.sequence_length(step)]
        batch = self._stream.next_batch(global_batch) if self._stream is not None else None
        fields = share(
            task.arrays(batch) if batch else None,
            task.widths,
            self._resolved.samples_per_rank(global_batch),
            self._runtime,
        )
        return model_fields(fields, documents_apart=self._resolved.run.data.attention == "document")

    def take_counts(self) -> list[float]:
        """Give what this rank's reader counted since the last call, to be added up over all ranks."""
        if self._stream is None:
            return [0.0] * (len(self._names) + len(COUNTERS))
        samples, counts = self._stream.take_counts()
        return [*map(float, samples), *(float(counts[name]) for name in COUNTERS)]

    def add_counts(self, counts: Sequence[float]) -> list[dict[str, Any]]:
        """Take the sums over all ranks; return the chunks that are new in quarantine, of all readers.

        Raises:
            DataError: on every rank, where more than `reading.max_bad_fraction` of the bytes is in quarantine.
        """
        for number in range(len(self._names)):
            self._samples[number] += int(counts[number])
        met = dict(zip(COUNTERS, map(int, counts[len(self._names) :]), strict=True))
        for name, count in met.items():
            self._counts[name] += count
        if not met["bad_chunks"]:
            return []
        found = self._runtime.gather_all(self._stream.take_news() if self._stream is not None else [])
        news = []
        for item in (item for items in found for item in items):
            key = item["source"], item["chunk"]
            if key not in self._bad_chunks:  # several readers may come to a chunk, in epochs of their own
                self._bad_chunks[key] = item["bytes"]
                news.append({**item, "source": self._names[item["source"]]})
        if news:
            limit = self._resolved.run.reading.max_bad_fraction
            check_bad_bytes(sum(self._bad_chunks.values()), self._num_bytes, limit, news[-1]["problem"])
        return news

    def record(self) -> dict[str, Any]:
        """Give the figures of the run so far for a line of metrics; shares only where there are several sources."""
        record: dict[str, Any] = {
            "data_bytes_read": self._counts["bytes_read"],
            "data_retries": self._counts["retries"],
            "data_cache_hits": self._counts["cache_hits"],
            "data_bad_chunks": len(self._bad_chunks),
            "data_bad_bytes": sum(self._bad_chunks.values()),
        }
        if len(self._names) > 1:
            total = max(1, sum(self._samples))
            record["data_shares"] = {
                name: samples / total for name, samples in zip(self._names, self._samples, strict=True)
            }
        return record

    def state(self) -> dict[str, Any]:
        """Give the position of all readers together; every rank calls this."""
        parts = self._runtime.gather_all(self._stream.state() if self._stream is not None else None)
        return merge_states([part for part in parts if part is not None])

    def close(self) -> None:
        """Stop the readers."""
        if self._stream is not None:
            self._stream.close()


def stream_settings(resolved: ResolvedRun, places: DataPlaces, tasks: Mapping[int, Task]) -> StreamSettings:
    """Say what a run streams for its tasks, which are by sequence length."""
    run, data = resolved.run, resolved.run.data
    task = tasks[data.sequence_length]
    sources = tuple(
        SourceSettings(name, found, source.weight if source else None, source.epochs if source else None)
        for name, found in places.train.items()
        for source in (data.sources.get(name),)
    )
    return StreamSettings(
        sources=sources,
        tokenizer=str(places.tokenizer.resolve()),
        sequence_length=task.row_tokens,
        lanes=resolved.lanes,
        seed=run.run.seed,
        packing=task.packing,
        mask_document_start=data.mask_document_start,
        temperature=data.temperature,
        phases=tuple((end, dict(row.weights)) for end, row in zip(resolved.mix_ends, data.mix, strict=True)),
        reading=run.reading.model_dump(),
        short_fraction=run.task.short_fraction,
        lengths=tuple((end, tasks[length].row_tokens) for end, length in resolved.batches.length_ends),
    )
