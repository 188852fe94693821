"""Storage that fails while a run goes on: exit code 74, one clear message, and the run directory says why it ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from streams import open_stream

from basestone.data.errors import DataError

pytestmark = [pytest.mark.dist, pytest.mark.faults]


def run_on_a_full_disk(name: str, corpus: Path, run_dir: Path, forked) -> None:
    """Train where every write to one file of the run directory finds no space."""
    run_dir.mkdir()
    (run_dir / name).symlink_to("/dev/full")
    done = forked("train", corpus / "run.toml", "--run-dir", run_dir, "--set", "meter.tensorboard=false")
    assert done.returncode == 74, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: storage failed: No space left on device: ")
    assert said[0].endswith("; check free space, permissions and the state of the storage")
    assert name.lstrip(".") in said[0]
    assert "No space left on device" in (run_dir / "FAILED").read_text()


def test_a_full_disk_at_a_record(tmp_path, corpus, forked):
    run_dir = tmp_path / "run"
    run_on_a_full_disk("metrics.jsonl", corpus, run_dir, forked)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "fail"]
    assert "metrics.jsonl" in events[-1]["message"]
    assert json.loads((run_dir / "ledger.json").read_text())["attempts"] == 1


def test_a_full_disk_at_the_ledger(tmp_path, corpus, forked):
    run_on_a_full_disk(".ledger.json", corpus, tmp_path / "run", forked)


def batches(shards: Path, tokenizer: Path, seed: int, reader: int) -> int:
    """Count what a reader of two gives before it comes to the damage."""
    stream = open_stream(
        (shards,),
        tokenizer,
        sequence_length=64,
        global_batch=8,
        seed=seed,
        reader=reader,
        num_readers=2,
    )
    for number in range(400):
        try:
            stream.next_batch()
        except DataError:
            return number
    return 400


def test_the_rank_that_knows_why_is_heard(tmp_path, corpus, forked):
    """Rank 1 reads a damaged shard; rank 0, which owns the records, only loses contact with it."""
    damaged, run_dir = tmp_path / "train", tmp_path / "run"
    shutil.copytree(corpus / "shards" / "train", damaged)
    shard = next(damaged.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    tokenizer = corpus / "tokenizer.model"
    seed = next(
        seed
        for seed in range(99)
        if batches(damaged, tokenizer, seed, 1) < batches(damaged, tokenizer, seed, 0)
    )
    words = [f"data.train={damaged}", "parallel.tensor=1", "train.steps=400", f"run.seed={seed}"]
    words = [word for change in words for word in ("--set", change)]
    done = forked("train", corpus / "run.toml", "--run-dir", run_dir, *words)
    assert done.returncode == 76, done.stderr
    assert "rank 1 failed first" in done.stderr and shard.name in done.stderr.splitlines()[-1]
    text = (run_dir / "FAILED").read_text()
    assert ": rank 1: " in text and shard.name in text
    event = json.loads((run_dir / "events.jsonl").read_text().splitlines()[-1])
    assert event["event"] == "fail" and event["message"] == text.strip().partition(": ")[2]
