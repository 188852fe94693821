"""Copy checkpoints to another place while training goes on. Imports no torch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

from .format import step_of
from .remote import Copying, copy_step, set_aside_later


class Outcome(NamedTuple):
    """What became of a step directory that was offered, or of one at the other place; no problem: it is there."""

    name: str
    problem: str | None


class Copier:
    """Copies the newest step directory that it was offered; nothing that fails or hangs there reaches the caller."""

    def __init__(self, place: str, *, threads: int, attempts: int = 5) -> None:
        """Start nothing before the first offer.

        Args:
            threads: files at once.
            attempts: tries of each file.
        """
        self._place, self._stop = place, threading.Event()
        self._copying = Copying(threads=threads, attempts=attempts, stop=self._stop)
        self._changed = threading.Condition()
        self._current: Path | None = None
        self._waiting: Path | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._outcomes: list[Outcome] = []

    def offer(self, directory: Path) -> None:
        """Have a step directory copied; returns at once. One that still waits is passed over for this one."""
        with self._changed:
            assert not self._closed
            if self._waiting is not None:
                self._tell(
                    self._waiting.name, f"was passed over for {directory.name}: copies take longer than saves"
                )
            self._waiting = directory
            if self._thread is None:
                # A daemon: storage that hangs must not keep a process from leaving.
                self._thread = threading.Thread(target=self._work, name="checkpoint-copier", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def busy(self) -> frozenset[str]:
        """Names of the step directories that are being copied or wait for it, and must not be removed."""
        with self._changed:
            return frozenset(path.name for path in (self._current, self._waiting) if path is not None)

    def take_outcomes(self) -> list[Outcome]:
        """Give what has been decided since the last call, in order."""
        with self._changed:
            taken, self._outcomes = self._outcomes, []
        return taken

    def close(self, wait_s: float) -> None:
        """Wait so many seconds at most for what was offered; what is not there by then is an outcome."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._current is None and self._waiting is None, wait_s):
                for path in (self._current, self._waiting):
                    if path is not None:
                        self._tell(
                            path.name,
                            f"was not copied within {wait_s:g} s of the end; it lies in the run directory",
                        )
                self._waiting = None
            self._stop.set()  # a copy that hangs begins no other file should it wake

    def _tell(self, name: str, problem: str | None) -> None:
        self._outcomes.append(Outcome(name, problem))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                directory, self._waiting = self._waiting, None
                self._current = directory
            outcomes = self._copy(directory)
            with self._changed:
                self._outcomes += [] if self._stop.is_set() else outcomes
                self._current = None
                self._changed.notify_all()

    def _copy(self, directory: Path) -> list[Outcome]:
        """Copy one directory; whatever goes wrong is an outcome."""
        try:
            copy_step(directory, self._place, self._copying)
            later = set_aside_later(step_of(directory.name) or 0, self._place, self._copying)
        except Exception as error:
            return [Outcome(directory.name, " ".join(str(error).split()) or type(error).__name__)]
        told = f"is later than {directory.name} and of a line that was left; its copy no longer counts"
        return [Outcome(directory.name, None), *(Outcome(name, told) for name in later)]
