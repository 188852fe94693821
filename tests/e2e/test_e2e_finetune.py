"""`basestone finetune` on what a run was exported as, by the command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from commands import start
from tiny_hub import labelled, questions, write_lines

from basestone.trainer import worker
from basestone.trainer.finetuning.settings import FinetuneSettings
from basestone.trainer.forks import run_ranks
from basestone.trainer.inference import OpenCheckpoint

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    run_ranks(_export, 1, trained, out)
    return out


def _export(run_dir: Path, out: Path) -> None:
    keys = {"dtype": "fp32", "licence": "apache-2.0", "name": "", "max_shard_bytes": 10**9}
    OpenCheckpoint(run_dir).export(out, verify=True, num_processes=1, **keys)


def test_an_exported_run_is_tuned_by_two_processes(exported, tmp_path, basestone):
    data, out = write_lines(tmp_path / "questions.jsonl", questions()), tmp_path / "tuned"
    words = ("finetune", exported, data, "--out", out, "--lora", "4", "--zero", "2", "--processes", "2")
    done = basestone(*words, "--steps", "6", "--batch", "4", "--lr", "1e-2", "--eval", data, "--json")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].endswith("4 a step = 2 processes x 2 x 1") and lines[-1].startswith("step 6/6  loss ")
    assert len(lines) == 7, "rank 1 and the libraries are silent"
    figures = json.loads(done.stdout)
    assert figures == json.loads((out / "metrics.json").read_text())
    assert figures["heldout"]["loss"] < figures["heldout_before"]["loss"] - 0.1
    assert 'license: "apache-2.0"' in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["questions.jsonl", "tuned"]


def _finetune(words: list[str]) -> None:
    worker.finetune(worker._parse(["finetune", *words]))


def test_classes_are_tuned_and_the_outcome_is_told(exported, tmp_path, capfd):
    """By a forked worker, to which the command hands its options as they are here."""
    data, out = write_lines(tmp_path / "classes.jsonl", labelled(40)), tmp_path / "out"
    settings = FinetuneSettings(source=exported, data=data, out=out, task="classify", steps=2)
    run_ranks(_finetune, 1, [settings.model_dump_json()], num_threads=1)
    told = capfd.readouterr().out.splitlines()[-1]
    assert "2 steps, loss " in told and "; held out: " in told
    figures = json.loads((out / "metrics.json").read_text())
    assert set(figures["heldout"]["classes"]) == {"colour", "fruit", "neither"} and figures["examples"] == 37


def test_a_run_must_be_exported_first_and_is_told_once(trained, tmp_path, forked):
    data = write_lines(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    done = forked("finetune", trained, data, "--out", tmp_path / "out", "--processes", "2")
    assert (done.returncode, done.stdout) == (64, "")
    lines = done.stderr.splitlines()
    assert (
        lines[0]
        == f"error: finetune: {trained} is a run or a checkpoint; export it first: basestone export {trained} OUT"
    )
    assert len(lines) == 2 and lines[1].startswith(f'  {data}: line 1 has no "answer"')


def test_stopped_on_request_it_leaves_nothing(exported, tmp_path):
    data = write_lines(tmp_path / "questions.jsonl", questions())
    process = start("finetune", exported, data, "--out", tmp_path / "out", "--steps", "100000")
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None
    assert list(tmp_path.glob(".out.*.partial"))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped on request; nothing was written" in output and "Traceback" not in output
    assert list(tmp_path.iterdir()) == [data]
