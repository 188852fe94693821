"""Faults that are planted in a process: at a call, and a kill there by a real signal."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

from basestone.trainer.forks import RankDied, run_ranks


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before(owner: Any, name: str, number: int, work: Callable[[], object]) -> bool:
    """Do `work` in a forked process that is killed before its `number`-th call of a function; tell whether it was."""

    def doomed() -> None:
        before(owner, name, kill_self, number)
        work()

    try:
        run_ranks(doomed, 1, num_threads=1)
    except RankDied as error:
        assert "exit code -9" in str(error)
        return True
    return False


def before(
    owner: Any, name: str, act: Callable[[], None], number: int = 1, when: Callable[..., bool] = lambda *_: True
) -> None:
    """Let `act` happen before the `number`-th call of a function whose arguments `when` likes."""
    _around(owner, name, act, number, when, after=False)


def after(
    owner: Any, name: str, act: Callable[[], None], number: int = 1, when: Callable[..., bool] = lambda *_: True
) -> None:
    """Let `act` happen after that call."""
    _around(owner, name, act, number, when, after=True)


def _around(
    owner: Any, name: str, act: Callable[[], None], number: int, when: Callable[..., bool], *, after: bool
) -> None:
    real, calls = getattr(owner, name), 0

    @functools.wraps(real)
    def call(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += bool(when(*args))
        due = calls == number and when(*args)
        if due and not after:
            act()
        result = real(*args, **more)
        if due and after:
            act()
        return result

    setattr(owner, name, call)
