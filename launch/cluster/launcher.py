"""One start of a launcher: its process, the signals that come meanwhile, and its end. Imports no torch."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...trainer.errors import EXIT_FAULT
from ...trainer.rundir import STOP
from .. import local
from . import ends, outcome
from .job import Job

LEFT_OVER_S = 60.0  # that a launcher has, once a rank has ended the run, to end by itself
POLL_S = 0.2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


class Asked:
    """Signals that ask a launch to stop. The first asks the run, by RUN/STOP; another one ends the launcher.

    What comes when the run has ended asks nothing of it, and leaves no file that would stop the next.
    """

    def __init__(self, job: Job, by: str = "") -> None:
        """Listen to nothing yet; `by` is what the file is to say."""
        self._job, self._by = job, by
        self._stop = Path(job.run_dir) / STOP
        self._num_signals = 0
        self.signals: list[int] = []  # those that came before the end of the run
        self.in_a_hurry = False

    @property
    def to_stop(self) -> bool:
        """Tell whether a signal or the file asks the run to stop."""
        return bool(self.signals) or self._stop.exists()

    def take_back(self) -> None:
        """Remove the file, where nothing is left that it could stop."""
        self._stop.unlink(missing_ok=True)

    def take_back_of(self, by: str) -> None:
        """Remove the file where it says so."""
        with suppress(OSError):
            if self._stop.read_text() == by:
                self.take_back()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals."""
        taken = [number for number in SIGNALS if number not in local.ignored_here()]
        before = {number: signal.signal(number, self._take) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _: object) -> None:
        self._num_signals += 1
        if self._num_signals > 1 and number != signal.SIGUSR2:
            self.in_a_hurry = True
            say(f"{signal.Signals(number).name} again: ending it now; the last save is good")
            return
        if outcome.outcome(self._job, EXIT_FAULT).is_final:
            say(f"{signal.Signals(number).name}: the run has ended; leaving in a moment")
            return
        self.signals.append(number)
        if self._job.check:
            self.in_a_hurry = True
            say(f"{signal.Signals(number).name}: ending the check")
            return
        with suppress(OSError), self._stop.open("x") as file:  # a full disk: a second signal still ends it
            file.write(self._by)
        say(f"{signal.Signals(number).name}: the run is asked to save and stop (again: leave at once)")


def run_launcher(
    command: list[str], environment: dict[str, str], folder: Path, asked: Asked, directory: Path | None = None
) -> int:
    """Run a launcher to its end, which a rank that has ended the run brings about where it does not come by itself."""
    child = subprocess.Popen(
        command,
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        preexec_fn=functools.partial(local.die_with_parent, os.getpid()),
        process_group=0,
    )
    failed_s: float | None = None
    while child.poll() is None:
        time.sleep(POLL_S)
        end = ends.cause(folder)
        if (
            end is None or end.code not in local.EXITS_THAT_SAY_WHY
        ):  # ranks may have been started again in place
            failed_s = None
        elif failed_s is None:
            failed_s = time.monotonic()
        if failed_s is not None and time.monotonic() - failed_s > LEFT_OVER_S:
            say("a rank has ended the run, and the launcher does not end: ending it")
            _end(child)
        if asked.in_a_hurry:
            _end(child)
    return child.returncode


def _end(child: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(child.pid, number)
        try:
            child.wait(timeout=local.GRACE_S)
        except subprocess.TimeoutExpired:
            continue
        return


def say(text: str) -> None:
    """Tell people, on the error stream; nobody may be there any more."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
