"""`basestone report` and `basestone watch`: what a run's files say, on a page and in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories; several are compared.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="By default report.html in the run directory, of several comparison.html here."),
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side."""
    from ..trainer.report.page import write_report

    print(write_report(run_dirs, out))


def watch(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame and leave; so it does in a pipe.")
    ] = False,
    every: Annotated[float, typer.Option(help="Seconds between two frames.", min=0.1, max=3600.0)] = 2.0,
) -> None:
    """Show a run in the terminal while it goes on, or as it was left; Ctrl-C leaves, the run goes on."""
    from ..trainer.report.live import watch as show

    show(run_dir, once=once, every_s=every)
