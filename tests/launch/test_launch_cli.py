"""The `basestone` command: its help, its errors, and what it hands to workers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import environment
from in_process import refused

from basestone.launch import cli, local
from basestone.trainer import worker
from basestone.trainer.rundir import make_run_directory

# ---- help and usage -----------------------------------------------------------------------------------------------


def leaves(command: Any, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command, as the words that a user types."""
    if not hasattr(command, "commands"):
        return [words]
    return [leaf for name, child in command.commands.items() for leaf in leaves(child, (*words, name))]


COMMANDS = leaves(typer.main.get_command(cli.app))
RUN_HELP = """
import contextlib, io, json, sys
from basestone.launch import cli
results = {}
names = ("torch", "deepspeed", "megatron", "pydantic", "numpy", "webdataset", "sentencepiece", "transformers")
heavy = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["basestone", *words]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            cli.main()
    except SystemExit as error:
        results[" ".join(words)] = [error.code, out.getvalue()]
    heavy[" ".join(words)] = [name for name in names if name in sys.modules]
print(json.dumps([results, heavy]))
"""


@pytest.fixture(scope="module")
def helped() -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What every --help and --version printed, and which heavy modules had been imported by then."""
    words = [["--version"], ["--help"], ["-h"], *([*leaf, "--help"] for leaf in COMMANDS)]
    words += [[group, "--help"] for group in ("tokenizer", "data", "checkpoint", "jobs")]
    done = subprocess.run(
        [sys.executable, "-c", RUN_HELP, json.dumps(words)],
        env=environment() | {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
    )
    results, heavy = json.loads(done.stdout)
    return results, heavy


def test_there_are_all_commands():
    assert {" ".join(leaf) for leaf in COMMANDS} == {
        *(
            "train",
            "launch",
            "verify",
            "evaluate",
            "generate",
            "export",
            "import",
            "report",
            "watch",
            "quickstart",
            "prepare",
            "finetune",
            "similarity",
        ),
        *("tokenizer train", "tokenizer inspect", "tokenizer export"),
        *("data index", "data inspect", "data verify"),
        *("checkpoint ls", "checkpoint show", "checkpoint verify"),
        *("checkpoint prune", "checkpoint import"),
        *("jobs ls", "jobs logs", "jobs stop"),
    }


@pytest.mark.parametrize("command", [(), *COMMANDS], ids=" ".join)
def test_help_shows_an_example(helped, command):
    code, text = helped[0][" ".join([*command, "--help"])]
    assert code == 0
    assert f"Example: basestone {' '.join(command)}" in text and "Usage: basestone" in text


def test_help_and_version_import_nothing_heavy(helped):
    assert helped[1]["--help"] == []
    # Typer asks pydantic for the forms of a command's options.
    assert all(set(names) <= {"pydantic"} for names in helped[1].values())


def test_version_and_short_help(helped):
    code, text = helped[0]["--version"]
    assert code == 0 and text.strip() and text.strip()[0].isdigit() and len(text.splitlines()) == 1
    assert helped[0]["-h"] == helped[0]["--help"]


@pytest.mark.parametrize("words", [(), ("tokenizer",), ("data",), ("checkpoint",)], ids=" ".join)
def test_no_command_shows_the_help_and_no_error(basestone, words):
    done = basestone(*words)
    assert done.code == 64 and "Usage:" in done.out and "error" not in done.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("trian",), "No such command 'trian'"),
        (("data", "check"), "No such command 'check'"),
        (("train",), "Missing argument"),
        (("train", "run.toml", "--stepps", "3"), "No such option"),
        (("train", "run.toml", "extra"), "extra"),
        (("evaluate", "x", "--max-tokens", "0"), "max-tokens"),
        (("evaluate", "x", "--max-tokens", "many"), "max-tokens"),
        (("generate", "x"), "prompt"),
        (("generate", "x", "--prompt", "a", "--temperature", "-1"), "temperature"),
        (("generate", "x", "--prompt", "a", "--temperature", "nan"), "temperature"),
        (("generate", "x", "--prompt", "a", "--temperature", "inf"), "temperature"),
        (("generate", "x", "--prompt", "a", "--seed", str(1 << 63)), "seed"),
        (("train", "run.toml", "--stepps", "3", "--debug"), "No such option"),
        (("prepare", "x"), "out"),
        (("prepare", "x", "--out", "y", "--heldout-fraction", "1"), "heldout-fraction"),
        (("tokenizer", "train", "x", "--out", "y", "--vocab-size", "299"), "vocab-size"),
        (("similarity", "--nope"), "No such option: --nope"),
        (("--nope",), "No such option: --nope"),
    ],
)
def test_a_usage_error_is_one_line_and_a_hint(basestone, words, text):
    done = basestone(*words)
    refused(done, 64, text)
    prefixes = [leaf[:length] for leaf in COMMANDS for length in range(len(leaf) + 1)]
    named = max((prefix for prefix in prefixes if prefix == words[: len(prefix)]), key=len)
    assert done.err.splitlines()[1:] == [" ".join(["try: basestone", *named, "--help"])]


def test_errors_end_with_their_own_code(basestone, tmp_path):
    refused(basestone("train", tmp_path / "no.toml"), 64, "there is no such run file")
    refused(basestone("report", tmp_path), 64, f"{tmp_path}: is no run directory (has none of metrics.jsonl, ")
    refused(basestone("watch", tmp_path / "no"), 64, "is no run directory (there is no such directory); give")
    refused(basestone("checkpoint", "ls", tmp_path), 64, f"{tmp_path}: is no run directory (no checkpoints/)")
    refused(basestone("checkpoint", "verify", tmp_path / "no"), 64, "there is no such checkpoint directory")
    make_run_directory(tmp_path)
    refused(basestone("checkpoint", "verify", tmp_path), 64, f"{tmp_path}: holds no checkpoint")


def test_ctrl_c_is_130(basestone, monkeypatch, tmp_path):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "run_workers", interrupt)
    assert basestone("evaluate", tmp_path).code == 130


def test_debug_shows_where_and_changes_no_code(basestone, tmp_path):
    done = basestone("train", tmp_path / "no.toml", "--debug")
    lines = done.err.splitlines()
    assert done.code == 64 and lines[0] == "Traceback (most recent call last):" and "load_run" in done.err
    assert lines[-1] == f"error: {tmp_path / 'no.toml'}: there is no such run file"


@pytest.mark.faults
def test_storage_that_fails_here_is_74(basestone, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/run/logs")

    monkeypatch.setattr(local, "run_workers", fail)
    refused(
        basestone("evaluate", tmp_path), 74, "storage failed: No space left on device: runs/run/logs; check"
    )


def test_what_is_no_users_error_is_not_hidden(monkeypatch, tmp_path):
    def fail(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(local, "run_workers", fail)
    monkeypatch.setattr(sys, "argv", ["basestone", "evaluate", str(tmp_path)])
    with pytest.raises(RuntimeError, match="ours"):
        cli.main()


# ---- commands for workers -----------------------------------------------------------------------------------------


PROMPT = "--help\n $(x) {0..9} '\"* é"


def test_evaluate_generate_and_export_reach_the_worker_as_typed(basestone, asked, tmp_path):
    assert (
        basestone(
            "evaluate",
            tmp_path,
            "--data",
            "a b",
            "--data",
            "c",
            "--json",
            "--tokenizer",
            "t",
            "--max-tokens",
            99,
        ).code
        == 7
    )
    words = ("--max-new-tokens", 3, "--temperature", 0, "--top-k", 0, "--seed", 9, "--debug")
    assert basestone("generate", tmp_path, "--prompt", PROMPT, *words).code == 7
    words = ("--dtype", "fp32", "--no-verify", "--licence", "-odd", "--name", "my model")
    assert basestone("export", tmp_path, tmp_path / "out", *words).code == 7
    assert [call[1:] for call in asked] == [(1,)] * 3
    evaluate, generate, export = (worker._parse(call[0]) for call in asked)
    assert (evaluate.command, evaluate.checkpoint) == (
        "evaluate",
        str(tmp_path),
    ) and evaluate.tokenizer == Path("t")
    assert (evaluate.data, evaluate.json, evaluate.max_tokens) == (["a b", "c"], True, 99)
    assert generate.prompt == PROMPT and generate.debug
    assert (generate.max_new_tokens, generate.temperature, generate.top_k, generate.seed) == (3, 0.0, 0, 9)
    assert (export.out, export.dtype, export.no_verify) == (tmp_path / "out", "fp32", True)
    assert (export.licence, export.name) == ("-odd", "my model")


def test_defaults_are_the_same_on_both_sides(basestone, asked, tmp_path):
    """The worker's own defaults are never seen by a user; they must not say something else."""
    for words in (("evaluate", "x"), ("generate", "x", "--prompt", "p"), ("export", "x", "y")):
        basestone(*words)
        bare = [word for word in words if word != "--prompt"][: 3 if words[0] == "export" else 2]
        bare += ["--prompt", "p"] if words[0] == "generate" else []
        assert vars(worker._parse(asked[-1][0])) == vars(worker._parse(bare))


