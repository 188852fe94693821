"""Sinks that fail, and Weights & Biases: the real wandb, offline, in this process."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb
from full_record import EVALUATION, STEP
from wandb_files import offline_runs

from basestone.trainer.console import RunConsole
from basestone.trainer.errors import ConfigError
from basestone.trainer.record import Recorder, heldout_text, measured_text
from basestone.trainer.rundir import RunDirectory
from basestone.trainer.sinks import weights_and_biases
from basestone.trainer.sinks.sink import evaluation_scalars, step_scalars
from basestone.trainer.sinks.weights_and_biases import WandbSink


class Notes:
    """A sink that keeps what it is given, and fails in one of its functions."""

    name = "Notes"

    def __init__(self, fails_in: str = "") -> None:
        self.fails_in, self.seen = fails_in, list[str]()

    def _do(self, what: str) -> None:
        self.seen.append(what)
        if what == self.fails_in:
            raise RuntimeError(f"{what} is broken")

    def begin(self, run_id: str, step: int) -> str:
        self._do("begin")
        return f"notes of {run_id}"

    def step(self, record: dict[str, Any]) -> None:
        self._do("step")

    def evaluation(self, record: dict[str, Any]) -> None:
        self._do("evaluation")

    def close(self) -> None:
        self._do("close")


def test_figures_of_the_parts_of_a_loss_have_names():
    figures = {"masked_loss": 1.0, "masked_accuracy": 0.5, "contrastive_recall_at_10": 0.75}
    record = {"kind": "eval", "name": "topics", "loss": 1.0, "perplexity": 2.7, "tokens": 9, **figures}
    assert {f"heldout/topics/{name}" for name in figures} <= evaluation_scalars(record).keys()
    assert heldout_text(record) == (
        "loss 1.0000, perplexity 2.70, masked loss 1.0000, masked accuracy 0.5000, contrastive recall at 10 0.7500"
    )


def test_an_evaluation_without_a_perplexity_has_none_anywhere():
    record = {"kind": "eval", "name": "topics", "loss": 4.25, "tokens": 9, "contrastive_accuracy": 0.5}
    assert evaluation_scalars(record) == {
        "heldout/topics/loss": 4.25,
        "heldout/topics/contrastive_accuracy": 0.5,
    }
    assert heldout_text(record) == "loss 4.2500, contrastive accuracy 0.5000"


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"perplexity": 2.0, "bits_per_byte": 1.0}, "over 9 tokens"),
        ({"perplexity": 2.0, "masked_accuracy": 0.5}, "over 9 predictions"),
        ({"contrastive_accuracy": 0.5}, "over 9 pairs"),
        ({}, "over 9 pairs"),
    ],
)
def test_what_a_held_out_set_was_measured_over(figures, said):
    assert measured_text({"loss": 1.0, "tokens": 9, **figures}) == said


EVERYTHING = ["begin", "step", "step", "evaluation", "close"]


@pytest.mark.parametrize(
    ("fails_in", "seen"),
    [
        ("begin", ["begin", "close"]),
        ("step", ["begin", "step", "close"]),
        ("evaluation", ["begin", "step", "step", "evaluation", "close"]),
        ("close", [*EVERYTHING, "close"]),
    ],
)
def test_a_sink_that_fails_gets_nothing_more_and_the_others_do(tmp_path, capfd, fails_in, seen):
    directory = RunDirectory(tmp_path / "run")
    broken, whole = Notes(fails_in), Notes()
    recorder = Recorder(directory, RunConsole(8, 0), [broken, whole])
    recorder.begin("r1", 6)
    recorder.step(STEP)
    recorder.step({**STEP, "step": 8})
    recorder.evaluation({**EVALUATION, "step": 8})
    recorder.close()
    recorder.close()
    directory.close()
    assert (broken.seen, whole.seen) == (seen, EVERYTHING)
    (event,) = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    told = f"Notes failed and gets nothing more: {fails_in} is broken"
    assert (event["event"], event["message"]) == ("sink_failed", told)
    assert event["step"] == {"begin": 6, "step": 7, "evaluation": 8, "close": 8}[fails_in]
    said = capfd.readouterr().err
    assert said.count("warning: ") == said.count(told) == 1 and "notes of r1" in said
    lines = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == ["step", "step", "eval"], "the truth is whole"


def test_figures_that_are_not_known_have_no_name():
    assert step_scalars({"loss": 1.0, "mfu": None, "cost": None, "step": 3}) == {"train/loss": 1.0}


@pytest.fixture
def without_key(tmp_path, monkeypatch):
    """A user without credentials for Weights & Biases."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "home").mkdir()


