"""Write files so that a crash leaves the old content or the new, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DataConfigError, DataStorageError


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an ``OSError`` inside the block into a ``DataStorageError`` that says what was being done.

    A path that leads through a file, or to one where a directory belongs, is the user's: a ``DataConfigError``.
    """
    try:
        yield
    except (NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        raise DataConfigError(
            f"{doing} failed: {error.strerror}{f': {error.filename}' if error.filename else ''}; choose another path"
        ) from error
    except OSError as error:
        raise DataStorageError(
            f"{doing} failed: {error.strerror or error}{f': {error.filename}' if error.filename else ''}; "
            "check free space, permissions and the state of the storage"
        ) from error


def sync_directory(directory: Path) -> None:
    """Make the names inside a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an ``OSError`` inside the block this path, which a failed write to an open file does not know."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file's content as a whole, and survive a power cut: temporary name, fsync, rename.

    Raises OSError that names ``path``.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with naming(path):
        try:
            with open(partial, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync_directory(path.parent)


def rename_directory(source: Path, target: Path) -> None:
    """Give a finished directory its final name; an empty directory of that name is replaced."""
    sync_directory(source)
    os.rename(source, target)
    sync_directory(target.parent)
