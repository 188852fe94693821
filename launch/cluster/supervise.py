"""Starts a launcher, again and again where it helps, until the run has an outcome.

`python -m basestone.launch.cluster.supervise TOKEN` is what a Slurm batch script becomes. Imports no torch.

Where a signal says that time is up, the run is asked to stop by a file in its directory, which every launcher lets
through: it saves and marks RESUME. A Slurm job that was told by USR2 to make room goes back into the queue. Starts that
make no progress are counted, requeues too, and there are not many of them.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...data.storage import write_atomic
from ...trainer.errors import EXIT_STOPPED, BasestoneError, exit_code_of, message_of
from .. import environ, local
from . import ends, outcome, slurm
from .job import Job, decode, read_job

WAIT_S = 5.0  # before another start
LEFT_OVER_S = 60.0  # that a launcher has, once a rank has failed, to end by itself
POLL_S = 0.2


class Supervisor:
    """Runs the starts of one launch."""

    def __init__(self, job: Job, command: Callable[[], list[str]], environment: dict[str, str]) -> None:
        """Take what to start: `command` gives the launcher's command line, anew for each start."""
        self._job, self._command, self._environment = job, command, environment
        self.asked: list[int] = []  # signals that came
        self._in_a_hurry = False

    def run(self, clean_up: Callable[[], None] = lambda: None) -> outcome.Outcome:
        """Start until there is an outcome, or no progress; `clean_up` ends what a start left on other nodes."""
        failures, before = 0, outcome.newest_step(Path(self._job.run_dir))
        with self._signals():
            while True:
                outcome.begin(self._job)
                found = outcome.outcome(self._job, self._start())
                clean_up()
                if found.is_final or self.asked:
                    return found
                failures = 0 if found.step > before else failures + 1
                before = max(before, found.step)
                self._explain()
                if failures > self._job.max_restarts:
                    _say(f"no progress in {failures} start(s) from step {found.step}: giving up")
                    return found
                told = f" ({failures} of {self._job.max_restarts} in vain)" if failures else ""
                _say(f"starting again from step {found.step}{told}")
                time.sleep(WAIT_S)

    def _start(self) -> int:
        child = subprocess.Popen(
            self._command(),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            preexec_fn=functools.partial(local.die_with_parent, os.getpid()),
            process_group=0,
        )
        failed_s: float | None = None
        while child.poll() is None:
            time.sleep(POLL_S)
            if failed_s is None and ends.cause(self._job.folder) is not None:
                failed_s = time.monotonic()
            if failed_s is not None and time.monotonic() - failed_s > LEFT_OVER_S:
                _say("a rank has failed, and the launcher does not end: ending it")
                _end(child)
            if self._in_a_hurry:
                _end(child)
        return child.returncode

    def _explain(self) -> None:
        if (end := ends.cause(self._job.folder)) is not None:
            _say(f"error: {end.tell()}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def ask(number: int, _: object) -> None:
            self.asked.append(number)
            if len(self.asked) > 1 and number != signal.SIGUSR2:
                _say(f"{signal.Signals(number).name} again: ending it now; the last save is good")
                self._in_a_hurry = True
                return
            outcome.ask_to_stop(Path(self._job.run_dir))
            _say(f"{signal.Signals(number).name}: the run is asked to save and stop (again: leave at once)")

        before = {
            number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _end(child: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(child.pid, number)
        try:
            child.wait(timeout=local.GRACE_S)
        except subprocess.TimeoutExpired:
            continue
        return


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Be the batch script of a Slurm job."""
    try:
        code = run_batch(read_job(decode(sys.argv[1])))
    except BasestoneError as error:
        _say(f"error: {message_of(error)}")
        code = exit_code_of(error)
    sys.exit(code)


def run_batch(job: Job) -> int:
    """Run the job's steps, and put it back into the queue where it was told to make room; give its exit code."""
    given = environ.slurm()
    if job.options.get("array") and outcome.is_complete(job):
        _say("complete already: nothing is left for this job of the array")
        return 0
    environment = environ.agent_environment({**job.environment, "BASESTONE_ENDPOINT": slurm.endpoint(given)})
    supervisor = Supervisor(job, lambda: slurm.step_command(job, given), environment)
    before = outcome.newest_step(Path(job.run_dir))
    found = supervisor.run()
    if found.exit_code == 0:
        job.forget_secrets()
    if found.exit_code != EXIT_STOPPED or signal.SIGUSR2 not in supervisor.asked or job.options.get("array"):
        return found.exit_code
    count = _count_requeues(job, progress=found.step > before)
    if count["in_vain"] > job.max_restarts or count["all"] > job.options["max_requeues"]:
        _say(f"requeued {count['all']} times, {count['in_vain']} in a row without progress: giving up")
        return found.exit_code
    _say(f"saved at step {found.step}: back into the queue")
    subprocess.run(slurm.requeue_command(given), check=False)
    time.sleep(LEFT_OVER_S)  # Slurm ends this process now; leaving by itself would end the job
    return found.exit_code


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
