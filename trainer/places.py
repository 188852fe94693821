"""Where a run's data lies, once embedded corpora have prepared themselves. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..data.builtin import BuiltinCorpus, prepare_builtin
from ..data.config import DataConfig
from ..data.errors import DataConfigError
from ..data.tokenizer import Tokenizer


@dataclass(frozen=True)
class DataPlaces:
    """Shard directories and the tokenizer of a run."""

    train: tuple[Path, ...]
    heldout: dict[str, Path]
    tokenizer: Path


def locate(data: DataConfig, cache_dir: Path, log: Callable[[str], None] = lambda _: None) -> DataPlaces:
    """Turn the `[data]` section into paths, preparing embedded corpora into the cache on first use.

    Raises:
        DataConfigError: listing every directory or file that is not there.
    """
    corpora: dict[str, BuiltinCorpus] = {}

    def corpus(name: str) -> BuiltinCorpus:
        if name not in corpora:
            corpora[name] = prepare_builtin(name, cache_dir, log)
        return corpora[name]

    def is_builtin(place: str) -> bool:
        return place.startswith("builtin:")

    places = DataPlaces(
        train=tuple(corpus(place).train if is_builtin(place) else Path(place) for place in data.train),
        heldout={
            name: corpus(place).heldout if is_builtin(place) else Path(place)
            for name, place in data.heldout.items()
        },
        tokenizer=corpus(data.tokenizer).tokenizer if is_builtin(data.tokenizer) else Path(data.tokenizer),
    )
    missing = [
        path for path in (*places.train, *places.heldout.values()) if not (path / "manifest.json").is_file()
    ]
    problems = [f"{path} holds no manifest.json; make shards with `basestone prepare`" for path in missing]
    if not places.tokenizer.is_file():
        problems.append(f"{places.tokenizer} is not there; make one with `basestone tokenizer train`")
    if problems:
        raise DataConfigError("\n".join(problems))
    return places


def vocab_size(places: DataPlaces) -> int:
    """Give the tokenizer's vocabulary."""
    return Tokenizer(places.tokenizer).vocab_size
