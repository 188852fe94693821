"""Decide what of a raw document is kept, and say why where nothing is."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

# C0 and C1 control characters but tab, newline and U+001F, which divides the two texts of a pair (passages.py), and
# the non-characters of the basic plane
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1e\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")
LINE_ENDS = re.compile("\r\n?")
BYTE_ORDER_MARK = "\ufeff"
DIGEST_BYTES = 16


@dataclass(frozen=True)
class CleanDocument:
    """Hold a document that was kept: its text, and a digest that copies of it share."""

    text: str
    digest: bytes


def clean_document(content: bytes | str, min_chars: int) -> CleanDocument | str:
    """Return a cleaned document, or the reason why it is dropped.

    Line ends become newlines and control characters go; letters are left as they are (no Unicode
    normalisation). Reasons: ``not_utf8``, ``binary`` (it holds a NUL), ``empty``, ``too_short``.
    """
    text = decode_text(content)
    if text is None:
        return "not_utf8"
    if "\0" in text:
        return "binary"
    text = CONTROL_CHARACTERS.sub("", LINE_ENDS.sub("\n", text.removeprefix(BYTE_ORDER_MARK)))
    words = text.split()
    if not words:
        return "empty"
    if len(text) < min_chars:
        return "too_short"
    return CleanDocument(text, document_digest(words))


def decode_text(content: bytes | str) -> str | None:
    """Return a raw document's text, or None where it is not UTF-8 or could not be written as UTF-8."""
    try:
        if isinstance(content, bytes):
            return content.decode("utf-8")
        content.encode("utf-8")
    except UnicodeError:
        return None
    return content


def document_digest(words: list[str]) -> bytes:
    """Hash a document by its words, so that copies that differ in blanks and line ends count as one."""
    return hashlib.blake2b(" ".join(words).encode(), digest_size=DIGEST_BYTES).digest()


def is_heldout(digest: bytes, fraction: float) -> bool:
    """Choose held-out documents by their content alone: the choice depends on neither order nor workers."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
