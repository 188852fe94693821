"""Write files so that a crash leaves the old content or the new, never a part."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import uuid
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
    # Nodes that share a disk write with equal process ids, in containers most of all.
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
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


def make_readable(directory: Path) -> tuple[str, ...]:
    """Let others read a directory of files, whatever the umask; list them."""
    for path in directory.iterdir():
        path.chmod(0o644)
    directory.chmod(0o755)
    return tuple(sorted(path.name for path in directory.iterdir()))


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Give a directory beside `out` that takes its name where the block ends well, and is gone where it does not.

    What a killed process left of the same `out` goes, too. It is told from what another process is writing by a lock,
    which ends with its holder; on a file system without locks it stays.

    Raises:
        DataConfigError: `out` is there, or another process is writing it.
        DataStorageError: the storage failed.
    """
    with storage_errors(f"writing {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir()
    try:
        with _held(partial, out):
            with storage_errors(f"writing {out}"):
                _clear_leftovers(out, partial)
            yield partial
            with storage_errors(f"writing {out}"):
                _publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already where it got its name


def _publish(partial: Path, out: Path) -> None:
    taken = f"{out}: exists already; remove it or name another"
    if os.path.lexists(out):  # made by somebody else meanwhile, and an empty directory would be replaced
        raise DataConfigError(taken)
    try:
        rename_directory(partial, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise DataConfigError(taken) from error


@contextmanager
def _held(partial: Path, out: Path) -> Iterator[None]:
    """Lock a directory of our own, where the file system has locks."""
    try:
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # it was not locked yet, and the other process took it for a leftover
        raise _busy(out) from None
    try:
        _lock(descriptor, out)
        if not partial.exists():  # likewise
            raise _busy(out)
        yield
    finally:
        os.close(descriptor)


def _clear_leftovers(out: Path, own: Path) -> None:
    leftover = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.partial")
    for path in out.parent.iterdir():
        if path == own or not leftover.fullmatch(path.name):
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, another user's, or no directory
            continue
        try:
            if _lock(descriptor, out):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, out: Path) -> bool:
    """Take the lock of what becomes `out`, and tell whether the file system has any."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(out) from None
    except OSError:
        return False
    return True


def _busy(out: Path) -> DataConfigError:
    return DataConfigError(
        f"{out}: another process is writing it; wait for that one, or name another directory"
    )
