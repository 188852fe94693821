"""A small corpus, tokenizer and run file, made by the commands that a user types."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from pydoc_data.topics import topics

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


def make_corpus(folder: Path) -> Path:
    """Fill a folder with shards/, tokenizer.model and run.toml."""
    lines = [json.dumps({"text": text}) for _, text in sorted(topics.items())]
    (folder / "topics.jsonl").write_text("\n".join(lines))
    shards, tokenizer = folder / "shards", folder / "tokenizer.model"
    for arguments in (
        ("prepare", folder / "topics.jsonl", "--out", shards, "--heldout-fraction", "0.1"),
        ("tokenizer", "train", shards / "train", "--out", tokenizer, "--vocab-size", "512"),
    ):
        done = subprocess.run(
            command(*arguments), env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    (folder / "run.toml").write_text(RUN_TOML)
    return folder
