"""What `checkpoint ls`, `show`, `verify` and `prune` know of step directories. Imports no torch."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...data.reading.transport import join
from ..errors import CheckpointError
from ..sections import CheckpointSection
from .format import FORMAT, MANIFEST
from .opening import CHECKPOINTS, steps_at
from .places import local_path
from .reader import Progress, Reader
from .retention import StepFacts, heldout_loss, policies
from .writer import remove

LEFTOVERS = ".t*-step_*"  # .tmp-step_... of a killed save, .trash-step_... of a killed removal
MODEL_FIELDS = ("family", "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")


@dataclass(frozen=True)
class Listed:
    """A step directory of a run; where `problem` says that its structure is bad, only the first two are known."""

    step: int
    place: str
    bytes: int | None = None
    saved: str | None = None  # UTC, ISO 8601; not known at a URL
    heldout_loss: float | None = None  # nats a token
    kept_by: tuple[str, ...] = ()
    problem: str | None = None


def list_steps(run: Path | str, section: CheckpointSection | None) -> list[Listed]:
    """List a run's step directories at any place, newest first, with the keys of `section` that keep each good one."""
    listed = [_listed(step, place) for step, place in steps_at(join(str(run), CHECKPOINTS))]
    good = [row for row in listed if row.problem is None]
    if section is None or not good:
        return listed
    facts = [StepFacts(row.step, row.heldout_loss) for row in good]
    keeps = policies(facts, section, good[0].step)
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
        "model": {name: model.get(name) for name in MODEL_FIELDS},
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

    @property
    def num_bytes(self) -> int:
        """What the removed ones and the leftovers take."""
        return sum(row.bytes or 0 for row in self.removed) + sum(map(_num_bytes, self.leftovers))


def plan_pruning(run_dir: Path, section: CheckpointSection) -> Pruning:
    """Say what goes and what stays by the keys of `section`; damaged checkpoints neither count nor go."""
    listed = list_steps(run_dir, section)
    good = [row for row in listed if row.problem is None]
    return Pruning(
        removed=tuple(row for row in good if not row.kept_by),
        leftovers=tuple(sorted((run_dir / "checkpoints").glob(LEFTOVERS))),
        kept=tuple(row for row in good if row.kept_by),
        damaged=tuple(row for row in listed if row.problem is not None),
    )


def prune(pruning: Pruning) -> None:
    """Remove what a plan says; only the holder of the run's lock may call this."""
    remove(Path(row.place) for row in pruning.removed)
    for path in pruning.leftovers:
        shutil.rmtree(path)


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
