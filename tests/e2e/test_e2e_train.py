"""Training by the command line: uninterrupted, killed, stopped, at another layout, under other launchers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import environment, losses_of, start, steps_of, wait_for_step

pytestmark = pytest.mark.dist


def processes_with(text: str) -> list[str]:
    """Command lines of live processes that mention `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except (OSError, IndexError):
                continue
            if text in line and state != "Z":
                found.append(line)
    return found


def test_trains_and_leaves_what_it_should(trained):
    steps = steps_of(trained)
    assert sorted(steps) == list(range(1, 17))
    assert steps[16]["loss"] < steps[1]["loss"] - 0.3
    assert steps[16]["joules"] > 0 and steps[16]["mfu"] is None
    assert (trained / "COMPLETE").exists() and not (trained / "RESUME").exists()
    ledger = json.loads((trained / "ledger.json").read_text())
    assert ledger["joules_source"] == "user-watts"
    assert ledger["tokens"] == steps[16]["tokens"] == 16 * 8 * 64
    assert ledger["wasted_tokens"] == 0
    # 100 W given, so joules are 100 times the seconds that the processes were there.
    assert ledger["joules"] == pytest.approx(100 * ledger["wall_s"], rel=0.05)
    assert 0 < ledger["train_s"] < ledger["wall_s"]
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == [
        "step_00000008",
        "step_00000012",
        "step_00000016",
    ]
    assert list((trained / "tensorboard").iterdir())
    assert (trained / "logs" / "rank_00001.log").exists()


@pytest.mark.faults
def test_killed_and_resumed_gives_the_same_losses(tmp_path, corpus, trained, basestone):
    run_dir = tmp_path / "run"
    process = start("train", corpus / "run.toml", "--run-dir", run_dir)
    wait_for_step(process, run_dir, 10)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while processes_with(str(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(str(run_dir)) == [], "a killed parent must leave no process behind"
    done = basestone("train", corpus / "run.toml", "--run-dir", run_dir)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stderr
    assert losses_of(run_dir) == losses_of(trained)
    ledger = json.loads((run_dir / "ledger.json").read_text())
    assert ledger["attempts"] == 2
    assert ledger["tokens"] - ledger["wasted_tokens"] == 16 * 8 * 64
    events = [json.loads(line)["event"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert events[0] == "start" and "resume" in events and events[-1] == "complete"


@pytest.mark.faults
def test_sigterm_saves_and_another_layout_goes_on(tmp_path, corpus, trained, forked):
    run_dir = tmp_path / "run"
    process = start("train", corpus / "run.toml", "--run-dir", run_dir, "--set", "checkpoint.every_steps=0")
    wait_for_step(process, run_dir, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped after step" in output and "Traceback" not in output
    assert (run_dir / "RESUME").exists()
    other = ["--set", "parallel.tensor=1", "--set", "parallel.zero=2", "--set", "data.workers=0"]
    done = forked("train", corpus / "run.toml", "--run-dir", run_dir, *other)
    assert done.returncode == 0, done.stderr
    assert not (run_dir / "RESUME").exists()
    assert losses_of(run_dir) == pytest.approx(losses_of(trained), rel=1e-5)


@pytest.mark.faults
def test_sigterm_saves_before_an_evaluation_that_is_due(tmp_path, corpus):
    run_dir = tmp_path / "run"
    changes = ["evaluate.every_steps=1", "checkpoint.every_steps=0", "train.steps=400"]
    process = start(
        "train", corpus / "run.toml", "--run-dir", run_dir, *(w for c in changes for w in ("--set", c))
    )
    wait_for_step(process, run_dir, 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    stop = json.loads((run_dir / "events.jsonl").read_text().splitlines()[-1])
    evaluation = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert (stop["event"], evaluation["kind"]) == ("stop", "eval")
    assert stop["step"] == evaluation["step"] and stop["time"] <= evaluation["time"]


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_python"],
}


@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_is_a_worker_under_other_launchers(tmp_path, corpus, trained, launcher):
    run_dir = tmp_path / "run"
    words = ["train", str(corpus / "run.toml"), "--run-dir", str(run_dir), "--set", "train.steps=4"]
    script = tmp_path / "basestone"  # what the installed command is
    script.write_text(f"#!{sys.executable}\nfrom basestone.launch.cli import main\nmain()\n")
    script.chmod(0o755)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    port = 20000 + os.getpid() % 20000
    address = ["--master-port" if launcher == "torchrun" else "--master_port", str(port)]
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher][:2], *address, *LAUNCHERS[launcher][2:], str(script), *words],
        env=environment() | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses_of(run_dir) == losses_of(trained)[:4]
