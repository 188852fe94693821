"""Replace spans by sentinels and predict them: span corruption (Raffel et al. 2020, "T5", section 3.1.4 and 3.3.4).

15 % of the tokens go, in spans of 3 on average. A text begins with a span that stays and ends with one that goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import DataConfigError
from .sample_random import SampleRandom


@dataclass(frozen=True)
class SpanRates:
    """Say which share of the tokens is noise, and how long a span of it is on average."""

    noise: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        """Raise DataConfigError for impossible rates."""
        if not (0 < self.noise < 1 and 1 <= self.mean_span < math.inf):
            raise DataConfigError(
                f"span rates are noise {self.noise} and mean span {self.mean_span}; the first lies between 0 and 1, "
                "the second is at least 1, and finite"
            )


@dataclass(frozen=True)
class Sentinels:
    """Hold the ids that stand for spans: ``first`` for the first span, then downwards, ``count`` of them."""

    first: int
    count: int

    def __post_init__(self) -> None:
        """Raise DataConfigError for ids below 0."""
        if self.count < 1 or self.first - self.count + 1 < 0:
            raise DataConfigError(
                f"{self.count} sentinels cannot go down from id {self.first}; give the largest of their ids"
            )


@dataclass(frozen=True)
class SpanSample:
    """Hold what an encoder-decoder is trained on: ``inputs`` and ``targets``, int32, each with its eos."""

    inputs: np.ndarray
    targets: np.ndarray


def count_spans(num_tokens: int, rates: SpanRates) -> tuple[int, int]:
    """Return how many tokens of a text are noise, and in how many spans."""
    num_noise = min(max(round(num_tokens * rates.noise), 1), num_tokens - 1)
    num_spans = max(round(num_noise / rates.mean_span), 1)
    return num_noise, min(num_spans, num_tokens - num_noise)


def corrupted_lengths(num_tokens: int, rates: SpanRates) -> tuple[int, int]:
    """Return the lengths of inputs and targets, eos and sentinels counted, for a text of ``num_tokens``."""
    num_noise, num_spans = count_spans(num_tokens, rates)
    return num_tokens - num_noise + num_spans + 1, num_noise + num_spans + 1


def raw_length(inputs_length: int, rates: SpanRates) -> tuple[int, int]:
    """Return ``(num_tokens, targets_length)``: the longest text whose inputs have at most ``inputs_length`` tokens.

    For inputs of 512 at the published rates these are 568 and 114.

    Raises DataConfigError where no text fits.
    """
    if inputs_length < corrupted_lengths(2, rates)[0]:
        raise DataConfigError(f"inputs of {inputs_length} tokens hold no text; at least 3 are needed")
    num_tokens = 2
    while corrupted_lengths(num_tokens + 1, rates)[0] <= inputs_length:
        num_tokens += 1
    return num_tokens, corrupted_lengths(num_tokens, rates)[1]


def corrupt_spans(
    tokens: np.ndarray, sentinels: Sentinels, eos: int, random: SampleRandom, rates: SpanRates | None = None
) -> SpanSample:
    """Move spans of a text, int [num_tokens >= 2] with no specials, from the inputs to the targets.

    Inputs: what stays, each span that went being one sentinel. Targets: each sentinel, then its span. Lengths
    are those of ``corrupted_lengths``: they depend on ``num_tokens`` alone, so no batch needs padding.

    Raises DataConfigError where there are fewer sentinels than spans.
    """
    rates = rates or SpanRates()
    assert len(tokens) >= 2
    num_noise, num_spans = count_spans(len(tokens), rates)
    if num_spans > sentinels.count:
        raise DataConfigError(
            f"{len(tokens)} tokens have {num_spans} spans, the tokenizer {sentinels.count} sentinels; "
            "train it with more, or take shorter inputs"
        )
    kept_lengths = _cut(len(tokens) - num_noise, num_spans, random)
    noise_lengths = _cut(num_noise, num_spans, random)
    borders = np.cumsum(np.stack([kept_lengths, noise_lengths], axis=1).ravel())[:-1]
    parts = np.split(tokens.astype(np.int32), borders)
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for number in range(num_spans):
        sentinel = np.array([sentinels.first - number], np.int32)
        inputs += [parts[2 * number], sentinel]
        targets += [sentinel, parts[2 * number + 1]]
    end = np.array([eos], np.int32)
    return SpanSample(np.concatenate([*inputs, end]), np.concatenate([*targets, end]))


def _cut(num_items: int, num_parts: int, random: SampleRandom) -> np.ndarray:
    """Return the lengths of a random cut into parts that are not empty; every cut is equally likely."""
    borders = np.sort(random.permutation(num_items - 1)[: num_parts - 1]) + 1
    return np.diff(borders, prepend=0, append=num_items)
