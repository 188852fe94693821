"""A process that saves step after step is killed at any moment; what it left must be whole.

The values of a step's tensors tell the step, so that a mix of two is seen. The run directory lives on from kill to
kill: each process begins with what the one before it left.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from one_rank import OneRank, Run, Tensors

from basestone.model.layout import Parameter
from basestone.trainer.checkpoint import restorer, saver, share
from basestone.trainer.checkpoint.format import steps_in
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.checkpoint.tensors import CheckpointTensors
from basestone.trainer.errors import CheckpointError
from basestone.trainer.forks import PR_SET_PDEATHSIG

# 12 MB a checkpoint, in two blocks: a save takes some tens of milliseconds.
TABLE = {"w": Parameter("w", (1024, 1000), "weight", 0), "norm": Parameter("norm", (1000,), "norm")}
LONGEST_WAIT_S = 20.0
# What may be aimed at, and how long after its begin the kill may come.
AIMS = {"clean": 0.001, "restore": 0.02, "write": 0.04, "commit": 0.02, "prune": 0.003}
KEYS = (
    {"keep_last": 1},
    {"keep_last": 2},
    {"keep_last": 3},
    {"keep_last": 1, "keep_every_steps": 7},
    {"keep_last": 1, "keep_best": 2},
    {"keep_last": 1, "rollback_steps": 3},
    {"keep_last": 2, "keep_every_steps": 10, "keep_best": 1, "rollback_steps": 2},
)


class Life(NamedTuple):
    """What a process does until it is killed, and when that is."""

    asynchronous: bool
    keys: dict[str, int]
    goes_back: bool  # to the oldest checkpoint, not on from the newest
    aim: str  # what is going on; or "any"
    wait_s: float  # before the aim is looked for
    then_s: float


class Before(NamedTuple):
    """What lay there when a process began."""

    steps: list[int]  # newest first
    begun_with: int  # 0: from the start


def draw(chance: random.Random) -> Life:
    """Draw a life."""
    aim = chance.choice(["any"] * 4 + ["prune", "prune", "commit", "commit", "write", "clean", "restore"])
    at_start = aim in ("clean", "restore")
    return Life(
        chance.random() < 0.6,
        chance.choice(KEYS),
        chance.random() < 0.15,
        aim,
        0.0 if at_start else chance.uniform(0.0, 0.8 if aim == "any" else 0.4),
        chance.uniform(0.0, AIMS.get(aim, 0.0)),
    )


class Board:
    """What a process says of itself in memory that outlives it: numbers, each written in one go."""

    PLACES = ("begun", "ended", "ready", *AIMS)

    def __init__(self) -> None:
        """Take memory that a fork shares."""
        self._numbers = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    def __getitem__(self, name: str) -> int:
        return self._numbers[self.PLACES.index(name)]

    def __setitem__(self, name: str, value: int) -> None:
        self._numbers[self.PLACES.index(name)] = value


def values_of(step: int, place: int, numel: int) -> torch.Tensor:
    """Give what a tensor holds after a step; every element tells step and tensor, exactly in fp32."""
    return (torch.arange(numel) % 1000 * 16384 + step % 4096 * 4 + place).float()


def one_life(folder: Path, life: Life) -> dict[str, Any]:
    """Let a process live and be killed, and look at what it left; give a record with its problems."""
    run_dir, board = folder / "run", Board()
    run_dir.mkdir(parents=True, exist_ok=True)
    steps = [step for step, _ in steps_in(run_dir / "checkpoints")]
    begun_with = (steps[-1] if life.goes_back else steps[0]) if steps else 0
    before, errors = Before(steps, begun_with), folder / "error.txt"
    board["ended"] = board["begun"] = begun_with
    errors.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _be_child(lambda: _live(run_dir, life, before, board), errors)
    _wait_for_moment(child, board, life)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    problems = (
        [] if killed else [f"the process ended by itself: {errors.read_text() if errors.exists() else status}"]
    )
    problems += problems_of(run_dir, before, board["begun"], board["ended"])
    return {
        **life._asdict(),
        "during": [name for name in AIMS if board[name]],
        "in_flight": board["begun"] > board["ended"],
        "went_back": life.goes_back and len(steps) > 1,
        "begun_with": begun_with,
        "begun": board["begun"],
        "ended": board["ended"],
        "left": [step for step, _ in steps_in(run_dir / "checkpoints")],
        "problems": problems,
    }


def _be_child(work: Callable[[], None], errors: Path) -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        if os.getppid() == parent:
            work()
    except BaseException:
        errors.write_text(traceback.format_exc())
    finally:
        os._exit(1)


def _wait_for_moment(child: int, board: Board, life: Life) -> None:
    """Return at the moment of the kill, or when the process has ended by itself."""
    deadline_s = time.monotonic() + LONGEST_WAIT_S
    if life.aim not in ("clean", "restore"):
        while not board["ready"] and time.monotonic() < deadline_s and _lives(child):
            time.sleep(0.001)
    time.sleep(life.wait_s)
    if life.aim != "any":
        while not board[life.aim] and time.monotonic() < deadline_s and _lives(child):
            time.sleep(0.00005)
            if board["ready"] and life.aim in ("clean", "restore"):
                break  # it was too quick for us
    time.sleep(life.then_s)


def _lives(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


# ---- the process --------------------------------------------------------------------------------------------------


def _live(run_dir: Path, life: Life, before: Before, board: Board) -> None:
    """Go on from a checkpoint, then train and save until the kill."""
    for owner, name, place in (
        (saver.Saver, "_clean", "clean"),
        (restorer.Restorer, "restore", "restore"),
        (share.Share, "write", "write"),
        (saver, "commit", "commit"),
        (saver, "remove", "prune"),
    ):
        _mark(owner, name, board, place)
    run = Run(run_dir, TABLE, asynchronous=life.asynchronous, **life.keys)
    if (run_dir / "checkpoints").exists():
        assert not [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")]
    step = run.restore(before.begun_with if life.goes_back and before.steps else None) or 0
    assert step == before.begun_with, f"went on from step {step}, not {before.begun_with}"
    assert step == 0 or wrong_values(step, run.state) == []
    board["ready"] = 1
    while True:
        step += 1
        run.saver.wait_copied()
        _update(run.state, step)
        if run.saver.in_flight is not None:
            if run.saver.working:
                continue  # training goes on beside the save
            _book(run.saver.advance(), board)
            if run.saver.in_flight is not None:
                continue
        board["begun"] = step
        heldout = {"books": step * 7919 % 101 / 10}
        _book(run.saver.begin(step, {"step": step, "optimizer_steps": step, "heldout": heldout}), board)


def _update(state: Tensors, step: int) -> None:
    for tensors in state.values.values():
        for place, tensor in enumerate(tensors.values()):
            tensor.copy_(values_of(step, place, tensor.numel()))


def _book(outcome: saver.SaveOutcome | None, board: Board) -> None:
    if outcome is not None:
        assert outcome.problem is None, outcome
        board["ended"] = outcome.step


def _mark(owner: Any, name: str, board: Board, place: str) -> None:
    """Let a function say on the board that it is being run."""
    real = getattr(owner, name)

    def marked(*args: Any, **more: Any) -> Any:
        board[place] = 1
        try:
            return real(*args, **more)
        finally:
            board[place] = 0

    setattr(owner, name, marked)


# ---- what it left -------------------------------------------------------------------------------------------------


def problems_of(run_dir: Path, before: Before, begun: int, ended: int) -> list[str]:
    """List what is wrong with a run directory whose process was killed.

    Args:
        begun: the last step whose save was begun; the one it began with where there was none.
        ended: the last step whose save was said to have ended, likewise.
    """
    places = steps_in(run_dir / "checkpoints")
    found = [step for step, _ in places]
    names = [path.name for path in run_dir.glob("checkpoints/*")]
    problems = [
        f"{name} has no business there" for name in names if not name.startswith(("step_", ".tmp-", ".trash-"))
    ]
    for step, path in places:
        problems += _problems_of_step(step, path)
    newest = found[0] if found else 0
    latest = begun if ended > before.begun_with else max([begun, *before.steps])
    if not ended <= newest <= latest:
        problems.append(f"the newest step is {newest}: step {ended} was saved, and {begun} begun")
    return problems + _problems_of_load(run_dir, newest)


def _problems_of_step(step: int, path: Path) -> list[str]:
    state = Tensors(TABLE)
    try:
        reader = Reader(path)
        problems = reader.verify()
        if (told := reader.state()["step"]) != step:
            problems.append(f"{path.name}: its state is that of step {told}")
        tensors = CheckpointTensors(reader, TABLE)
        for name, values in state.values.items():
            for key, tensor in values.items():
                tensors.fill(key, name, tensor, 0, 1, 0)
    except (OSError, CheckpointError) as error:
        return [f"{path.name}: {error}"]
    return problems + [f"{path.name}: {text}" for text in wrong_values(step, state)]


def _problems_of_load(run_dir: Path, newest: int) -> list[str]:
    """Load as the next process does; the newest step must be what is loaded."""
    state, runtime = Tensors(TABLE), OneRank()
    everything: Any = (run_dir, TABLE, runtime, state)
    try:
        loaded = restorer.Restorer(*everything).restore(lambda _: [])
    except CheckpointError as error:
        return [f"nothing loads: {error}"]
    if (step := loaded["step"] if loaded else 0) != newest:
        return [f"step {step} was loaded, and the newest is {newest}"]
    return wrong_values(step, state) if step else []


def wrong_values(step: int, state: Tensors) -> list[str]:
    """List the tensors that do not hold a step's values, and whose they do hold."""
    problems = []
    for name, tensors in state.values.items():
        for place, (key, tensor) in enumerate(tensors.items()):
            if not torch.equal(tensor, values_of(step, place, tensor.numel())):
                others = sorted({int(value) % 16384 // 4 for value in tensor[:: max(1, tensor.numel() // 200)]})
                problems.append(f"{name} {key} is not of step {step} but of {others} (modulo 4096)")
    return problems
