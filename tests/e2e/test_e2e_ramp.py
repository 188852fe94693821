"""A run whose batch grows: interrupted anywhere, in whatever layout it goes on."""

from __future__ import annotations

import json
import os
import signal

import pytest
from commands import losses_of, start, steps_of, wait_for_step

pytestmark = pytest.mark.dist
STEPS = 14
RAMP = "[{global_batch = 2, until_step = 3}, {global_batch = 4, until_tokens = 1400}]"
# 3 steps of 2 sequences of 64, then 4 of 4 (1408 tokens): the run's own batch of 8 begins with step 7.
BATCHES = [2] * 3 + [4] * 4 + [8] * 7


def words(*changes: str) -> list[str]:
    return [
        word
        for change in (f"train.ramp={RAMP}", f"train.steps={STEPS}", *changes)
        for word in ("--set", change)
    ]


@pytest.mark.faults
def test_killed_in_the_second_phase_another_layout_goes_on(tmp_path, corpus, forked):
    alone = ("run.processes=1", "parallel.tensor=1", "parallel.zero=0")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = forked("train", corpus / "run.toml", "--run-dir", whole, *words(*alone))
    assert done.returncode == 0, done.stderr
    steps = steps_of(whole)
    assert [steps[step]["global_batch"] for step in sorted(steps)] == BATCHES
    assert steps[STEPS]["tokens"] == 64 * sum(BATCHES)

    changes = words("checkpoint.every_steps=2", "evaluate.every_steps=0")
    process = start("train", corpus / "run.toml", "--run-dir", killed, *changes)
    wait_for_step(process, killed, 5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = max(steps_of(killed))
    assert before < STEPS, "it was to be killed before its end"
    other = [
        "parallel.tensor=1",
        "parallel.pipeline=2",
        "parallel.zero=2",
        "data.workers=0",
        "train.micro_batch=1",
    ]
    done = forked("train", corpus / "run.toml", "--run-dir", killed, *words(*other))
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stderr
    steps = steps_of(killed)
    assert [steps[step]["global_batch"] for step in sorted(steps)] == BATCHES
    assert losses_of(killed) == pytest.approx(losses_of(whole), rel=1e-5)
    ledger = json.loads((killed / "ledger.json").read_text())
    assert ledger["attempts"] == 2 and ledger["tokens"] - ledger["wasted_tokens"] == 64 * sum(BATCHES)
