"""Make rows of the stream the inputs of an encoder-decoder that predicts hidden spans."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..stream import StreamBatch
from .sample_random import SampleRandom
from .spans import Sentinels, SpanRates, corrupt_spans, raw_length

MIN_TEXT_TOKENS = 2  # one stays, one goes


@dataclass(frozen=True)
class SpansTask:
    """Predict the spans that went from a run of tokens: see task.Task.

    Fields: ``tokens`` [L], the encoder's inputs, and ``length`` [1], those that are no padding; ``labels`` [M], the
    targets, M as many as the longest inputs have; ``decoder_tokens`` [M], the targets one place later with the padding
    token in front; ``weights`` [M].

    Documents stand end to end, each with its eos; their bos, which T5 does not have, go, so rows with a border
    give inputs and targets that are shorter. A row of which less than two tokens are left predicts nothing.
    """

    length: int
    sentinels: Sentinels
    rates: SpanRates
    bos: int
    eos: int
    pad: int
    seed: int
    packing: str = "split"

    @property
    def row_tokens(self) -> int:
        """See task.Task: as much text as fills the inputs."""
        return self._sizes[0]

    @property
    def widths(self) -> dict[str, int]:
        """See task.Task."""
        targets = self._sizes[1]
        return {
            "tokens": self.length,
            "decoder_tokens": targets,
            "labels": targets,
            "weights": targets,
            "length": 1,
        }

    def arrays(self, batch: StreamBatch) -> dict[str, np.ndarray]:
        """See task.Task."""
        num_tokens, num_samples = self.row_tokens, len(batch.ids)
        fields = {
            name: np.full((num_samples, columns), 0 if name in ("weights", "length") else self.pad, np.int32)
            for name, columns in self.widths.items()
        }
        for row in np.flatnonzero(batch.ids >= 0).tolist():
            there = min(int(batch.lengths[row]), num_tokens)
            text = batch.tokens[row, :there]
            text = text[(text != self.bos) | ~batch.starts[row, :there]]
            if len(text) < MIN_TEXT_TOKENS:
                continue
            random = SampleRandom(self.seed, int(batch.ids[row]))
            found = corrupt_spans(text, self.sentinels, self.eos, random, self.rates)
            count = len(found.targets)
            fields["tokens"][row, : len(found.inputs)] = found.inputs
            fields["length"][row] = len(found.inputs)
            fields["labels"][row, :count] = found.targets
            fields["decoder_tokens"][row, 1:count] = found.targets[:-1]
            fields["weights"][row, :count] = 1
        return fields

    def reseeded(self, seed: int) -> SpansTask:
        """See task.Task."""
        return replace(self, seed=seed)

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        return raw_length(self.length, self.rates)
