"""Turn text files into cleaned, de-duplicated, split and indexed shards."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .cleaning import CleanDocument, clean_document, is_heldout
from .errors import DataConfigError, DataError
from .shards import ShardWriter
from .sources import RawDocument, find_source_files, read_documents
from .storage import rename_directory, storage_errors, write_atomic
from .tokenizer import Tokenizer
from .worker import end_with_parent

# Smaller chunks shuffle better, larger ones cost fewer reads and a shorter manifest (40 bytes a chunk).
DEFAULT_CHUNK_BYTES = 128 << 10
DEFAULT_SHARD_BYTES = 64 << 20
DEFAULT_MIN_CHARS = 32
MIN_CHUNK_BYTES = 1 << 10
BATCH_DOCUMENTS = 256
BATCH_BYTES = 4 << 20
BATCHES_PER_WORKER = 3
EXAMPLES_PER_REASON = 5
REPORT_NAME = "report.json"
TRAIN_NAME, HELDOUT_NAME = "train", "heldout"


@dataclass(frozen=True)
class PrepareProgress:
    """Tell how far a preparation has come."""

    documents_read: int
    documents_kept: int
    bytes_kept: int


@dataclass
class PrepareReport:
    """Count what a preparation read, kept and dropped. ``tokens`` is None where text was written as text.

    Sizes are those of the text in UTF-8.
    """

    out: Path
    documents_read: int = 0
    documents_kept: int = 0
    train_documents: int = 0
    heldout_documents: int = 0
    train_bytes: int = 0
    heldout_bytes: int = 0
    train_tokens: int | None = None
    heldout_tokens: int | None = None
    train_fingerprint: str = ""
    heldout_fingerprint: str = ""
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_examples: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what report.json holds: everything but the place, so equal input gives equal bytes."""
        content = asdict(self)
        del content["out"]
        return content


@dataclass(frozen=True)
class CorpusSettings:
    """Say how documents are cleaned, split and written."""

    heldout_fraction: float = 0.01
    tokenizer: Path | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    min_chars: int = DEFAULT_MIN_CHARS
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if not 0 <= self.heldout_fraction < 1:
            raise DataConfigError(f"heldout_fraction is {self.heldout_fraction}; it must be 0 or more, under 1")
        if not MIN_CHUNK_BYTES <= self.chunk_bytes <= self.shard_bytes:
            raise DataConfigError(
                f"chunk_bytes is {self.chunk_bytes} and shard_bytes {self.shard_bytes}; a chunk must be at least "
                f"{MIN_CHUNK_BYTES} bytes and no larger than a shard"
            )
        if self.min_chars < 0 or self.workers < 0:
            raise DataConfigError(
                f"min_chars is {self.min_chars} and workers {self.workers}; neither may be negative"
            )


@dataclass(frozen=True)
class _Outcome:
    """Hold what became of a document: the reason it is dropped for, or its text with its tokens if wanted."""

    origin: str
    reason: str | None = None
    document: CleanDocument | None = None
    tokens: np.ndarray | None = None


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    heldout_fraction: float = 0.01,
    tokenizer: Path | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    min_chars: int = DEFAULT_MIN_CHARS,
    workers: int = 0,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> PrepareReport:
    """Write ``out/train``, ``out/heldout`` and ``out/report.json`` from text and .jsonl files.

    With a tokenizer the shards hold token blocks, without one the text. ``workers`` processes clean and
    tokenise; 0 does it in this one. The bytes written depend on the sources and settings alone. ``out`` appears
    when it is finished. Digests of all kept documents are held in memory, some 100 bytes each.

    Raises DataConfigError for unusable sources and settings, an ``out`` that holds something, and where
    nothing is left after cleaning; DataStorageError where reading or writing fails.
    """
    settings = CorpusSettings(heldout_fraction, tokenizer, shard_bytes, chunk_bytes, min_chars, workers)
    files = find_source_files(sources)
    documents = (document for file in files for document in read_documents(file))
    with storage_errors(f"writing {out}"), unfinished_directory(out) as unfinished:
        return write_corpus(documents, unfinished, out, settings, progress)


