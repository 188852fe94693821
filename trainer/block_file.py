"""A new file, written block by block past the kernel's page cache. Imports no torch.

To copy a byte into the page cache and write it out from there costs the cores more than its sha256 does, and takes
memory from what runs beside it (docs/decisions/0006).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

Buffer = NDArray[np.uint8]
Seen = TypeVar("Seen")
BUFFERS = 6  # blocks that are filled, looked at and written at one time
THREADS = 4  # two cores look while two writes keep a disk busy


class BlockFile(Generic[Seen]):
    """Writes a file in blocks, and calls a function with each meanwhile.

    Where the file system has a page cache alone, or other blocks than ours, the file is written through the cache.
    """

    def __init__(self, path: Path, block_bytes: int, look: Callable[[memoryview], Seen]) -> None:
        """Prepare the file `path`, which must not exist; `look` may run in several threads at once."""
        self.path, self.written = path, 0
        self.seen: list[Seen] = []  # what `look` made of each block, in their order
        self._block_bytes, self._look = block_bytes, look

    def __enter__(self) -> Self:
        self._fd = _open_new(self.path, direct=self._block_bytes % mmap.PAGESIZE == 0)
        self._pool = ThreadPoolExecutor(THREADS, "write")
        self._under_way: deque[tuple[Buffer, Future[None], Future[Seen]]] = deque()
        self._buffer, self._filled = self._new_buffer(), 0
        return self

    def write(self, data: memoryview) -> None:
        """Append bytes; the caller may change them afterwards.

        Raises:
            OSError: these or earlier bytes cannot be written.
        """
        while len(data):
            part = data[: self._block_bytes - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = np.frombuffer(part, np.uint8)
            self._filled += len(part)
            self.written += len(part)
            data = data[len(part) :]
            if self._filled == self._block_bytes:
                self._begin_block()
                more = len(self._under_way) < BUFFERS - 1
                self._buffer = self._new_buffer() if more else self._end_block()

    def _new_buffer(self) -> Buffer:
        return np.frombuffer(mmap.mmap(-1, self._block_bytes), np.uint8)  # at a page, as direct writes ask

    def _begin_block(self) -> None:
        block = self._buffer[: self._filled].data
        written = self._pool.submit(_put, self._fd, block, self.written - len(block))
        self._under_way.append((self._buffer, written, self._pool.submit(self._look, block)))
        self._filled = 0

    def _end_block(self) -> Buffer:
        """Wait for the oldest block, and give its buffer back."""
        buffer, written, seen = self._under_way.popleft()
        written.result()
        self.seen.append(seen.result())
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


def _open_new(path: Path, *, direct: bool) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    if direct:
        with suppress(OSError):  # a file system that has a page cache alone
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    return fd


def _leave_direct(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


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
