"""Saves beside training, on storage that is full, slow, hung or wrong, and runs that are asked to stop."""

from __future__ import annotations

import collections
import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import losses_of
from faults import after, before
from whole_run import Fault, train

from basestone.trainer import engine, evaluate, feed, saving
from basestone.trainer.checkpoint import places, saver, share, writer
from basestone.trainer.checkpoint.format import steps_in
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.errors import CheckpointError, ConfigError, NumericsError, Stopped
from basestone.trainer.forks import RankDied

pytestmark = [pytest.mark.dist, pytest.mark.faults]


def on_rank(rank: int, install: Callable[[], None]) -> Fault:
    """Install a fault on one rank."""
    return lambda own: install() if own == rank else None


def events_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def saved(run_dir: Path) -> list[int]:
    """Steps that are there, all of them good; and nothing else is."""
    found = steps_in(run_dir / "checkpoints")
    assert len(list((run_dir / "checkpoints").iterdir())) == len(found)
    assert all(Reader(path).verify() == [] for _, path in found)
    return [step for step, _ in found]


def fail(number: int) -> Callable[[], None]:
    def act() -> None:
        raise OSError(number, os.strerror(number), "/the/file")

    return act


# ---- asked to stop ------------------------------------------------------------------------------------------------

MOMENTS = {
    "data": lambda act: before(feed.Feed, "read", act, 4),
    "forward": lambda act: before(engine.Engine, "forward_backward", act, 4),
    "update": lambda act: after(engine.Engine, "update", act, 4),
    "save": lambda act: before(share.Share, "write", act, 2),  # in the thread that writes
    "evaluate": lambda act: before(evaluate.HeldOut, "measure", act, 1),
}


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("where", MOMENTS)
def test_sigterm(tmp_path, corpus, reference, where):
    run_dir = tmp_path / "run"
    with pytest.raises(Stopped) as caught:
        train(corpus, run_dir, "evaluate.every_steps=3", fault=on_rank(1, lambda: MOMENTS[where](ask_to_stop)))
    assert caught.value.exit_code == 75
    (newest, *_) = saved(run_dir)
    assert (run_dir / "RESUME").read_text() == f"step {newest}\n" and 3 < newest <= 6
    assert events_of(run_dir)[-1]["event"] == "stop"
    train(corpus, run_dir)
    assert losses_of(run_dir) == reference


def test_second_signal(tmp_path, corpus, reference):
    """The second one leaves at once, in the middle of a save that never ends; the save before it is good."""
    run_dir = tmp_path / "run"

    def twice() -> None:
        ask_to_stop()
        threading.Timer(0.5, ask_to_stop).start()
        time.sleep(60)

    with pytest.raises(RankDied, match=r"exit code 75"):
        train(corpus, run_dir, fault=on_rank(0, lambda: before(writer.RankWriter, "write", twice, 55)))
    assert [step for step, _ in steps_in(run_dir / "checkpoints")] == [2]
    train(corpus, run_dir)
    assert losses_of(run_dir) == reference


# ---- storage ------------------------------------------------------------------------------------------------------