@contextmanager
def unfinished_directory(out: Path) -> Iterator[Path]:
    """Give a directory to fill that takes the name ``out`` when the block ends well, and else is removed.

    What an earlier, killed process left is removed first. Raises DataConfigError where ``out`` holds
    something or another process is writing it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataConfigError(f"{out} exists and is not empty; give another place, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished")
    unfinished.mkdir(exist_ok=True)
    descriptor = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), os.stat(unfinished)):
                raise FileNotFoundError("the directory was renamed before the lock was had")
        except OSError as error:
            raise DataConfigError(f"another process is writing {out}; wait for it to finish") from error
        try:
            for leftover in unfinished.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            yield unfinished
            rename_directory(unfinished, out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    finally:
        os.close(descriptor)


def write_corpus(
    documents: Iterable[RawDocument],
    directory: Path,
    out: Path,
    settings: CorpusSettings,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> PrepareReport:
    """Clean documents and write them into ``directory``, which will be called ``out``; see ``prepare``."""
    report = PrepareReport(out)
    dropped: Counter[str] = Counter()
    writers = {name: _open_writer(directory / name, settings) for name in (TRAIN_NAME, HELDOUT_NAME)}
    seen: set[bytes] = set()
    for outcomes in _process_documents(documents, settings):
        for outcome in outcomes:
            report.documents_read += 1
            document, reason = outcome.document, outcome.reason
            if document is not None and document.digest in seen:
                reason = "duplicate"
            if reason is not None or document is None:
                assert reason is not None
                dropped[reason] += 1
                examples = report.dropped_examples.setdefault(reason, [])
                if len(examples) < EXAMPLES_PER_REASON:
                    examples.append(outcome.origin)
                continue
            seen.add(document.digest)
            _write_document(document, outcome.tokens, writers, report, settings.heldout_fraction)
        if progress is not None:
            kept_bytes = report.train_bytes + report.heldout_bytes
            progress(PrepareProgress(report.documents_read, report.documents_kept, kept_bytes))
    report.dropped = dict(sorted(dropped.items()))
    report.dropped_examples = dict(sorted(report.dropped_examples.items()))
    if not report.train_documents:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in report.dropped.items()) or "none"
        raise DataConfigError(
            f"no document is left to train on: {report.documents_read} read, {report.heldout_documents} held out, "
            f"dropped {reasons}; give more text, or lower min_chars or heldout_fraction"
        )
    train, heldout = (writers[name].finish() for name in (TRAIN_NAME, HELDOUT_NAME))
    report.train_tokens, report.heldout_tokens = train.get("tokens"), heldout.get("tokens")
    report.train_fingerprint, report.heldout_fingerprint = train["fingerprint"], heldout["fingerprint"]
    write_atomic(directory / REPORT_NAME, (json.dumps(report.to_json(), indent=2) + "\n").encode())
    return report


def _open_writer(directory: Path, settings: CorpusSettings) -> ShardWriter:
    tokenizer = None if settings.tokenizer is None else _load_tokenizer(settings.tokenizer)
    return ShardWriter(
        directory,
        shard_bytes=settings.shard_bytes,
        chunk_bytes=settings.chunk_bytes,
        vocab_size=tokenizer.vocab_size if tokenizer else None,
        tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
    )


def _write_document(
    document: CleanDocument,
    tokens: np.ndarray | None,
    writers: dict[str, ShardWriter],
    report: PrepareReport,
    heldout_fraction: float,
) -> None:
    heldout = is_heldout(document.digest, heldout_fraction)
    writer = writers[HELDOUT_NAME if heldout else TRAIN_NAME]
    size = len(document.text.encode())
    if tokens is None:
        writer.write_text(document.text)
    else:
        writer.write_tokens(tokens, size)
    report.documents_kept += 1
    if heldout:
        report.heldout_documents += 1
        report.heldout_bytes += size
    else:
        report.train_documents += 1
        report.train_bytes += size


def _process_documents(documents: Iterable[RawDocument], settings: CorpusSettings) -> Iterator[list[_Outcome]]:
    """Clean and tokenise batches of documents, in this process or in workers, in order."""
    batches = _batches(documents)
    if not settings.workers:
        for batch in batches:
            yield _process_batch(batch, settings)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.workers, context, end_with_parent, (os.getpid(),)) as pool:
        waiting: deque[Future[list[_Outcome]]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_process_batch, batch, settings))
                if len(waiting) >= BATCHES_PER_WORKER * settings.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a preparing process died, most often for want of memory; use fewer workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _batches(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _process_batch(batch: list[RawDocument], settings: CorpusSettings) -> list[_Outcome]:
    outcomes = []
    for raw in batch:
        cleaned = raw.reason or clean_document(raw.content, settings.min_chars)
        if isinstance(cleaned, str):
            outcomes.append(_Outcome(raw.origin, reason=cleaned))
            continue
        tokens = None
        if settings.tokenizer is not None:
            tokens = _load_tokenizer(settings.tokenizer).encode_document(cleaned.text)
        outcomes.append(_Outcome(raw.origin, document=cleaned, tokens=tokens))
    return outcomes


@cache
def _load_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)
