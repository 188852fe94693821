"""Ranks killed at any moment of a run: the same command goes on from the newest good checkpoint, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import whole_run
from commands import losses_of
from faults import after, before, kill_self
from whole_run import killed, train

from basestone.trainer import engine, feed
from basestone.trainer.checkpoint import saver, share, tensors, writer
from basestone.trainer.checkpoint.format import steps_in
from basestone.trainer.checkpoint.reader import Reader

pytestmark = [pytest.mark.dist, pytest.mark.faults]


def named(text: str) -> Callable[..., bool]:
    """Like calls whose first argument is a path with this in its name."""
    return lambda path, *_: text in Path(path).name


# The second save of a run, at each of its points; what rank 0 alone does is one case.
POINTS: dict[str, tuple[tuple[int, ...], Callable[[Callable[[], None]], None]]] = {
    "begin": ((0,), lambda act: before(saver.Saver, "_prepare", act, 2)),
    "snapshot": ((0, 1), lambda act: before(share.Staging, "_copy", act, 2)),
    "mid_file": ((0, 1), lambda act: before(writer.RankWriter, "write", act, 55)),
    "after_file": ((0, 1), lambda act: after(share.Share, "write", act, 2)),
    "commit": ((0,), lambda act: before(saver, "commit", act, 2)),
    "before_manifest": ((0,), lambda act: before(writer, "write_atomic", act, 2, named("MANIFEST"))),
    "after_manifest": ((0,), lambda act: before(os, "rename", act, 2, named(".tmp-step"))),
    "after_rename": ((0,), lambda act: before(saver.Saver, "_hint", act, 2)),
    "before_latest": ((0,), lambda act: before(os, "replace", act, 2, named(".latest"))),
    "after_latest": ((0,), lambda act: before(saver.Saver, "_prune", act, 2)),
    "forward": ((0, 1), lambda act: before(engine.Engine, "forward_backward", act, 6)),
    "update": ((0, 1), lambda act: before(engine.Engine, "update", act, 5)),
    "data": ((0, 1), lambda act: before(feed.Feed, "read", act, 6)),
}
THREAD = ("snapshot", "mid_file", "after_file")  # in the thread of a rank that writes
CASES = [(point, rank) for point, (ranks, _) in POINTS.items() for rank in ranks]


def fault_at(point: str, rank: int) -> whole_run.Fault:
    def prepare(own: int) -> None:
        if own == rank:
            POINTS[point][1](kill_self)

    return prepare


@pytest.mark.parametrize(("point", "rank"), [case for case in CASES if case[0] not in THREAD])
def test_kill_in_save(tmp_path, corpus, reference, point, rank):
    goes_on(tmp_path / "run", corpus, reference, point, rank)


@pytest.mark.parametrize(("point", "rank"), [case for case in CASES if case[0] in THREAD])
def test_kill_in_async_writer(tmp_path, corpus, reference, point, rank):
    goes_on(tmp_path / "run", corpus, reference, point, rank)


def goes_on(run_dir: Path, corpus: Path, reference: list[float], point: str, rank: int) -> None:
    assert killed(corpus, run_dir, fault=fault_at(point, rank))
    for _, path in steps_in(run_dir / "checkpoints"):
        assert Reader(path).verify() == []
    train(corpus, run_dir)
    assert losses_of(run_dir) == reference


def test_kill_in_prune(tmp_path, corpus, reference):
    run_dir = tmp_path / "run"
    changes = ("checkpoint.keep_last=1",)

    def prepare(rank: int) -> None:
        if rank == 0:
            before(shutil, "rmtree", kill_self, 1, named(".trash-step_00000002"))

    assert killed(corpus, run_dir, *changes, fault=prepare)
    assert [step for step, _ in steps_in(run_dir / "checkpoints")] == [4]
    assert (run_dir / "checkpoints" / ".trash-step_00000002").exists()
    train(corpus, run_dir, *changes)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000008"]
    assert losses_of(run_dir) == reference


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_in_load(tmp_path, corpus, reference, rank):
    run_dir = tmp_path / "run"
    assert killed(corpus, run_dir, fault=fault_at("forward", 0))
    held = {path.name: Reader(path).state() for _, path in steps_in(run_dir / "checkpoints")}

    def prepare(own: int) -> None:
        if own == rank:
            before(tensors.CheckpointTensors, "fill", kill_self, 5)

    assert killed(corpus, run_dir, fault=prepare)
    assert {path.name: Reader(path).state() for _, path in steps_in(run_dir / "checkpoints")} == held
    train(corpus, run_dir)
    assert losses_of(run_dir) == reference


@pytest.mark.parametrize("point", ["load", "step", "save"])
def test_kill_in_rollback(tmp_path, corpus, reference, point):
    """Going back by hand to a step, killed on the way: the same command goes back again."""
    run_dir = tmp_path / "run"
    train(corpus, run_dir)

    def prepare(rank: int) -> None:
        if rank == 1:
            owner, name, number = {
                "load": (tensors.CheckpointTensors, "fill", 5),
                "step": (engine.Engine, "update", 1),
                "save": (share.Share, "write", 1),
            }[point]
            before(owner, name, kill_self, number)

    back = run_dir / "checkpoints" / "step_00000004"
    assert killed(corpus, run_dir, resume=back, fault=prepare)
    train(corpus, run_dir, resume=back)
    assert losses_of(run_dir) == reference
    assert [step for step, _ in steps_in(run_dir / "checkpoints")] == [8, 6, 4]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len([record for record in records if record["kind"] == "step" and record["step"] == 8]) == 2


def test_a_command_with_resume_goes_on_when_it_is_given_again(tmp_path, corpus, reference):
    """Back to step 2, stopped behind a save: the same command goes on, and not back again; another step is another."""
    run_dir = tmp_path / "run"
    train(corpus, run_dir, "checkpoint.keep_last=9")
    back = run_dir / "checkpoints" / "step_00000002"

    def prepare(rank: int) -> None:
        if rank == 1:
            before(engine.Engine, "update", kill_self, 5)

    assert killed(corpus, run_dir, "checkpoint.keep_last=9", resume=back, fault=prepare)
    newest = steps_in(run_dir / "checkpoints")[0][0]
    assert newest in (4, 6)
    train(corpus, run_dir, "checkpoint.keep_last=9", resume=back)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [2, newest]
    assert losses_of(run_dir) == reference
    train(corpus, run_dir, "checkpoint.keep_last=9", resume=run_dir / "checkpoints" / "step_00000004")
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [2, newest, 4]
    assert losses_of(run_dir) == reference


def kill_after(seconds: float) -> None:
    threading.Timer(seconds, kill_self).start()


def until_it_ends(corpus: Path, run_dir: Path, ranks: tuple[int, ...], seed: int, *changes: str) -> int:
    """Kill ranks at random moments until a run gets through; give how often they were."""
    chance, kills = random.Random(seed), 0
    while True:
        seconds = chance.uniform(0.2, 0.9) * 1.25 ** max(0, kills - 2)  # so that it comes to an end

        def prepare(rank: int, seconds: float = seconds) -> None:
            if rank in ranks:
                kill_after(seconds)

        if not killed(corpus, run_dir, *changes, fault=prepare):
            return kills
        kills += 1
        for _, path in steps_in(run_dir / "checkpoints"):
            assert Reader(path).verify() == []


@pytest.mark.parametrize(("rank", "seed"), [(0, 1), (1, 2)])
def test_kill_one_rank_random(tmp_path, corpus, reference, rank, seed):
    assert until_it_ends(corpus, tmp_path / "run", (rank,), seed) > 0
    assert losses_of(tmp_path / "run") == reference


def test_kill_all_ranks_random(tmp_path, corpus, reference):
    assert until_it_ends(corpus, tmp_path / "run", (0, 1), 3) > 0
    assert losses_of(tmp_path / "run") == reference


@pytest.mark.parametrize(("point", "layout", "size"), [
    ("mid_file", ("parallel.tensor=1", "parallel.zero=3"), 2),
    ("after_manifest", ("parallel.tensor=1", "parallel.zero=0"), 1),
])  # fmt: skip
def test_kill_then_reshape(tmp_path, corpus, reference, point, layout, size):
    run_dir = tmp_path / "run"
    assert killed(corpus, run_dir, fault=fault_at(point, 0))
    train(corpus, run_dir, *layout, size=size)
    assert losses_of(run_dir) == pytest.approx(reference, rel=1e-5)
