"""What bad input gets: one clear message, the exit code of the table, no traceback, nothing lost."""

from __future__ import annotations

import os
import shutil
from contextlib import closing

import pytest

from basestone.trainer.run_lock import RunLock

pytestmark = pytest.mark.dist


def refused(done, code: int, *words: str) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, f"{word!r} is not in: {done.stderr}"
    return done.stderr


def test_every_wrong_key_at_once(corpus, tmp_path, basestone):
    text = (corpus / "run.toml").read_text()
    bad = tmp_path / "bad.toml"
    bad.write_text(text.replace("num_layers", "num_layer").replace("lr = 3e-3", 'lr = "fast"\nbetta = 1'))
    words = ("model.num_layer: unknown key; did you mean 'num_layers'", "optimizer.lr", "did you mean 'betas'")
    refused(basestone("train", bad, "--run-dir", tmp_path / "run"), 64, *words)
    assert not (tmp_path / "run").exists()


def test_layouts_that_cannot_be(corpus, tmp_path, forked):
    run = ("train", corpus / "run.toml", "--run-dir", tmp_path / "run")
    refused(
        forked(*run, "--set", "parallel.tensor=4"),
        64,
        "num_query_groups = 2",
        "legal values: [1, 2]",
        "2 processes",
    )
    refused(forked(*run, "--set", "run.processes=3"), 64, "3 processes", "multiple of 2")


def test_offload_that_cannot_be(corpus, tmp_path, forked, monkeypatch):
    run = ("train", corpus / "run.toml", "--run-dir", tmp_path / "run", "--set")
    refused(forked(*run, "parallel.offload=cpu"), 64, "needs parallel.zero >= 2, got 1; set parallel.zero = 2")
    mine = tmp_path / "mine.json"
    mine.write_text('{"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}}')
    refused(forked(*run, f"parallel.ds_config={mine}"), 64, "needs ZeRO stage 3 or higher, got 1")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    nvme = (
        "parallel.zero=3",
        "--set",
        "parallel.offload=nvme",
        "--set",
        f"parallel.nvme_path={tmp_path / 'swap'}",
    )
    text = refused(forked(*run, *nvme), 64, "there is no C++ compiler", 'set parallel.offload = "cpu"')
    assert text.count("error: ") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_missing_file_and_usage(tmp_path, basestone):
    refused(basestone("train", tmp_path / "no.toml"), 64, "there is no such run file")
    refused(basestone("trian"), 64, "No such command")
    refused(basestone("evaluate", tmp_path / "nowhere"), 74, "there is no such checkpoint")


