"""`basestone checkpoint ls|show|verify|prune` on step directories of real files, damaged in real ways."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from forked import in_child, kill
from in_process import Command, refused
from run_files import run_values
from step_files import save, use_small_blocks

from basestone.trainer import console, worker
from basestone.trainer.load import run_to_toml
from basestone.trainer.run_lock import RunLock

LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 4.5}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with four checkpoints, whose run keeps the last one and the best."""
    path = tmp_path / "run"
    for step, loss in LOSSES.items():
        save(path / "checkpoints", step, heldout={"a": loss - 1, "b": loss + 1})
    keys = run_values(checkpoint__keep_last=1, checkpoint__keep_best=1)
    (path / "run.toml").write_text(run_to_toml(keys))
    return path


def step(run_dir: Path, number: int) -> Path:
    return run_dir / "checkpoints" / f"step_{number:08d}"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def steps_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def size_of(path: Path) -> int:
    return sum(entry.stat().st_size for entry in path.iterdir())


# ---- ls -----------------------------------------------------------------------------------------------------------


def test_ls_says_size_date_loss_and_what_keeps_each(basestone: Command, run_dir):
    os.utime(step(run_dir, 4) / "MANIFEST.json", (1_800_000_000, 1_800_000_000))
    (step(run_dir, 6) / "state.json").unlink()
    rows = json.loads(basestone("checkpoint", "ls", run_dir, "--json").out)
    assert [row["step"] for row in rows] == [8, 6, 4, 2]
    by_step = {row["step"]: row for row in rows}
    assert by_step[4] == {
        "step": 4,
        "place": str(step(run_dir, 4)),
        "bytes": size_of(step(run_dir, 4)),
        "saved": "2027-01-15T08:00:00+00:00",
        "heldout_loss": 3.0,
        "kept_by": ["keep_best"],
        "problem": None,
    }
    assert by_step[8]["kept_by"] == ["keep_last"] and by_step[2]["kept_by"] == []
    assert datetime.fromisoformat(by_step[8]["saved"]).tzinfo == UTC
    assert by_step[6]["problem"].endswith("state.json is missing") and by_step[6]["bytes"] is None
    lines = basestone("checkpoint", "ls", run_dir).out.splitlines()
    assert len(lines) == 4 and lines[1].endswith("state.json is missing") and "damaged: " in lines[1]
    assert lines[2].endswith("0.0 MB  2027-01-15T08:00:00+00:00  held-out loss 3.0000  keep_best")
    assert lines[0].endswith("held-out loss 4.5000  keep_last") and lines[3].endswith("held-out loss 5.0000")


def test_ls_without_a_run_file_says_so(basestone: Command, run_dir):
    (run_dir / "run.toml").unlink()
    done = basestone("checkpoint", "ls", run_dir, "--json")
    assert done.code == 0 and all(row["kept_by"] == [] for row in json.loads(done.out))
    assert "what keeps them is not known: " in done.err and "has no run.toml" in done.err
    assert "--keep-last" not in done.err, "ls has no such flag"


