"""Starts a launcher, again and again where it helps, until the run has an outcome.

`python -m basestone.launch.cluster.supervise TOKEN` is what a Slurm batch script becomes. Imports no torch.

Where a signal says that time is up, the run is asked to stop by a file in its directory, which every launcher lets
through: it saves and marks RESUME. A Slurm job that was told by USR2 to make room goes back into the queue. Starts that
make no progress are counted, requeues too, and there are not many of them.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ...data.storage import write_atomic
from ...trainer.errors import EXIT_STOPPED, BasestoneError, ConfigError, exit_code_of, message_of
from .. import environ
from . import ends, outcome, slurm
from .job import Job, decode, read_job
from .launcher import Asked, run_launcher, say

WAIT_S = 5.0  # before another start
REQUEUE_S = 60.0  # that Slurm has to end this process


class Supervisor:
    """Runs the starts of one launch."""

    def __init__(
        self,
        job: Job,
        command: Callable[[], list[str]],
        environment: dict[str, str],
        directory: Path | None = None,
    ) -> None:
        """Take what to start: `command` gives the launcher's command line, anew for each start."""
        self._job, self._command, self._environment, self._directory = job, command, environment, directory
        self.asked = Asked(job)
        self._stopped = False

    def run(self, clean_up: Callable[[], None] = lambda: None) -> outcome.Outcome:
        """Start until there is an outcome, or no progress; `clean_up` ends what a start left on other nodes.

        Raises:
            ConfigError: the first start cannot be begun.
        """
        with self.asked.listening():
            outcome.begin(self._job)
            failures, step = 0, outcome.newest_step(Path(self._job.run_dir))
            command = self._command()
            clean_up()
            while True:
                if self._stops():
                    return outcome.Outcome(EXIT_STOPPED, step)
                outcome.begin(self._job)
                code = run_launcher(command, self._environment, self._job.folder, self.asked, self._directory)
                found = outcome.outcome(self._job, code)
                clean_up()
                if found.is_final:
                    self.asked.take_back()  # it came too late to be followed
                    return found
                self.asked.take_back_of(outcome.BY_A_NODE)  # srun ends the other nodes when one fails
                if self._job.check and self.asked.signals:
                    return outcome.Outcome(EXIT_STOPPED, step)
                failures, step = (0 if found.step > step else failures + 1), max(step, found.step)
                if (end := ends.cause(self._job.folder)) is not None:
                    say(f"error: {end.tell()}")
                elif code not in (0, *outcome.OWN_EXITS):
                    say(
                        f"error: {Path(command[0]).name} left with {code} before any rank did; its own words are above"
                    )
                if self._job.check:
                    return found
                again = self._next(found, failures)
                while again is None and failures <= self._job.max_restarts:  # hosts that are not back yet
                    failures += 1
                    again = self._next(found, failures)
                if not again:
                    return outcome.Outcome(EXIT_STOPPED if self._stopped else found.exit_code, step)
                command = again

    def _stops(self) -> bool:
        """Follow a request to stop that came while nothing ran."""
        if self.asked.to_stop:
            self.asked.take_back()
            self._stopped = True
            say("stopped before a start")
        return self._stopped

    def _next(self, found: outcome.Outcome, failures: int) -> list[str] | None:
        """Wait, and give the next start's command line: empty where there is none, None where it cannot be begun."""
        if failures > self._job.max_restarts:
            say(f"no progress in {failures} start(s) from step {found.step}: giving up")
            return []
        told = f" ({failures} of {self._job.max_restarts} in vain)" if failures else ""
        say(f"starting again from step {found.step}{told}")
        end_s = time.monotonic() + WAIT_S
        while time.monotonic() < end_s and not self.asked.to_stop:
            time.sleep(0.1)
        if self._stops():
            return []
        try:
            return self._command()
        except ConfigError as error:
            say(f"error: {error}")
            return None


def main() -> None:
    """Be the batch script of a Slurm job."""
    try:
        code = run_batch(read_job(decode(sys.argv[1])))
    except BasestoneError as error:
        say(f"error: {message_of(error)}")
        code = exit_code_of(error)
    sys.exit(code)


def run_batch(job: Job) -> int:
    """Run the job's steps, and put it back into the queue where it was told to make room; give its exit code."""
    given, over = environ.slurm(), job.folder / "over"
    is_array = bool(job.options.get("array"))
    if is_array and over.exists():
        say(f"nothing is left for this job of the array: {over.read_text().strip()}")
        return 0
    meeting = {"BASESTONE_ENDPOINT": slurm.endpoint(given)}
    environment = environ.agent_environment({**job.environment, **meeting})
    supervisor = Supervisor(job, lambda: slurm.step_command(job, given), environment)
    before = outcome.newest_step(Path(job.run_dir))
    found = supervisor.run()
    makes_room = found.exit_code == EXIT_STOPPED and signal.SIGUSR2 in supervisor.asked.signals
    if is_array and found.is_final and not makes_room:
        over.write_text(f"the one before left with {found.exit_code} at step {found.step}\n")
    if not makes_room or is_array:
        if not is_array or over.exists() or slurm.is_last_of_array(given):
            job.forget_secrets()
        return found.exit_code
    count = _count_requeues(job, progress=found.step > before)
    if count["in_vain"] > job.max_restarts or count["all"] > job.options["max_requeues"]:
        say(f"requeued {count['all']} times, {count['in_vain']} in a row without progress: giving up")
        job.forget_secrets()
        return found.exit_code
    say(f"saved at step {found.step}: back into the queue")
    if subprocess.run(slurm.requeue_command(given), check=False).returncode != 0:
        say("Slurm does not take it back: launch it again")
        job.forget_secrets()
        return found.exit_code
    time.sleep(REQUEUE_S)  # Slurm ends this process now; leaving by itself would end the job
    return found.exit_code


def forget(job: Job) -> None:
    """Forget what an earlier launch counted and decided."""
    for name in ("requeues.json", "over"):
        (job.folder / name).unlink(missing_ok=True)


def _count_requeues(job: Job, *, progress: bool) -> dict[str, int]:
    path = job.folder / "requeues.json"
    count = {"all": 0, "in_vain": 0}
    if path.exists():
        count |= json.loads(path.read_text())
    count = {"all": count["all"] + 1, "in_vain": 0 if progress else count["in_vain"] + 1}
    write_atomic(path, json.dumps(count).encode())
    return count


if __name__ == "__main__":
    main()
