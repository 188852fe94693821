"""Take one raw document through extraction, cleaning, rules and filters to what will be written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from ..cleaning import CleanDocument, clean_document, decode_text, document_digest, is_heldout
from ..sources import RawDocument
from ..tokenizer import Tokenizer
from .contamination import is_contaminated
from .hooks import call_filter
from .near_duplicates import hash_bands
from .ngrams import find_words
from .rules import apply_rules
from .scrub import scrub
from .settings import CorpusSettings
from .web import extract_text

NOT_TOKENISED = "not_tokenised"


@dataclass(frozen=True)
class Outcome:
    """Hold what became of a document: the reason it is dropped for, or its text with what was computed of it.

    ``tokens`` and ``bands`` (see ``hash_bands``) are there where the settings want them.
    """

    origin: str
    source: str
    reason: str | None = None
    document: CleanDocument | None = None
    tokens: np.ndarray | None = None
    bands: np.ndarray | None = None
    scrubbed: Counter[str] = field(default_factory=Counter)


def process_document(raw: RawDocument, settings: CorpusSettings, test_ngrams: Path | None) -> Outcome:
    """Extract, clean and judge one document; ``test_ngrams`` is the file to decontaminate with.

    Order: extraction, ``fix_text``, cleaning, rules, filters, scrubbing, contamination. With the test files a
    document is compared both as it will be written and as it was before ``fix_text``, rules and scrubbing: each
    may hide what a test file holds. Held-out documents are not compared: nothing is trained on them.
    """
    raw = extract_text(raw, settings.keep_html)
    cleaned = raw.reason or _clean(raw.content, settings)
    if isinstance(cleaned, str):
        return Outcome(raw.origin, raw.source, cleaned)
    text, reason = apply_rules(cleaned.text, settings.rules)
    for name in () if reason else settings.filters:
        reason = reason or call_filter(name, text, raw.origin)
    if reason:
        return Outcome(raw.origin, raw.source, reason)
    scrubbed: Counter[str] = Counter()
    if settings.scrub:
        text, scrubbed = scrub(text)
    document = cleaned if text is cleaned.text else CleanDocument(text, document_digest(text.split()))
    words = find_words(text) if settings.near_duplicates or test_ngrams else []
    if (
        test_ngrams
        and not is_heldout(document.digest, settings.heldout_fraction)
        and (
            is_contaminated(words, settings.ngram, test_ngrams)
            or any(
                is_contaminated(find_words(version), settings.ngram, test_ngrams)
                for version in _versions_before(raw, cleaned, settings)
                if version != text
            )
        )
    ):
        return Outcome(raw.origin, raw.source, "contaminated")
    tokens = encode_document(load_tokenizer(settings.tokenizer), text) if settings.tokenizer else None
    if settings.tokenizer and tokens is None:
        return Outcome(raw.origin, raw.source, NOT_TOKENISED)
    return Outcome(
        raw.origin,
        raw.source,
        document=document,
        tokens=tokens,
        bands=hash_bands(words, document.digest) if settings.near_duplicates else None,
        scrubbed=scrubbed,
    )


def encode_document(tokenizer: Tokenizer, text: str) -> np.ndarray | None:
    """Return a document's tokens with bos and eos, int32 [num_tokens + 2]; None where its tokenizer fails on it."""
    try:
        return tokenizer.encode_document(text)
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise  # not of the text
    except BaseException:  # a panic of a library in Rust is no Exception
        return None


@cache
def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer once in each process."""
    return Tokenizer(path)


def _versions_before(raw: RawDocument, cleaned: CleanDocument, settings: CorpusSettings) -> Iterator[str]:
    """Give a document as it was before rules and scrubbing, and before ``fix_text``; line ends and such are clean."""
    yield cleaned.text
    as_read = clean_document(raw.content, 0) if settings.fix_text else cleaned
    if isinstance(as_read, CleanDocument):
        yield as_read.text


def _clean(content: bytes | str, settings: CorpusSettings) -> CleanDocument | str:
    if settings.fix_text:
        import ftfy  # a package of the extra `clean`

        text = decode_text(content)
        if text is None:
            return "not_utf8"
        if "\0" not in text:  # a NUL tells a binary file, and ftfy would take it out
            # Curled quotes are no damage; they stay as the author set them
            content = ftfy.fix_text(text, uncurl_quotes=False)
    return clean_document(content, settings.min_chars)
