"""What a launch does between and after starts: real processes stand for launchers, and the run's marks decide."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_jobs import job_in

from basestone.launch.cluster import ends, launcher, outcome, supervise
from basestone.launch.cluster.job import Job
from basestone.launch.cluster.outcome import Outcome
from basestone.launch.cluster.supervise import Supervisor
from basestone.trainer.errors import ConfigError
from basestone.trainer.rundir import STOP


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "WAIT_S", 0.2)
    monkeypatch.setattr(launcher, "LEFT_OVER_S", 0.5)


def supervised(job: Job, script: str, clean_up: Callable[[], None] = lambda: None) -> Outcome:
    """Supervise a launcher that is a Python program; `run` is its run directory, `leave` says how a rank ends."""
    head = (
        "import os, sys, time; from pathlib import Path; from basestone.launch.cluster import ends\n"
        "run = Path(sys.argv[1]); log = run / 'log'\n"
        "def leave(code, rank=0):\n"
        "    log.write_text('its last words\\n'); ends.leave(run / 'launch', rank, 'n1', code, log)\n"
    )
    command = [sys.executable, "-c", head + script, job.run_dir]
    return Supervisor(job, lambda: command, dict(os.environ)).run(clean_up)


# ---- outcomes -------------------------------------------------------------------------------------------------------


def test_marks_of_another_start_say_nothing_of_this_one(tmp_path):
    job = job_in(tmp_path)
    for mark in ("COMPLETE", "RESUME"):
        (tmp_path / mark).touch()
    ends.leave(job.folder, 0, "n0", 64, tmp_path / "log")
    time.sleep(0.02)
    outcome.begin(job)
    assert outcome.outcome(job, 0) == Outcome(1, 0), "a launcher that leaves with 0 and no mark has failed"
    assert outcome.outcome(job, 64) == Outcome(64, 0)
    assert outcome.outcome(job, 255) == Outcome(1, 0), "a code of mpirun's own"
    (tmp_path / "RESUME").write_text("step 3\n")
    assert outcome.outcome(job, 0).exit_code == 75
    (tmp_path / "COMPLETE").write_text("step 5\n")
    assert outcome.outcome(job, 1).exit_code == 0


@pytest.mark.parametrize(
    ("codes", "cause"),
    [({0: 1, 1: -9}, 1), ({0: -9, 1: 1, 2: 74}, 2), ({0: 1, 1: 75}, 1), ({3: 64, 1: 64}, 1), ({0: 1}, 0)],
)
def test_the_rank_that_says_why_is_the_cause(tmp_path, codes, cause):
    job = job_in(tmp_path)
    outcome.begin(job)
    for number, code in codes.items():
        ends.leave(job.folder, number, "n0", code, tmp_path / "log")
    assert ends.cause(job.folder).rank == cause


# ---- starts ---------------------------------------------------------------------------------------------------------


def test_a_run_that_makes_no_progress_is_given_up(tmp_path, capsys):
    cleaned: list[int] = []
    job = job_in(tmp_path, max_restarts=2)
    found = supervised(job, "leave(-9, 3); sys.exit(3)", lambda: cleaned.append(1))
    assert found.exit_code == 1
    said = capsys.readouterr().err
    assert said.count("rank 3 on n1 was killed by SIGKILL; its last words:\n  its last words") == 3
    assert (
        said.count("starting again from step 0") == 2
        and "no progress in 3 start(s) from step 0: giving up" in said
    )
    assert len(cleaned) == 4, "before the first start, and after each"


def test_a_run_that_makes_progress_is_started_as_often_as_it_takes(tmp_path):
    job = job_in(tmp_path, max_restarts=1)
    script = """
steps = run / "checkpoints"
number = len(list(steps.iterdir())) if steps.exists() else 0
if number == 6: (run / "COMPLETE").touch()
else: (steps / f"step_{number + 1:08d}").mkdir(parents=True)
sys.exit(0 if number == 6 else 1)
"""
    assert supervised(job, script) == Outcome(0, 6)


@pytest.mark.parametrize("code", [64, 74, 76])
def test_what_people_must_mend_is_not_started_again_and_ends_a_launcher_that_hangs(tmp_path, code, capfd):
    job = job_in(tmp_path)
    assert supervised(job, f"leave({code}, 1); time.sleep(600)").exit_code == code
    said = capfd.readouterr().err
    assert "the launcher does not end: ending it" in said and "starting again" not in said


def test_an_end_that_a_start_in_place_has_taken_back_ends_nothing(tmp_path, capfd):
    job = job_in(tmp_path)
    took_back = "leave(74); time.sleep(0.35); ends.clear(run / 'launch'); leave(75); time.sleep(1.5)\n"
    assert supervised(job, took_back + "(run / 'COMPLETE').touch()").exit_code == 0
    assert "ending it" not in capfd.readouterr().err


def test_a_signal_asks_the_run_and_a_second_one_ends_the_launcher(tmp_path, capfd):
    job = job_in(tmp_path)
    told = "".join(f"os.kill(os.getppid(), {number}); time.sleep(0.5)\n" for number in (1, 15))
    started_s = time.monotonic()
    assert supervised(job, f"{told}time.sleep(600)").exit_code == 75
    assert time.monotonic() - started_s < 30 and "SIGHUP: the run is asked to save" in capfd.readouterr().err
    assert not (tmp_path / STOP).exists(), "there is nothing left that it could stop"


def test_a_request_to_stop_between_two_starts_is_heard(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(supervise, "WAIT_S", 60.0)
    job = job_in(tmp_path)
    threading.Timer(2.0, (tmp_path / STOP).touch).start()
    assert supervised(job, "sys.exit(1)").exit_code == 75
    assert "stopped before a start" in capsys.readouterr().err


def test_a_request_to_stop_before_the_first_start_is_heard(tmp_path, capsys):
    job = job_in(tmp_path)
    (tmp_path / STOP).touch()
    assert supervised(job, "(run / 'started').touch()").exit_code == 75
    assert "stopped before a start" in capsys.readouterr().err
    assert not (tmp_path / "started").exists() and not (tmp_path / STOP).exists()


@pytest.mark.parametrize("ended", ["(run / 'COMPLETE').touch()", "leave(64)"])
def test_a_signal_after_the_end_leaves_no_request_for_the_next_start(tmp_path, ended, capfd, monkeypatch):
    monkeypatch.setattr(launcher, "LEFT_OVER_S", 60.0)
    job = job_in(tmp_path)
    found = supervised(job, f"{ended}; os.kill(os.getppid(), {signal.SIGTERM.value}); time.sleep(1)")
    assert found.exit_code == (0 if "COMPLETE" in ended else 64)
    assert not (tmp_path / STOP).exists() and "the run has ended" in capfd.readouterr().err


def test_a_node_that_is_ended_for_anothers_failure_does_not_stop_the_run(tmp_path, capsys):
    """As srun does: one node fails without a rank's word, and the entries of the others get a signal."""
    job = job_in(tmp_path, "slurm", max_restarts=1)
    node_is_told = f"(run / 'STOP').write_text({outcome.BY_A_NODE!r}); sys.exit(1)"
    assert supervised(job, node_is_told).exit_code == 1
    assert "no progress in 2 start(s)" in capsys.readouterr().err


