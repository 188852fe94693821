"""Where a rank's swap files lie. DeepSpeed never removes them, and a killed run cannot.

Each rank has a directory of its own and holds a lock in it as long as it lives. Who begins sweeps the directories
away whose lock nobody holds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "basestone-"
LOCK = "lock"
GIB = 1 << 30


class SwapFolder:
    """A directory for one rank's swap files, removed by `close` or, after a crash, by the next run."""

    def __init__(self, parent: Path) -> None:
        """Sweep what dead runs left in `parent`, and make a directory in it."""
        with _swept(parent):
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            self._lock = open(self.path / LOCK, "w")  # noqa: SIM115 (held until close)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the directory with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


@contextlib.contextmanager
def _swept(parent: Path) -> Iterator[None]:
    """Remove what dead runs left, and keep others from making directories meanwhile."""
    parent.mkdir(parents=True, exist_ok=True)
    with open(parent / f".{PREFIX}{LOCK}", "w") as meeting:
        fcntl.flock(meeting, fcntl.LOCK_EX)  # or a directory that has no lock yet would look abandoned
        for path in parent.glob(f"{PREFIX}*"):
            if not _is_held(path):
                shutil.rmtree(path, ignore_errors=True)
        yield


def _is_held(folder: Path) -> bool:
    try:
        with open(folder / LOCK, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # held, or another user's
    return False


def swap_folder_problem(parent: Path, num_bytes: float) -> str | None:
    """Say why a directory cannot hold so many bytes of swap files; None where it can.

    They are written past the page cache, which not every file system can do.
    """
    try:
        with _swept(parent), _temporary(parent) as path:
            os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return "lies on a file system without direct I/O"
        return f"cannot be written: {error.strerror}"
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        return f"has {free / GIB:.1f} GiB free, and this host's ranks swap about {num_bytes / GIB:.1f} GiB"
    return None


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix=f".{PREFIX}", dir=parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        os.unlink(name)
