"""Find source files and read raw documents out of them."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .errors import DataConfigError
from .storage import storage_errors

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSION_SUFFIXES = (".gz", ".zst")
SUFFIX_LIST = (
    ".txt .text .md .markdown .rst .adoc .tex .org .html .htm .xml .py .pyi .ipy .js .mjs .jsx .ts .tsx .java .kt "
    ".c .h .cc .cpp .cxx .hpp .cu .cuh .cs .go .rs .swift .rb .php .pl .pm .lua .r .jl .scala .hs .ml .ex .exs .erl "
    ".clj .lisp .sh .bash .sql .toml .yaml .yml .json .ini .cfg .css .proto .cmake .f90 .f .m .v .sv .vhd .asm"
)
TEXT_SUFFIXES = frozenset(SUFFIX_LIST.split())


@dataclass(frozen=True)
class RawDocument:
    """Hold a document as it was found: where, and its bytes or text; or why it could not be read."""

    origin: str
    content: bytes | str
    reason: str | None = None


def find_source_files(sources: Sequence[str]) -> list[Path]:
    """Return the files that paths, folders and glob patterns name, each once, in the order given.

    In a folder, hidden files and files that are no text by their suffix are passed over; a file named
    itself is always taken. Pipes and devices, which may never end, are passed over, and refused where one is
    named itself. Raises DataConfigError for what names nothing.
    """
    found: dict[Path, None] = {}
    for source in sources:
        if not source.strip():
            raise DataConfigError(f"source {source!r} is empty; give a file, a folder or a pattern")
        path = Path(source)
        if path.is_dir():
            files = list(_folder_files(path))
        elif _is_special(path):
            raise DataConfigError(
                f"source {source!r} is neither a regular file nor a folder; write what it gives into a file"
            )
        elif path.exists():
            files = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(source, recursive=True))]
            matches = [match for match in matches if not _is_special(match)]
            files = [
                file for match in matches for file in (_folder_files(match) if match.is_dir() else [match])
            ]
        if not files:
            problem = "holds no text files" if path.is_dir() else "names no file"
            raise DataConfigError(
                f"source {source!r} {problem}; give a file, a folder or a pattern of text or .jsonl files "
                "(plain, .gz or .zst)"
            )
        found.update(dict.fromkeys(files))
    if not found:
        raise DataConfigError("no sources; give at least one file, folder or pattern")
    return list(found)


def read_documents(file: Path) -> Iterator[RawDocument]:
    """Yield the documents of a file: each line's ``text`` of a .jsonl, else the whole file.

    A damaged archive gives what comes before the damage, then a document with the reason ``damaged_archive``.
    Raises DataStorageError where reading fails.
    """
    suffix = _content_suffix(file)
    with storage_errors(f"reading {file}"):
        try:
            with _open(file) as stream:
                if suffix not in JSON_LINES_SUFFIXES:
                    yield RawDocument(str(file), stream.read())
                    return
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield _json_document(line, f"{file}:{number}")
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield RawDocument(str(file), b"", "damaged_archive")


def _folder_files(folder: Path) -> Iterator[Path]:
    for root, directories, files in os.walk(folder):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(files):
            file = Path(root, name)
            suffix = _content_suffix(file)
            is_text = suffix in TEXT_SUFFIXES or suffix in JSON_LINES_SUFFIXES
            if is_text and not name.startswith(".") and not _is_special(file):
                yield file


def _is_special(path: Path) -> bool:
    """Tell a pipe, socket or device from a file, a folder and what is not there."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _content_suffix(file: Path) -> str:
    """Return the suffix of what a file holds, looking through compression."""
    name = Path(file.stem) if file.suffix.lower() in COMPRESSION_SUFFIXES else file
    return name.suffix.lower()


def _json_document(line: bytes, origin: str) -> RawDocument:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        return RawDocument(origin, b"", "bad_json")
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        return RawDocument(origin, b"", "no_text_field")
    return RawDocument(origin, record["text"])


def _open(file: Path) -> IO[bytes] | io.BufferedIOBase:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file, "rb")
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(file), 1 << 20)
    return open(file, "rb")


class _ZstdStream(io.RawIOBase):
    """Decompress a .zst file; unlike the library's reader it raises EOFError where the file was cut."""

    def __init__(self, file: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataConfigError(
                f"{file} needs the package zstandard, which is not installed; run: pip install 'basestone[zst]'"
            ) from error
        self._zstandard = zstandard
        self._compressed = open(file, "rb")  # noqa: SIM115
        self._frame: Any = None
        self._unused = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            content = self._unused or self._compressed.read(1 << 16)
            self._unused = b""
            if not content:
                if self._frame is not None:
                    raise EOFError("the last frame is cut")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(content)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            if self._frame.eof:
                self._unused, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._compressed.close()
        super().close()
