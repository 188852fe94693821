"""Run a function as several ranks that are forked from this process, which has imported everything once.

For work in many layouts, one after another: a layout costs no new start of torch. The parent itself must never join
a process group nor touch a GPU.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from .runtime import become_rank

TIMEOUT_S = 600.0
GRACE_S = 1.0  # after the first failure, to learn of one that caused it
PR_SET_PDEATHSIG = 1


class RankDied(RuntimeError):
    """A rank ended without an answer, or gave none in time."""

    exit_code = 76


def threads_each(size: int) -> int:
    """Give a rank's share of the cores, where there are `size` ranks."""
    return max(1, (os.cpu_count() or 1) // size)


def run_ranks(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    timeout_s: float = TIMEOUT_S,
    num_threads: int | None = None,
) -> list[Any]:
    """Give what `function(*args)` returned on each of `size` ranks.

    Args:
        num_threads: of torch on each rank; by default its share of the cores.

    Raises:
        RankDied: a rank was killed or gave no answer in time.
        Exception: what the first rank raised that failed, with its traceback as a note. The others are stopped.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="basestone-") as folder:
        store = Path(folder) / "store"
        pipes: list[Connection] = []
        children: list[BaseProcess] = []
        threads = num_threads or threads_each(size)
        try:
            for rank in range(size):
                parent, child = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(
                    target=_be_rank, args=(function, rank, size, threads, store, child, args)
                )
                with _stop_waits():
                    process.start()
                    children.append(process)
                child.close()
                pipes.append(parent)
            return _collect(pipes, children, timeout_s)
        finally:
            for process in children:
                process.kill()
                process.join()


@contextmanager
def _stop_waits() -> Iterator[None]:
    """Handle a SIGTERM behind the block: what its handler raises is lost in the hooks that Python calls at a fork."""
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGTERM, lambda *got: came.append(got))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
    if came:
        handler(*came[0])


def die_with_parent(parent: int | None = None) -> None:
    """Let this process be killed when the one that started it dies, or at once where `parent` is dead already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def _be_rank(
    function: Callable[..., Any],
    rank: int,
    size: int,
    threads: int,
    store: Path,
    pipe: Connection,
    args: Sequence[Any],
) -> None:
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler is for the parent
    become_rank(rank, size, store)
    torch.set_num_threads(threads)
    try:
        pipe.send((True, function(*args)))
    except BaseException as error:  # a failing rank must answer, or the parent waits
        pipe.send((False, (_portable(error), traceback.format_exc())))
        signal.pause()  # its end would be an error of the others, and hide this one; the parent kills it
    pipe.close()
    os._exit(0)  # no atexit: groups may be half gone


def _portable(error: BaseException) -> BaseException:
    """Give the error, or its text where pickle cannot make it again."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _collect(pipes: Sequence[Connection], children: Sequence[BaseProcess], timeout_s: float) -> list[Any]:
    answers: dict[int, Any] = {}
    failures: list[BaseException] = []
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    deadline_s = time.monotonic() + timeout_s
    while open_pipes:
        ready: list[Any] = wait(list(open_pipes), timeout=max(0.0, deadline_s - time.monotonic()))
        if not ready and not failures:
            failures.append(
                RankDied(f"rank {min(open_pipes.values())} gave no answer within {timeout_s:.0f} s")
            )
        if not ready:
            break
        for pipe in ready:
            rank = open_pipes.pop(pipe)
            try:
                good, answers[rank] = pipe.recv()
            except (EOFError, OSError):  # the latter in the middle of an answer
                children[rank].join()
                code = children[rank].exitcode
                # It is the cause: the others fail because they lost contact with it.
                failures.insert(0, RankDied(f"rank {rank} died without an answer (exit code {code})"))
                continue
            if not good:
                error, text = answers[rank]
                error.add_note(text)  # a note of the rank's own would not survive the pipe
                failures.append(error)
        if failures:
            deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
    if failures:
        raise failures[0]
    return [answers[rank] for rank in range(len(pipes))]
