"""Sequences that get longer in the course of a run: every family, over the border in any layout."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import losses_of, steps_of
from small_families import write_run
from whole_run import train

from basestone.trainer.load import load_run
from basestone.trainer.plan import token_flops

pytestmark = pytest.mark.dist
STEPS, BORDER, SHORT, LONG = 8, 4, 24, 48
RAMP = f"[{{sequence_length = {SHORT}, global_batch = 16, until_step = {BORDER}}}]"
CHANGES = (
    f"train.ramp={RAMP}",
    f"train.steps={STEPS}",
    "evaluate.every_steps=2",
    "optimizer.eps=1e-5",  # at 1e-8 gradients that are rounding noise make whole steps: decision 0004
    "meter.peak_tflops=1.0",
)
KINDS = ("llama", "bert", "t5", "bert-sentences")
LAYOUTS = {
    "serial": (1, ("parallel.zero=0",)),
    "tensor": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "pipeline": (2, ("parallel.pipeline=2", "parallel.zero=2")),
    "data": (2, ("parallel.zero=2", "train.micro_batch=4")),
    "shards": (2, ("parallel.zero=3",)),
}
# a layout, the steps that are saved in it, and the one that goes on
WAYS = [("shards", 5, "pipeline"), ("tensor", 3, "pipeline"), ("tensor", 5, "data"), ("pipeline", 4, "tensor")]
USUAL = {("bert", *way) for way in WAYS} | {("t5", *WAYS[1])}
CASES = [
    pytest.param(kind, *way, marks=[] if (kind, *way) in USUAL else pytest.mark.slow)
    for kind in KINDS
    for way in WAYS
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, corpus, symbols) -> Callable[[str], Path]:
    """Folders by kind, each with a run file and the run directory `serial` of one process."""

    @functools.cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        write_run(folder, kind, corpus, symbols)
        go(folder, "serial", "serial")
        return folder

    return make


def go(folder: Path, name: str, layout: str, *changes: str, resume: Path | None = None) -> Path:
    size, settings = LAYOUTS[layout]
    run_dir = folder / name
    changes = (*CHANGES, *settings, *changes)
    train(folder, run_dir, *changes, size=size, resume=resume)
    return run_dir


def lines_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize(("kind", "first", "stop", "then"), CASES)
def test_any_layout_goes_on_before_at_and_after_the_border(kind, first, stop, then, folder_of):
    """Evaluations between are at the run's own length, with the sequences still short."""
    folder, name = folder_of(kind), f"{first}-{stop}-{then}"
    serial = folder / "serial"
    go(folder, name, first, f"train.steps={stop}")
    run_dir = go(folder, name, then)
    assert losses_of(run_dir) == pytest.approx(losses_of(serial), rel=1e-5)
    steps = steps_of(run_dir)
    shapes = [(steps[step]["sequence_length"], steps[step]["global_batch"]) for step in sorted(steps)]
    assert shapes == [(SHORT, 16)] * BORDER + [(LONG, 8)] * (STEPS - BORDER)
    assert [steps[step]["tokens"] for step in sorted(steps)] == [
        steps_of(serial)[step]["tokens"] for step in sorted(steps)
    ]
    resolved = load_run(serial / "run.toml").resolve(1, 600)
    for line in steps_of(serial).values():
        flops = 1e12 * line["tflops_per_device"] / line["tokens_per_s"]
        assert flops == pytest.approx(token_flops(resolved, line["sequence_length"])), (
            "by the length of the step"
        )
    expected = {line["step"]: line["loss"] for line in lines_of(serial, "eval")}
    found = {line["step"]: line["loss"] for line in lines_of(run_dir, "eval")}
    assert {step: found[step] for step in expected} == pytest.approx(expected, rel=1e-5)
    told = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [(line["step"], line["message"]) for line in told if line["event"] == "length"] == [
        (BORDER, f"sequences of {LONG} tokens from here on")
    ]


def test_going_back_over_the_border(folder_of):
    folder = folder_of("bert")
    run_dir = go(folder, "back", "data", "train.steps=6")
    go(folder, "back", "tensor", resume=run_dir / "checkpoints" / "step_00000002")
    assert losses_of(run_dir) == pytest.approx(losses_of(folder / "serial"), rel=1e-5)
    steps = [line["step"] for line in lines_of(run_dir, "step")]
    assert steps == [*range(1, 7), *range(3, STEPS + 1)]
    told = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told if line["event"] == "length"] == [BORDER, BORDER]
