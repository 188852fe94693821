"""`basestone launch`: the same run file on one machine or many."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import environ


class Backend(enum.StrEnum):
    """What starts the processes."""

    local = "local"
    hosts = "hosts"
    torchrun = "torchrun"
    slurm = "slurm"
    kubernetes = "kubernetes"
    mpi = "mpi"


def launch(
    run: Annotated[Path, typer.Argument(help="The run file, TOML.", show_default=False)],
    on: Annotated[Backend, typer.Option("--on", help="What starts the processes.")] = Backend.local,
    nodes: Annotated[
        str, typer.Option(help="How many, or MIN:MAX to go on with fewer; by default the hostfile's, else 1.")
    ] = "",
    processes_per_node: Annotated[
        int | None, typer.Option(help="By default the hostfile's slots, else one per GPU here, else 1.", min=1)
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(help="One host a line: `worker-1 slots=8`.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="For torchrun: where nodes meet, the same on each.")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(help="What the cluster is like, TOML: partition, image, secrets and the like."),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="On a disk that all nodes share; by default runs/<file stem>."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Override a key of the file; repeatable."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", help="Go on from this step directory; a path or a URL.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the nodes as before training, and leave.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train on one machine or many, from the newest checkpoint, again after failures.

    slurm and kubernetes take a job into their queue and return. The others stay here until the run ends: Ctrl-C lets it
    save and stop. For torchrun, give the same command on every node.
    """
    from .cluster.launching import Request, prepare, start

    request = Request(
        run_file=run.resolve(),
        backend=on.value,
        nodes=nodes,
        processes_per_node=processes_per_node,
        hostfile=hostfile,
        endpoint=endpoint,
        cluster_file=cluster,
        run_dir=(run_dir or Path("runs") / run.stem).resolve(),
        overrides=overrides or [],
        resume=resume,
        check=check,
        debug=debug,
    )
    launching = prepare(request, environ.cache_dir())
    for label, text in launching.described:
        print(f"{label:>15}  {text}", file=sys.stdout if dry_run else sys.stderr)
    if dry_run:
        print("\n" + launching.plan.shown(launching.job), end="")
        return
    raise typer.Exit(start(launching))
