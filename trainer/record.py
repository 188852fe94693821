"""Where a run's figures go: metrics.jsonl (the source of truth), the console, and the sinks. Rank 0 only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..data.storage import write_atomic
from .config import ResolvedRun
from .console import RunConsole
from .errors import message_of
from .load import run_to_toml
from .rundir import RunDirectory, warned_of
from .sinks.sink import OF_PARTS, Sink


def heldout_text(record: Mapping[str, Any]) -> str:
    """Say what a held-out set gave in a line."""
    texts = [f"loss {record['loss']:.4f}"]
    if "perplexity" in record:
        texts.append(f"perplexity {record['perplexity']:.2f}")
    if "bits_per_byte" in record:
        texts.append(f"{record['bits_per_byte']:.4f} bits per byte")
    for name, value in record.items():
        if name.endswith(OF_PARTS):
            texts.append(f"{name.replace('_', ' ')} {value:.4f}")
    return ", ".join(texts)


def measured_text(record: Mapping[str, Any]) -> str:
    """Say over how much a held-out set was measured."""
    if "perplexity" not in record:
        counted = "pairs"
    else:  # only where all tokens are predicted do their bytes count
        counted = "tokens" if "bits_per_byte" in record else "predictions"
    return f"over {record['tokens']} {counted}"


class Recorder:
    """Writes every record, and hands it to every sink; does nothing on a rank without a run directory."""

    def __init__(self, directory: RunDirectory | None, console: RunConsole, sinks: Sequence[Sink]) -> None:
        """Take the sinks, which have not begun."""
        self._directory, self._console, self._sinks = directory, console, list(sinks)
        self._step = 0

    def begin(self, run_id: str, step: int) -> None:
        """Let the sinks begin, at a step."""
        self._step = step

        def begin_one(sink: Sink) -> None:
            if told := sink.begin(run_id, step):
                self._console.say(told)

        self._hand(begin_one)

    def write_config(self, resolved: ResolvedRun, versions: dict[str, str]) -> None:
        """Write the resolved run file; `basestone train` reads it back."""
        if self._directory is not None:
            comments = ["resolved by basestone", *(f"{name} {version}" for name, version in versions.items())]
            text = run_to_toml(resolved.run.model_dump(mode="json"), comments)
            write_atomic(self._directory.path / "run.toml", text.encode())

    def step(self, record: dict[str, Any]) -> None:
        """Take a step's line."""
        if self._directory is None:
            return
        self._step = record["step"]
        self._directory.metric(record)
        self._directory.save_ledger()
        self._console.step(record)
        self._hand(lambda sink: sink.step(record))

    def evaluation(self, record: dict[str, Any]) -> None:
        """Take a held-out result."""
        if self._directory is None:
            return
        self._directory.metric(record)
        found = heldout_text(record)
        self._console.say(f"step {record['step']} held-out {record['name']}: {found}")
        self._hand(lambda sink: sink.evaluation(record))

    def close(self) -> None:
        """Let the sinks write what is left."""
        self._hand(lambda sink: sink.close())
        self._sinks = []

    def _hand(self, give: Callable[[Sink], None]) -> None:
        """Do something with every sink; one that fails is told of, once, and gets nothing more."""
        for sink in tuple(self._sinks):
            try:
                give(sink)
            except Exception as error:  # whatever a library raises: the figures are in metrics.jsonl
                self._sinks.remove(sink)
                reason = " ".join(message_of(error).split()) or type(error).__name__
                told = f"{sink.name} failed and gets nothing more: {reason}"
                self._console.say(f"warning: {told}")
                with suppress(Exception):
                    sink.close()
                if self._directory is not None:
                    with warned_of("the failure was not recorded in events.jsonl"):
                        self._directory.event(self._step, "sink_failed", told)
