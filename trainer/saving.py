"""When a run saves, and what is told of it. The writing itself is in checkpoint/saver.py."""

from __future__ import annotations

import time
from typing import Any

from ..data.reading.transport import shown
from .checkpoint.copier import Copier
from .checkpoint.format import step_of
from .checkpoint.saver import SaveOutcome, Saver
from .config import RunConfig
from .console import RunConsole
from .errors import CheckpointError
from .hub.exporter import Exporter, Outcome
from .rundir import RunDirectory

COPY_AT_END_S, COPY_AT_STOP_S = 3600.0, 30.0  # that the end of a run waits for copies elsewhere
EXPORT_AT_END_S = 3600.0  # that the end of a run waits for each export
LONGEST_WAIT_S = 60.0  # of training, for the save before the one that is due


class Saving:
    """Begins saves when they are due, one at a time, and books how they ended."""

    def __init__(
        self,
        saver: Saver,
        copier: Copier | None,
        run: RunConfig,
        directory: RunDirectory | None,
        console: RunConsole,
        exporter: Exporter | None = None,
    ) -> None:
        """Begin to count the minutes; `copier`, `directory` and `exporter` are rank 0's."""
        self._saver, self._copier, self._section = saver, copier, run.checkpoint
        self._every_steps = (run.checkpoint.every_steps, run.export.every_steps)
        self._directory, self._console, self._exporter = directory, console, exporter
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
        self._tell_copies()
        if self._exporter is not None:
            self._tell_exports(self._exporter.advance())
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
        return minutes_over or any(every > 0 and step % every == 0 for every in self._every_steps)

    def save(self, step: int, state: dict[str, Any], *, cause: str = "save", wait: bool = False) -> None:
        """Save, and with `wait` see it through; every rank calls this.

        The save before it is waited for, and where that takes long this one is left out.

        Raises:
            CheckpointError: it failed, and was to be waited for or was one too many; on every rank.
        """
        self._book(self._saver.finish(None if wait else self.longest_wait_s), last_word=not wait)
        self._begun_s = time.monotonic()
        if self._saver.in_flight is not None:
            self._tell(
                step, "save_skipped", f"is left out: that of step {self._saver.in_flight[0]} is being written"
            )
            return
        self._overdue_told = False
        outcome = self._saver.begin(step, state, cause=cause, wait=wait)
        self._book(outcome, last_word=not wait)
        if wait and outcome is not None and outcome.problem:
            raise CheckpointError(f"the checkpoint of step {step} was not written: {outcome.problem}")

    def finish(self) -> None:
        """Wait for the save in flight; every rank calls this."""
        self._book(self._saver.finish())

    def close(self, step: int, *, stopped: bool) -> None:
        """Wait for copies elsewhere, on rank 0, after the last exchange of the ranks."""
        if self._copier is not None:
            if self._copier.busy:
                self._console.say(
                    f"copying {', '.join(sorted(self._copier.busy))} to {shown(self._section.remote or '')}"
                )
            self._copier.close(COPY_AT_STOP_S if stopped else COPY_AT_END_S)
            self._tell_copies(step)

        if self._exporter is not None:
            if self._exporter.busy and not stopped:
                self._console.say(f"exporting {', '.join(sorted(self._exporter.busy))}")
            self._tell_exports(self._exporter.close(0.0 if stopped else EXPORT_AT_END_S))

    def give_up_exports(self) -> None:
        """Stop what is left of exports where the run has failed; the next start does them again."""
        if self._exporter is not None:
            self._exporter.close(0.0)

    def _tell_exports(self, outcomes: list[Outcome]) -> None:
        for name, text, problem in outcomes:
            assert self._directory is not None
            event = "export" if problem is None else "export_failed"
            self._directory.event(step_of(name) or 0, event, f"hf/{name}: {problem or text}")
            self._console.say(f"{event.replace('_', ' ')}: hf/{name}: {problem or text}")

    def _tell_copies(self, step: int | None = None) -> None:
        for name, problem in self._copier.take_outcomes() if self._copier is not None else ():
            assert self._directory is not None
            at = step_of(name) if step is None else step
            self._directory.event(at or 0, "remote", f"{name} {problem or 'is copied'}")
            if problem:
                self._console.say(f"{shown(self._section.remote or '')}: {name} {problem}")

    def _book(self, outcome: SaveOutcome | None, *, last_word: bool = True) -> None:
        """Record how a save ended; with `last_word` the run ends where it is one failure too many."""
        if outcome is None:
            return
        if outcome.path is not None:
            if self._directory is not None:
                times = f"in {outcome.total_s:.1f} s, of which training waited {outcome.blocked_s:.2f} s"
                self._directory.event(outcome.step, outcome.cause, f"{outcome.path.name} {times}")
                self._directory.save_ledger(durable=True)
            if self._exporter is not None:
                self._exporter.offer(outcome.path)
            return
        self._tell(outcome.step, "save_failed", f"was not written: {outcome.problem}")
        if outcome.hangs and not self._saver.asynchronous:
            # Its thread may wake, and read what an update writes.
            raise CheckpointError(f"the checkpoint of step {outcome.step} was not written: {outcome.problem}")
        if last_word and self._saver.failed_in_a_row >= self._section.max_failed_saves:
            raise CheckpointError(
                f"{self._saver.failed_in_a_row} saves in a row have failed (checkpoint.max_failed_saves), the last of "
                f"step {outcome.step}: {outcome.problem}"
            )

    def _tell(self, step: int, event: str, text: str) -> None:
        if self._directory is not None:
            self._directory.event(step, event, f"the checkpoint of step {step} {text}")
            self._console.say(f"the checkpoint of step {step} {text}")
