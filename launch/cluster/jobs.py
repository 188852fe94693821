"""What was launched: each launch leaves a record in its run directory. Imports no torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ...data.storage import write_atomic
from ...trainer.errors import ConfigError
from ...trainer.rundir import MARKERS
from . import outcome
from .job import FOLDER, Job

RECORD = "started.json"


@dataclass(frozen=True)
class Started:
    """A launch as it was started: by which process here, or as which job of a scheduler (`identity`)."""

    name: str
    backend: str
    identity: str
    host: str
    pid: int
    pid_started_s: float
    time_s: float


@dataclass(frozen=True)
class Status:
    """What is known of a launch now; `step` is the newest saved one."""

    run_dir: Path
    started: Started
    state: str
    step: int


def record(job: Job, folder: Path, identity: str) -> None:
    """Write down in the launch's folder that it was started."""
    started = Started(
        name=job.name,
        backend=job.backend,
        identity=identity,
        host=os.uname().nodename,
        pid=os.getpid(),
        pid_started_s=psutil.Process().create_time(),
        time_s=time.time(),
    )
    write_atomic(folder / RECORD, json.dumps(asdict(started)).encode())


def read_started(run_dir: Path) -> Started:
    """Read the record of a run's last launch.

    Raises:
        ConfigError: the run was never launched.
    """
    try:
        return Started(**json.loads((run_dir / FOLDER / RECORD).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{run_dir}: no launch of this run is known; `basestone launch` starts one"
        ) from error


def launches_in(folder: Path) -> Iterator[Status]:
    """Give every launched run of a folder, in order of its name."""
    for path in sorted(folder.glob(f"*/{FOLDER}/{RECORD}")):
        yield status_of(path.parents[1])


def status_of(run_dir: Path) -> Status:
    """Tell what became of a run's last launch.

    Raises:
        ConfigError: the run was never launched.
    """
    started = read_started(run_dir)
    return Status(run_dir, started, _state(run_dir, started), outcome.newest_step(run_dir))


def _state(run_dir: Path, started: Started) -> str:
    marks = [name for name in MARKERS if _is_after(run_dir / name, started.time_s)]
    if started.backend == "slurm" and shutil.which("squeue"):
        asked = ["squeue", "--noheader", "--format=%T", f"--jobs={started.identity}"]
        known = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        if known:
            return known[0].lower()
    elif started.host == os.uname().nodename and started.backend != "kubernetes":
        try:
            if psutil.Process(started.pid).create_time() == started.pid_started_s:
                return "running"
        except psutil.NoSuchProcess:
            pass
    elif not marks:
        return f"not seen from here (started on {started.host})"
    return {"COMPLETE": "complete", "RESUME": "stopped", "FAILED": "failed"}[marks[0]] if marks else "ended"


def _is_after(path: Path, time_s: float) -> bool:
    try:
        return path.stat().st_mtime >= time_s
    except OSError:
        return False


def log_of(run_dir: Path, rank: int) -> Path:
    """Give the file of what a rank says.

    Raises:
        ConfigError: there is none; it names those that are there.
    """
    path = run_dir / "logs" / f"rank_{rank:05d}.log"
    if not path.exists():
        known = sorted(
            one.stem.removeprefix("rank_").lstrip("0") or "0" for one in path.parent.glob("rank_*.log")
        )
        raise ConfigError(f"{path}: no such log; there are those of ranks {', '.join(known) or 'none'}")
    return path


def stop(run_dir: Path) -> str:
    """Ask a run to save and stop; say what comes of it.

    Raises:
        ConfigError: the run was never launched.
    """
    status = status_of(run_dir)
    if status.state in ("complete", "stopped", "failed", "ended"):
        return f"{run_dir}: {status.state} already, at step {status.step}"
    if status.started.backend == "slurm" and status.state == "pending":
        done = subprocess.run(["scancel", status.started.identity], capture_output=True, text=True, check=False)
        return f"{run_dir}: {'taken out of the queue' if done.returncode == 0 else done.stderr.strip()}"
    outcome.ask_to_stop(run_dir)
    return f"{run_dir}: asked to save and stop after its step"
