"""`basestone checkpoint ...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.reading.transport import shown
from . import local

if TYPE_CHECKING:
    from ..trainer.sections import CheckpointSection

checkpoint_app = typer.Typer(
    name="checkpoint", help="List, show, verify, remove and import checkpoints.", no_args_is_help=True
)

EXIT_STORAGE = 74
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]
RunPlace = Annotated[
    str, typer.Argument(metavar="RUN", help="A run directory, or the URL of its copies.", show_default=False)
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A step directory, or a run directory for its newest one; a path or a URL.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print for machines.")]


@checkpoint_app.command("ls", epilog="Example: basestone checkpoint ls runs/quickstart")
def checkpoint_ls(run: RunPlace, as_json: AsJson = False) -> None:
    """List the checkpoints of a run, newest first: size, date, held-out loss, and what keeps each.

    Only their structure is looked at: `checkpoint verify` reads every byte.
    """
    from ..trainer.checkpoint.inspection import list_steps
    from ..trainer.checkpoint.places import local_path
    from ..trainer.errors import ConfigError

    run_dir, section = local_path(run), None
    if run_dir is not None:
        _check_run(run_dir)
        try:
            section = _section_of(run_dir, hint="")
        except ConfigError as error:
            _say(f"what keeps them is not known: {str(error).splitlines()[0]}")
    rows = list_steps(run, section)
    if not rows:
        _say(f"{shown(run)}: holds no checkpoint")
    if as_json:
        print(json.dumps([vars(row) for row in rows], indent=1))
        return
    for row in rows:
        if row.problem is not None:
            print(f"{shown(row.place)}  damaged: {row.problem}")
            continue
        loss = "" if row.heldout_loss is None else f"  held-out loss {row.heldout_loss:.4f}"
        keys = f"  {', '.join(row.kept_by)}" if row.kept_by else ""
        print(f"{shown(row.place)}  {_size(row.bytes or 0):>10}  {row.saved or ''}{loss}{keys}")


@checkpoint_app.command("show", epilog="Example: basestone checkpoint show runs/quickstart")
def checkpoint_show(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Show what a checkpoint holds, the layout that it was written in, and its files."""
    from ..trainer.checkpoint.inspection import describe
    from ..trainer.checkpoint.opening import open_checkpoint

    _steps_of(checkpoint)
    facts = describe(open_checkpoint(checkpoint))
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    files = facts.pop("files")
    for name, value in facts.items():
        print(f"{name:>16}  {_plain(name, value)}")
    for file in files:
        print(f"{'':>16}  {file['file']}  {_size(file['bytes'])}, {file['fragments']} fragments")


