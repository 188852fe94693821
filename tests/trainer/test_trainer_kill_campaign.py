"""Kills at random moments lose nothing but the newest save: a short campaign here, the long one as a slow test."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import environment

pytestmark = pytest.mark.faults
PROGRAM = Path(__file__).parent.parent / "kill_campaign.py"


def start(out: Path, *arguments: object, before: str = "") -> subprocess.Popen[str]:
    """Start a campaign; `before` is a fault that is planted in it."""
    line = [str(PROGRAM)]
    if before:
        imports = "import sys; from basestone.trainer.checkpoint import saver, share; import kill_campaign"
        line = ["-c", f"{imports}\n{before}\nsys.exit(kill_campaign.main(sys.argv[1:]))"]
    return subprocess.Popen(
        [sys.executable, *line, str(out), *map(str, arguments)],
        env=environment(),
        cwd=PROGRAM.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def records(out: Path) -> list[dict[str, Any]]:
    file = out / "campaign.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_campaign_that_is_killed_itself_goes_on_and_finds_nothing_wrong(tmp_path):
    arguments = ("--storage", 15, "--runs", 0)
    first = start(tmp_path, *arguments)
    while len(records(tmp_path)) < 4 and first.poll() is None:
        time.sleep(0.02)
    children = []
    while not children and first.poll() is None:
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    first.kill()
    first.wait()
    done = records(tmp_path)
    assert 4 <= len(done) < 15
    again = start(tmp_path, *arguments)
    output = again.communicate()[0]
    assert again.returncode == 0, output
    every = records(tmp_path)
    assert every[: len(done)] == done and [record["number"] for record in every] == list(range(15))
    assert output.splitlines()[-1].startswith("15 storage kills: ") and "; 0 with problems" in output
    assert sum(record["in_flight"] for record in every) > 0
    start(tmp_path, *arguments).wait()
    assert records(tmp_path) == every, "nothing is left to do"
    assert children and not any(Path(f"/proc/{child}").exists() for child in children), (
        "it outlived its campaign"
    )


TOO_SOON = """
import time
real = share.Staging._copy
def copy(self, *arguments):
    self._copied.set()
    time.sleep(0.02)
    return real(self, *arguments)
share.Staging._copy = copy
"""
PLANTED = {
    "training goes on before all is copied": (TOO_SOON, "is not of step"),
    "a prune that leaves nothing": ("saver.kept = lambda *_: set()", "the newest step is 0"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_campaign_finds_what_is_planted(tmp_path, name):
    fault, text = PLANTED[name]
    # A seed by which all six are asynchronous, and live for several saves.
    process = start(tmp_path, "--storage", 6, "--runs", 0, "--seed", 211, before=fault)
    output = process.communicate()[0]
    assert process.returncode == 1, output
    found = "\n".join(problem for record in records(tmp_path) for problem in record["problems"])
    assert text in found
    assert list(tmp_path.glob("bad-storage-*")), "what was wrong stays to be looked at"


@pytest.mark.slow
def test_a_whole_campaign_finds_nothing_wrong(tmp_path):
    process = start(tmp_path, "--storage", 200, "--runs", 30)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    storage, runs = output.splitlines()[-2:]
    assert storage.startswith("200 storage kills: ") and runs.startswith("30 whole runs with ")
