"""Where a step directory lies: on a local disk, or at a URL that fsspec reads. Imports no torch.

Both say what lies in a directory and read ranges of its files; whatever fails is a CheckpointError with the place.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from ...data.errors import DataError
from ...data.reading.reader import RangeReader
from ...data.reading.transport import join, shown
from ..errors import CheckpointError

LOCAL_SCHEMES = ("file://", "local://")


class Directory(Protocol):
    """A directory of files; `str()` of it is fit for messages, `place` opens it again."""

    place: str
    blocks_at_once: int  # that one request is worth

    def sizes(self) -> dict[str, int | None]:
        """Give the size in bytes of everything in it, by name; None for what is no regular file."""
        ...

    def read(self, name: str, start: int, num_bytes: int) -> bytes:
        """Read a range of a file; it may be shorter where the file is."""
        ...

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a file from `start` on."""
        ...

    def at(self, name: str) -> str:
        """Give the place of a file for messages."""
        ...


class LocalDirectory:
    """A directory of this host; links are not followed."""

    blocks_at_once = 1

    def __init__(self, path: Path) -> None:
        """Open nothing yet."""
        self._path, self.place = path, str(path)

    def __str__(self) -> str:
        return self.place

    def at(self, name: str) -> str:
        """Give the path of a file."""
        return str(self._path / name)

    def sizes(self) -> dict[str, int | None]:
        """Look at the directory; {} where there is none."""
        with _storage_errors(self.place):
            if not self._path.is_dir():
                return {}
            sizes: dict[str, int | None] = {}
            for entry in self._path.iterdir():
                with suppress(FileNotFoundError):  # a run that goes on renames its files meanwhile
                    status = entry.lstat()
                    sizes[entry.name] = status.st_size if stat.S_ISREG(status.st_mode) else None
            return sizes

    def read(self, name: str, start: int, num_bytes: int) -> bytes:
        """Read with one seek."""
        with _storage_errors(self.at(name)), open(self._path / name, "rb") as file:
            file.seek(start)
            return file.read(num_bytes)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Read straight to where the bytes are wanted."""
        with _storage_errors(self.at(name)), open(self._path / name, "rb", buffering=0) as file:
            file.seek(start)
            while len(out):
                num_bytes = file.readinto(out)
                if not num_bytes:
                    raise CheckpointError(f"{self.at(name)}: ends {len(out)} bytes too early")
                out = out[num_bytes:]


class RemoteDirectory:
    """A directory of an object store, or of what else fsspec reads."""

    blocks_at_once = 4  # 32 MiB: a store takes longer to begin than to go on

    def __init__(self, url: str, reader: RangeReader | None = None) -> None:
        """Connect to nothing yet.

        Args:
            reader: tries again what may succeed later; by default with the settings that shards are read by.
        """
        self.place, self._reader = url.rstrip("/"), reader or RangeReader()

    def __str__(self) -> str:
        return shown(self.place)

    def at(self, name: str) -> str:
        """Give the URL of a file without what may be secret in it."""
        return shown(join(self.place, name))

    def sizes(self) -> dict[str, int | None]:
        """Ask the store, never a listing that was kept; {} where nothing lies there."""
        with _storage_errors(str(self)):
            return self._reader.entries(self.place)

    def read(self, name: str, start: int, num_bytes: int) -> bytes:
        """Ask for a range, several times where that may help."""
        with _storage_errors(self.at(name)):
            return self._reader.read(join(self.place, name), start, num_bytes)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Ask for a range as `read` does."""
        out[:] = self.read(name, start, len(out))


def local_path(place: Path | str) -> Path | None:
    """Give the path of a place on this host's file systems, or None for a URL of anything else."""
    text = str(place)
    for scheme in LOCAL_SCHEMES:
        text = text.removeprefix(scheme)
    return None if "://" in text else Path(text)


def directory_at(place: Path | str, reader: RangeReader | None = None) -> Directory:
    """Give the directory of a path or a URL; nothing is opened yet."""
    path = local_path(place)
    return LocalDirectory(path) if path is not None else RemoteDirectory(str(place), reader)


@contextmanager
def _storage_errors(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be read: {error.strerror or error}") from error
    except DataError as error:
        raise CheckpointError(str(error)) from error  # it names the place
