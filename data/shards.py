"""Write and open shard directories: tar files, a sample index beside each, and one manifest."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .documents import (
    LENGTHS_DTYPE,
    LENGTHS_EXTENSION,
    TEXT_EXTENSION,
    TEXT_KIND,
    TOKEN_DTYPES,
    TOKENS_KIND,
    read_texts,
    read_token_documents,
)
from .errors import DataConfigError, DataError
from .index import ShardIndex, index_shard, write_sample_index
from .storage import storage_errors, write_atomic

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "basestone-shards-1"
HEADER_BYTES = 512
CHUNK_COLUMNS = 4  # offset, length, samples, crc32


@dataclass(frozen=True)
class ShardSet:
    """Hold an opened shard directory: what its manifest says, checked against the files' sizes.

    ``chunks`` is int64 [num_chunks, 5]: shard number, byte offset, byte length, samples, crc32.
    """

    directory: Path
    kind: str
    files: tuple[str, ...]
    chunks: np.ndarray
    num_documents: int
    text_bytes: int
    num_tokens: int | None
    tokenizer_sha256: str | None
    fingerprint: str

    @property
    def num_chunks(self) -> int:
        """Return the number of chunks in all shards."""
        return len(self.chunks)

    def place(self, chunk: int) -> str:
        """Name a chunk for messages: the shard's path and the byte range."""
        shard, offset, length = (int(value) for value in self.chunks[chunk, :3])
        return f"shard {self.directory / self.files[shard]}, bytes {offset}-{offset + length}"

    def read_chunk(self, chunk: int) -> bytes:
        """Read one chunk and compare its checksum.

        Raises DataError for a short read or a checksum that differs, DataStorageError where reading fails.
        """
        shard, offset, length, _, expected = (int(value) for value in self.chunks[chunk])
        path = self.directory / self.files[shard]
        with storage_errors(f"reading {self.place(chunk)}"), open(path, "rb") as stream:
            content = os.pread(stream.fileno(), length, offset)
        if len(content) != length:
            raise DataError(
                f"{self.place(chunk)}: got {len(content)} bytes, expected {length}; the shard was cut: copy it anew"
            )
        found = zlib.crc32(content)
        if found != expected:
            raise DataError(
                f"{self.place(chunk)}: checksum is {found:08x}, expected {expected:08x}; the shard is damaged: "
                "copy it anew, or run `data index` if it was changed on purpose"
            )
        return content

    def read_documents(self, chunk: int) -> Sequence[str] | Sequence[np.ndarray]:
        """Return a chunk's documents in file order: texts, or token arrays where the kind is tokens."""
        content, where = self.read_chunk(chunk), self.place(chunk)
        if self.kind == TEXT_KIND:
            return read_texts(content, where)
        return read_token_documents(content, where)


def open_shard_set(directory: Path) -> ShardSet:
    """Open a shard directory; its manifest must be whole and every shard there with the size it says.

    Raises DataConfigError where the directory is no shard directory or holds nothing, DataError where a
    shard is missing or cut or the manifest is damaged.
    """
    manifest = _read_manifest(directory)
    try:
        shards = manifest["shards"]
        files = tuple(str(shard["file"]) for shard in shards)
        rows = [(number, *row) for number, shard in enumerate(shards) for row in shard["chunks"]]
        chunks = np.array(rows, dtype=np.int64).reshape(len(rows), CHUNK_COLUMNS + 1)
        kind, recorded = manifest["kind"], manifest["fingerprint"]
        sizes = [int(shard["bytes"]) for shard in shards]
        found = manifest_fingerprint(kind, shards, manifest.get("tokenizer_sha256"))
        documents, text_bytes = int(manifest["documents"]), int(manifest["bytes_text"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{directory / MANIFEST_NAME} is damaged ({type(error).__name__}: {error}); run `data index {directory}`"
        ) from error
    if kind not in (TEXT_KIND, TOKENS_KIND) or found != recorded:
        raise DataError(
            f"{directory / MANIFEST_NAME} is damaged: its content gives fingerprint {found[:12]}, it says "
            f"{str(recorded)[:12]}; run `data index {directory}`"
        )
    _check_files(directory, files, sizes)
    return ShardSet(
        directory=directory,
        kind=kind,
        files=files,
        chunks=chunks,
        num_documents=documents,
        text_bytes=text_bytes,
        num_tokens=manifest.get("tokens"),
        tokenizer_sha256=manifest.get("tokenizer_sha256"),
        fingerprint=found,
    )


def open_filled_shard_set(directory: Path) -> ShardSet:
    """Open a shard directory that must hold at least one document."""
    shard_set = open_shard_set(directory)
    if not shard_set.num_documents:
        raise DataConfigError(f"{directory} holds no documents; prepare it with more text")
    return shard_set


def manifest_fingerprint(kind: str, shards: Sequence[dict[str, Any]], tokenizer_sha256: str | None) -> str:
    """Hash what decides the documents and their order: kind, sizes, chunks with checksums, tokenizer.

    File names and places do not count: a directory may be moved.
    """
    content = [
        kind,
        tokenizer_sha256,
        [[shard["bytes"], shard["samples"], shard["chunks"]] for shard in shards],
    ]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def write_manifest(
    directory: Path, indexes: Sequence[ShardIndex], *, tokenizer_sha256: str | None
) -> dict[str, Any]:
    """Write ``manifest.json`` and the sample indexes for shards that were indexed; return the manifest.

    A directory of token blocks records the tokens and the tokenizer in place of the text's bytes.
    """
    kinds = {index.kind for index in indexes}
    if len(kinds) > 1:
        raise DataError(
            f"{directory} mixes shards of text and of token blocks; keep them in separate directories"
        )
    kind = kinds.pop() if kinds else (TOKENS_KIND if tokenizer_sha256 else TEXT_KIND)
    shards = [
        {
            "file": index.file,
            "bytes": index.num_bytes,
            "samples": index.num_samples,
            "chunks": [list(row) for row in index.chunks],
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
    if kind == TOKENS_KIND:
        manifest["tokens"] = sum(index.num_tokens for index in indexes)
        manifest["tokenizer_sha256"] = tokenizer_sha256
    for index in indexes:
        write_sample_index(directory / index.file, index.sample_offsets)
    content = json.dumps(manifest, separators=(",", ":"), sort_keys=True) + "\n"
    write_atomic(directory / MANIFEST_NAME, content.encode())
    return manifest


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


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise DataConfigError(f"shard directory {directory} does not exist; make it with `prepare`")
    if not path.is_file():
        raise DataConfigError(
            f"{directory} has no {MANIFEST_NAME}; make shards with `prepare`, or index the tar files that are "
            f"there with `data index {directory}`"
        )
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); run `data index {directory}`") from error
    except OSError as error:
        raise DataConfigError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataConfigError(
            f"{path} has format {found!r}, expected {MANIFEST_FORMAT!r}; run `data index {directory}`"
        )
    return manifest


def _check_files(directory: Path, files: Sequence[str], sizes: Sequence[int]) -> None:
    for file, expected in zip(files, sizes, strict=True):
        try:
            found = (directory / file).stat().st_size
        except OSError as error:
            raise DataError(
                f"shard {directory / file} is missing ({error.strerror}), expected {expected} bytes; copy it anew"
            ) from error
        if found != expected:
            raise DataError(
                f"shard {directory / file} has {found} bytes, expected {expected}; it was cut or changed: copy it "
                f"anew, or run `data index {directory}` if it was changed on purpose"
            )
