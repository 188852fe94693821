"""Find documents that are nearly the same, by MinHash over runs of words.

Broder 1997, "On the resemblance and containment of documents", with banding (Leskovec, Rajaraman, Ullman,
"Mining of Massive Datasets", section 3.4). The numbers are FineWeb's (Penedo et al. 2024): 5 words to a
shingle and 14 bands of 8 rows. Two documents whose shingle sets have Jaccard similarity s agree in some band
with probability 1 - (1 - s**8)**14: 0.22 at 0.6, 0.56 at 0.7, 0.92 at 0.8, 0.9996 at 0.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from ..order import hash_integers
from .ngrams import hash_ngrams, mix

SHINGLE_WORDS = 5
NUM_BANDS, BAND_ROWS = 14, 8
NUM_HASHES = NUM_BANDS * BAND_ROWS
SEED = 0x6D696E68617368
BLOCK_SHINGLES = 1024  # keeps the products of one block in the cache


def hash_bands(words: list[str], digest: bytes) -> np.ndarray:
    """Return a document's band hashes, uint64 [NUM_BANDS]; near-duplicates share at least one, most likely.

    A document shorter than a shingle is one shingle; one without words is like its exact copies alone, which
    ``digest`` tells.
    """
    if not words:
        return mix(np.arange(NUM_BANDS, dtype=np.uint64) ^ np.frombuffer(digest[:8], "<u8"))
    shingles = hash_ngrams(words, min(SHINGLE_WORDS, len(words)))
    values = (np.unique(shingles) >> np.uint64(32)).astype(np.uint32)
    multipliers, offsets, rows = _hash_parameters()
    smallest = np.full(NUM_HASHES, np.iinfo(np.uint32).max, np.uint32)
    with np.errstate(over="ignore"):
        for start in range(0, len(values), BLOCK_SHINGLES):
            products = multipliers * values[start : start + BLOCK_SHINGLES]
            products += offsets
            np.minimum(smallest, products.min(axis=1), out=smallest)
        bands = (smallest.reshape(NUM_BANDS, BAND_ROWS).astype(np.uint64) * rows).sum(axis=1, dtype=np.uint64)
        return mix(bands)


def first_equals(digests: np.ndarray) -> np.ndarray:
    """Return for each document the first one with the same digest; ``digests`` is uint64 [documents, 2]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]  # lexsort is stable: a group begins with its first
    return first


def first_alike(bands: Sequence[np.ndarray], first: np.ndarray) -> np.ndarray:
    """Return for each document the first of its cluster, int64 [documents].

    ``bands`` holds uint64 [some documents, NUM_BANDS] for all documents in order; ``first`` says which are
    exact copies, which follow the one they copy. A cluster is what a chain of shared bands joins.
    """
    parents = first.copy()
    distinct = np.flatnonzero(first == np.arange(len(first)))

    def root_of(index: int) -> int:
        root = index
        while parents[root] != root:
            root = int(parents[root])
        while parents[index] != root:
            parents[index], index = root, int(parents[index])
        return root

    for band in range(bands[0].shape[1]):
        column = np.concatenate([part[:, band] for part in bands])[distinct]
        order = np.argsort(column, kind="stable")
        shared = np.flatnonzero(column[order][1:] == column[order][:-1])
        for left, right in zip(distinct[order[shared]], distinct[order[shared + 1]], strict=True):
            one, other = root_of(int(left)), root_of(int(right))
            parents[max(one, other)] = min(one, other)
    while (parents != parents[parents]).any():
        parents = parents[parents]
    return parents


@cache
def _hash_parameters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return multipliers and offsets, uint32 [NUM_HASHES, 1], and row multipliers, uint64 [BAND_ROWS].

    The multipliers are odd, so that each function permutes the 32-bit numbers.
    """
    multipliers = [hash_integers(SEED, 0, number) >> 32 | 1 for number in range(NUM_HASHES)]
    offsets = [hash_integers(SEED, 1, number) >> 32 for number in range(NUM_HASHES)]
    rows = [hash_integers(SEED, 2, number) | 1 for number in range(BAND_ROWS)]
    as_column = [np.array(values, np.uint32)[:, None] for values in (multipliers, offsets)]
    return as_column[0], as_column[1], np.array(rows, np.uint64)
