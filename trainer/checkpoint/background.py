"""Work on files beside training: one thread, whose end is a value. Nothing here speaks to another rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from ..errors import message_of

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Runs `work` in a thread that dies with the process; what it raised is a text, never an exception.

    A rank that raised where others wait for it would leave them waiting.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        """Start."""
        self._started_s = time.monotonic()
        self._result: Result | None = None
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Result]) -> None:
        try:
            self._result = work()
        except Exception as error:
            self._problem = message_of(error) or type(error).__name__

    @property
    def running(self) -> bool:
        """Tell whether it has not ended."""
        return self._thread.is_alive()

    @property
    def running_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    def wait(self, limit_s: float) -> tuple[Result | None, str | None]:
        """Wait until `limit_s` after the start; give (result, problem), of which one is None."""
        self._thread.join(max(0.0, limit_s - self.running_s))
        if self.running:
            return None, f"has not ended after {self.running_s:.0f} s; is the storage well?"
        return self._result, self._problem
