"""Write a step directory: rank files, then index, state and manifest, then the name. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.storage import sync_directory, write_atomic
from ..errors import CheckpointError
from .format import BLOCK_BYTES, FORMAT, INDEX, MANIFEST, STATE

Buffer = NDArray[np.uint8]
BUFFERS = 6  # blocks of a rank that are filled, hashed and written at one time
THREADS = 4  # two cores hash while two writes keep a disk busy


@dataclass
class RankWriter:
    """Writes one rank's file block by block, and hashes each meanwhile.

    Blocks go past the kernel's page cache where the file system allows it: to copy them there costs more time of the
    cores than their hashes, and takes memory from what trains beside it (docs/decisions/0006).
    """

    path: Path
    blocks: list[str] = field(default_factory=list)
    written: int = 0

    def __enter__(self) -> RankWriter:
        self._fd = _open_new(self.path)
        self._pool = ThreadPoolExecutor(THREADS, "write")
        self._under_way: deque[tuple[Buffer, Future[None], Future[str]]] = deque()
        self._buffer, self._filled = _new_buffer(), 0
        return self

    def write(self, data: memoryview) -> None:
        """Append bytes; the caller may change them afterwards.

        Raises:
            OSError: these or earlier bytes cannot be written.
        """
        while len(data):
            part = data[: BLOCK_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = np.frombuffer(part, np.uint8)
            self._filled += len(part)
            self.written += len(part)
            data = data[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._begin_block()
                self._buffer = _new_buffer() if len(self._under_way) < BUFFERS - 1 else self._end_block()

    def _begin_block(self) -> None:
        block = self._buffer[: self._filled].data
        written = self._pool.submit(_put, self._fd, block, self.written - len(block))
        self._under_way.append((self._buffer, written, self._pool.submit(_digest, block)))
        self._filled = 0

    def _end_block(self) -> Buffer:
        """Wait for the oldest block, and give its buffer back."""
        buffer, written, digest = self._under_way.popleft()
        written.result()
        self.blocks.append(digest.result())
        return buffer

    def _end_blocks(self) -> None:
        while self._under_way:
            self._end_block()

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._end_blocks()
                if self._filled:
                    _leave_direct(self._fd)  # which takes whole blocks alone
                    self._begin_block()
                    self._end_blocks()
                os.fsync(self._fd)
        finally:
            self._pool.shutdown(cancel_futures=True)
            os.close(self._fd)


def _open_new(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    fd = os.open(path, flags, 0o666)
    if BLOCK_BYTES % mmap.PAGESIZE == 0:
        with suppress(OSError):  # a file system that has a page cache alone
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    return fd


def _leave_direct(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def _new_buffer() -> Buffer:
    return np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8)  # aligned to a page, as direct writes ask


def _put(fd: int, block: memoryview, position: int) -> None:
    try:
        written = os.pwrite(fd, block, position)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        written = 0
    if written < len(block):
        _leave_direct(fd)  # a disk that is nearly full, or whose own blocks are larger
    while written < len(block):
        written += os.pwrite(fd, block[written:], position + written)


def _digest(block: memoryview) -> str:
    return hashlib.sha256(block).hexdigest()


def commit(
    temporary: Path,
    final: Path,
    index: dict[str, Any],
    state: dict[str, Any],
    moved: Callable[[], None] = lambda: None,
) -> None:
    """Write index, state and manifest beside the rank files, then give the directory its final name.

    Args:
        moved: is called before the directory gets its name, and may raise.

    Raises:
        CheckpointError: the directory does not hold exactly the announced rank files, or the name is taken.
    """
    announced = {rank["file"]: rank["bytes"] for rank in index["ranks"]}
    found = {path.name: path.stat().st_size for path in temporary.iterdir()}
    if found != announced:
        raise CheckpointError(
            f"{temporary}: holds {sorted(found.items())} but the ranks wrote {sorted(announced.items())}; "
            "is the run directory on a disk that all nodes share?"
        )
    manifest: dict[str, Any] = {"format": FORMAT, "files": dict(announced), "sha256": {}}
    for name, value in ((INDEX, index), (STATE, state)):
        body = json.dumps(value, separators=(",", ":")).encode()
        write_atomic(temporary / name, body)
        manifest["files"][name] = len(body)
        manifest["sha256"][name] = hashlib.sha256(body).hexdigest()
    write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
    if final.exists():
        raise CheckpointError(f"{final}: exists already; a step directory is never written twice")
    moved()
    os.rename(temporary, final)
    sync_directory(final.parent)


def discard(path: Path) -> None:
    """Delete a directory, or a link and not what it points to; nothing where the name is free.

    Raises:
        OSError: it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def trash_of(path: Path) -> Path:
    """Give the name that a step directory has while it is removed."""
    return path.with_name(f".trash-{path.name}")


def remove(paths: Iterable[Path]) -> None:
    """Delete step directories so that a kill in the middle never leaves half of one under its name.

    Where a disk deletes only a part, the rest stays under a name that counts as no checkpoint.
    """
    for path in paths:
        trash = trash_of(path)
        with suppress(OSError):
            discard(trash)
        os.rename(path, trash)
        sync_directory(path.parent)  # or a power cut keeps the old name and loses some of the files
        with suppress(OSError):
            discard(trash)
