"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere. Rank 0 only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LONG_BYTES = 1 << 30  # from here on work on files says how far it is


class RunConsole:
    """Prints to stderr, so that results on stdout stay alone."""

    def __init__(self, total_steps: int, first_step: int, *, silent: bool = False) -> None:
        self._silent = silent
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._total = total_steps
        if not silent and sys.stderr.isatty():
            columns = (
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task("starting", total=total_steps, completed=first_step)

    def step(self, record: dict[str, Any]) -> None:
        """Show a metrics line."""
        if self._silent:
            return
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], description=short_line(record))
        else:
            self.say(f"step {record['step']}/{self._total} | {step_line(record)}")

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if not self._silent:
            self._console.print(text, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()


def tenths(doing: str) -> Callable[[int, int], None]:
    """Give a function that takes (bytes done, bytes in all) and says at every tenth how far long work is."""
    said = 0

    def tell(done: int, total: int) -> None:
        nonlocal said
        tenth = 10 * done // total
        if total >= LONG_BYTES and tenth > said:
            said = tenth
            print(f"{doing}: {10 * tenth} % of {total / 1e9:.1f} GB", file=sys.stderr, flush=True)

    return tell


def step_line(record: dict[str, Any]) -> str:
    """Write a metrics line for people; what is unknown is left out."""
    parts = [
        f"loss {record['loss']:.4f}",
        f"gnorm {record['grad_norm']:.2f}",
        f"lr {record['lr']:.1e}",
        f"{_short(record['tokens_per_s'])} tok/s",
        f"{record['tflops_per_device']:.2f} TF/dev",
    ]
    if record.get("mfu") is not None:
        parts.append(f"mfu {100 * record['mfu']:.1f}%")
    parts.append(f"mem {record['memory_gib']:.1f} GiB")
    if record.get("joules") is not None:
        parts.append(f"{_short(record['joules'])}J")
    return " | ".join(parts)


def short_line(record: dict[str, Any]) -> str:
    """Write what fits beside a progress bar on 80 columns."""
    joules = record.get("joules")
    energy = "" if joules is None else f" | {_short(joules)}J"
    return f"loss {record['loss']:.3f} | {_short(record['tokens_per_s'])} tok/s{energy}"


def _short(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"
