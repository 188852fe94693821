"""Exports while training goes on, in processes of their own: in time, after a stop or a kill, and where they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from faults import after, kill_self
from whole_run import killed, train

from basestone.trainer import engine
from basestone.trainer.checkpoint.format import steps_in
from basestone.trainer.errors import ConfigError, Stopped
from basestone.trainer.forks import RankDied
from basestone.trainer.hub import exporter

pytestmark = pytest.mark.dist
EXPORT = ("export.every_steps=4", "export.licence=mit", "data.heldout={}")


def quick(_: int) -> None:
    """Let a process that copies the manifest stand for an export, which would import everything anew."""

    def started(self: Any, path: Path) -> subprocess.Popen[bytes]:
        script = 'mkdir -p "$2" && cp "$1/MANIFEST.json" "$2/model.safetensors" && echo "$2, copied"'
        self._log(path).parent.mkdir(exist_ok=True)
        with open(self._log(path), "wb") as log:
            return subprocess.Popen(["sh", "-c", script, "sh", path, self._out / path.name], stdout=log)

    exporter.Exporter._start = started  # type: ignore[method-assign]


EXPORTS = pytest.mark.parametrize(
    "export", [pytest.param(quick, id="quick"), pytest.param(None, id="whole", marks=pytest.mark.slow)]
)


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def exported(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "hf").glob("*"))


def test_checkpoints_are_exported_while_training_goes_on(corpus, tmp_path):
    """Steps between saves are due, too; what is being exported is not pruned; and the last step always is."""
    from transformers import AutoModelForCausalLM

    run_dir = tmp_path / "run"
    changes = ("train.steps=5", "export.every_steps=3", "checkpoint.every_steps=2", "checkpoint.keep_last=1")
    train(corpus, run_dir, *changes, "export.licence=mit")
    names = [f"step_{step:08d}" for step in (3, 5)]
    assert exported(run_dir) == names
    events = events_of(run_dir, "export")
    assert [event["step"] for event in events] == [3, 5] and not events_of(run_dir, "export_failed")
    assert all("bf16, logits equal the trainer's within" in event["message"] for event in events)
    weights = [AutoModelForCausalLM.from_pretrained(run_dir / "hf" / name).lm_head.weight for name in names]
    assert not weights[0].equal(weights[1])
    assert 'license: "mit"' in (run_dir / "hf" / names[0] / "README.md").read_text()
    assert next(step for step, _ in steps_in(run_dir / "checkpoints")) == 5


@pytest.mark.faults
def test_an_export_that_fails_is_an_event(corpus, tmp_path):
    """Its tokenizer is another one: the run goes on, and the log says why."""
    run_dir = tmp_path / "run"

    def spoil(_: int) -> None:
        start = exporter.Exporter._start

        def other(self: Any, path: Path) -> Any:
            if path.name.endswith("4"):
                (run_dir / "tokenizer.model").rename(run_dir / "away")
            return start(self, path)

        exporter.Exporter._start = other  # type: ignore[method-assign]

    train(corpus, run_dir, *EXPORT, "train.steps=4", fault=spoil)
    assert exported(run_dir) == []
    (event,) = events_of(run_dir, "export_failed")
    assert (
        "hf/step_00000004: ended with 64: " in event["message"] and "tokenizer is not there" in event["message"]
    )
    assert (run_dir / "logs" / "export_step_00000004.log").is_file()
    assert (run_dir / "COMPLETE").exists()


@EXPORTS
@pytest.mark.faults
def test_a_stop_leaves_an_export_to_the_next_start(corpus, tmp_path, export):
    run_dir = tmp_path / "run"

    def stop(_: int) -> None:
        after(engine.Engine, "update", lambda: os.kill(os.getpid(), signal.SIGTERM), 5)

    with pytest.raises(Stopped):
        train(corpus, run_dir, *EXPORT, fault=stop)
    (event,) = events_of(run_dir, "export_failed")
    assert (
        event["message"] == "hf/step_00000004: is left to the next start of the run" and exported(run_dir) == []
    )
    train(corpus, run_dir, *EXPORT, fault=export)
    assert exported(run_dir) == ["step_00000004", "step_00000008"]


@EXPORTS
@pytest.mark.faults
def test_an_export_dies_with_its_run_and_is_made_up_for(corpus, tmp_path, export):
    run_dir, told = tmp_path / "run", tmp_path / "pid"

    def kill(_: int) -> None:
        start = exporter.Exporter._start

        def started(self: Any, path: Path) -> Any:
            told.write_text(str(start(self, path).pid))
            kill_self()

        exporter.Exporter._start = started  # type: ignore[method-assign]

    assert killed(corpus, run_dir, *EXPORT, fault=kill)
    deadline_s = time.monotonic() + 30
    while alive(int(told.read_text())) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not alive(int(told.read_text())) and exported(run_dir) == []
    (run_dir / "hf").mkdir(exist_ok=True)
    (run_dir / "hf" / ".step_00000004.x.partial").mkdir()
    train(corpus, run_dir, *EXPORT, fault=export)
    assert sorted(path.name for path in (run_dir / "hf").iterdir()) == ["step_00000004", "step_00000008"]


def alive(pid: int) -> bool:
    """Tell whether a process is there and is more than an entry that nobody has taken up."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@EXPORTS
def test_an_export_of_a_line_that_was_left_is_replaced(corpus, tmp_path, export):
    run_dir = tmp_path / "run"
    train(corpus, run_dir, *EXPORT, "train.steps=4", fault=export)
    file = run_dir / "hf" / "step_00000004" / "model.safetensors"
    before_it = file.read_bytes()
    step = run_dir / "checkpoints" / "step_00000002"
    train(corpus, run_dir, *EXPORT, "train.steps=4", "optimizer.lr=1e-2", resume=step, fault=export)
    assert exported(run_dir) == ["step_00000004"] and file.read_bytes() != before_it


def test_what_cannot_be_exported_is_refused_before_training(corpus, tmp_path):
    with pytest.raises((ConfigError, RankDied, ValueError), match="cannot hold this model"):
        train(corpus, tmp_path / "run", *EXPORT, "model.bias=true")
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
