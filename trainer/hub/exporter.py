"""Export checkpoints while training goes on: in a process of their own, one after another. Rank 0 alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ...model.config import ModelConfig
from ...model.hf.adapter import adapter_for
from .. import runtime as processes
from ..checkpoint.format import step_of, steps_in
from ..checkpoint.writer import discard
from ..sections import ExportSection
from .export import check_transformers

DIRECTORY = "hf"  # of a run directory
LEFTOVERS = ".step_*.partial"


class Outcome(NamedTuple):
    """What became of a checkpoint that was offered; no problem: it is exported, and `text` says how it was checked."""

    name: str
    text: str
    problem: str | None


class Exporter:
    """Exports the checkpoints of one run into RUN/hf; what fails there reaches nobody but by its outcome."""

    def __init__(self, run_dir: Path, section: ExportSection, last_step: int) -> None:
        """Remove what killed exports left; the caller holds the run directory's lock."""
        self._out, self._logs = run_dir / DIRECTORY, run_dir / "logs"
        self._section, self._last_step = section, last_step
        self._waiting: list[Path] = []
        self._current: tuple[Path, subprocess.Popen[bytes]] | None = None
        for partial in self._out.glob(LEFTOVERS):
            shutil.rmtree(partial, ignore_errors=True)

    def is_due(self, step: int) -> bool:
        """Tell whether the checkpoint of a step is to be exported."""
        return step % self._section.every_steps == 0 or step == self._last_step

    def offer_missing(self, checkpoints: Path, newest: int) -> None:
        """Have those exported that are due up to step `newest` and have no export: an attempt was killed."""
        for step, path in reversed(steps_in(checkpoints)):
            if step and step <= newest and self.is_due(step) and not (self._out / path.name).exists():
                self._waiting.append(path)

    def offer(self, directory: Path) -> None:
        """Have a new checkpoint exported, if it is due. An export of that name is of a line that was left, and goes."""
        if self.is_due(step_of(directory.name) or 0):
            discard(self._out / directory.name)
            self._waiting.append(directory)

    @property
    def busy(self) -> frozenset[str]:
        """Names of the step directories that are being exported or wait for it, and must not be removed."""
        current = [self._current[0]] if self._current is not None else []
        return frozenset(path.name for path in (*current, *self._waiting))

    def advance(self) -> list[Outcome]:
        """Begin the next export where none goes on; give how one ended. Returns at once."""
        ended = []
        if self._current is not None and self._current[1].poll() is not None:
            path, process = self._current
            self._current = None
            ended.append(self._outcome(path, process.returncode))
        if self._current is None and self._waiting:
            path = self._waiting[0]
            self._current = (path, self._start(path))  # before it leaves the list: it is busy all the while
            self._waiting.pop(0)
        return ended

    def close(self, wait_s: float) -> list[Outcome]:
        """Wait so long for each export that is due; what is not done by then is given up."""
        outcomes = self.advance()
        while self._current is not None:
            path, process = self._current
            try:
                process.wait(wait_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self._current = None
                left = [path, *self._waiting]
                self._waiting.clear()
                return [
                    *outcomes,
                    *(Outcome(each.name, "", "is left to the next start of the run") for each in left),
                ]
            outcomes += self.advance()
        return outcomes

    def _log(self, path: Path) -> Path:
        return self._logs / f"export_{path.name}.log"

    def _start(self, path: Path) -> subprocess.Popen[bytes]:
        self._logs.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "basestone.trainer.worker", "export", str(path)]
        command += [str(self._out / path.name), f"--dtype={self._section.dtype}"]
        command += [f"--licence={self._section.licence}", f"--background={os.getpid()}"]
        with open(self._log(path), "wb") as log:
            return subprocess.Popen(
                command,
                env=processes.environment_on_cpu(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C is for the run, which stops this
            )

    def _outcome(self, path: Path, code: int) -> Outcome:
        lines = self._log(path).read_text(errors="replace").strip().splitlines() or [""]
        if code == 0:
            return Outcome(path.name, lines[-1].partition(", ")[2], None)
        said = next((line for line in lines if line.startswith("error: ")), lines[-1])
        return Outcome(path.name, "", f"ended with {code}: {said.removeprefix('error: ')} ({self._log(path)})")


def check_exports(model: ModelConfig) -> None:
    """Refuse before training what no export could do.

    Raises:
        AdapterError: the model's Hugging Face class cannot hold it.
        ConfigError: a package is missing.
    """
    adapter_for(model)
    check_transformers("export")
