"""Small runs of a T5: the same batches in every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from small import GLOBAL_BATCH, LR, SEQUENCE, VOCAB, make_engine, run_config

from basestone.trainer import runtime as processes
from basestone.trainer.batch import MicroBatch, cut
from basestone.trainer.config import RunConfig
from basestone.trainer.engine import Engine

TARGETS = 8  # of inputs of SEQUENCE tokens, at the published rates
Curve = list[tuple[float, float]]


def t5(**changes: Any) -> RunConfig:
    """Make a run file's content: 4 layers of an encoder, 2 of its decoder."""
    shape = {"model__num_query_groups": 8, "model__num_layers": 4, "model__num_decoder_layers": 2}
    return run_config("t5", **{**shape, **changes})


def fields_of(step: int) -> dict[str, torch.Tensor]:
    """Give a global batch: inputs and targets of uneven lengths, the last of which fill up and count nothing."""
    generator = np.random.default_rng(step)
    lengths = generator.integers(8, SEQUENCE + 1, (GLOBAL_BATCH, 1))
    lengths[-1] = 0
    counts = np.minimum(generator.integers(2, TARGETS + 1, (GLOBAL_BATCH, 1)), lengths)
    start, stride = (generator.integers(low, high, (GLOBAL_BATCH, 1)) for low, high in ((1, VOCAB), (1, 4)))
    tokens = (start + np.arange(SEQUENCE) * stride) % VOCAB
    labels = (start + np.arange(TARGETS) * stride) % VOCAB  # what the inputs begin with
    weights = np.arange(TARGETS) < counts
    labels = np.where(weights, labels, 0)
    fields = {
        "tokens": np.where(np.arange(SEQUENCE) < lengths, tokens, 0),
        "decoder_tokens": np.pad(labels[:, :-1], ((0, 0), (1, 0))),
        "labels": labels,
        "weights": weights,
        "length": lengths,
    }
    return {name: torch.from_numpy(field.astype(np.int32)) for name, field in fields.items()}


def batches_of(engine: Engine, run: RunConfig, step: int) -> tuple[list[MicroBatch], dict[str, float]]:
    """Give this rank's micro-batches, and how many predictions of the whole batch count."""
    fields = fields_of(step)
    own = {name: field[engine.runtime.dp_rank :: engine.runtime.dp_size] for name, field in fields.items()}
    batches = cut(own, run.train.micro_batch, engine.micro_batch_multiple)
    return batches, {"spans": float(fields["weights"].sum())}


def train(engine: Engine, run: RunConfig, steps: range) -> Curve:
    """Give (loss, gradient norm) of each step, the same on every rank."""
    curve = []
    for step in steps:
        batches, counts = batches_of(engine, run, step)
        processes.seed_step(run.run.seed, step, engine.runtime)
        sums = engine.forward_backward(batches, counts)
        dist.all_reduce(sums)
        curve.append((float(sums) / counts["spans"], engine.update(LR)))
    return curve


def curve_of(run: RunConfig, steps: int) -> Curve:
    """Train from the initial weights; the last pair is the summed loss and the right predictions held out."""
    engine = make_engine(run)
    curve = train(engine, run, range(steps))
    sums = engine.evaluate(batches_of(engine, run, 1000)[0]).double()
    dist.all_reduce(sums)
    loss, right = sums[0].tolist()
    return [*curve, (loss, right)]
