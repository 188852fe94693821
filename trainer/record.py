"""Where a run's figures go: metrics.jsonl (the source of truth), TensorBoard, the console. Rank 0 only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.storage import write_atomic
from .config import ResolvedRun
from .console import RunConsole
from .load import run_to_toml
from .rundir import RunDirectory, warned_of

STEP_SCALARS = ("loss", "grad_norm", "lr", "tokens_per_s", "tflops_per_device", "mfu", "memory_gib", "joules")
EVAL_SCALARS = ("loss", "perplexity", "bits_per_byte")


class Recorder:
    """Writes every record to every sink; does nothing on a rank without a run directory."""

    def __init__(
        self, directory: RunDirectory | None, console: RunConsole, run_dir: Path, tensorboard: bool
    ) -> None:
        self._directory, self._console = directory, console
        self._board: Any = None
        if directory is not None and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def write_config(self, resolved: ResolvedRun, versions: dict[str, str]) -> None:
        """Write the resolved run file; `basestone train` reads it back."""
        if self._directory is not None:
            comments = ["resolved by basestone", *(f"{name} {version}" for name, version in versions.items())]
            text = run_to_toml(resolved.run.model_dump(mode="json"), comments)
            write_atomic(self._directory.path / "run.toml", text.encode())

    def step(self, record: dict[str, Any]) -> None:
        """Take a step's line."""
        if self._directory is None:
            return
        self._directory.metric(record)
        self._directory.save_ledger()
        self._console.step(record)
        self._scalars("train", record, STEP_SCALARS)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Take a held-out result."""
        if self._directory is None:
            return
        self._directory.metric(record)
        self._console.say(
            f"step {record['step']} held-out {record['name']}: loss {record['loss']:.4f}, "
            f"perplexity {record['perplexity']:.2f}, {record['bits_per_byte']:.4f} bits per byte"
        )
        self._scalars(f"heldout/{record['name']}", record, EVAL_SCALARS)

    def _scalars(self, prefix: str, record: dict[str, Any], names: tuple[str, ...]) -> None:
        if self._board is None:
            return
        for name in names:
            if record.get(name) is not None:
                self._board.add_scalar(f"{prefix}/{name}", record[name], record["step"])

    def close(self) -> None:
        """Flush the sinks, as far as the disk lets them."""
        if self._board is not None:
            with warned_of("TensorBoard's events were not all written"):
                self._board.close()
