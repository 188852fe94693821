"""Decide the order of everything by hashing, so that any position is reached without replaying.

The hash is the finaliser of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators"); the permutation is a balanced Feistel network with cycle walking (Black, Rogaway 2002,
"Ciphers with arbitrary finite domains"). Both are pinned by golden tests: a change here would silently
reorder every run that is resumed.
"""

from __future__ import annotations

import numpy as np

MASK_64 = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
NUM_ROUNDS = 6


def splitmix64(value: int) -> int:
    """Hash one 64-bit integer to another."""
    value = (value + GOLDEN_GAMMA) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


def hash_integers(*values: int) -> int:
    """Hash a sequence of integers (each taken modulo 2**64) to 64 bits; their order matters."""
    result = 0
    for value in values:
        result = splitmix64(result ^ (value & MASK_64))
    return result


def permute_index(index: int, size: int, key: int) -> int:
    """Return the place of ``index`` in the permutation of ``range(size)`` that ``key`` selects.

    Needs memory and time independent of ``size``: the network's domain is at most four times ``size``,
    and an image outside ``range(size)`` is permuted again until it falls inside.
    """
    assert 0 <= index < size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_number in range(NUM_ROUNDS):
            left, right = right, left ^ (hash_integers(key, round_number, right) & half_mask)
        index = (left << half_bits) | right
        if index < size:
            return index


def permute_all(size: int, key: int) -> np.ndarray:
    """Return a whole permutation of ``range(size)`` selected by ``key``, int64 [size].

    Sorts hashes of the indices: quicker than ``permute_index`` where every place is wanted.
    """
    with np.errstate(over="ignore"):
        value = np.arange(size, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA) + np.uint64(key & MASK_64)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value ^= value >> np.uint64(31)
    return np.argsort(value, kind="stable").astype(np.int64)
