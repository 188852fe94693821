"""One run goes on through layouts drawn at random: every change loads what another layout saved."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
from legal_layouts import laid_out
from small import (
    VOCAB,
    curve_of,
    make_engine,
    relative_difference,
    restore,
    run_config,
    saver_of,
    train,
)

from basestone.trainer.checkpoint.tensors import CheckpointTensors
from basestone.trainer.config import RunConfig
from basestone.trainer.forks import run_ranks
from basestone.trainer.layouts import ZERO_STAGES

pytestmark = pytest.mark.dist
STEPS_EACH, TOLERANCE = 2, 1e-5
Curve = list[tuple[float, float]]


def drawn(run: RunConfig, number: int, seed: int) -> list[tuple[int, RunConfig]]:
    """Draw layouts, none twice as long as there are others."""
    every = list(laid_out(run, VOCAB))
    chance, found = random.Random(seed), []
    while len(found) < number:
        found += chance.sample(every, min(len(every), number - len(found)))
    return found


def _attempt(
    run: RunConfig, folder: str, begun: int, asynchronous: bool, forget: str | None
) -> tuple[Curve, Curve]:
    """Go on from the newest checkpoint and save; give the steps before the save, and one beside it."""
    engine = make_engine(run)
    if forget is not None:
        _forget(forget)
    state = restore(engine, folder)
    assert (state["step"] if state else 0) == begun and engine.state.steps == begun
    saver, end = saver_of(engine, folder, asynchronous=asynchronous), begun + STEPS_EACH
    before = train(engine, run, range(begun, end))
    outcome = saver.begin(end, {"step": end, "optimizer_steps": engine.state.steps}, wait=not asynchronous)
    beside: Curve = []
    if asynchronous:
        assert outcome is None and saver.in_flight is not None
        beside = train(engine, run, range(end, end + 1), before_update=saver.wait_copied)
        assert saver.in_flight is not None, "no rank met the others to commit it"
        outcome = saver.finish()
    assert outcome is not None and outcome.problem is None, outcome
    engine.close()
    return before, beside


def _forget(name: str) -> None:
    """Do not load the first moment of one parameter."""
    real = CheckpointTensors.fill

    def fill(self: CheckpointTensors, key: str, parameter: str, *more: Any) -> None:
        if (key, parameter) != ("exp_avg", name):
            real(self, key, parameter, *more)

    CheckpointTensors.fill = fill  # type: ignore[method-assign]


@functools.cache
def reference(family: str, steps: int) -> Curve:
    """Give the curve of one process that is never interrupted."""
    return run_ranks(curve_of, 1, run_config(family, parallel__zero=0), steps)[0]


def chain(folder: Path, family: str, changes: int, seed: int, forget: dict[int, str] | None = None) -> float:
    """Train through `changes` changes of the layout; give the largest difference of a loss or norm."""
    worst, begun = 0.0, 0
    expected = reference(family, (changes + 1) * STEPS_EACH + 1)
    for number, (size, run) in enumerate(drawn(run_config(family), changes + 1, seed)):
        name = (forget or {}).get(number)
        answers = run_ranks(_attempt, size, run, str(folder), begun, number % 2 == 0, name)
        before, beside = answers[0]
        assert all(answer == answers[0] for answer in answers), run.parallel
        found = before + beside
        difference = relative_difference(found, expected[begun : begun + len(found)])
        print(
            f"steps {begun}..{begun + len(found)}: {difference:.1e} on {size}: {run.parallel}"
        )  # where a test fails
        worst, begun = max(worst, difference), begun + STEPS_EACH
    return worst


@pytest.mark.parametrize(("family", "seed"), [("llama", 1), pytest.param("gpt2", 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_through_five_random_layouts(tmp_path, family, seed):
    assert chain(tmp_path, family, 5, seed) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "seed"), [("llama", 3), ("gpt2", 4), ("llama", 5), ("qwen3", 6), ("qwen2", 7)]
)
def test_a_run_goes_on_through_twenty_random_layouts(tmp_path, family, seed):
    assert chain(tmp_path, family, 20, seed) < TOLERANCE


def test_a_moment_that_one_layout_does_not_load_is_seen(tmp_path):
    assert chain(tmp_path, "llama", 2, 1, {1: "norm.weight"}) > TOLERANCE


def test_every_kind_of_layout_is_drawn_from():
    """Nothing that the run file offers is left out by mistake."""
    kinds = [run.parallel for _, run in laid_out(run_config(), VOCAB)]
    for key, values in {
        "tensor": {1, 2, 4},
        "sequence": {False, True},
        "pipeline": {1, 2, 4},
        "virtual_pipeline": {1, 2},
        "zero": set(ZERO_STAGES),
        "offload": {"none", "cpu"},
    }.items():
        assert {getattr(kind, key) for kind in kinds} == values, key