def test_signals_that_were_ignored_stay_ignored(tmp_path):
    job = job_in(tmp_path)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        told = "".join(f"os.kill(os.getppid(), {number.value})\n" for number in before)
        assert supervised(job, f"{told}time.sleep(1)\n(run / 'COMPLETE').touch()").exit_code == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not (tmp_path / STOP).exists()


def test_hosts_that_are_away_for_a_while_are_waited_for(tmp_path, capsys):
    job, asked = job_in(tmp_path, max_restarts=3), []

    def command() -> list[str]:
        asked.append(1)
        if len(asked) in (2, 3):
            raise ConfigError("1 of 2 host(s) cannot be reached")
        finish = (
            "import sys, pathlib; pathlib.Path(sys.argv[1], 'COMPLETE').touch()"
            if len(asked) == 4
            else "exit(1)"
        )
        return [sys.executable, "-c", finish, job.run_dir]

    assert Supervisor(job, command, dict(os.environ)).run() == Outcome(0, 0)
    assert capsys.readouterr().err.count("cannot be reached") == 2


# ---- Slurm's batch process ------------------------------------------------------------------------------------------


@pytest.fixture
def in_slurm(tmp_path, monkeypatch) -> Path:
    """A job of Slurm's: srun runs what stands in the file `step`, scontrol writes down what it is asked."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/sh\nexec sh "$STEP"\n')
    (tools / "scontrol").write_text('#!/bin/sh\necho "$@" >> "$ASKED"\necho n0\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("STEP", str(tmp_path / "step"))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n0")
    monkeypatch.setattr(supervise, "REQUEUE_S", 0.0)
    return tmp_path


def asked_of(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def test_a_job_that_makes_room_is_requeued_until_it_is_in_vain(in_slurm):
    run_dir = in_slurm / "run"
    run_dir.mkdir()
    job = job_in(run_dir, "slurm", max_restarts=1)
    (in_slurm / "step").write_text(f"kill -USR2 $PPID; sleep 0.5; touch '{run_dir}/RESUME'\n")
    secrets, kept = job.folder / "secrets.json", []
    secrets.parent.mkdir(parents=True, exist_ok=True)
    secrets.write_text("{}")
    for _ in range(3):
        assert supervise.run_batch(job) == 75
        kept.append(secrets.exists())
        (run_dir / STOP).unlink(missing_ok=True)
    assert asked_of(in_slurm).count("requeue 7") == 1, "the second start saved nothing new"
    assert kept == [True, False, False], "who gives up needs them no more"
    supervise.forget(job)
    assert supervise.run_batch(job) == 75
    assert asked_of(in_slurm).count("requeue 7") == 2, "a new launch counts anew"


def test_a_job_that_was_asked_to_stop_is_not_requeued_and_ends_its_array(in_slurm):
    run_dir = in_slurm / "run"
    run_dir.mkdir()
    job = job_in(run_dir, "slurm", options=job_in(run_dir).options | {"array": 4})
    (in_slurm / "step").write_text(f"touch '{run_dir}/RESUME'\n")
    assert supervise.run_batch(job) == 75
    (in_slurm / "step").write_text("exit 9\n")
    assert supervise.run_batch(job) == 0, "the next of the array does nothing"
    assert "requeue 7" not in asked_of(in_slurm)


@pytest.mark.parametrize(
    ("array", "task", "step", "kept"),
    [
        (0, None, "exit 1", False),
        (0, None, "exit 64", False),
        (3, "2", "exit 1", True),
        (3, "3", "exit 1", False),
    ],
)
def test_secrets_go_with_the_last_job_that_can_need_them(in_slurm, monkeypatch, array, task, step, kept):
    run_dir = in_slurm / "run"
    job = job_in(run_dir, "slurm", max_restarts=0, options=job_in(run_dir).options | {"array": array})
    job.write({"TOKEN": "canary"})
    (in_slurm / "step").write_text(step + "\n")
    if task is not None:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "3")
    assert supervise.run_batch(job) != 0
    assert (job.folder / "secrets.json").exists() == kept
