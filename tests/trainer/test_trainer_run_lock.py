"""The lock of a run directory, with real processes: one run at a time, and free however its process ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import in_child, kill

from basestone.trainer import run_lock
from basestone.trainer.errors import ConfigError
from basestone.trainer.run_lock import BEAT, LOCK, RunLock
from basestone.trainer.rundir import RunDirectory, make_run_directory

HOST = socket.gethostname()
BEAT_S = 0.05
HOLD = """
import sys, time
from pathlib import Path
from basestone.trainer.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def lock_here(path: Path, watch_s: float = 20 * BEAT_S) -> RunLock:
    """Take the lock with short intervals; they count where there is no flock."""
    return RunLock(path, beat_s=BEAT_S, watch_s=watch_s)


def hold(path: Path) -> str:
    """Take the lock and keep it for as long as the process lives."""
    hold.lock = lock_here(path)  # type: ignore[attr-defined]
    return "held"


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        lock_here(path, watch_s=60)  # a busy machine may raise a counter late
    assert caught.value.exit_code == 64
    return str(caught.value)


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, in this process and its children."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """Another process that holds the lock of `tmp_path`."""
    child, text = in_child(lambda: hold(tmp_path))
    assert text == "held"
    yield child
    kill(child)


# ---- the kernel's lock --------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_lock_second_run(tmp_path):
    """The second one is another program, not a copy of the first."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        try:
            for take in (RunLock, RunDirectory):
                with pytest.raises(ConfigError) as caught:
                    take(tmp_path)
                since = json.loads((tmp_path / LOCK).read_text())["since"]
                assert str(caught.value) == (
                    f"run directory {tmp_path}: another run holds it (pid {first.pid} on {HOST} since {since}); wait "
                    "for it, stop it, or choose another directory"
                )
            second = subprocess.run(command, capture_output=True, text=True)
            assert second.returncode == 1 and f"pid {first.pid} on {HOST}" in second.stderr
        finally:
            first.kill()


def test_a_lock_given_back_is_free(tmp_path):
    lock = lock_here(tmp_path)
    assert "another run holds it" in refusal(tmp_path), "also within a process"
    lock.close()
    lock.close()
    lock_here(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_lock_after_kill(tmp_path, number):
    child, text = in_child(lambda: hold(tmp_path))
    assert text == "held" and f"pid {child} on {HOST}" in refusal(tmp_path)
    os.kill(child, number)
    if number == signal.SIGSTOP:
        assert f"another run holds it (pid {child} on {HOST}" in refusal(tmp_path), "it may go on"
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock = lock_here(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.close()


@pytest.mark.faults
def test_lock_orphan_child(tmp_path):
    """A worker that was forked outlives its killed run, and keeps nothing: neither the lock nor its descriptor."""

    def hold_and_fork() -> str:
        hold(tmp_path)
        worker = os.fork()
        if worker == 0:
            time.sleep(600)
        return str(worker)

    child, worker = in_child(hold_and_fork)
    try:
        assert f"pid {child} on" in refusal(tmp_path), "the child's end of it changed nothing for the holder"
        kill(child)
        os.kill(int(worker), 0)
        lock_here(tmp_path).close()
    finally:
        os.kill(int(worker), signal.SIGKILL)


@pytest.mark.faults
def test_lock_orphan_child_that_got_the_descriptor(tmp_path):
    """One that was handed the open file keeps the lock; the refusal names it, not only the dead holder."""

    def hold_and_hand_over() -> str:
        hold(tmp_path)
        descriptor = hold.lock._descriptor  # type: ignore[attr-defined]
        return str(subprocess.Popen(["sleep", "600"], pass_fds=[descriptor]).pid)

    child, sleeper = in_child(hold_and_hand_over)
    try:
        assert "another run holds it" in refusal(tmp_path)
        kill(child)
        text = refusal(tmp_path)
        assert f"run directory {tmp_path}: pid {child} on {HOST} since " in text
        assert f" is dead, but its lock is held by pid {sleeper} (sleep); stop what is left of it, or " in text
    finally:
        os.kill(int(sleeper), signal.SIGKILL)
    while "sleep" in run_lock_names(tmp_path):
        time.sleep(0.01)
    lock_here(tmp_path).close()


def run_lock_names(path: Path) -> str:
    return " ".join(run_lock._holding((path / LOCK).stat()))


@pytest.mark.faults
def test_a_program_that_the_holder_started_does_not_keep_the_lock(tmp_path):
    def hold_and_start() -> str:
        hold(tmp_path)
        return str(subprocess.Popen(["sleep", "600"], close_fds=False).pid)

    child, sleeper = in_child(hold_and_start)
    kill(child)
    try:
        os.kill(int(sleeper), 0)
        lock_here(tmp_path).close()
    finally:
        os.kill(int(sleeper), signal.SIGKILL)


@pytest.mark.faults
def test_a_holder_on_another_host_is_named_with_what_nfs_does(tmp_path, holder):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "node-17", "since": "noon"}))
    text = refusal(tmp_path)
    assert "another run holds it (pid 1 on node-17 since noon); wait for it" in text
    assert text.endswith("; on NFS the lock of a host that died lasts about 90 s")


@pytest.mark.faults
@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"7", b'{"pid": "x"}', b"[" * 5000])
def test_a_lock_file_that_says_nothing_still_locks(tmp_path, holder, content):
    (tmp_path / LOCK).write_bytes(content)
    assert "another run holds it (" in refusal(tmp_path)


