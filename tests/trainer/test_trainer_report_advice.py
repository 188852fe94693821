"""What must be warned of, and what must not, on curves made by a formula with noise of a fixed seed."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import made_run

from basestone.trainer.report.advice import (
    advise,
    data_wait,
    doubtful_energy,
    low_goodput,
    overfitting,
    partial_energy,
    spikes,
    stall,
    unknown_mfu,
    unread_files,
)
from basestone.trainer.report.records import RunRecords, read_records
from basestone.trainer.report.summary import summarise

SEEDS = range(8)


def power_law(num_lines, noise, seed, *, floor=2.0, every=1):
    draw = random.Random(seed)
    return [
        (float(i * every), floor + 7 * (i + 1) ** -0.3 + draw.gauss(0, noise)) for i in range(1, num_lines + 1)
    ]


def constant_rate(curve):
    return [(step, 6e-4) for step, _ in curve]


def held_out(losses, every=50):
    return {"web": [(float(every * i), loss) for i, loss in enumerate(losses, 1)]}


# ---- overfitting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_overfitting_is_found_at_its_best_step(seed):
    train = power_law(1000, 0.05, seed)
    losses = [3.5 - 0.05 * i if i < 10 else 3.05 + 0.03 * (i - 10) for i in range(20)]
    (found,) = overfitting(train, held_out(losses))
    assert found.serious and found.title == "Overfitting: the loss held out in web rises"
    assert found.evidence.startswith("Best at step 500 with 3.0500, 3.3200 at step 1,000 (+8.9%)")
    assert "nearest to step 500" in found.action


@pytest.mark.parametrize("seed", SEEDS)
def test_a_held_out_loss_that_falls_or_wavers_is_not_overfitting(seed):
    draw = random.Random(seed)
    train = power_law(1000, 0.05, seed)
    falling = [2.2 + 7 * (50 * i) ** -0.3 + draw.gauss(0, 0.004) for i in range(1, 21)]
    wavering = [3.0 + draw.gauss(0, 0.003) for _ in range(20)]
    assert overfitting(train, held_out(falling)) == []
    assert overfitting(train, held_out(wavering)) == []


def test_one_bad_evaluation_is_not_overfitting():
    train = power_law(1000, 0.05, 1)
    for losses in ([3.0, 2.9, 2.8, 3.4], [3.0, 2.8, 3.4, 2.81], [3.0], []):
        assert overfitting(train, held_out(losses, 250)) == []


def test_a_loss_that_rises_everywhere_is_no_overfitting():
    train = [(float(i), 3.0 + i / 500) for i in range(1, 1001)]
    assert overfitting(train, held_out([3.0 + i / 10 for i in range(20)])) == []


def test_only_the_set_that_rises_is_named():
    falling, rising = (
        held_out([4 - i / 10 for i in range(20)]),
        held_out([3 + abs(i - 8) / 10 for i in range(20)]),
    )
    found = overfitting(power_law(1000, 0.05, 3), {"books": falling["web"], "code": rising["web"]})
    assert [one.title for one in found] == ["Overfitting: the loss held out in code rises"]


# ---- stall --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("num_lines", "noise"), [(600, 0.02), (3000, 0.05), (20_000, 0.1)])
def test_a_loss_that_stands_still_is_a_stall(seed, num_lines, noise):
    draw = random.Random(seed)
    train = [
        (float(i), 2.5 + 5 * math.exp(-i / (num_lines / 20)) + draw.gauss(0, noise)) for i in range(num_lines)
    ]
    (found,) = stall(train, constant_rate(train), {})
    assert found.title == "The training loss stands still" and "at a learning rate of 0.0006" in found.evidence


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("num_lines", "noise"), [(60, 0.05), (300, 0.1), (3000, 0.1), (20_000, 0.1)])
def test_a_loss_that_falls_slowly_is_no_stall(seed, num_lines, noise):
    train = power_law(num_lines, noise, seed)
    assert stall(train, constant_rate(train), {}) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loss_may_settle_at_the_end_of_a_schedule(seed):
    draw = random.Random(seed)
    train = [(float(i), 2.5 + draw.gauss(0, 0.02)) for i in range(600)]
    rate = [(float(i), 6e-4 * max(0.0, 1 - i / 390)) for i in range(600)]
    assert stall(train, rate, {}) == []
    assert len(stall(train, constant_rate(train), {})) == 1


def test_few_lines_and_much_noise_prove_no_stall():
    draw = random.Random(5)
    assert stall([(float(i), 2.0) for i in range(20)], [], {}) == []
    assert stall([(float(i), 3.0 + draw.gauss(0, 0.5)) for i in range(60)], [], {}) == []


def test_a_loss_that_rises_is_said_to_rise():
    train = [(float(i), 2.0 + i / 1000) for i in range(1000)]
    assert stall(train, constant_rate(train), {})[0].title == "The training loss rises"


def test_a_rise_within_the_noise_proves_no_stall():
    """16 lines with noise of 3 %: that they rose by 2 % is neither a stall nor a rise."""
    train = [(float(i), 4.75 + (-1) ** i * 0.13 + (0.11 if i >= 40 else 0.0)) for i in range(48)]
    assert stall(train, constant_rate(train), {}) == []
    steady = [(step, 4.75 + (loss - 4.75) / 20) for step, loss in train]
    assert len(stall(steady, constant_rate(steady), {})) == 1


def test_a_held_out_loss_that_falls_on_shows_progress():
    draw = random.Random(7)
    train = [(float(i), 2.5 + draw.gauss(0, 0.02)) for i in range(1, 1001)]
    falling, flat = held_out([3 - i / 50 for i in range(20)]), held_out([3.0] * 20)
    assert stall(train, constant_rate(train), falling) == []
    assert len(stall(train, constant_rate(train), flat)) == 1


# ---- spikes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_spikes_are_counted_and_the_largest_is_named(seed):
    train = power_law(2000, 0.05, seed)
    for first, height, length in ((400, 1.5, 1), (900, 3.0, 4), (1500, 2.0, 1)):
        for i in range(first, first + length):
            train[i] = (train[i][0], train[i][1] + height)
    (found,) = spikes(train)
    assert found.title == "The training loss spiked 3 time(s)"
    step = float(found.evidence.split("step ")[1].split(":")[0].replace(",", ""))
    assert step in range(901, 905)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("num_lines", "noise"), [(200, 0.02), (2000, 0.1), (20_000, 0.05)])
def test_a_noisy_curve_has_no_spikes(seed, num_lines, noise):
    assert spikes(power_law(num_lines, noise, seed)) == []


def test_a_loss_that_is_not_finite_is_said():
    (found,) = spikes(power_law(100, 0.05, 1), 2)
    assert found.title == "The training loss was not finite" and "2 line(s)" in found.evidence


@given(st.lists(st.floats(-1e100, 1e100), max_size=80))
def test_no_curve_breaks_a_rule(losses):
    curve = [(float(i), loss) for i, loss in enumerate(losses)]
    for found in (*overfitting(curve, {"x": curve}), *stall(curve, curve, {}), *spikes(curve)):
        assert found.title and found.evidence and found.action


# ---- time, energy, files ------------------------------------------------------------------------------------


def timed(data_s, *, num_lines=50):
    return [
        {"step": i, "step_s": 1.0, "phase_s": {"data": data_s, "forward": 0.9 - data_s, "evaluate": 5.0}}
        for i in range(1, num_lines + 1)
    ]


def test_waiting_for_data_is_a_share_of_the_steps():
    (found,) = data_wait(timed(0.25))
    assert found.title == "Steps wait for data 25% of their time"
    assert found.evidence == "0m 12s of 0m 49s in steps 2 to 50."
    assert data_wait(timed(0.09)) == []


def test_the_first_line_may_wait_for_the_readers():
    assert data_wait([{"step": 1, "step_s": 60.0, "phase_s": {"data": 59.0}}, *timed(0.01)[1:]]) == []
    assert data_wait([]) == data_wait([{"step": 1}, {"step": 2, "phase_s": None}]) == []


def records_of(steps=(), ledger=None, config=""):
    return RunRecords("run", list(steps), {}, [], ledger or {}, config)


def goodput_of(ledger, steps=()):
    return low_goodput(summarise(records_of(steps, ledger)), steps)


def test_goodput_below_80_percent_says_where_the_time_went():
    ledger = {"wall_s": 1000.0, "train_s": 800.0, "wasted_s": 100.0}
    (found,) = goodput_of(ledger, timed(0.1, num_lines=10))
    assert found.title == "Goodput is 70%"
    assert found.evidence.endswith(
        "Of 16m 40s: 10% lost work, 5% evaluations, 0% saves, 15% starts and the rest."
    )
    for fine in ({**ledger, "wasted_s": 0.0}, {**ledger, "wall_s": 0.0}, {}):
        assert goodput_of(fine) == []


@pytest.mark.parametrize(
    ("lost_s", "evaluate_s", "save_s", "action"),
    [
        (300.0, 10.0, 10.0, "Save more often"),
        (0.0, 30.0, 3.0, "Evaluate less often"),
        (0.0, 3.0, 30.0, "Save less often"),
        (0.0, 1.0, 1.0, "Starts cost most"),
    ],
)
def test_the_advice_on_goodput_fits_the_cause(lost_s, evaluate_s, save_s, action):
    phases_s = {"forward": 1.0, "evaluate": evaluate_s, "checkpoint": save_s}
    steps = [{"step": step, "step_s": 1.0, "phase_s": phases_s} for step in range(1, 11)]
    (found,) = goodput_of({"wall_s": 1000.0, "train_s": 600.0, "wasted_s": lost_s}, steps)
    assert found.action.startswith(action)


def test_a_short_run_may_be_mostly_its_start():
    assert goodput_of({"wall_s": 50.0, "train_s": 5.0, "wasted_s": 0.0}) == []
    assert goodput_of({"wall_s": 599.0, "train_s": 100.0, "wasted_s": 20.0}) == []
    assert goodput_of({"wall_s": 601.0, "train_s": 100.0, "wasted_s": 20.0})
    assert goodput_of({"wall_s": 200.0, "train_s": 190.0, "wasted_s": 120.0})[0].action.startswith("Save more")


def test_energy_that_leaves_hosts_out_is_partial():
    (found,) = partial_energy({"hosts": 1, "all_hosts": 2})
    assert found.title == "Energy is partial: 1 of 2 hosts metered"
    (found,) = partial_energy(
        {"joules": 400.0, "metered_tokens": 50, "tokens": 100, "hosts": 1, "all_hosts": 1}
    )
    assert found.title == "Energy is partial: 50% of the tokens were metered, some attempts read nothing"
    for whole in ({"hosts": 2, "all_hosts": 2}, {"hosts": 0, "all_hosts": 0}, {}):
        assert partial_energy(whole) == []


def test_energy_is_said_to_be_estimated_or_unknown():
    steps = [{"step": 1, "watts": 200.0, "step_s": 2.0}]
    for ledger, kind in (
        ({"joules": 400.0, "joules_source": "user-watts"}, ["estimated energy"]),
        ({"joules": None, "joules_source": "none"}, ["unknown energy"]),
        ({"joules": 400.0, "joules_source": "nvml-counter"}, []),
    ):
        found = doubtful_energy(summarise(records_of(steps, ledger)))
        assert [one.kind for one in found] == kind and not any(one.serious for one in found)
    assert doubtful_energy(summarise(records_of())) == []  # it has not begun


def test_an_unknown_mfu_and_unread_files_are_said():
    assert [one.kind for one in unknown_mfu([{"mfu": None}, {}])] == ["unknown MFU"]
    assert unknown_mfu([{"mfu": None}, {"mfu": 0.4}]) == unknown_mfu([]) == []
    assert unread_files(["ledger.json: is not there"])[0].evidence == "ledger.json: is not there."
    assert unread_files([]) == []


def test_all_findings_of_a_run_stand_on_its_page_the_serious_ones_first(tmp_path):
    run = made_run(tmp_path / "run", 1500)
    (run / "events.jsonl").write_text("{\n")
    found = advise(read_records(run))
    kinds = [one.kind for one in found]
    assert kinds == ["overfitting", "spikes", "goodput", "partial energy", "unread files"]
    assert [one.serious for one in found] == [True] * 4 + [False]
