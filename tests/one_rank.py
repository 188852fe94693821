"""A run directory whose checkpoints are saved and loaded by one rank, with an optimizer that is only tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from basestone.model.layout import Parameter
from basestone.trainer.checkpoint.format import step_name, steps_in
from basestone.trainer.checkpoint.restorer import Restorer
from basestone.trainer.checkpoint.saver import SaveOutcome, Saver
from basestone.trainer.checkpoint.share import TENSORS
from basestone.trainer.engine_state import MASTER, Fragment
from basestone.trainer.sections import CheckpointSection

TABLE = {"w": Parameter("w", (4, 3), "weight", 0), "norm": Parameter("norm", (3,), "norm")}


class OneRank:
    """The runtime of a world of one."""

    rank = tp_rank = dp_rank = 0
    tp_size = dp_size = world_size = 1
    on_cpu, device = True, torch.device("cpu")

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    gather_all = gather


class Tensors:
    """What an engine's state is to the checkpoint."""

    is_replicated = False

    def __init__(self, table: dict[str, Parameter] = TABLE) -> None:
        self.steps, self.refreshed = 0, 0
        self.loss_scale: dict[str, float] | None = None
        self.values = {name: {key: torch.zeros(row.numel) for key in TENSORS} for name, row in table.items()}

    def set(self, number: float) -> None:
        for tensors in self.values.values():
            for place, tensor in enumerate(tensors.values()):
                tensor.copy_(number + place / 4 + torch.arange(tensor.numel()) * 64)

    def fragments(self) -> Iterator[Fragment]:
        for name, tensors in self.values.items():
            yield Fragment(name, 0, tensors[MASTER].numel(), True, tensors)

    def refresh(self) -> None:
        self.refreshed += 1


class Run:
    """A run directory, and what stands for its engine."""

    def __init__(
        self, path: Path, table: dict[str, Parameter] = TABLE, *, asynchronous: bool = False, **keys: Any
    ) -> None:
        """Take the keys of [checkpoint]."""
        self.path, self.state, runtime = path, Tensors(table), OneRank()
        everything: Any = (path, table, runtime, self.state)
        self.saver = Saver(*everything, CheckpointSection(**keys), asynchronous=asynchronous)
        self.restorer = Restorer(*everything)

    def save(self, *steps: int, **more: Any) -> SaveOutcome:
        """Save steps one after another; give how the last one ended."""
        for step in steps:
            self.state.set(step)
            outcome = self.saver.begin(step, {"step": step, "optimizer_steps": step, **more}, wait=True)
        assert outcome is not None
        return outcome

    def restore(self, explicit: int | Path | None = None) -> int | None:
        """Load as a run does, and give the step."""
        path = self.step(explicit) if isinstance(explicit, int) else explicit
        state = self.restorer.restore(lambda _: [], None if path is None else str(path))
        return state["step"] if state else None

    def step(self, step: int) -> Path:
        return self.path / "checkpoints" / step_name(step)

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in steps_in(self.path / "checkpoints")]

    def damage(self, step: int) -> None:
        path = self.step(step) / "rank_00000.bin"
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
