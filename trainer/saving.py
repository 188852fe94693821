"""When a run saves, and what is told of it. The writing itself is in checkpoint/saver.py."""

from __future__ import annotations

import time
from typing import Any

from .checkpoint.saver import SaveOutcome, Saver
from .console import RunConsole
from .errors import CheckpointError
from .rundir import RunDirectory
from .sections import CheckpointSection

LONGEST_WAIT_S = 60.0  # of training, for the save before the one that is due


class Saving:
    """Begins saves when they are due, one at a time, and books how they ended."""

    def __init__(
        self, saver: Saver, section: CheckpointSection, directory: RunDirectory | None, console: RunConsole
    ) -> None:
        """Begin to count the minutes; `directory` is rank 0's."""
        self._saver, self._section, self._directory, self._console = saver, section, directory, console
        self._begun_s, self.longest_wait_s = time.monotonic(), LONGEST_WAIT_S
        self._overdue_told = False

    def flags(self) -> tuple[bool, bool]:
        """Tell whether this rank's save still works, and whether the minutes are over on rank 0's clock."""
        minutes, clock = self._section.every_minutes, self._directory is not None
        due = clock and minutes is not None and time.monotonic() - self._begun_s >= minutes * 60
        return self._saver.working, due

    def advance(self, *, working: bool) -> None:
        """Take the save in flight on, where no rank works at it any more; every rank calls this after every step.

        Raises:
            CheckpointError: too many saves in a row have failed, on every rank.
        """
        if not working:
            self._book(self._saver.advance())
            return
        step, age_s = self._saver.in_flight or (0, 0.0)
        if age_s > self._saver.limit_s and not self._overdue_told:
            self._overdue_told = True
            text = f"has not ended after {age_s:.0f} s; training goes on unsaved; is the storage well?"
            self._tell(step, "save_hangs", text)

    def is_due(self, step: int, *, minutes_over: bool) -> bool:
        """Tell whether to save after `step` steps."""
        every = self._section.every_steps
        return minutes_over or (every > 0 and step % every == 0)

    def save(self, step: int, state: dict[str, Any], *, cause: str = "save", wait: bool = False) -> None:
        """Save, and with `wait` see it through; every rank calls this.

        The save before it is waited for, and where that takes long this one is left out.

        Raises:
            CheckpointError: it failed, and was to be waited for or was one too many; on every rank.
        """
        self._book(self._saver.finish(None if wait else self.longest_wait_s))
        self._begun_s = time.monotonic()
        if self._saver.in_flight is not None:
            self._tell(
                step, "save_skipped", f"is left out: that of step {self._saver.in_flight[0]} is being written"
            )
            return
        self._overdue_told = False
        outcome = self._saver.begin(step, state, cause=cause, wait=wait)
        self._book(outcome)
        if wait and outcome is not None and outcome.problem:
            raise CheckpointError(f"the checkpoint of step {step} was not written: {outcome.problem}")

    def finish(self) -> None:
        """Wait for the save in flight; every rank calls this."""
        self._book(self._saver.finish())

    def _book(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        if outcome.path is not None:
            if self._directory is not None:
                times = f"in {outcome.total_s:.1f} s, of which training waited {outcome.blocked_s:.2f} s"
                self._directory.event(outcome.step, outcome.cause, f"{outcome.path.name} {times}")
                self._directory.save_ledger(durable=True)
            return
        self._tell(outcome.step, "save_failed", f"was not written: {outcome.problem}")
        if self._saver.failed_in_a_row >= self._section.max_failed_saves:
            raise CheckpointError(
                f"{self._saver.failed_in_a_row} saves in a row have failed (checkpoint.max_failed_saves), the last of "
                f"step {outcome.step}: {outcome.problem}"
            )

    def _tell(self, step: int, event: str, text: str) -> None:
        if self._directory is not None:
            self._directory.event(step, event, f"the checkpoint of step {step} {text}")
            self._console.say(f"the checkpoint of step {step} {text}")