def sink_of(run_dir: Path, last_step: int = 7) -> WandbSink:
    return WandbSink("small", run_dir, {"optimizer": {"lr": 3e-4}}, last_step)


def test_wandb_without_a_key_is_offline_and_leaves_nothing_behind(tmp_path, without_key):
    before = dict(os.environ), sys.excepthook, set(threading.enumerate()), psutil.Process().children()
    run_dir = tmp_path / "run-a"
    run_dir.mkdir()
    sink = sink_of(run_dir)
    told = sink.begin("abc1", 0)
    assert told.startswith(
        f"Weights & Biases: offline, as there is no key; to upload: wandb sync {run_dir}/wandb/off"
    )
    sink.step(STEP)
    sink.evaluation({**EVALUATION, "step": 7})
    sink.close()
    sink.close()
    (run,) = offline_runs(run_dir)
    assert (run.run_id, run.project, run.resumes, run.exit_code) == ("abc1", "small", True, 0)
    assert run.config["optimizer"] == {"lr": 3e-4}
    (row,) = run.history
    assert row["_step"] == 7
    assert {name: value for name, value in row.items() if not name.startswith("_")} == {
        **step_scalars(STEP),
        "heldout/topics/loss": 2.75,
        "heldout/topics/perplexity": 15.64,
        "heldout/topics/bits_per_byte": 1.25,
    }
    assert wandb.run is None
    after = dict(os.environ), sys.excepthook, set(threading.enumerate()), psutil.Process().children()
    assert after == before
    assert not list((tmp_path / "home").rglob("*.wandb"))


def test_wandb_that_resumes_keeps_the_id(tmp_path, without_key):
    for step, last in ((3, 7), (7, 7)):
        sink = sink_of(tmp_path, last)
        sink.begin("abc2", 0)
        sink.step({**STEP, "step": step})
        sink.close()
    first, second = sorted(offline_runs(tmp_path), key=lambda run: run.history[0]["_step"])
    assert (first.run_id, second.run_id) == ("abc2", "abc2")
    assert (first.exit_code, second.exit_code) == (1, 0), "finished is what reached its last step"


def test_wandb_without_a_network_is_offline(tmp_path, without_key, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(weights_and_biases, "INIT_TIMEOUT_S", 1.0)
    sink = sink_of(tmp_path)
    told = sink.begin("abc3", 0)
    assert told.startswith("Weights & Biases: offline, as the server gives no access (") and "refused" in told
    assert "0" * 40 not in told
    sink.step(STEP)
    sink.close()
    assert [row["_step"] for run in offline_runs(tmp_path) for row in run.history] == [7]


def test_wandb_that_is_switched_off_says_so(tmp_path, without_key, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    sink = sink_of(tmp_path / "run")
    assert sink.begin("abc4", 0) == "Weights & Biases: off, by WANDB_MODE=disabled"
    sink.step(STEP)
    sink.evaluation({**EVALUATION, "step": 7})
    sink.close()
    assert not list(tmp_path.rglob("*wandb*"))


def test_a_mode_that_wandb_does_not_have_takes_one_line(tmp_path, without_key, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "foo")
    directory = RunDirectory(tmp_path / "run")
    recorder = Recorder(directory, RunConsole(8, 0), [sink_of(tmp_path / "run")])
    recorder.begin("abc5", 0)
    recorder.close()
    directory.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        "warning: Weights & Biases failed and gets nothing more: WANDB_MODE: Input should be 'online', 'offline'"
    )


def test_without_wandb_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"meter.wandb_project needs the package wandb; pip install 'basestone\[w"
    ):
        sink_of(tmp_path)
