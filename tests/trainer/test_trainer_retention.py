"""Which checkpoints stay: a pure function of step numbers, held-out losses and keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basestone.trainer.checkpoint.retention import StepFacts, heldout_loss, kept, policies
from basestone.trainer.sections import CheckpointSection

LOSSES = st.none() | st.floats(0, 20) | st.sampled_from([math.nan, math.inf])
STEPS = st.dictionaries(st.integers(0, 500), LOSSES, min_size=1, max_size=30)
SECTIONS = st.builds(
    CheckpointSection,
    keep_last=st.integers(1, 5),
    keep_every_steps=st.integers(0, 50),
    keep_best=st.integers(0, 4),
    rollback_steps=st.integers(0, 200),
)


def facts_of(steps: dict[int, float | None]) -> list[StepFacts]:
    return [StepFacts(step, loss) for step, loss in steps.items()]


def section(**keys: Any) -> CheckpointSection:
    return CheckpointSection(**keys)


def named(*steps: int) -> list[StepFacts]:
    return [StepFacts(step, None) for step in steps]


def test_each_key_keeps_what_it_says():
    losses = [9.0, 8.0, 3.0, 7.0, 6.0, 2.0, 5.0, 4.0, 9.0, 9.0]
    steps = [StepFacts(10 * number, loss) for number, loss in enumerate(losses, 1)]
    keys = section(keep_last=2, keep_every_steps=40, keep_best=2, rollback_steps=30)
    assert policies(steps, keys, 100) == {
        100: ["keep_last"],
        90: ["keep_last"],
        80: ["keep_every_steps", "rollback_steps"],
        70: ["rollback_steps"],
        60: ["keep_best"],
        40: ["keep_every_steps"],
        30: ["keep_best"],
    }
    assert kept(steps, keys, 100) == {30, 40, 60, 70, 80, 90, 100}
    assert kept(steps, section(keep_last=1), 100) == {100}


def test_later_steps_are_of_a_line_that_was_left():
    assert kept(named(2, 4, 6, 8), section(keep_last=2, keep_every_steps=8), 4) == {2, 4}


def test_of_equal_losses_the_newer_stays():
    steps = [StepFacts(2, 1.0), StepFacts(4, 1.0), StepFacts(6, 2.0)]
    assert kept(steps, section(keep_last=1, keep_best=1), 6) == {4, 6}


def test_a_loss_that_is_no_number_is_never_best():
    steps = [StepFacts(2, math.nan), StepFacts(4, math.inf), StepFacts(6, 5.0), StepFacts(8, None)]
    assert kept(steps, section(keep_last=1, keep_best=4), 8) == {6, 8}


@given(STEPS, SECTIONS)
def test_the_newest_and_the_last_always_stay(steps, keys):
    newest = max(steps)
    staying = kept(facts_of(steps), keys, newest)
    assert newest in staying and staying <= set(steps)
    assert set(sorted(steps)[-keys.keep_last :]) <= staying
    assert set(policies(facts_of(steps), keys, newest)) == staying
    assert len(staying) <= keys.keep_last + keys.keep_best + 2 + (
        sum(step % keys.keep_every_steps == 0 for step in steps) if keys.keep_every_steps else 0
    )


@given(STEPS, SECTIONS)
def test_what_stays_stays_when_asked_again(steps, keys):
    newest = max(steps)
    staying = kept(facts_of(steps), keys, newest)
    left = {step: loss for step, loss in steps.items() if step in staying}
    assert kept(facts_of(left), keys, newest) == staying


@given(STEPS, SECTIONS, st.randoms())
def test_the_order_of_the_listing_does_not_matter(steps, keys, random):
    facts = facts_of(steps)
    shuffled = random.sample(facts, len(facts))
    assert kept(shuffled, keys, max(steps)) == kept(facts, keys, max(steps))


@given(STEPS, SECTIONS)
def test_the_best_and_every_nth_stay(steps, keys):
    staying = kept(facts_of(steps), keys, max(steps))
    if keys.keep_every_steps:
        assert {step for step in steps if step % keys.keep_every_steps == 0} <= staying
    finite = sorted(loss for loss in steps.values() if loss is not None and math.isfinite(loss))
    mine = sorted(steps[step] for step in staying if steps[step] is not None and math.isfinite(steps[step]))
    assert mine[: keys.keep_best] == finite[: keys.keep_best]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=120),
    st.integers(1, 3),
    st.integers(1, 300),
    st.integers(0, 2),
)
def test_over_a_whole_run_there_is_always_one_to_roll_back_to(gaps, keep_last, margin, keep_best):
    """Pruned after every save: not only is one kept that is far enough behind, it also moves on."""
    keys = section(keep_last=keep_last, rollback_steps=margin, keep_best=keep_best)
    there: list[int] = []
    first = now = 0
    for gap in gaps:
        now += gap
        first = first or now
        there = sorted(kept(named(*there, now), keys, now))
        behind = [step for step in there if step <= now - margin]
        if now - margin >= first:
            assert behind and now - behind[-1] <= 2 * (margin + max(gaps))
        assert len(there) <= keep_last + 2


@pytest.mark.parametrize(
    ("state", "loss"),
    [
        ({"heldout": {"a": 2.0, "b": 4.0}}, 3.0),
        ({"heldout": {"a": 2}}, None),
        ({}, None),
        ({"heldout": {}}, None),
        ({"heldout": None}, None),
        ({"heldout": {"a": "2"}}, None),
        ({"heldout": {"a": True}}, None),
        ({"heldout": {"a": None}}, None),
        ({"heldout": {"a": math.nan}}, None),
        ({"heldout": {"a": 2.0, "b": math.inf}}, None),
        ({"heldout": {"a": 1e308, "b": 1e308}}, None),
        ({"heldout": {"a": 10**400}}, None),
        ({"heldout": [2.0]}, None),
    ],
)
def test_the_held_out_loss_of_a_state(state, loss):
    assert heldout_loss(state) == loss
