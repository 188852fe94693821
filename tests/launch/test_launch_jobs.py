"""What becomes of launched runs: their states, requests to stop, locks, and what a refusal leaves alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from in_process import Command
from launch_jobs import job_in

from basestone.launch import local
from basestone.launch.cluster import ends, jobs, kubernetes, rank
from basestone.launch.cluster.config import ClusterConfig
from basestone.launch.cluster.job import Job
from basestone.launch.cluster.plan import port_of
from basestone.launch.environ import RankIdentity
from basestone.trainer.errors import ConfigError
from basestone.trainer.run_lock import RunLock, is_held
from basestone.trainer.rundir import STOP


def test_a_refused_launch_leaves_the_run_that_goes_on_alone(
    basestone: Command, run_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    job = job_in(run_dir, secrets=["TOKEN"])
    job.write({"TOKEN": "value"})
    (run_dir / STOP).touch()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    lock = RunLock(run_dir)
    try:
        assert is_held(run_dir)
        done = basestone("launch", run_file, "--set", "optimizer.lr=0.5")
    finally:
        lock.close()
    assert done.code == 64 and "a run goes on in it already; `basestone jobs stop" in done.err
    assert {path: path.read_bytes() for path in before} == before
    assert not is_held(run_dir)


def test_states_are_told_by_the_lock_and_the_marks(basestone: Command, tmp_path):
    for name in ("going", "done", "broken"):
        (tmp_path / name / "launch").mkdir(parents=True)
        job = job_in(tmp_path / name)
        jobs.record(job, job.folder, "")
    record = tmp_path / "done" / "launch" / "started.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"pid": 1, "pid_started_s": 0.0}))
    (tmp_path / "done" / "COMPLETE").touch()
    (tmp_path / "broken" / "launch" / "started.json").write_text("{")
    lock = RunLock(tmp_path / "going")
    try:
        rows = json.loads(basestone("jobs", "ls", tmp_path, "--json").out)
        assert [(Path(row["run"]).name, row["state"]) for row in rows] == [
            ("done", "complete"),
            ("going", "running"),
        ]
        basestone("jobs", "stop", tmp_path / "going")
        assert (tmp_path / "going" / STOP).exists()
    finally:
        lock.close()


def test_pods_are_stopped_elsewhere(tmp_path):
    job = job_in(tmp_path, "kubernetes")
    jobs.record(job, job.folder, kubernetes.identity("gpt-1", ClusterConfig(kubernetes={"namespace": "ml"})))
    with pytest.raises(ConfigError, match=r"\(kubectl exec\), or kubectl delete jobset/gpt-1 -n ml"):
        jobs.stop(tmp_path)
    assert jobs.status_of(tmp_path).state == "unknown here: kubectl get jobset/gpt-1 -n ml"


def test_a_run_that_has_ended_is_not_asked_to_stop(tmp_path):
    job = job_in(tmp_path)
    jobs.record(job, job.folder, "")
    assert jobs.stop(tmp_path) == f"{tmp_path}: ended already, at step 0"
    assert not (tmp_path / STOP).exists()


@pytest.mark.parametrize(
    ("squeue", "state"),
    [
        ("echo RUNNING", "running"),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "ended"),
        ("echo Unable to contact slurm controller >&2; exit 1", "unknown"),
    ],
)
def test_a_queue_that_does_not_answer_lets_no_second_launch_through(tmp_path, monkeypatch, squeue, state):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    job = job_in(tmp_path, "slurm")
    jobs.record(job, job.folder, "7")
    assert jobs.status_of(tmp_path).state == state
    if state == "ended":
        jobs.check_queue(tmp_path)
    else:
        with pytest.raises(ConfigError, match=r"Slurm job 7 of this run (is running|has ended; wait)"):
            jobs.check_queue(tmp_path)


def test_a_run_over_ssh_is_asked_to_stop_when_its_launch_is_killed(tmp_path, monkeypatch, capsys):
    job = job_in(tmp_path, "hosts")
    monkeypatch.setattr(rank, "WATCH_S", 0.2)
    worker = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); time.sleep(60)"
    monkeypatch.setattr(local, "worker_command", lambda _: [sys.executable, "-c", worker])
    lock = RunLock(job.folder)  # stands for the launch
    threading.Timer(2.0, lock.close).start()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with open(os.devnull, "w") as shown:
            monkeypatch.setattr(sys, "stdout", shown)
            assert rank.run_rank(job, RankIdentity(0, 1, 0, 1)) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ends.cause(job.folder) is None or ends.cause(job.folder).code == 75
    assert "the launch is gone" in capsys.readouterr().err


def test_launches_meet_at_ports_of_their_own():
    ports = {port_of(Job(f"gpt-{number}", "hosts", "r", "d", 1, 1, 1)) for number in range(1000)}
    assert len(ports) > 950 and min(ports) >= 20000 and max(ports) < 40000


def test_a_scheduler_gets_no_secret(basestone: Command, run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(f"#!/bin/sh\nenv > {tmp_path}/given\necho 12\n")
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("TOKEN", "canary")
    (tmp_path / "cluster.toml").write_text("secrets = ['TOKEN']\n")
    old_stop = tmp_path / "runs" / "run" / STOP
    old_stop.parent.mkdir(parents=True)
    old_stop.touch()
    done = basestone(
        "launch", "run.toml", "--on", "slurm", "--processes-per-node", "1", "--cluster", "cluster.toml"
    )
    assert done.code == 0 and "slurm job 12; basestone jobs ls " in done.out
    assert "canary" not in (tmp_path / "given").read_text()
    assert not old_stop.exists(), "it was for an earlier launch"
    secrets = tmp_path / "runs" / "run" / "launch" / "secrets.json"
    assert json.loads(secrets.read_text()) == {"TOKEN": "canary"} and secrets.stat().st_mode & 0o777 == 0o600


def test_train_takes_back_a_request_that_is_older_than_itself_and_leaves_that_of_a_run_that_goes_on(
    basestone: Command, run_file, tmp_path, asked, monkeypatch
):
    run_dir = tmp_path / "kept"
    run_dir.mkdir()
    stop = run_dir / STOP

    def trained(age_s: float) -> bool:
        stop.touch()
        os.utime(stop, (time.time() - age_s,) * 2)
        assert basestone("train", run_file, "--run-dir", run_dir).code == 7
        return stop.exists()

    since_s = time.time() - local.started_s()
    assert not trained(since_s + 60) and trained(0)
    lock = RunLock(run_dir)
    try:
        assert trained(since_s + 60)
    finally:
        lock.close()


def test_a_rank_takes_back_what_is_older_than_its_launcher_alone(
    basestone: Command, run_file, tmp_path, monkeypatch
):
    """A rank that its launcher started again in place must not lose what came meanwhile."""
    monkeypatch.setattr(local, "become_worker", lambda _: sys.exit(7))
    stop = tmp_path / STOP
    launched_s = local.parent_started_s()
    for number, since_launch_s, stays in (("0", 10.0, True), ("0", -10.0, False), ("1", -10.0, True)):
        stop.touch()
        os.utime(stop, (launched_s + since_launch_s,) * 2)
        monkeypatch.setenv("RANK", number)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert basestone("train", run_file, "--run-dir", tmp_path).code == 7
        assert stop.exists() == stays
