"""docs/adding-a-family.md, done to a copy of the checkout: what it writes trains, equal in layouts, and exports."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import environment, losses_of

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
FOLDERS = ("basestone", "data", "launch", "model", "trainer", "ds_configs")
LOSS_OF_A_COIN = 0.43  # nats, of one who knows that 15 % are replaced, and no more


class Block(NamedTuple):
    """A block of the page that is a file, or changes one."""

    language: str
    name: str
    text: str


BLOCKS = [Block(*found) for found in re.findall(r"^```(\w+)\n# (\S+)\n(.*?)^```", PAGE, re.S | re.M)]
COMMANDS = [
    shlex.split(line)
    for text in re.findall(r"^```sh\n(.*?)^```", PAGE, re.S | re.M)
    for line in text.splitlines()
]


def changed(text: str, block: Block) -> str:
    """Put what a block adds in the one place that it shows."""
    lines = block.text.splitlines(keepends=True)
    assert {line[0] for line in lines} <= {" ", "-", "+"} and any(line[0] == "+" for line in lines)
    old, new = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
    assert text.count(old) == 1, f"{block.name} has this {text.count(old)} times:\n{old}"
    return text.replace(old, new)


def follow(folder: Path, shown: str = "", mistake: str = "") -> None:
    """Copy the package, and do what the page says, or a mistake; what is no part of the package lies beside it."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "model" / "electra").mkdir()
    (folder / "model" / "electra" / "__init__.py").touch()
    for block in BLOCKS:
        path = folder / block.name
        if block.language == "diff":
            path.write_text(changed(path.read_text(), block))
        else:
            assert not path.exists(), f"{block.name} is there already"
            path.write_text(block.text.replace(shown, mistake) if shown else block.text)


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment() | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    follow(folder)
    return folder


def test_the_page_names_every_file_once():
    listed = set(re.findall(r"`((?:model|data)/\S+?\.py)`", PAGE.partition("Blocks below")[0]))
    assert listed == {block.name for block in BLOCKS if "/" in block.name} | {"model/electra/__init__.py"}
    added = [line for block in BLOCKS if block.language == "diff" for line in block.text.splitlines()]
    assert sum(line.startswith("+") for line in added) < 20
    assert sum(block.text.count("\n") for block in BLOCKS if block.language == "python") < 200


def test_what_the_page_writes_trains_and_exports(checkout):
    done = {}
    for words in COMMANDS:
        assert words[0] == "basestone"
        done[words[1]] = run(checkout, "-m", "basestone.launch", *words[1:])
        assert done[words[1]].returncode == 0, f"{words}\n{done[words[1]].stdout}\n{done[words[1]].stderr}"
    assert "3 layouts equal one process" in done["verify"].stdout
    losses = losses_of(checkout / "runs" / "electra")
    assert len(losses) == 8 and losses[-1] < losses[0]
    lines = map(json.loads, (checkout / "runs" / "electra" / "metrics.jsonl").read_text().splitlines())
    (figures,) = (line for line in lines if line["kind"] == "eval")
    assert 0.5 * LOSS_OF_A_COIN < figures["loss"] < losses[0] and 0.8 < figures["replaced_accuracy"] <= 1
    for name in ("export", "import"):
        error = re.search(r"logits equal .* within (\S+) \(relative\)", done[name].stdout)
        assert error and float(error[1]) < 1e-5, done[name].stdout
    looked = run(checkout, "look.py")
    assert looked.returncode == 0 and "tensor([[0." in looked.stdout, looked.stderr


TASK = """
import numpy as np
from basestone.data.tasks.replaced import EncoderReplacing
from basestone.data.tasks.sample_random import SampleRandom
from basestone.data.tasks.sentences import EncoderSpecials

special = np.arange(1000) < 5
inputs = EncoderReplacing(64, EncoderSpecials(1, 2, 0), 7, special)
shares = []
for sample in range(200):
    framed = np.concatenate([[1], np.random.default_rng(sample).integers(5, 1000, 100), [2]])
    found = inputs.changed(framed, SampleRandom(7, sample))
    assert (found.labels == (found.tokens != framed)).all() and found.weights.all()
    assert set(found.tokens) <= set(framed) and found.tokens[0] == 1 and found.tokens[-1] == 2
    shares.append(found.labels[1:-1].mean())
assert abs(np.mean(shares) - 0.15 * 0.99) < 0.005, np.mean(shares)
nothing = inputs.changed(np.array([1, 2]), SampleRandom(7, 0))
assert nothing.tokens.tolist() == [1, 2] and not nothing.labels.any()
"""


def test_the_task_replaces_what_its_labels_say(checkout):
    done = run(checkout, "-c", TASK)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shown", "mistake", "command", "seen"),
    [
        (
            "self.config.activation_func(self.transform(x_bsh))",
            "self.transform(x_bsh)",
            "export",
            "depart at the logits",
        ),
        ('"embedding_size": config.hidden_size', '"embedding_size": 32', "export", "transformers"),
        (
            "self.replaced(self",
            "(1 + self.config.sequence_parallel) * self.replaced(self",
            "verify",
            "differ from one process",
        ),
    ],
)
def test_a_mistake_in_the_page_is_seen(shown, mistake, command, seen, tmp_path):
    assert sum(block.text.count(shown) for block in BLOCKS) == 1
    follow(tmp_path, shown, mistake)
    last = None
    for words in COMMANDS:
        if words[1] == command or (words[1] == "train" and command == "export"):
            last = run(tmp_path, "-m", "basestone.launch", *words[1:])
    assert last is not None and last.returncode and seen in last.stderr, last
