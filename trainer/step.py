"""One optimizer step on one rank: what training repeats, and what `verify` compares between layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .batch import cut, num_tokens_of
from .config import ResolvedRun
from .engine import Engine
from .errors import NumericsError
from .feed import Feed
from .runtime import Runtime, seed_step
from .schedule import learning_rate


@dataclass(frozen=True)
class StepFigures:
    """What a step gave, the same on every rank but for the seconds.

    `loss` in nats a prediction, the sum of `parts` by name; `grad_norm` before clipping, `num_tokens` what the model
    was trained on. A flag is true where any rank raised it. `data_counts` are those of Feed.take_counts over all ranks.
    `phase_s` has seconds by phase.
    """

    loss: float
    parts: dict[str, float]
    grad_norm: float
    lr: float
    num_tokens: int
    flags: tuple[bool, ...]
    data_counts: tuple[float, ...]
    phase_s: dict[str, float]


class TrainingStep:
    """Reads a global batch, runs it forward and backward, checks the numbers and updates."""

    def __init__(
        self,
        engine: Engine,
        resolved: ResolvedRun,
        runtime: Runtime,
        feed: Feed,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:
        """Take what the steps work with; `before_update` returns when masters and states may change."""
        self._engine, self._resolved, self._runtime, self._feed = engine, resolved, runtime, feed
        self._before_update = before_update

    def run(self, step: int, flags: Sequence[bool] = ()) -> StepFigures:
        """Do optimizer step `step`, counted from 0; every rank calls this, with as many flags.

        Raises:
            NumericsError: the loss or the gradient norm is not finite, on every rank; nothing was updated for the loss.
        """
        run, runtime, phases = self._resolved.run, self._runtime, self._engine.phases
        parts = self._resolved.parts
        with phases.host("data"):
            fields = self._feed.read(step)
            # Tokens and predictions that count, flags, what the readers met: one small reduction over all ranks.
            counted = [0.0] * (1 + len(parts))
            if runtime.reads_data:
                counted = [num_tokens_of(fields), *(float(fields[name].sum()) for name in parts.values())]
            num_tokens, *sums = self._sum_over_ranks(*counted, *map(float, flags), *self._feed.take_counts())
        counts = {name: max(1.0, sums.pop(0)) for name in parts}
        seed_step(run.run.seed, step, runtime)
        batches = cut(fields, run.train.micro_batch)
        own = self._engine.forward_backward(batches, counts).tolist()
        totals = self._sum_over_ranks(*own)
        losses = {name: total / counts[name] for name, total in zip(parts, totals, strict=True)}
        loss = sum(losses.values())
        if not math.isfinite(loss):
            self._refuse(step, "loss", sum(own))
        with phases.host("checkpoint"):
            self._before_update()
        lr = learning_rate(step, self._resolved.steps, run.optimizer.lr, run.schedule)
        norm = self._engine.update(lr)
        if not math.isfinite(norm) and run.train.dtype != "fp16":  # fp16 skips the step and lowers its scale
            self._refuse(step, "gradient norm", norm)
        return StepFigures(
            loss=loss,
            parts=losses,
            grad_norm=norm,
            lr=lr,
            num_tokens=int(num_tokens),
            flags=tuple(count > 0 for count in sums[: len(flags)]),
            data_counts=tuple(sums[len(flags) :]),
            phase_s=phases.take(),
        )

    def _sum_over_ranks(self, *values: float) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self._runtime.device)
        dist.all_reduce(total)
        return total.tolist()

    def _refuse(self, step: int, what: str, own: float) -> None:
        """Stop a run whose numbers are not finite; every rank sees it, so a last exchange is safe."""
        values = self._runtime.gather_all(own)
        ranks = [rank for rank, value in enumerate(values) if not math.isfinite(value)] or "all"
        raise NumericsError(f"step {step + 1}: the {what} is not finite on rank(s) {ranks}")
