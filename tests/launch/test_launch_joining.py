"""Launches whose nodes each have a command of their own, and what checks and refused launches leave behind."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest
from in_process import Command

from basestone.launch.cluster import ends, jobs, joining, node, outcome, places
from basestone.launch.cluster.job import Job, read_job
from basestone.launch.cluster.joining import is_taken, joined
from basestone.trainer.errors import ConfigError
from basestone.trainer.run_lock import RunLock
from basestone.trainer.rundir import STOP


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "TAKE_S", 0.5)


def job_in(run_dir: Path, **changes: object) -> Job:
    job = Job(
        "gpt-1", "torchrun", "/shared/gpt.toml", str(run_dir), 1, 2, 1, options={"python": "/venv/bin/python"}
    )
    return dataclasses.replace(job, **changes)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_the_first_node_writes_and_the_last_to_leave_removes_the_secrets(tmp_path):
    first = job_in(tmp_path / "run", secrets=["TOKEN"])
    second = dataclasses.replace(first, options={"python": "/elsewhere/python"})
    (tmp_path / "run").mkdir()
    with joined(first, lambda: first.write({"TOKEN": "canary"})):
        ends.leave(first.folder, 0, "n0", 1, tmp_path / "log")
        with joined(second, lambda: pytest.fail("the first has written")):
            assert ends.cause(first.folder) is not None, "a node that joins begins no start"
            assert read_job(first.path) == first
        assert first.read_secrets() == {"TOKEN": "canary"}, "the other node goes on"
    assert first.read_secrets() == {} and not is_taken(first.folder)
    with joined(second, lambda: second.write({})):
        assert read_job(first.path) == second and ends.cause(first.folder) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other", "endpoint": "n9:1"},
        {"max_nodes": 3},
        {"overrides": ["train.steps=7"], "processes_per_node": 4},
        {"options": {"python": "/venv/bin/python", "array": 3}},
    ],
)
def test_a_node_with_another_job_is_refused_and_told_what_differs(tmp_path, changes):
    job = job_in(tmp_path)
    with joined(job, lambda: job.write({})):
        before = contents(job.folder)
        with (
            pytest.raises(ConfigError) as caught,
            joined(dataclasses.replace(job, **changes), lambda: pytest.fail("the first has written")),
        ):
            pass
        assert contents(job.folder) == before
    names = {"array" if name == "options" else name for name in changes}
    told = {line.strip().partition(":")[0] for line in str(caught.value).splitlines() if line.startswith("  ")}
    assert told == names


def test_a_launch_of_one_command_and_one_of_many_refuse_each_other(
    basestone: Command, run_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    job = job_in(tmp_path / "runs" / "run")
    with joined(job, lambda: job.write({})):
        done = basestone("launch", run_file)
        assert done.code == 64 and "another run holds it" in done.err
    lock = RunLock(job.folder)
    before = contents(job.folder)
    try:
        done = basestone("launch", run_file, "--on", "torchrun")
    finally:
        lock.close()
    assert done.code == 64 and "another launch goes on in it, or is just ending" in done.err
    assert contents(job.folder) == before


def test_a_launch_that_has_ended_and_is_leaving_is_not_joined(tmp_path):
    job = job_in(tmp_path)
    with joined(job, lambda: job.write({})):
        (tmp_path / "COMPLETE").touch()
        with pytest.raises(ConfigError, match="or is just ending"), joined(job, lambda: None):
            pass


def test_a_launch_is_starting_as_long_as_any_node_holds_it(tmp_path):
    job = job_in(tmp_path)
    with joined(job, lambda: job.write({})):
        jobs.record(job, job.folder, "")
        assert jobs.status_of(tmp_path).state == "starting"
        (tmp_path / "FAILED").touch()
        assert jobs.status_of(tmp_path).state == "starting", "it starts again"
        (tmp_path / "COMPLETE").touch()
        assert jobs.status_of(tmp_path).state == "complete", "other nodes may wait for long"
    (tmp_path / "COMPLETE").unlink()
    (tmp_path / "FAILED").unlink()
    assert jobs.status_of(tmp_path).state == "ended"


def test_pods_take_back_the_request_for_another_launch_alone(tmp_path):
    job, again = job_in(tmp_path, backend="kubernetes"), job_in(tmp_path, backend="kubernetes", name="gpt-2")
    for one, stays in ((job, False), (job, True), (again, False)):
        (tmp_path / STOP).touch()
        with joined(one, lambda one=one: node._write(one)):
            assert (tmp_path / STOP).exists() == stays


# ---- what is left behind --------------------------------------------------------------------------------------------


def test_a_check_leaves_nothing_where_nothing_was_and_a_run_as_it_was(tmp_path):
    run_dir = tmp_path / "runs" / "run"
    job = job_in(run_dir, check=True)
    with joined(job, lambda: job.write({})), joined(job, lambda: None):
        (job.folder / "logs").mkdir()
        assert outcome.outcome(job, 1).exit_code == 1
        (job.folder / "CHECKED").touch()
        assert outcome.outcome(job, 1).exit_code == 0
    assert list(tmp_path.iterdir()) == []
    own = job_in(run_dir)
    with joined(own, lambda: own.write({})):
        jobs.record(own, own.folder, "")
    time.sleep(0.02)
    (run_dir / "COMPLETE").touch()
    before = contents(run_dir)
    with joined(job, lambda: job.write({})):
        assert jobs.status_of(run_dir).state == "complete"
    assert contents(run_dir) == before and not job.folder.exists()


def test_a_check_removes_no_run_that_began_meanwhile(tmp_path):
    run_dir = tmp_path / "runs" / "run"
    job = job_in(run_dir, check=True)
    with joined(job, lambda: job.write({})):
        places.make(job_in(run_dir))
    assert (run_dir / "checkpoints").is_dir() and (run_dir / "lock").exists() and not job.folder.exists()


def test_a_job_that_is_refused_leaves_nothing(basestone: Command, run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text("#!/bin/sh\necho no such partition >&2; exit 1\n")
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    line = ("launch", run_file, "--on", "slurm", "--processes-per-node", "1")
    done = basestone(*line)
    assert done.code == 64 and "sbatch refused the job: no such partition" in done.err
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "run" / "checkpoints").mkdir(parents=True)
    assert basestone(*line).code == 64
    assert (tmp_path / "runs" / "run" / "checkpoints").is_dir() and not (
        tmp_path / "runs" / "run" / "launch"
    ).exists()
