"""Sums of gradients in fp32, and over a group, on parameters of one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from basestone.trainer.gradients import Fp32Accumulation, gradient_of

MICRO_BATCHES, SMALL = 64, 2.0**-9  # one and so small a number have no sum in bf16


@pytest.mark.parametrize("stage3", [False, True])
def test_what_bf16_would_lose_is_added_up(stage3):
    module = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = SimpleNamespace()
    accumulation = Fp32Accumulation(module, optimizer, stage3=stage3)
    for step in range(2):  # the second begins anew
        for number in range(MICRO_BATCHES + 1):
            (module.weight * (SMALL if number else 1.0)).sum().backward()
        accumulation.hand_over()
        assert float(gradient_of(module.weight)) == 1 + MICRO_BATCHES * SMALL, step
        assert gradient_of(module.weight).dtype == (torch.bfloat16 if stage3 else torch.float32)
        module.weight.grad = module.weight.grad_accum = None
    assert getattr(optimizer, "use_grad_accum_attribute", False) is not stage3


def test_without_it_bf16_loses_them():
    module = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    for number in range(MICRO_BATCHES + 1):
        (module.weight * (SMALL if number else 1.0)).sum().backward()
    assert float(gradient_of(module.weight)) == 1.0
