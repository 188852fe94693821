"""How a global batch is divided over lanes and readers. Imports nothing heavy."""

from __future__ import annotations

import math

from .errors import DataConfigError

USUAL_LANES = 256
MAX_LANES = 1 << 16


def num_lanes(*global_batches: int) -> int:
    """Return the largest number up to ``USUAL_LANES`` that divides every global batch (in sequences) of a run.

    Open chunks and the reads before the first batch grow with the lanes, so there is an upper bound.
    """
    if min(global_batches) < 1:
        raise DataConfigError(f"global batch is {min(global_batches)}; it must be at least 1 sequence")
    common = math.gcd(*global_batches)
    return next(lanes for lanes in range(min(common, USUAL_LANES), 0, -1) if common % lanes == 0)


def samples_per_reader(global_batch: int, num_readers: int, lanes: int | None = None) -> int:
    """Return how many samples, filler included, every reader delivers for a global batch."""
    if num_readers < 1:
        raise DataConfigError(f"number of readers is {num_readers}; it must be at least 1")
    lanes = num_lanes(global_batch) if lanes is None else lanes
    if global_batch % lanes:
        raise DataConfigError(
            f"global batch is {global_batch}; it must be a multiple of the run's {lanes} lanes"
        )
    return -(-lanes // num_readers) * (global_batch // lanes)
