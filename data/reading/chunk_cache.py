"""Keep chunks that came over the network on a local disk, up to a number of bytes.

Several processes of a host share one directory. Each reserves its bytes in a small file under a lock before it
writes, so that the limit holds whatever they do at once; a chunk appears under its name when it is whole.
After a crash the count may be too high, never too low; the next eviction counts anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

TOTAL_NAME = ".total"
PARTIAL_PREFIX = ".partial-"
PARTIAL_LIFETIME_S = 3600.0
KEPT_FRACTION = 0.9  # an eviction makes room for more than one chunk


class ChunkCache:
    """Keep byte strings by key; what was used longest ago goes first. Every failure of the disk means a miss."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """Use or make the directory. Raises OSError where it cannot be made or written."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._max_bytes = directory, max_bytes
        with self._locked_total() as total:
            total.write(self._count())

    def get(self, key: str) -> bytes | None:
        """Return what was kept, or None; the reader compares its checksum."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keep a byte string, evicting others; one larger than the limit is not kept."""
        path = self._path(key)
        if len(content) > self._max_bytes * KEPT_FRACTION or path.exists():
            return
        partial = path.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{path.name}")
        try:
            path.parent.mkdir(exist_ok=True)
            self._reserve(partial, len(content))
            with open(partial, "r+b") as stream:
                stream.write(content)  # not synced: a torn file fails its checksum and is fetched again
            os.replace(partial, path)
        except OSError:  # most often a full disk: going on without is better than stopping a run
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def discard(self, key: str) -> None:
        """Forget a byte string that turned out to be damaged."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._directory / name[:2] / name

    def _reserve(self, partial: Path, num_bytes: int) -> None:
        """Make room and an empty file of the full size, so that another process that counts anew counts it."""
        with self._locked_total() as total:
            wanted = total.read() + num_bytes
            if wanted > self._max_bytes:
                wanted = self._evict(int(self._max_bytes * KEPT_FRACTION) - num_bytes) + num_bytes
            total.write(wanted)  # first: whoever is killed now leaves a count that is too high, not too low
            with open(partial, "wb") as stream:
                stream.truncate(num_bytes)

    def _evict(self, max_bytes: int) -> int:
        """Remove the chunks used longest ago until at most so many bytes are left; return how many are."""
        files = sorted(self._files(), key=lambda item: item[0])
        left = sum(size for _, size, _ in files)
        for _, size, path in files:
            if left <= max_bytes:
                break
            if path.name.startswith(PARTIAL_PREFIX):
                continue  # a process is writing it
            path.unlink(missing_ok=True)
            left -= size
        return left

    def _count(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield time of use, size and path of every chunk, among them what is being written; clear old wrecks."""
        for folder in self._directory.iterdir():
            if not folder.is_dir():
                continue
            for entry in os.scandir(folder):
                try:
                    found = entry.stat()
                    wreck = (
                        entry.name.startswith(PARTIAL_PREFIX)
                        and found.st_mtime < time.time() - PARTIAL_LIFETIME_S
                    )
                    if wreck:
                        os.unlink(entry.path)
                        continue
                except FileNotFoundError:
                    continue  # another process has just finished or removed it
                yield found.st_mtime, found.st_size, Path(entry.path)

    @contextlib.contextmanager
    def _locked_total(self) -> Iterator[_Total]:
        descriptor = os.open(self._directory / TOTAL_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _Total(descriptor)
        finally:
            os.close(descriptor)


class _Total:
    """The number in the locked file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self) -> int:
        content = os.pread(self._descriptor, 32, 0)
        return int(content) if content.strip().isdigit() else 0

    def write(self, value: int) -> None:
        os.pwrite(self._descriptor, b"%020d" % value, 0)  # one call of one length: a kill leaves no half of it
