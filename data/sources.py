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
from typing import IO, Any, cast

from .errors import DataConfigError
from .preparing.place import DROPPED_NAME, REPORT_NAME, TRAIN_NAME
from .shards import MANIFEST_FORMAT, MANIFEST_NAME
from .storage import storage_errors

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
HTML_SUFFIXES = (".html", ".htm")
PARQUET_SUFFIX, ARROW_SUFFIX = ".parquet", ".arrow"
WARC_SUFFIXES = (".warc", ".wet")
RECORD_SUFFIXES = (*JSON_LINES_SUFFIXES, PARQUET_SUFFIX, ARROW_SUFFIX, *WARC_SUFFIXES)
# What `save_to_disk` of Hugging Face's datasets writes beside the shards
DATASET_STATE, DATASET_NOTES = "state.json", frozenset({"state.json", "dataset_info.json", "dataset_dict.json"})
PREPARE_NOTES = frozenset({REPORT_NAME, DROPPED_NAME})
COMPRESSION_SUFFIXES = (".gz", ".zst")
SUFFIX_LIST = (
    ".txt .text .md .markdown .rst .adoc .tex .org .html .htm .xml .py .pyi .ipy .js .mjs .jsx .ts .tsx .java .kt "
    ".c .h .cc .cpp .cxx .hpp .cu .cuh .cs .go .rs .swift .rb .php .pl .pm .lua .r .jl .scala .hs .ml .ex .exs .erl "
    ".clj .lisp .sh .bash .sql .toml .yaml .yml .json .ini .cfg .css .proto .cmake .f90 .f .m .v .sv .vhd .asm"
)
TEXT_SUFFIXES = frozenset(SUFFIX_LIST.split())


@dataclass(frozen=True)
class RawDocument:
    """Hold a document as it was found: where, and its bytes or text; or why it could not be read.

    ``html`` marks a page whose text is still to be extracted. ``source`` and ``file_number`` say which of the
    given sources and files it is from.
    """

    origin: str
    content: bytes | str
    reason: str | None = None
    html: bool = False
    source: str = ""
    file_number: int = 0


@dataclass(frozen=True)
class SourceFile:
    """Name a file and the source, as it was given, that led to it."""

    path: Path
    source: str


def find_source_files(sources: Sequence[str]) -> list[Path]:
    """Return the files that sources name; see ``find_named_files``."""
    return [file.path for file in find_named_files(sources)]


def find_named_files(sources: Sequence[str]) -> list[SourceFile]:
    """Return the files that paths, folders and glob patterns name, each once, in the order given.

    In a folder, hidden files, files that are no text by their suffix and what ``prepare`` wrote are passed
    over; a file named itself is always taken. Of a dataset that was saved to disk its shards are taken, in
    their order. Pipes and devices, which may never end, are passed over, and links that lead nowhere are found
    like what they are called; both are refused where one is named itself. Links to folders are not followed
    in a folder and under ``**``.
    Raises DataConfigError, all in one, for what names nothing.
    """
    found: dict[Path, str] = {}
    problems: list[str] = []
    for source in sources:
        if not source.strip():
            problems.append(f"source {source!r} is empty; give a file, a folder or a pattern")
            continue
        path = Path(source)
        if path.is_dir():
            files = list(_folder_files(path))
        elif _is_special(path):
            problems.append(
                f"source {source!r} is neither a regular file nor a folder; write what it gives into a file"
            )
            continue
        elif is_broken_link(path):
            problems.append(f"source {source!r} is a link that leads nowhere; mend it or take it away")
            continue
        elif path.exists():
            files = [path]
        else:
            matches = sorted(_expand(source))
            matches = [match for match in matches if not _is_special(match)]
            files = [
                file for match in matches for file in (_folder_files(match) if match.is_dir() else [match])
            ]
        if not files:
            problem = "holds no text files" if path.is_dir() else "names no file"
            problems.append(
                f"source {source!r} {problem}; give a file, a folder or a pattern of text, .jsonl, .parquet, .warc "
                "or .html files (plain, .gz or .zst), or a saved dataset"
            )
        for file in files:
            found.setdefault(file, source)
    if problems:
        raise DataConfigError("\n".join(problems))
    if not found:
        raise DataConfigError("no sources; give at least one file, folder or pattern")
    return [SourceFile(path, source) for path, source in found.items()]


