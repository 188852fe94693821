"""A copy of a run at an S3 server is evaluated and exported as the run itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from commands import environment
from servers import s3_endpoint, serving_s3

from basestone.trainer.checkpoint.format import steps_in
from basestone.trainer.checkpoint.remote import Copying, copy_step
from basestone.trainer.errors import CheckpointError, ConfigError
from basestone.trainer.inference import OpenCheckpoint

pytestmark = pytest.mark.dist
Worker = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def copied(trained) -> Iterator[str]:
    """Where all checkpoints of the trained run were copied."""
    with serving_s3() as port, s3_endpoint(f"http://127.0.0.1:{port}") as files:
        files.mkdir("runs")
        for _, directory in reversed(steps_in(trained / "checkpoints")):
            copy_step(directory, "s3://runs/one", Copying(threads=4))
        yield "s3://runs/one"


@pytest.fixture
def worker(tmp_path) -> Worker:
    """Run a worker command with a cache of its own."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "basestone.trainer.worker", *map(str, arguments)]
        settings = environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run(words, env=settings, capture_output=True, text=True, timeout=300)

    return run


def test_what_is_done_with_a_copy_equals_what_is_done_with_the_run(
    trained, copied, worker, forked, cache, tmp_path
):
    done = worker("evaluate", f"{copied}/checkpoints/step_00000008", "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (own,) = [line for line in lines if line["kind"] == "eval" and line["step"] == 8]
    result = json.loads(done.stdout)["topics"]
    assert result == pytest.approx({name: own[name] for name in result}, rel=1e-5)
    for place, out in ((trained, tmp_path / "here"), (copied, tmp_path / "there")):
        done = forked("export", place, out, "--name", "one", "--no-verify")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{out}: step_00000016, bf16, not verified\n"
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert names == {path.name for path in (tmp_path / "there").iterdir()} and "model.safetensors" in names
    for name in names - {"README.md"}:  # the records, from which the card tells, are not copied
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "basestone" / "tokenizers"


@pytest.mark.faults
def test_a_copy_with_another_tokenizer_or_none_is_refused(trained, copied, cache):
    files, name = fsspec.filesystem("s3"), f"{copied}/tokenizer.model"
    good = files.cat_file(name)
    opened = OpenCheckpoint(copied)
    assert opened.tokenizer.read_bytes() == good and opened.tokenizer.parent == cache
    try:
        files.pipe_file(name, good[:-1])
        with pytest.raises(
            ConfigError, match=f"^{name}: is not the tokenizer that the checkpoint was trained with"
        ):
            OpenCheckpoint(copied)
        files.rm_file(name)
        with pytest.raises(ConfigError, match=f"^{name}: .*name the checkpoint's tokenizer with --tokenizer"):
            OpenCheckpoint(copied)
        assert [path.read_bytes() for path in cache.iterdir()] == [good], "what is wrong is not kept"
        assert OpenCheckpoint(copied, trained / "tokenizer.model").tokenizer == trained / "tokenizer.model"
    finally:
        files.pipe_file(name, good)


@pytest.mark.faults
def test_the_newest_good_copy_is_taken(copied, cache):
    files, index = fsspec.filesystem("s3"), f"{copied}/checkpoints/step_00000016/index.json"
    good = files.cat_file(index)
    try:
        files.pipe_file(index, good[:-1])
        assert OpenCheckpoint(copied).name == "step_00000012"
        with pytest.raises(
            CheckpointError, match=f"^{index}: has {len(good) - 1} bytes, {len(good)} were written"
        ):
            OpenCheckpoint(os.path.dirname(index))
    finally:
        files.pipe_file(index, good)
    assert OpenCheckpoint(copied).name == "step_00000016"
