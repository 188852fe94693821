"""Storage that fails while a run goes on: exit code 74, one clear message, and the run directory says why it ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.faults]


def run_on_a_full_disk(name: str, corpus: Path, run_dir: Path, basestone) -> None:
    """Train where every write to one file of the run directory finds no space."""
    run_dir.mkdir()
    (run_dir / name).symlink_to("/dev/full")
    done = basestone("train", corpus / "run.toml", "--run-dir", run_dir, "--set", "meter.tensorboard=false")
    assert done.returncode == 74, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: storage failed: No space left on device: ")
    assert said[0].endswith("; check free space, permissions and the state of the storage")
    assert name.lstrip(".") in said[0]
    assert "No space left on device" in (run_dir / "FAILED").read_text()


def test_a_full_disk_at_a_record(tmp_path, corpus, basestone):
    run_dir = tmp_path / "run"
    run_on_a_full_disk("metrics.jsonl", corpus, run_dir, basestone)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "fail"]
    assert "metrics.jsonl" in events[-1]["message"]
    assert json.loads((run_dir / "ledger.json").read_text())["attempts"] == 1


def test_a_full_disk_at_the_ledger(tmp_path, corpus, basestone):
    run_on_a_full_disk(".ledger.json", corpus, tmp_path / "run", basestone)
