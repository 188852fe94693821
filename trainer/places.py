"""Where a run's data lies, once embedded corpora are prepared and shards without a manifest indexed. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data.builtin import BuiltinCorpus, prepare_builtin
from ..data.config import BUILTIN_PREFIX, DataConfig, ReadingConfig
from ..data.errors import DataConfigError
from ..data.indexing import Indexer
from ..data.reading.reader import RangeReader
from ..data.tasks.task import Task, make_task
from ..data.tokenizer import Tokenizer
from .config import ResolvedRun, RunConfig
from .errors import ConfigError

ONLY_SOURCE = "train"  # the name of the source where data.train names the shards
Log = Callable[[str], None]


@dataclass(frozen=True)
class DataPlaces:
    """Shard directories with manifests, by source and by held-out set, and the tokenizer of a run."""

    train: dict[str, tuple[str, ...]]
    heldout: dict[str, str]
    tokenizer: Path


class _Locator:
    """Finds what a `[data]` section names; what has to be made for it goes into the cache on first use."""

    def __init__(self, data: DataConfig, reading: ReadingConfig, cache_dir: Path, log: Log) -> None:
        self._data, self._cache_dir, self._log = data, cache_dir, log
        self._reader = RangeReader(reading)
        self._corpora: dict[str, BuiltinCorpus] = {}
        self._indexer: Indexer | None = None
        self.problems: list[str] = []

    def _builtin(self, place: str, part: Literal["train", "heldout", "tokenizer"]) -> Path:
        if place not in self._corpora:
            self._corpora[place] = prepare_builtin(place, self._cache_dir, self._log)
        found: Path = getattr(self._corpora[place], part)
        return found

    def _shards(self, place: str, part: Literal["train", "heldout"], tokenizer: Path) -> str:
        if place.startswith(BUILTIN_PREFIX):
            return str(self._builtin(place, part))
        try:
            return self._indexer_for(tokenizer).indexed(place)
        except DataConfigError as error:
            self.problems.append(str(error))
            return place

    def _indexer_for(self, tokenizer: Path) -> Indexer:
        if self._indexer is None:
            loaded = Tokenizer(tokenizer) if tokenizer.exists() else None
            self._indexer = Indexer(self._cache_dir / "indexes", self._reader, loaded, log=self._log)
        return self._indexer

    def train(self, tokenizer: Path) -> dict[str, tuple[str, ...]]:
        named = {name: source.path for name, source in self._data.sources.items()} or {
            ONLY_SOURCE: self._data.places
        }
        return {
            name: tuple(self._shards(place, "train", tokenizer) for place in places)
            for name, places in named.items()
        }

    def heldout(self, tokenizer: Path) -> dict[str, str]:
        return {name: self._shards(place, "heldout", tokenizer) for name, place in self._data.heldout.items()}

    def tokenizer(self) -> Path:
        place = self._data.tokenizer
        found = self._builtin(place, "tokenizer") if place.startswith(BUILTIN_PREFIX) else Path(place)
        if not found.exists():
            self.problems.append(f"{found} is not there; make one with `basestone tokenizer train`")
        return found


def locate(data: DataConfig, reading: ReadingConfig, cache_dir: Path, log: Log = lambda _: None) -> DataPlaces:
    """Turn the `[data]` section into places, preparing and indexing into the cache on first use.

    Raises:
        DataConfigError: listing everything that is not there.
    """
    locator = _Locator(data, reading, cache_dir, log)
    tokenizer = locator.tokenizer()
    places = DataPlaces(locator.train(tokenizer), locator.heldout(tokenizer), tokenizer)
    _refuse(locator.problems)
    return places


def locate_heldout(
    data: DataConfig, reading: ReadingConfig, cache_dir: Path, tokenizer: Path
) -> dict[str, str]:
    """Give the held-out sets alone, by name: what the run was trained on need not be there any more.

    Raises:
        DataConfigError: listing every one that is not there.
    """
    locator = _Locator(data, reading, cache_dir, lambda _: None)
    heldout = locator.heldout(tokenizer)
    _refuse(locator.problems)
    return heldout


def locate_tokenizer(data: DataConfig, reading: ReadingConfig, cache_dir: Path) -> Path:
    """Give the tokenizer alone: what the run trains on need not be there.

    Raises:
        DataConfigError: it is not there.
    """
    locator = _Locator(data, reading, cache_dir, lambda _: None)
    tokenizer = locator.tokenizer()
    _refuse(locator.problems)
    return tokenizer


def open_run(
    run: RunConfig, world_size: int, cache_dir: Path, log: Log = lambda _: None
) -> tuple[ResolvedRun, DataPlaces]:
    """Find what a run names and derive everything from it, before anything starts.

    Raises:
        ConfigError, DataConfigError: listing what is not there, does not go together, or lacks what the task needs.
    """
    places = locate(run.data, run.reading, cache_dir, log)
    resolved = run.resolve(world_size, vocab_size(places))
    if (
        resolved.run.task.name == "contrastive"
        and resolved.run.task.pairs == "dropout"
        and not run.model.dropout
    ):
        raise ConfigError(
            "task.pairs = 'dropout' (the default) with model.dropout = 0: the two vectors of a text are the same; set "
            "model.dropout = 0.1, or task.pairs = 'given' or 'neighbours'"
        )
    tasks_of(run, places.tokenizer)
    return resolved, places


def task_of(run: RunConfig, tokenizer: Path) -> Task:
    """Give what makes arrays of the data of a run at its longest length: what it is measured on.

    Raises:
        DataConfigError: the tokenizer lacks what the task needs, or settings do not go together.
    """
    return _task(run, Tokenizer(tokenizer), run.data.sequence_length)


def tasks_of(run: RunConfig, tokenizer: Path) -> dict[int, Task]:
    """Give what makes training arrays of the data of a run, by sequence length.

    Raises:
        DataConfigError: as task_of, or a length of the ramp is too short for the task.
    """
    opened, tasks = Tokenizer(tokenizer), {}
    for key, length in run.lengths.items():
        try:
            tasks[length] = _task(run, opened, length)
        except DataConfigError as error:
            raise DataConfigError(f"{key}: {error}" if tasks else str(error)) from error
    return tasks


def _task(run: RunConfig, tokenizer: Tokenizer, sequence_length: int) -> Task:
    return make_task(
        run.filled_task,
        tokenizer,
        sequence_length=sequence_length,
        packing=run.data.packing,
        mask_document_start=run.data.mask_document_start,
        seed=run.run.seed,
    )


def _refuse(problems: Iterable[str]) -> None:
    if listed := "\n".join(problems):
        raise DataConfigError(listed)


def vocab_size(places: DataPlaces) -> int:
    """Give the tokenizer's vocabulary."""
    return Tokenizer(places.tokenizer).vocab_size
