"""Predict the next token: a row of tokens gives inputs, labels, weights, and where its documents lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..stream import StreamBatch

PADDING_SEGMENT = 0


@dataclass(frozen=True)
class CausalSample:
    """Hold what a decoder is trained on, each [sequence_length].

    ``tokens`` and ``labels`` int32; ``weights`` uint8, 1 where the prediction counts; ``positions`` int32, from 0 in
    each document; ``segments`` int32, documents counted from 1, padding 0.
    """

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


def causal_sample(
    row: np.ndarray, lengths: Sequence[int] | None = None, *, across_documents: bool = True
) -> CausalSample:
    """Cut a row [sequence_length + 1] into inputs and the labels one further on.

    ``lengths`` are the tokens that each document has in the row, in order; what they leave over is padding.
    Without them the row is one document. ``across_documents = False`` gives no weight to predicting a
    document's first token from the one before, as it must be where attention does not see across.
    """
    lengths = (len(row),) if lengths is None else lengths
    assert len(row) >= 2 and sum(lengths) <= len(row) and all(length > 0 for length in lengths)
    segments = np.full(len(row), PADDING_SEGMENT, np.int32)
    segments[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    weights = segments[1:] != PADDING_SEGMENT
    if not across_documents:
        weights &= segments[1:] == segments[:-1]
    return CausalSample(
        tokens=row[:-1].astype(np.int32),
        labels=row[1:].astype(np.int32),
        weights=weights.astype(np.uint8),
        positions=document_positions(lengths, len(row))[:-1],
        segments=segments[:-1],
    )


def document_positions(lengths: Sequence[int], num_tokens: int) -> np.ndarray:
    """Return each token's place in its document, from 0, int32 [num_tokens]; padding counts as one document."""
    pieces = np.array([*lengths, num_tokens - sum(lengths)])
    starts = np.cumsum(pieces) - pieces
    return (np.arange(num_tokens) - np.repeat(starts, pieces)).astype(np.int32)


@dataclass(frozen=True)
class CausalTask:
    """Make rows of the stream the inputs of a decoder: see task.Task.

    Fields: ``tokens`` [sequence_length + 1], and ``marks`` [sequence_length], 1 where the prediction of the token one
    further on counts, and 2 more where a document begins.
    """

    row_tokens: int
    packing: str

    @property
    def widths(self) -> dict[str, int]:
        """See task.Task."""
        return {"tokens": self.row_tokens + 1, "marks": self.row_tokens}

    def arrays(self, batch: StreamBatch) -> dict[str, np.ndarray]:
        """See task.Task."""
        return {"tokens": batch.tokens, "marks": batch.weights + 2 * batch.starts.astype(np.int32)}

    def reseeded(self, seed: int) -> CausalTask:
        """See task.Task: nothing is drawn here."""
        return self
