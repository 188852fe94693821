"""Local workers, each a small program in place of one that needs torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import environment

from basestone.launch import local

DEADLINE_S = 20.0
Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a program as several workers; its argument is the test's folder."""
    monkeypatch.setattr(local, "GRACE_S", 0.3)

    def run_program(program: str, num_workers: int, log_dir: Path | None = None) -> int:
        words = [sys.executable, "-S", "-c", textwrap.dedent(program)]
        monkeypatch.setattr(local, "worker_command", lambda arguments: [*words, *arguments])
        return local.run_workers([str(tmp_path)], num_workers, log_dir)

    return run_program


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def wait_until(true: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# ---- a run that goes well -----------------------------------------------------------------------------------------

TELL = """
    import json, os, sys
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "BASESTONE_RENDEZVOUS", "OMP_NUM_THREADS")
    found = {name: os.environ[name] for name in names}
    found["pid"], found["group"] = os.getpid(), os.getpgid(0)
    found["meeting"] = os.path.isdir(os.path.dirname(found["BASESTONE_RENDEZVOUS"]))
    found["stdin"] = sys.stdin.read()
    with open(f"{sys.argv[1]}/{found['RANK']}.json", "w") as file:
        json.dump(found, file)
    print("rank", found["RANK"], "speaks", flush=True)
    print("and complains", file=sys.stderr)
"""


def test_every_rank_has_its_place_and_all_meet_in_one(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run(TELL, 3, tmp_path / "logs") == 0
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [(row["RANK"], row["LOCAL_RANK"]) for row in found] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {(row["WORLD_SIZE"], row["LOCAL_WORLD_SIZE"]) for row in found} == {("3", "3")}
    assert {row["OMP_NUM_THREADS"] for row in found} == {"7"}, "what the user gave is kept"
    (rendezvous,) = {row["BASESTONE_RENDEZVOUS"] for row in found}
    assert all(row["meeting"] for row in found) and not Path(rendezvous).parent.exists(), (
        "and it is cleaned away"
    )
    assert all(row["group"] == row["pid"] for row in found), (
        "the terminal's Ctrl-C must not reach workers by itself"
    )
    assert {row["stdin"] for row in found} == {""}


def test_rank_0_has_the_terminal_and_the_others_logs(run, tmp_path, capfd):
    assert run(TELL, 3, tmp_path / "logs") == 0
    out, err = capfd.readouterr()
    assert out == "rank 0 speaks\n" and err == "and complains\n"
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank_00001.log", "rank_00002.log"]
    assert (tmp_path / "logs" / "rank_00002.log").read_text() == "rank 2 speaks\nand complains\n"
    assert run(TELL, 2, tmp_path / "logs") == 0
    assert (tmp_path / "logs" / "rank_00001.log").read_text().count("rank 1 speaks") == 2, (
        "logs are appended to"
    )


def test_the_parents_signal_handlers_come_back(run):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert run("pass", 2) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# ---- ranks that fail ----------------------------------------------------------------------------------------------

RANK_FAILS = """
    import os, sys, time
    rank = os.environ["RANK"]
    open(f"{sys.argv[1]}/{rank}.pid", "w").write(str(os.getpid()))
    if rank == "FAILING":
        while not all(os.path.exists(f"{sys.argv[1]}/{other}.pid") for other in range(3)):
            time.sleep(0.01)
        for line in range(8):
            print("line", line)
        DEED
    time.sleep(60)
"""


def failing(rank: int, deed: str) -> str:
    return RANK_FAILS.replace("FAILING", str(rank)).replace("DEED", deed)


def all_gone(tmp_path: Path) -> bool:
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    return len(pids) == 3 and not any(map(is_alive, pids))


def test_the_first_failure_is_returned_and_explained_and_the_others_are_stopped(run, tmp_path, capfd):
    started_s = time.monotonic()
    assert run(failing(1, "sys.exit(76)"), 3, tmp_path / "logs") == 76
    assert time.monotonic() - started_s < 30 and all_gone(tmp_path)
    lines = capfd.readouterr().err.splitlines()
    log = tmp_path / "logs" / "rank_00001.log"
    assert lines == [f"error: rank 1 failed first; the end of {log}:", *(f"  line {n}" for n in range(3, 8))]


def test_rank_0_has_spoken_for_itself(run, tmp_path, capfd):
    assert run(failing(0, "sys.exit(64)"), 3, tmp_path / "logs") == 64
    out, err = capfd.readouterr()
    assert "line 7" in out and err == "" and all_gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM])
