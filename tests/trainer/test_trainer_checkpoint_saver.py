"""A save beside training: what is written is what was there when it began, and one rank's part of the protocol."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from one_rank import TABLE, Run
from run_files import run_of

from basestone.trainer.checkpoint import saver, share
from basestone.trainer.checkpoint.background import Background
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.checkpoint.share import TENSORS
from basestone.trainer.checkpoint.tensors import CheckpointTensors
from basestone.trainer.engine_state import EngineState
from basestone.trainer.errors import CheckpointError
from basestone.trainer.saving import Saving


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, asynchronous=True)


def begin(run: Run, step: int) -> None:
    run.state.set(step)
    assert run.saver.begin(step, {"step": step, "optimizer_steps": step}) is None


def masters(run: Run, step: int) -> dict[str, torch.Tensor]:
    tensors = CheckpointTensors(Reader(run.step(step)), TABLE)
    return {name: tensors.read(name).flatten() for name in TABLE}


def hold(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> threading.Event:
    """Let a function wait for an event."""
    go, real = threading.Event(), getattr(owner, name)

    def held(*args: Any) -> Any:
        assert go.wait(30)
        return real(*args)

    monkeypatch.setattr(owner, name, held)
    return go


def test_what_changes_after_the_copy_is_not_saved(run, monkeypatch):
    go = hold(monkeypatch, share.Share, "write")
    begin(run, 2)
    run.saver.wait_copied()
    run.state.set(99)  # the next update
    go.set()
    outcome = run.saver.finish()
    assert outcome.path == run.step(2) and outcome.problem is None
    run.state.set(2)
    for name, values in masters(run, 2).items():
        assert torch.equal(values, run.state.values[name]["master"])


def test_an_update_waits_for_the_copy(run, monkeypatch):
    """Planted: were the update not to wait, the copy would hold what came after."""
    go = hold(monkeypatch, share.Staging, "_copy")
    begin(run, 2)
    updated = threading.Event()

    def update() -> None:
        run.saver.wait_copied()
        run.state.set(99)
        updated.set()

    threading.Thread(target=update, daemon=True).start()
    assert not updated.wait(0.2)
    go.set()
    assert updated.wait(30)
    run.saver.finish()
    run.state.set(2)
    assert torch.equal(masters(run, 2)["w"], run.state.values["w"]["master"])


def test_a_copy_that_fails_lets_the_update_go_on(run, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(share.Staging, "_copy", fail)
    begin(run, 2)
    run.saver.wait_copied()
    outcome = run.saver.finish()
    assert outcome.path is None and outcome.problem == "rank 0: the device is lost"
    assert list((run.path / "checkpoints").iterdir()) == []


def test_a_save_takes_two_turns_without_waiting(run, monkeypatch):
    go = hold(monkeypatch, share.Share, "write")
    begin(run, 2)
    assert run.saver.working and run.saver.in_flight[0] == 2
    with pytest.raises(AssertionError, match="one save at a time"):
        begin(run, 3)
    assert run.saver.finish(wait_s=0.05) is None and run.saver.in_flight[0] == 2, "left in flight"
    go.set()
    outcomes = []
    while run.saver.in_flight:
        while run.saver.working:
            pass
        outcomes.append(run.saver.advance())
    assert [outcome and outcome.path for outcome in outcomes] == [None, run.step(2)]
    assert run.saver.advance() is None and run.saver.finish() is None


def test_both_ways_write_the_same_files(run, tmp_path):
    begin(run, 2)
    run.saver.finish()
    (tmp_path / "other").mkdir()
    other = Run(tmp_path / "other")
    other.save(2)
    for name in ("rank_00000.bin", "index.json", "state.json"):
        assert (run.step(2) / name).read_bytes() == (other.step(2) / name).read_bytes(), name


def test_the_copy_is_kept_and_is_the_ranks_share(run):
    elements = sum(row.numel for row in TABLE.values()) * len(TENSORS)
    assert run.saver._staging._buffer.numel() == elements
    before = run.saver._staging._buffer.data_ptr()
    for step in (2, 4):
        begin(run, step)
        run.saver.finish()
    assert run.saver._staging._buffer.data_ptr() == before and run.steps == [4, 2]
    assert Run(run.path).saver._staging is None


def test_a_background_that_never_ends_is_a_problem_in_time():
    stuck = threading.Event()
    background = Background(lambda moved: stuck.wait() and moved())
    background.join(0.05)
    assert background.running and background.end() == (
        None,
        "has not come further for 0 s; is the storage well?",
    )
    stuck.set()
    background.join(30)
    assert background.end() == (None, "given up: the storage did not answer in time"), (
        "it changes nothing any more"
    )


class Held:
    """An optimizer of which only the loss scaler is asked."""

    def __init__(self, scaler: Any) -> None:
        self.loss_scaler, self.param_groups, self.state = scaler, [], {}
        self.optimizer = SimpleNamespace(param_groups=[], state={}, defaults={})


def state_with(scaler: Any) -> EngineState:
    return EngineState(torch.nn.Module(), Held(scaler), None)  # type: ignore[arg-type]


def test_the_loss_scale_goes_on_as_it_was(monkeypatch):
    """DeepSpeed's own scaler: after a resume it halves and doubles at the very steps it would have."""

    def scaler() -> DynamicLossScaler:
        return DynamicLossScaler(2**16, 3, 1, 2, False)

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # it tells of overflows on rank 0
    first, resumed = scaler(), scaler()
    overflows = [False, True, True, False, False, False, False, True, False, False, False, False]
    for overflow in overflows[:5]:
        first.update_scale(overflow)
    state = state_with(first).loss_scale
    assert state["cur_scale"] == 2**15 and state["last_overflow_iter"] == 2
    state_with(resumed).loss_scale = state
    for overflow in overflows[5:]:
        first.update_scale(overflow)
        resumed.update_scale(overflow)
        assert vars(resumed) == vars(first)
    assert state_with(LossScaler(1)).loss_scale is None
    fixed = state_with(LossScaler(8))
    fixed.loss_scale = state
    assert fixed._optimizer.loss_scaler.cur_scale == 8


