"""Make rows of the stream the texts of a sentence encoder, alone or in twos that belong together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..stream import StreamBatch
from .sentences import EncoderSpecials

PAIR_PACKINGS = {"dropout": "passages", "neighbours": "neighbours", "given": "given"}


@dataclass(frozen=True)
class ContrastiveTask:
    """Tell a text's partner from those of the other texts of a batch (Gao et al. 2021, "SimCSE"): see task.Task.

    Fields: ``tokens`` [L], [CLS] text [SEP]; ``length`` [1], those that are no padding; ``real`` [1], 1 where the
    sample counts; and, but for ``pairs`` = "dropout", where a text is its own partner, ``other_tokens`` [L] and
    ``other_length`` [1].
    """

    length: int
    pairs: str
    frame: EncoderSpecials

    @property
    def packing(self) -> str:
        """See task.Task."""
        return PAIR_PACKINGS[self.pairs]

    @property
    def row_tokens(self) -> int:
        """See task.Task; packing's rows (passages.py) have no specials, and leave a place empty."""
        return (self.length - 2) * (1 if self.pairs == "dropout" else 2)

    @property
    def widths(self) -> dict[str, int]:
        """See task.Task."""
        columns = {"tokens": self.length, "length": 1, "real": 1}
        if self.pairs != "dropout":
            columns |= {"other_tokens": self.length, "other_length": 1}
        return columns

    def arrays(self, batch: StreamBatch) -> dict[str, np.ndarray]:
        """See task.Task."""
        fields = {
            name: np.full((len(batch.ids), columns), self.frame.pad if "tokens" in name else 0, np.int32)
            for name, columns in self.widths.items()
        }
        for row in np.flatnonzero(batch.ids >= 0).tolist():
            begins = np.flatnonzero(batch.starts[row])
            texts = np.split(batch.tokens[row, : batch.lengths[row]], begins[1:])
            for prefix, text in zip(("", "other_"), texts, strict=False):
                count = len(text) + 2
                fields[f"{prefix}tokens"][row, :count] = [self.frame.cls, *text, self.frame.sep]
                fields[f"{prefix}length"][row] = count
            fields["real"][row] = 1
        return fields

    def reseeded(self, seed: int) -> ContrastiveTask:
        """See task.Task: nothing is drawn here."""
        return self