# ---- train --------------------------------------------------------------------------------------------------------

RUN_TOML = """
[model]
family = "llama"
num_layers = 2
hidden_size = 64
num_attention_heads = 4
max_sequence_length = 64
[data]
train = "shards/train"
tokenizer = "texts.model"
sequence_length = 64
[train]
steps = 4
global_batch = 4
micro_batch = 2
[optimizer]
lr = 1e-3
"""


@pytest.fixture
def run_file(tmp_path: Path, tokenizer: Path) -> Path:
    (tmp_path / "run.toml").write_text(RUN_TOML)
    return tmp_path / "run.toml"


def test_a_dry_run_prints_the_plan_and_starts_nothing(basestone, asked, run_file, tmp_path):
    words = ("train", run_file, "--run-dir", tmp_path / "run", "--set", "run.processes=2", "--dry-run")
    done = basestone(*words)
    assert done.code == 0 and done.err == ""
    labels = [line.split()[0] for line in done.out.splitlines()]
    assert {"model", "parameters", "layout", "batch", "length"} <= set(labels)
    assert asked == [] and not (tmp_path / "run").exists()
    program = (
        "import sys\nfrom basestone.launch import cli\ntry: cli.main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr


def test_train_starts_its_workers_with_what_was_typed(basestone, asked, run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--set", "run.processes=2", "--set", "train.steps=8", "--resume", "somewhere", "--debug")
    assert basestone("train", run_file, *words).code == 7
    ((arguments, num_workers, log_dir),) = asked
    assert (num_workers, log_dir) == (2, tmp_path / "runs" / "run" / "logs") and log_dir.is_dir()
    parsed = worker._parse(arguments)
    assert (parsed.run, parsed.run_dir) == (run_file, tmp_path / "runs" / "run")
    assert (parsed.overrides, parsed.resume) == (["run.processes=2", "train.steps=8"], "somewhere")
    assert parsed.debug


def test_a_run_that_cannot_be_makes_no_directory(basestone, asked, run_file, tmp_path):
    done = basestone("train", run_file, "--run-dir", tmp_path / "run", "--set", "model.num_layer=3")
    assert done.code == 64 and "did you mean 'num_layers'" in done.err and "Traceback" not in done.err
    assert asked == [] and not (tmp_path / "run").exists()


class Replaced(Exception):
    """Stands for the end of this program."""


@pytest.mark.parametrize("first", [(), ("--local_rank=3",)], ids=["torchrun", "deepspeed"])
def test_under_a_launcher_it_becomes_a_worker(monkeypatch, tmp_path, first):
    def replace(path: str, command: list[str]) -> None:
        raise Replaced(path, command)

    monkeypatch.setattr(local.os, "execv", replace)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = [*first, "train", "run.toml", "--run-dir", str(tmp_path), "--set", "train.steps=2"]
    monkeypatch.setattr(sys, "argv", ["basestone", *words])
    with pytest.raises(Replaced) as caught:
        cli.main()
    path, command = caught.value.args
    assert path == sys.executable and command[:3] == [sys.executable, "-m", "basestone.trainer.worker"]
    parsed = worker._parse(command[3:])
    assert (parsed.run, parsed.run_dir, parsed.overrides) == (Path("run.toml"), tmp_path, ["train.steps=2"])
