"""Read a step directory: its structure first, then byte ranges that match their hashes. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import CheckpointError
from .format import BLOCK_BYTES, FORMAT, INDEX, MANIFEST, PICKLE_SUFFIXES, STATE, Index, Manifest, RankFile

Checked = TypeVar("Checked", bound=BaseModel)


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

    def _read_manifest(self, names: set[str]) -> Manifest:
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
        manifest = self._checked(Manifest, MANIFEST, body)
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
