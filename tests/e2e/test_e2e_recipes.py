"""docs/recipes.md as it stands: what is trained ends better than chance and than an untrained model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import command, environment

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
UNTRAINED = ("train.steps=1", "optimizer.lr=1e-9")


def last_evaluation(run_dir: Path) -> dict[str, Any]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"][-1]


def run(words: list[str], cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_code_is_found_by_its_docstring_after_a_minute(forked, tmp_path):
    found = {}
    for name, changes in (("trained", ("train.steps=60", "train.global_batch=32")), ("untrained", UNTRAINED)):
        settings = [word for change in changes for word in ("--set", change)]
        done = forked("train", ROOT / "recipes/code-search-cpu.toml", "--run-dir", tmp_path / name, *settings)
        assert done.returncode == 0, done.stderr
        found[name] = last_evaluation(tmp_path / name)
    assert (
        found["trained"]["contrastive_recall_at_10"] > 0.3 > 2 * found["untrained"]["contrastive_recall_at_10"]
    )
    assert found["trained"]["loss"] < found["untrained"]["loss"] - 0.5


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the recipes, in which the page's programs and commands ran."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.S | re.M)
    for language, text in blocks:
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", text)
            assert name
            (folder / name[1]).write_text(text)
            continue
        for line in text.splitlines():
            program, *words = shlex.split(line)
            run(command(*words) if program == "basestone" else [sys.executable, *words], folder)
    return folder


@pytest.mark.slow
def test_bert_finds_hidden_tokens_and_tells_pairs(place):
    trained = last_evaluation(place / "runs/bert-cpu")
    untrained = last_evaluation(place / "runs/untrained")
    assert trained["masked_accuracy"] > 0.15 > 0.06 > untrained["masked_accuracy"]
    assert trained["next_sentence_accuracy"] > 0.62 > untrained["next_sentence_accuracy"]


@pytest.mark.slow
def test_t5_finds_more_than_frequencies_and_sentinels_give(place):
    trained = last_evaluation(place / "runs/t5-cpu")
    untrained = last_evaluation(place / "runs/untrained-t5")
    said = run([sys.executable, "chance.py", "recipes/t5-cpu.toml"], place)
    found = re.search(r"token is ([\d.]+) of .* the end ([\d.]+); .* alone is ([\d.]+)$", said)
    assert found
    commonest, marks, loss = map(float, found.groups())
    assert trained["spans_accuracy"] > commonest + marks + 0.03 and untrained["spans_accuracy"] < 0.01
    assert trained["loss"] < loss - 0.8 < untrained["loss"] - 3


@pytest.mark.slow
def test_a_pre_trained_classifier_is_better_than_one_from_scratch(place):
    tuned, scratch = (
        json.loads((place / name / "metrics.json").read_text())["heldout"]
        for name in ("classifier", "from-scratch")
    )
    assert tuned["accuracy"] > scratch["accuracy"] + 0.02 and tuned["macro"]["f1"] > scratch["macro"]["f1"]


@pytest.mark.slow
def test_code_search_finds_most_of_what_was_held_out(place):
    pairs = json.loads(run(command("similarity", "search", "pairs.jsonl", "--json"), place))
    scored = json.loads(run(command("similarity", "search", "scored.jsonl", "--json"), place))
    assert pairs["recall_at_1"] > 0.25 and pairs["recall_at_10"] > 0.5 and scored["spearman"] > 0.4