# ---- without the kernel's lock ------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_lock_without_flock(tmp_path, monkeypatch, caplog, number):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    child, text = in_child(lambda: hold(tmp_path))
    try:
        assert text == "held"
        assert f"another run holds it (pid {child} on {HOST} since " in refusal(tmp_path)
        assert json.loads((tmp_path / BEAT).read_text())["pid"] == child, "the refused one left it alone"
    finally:
        kill(child)
    caplog.clear()
    lock = lock_here(tmp_path)
    assert f"pid {child} on {HOST}" in caplog.text and "stands still; taking over" in caplog.text
    first = json.loads((tmp_path / BEAT).read_text())
    while json.loads((tmp_path / BEAT).read_text())["count"] < first["count"] + 3:
        time.sleep(BEAT_S)
    assert first["pid"] == os.getpid()
    lock.close()
    assert not (tmp_path / BEAT).exists()
    caplog.clear()
    lock_here(tmp_path).close()
    assert caplog.text == "", "one that was closed is not waited for"


@pytest.mark.faults
def test_another_error_of_flock_is_not_taken_for_no_locks(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        lock_here(tmp_path)
    assert not (tmp_path / BEAT).exists()


@pytest.mark.faults
def test_of_two_that_begin_without_flock_at_once_one_goes_on(tmp_path, no_flock):
    ours, theirs = os.pipe()

    def wait_and_hold() -> str:
        os.read(ours, 1)
        hold.lock = RunLock(tmp_path, beat_s=5, watch_s=60)  # type: ignore[attr-defined]
        return "held"

    children: list[int] = []
    answers: list[str] = []

    def start() -> None:
        child, text = in_child(wait_and_hold)
        children.append(child)
        answers.append(text)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    os.write(theirs, b"xx")
    for thread in threads:
        thread.join()
    for child in children:
        kill(child)
    assert answers.count("held") == 1, answers
    assert any("began at the same time, and holds it" in text or "another run" in text for text in answers)


@pytest.mark.faults
def test_one_that_was_stopped_too_long_is_told_that_it_was_replaced(tmp_path, no_flock, caplog):
    lock = lock_here(tmp_path)
    other = {"pid": 4711, "host": "node-17", "since": "noon", "token": "other", "count": 1}
    (tmp_path / BEAT).write_text(json.dumps(other))
    lock._beat._thread.join()
    assert "pid 4711 on node-17 since noon has taken it over" in caplog.text
    lock.close()
    assert json.loads((tmp_path / BEAT).read_text()) == other, "it is the other's now"


@pytest.mark.faults
def test_a_beat_that_cannot_be_written_is_told_and_tried_again(tmp_path, no_flock, caplog):
    lock = lock_here(tmp_path)
    (tmp_path / f".{BEAT}.{os.uname().nodename}.{os.getpid()}").mkdir()
    while "the counter of the lock was not raised" not in caplog.text:
        time.sleep(BEAT_S)
    (tmp_path / f".{BEAT}.{os.uname().nodename}.{os.getpid()}").rmdir()
    count = json.loads((tmp_path / BEAT).read_text())["count"]
    while json.loads((tmp_path / BEAT).read_text())["count"] == count:
        time.sleep(BEAT_S)
    lock.close()


@pytest.mark.faults
def test_a_counter_that_moves_counts_where_there_is_flock_too(tmp_path, monkeypatch):
    """A host that mounts the directory without locks may hold it."""
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none")))
        child, text = in_child(lambda: hold(tmp_path))
    assert text == "held"
    try:
        assert f"another run holds it (pid {child} on " in refusal(tmp_path)
    finally:
        kill(child)
    lock_here(tmp_path).close()
    assert not (tmp_path / BEAT).exists()


# ---- clocks -------------------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
@pytest.mark.parametrize("flock", [True, False])
def test_clock_jump(tmp_path, monkeypatch, jump_s, flock):
    """Neither a holder's clock, nor ours, nor the times of files decide who holds the lock."""
    if not flock:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none")))
    real = time.time

    def jump_and_hold() -> str:
        time.time = lambda: real() - jump_s
        return hold(tmp_path)

    child, text = in_child(jump_and_hold)
    assert text == "held"
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    try:
        for path in tmp_path.iterdir():
            os.utime(path, (real() + jump_s, real() + jump_s))
        assert "another run holds it" in refusal(tmp_path), "a live one is not taken for a dead one"
    finally:
        kill(child)
    for path in tmp_path.iterdir():
        os.utime(path, (real() + jump_s, real() + jump_s))
    lock_here(tmp_path).close()  # and a dead one not for a live one


# ---- links --------------------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("take", [RunLock, make_run_directory, RunDirectory])
@pytest.mark.parametrize("there", [True, False])
def test_a_lock_that_is_a_link_is_refused_and_its_target_untouched(tmp_path, take, there):
    run_dir, target = tmp_path / "run", tmp_path / "mine.txt"
    run_dir.mkdir()
    if there:
        target.write_text("mine")
    (run_dir / LOCK).symlink_to(target)
    with pytest.raises(ConfigError) as caught:
        take(run_dir)
    assert str(caught.value) == f"{run_dir / LOCK}: is a link, and a lock must be a file; remove the link"
    assert target.read_text() == "mine" if there else not target.exists()
    (run_dir / LOCK).unlink()
    lock_here(run_dir).close()


@pytest.mark.faults
def test_a_counter_that_is_a_link_is_replaced_and_its_target_untouched(tmp_path, no_flock):
    run_dir, target = tmp_path / "run", tmp_path / "mine.txt"
    run_dir.mkdir()
    target.write_text("mine")
    (run_dir / BEAT).symlink_to(target)
    lock = lock_here(run_dir)
    assert not (run_dir / BEAT).is_symlink()
    lock.close()
    assert target.read_text() == "mine" and not (run_dir / BEAT).exists()