@checkpoint_app.command("verify", epilog="Example: basestone checkpoint verify runs/quickstart --all")
def checkpoint_verify(
    checkpoint: Checkpoint,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint of the run directory.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a checkpoint against its checksums; what is wrong is named by file and bytes."""
    from ..trainer.checkpoint.inspection import problems_of
    from ..trainer.errors import CheckpointError, ConfigError

    places = _steps_of(checkpoint)
    if every and places == [checkpoint]:
        raise ConfigError(f"{shown(checkpoint)}: is one checkpoint; --all takes a run directory")
    found = {}
    for place in places if every else places[:1]:
        found[place] = problems_of(place, _progress(place))
        if not found[place] and not as_json:
            print(f"{shown(place)}: every byte matches its checksum")
    problems = [problem for listed in found.values() for problem in listed]
    if as_json:
        rows = [{"place": shown(place), "problems": listed} for place, listed in found.items()]
        print(json.dumps(rows, indent=1))
        raise typer.Exit(EXIT_STORAGE if problems else 0)
    if problems:
        raise CheckpointError("\n".join(problems))


@checkpoint_app.command(
    "prune", epilog="Example: basestone checkpoint prune runs/quickstart --keep-last 1 --dry-run"
)
def checkpoint_prune(
    run_dir: RunPath,
    keep_last: Annotated[int | None, typer.Option(help="Newest ones to keep.", min=1)] = None,
    keep_every_steps: Annotated[
        int | None, typer.Option(help="Keep those of steps that this divides; 0: none.", min=0)
    ] = None,
    keep_best: Annotated[
        int | None, typer.Option(help="Keep so many with the lowest held-out loss.", min=0)
    ] = None,
    rollback_steps: Annotated[
        int | None, typer.Option(help="Keep one that is so many steps behind; 0: none.", min=0)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove checkpoints that the run's own `[checkpoint]` keys do not keep, and what killed saves left.

    A key that is given here counts in place of the run's. A run that is going is refused; damaged ones stay. Nothing
    goes before every byte of one that stays was read.
    """
    from ..trainer.checkpoint.inspection import plan_pruning, prune
    from ..trainer.run_lock import RunLock

    _check_run(run_dir)
    given = {
        "keep_last": keep_last,
        "keep_every_steps": keep_every_steps,
        "keep_best": keep_best,
        "rollback_steps": rollback_steps,
    }
    section = _section_of(run_dir, {name: value for name, value in given.items() if value is not None})
    if dry_run:
        _say_pruning(plan_pruning(run_dir, section, _progress), "would be removed", as_json)
        return
    with closing(RunLock(run_dir)):
        pruning = plan_pruning(run_dir, section, _progress)
        num_bytes = pruning.num_bytes
        prune(pruning)
    _say_pruning(pruning, "removed", as_json, num_bytes)


@checkpoint_app.command(
    "import",
    epilog="Example: basestone checkpoint import pytorch_model.bin imported --run recipes/quickstart.toml",
)
def checkpoint_import(
    file: Annotated[
        Path,
        typer.Argument(help="A state dict of torch.save: pytorch_model.bin, *.pt, *.pth.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Argument(help="The step directory to write; must not exist.", show_default=False)
    ],
    run: Annotated[
        Path, typer.Option("--run", help="The run file that describes its model.", show_default=False)
    ],
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Make a checkpoint of weights alone out of a torch file; nothing in the file is executed.

    Its names are those of the family's Hugging Face class, or our own.
    """
    arguments = ["import-file", str(file), str(out), "--run", str(run), *(["--debug"] if debug else [])]
    raise typer.Exit(local.run_workers(arguments, 1))


def _say_pruning(pruning: Any, verb: str, as_json: bool, num_bytes: int | None = None) -> None:
    gone = [*(row.place for row in pruning.removed), *map(str, pruning.leftovers)]
    num_bytes = pruning.num_bytes if num_bytes is None else num_bytes
    if as_json:
        values = {
            "removed": gone,
            "bytes": num_bytes,
            "kept": [row.place for row in pruning.kept],
            "damaged": [row.place for row in pruning.damaged],
        }
        print(json.dumps(values, indent=1))
        return
    for row in pruning.kept:
        print(f"{row.place}  stays: {', '.join(row.kept_by)}")
    for row in pruning.damaged:
        print(f"{row.place}  stays: it is damaged: {row.problem}")
    for path in gone:
        link = f": a link; the data stays at {pruning.links[path]}" if path in pruning.links else ""
        print(f"{path}  {verb}{link}")
    print(f"{len(gone)} {verb}, {_size(num_bytes)}")


def _check_run(run_dir: Path) -> None:
    from ..trainer.errors import ConfigError

    if not (run_dir / "checkpoints").is_dir():
        raise ConfigError(f"{run_dir}: is no run directory (no checkpoints/)")


def _section_of(
    run_dir: Path, given: dict[str, int] | None = None, hint: str = "; give --keep-last"
) -> CheckpointSection:
    """Give the `[checkpoint]` section of a run directory's own run.toml, with what is given laid over it."""
    from ..trainer.errors import ConfigError
    from ..trainer.load import load_run
    from ..trainer.sections import CheckpointSection

    if (run_dir / "run.toml").exists():
        section = load_run(run_dir / "run.toml").checkpoint
    elif given:
        section = CheckpointSection()
    else:
        raise ConfigError(f"{run_dir}: has no run.toml that says what to keep{hint}")
    return section.model_copy(update=given)


def _steps_of(checkpoint: str) -> list[str]:
    """Give the step directories of a run at any place, newest first, or the one that is named.

    Raises:
        ConfigError: it is neither.
    """
    from ..data.reading.transport import join
    from ..trainer.checkpoint.format import INDEX, MANIFEST, STATE, step_of
    from ..trainer.checkpoint.opening import CHECKPOINTS, steps_at
    from ..trainer.checkpoint.places import directory_at, local_path
    from ..trainer.errors import ConfigError

    path, names = local_path(checkpoint), directory_at(checkpoint).sizes().keys()
    if CHECKPOINTS in names:
        if steps := steps_at(join(checkpoint, CHECKPOINTS)):
            return [place for _, place in steps]
        what = "holds no checkpoint yet"
    elif names & {MANIFEST, INDEX, STATE} or any(name.startswith("rank_") for name in names):
        return [checkpoint]
    elif path is not None and path.is_file():
        what = "is a file"
    elif any(step_of(name) is not None for name in names):
        what = "is the folder of a run's checkpoints"
    elif names:
        what = "is neither a checkpoint nor a run directory"
    else:
        what = "is empty" if path is not None and path.exists() else "there is no such checkpoint directory"
    raise ConfigError(f"{shown(checkpoint)}: {what}; name a step directory, or the run directory")


def _progress(place: str) -> Callable[[int, int], None]:
    from ..trainer.console import tenths

    return tenths(place.rstrip("/").rpartition("/")[2])


def _plain(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(key, inner)}" for key, inner in value.items()) or "unknown"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None:
        return "unknown"
    if name == "bytes":
        return _size(value)
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
