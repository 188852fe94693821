"""Which steps a run keeps and goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import Run

from basestone.trainer.checkpoint import saver, share
from basestone.trainer.checkpoint.opening import newest_good, open_checkpoint
from basestone.trainer.errors import CheckpointError, ConfigError


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_the_newest_are_kept_and_restored(run):
    run.save(2, 4, 6, 8)
    assert run.steps == [8, 6, 4]
    assert (run.path / "latest").read_text() == "step_00000008\n"
    wanted = {
        name: {key: value.clone() for key, value in row.items()} for name, row in run.state.values.items()
    }
    run.state.set(0)
    assert run.restore() == 8 and run.state.steps == 8 and run.state.refreshed == 1
    for name, tensors in run.state.values.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, wanted[name][key])


def test_a_fresh_directory_is_a_fresh_start(run):
    assert run.restore() is None and run.state.refreshed == 0


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_damaged_newer_steps_do_not_push_out_good_ones(tmp_path, keep_last):
    run = Run(tmp_path)
    run.save(2, 4, 6)
    run.damage(4)
    run.damage(6)
    run = Run(tmp_path, keep_last=keep_last)
    assert run.restore() == 2
    run.save(3)
    assert run.steps == [3, 2][:keep_last]
    assert run.restore() == 3


def test_a_line_that_was_left_is_not_gone_on_from(run):
    run.save(4, 8, 12)
    assert run.restore(explicit=4) == 4
    run.save(6)
    assert run.steps == [6, 4] and run.restore() == 6
    run.save(8)
    run.state.set(0)
    assert run.restore() == 8 and run.steps == [8, 6, 4]


def test_a_step_of_a_line_that_was_left_is_written_anew(run):
    run.save(4, 8)
    run.restore(explicit=4)
    run.save(8, again=True)
    assert run.steps == [8, 4] and open_checkpoint(run.step(8)).state()["again"]


def test_a_failed_removal_does_not_fail_the_save(run, monkeypatch, caplog):
    run.save(1, 2, 3)

    def fail(_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(saver, "remove", fail)
    run.save(4)
    assert run.steps == [4, 3, 2, 1]
    assert "old checkpoints were not removed: " in caplog.text


@pytest.mark.faults
def test_latest_that_cannot_be_written_does_not_fail_the_save(run, caplog):
    run.save(1)
    (run.path / "latest").unlink()
    (run.path / "latest").mkdir()
    run.save(2)
    assert run.steps == [2, 1] and run.restore() == 2
    assert "latest was not written: storage failed: Is a directory" in caplog.text


def test_a_failed_write_is_named_and_changes_nothing(run, monkeypatch):
    run.save(1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for module, name in ((share, "RankWriter"), (saver, "commit")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            outcome = run.save(2)
        assert outcome.path is None and "No space" in outcome.problem
        assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step_00000001"]
    assert (run.path / "latest").read_text() == "step_00000001\n"


def test_all_bad_is_an_error_that_names_each(run):
    run.save(2, 4)
    run.damage(2)
    (run.step(4) / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        run.restore()
    text = str(caught.value)
    assert "no checkpoint is good, and a run with checkpoints does not start over by itself" in text
    assert f"{run.step(2)}" in text and f"{run.step(4)}" in text and "move " in text
    assert run.steps == [4, 2], "nothing is thrown away"


def test_an_explicit_step_that_is_bad_is_never_replaced_by_another(run):
    run.save(2, 4)
    run.damage(4)
    with pytest.raises(CheckpointError, match=r"(?s)--resume .*step_00000004: is not good:.*sha256") as caught:
        run.restore(explicit=4)
    assert "move" not in str(caught.value) and "start over" not in str(caught.value)
    assert run.restore(explicit=2) == 2


def test_a_path_that_is_not_there_is_the_users(run):
    run.save(2)
    (run.path / "file").touch()
    for path in (run.step(7), run.path / "file"):
        with pytest.raises(ConfigError) as caught:
            run.restore(explicit=path)
        assert str(caught.value) == (
            f"--resume {path}: there is no such directory; name a step directory or a run directory"
        )
        assert caught.value.exit_code == 64


def test_a_run_directory_stands_for_its_newest_good_step(run, tmp_path_factory, caplog):
    run.save(2, 4, 6)
    run.damage(6)
    other = Run(tmp_path_factory.mktemp("other"))
    assert other.restore(explicit=run.path) == 4
    assert "skipping a checkpoint that is not good" in caplog.text and "step_00000006" in caplog.text
    run.damage(4)
    run.damage(2)
    with pytest.raises(CheckpointError, match=r"(?s)is not good:.*step_00000006.*step_00000004.*step_00000002"):
        other.restore(explicit=run.path)
    (other.path / "checkpoints").mkdir()
    with pytest.raises(
        ConfigError, match="the run directory holds no checkpoint; leave --resume out to start it"
    ):
        run.restore(explicit=other.path)
    assert run.steps == [6, 4, 2]


def test_another_run_is_refused_and_older_steps_are_not_tried(run):
    run.save(2, 4)
    asked = []

    def differences(state: dict[str, Any]) -> list[str]:
        asked.append(state["step"])
        return ["model.num_layers: 2", "data.tokenizer: another"]

    with pytest.raises(ConfigError) as caught:
        run.restorer.restore(differences)
    assert str(caught.value) == (
        "the checkpoint belongs to another run:\n  model.num_layers: 2\n  data.tokenizer: another\n"
        "put these back, or choose another --run-dir"
    )
    assert asked == [4] and run.state.refreshed == 0


@pytest.mark.faults
@pytest.mark.parametrize("content", [None, "", "step_00000099\n", "\x00\xff", "../../etc"])
def test_latest_bad(run, content):
    run.save(2)
    (run.path / "latest").unlink()
    if content is not None:
        (run.path / "latest").write_text(content)
    assert run.restore() == 2


def test_what_killed_attempts_left_is_removed_and_nothing_else(run):
    run.save(2)
    (run.path / "checkpoints" / ".tmp-step_00000003-0a1b2c3d").mkdir()
    shutil.copytree(run.step(2), run.path / "checkpoints" / ".trash-step_00000001")
    (run.path / "checkpoints" / "notes.txt").touch()
    Run(run.path)
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["notes.txt", "step_00000002"]


def test_readers_take_the_newest_with_a_good_structure(run):
    with pytest.raises(CheckpointError, match="no good checkpoint: it holds none"):
        newest_good(run.path)
    run.save(2, 4)
    (run.step(4) / "index.json").unlink()
    assert open_checkpoint(run.path).place == str(run.step(2))
    (run.step(2) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)index\.json is missing.*state\.json is missing"):
        newest_good(run.path, attempts=1)


@pytest.mark.faults
def test_a_directory_that_cannot_be_made_is_a_checkpoint_that_was_not_written(run):
    (run.path / "checkpoints").touch()
    outcome = run.save(2)
    assert outcome.path is None and outcome.problem.startswith("rank 0: ") and "checkpoints" in outcome.problem