def test_ls_of_a_run_without_checkpoints_says_so(basestone: Command, run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    done = basestone("checkpoint", "ls", run_dir)
    assert (done.code, done.out, done.err) == (0, "", f"{run_dir}: holds no checkpoint\n")
    assert json.loads(basestone("checkpoint", "ls", run_dir, "--json").out) == []


# ---- show ---------------------------------------------------------------------------------------------------------


def test_show_says_what_is_in_a_checkpoint(basestone: Command, tmp_path):
    run = run_values(parallel__zero=2)
    path = save(
        tmp_path / "checkpoints",
        7,
        tokens=12345,
        optimizer_steps=6,
        run=run,
        versions={"basestone": "1.2", "torch": "2.x"},
        heldout={"a": 2.5},
    )
    facts = json.loads(basestone("checkpoint", "show", path, "--json").out)
    assert json.loads(basestone("checkpoint", "show", tmp_path, "--json").out) == facts
    assert (facts["format"], facts["step"], facts["tokens"], facts["optimizer_steps"]) == (1, 7, 12345, 6)
    assert facts["parameters"] == 12 and facts["tensors"] == ["master"] and facts["weights_only"]
    assert facts["layout"] == {"processes": 3, "tensor": 1, "pipeline": None, "zero": 2}
    assert facts["model"]["hidden_size"] == run["model"]["hidden_size"] and facts["heldout_loss"] == 2.5
    assert facts["versions"] == {"basestone": "1.2", "torch": "2.x"} and facts["bytes"] == size_of(path)
    assert facts["files"][1] == {"file": "rank_00001.bin", "bytes": 150, "fragments": 1, "tp_rank": 0}
    text = basestone("checkpoint", "show", path).out
    for words in (
        "tokens  12,345\n",
        "family llama",
        "zero 2",
        "torch 2.x",
        "rank_00002.bin  0.0 MB, 1 fragments",
    ):
        assert words in text


def test_show_of_a_state_that_says_nothing(basestone: Command, tmp_path):
    path = save(tmp_path / "checkpoints", 7, run=[1], versions=None)
    facts = json.loads(basestone("checkpoint", "show", path, "--json").out)
    assert facts["tokens"] is None and facts["versions"] == {} and facts["layout"]["zero"] is None
    assert "versions  unknown\n" in basestone("checkpoint", "show", path).out


@pytest.mark.parametrize("command", ["show", "verify"])
def test_what_is_no_checkpoint_at_all_is_the_users(basestone: Command, run_dir, tmp_path, command):
    for name in ("empty", "other/folder", "new/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    for place, what in (
        (tmp_path / "empty", "is empty"),
        (tmp_path / "other", "is neither a checkpoint nor a run directory"),
        (tmp_path / "new", "holds no checkpoint yet"),
        (tmp_path / "nothing", "there is no such checkpoint directory"),
        (run_dir / "run.toml", "is a file"),
        (run_dir / "checkpoints", "is the folder of a run's checkpoints"),
        ("memory://nothing", "there is no such checkpoint directory"),
    ):
        done = basestone("checkpoint", command, place)
        refused(done, 64)
        assert done.err == f"error: {place}: {what}; name a step directory, or the run directory\n"
    (step(run_dir, 8) / "MANIFEST.json").unlink()
    refused(basestone("checkpoint", command, step(run_dir, 8)), 74, "no MANIFEST.json; the save never finished")


# ---- verify -------------------------------------------------------------------------------------------------------


def test_verify_reads_the_newest_or_all(basestone: Command, run_dir):
    done = basestone("checkpoint", "verify", run_dir)
    assert (done.code, done.out) == (0, f"{step(run_dir, 8)}: every byte matches its checksum\n")
    done = basestone("checkpoint", "verify", run_dir, "--all")
    assert done.code == 0 and len(done.out.splitlines()) == 4 and done.err == ""
    flip(step(run_dir, 4) / "rank_00001.bin", 70)
    flip(step(run_dir, 4) / "rank_00001.bin", 149)
    assert basestone("checkpoint", "verify", run_dir).code == 0, "an older one is not looked at"
    done = basestone("checkpoint", "verify", run_dir, "--all")
    assert done.code == 74 and len(done.out.splitlines()) == 3
    file = step(run_dir, 4) / "rank_00001.bin"
    assert done.err.splitlines() == [
        f"error: {file}: bytes 64..128 do not match their sha256",
        f"{file}: bytes 128..150 do not match their sha256",
    ]
    refused(basestone("checkpoint", "verify", step(run_dir, 4)), 74, str(file))
    rows = json.loads(basestone("checkpoint", "verify", run_dir, "--all", "--json").out)
    assert [(row["place"], len(row["problems"])) for row in rows] == [
        *((str(step(run_dir, 8)), 0), (str(step(run_dir, 6)), 0)),
        *((str(step(run_dir, 4)), 2), (str(step(run_dir, 2)), 0)),
    ]
    assert basestone("checkpoint", "verify", run_dir, "--all", "--json").code == 74


def test_verify_of_all_takes_a_run_directory(basestone: Command, run_dir):
    one = step(run_dir, 8)
    refused(
        basestone("checkpoint", "verify", one, "--all"),
        *(64, f"{one}: is one checkpoint; --all takes a run directory"),
    )


@pytest.mark.faults
def test_a_flipped_bit_anywhere_is_found(basestone: Command, run_dir):
    chance = random.Random(5)
    for _ in range(20):
        path = chance.choice([path for path in step(run_dir, 8).iterdir() if path.stat().st_size])
        at = chance.randrange(path.stat().st_size)
        flip(path, at)
        assert basestone("checkpoint", "verify", run_dir).code == 74, (path, at)
        flip(path, at)
    assert basestone("checkpoint", "verify", run_dir).code == 0


@pytest.mark.faults
@pytest.mark.parametrize("name", ["notes.txt", ".nfs0001", "rank_00003.bin", "folder"])
def test_extra_file(basestone: Command, run_dir, name):
    path = step(run_dir, 8) / name
    path.mkdir() if name == "folder" else path.touch()
    refused(basestone("checkpoint", "verify", run_dir), 74, f"{path}: is not of this checkpoint")
    assert basestone("checkpoint", "ls", run_dir).code == 0


def test_extra_file_that_may_be_a_pickle_is_refused(basestone: Command, run_dir):
    (step(run_dir, 8) / "model.pt").touch()
    refused(basestone("checkpoint", "verify", run_dir), 74, "model.pt is not ours and may hold a pickle")


def test_verify_of_a_large_one_says_how_far_it_is(basestone: Command, run_dir, monkeypatch):
    monkeypatch.setattr(console, "LONG_BYTES", 100)
    done = basestone("checkpoint", "verify", run_dir)
    lines = done.err.splitlines()
    assert lines[0].startswith("step_00000008: 20 % of ") and lines[-1].startswith("step_00000008: 100 % of ")
    assert done.code == 0 and 2 < len(lines) <= 10


# ---- prune --------------------------------------------------------------------------------------------------------


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


@pytest.mark.faults
@pytest.mark.parametrize("command", ["ls", "prune"])
def test_what_is_no_run_directory_is_refused(basestone: Command, tmp_path, run_dir, command):
    refused(
        basestone("checkpoint", command, tmp_path), 64, f"{tmp_path}: is no run directory (no checkpoints/)"
    )
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    assert basestone("checkpoint", command, run_dir).code == 0


# ---- import -------------------------------------------------------------------------------------------------------


def test_import_reaches_the_worker_as_typed(basestone: Command, asked):
    done = basestone("checkpoint", "import", "a b.bin", "out", "--run", "run.toml", "--debug")
    ((arguments, num_workers),) = asked
    parsed = worker._parse(arguments)
    assert (done.code, num_workers, parsed.command, parsed.debug) == (7, 1, "import-file", True)
    assert (parsed.file, parsed.out, parsed.run) == (Path("a b.bin"), Path("out"), Path("run.toml"))
    refused(basestone("checkpoint", "import", "a", "b"), 64, "run")
