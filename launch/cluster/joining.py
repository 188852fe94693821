"""A launch whose nodes each have a command of their own: the first of them writes its files, the others agree with it.

They hold RUN/launch/lock together. A launch of one command, which holds it alone, and nodes of another launch are
refused. Imports no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from ...trainer.errors import EXIT_FAULT, ConfigError
from ...trainer.run_lock import LOCK, NO_LOCKS, is_held, open_lock
from . import outcome, places
from .job import Job, read_job

TAKE_S = 15.0  # that another node may take to write, or the launch before to leave


@contextlib.contextmanager
def joined(job: Job, write: Callable[[], None]) -> Iterator[None]:
    """Belong to a launch: `write` makes its files where this node is the first; the last to leave removes its secrets.

    Raises:
        ConfigError: another launch goes on there, or the others have another job.
    """
    made = places.make(job)
    descriptor, is_first = _take(job)
    try:
        if is_first and not is_held(Path(job.run_dir)):
            places.remember(job, made)
            write()
            outcome.begin(job)
            holder = {"pid": os.getpid(), "host": os.uname().nodename, "since": datetime.now(UTC).isoformat()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        else:
            _check_same(job)
        locked(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        locked(descriptor, fcntl.LOCK_UN)
        if locked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) and not is_held(Path(job.run_dir)):
            job.forget_secrets()
            places.forget_check(job)
        os.close(descriptor)


def is_taken(folder: Path) -> bool:
    """Tell whether any command holds a launch, alone or with others."""
    if is_held(folder):
        return True
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not locked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def locked(descriptor: int, how: int) -> bool:
    """Lock a file, or try to: False where others hold it, True where the file system has no locks."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _take(job: Job) -> tuple[int, bool]:
    """Open and lock the launch's lock; tell whether nobody else held it."""
    end_s = time.monotonic() + TAKE_S
    while time.monotonic() < end_s:
        job.folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(job.folder)
        for how in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            is_first = how == fcntl.LOCK_EX
            if (
                locked(descriptor, how | fcntl.LOCK_NB)
                and os.fstat(descriptor).st_nlink  # a check that has just ended removes its folder
                and (is_first or not outcome.outcome(job, EXIT_FAULT).is_final)
            ):
                return descriptor, is_first
        os.close(descriptor)
        time.sleep(0.1)
    raise ConfigError(
        f"{job.run_dir}: another launch goes on in it, or is just ending; `basestone jobs stop {job.run_dir}` lets it "
        "save and stop, or give another --run-dir"
    )


def _check_same(job: Job) -> None:
    """See that the others have the same job; their Python may lie elsewhere.

    Raises:
        ConfigError: it differs.
    """
    there, here = (
        {**asdict(one), **one.options, "options": None, "python": None} for one in (read_job(job.path), job)
    )
    if different := [name for name in here if there.get(name) != here[name]]:
        told = "".join(f"\n  {name}: {there.get(name)!r} there, {here[name]!r} here" for name in different)
        raise ConfigError(
            f"{job.run_dir}: another launch goes on in it, and is not this one:{told}\ngive every node of a launch the "
            f"same command; `basestone jobs stop {job.run_dir}` lets the other save and stop"
        )
