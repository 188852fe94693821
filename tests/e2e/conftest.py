"""A small corpus, tokenizer and run file, made by the commands that a user types."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from commands import command, environment

RUN_TOML = """
[run]
processes = 2
[model]
family = "llama"
num_layers = 2
hidden_size = 64
num_attention_heads = 4
num_query_groups = 2
max_sequence_length = 64
[data]
train = "shards/train"
tokenizer = "tokenizer.model"
sequence_length = 64
[data.heldout]
topics = "shards/heldout"
[parallel]
tensor = 2
[train]
steps = 16
global_batch = 8
micro_batch = 4
dtype = "fp32"
[optimizer]
lr = 3e-3
[schedule]
kind = "constant"
warmup_steps = 4
[evaluate]
every_steps = 8
max_tokens = 2000
[checkpoint]
every_steps = 4
[meter]
watts = 100
"""


@pytest.fixture(scope="session")
def basestone() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command to its end."""

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), env=environment(), cwd=cwd, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, basestone) -> Path:
    """A folder with shards/, tokenizer.model and run.toml."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}) for _, text in sorted(topics.items())]
    (folder / "topics.jsonl").write_text("\n".join(lines))
    for arguments in (
        ("prepare", folder / "topics.jsonl", "--out", folder / "shards", "--heldout-fraction", "0.1"),
        (
            "tokenizer",
            "train",
            folder / "shards/train",
            "--out",
            folder / "tokenizer.model",
            "--vocab-size",
            "512",
        ),
    ):
        done = basestone(*arguments)
        assert done.returncode == 0, done.stderr
    (folder / "run.toml").write_text(RUN_TOML)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, basestone, corpus) -> Path:
    """The run directory of an uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    done = basestone("train", corpus / "run.toml", "--run-dir", run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir
