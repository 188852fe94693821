"""The `basestone` command. Imports nothing heavy: what needs torch is started as a worker."""

from __future__ import annotations

import enum
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from . import environ, local
from .checkpoint_commands import checkpoint_app
from .data_commands import data_app, prepare, tokenizer_app
from .finetune_command import finetune
from .jobs_commands import jobs_app
from .launch_command import launch
from .report_commands import report, watch

EXIT_USER, EXIT_INTERRUPTED = 64, 130
MAX_SEED = (1 << 63) - 1  # what torch's generators take
MAX_TEMPERATURE = 1e6  # and not nan: there every token is as likely as any other

app = typer.Typer(
    name="basestone",
    help="Pre-train Transformers: Megatron-core blocks under DeepSpeed ZeRO, fed by WebDataset streams.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: basestone quickstart",
)
app.add_typer(tokenizer_app)
app.add_typer(data_app)
app.command(
    epilog="Example: basestone prepare docs/ crawl.warc.gz --rules gopher --near-duplicates --out shards/web"
)(prepare)
app.add_typer(checkpoint_app)
app.command(
    epilog="Example: basestone finetune my-model questions.jsonl --out my-tuned-model --lora 16",
)(finetune)
app.command(epilog="Example: basestone report runs/quickstart/run")(report)
app.command(epilog="Example: basestone watch runs/quickstart/run")(watch)
app.command(epilog="Example: basestone launch run.toml --on slurm --nodes 8 --cluster cluster.toml --dry-run")(
    launch
)
app.add_typer(jobs_app)

RunFile = Annotated[Path, typer.Argument(help="The run file, TOML.", show_default=False)]
Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A step directory, or a run directory for its newest good one; a path or a URL.",
        show_default=False,
    ),
]
Override = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a key of the file; repeatable.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print for machines.")]
TokenizerPath = Annotated[
    Path | None, typer.Option("--tokenizer", help="The tokenizer, where it is not in the run directory.")
]


class Precision(enum.StrEnum):
    """What `verify` compares in."""

    fp32 = "fp32"
    bf16 = "bf16"


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(version("basestone"))
        except PackageNotFoundError:
            print("0+checkout")
        raise typer.Exit


@app.callback()
def _common(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: basestone train recipes/quickstart.toml --set train.steps=50 --dry-run")
def train(
    run: RunFile,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Where the run lives; by default runs/<file stem>.")
    ] = None,
    overrides: Override = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            help="Go on from this step directory and no other, or from the newest good one of this run directory; "
            "a path or a URL.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved run and leave; starts no process group.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train, going on from the run directory's newest good checkpoint.

    Outside a launcher it starts `run.processes` local workers; under torchrun, deepspeed or srun it is one.
    """
    directory = (run_dir or Path("runs") / run.stem).resolve()
    arguments = ["train", str(run), "--run-dir", str(directory)]
    for override in overrides or []:
        arguments += ["--set", override]
    arguments += ["--resume", resume] if resume else []
    arguments += ["--debug"] if debug else []
    environ.adopt_srun()
    from ..trainer.rundir import forget_old_stop, make_run_directory

    if environ.inside_launcher() and not dry_run:
        if environ.is_first_rank():
            forget_old_stop(directory, local.parent_started_s())
        local.become_worker(arguments)

    from ..trainer.load import load_run
    from ..trainer.places import open_run
    from ..trainer.plan import describe
    from .gpus import check_gpus

    config = load_run(run, overrides or [])
    num_workers = config.run.processes or max(1, environ.num_gpus())
    resolved, _ = open_run(config, num_workers, environ.cache_dir(), _say)
    lines = describe(resolved, directory)
    if dry_run:
        for label, text in lines:
            print(f"{label:>15}  {text}")
        return
    for label, text in lines:
        if label in ("model", "parameters", "layout", "batch", "length"):
            _say(f"{label}: {text}")
    check_gpus(config, num_workers)
    make_run_directory(directory)
    forget_old_stop(directory, local.started_s())
    raise typer.Exit(local.run_workers(arguments, num_workers, directory / "logs"))


@app.command(epilog="Example: basestone verify recipes/quickstart.toml --layouts tp2-sp-pp2-z1,pp4-z3")
def verify(
    run: RunFile,
    overrides: Override = None,
    num_processes: Annotated[int, typer.Option("--processes", help="Local ranks of each layout.", min=1)] = 4,
    layouts: Annotated[
        str, typer.Option(help="Names of layouts, with commas between; by default every legal one.")
    ] = "",
    steps: Annotated[int, typer.Option(help="Steps to compare.", min=1)] = 5,
    dtype: Annotated[Precision, typer.Option(help="bf16 has tolerances of its own.")] = Precision.fp32,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prove that layouts compute what one process computes: losses, norms, every gradient and update.

    Runs the file's model on the file's data in small batches, first in one process, then in each layout. A layout is
    named like tp2-sp-pp2-vp2-dp1-z1: tensor, sequence, pipeline, virtual stages, data, ZeRO stage.
    """
    from .gpus import check_ranks

    check_ranks(num_processes)
    arguments = ["verify", str(run), "--processes", str(num_processes), "--steps", str(steps)]
    arguments += ["--dtype", dtype.value]
    for name, values in (
        ("--set", overrides or []),
        ("--layout", [text for text in layouts.split(",") if text]),
    ):
        for value in values:
            arguments += [name, value]
    arguments += ["--json"] if as_json else []
    arguments += ["--debug"] if debug else []
    raise typer.Exit(local.run_workers(arguments, 1))


@app.command(epilog="Example: basestone evaluate runs/quickstart")
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Held-out shards; by default the run's own. Repeatable.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of each set; by default the run's evaluate.max_tokens.", min=1)
    ] = None,
    tokenizer: TokenizerPath = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure loss, and what the model's task tells more, on held-out text: perplexity, bits per byte, accuracies."""
    arguments = ["evaluate", checkpoint]
    arguments += [] if max_tokens is None else ["--max-tokens", str(max_tokens)]
    for place in data or []:
        arguments += ["--data", place]
    arguments += ["--json"] if as_json else []
    _one_worker(arguments, tokenizer, debug)


