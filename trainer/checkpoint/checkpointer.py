"""Save and resume: which ranks write what, in which order, and which checkpoint a run goes on from.

The format is in format.py, the mapping between layouts in tensors.py. Every rank meets in `runtime.control` only;
an exception on one rank is gathered as a value, so that nobody waits for a rank that has left.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...data.storage import write_atomic
from ...model.layout import Parameter
from ..engine_state import MASTER, STATE_KEYS, EngineState
from ..errors import CheckpointError, ConfigError, message_of
from ..runtime import Runtime
from .format import step_name, steps_in
from .reader import Reader
from .tensors import CheckpointTensors, index_of
from .writer import RankWriter, commit, remove

log = logging.getLogger(__name__)
TENSORS = [MASTER, *STATE_KEYS]


class Checkpointer:
    """Writes and reads the checkpoints of one run directory."""

    def __init__(self, run_dir: Path, table: dict[str, Parameter], runtime: Runtime, *, keep_last: int) -> None:
        self.directory = run_dir / "checkpoints"
        self._run_dir, self._table, self._runtime, self._keep_last = run_dir, table, runtime, keep_last
        self._numbers = {name: number for number, name in enumerate(table)}

    def save(self, step: int, engine_state: EngineState, state: dict[str, Any]) -> Path:
        """Write a step directory; every rank calls this with the same step.

        Args:
            state: everything that is not a tensor, JSON-able; rank 0's counts.

        Raises:
            CheckpointError: on every rank, naming the rank that failed and why. Nothing under a final name changes.
        """
        runtime, final = self._runtime, self.directory / step_name(step)
        temporary = runtime.broadcast(self.directory / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}")
        problem = self._make(temporary) if runtime.rank == 0 else None
        problem = runtime.broadcast(problem)  # nobody writes before the directory is there
        if problem is None:
            try:
                report: dict[str, Any] | str = self._write_rank(temporary, engine_state)
            except OSError as error:
                report = f"rank {runtime.rank}: {error}"
            reports = runtime.gather(report)
            if runtime.rank == 0:
                problem = self._commit(temporary, step, reports or [], state)
            problem = runtime.broadcast(problem)
        if problem:
            raise CheckpointError(f"the checkpoint of step {step} was not written: {problem}")
        return final

    @staticmethod
    def _make(temporary: Path) -> str | None:
        """Make the directory to write in; give what went wrong, or None."""
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            return f"rank 0: {error}"
        return None

    def _write_rank(self, temporary: Path, engine_state: EngineState) -> dict[str, Any]:
        runtime = self._runtime
        idle = engine_state.is_replicated and runtime.dp_rank != 0
        fragments: list[list[int]] = []
        with RankWriter(temporary / f"rank_{runtime.rank:05d}.bin") as writer:
            for fragment in engine_state.fragments() if not idle else ():
                if not fragment.owned:
                    continue
                number = self._numbers[fragment.name]
                fragments.append([number, fragment.start, fragment.numel, writer.written])
                for key in TENSORS:
                    data = fragment.tensors[key].cpu().contiguous()
                    writer.write(data.view(torch.uint8).numpy().data)
        return {
            "file": writer.path.name,
            "bytes": writer.written,
            "tp_rank": runtime.tp_rank,
            "tp_size": runtime.tp_size,
            "fragments": fragments,
            "blocks": writer.blocks,
        }

    def _commit(self, temporary: Path, saved: int, reports: list[Any], state: dict[str, Any]) -> str | None:
        """Rank 0: commit and prune; give what went wrong, or None."""
        final = self.directory / step_name(saved)
        failed = [report for report in reports if isinstance(report, str)]
        try:
            if failed:
                raise CheckpointError("; ".join(failed))
            if final.exists():  # left by an attempt that was rolled back behind it
                remove([final])
            commit(temporary, final, index_of(self._table, TENSORS, reports), state)
        except (OSError, CheckpointError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            return str(error)
        self._hint(final)
        self._prune(saved)
        return None

    def _hint(self, final: Path) -> None:
        """Write `latest`, by which nothing is decided: a failure costs the hint, not the checkpoint."""
        try:
            write_atomic(self._run_dir / "latest", f"{final.name}\n".encode())
        except OSError as error:
            log.warning("latest was not written: %s", message_of(error))

    def _prune(self, saved: int) -> None:
        """Remove what the run no longer goes on from; a failure costs space, not the checkpoint."""
        try:
            steps = steps_in(self.directory)
            # Later steps are damaged, or of a line that was left: a resume must not go on from them, and they must
            # not push out the ones that it needs.
            later = [path for step, path in steps if step > saved]
            older = [path for step, path in steps if step <= saved][self._keep_last :]
            remove([*later, *older])
        except OSError as error:
            log.warning("old checkpoints were not removed: %s", message_of(error))

    def clean(self) -> None:
        """Remove what killed attempts left; only the holder of the run's lock may call this, on rank 0."""
        if self.directory.is_dir():
            for path in self.directory.glob(".t*-step_*"):
                shutil.rmtree(path, ignore_errors=True)

    def restore(
        self, engine_state: EngineState, accept: Callable[[dict[str, Any]], None], explicit: Path | None = None
    ) -> dict[str, Any] | None:
        """Load the newest good checkpoint and give its `state`; None for a fresh start.

        Args:
            accept: raises ConfigError where a checkpoint belongs to another run than this one.
            explicit: this step directory and no other, or the newest good one of this run directory.

        Raises:
            ConfigError: `explicit` is neither.
            CheckpointError: there are checkpoints, but none is good. A run never starts over silently.
        """
        candidates = self._runtime.broadcast(self._candidates(explicit))
        if isinstance(candidates, str):
            raise ConfigError(candidates)
        problems = []
        for path in candidates:
            outcome = self._try(path, engine_state, accept)
            if isinstance(outcome, dict):
                return outcome
            problems.append(outcome)
            if self._runtime.rank == 0:
                log.warning("skipping a checkpoint that is not good: %s", outcome)
        if problems and explicit is not None:
            raise CheckpointError(f"--resume {explicit}: is not good:\n  " + "\n  ".join(problems))
        if problems:
            raise CheckpointError(
                "no checkpoint is good, and a run with checkpoints does not start over by itself:\n  "
                + "\n  ".join(problems)
                + f"\nmove {self.directory} away to start over"
            )
        return None

    def _candidates(self, explicit: Path | None) -> list[Path] | str:
        """List the step directories to try, in this order; or give what is wrong with the path that was named."""
        if explicit is None:
            return [path for _, path in steps_in(self.directory)]
        if not explicit.is_dir():
            return f"--resume {explicit}: there is no such directory; name a step directory or a run directory"
        if not (explicit / "checkpoints").is_dir():
            return [explicit]
        if steps := steps_in(explicit / "checkpoints"):
            return [path for _, path in steps]
        return f"--resume {explicit}: the run directory holds no checkpoint; leave --resume out to start it"

    def _try(
        self, path: Path, engine_state: EngineState, accept: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any] | str:
        """Load one checkpoint on all ranks: its state, or what is wrong with it, the same on every rank."""
        problem, state = None, {}
        try:
            reader = Reader(path)
            state = reader.state()
        except (OSError, CheckpointError) as error:
            problem = str(error)
        if found := next(filter(None, self._runtime.gather_all(problem)), None):
            return found
        accept(state)
        try:
            self._read_rank(CheckpointTensors(reader, self._table), engine_state)
        except (OSError, CheckpointError) as error:
            problem = f"rank {self._runtime.rank}: {error}"
        if found := next(filter(None, self._runtime.gather_all(problem)), None):
            return found
        engine_state.steps = state["optimizer_steps"]
        engine_state.refresh()
        return state

    def _read_rank(self, tensors: CheckpointTensors, engine_state: EngineState) -> None:
        runtime = self._runtime
        for fragment in engine_state.fragments():
            for key, target in fragment.tensors.items():
                host = target if target.device.type == "cpu" else target.cpu()
                tensors.fill(key, fragment.name, host, runtime.tp_rank, runtime.tp_size, fragment.start)
                if host is not target:
                    target.copy_(host)
