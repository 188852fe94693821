"""Go on from the newest good checkpoint, or begin with the weights of another one.

The format is in format.py, the mapping between layouts in tensors.py. Every rank meets in `runtime.control` only; what
is wrong on one rank is gathered as a value, so that all go to the next checkpoint together.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...data.reading.transport import join, shown
from ...model.config import ModelConfig
from ...model.families import layout_of
from ...model.layout import Parameter, is_head
from ..engine_state import MASTER, STATE_KEYS, EngineState, Fragment
from ..errors import BasestoneError, CheckpointError, ConfigError
from ..load import validated
from ..runtime import Runtime
from .format import MANIFEST, steps_in
from .opening import CHECKPOINTS, newest_good, steps_at
from .places import directory_at, local_path
from .reader import Reader
from .tensors import PIECE_ELEMENTS, CheckpointTensors, model_problem

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
        self._run_dir, self.directory, self._remote = run_dir, run_dir / CHECKPOINTS, remote
        self.origin = ""  # the step directory that was loaded, for messages
        self.gone_back_to: str | None = None  # what --resume named, where the run went back to it
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
        found = self._runtime.broadcast(self._candidates(explicit) if self._runtime.rank == 0 else None)
        if isinstance(found, BasestoneError):
            raise found
        candidates, self.gone_back_to = found
        explicit = self.gone_back_to and explicit
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
            copies = f" and {shown(self._remote)}" if self._remote is not None else ""
            raise CheckpointError(
                "no checkpoint is good, and a run with checkpoints does not start over by itself:\n  "
                + "\n  ".join(problems)
                + f"\nmove {self.directory}{copies} away to start over"
            )
        return None

    def _candidates(self, explicit: str | None) -> tuple[list[str], str | None] | BasestoneError:
        """List the step directories to try, in this order, and where the run goes back to; or give what forbids it."""
        named = None if explicit is None else _absolute(explicit)
        try:
            if explicit is None or self._has_gone_back_to(named):
                return self._here_and_there(), None
            return self._of(explicit), named
        except BasestoneError as error:
            return error

    def _has_gone_back_to(self, named: str | None) -> bool:
        """Tell whether the run's newest checkpoint comes from a start that went back to this place.

        A command that is given again, by a scheduler say, goes on then; it must not throw its own work away.
        """
        try:
            state = newest_good(self._run_dir, attempts=1).state()
        except (OSError, CheckpointError):
            return False
        if state.get("gone_back_to") != named:
            return False
        log.warning(
            "--resume %s: the run went back there before, and goes on from step %s; to go back again remove the later "
            "checkpoints",
            *(shown(named or ""), state.get("step")),
        )
        return True

    def _here_and_there(self) -> list[str]:
        """List the run's own checkpoints and their copies, newest first; of a step the own one comes first.

        Copies of later steps than the own ones are of a line that was left, before its copies could be set aside.
        """
        own = [(step, str(path)) for step, path in steps_in(self.directory)]
        try:
            copies = steps_at(join(self._remote, CHECKPOINTS)) if self._remote is not None else []
        except CheckpointError as error:
            if not own:  # a run that has copies must not start over because they are out of reach
                raise
            log.warning("checkpoint.remote: %s; going by the run directory alone", error)
            copies = []
        if own:
            copies = [(step, place) for step, place in copies if step <= own[0][0]]
        return [place for _, place in sorted([*own, *copies], key=lambda row: -row[0])]

    def _of(self, explicit: str, key: str = "--resume", equals: str = " ") -> list[str]:
        """List the step directories that a flag or a key of the run file stands for."""
        given, sizes = f"{key}{equals}{shown(explicit)}", directory_at(explicit).sizes()
        if not sizes:
            raise ConfigError(f"{given}: there is no such directory; name a step directory or a run directory")
        if MANIFEST in sizes:
            return [explicit]
        if steps := steps_at(join(explicit, CHECKPOINTS) if CHECKPOINTS in sizes else explicit):
            return [place for _, place in steps]
        if CHECKPOINTS in sizes:
            raise ConfigError(f"{given}: the run directory holds no checkpoint; leave {key} out to start it")
        return [explicit]

    def _try(self, place: str, differences: Callable[[dict[str, Any]], list[str]]) -> dict[str, Any] | str:
        """Load one checkpoint on all ranks: its state, or what is wrong with it, the same on every rank."""
        problem, reader = self._open(place)
        if problem is not None:
            return problem
        state = reader.state()
        others = self._optimizer_differences(reader)  # an imported checkpoint has no more to compare
        if others := [*others, *([] if reader.index.tensors == [MASTER] else differences(state))]:
            raise ConfigError(
                "the checkpoint belongs to another run:\n  "
                + "\n  ".join(others)
                + "\nput these back, or choose another --run-dir"
            )
        if found := self._load(reader, self._table, MASTER, *STATE_KEYS):
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

    def begin_with(self, place: str, *, predicts_tokens: bool) -> str:
        """Load the masters of another run's checkpoint; optimizer states and counts stay as they are.

        Heads that this model lacks are left out: sentence embeddings begin with the trunk of a language model.

        Args:
            place: a step directory, or a run directory for its newest good one; a path or a URL.
            predicts_tokens: this model has a head for tokens, tied or not, so that another one cannot be left out.

        Returns:
            The step directory and what of it was left out, for messages.

        Raises:
            ConfigError: it is not there, or holds no good checkpoint of this model, on every rank.
        """
        candidates = self._runtime.broadcast(self._begun_from(place) if self._runtime.rank == 0 else None)
        if isinstance(candidates, str):
            raise ConfigError(candidates)
        problems = []
        for candidate in candidates:
            problem, reader = self._open(candidate)
            if problem is not None:
                problems.append(problem)
                continue
            names = [row.name for row in reader.index.parameters]
            heads = [name for name in names if is_head(name) and name not in self._table]
            if predicts_tokens:
                heads = [name for name in heads if not name.startswith("head.")]
            if other := model_problem(reader, self._table, heads):
                raise ConfigError(f"train.init_from: {other}")
            table = self._table_there(reader) if heads else self._table
            if problem := self._load(reader, table, MASTER):
                problems.append(problem)
                continue
            self._engine_state.refresh()
            return reader.at() + (f", without {', '.join(heads)}" if heads else "")
        raise ConfigError(f"train.init_from = {shown(place)}: " + "\n  ".join(problems))

    @staticmethod
    def _table_there(reader: Reader) -> dict[str, Parameter]:
        """Give the parameters of a checkpoint with other heads."""
        model = reader.state().get("run", {}).get("model", {})
        return layout_of(validated(ModelConfig, model, f"train.init_from: {reader.at()}"))

    def _begun_from(self, place: str) -> list[str] | str:
        try:
            return self._of(place, "train.init_from", " = ")
        except ConfigError as error:
            return str(error)
        except CheckpointError as error:  # of the storage, which names the place
            return f"train.init_from: {error}"

    def _open(self, place: str) -> tuple[str | None, Reader]:
        """Open a checkpoint on every rank; give what is wrong with it on any, the same on every rank."""
        problem, reader = None, None
        try:
            reader = Reader(place)
            reader.state()
        except (OSError, CheckpointError) as error:
            problem = str(error)
        return next(filter(None, self._runtime.gather_all(problem)), None), reader  # type: ignore[return-value]

    def _load(self, reader: Reader, table: dict[str, Parameter], *keys: str) -> str | None:
        """Fill this rank's tensors from a checkpoint of the table's parameters.

        Returns:
            What is wrong with it on any rank, the same on every rank.
        """
        problem = None
        try:
            self._read_rank(CheckpointTensors(reader, table), keys)
        except (OSError, CheckpointError) as error:
            problem = f"rank {self._runtime.rank}: {error}"
        return next(filter(None, self._runtime.gather_all(problem)), None)

    def _read_rank(self, tensors: CheckpointTensors, keys: Sequence[str]) -> None:
        runtime = self._runtime

        def fill(fragment: Fragment, key: str) -> None:
            target = fragment.tensors[key]
            host = target if target.device.type == "cpu" else target.cpu()
            tensors.fill(key, fragment.name, host, runtime.tp_rank, runtime.tp_size, fragment.start)
            if host is not target:
                target.copy_(host)

        with ThreadPoolExecutor(len(keys), "read") as pool:
            for fragment in self._engine_state.fragments():
                # Tensors of a small one lie in the same blocks, which each thread would read and hash for itself.
                each: Callable[..., Iterable[None]] = pool.map if fragment.numel >= PIECE_ELEMENTS else map
                list(each(functools.partial(fill, fragment), keys))


def _absolute(place: str) -> str:
    """Give a place by which it is known again from another working directory."""
    path = local_path(place)
    return place if path is None else str(path.resolve())
