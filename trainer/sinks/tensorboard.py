"""TensorBoard events in RUN/tensorboard/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .sink import evaluation_scalars, step_scalars


class TensorBoardSink:
    """One scalar a figure; a resumed run adds a file, whose beginning takes back what lies behind its step."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path) -> None:
        """Take the run directory."""
        self._folder = run_dir / "tensorboard"
        self._writer: Any = None

    def begin(self, run_id: str, step: int) -> None:
        """Open a file of events, before which those of later steps do not count."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def step(self, record: dict[str, Any]) -> None:
        """Write the scalars of a step."""
        self._write(step_scalars(record), record["step"])

    def evaluation(self, record: dict[str, Any]) -> None:
        """Write the scalars of a held-out set."""
        self._write(evaluation_scalars(record), record["step"])

    def _write(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what waits."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
