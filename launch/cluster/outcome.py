"""What a launch came to, by the run's own marks: launchers leave with 0 when they are killed. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...trainer.checkpoint.format import steps_in
from ...trainer.errors import EXIT_FAULT, EXIT_STOPPED
from ...trainer.preflight.limits import CHECKED
from ...trainer.rundir import STOP
from ..local import EXITS_THAT_SAY_WHY, FINAL_EXITS
from . import ends
from .job import Job

OWN_EXITS = (EXIT_FAULT, EXIT_STOPPED, *EXITS_THAT_SAY_WHY)
BY_A_NODE = "node\n"  # what STOP says where a signal to a node's entry made it


@dataclass(frozen=True)
class Outcome:
    """How a start ended: with an exit code of the run's, at a saved step (0 where there is none)."""

    exit_code: int
    step: int

    @property
    def is_final(self) -> bool:
        """Tell whether another start would change nothing: it is complete, or whoever gave the input must act."""
        return self.exit_code in FINAL_EXITS


def outcome(job: Job, launcher_code: int) -> Outcome:
    """Read how a start ended; what the launcher left with counts only where nothing else is known."""
    run_dir = Path(job.run_dir)
    step = newest_step(run_dir)
    end = ends.cause(job.folder)
    if ends.is_of_this_start(run_dir / (CHECKED if job.check else "COMPLETE"), job.folder):
        return Outcome(0, step)
    if end is not None and end.code in EXITS_THAT_SAY_WHY:
        return Outcome(end.code, step)
    if ends.is_of_this_start(run_dir / "RESUME", job.folder):
        return Outcome(EXIT_STOPPED, step)
    if end is not None:
        return Outcome(end.exit_code, step)
    return Outcome(launcher_code if launcher_code in OWN_EXITS else EXIT_FAULT, step)


def newest_step(run_dir: Path) -> int:
    """Give the newest saved step; 0 without one."""
    steps = steps_in(run_dir / "checkpoints")
    return steps[0][0] if steps else 0


def begin(job: Job) -> None:
    """Begin a start: what an earlier one left says nothing of it."""
    ends.clear(job.folder)
    ends.begin(job.folder)


def ask_to_stop(run_dir: Path) -> None:
    """Let the run finish its step, save and leave, wherever its processes are."""
    (run_dir / STOP).touch()
