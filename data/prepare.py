"""Turn text files into cleaned, de-duplicated, split and indexed shards."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import DataConfigError
from .preparing.contamination import write_test_ngrams
from .preparing.document import load_tokenizer
from .preparing.hooks import filter_digest
from .preparing.packages import missing_packages
from .preparing.pieces import OpenDocuments, PieceSummary, process_in_pieces
from .preparing.place import HELDOUT_NAME, REPORT_NAME, TRAIN_NAME, unfinished_directory
from .preparing.settings import (
    DEFAULT_CHUNK_BYTES,
    DEFAULT_MIN_CHARS,
    DEFAULT_SHARD_BYTES,
    CorpusSettings,
    raise_problems,
)
from .preparing.writing import (
    CorpusWriter,
    PrepareReport,
    decide,
)
from .sources import RawDocument, SourceFile, find_named_files, is_broken_link, read_documents
from .storage import storage_errors

__all__ = [
    "DEFAULT_CHUNK_BYTES",
    "DEFAULT_MIN_CHARS",
    "DEFAULT_SHARD_BYTES",
    "HELDOUT_NAME",
    "REPORT_NAME",
    "TRAIN_NAME",
    "CorpusSettings",
    "PrepareProgress",
    "PrepareReport",
    "prepare",
    "unfinished_directory",
    "write_corpus",
]

PIECES_NAME = "pieces"
TEST_NGRAMS_NAME = "test-ngrams.npy"
# Raised whenever what a piece holds changes: pieces of an older program are then not taken up
PIECES_VERSION = 2
CLEANING_PACKAGES = (
    "ftfy",
    "trafilatura",
    "lxml",
    "pyarrow",
    "warcio",
    "sentencepiece",
    "tokenizers",
    "tiktoken",
)


@dataclass(frozen=True)
class PrepareProgress:
    """Tell how far a preparation has come.

    ``phase`` is "cleaning" or "writing". ``documents_kept`` and ``bytes_kept`` are before duplicates are
    dropped while it is cleaning. ``done`` of ``total`` are source files while it is cleaning, then documents.
    """

    phase: str
    documents_read: int
    documents_kept: int
    bytes_kept: int
    done: int
    total: int


Progress = Callable[[PrepareProgress], None]


def prepare(
    sources: Sequence[str], out: Path, *, progress: Progress | None = None, **settings: Any
) -> PrepareReport:
    """Write ``out/train``, ``out/heldout``, ``out/report.json`` and ``out/dropped.jsonl.gz``.

    ``settings`` are the fields of CorpusSettings. With a tokenizer the shards hold token blocks, without one
    the text. ``workers`` processes clean and tokenise; 0 does it in this one. The bytes written depend on the
    sources and the other settings alone. ``out`` appears when it is finished; until then finished pieces lie
    in ``.NAME.unfinished`` beside it, and a preparation that was killed goes on with them. Some 100 bytes of
    memory are needed for each document, 200 with ``near_duplicates``.

    Raises DataConfigError for unusable sources and settings, an ``out`` that holds something, and where
    nothing is left after cleaning; DataStorageError where reading or writing fails.
    """
    corpus, files = _check_input(sources, out, settings)
    with storage_errors(f"writing {out}"):
        keep = f"{PIECES_NAME}-{_input_fingerprint(files, corpus)}"
        with unfinished_directory(out, keep) as directory:

            def open_documents(file_number: int, file_documents: int) -> Iterator[RawDocument]:
                return _read_files(files, corpus.text_field, file_number, file_documents)

            return _write_pieces_then_corpus(
                open_documents, directory.parent / keep, directory, out, corpus, progress, len(files)
            )


def write_corpus(
    documents: Iterable[RawDocument],
    directory: Path,
    out: Path,
    settings: CorpusSettings,
    progress: Progress | None = None,
) -> PrepareReport:
    """Clean documents and write them into ``directory``, which will be called ``out``; see ``prepare``."""
    pieces = directory / f".{PIECES_NAME}"
    report = _write_pieces_then_corpus(lambda *_: documents, pieces, directory, out, settings, progress, 1)
    shutil.rmtree(pieces)
    return report


def _check_input(
    sources: Sequence[str], out: Path, settings: dict[str, Any]
) -> tuple[CorpusSettings, list[SourceFile]]:
    """Return settings and files; raise one DataConfigError for all that is wrong with the call."""
    problems: list[str] = []
    if out.name in ("", ".."):
        problems.append(
            f"out {str(out)!r} has no name of its own; name a directory that is to be made, like shards"
        )
    corpus, files = CorpusSettings(), []
    checks: list[Callable[[], Any]] = [
        lambda: CorpusSettings(**settings),
        lambda: find_named_files(sources),
        *(lambda name=name: filter_digest(name) for name in settings.get("filters", ())),
    ]
    if settings.get("tokenizer"):
        checks.append(lambda: load_tokenizer(settings["tokenizer"]))
    for check in checks:
        try:
            found = check()
        except DataConfigError as error:
            problems.append(str(error))
            continue
        if isinstance(found, CorpusSettings):
            corpus = found
        elif isinstance(found, list):
            files = found
    paths = [*(file.path for file in files), *settings.get("decontaminate", ())]
    problems += missing_packages(paths, bool(settings.get("keep_html")))
    raise_problems(problems)
    return corpus, files


def _read_files(
    files: Sequence[SourceFile], text_field: str, file_number: int, file_documents: int
) -> Iterator[RawDocument]:
    """Yield the documents of files, from file ``file_number`` on and behind the first documents of that one."""
    for number, file in enumerate(files[file_number:], file_number):
        documents = read_documents(file.path, text_field)
        for document in islice(documents, file_documents if number == file_number else 0, None):
            yield replace(document, source=file.source, file_number=number)


def _input_fingerprint(files: Sequence[SourceFile], settings: CorpusSettings) -> str:
    """Hash all that pieces depend on: files with size and time, settings, and the packages that clean."""
    values = asdict(settings)
    del values["workers"]
    tests = [SourceFile(path, "") for path in settings.decontaminate]
    content = [
        PIECES_VERSION,
        {name: str(value) for name, value in values.items()},
        [[str(file.path), file.source, *_size_and_time(file.path)] for file in [*files, *tests]],
        load_tokenizer(settings.tokenizer).sha256 if settings.tokenizer else None,
        [filter_digest(name) for name in settings.filters],
        [_version(name) for name in CLEANING_PACKAGES],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.lstat() if is_broken_link(path) else path.stat()
    return status.st_size, status.st_mtime_ns


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _write_pieces_then_corpus(
    open_documents: OpenDocuments,
    pieces: Path,
    directory: Path,
    out: Path,
    settings: CorpusSettings,
    progress: Progress | None,
    num_files: int,
) -> PrepareReport:
    report = PrepareReport(out)
    pieces.mkdir(exist_ok=True)
    test_ngrams = None
    if settings.decontaminate:
        test_ngrams = pieces / TEST_NGRAMS_NAME
        report.decontamination = write_test_ngrams(
            settings.decontaminate, settings.ngram, settings.text_field, test_ngrams
        )
    totals = PieceSummary(0, 0, 0, 0, 0)
    num_pieces = 0
    for piece in process_in_pieces(open_documents, pieces, settings, test_ngrams):
        num_pieces += 1
        totals = PieceSummary(
            piece.file_number,
            piece.file_documents,
            totals.num_documents + piece.num_documents,
            totals.num_kept + piece.num_kept,
            totals.bytes_kept + piece.bytes_kept,
        )
        if progress is not None:
            counts = (totals.num_documents, totals.num_kept, totals.bytes_kept)
            progress(PrepareProgress("cleaning", *counts, piece.file_number, num_files))
    decisions = decide(pieces, num_pieces, settings.near_duplicates)
    writer = CorpusWriter(directory, settings, report)

    def tell() -> None:
        if progress is not None:
            counts = (report.documents_read, report.documents_kept, report.train_bytes + report.heldout_bytes)
            progress(PrepareProgress("writing", *counts, report.documents_read, totals.num_documents))

    writer.write_pieces(pieces, num_pieces, decisions, tell)
    if not report.train_documents:
        shutil.rmtree(pieces)  # other settings make other pieces
    writer.finish()
    return report
