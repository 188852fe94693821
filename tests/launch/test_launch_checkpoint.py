"""`basestone checkpoint ls|show|verify|import` on step directories of real files, damaged in real ways."""

from __future__ import annotations

import json
import os
import random
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from in_process import Command, refused
from launch_steps import flip, size_of, step
from run_files import run_values
from step_files import save

from basestone.trainer import console, worker

pytestmark = pytest.mark.usefixtures("small_blocks")


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
        "heldout_loss  2.5000\n",
    ):
        assert words in text
    assert "pooling" not in text and "pooling" not in facts["model"]


def test_show_names_the_pooling_of_sentence_embeddings(basestone: Command, tmp_path):
    path = save(tmp_path / "checkpoints", 7, run=run_values(model__pooling="last"))
    assert json.loads(basestone("checkpoint", "show", path, "--json").out)["model"]["pooling"] == "last"
    assert ", pooling last\n" in basestone("checkpoint", "show", path).out


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


# ---- what holds for several --------------------------------------------------------------------------------------


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
