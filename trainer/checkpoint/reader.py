"""Read a step directory: its structure first, then byte ranges that match their hashes. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ...data.reading.reader import RangeReader
from ..errors import CheckpointError
from .format import BLOCK_BYTES, FORMAT, INDEX, MANIFEST, PICKLE_SUFFIXES, STATE, Index, Manifest, RankFile
from .places import directory_at

CACHED_BLOCKS = 4
Progress = Callable[[int, int], None]
Checked = TypeVar("Checked", bound=BaseModel)


class Reader:
    """Opens a step directory, checks its structure, and reads byte ranges that match their hashes.

    Whoever wrote the directory, nothing outside it is opened, and what is wrong with it is a CheckpointError. Threads
    may share one.
    """

    def __init__(self, place: Path | str, reader: RangeReader | None = None) -> None:
        """Read manifest and index.

        Args:
            place: a path, or a URL that fsspec reads.
            reader: reads what lies at a URL.

        Raises:
            CheckpointError: naming the file that is missing, has another size or another hash, or is not ours.
        """
        self._directory = directory_at(place, reader)
        self.place = self._directory.place
        self._sizes = self._listed()
        self._manifest = self._read_manifest()
        for name, size in self._manifest.files.items():
            self._check_file(name, size)
        self.index = self._checked(Index, INDEX, self._hashed(INDEX))
        self._ranks = self._rank_files()
        self._cache: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, name: str = "") -> str:
        """Give the place of the directory, or of a file in it, as messages may show it."""
        return self._directory.at(name) if name else str(self._directory)

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(self._manifest.files.values()) + (self._sizes[MANIFEST] or 0)

    def _listed(self) -> dict[str, int | None]:
        sizes = self._directory.sizes()
        if not sizes:
            raise CheckpointError(f"{self.at()}: there is no such checkpoint directory")
        if bad := sorted(name for name in sizes if name.endswith(PICKLE_SUFFIXES)):
            raise CheckpointError(
                f"{self.at()}: {', '.join(bad)} is not ours and may hold a pickle; refused unopened"
            )
        return sizes

    def _read_manifest(self) -> Manifest:
        size = self._sizes.get(MANIFEST)
        if size is None:
            raise CheckpointError(
                f"{self.at()}: no {MANIFEST}; the save never finished, or this is no checkpoint"
            )
        body = self._directory.read(MANIFEST, 0, size)
        try:
            version = json.loads(body)["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{self.at(MANIFEST)}: is damaged: {error!r}") from error
        if version != FORMAT:
            raise CheckpointError(f"{self.at()}: has format {version}, this release reads format {FORMAT}")
        manifest = self._checked(Manifest, MANIFEST, body)
        for name in (INDEX, STATE):
            if name not in manifest.files:
                raise CheckpointError(f"{self.at(MANIFEST)}: is damaged: it does not name {name}")
        return manifest

    def _check_file(self, name: str, size: int) -> None:
        if name not in self._sizes:  # which also refuses whatever points out of the directory
            raise CheckpointError(f"{self.at()}: {name} is missing")
        found = self._sizes[name]
        if found is None:
            raise CheckpointError(f"{self.at(name)}: is not a regular file")
        if found != size:
            raise CheckpointError(f"{self.at(name)}: has {found} bytes, {size} were written")

    def _rank_files(self) -> dict[str, RankFile]:
        """Check that the index speaks of exactly the manifest's rank files."""
        sizes = {name: size for name, size in self._manifest.files.items() if name not in (INDEX, STATE)}
        ranks = {rank.file: rank for rank in self.index.ranks}
        if len(ranks) != len(self.index.ranks) or {name: rank.bytes for name, rank in ranks.items()} != sizes:
            raise CheckpointError(f"{self.at(INDEX)}: names other rank files than {MANIFEST}")
        for name, rank in ranks.items():
            if len(rank.blocks) != -(-rank.bytes // BLOCK_BYTES):
                raise CheckpointError(f"{self.at(INDEX)}: {name} has {len(rank.blocks)} block hashes")
        return ranks

    def _hashed(self, name: str) -> bytes:
        body = self._directory.read(name, 0, self._manifest.files[name])
        if hashlib.sha256(body).hexdigest() != self._manifest.sha256.get(name):
            raise CheckpointError(f"{self.at(name)}: its sha256 differs from the manifest's")
        return body

    def _checked(self, form: type[Checked], name: str, body: bytes) -> Checked:
        try:
            return form.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{self.at(name)}: is damaged: {place}: {first['msg']}") from error

    def state(self) -> dict[str, Any]:
        """Give everything that is not a tensor."""
        body = self._hashed(STATE)
        try:
            state = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.at(STATE)}: is damaged: {error!r}") from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.at(STATE)}: is damaged: holds no object")
        return state

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a rank file from `start` on, verified.

        Whole blocks, as many as one request is worth, go straight there. What others hold besides is kept, as the next
        range may begin with it.

        Raises:
            CheckpointError: the file ends before, cannot be read, or bytes do not match their hashes; `out` may hold
                some of them then.
        """
        num_bytes = self._ranks[name].bytes
        if start + len(out) > num_bytes:
            raise CheckpointError(f"{self.at(name)}: ends before byte {start + len(out)}")
        last = (start + len(out) - 1) // BLOCK_BYTES
        request_bytes = self._directory.blocks_at_once * BLOCK_BYTES
        while len(out):
            block, inside = divmod(start, BLOCK_BYTES)
            if inside or len(out) < request_bytes or (name, block) in self._cache:
                part = memoryview(self._block(name, block, last))[inside : inside + len(out)]
                out[: len(part)] = part
            else:
                part = out[:request_bytes]
                self._directory.read_into(name, start, part)
                for first in range(0, request_bytes, BLOCK_BYTES):
                    self._check_block(name, block + first // BLOCK_BYTES, part[first : first + BLOCK_BYTES])
            start, out = start + len(part), out[len(part) :]

    def _block(self, name: str, block: int, last: int) -> bytes:
        """Give a block that matches its hash; from afar, those behind it up to `last` come along."""
        key = (name, block)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        rank, first = self._ranks[name], block * BLOCK_BYTES
        count = min(last - block + 1, self._directory.blocks_at_once)
        data = self._directory.read(name, first, min(count * BLOCK_BYTES, rank.bytes - first))
        good: dict[tuple[str, int], bytes] = {}
        for number in range(count):
            part = data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            if number == 0 or self._matches(name, block + number, part):
                good[name, block + number] = part
        self._check_block(name, block, good[key])
        with self._lock:
            self._cache.update(good)
            while len(self._cache) > CACHED_BLOCKS:
                self._cache.popitem(last=False)
        return good[key]

    def _matches(self, name: str, block: int, content: bytes | memoryview) -> bool:
        return hashlib.sha256(content).hexdigest() == self._ranks[name].blocks[block]

    def _check_block(self, name: str, block: int, content: bytes | memoryview) -> None:
        if not self._matches(name, block, content):
            first = block * BLOCK_BYTES
            raise CheckpointError(
                f"{self.at(name)}: bytes {first}..{first + len(content)} do not match their sha256"
            )

    def verify(self, progress: Progress = lambda done, total: None) -> list[str]:
        """Read every byte; list what does not match, and files that are not of this checkpoint.

        Args:
            progress: is told (bytes read, bytes in all) after every block.
        """
        done, total = 0, sum(rank.bytes for rank in self._ranks.values())
        extra = sorted(self._sizes.keys() - self._manifest.files.keys() - {MANIFEST})
        problems = [
            f"{self.at(name)}: is not of this checkpoint: {MANIFEST} does not name it" for name in extra
        ]
        for name, rank in self._ranks.items():
            for block in range(len(rank.blocks)):
                try:
                    self._block(name, block, len(rank.blocks) - 1)
                except CheckpointError as error:
                    problems.append(str(error))
                done = min(done + BLOCK_BYTES, total)
                progress(done, total)
        try:
            self.state()
        except CheckpointError as error:
            problems.append(str(error))
        return problems
