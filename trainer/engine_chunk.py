"""What Megatron-core's schedule calls where each forward has to pass through DeepSpeed's engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..model.stage import Stage
from .batch import MicroBatch


class EngineChunk(nn.Module):
    """Stand in place of the model, so that each forward passes through DeepSpeed's engine."""

    engine: Any
    stage: Stage

    def __init__(self, engine: Any, module: Stage) -> None:
        """Wrap the engine of a stage of one chunk."""
        super().__init__()
        object.__setattr__(self, "engine", engine)  # not a sub-module: the engine owns the parameters
        object.__setattr__(self, "stage", module)  # "decoder" would mean something to the schedule
        (chunk,) = module.chunks
        self.config, self.model_type = chunk.config, chunk.model_type
        self._remaining = 0

    def begin_step(self, num_micro_batches: int) -> None:
        """Say how many forwards come before the optimizer's step."""
        self._remaining = num_micro_batches

    def set_input_tensor(self, tensor: Any) -> None:
        """Pass on what the schedule hands over."""
        self.stage.chunks[0].set_input_tensor(tensor)

    def forward(self, batch: MicroBatch) -> Any:
        """Run one micro-batch; the last one of a step is the accumulation boundary."""
        if self.stage.training and torch.is_grad_enabled():
            self._remaining -= 1
            self.engine.set_gradient_accumulation_boundary(self._remaining == 0)
        return self.engine(batch)
