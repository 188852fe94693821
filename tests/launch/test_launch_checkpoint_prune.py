"""`basestone checkpoint prune` on step directories of real files, damaged in real ways."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from forked import in_child, kill
from in_process import Command, refused
from launch_steps import LOSSES, flip, size_of, step, steps_of

from basestone.trainer import console
from basestone.trainer.run_lock import RunLock

pytestmark = pytest.mark.usefixtures("small_blocks")


def test_prune_by_the_runs_own_keys(basestone: Command, run_dir):
    size = size_of(step(run_dir, 2)) + size_of(step(run_dir, 6)) + 7
    leftover = run_dir / "checkpoints" / ".tmp-step_00000010-abc"
    leftover.mkdir()
    (leftover / "rank_00000.bin").write_bytes(b"1234567")
    before = steps_of(run_dir)
    would = basestone("checkpoint", "prune", run_dir, "--dry-run")
    assert steps_of(run_dir) == before and would.code == 0
    done = basestone("checkpoint", "prune", run_dir)
    assert done.code == 0 and would.out == done.out.replace("removed", "would be removed")
    assert steps_of(run_dir) == ["step_00000004", "step_00000008"]
    assert done.out.splitlines() == [
        f"{step(run_dir, 8)}  stays: keep_last",
        f"{step(run_dir, 4)}  stays: keep_best",
        f"{step(run_dir, 6)}  removed",
        f"{step(run_dir, 2)}  removed",
        f"{leftover}  removed",
        f"3 removed, {size / 1e6:,.1f} MB",
    ]
    done = basestone("checkpoint", "prune", run_dir, "--json")
    assert json.loads(done.out) == {
        "removed": [],
        "bytes": 0,
        "kept": [str(step(run_dir, 8)), str(step(run_dir, 4))],
        "damaged": [],
    }


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        (("--keep-last", 2), [4, 6, 8]),
        (("--keep-best", 0), [8]),
        (("--keep-best", 2), [4, 6, 8]),
        (("--keep-every-steps", 2), [2, 4, 6, 8]),
        (("--keep-best", 0, "--rollback-steps", 4), [4, 6, 8]),
    ],
)
def test_prune_with_keys_of_ones_own(basestone: Command, run_dir, flags, left):
    size = sum(size_of(step(run_dir, number)) for number in LOSSES if number not in left)
    done = basestone("checkpoint", "prune", run_dir, *flags, "--json")
    assert done.code == 0 and json.loads(done.out)["bytes"] == size
    assert steps_of(run_dir) == [f"step_{number:08d}" for number in left]


def test_prune_leaves_damaged_ones_and_does_not_count_them(basestone: Command, run_dir):
    (step(run_dir, 8) / "index.json").unlink()
    done = basestone("checkpoint", "prune", run_dir, "--keep-best", "0")
    assert done.code == 0 and steps_of(run_dir) == ["step_00000006", "step_00000008"]
    assert f"{step(run_dir, 8)}  stays: it is damaged: " in done.out
    assert f"{step(run_dir, 6)}  stays: keep_last" in done.out


@pytest.mark.faults
def test_prune_keeps_good_ones_where_those_that_stay_have_flipped_bits(basestone: Command, run_dir):
    for number in (8, 6):
        flip(step(run_dir, number) / "rank_00001.bin", 70)
        flip(step(run_dir, number) / "rank_00001.bin", 140)
    would = basestone("checkpoint", "prune", run_dir, "--dry-run", "--keep-best", 0)
    done = basestone("checkpoint", "prune", run_dir, "--keep-best", 0)
    assert done.code == 0 and would.out == done.out.replace("removed", "would be removed")
    assert steps_of(run_dir) == ["step_00000004", "step_00000006", "step_00000008"]
    file = step(run_dir, 8) / "rank_00001.bin"
    assert done.out.splitlines()[:3] == [
        f"{step(run_dir, 4)}  stays: keep_last",
        f"{step(run_dir, 8)}  stays: it is damaged: {file}: bytes 64..128 do not match their sha256 (and 1 more)",
        f"{step(run_dir, 6)}  stays: it is damaged: {str(file).replace('08/', '06/')}: bytes 64..128 do not match "
        "their sha256 (and 1 more)",
    ]


@pytest.mark.faults
def test_prune_removes_nothing_where_none_is_good(basestone: Command, run_dir):
    for number in LOSSES:
        flip(step(run_dir, number) / "rank_00002.bin", 0)
    done = basestone("checkpoint", "prune", run_dir, "--json")
    values = json.loads(done.out)
    assert done.code == 0 and len(steps_of(run_dir)) == 4
    assert values["removed"] == values["kept"] == [] and len(values["damaged"]) == 4


def test_prune_says_how_far_the_check_of_a_large_one_is(basestone: Command, run_dir, monkeypatch):
    monkeypatch.setattr(console, "LONG_BYTES", 100)
    lines = basestone("checkpoint", "prune", run_dir, "--dry-run").err.splitlines()
    assert lines[0].startswith("step_00000008: 20 % of ") and lines[-1].startswith("step_00000008: 100 % of ")


@pytest.mark.faults
def test_prune_of_a_link_leaves_its_data(basestone: Command, run_dir, tmp_path):
    link, target = step(run_dir, 2), tmp_path / "elsewhere"
    link.rename(target)
    link.symlink_to(target)
    old = run_dir / "checkpoints" / ".trash-step_00000001"
    old.symlink_to(target)
    done = basestone("checkpoint", "prune", run_dir)
    assert done.code == 0 and steps_of(run_dir) == ["step_00000004", "step_00000008"]
    assert len(list(target.iterdir())) == 6, "the data stay"
    assert f"{link}  removed: a link; the data stays at {target}\n" in done.out
    assert f"{old}  removed: a link; the data stays at {target}\n" in done.out
    assert done.out.endswith(f"3 removed, {size_of(step(run_dir, 8)) / 1e6:,.1f} MB\n")
    assert basestone("checkpoint", "prune", run_dir).code == 0


@pytest.mark.faults
def test_what_cannot_be_removed_is_named(basestone: Command, run_dir, monkeypatch):
    leftover = run_dir / "checkpoints" / ".tmp-step_00000010-abc"
    leftover.mkdir()

    def fail(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        done = basestone("checkpoint", "prune", run_dir)
        refused(done, 74, f"{step(run_dir, 6)}: cannot be removed: Permission denied; check its permissions")
        basestone("checkpoint", "prune", run_dir)
        done = basestone("checkpoint", "prune", run_dir)
        refused(done, 74, f"{leftover}: cannot be removed: Permission denied; check its permissions")
    assert basestone("checkpoint", "prune", run_dir).code == 0
    assert steps_of(run_dir) == ["step_00000004", "step_00000008"]


def test_prune_needs_to_know_what_to_keep(basestone: Command, run_dir):
    (run_dir / "run.toml").unlink()
    refused(
        basestone("checkpoint", "prune", run_dir),
        *(64, f"{run_dir}: has no run.toml that says what to keep; give --keep-last"),
    )
    assert len(steps_of(run_dir)) == 4
    assert basestone("checkpoint", "prune", run_dir, "--keep-last", "2").code == 0
    assert steps_of(run_dir) == ["step_00000006", "step_00000008"]


@pytest.mark.faults
def test_prune_of_a_run_that_is_going_is_refused(basestone: Command, run_dir):
    def hold() -> str:
        hold.lock = RunLock(run_dir)  # type: ignore[attr-defined]
        return "held"

    child, _ = in_child(hold)
    try:
        done = basestone("checkpoint", "prune", run_dir)
        refused(done, 64, f"another run holds it (pid {child} on ")
        assert len(steps_of(run_dir)) == 4
        assert basestone("checkpoint", "prune", run_dir, "--dry-run").code == 0
    finally:
        kill(child)
    assert basestone("checkpoint", "prune", run_dir).code == 0 and len(steps_of(run_dir)) == 2
    RunLock(run_dir).close()  # it is given back


@pytest.mark.faults
@pytest.mark.parametrize("jump_s", [-3600, 3600])
def test_clock_jump_changes_no_pruning(basestone: Command, run_dir, jump_s):
    """Times of files say nothing: the oldest by its date is the newest by its step."""
    for number in LOSSES:
        for path in (*step(run_dir, number).iterdir(), step(run_dir, number)):
            os.utime(path, (1_800_000_000 + jump_s * number,) * 2)
    assert basestone("checkpoint", "prune", run_dir).code == 0
    assert steps_of(run_dir) == ["step_00000004", "step_00000008"]
