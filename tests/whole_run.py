"""Whole runs as forked ranks: the worker of `basestone train` without its start, and with a fault where one is wanted.

The ranks are real processes, killed by real signals; forking after the imports makes a run cost a second or two.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from basestone.trainer import worker
from basestone.trainer.forks import RankDied, run_ranks

# Small enough for a second, with a save in every other step.
CHANGES = (
    "train.steps=8",
    "checkpoint.every_steps=2",
    "evaluate.every_steps=0",
    "evaluate.max_tokens=1000",
    "data.workers=0",
    "meter.tensorboard=false",
    "schedule.kind=constant",
)
Fault = Callable[[int], None]  # prepares the rank of this number


def train(
    corpus: Path,
    run_dir: Path,
    *changes: str,
    size: int = 2,
    resume: Path | None = None,
    fault: Fault | None = None,
) -> None:
    """Train to the end; raises what the first failing rank raised, RankDied where one was killed."""
    arguments = Namespace(
        run=corpus / "run.toml",
        run_dir=run_dir,
        overrides=[*CHANGES, *changes],
        resume=resume and str(resume),
        preflight=None,
        debug=False,
    )
    run_ranks(_rank, size, arguments, fault, timeout_s=120)


def _rank(arguments: Namespace, fault: Fault | None) -> None:
    if fault is not None:
        fault(int(os.environ["RANK"]))
    worker.train(arguments)


def killed(corpus: Path, run_dir: Path, *changes: str, **more: Any) -> bool:
    """Train with a fault that kills; tell whether it did."""
    try:
        train(corpus, run_dir, *changes, **more)
    except RankDied:
        return True
    return False
