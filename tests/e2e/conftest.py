"""What the whole runs share: the command line, a corpus, and a run that nothing happened to."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import forked_commands
import pytest
from commands import command, environment, losses_of
from small_corpus import make_corpus
from whole_run import train


@pytest.fixture(scope="session")
def basestone() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command to its end."""

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), env=environment(), cwd=cwd, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture(scope="session")
def forked() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same by forks of this process, where a start of its own is not what is tested."""
    return forked_commands.run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with shards/, tokenizer.model and run.toml."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def symbols(tmp_path_factory, forked, corpus) -> Path:
    """A tokenizer of the corpus with masks and sentinels."""
    tokenizer = tmp_path_factory.mktemp("symbols") / "tokenizer.model"
    specials = [part for name in ("[CLS]", "[SEP]", "[MASK]") for part in ("--special", name)]
    sizes = ("--vocab-size", 600, "--sentinels", 20)
    done = forked("tokenizer", "train", corpus / "shards/train", "--out", tokenizer, *specials, *sizes)
    assert done.returncode == 0, done.stderr
    return tokenizer


@pytest.fixture(scope="session")
def trained(tmp_path_factory, basestone, corpus) -> Path:
    """The run directory of an uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    done = basestone("train", corpus / "run.toml", "--run-dir", run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="session")
def reference(tmp_path_factory, corpus) -> list[float]:
    """Losses of a run of tests/whole_run.py that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    train(corpus, run_dir)
    return losses_of(run_dir)
