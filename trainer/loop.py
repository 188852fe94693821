"""The training loop: one readable step, and what happens between steps."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..data.errors import DataError
from ..data.storage import write_atomic
from ..data.tokenizer import Tokenizer
from ..model.families import layout_of
from .accounts import Accounts
from .checkpoint.copier import Copier
from .checkpoint.format import steps_in
from .checkpoint.remote import check_place
from .checkpoint.restorer import Restorer
from .checkpoint.saver import Saver
from .config import ResolvedRun
from .console import RunConsole
from .engine import Engine
from .errors import (
    EXIT_STOPPED,
    EXIT_USER,
    CheckpointError,
    ConfigError,
    NumericsError,
    Stopped,
    exit_code_of,
    message_of,
)
from .evaluate import HeldOut
from .feed import Feed
from .hub.exporter import Exporter, check_exports
from .load import fixed_differences
from .places import DataPlaces
from .record import Recorder
from .rundir import RunDirectory, tell_failure
from .runtime import Runtime
from .saving import Saving
from .sinks.opening import open_sinks
from .sinks.sink import Sink
from .sinks.traces import StepTracer
from .step import StepFigures, TrainingStep

# What a checkpoint's state must have before it is compared.
STATE_FIELDS = ("step", "tokens", "optimizer_steps", "data", "run", "tokenizer_sha256", "ledger")


class Trainer:
    """One run, on one rank. Build it, then `fit()`."""

    def __init__(
        self,
        resolved: ResolvedRun,
        runtime: Runtime,
        places: DataPlaces,
        run_dir: Path,
        *,
        resume: str | None = None,
        versions: dict[str, str],
        preflight: str | None = None,
    ) -> None:
        """Take the lock, build the model, go on from the newest good checkpoint, open the data."""
        self._resolved, self._runtime, self._places = resolved, runtime, places
        self._versions, self._preflight, self._stop_signals = versions, preflight, 0
        self.step, self._run_dir = 0, run_dir
        self._tokenizer_sha256 = Tokenizer(places.tokenizer).sha256
        self._sinks: list[Sink] = []
        self._directory = self._open_directory(run_dir)
        try:
            self._prepare(run_dir, resume)
        except Exception as error:
            self.fail(error)
            raise

    # ---- beginning ------------------------------------------------------------------------------------------

    def _prepare(self, run_dir: Path, resume: str | None) -> None:
        """Build the model, restore, open the data and the records."""
        resolved, runtime = self._resolved, self._runtime
        if resolved.run.export.every_steps:
            check_exports(resolved.run.model)
        self._engine = Engine(resolved, runtime)
        table, section = layout_of(resolved.run.model), resolved.run.checkpoint
        copier, exporter = None, None
        if self._directory is not None and section.remote is not None:
            copier = Copier(section.remote, threads=resolved.run.reading.threads)
        if self._directory is not None and resolved.run.export.every_steps:
            exporter = Exporter(run_dir, resolved.run.export, resolved.steps)
        self._saver = Saver(
            run_dir,
            table,
            runtime,
            self._engine.state,
            section,
            asynchronous=resolved.saves_asynchronously,
            copier=copier,
            in_use=lambda: exporter.busy if exporter is not None else frozenset(),
        )
        self._feed = Feed(resolved, self._places, runtime)
        restorer = Restorer(run_dir, table, runtime, self._engine.state, section.remote)
        self._own_id = runtime.broadcast(self._directory.run_id if self._directory is not None else None)
        self._resumes_from_elsewhere = resume is not None
        state = restorer.restore(self._differences, resume)
        known = state if state is not None and resume is None else {}
        self._run_id = self._own_id or known.get("run_id") or uuid.uuid4().hex
        self._gone_back_to = restorer.gone_back_to or (state or {}).get("gone_back_to")
        init_from = resolved.run.train.init_from if state is None else None
        predicts_tokens = resolved.run.model.predicts_tokens
        begun_with = restorer.begin_with(init_from, predicts_tokens=predicts_tokens) if init_from else None
        self.step = int(state["step"]) if state else 0
        self._tokens: int = state["tokens"] if state else 0
        self._heldout_losses: dict[str, float] = {}  # of this step, where it was evaluated
        self._feed.start(state["data"] if state else None, workers=resolved.run.data.workers)
        self._training_step = TrainingStep(self._engine, resolved, runtime, self._feed, self._saver.wait_copied)
        self._held_out = self._open_held_out()
        self._console = RunConsole(resolved.steps, self.step, silent=runtime.rank != 0)
        self._accounts = Accounts(resolved, runtime, self._directory, self._console)
        self._saving = Saving(self._saver, copier, resolved.run, self._directory, self._console, exporter)
        self._recorder = Recorder(self._directory, self._console, self._sinks)
        places = (run_dir, self._directory, self._console)
        self._tracer = StepTracer(resolved.run.profile, runtime, *places, last_step=resolved.steps)
        if self._directory is not None:
            self._directory.ledger.resume_from(state["ledger"] if state else {})
        self._accounts.check()
        if self._directory is not None:
            self._begin_records(state, begun_with, restorer.origin)
        self._accounts.begin()
        if exporter is not None:
            exporter.offer_missing(self._saver.directory, self.step)

    def _open_directory(self, run_dir: Path) -> RunDirectory | None:
        """Open the run directory and the sinks on rank 0; every rank learns of a failure."""
        directory, problem = None, None
        if self._runtime.rank == 0:
            try:
                if (remote := self._resolved.run.checkpoint.remote) is not None:
                    check_place(remote, run_dir)
                directory = RunDirectory(run_dir)
                self._sinks = open_sinks(self._resolved, directory)
            except (ConfigError, DataError, OSError) as error:  # as a value: the other ranks wait here
                problem = message_of(error)
                if directory is not None and directory.is_unused:
                    directory.fail(0, error)
        problem = self._runtime.broadcast(problem)
        if problem:
            raise ConfigError(problem)
        return directory

    def _begin_records(self, state: dict[str, Any] | None, begun_with: str | None, origin: str) -> None:
        assert self._directory is not None
        directory = self._directory
        copy = directory.path / "tokenizer.model"
        if not copy.exists():
            write_atomic(copy, Tokenizer(self._places.tokenizer).content)
        directory.identify(self._run_id)
        self._recorder.write_config(self._resolved, self._versions)
        directory.mark(None)
        event = "resume" if state else "start"
        where = f"at step {self.step}" if state else f"{self._resolved.steps} steps"
        if state and not origin.startswith(str(directory.path)):
            where += f" of {origin}"
        directory.event(self.step, event, f"{where} on {self._resolved.world_size} process(es)")
        if self._preflight is not None:
            directory.event(self.step, "preflight", self._preflight)
        if begun_with is not None:
            directory.event(self.step, "init", f"weights of {begun_with}")
            self._console.say(f"begins with the weights of {begun_with}")
        for change in self._feed.changes:
            directory.event(self.step, "data", change)
            self._console.say(f"data: {change}")
        directory.save_ledger()
        if state:
            self._console.say(f"resuming {where} (attempt {directory.attempt})")
        self._recorder.begin(self._run_id, self.step)

    def _differences(self, state: dict[str, Any]) -> list[str]:
        """List what makes a checkpoint that of another model, tokenizer or dataset."""
        if missing := [name for name in STATE_FIELDS if name not in state]:
            return [f"state.json has no {', '.join(missing)}: no run wrote it"]
        differences = []
        known = not self._resumes_from_elsewhere and self._own_id and state.get("run_id")
        if known and known != self._own_id:
            differences.append(
                "checkpoint.remote: holds the copies of another run; give every run a place of its own"
            )
        differences += fixed_differences(state["run"], self._resolved.run.model_dump(mode="json"))
        # Its path may move; the tokenizer is known by its content.
        differences = [line for line in differences if not line.startswith("data.tokenizer:")]
        if state["tokenizer_sha256"] != self._tokenizer_sha256:
            differences.append(
                "data.tokenizer: its content differs from the one the checkpoint was trained with"
            )
        return differences + self._feed.differences(state["data"])

    def _open_held_out(self) -> list[HeldOut]:
        return [
            HeldOut(name, path, self._resolved, self._places, self._runtime)
            for name, path in sorted(self._places.heldout.items())
        ]

    # ---- the loop -------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the last step, or until a signal asks to stop.

        Raises:
            Stopped: after saving, on SIGTERM or SIGINT.
            NumericsError: a loss or gradient is not finite.
        """
        run, last = self._resolved.run, self._resolved.steps
        evaluated = -1
        with self._signals():
            while self.step < last:
                self._tell_length()
                figures = self._train_step()
                self.step += 1
                asked, used_up, book, working, minutes_over = figures.flags
                done = self.step == last
                stop = asked or (used_up and not done)
                self._saving.advance(working=working)
                saving = self._saving.is_due(self.step, minutes_over=minutes_over) or done or stop
                # A checkpoint carries the ledger, which is brought up to date by a log line.
                if self.step == 1 or _is_due(self.step, run.meter.log_every_steps) or saving:
                    self._log(figures)
                elif book:
                    self._accounts.book(self.step)
                if stop:  # before an evaluation: whoever asked may not wait for it
                    self._save("stop", wait=True)
                if _is_due(self.step, run.evaluate.every_steps) or (done and not stop):
                    self._evaluate()  # before the save, which tells by it which checkpoint is best
                    evaluated = self.step
                if saving and not stop:
                    self._save("save", wait=done)
                if stop:
                    self._saving.close(self.step, stopped=True)
                    self._accounts.finish()
                    raise Stopped(self._accounts.stop_message(self.step))
            if evaluated != self.step:
                self._evaluate()
        self._finish()

    def _tell_length(self) -> None:
        """Say that the next step is the first of another length."""
        batches = self._resolved.batches
        length = batches.sequence_length(self.step)
        if self._directory is not None and self.step and length != batches.sequence_length(self.step - 1):
            self._directory.event(self.step, "length", f"sequences of {length} tokens from here on")
            self._console.say(f"sequences of {length} tokens after step {self.step}")

    def _train_step(self) -> StepFigures:
        self._heldout_losses = {}
        try:
            flags = (
                self._stop_signals > 0 or (self._directory is not None and self._directory.asked_to_stop()),
                *self._accounts.flags(),
                *self._saving.flags(),
            )
            with self._tracer.around(self.step + 1):
                figures = self._training_step.run(self.step, flags)
        except NumericsError as error:  # on every rank
            self._end_save()
            steps = steps_in(self._saver.directory)
            newest = steps[0][1].name if steps else "none yet"
            raise NumericsError(
                f"{error}; newest checkpoint: {newest}; "
                "lower optimizer.lr, lengthen schedule.warmup_steps, or look at the data of this step; "
                "--resume goes on from an older checkpoint"
            ) from error
        self._accounts.meters.step(self.step, figures.num_tokens, figures.phase_s)
        self._tokens += figures.num_tokens
        try:
            news = self._feed.add_counts(figures.data_counts)
        except DataError:  # on every rank: too much in quarantine
            self._end_save()
            raise
        for item in news:
            if self._directory is not None:
                self._directory.quarantine({"step": self.step + 1, **item})
                self._console.say(f"passed over {item['bytes']} bytes of {item['source']}: {item['problem']}")
        return figures

    def _end_save(self) -> None:
        """See a save in flight through before an error of all ranks; its own failure would hide that one."""
        with suppress(CheckpointError):
            self._saving.finish()

    # ---- between steps --------------------------------------------------------------------------------------

    def _log(self, figures: StepFigures) -> None:
        batches, step = self._resolved.batches, self.step - 1
        record = {
            "kind": "step",
            "step": self.step,
            "loss": figures.loss,
            **(
                {f"{name}_loss": loss for name, loss in figures.parts.items()} if len(figures.parts) > 1 else {}
            ),
            "grad_norm": figures.grad_norm,
            "lr": figures.lr,
            "global_batch": batches.global_batch(step),
            **({"sequence_length": batches.sequence_length(step)} if batches.length_ends else {}),
            "tokens": self._tokens,
            **self._accounts.line(self.step),
            **self._feed.record(),
        }
        self._recorder.step(record)

    def _evaluate(self) -> None:
        with self._engine.phases.host("evaluate"):
            for held_out in self._held_out:
                result = held_out.measure(self._engine, self._resolved.run.train.micro_batch)
                self._heldout_losses[held_out.name] = result.loss
                self._recorder.evaluation(
                    {"kind": "eval", "step": self.step, "name": held_out.name, **result.record()}
                )

    def _save(self, cause: str, *, wait: bool) -> None:
        state = {
            "step": self.step,
            "tokens": self._tokens,
            "optimizer_steps": self._engine.state.steps,
            "loss_scale": self._engine.state.loss_scale,
            "heldout": self._heldout_losses,
            "run_id": self._run_id,
            "gone_back_to": self._gone_back_to,
            "data": self._feed.state(),
            "run": self._resolved.run.model_dump(mode="json"),
            "tokenizer_sha256": self._tokenizer_sha256,
            "ledger": self._directory.ledger.useful() if self._directory is not None else {},
            "versions": self._versions,
        }
        with self._engine.phases.host("checkpoint"):
            self._saving.save(self.step, state, cause=cause, wait=wait)
        if self._directory is not None and cause == "stop":
            self._directory.mark("RESUME", f"step {self.step}")
            self._directory.forget_stop()

    def _finish(self) -> None:
        if self._directory is not None:
            self._directory.event(self.step, "complete", f"{self._tokens} tokens")
            self._directory.mark("COMPLETE", f"step {self.step}")
            self._console.say(
                f"complete after {self.step} steps and {self._tokens:,} tokens: {self._directory.path}"
            )
        self._saving.close(self.step, stopped=False)
        self._accounts.finish()

    def fail(self, error: Exception) -> None:
        """Record a failure; no collective, as other ranks may be gone.

        A wrong run file or flag is no failure of the run that lies here, only of one that never began.
        """
        code = exit_code_of(error)
        refused = code == EXIT_USER and (self._directory is None or not self._directory.is_unused)
        if refused or code == EXIT_STOPPED:
            return
        if self._directory is not None:
            self._directory.fail(self.step, error)
        else:
            tell_failure(self._run_dir, self._runtime.rank, self.step, error)

    def close(self) -> None:
        """Stop readers and sampling, close files; safe after an exception."""
        self._saving.give_up_exports()
        self._console.close()
        self._tracer.close()
        self._recorder.close()
        self._accounts.close()
        self._feed.close()
        self._engine.close()
        if self._directory is not None:
            self._directory.close()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM or Ctrl-C: finish the step, save, leave. A second one leaves at once; the last save is good."""

        def ask(*_: object) -> None:
            self._stop_signals += 1
            if self._stop_signals > 1:
                os._exit(EXIT_STOPPED)
            self._console.say("asked to stop: finishing this step and saving (again: leave at once)")

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
