"""Traces of some optimizer steps by torch.profiler, for chrome://tracing and https://ui.perfetto.dev.

RUN/traces/rank_R_step_S.json.gz: rank R, from step S on.
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from ...data.storage import sync_directory
from ..console import RunConsole
from ..errors import message_of
from ..rundir import RunDirectory, warned_of
from ..runtime import Runtime
from ..sections import ProfileSection


class StepTracer:
    """Traces the steps that [profile] names; every rank has one, and outside these steps it does nothing.

    A trace that cannot be made or written costs a warning and an event.
    """

    def __init__(
        self,
        section: ProfileSection,
        runtime: Runtime,
        run_dir: Path,
        directory: RunDirectory | None,
        console: RunConsole,
        *,
        last_step: int,
    ) -> None:
        """Take what to trace; `last_step` is the run's."""
        self._runtime, self._folder = runtime, run_dir / "traces"
        self._directory, self._console = directory, console
        self._steps = range(0)
        if section.first_step is not None:
            self._steps = range(
                section.first_step, min(section.first_step + section.num_steps - 1, last_step) + 1
            )
        self._is_mine = runtime.rank in section.ranks
        self._profile: profile | None = None
        self._problem: str | None = None
        self._first = self._last = 0

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Trace what happens in the block where it is a step to trace; every rank calls this for every step."""
        if step not in self._steps:
            yield
            return
        if self._is_mine and not self._first:
            self._start(step)
        with record_function(f"optimizer step {step}"):
            yield
        self._last = step
        if step == self._steps[-1]:
            for rank, told in enumerate(self._runtime.gather(self._finish()) or []):
                if told is not None:
                    self._tell(step, told[0], f"rank {rank}: {told[1]}")

    def _start(self, step: int) -> None:
        self._first = step
        activities = [ProfilerActivity.CPU] + ([] if self._runtime.on_cpu else [ProfilerActivity.CUDA])
        try:
            traced = profile(activities=activities)
            traced.start()
        except RuntimeError as error:
            self._problem = message_of(error)
        else:
            self._profile = traced

    def _finish(self) -> tuple[str, str] | None:
        """Write the trace; give the event that tells of it, or why there is none. None where nothing was traced."""
        if (problem := self._problem) is not None:
            self._problem = None
            return "trace_failed", problem
        if self._profile is None:
            return None
        traced, self._profile = self._profile, None
        path = self._folder / f"rank_{self._runtime.rank}_step_{self._first}.json.gz"
        try:
            traced.stop()
            self._write(traced, path)
        except (OSError, RuntimeError) as error:
            return "trace_failed", message_of(error)
        return "trace", f"steps {self._first} to {self._last}: {path}"

    def _write(self, traced: profile, path: Path) -> None:
        # The profiler has a temporary file of its own; what it leaves on a full disk goes with the folder.
        self._folder.mkdir(parents=True, exist_ok=True)
        work = self._folder / f".rank_{self._runtime.rank}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        plain, packed = work / "trace.json", work / "trace.json.gz"
        try:
            traced.export_chrome_trace(str(plain))
            if not _is_whole(plain):  # the profiler says nothing of a full disk
                raise OSError(f"{path}: the trace is cut short; is the disk full?")
            with open(plain, "rb") as source, open(packed, "wb") as file:
                with gzip.open(file, "wb", compresslevel=6) as target:
                    shutil.copyfileobj(source, target)
                file.flush()
                os.fsync(file.fileno())
            os.replace(packed, path)
            sync_directory(self._folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _tell(self, step: int, event: str, message: str) -> None:
        if self._directory is not None:
            self._console.say(("warning: " if event == "trace_failed" else "") + f"trace of {message}")
            with warned_of("the trace was not recorded in events.jsonl"):
                self._directory.event(step, event, message)

    def close(self) -> None:
        """Write what was traced of a run that ends before the last of these steps; asks no other rank."""
        if (told := self._finish()) is not None:
            self._tell(self._last, told[0], f"rank {self._runtime.rank}: {told[1]}")


def _is_whole(trace: Path) -> bool:
    """Tell whether a file of JSON is there to its end."""
    if not trace.exists():
        return False
    with open(trace, "rb") as file:
        file.seek(max(0, trace.stat().st_size - 16))
        return file.read().rstrip().endswith(b"}")
