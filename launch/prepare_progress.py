"""Show on a terminal how far a preparation is, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from ..data.prepare import PrepareProgress

MEGABYTE = 1e6


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[Callable[[PrepareProgress], None] | None]:
    """Give a function that draws a bar with rates on standard error; None where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(file=stream, stderr=stream is None)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}, {task.fields[text]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def show(progress: PrepareProgress) -> None:
            if progress.phase not in tasks:
                unit = "files" if progress.phase == "cleaning" else "documents"
                tasks[progress.phase] = bar.add_task(progress.phase, unit=unit, text="")
            task = tasks[progress.phase]
            elapsed_s = bar.tasks[task].elapsed or 0
            text = f"{progress.documents_read:,} documents read, {progress.documents_kept:,} kept"
            if elapsed_s:
                text += (
                    f", {progress.documents_read / elapsed_s:,.0f} documents/s, "
                    f"{progress.bytes_kept / MEGABYTE / elapsed_s:,.1f} MB/s"
                )
            bar.update(task, completed=progress.done, total=progress.total, text=text)

        yield show
