"""Where a run's data lies, once embedded corpora have prepared themselves. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data.builtin import BuiltinCorpus, prepare_builtin
from ..data.config import BUILTIN_PREFIX, DataConfig
from ..data.errors import DataConfigError
from ..data.tokenizer import Tokenizer


@dataclass(frozen=True)
class DataPlaces:
    """Shard directories and the tokenizer of a run."""

    train: tuple[Path, ...]
    heldout: dict[str, Path]
    tokenizer: Path


class _Locator:
    """Finds what a `[data]` section names; embedded corpora are prepared into the cache on first use."""

    def __init__(self, data: DataConfig, cache_dir: Path, log: Callable[[str], None]) -> None:
        self._data, self._cache_dir, self._log = data, cache_dir, log
        self._corpora: dict[str, BuiltinCorpus] = {}

    def _place(self, place: str, part: Literal["train", "heldout", "tokenizer"]) -> Path:
        if not place.startswith(BUILTIN_PREFIX):
            return Path(place)
        if place not in self._corpora:
            self._corpora[place] = prepare_builtin(place, self._cache_dir, self._log)
        found: Path = getattr(self._corpora[place], part)
        return found

    def train(self) -> tuple[Path, ...]:
        return tuple(self._place(place, "train") for place in self._data.train)

    def heldout(self) -> dict[str, Path]:
        return {name: self._place(place, "heldout") for name, place in self._data.heldout.items()}

    def tokenizer(self) -> Path:
        return self._place(self._data.tokenizer, "tokenizer")


def locate(data: DataConfig, cache_dir: Path, log: Callable[[str], None] = lambda _: None) -> DataPlaces:
    """Turn the `[data]` section into paths, preparing embedded corpora into the cache on first use.

    Raises:
        DataConfigError: listing every directory or file that is not there.
    """
    locator = _Locator(data, cache_dir, log)
    places = DataPlaces(locator.train(), locator.heldout(), locator.tokenizer())
    problems = _without_manifest((*places.train, *places.heldout.values()))
    if not places.tokenizer.is_file():
        problems.append(f"{places.tokenizer} is not there; make one with `basestone tokenizer train`")
    if problems:
        raise DataConfigError("\n".join(problems))
    return places


def locate_heldout(data: DataConfig, cache_dir: Path) -> dict[str, Path]:
    """Give the held-out sets alone, by name: what the run was trained on need not be there any more.

    Raises:
        DataConfigError: listing every directory that is not there.
    """
    heldout = _Locator(data, cache_dir, lambda _: None).heldout()
    if problems := _without_manifest(heldout.values()):
        raise DataConfigError("\n".join(problems))
    return heldout


def _without_manifest(shards: Iterable[Path]) -> list[str]:
    missing = [path for path in shards if not (path / "manifest.json").is_file()]
    return [f"{path} holds no manifest.json; make shards with `basestone prepare`" for path in missing]


def vocab_size(places: DataPlaces) -> int:
    """Give the tokenizer's vocabulary."""
    return Tokenizer(places.tokenizer).vocab_size
