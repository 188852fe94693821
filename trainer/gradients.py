"""What happens to gradients between the schedule and DeepSpeed's one reduction, where there are pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Fp32Accumulation:
    """Adds the gradients of micro-batches up in fp32, where DeepSpeed would add them in the working precision.

    DeepSpeed's setting for it is not heard when it reduces once a step. Its stage 1-2 optimizer reads the sum from
    `grad_accum`, in fp32. Stage 3 reads `grad` alone: it gets the sum, rounded once.
    """

    def __init__(self, module: nn.Module, optimizer: Any, *, stage3: bool) -> None:
        self._stage3 = stage3
        self._parameters = list(module.parameters())
        if not stage3:
            optimizer.use_grad_accum_attribute = True
        for parameter in self._parameters:
            parameter.grad_accum = None  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(self._add)

    def _add(self, parameter: Any) -> None:
        if parameter.grad_accum is None:
            parameter.grad_accum = parameter.grad.float()
        else:
            parameter.grad_accum.add_(parameter.grad)
        if self._stage3:
            parameter.grad.zero_()  # a new one could not take its shape: the parameter itself is partitioned again
        else:
            parameter.grad = None

    def hand_over(self) -> None:
        """Give DeepSpeed the sums, at the end of a step's last micro-batch."""
        if self._stage3:
            for parameter in self._parameters:
                parameter.grad.copy_(parameter.grad_accum)  # type: ignore[union-attr, arg-type, attr-defined]
                parameter.grad_accum = None  # type: ignore[attr-defined]


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Give the gradient that the reduction will take."""
    accumulated = getattr(parameter, "grad_accum", None)
    gradient = parameter.grad if accumulated is None else accumulated
    assert gradient is not None
    return gradient


def add_copies(
    copies: Sequence[tuple[tuple[int, ...], nn.Parameter | None]],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> None:
    """Replace the gradients of copies by their sum over a group, in fp32 and one message.

    Args:
        copies: (shape, parameter) in the same order on every rank, with None where a rank has no copy.
    """
    sums = [
        torch.zeros(shape, device=device) if parameter is None else gradient_of(parameter).float()
        for shape, parameter in copies
    ]
    add_over(sums, group)
    for (_, parameter), total in zip(copies, sums, strict=True):
        if parameter is not None:
            gradient_of(parameter).copy_(total)


def add_over(gradients: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Replace each gradient by its sum over a group, in one message."""
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(total.view_as(gradient))
