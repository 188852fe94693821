"""The learning rate over steps: values worked out by hand, and rules that hold for every schedule."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basestone.trainer.schedule import learning_rate
from basestone.trainer.sections import ScheduleSection

PEAK = 2.0
KINDS = ("cosine", "wsd", "linear", "constant")


def curve(steps: int, **section: object) -> list[float]:
    schedule = ScheduleSection(**section)
    return [learning_rate(step, steps, PEAK, schedule) for step in range(steps + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_linear_and_reaches_the_peak(kind):
    assert curve(100, kind=kind, warmup_steps=4)[:4] == [0.5, 1.0, 1.5, 2.0]
    assert curve(100, kind=kind, warmup_steps=4)[4] == pytest.approx(PEAK)


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_has_the_peak(kind):
    assert curve(10, kind=kind)[0] == pytest.approx(PEAK)


def test_cosine_by_hand():
    got = curve(12, kind="cosine", warmup_steps=4, final_ratio=0.1)
    # after warm-up: quarters of half a cosine between 2.0 and 0.2
    assert got[4] == pytest.approx(2.0)
    assert got[6] == pytest.approx(0.2 + 1.8 * (1 + 2**-0.5) / 2)
    assert got[8] == pytest.approx(1.1)
    assert got[10] == pytest.approx(0.2 + 1.8 * (1 - 2**-0.5) / 2)
    assert got[12] == pytest.approx(0.2)


def test_linear_by_hand():
    got = curve(12, kind="linear", warmup_steps=2, final_ratio=0.0)
    assert got[2:] == pytest.approx([2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_wsd_is_flat_and_then_linear():
    got = curve(20, kind="wsd", decay_steps=4, final_ratio=0.5)
    assert got[:17] == [PEAK] * 17
    assert got[16:] == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])


def test_wsd_decays_over_a_fifth_by_default():
    assert curve(20, kind="wsd") == curve(20, kind="wsd", decay_steps=4)
    assert curve(3, kind="wsd", final_ratio=0.0) == pytest.approx([2.0, 2.0, 2.0, 0.0])


def test_constant_stays():
    assert curve(10, kind="constant", warmup_steps=2) == [1.0, *[PEAK] * 10]


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    ratio=st.floats(0, 1),
    decay=st.none() | st.integers(1, 400),
)
def test_every_schedule_stays_between_zero_and_the_peak_and_falls_after_warm_up(
    kind, steps, warmup, ratio, decay
):
    got = curve(steps, kind=kind, warmup_steps=warmup, final_ratio=ratio, decay_steps=decay)
    assert all(0 <= rate <= PEAK * (1 + 1e-12) for rate in got)
    after = got[warmup:]
    assert all(late <= early * (1 + 1e-12) for early, late in pairwise(after))
    if kind != "constant" and warmup < steps:
        assert got[steps] == pytest.approx(PEAK * ratio)