def test_a_killed_rank_is_named_with_its_signal(run, tmp_path, capfd, number):
    assert run(failing(2, f"os.kill(os.getpid(), {int(number)})"), 3, tmp_path / "logs") == 1
    err = capfd.readouterr().err
    hint = " (out of memory?)" if number == signal.SIGKILL else ""
    assert err == f"error: rank 2 was killed by {number.name}{hint}\n" and all_gone(tmp_path)


def test_a_killed_rank_is_the_cause_of_what_its_peers_say(run, tmp_path, capfd):
    """Rank 0 notices, and leaves with an error of its own before the parent looks again."""
    program = """
        import os, sys, time
        if os.environ["RANK"] == "0":
            while not os.path.exists(sys.argv[1] + "/1.pid"):
                time.sleep(0.001)
            os.kill(int(open(sys.argv[1] + "/1.pid").read()), 9)
            os._exit(1)
        open(sys.argv[1] + "/hidden", "w").write(str(os.getpid()))
        os.rename(sys.argv[1] + "/hidden", sys.argv[1] + "/1.pid")
        time.sleep(60)
    """
    seen = []
    for _ in range(3):
        (tmp_path / "1.pid").unlink(missing_ok=True)
        assert run(program, 2, tmp_path / "logs") == 1
        seen.append(capfd.readouterr().err)
    # A look may fall between the two deaths, which are a moment apart; most do not.
    assert "error: rank 1 was killed by SIGKILL (out of memory?)\n" in seen


class Ended:
    """A worker that has ended, or with None still runs."""

    def __init__(self, returncode: int | None) -> None:
        self.returncode = returncode

    def poll(self) -> int | None:
        return self.returncode


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ([0, None, 0], None),
        ([1, 76], 1),  # rank 0 only lost contact
        ([1, 1, 74], 2),
        ([-6, 1, 64], 2),  # a communication library aborts where a peer is gone
        ([76, 76], 0),
        ([75, 74], 1),
        ([75, 1], 0),
        ([1, -9], 1),
        ([1, 1], 0),
        ([None, 1, None], 1),
    ],
)
def test_the_rank_that_says_why_is_the_cause(codes, cause):
    assert local._first_failure([Ended(code) for code in codes]) == cause


@pytest.mark.parametrize(
    ("codes", "known", "cause"),
    [
        ([75, 1], 1, 0),  # it stopped, and took a moment to be gone
        ([1, 76], 0, 1),
        ([1, -9], 0, 0),
        ([74, 76], 1, 1),
        ([64, 1], 0, 0),
        ([1, 76, 76], 2, 1),
        ([64, 64], 1, 0),  # both say the same, and rank 0 has said it here
    ],
)
def test_a_cause_gives_way_only_to_one_that_says_why_or_the_same(codes, known, cause):
    assert local._first_failure([Ended(code) for code in codes], known) == cause


def test_what_all_ranks_say_is_said_once(run, tmp_path, capfd):
    """Rank 0 says it last."""
    program = """
        import os, sys, time
        time.sleep(0.3 if os.environ["RANK"] == "0" else 0)
        print("wrong key", file=sys.stderr)
        sys.exit(64)
    """
    assert run(program, 3, tmp_path / "logs") == 64
    assert capfd.readouterr().err == "wrong key\n"


def test_a_rank_that_says_why_is_heard_after_one_that_lost_contact(run, tmp_path, capfd):
    program = """
        import os, sys, time
        if os.environ["RANK"] == "1":
            time.sleep(0.2)
            print("the shard is damaged")
            sys.exit(76)
        sys.exit(1)
    """
    assert run(program, 2, tmp_path / "logs") == 76
    assert capfd.readouterr().err.splitlines()[1:] == ["  the shard is damaged"]


