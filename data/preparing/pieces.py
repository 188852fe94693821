"""Process documents in pieces that are kept on disk until the corpus is written.

A piece is a run of documents in source order, cut by their number and size alone. Each is processed in this
process or in a worker and written under its number when it is finished, so that a preparation that was killed
goes on behind the pieces that are there, and the decisions that need all documents are made on what pieces
hold, with any number of workers.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..sources import RawDocument
from ..storage import write_atomic
from ..worker import end_with_parent
from .document import Outcome, process_document
from .near_duplicates import NUM_BANDS
from .settings import CorpusSettings

BATCH_DOCUMENTS = 256
BATCH_BYTES = 4 << 20
BATCHES_PER_WORKER = 3
DIGEST_WORDS = 2  # of 64 bits

# Opens the documents behind `count` documents of the file with a number
OpenDocuments = Callable[[int, int], Iterable[RawDocument]]


@dataclass(frozen=True)
class PieceSummary:
    """Say how far the sources were read where a piece ends, and what it holds.

    ``file_documents`` of the file ``file_number`` had been read.
    """

    file_number: int
    file_documents: int
    num_documents: int
    num_kept: int
    bytes_kept: int


@dataclass(frozen=True)
class Piece:
    """Hold what was made of a run of documents.

    Each document has an origin, a source and a reason (None: kept so far); each kept one has a digest,
    uint64 [kept, 2], its text's size in bytes, int64 [kept], and where wanted bands, uint64 [kept, NUM_BANDS].
    """

    summary: PieceSummary
    origins: list[str]
    sources: list[str]
    reasons: list[str | None]
    scrubbed: list[dict[str, int]]
    digests: np.ndarray
    sizes: np.ndarray
    bands: np.ndarray
    texts: list[str]
    tokens: list[np.ndarray]


def process_in_pieces(
    open_documents: OpenDocuments, directory: Path, settings: CorpusSettings, test_ngrams: Path | None
) -> Iterator[PieceSummary]:
    """Write the pieces that are not there yet; yield a summary of each, in order.

    Raises DataError where a worker dies.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file_number = file_documents = number = 0
    while (summary := read_summary(piece_path(directory, number))) is not None:
        file_number, file_documents = summary.file_number, summary.file_documents
        number += 1
        yield summary
    batches = _batches(open_documents(file_number, file_documents), file_number, file_documents)
    jobs = (
        (piece_path(directory, number), batch, end, settings, test_ngrams)
        for number, (batch, end) in enumerate(batches, number)
    )
    if settings.workers:
        yield from _run_workers(jobs, settings.workers)
    else:
        yield from itertools.starmap(_write_piece, jobs)


def piece_path(directory: Path, number: int) -> Path:
    """Return where the piece with a number is kept."""
    return directory / f"{number:08d}.npz"


def read_summary(path: Path) -> PieceSummary | None:
    """Return a piece's summary, or None where there is no whole piece."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return PieceSummary(**json.loads(arrays["record"].tobytes())["summary"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def read_piece(path: Path, *, with_content: bool) -> Piece:
    """Read a piece, without texts and tokens where only decisions are made.

    Raises DataError where it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            record = json.loads(arrays["record"].tobytes())
            sizes, tokens, texts = arrays["sizes"], [], []
            if with_content and len(arrays["lengths"]):
                tokens = np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])
            elif with_content:
                content = arrays["content"].tobytes()
                ends = np.cumsum(sizes)
                texts = [content[end - size : end].decode() for end, size in zip(ends, sizes, strict=True)]
            return Piece(
                summary=PieceSummary(**record["summary"]),
                origins=record["origins"],
                sources=record["sources"],
                reasons=record["reasons"],
                scrubbed=record["scrubbed"],
                digests=arrays["digests"],
                sizes=sizes,
                bands=arrays["bands"],
                texts=texts,
                tokens=tokens,
            )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} was damaged since it was written ({error}); remove it and start again"
        ) from error


def _run_workers(jobs: Iterable[tuple], num_workers: int) -> Iterator[PieceSummary]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, end_with_parent, (os.getpid(),)) as pool:
        waiting: deque[Future[PieceSummary]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(_write_piece, *job))
                if len(waiting) >= BATCHES_PER_WORKER * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a preparing process died, most often for want of memory; use fewer workers, and the same "
                "command goes on"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _batches(
    documents: Iterable[RawDocument], file_number: int, file_documents: int
) -> Iterator[tuple[list[RawDocument], tuple[int, int]]]:
    """Yield batches, each with the file it ends in and how many of that file's documents were read by then."""
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        file_documents = file_documents + 1 if document.file_number == file_number else 1
        file_number = document.file_number
        batch.append(document)
        size += len(document.content)
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch, (file_number, file_documents)
            batch, size = [], 0
    if batch:
        yield batch, (file_number, file_documents)


def _write_piece(
    path: Path,
    batch: list[RawDocument],
    end: tuple[int, int],
    settings: CorpusSettings,
    test_ngrams: Path | None,
) -> PieceSummary:
    """Process a batch and write its piece, if an earlier process has not."""
    summary = read_summary(path)
    if summary is None:
        outcomes = [process_document(raw, settings, test_ngrams) for raw in batch]
        summary, content = _pack(outcomes, end)
        write_atomic(path, content)
    return summary


def _pack(outcomes: list[Outcome], end: tuple[int, int]) -> tuple[PieceSummary, bytes]:
    kept = [outcome for outcome in outcomes if outcome.document is not None]
    documents = [outcome.document for outcome in outcomes if outcome.document is not None]
    tokens = [outcome.tokens for outcome in kept if outcome.tokens is not None]
    encoded = [document.text.encode() for document in documents]
    bands = [outcome.bands for outcome in kept if outcome.bands is not None]
    summary = PieceSummary(*end, len(outcomes), len(kept), sum(map(len, encoded)))
    record = {
        "summary": vars(summary),
        "origins": [outcome.origin for outcome in outcomes],
        "sources": [outcome.source for outcome in outcomes],
        "reasons": [outcome.reason for outcome in outcomes],
        "scrubbed": [outcome.scrubbed for outcome in kept],
    }
    content = io.BytesIO()
    np.savez(
        content,
        record=np.frombuffer(json.dumps(record).encode(), np.uint8),
        digests=np.frombuffer(b"".join(document.digest for document in documents), "<u8").reshape(
            -1, DIGEST_WORDS
        ),
        sizes=np.array([len(text) for text in encoded], np.int64),
        bands=np.array(bands, np.uint64).reshape(-1, NUM_BANDS),
        content=np.frombuffer(b"" if tokens else b"".join(encoded), np.uint8),
        tokens=np.concatenate(tokens) if tokens else np.empty(0, np.uint16),
        lengths=np.array([len(array) for array in tokens], np.int64),
    )
    return summary, content.getvalue()
