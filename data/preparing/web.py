"""Read web archives, and take the text out of HTML pages."""

from __future__ import annotations

import codecs
import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from ..errors import DataConfigError
from ..sources import RawDocument
from .settings import missing_package

HTML_TYPES = ("text/html", "application/xhtml+xml")
RECORD_END = b"\r\n\r\n"  # ISO 28500, section 4: two line ends close every record
CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.I)


def read_web_archive(file: Path, stream: IO[bytes]) -> Iterator[RawDocument]:
    """Yield the pages of a WARC file, and the texts of a WET file; records are counted from 1.

    ``stream`` gives the decompressed bytes. Records that are no documents (requests, metadata) are passed
    over. Reasons: ``http_status`` for a response other than 2xx, ``not_html`` for pictures and the like,
    ``damaged_record``, and ``damaged_file`` where the archive ends within a record or is none.
    Raises DataConfigError without warcio.
    """
    try:
        from warcio.archiveiterator import WARCIterator
    except ImportError as error:
        raise DataConfigError(missing_package(str(file), "warcio", "web")) from error
    watched = _WatchedStream(stream)
    records = iter(WARCIterator(watched))
    number, damaged = 0, False
    while not damaged:
        try:
            record = next(records, None)
            if record is None:
                break
            number += 1
            document = _record_document(record, f"{file}:{number}")
            damaged = record.raw_stream.limit > 0  # the archive ends within this record
        except (EOFError, OSError, zlib.error):
            raise  # of the storage or the compression around
        except Exception:  # damaged headers raise of all kinds
            damaged = True
        else:
            if document is not None and not damaged:
                yield document
    if damaged or not number or watched.last != RECORD_END:
        yield RawDocument(str(file), b"", "damaged_file")


def extract_text(page: RawDocument, keep_html: bool = False) -> RawDocument:
    """Return a page's main text in place of its HTML; other documents, and pages to keep, as they are.

    Reasons: ``no_main_text`` where nothing is left, ``bad_html`` where the page cannot be parsed.
    Raises DataConfigError without trafilatura.
    """
    if not page.html or page.reason or keep_html:
        return page
    try:
        from trafilatura import extract
    except ImportError as error:
        raise DataConfigError(
            f"{missing_package(page.origin, 'trafilatura', 'web')}, or keep the markup: --keep-html"
        ) from error
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # each empty page would be a line
    try:
        text = extract(page.content, include_comments=False, favor_precision=True)
    except Exception:  # parsers raise of all kinds on pages from the web
        return replace(page, content=b"", reason="bad_html")
    if not text or not text.strip():
        return replace(page, content=b"", reason="no_main_text")
    return replace(page, content=text, html=False)


class _WatchedStream:
    """Remember the last bytes read: the reader takes a cut header for the end of the archive."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(size)
        self.last = (self.last + content[-len(RECORD_END) :])[-len(RECORD_END) :]
        return content


def _record_document(record: Any, origin: str) -> RawDocument | None:
    """Read a record to its end; None where it is no document."""
    if record.rec_type not in ("response", "conversion"):
        _drained(record, origin, "")
        return None
    headers = record.http_headers
    if headers is None:
        kind = record.rec_headers.get_header("Content-Type") or ""
    else:
        kind = headers.get_header("Content-Type") or ""
        if not headers.get_statuscode().startswith("2"):
            return _drained(record, origin, "http_status")
    is_html = kind.lower().startswith(HTML_TYPES)
    if not is_html and not kind.lower().startswith("text/plain"):
        return _drained(record, origin, "not_html")
    try:
        content = record.content_stream().read()
    except Exception:  # what is wrong in a compressed or chunked body has no common class
        return _drained(record, origin, "damaged_record")
    return RawDocument(origin, _decoded(content, kind), html=is_html)


def _drained(record: Any, origin: str, reason: str) -> RawDocument:
    """Read a record to its end, so that a cut one is noticed."""
    while record.raw_stream.read(1 << 20):
        pass
    return RawDocument(origin, b"", reason)


def _decoded(content: bytes, kind: str) -> bytes | str:
    """Decode by the charset that the server named; without one leave it to the reader."""
    charset = CHARSET.search(kind)
    try:
        return codecs.decode(content, charset[1], "replace") if charset else content
    except (LookupError, TypeError, ValueError):
        return content
