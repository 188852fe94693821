"""The command line as tests start it, and what a run left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def environment() -> dict[str, str]:
    """The test's environment without what a launcher would have set, and with buffers as a user has them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "BASESTONE_RENDEZVOUS", "PYTHONUNBUFFERED")
    return {name: value for name, value in os.environ.items() if name not in names} | {"OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "basestone.launch", *map(str, arguments)]


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and any(done >= step for done in _whole_steps(run_dir)):
            return
        time.sleep(0.02)
    output = process.stdout.read() if process.poll() is not None else "still running"
    raise AssertionError(f"step {step} was not reached: {output}")


def _whole_steps(run_dir: Path) -> list[int]:
    text = (run_dir / "metrics.jsonl").read_text()
    lines = text.split("\n")[:-1]
    return [json.loads(line)["step"] for line in lines if '"step"' in line]


def steps_of(run_dir: Path) -> dict[int, dict]:
    """The last line of every step in metrics.jsonl."""
    found = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "step":
            found[record["step"]] = record
    return found


def losses_of(run_dir: Path) -> list[float]:
    """Losses in order of step, at full precision."""
    return [record["loss"] for _, record in sorted(steps_of(run_dir).items())]
