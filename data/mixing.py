"""Decide which source each sample comes from: a function of the seed and the sample's number alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .errors import DataConfigError
from .order import hash_integers

SOURCE_DRAW = 2  # sets the keys of these draws apart from those of orders (see lanes.py)


@dataclass(frozen=True)
class SourceSettings:
    """Name a source and its shard directories, and how much of the mix it gets. JSON-able.

    ``epochs`` asks for that many passes in proportion to the other sources; without ``weight`` and ``epochs``
    the size decides.
    """

    name: str
    places: tuple[str, ...]
    weight: float | None = None
    epochs: float | None = None


@dataclass(frozen=True)
class MixPhase:
    """From ``first_sample`` on, samples are drawn with ``weights``, one for each source. JSON-able."""

    first_sample: int
    weights: tuple[float, ...]


class Mix:
    """Draw the source of a sample."""

    def __init__(self, phases: Sequence[MixPhase], seed: int) -> None:
        """Take phases in the order of their first samples; the first one begins at 0."""
        assert phases and phases[0].first_sample == 0
        self._seed = seed
        self._firsts = [phase.first_sample for phase in phases]
        # in parts of the largest, so that no sum overflows
        self._bounds = [
            tuple(accumulate(weight / max(phase.weights) for weight in phase.weights)) for phase in phases
        ]
        self._num_sources = len(phases[0].weights)

    def source_of(self, sample: int) -> int:
        """Return the number of the source that global sample ``sample`` comes from."""
        if self._num_sources == 1:
            return 0
        bounds = self._bounds[bisect_right(self._firsts, sample) - 1]
        drawn = hash_integers(self._seed, SOURCE_DRAW, sample) * 2.0**-64 * bounds[-1]
        # rounding may reach the very end; a source of weight 0 has no width and is never met
        return min(bisect_right(bounds, drawn), bounds.index(bounds[-1]))


def mix_weights(
    sources: Sequence[SourceSettings], sizes: Sequence[int], temperature: float | None
) -> tuple[float, ...]:
    """Return a weight for each source: given, or by its epochs times its size, or by size ** (1 / temperature).

    ``sizes`` are all in one unit. Mixing by temperature: Devlin et al. 2019 (multilingual BERT), Arivazhagan et
    al. 2019, section 4.
    """
    if sources[0].weight is not None:
        return tuple(float(source.weight or 0.0) for source in sources)
    if sources[0].epochs is not None:
        return tuple(float(source.epochs or 0.0) * size for source, size in zip(sources, sizes, strict=True))
    # in parts of the largest: no power of them overflows
    return tuple((size / max(sizes)) ** (1.0 / (temperature or 1.0)) for size in sizes)


def comparable_sizes(
    tokens: Sequence[int | None], text_bytes: Sequence[int | None], names: Sequence[str]
) -> list[int]:
    """Return the sizes of sources in the unit that all of them know: tokens, else bytes of text.

    Raises DataConfigError where there is none.
    """
    for sizes in (tokens, text_bytes):
        known = [size for size in sizes if size]
        if len(known) == len(names):
            return known
    raise DataConfigError(
        f"the sizes of {', '.join(names)} cannot be compared: some are known in tokens and some in bytes of text; "
        "give each source a weight"
    )
