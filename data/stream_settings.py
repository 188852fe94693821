"""What decides a stream's samples, and how a process opens what it names."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .config import ReadingConfig
from .errors import DataConfigError, DataError
from .lanes import PACKINGS, Source, data_fingerprint
from .lengths import RowLengths
from .mixing import Mix, MixPhase, SourceSettings, comparable_sizes, mix_weights
from .quarantine import Quarantine
from .reading.reader import RangeReader
from .shards import open_filled_shard_set
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class StreamSettings:
    """Say what is streamed. JSON-able by ``dataclasses.asdict``.

    ``lanes`` divides every global batch. ``phases`` are rows ``(first sample that they no longer rule, weights by
    source name)`` of the mix before the sources' own weights begin. ``mask_document_start`` gives weight 0 to
    predicting a document's first token; ``packing`` is one of lanes.PACKINGS, and ``short_fraction`` is that of its
    sentence pairs (tasks/sentences.py). ``lengths`` are rows ``(first sample that they no longer rule, tokens)`` of
    shorter sequences before those of ``sequence_length`` begin; they grow, and change between two rounds of the lanes.
    """

    sources: tuple[SourceSettings, ...]
    tokenizer: str
    sequence_length: int
    lanes: int
    seed: int
    packing: str = "split"
    mask_document_start: bool = False
    temperature: float | None = None
    phases: tuple[tuple[int, dict[str, float]], ...] = ()
    reading: dict[str, Any] = field(default_factory=dict)
    short_fraction: float = 0.1
    lengths: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of_json(values: dict[str, Any]) -> StreamSettings:
        """Make it from ``asdict`` once it went through JSON."""
        sources = tuple(
            SourceSettings(**{**source, "places": tuple(source["places"])}) for source in values["sources"]
        )
        phases = tuple((int(until), weights) for until, weights in values["phases"])
        lengths = tuple((int(until), int(tokens)) for until, tokens in values["lengths"])
        return StreamSettings(**{**values, "sources": sources, "phases": phases, "lengths": lengths})

    @property
    def row_lengths(self) -> RowLengths:
        """Return how long the rows of every sample are."""
        return RowLengths(self.lengths, self.sequence_length)

    def check(self) -> None:
        """Raise DataConfigError for what cannot be meant."""
        if not self.sources or not all(source.places for source in self.sources):
            raise DataConfigError("no shard directories; give at least one in data.train")
        if self.packing not in PACKINGS:
            raise DataConfigError(f"packing is {self.packing!r}; it is one of {', '.join(PACKINGS)}")
        if self.sequence_length < 1 or self.lanes < 1:
            raise DataConfigError(
                f"sequence length is {self.sequence_length} and lanes {self.lanes}; at least 1 is needed of each"
            )
        changes = [0, *(until for until, _ in self.lengths)]
        tokens = [*(tokens for _, tokens in self.lengths), self.sequence_length]
        if not (_grow(changes) and _grow(tokens) and tokens[0] > 0) or any(
            until % self.lanes for until in changes
        ):
            raise DataConfigError(
                f"lengths are {list(self.lengths)} before {self.sequence_length}; samples and tokens must grow from "
                f"row to row, and the samples be multiples of the {self.lanes} lanes"
            )


def _grow(numbers: Sequence[int]) -> bool:
    return all(one < other for one, other in pairwise(numbers))


class OpenedSources:
    """A stream's sources as one process reads them."""

    def __init__(self, settings: StreamSettings) -> None:
        """Open every manifest. Raises DataConfigError for input to change, DataError for damage."""
        settings.check()
        reading = ReadingConfig(**settings.reading)
        self.tokenizer = Tokenizer(Path(settings.tokenizer))
        self.reader = RangeReader(reading)
        pool = ThreadPoolExecutor(reading.threads, "read-ahead")  # its threads start on use
        shard_sets = [
            [open_filled_shard_set(place, self.reader) for place in source.places]
            for source in settings.sources
        ]
        self.num_bytes = sum(shard_set.num_bytes for sets in shard_sets for shard_set in sets)
        self.quarantine = Quarantine(reading, self.num_bytes)
        self.sources = [
            Source(sets, self.tokenizer, settings.seed, number=number, quarantine=self.quarantine, pool=pool)
            for number, sets in enumerate(shard_sets)
        ]
        self.fingerprints = tuple(data_fingerprint(sets) for sets in shard_sets)
        self.mix = Mix(self._phases(settings), settings.seed)

    def check_same(self, fingerprints: Sequence[str]) -> None:
        """Raise DataError where the sources are not what another process found."""
        if list(self.fingerprints) != list(fingerprints):
            raise DataError("the data changed while the run was starting; start it again")

    def _phases(self, settings: StreamSettings) -> list[MixPhase]:
        names = [source.name for source in settings.sources]
        own: tuple[float, ...] = (1.0,)
        if len(names) > 1:
            own = mix_weights(settings.sources, self._sizes(settings, names), settings.temperature)
        firsts = [0, *(until for until, _ in settings.phases)]
        rows = [
            *(tuple(float(weights.get(name, 0.0)) for name in names) for _, weights in settings.phases),
            own,
        ]
        return [MixPhase(first, weights) for first, weights in zip(firsts, rows, strict=True)]

    def _sizes(self, settings: StreamSettings, names: list[str]) -> list[int]:
        if settings.sources[0].weight is not None:
            return [0] * len(names)
        return comparable_sizes(
            [source.num_tokens for source in self.sources],
            [source.text_bytes for source in self.sources],
            names,
        )
