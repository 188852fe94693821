"""Copy committed step directories to another place: the files first, the manifest last. Imports no torch.

    PLACE/run_id  PLACE/tokenizer.model  PLACE/run.toml  PLACE/checkpoints/step_00000400/

An object store cannot rename. There a directory counts once it has a manifest; so one that is to change loses its
manifest first. On a disk a copy appears by one rename. What decides whether a copy is this step's is the content of
the manifest, which holds the hash of every other hash.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from ...data.config import ReadingConfig
from ...data.errors import DataError
from ...data.reading.reader import RangeReader
from ...data.reading.transport import PIPE_PREFIX, join, open_filesystem, shown, store_error
from ...data.storage import naming, sync_directory, write_atomic
from ..errors import CheckpointError, ConfigError, message_of
from ..run_lock import LOCK
from .format import MANIFEST, Manifest, step_of
from .opening import CHECKPOINTS
from .places import Directory, LocalDirectory, RemoteDirectory, local_path
from .writer import remove

RUN_ID, TOKENIZER, RUN_FILE = "run_id", "tokenizer.model", "run.toml"
RUN_RECORDS = (LOCK, "ledger.json")  # are never copied
LEFT_MANIFEST = f"left-{MANIFEST}"  # of a step that is later than the one that was saved
PIECE_BYTES = 1 << 20
HINT = "check the place, the credentials and the storage"
Result = TypeVar("Result")


class _Step(NamedTuple):
    """A step directory that is to be copied."""

    directory: Path
    manifest: bytes
    whole: dict[str, int]  # sizes of all files

    def files(self) -> list[str]:
        """Name all files but the manifest, the largest first, so that the last ones are short."""
        return sorted(self.whole.keys() - {MANIFEST}, key=lambda name: (-self.whole[name], name))

    def compare(self, copy: Directory, but: str = "") -> None:
        """Compare the sizes of a copy."""
        found = copy.sizes()
        for name, size in self.whole.items():
            if found.get(name) != size and name != but:
                raise CheckpointError(f"{copy.at(name)}: has {found.get(name)} bytes, {size} were copied")

    def check(self) -> None:
        """Refuse to call a copy whole while another directory has taken the name of the one that was read."""
        if (
            not (self.directory / MANIFEST).is_file()
            or (self.directory / MANIFEST).read_bytes() != self.manifest
        ):
            raise CheckpointError(f"{self.directory}: was removed or written anew while it was copied")


class Copying:
    """How copies are made: files at once, tries of each, and when to give up."""

    def __init__(self, *, threads: int, attempts: int = 5, stop: threading.Event | None = None) -> None:
        """Start nothing. Once `stop` is set no file is begun and no try waited for."""
        self.threads, self._stop = threads, stop or threading.Event()
        self.reader = RangeReader(ReadingConfig(attempts=attempts), sleep=self._wait)

    def _wait(self, seconds: float) -> None:
        self._stop.wait(seconds)
        self.check()

    def check(self) -> None:
        """Raise where the copy is to stop."""
        if self._stop.is_set():
            raise CheckpointError("the copy was stopped before its end")

    def store(self, where: str, action: Callable[[], Result]) -> Result:
        """Change something at an object store, several times where that may help."""

        def attempt() -> Result:
            try:
                return action()
            except Exception as error:
                raise store_error(error) from error

        self.check()
        return self.reader.persist(where, attempt, hint=HINT)

    def each(self, names: Iterable[str], action: Callable[[str], object]) -> None:
        """Do something for every name, several at once; the first error ends it and is raised.

        The threads are daemons: one that hangs must not keep a process from leaving.
        """
        waiting, errors = deque(names), deque[Exception]()

        def work() -> None:
            while not errors:
                try:
                    name = waiting.popleft()
                except IndexError:
                    return
                try:
                    action(name)
                except Exception as error:
                    errors.append(error)

        workers = [threading.Thread(target=work, daemon=True) for _ in range(min(self.threads, len(waiting)))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]


def copy_step(directory: Path, place: str, copying: Copying) -> None:
    """Copy a committed step directory to PLACE/checkpoints, and its run's identity, tokenizer and run file to PLACE.

    A copy that is there and whole is left alone; any other is replaced. Killed at any moment, it leaves no directory
    that is seen as whole and is not.

    Raises:
        CheckpointError: naming the file and the reason; nothing that counts as whole is left of the copy.
    """
    with _failures():
        step, target = _opened(directory), _target(place, copying)
        path, run_dir = local_path(place), directory.resolve().parent.parent
        if path is not None and path.resolve() == run_dir:
            raise CheckpointError(f"{place}: is the run directory itself; choose another place for its copies")
        for name in (RUN_ID, TOKENIZER, RUN_FILE):
            if (source := run_dir / name).is_file():
                _copy_run_file(source, target)
        there = target.step(directory.name)
        sizes = there.sizes()
        if sizes != step.whole or there.read(MANIFEST, 0, len(step.manifest)) != step.manifest:
            target.copy(step)


def set_aside_later(step: int, place: str, copying: Copying) -> list[str]:
    """Let the copies of later steps than this one no longer count, and give their names.

    They are of a line of training that a run has left; nobody must go on from them. Their bytes stay.

    Raises:
        CheckpointError: naming the place and the reason.
    """
    with _failures():
        target = _target(place, copying)
        later = sorted(name for name in target.checkpoints.sizes() if (step_of(name) or 0) > step)
        return [name for name in later if target.set_aside(name)]


def check_place(place: str, run_dir: Path) -> None:
    """See at the start of a run that its copies can go to a place, as far as that shows without a network request.

    Raises:
        ConfigError: it is a run's own directory, cannot be written, or is a URL that nothing installed writes to.
    """
    path, name = local_path(place), f"checkpoint.remote = {shown(place)}"
    if path is None:
        if place.startswith(("http://", "https://", PIPE_PREFIX)):
            raise ConfigError(f"{name}: cannot be written to; give a path or a bucket")
        try:
            open_filesystem(place)
        except DataError as error:
            raise ConfigError(f"checkpoint.remote = {error}") from error
        return
    if path.resolve() == run_dir.resolve():
        raise ConfigError(f"{name}: is the run directory itself; choose another place for its copies")
    if found := [file for file in RUN_RECORDS if os.path.lexists(path / file)]:
        raise ConfigError(
            f"{name}: holds {' and '.join(found)}, so it is another run's own directory; choose another place"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot be written ({error.strerror or error}); choose another place"
        ) from error


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(message_of(error)) from error


def _opened(directory: Path) -> _Step:
    """Look at a step directory without its index, which may be large, and time is taken from a training run."""
    source = LocalDirectory(directory)
    sizes = source.sizes()
    if sizes.get(MANIFEST) is None:
        raise CheckpointError(f"{directory}: is no finished step directory")
    body = source.read(MANIFEST, 0, sizes[MANIFEST] or 0)
    try:
        files = Manifest.model_validate_json(body).files
    except ValidationError as error:
        raise CheckpointError(f"{source.at(MANIFEST)}: is damaged") from error
    if bad := [name for name, size in files.items() if sizes.get(name) != size]:
        raise CheckpointError(f"{directory}: {', '.join(bad)} is not what {MANIFEST} says")
    return _Step(directory, body, {**files, MANIFEST: len(body)})


def _copy_run_file(source: Path, target: _Disk | _Store) -> None:
    content, there = source.read_bytes(), target.read(source.name)
    if there == content:
        return
    if there is not None and source.name != RUN_FILE:
        raise CheckpointError(
            f"{target}: holds the copies of another run ({source.name} differs); give every run a place of its own"
        )
    target.write(source.name, content)


class _Disk:
    """Copies on a file system of this host."""

    def __init__(self, path: Path, copying: Copying) -> None:
        self._path, self._copying = path, copying
        self.checkpoints = LocalDirectory(path / CHECKPOINTS)

    def __str__(self) -> str:
        return str(self._path)

    def step(self, name: str) -> LocalDirectory:
        return LocalDirectory(self._path / CHECKPOINTS / name)

    def read(self, name: str) -> bytes | None:
        return (self._path / name).read_bytes() if (self._path / name).exists() else None

    def write(self, name: str, content: bytes) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path / name, content)

    def copy(self, step: _Step) -> None:
        target = self._path / CHECKPOINTS / step.directory.name
        temporary = target.with_name(f".tmp-copy-{target.name}")
        for left in (temporary, target.with_name(f".trash-{target.name}")):  # by a copy that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)

        def copy_file(name: str) -> None:
            self._copying.check()
            with (
                open(step.directory / name, "rb") as source,
                naming(temporary / name),
                open(temporary / name, "xb") as out,
            ):
                shutil.copyfileobj(source, out, PIECE_BYTES)
                out.flush()
                os.fsync(out.fileno())

        try:
            self._copying.each(step.files(), copy_file)
            write_atomic(temporary / MANIFEST, step.manifest)
            step.compare(LocalDirectory(temporary))
            step.check()
            if target.exists():
                remove([target])
            os.rename(temporary, target)
            sync_directory(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def set_aside(self, name: str) -> bool:
        path = self._path / CHECKPOINTS / name
        os.rename(path, path.with_name(f".left-{name}-{uuid.uuid4().hex[:8]}"))
        return True


class _Store:
    """Copies at an object store, or at what else fsspec writes to."""

    def __init__(self, url: str, copying: Copying) -> None:
        # One filesystem for all threads: each that a thread asks for has connections of its own.
        self._files, base = open_filesystem(url)
        self._base = base.rstrip("/")
        self._run, self._copying = RemoteDirectory(url, copying.reader), copying
        self.checkpoints = RemoteDirectory(join(self._run.place, CHECKPOINTS), copying.reader)

    def __str__(self) -> str:
        return str(self._run)

    def step(self, name: str) -> RemoteDirectory:
        return RemoteDirectory(join(self.checkpoints.place, name), self._copying.reader)

    def read(self, name: str) -> bytes | None:
        size = self._run.sizes().get(name)
        return None if size is None else self._run.read(name, 0, size)

    def write(self, name: str, content: bytes) -> None:
        self._change(name, lambda path: self._files.pipe_file(path, content))

    def _change(self, name: str, action: Callable[[str], object]) -> None:
        self._copying.store(self._run.at(name), lambda: action(f"{self._base}/{name}"))

    def copy(self, step: _Step) -> None:
        prefix, target = f"{CHECKPOINTS}/{step.directory.name}", self.step(step.directory.name)
        there = target.sizes()
        if MANIFEST in there:
            self._change(f"{prefix}/{MANIFEST}", self._files.rm_file)  # first: now nothing there counts
        for name in sorted(there.keys() - step.whole.keys()):
            self._change(f"{prefix}/{name}", self._files.rm_file)

        def put(name: str) -> None:
            source = str(step.directory / name)
            self._change(f"{prefix}/{name}", lambda path: self._files.put_file(source, path))

        # Of S3's and Azure's filesystems: parts of one file that are sent, and held in memory, at once.
        self._files.max_concurrency = max(1, self._copying.threads // len(step.files()))
        self._copying.each(step.files(), put)
        step.compare(target, but=MANIFEST)
        step.check()
        self.write(f"{prefix}/{MANIFEST}", step.manifest)

    def set_aside(self, name: str) -> bool:
        there, prefix = self.step(name), f"{CHECKPOINTS}/{name}"
        size = there.sizes().get(MANIFEST)
        if size is None:
            return False
        self.write(f"{prefix}/{LEFT_MANIFEST}", there.read(MANIFEST, 0, size))
        self._change(f"{prefix}/{MANIFEST}", self._files.rm_file)
        return True


def _target(place: str, copying: Copying) -> _Disk | _Store:
    path = local_path(place)
    return _Store(place, copying) if path is None else _Disk(path, copying)
