"""README's commands run as they stand there, in an empty directory; only the model of its run file is made smaller."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest
from commands import command, environment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = [
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.num_attention_heads=2",
    "model.num_query_groups=2",
    "model.head_dim=32",
    "model.ffn_hidden_size=128",
    "data.sequence_length=64",
    "train.steps=4",
    "train.global_batch=4",
    "run.processes=2",
    "evaluate.max_tokens=20000",
]


def block(language: str, containing: str) -> str:
    """The fenced block of a language that holds a text."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
    found = [text for name, text in blocks if name == language and containing in text]
    assert len(found) == 1, f"one {language} block with {containing!r} was expected, {len(found)} are there"
    return found[0]


@pytest.mark.dist
def test_the_commands_for_your_own_text(tmp_path):
    (tmp_path / "notes").mkdir()
    library = Path(sysconfig.get_path("stdlib"))
    sources = sorted(library.glob("*.py"))[:90]
    for source in sources[:60]:
        (tmp_path / "notes" / source.name).write_bytes(source.read_bytes())
    lines = [
        json.dumps({"text": source.read_text(encoding="utf-8", errors="replace")}) for source in sources[60:]
    ]
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "run.toml").write_text(block("toml", "[model]"))
    for line in block("sh", "basestone prepare notes/").strip().splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "basestone"
        if words[1] == "train":
            words += [word for change in SMALLER for word in ("--set", change)]
        done = subprocess.run(
            command(*words[1:]), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "my-model" / "config.json").exists()
    assert (tmp_path / "runs" / "run" / "report.html").exists()


def test_the_tree_names_what_is_there():
    tree = block("", "launch/ ")
    named = re.findall(r"^(\w+)/ ", tree, re.M) + re.findall(r" (docs)/ ", tree)
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert folders | {"tests", "bench", "docs"} <= set(named)
    assert all((ROOT / name).is_dir() for name in named)


def test_the_two_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([\w-]+)`?", README)) <= targets


@pytest.mark.slow
@pytest.mark.dist
def test_the_proof():
    words = shlex.split(block("sh", "basestone verify"))
    done = subprocess.run(command(*words[1:]), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed, shown = done.stdout.splitlines(), block("text", "3 layouts equal").splitlines()
    assert (printed[0], printed[-1], len(printed)) == (shown[0], shown[-1], len(shown))
