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

    def __init__(self, work: Callable[[Callable[[], None]], Result]) -> None:
        """Start; `work` calls the function that it is given whenever it has come further."""
        self._moved_s = time.monotonic()
        self._result: Result | None = None
        self._problem: str | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Callable[[], None]], Result]) -> None:
        try:
            self._result = work(self._move)
        except Exception as error:
            self._problem = message_of(error) or type(error).__name__

    def _move(self) -> None:
        """Note progress, and end work that nobody waits for any more."""
        if self._abandoned:
            raise TimeoutError("given up: the storage did not answer in time")
        self._moved_s = time.monotonic()

    @property
    def running(self) -> bool:
        """Tell whether it has not ended."""
        return self._thread.is_alive()

    @property
    def still_s(self) -> float:
        """Seconds since it last came further."""
        return time.monotonic() - self._moved_s

    def join(self, seconds: float) -> None:
        """Wait for its end, but not longer."""
        self._thread.join(seconds)

    def end(self) -> tuple[Result | None, str | None]:
        """Give (result, problem), of which one is None; work that has not ended is abandoned, and changes no more."""
        if self.running:
            self._abandoned = True
            return None, f"has not come further for {self.still_s:.0f} s; is the storage well?"
        return self._result, self._problem