@pytest.mark.faults
def test_a_worker_that_will_not_stop_is_killed(run, tmp_path):
    started_s = time.monotonic()
    program = failing(1, "sys.exit(3)").replace(
        "time.sleep(60)", "signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    )
    assert run(program.replace("import os", "import signal, os"), 3, tmp_path / "logs") == 3
    assert time.monotonic() - started_s < 30 and all_gone(tmp_path)


def test_a_worker_that_cannot_be_started_leaves_none_behind(run, tmp_path, monkeypatch):
    started, start = [], local._start

    def remember(*arguments: Any) -> Any:
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(local, "_start", remember)
    (tmp_path / "logs").touch()
    with pytest.raises(FileExistsError):
        run("import time; time.sleep(60)", 2, tmp_path / "logs")
    assert len(started) == 1 and started[0].returncode == -signal.SIGKILL


def test_a_rank_that_stopped_on_request_is_no_error(run, tmp_path, capfd):
    assert run("import sys; sys.exit(75)", 2, tmp_path / "logs") == 75
    assert capfd.readouterr().err == ""


# ---- signals to the parent ----------------------------------------------------------------------------------------

PARENT = """
import sys
from pathlib import Path
from basestone.launch import local
local.GRACE_S = 0.5
program, folder, num_workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
local.worker_command = lambda arguments: [sys.executable, "-S", "-c", program, *arguments]
sys.exit(local.run_workers([folder], num_workers, Path(folder) / "logs"))
"""

SAVES_WHEN_ASKED = """
import os, signal, sys, time
rank, asked = os.environ["RANK"], []
signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
open(f"{sys.argv[1]}/{rank}.tmp", "w").write(str(os.getpid()))
os.rename(f"{sys.argv[1]}/{rank}.tmp", f"{sys.argv[1]}/{rank}.pid")
while not asked:
    time.sleep(0.01)
time.sleep(0.3)
open(f"{sys.argv[1]}/{rank}.asked", "w").write(str(asked))
sys.exit(75)
"""
KNOWS_NO_SIGNALS = """
import os, sys, time
open(f"{sys.argv[1]}/{os.environ['RANK']}.tmp", "w").write(str(os.getpid()))
os.rename(f"{sys.argv[1]}/{os.environ['RANK']}.tmp", f"{sys.argv[1]}/{os.environ['RANK']}.pid")
time.sleep(60)
"""


def start_parent(program: str, tmp_path: Path, num_workers: int = 2) -> subprocess.Popen[str]:
    """Start a parent in a process group of its own and wait until its workers are there."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, program, str(tmp_path), str(num_workers)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == num_workers, "the workers did not start")
    return parent


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_worker_once_and_75_is_returned(tmp_path, number):
    parent = start_parent(SAVES_WHEN_ASKED, tmp_path, 3)
    os.killpg(parent.pid, number)  # as a terminal does: to the whole group
    _, err = parent.communicate(timeout=DEADLINE_S)
    assert (parent.returncode, err) == (75, "")
    assert [(tmp_path / f"{rank}.asked").read_text() for rank in range(3)] == ["[15]"] * 3


@pytest.mark.faults
def test_workers_that_are_stopped_before_they_can_listen_are_no_error(tmp_path):
    parent = start_parent(KNOWS_NO_SIGNALS, tmp_path)
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=DEADLINE_S)
    assert (parent.returncode, err) == (75, "")


@pytest.mark.faults
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_signal_while_workers_are_started_stops_all(run, tmp_path, monkeypatch, num_workers):
    started, start = [], local._start

    def ask_after_the_first(*arguments: Any) -> Any:
        started.append(start(*arguments))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(local, "_start", ask_after_the_first)
    assert run("import time; time.sleep(60)", num_workers, tmp_path / "logs") == 75
    assert len(started) == 1 and started[0].poll() is not None


@pytest.mark.faults
def test_a_killed_parent_leaves_no_worker(tmp_path):
    parent = start_parent(KNOWS_NO_SIGNALS, tmp_path)
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert all(map(is_alive, pids))
    parent.kill()
    parent.communicate(timeout=DEADLINE_S)
    wait_until(lambda: not any(map(is_alive, pids)), "workers outlived their parent")


@pytest.mark.faults
def test_a_worker_whose_parent_died_before_it_was_watched_ends():
    child = os.fork()
    if child == 0:
        try:
            local.die_with_parent(1 << 30)  # not the parent's number: it has another by now
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
