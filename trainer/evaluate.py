"""Held-out loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ..data.config import ReadingConfig
from ..data.heldout import load_heldout
from ..data.reading.reader import RangeReader
from .batch import causal_fields, cut, marks_of, share
from .engine import Engine
from .runtime import Runtime


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss in nats per token; bits per byte over the UTF-8 bytes of the same documents."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int

    def record(self) -> dict[str, float]:
        """Give the fields by name."""
        return asdict(self)


class HeldOut:
    """One held-out set, this rank's share of it in memory."""

    def __init__(
        self,
        name: str,
        place: str,
        tokenizer: Path,
        runtime: Runtime,
        *,
        sequence_length: int,
        max_tokens: int,
        documents_apart: bool,
        reading: ReadingConfig,
    ) -> None:
        """Read the set on every reader and share it with the ranks of its replica."""
        self.name = name
        fields = None
        size = (0, 0, 0)
        if runtime.reads_data:
            data = load_heldout(
                place,
                tokenizer,
                sequence_length=sequence_length,
                max_tokens=max_tokens,
                reader=RangeReader(reading),
            )
            mine = slice(runtime.dp_rank, None, runtime.dp_size)
            fields = {"tokens": data.tokens[mine], "marks": marks_of(data.weights[mine], data.starts[mine])}
            size = (len(data.tokens), int(data.weights.sum()), data.num_bytes)
        total, self.num_tokens, self.num_bytes = runtime.broadcast(size)
        own = len(range(runtime.dp_rank, total, runtime.dp_size))
        widths = {"tokens": sequence_length + 1, "marks": sequence_length}
        # Every rank runs as many forwards as the busiest: the schedule's collectives have to match.
        missing = -(-total // runtime.dp_size) - own
        shared = {
            name: torch.cat((field, field.new_zeros(missing, field.shape[1])))
            for name, field in share(fields, widths, own, runtime).items()
        }
        self._fields = causal_fields(**shared, documents_apart=documents_apart)

    def measure(self, engine: Engine, micro_batch: int) -> HeldOutLoss:
        """Run the model over the set; the same result on every rank."""
        batches = cut(self._fields, micro_batch, engine.micro_batch_multiple)
        sums = engine.evaluate(batches).double()
        dist.all_reduce(sums)
        nats = float(sums[0, 0])
        loss = nats / max(1, self.num_tokens)
        return HeldOutLoss(
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            bits_per_byte=nats / math.log(2) / max(1, self.num_bytes),
            tokens=self.num_tokens,
        )
