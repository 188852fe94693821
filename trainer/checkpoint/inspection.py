"""What `checkpoint ls`, `show`, `verify` and `prune` know of step directories. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...data.reading.transport import join
from ..errors import CheckpointError
from ..sections import CheckpointSection
from .format import FORMAT, LEFTOVERS, MANIFEST
from .opening import CHECKPOINTS, steps_at
from .places import local_path
from .reader import Progress, Reader
from .retention import StepFacts, heldout_loss, policies
from .writer import discard, remove, trash_of

MODEL_FIELDS = ("family", "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")


@dataclass(frozen=True)
class Listed:
    """A step directory of a run; where `problem` says that its structure is bad, only the first two are known."""

    step: int
    place: str
    bytes: int | None = None
    saved: str | None = None  # UTC, ISO 8601; not known at a URL
    heldout_loss: float | None = None  # nats
    kept_by: tuple[str, ...] = ()
    problem: str | None = None


def list_steps(run: Path | str, section: CheckpointSection | None) -> list[Listed]:
    """List a run's step directories at any place, newest first, with the keys of `section` that keep each good one."""
    listed = [_listed(step, place) for step, place in steps_at(join(str(run), CHECKPOINTS))]
    return listed if section is None else _with_keys(listed, section)


def _with_keys(listed: list[Listed], section: CheckpointSection) -> list[Listed]:
    good = [StepFacts(row.step, row.heldout_loss) for row in listed if row.problem is None]
    keeps = policies(good, section, good[0].step) if good else {}
    return [row if row.problem else replace(row, kept_by=tuple(keeps.get(row.step, ()))) for row in listed]


def _listed(step: int, place: str) -> Listed:
    try:
        reader = Reader(place)
        return Listed(step, place, reader.num_bytes, _saved(place), heldout_loss(reader.state()))
    except (OSError, CheckpointError) as error:
        return Listed(step, place, problem=str(error))


def describe(reader: Reader) -> dict[str, Any]:
    """Say what a step directory holds and how it was written; what its state does not say is None."""
    state, ranks = reader.state(), reader.index.ranks
    run = _table(state.get("run"))
    model, parallel = _table(run.get("model")), _table(run.get("parallel"))
    return {
        "place": reader.at(),
        "format": FORMAT,
        "step": state.get("step"),
        "tokens": state.get("tokens"),
        "optimizer_steps": state.get("optimizer_steps"),
        "weights_only": reader.index.tensors == ["master"],
        "heldout_loss": heldout_loss(state),
        "model": {name: model.get(name) for name in MODEL_FIELDS}
        | ({"pooling": model["pooling"]} if model.get("pooling") else {}),
        "parameters": sum(math.prod(row.shape) for row in reader.index.parameters),
        "tensors": reader.index.tensors,
        "layout": {
            "processes": len(ranks),
            "tensor": max((rank.tp_size for rank in ranks), default=1),
            "pipeline": parallel.get("pipeline"),
            "zero": parallel.get("zero"),
        },
        "tokenizer_sha256": state.get("tokenizer_sha256"),
        "versions": _table(state.get("versions")),
        "saved": _saved(reader.place),
        "bytes": reader.num_bytes,
        "files": [
            {"file": rank.file, "bytes": rank.bytes, "fragments": len(rank.fragments), "tp_rank": rank.tp_rank}
            for rank in ranks
        ],
    }


def problems_of(place: str, progress: Progress = lambda done, total: None) -> list[str]:
    """Read every byte of a step directory; list what does not match, and files that it should not hold."""
    try:
        return Reader(place).verify(progress)
    except CheckpointError as error:
        return [str(error)]


@dataclass(frozen=True)
class Pruning:
    """What a pruning removes and what it leaves: step directories, and what killed attempts left."""

    removed: tuple[Listed, ...]
    leftovers: tuple[Path, ...]
    kept: tuple[Listed, ...]
    damaged: tuple[Listed, ...]  # stay: nobody has looked at them yet
    links: dict[str, str]  # of what goes: a link and its target, which stays

    @property
    def num_bytes(self) -> int:
        """What the removed ones and the leftovers take."""
        rows = sum(row.bytes or 0 for row in self.removed if row.place not in self.links)
        return rows + sum(_num_bytes(path) for path in self.leftovers if str(path) not in self.links)


def plan_pruning(
    run_dir: Path,
    section: CheckpointSection,
    progress_of: Callable[[str], Progress] = lambda place: lambda done, total: None,
) -> Pruning:
    """Say what goes and what stays by the keys of `section`; damaged checkpoints neither count nor go.

    Nothing goes before every byte of one that stays was read and found good: of the newest, or where that is damaged
    of the next.

    Args:
        progress_of: gives what is told how far the reading of a step directory is.
    """
    listed = list_steps(run_dir, section)
    to_check = any(row.problem is None and not row.kept_by for row in listed)
    while to_check and (newest := next((row for row in listed if row.kept_by), None)):
        problems = problems_of(newest.place, progress_of(newest.place))
        if not problems:
            break
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        bad = replace(newest, kept_by=(), problem=f"{problems[0]}{more}")
        listed = _with_keys([bad if row is newest else row for row in listed], section)
    removed = tuple(row for row in listed if row.problem is None and not row.kept_by)
    leftovers = tuple(sorted((run_dir / CHECKPOINTS).glob(LEFTOVERS)))
    going = [*(Path(row.place) for row in removed), *leftovers]
    return Pruning(
        removed=removed,
        leftovers=leftovers,
        kept=tuple(row for row in listed if row.kept_by),
        damaged=tuple(row for row in listed if row.problem is not None),
        links={str(path): str(path.resolve()) for path in going if path.is_symlink()},
    )


def prune(pruning: Pruning) -> None:
    """Remove what a plan says; only the holder of the run's lock may call this.

    Raises:
        CheckpointError: naming what cannot be removed.
    """
    for row in pruning.removed:
        with _removal_errors(row.place):
            remove([Path(row.place)])
            discard(trash_of(Path(row.place)))  # says why, where a part was left
    for path in pruning.leftovers:
        with _removal_errors(str(path)):
            discard(path)


@contextmanager
def _removal_errors(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{place}: cannot be removed: {error.strerror or error}; check its permissions and the storage"
        ) from error


def _num_bytes(path: Path) -> int:
    return sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir())


def _saved(place: str) -> str | None:
    """Give when the manifest was written, the last file of a save; None at a URL."""
    path = local_path(place)
    if path is None:
        return None
    return datetime.fromtimestamp((path / MANIFEST).stat().st_mtime, UTC).isoformat(timespec="seconds")


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
