"""Forked ranks: answers in order, and every way in which one can fail to give its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist
from commands import environment

from basestone.trainer import forks
from basestone.trainer.errors import NumericsError
from basestone.trainer.forks import RankDied, run_ranks, threads_each

pytestmark = pytest.mark.dist


def rank() -> int:
    return int(os.environ["RANK"])


def _who(greeting):
    time.sleep(0.1 * (2 - rank()))  # the last one answers first
    return greeting, rank(), os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], os.getpid()


def test_answers_come_in_the_order_of_ranks():
    answers = run_ranks(_who, 3, "hello")
    assert [answer[:4] for answer in answers] == [("hello", number, "3", str(number)) for number in range(3)]
    assert len({os.getpid(), *(answer[4] for answer in answers)}) == 4, "each is a process of its own"
    assert "RANK" not in os.environ, "this process is no rank"


def _sum():
    store = dist.FileStore(os.environ["BASESTONE_RENDEZVOUS"], 2)
    dist.init_process_group("gloo", store=store, rank=rank(), world_size=2)
    total = torch.tensor([float(rank() + 1)])
    dist.all_reduce(total)
    return float(total)


def test_ranks_meet_again_and_again():
    assert [run_ranks(_sum, 2) for _ in range(3)] == [[3.0, 3.0]] * 3


def test_threads_are_a_share_of_the_cores_or_as_many_as_asked():
    assert run_ranks(torch.get_num_threads, 2) == [threads_each(2)] * 2
    assert run_ranks(torch.get_num_threads, 2, num_threads=3) == [3, 3]
    assert threads_each(10**6) == 1 and threads_each(1) == os.cpu_count()


# ---- a rank that says what is wrong -------------------------------------------------------------------------------


def _refuse_in(which):
    if rank() == which:
        raise NumericsError("the loss is not finite")
    time.sleep(60)


def test_the_first_error_is_raised_with_the_ranks_own_traceback():
    started_s = time.monotonic()
    with pytest.raises(NumericsError, match="the loss is not finite") as caught:
        run_ranks(_refuse_in, 3, 1)
    assert caught.value.exit_code == 76
    (note,) = caught.value.__notes__
    assert "Traceback" in note and "in _refuse_in" in note
    assert time.monotonic() - started_s < 20, "the others are not waited for"


class PickyError(Exception):
    """Its arguments are not its message, so that pickle cannot make it again."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"{what} {number}")


def _picky():
    raise PickyError("no", 7)


def _answer_that_does_not_travel():
    return lambda: None


def test_an_error_that_does_not_travel_is_told_by_name():
    with pytest.raises(RuntimeError) as caught:
        run_ranks(_picky, 2)
    assert str(caught.value) == "PickyError: no 7"
    assert "in _picky" in caught.value.__notes__[0]


def test_an_answer_that_does_not_travel_is_an_error():
    with pytest.raises(Exception, match="pickle"):
        run_ranks(_answer_that_does_not_travel, 1)


def _leave():
    sys.exit(3)


def test_a_rank_that_leaves_is_no_answer():
    with pytest.raises(SystemExit) as caught:
        run_ranks(_leave, 1)
    assert caught.value.code == 3


# ---- a rank that says nothing -------------------------------------------------------------------------------------


def _die_in(which, number):
    if rank() == which:
        os.kill(os.getpid(), number)
    time.sleep(60)


@pytest.mark.faults
@pytest.mark.parametrize(("which", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_killed_rank_is_named_at_once(which, number):
    started_s = time.monotonic()
    with pytest.raises(RankDied) as caught:
        run_ranks(_die_in, 2, which, number)
    assert str(caught.value) == f"rank {which} died without an answer (exit code {-number})"
    assert caught.value.exit_code == 76
    assert time.monotonic() - started_s < 20


def _die_in_the_middle_of_the_answer():
    write = Connection._send

    def half(self, buffer, *more):
        write(self, bytes(buffer)[: len(buffer) // 2], *more)
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = half
    return "an answer"


@pytest.mark.faults
def test_a_rank_killed_in_the_middle_of_its_answer_is_named():
    with pytest.raises(RankDied, match="rank 0 died without an answer"):
        run_ranks(_die_in_the_middle_of_the_answer, 1)


def _meet_and_lose_one(dies):
    _sum()
    if rank() == 1:
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        raise NumericsError("the cause")
    dist.all_reduce(torch.zeros(1))  # loses contact


@pytest.mark.faults
@pytest.mark.parametrize(
    ("dies", "error", "message"), [(True, RankDied, "rank 1"), (False, NumericsError, "the cause")]
)
def test_the_cause_is_told_where_others_lost_contact_with_it(dies, error, message, monkeypatch):
    """Even where their error is there to be read by the time that anyone looks."""
    collect = forks._collect

    def late(*arguments):
        time.sleep(1.5)
        return collect(*arguments)

    monkeypatch.setattr(forks, "_collect", late)
    with pytest.raises(error, match=message):
        run_ranks(_meet_and_lose_one, 2, dies)


def _hang_in(which):
    if rank() == which:
        time.sleep(60)
    return os.getpid()


def test_a_rank_that_hangs_is_named_when_the_time_is_over():
    started_s = time.monotonic()
    with pytest.raises(RankDied) as caught:
        run_ranks(_hang_in, 3, 1, timeout_s=2)
    assert str(caught.value) == "rank 1 gave no answer within 2 s"
    assert 2 <= time.monotonic() - started_s < 20


# ---- nobody is left behind ----------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(pids: list[int]) -> bool:
    deadline_s = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def _tell_pid(folder):
    (folder / f"{rank()}.tmp").write_text(str(os.getpid()))
    (folder / f"{rank()}.tmp").rename(folder / f"{rank()}.pid")
    if rank() == 1 and (folder / "fail").exists():
        while len(list(folder.glob("*.pid"))) < 2:
            time.sleep(0.01)
        raise ValueError("enough")
    time.sleep(60)


def pids_in(folder) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("*.pid")]


def test_the_others_are_stopped_when_one_fails(tmp_path):
    (tmp_path / "fail").touch()
    with pytest.raises(ValueError, match="enough"):
        run_ranks(_tell_pid, 2, tmp_path)
    assert len(pids_in(tmp_path)) == 2 and all_gone(pids_in(tmp_path))


PARENT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_trainer_forks import _tell_pid
from basestone.trainer.forks import run_ranks
run_ranks(_tell_pid, 2, Path(sys.argv[2]))
"""


@pytest.mark.faults
def test_a_killed_parent_takes_its_ranks_with_it(tmp_path):
    tests = os.path.dirname(__file__)
    path = os.pathsep.join(filter(None, [os.path.dirname(tests), os.environ.get("PYTHONPATH", "")]))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, tests, str(tmp_path)], env=environment() | {"PYTHONPATH": path}
    )
    try:
        deadline_s = time.monotonic() + 120
        while len(pids_in(tmp_path)) < 2 and time.monotonic() < deadline_s and parent.poll() is None:
            time.sleep(0.02)
        pids = pids_in(tmp_path)
        assert len(pids) == 2 and all(map(is_alive, pids))
    finally:
        parent.kill()
        parent.wait()
    assert all_gone(pids)
