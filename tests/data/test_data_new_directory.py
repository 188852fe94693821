"""A directory that appears whole or not at all, whoever else wants the name."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from basestone.data import storage
from basestone.data.errors import DataConfigError, DataStorageError
from basestone.data.storage import make_readable, new_directory

ROOT = Path(storage.__file__).resolve().parents[1]
HOLD = """
import sys
from pathlib import Path
from basestone.data.storage import new_directory
with new_directory(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("written")
    print(partial, flush=True)
    sys.stdin.read()
"""
RACE = """
import sys
from pathlib import Path
from basestone.data.errors import DataConfigError
from basestone.data.storage import new_directory
print("ready", flush=True)
sys.stdin.readline()
try:
    with new_directory(Path(sys.argv[1])) as partial:
        for name in "abc":
            (partial / name).write_text(sys.argv[2])
except DataConfigError as error:
    assert "another process is writing it" in str(error) or "exists already" in str(error), error
    sys.exit(64)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a script and wait for its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_gets_its_name_at_the_end(tmp_path):
    out = tmp_path / "new" / "parents" / "out"
    with new_directory(out) as partial:
        (partial / "file").write_text("whole")
        assert not out.exists()
    assert names(out.parent) == ["out"] and (out / "file").read_text() == "whole"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    with pytest.raises(error), new_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("half")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["directory", "full directory", "file", "dangling link", "link"])
def test_what_appeared_meanwhile_is_not_touched(tmp_path, kind):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    refused = pytest.raises(DataConfigError, match="out: exists already; remove it or name another")
    with refused, new_directory(out):
        if kind.endswith("directory"):
            out.mkdir()
            for name in ["theirs"] if kind.startswith("full") else []:
                (out / name).write_text("")
        elif kind == "file":
            out.write_text("theirs")
        else:
            out.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    assert names(tmp_path) == ["other", "out"] and names(other) == []


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_appears_at_the_last_moment_is_not_touched(tmp_path, monkeypatch, kind):
    """After the look and before the rename."""
    out, rename = tmp_path / "out", os.rename

    def late(source: Path, target: Path) -> None:
        if kind == "file":
            out.write_text("theirs")
        else:
            out.mkdir()
            (out / "theirs").write_text("")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(DataConfigError, match="exists already"), new_directory(out) as partial:
        (partial / "ours").write_text("")
    assert names(tmp_path) == ["out"] and not (out / "ours").exists()


@pytest.mark.faults
def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    first = start(HOLD, tmp_path / "out")
    refused = pytest.raises(DataConfigError, match="out: another process is writing it; wait for that one")
    with refused, new_directory(tmp_path / "out"):
        pytest.fail("it began")
    with new_directory(tmp_path / "out.b"):  # of a name that begins alike
        pass
    first.communicate("", timeout=60)
    assert first.returncode == 0
    assert names(tmp_path) == ["out", "out.b"] and (tmp_path / "out" / "half").exists()


@pytest.mark.faults
def test_what_a_kill_left_is_cleared_by_the_next(tmp_path):
    """What is of another name, a file or a link stays."""
    killed = start(HOLD, tmp_path / "out")
    killed.kill()
    killed.communicate(timeout=60)
    assert [name.endswith(".partial") for name in names(tmp_path)] == [True]
    kept = [".out.00000001.partial", ".out.00000002.partial", ".out.b.00000003.partial", "elsewhere"]
    (tmp_path / kept[0]).write_text("")
    (tmp_path / kept[1]).symlink_to(tmp_path / kept[3])
    for name in kept[2:]:
        (tmp_path / name).mkdir()
    with new_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == [*kept, "out"]


@pytest.mark.faults
def test_of_many_at_once_at_most_one_wins(tmp_path):
    won = 0
    for attempt in range(5):
        out = tmp_path / f"out-{attempt}"
        processes = [start(RACE, out, number) for number in range(4)]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            process.communicate(timeout=60)
        winners = [number for number, process in enumerate(processes) if process.returncode == 0]
        assert {process.returncode for process in processes} <= {0, 64} and len(winners) <= 1
        assert out.exists() == bool(winners)
        if winners:
            assert [(out / name).read_text() for name in "abc"] == [str(winners[0])] * 3
        won += len(winners)
    left = [f"out-{attempt}" for attempt in range(5)]
    assert set(names(tmp_path)) <= set(left) and len(names(tmp_path)) == won


def test_without_locks_nothing_is_cleared_and_all_else_works(tmp_path, monkeypatch):
    (tmp_path / ".out.00000001.partial").mkdir()

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with new_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".out.00000001.partial", "out"]


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(DataConfigError, match="choose another path"), new_directory(out):
            pytest.fail("it began")


@pytest.mark.parametrize("out", ["/proc/out", f"{'n' * 250}"])
def test_a_place_that_cannot_be_written(tmp_path, out):
    with pytest.raises(DataStorageError, match=r"writing .* failed: "), new_directory(tmp_path / out):
        pytest.fail("it began")
    assert names(tmp_path) == []


def test_readable_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        with new_directory(tmp_path / "out") as partial:
            (partial / "b").write_text("")
            (partial / "a").write_text("")
            assert make_readable(partial) == ("a", "b")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "out", tmp_path / "out" / "a")]
    assert modes == [0o755, 0o644]
