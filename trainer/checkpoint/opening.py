"""Open a finished checkpoint: a step directory, or the newest good one of a run directory. Imports no torch."""

from __future__ import annotations

import time
from pathlib import Path

from ..errors import CheckpointError
from .format import steps_in
from .reader import Reader


def newest_good(run_dir: Path, attempts: int = 5) -> Reader:
    """Open the newest checkpoint of a run directory whose structure is good, for reading only.

    Raises:
        CheckpointError: there is none.
    """
    problems: list[str] = []
    for _ in range(attempts):  # a training run may prune the one that we are about to open
        problems = []
        for _, path in steps_in(run_dir / "checkpoints"):
            try:
                return Reader(path)
            except (OSError, CheckpointError) as error:
                problems.append(str(error))
        if not problems:
            break
        time.sleep(0.2)
    reason = "\n  ".join(problems) or "it holds none"
    raise CheckpointError(f"{run_dir}: no good checkpoint: {reason}")


def open_checkpoint(path: Path) -> Reader:
    """Open a step directory, or the newest good one of a run directory."""
    if (path / "checkpoints").is_dir():
        return newest_good(path)
    return Reader(path)
