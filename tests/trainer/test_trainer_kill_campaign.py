"""Kills at random moments lose nothing but the newest save: a short campaign here, the long one as a slow test."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import kill_campaign
import pytest
from commands import environment

from basestone.trainer.checkpoint import saver, share

pytestmark = pytest.mark.faults
PROGRAM = Path(kill_campaign.__file__)


def start(out: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start a campaign by its command line."""
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(out), *map(str, arguments)],
        env=environment(),
        cwd=PROGRAM.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def fork(out: Path, *arguments: object, fault: Callable[[], None] = lambda: None) -> BaseProcess:
    """Fork a campaign from this process, which has imported everything; it writes to OUT/output.txt."""

    def campaign() -> None:
        fault()
        with open(out / "output.txt", "w") as file, contextlib.redirect_stdout(file):
            code = kill_campaign.main([str(out), *map(str, arguments)])
        sys.exit(code)

    process = multiprocessing.get_context("fork").Process(target=campaign)
    process.start()
    return process


def ended(process: BaseProcess, out: Path) -> tuple[int | None, str]:
    """Wait for a forked campaign; give its exit code and its output."""
    process.join()
    return process.exitcode, (out / "output.txt").read_text()


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
    first = fork(tmp_path, *arguments)
    while len(records(tmp_path)) < 4 and first.is_alive():
        time.sleep(0.02)
    children = []
    while not children and first.is_alive():
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    first.kill()
    first.join()
    done = records(tmp_path)
    assert 4 <= len(done) < 15
    code, output = ended(fork(tmp_path, *arguments), tmp_path)
    assert code == 0, output
    every = records(tmp_path)
    assert every[: len(done)] == done and [record["number"] for record in every] == list(range(15))
    assert output.splitlines()[-1].startswith("15 storage kills: ") and "; 0 with problems" in output
    assert sum(record["in_flight"] for record in every) > 0
    once_more = start(tmp_path, *arguments)
    assert once_more.communicate()[0] == output and once_more.returncode == 0
    assert records(tmp_path) == every, "nothing is left to do"
    assert children and not any(Path(f"/proc/{child}").exists() for child in children), (
        "it outlived its campaign"
    )


def go_on_too_soon() -> None:
    real = share.Staging._copy

    def copy(self: Any, *arguments: Any) -> Any:
        self._copied.set()
        time.sleep(0.02)
        return real(self, *arguments)

    share.Staging._copy = copy  # type: ignore[method-assign]


def prune_all() -> None:
    saver.kept = lambda *_: set()  # type: ignore[assignment]


PLANTED = {
    "training goes on before all is copied": (go_on_too_soon, "is not of step"),
    "a prune that leaves nothing": (prune_all, "the newest step is 0"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_campaign_finds_what_is_planted(tmp_path, name):
    fault, text = PLANTED[name]
    # A seed by which all six are asynchronous, and live for several saves.
    code, output = ended(fork(tmp_path, "--storage", 6, "--runs", 0, "--seed", 211, fault=fault), tmp_path)
    assert code == 1, output
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
