"""Files of a checkpoint as they are written and removed: durable before they are named, whole or absent."""

from __future__ import annotations

import builtins
import errno
import fcntl
import hashlib
import io
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from step_files import problem, save, write_ranks

from basestone.data import storage as files
from basestone.data.storage import write_atomic
from basestone.trainer.checkpoint import writer
from basestone.trainer.checkpoint.format import steps_in
from basestone.trainer.checkpoint.writer import RankWriter, commit, discard, remove
from basestone.trainer.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("small_blocks")

REAL_PWRITE = os.pwrite
PAGE_BYTES = 4096


def test_an_existing_name_is_refused(tmp_path):
    final = save(tmp_path)
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    with pytest.raises(CheckpointError, match="exists already; a step directory is never written twice"):
        save(tmp_path)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before


@pytest.mark.parametrize("kind", ["missing", "other size", "one more"])
def test_other_files_than_announced_name_the_shared_disk(tmp_path, kind):
    temporary, final = tmp_path / ".tmp", tmp_path / "step_00000001"
    index = write_ranks(temporary)
    if kind == "missing":
        (temporary / "rank_00001.bin").unlink()
    elif kind == "other size":
        os.truncate(temporary / "rank_00001.bin", 149)
    else:
        (temporary / "rank_00003.bin").touch()
    with pytest.raises(CheckpointError, match="is the run directory on a disk that all nodes share"):
        commit(temporary, final, index, {})
    assert not final.exists()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What asks the disk for durability, and what renames or deletes, in order, by names."""
    made: list[tuple[str, ...]] = []

    def record(name: str, *shown: int) -> None:
        real = getattr(os, name)

        def call(*args: Any, **more: Any) -> Any:
            paths = [os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) else str(a) for a in args]
            made.append((name, *(Path(paths[i]).name for i in shown)))
            return real(*args, **more)

        monkeypatch.setattr(os, name, call)

    record("fsync", 0)
    record("rename", 0, 1)
    record("replace", 0, 1)
    record("unlink", 0)
    return made


@pytest.mark.faults
def test_fsync_order(tmp_path, calls):
    save(tmp_path / "checkpoints")
    made = [tuple("temporary" if part.startswith(".tmp-") else part for part in call) for call in calls]
    expected: list[tuple[str, ...]] = [("fsync", f"rank_{rank:05d}.bin") for rank in range(3)]
    for name in ("index.json", "state.json", "MANIFEST.json"):
        hidden = f".{name}.{os.uname().nodename}.{os.getpid()}"
        expected += [("fsync", hidden), ("replace", hidden, name), ("fsync", "temporary")]
    expected += [("rename", "temporary", "step_00000001"), ("fsync", "checkpoints")]
    assert [call for call in made if call[0] != "unlink"] == expected


def test_a_removal_is_durable_before_the_first_file_goes(tmp_path, calls):
    final = save(tmp_path / "checkpoints")
    calls.clear()
    remove([final])
    assert calls[:2] == [("rename", "step_00000001", ".trash-step_00000001"), ("fsync", "checkpoints")]
    assert {call[0] for call in calls[2:]} == {"unlink"} and len(calls) == 2 + 6
    assert list((tmp_path / "checkpoints").iterdir()) == []


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def short(fd: int, data: memoryview, position: int) -> int:
    """Write as a disk that fills up does: half of a block."""
    return REAL_PWRITE(fd, data[: PAGE_BYTES * 2] if is_direct(fd) else data, position)


def other_blocks(fd: int, data: memoryview, position: int) -> int:
    """Write as a disk does that takes other blocks than ours."""
    if is_direct(fd):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return REAL_PWRITE(fd, data, position)


@pytest.mark.parametrize("disk", [REAL_PWRITE, short, other_blocks])
def test_blocks_go_past_the_page_cache_where_the_disk_takes_them(tmp_path, monkeypatch, disk):
    block, sizes, direct = 4 * PAGE_BYTES, (1, 3 * PAGE_BYTES, 70_000, 0, 200_001), []

    def pwrite(fd: int, data: memoryview, position: int) -> int:
        direct.append(is_direct(fd))
        return disk(fd, data, position)

    monkeypatch.setattr(writer, "BLOCK_BYTES", block)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with RankWriter(tmp_path / "rank") as out:
        for number, size in enumerate(sizes):
            data = bytearray(random.Random(number).randbytes(size))
            out.write(memoryview(data))
            data[:] = bytes(size)  # it belongs to the caller again
    expected = b"".join(random.Random(number).randbytes(size) for number, size in enumerate(sizes))
    assert (tmp_path / "rank").read_bytes() == expected and out.written == len(expected)
    assert out.blocks == [
        hashlib.sha256(expected[start : start + block]).hexdigest() for start in range(0, len(expected), block)
    ]
    assert direct[-1] is False  # the last block is no whole one
    if disk is REAL_PWRITE and direct[0]:  # else the file system has a page cache alone
        assert direct == [True] * (len(expected) // block) + [False]


class Disk:
    """A disk with room for some bytes; when it is full a write takes what fits, then fails."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        self._lock = threading.Lock()

    def take(self, data: Any) -> memoryview:
        """Give what fits."""
        with self._lock:
            fitting = memoryview(data)[: self.free_bytes]
            if not fitting and len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.free_bytes -= len(fitting)
            return fitting

    def pwrite(self, fd: int, data: Any, position: int) -> int:
        return REAL_PWRITE(fd, self.take(data), position)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let everything that a checkpoint writes go to this disk."""
        monkeypatch.setattr(files, "open", self.open, raising=False)
        monkeypatch.setattr(os, "pwrite", self.pwrite)

    def open(self, path: Path, mode: str) -> Any:
        if mode == "rb":
            return builtins.open(path, mode)
        return io.BufferedWriter(_FileOn(self, path, mode))


class _FileOn(io.FileIO):
    def __init__(self, disk: Disk, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self._disk = disk

    def write(self, data: Any) -> int:
        return super().write(self._disk.take(data)) or 0


@pytest.mark.faults
def test_a_full_disk_at_any_write_leaves_no_step(tmp_path, monkeypatch):
    total = sum(path.stat().st_size for path in save(tmp_path / "whole").iterdir())
    budgets = [*range(0, total, 37), total - 1]
    assert len(budgets) > 20
    for free_bytes in budgets:
        Disk(free_bytes).install(monkeypatch)
        checkpoints = tmp_path / str(free_bytes)
        with pytest.raises(OSError) as caught:
            save(checkpoints)
        assert caught.value.errno == errno.ENOSPC
        assert steps_in(checkpoints) == []
    Disk(total).install(monkeypatch)
    assert problem(save(tmp_path / "enough")) == ""


@pytest.mark.faults
def test_write_atomic_on_a_full_disk_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    write_atomic(path, b"old")
    for free_bytes in range(10):
        Disk(free_bytes).install(monkeypatch)
        with pytest.raises(OSError, match="No space"):
            write_atomic(path, b"a new line")
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    Disk(10).install(monkeypatch)
    write_atomic(path, b"a new line")
    assert path.read_bytes() == b"a new line" and list(tmp_path.iterdir()) == [path]


def killed_at(number: int, names: tuple[str, ...], work: Callable[[], object]) -> bool:
    """Do `work` in a child that is killed before its `number`-th call of these os functions; tell whether it was."""
    child = os.fork()
    if child == 0:
        left = number

        def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return real(*args, **more)

            return call

        try:
            for name in names:
                setattr(os, name, deadly(getattr(os, name)))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


CALLS = ("fsync", "rename", "replace", "unlink", "rmdir")


@pytest.mark.faults
def test_write_atomic_killed_anywhere_leaves_old_or_new(tmp_path):
    path, seen = tmp_path / "latest", []
    for number in range(20):
        write_atomic(path, b"old")
        killed = killed_at(number, CALLS, lambda: write_atomic(path, b"new"))
        seen.append(path.read_bytes())
        assert seen[-1] in (b"old", b"new")
        if not killed:
            break
    assert seen[0] == b"old" and seen[-1] == b"new" and not killed and len(seen) > 3


@pytest.mark.faults
def test_save_killed_anywhere_leaves_a_whole_step_or_none(tmp_path):
    found = []
    for number in range(40):
        checkpoints = tmp_path / str(number)
        killed = killed_at(number, CALLS, lambda: save(checkpoints))  # noqa: B023  (called at once)
        steps = steps_in(checkpoints)
        assert all(problem(path) == "" for _, path in steps)
        found.append(len(steps))
        if not killed:
            break
    assert found[0] == 0 and found[-1] == 1 and sorted(found) == found and not killed and len(found) > 12


@pytest.mark.faults
def test_remove_killed_anywhere_leaves_no_half_step(tmp_path):
    found = []
    for number in range(40):
        checkpoints = tmp_path / str(number)
        save(checkpoints, 1)
        final = save(checkpoints, 2)
        killed = killed_at(number, CALLS, lambda: remove([final]))  # noqa: B023  (called at once)
        steps = steps_in(checkpoints)
        assert all(problem(path) == "" for _, path in steps)
        found.append(len(steps))
        if not killed:
            break
        save(checkpoints, 2) if len(steps) == 1 else None
        remove([final])  # what was left does not stand in the way of the next
        assert [number for number, _ in steps_in(checkpoints)] == [1]
    assert found[0] == 2 and found[-1] == 1 and not killed and len(found) > 7


def test_steps_are_listed_newest_first_and_nothing_else(tmp_path):
    assert steps_in(tmp_path / "nowhere") == []
    for name in (
        "step_00000009",
        "step_00000010",
        "step_100000000",
        ".tmp-step_00000011",
        ".trash-step_00000012",
    ):
        (tmp_path / name).mkdir()
    for name in ("step_", "step_x", "step_²", "step_-1", "step_00000013.bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000014").touch()
    assert [step for step, _ in steps_in(tmp_path)] == [100_000_000, 10, 9]


@pytest.mark.faults
def test_a_link_is_discarded_and_not_what_it_points_to(tmp_path):
    target = save(tmp_path / "elsewhere")
    link, gone = tmp_path / "step_00000001", tmp_path / "step_00000002"
    link.symlink_to(target)
    gone.symlink_to(tmp_path / "nothing")
    remove([link])
    discard(gone)
    discard(tmp_path / "step_00000003")  # nothing there
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"] and problem(target) == ""
    discard(target)
    assert not target.exists()
