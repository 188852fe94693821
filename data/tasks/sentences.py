"""Lay out pairs of sentences for next-sentence prediction, as for BERT (Devlin et al. 2019, appendix A.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataConfigError
from .sample_random import SampleRandom

Document = Sequence[np.ndarray]  # its sentences, each int [num_tokens], none empty


@dataclass(frozen=True)
class EncoderSpecials:
    """Hold the ids that frame an encoder's sequences."""

    cls: int
    sep: int
    pad: int


@dataclass(frozen=True)
class SentencePair:
    """Hold two runs of tokens, int32; ``is_next`` tells whether the second followed the first."""

    first: np.ndarray
    second: np.ndarray
    is_next: bool


@dataclass(frozen=True)
class EncoderRow:
    """Hold a framed sequence: ``tokens`` and ``segments`` int32 [length], padded; ``num_tokens`` without padding."""

    tokens: np.ndarray
    segments: np.ndarray
    num_tokens: int


def sentence_pairs(
    document: Document,
    others: Sequence[Document],
    random: SampleRandom,
    *,
    max_tokens: int,
    short_fraction: float = 0.1,
) -> list[SentencePair]:
    """Make all pairs of a document; together a pair has at most ``max_tokens`` tokens, specials not counted.

    Sentences are gathered up to a target length, which in ``short_fraction`` of the pairs is drawn from 2 to
    ``max_tokens``. A random number of them are the first part; with probability 1/2 the rest is the second, else it
    comes from one of ``others`` and the rest begins the next pair. A single sentence has no rest: its second part
    always comes from elsewhere.

    Raises DataConfigError where there are no other documents, or no room for a pair.
    """
    others = [other for other in others if len(other)]
    if not others:
        raise DataConfigError("sentence pairs need a second document; use larger chunks, or full sentences")
    if max_tokens < 2:
        raise DataConfigError(f"a pair has room for {max_tokens} tokens; at least 2 are needed")
    pairs = []
    start = 0
    while start < len(document):
        target = max_tokens
        if random.uniform() < short_fraction:
            target = 2 + random.integer(max_tokens - 1)
        end = _fill(document, start, target)
        num_sentences = end - start
        cut = start + (1 + random.integer(num_sentences - 1) if num_sentences > 1 else 1)
        is_next = num_sentences > 1 and random.uniform() < 0.5
        first = np.concatenate(document[start:cut])
        if is_next:
            second = np.concatenate(document[cut:end])
            start = end
        else:
            other = others[random.integer(len(others))]
            begin = random.integer(len(other))
            room = max(1, target - len(first))
            second = np.concatenate(other[begin : _fill(other, begin, room)])
            start = cut  # the sentences that were not used begin the next pair
        first, second = _truncate_pair(first, second, max_tokens, random)
        pairs.append(SentencePair(first.astype(np.int32), second.astype(np.int32), is_next))
    return pairs


def frame_pair(pair: SentencePair, length: int, specials: EncoderSpecials) -> EncoderRow:
    """Write [CLS] first [SEP] second [SEP] and padding; segment 0 up to the first [SEP] and in padding, then 1."""
    num_tokens = len(pair.first) + len(pair.second) + 3
    assert num_tokens <= length
    tokens = np.full(length, specials.pad, np.int32)
    tokens[:num_tokens] = [specials.cls, *pair.first, specials.sep, *pair.second, specials.sep]
    segments = np.zeros(length, np.int32)
    segments[len(pair.first) + 2 : num_tokens] = 1
    return EncoderRow(tokens, segments, num_tokens)


def _fill(document: Document, start: int, target: int) -> int:
    """Return the end of the sentences from ``start`` that reach ``target`` tokens, or of the document."""
    end, found = start, 0
    while end < len(document) and found < target:
        found += len(document[end])
        end += 1
    return end


def _truncate_pair(
    first: np.ndarray, second: np.ndarray, max_tokens: int, random: SampleRandom
) -> tuple[np.ndarray, np.ndarray]:
    """Take tokens from the longer part, each from its front or back at random, until both fit."""
    excess = len(first) + len(second) - max_tokens
    if excess <= 0:
        return first, second
    from_front = random.uniforms(excess) < 0.5
    sizes, fronts = [len(first), len(second)], [0, 0]
    for front in from_front:
        longer = 0 if sizes[0] > sizes[1] else 1
        sizes[longer] -= 1
        fronts[longer] += int(front)
    return first[fronts[0] : fronts[0] + sizes[0]], second[fronts[1] : fronts[1] + sizes[1]]
