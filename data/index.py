"""Find samples and chunks in a tar shard.

A chunk, the unit of reading and of checksums, is a run of whole samples of at least ``chunk_bytes``
(the last one of a shard may be shorter).
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .documents import SAMPLES_KIND, TEXT_KIND, documents_of_samples, expand_samples, kind_of_sample
from .errors import DataError
from .storage import write_atomic

BLOCK_BYTES = 512
INDEX_SUFFIX = ".idx"


@dataclass
class ShardIndex:
    """Describe one shard: its samples, its chunks ``(offset, length, samples, crc32)`` and what they hold."""

    file: str
    num_bytes: int
    kind: str
    sample_offsets: list[int]
    chunks: list[tuple[int, int, int, int]] = field(default_factory=list)
    num_documents: int = 0
    text_bytes: int = 0
    num_tokens: int = 0
    lengths_crc32: list[int] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """Return the number of samples in the shard."""
        return sum(row[2] for row in self.chunks)


def index_shard(path: Path, chunk_bytes: int, *, name: str | None = None) -> ShardIndex:
    """Read a whole shard once and describe it; every sample is parsed, so a shard that passes is sound.

    ``name`` is what messages call it, by default its path. Raises DataError where the tar is cut or damaged, a
    key comes twice, or a sample is not of the kind of the first one.
    """
    num_bytes = path.stat().st_size
    name = name or str(path)
    with open(path, "rb") as stream:
        offsets = _sample_offsets(stream, name, num_bytes)
        index = ShardIndex(path.name, num_bytes, TEXT_KIND, offsets)
        for start, stop in _chunk_bounds(offsets, chunk_bytes):
            offset, length = offsets[start], offsets[stop] - offsets[start]
            stream.seek(offset)
            chunk = stream.read(length)
            index.chunks.append((offset, length, stop - start, zlib.crc32(chunk)))
            _count_chunk(index, chunk, stop - start, f"shard {name}, bytes {offset}-{offset + length}")
    return index


def write_sample_index(shard: Path, sample_offsets: list[int]) -> None:
    """Write ``<shard>.idx``: little-endian uint64 header offsets of the samples, then the end offset.

    The layout is the one that Megatron-Energon reads beside a tar.
    """
    write_atomic(shard.with_name(shard.name + INDEX_SUFFIX), np.array(sample_offsets, "<u8").tobytes())


def _sample_offsets(stream: BinaryIO, shard: str, num_bytes: int) -> list[int]:
    """Return the header offset of each sample's first member, and the offset where the last one ends."""
    offsets: list[int] = []
    seen: set[str] = set()
    key, end = None, 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it has seen
                end = member.offset_data + -(-member.size // BLOCK_BYTES) * BLOCK_BYTES
                if not member.isreg() or member.name.startswith("__"):
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, dot, _ = name.partition(".")
                if not stem or not dot:
                    raise DataError(f"shard {shard}: member {member.name!r} is not named KEY.EXTENSION")
                member_key = f"{folder}/{stem}"
                if member_key != key:
                    if member_key in seen:
                        raise DataError(
                            f"shard {shard}: key {stem!r} comes twice, at byte {member.offset}; give each sample "
                            "a key of its own, its members one after the other, with no dot inside the key"
                        )
                    seen.add(member_key)
                    key = member_key
                    offsets.append(member.offset)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"shard {shard} is not a whole, uncompressed tar: {error}; write it anew") from error
    stream.seek(end)
    # tarfile ends without a word at a cut or damaged header: only the end marker proves that all was seen
    if end > num_bytes or stream.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
        raise DataError(f"shard {shard} is cut or damaged at byte {end} of {num_bytes}; write it anew")
    return [*offsets, end]


def _chunk_bounds(offsets: list[int], chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield ``(first sample, end sample)`` of each chunk."""
    start = 0
    for stop in range(1, len(offsets)):
        if offsets[stop] - offsets[start] >= chunk_bytes:
            yield start, stop
            start = stop
    if start < len(offsets) - 1:
        yield start, len(offsets) - 1


def _count_chunk(index: ShardIndex, chunk: bytes, num_samples: int, where: str) -> None:
    """Parse a chunk and add what it holds to the shard's totals."""
    samples = expand_samples(chunk, where)
    if len(samples) != num_samples:
        raise DataError(f"{where} gives {len(samples)} samples, expected {num_samples}; write the shard anew")
    if not index.num_documents:
        index.kind = kind_of_sample(samples[0])
    documents = documents_of_samples(index.kind, samples, where)
    index.num_documents += len(documents)
    if index.kind == TEXT_KIND:
        index.text_bytes += sum(len(document.encode()) for document in documents)
    elif index.kind != SAMPLES_KIND:
        index.num_tokens += sum(map(len, documents))