@app.command(epilog='Example: basestone generate runs/quickstart --prompt "def main(" --temperature 0.7')
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token.", min=0.0, max=MAX_TEMPERATURE)
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0 from all.", min=0)] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the draws.", min=0, max=MAX_SEED)] = 0,
    tokenizer: TokenizerPath = None,
    debug: Debug = False,
) -> None:
    """Continue a prompt with the trainer's own model."""
    arguments = ["generate", checkpoint, f"--prompt={prompt}", "--max-new-tokens", str(max_new_tokens)]
    arguments += ["--temperature", str(temperature), "--top-k", str(top_k), "--seed", str(seed)]
    _one_worker(arguments, tokenizer, debug)


@app.command(epilog="Example: basestone export runs/quickstart my-model --licence apache-2.0")
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="The directory to write; must not exist.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare logits; the model card says so.")
    ] = False,
    max_shard_gb: Annotated[
        float, typer.Option(help="Largest file of weights, in GB of 10^9 bytes.", min=0.001)
    ] = 5.0,
    num_processes: Annotated[
        int, typer.Option("--processes", help="That share the files of weights.", min=1)
    ] = 1,
    licence: Annotated[str, typer.Option(help="For the model card, e.g. apache-2.0.")] = "",
    name: Annotated[str, typer.Option(help="For the model card; by default the directory's.")] = "",
    tokenizer: TokenizerPath = None,
    debug: Debug = False,
) -> None:
    """Write a Hugging Face directory, and compare it with the trainer's logits before it is called done."""
    arguments = [
        "export",
        checkpoint,
        str(out),
        "--dtype",
        dtype,
        f"--max-shard-gb={max_shard_gb}",
        f"--processes={num_processes}",
        f"--licence={licence}",
        f"--name={name}",
    ]
    arguments += ["--no-verify"] if no_verify else []
    _one_worker(arguments, tokenizer, debug)


@app.command("import", epilog="Example: basestone import ./Qwen2.5-0.5B imported")
def import_directory(
    directory: Annotated[
        Path, typer.Argument(help="A model's directory as the Hugging Face hub has it.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The directory to make; must not exist.", show_default=False)],
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare logits with transformers'.")
    ] = False,
    tokenizer: TokenizerPath = None,
    debug: Debug = False,
) -> None:
    """Make a checkpoint of a Hugging Face model, to go on training from in any layout.

    Nothing of the directory is executed. With the weights come the tokenizer and a run file to begin with.
    """
    arguments = ["import-directory", str(directory), str(out), *(["--no-verify"] if no_verify else [])]
    _one_worker(arguments, tokenizer, debug)


@app.command(epilog="Example: basestone similarity my-encoder sts-test.jsonl --json")
def similarity(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="An exported encoder of sentences, or another's.", show_default=False
        ),
    ],
    pairs: Annotated[
        Path,
        typer.Argument(help='JSON lines: {"text", "other"}, all with "score" or none.', show_default=False),
    ],
    batch: Annotated[int, typer.Option(help="Texts of one forward pass.", min=1)] = 32,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure vectors of texts: correlation with people's scores, or how often a text's partner is found.

    With scores it gives Spearman's and Pearson's correlation with the cosines; without, recall at 1, and at 10 of more
    than ten, and the mean reciprocal rank of each text's partner among all others of the file.
    """
    arguments = ["similarity", str(directory), str(pairs), "--batch", str(batch)]
    _one_worker(arguments + (["--json"] if as_json else []), None, debug)


def _one_worker(arguments: list[str], tokenizer: Path | None, debug: bool) -> None:
    arguments = [
        *arguments,
        *(["--tokenizer", str(tokenizer)] if tokenizer else []),
        *(["--debug"] if debug else []),
    ]
    raise typer.Exit(local.run_workers(arguments, 1))


@app.command(epilog="Example: basestone quickstart --out /tmp/quickstart")
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Where everything goes.")] = Path("runs/quickstart"),
    fresh: Annotated[
        bool, typer.Option("--fresh/--keep", help="Start over, or go on with what is there.")
    ] = True,
) -> None:
    """Train, kill, resume, export and sample a small model on this machine, in a few minutes."""
    from .quickstart import run_quickstart

    raise typer.Exit(run_quickstart(out.resolve(), fresh))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line; errors with an exit code of their own become one line."""
    # The deepspeed launcher puts --local_rank=N in front; the environment says the same.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    debug = "--debug" in arguments
    try:
        code = app(arguments, prog_name=app.info.name, standalone_mode=False)
    except Exception as error:
        if hasattr(error, "format_message"):  # a wrong flag or command
            if message := error.format_message():  # none where the help was the answer
                context: Any = getattr(error, "ctx", None)
                _say(f"error: {message}\ntry: {context.command_path if context else app.info.name} --help")
            sys.exit(EXIT_USER)
        if isinstance(error, typer.Abort):
            sys.exit(EXIT_INTERRUPTED)
        from ..trainer.errors import EXIT_FAULT, exit_code_of, message_of

        code = exit_code_of(error)
        if code == EXIT_FAULT:
            raise
        if debug:
            traceback.print_exc()
        _say(f"error: {message_of(error)}")
    sys.exit(code or 0)
