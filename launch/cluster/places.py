"""The folders that a launch makes, and takes away where nothing came of it. Imports no torch."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

from ...data.storage import write_atomic
from ...trainer.errors import ConfigError
from ...trainer.run_lock import LOCK
from ...trainer.rundir import make_run_directory
from .job import Job

MADE = "made.json"


def make(job: Job, folder: Path | None = None) -> list[Path]:
    """Make the folders that a launch needs, by default where its job has them; give what was not there before.

    Raises:
        ConfigError: they cannot be written.
    """
    folder = folder or job.folder
    run_dir = folder.parent
    own = [] if job.check else [run_dir / name for name in ("checkpoints", "logs", LOCK)]
    made = [path for path in (folder, *own, run_dir, *run_dir.parents) if not path.exists()]
    if not job.check:
        make_run_directory(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run directory {run_dir}: cannot be written ({error}); choose another") from error
    return made


def remember(job: Job, made: list[Path]) -> None:
    """Write down what a check made: another node may be the last to leave."""
    if job.check:
        write_atomic(job.folder / MADE, json.dumps([str(path) for path in made]).encode())


def forget_check(job: Job) -> None:
    """Remove what a check made, and nothing that others put there."""
    if job.check:
        with suppress(OSError, ValueError):
            unmake([job.folder, *map(Path, json.loads((job.folder / MADE).read_text()))], job.folder)


def unmake(made: list[Path], folder: Path) -> None:
    """Remove paths that `make` made: the launch's folder with all in it, others where they are empty."""
    for path in made:
        if path == folder:
            shutil.rmtree(path, ignore_errors=True)
            continue
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
