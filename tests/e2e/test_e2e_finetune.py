"""`basestone finetune` on what a run was exported as, by the command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from commands import start
from tiny_hub import labelled, questions, write_lines

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def exported(trained, basestone, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    done = basestone("export", trained, out, "--dtype", "fp32", "--licence", "apache-2.0")
    assert done.returncode == 0, done.stderr
    return out


def test_an_exported_run_is_tuned_by_two_processes(exported, tmp_path, basestone):
    data, out = write_lines(tmp_path / "questions.jsonl", questions()), tmp_path / "tuned"
    words = ("finetune", exported, data, "--out", out, "--lora", "4", "--zero", "2", "--processes", "2")
    done = basestone(*words, "--steps", "6", "--batch", "4", "--lr", "1e-2", "--eval", data)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].endswith("4 a step = 2 processes x 2 x 1") and lines[-1].startswith("step 6/6  loss ")
    assert len(lines) == 7, "rank 1 and the libraries are silent"
    assert (
        len(done.stdout.splitlines()) == 1 and "6 steps, loss " in done.stdout and "; held out: " in done.stdout
    )
    figures = json.loads((out / "metrics.json").read_text())
    assert figures["heldout"]["loss"] < figures["heldout_before"]["loss"] - 0.1
    assert 'license: "apache-2.0"' in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["questions.jsonl", "tuned"]


def test_figures_for_machines(exported, tmp_path, basestone):
    data = write_lines(tmp_path / "classes.jsonl", labelled(40))
    words = ("finetune", exported, data, "--out", tmp_path / "out", "--task", "classify", "--json")
    done = basestone(*words, "--steps", "2")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(figures["heldout"]["classes"]) == {"colour", "fruit", "neither"} and figures["examples"] == 37


def test_a_run_must_be_exported_first_and_is_told_once(trained, tmp_path, basestone):
    data = write_lines(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    done = basestone("finetune", trained, data, "--out", tmp_path / "out", "--processes", "2")
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
