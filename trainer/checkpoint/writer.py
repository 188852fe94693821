"""Write a step directory: rank files, then index, state and manifest, then the name. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...data.storage import sync_directory, write_atomic
from ..block_file import BlockFile
from ..errors import CheckpointError
from .format import BLOCK_BYTES, FORMAT, INDEX, MANIFEST, STATE


class RankWriter(BlockFile[str]):
    """Writes one rank's file, and hashes each block meanwhile."""

    def __init__(self, path: Path) -> None:
        """Prepare the file `path`, which must not exist."""
        super().__init__(path, BLOCK_BYTES, lambda block: hashlib.sha256(block).hexdigest())

    @property
    def blocks(self) -> list[str]:
        """Give the sha256 of every block, once the file is whole."""
        return self.seen


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
