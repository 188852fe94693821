"""`basestone jobs`: what was launched, what it says, and how it stops."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

jobs_app = typer.Typer(
    name="jobs", help="Look after launched runs.", no_args_is_help=True, pretty_exceptions_enable=False
)
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]


@jobs_app.command("ls", epilog="Example: basestone jobs ls runs")
def list_jobs(
    folder: Annotated[Path, typer.Argument(help="Where run directories lie.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print for machines.")] = False,
) -> None:
    """List the last launch of every run in a folder."""
    from .cluster.jobs import launches_in

    rows = [
        {
            "run": str(status.run_dir),
            "by": status.started.backend,
            "job": status.started.identity or str(status.started.pid),
            "state": status.state,
            "saved_step": status.step,
            "started": datetime.fromtimestamp(status.started.time_s).isoformat(" ", "minutes"),
        }
        for status in launches_in(folder)
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        print(f"no launched run in {folder}", file=sys.stderr)
        return
    table = [tuple(rows[0]), *(tuple(str(value) for value in row.values()) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@jobs_app.command(epilog="Example: basestone jobs logs runs/gpt --rank 3 --follow")
def logs(
    run_dir: RunDir,
    rank: Annotated[int, typer.Option(help="Whose output.", min=0)] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as more is said; Ctrl-C leaves.")
    ] = False,
) -> None:
    """Print what a rank has said, over all starts."""
    from .cluster.jobs import log_of

    with log_of(run_dir, rank).open(encoding="utf-8", errors="replace") as file:
        try:
            while True:
                if text := file.read(1 << 20):
                    print(text, end="", flush=True)
                elif follow:
                    time.sleep(0.5)
                else:
                    return
        except KeyboardInterrupt:
            return


@jobs_app.command(epilog="Example: basestone jobs stop runs/gpt")
def stop(run_dir: RunDir) -> None:
    """Let a run finish its step, save and stop, wherever it is; launching it again goes on."""
    from .cluster.jobs import stop as ask

    print(ask(run_dir))
