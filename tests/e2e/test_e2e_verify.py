"""`basestone verify` by the command line: the table, the codes it leaves with, and a difference that is honest."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest
from commands import command, environment

pytestmark = pytest.mark.dist


@pytest.fixture
def verify(corpus, forked):
    """Run the command with two processes and two steps, where nothing else is said."""

    def run(*words: object):
        return forked("verify", corpus / "run.toml", "--processes", "2", "--steps", "2", *words)

    return run


def test_equal_layouts_are_a_table(corpus, basestone):
    words = ("--processes", "2", "--steps", "2", "--layouts", "tp2-z1,pp2-z1")
    done = basestone("verify", corpus / "run.toml", *words)
    assert done.returncode == 0, done.stderr
    head, *rows, last = done.stdout.splitlines()
    assert head.split() == ["layout", "loss", "norm", "gradient", "update", "verdict", "seconds"]
    assert [row.split()[0] for row in rows] == ["tp2-pp1-dp1-z1", "tp1-pp2-dp1-z1"]
    for row in rows:
        _, *apart, verdict, seconds = row.split()
        assert verdict == "equal" and float(seconds) > 0
        assert len(apart) == 4 and all(0 <= float(value) <= 1e-5 for value in apart)
        assert len(row) == len(head)
    assert last == "2 layouts equal one process (fp32, 2 steps)"
    assert "error" not in done.stderr and "Traceback" not in done.stderr


def test_a_difference_is_named_and_leaves_with_76(corpus, basestone, tmp_path):
    """A DeepSpeed file that sends fp32 gradients as bf16 does so where there are data-parallel ranks."""
    config = {"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    changes = ("--set", f"parallel.ds_config={tmp_path / 'ds.json'}", "--set", "parallel.zero=2")
    words = ("--processes", "2", "--steps", "2", "--layouts", "dp2-z2,dp2-z1", "--json")
    done = basestone("verify", corpus / "run.toml", *words, *changes)
    assert done.returncode == 76, done.stdout + done.stderr
    differs, equal = json.loads(done.stdout)
    assert set(equal) == {"layout", "equal", "loss", "norm", "gradient", "update", "first", "seconds"}
    assert (equal["layout"], equal["equal"], equal["first"]) == ("tp1-pp1-dp2-z1", True, "")
    assert (differs["layout"], differs["equal"]) == ("tp1-pp1-dp2-z2", False)
    assert 1e-5 < differs["gradient"] < 1e-1
    assert differs["first"].startswith("step 1: the ") and "the gradient of " in differs["first"]
    assert "error: 1 of 2 layouts differ from one process:" in done.stderr
    assert f"  tp1-pp1-dp2-z2: {differs['first']}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_reference_that_is_not_finite_leaves_with_76(verify):
    done = verify("--layouts", "pp2-z1", "--set", "model.init_std=1e30")
    assert done.returncode == 76, done.stdout + done.stderr
    assert "error: step 1: the " in done.stderr and "is not finite on rank(s) [0]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_that_is_none_leaves_with_64(verify):
    done = verify("--layouts", "tp2-z1,ep2")
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("error: --layouts ep2: cannot read 'ep2'; a layout is tensor tpN")
    assert len(done.stderr.splitlines()) == 1


def test_illegal_layouts_come_with_every_rule_and_leave_with_64(verify):
    done = verify("--processes", "4", "--layouts", "tp4-vp2-z0,pp4-z1,tp2-pp2", "--dtype", "bf16")
    assert (done.returncode, done.stdout) == (64, "")
    for rule in (
        "error: tp4-pp1-vp2-dp1-z0: ",
        "model.num_query_groups = 2; legal values: [1, 2]",
        "parallel.virtual_pipeline = 2 needs parallel.pipeline > 1",
        "parallel.zero = 0 accumulates bf16 gradients",
        "tp1-pp4-dp1-z1: parallel.pipeline = 4 stages for model.num_layers = 2",
    ):
        assert rule in done.stderr, done.stderr
    assert "tp2-pp2" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.faults
def test_asked_to_stop_it_leaves_nothing_behind(corpus, tmp_path):
    words = command("verify", corpus / "run.toml", "--processes", "2", "--steps", "200", "--layouts", "pp2-z1")
    process = subprocess.Popen(words, env={**environment(), "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE)
    deadline_s = time.monotonic() + 60
    while not list(tmp_path.glob("basestone-verify-*/step_00000003.f32")) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert list(tmp_path.glob("basestone-*")) == []
