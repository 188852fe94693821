"""One optimizer step on one rank: what training repeats, and what `verify` compares between layouts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.mixing import SourceSettings
from ..data.stream import TokenStream
from ..data.stream_settings import StreamSettings
from .batch import cut, share
from .config import ResolvedRun
from .engine import Engine
from .errors import NumericsError
from .places import DataPlaces
from .runtime import Runtime, seed_step
from .schedule import learning_rate


def open_stream(
    resolved: ResolvedRun,
    places: DataPlaces,
    runtime: Runtime,
    *,
    workers: int,
    state: dict[str, Any] | None = None,
) -> TokenStream | None:
    """Open the stream of this rank's model replica on the rank that reads for it; None on the others."""
    if not runtime.reads_data:
        return None
    return TokenStream(
        stream_settings(resolved, places),
        global_batch=resolved.run.train.global_batch,
        reader=runtime.dp_rank,
        num_readers=runtime.dp_size,
        workers=workers,
        state=state,
    )


def stream_settings(resolved: ResolvedRun, places: DataPlaces) -> StreamSettings:
    """Say what a run streams."""
    run, data = resolved.run, resolved.run.data
    sources = tuple(
        SourceSettings(name, found, source.weight if source else None, source.epochs if source else None)
        for name, found in places.train.items()
        for source in (data.sources.get(name),)
    )
    return StreamSettings(
        sources=sources,
        tokenizer=str(places.tokenizer.resolve()),
        sequence_length=data.sequence_length,
        lanes=resolved.lanes,
        seed=run.run.seed,
        packing=data.packing,
        mask_document_start=data.mask_document_start,
        temperature=data.temperature,
        phases=tuple((end, dict(row.weights)) for end, row in zip(resolved.mix_ends, data.mix, strict=True)),
        reading=run.reading.model_dump(),
    )


@dataclass(frozen=True)
class StepFigures:
    """What a step gave, the same on every rank but for the seconds.

    `loss` in nats a token, `grad_norm` before clipping, `num_tokens` the predictions that counted; `asked` tells
    whether any rank was asked to stop.
    """

    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    asked: bool
    data_s: float
    forward_backward_s: float
    optimizer_s: float


class TrainingStep:
    """Reads a global batch, runs it forward and backward, checks the numbers and updates."""

    def __init__(
        self, engine: Engine, resolved: ResolvedRun, runtime: Runtime, stream: TokenStream | None
    ) -> None:
        """Take the stream of this rank's model replica on the rank that reads for it, None on the others."""
        self._engine, self._resolved, self._runtime, self._stream = engine, resolved, runtime, stream

    def run(self, step: int, *, asked: bool = False) -> StepFigures:
        """Do optimizer step `step`, counted from 0; every rank calls this.

        Raises:
            NumericsError: the loss or the gradient norm is not finite, on every rank; nothing was updated for the loss.
        """
        run, runtime = self._resolved.run, self._runtime
        started_s = time.perf_counter()
        tokens, weights = self._read(step)
        # Tokens that count, and who was asked to stop: one small reduction over all ranks.
        counted = float(weights.sum()) if runtime.reads_data else 0.0
        num_tokens, num_asked = self._sum_over_ranks(counted, float(asked))
        read_s = time.perf_counter()
        seed_step(run.run.seed, step, runtime)
        own = float(
            self._engine.forward_backward(cut(tokens, weights, run.train.micro_batch), max(1.0, num_tokens))
        )
        (total,) = self._sum_over_ranks(own)
        loss = total / max(1.0, num_tokens)
        if not math.isfinite(loss):
            self._refuse(step, "loss", own)
        forward_s = time.perf_counter()
        lr = learning_rate(step, self._resolved.steps, run.optimizer.lr, run.schedule)
        norm = self._engine.update(lr)
        if not math.isfinite(norm) and run.train.dtype != "fp16":  # fp16 skips the step and lowers its scale
            self._refuse(step, "gradient norm", norm)
        return StepFigures(
            loss=loss,
            grad_norm=norm,
            lr=lr,
            num_tokens=int(num_tokens),
            asked=num_asked > 0,
            data_s=read_s - started_s,
            forward_backward_s=forward_s - read_s,
            optimizer_s=time.perf_counter() - forward_s,
        )

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        global_batch = self._resolved.batches.global_batch(step)
        batch = self._stream.next_batch(global_batch) if self._stream is not None else None
        return share(
            batch.tokens if batch else None,
            batch.weights if batch else None,
            self._resolved.samples_per_rank(global_batch),
            self._resolved.run.data.sequence_length,
            self._runtime,
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
