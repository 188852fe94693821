"""What lies in a run directory's copy, read and changed without what is under test."""

from __future__ import annotations

import hashlib
from pathlib import Path

import fsspec
from step_files import BLOCK_BYTES, problem, write_ranks

from basestone.data.config import ReadingConfig
from basestone.data.reading.reader import RangeReader
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.checkpoint.remote import Copying
from basestone.trainer.checkpoint.writer import commit, remove
from basestone.trainer.errors import CheckpointError

QUICK = Copying(threads=3, attempts=2)


def step_of(run: Path, step: int = 4) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def at(place: str, step: int = 4) -> str:
    return f"{place}/checkpoints/step_{step:08d}"


class Files:
    """The files at a place, by their names under it."""

    def __init__(self, place: str) -> None:
        self.files, self.base = fsspec.url_to_fs(place)
        self.files.invalidate_cache()

    def __call__(self) -> dict[str, bytes]:
        found = self.files.find(self.base, withdirs=False)
        return {name.removeprefix(self.base).lstrip("/"): self.files.cat_file(name) for name in found}

    def write(self, name: str, content: bytes) -> None:
        self.files.pipe_file(f"{self.base}/{name}", content)

    def remove(self, name: str) -> None:
        self.files.rm_file(f"{self.base}/{name}")


def local_files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def rewrite(run: Path, step: int = 4) -> Path:
    """Leave a line of training, and save the same step anew: files of the same sizes, other contents."""
    remove([step_of(run, step)])
    checkpoints = run / "checkpoints"
    temporary, final = checkpoints / ".tmp-step", step_of(run, step)
    index = write_ranks(temporary)
    for rank in index["ranks"]:
        path = temporary / rank["file"]
        path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
        rank["blocks"] = [hash_of(path.read_bytes(), block) for block in range(len(rank["blocks"]))]
    commit(temporary, final, index, {"step": 7})
    assert problem(final) == ""
    return final


def hash_of(content: bytes, block: int) -> str:
    return hashlib.sha256(content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]).hexdigest()


def remote_problem(place: str) -> str:
    """What is wrong with a step directory, by its structure or by all its bytes; nothing where it is good."""
    try:
        return "\n".join(Reader(place, RangeReader(ReadingConfig(attempts=2), sleep=lambda _: None)).verify())
    except CheckpointError as error:
        return str(error)
