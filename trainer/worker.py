"""The processes that need torch: what a launcher starts. `python -m basestone.trainer.worker COMMAND ...`.

Arguments come from our own command line (launch/), which has checked them; this is not an interface for people.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EXIT_FAULT, EXIT_STOPPED, Stopped, exit_code_of, lost_contact, message_of

if TYPE_CHECKING:
    from .config import ResolvedRun
    from .places import DataPlaces
    from .preflight.check import Passed

warnings.filterwarnings("ignore")  # of libraries, at import; what users must know is said by ourselves
logging.basicConfig(level=logging.WARNING, format="%(message)s")


def main(argv: list[str] | None = None) -> None:
    """Run one command and leave with its exit code."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    commands = {
        "train": train,
        "preflight": preflight,
        "verify": verify,
        "evaluate": evaluate,
        "generate": generate,
        "export": export,
        "import-file": import_file,
        "import-directory": import_directory,
        "finetune": finetune,
        "similarity": similarity,
    }
    try:
        commands[arguments.command](arguments)
    except Exception as error:
        code = exit_code_of(error)
        if arguments.debug or (code == EXIT_FAULT and not lost_contact(error)):
            traceback.print_exc()
        print(f"{'' if code == EXIT_STOPPED else 'error: '}{message_of(error)}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # whoever read it may be gone
            sys.stdout.flush()
        # No collectives after an exception: atexit handlers of process groups would wait for others.
        os._exit(code)
    sys.stdout.flush()


def _parse(argv: list[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true")
    with_tokenizer = argparse.ArgumentParser(add_help=False, parents=[common])
    with_tokenizer.add_argument("--tokenizer", type=Path)
    parser = argparse.ArgumentParser(prog="basestone-worker")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "preflight"):
        one = commands.add_parser(name, parents=[common])
        one.add_argument("run", type=Path)
        one.add_argument("--run-dir", type=Path, required=True)
        one.add_argument("--set", action="append", default=[], dest="overrides")
        one.add_argument("--resume")
        one.add_argument("--preflight", type=json.loads, required=name == "preflight")  # its limits
    one = commands.add_parser("verify", parents=[common])
    one.add_argument("run", type=Path)
    one.add_argument("--set", action="append", default=[], dest="overrides")
    one.add_argument("--processes", type=int, required=True)
    one.add_argument("--layout", action="append", default=[])
    one.add_argument("--steps", type=int, required=True)
    one.add_argument("--dtype", required=True)
    one.add_argument("--json", action="store_true")
    one = commands.add_parser("evaluate", parents=[with_tokenizer])
    one.add_argument("checkpoint")
    one.add_argument("--data", action="append", default=[])
    one.add_argument("--max-tokens", type=int)
    one.add_argument("--json", action="store_true")
    one = commands.add_parser("generate", parents=[with_tokenizer])
    one.add_argument("checkpoint")
    one.add_argument("--prompt", required=True)
    one.add_argument("--max-new-tokens", type=int, default=64)
    one.add_argument("--temperature", type=float, default=0.8)
    one.add_argument("--top-k", type=int, default=50)
    one.add_argument("--seed", type=int, default=0)
    _add_hub_commands(commands, common, with_tokenizer)
    return parser.parse_args(argv)


def _add_hub_commands(
    commands: Any, common: argparse.ArgumentParser, with_tokenizer: argparse.ArgumentParser
) -> None:
    """Add what reads or writes models in the form of others."""
    one = commands.add_parser("export", parents=[with_tokenizer])
    one.add_argument("checkpoint")
    one.add_argument("out", type=Path)
    one.add_argument("--dtype", default="bf16")
    one.add_argument("--no-verify", action="store_true")
    one.add_argument("--background", type=int)  # the process id of the run
    one.add_argument("--max-shard-gb", type=float, default=5.0)
    one.add_argument("--processes", type=int, default=1)
    one.add_argument("--licence", default="")
    one.add_argument("--name", default="")
    one = commands.add_parser("import-directory", parents=[with_tokenizer])
    one.add_argument("directory", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--no-verify", action="store_true")
    one = commands.add_parser("import-file", parents=[common])
    one.add_argument("file", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--run", type=Path, required=True)
    one = commands.add_parser("finetune", parents=[common])
    one.add_argument("settings", type=json.loads)
    one.add_argument("--json", action="store_true")
    one = commands.add_parser("similarity", parents=[common])
    one.add_argument("directory", type=Path)
    one.add_argument("data", type=Path)
    one.add_argument("--batch", type=int, required=True)
    one.add_argument("--json", action="store_true")


def train(arguments: argparse.Namespace) -> None:
    """Be one rank of a training run."""
    from . import runtime as processes
    from .provenance import versions

    passed = _preflight(arguments) if arguments.preflight is not None else None
    resolved, places = (passed.resolved, passed.places) if passed is not None else _open_run(arguments)
    run = resolved.run
    processes.find_own_programs()
    from .engine import check_deepspeed

    check_deepspeed(resolved, processes.local_world_size())
    runtime = processes.start(
        tensor=run.parallel.tensor,
        pipeline=run.parallel.pipeline,
        virtual_pipeline=run.parallel.virtual_pipeline,
        deterministic=run.run.deterministic,
        store=passed.store if passed is not None else None,
        timeout=timedelta(seconds=run.run.timeout_s),
    )
    from .loop import Trainer

    trainer = Trainer(
        resolved,
        runtime,
        places,
        arguments.run_dir,
        resume=arguments.resume,
        versions=versions(),
        preflight=passed.summary if passed is not None else None,
    )
    try:
        trainer.fit()
    except Exception as error:
        trainer.fail(error)
        raise
    finally:
        trainer.close()
    processes.stop()


def preflight(arguments: argparse.Namespace) -> None:
    """Be one rank of a launch that is only checked."""
    from .preflight.check import leave_passed
    from .runtime import rank

    summary = _preflight(arguments).summary
    if rank() == 0:
        leave_passed(arguments.run_dir, summary)


def _preflight(arguments: argparse.Namespace) -> Passed:
    """Check the launch; rank 0 says what was found."""
    from .preflight.check import check
    from .preflight.limits import PreflightSection
    from .runtime import rank

    passed = check(
        functools.partial(_open_run, arguments), arguments.run_dir, PreflightSection(**arguments.preflight)
    )
    if rank() == 0:
        print(f"preflight: {passed.summary}", flush=True)
    return passed


def _open_run(
    arguments: argparse.Namespace, log: Callable[[str], None] = lambda _: None
) -> tuple[ResolvedRun, DataPlaces]:
    """Read the run file and find what it names."""
    from .load import load_run
    from .places import open_run
    from .runtime import cache_dir, world_size

    return open_run(load_run(arguments.run, arguments.overrides), world_size(), cache_dir(), log)


def verify(arguments: argparse.Namespace) -> None:
    """Compare layouts with one process; the ranks are forked from here."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))  # an exception, so that temporary files go
    from . import runtime as processes
    from .errors import ConfigError, NumericsError
    from .layouts import all_layouts, parse_layout
    from .load import load_run
    from .places import locate

    run = load_run(arguments.run, arguments.overrides)
    places = locate(run.data, run.reading, processes.cache_dir())
    given = [parse_layout(text, arguments.processes) for text in arguments.layout]
    from . import verify as proof

    checked = proof.Verification(
        run, places, num_processes=arguments.processes, steps=arguments.steps, dtype=arguments.dtype
    )
    problems = {layout: checked.problems(layout) for layout in given or all_layouts(arguments.processes)}
    illegal = {layout: text for layout, text in problems.items() if text}
    if given and illegal:
        raise ConfigError("\n".join(f"{layout}: {text}" for layout, text in illegal.items()))
    legal = [layout for layout, text in problems.items() if not text]
    if not legal:
        raise ConfigError(f"no layout of {arguments.processes} processes is legal for {arguments.run}")
    say = (lambda _: None) if arguments.json else functools.partial(print, flush=True)
    say(proof.HEADER)
    verdicts = []
    for verdict in checked.run(legal):
        say(proof.row(verdict))
        verdicts.append(verdict)
    if arguments.json:
        print(json.dumps([proof.as_json(verdict) for verdict in verdicts], indent=1))
    for layout, text in illegal.items():
        say(f"not legal: {layout}: {text.splitlines()[0]}")
    misses = [verdict for verdict in verdicts if not verdict.equal]
    if misses:
        lines = "\n".join(f"  {verdict.layout}: {verdict.first}" for verdict in misses)
        raise NumericsError(f"{len(misses)} of {len(verdicts)} layouts differ from one process:\n{lines}")
    say(f"{len(verdicts)} layouts equal one process ({arguments.dtype}, {arguments.steps} steps)")


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure a checkpoint on held-out shards, in one process, with the trainer's model."""
    from .inference import OpenCheckpoint
    from .record import heldout_text, measured_text

    opened = OpenCheckpoint(arguments.checkpoint, arguments.tokenizer)
    results = opened.evaluate(arguments.data, arguments.max_tokens)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    for name, result in results.items():
        print(f"{name}: {heldout_text(result)} {measured_text(result)}")


def generate(arguments: argparse.Namespace) -> None:
    """Continue a prompt with the trainer's model."""
    from .inference import OpenCheckpoint

    opened = OpenCheckpoint(arguments.checkpoint, arguments.tokenizer)
    text = opened.generate(
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    print(text)


def export(arguments: argparse.Namespace) -> None:
    """Write a Hugging Face directory and compare it with the trainer's logits."""
    if arguments.background is not None:
        from .forks import die_with_parent

        die_with_parent(arguments.background)
        os.nice(10)  # the run that it belongs to goes first
    from .inference import OpenCheckpoint

    with _stoppable("export", arguments.out):
        told = OpenCheckpoint(arguments.checkpoint, arguments.tokenizer).export(
            arguments.out,
            dtype=arguments.dtype,
            verify=not arguments.no_verify,
            licence=arguments.licence,
            name=arguments.name,
            max_shard_bytes=round(arguments.max_shard_gb * 1e9),
            num_processes=arguments.processes,
        )
    print(told)


def import_directory(arguments: argparse.Namespace) -> None:
    """Write a Hugging Face directory as a checkpoint."""
    from ..model.flops import num_parameters
    from .hub.from_directory import RUN_FILE, import_directory
    from .provenance import versions

    with _stoppable("import", arguments.out):
        model, verification = import_directory(
            arguments.directory,
            arguments.out,
            tokenizer=arguments.tokenizer,
            versions=versions(),
            compare=not arguments.no_verify,
        )
    checked = "not verified"
    if verification is not None:
        checked = (
            f"{verification.compared} equal transformers' within {verification.relative_error:.1e} (relative)"
        )
    print(
        f"{arguments.out}: {model.family}, {num_parameters(model) / 1e6:,.1f} M parameters of {arguments.directory}, "
        f"{checked}; to go on from them: {arguments.out / RUN_FILE}"
    )


def import_file(arguments: argparse.Namespace) -> None:
    """Write the weights of a torch state dict as a step directory."""
    from ..data.tokenizer import Tokenizer
    from . import runtime as processes
    from .foreign import import_weights
    from .load import load_run
    from .places import locate_tokenizer
    from .provenance import versions

    run = load_run(arguments.run)
    place = locate_tokenizer(run.data, run.reading, processes.cache_dir())
    tokenizer = Tokenizer(place)
    resolved = run.resolve(run.parallel.tensor * run.parallel.pipeline, tokenizer.vocab_size)
    import_weights(
        arguments.file, arguments.out, resolved, tokenizer_sha256=tokenizer.sha256, versions=versions()
    )
    print(f"{arguments.out}: weights of {arguments.file.name}; its tokenizer is {place}")


def finetune(arguments: argparse.Namespace) -> None:
    """Fine-tune a Hugging Face directory, as one of the processes that do."""
    from .finetuning.run import finetune as tune
    from .finetuning.settings import FinetuneSettings

    settings = FinetuneSettings(**arguments.settings)
    with _stoppable("finetune", settings.out):
        tune(settings, as_json=arguments.json)


def similarity(arguments: argparse.Namespace) -> None:
    """Measure the vectors of a Hugging Face directory on pairs of texts."""
    from .similarity.run import similarity as measure

    measure(arguments.directory, arguments.data, batch=arguments.batch, as_json=arguments.json)


@contextlib.contextmanager
def _stoppable(command: str, out: Path) -> Iterator[None]:
    """Turn SIGTERM into `Stopped`, by way of an exception that no library catches, so that what is unfinished goes."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the removal short
        sys.exit(EXIT_STOPPED)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit:
        left = f"{out} is whole" if out.exists() else "nothing was written"
        raise Stopped(f"{command}: stopped on request; {left}") from None


if __name__ == "__main__":
    main()
