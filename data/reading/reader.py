"""Read byte ranges from anywhere, trying again where that may help, and keep them on a local disk."""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from ..config import ReadingConfig
from ..errors import DataConfigError, DataError, DataStorageError
from .chunk_cache import ChunkCache
from .transport import (
    PIPE_PREFIX,
    FilesystemFiles,
    HttpFiles,
    LocalFiles,
    PipeFiles,
    ReadError,
    Transport,
    is_local,
    shown,
)

FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 30.0
GIB = 1 << 30
Result = TypeVar("Result")


class ReadCounters:
    """Count bytes that came from the places themselves, tries after the first, and hits of the cache."""

    def __init__(self) -> None:
        """Begin at 0; threads may count at once."""
        self._lock, self._counts = threading.Lock(), Counter[str]()

    def add(self, name: str, count: int = 1) -> None:
        """Add to ``bytes_read``, ``retries`` or ``cache_hits``."""
        with self._lock:
            self._counts[name] += count

    def take(self) -> dict[str, int]:
        """Return the counts since the last call."""
        with self._lock:
            taken, self._counts = dict(self._counts), Counter[str]()
        return taken


class RangeReader:
    """Read ranges of local files, http(s), object stores, the Hub and pipes; threads may share it."""

    def __init__(
        self,
        settings: ReadingConfig | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Open nothing yet. ``sleep`` and ``chance`` (the jitter, in [0, 1)) are seams for tests."""
        self.settings = settings or ReadingConfig()
        self.counters = ReadCounters()
        self._sleep, self._chance = sleep, chance

    @cached_property
    def _local(self) -> LocalFiles:
        return LocalFiles()

    @cached_property
    def _http(self) -> HttpFiles:
        return HttpFiles(self.settings.timeout_s, self.settings.threads)

    @cached_property
    def _filesystems(self) -> FilesystemFiles:
        return FilesystemFiles()

    @cached_property
    def _pipes(self) -> PipeFiles:
        return PipeFiles()

    @cached_property
    def _cache(self) -> ChunkCache | None:
        if self.settings.cache is None:
            return None
        try:
            return ChunkCache(Path(self.settings.cache), int(self.settings.cache_gib * GIB))
        except OSError as error:
            raise DataConfigError(
                f"reading.cache = {self.settings.cache}: {error.strerror}; give a directory that can be written"
            ) from error

    def size(self, place: str) -> tuple[int, str]:
        """Return a file's size in bytes, and a mark that changes with its content where the place knows one.

        Raises DataConfigError where there is no such file or it may not be read, DataStorageError where storage fails.
        """
        return self.persist(shown(place), lambda: self._transport(place).size(place), missing=DataConfigError)

    def entries(self, place: str) -> dict[str, int | None]:
        """List a directory that fsspec reads, as it is now: sizes in bytes by name, None for a directory.

        Where nothing lies it is empty: an object store knows no empty directories. Raises as ``size`` does.
        """
        if place.startswith(("http://", "https://")):
            raise DataConfigError(
                f"{shown(place)}: http servers do not list files; copy it to a disk or a bucket"
            )
        return self.persist(shown(place), lambda: self._filesystems.entries(place), missing=DataConfigError)

    def read_all(self, place: str) -> bytes:
        """Return a whole file."""
        num_bytes, _ = self.size(place)
        return self.read(place, 0, num_bytes)

    def read_parsed(self, place: str, parse: Callable[[bytes], Result]) -> Result:
        """Return what ``parse`` makes of a whole file; over a network, where it raises DataError, it is read again."""

        def read() -> Result:
            try:
                return parse(self.read_all(place))
            except DataError as error:
                if is_local(place) or type(error) is not DataError:
                    raise
                raise ReadError(str(error), transient=True, damaged=True) from error

        return self.persist(shown(place), read)

    def read(
        self, place: str, offset: int, length: int, *, crc32: int | None = None, where: str | None = None
    ) -> bytes:
        """Return ``length`` bytes from ``offset``; with ``crc32`` they are compared, and kept in the cache.

        Raises DataError for damage (cut, or another checksum at every try) and DataStorageError where the
        storage fails for good; both name ``where``.
        """
        where = where or f"{shown(place)}, bytes {offset}-{offset + length}"
        cache = None if crc32 is None or is_local(place) else self._cache
        key = f"{shown(place)} {offset} {length} {crc32}"
        if cache is not None and (kept := cache.get(key)) is not None:
            if zlib.crc32(kept) == crc32:
                self.counters.add("cache_hits")
                return kept
            cache.discard(key)
        content = self.persist(where, lambda: self._read_once(place, offset, length, crc32))
        self.counters.add("bytes_read", length)
        if cache is not None:
            cache.put(key, content)
        return content

    def _read_once(self, place: str, offset: int, length: int, crc32: int | None) -> bytes:
        content = self._transport(place).read(place, offset, length)
        if crc32 is not None and (found := zlib.crc32(content)) != crc32:
            raise ReadError(
                f"checksum is {found:08x}, expected {crc32:08x}; the shard is damaged: copy it anew, or run "
                "`data index` if it was changed on purpose",
                transient=not is_local(place),  # a network may garble what a disk gives again
                damaged=True,
            )
        return content

    def _transport(self, place: str) -> Transport:
        if is_local(place):
            return self._local
        if place.startswith(PIPE_PREFIX):
            if not self.settings.allow_pipe:
                raise DataConfigError(
                    f"{place!r} would run a command; set reading.allow_pipe = true if that is wanted"
                )
            return self._pipes
        return self._http if place.startswith(("http://", "https://")) else self._filesystems

    def persist(
        self,
        where: str,
        action: Callable[[], Result],
        *,
        missing: type[DataError] = DataStorageError,
        hint: str = "check that it is there, may be read, and that the storage is well",
    ) -> Result:
        """Do what may fail with a ReadError, again after a growing, random wait while that may help.

        Raises DataStorageError, or ``missing`` for what no other try can change; both name ``where``.
        """
        for attempt in range(1, self.settings.attempts + 1):
            try:
                return action()
            except ReadError as error:
                if error.transient and attempt < self.settings.attempts:
                    self.counters.add("retries")
                    longest_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1))
                    self._sleep(max(error.after_s, longest_s * self._chance()))
                    continue
                if error.damaged:
                    raise DataError(f"{where}: {error}") from error
                tries = f" (tried {attempt} times)" if attempt > 1 else ""
                kind = DataStorageError if error.transient else missing
                raise kind(f"{where}: {error}{tries}; {hint}") from error
        raise AssertionError("the last attempt returns or raises")