def slow(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def test_exit_waits_for_writer(tmp_path, corpus, reference):
    """The save of step 6 is still being written when the last step is done."""
    run_dir = tmp_path / "run"
    train(corpus, run_dir, fault=on_rank(1, lambda: before(share.Share, "write", slow(2.0), 3)))
    assert saved(run_dir) == [8, 6, 4] and losses_of(run_dir) == reference


def test_slow_disk_one_in_flight(tmp_path, corpus, reference):
    """Training goes on beside a slow save; the one that is due meanwhile is left out, and said to be."""
    run_dir = tmp_path / "run"

    def install(rank: int) -> None:
        saving.LONGEST_WAIT_S = 0.05
        if rank == 1:
            before(share.Share, "write", slow(2.0), 1)

    train(corpus, run_dir, fault=install)
    events = [(event["event"], event["step"]) for event in events_of(run_dir)]
    assert ("save_skipped", 4) in events and ("save", 2) in events and ("save", 8) in events
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    waited_s = [record["phase_s"].get("checkpoint", 0.0) for record in records if record["kind"] == "step"]
    assert max(waited_s[2:6]) < 1.0, "no step waited for the disk"
    assert losses_of(run_dir) == reference


@pytest.mark.parametrize("writes", [1, 99])
def test_hung_writer(tmp_path, corpus, writes):
    """Writes that never return: given up and told, training goes on; where all hang the run ends, and does not wait."""
    run_dir = tmp_path / "run"

    def install(rank: int) -> None:
        saving.LONGEST_WAIT_S, saver.LIMIT_S = 0.05, 0.5
        real, calls = share.Share.write, [0]

        def write(self: Any, *more: Any) -> Any:
            calls[0] += 1
            if rank == 1 and calls[0] <= writes:
                time.sleep(1000)
            return real(self, *more)

        share.Share.write = write  # type: ignore[method-assign]

    started_s, words = time.monotonic(), ["train.steps=60", "checkpoint.max_failed_saves=2"]
    if writes == 1:
        train(corpus, run_dir, *words, fault=install)
        assert saved(run_dir)[0] == 60 and len(losses_of(run_dir)) == 60
    else:
        with pytest.raises(
            CheckpointError, match=r"rank 1: has not come further for \d+ s; is the storage well\?"
        ):
            train(corpus, run_dir, *words, fault=install)
        assert saved(run_dir) == [] and (run_dir / "FAILED").exists()
    assert time.monotonic() - started_s < 60
    events = [event["event"] for event in events_of(run_dir)]
    assert "save_failed" in events and "save_skipped" in events


def test_disk_full_one_rank(tmp_path, corpus, reference):
    run_dir = tmp_path / "run"
    train(corpus, run_dir, fault=on_rank(1, lambda: before(writer.RankWriter, "write", fail(errno.ENOSPC), 55)))
    assert saved(run_dir) == [8, 6, 2] and losses_of(run_dir) == reference
    (failed,) = [event for event in events_of(run_dir) if event["event"] == "save_failed"]
    assert (
        failed["step"] == 4
        and "rank 1: storage failed: No space left on device: /the/file" in failed["message"]
    )
    assert (run_dir / "latest").read_text() == "step_00000008\n"


CUT_SHORT = {"MANIFEST.json": [8, 6, 2], "index.json": [8, 6, 2], "latest": [8, 6, 4]}


@pytest.mark.parametrize(("name", "left"), CUT_SHORT.items())
def test_disk_full_in_commit(tmp_path, corpus, reference, name, left):
    run_dir, owner = tmp_path / "run", saver if name == "latest" else writer

    def install() -> None:
        before(owner, "write_atomic", fail(errno.ENOSPC), 2, lambda path, *_: path.name == name)

    train(corpus, run_dir, fault=on_rank(0, install))
    assert saved(run_dir) == left and losses_of(run_dir) == reference
    failed = [event["step"] for event in events_of(run_dir) if event["event"] == "save_failed"]
    assert failed == ([] if name == "latest" else [4])


def test_saves_that_fail_in_a_row_stop_the_run(tmp_path, corpus):
    run_dir = tmp_path / "run"

    def install() -> None:
        for number in range(2, 9):
            before(share.Share, "write", fail(errno.EIO), number)

    with pytest.raises(CheckpointError, match=r"2 saves in a row have failed .*rank 1: .*Input/output error"):
        train(corpus, run_dir, "train.steps=12", "checkpoint.max_failed_saves=2", fault=on_rank(1, install))
    assert saved(run_dir) == [2] and (run_dir / "FAILED").exists()


def test_the_last_save_must_not_fail(tmp_path, corpus):
    run_dir = tmp_path / "run"
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 8 was not written: rank 1: .*No space left"
    ):
        train(corpus, run_dir, fault=on_rank(1, lambda: before(share.Share, "write", fail(errno.ENOSPC), 4)))
    assert saved(run_dir) == [6, 4, 2] and not (run_dir / "COMPLETE").exists()


