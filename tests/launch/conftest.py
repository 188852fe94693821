"""Commands in this process, small shards and a tokenizer made by them, and a run's checkpoints."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from in_process import Command, Done
from launch_steps import LOSSES
from run_files import run_values
from step_files import save, use_small_blocks

from basestone.launch import cli, local
from basestone.trainer.load import run_to_toml


@pytest.fixture
def basestone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["basestone", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Done(caught.value.code, *capsys.readouterr())  # type: ignore[arg-type]

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been started; its exit code is 7."""
    calls: list[tuple[Any, ...]] = []

    def remember(*arguments: Any) -> int:
        calls.append(arguments)
        return 7

    monkeypatch.setattr(local, "run_workers", remember)
    return calls


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A small run on the embedded corpus."""
    values = run_values(data__train="builtin:python", data__tokenizer="builtin:python")
    (tmp_path / "run.toml").write_text(run_to_toml(values))
    return tmp_path / "run.toml"


TEXTS = [
    f"Document {number}: " + "the quick brown fox jumps over the lazy dog. " * (5 + number)
    for number in range(60)
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents that all differ."""
    return TEXTS


@pytest.fixture(scope="session")
def jsonl() -> bytes:
    """The documents, and one of them twice."""
    return "".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, TEXTS[0]]).encode()


@pytest.fixture
def shards(tmp_path: Path, jsonl: bytes, basestone: Command) -> Path:
    """Shards and a tokenizer, made from a compressed file by the commands."""
    (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress(jsonl))
    done = basestone(
        *("prepare", tmp_path / "texts.jsonl.gz", "--out", tmp_path / "shards", "--workers", "0", "--json"),
        *("--heldout-fraction", "0.1", "--min-chars", "10"),
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["dropped"] == {"exact_duplicate": 1} or sum(report["dropped"].values()) == 1
    return tmp_path / "shards"


@pytest.fixture
def tokenizer(tmp_path: Path, shards: Path, basestone: Command) -> Path:
    model = tmp_path / "texts.model"
    done = basestone("tokenizer", "train", shards / "train", "--out", model, "--vocab-size", "400", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["vocab_size"] == 400 and model.is_file()
    return model


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks small, so that small files have several."""
    use_small_blocks(monkeypatch)


@pytest.fixture
def run_dir(tmp_path: Path, small_blocks: None) -> Path:
    """A run directory with four checkpoints, whose run keeps the last one and the best."""
    path = tmp_path / "run"
    for step, loss in LOSSES.items():
        save(path / "checkpoints", step, heldout={"a": loss - 1, "b": loss + 1})
    keys = run_values(checkpoint__keep_last=1, checkpoint__keep_best=1)
    (path / "run.toml").write_text(run_to_toml(keys))
    return path
