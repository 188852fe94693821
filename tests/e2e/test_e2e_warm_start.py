"""A new run that begins with the weights of another one: no optimizer state, step 0, any layout."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import losses_of
from step_files import reseal
from whole_run import train

from basestone.model.families import layout_of
from basestone.trainer.checkpoint.format import steps_in
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.checkpoint.tensors import CheckpointTensors
from basestone.trainer.errors import ConfigError
from basestone.trainer.load import validate_run

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("first") / "run"
    train(corpus, run_dir)
    return run_dir


def tensors_of(run_dir: Path) -> tuple[CheckpointTensors, dict]:
    (_, newest), *_ = steps_in(run_dir / "checkpoints")
    state = Reader(newest).state()
    return CheckpointTensors(Reader(newest), layout_of(validate_run(state["run"], "").model)), state


@pytest.mark.parametrize(
    ("layout", "size"),
    [(["parallel.tensor=1", "parallel.zero=3"], 2), (["parallel.tensor=1", "parallel.pipeline=2"], 2), ([], 2)],
    ids=["dp2-z3", "pp2", "tp2"],
)
def test_a_run_begins_with_the_weights_of_another(tmp_path, corpus, first, layout, size):
    """A step so small that fp32 hardly sees it: the masters are the first run's, and the moments are new."""
    run_dir = tmp_path / "run"
    words = [
        *layout,
        f"train.init_from={first}",
        "train.steps=1",
        "optimizer.lr=1e-30",
        "optimizer.weight_decay=0",
    ]
    train(corpus, run_dir, *words, size=size)
    (found, state), (wanted, _) = tensors_of(run_dir), tensors_of(first)
    for name in wanted.names():
        np.testing.assert_array_equal(found.read(name).numpy(), wanted.read(name).numpy())
    assert (state["step"], state["optimizer_steps"], state["tokens"]) == (1, 1, 8 * 64)
    assert state["data"]["position"] == 8
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events][:2] == ["start", "init"]
    assert events[1]["message"] == f"weights of {first / 'checkpoints' / 'step_00000008'}"


def test_sentence_embeddings_begin_with_the_trunk_of_a_language_model(tmp_path, corpus, first):
    """What predicts tokens is left out, and named; everything else is the first run's."""
    run_dir = tmp_path / "run"
    words = [
        "model.pooling=mean",
        "task.pairs=neighbours",
        f"train.init_from={first}",
        "train.steps=1",
        "optimizer.lr=1e-30",
        "optimizer.weight_decay=0",
    ]
    train(corpus, run_dir, *words)
    (found, _), (wanted, _) = tensors_of(run_dir), tensors_of(first)
    assert {*wanted.names()} - {*found.names()} == {"head.weight"}
    for name in found.names():
        np.testing.assert_array_equal(found.read(name).numpy(), wanted.read(name).numpy())
    (message,) = (
        event["message"]
        for event in map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
        if event["event"] == "init"
    )
    assert message.endswith("step_00000008, without head.weight")


def test_another_models_section_that_does_not_hold_names_the_key(tmp_path, corpus, first):
    """Only `[model]` of the other run is looked at."""
    copy = tmp_path / "first"
    shutil.copytree(first, copy)
    for path in copy.glob("checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        state["run"]["model"]["hidden_size"] = -1
        state["run"]["data"] = {"renamed": 1}
        path.write_text(json.dumps(state))
        reseal(path.parent)
    with pytest.raises(ConfigError, match=r"(?s)^train\.init_from: .*hidden_size: Input should be greater"):
        train(
            corpus, tmp_path / "run", "model.pooling=mean", "task.pairs=neighbours", f"train.init_from={copy}"
        )


def test_a_resume_does_not_begin_again(tmp_path, corpus, first):
    run_dir, step = tmp_path / "run", first / "checkpoints" / "step_00000006"
    train(corpus, run_dir, f"train.init_from={step}", "train.steps=2")
    train(corpus, run_dir, f"train.init_from={step}", "train.steps=4")
    train(corpus, tmp_path / "whole", f"train.init_from={step}", "train.steps=4")
    assert losses_of(run_dir) == losses_of(tmp_path / "whole")
    assert losses_of(run_dir)[0] < losses_of(first)[0] - 0.2
    events = [json.loads(line)["event"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert events.count("init") == 1 and all(map(math.isfinite, losses_of(run_dir)))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train.init_from=/nowhere"], r"train\.init_from = /nowhere: there is no such directory"),
        (["train.init_from={empty}"], r"train\.init_from = .*holds no checkpoint; leave train\.init_from out"),
        (
            ["train.init_from={first}", "model.tied=true"],
            r"train\.init_from: .*another model .*: head\.weight is not in",
        ),
        (
            ["train.init_from={first}", "model.pooling=mean", "task.pairs=neighbours", "model.num_layers=1"],
            r"train\.init_from: .*another model .*: layers\.1\.",
        ),
        (["train.init_from={first}", "model.ffn_hidden_size=128"], r"train\.init_from: .*another model.*mlp"),
    ],
)
def test_weights_that_cannot_be_taken_are_the_users(tmp_path, corpus, first, words, text):
    with pytest.raises(ConfigError, match=text):
        empty = tmp_path / "empty"
        (empty / "checkpoints").mkdir(parents=True)
        train(corpus, tmp_path / "run", *(word.format(first=first, empty=empty) for word in words))
