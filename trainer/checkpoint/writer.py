"""Write a step directory: rank files, then index, state and manifest, then the name. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ...data.storage import sync_directory, write_atomic
from ..errors import CheckpointError
from .format import BLOCK_BYTES, FORMAT, INDEX, MANIFEST, STATE

LARGE_BYTES = 1 << 20  # below, a thread costs more than it gains


@dataclass
class RankWriter:
    """Writes one rank's file and hashes it on the way, block by block."""

    path: Path
    blocks: list[str] = field(default_factory=list)
    written: int = 0

    def __enter__(self) -> RankWriter:
        self._file: BinaryIO = open(self.path, "xb")
        self._hasher = ThreadPoolExecutor(1, "hash")  # its thread starts with the first large write
        self._hash = hashlib.sha256()
        self._in_block = 0
        return self

    def write(self, data: memoryview) -> None:
        """Append bytes; large ones are hashed while they are written."""
        if len(data) < LARGE_BYTES:
            self._add(data)
            self._write(data)
            return
        hashed = self._hasher.submit(self._add, data)
        try:
            self._write(data)
        finally:
            hashed.result()  # whoever called may change the bytes then

    def _write(self, data: memoryview) -> None:
        self._file.write(data)
        # The disk begins now, not at the fsync, and pages that are written out make room for those of the data.
        os.posix_fadvise(self._file.fileno(), self.written, len(data), os.POSIX_FADV_DONTNEED)
        self.written += len(data)

    def _add(self, data: memoryview) -> None:
        while len(data):
            part = data[: BLOCK_BYTES - self._in_block]
            self._hash.update(part)
            self._in_block += len(part)
            data = data[len(part) :]
            if self._in_block == BLOCK_BYTES:
                self._close_block()

    def _close_block(self) -> None:
        self.blocks.append(self._hash.hexdigest())
        self._hash, self._in_block = hashlib.sha256(), 0

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                if self._in_block:
                    self._close_block()
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._hasher.shutdown()
            self._file.close()


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
