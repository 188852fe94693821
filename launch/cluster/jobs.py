"""What was launched: each launch leaves a record in its run directory. Imports no torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ...data.storage import write_atomic
from ...trainer.errors import ConfigError
from ...trainer.run_lock import is_held
from ...trainer.rundir import MARKERS
from . import outcome
from .job import FOLDER, SECRETS, Job
from .joining import is_taken

RECORD = "started.json"
ENDED = ("complete", "stopped", "failed", "ended")
UNKNOWN = "unknown"


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
    """Give every launched run of a folder, in order of its name; records that cannot be read are left out."""
    for path in sorted(folder.glob(f"*/{FOLDER}/{RECORD}")):
        with suppress(ConfigError):
            yield status_of(path.parents[1])


def status_of(run_dir: Path) -> Status:
    """Tell what became of a run's last launch.

    Raises:
        ConfigError: the run was never launched.
    """
    started = read_started(run_dir)
    return Status(run_dir, started, _state(run_dir, started), outcome.newest_step(run_dir))


def check_queue(run_dir: Path) -> None:
    """See that no job of an earlier launch waits or runs.

    Raises:
        ConfigError: one does.
    """
    try:
        started = read_started(run_dir)
    except ConfigError:
        return
    state = _in_queue(started)
    if state == UNKNOWN and not _marks(run_dir, started):
        raise ConfigError(
            f"{run_dir}: squeue does not tell whether Slurm job {started.identity} of this run has ended; wait until "
            "it does, or give another --run-dir"
        )
    if state not in (None, UNKNOWN):
        raise ConfigError(
            f"{run_dir}: Slurm job {started.identity} of this run is {state}; `basestone jobs stop {run_dir}` ends "
            "it, or give another --run-dir"
        )


def _in_queue(started: Started) -> str | None:
    """Give the state of a job in Slurm's queue; None where it is not there, UNKNOWN where Slurm does not say.

    Of an array it is that of the task that runs.
    """
    if started.backend != "slurm" or shutil.which("squeue") is None:
        return None
    asked = ["squeue", "--noheader", "--format=%T", f"--jobs={started.identity}"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode != 0:  # Slurm forgets jobs some minutes after their end
        return None if "Invalid job id" in done.stderr else UNKNOWN
    states = done.stdout.lower().split()
    return "running" if "running" in states else states[0] if states else None


def _state(run_dir: Path, started: Started) -> str:
    if started.backend == "kubernetes":
        return f"unknown here: kubectl get {started.identity}"
    if is_held(run_dir):
        return "running"
    state = _in_queue(started)
    if state not in (None, UNKNOWN):
        return str(state)
    marks = _marks(run_dir, started)
    if is_taken(run_dir / FOLDER) and not {"COMPLETE", "RESUME"} & set(marks):  # it may be leaving
        return "starting"
    if not marks:
        if state == UNKNOWN:
            return UNKNOWN
        return "ended" if started.host == os.uname().nodename else f"not seen from {os.uname().nodename}"
    return {"COMPLETE": "complete", "RESUME": "stopped", "FAILED": "failed"}[marks[0]]


def _marks(run_dir: Path, started: Started) -> list[str]:
    return [name for name in MARKERS if _is_after(run_dir / name, started.time_s)]


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
    if status.started.backend == "kubernetes":
        raise ConfigError(
            f"{run_dir}: the run directory of pods lies on their claim; make the file STOP in it there (kubectl exec), "
            f"or kubectl delete {status.started.identity}"
        )
    if status.state in ENDED:
        return f"{run_dir}: {status.state} already, at step {status.step}"
    if status.state == "pending":
        done = subprocess.run(["scancel", status.started.identity], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"{run_dir}: {done.stderr.strip()}"
        (run_dir / FOLDER / SECRETS).unlink(missing_ok=True)
        return f"{run_dir}: taken out of the queue"
    outcome.ask_to_stop(run_dir)
    return f"{run_dir}: asked to save and stop after its step"
