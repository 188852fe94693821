"""Go on from the newest good checkpoint, or begin with the weights of another one.

The format is in format.py, the mapping between layouts in tensors.py. Every rank meets in `runtime.control` only; what
is wrong on one rank is gathered as a value, so that all go to the next checkpoint together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...data.reading.transport import join, shown
from ...model.layout import Parameter
from ..engine_state import MASTER, STATE_KEYS, EngineState
from ..errors import BasestoneError, CheckpointError, ConfigError
from ..runtime import Runtime
from .format import steps_in
from .opening import CHECKPOINTS, open_checkpoint, steps_at
from .places import directory_at
from .reader import Reader
from .tensors import CheckpointTensors

log = logging.getLogger(__name__)


class Restorer:
    """Loads checkpoints into the engine of a run."""

    def __init__(
        self,
        run_dir: Path,
        table: dict[str, Parameter],
        runtime: Runtime,
        engine_state: EngineState,
        remote: str | None = None,
    ) -> None:
        """Take where checkpoints lie, and copies of them, and what to load them into."""
        self.directory, self._remote = run_dir / CHECKPOINTS, remote
        self.origin = ""  # the step directory that was loaded, for messages
        self._table, self._runtime, self._engine_state = table, runtime, engine_state

    def restore(
        self, differences: Callable[[dict[str, Any]], list[str]], explicit: str | None = None
    ) -> dict[str, Any] | None:
        """Load the newest good checkpoint and give its `state`; None for a fresh start.

        Args:
            differences: lists, from a checkpoint's `state`, what makes it another run's than this one.
            explicit: this step directory and no other, or the newest good one of this run directory.

        Raises:
            ConfigError: `explicit` is neither, or the checkpoint belongs to another run: every difference at once.
            CheckpointError: there are checkpoints, but none is good. A run never starts over silently.
        """
        candidates = self._runtime.broadcast(self._candidates(explicit) if self._runtime.rank == 0 else None)
        if isinstance(candidates, BasestoneError):
            raise candidates
        problems = []
        for place in candidates:
            outcome = self._try(place, differences)
            if isinstance(outcome, dict):
                return outcome
            problems.append(outcome)
            if self._runtime.rank == 0:
                log.warning("skipping a checkpoint that is not good: %s", outcome)
        if problems and explicit is not None:
            raise CheckpointError(f"--resume {shown(explicit)}: is not good:\n  " + "\n  ".join(problems))
        if problems:
            raise CheckpointError(
                "no checkpoint is good, and a run with checkpoints does not start over by itself:\n  "
                + "\n  ".join(problems)
                + f"\nmove {self.directory} away to start over"
            )
        return None

    def _candidates(self, explicit: str | None) -> list[str] | BasestoneError:
        """List the step directories to try, in this order; or give what forbids it, on rank 0."""
        try:
            return self._here_and_there() if explicit is None else self._of(explicit)
        except BasestoneError as error:
            return error

    def _here_and_there(self) -> list[str]:
        """List the run's own checkpoints and their copies, newest first; of a step the own one comes first."""
        own = [(step, str(path)) for step, path in steps_in(self.directory)]
        try:
            copies = steps_at(join(self._remote, CHECKPOINTS)) if self._remote is not None else []
        except CheckpointError as error:
            if not own:  # a run that has copies must not start over because they are out of reach
                raise
            log.warning("checkpoint.remote: %s; going by the run directory alone", error)
            copies = []
        return [place for _, place in sorted([*own, *copies], key=lambda row: -row[0])]

    def _of(self, explicit: str) -> list[str]:
        """List the step directories that --resume stands for."""
        sizes = directory_at(explicit).sizes()
        if not sizes:
            raise ConfigError(
                f"--resume {shown(explicit)}: there is no such directory; name a step directory or a run directory"
            )
        if CHECKPOINTS not in sizes:
            return [explicit]
        if steps := steps_at(join(explicit, CHECKPOINTS)):
            return [place for _, place in steps]
        raise ConfigError(
            f"--resume {shown(explicit)}: the run directory holds no checkpoint; leave --resume out to start it"
        )

    def _try(self, place: str, differences: Callable[[dict[str, Any]], list[str]]) -> dict[str, Any] | str:
        """Load one checkpoint on all ranks: its state, or what is wrong with it, the same on every rank."""
        problem, state = None, {}
        try:
            reader = Reader(place)
            state = reader.state()
        except (OSError, CheckpointError) as error:
            problem = str(error)
        if found := next(filter(None, self._runtime.gather_all(problem)), None):
            return found
        if others := [*differences(state), *self._optimizer_differences(reader)]:
            raise ConfigError(
                "the checkpoint belongs to another run:\n  "
                + "\n  ".join(others)
                + "\nput these back, or choose another --run-dir"
            )
        if found := self._load(reader, MASTER, *STATE_KEYS):
            return found
        self._engine_state.steps = state["optimizer_steps"]
        self._engine_state.loss_scale = state.get("loss_scale")
        self._engine_state.refresh()
        self.origin = reader.at()
        return state

    @staticmethod
    def _optimizer_differences(reader: Reader) -> list[str]:
        """Refuse states that are missing, and states that nobody would take up: either way the optimizer is another."""
        saved, wanted = reader.index.tensors, [MASTER, *STATE_KEYS]
        if sorted(saved) == sorted(wanted):
            return []
        hint = "; train.init_from begins a new run with its weights" if saved == [MASTER] else ""
        return [f"optimizer: the checkpoint holds {', '.join(saved)}, this run's has {', '.join(wanted)}{hint}"]

    def begin_with(self, place: str) -> str:
        """Load the masters of another run's checkpoint; optimizer states and counts stay as they are.

        Args:
            place: a step directory, or a run directory for its newest good one; a path or a URL.

        Returns:
            The step directory, for messages.

        Raises:
            ConfigError: it holds no good checkpoint of this model, on every rank.
        """
        problem, reader = None, None
        try:
            reader = open_checkpoint(place)
        except (OSError, CheckpointError) as error:
            problem = str(error)
        found = next(filter(None, self._runtime.gather_all(problem)), None)
        if reader is not None and not found:
            found = self._load(reader, MASTER)
        if found or reader is None:
            raise ConfigError(f"train.init_from: {found}")
        self._engine_state.refresh()
        return reader.at()

    def _load(self, reader: Reader, *keys: str) -> str | None:
        """Fill this rank's tensors; give what is wrong with the checkpoint on any rank, the same on every rank."""
        problem = None
        try:
            self._read_rank(CheckpointTensors(reader, self._table), keys)
        except (OSError, CheckpointError) as error:
            problem = f"rank {self._runtime.rank}: {error}"
        return next(filter(None, self._runtime.gather_all(problem)), None)

    def _read_rank(self, tensors: CheckpointTensors, keys: Iterable[str]) -> None:
        runtime = self._runtime
        for fragment in self._engine_state.fragments():
            for key in keys:
                target = fragment.tensors[key]
                host = target if target.device.type == "cpu" else target.cpu()
                tensors.fill(key, fragment.name, host, runtime.tp_rank, runtime.tp_size, fragment.start)
                if host is not target:
                    target.copy_(host)
