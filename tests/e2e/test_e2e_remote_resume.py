"""A run whose checkpoints are copied to an S3 server goes on from there, wherever its own directory is."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from commands import losses_of
from faults import before, kill_self
from servers import S3Proxy, s3_endpoint, serving_s3
from whole_run import killed, train

from basestone.trainer import engine
from basestone.trainer.checkpoint import copier, restorer
from basestone.trainer.checkpoint.format import steps_in
from basestone.trainer.checkpoint.opening import steps_at
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.errors import CheckpointError, ConfigError

pytestmark = [pytest.mark.dist, pytest.mark.faults]


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with serving_s3() as port, s3_endpoint(f"http://127.0.0.1:{port}") as files:
        files.mkdir("runs")
        yield port


def copies_at(place: str) -> list[int]:
    found = steps_at(f"{place}/checkpoints")
    assert all(Reader(copy).verify() == [] for _, copy in found)
    return [step for step, _ in found]


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_lost_run_directory_goes_on_from_the_copies(tmp_path, corpus, reference, server):
    run_dir, place = tmp_path / "run", "s3://runs/lost"
    words = [f"checkpoint.remote={place}"]
    train(corpus, run_dir, *words, "train.steps=4")
    assert copies_at(place)[0] == 4
    told = events_of(run_dir, "remote")
    assert told[-1]["message"] == "step_00000004 is copied"
    shutil.copy(run_dir / "metrics.jsonl", tmp_path / "metrics.jsonl")
    shutil.rmtree(run_dir)
    train(corpus, run_dir, *words)
    assert events_of(run_dir, "resume")[0]["message"].startswith(
        f"at step 4 of {place}/checkpoints/step_00000004 on "
    )
    assert losses_of(run_dir) == reference[4:]
    assert copies_at(place)[0] == 8


def test_a_bad_checkpoint_is_made_good_by_its_copy(tmp_path, corpus, reference, server):
    run_dir, place = tmp_path / "run", "s3://runs/bad"
    words = [f"checkpoint.remote={place}"]
    train(corpus, run_dir, *words, "train.steps=4")
    path = run_dir / "checkpoints" / "step_00000004" / "rank_00001.bin"
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 16
    path.write_bytes(body)
    train(corpus, run_dir, *words)
    assert losses_of(run_dir) == reference
    assert f"of {place}" in events_of(run_dir, "resume")[0]["message"]


def test_a_line_that_was_left_does_not_come_back_from_the_copies(tmp_path, corpus, reference, server):
    """Back to step 2, then killed after a save: neither directory nor copies know the later steps any more."""
    run_dir, place = tmp_path / "run", "s3://runs/left"
    words = [f"checkpoint.remote={place}"]
    train(corpus, run_dir, *words, "checkpoint.keep_last=9")
    assert copies_at(place)[0] == 8
    back = run_dir / "checkpoints" / "step_00000002"

    def prepare(rank: int) -> None:
        if rank == 0:  # in the last step, when step 4 is saved and copied
            before(engine.Engine, "forward_backward", wait_for_copy, 6)
            before(engine.Engine, "update", kill_self, 6)

    changes = ("checkpoint.keep_last=9", "checkpoint.every_steps=4")
    assert killed(corpus, run_dir, *words, *changes, resume=back, fault=prepare)
    assert [step for step, _ in steps_in(run_dir / "checkpoints")] == [4, 2]
    assert copies_at(place)[0] == 4
    train(corpus, run_dir, *words, "checkpoint.keep_last=9")
    assert losses_of(run_dir) == reference and copies_at(place)[0] == 8


def test_later_copies_of_a_line_that_was_left_are_not_gone_on_from(tmp_path, corpus, reference, server):
    """Killed before its first copy could set the later ones aside: the run's own checkpoints say where it is."""
    run_dir, place = tmp_path / "run", "s3://runs/late"
    words = [f"checkpoint.remote={place}", "checkpoint.keep_last=9"]
    train(corpus, run_dir, *words)

    def prepare(rank: int) -> None:
        copier.copy_step = lambda *_: time.sleep(60)  # in reach, but slow
        if rank == 0:
            before(engine.Engine, "update", kill_self, 5)

    assert killed(corpus, run_dir, *words, resume=run_dir / "checkpoints" / "step_00000002", fault=prepare)
    (newest, _), *_ = steps_in(run_dir / "checkpoints")
    assert newest in (4, 6) and copies_at(place)[0] == 8
    train(corpus, run_dir, *words)
    assert [event["step"] for event in events_of(run_dir, "resume")] == [2, newest]
    assert losses_of(run_dir) == reference


def test_copies_of_another_run_are_refused(tmp_path, corpus, server):
    place = "checkpoint.remote=s3://runs/shared"
    train(corpus, tmp_path / "one", place, "train.steps=4")
    train(corpus, tmp_path / "two", "train.steps=6")
    path = tmp_path / "two" / "checkpoints" / "step_00000004" / "rank_00000.bin"
    for step in (2, 4, 6):
        path = tmp_path / "two" / "checkpoints" / f"step_{step:08d}" / "rank_00000.bin"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(
        ConfigError, match=r"holds the copies of another run; give every run a place of its own"
    ):
        train(corpus, tmp_path / "two", place)


def wait_for_copy() -> None:
    """Wait until the step that was saved anew is copied, and the later copies do not count any more."""
    deadline_s = time.monotonic() + 30
    # Not by copies_at: it reads what the copier is setting aside.
    while time.monotonic() < deadline_s and steps_at("s3://runs/left/checkpoints")[0][0] != 4:
        time.sleep(0.1)


def test_copies_that_fail_do_not_touch_the_run(tmp_path, corpus, reference, server):
    run_dir, proxy = tmp_path / "run", S3Proxy(server)
    proxy.fault_for = lambda method, path: 403 if method == "PUT" else None
    with s3_endpoint(proxy.url), closing(proxy):
        train(corpus, run_dir, "checkpoint.remote=s3://runs/never")
    assert losses_of(run_dir) == reference and (run_dir / "COMPLETE").exists()
    assert all("is copied" not in event["message"] for event in events_of(run_dir, "remote"))
    assert events_of(run_dir, "remote")


def test_copies_out_of_reach_are_no_fresh_start(tmp_path, corpus, reference, server, caplog):
    run_dir = tmp_path / "run"
    words = ["checkpoint.remote=s3://runs/away"]
    with s3_endpoint("http://127.0.0.1:9"):  # nobody listens there

        def quickly(_: int) -> None:
            restorer.steps_at.__globals__["RangeReader"].persist = refuse

        with pytest.raises(CheckpointError, match=r"s3://runs/away/checkpoints"):
            train(corpus, run_dir, *words, fault=quickly)
    assert not list((run_dir / "checkpoints").iterdir())


def refuse(self: Any, where: str, read: Any, *more: Any, **words: Any) -> Any:
    """Try once: the waits between tries are not what is tested here."""
    from basestone.data.errors import DataStorageError

    try:
        return read()
    except Exception as error:
        raise DataStorageError(f"{where}: {error}") from error
