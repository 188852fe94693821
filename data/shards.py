"""Write and open shard directories: tar files, a sample index beside each, and one manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .documents import (
    LENGTHS_DTYPE,
    LENGTHS_EXTENSION,
    MEGATRON_KIND,
    SAMPLES_KIND,
    TEXT_EXTENSION,
    TEXT_KIND,
    TOKEN_DTYPES,
    TOKENS_KIND,
    documents_of_samples,
    expand_samples,
    split_documents,
)
from .errors import DataConfigError, DataError
from .index import ShardIndex, index_shard, write_sample_index
from .reading.reader import RangeReader
from .reading.transport import is_local, join, shown
from .storage import write_atomic

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "basestone-shards-1"
LENGTHS_NAME = "documents.len.u32"  # beside the manifest of Megatron's files: the tokens of every document
HEADER_BYTES = 512
KINDS = (TEXT_KIND, TOKENS_KIND, MEGATRON_KIND, SAMPLES_KIND)
CHUNK_COLUMNS = 4  # offset, length, samples, crc32


@dataclass(frozen=True)
class ShardSet:
    """Hold an opened shard directory: what its manifest says, for local files checked against their sizes.

    ``files`` are names in the directory, or places of their own, and ``sizes`` their bytes. ``chunks`` is
    int64 [num_chunks, 5]: shard number, byte offset, byte length, samples, crc32.
    """

    place: str
    kind: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    chunks: np.ndarray
    num_documents: int
    text_bytes: int
    num_tokens: int | None
    tokenizer_sha256: str | None
    fingerprint: str
    reader: RangeReader
    name: str | None = None  # what the user called it, where that is another place
    token_dtype: str | None = None  # of Megatron's files
    lengths_crc32: tuple[int, ...] = ()  # and for each chunk of the part of the file of lengths

    @property
    def num_chunks(self) -> int:
        """Return the number of chunks in all shards."""
        return len(self.chunks)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all chunks."""
        return int(self.chunks[:, 2].sum())

    @property
    def is_remote(self) -> bool:
        """Tell whether any of the shards is behind a network or a pipe."""
        return any(not is_local(join(self.place, file)) for file in self.files)

    @property
    def holds_text(self) -> bool:
        """Tell whether documents are texts."""
        return self.kind == TEXT_KIND

    @property
    def holds_tokens(self) -> bool:
        """Tell whether documents are tokens."""
        return self.kind in (TOKENS_KIND, MEGATRON_KIND)

    @property
    def place_shown(self) -> str:
        """Return the directory as messages may show it."""
        return self.name or shown(self.place)

    @cached_property
    def _first_documents(self) -> np.ndarray:
        return np.concatenate(([0], np.cumsum(self.chunks[:, 3])))

    def chunk_name(self, chunk: int) -> str:
        """Name a chunk for messages: the shard's place and the byte range."""
        shard, offset, length = (int(value) for value in self.chunks[chunk, :3])
        return f"shard {shown(join(self.place, self.files[shard]))}, bytes {offset}-{offset + length}"

    def read_chunk(self, chunk: int) -> bytes:
        """Read one chunk and compare its checksum.

        Raises DataError for a short read or a checksum that differs, DataStorageError where reading fails.
        """
        shard, offset, length, _, expected = (int(value) for value in self.chunks[chunk])
        place = join(self.place, self.files[shard])
        return self.reader.read(place, offset, length, crc32=expected, where=self.chunk_name(chunk))

    def documents_of(self, chunk: int, content: bytes) -> list[Any]:
        """Return the documents in a chunk's bytes, in file order: texts, token arrays, or whole samples."""
        where, num_samples = self.chunk_name(chunk), int(self.chunks[chunk, 3])
        if self.kind == MEGATRON_KIND:
            first = int(self._first_documents[chunk])
            lengths = self.reader.read(
                join(self.place, LENGTHS_NAME),
                first * LENGTHS_DTYPE.itemsize,
                num_samples * LENGTHS_DTYPE.itemsize,
                crc32=self.lengths_crc32[chunk],
            )
            tokens = np.frombuffer(content, self.token_dtype)
            return split_documents(tokens, np.frombuffer(lengths, LENGTHS_DTYPE).astype(np.int64))
        samples = expand_samples(content, where)
        if len(samples) != num_samples:
            raise DataError(
                f"{where} gives {len(samples)} samples, expected {num_samples}; write the shard anew"
            )
        return documents_of_samples(self.kind, samples, where)

    def read_documents(self, chunk: int) -> list[Any]:
        """Read a chunk and return its documents."""
        return self.documents_of(chunk, self.read_chunk(chunk))