def test_missing_empty_and_truncated_shards(corpus, tmp_path, forked):
    run = ("train", corpus / "run.toml", "--run-dir", tmp_path / "run", "--set")
    refused(forked(*run, f"data.train={tmp_path / 'none'}"), 64, "no manifest.json", "basestone prepare")
    cut = tmp_path / "cut"
    shutil.copytree(corpus / "shards" / "train", cut)
    shard = next(cut.glob("*.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    done = forked(*run, f"data.train={cut}")
    refused(done, done.returncode, shard.name)
    assert done.returncode in (64, 76)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    shard.write_bytes(flipped)
    refused(forked(*run, f"data.train={cut}", "--set", "train.steps=400"), 76, shard.name)


def test_run_directory_that_cannot_be_written_or_is_taken(corpus, tmp_path, forked):
    (tmp_path / "file").write_text("")
    run = ("train", corpus / "run.toml", "--set", "train.steps=1", "--run-dir")
    refused(forked(*run, tmp_path / "file" / "run"), 64, "cannot be written")
    taken = tmp_path / "taken"
    taken.mkdir()
    with closing(RunLock(taken)):
        refused(forked(*run, taken), 64, f"another run holds it (pid {os.getpid()} on ")


def test_another_model_tokenizer_or_batch_at_a_resume(corpus, tmp_path, trained, forked):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    other = tmp_path / "other.model"
    forked("tokenizer", "train", corpus / "shards/train", "--out", other, "--vocab-size", "512", "--json")
    shutil.copyfile(corpus / "tokenizer.model", other)
    changes = ["train.steps=20", "model.num_layers=3", "train.global_batch=16"]
    words = [word for change in changes for word in ("--set", change)]
    text = refused(
        forked("train", corpus / "run.toml", "--run-dir", run_dir, *words),
        64,
        "model.num_layers: 2 in the checkpoint, 3 now",
        "train.global_batch: 8 in the checkpoint, 16 now",
    )
    assert text.count("belongs to another run") == 1
    assert (run_dir / "COMPLETE").exists(), "a wrong run file is no failure of the run that lies there"
    smaller = tmp_path / "smaller.model"
    forked("tokenizer", "train", corpus / "shards/train", "--out", smaller, "--vocab-size", "500")
    words = ["--set", f"data.tokenizer={smaller}", "--set", "train.steps=20"]
    refused(forked("train", corpus / "run.toml", "--run-dir", run_dir, *words), 64, "tokenizer")


def test_a_start_that_is_refused_leaves_its_reason_where_no_run_lies(corpus, tmp_path, trained, forked):
    run_dir, port = (
        tmp_path / "run",
        ("--set", "meter.prometheus_port=9", "--set", "meter.prometheus_host=256.1.1.1"),
    )
    run = ("train", corpus / "run.toml", "--set", "train.steps=20", "--run-dir")
    for words, reason in (
        (port, "meter.prometheus_port = 9: cannot listen on 256.1.1.1"),
        (("--set", "meter.power_limit_w=300"), "meter.power_limit_w = 300: there is no GPU; leave it out"),
    ):
        refused(forked(*run, run_dir, *words), 64, reason)
        assert (run_dir / "FAILED").read_text().startswith(f"step 0: {reason}")
        assert reason in forked("watch", run_dir).stdout.replace("\n", " ")
    shutil.copytree(trained, tmp_path / "complete")
    refused(forked(*run, tmp_path / "complete", *words), 64, reason)
    assert not (tmp_path / "complete" / "FAILED").exists(), "the run that lies there has not failed"
    done = forked(*run, run_dir, "--set", "train.steps=1")
    assert done.returncode == 0 and (run_dir / "COMPLETE").exists() and not (run_dir / "FAILED").exists()


def test_numbers_that_are_not_finite(corpus, tmp_path, forked):
    changes = ["optimizer.lr=1e30", "schedule.warmup_steps=0", "train.clip=0", "checkpoint.every_steps=1"]
    words = [word for change in changes for word in ("--set", change)]
    done = forked("train", corpus / "run.toml", "--run-dir", tmp_path / "run", *words)
    refused(
        done,
        76,
        "is not finite on rank(s)",
        "; newest checkpoint: step_0000000",
        "lower optimizer.lr",
        "--resume goes on from an older",
    )
    assert (tmp_path / "run" / "FAILED").exists()
    assert "every byte matches" in forked("checkpoint", "verify", tmp_path / "run").stdout


@pytest.mark.faults
def test_a_run_whose_checkpoints_are_all_bad_does_not_start_over(corpus, tmp_path, trained, forked):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    for path in run_dir.glob("checkpoints/*/rank_00001.bin"):
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    before = (run_dir / "metrics.jsonl").read_bytes()
    nowhere = tmp_path / "nowhere"
    text = refused(
        forked("train", corpus / "run.toml", "--run-dir", run_dir, "--resume", nowhere),
        64,
        f"error: --resume {nowhere}: there is no such directory",
    )
    assert "move" not in text and (run_dir / "COMPLETE").exists()
    done = forked("train", corpus / "run.toml", "--run-dir", run_dir, "--set", "train.steps=20")
    refused(done, 74, "no checkpoint is good", "does not start over", "do not match their sha256")
    assert (run_dir / "FAILED").exists() and not (run_dir / "COMPLETE").exists()
    assert (run_dir / "metrics.jsonl").read_bytes() == before