def test_free_space(tmp_path, corpus, reference):
    """A save that does not fit is not begun, and training goes on; where none fits, nothing begins."""
    run_dir, usage = tmp_path / "run", collections.namedtuple("usage", "total used free")
    free = {"bytes": [10**12, 10**12, 1000]}  # at the start, at step 2, at step 4; then much

    def install() -> None:
        def disk_usage(_: Path) -> Any:
            return usage(10**12, 0, free["bytes"].pop(0) if free["bytes"] else 10**12)

        shutil.disk_usage = disk_usage

    train(corpus, run_dir, fault=on_rank(0, install))
    assert saved(run_dir) == [8, 6, 2] and losses_of(run_dir) == reference
    (failed,) = [event for event in events_of(run_dir) if event["event"] == "save_failed"]
    assert (
        failed["step"] == 4
        and "a checkpoint needs" in failed["message"]
        and "0.00 GB are free" in failed["message"]
    )
    free["bytes"] = [1000]
    with pytest.raises(ConfigError, match=r"checkpoints: a checkpoint needs .* free some, lower"):
        train(corpus, tmp_path / "other", fault=on_rank(0, install))
    assert not (tmp_path / "other" / "metrics.jsonl").read_text()


def test_read_only_run_dir(tmp_path, corpus):
    def install() -> None:
        before(os, "open", fail(errno.EROFS), 1, lambda path, *_: Path(path).name == "lock")

    with pytest.raises(ConfigError, match=r"run: cannot be written .*Read-only file system.*choose another"):
        train(corpus, tmp_path / "run", fault=on_rank(0, install))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_eio_on_load(tmp_path, corpus, reference):
    """A block of the newest checkpoint cannot be read on one rank: all ranks take the one before."""
    run_dir = tmp_path / "run"
    train(corpus, run_dir, "train.steps=6")

    def install() -> None:
        real = open

        def opened(path: Path, *more: Any) -> Any:
            if Path(path).name == "rank_00001.bin" and "step_00000006" in str(path):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(path, *more)

        places.open = opened  # type: ignore[attr-defined]

    train(corpus, run_dir, fault=on_rank(1, install))
    resumed = [event for event in events_of(run_dir) if event["event"] == "resume"]
    assert resumed[0]["step"] == 4 and losses_of(run_dir) == reference


def test_all_bad_is_an_error(tmp_path, corpus):
    run_dir = tmp_path / "run"
    train(corpus, run_dir)
    for _, path in steps_in(run_dir / "checkpoints"):
        body = bytearray((path / "rank_00000.bin").read_bytes())
        body[len(body) // 3] ^= 4
        (path / "rank_00000.bin").write_bytes(body)
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint is good, .* does not start over.*move"):
        train(corpus, run_dir)
    assert (run_dir / "FAILED").exists() and [step for step, _ in steps_in(run_dir / "checkpoints")] == [
        8,
        6,
        4,
    ]


# ---- what belongs together ----------------------------------------------------------------------------------------


def test_resume_mismatch(tmp_path, corpus):
    """Another model, batch, data and optimizer: every difference in one message, before any weights are read."""
    run_dir, other = tmp_path / "run", tmp_path / "shards"
    train(corpus, run_dir, "train.steps=2")
    changes = [
        "model.ffn_hidden_size=128",
        "train.global_batch=16",
        "train.dtype=bf16",
        "optimizer.decay_all=true",
        f"data.train={corpus / 'shards' / 'heldout'}",
    ]
    with pytest.raises(ConfigError) as caught:
        train(corpus, run_dir, *changes)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the checkpoint belongs to another run:" and "choose another --run-dir" in lines[-1]
    for word in (
        "model.ffn_hidden_size",
        "train.global_batch: 8 in",
        "train.dtype",
        "decay_all",
        "content of",
    ):
        assert sum(word in line for line in lines) == 1, word
    assert len(lines) == 7 and not other.exists()


def test_numbers_that_are_not_finite_let_the_save_end(tmp_path, corpus):
    """The loss of step 5 is not finite while the save of step 4 is being written: it is there afterwards."""
    run_dir = tmp_path / "run"

    def install(rank: int) -> None:
        real, calls = engine.Engine.forward_backward, [0]

        def forward_backward(self: Any, *more: Any) -> Any:
            calls[0] += 1
            return real(self, *more) * (float("nan") if calls[0] == 5 else 1.0)

        engine.Engine.forward_backward = forward_backward  # type: ignore[method-assign]
        if rank == 1:
            before(share.Share, "write", slow(1.5), 2)

    with pytest.raises(
        NumericsError, match=r"step 5: the loss is not finite .*newest checkpoint: step_00000004"
    ):
        train(corpus, run_dir, fault=install)
    assert saved(run_dir) == [4, 2]
