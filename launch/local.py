"""Local workers: start them, watch them, stop them together. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from ..trainer.errors import EXIT_STOPPED
from .environ import worker_environment

GRACE_S = 10.0  # between the first failure and a SIGTERM to the others, then again before a SIGKILL
EXITS_THAT_SAY_WHY = (64, 74, 76)  # this rank knew what was wrong; others may only have lost contact with it
FINAL_EXITS = (0, EXIT_STOPPED, *EXITS_THAT_SAY_WHY)  # another start would change nothing
PR_SET_PDEATHSIG = 1


def started_s() -> float:
    """Give when this process began, in seconds since 1970."""
    return psutil.Process().create_time()


def parent_started_s() -> float:
    """Give when the process that started this one began: a launcher, which outlives restarts in place."""
    return (psutil.Process().parent() or psutil.Process()).create_time()


def worker_command(arguments: Sequence[str]) -> list[str]:
    """Give the command line of a process that needs torch."""
    return [sys.executable, "-m", "basestone.trainer.worker", *arguments]


def become_worker(arguments: Sequence[str]) -> None:
    """Turn this process into a worker: a launcher has started it as one."""
    command = worker_command(arguments)
    os.execv(command[0], command)


def run_workers(arguments: Sequence[str], num_workers: int, log_dir: Path | None = None) -> int:
    """Run a worker command as `num_workers` local processes and wait for all.

    Rank 0 has this terminal; the others write to log_dir/rank_00001.log and so on. SIGTERM and Ctrl-C are passed on
    as SIGTERM. When one fails the others are stopped. A killed parent takes its workers with it.

    Returns:
        0, or the exit code of the rank that is the cause; 75 when they stopped on request.
    """
    meeting = Path(tempfile.mkdtemp(prefix="basestone-"))
    workers: list[subprocess.Popen[bytes]] = []
    try:
        with _signals_to(workers) as asked:
            for rank in range(num_workers):
                workers.append(_start(arguments, rank, num_workers, meeting / "rendezvous", log_dir))
                if asked:  # it reached only the workers that were there
                    return EXIT_STOPPED
            return _wait(workers, log_dir, asked)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        shutil.rmtree(meeting, ignore_errors=True)


def _start(
    arguments: Sequence[str], rank: int, num_workers: int, rendezvous: Path, log_dir: Path | None
) -> subprocess.Popen[bytes]:
    environment = worker_environment(rank, num_workers, rendezvous)
    output = None
    if rank and log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        output = open(log_dir / f"rank_{rank:05d}.log", "ab")  # noqa: SIM115  (closed below; the child has its own)
    try:
        return subprocess.Popen(
            worker_command(arguments),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
            process_group=0,  # Ctrl-C reaches this process alone, which passes it on once
        )
    finally:
        if output is not None:
            output.close()


def die_with_parent(parent: int) -> None:
    """Be killed with the parent, which had this process id; for a child between fork and exec."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it was watched
        os._exit(1)


def ignored_here() -> list[int]:
    """Give what this command was started to ignore, by nohup or as a job in the background; it goes on so."""
    return [number for number in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(number) is signal.SIG_IGN]


@contextlib.contextmanager
def _signals_to(workers: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass SIGTERM and Ctrl-C on as SIGTERM; give the list that fills with the signals that came."""
    asked: list[int] = []

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        _send(workers, signal.SIGTERM)

    taken = [number for number in (signal.SIGTERM, signal.SIGINT) if number not in ignored_here()]
    before = {number: signal.signal(number, pass_on) for number in taken}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(workers: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def _wait(workers: Sequence[subprocess.Popen[bytes]], log_dir: Path | None, asked: Sequence[int]) -> int:
    first: int | None = None
    failed_s, sent = 0.0, 0
    while any(worker.poll() is None for worker in workers):
        time.sleep(0.05)
        if first is None:
            first = _first_failure(workers)
            failed_s = time.monotonic()
            continue
        if not sent:  # what they say after a signal of ours is no cause
            first = _first_failure(workers, first)
        if time.monotonic() - failed_s > GRACE_S * (sent + 1) and sent < 2:
            _send(workers, (signal.SIGTERM, signal.SIGKILL)[sent])
            sent += 1
    if not sent:
        first = _first_failure(workers, first)
    if first is None:
        return 0
    code = workers[first].returncode
    if asked and code == -signal.SIGTERM:  # stopped before it could listen: there was nothing to save yet
        return EXIT_STOPPED
    if code != EXIT_STOPPED:
        _explain(first, code, log_dir)
    return code if code > 0 else 1


def innocence(code: int) -> int:
    """Order the ways in which failed ranks ended by who is the cause: the lowest is.

    Ranks that say why come before those that stopped, these before those that were killed, and all of them before those
    that lost contact with them.
    """
    if code in EXITS_THAT_SAY_WHY:
        return 0
    return 1 if code == EXIT_STOPPED else 2 if code < 0 else 3


def _first_failure(workers: Sequence[subprocess.Popen[bytes]], known: int | None = None) -> int | None:
    """Give the rank that is the cause, as far as can be seen.

    `known` gives way only to one that says why, or says the same.
    """

    failed = [rank for rank, worker in enumerate(workers) if worker.poll() not in (None, 0)]
    worst = min(failed, key=lambda rank: (innocence(workers[rank].returncode), rank), default=None)
    if known is None or worst is None:
        return worst
    known_code, worst_code = workers[known].returncode, workers[worst].returncode
    # Ranks that say the same: the first of them, and rank 0 has said it on this terminal.
    gives_way = known_code not in EXITS_THAT_SAY_WHY or known_code == worst_code
    # A rank that has stopped takes a moment to be gone, in which others may already have lost contact with it.
    says_why = worst_code in (*EXITS_THAT_SAY_WHY, EXIT_STOPPED)
    return worst if says_why and gives_way else known


def _explain(rank: int, code: int, log_dir: Path | None) -> None:
    if code < 0:
        print(
            f"error: rank {rank} was killed by {signal.Signals(-code).name}"
            + (" (out of memory?)" if code == -signal.SIGKILL else ""),
            file=sys.stderr,
        )
    elif rank and log_dir is not None:  # rank 0 has said it here already
        log = log_dir / f"rank_{rank:05d}.log"
        lines = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
        print(f"error: rank {rank} failed first; the end of {log}:", *lines, sep="\n  ", file=sys.stderr)
