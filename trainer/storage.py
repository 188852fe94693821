"""Files of a checkpoint: raw little-endian bytes, a JSON index, a sha256 for every block. Imports no torch.

    step_00000400/
      rank_00003.bin   fragments one after another; a fragment's tensors (master, exp_avg, ...) follow each other
      index.json       parameters, tensor names, and for every rank file its fragments and the hashes of its blocks
      state.json       everything that is not a tensor
      MANIFEST.json    written last: names, sizes and the hashes of index.json and state.json

A directory appears under its final name by one rename and is never written to again. Nothing in it is a pickle;
a file that might be one is refused unopened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..data.storage import sync_directory, write_atomic
from .errors import CheckpointError

FORMAT = 1
BLOCK_BYTES = 8 << 20
MANIFEST, INDEX, STATE = "MANIFEST.json", "index.json", "state.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".metadata", ".distcp")
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class ParameterShape(_Strict):
    """A parameter as index.json names it."""

    name: str
    shape: tuple[Positive, ...]


class RankFile(_Strict):
    """What index.json says of one rank's file.

    A fragment is (number of the parameter, first element in the rank's piece, elements, first byte in the file).
    """

    file: str
    bytes: Count
    tp_rank: Count
    tp_size: Positive
    fragments: list[tuple[Count, Count, Positive, Count]]
    blocks: list[str]


class Index(_Strict):
    """What index.json holds; `tensors` names what each fragment stores, in this order."""

    parameters: list[ParameterShape]
    tensors: list[str]
    ranks: list[RankFile]


class _Manifest(_Strict):
    files: dict[str, Count]
    sha256: dict[str, str]


Checked = TypeVar("Checked", bound=BaseModel)


@dataclass
class RankWriter:
    """Writes one rank's file and hashes it on the way, block by block."""

    path: Path
    blocks: list[str] = field(default_factory=list)
    written: int = 0

    def __enter__(self) -> RankWriter:
        self._file: BinaryIO = open(self.path, "xb")
        self._hash = hashlib.sha256()
        self._in_block = 0
        return self

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self.written += len(data)
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
            self._file.close()


def commit(temporary: Path, final: Path, index: dict[str, Any], state: dict[str, Any]) -> None:
    """Write index, state and manifest beside the rank files, then give the directory its final name.

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
    os.rename(temporary, final)
    sync_directory(final.parent)


class Reader:
    """Opens a step directory, checks its structure, and reads byte ranges that match their hashes.

    Whoever wrote the directory, nothing outside it is opened, and what is wrong with it is a CheckpointError.
    """

    def __init__(self, path: Path) -> None:
        """Read manifest and index.

        Raises:
            CheckpointError: naming the file that is missing, has another size or another hash, or is not ours.
        """
        self.path = path
        names = self._names()
        self._manifest = self._read_manifest(names)
        for name, size in self._manifest.files.items():
            self._check_file(name, size, names)
        self.index = self._checked(Index, INDEX, self._hashed(INDEX))
        self._ranks = self._rank_files()
        self._cache: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(self._manifest.files.values())

    def _names(self) -> set[str]:
        with _storage_errors(self.path):
            if not self.path.is_dir():
                raise CheckpointError(f"{self.path}: there is no such checkpoint directory")
            names = {entry.name for entry in self.path.iterdir()}
        if bad := sorted(name for name in names if name.endswith(PICKLE_SUFFIXES)):
            raise CheckpointError(
                f"{self.path}: {', '.join(bad)} is not ours and may hold a pickle; refused unopened"
            )
        return names

    def _read_manifest(self, names: set[str]) -> _Manifest:
        path = self.path
        if MANIFEST not in names:
            raise CheckpointError(f"{path}: no {MANIFEST}; the save never finished, or this is no checkpoint")
        body = self._bytes(MANIFEST)
        try:
            version = json.loads(body)["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path / MANIFEST}: is damaged: {error!r}") from error
        if version != FORMAT:
            raise CheckpointError(f"{path}: has format {version}, this release reads format {FORMAT}")
        manifest = self._checked(_Manifest, MANIFEST, body)
        for name in (INDEX, STATE):
            if name not in manifest.files:
                raise CheckpointError(f"{path / MANIFEST}: is damaged: it does not name {name}")
        return manifest

    def _check_file(self, name: str, size: int, names: set[str]) -> None:
        path = self.path / name
        if name not in names:  # which also refuses whatever points out of the directory
            raise CheckpointError(f"{self.path}: {name} is missing")
        with _storage_errors(path):
            status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        if status.st_size != size:
            raise CheckpointError(f"{path}: has {status.st_size} bytes, {size} were written")

    def _rank_files(self) -> dict[str, RankFile]:
        """Check that the index speaks of exactly the manifest's rank files."""
        sizes = {name: size for name, size in self._manifest.files.items() if name not in (INDEX, STATE)}
        ranks = {rank.file: rank for rank in self.index.ranks}
        if len(ranks) != len(self.index.ranks) or {name: rank.bytes for name, rank in ranks.items()} != sizes:
            raise CheckpointError(f"{self.path / INDEX}: names other rank files than {MANIFEST}")
        for name, rank in ranks.items():
            if len(rank.blocks) != -(-rank.bytes // BLOCK_BYTES):
                raise CheckpointError(f"{self.path / INDEX}: {name} has {len(rank.blocks)} block hashes")
        return ranks

    def _bytes(self, name: str) -> bytes:
        with _storage_errors(self.path / name):
            return (self.path / name).read_bytes()

    def _hashed(self, name: str) -> bytes:
        body = self._bytes(name)
        if hashlib.sha256(body).hexdigest() != self._manifest.sha256.get(name):
            raise CheckpointError(f"{self.path / name}: its sha256 differs from the manifest's")
        return body

    def _checked(self, form: type[Checked], name: str, body: bytes) -> Checked:
        try:
            return form.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{self.path / name}: is damaged: {place}: {first['msg']}") from error

    def state(self) -> dict[str, Any]:
        """Give everything that is not a tensor."""
        body = self._hashed(STATE)
        try:
            state = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path / STATE}: is damaged: {error!r}") from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.path / STATE}: is damaged: holds no object")
        return state

    def read(self, name: str, start: int, num_bytes: int) -> bytearray:
        """Read bytes [start, start + num_bytes) of a rank file, verified."""
        out = bytearray(num_bytes)
        position = start
        while position < start + num_bytes:
            block, inside = divmod(position, BLOCK_BYTES)
            data = self._block(name, block)
            part = memoryview(data)[inside : inside + start + num_bytes - position]
            if not part:
                raise CheckpointError(f"{self.path / name}: ends before byte {start + num_bytes}")
            out[position - start : position - start + len(part)] = part
            position += len(part)
        return out

    def _block(self, name: str, block: int) -> bytes:
        key = (name, block)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        hashes = self._ranks[name].blocks
        with _storage_errors(self.path / name), open(self.path / name, "rb") as file:
            file.seek(block * BLOCK_BYTES)
            data = file.read(BLOCK_BYTES)
        if block >= len(hashes) or hashlib.sha256(data).hexdigest() != hashes[block]:
            raise CheckpointError(
                f"{self.path / name}: bytes {block * BLOCK_BYTES}..{block * BLOCK_BYTES + len(data)} "
                "do not match their sha256"
            )
        self._cache[key] = data
        while len(self._cache) > 4:
            self._cache.popitem(last=False)
        return data

    def verify(self) -> list[str]:
        """Read every byte; list what does not match."""
        problems = []
        for name, rank in self._ranks.items():
            for block in range(len(rank.blocks)):
                try:
                    self._block(name, block)
                except CheckpointError as error:
                    problems.append(str(error))
        try:
            self.state()
        except CheckpointError as error:
            problems.append(str(error))
        return problems


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def steps_in(checkpoints: Path) -> list[tuple[int, Path]]:
    """List the step directories under their final names, newest first."""
    found = []
    if checkpoints.is_dir():
        for path in checkpoints.iterdir():
            if path.is_dir() and path.name.startswith("step_") and path.name[5:].isdecimal():
                found.append((int(path.name[5:]), path))
    return sorted(found, reverse=True)


def remove(paths: Iterable[Path]) -> None:
    """Delete step directories so that a kill in the middle never leaves half of one under its name."""
    for path in paths:
        trash = path.with_name(f".trash-{path.name}")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(path, trash)
        sync_directory(path.parent)  # or a power cut keeps the old name and loses some of the files
        shutil.rmtree(trash, ignore_errors=True)
