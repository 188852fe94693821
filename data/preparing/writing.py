"""Decide between the documents of all pieces, and write those that stay, with a report."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ..cleaning import is_heldout
from ..errors import DataConfigError
from ..shards import ShardWriter
from ..storage import write_atomic
from .document import load_tokenizer
from .near_duplicates import first_alike, first_equals
from .pieces import Piece, piece_path, read_piece
from .place import DROPPED_NAME, HELDOUT_NAME, REPORT_NAME, TRAIN_NAME
from .settings import CorpusSettings

EXAMPLES_PER_REASON = 5
GZIP_LEVEL = 6


@dataclass
class PrepareReport:
    """Count what a preparation read, kept and dropped. ``tokens`` is None where text was written as text.

    Sizes are those of the text in UTF-8. ``sources`` has the counts of each source as it was given;
    ``scrubbed`` counts replacements in documents that were kept.
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
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    scrubbed: dict[str, int] = field(default_factory=dict)
    decontamination: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what report.json holds: everything but the place, so equal input gives equal bytes."""
        content = asdict(self)
        del content["out"]
        return content


@dataclass(frozen=True)
class Decisions:
    """Say of each document that its piece kept, numbered through, which earlier one it repeats or itself.

    ``exact`` and ``alike`` are int64 [kept]: the first one with the same words, and the first of its cluster
    of near-duplicates.
    """

    exact: np.ndarray
    alike: np.ndarray

    def reason(self, number: int) -> str | None:
        """Return why a document is dropped, or None."""
        if self.exact[number] != number:
            return "duplicate"
        return None if self.alike[number] == number else "near_duplicate"


def decide(pieces: Path, num_pieces: int, near_duplicates: bool) -> Decisions:
    """Find exact copies, and near-duplicates where wanted; the first in source order stays."""
    digests, bands = [], []
    for number in range(num_pieces):
        piece = read_piece(piece_path(pieces, number), with_content=False)
        digests.append(piece.digests)
        bands.append(piece.bands)
    if not digests:
        return Decisions(np.empty(0, np.int64), np.empty(0, np.int64))
    exact = first_equals(np.concatenate(digests))
    return Decisions(exact, first_alike(bands, exact) if near_duplicates else exact)


class CorpusWriter:
    """Write the documents that stay into ``train`` and ``heldout``, and say of the others why they do not."""

    def __init__(self, directory: Path, settings: CorpusSettings, report: PrepareReport) -> None:
        """Start writing into ``directory``; ``report`` is counted into."""
        self._directory = directory
        self._heldout_fraction = settings.heldout_fraction
        self._report = report
        self._dropped: Counter[str] = Counter()
        self._scrubbed: Counter[str] = Counter()
        self._writers = {
            name: open_writer(
                directory / name,
                tokenizer=settings.tokenizer,
                shard_bytes=settings.shard_bytes,
                chunk_bytes=settings.chunk_bytes,
            )
            for name in (TRAIN_NAME, HELDOUT_NAME)
        }

    def write_pieces(
        self, pieces: Path, num_pieces: int, decisions: Decisions, tell: Callable[[], None]
    ) -> None:
        """Write all pieces in order, calling ``tell`` after each."""
        copied = np.zeros(len(decisions.alike), bool)
        copied[decisions.alike[decisions.alike != np.arange(len(copied))]] = True
        origins: dict[int, str] = {}  # of documents that others are copies of, which all come later
        start = 0
        with _gzip_lines(self._directory / DROPPED_NAME) as log:
            for piece_number in range(num_pieces):
                piece = read_piece(piece_path(pieces, piece_number), with_content=True)
                place = 0
                for origin, source, reason in zip(piece.origins, piece.sources, piece.reasons, strict=True):
                    if reason is not None:
                        self._drop(origin, source, reason, None, log)
                        continue
                    number = start + place
                    found = decisions.reason(number)
                    if copied[number]:
                        origins[number] = origin
                    if found is None:
                        self._keep(piece, place, source)
                    else:
                        self._drop(origin, source, found, origins[int(decisions.alike[number])], log)
                    place += 1
                start += place
                tell()

    def finish(self) -> None:
        """Finish shards and report. Raises DataConfigError where nothing is left to train on."""
        report = self._report
        report.dropped = dict(sorted(self._dropped.items()))
        report.dropped_examples = dict(sorted(report.dropped_examples.items()))
        report.scrubbed = dict(sorted(self._scrubbed.items()))
        if not report.train_documents:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in report.dropped.items()) or "none"
            raise DataConfigError(
                f"no document is left to train on: {report.documents_read} read, {report.heldout_documents} held "
                f"out, dropped {reasons}; give more text, lower min_chars or heldout_fraction, use fewer rules, or "
                "name the right text_field"
            )
        train, heldout = (self._writers[name].finish() for name in (TRAIN_NAME, HELDOUT_NAME))
        report.train_tokens, report.heldout_tokens = train.get("tokens"), heldout.get("tokens")
        report.train_fingerprint, report.heldout_fingerprint = train["fingerprint"], heldout["fingerprint"]
        content = json.dumps(report.to_json(), indent=2) + "\n"
        write_atomic(self._directory / REPORT_NAME, content.encode())

    def _count_source(self, source: str) -> dict[str, int]:
        self._report.documents_read += 1
        none = {"documents_read": 0, "documents_kept": 0, "bytes_kept": 0}
        counts = self._report.sources.setdefault(source, none)
        counts["documents_read"] += 1
        return counts

    def _drop(self, origin: str, source: str, reason: str, kept: str | None, log: IO[bytes]) -> None:
        self._count_source(source)
        self._dropped[reason] += 1
        examples = self._report.dropped_examples.setdefault(reason, [])
        if len(examples) < EXAMPLES_PER_REASON:
            examples.append(origin)
        record = {"origin": origin, "reason": reason} | ({} if kept is None else {"kept": kept})
        log.write((json.dumps(record) + "\n").encode())

    def _keep(self, piece: Piece, place: int, source: str) -> None:
        report, size = self._report, int(piece.sizes[place])
        heldout = is_heldout(piece.digests[place].tobytes(), self._heldout_fraction)
        writer = self._writers[HELDOUT_NAME if heldout else TRAIN_NAME]
        if piece.tokens:
            writer.write_tokens(piece.tokens[place], size)
        else:
            writer.write_text(piece.texts[place])
        counts = self._count_source(source)
        counts["documents_kept"] += 1
        counts["bytes_kept"] += size
        self._scrubbed.update(piece.scrubbed[place])
        report.documents_kept += 1
        if heldout:
            report.heldout_documents += 1
            report.heldout_bytes += size
        else:
            report.train_documents += 1
            report.train_bytes += size


def open_writer(directory: Path, *, tokenizer: Path | None, shard_bytes: int, chunk_bytes: int) -> ShardWriter:
    """Start writing shards into a new directory: of token blocks with a tokenizer, of text without one."""
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    return ShardWriter(
        directory,
        shard_bytes=shard_bytes,
        chunk_bytes=chunk_bytes,
        vocab_size=loaded.vocab_size if loaded else None,
        tokenizer_sha256=loaded.sha256 if loaded else None,
    )


@contextmanager
def _gzip_lines(path: Path) -> Iterator[IO[bytes]]:
    """Open a .gz file to write; neither its name nor the time gets into the bytes."""
    with open(path, "wb") as stream:
        with gzip.GzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=stream, mtime=0) as lines:
            yield cast(IO[bytes], lines)
        stream.flush()
        os.fsync(stream.fileno())
