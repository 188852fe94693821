"""From what a model makes of a micro-batch to the loss that Megatron-core's schedule takes back through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.config import ModelConfig
from ..model.embedding.pooling import Contrast, contrast
from .batch import MicroBatch

Loss = tuple[Tensor, dict[str, Tensor]]  # what is taken back, and what the schedule reports
LossOf = Callable[[Any, MicroBatch], Loss]
Reports = list[dict[str, Tensor]]


def objective_of(
    model: ModelConfig, parts: Mapping[str, str], group: dist.ProcessGroup | None
) -> Predictions | Pairs:
    """Give what a model is trained for; `group` are the data-parallel ranks."""
    return Predictions(parts) if model.pooling is None else Pairs(model.temperature, group)


def named_sums(sums: Tensor, parts: Iterable[str], figures: Sequence[str]) -> dict[str, dict[str, float]]:
    """Name sums [parts, figures]."""
    return {part: dict(zip(figures, row, strict=True)) for part, row in zip(parts, sums.tolist(), strict=True)}


class Predictions:
    """Losses of predictions, each part's weighted by its scale: every micro-batch stands for itself.

    A report's `sums` are fp32 [parts, figures]: the loss in nats, and the predictions that were right where the model
    tells.
    """

    figures = ("loss", "accuracy")

    def __init__(self, parts: Mapping[str, str]) -> None:
        """Take the parts of the loss, each with the field that says which predictions count."""
        self._parts = parts

    def prepare(self, micro_batches: Sequence[MicroBatch], run: Callable[[LossOf], Reports]) -> None:
        """Do nothing: there is nothing to know of the other micro-batches."""

    def loss(self, outputs: Any, batch: MicroBatch, scales: Mapping[str, float]) -> Loss:
        """Give the loss of a micro-batch."""
        sums = {}
        for name, weights in self._parts.items():
            losses, right = outputs[name]
            weight = batch[weights].view_as(losses)
            hits = losses.new_zeros(()) if right is None else (right * weight).sum()
            sums[name] = torch.stack(((losses * weight).sum(), hits))
        total = torch.stack([sums[name][0] * scales[name] for name in self._parts]).sum()
        return total, {"sums": torch.stack(tuple(sums.values())).detach()}


class Pairs:
    """The contrastive loss of a whole global batch, over all of its micro-batches and data-parallel ranks.

    A report's `sums` are fp32 [1, figures]: the loss in nats, how many partners are nearest, and how many are among the
    ten nearest.

    Where there are several micro-batches, a first pass without gradients finds all vectors, and the second takes back
    the gradient of each (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup").
    """

    figures = ("loss", "accuracy", "recall_at_10")

    def __init__(self, temperature: float, group: dist.ProcessGroup | None) -> None:
        """Take what cosines are divided by, and the data-parallel ranks."""
        self._temperature, self._group = temperature, group
        self._waiting: list[Contrast] = []

    def prepare(self, micro_batches: Sequence[MicroBatch], run: Callable[[LossOf], Reports]) -> None:
        """Find the vectors of all micro-batches, where there are several; `run` is a pass that only looks."""
        self._waiting = []
        if len(micro_batches) == 1:
            return
        reports = run(
            lambda outputs, batch: (outputs["contrastive"].sum(), {"vectors": outputs["contrastive"]})
        )
        if not reports:  # an earlier stage
            return
        halves = [report["vectors"].chunk(2) for report in reports]
        found = self._contrast(
            torch.cat([first for first, _ in halves]),
            torch.cat([second for _, second in halves]),
            torch.cat([batch["real"][:, 0] for batch in micro_batches]),
        )
        parts = zip(*(field.split(len(halves[0][0])) for field in found), strict=True)
        self._waiting = [Contrast(*part) for part in parts]

    def loss(self, outputs: Any, batch: MicroBatch, scales: Mapping[str, float]) -> Loss:
        """Give what has the gradient of the loss; the report has the loss itself."""
        first, second = outputs["contrastive"].chunk(2)
        real = batch["real"][:, 0]
        found = self._waiting.pop(0) if self._waiting else self._contrast(first.detach(), second.detach(), real)
        total = (first * found.first_gradient + second * found.second_gradient).sum() * scales["contrastive"]
        hits = [((found.ahead < among) * real).sum() for among in (1, 10)]
        return total, {"sums": torch.stack((found.losses.sum(), *hits))[None]}

    def _contrast(self, first: Tensor, second: Tensor, real: Tensor) -> Contrast:
        return contrast(first, second, real, temperature=self._temperature, group=self._group)
