"""Predict the next token: a row of tokens gives inputs and labels, and where its documents lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..stream import StreamBatch


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
