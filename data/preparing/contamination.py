"""Find documents that share a run of words with test files.

Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C: words in lower case without
punctuation, runs of 13 of them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from ..cleaning import clean_document
from ..errors import DataConfigError
from ..sources import read_documents
from ..storage import write_atomic
from .ngrams import find_words, hash_ngrams
from .web import extract_text


def write_test_ngrams(files: Sequence[Path], n: int, text_field: str, out: Path) -> dict[str, int]:
    """Write the sorted hashes of all n-grams of test files, uint64 [n-grams], as a .npy file; return counts.

    Documents of fewer than ``n`` words give no n-gram, and are counted. Raises DataConfigError where a test
    document cannot be read, or a file holds no text: what it says would stay in the training part unnoticed.
    """
    counts = {"test_documents": 0, "test_documents_too_short": 0}
    hashes = [np.empty(0, np.uint64)]
    unreadable, empty = [], []
    for file in files:
        num_texts = 0
        for raw in read_documents(file, text_field):
            counts["test_documents"] += 1
            raw = extract_text(raw)
            document = raw.reason or clean_document(raw.content, 0)
            if isinstance(document, str):
                unreadable += [] if document == "empty" else [f"{raw.origin} ({document})"]
                words = []
            else:
                words = find_words(document.text)
                num_texts += 1
            hashes.append(hash_ngrams(words, n))
            counts["test_documents_too_short"] += len(words) < n
        if not num_texts:
            empty.append(str(file))
    if unreadable:
        raise DataConfigError(
            f"{len(unreadable)} documents of the test files cannot be read, the first is {unreadable[0]}; give their "
            f"text in the field {text_field!r}, one document a line, or as text files"
        )
    if empty:
        raise DataConfigError(
            f"test files without any text: {', '.join(empty)}; nothing can be compared with them, give files that hold "
            "the test's text"
        )
    ngrams = np.unique(np.concatenate(hashes))
    content = io.BytesIO()
    np.save(content, ngrams, allow_pickle=False)
    write_atomic(out, content.getvalue())
    return counts | {"test_ngrams": len(ngrams)}


def is_contaminated(words: list[str], n: int, test_ngrams: Path) -> bool:
    """Tell whether a document's words hold one of the n-grams that ``write_test_ngrams`` wrote."""
    known = _open_ngrams(test_ngrams)
    found = hash_ngrams(words, n)
    if not len(known) or not len(found):
        return False
    places = np.searchsorted(known, found)
    return bool((known[np.minimum(places, len(known) - 1)] == found).any())


@cache
def _open_ngrams(path: Path) -> np.ndarray:
    """Map the file, so that all processes share one copy in memory."""
    return np.load(path, mmap_mode="r", allow_pickle=False)
