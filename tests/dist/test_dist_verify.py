"""`verify` finds layouts equal that are, and gives a verdict on those whose ranks fail."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import pytest
from faults import kill_self
from proofs import GROUPS, assert_equal, named

from basestone.trainer import verify
from basestone.trainer.errors import NumericsError
from basestone.trainer.forks import run_ranks
from basestone.trainer.layouts import all_layouts, parse_layout
from basestone.trainer.load import load_run
from basestone.trainer.places import locate
from basestone.trainer.verify import TOLERANCES, Verification

pytestmark = pytest.mark.dist


# ---- layouts as they are ------------------------------------------------------------------------------------------

EQUAL = [
    ("llama", 2, "tp2-sp-z1"),
    ("llama", 2, "z3"),
    ("llama", 2, "pp2-z0"),
    ("llama", 2, "pp2-vp2-z2"),
    ("llama", 4, "tp2-sp-pp2-z3"),
    ("llama", 4, "pp2-vp2-dp2-z1"),
    ("gpt2", 2, "tp2-z2"),
    ("gpt2", 2, "pp2-z1"),
    ("qwen2", 2, "tp2-sp-z3"),
    ("qwen2", 4, "tp2-pp2-z2"),
    ("qwen3", 2, "tp2-z0"),
    ("qwen3", 2, "tp2-z2"),
    ("qwen3", 2, "tp2-z3"),
    ("qwen3", 2, "tp2-sp-z1"),
    ("qwen3", 4, "tp2-sp-pp2-z3"),
    ("t5", 2, "pp2-vp2-z1"),
    ("t5", 2, "tp2-sp-z3"),
    ("t5", 4, "tp2-pp2-z2"),
    *(
        pytest.param(family, 2, f"tp2{sequence}-z{zero}", marks=pytest.mark.slow)
        for family in ("qwen2", "qwen3")
        for sequence in ("", "-sp")
        for zero in range(4)
    ),
]


@pytest.mark.parametrize(("family", "processes", "name"), EQUAL)
def test_layouts_equal_one_process(proof, family, processes, name):
    assert_equal(proof(family, processes)(name))


# Pipelines: see the gradients that are added up in bf16, below.
EQUAL_IN_BF16 = [("llama", 2, "tp2-sp-z1"), ("qwen3", 2, "tp2-z2"), ("gpt2", 2, "z2"), ("gpt2", 2, "pp2-z3")]


@pytest.mark.parametrize(("family", "processes", "name"), EQUAL_IN_BF16)
def test_layouts_equal_one_process_in_bf16(proof, family, processes, name):
    assert_equal(proof(family, processes, "bf16")(name), "bf16")


EVERYTHING = [(family, processes, dtype) for family in GROUPS for processes in (2, 4) for dtype in TOLERANCES]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "processes", "dtype"), EVERYTHING)
def test_every_layout_equals_one_process(proof, family, processes, dtype):
    one = proof(family, processes, dtype)
    legal = [layout for layout in all_layouts(processes) if not one.verification.problems(layout)]
    assert len(legal) >= (9 if dtype == "bf16" else 12)
    worst = [0.0] * 4
    for layout in legal:
        verdict = one(str(layout))
        assert_equal(verdict, dtype)
        figures = (verdict.loss, verdict.norm, verdict.gradient, verdict.update)
        worst = [max(pair) for pair in zip(worst, figures, strict=True)]
    print(family, processes, dtype, "loss, norm, gradient, update:", *(f"{value:.1e}" for value in worst))


# ---- runs of other settings ----------------------------------------------------------------------------------------


def test_a_run_of_fewer_steps_whose_rate_ends_at_nothing(folder):
    run = load_run(
        folder / "llama.toml", ["train.steps=1", "schedule.final_ratio=0.0", "schedule.warmup_steps=1"]
    )
    places = locate(run.data, run.reading, folder)
    short = Verification(run, places, num_processes=2, steps=3, dtype="fp32")
    (verdict,) = short.run([parse_layout("pp2-z1", 2)])
    assert_equal(verdict)


def test_a_run_with_lanes_of_its_own_documents_whole_and_apart(folder):
    """Lanes that divide the run's batch need not divide the small one here."""
    changes = ["train.global_batch=1024", "data.lanes=512", "data.packing=best_fit", "data.attention=document"]
    run = load_run(folder / "gpt2.toml", changes)
    proof = Verification(run, locate(run.data, run.reading, folder), num_processes=2, steps=2, dtype="fp32")
    for verdict in proof.run([parse_layout("tp2-sp-z1"), parse_layout("pp2-z2")]):
        assert_equal(verdict)


# ---- ranks that fail ----------------------------------------------------------------------------------------------


def _fail_in_step_2(monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None]) -> None:
    run = verify.TrainingStep.run

    def planted(self, number, **more):
        if number == 1 and self._runtime.rank == 1:
            fail()
        return run(self, number, **more)

    monkeypatch.setattr(verify.TrainingStep, "run", planted)


def _refuse() -> None:
    raise NumericsError("step 2: the loss is not finite on rank(s) [1]")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "fail", "message"),
    [
        ("pp2-z1", _refuse, "failed: NumericsError: step 2: the loss is not finite on rank(s) [1]"),
        ("tp2-z1", kill_self, "failed: RankDied: rank 1 died without an answer (exit code -9)"),
    ],
)
def test_a_rank_that_fails_is_a_verdict_and_the_next_layout_runs(proof, name, fail, message, monkeypatch):
    one = proof("llama", 2)
    with monkeypatch.context() as patch:
        _fail_in_step_2(patch, fail)
        started_s = time.monotonic()
        verdict = one(name)
        assert time.monotonic() - started_s < 30
    assert not verdict.equal and verdict.first == message
    assert all(map(math.isnan, (verdict.loss, verdict.norm, verdict.gradient, verdict.update)))
    assert [verify.as_json(verdict)[key] for key in ("equal", "loss", "first")] == [False, None, message]
    assert "DIFFERS" in verify.row(verdict) and message in verify.row(verdict)
    assert_equal(one("pp2-z1"))


@pytest.mark.faults
def test_a_layout_that_hangs_is_a_verdict(proof, monkeypatch):
    one = proof("llama", 2)
    monkeypatch.setattr(verify, "run_ranks", functools.partial(run_ranks, timeout_s=2))
    _fail_in_step_2(monkeypatch, lambda: time.sleep(100))
    verdict = one("pp2-z1")
    named(verdict, "failed: RankDied: rank 0 gave no answer within 2 s")
    assert 2 <= verdict.seconds < 30
