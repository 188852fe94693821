"""Pipelines by the command line: the same run as in other layouts, and an end when one rank dies."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from commands import losses_of
from test_e2e_train import processes_with, start, wait_for_step

pytestmark = pytest.mark.dist
PIPELINE = ["--set", "parallel.tensor=1", "--set", "parallel.pipeline=2", "--set", "train.micro_batch=2"]


def evaluations(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "eval"]


def test_a_pipeline_takes_up_a_tensor_parallel_run(tmp_path, corpus, trained, forked):
    run_dir = tmp_path / "run"
    process = start("train", corpus / "run.toml", "--run-dir", run_dir)
    wait_for_step(process, run_dir, 6)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    done = forked("train", corpus / "run.toml", "--run-dir", run_dir, *PIPELINE)
    assert done.returncode == 0, done.stderr
    assert "1F1B over layers 1 | 1, bubble 20%" in done.stderr
    assert losses_of(run_dir) == pytest.approx(losses_of(trained), rel=1e-5)
    assert evaluations(run_dir)[-1] == pytest.approx(evaluations(trained)[-1], rel=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_a_pipeline_at_once(tmp_path, corpus, rank):
    run_dir = tmp_path / "run"
    process = start("train", corpus / "run.toml", "--run-dir", run_dir, *PIPELINE, "--set", "train.steps=4000")
    wait_for_step(process, run_dir, 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())
    os.kill(int(victim), signal.SIGKILL)
    killed_s = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed_s < 15
    assert process.returncode == 1
    assert f"error: rank {rank} was killed by SIGKILL" in output
    assert "Traceback" not in output and output.count("was killed by") == 1
    assert processes_with(str(run_dir)) == []
