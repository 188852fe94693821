"""Traces by the real torch.profiler, of steps that are a matrix product each."""

from __future__ import annotations

import gzip
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import OneRank
from run_files import run_of

from basestone.trainer.console import RunConsole
from basestone.trainer.errors import ConfigError
from basestone.trainer.forks import run_ranks
from basestone.trainer.rundir import RunDirectory
from basestone.trainer.sections import ProfileSection
from basestone.trainer.sinks import traces
from basestone.trainer.sinks.traces import StepTracer


class Run:
    """A run directory, and a tracer whose `steps` are traced."""

    def __init__(self, path: Path, last_step: int = 100, **keys: Any) -> None:
        self.path, self.directory = path, RunDirectory(path)
        runtime: Any = OneRank()
        places = (path, self.directory, RunConsole(last_step, 0))
        self.tracer = StepTracer(ProfileSection(**keys), runtime, *places, last_step=last_step)

    def train(self, *steps: int) -> None:
        for step in steps:
            with self.tracer.around(step):
                torch.ones(2, 2) @ torch.ones(2, 2)

    def close(self) -> list[tuple[int, str, str]]:
        """End it; give step, event and message of its events."""
        self.tracer.close()
        self.directory.close()
        lines = map(json.loads, (self.path / "events.jsonl").read_text().splitlines())
        return [(line["step"], line["event"], line["message"]) for line in lines]

    def names(self, first: int) -> list[str]:
        body = gzip.decompress((self.path / "traces" / f"rank_0_step_{first}.json.gz").read_bytes())
        return [event["name"] for event in json.loads(body)["traceEvents"]]


def test_exactly_the_steps_that_were_asked_for_are_in_the_trace(tmp_path):
    run = Run(tmp_path / "run", first_step=3, num_steps=2)
    run.train(1, 2, 3, 4, 5, 6)
    path = tmp_path / "run" / "traces" / "rank_0_step_3.json.gz"
    assert run.close() == [(4, "trace", f"rank 0: steps 3 to 4: {path}")]
    assert list(path.parent.iterdir()) == [path], "nothing unfinished is left"
    names = run.names(3)
    assert [name for name in names if name.startswith("optimizer")] == ["optimizer step 3", "optimizer step 4"]
    assert names.count("aten::mm") == 2


def test_a_run_resumed_among_them_traces_the_rest(tmp_path):
    run = Run(tmp_path / "run", first_step=3, num_steps=4)
    run.train(5, 6, 7)
    ((step, event, message),) = run.close()
    assert (step, event) == (6, "trace") and message.startswith("rank 0: steps 5 to 6: ")
    assert run.names(5).count("aten::mm") == 2


@pytest.mark.parametrize("last_step", [4, 100], ids=["last", "stopped"])
def test_a_run_that_ends_among_them_writes_what_it_has(tmp_path, last_step):
    run = Run(tmp_path / "run", last_step, first_step=3, num_steps=50)
    run.train(3, 4)
    ((step, event, message),) = run.close()
    assert (step, event) == (4, "trace") and message.startswith("rank 0: steps 3 to 4: ")
    assert run.names(3).count("aten::mm") == 2


def test_a_step_that_fails_is_no_reason_to_lose_the_trace(tmp_path):
    run = Run(tmp_path / "run", first_step=3)
    run.train(3)
    with pytest.raises(ZeroDivisionError), run.tracer.around(4):
        raise ZeroDivisionError
    ((_, event, message),) = run.close()
    assert event == "trace" and message.startswith("rank 0: steps 3 to 3: ")


@pytest.mark.parametrize("keys", [{}, {"first_step": 1, "ranks": [1]}], ids=["off", "another rank"])
def test_nothing_is_traced_unasked(tmp_path, monkeypatch, keys):
    monkeypatch.setattr(traces, "profile", None)  # would fail where it is called
    run = Run(tmp_path / "run", **keys)
    run.train(1, 2, 3, 4)
    assert run.close() == [] and not (tmp_path / "run" / "traces").exists()


def test_a_trace_that_cannot_be_written_costs_an_event(tmp_path, capfd):
    run = Run(tmp_path / "run", first_step=1, num_steps=1)
    (tmp_path / "run" / "traces").write_text("in the way")
    run.train(1, 2)
    ((step, event, message),) = run.close()
    assert (step, event) == (1, "trace_failed") and message.startswith("rank 0: storage failed: File exists")
    assert capfd.readouterr().err.count("warning: trace of rank 0: storage failed") == 1


class _CutShort(torch.profiler.profile):
    """Exports to a disk that fills up, of which the profiler says nothing."""

    def export_chrome_trace(self, path: str, use_python_export: bool = False) -> None:
        super().export_chrome_trace(path)
        with open(path, "r+b") as file:
            file.truncate(200)


def test_a_trace_that_is_cut_short_is_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(traces, "profile", _CutShort)
    run = Run(tmp_path / "run", first_step=1, num_steps=1)
    run.train(1)
    ((_, event, message),) = run.close()
    assert event == "trace_failed" and "cut short; is the disk full?" in message
    assert list((tmp_path / "run" / "traces").iterdir()) == []


def _trace_on_a_full_disk(path: Path) -> None:
    """Trace where files take 20,000 bytes and no more; the profiler meets a real error in mid-file."""
    run = Run(path, first_step=1, num_steps=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    with run.tracer.around(1):
        for _ in range(100):
            torch.ones(2, 2) @ torch.ones(2, 2)
    run.close()


def test_a_full_disk_is_said_and_nothing_is_left_on_it(tmp_path):
    run_ranks(_trace_on_a_full_disk, 1, tmp_path / "run", num_threads=1)
    (event,) = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    assert event["event"] == "trace_failed" and "cut short; is the disk full?" in event["message"]
    assert list((tmp_path / "run" / "traces").iterdir()) == []


def test_what_a_kill_left_of_a_trace_goes_with_the_next(tmp_path):
    left = tmp_path / "run" / "traces" / ".rank_0"
    left.mkdir(parents=True)
    (left / "trace.json.tmp").write_bytes(b"{" * 1000)
    run = Run(tmp_path / "run", first_step=1, num_steps=1)
    run.train(1)
    assert [event for _, event, _ in run.close()] == ["trace"]
    assert [path.name for path in left.parent.iterdir()] == ["rank_0_step_1.json.gz"]


def test_a_rank_that_is_not_there_is_refused():
    run = run_of(profile__first_step=2, profile__ranks=[0, 3])
    with pytest.raises(ConfigError, match=r"profile.ranks names rank 3; the 2 processes are ranks 0 to 1"):
        run.resolve(2, 100)
    run.resolve(4, 100)
