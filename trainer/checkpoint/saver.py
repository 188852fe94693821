"""Save while training goes on: which ranks write what, in which order, and what is told of it.

A save has two parts: every rank writes its file, then rank 0 commits the directory. Each runs in a thread that speaks
to files alone. The ranks meet on their main threads: every step carries a flag that tells whether any rank still
works, and once none does, `advance` exchanges how it went. So nothing collective ever runs beside training's own, a
disk that hangs keeps nobody from training, and a rank that fails answers like any other.
"""

from __future__ import annotations

import functools
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...data.storage import write_atomic
from ...model.layout import Parameter
from ..engine_state import EngineState
from ..errors import CheckpointError, ConfigError, message_of
from ..runtime import Runtime
from ..sections import CheckpointSection
from .background import Background
from .copier import Copier
from .format import LEFTOVERS, step_name, steps_in
from .opening import CHECKPOINTS
from .reader import Reader
from .retention import StepFacts, heldout_loss, kept
from .share import TENSORS, Share, Staging
from .tensors import FP32_BYTES, index_of
from .writer import commit, discard, remove

log = logging.getLogger(__name__)
SPARE_BYTES = 64 << 20  # left on the disk for the run's other files
LIMIT_S = 1500.0  # a thread that comes no further for so long hangs
POLL_S = 30.0  # ranks that wait for each other meet so often: far within the timeout of their group


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended; `path` or `problem` is None. The same on every rank but for `blocked_s`."""

    step: int
    cause: str
    path: Path | None
    problem: str | None
    hangs: bool  # the problem is storage that does not answer
    blocked_s: float  # that training waited
    total_s: float


@dataclass
class _Flight:
    """A save that has begun."""

    step: int
    cause: str
    state: dict[str, Any]
    temporary: Path
    started_s: float
    work: Background[Any]
    committing: bool = False
    hangs: bool = False
    blocked_s: float = 0.0


def checkpoint_bytes(table: Mapping[str, Parameter]) -> int:
    """Give the size of the tensors of a checkpoint."""
    return sum(row.numel for row in table.values()) * len(TENSORS) * FP32_BYTES


def space_problem(run_dir: Path, num_bytes: int) -> str | None:
    """Tell where a checkpoint would not fit on the disk of a run directory, before a byte of it is written."""
    place = run_dir / CHECKPOINTS
    place = place if place.is_dir() else run_dir
    free, needed = shutil.disk_usage(place).free, int(num_bytes * 1.05) + SPARE_BYTES
    if free >= needed:
        return None
    return (
        f"a checkpoint needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on the disk of {place}; free "
        "some, lower checkpoint.keep_last, or choose another run directory"
    )


class Saver:
    """Writes the checkpoints of one run directory, one at a time."""

    def __init__(
        self,
        run_dir: Path,
        table: dict[str, Parameter],
        runtime: Runtime,
        engine_state: EngineState,
        section: CheckpointSection,
        *,
        asynchronous: bool,
        copier: Copier | None = None,
        in_use: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        """Remove what killed attempts left, and reserve the copy that asynchronous saves write from.

        Args:
            copier: rank 0's, which is offered every checkpoint; the caller closes it.
            in_use: gives the names of those that somebody else reads, and that must not be removed.

        Raises:
            ConfigError: on every rank, where not even one checkpoint fits on the disk.
        """
        self.directory = run_dir / CHECKPOINTS
        self._run_dir, self._table, self._runtime, self._section = run_dir, table, runtime, section
        self._copier, self._others_use = copier, in_use
        self._num_bytes = checkpoint_bytes(table)
        self._share = Share(engine_state, runtime, table)
        self._staging = Staging(self._share, runtime.device) if asynchronous else None
        self._flight: _Flight | None = None
        if runtime.rank == 0:
            self._clean()
        self._losses: dict[int, float | None] = {}  # of the checkpoints that are there
        self._newest = -1  # step that this attempt has committed
        self.failed_in_a_row = 0
        self.limit_s = LIMIT_S
        problem = space_problem(run_dir, self._num_bytes) if runtime.rank == 0 else None
        if problem := runtime.broadcast(problem):
            raise ConfigError(f"checkpoints: {problem}")

    # ---- where a save is ------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> tuple[int, float] | None:
        """Give the step of the save that has not ended, the same on every rank, and its age in seconds."""
        if self._flight is None:
            return None
        return self._flight.step, time.perf_counter() - self._flight.started_s

    @property
    def asynchronous(self) -> bool:
        """Tell whether saves are written from a copy."""
        return self._staging is not None

    @property
    def working(self) -> bool:
        """Tell whether this rank's thread works."""
        return self._flight is not None and self._flight.work.running

    def wait_copied(self) -> None:
        """Wait until masters and states may change: before every update."""
        if self._staging is None:
            return
        started_s = time.perf_counter()
        self._staging.wait()
        if self._flight is not None:
            self._flight.blocked_s += time.perf_counter() - started_s

    # ---- saving ---------------------------------------------------------------------------------------------

    def begin(
        self, step: int, state: dict[str, Any], *, cause: str = "save", wait: bool = False
    ) -> SaveOutcome | None:
        """Begin the save of a step, and with `wait`, or without a staging copy, end it; every rank calls this.

        Args:
            state: everything that is not a tensor, JSON-able; rank 0's counts, and it must not change any more.

        Returns:
            How it ended, or None while it goes on.
        """
        assert self._flight is None, "one save at a time"
        started_s = time.perf_counter()
        self._newest = min(self._newest, step)  # an earlier step than before: the run went back
        prepared = self._runtime.broadcast(self._prepare(step) if self._runtime.rank == 0 else None)
        if isinstance(prepared, str):
            return self._ended(SaveOutcome(step, cause, None, prepared, False, 0.0, 0.0))
        path = prepared / f"rank_{self._runtime.rank:05d}.bin"
        wait = wait or self._staging is None
        work = self._writing(path, None if wait else self._staging)
        self._flight = _Flight(step, cause, state, prepared, started_s, Background(work))
        if wait:
            return self.finish()
        self._flight.blocked_s = time.perf_counter() - started_s
        return None

    def _writing(self, path: Path, staging: Staging | None) -> Callable[[Callable[[], None]], dict[str, Any]]:
        runtime, share = self._runtime, self._share
        copy = staging.begin() if staging is not None else share.fragments

        def write(moved: Callable[[], None]) -> dict[str, Any]:
            if not runtime.on_cpu:
                torch.cuda.set_device(runtime.device)  # a thread begins on the first one
            return {**share.write(path, copy(), moved), "tp_rank": runtime.tp_rank, "tp_size": runtime.tp_size}

        return write

    def advance(self) -> SaveOutcome | None:
        """Take a save on, where no rank's thread works any more; every rank calls this.

        Returns:
            How it ended, or None while it goes on, or where there is none.
        """
        if self._flight is None:
            return None
        if not self._flight.committing:
            self._begin_commit(self._flight)
            return None
        return self._end_commit(self._flight)

    def finish(self, wait_s: float | None = None) -> SaveOutcome | None:
        """Wait until the save in flight has ended, if there is one; every rank calls this.

        Args:
            wait_s: leave it in flight where a part of it takes longer; by default only one that comes no further is
                given up.
        """
        if (flight := self._flight) is None:
            return None
        waited_s, outcome = time.perf_counter(), None
        if not flight.committing and self._all_end(flight, wait_s):
            self._begin_commit(flight)
        if flight.committing and self._all_end(flight, wait_s):
            outcome = self._end_commit(flight)
        if outcome is not None:
            return replace(outcome, blocked_s=outcome.blocked_s + time.perf_counter() - waited_s)
        flight.blocked_s += time.perf_counter() - waited_s
        return None

    def _all_end(self, flight: _Flight, wait_s: float | None) -> bool:
        """Wait until every rank's thread has ended or hangs, but not longer; tell whether it is so."""
        started_s = time.monotonic()
        while True:
            left_s = POLL_S if wait_s is None else started_s + wait_s - time.monotonic()
            flight.work.join(max(0.0, min(POLL_S, self.limit_s, left_s)))
            over = wait_s is not None and time.monotonic() - started_s >= wait_s
            hangs = flight.work.running and flight.work.still_s > self.limit_s
            states = self._runtime.gather_all((flight.work.running and not hangs, hangs, over))
            flight.hangs |= any(hangs for _, hangs, _ in states)
            if not any(works for works, _, _ in states):
                return True
            if states[0][2]:  # rank 0's clock decides for all
                return False

    def _begin_commit(self, flight: _Flight) -> None:
        report, problem = flight.work.end()
        reports = self._runtime.gather(f"rank {self._runtime.rank}: {problem}" if problem else report)
        work = functools.partial(self._commit, flight, reports) if reports else lambda _: None
        flight.work, flight.committing = Background(work), True

    def _end_commit(self, flight: _Flight) -> SaveOutcome:
        _, problem = flight.work.end()
        problem = self._runtime.broadcast(problem)
        self._flight = None
        path = None if problem else self.directory / step_name(flight.step)
        total_s = time.perf_counter() - flight.started_s
        return self._ended(
            SaveOutcome(flight.step, flight.cause, path, problem, flight.hangs, flight.blocked_s, total_s)
        )

    def _ended(self, outcome: SaveOutcome) -> SaveOutcome:
        self.failed_in_a_row = self.failed_in_a_row + 1 if outcome.problem else 0
        return outcome

    # ---- rank 0 ---------------------------------------------------------------------------------------------

    def _prepare(self, step: int) -> Path | str:
        """Make the directory to write in; or give what forbids the save."""
        # The name of an attempt: what a killed one left is never mixed in.
        temporary = self.directory / f".tmp-{step_name(step)}-{uuid.uuid4().hex[:8]}"
        try:
            if problem := space_problem(self._run_dir, self._num_bytes):
                return problem
            temporary.mkdir(parents=True)
        except OSError as error:
            return f"rank 0: {message_of(error)}"
        return temporary

    def _commit(self, flight: _Flight, reports: list[Any], moved: Callable[[], None]) -> None:
        """Give the directory its name, then remove what is no longer kept.

        Storage that hung and wakes finds itself given up by `moved`: later saves may have been committed meanwhile.
        """
        final = self.directory / step_name(flight.step)
        try:
            if failed := [report for report in reports if isinstance(report, str)]:
                raise CheckpointError("; ".join(failed))
            if final.exists():  # left by an attempt that was rolled back behind it
                if final.name in self._in_use:
                    raise CheckpointError(
                        f"{final}: is of a line that was left, and still being copied or exported"
                    )
                remove([final])
            commit(flight.temporary, final, index_of(self._table, TENSORS, reports), flight.state, moved)
        except Exception:
            shutil.rmtree(flight.temporary, ignore_errors=True)
            raise
        moved()
        self._newest = max(self._newest, flight.step)
        self._hint(final)
        if self._copier is not None:
            self._copier.offer(final)
        self._losses[flight.step] = heldout_loss(flight.state)
        self._prune()

    def _hint(self, final: Path) -> None:
        """Write `latest`, by which nothing is decided: a failure costs the hint, not the checkpoint."""
        try:
            write_atomic(self._run_dir / "latest", f"{final.name}\n".encode())
        except OSError as error:
            log.warning("latest was not written: %s", message_of(error))

    def _prune(self) -> None:
        """Remove what is not kept; a failure costs space, not the checkpoint.

        Later steps are damaged, or of a line that was left: a resume must not go on from them, and they must not push
        out the ones that it needs.
        """
        try:
            steps = dict(steps_in(self.directory))
            self._losses = {step: self._loss_of(step, path) for step, path in steps.items()}
            stay = kept([StepFacts(*row) for row in self._losses.items()], self._section, self._newest)
            remove(path for step, path in steps.items() if step not in stay and path.name not in self._in_use)
        except OSError as error:
            log.warning("old checkpoints were not removed: %s", message_of(error))

    @property
    def _in_use(self) -> frozenset[str]:
        """Names of the checkpoints that are being copied elsewhere or exported."""
        copied = self._copier.busy if self._copier is not None else frozenset()
        return copied | self._others_use()

    def _loss_of(self, step: int, path: Path) -> float | None:
        """Give the held-out loss of a checkpoint, read once from one that an earlier attempt wrote."""
        if step in self._losses or not self._section.keep_best:
            return self._losses.get(step)
        try:
            return heldout_loss(Reader(path).state())
        except (OSError, CheckpointError):
            return None

    def _clean(self) -> None:
        """Remove what killed attempts left, before anything new is written: the run holds its directory's lock."""
        if self.directory.is_dir():
            for path in self.directory.glob(LEFTOVERS):
                with suppress(OSError):
                    discard(path)