def open_shard_set(
    directory: Path | str, reader: RangeReader | None = None, *, check_files: bool = True
) -> ShardSet:
    """Open a shard directory at a path or URL; its manifest must be whole, and local shards have the size it says.

    Without ``check_files`` the shards themselves are not looked at.

    Raises DataConfigError where the directory is no shard directory or holds nothing, DataError where a
    shard is missing or cut or the manifest is damaged.
    """
    place, reader = str(directory), reader or RangeReader()
    name = join(place, MANIFEST_NAME)
    _check_directory(place, name)
    shard_set = reader.read_parsed(name, lambda content: _parse_manifest(content, place, reader))
    if check_files:
        _check_files(shard_set)
    return shard_set


def open_filled_shard_set(directory: Path | str, reader: RangeReader | None = None) -> ShardSet:
    """Open a shard directory that must hold at least one document."""
    shard_set = open_shard_set(directory, reader)
    if not shard_set.num_documents:
        raise DataConfigError(f"{shard_set.place_shown} holds no documents; prepare it with more text")
    return shard_set


def manifest_fingerprint(kind: str, shards: Sequence[dict[str, Any]], tokenizer_sha256: str | None) -> str:
    """Hash what decides the documents and their order: kind, sizes, chunks with checksums, tokenizer.

    File names and places do not count: a directory may be moved.
    """
    content = [
        kind,
        tokenizer_sha256,
        [
            [shard["bytes"], shard["samples"], shard["chunks"], *shard.get("lengths_crc32", ())]
            for shard in shards
        ],
    ]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def write_manifest(
    directory: Path,
    indexes: Sequence[ShardIndex],
    *,
    tokenizer_sha256: str | None,
    token_dtype: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Write ``manifest.json`` for shards that were indexed; return the manifest.

    ``name`` is what messages call the directory, by default its place.

    A directory of tokens records their number and the tokenizer, one of Megatron's files their type, too.
    """
    kinds = sorted({index.kind for index in indexes if index.num_documents})
    if len(kinds) > 1:
        raise DataError(f"{directory} mixes shards of {' and '.join(kinds)}; keep them in separate directories")
    kind = kinds[0] if kinds else (TOKENS_KIND if tokenizer_sha256 else TEXT_KIND)
    shards = [
        {
            "file": index.file,
            "bytes": index.num_bytes,
            "samples": index.num_samples,
            "chunks": [list(row) for row in index.chunks],
            **({"lengths_crc32": index.lengths_crc32} if index.lengths_crc32 else {}),
        }
        for index in indexes
    ]
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "kind": kind,
        "documents": sum(index.num_documents for index in indexes),
        "bytes_text": sum(index.text_bytes for index in indexes),
        "fingerprint": manifest_fingerprint(kind, shards, tokenizer_sha256),
        "shards": shards,
    }
    if kind in (TOKENS_KIND, MEGATRON_KIND):
        manifest["tokens"] = sum(index.num_tokens for index in indexes)
        manifest["tokenizer_sha256"] = tokenizer_sha256
    manifest |= {key: value for key, value in (("token_dtype", token_dtype), ("name", name)) if value}
    content = json.dumps(manifest, separators=(",", ":"), sort_keys=True) + "\n"
    write_atomic(directory / MANIFEST_NAME, content.encode())
    return manifest


def write_sample_indexes(directory: Path, indexes: Sequence[ShardIndex]) -> None:
    """Write the sample index beside each shard of a directory."""
    for index in indexes:
        write_sample_index(directory / index.file, index.sample_offsets)


class ShardWriter:
    """Write documents into shards of about ``shard_bytes`` each, then index them.

    Texts become one ``.txt`` member each. Token documents are gathered into blocks of about
    ``chunk_bytes``. The same documents in the same order give the same bytes.
    """

    def __init__(
        self,
        directory: Path,
        *,
        shard_bytes: int,
        chunk_bytes: int,
        vocab_size: int | None = None,
        tokenizer_sha256: str | None = None,
    ) -> None:
        """Start writing into a new directory; ``vocab_size`` and ``tokenizer_sha256`` are for token blocks."""
        directory.mkdir(parents=True)
        self._directory = directory
        self._shard_bytes, self._chunk_bytes = shard_bytes, chunk_bytes
        self._tokenizer_sha256 = tokenizer_sha256
        self._extension = "tok.u16" if vocab_size is not None and vocab_size <= 1 << 16 else "tok.u32"
        self._dtype = TOKEN_DTYPES[self._extension]
        self._block: list[np.ndarray] = []
        self._block_bytes = 0
        self._text_bytes = 0
        self._num_samples = 0
        self._indexes: list[ShardIndex] = []
        self._stream: BinaryIO | None = None
        self._tar: Any = None

    def write_text(self, text: str) -> None:
        """Append one document as text."""
        self._write_sample({TEXT_EXTENSION: text.encode()})

    def write_tokens(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append one document as framed tokens; ``text_bytes`` is the size of its text in UTF-8."""
        self._block.append(tokens.astype(self._dtype))
        self._block_bytes += self._block[-1].nbytes
        self._text_bytes += text_bytes
        if self._block_bytes >= self._chunk_bytes:
            self._write_block()

    def finish(self) -> dict[str, Any]:
        """Close and index the last shard, write the manifest and return it."""
        if self._block:
            self._write_block()
        if self._tar is not None:
            self._close_shard()
        if self._text_bytes and self._indexes:
            self._indexes[0].text_bytes = self._text_bytes  # a block does not tell the size of its text
        write_sample_indexes(self._directory, self._indexes)
        return write_manifest(self._directory, self._indexes, tokenizer_sha256=self._tokenizer_sha256)

    def _write_block(self) -> None:
        lengths = np.array([len(tokens) for tokens in self._block], LENGTHS_DTYPE)
        tokens = np.concatenate(self._block)
        self._write_sample({self._extension: tokens.tobytes(), LENGTHS_EXTENSION: lengths.tobytes()})
        self._block, self._block_bytes = [], 0

    def _write_sample(self, members: dict[str, bytes]) -> None:
        size = sum(len(content) + 2 * HEADER_BYTES for content in members.values())
        if self._stream is not None and self._stream.tell() + size > self._shard_bytes:
            self._close_shard()
        if self._tar is None:
            from webdataset import TarWriter  # imported on use, as it imports torch

            self._stream = open(self._directory / f"{len(self._indexes):05d}.tar", "wb")  # noqa: SIM115
            # mtime 0: the time of writing must not get into the bytes
            self._tar = TarWriter(self._stream, encoder=False, mtime=0)
        self._tar.write({"__key__": f"{self._num_samples:09d}", **members})
        self._num_samples += 1

    def _close_shard(self) -> None:
        assert self._stream is not None and self._tar is not None
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        path = self._directory / f"{len(self._indexes):05d}.tar"
        self._indexes.append(index_shard(path, self._chunk_bytes))
        self._stream = self._tar = None


def _check_directory(place: str, manifest: str) -> None:
    """Say of a local directory what is missing."""
    if not is_local(place):
        return
    if Path(place).is_file():
        raise DataConfigError(
            f"{place} is no shard directory; index it with `data index {place} --out DIRECTORY`"
        )
    if not Path(place).is_dir():
        raise DataConfigError(f"shard directory {place} does not exist; make it with `prepare`")
    if not Path(manifest).is_file():
        raise DataConfigError(
            f"{place} has no {MANIFEST_NAME}; make shards with `prepare`, or index the tar files that are "
            f"there with `data index {place}`"
        )


def _parse_manifest(content: bytes, place: str, reader: RangeReader) -> ShardSet:
    """Make a set of what a manifest says; its fingerprint must be that of its content."""
    name, directory = shown(join(place, MANIFEST_NAME)), shown(place)
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise DataError(f"{name} is no JSON ({error}); run `data index {directory}`") from error
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataConfigError(
            f"{name} has format {found!r}, expected {MANIFEST_FORMAT!r}; run `data index {directory}`"
        )
    try:
        shards, kind, recorded = manifest["shards"], manifest["kind"], manifest["fingerprint"]
        rows = [(number, *row) for number, shard in enumerate(shards) for row in shard["chunks"]]
        found = manifest_fingerprint(kind, shards, manifest.get("tokenizer_sha256"))
        shard_set = ShardSet(
            place=place,
            kind=kind,
            files=tuple(str(shard["file"]) for shard in shards),
            sizes=tuple(int(shard["bytes"]) for shard in shards),
            chunks=np.array(rows, dtype=np.int64).reshape(len(rows), CHUNK_COLUMNS + 1),
            num_documents=int(manifest["documents"]),
            text_bytes=int(manifest["bytes_text"]),
            num_tokens=manifest.get("tokens"),
            tokenizer_sha256=manifest.get("tokenizer_sha256"),
            fingerprint=found,
            reader=reader,
            name=manifest.get("name"),
            token_dtype=manifest.get("token_dtype"),
            lengths_crc32=tuple(crc32 for shard in shards for crc32 in shard.get("lengths_crc32", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{name} is damaged ({type(error).__name__}: {error}); run `data index {directory}`"
        ) from error
    if kind not in KINDS or found != recorded:
        raise DataError(
            f"{name} is damaged: its content gives fingerprint {found[:12]}, it says {str(recorded)[:12]}; "
            f"run `data index {directory}`"
        )
    return shard_set


def _check_files(shard_set: ShardSet) -> None:
    """Compare the sizes of local shards; over a network a question for each would take longer than the start."""
    for file, expected in zip(shard_set.files, shard_set.sizes, strict=True):
        path = join(shard_set.place, file)
        if not is_local(path):
            continue
        try:
            found = os.stat(path).st_size
        except OSError as error:
            raise DataError(
                f"shard {path} is missing ({error.strerror}), expected {expected} bytes; copy it anew"
            ) from error
        if found != expected:
            raise DataError(
                f"shard {path} has {found} bytes, expected {expected}; it was cut or changed: copy it "
                f"anew, or run `data index {shard_set.place}` if it was changed on purpose"
            )