def test_nothing_is_begun_where_nothing_fits(run, monkeypatch):
    monkeypatch.setattr(saver, "space_problem", lambda *_: "full")
    outcome = run.save(2)
    assert (outcome.path, outcome.problem, run.saver.failed_in_a_row) == (None, "full", 1)
    assert not (run.path / "checkpoints").exists()
    monkeypatch.undo()
    run.save(4)
    assert run.saver.failed_in_a_row == 0 and run.steps == [4]


def test_saves_keep_what_the_policy_says(tmp_path):
    """The best and every tenth stay beside the newest, over a restart that has to read the losses again."""
    losses = {5: 3.0, 10: 2.5, 15: 2.0, 20: 2.7, 25: 2.9, 30: 2.8, 35: 2.6}
    for steps in ((5, 10, 15, 20), (25, 30, 35)):
        run = Run(tmp_path, keep_last=1, keep_best=2, keep_every_steps=20)
        for step in steps:
            run.save(step, heldout={"a": losses[step] - 0.5, "b": losses[step] + 0.5})
    assert run.steps == [35, 20, 15, 10]


def test_a_commit_that_hung_and_wakes_changes_nothing(run, monkeypatch):
    """It was given up, and a later save was committed: the late one neither takes its name nor prunes the later one."""
    others = threading.enumerate()
    run.saver.limit_s = 0.2
    go = hold(monkeypatch, saver, "index_of")
    begin(run, 6)
    assert run.saver.finish().hangs and run.saver.in_flight is None
    monkeypatch.undo()
    assert run.save(8).path == run.step(8)
    go.set()
    late = [thread for thread in threading.enumerate() if thread not in others]
    for thread in late:
        thread.join(5)
    assert late and not any(thread.is_alive() for thread in late)
    assert run.steps == [8] and (run.path / "latest").read_text() == "step_00000008\n"
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step_00000008"]


def test_a_save_that_comes_further_is_not_given_up(run, monkeypatch):
    run.saver.limit_s = 0.3
    real = share.RankWriter.write

    def slowly(self: Any, data: memoryview) -> None:
        time.sleep(0.1)
        real(self, data)

    monkeypatch.setattr(share.RankWriter, "write", slowly)
    assert run.save(2).path == run.step(2)  # six pieces, 0.6 s


def test_the_last_save_is_tried_whatever_came_before(tmp_path, monkeypatch):
    run = Run(tmp_path, asynchronous=True, max_failed_saves=1)
    console = SimpleNamespace(say=lambda _: None)
    config = run_of(checkpoint__max_failed_saves=1)
    saving = Saving(run.saver, None, config, None, console)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(share.Share, "write", lambda *_: 1 / 0)
        saving.save(2, {"step": 2})
        while run.saver.working:
            pass
    run.state.set(4)
    saving.save(4, {"step": 4}, wait=True)
    assert run.steps == [4]
    with (
        monkeypatch.context() as patch,
        pytest.raises(CheckpointError, match="rank 0: division"),
    ):
        patch.setattr(share.Share, "write", lambda *_: 1 / 0)
        saving.save(6, {"step": 6}, wait=True)
