"""Launches on this machine, by the command line: torchrun's agent, its ranks, and what happens to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import command, environment, losses_of, wait_for_step
from whole_run import CHANGES, train

pytestmark = pytest.mark.dist
STEPS = 60  # enough for what happens in between
CANARY = "canary-5up3r-s3cr3t"
ODD = "a&b $(id) {0..9} '\"* \\ ;|"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus) -> list[float]:
    """Losses of as many steps as a launch here takes, with nothing in between."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(corpus, run_dir, f"train.steps={STEPS}")
    return losses_of(run_dir)


def launch(corpus: Path, run_dir: Path, *arguments: str) -> list[str]:
    changes = [*CHANGES, f"train.steps={STEPS}", "meter.tensorboard=false"]
    sets = [word for change in changes for word in ("--set", change)]
    return command("launch", corpus / "run.toml", "--run-dir", run_dir, *sets, *arguments)


@contextlib.contextmanager
def launched(corpus: Path, run_dir: Path, *arguments: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    """Start a launch, and see that nothing of it is left."""
    process = subprocess.Popen(
        launch(corpus, run_dir, *arguments),
        env=environment() | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while (left := processes_of(run_dir)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, left


def processes_of(run_dir: Path, entry: str = "") -> list[psutil.Process]:
    """Give the ranks and workers of a run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if str(run_dir) in words and entry in " ".join(words):
                found.append(process)
    return found


def events_of(run_dir: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (run_dir / "events.jsonl").read_text().splitlines()]


def test_a_launch_trains_as_train_does_and_shows_no_secret(tmp_path, corpus, undisturbed):
    run_dir = tmp_path / "run 'odd' $(touch planted)"
    (tmp_path / "cluster.toml").write_text(f"secrets = ['TOKEN']\n[env]\nVALUE = {json.dumps(ODD)}\n")
    options = (
        "--processes-per-node",
        "2",
        "--cluster",
        str(tmp_path / "cluster.toml"),
        "--set",
        "parallel.tensor=2",
    )
    with launched(corpus, run_dir, *options, TOKEN=CANARY) as process:
        wait_for_step(process, run_dir, 1)
        (first, second) = processes_of(run_dir, "basestone.trainer.worker")
        for worker in (first, second):
            given = worker.environ()
            assert (given["TOKEN"], given["VALUE"]) == (CANARY, ODD)
        for anyone in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                assert CANARY not in " ".join(anyone.cmdline())
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
    assert losses_of(run_dir) == pytest.approx(undisturbed, rel=1e-5)
    assert "complete after 60 steps" in said and (run_dir / "COMPLETE").exists()
    assert "step 60/60" in (run_dir / "logs" / "rank_00000.log").read_text()
    assert (run_dir / "logs" / "rank_00001.log").exists()
    for path in run_dir.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
    assert not (run_dir / "launch" / "secrets.json").exists() and not list(tmp_path.rglob("planted"))


def test_a_killed_rank_or_agent_is_started_again_from_the_newest_checkpoint(tmp_path, corpus, undisturbed):
    run_dir = tmp_path / "run"
    with launched(corpus, run_dir, "--processes-per-node", "2") as process:
        wait_for_step(process, run_dir, 10)
        processes_of(run_dir, "basestone.trainer.worker")[1].kill()
        wait_for_step_of_attempt(process, run_dir, 2)
        (agent,) = [
            child
            for child in psutil.Process(process.pid).children()
            if "torch.distributed.run" in child.cmdline()
        ]
        agent.kill()
        said = process.communicate(timeout=180)[0]
        assert process.returncode == 0, said
    assert events_of(run_dir).count("resume") == 2
    assert losses_of(run_dir) == undisturbed
    assert said.count("starting again from step") == 2 and "was killed by SIGKILL" in said


def wait_for_step_of_attempt(process: subprocess.Popen[str], run_dir: Path, attempt: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
        if sum(json.loads(line)["attempt"] == attempt for line in lines) > 5:
            return
        time.sleep(0.02)
    raise AssertionError("it did not start again")


def test_a_stop_saves_and_the_same_launch_goes_on(tmp_path, corpus, undisturbed, basestone):
    run_dir = tmp_path / "runs" / "run"
    (run_dir.parent).mkdir()
    options = ("--on", "torchrun", "--processes-per-node", "2")
    with launched(corpus, run_dir, *options) as process:
        wait_for_step(process, run_dir, 2)
        stopped = basestone("jobs", "stop", run_dir)
        assert stopped.stdout == f"{run_dir}: asked to save and stop after its step\n"
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 75, said
    assert (run_dir / "RESUME").exists() and not (run_dir / "STOP").exists()
    with launched(corpus, run_dir, *options) as process:
        wait_for_step(process, run_dir, len(losses_of(run_dir)) + 1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 75, said
    with launched(corpus, run_dir, *options) as process:
        assert process.wait(timeout=120) == 0
    assert losses_of(run_dir) == undisturbed
    (row,) = json.loads(basestone("jobs", "ls", run_dir.parent, "--json").stdout)
    assert (row["state"], row["saved_step"], row["by"]) == ("complete", STEPS, "torchrun")
    assert "step 60/60" in basestone("jobs", "logs", run_dir).stdout
    assert "error: " in basestone("jobs", "logs", run_dir, "--rank", "7").stderr
    assert basestone("jobs", "stop", run_dir).stdout == f"{run_dir}: complete already, at step 60\n"


def test_what_the_user_must_mend_is_not_started_again(tmp_path, corpus):
    run_dir = tmp_path / "run"
    with launched(corpus, run_dir, "--processes-per-node", "2", "--set", "meter.power_limit_w=300") as process:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 64, said
    assert "power_limit_w = 300: there is no GPU; leave it out" in said
    assert "starting again" not in said


def test_an_endpoint_that_is_taken_is_told_before_anything_starts(tmp_path, corpus, basestone):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            launch(corpus, tmp_path / "run", "--on", "torchrun", "--endpoint", f"127.0.0.1:{port}"),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 64 and f"port {port} is taken on {os.uname().nodename}" in done.stderr


def test_a_launch_that_is_only_checked_trains_nothing(tmp_path, corpus):
    run_dir = tmp_path / "run"
    with launched(corpus, run_dir, "--processes-per-node", "2", "--check") as process:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
    assert "preflight: 1 node(s), 2 rank(s), all-reduce " in said
    assert not run_dir.exists()


def test_a_check_ends_at_once_when_it_is_interrupted_and_leaves_nothing(tmp_path, corpus):
    run_dir = tmp_path / "run"
    with launched(corpus, run_dir, "--processes-per-node", "2", "--check") as process:
        deadline = time.monotonic() + 60
        while not processes_of(run_dir, "basestone.trainer.worker") and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 75, said
    assert "SIGINT: ending the check" in said and "starting again" not in said
    assert not run_dir.exists()


@pytest.mark.slow
def test_a_rank_that_stands_still_is_given_up_and_started_again(tmp_path, corpus, undisturbed):
    """As a node does that has lost power: nobody closes its connections."""
    run_dir = tmp_path / "run"
    with launched(corpus, run_dir, "--processes-per-node", "2", "--set", "run.timeout_s=5") as process:
        wait_for_step(process, run_dir, 10)
        processes_of(run_dir, "basestone.trainer.worker")[1].send_signal(signal.SIGSTOP)
        said = process.communicate(timeout=180)[0]
        assert process.returncode == 0, said
    assert "lost contact with another rank" in said and "starting again from step" in said
    assert losses_of(run_dir) == undisturbed
