"""The training step: what it draws depends on its number alone."""

from __future__ import annotations

import pytest
from small import batch_of, make_engine, run_config

from basestone.trainer.batch import causal_fields, share
from basestone.trainer.forks import run_ranks
from basestone.trainer.step import TrainingStep

pytestmark = pytest.mark.dist


class SameBatch:
    """A feed that always gives the same batch."""

    def __init__(self, runtime):
        self.runtime = runtime

    def read(self, step):
        tokens, weights = batch_of(0)
        widths = {"tokens": tokens.shape[1], "marks": weights.shape[1]}
        fields = share({"tokens": tokens, "marks": weights}, widths, len(tokens), self.runtime)
        return causal_fields(**fields)

    def take_counts(self):
        return [0.0]


def _losses_of_steps(run, steps):
    engine = make_engine(run)
    resolved = run.resolve(engine.runtime.world_size, 200)
    step = TrainingStep(engine, resolved, engine.runtime, SameBatch(engine.runtime))
    return [step.run(number).loss for number in steps]


def test_dropout_depends_on_the_step_and_not_on_what_came_before():
    """A rate of 1e-30 moves no weight, so losses on one batch differ by dropout alone."""
    run = run_config(model__dropout=0.1, optimizer__lr=1e-30, parallel__tensor=2, train__steps=100)
    one, two, again, other = run_ranks(_losses_of_steps, 2, run, (3, 4, 3, 5))[0]
    assert one == again
    assert len({one, two, other}) == 3
    assert run_ranks(_losses_of_steps, 2, run, (4,))[0] == [two]
