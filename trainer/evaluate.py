"""Held-out loss of each part, and what follows from it: perplexity, bits per byte, the share of right predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..data.config import TaskConfig
from ..data.heldout import load_heldout
from ..data.reading.reader import RangeReader
from .batch import cut, model_fields, share
from .config import ResolvedRun
from .objective import named_sums
from .places import DataPlaces, task_of
from .runtime import Runtime

if TYPE_CHECKING:
    from .engine import Engine  # brings DeepSpeed along, which a look at a checkpoint needs not


@dataclass(frozen=True)
class HeldOutLoss:
    """What a held-out set gave.

    `loss` in nats a prediction, the sum of `losses` by part; `shares` of predictions where the model tells, such as
    `masked_accuracy`; `perplexity` of the first part, where that predicts tokens; `bits_per_byte` over the UTF-8 bytes
    of the same documents, where every token is predicted; `tokens` the predictions of the first part.
    """

    loss: float
    losses: dict[str, float]
    shares: dict[str, float]
    perplexity: float | None
    bits_per_byte: float | None
    tokens: int

    def record(self) -> dict[str, float]:
        """Give the fields by name, those that are known; losses of parts only where there are several."""
        record = {"loss": self.loss, "tokens": self.tokens}
        if self.perplexity is not None:
            record["perplexity"] = self.perplexity
        if self.bits_per_byte is not None:
            record["bits_per_byte"] = self.bits_per_byte
        if len(self.losses) > 1:
            record |= {f"{name}_loss": loss for name, loss in self.losses.items()}
        return record | self.shares


class HeldOut:
    """One held-out set, this rank's share of it in memory."""

    def __init__(
        self, name: str, place: str, resolved: ResolvedRun, places: DataPlaces, runtime: Runtime
    ) -> None:
        """Read the set on every reader and share it with the ranks of its replica."""
        run = resolved.run
        self.name, self._parts, self._task = name, resolved.parts, run.task
        task = task_of(run, places.tokenizer)
        fields, size = None, (0, 0)
        if runtime.reads_data:
            data = load_heldout(
                place,
                places.tokenizer,
                task,
                max_tokens=run.evaluate.max_tokens,
                short_fraction=run.task.short_fraction,
                reader=RangeReader(run.reading),
            )
            fields = {name: values[runtime.dp_rank :: runtime.dp_size] for name, values in data.arrays.items()}
            size = (len(data.arrays["tokens"]), data.num_bytes)
        total, self._num_bytes = runtime.broadcast(size)
        own = len(range(runtime.dp_rank, total, runtime.dp_size))
        # Every rank runs as many forwards as the busiest: the schedule's collectives have to match.
        missing = -(-total // runtime.dp_size) - own
        shared = {
            name: torch.cat((field, field.new_zeros(missing, field.shape[1])))
            for name, field in share(fields, task.widths, own, runtime).items()
        }
        self._fields = model_fields(shared, documents_apart=run.data.attention == "document")
        counts = [float(self._fields[weights].sum()) for weights in self._parts.values()]
        counted = torch.tensor(
            counts if runtime.reads_data else [0.0] * len(counts), dtype=torch.float64, device=runtime.device
        )
        dist.all_reduce(counted)
        self._counts = dict(zip(self._parts, counted.tolist(), strict=True))

    def measure(self, engine: Engine, micro_batch: int) -> HeldOutLoss:
        """Run the model over the set; the same result on every rank."""
        sums = engine.evaluate(cut(self._fields, micro_batch, engine.micro_batch_multiple)).double()
        dist.all_reduce(sums)
        return held_out_loss(
            named_sums(sums, self._parts, engine.figures), self._counts, self._num_bytes, self._task
        )


def held_out_loss(
    sums: dict[str, dict[str, float]], counts: dict[str, float], num_bytes: int, task: TaskConfig
) -> HeldOutLoss:
    """Make the figures of a set from each part's sums, the loss among them, and how many predictions counted."""
    first = next(iter(sums))
    means = {
        part: {name: total / max(1.0, counts[part]) for name, total in of_part.items()}
        for part, of_part in sums.items()
    }
    losses = {part: of_part.pop("loss") for part, of_part in means.items()}
    causal = first == "next_token"
    # Without dropout, as here, a text that is its own partner is always found.
    finds_itself = task.name == "contrastive" and task.pairs == "dropout"
    return HeldOutLoss(
        loss=sum(losses.values()),
        losses=losses,
        shares={}
        if causal or finds_itself
        else {f"{part}_{name}": share for part, of_part in means.items() for name, share in of_part.items()},
        perplexity=None if first == "contrastive" else math.exp(min(losses[first], 700.0)),
        bits_per_byte=sums[first]["loss"] / math.log(2) / max(1, num_bytes) if causal else None,
        tokens=int(counts[first]),
    )
