"""Draw a sample's random numbers from its number alone, so that no generator's state has to be saved.

The source is Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the seed and the
global sample id as its key: no two samples share a stream. Only raw bits are taken from numpy, whose higher
methods may change between versions (NEP 19); what is made of the bits here is pinned by golden tests.
"""

from __future__ import annotations

from operator import index

import numpy as np

from ..order import MASK_64


class SampleRandom:
    """Generate the random numbers of one sample: the same for the same ``(seed, sample_id)``, everywhere."""

    def __init__(self, seed: int, sample_id: int) -> None:
        """Begin the stream of a sample; both numbers, integers of any type, are taken modulo 2**64."""
        key = np.array([index(seed) & MASK_64, index(sample_id) & MASK_64], np.uint64)
        self._bits = np.random.Philox(key=key, counter=0)

    def uniforms(self, count: int) -> np.ndarray:
        """Return numbers that are uniform in [0, 1), float64 [count]."""
        return (self._raw(count) >> np.uint64(11)) * 2.0**-53

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return one number that is uniform in [low, high)."""
        return low + (high - low) * float(self.uniforms(1)[0])

    def integers(self, bound: int, count: int) -> np.ndarray:
        """Return integers that are uniform in [0, bound), int64 [count]; ``bound`` is at most 2**32."""
        assert 0 < bound <= 1 << 32
        return (self.uniforms(count) * bound).astype(np.int64)

    def integer(self, bound: int) -> int:
        """Return one integer that is uniform in [0, bound)."""
        return int(self.integers(bound, 1)[0])

    def permutation(self, size: int) -> np.ndarray:
        """Return a permutation of ``range(size)``, int64 [size]."""
        return np.argsort(self._raw(size), kind="stable")

    def _raw(self, count: int) -> np.ndarray:
        return self._bits.random_raw(count)