def read_documents(file: Path, text_field: str = "text") -> Iterator[RawDocument]:
    """Yield the documents of a file: each record's of a .jsonl, table or web archive, else the whole file.

    ``text_field`` names the key or column of records. A damaged archive or file gives what comes before the
    damage, then a document with the reason ``damaged_archive`` or ``damaged_file``; a link that leads nowhere
    gives ``broken_link``. Pages come as HTML.
    Raises DataStorageError where reading fails, DataConfigError where a package for a format is missing.
    """
    suffix = content_suffix(file)
    if is_broken_link(file):
        yield RawDocument(str(file), b"", "broken_link")
        return
    with storage_errors(f"reading {file}"):
        if suffix in (PARQUET_SUFFIX, ARROW_SUFFIX):
            from .preparing.tables import read_table  # pyarrow is imported for tables alone

            yield from read_table(file, text_field)
            return
        try:
            with _open(file) as stream:
                if suffix in WARC_SUFFIXES:
                    from .preparing.web import read_web_archive  # and warcio for web archives

                    yield from read_web_archive(file, stream)
                elif suffix in JSON_LINES_SUFFIXES:
                    for number, line in enumerate(stream, 1):
                        if line.strip():
                            yield _json_document(line, f"{file}:{number}", text_field)
                else:
                    yield RawDocument(str(file), stream.read(), html=suffix in HTML_SUFFIXES)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield RawDocument(str(file), b"", "damaged_archive")


def is_broken_link(path: Path) -> bool:
    """Tell a link to what is not there, or round in a circle."""
    return path.is_symlink() and not path.exists()


def _expand(pattern: str) -> set[Path]:
    """Return the paths that a pattern names; ``**`` passes over hidden folders and links to folders.

    glob itself follows such links as often as the system allows: through two that lead back, for ever.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        return {Path(match) for match in glob.glob(pattern)}
    place = parts.index("**")
    tops = _expand(str(Path(*parts[:place]))) if place else {Path()}
    rest = parts[place + 1 :] or ("*",)
    found: set[Path] = set()
    for top in tops:
        for root, directories, files in os.walk(top):
            if MANIFEST_NAME in files and _is_shard_directory(Path(root, MANIFEST_NAME)):
                directories.clear()
                continue
            directories[:] = [name for name in directories if not name.startswith(".")]
            found |= _expand(str(Path(glob.escape(root), *rest)))
    return {path for path in found if not (path.is_symlink() and path.is_dir()) and not _is_prepare_note(path)}


def _folder_files(folder: Path) -> Iterator[Path]:
    for root, directories, files in os.walk(folder):
        if MANIFEST_NAME in files and _is_shard_directory(Path(root, MANIFEST_NAME)):
            directories.clear()
            continue
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        shards = _dataset_shards(Path(root, DATASET_STATE)) if DATASET_STATE in files else None
        if shards is not None:
            yield from (Path(root, name) for name in shards)
            files = [name for name in files if name not in DATASET_NOTES and not name.endswith(ARROW_SUFFIX)]
        elif "dataset_dict.json" in files:
            files = [name for name in files if name not in DATASET_NOTES]
        for name in sorted(files):
            file = Path(root, name)
            suffix = content_suffix(file)
            is_text = suffix in TEXT_SUFFIXES or suffix in RECORD_SUFFIXES
            hidden = name.startswith(".") or _is_special(file) or _is_prepare_note(file)
            if is_text and not hidden:
                yield file


def _is_shard_directory(manifest: Path) -> bool:
    """Tell the manifest of shards from a file of that name which is another program's."""
    try:
        return bool(json.loads(manifest.read_bytes())["format"] == MANIFEST_FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_prepare_note(file: Path) -> bool:
    """Tell the reports that ``prepare`` wrote beside its shards."""
    return file.name in PREPARE_NOTES and _is_shard_directory(file.parent / TRAIN_NAME / MANIFEST_NAME)


def _dataset_shards(state: Path) -> list[str] | None:
    """Return the shards that a saved dataset lists; None where the file is another program's."""
    try:
        return [str(entry["filename"]) for entry in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_special(path: Path) -> bool:
    """Tell a pipe, socket or device from a file, a folder and what is not there."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def content_suffix(file: Path) -> str:
    """Return the suffix of what a file holds, looking through compression."""
    name = Path(file.stem) if file.suffix.lower() in COMPRESSION_SUFFIXES else file
    return name.suffix.lower()


def _json_document(line: bytes, origin: str, text_field: str) -> RawDocument:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        return RawDocument(origin, b"", "bad_json")
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        return RawDocument(origin, b"", "no_text_field")
    return RawDocument(origin, record[text_field])


def _open(file: Path) -> IO[bytes]:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(file, "rb"))
    if suffix == ".zst":
        return cast(IO[bytes], io.BufferedReader(_ZstdStream(file), 1 << 20))
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
