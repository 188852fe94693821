"""Small runs for the distributed tests: the same batches in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from basestone.model.families import layout_of
from basestone.trainer import runtime as processes
from basestone.trainer.batch import MicroBatch, causal_fields, cut
from basestone.trainer.checkpoint.restorer import Restorer
from basestone.trainer.checkpoint.saver import SaveOutcome, Saver
from basestone.trainer.config import RunConfig
from basestone.trainer.engine import Engine
from basestone.trainer.sections import CheckpointSection

VOCAB, SEQUENCE, GLOBAL_BATCH, NUM_LAYERS = 200, 32, 8, 4
LR = 1e-3


def run_config(family: str = "llama", **changes: Any) -> RunConfig:
    """Make a run file's content; `changes` are whole sections or "section.key" values."""
    model: dict[str, Any] = {
        "family": family,
        "num_layers": NUM_LAYERS,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "max_sequence_length": 64,
    }
    if family != "gpt2":
        model["num_query_groups"] = 4
    values: dict[str, Any] = {
        "run": {},
        "model": model,
        "data": {"train": "nowhere", "tokenizer": "nowhere", "sequence_length": SEQUENCE},
        "parallel": {},
        "train": {"steps": 20, "global_batch": GLOBAL_BATCH, "micro_batch": 2, "dtype": "fp32", "clip": 0.5},
        "optimizer": {"lr": LR},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values[section][key] = value
    return RunConfig(**values)


def make_engine(run: RunConfig) -> Engine:
    """Start this rank and build its engine."""
    parallel = run.parallel
    runtime = processes.start(
        tensor=parallel.tensor, pipeline=parallel.pipeline, virtual_pipeline=parallel.virtual_pipeline
    )
    return Engine(run.resolve(runtime.world_size, VOCAB), runtime)


def saver_of(engine: Engine, folder: str, *, asynchronous: bool = False, **keys: Any) -> Saver:
    """Give what saves an engine in a run directory; `keys` are those of [checkpoint]."""
    table, section = layout_of(engine.model), CheckpointSection(**keys)
    return Saver(Path(folder), table, engine.runtime, engine.state, section, asynchronous=asynchronous)


def save(engine: Engine, folder: str, step: int, **keys: Any) -> SaveOutcome:
    """Save an engine and see it through."""
    state = {"step": step, "optimizer_steps": engine.state.steps}
    outcome = saver_of(engine, folder, **keys).begin(step, state, wait=True)
    assert outcome is not None
    return outcome


def restore(engine: Engine, folder: str) -> dict[str, Any] | None:
    """Load the newest good checkpoint of a run directory into an engine."""
    table = layout_of(engine.model)
    return Restorer(Path(folder), table, engine.runtime, engine.state).restore(lambda state: [])


def batch_of(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Give step's global batch and weights: uneven numbers of tokens that count."""
    generator = np.random.default_rng(step)
    # A learnable pattern: runs of consecutive ids.
    start = generator.integers(0, VOCAB, (GLOBAL_BATCH, 1))
    tokens = (start + np.arange(SEQUENCE + 1) * generator.integers(1, 4, (GLOBAL_BATCH, 1))) % VOCAB
    weights = (generator.random((GLOBAL_BATCH, SEQUENCE)) < 0.9).astype(np.int32)
    return tokens.astype(np.int32), weights


def micro_batches_of(
    step: int, run: RunConfig, rows: slice, multiple: int = 1
) -> tuple[list[MicroBatch], float]:
    """Give some rows of a step's batch as micro-batches, and how many predictions of the whole batch count."""
    tokens, weights = batch_of(step)
    apart = run.data.attention == "document"
    starts = np.random.default_rng(10_000 + step).random(weights.shape) < 0.1
    marks = weights + 2 * starts
    batches = causal_batches(tokens[rows], marks[rows], run.train.micro_batch, multiple, documents_apart=apart)
    return batches, float(weights.sum())


def causal_batches(
    tokens: np.ndarray, marks: np.ndarray, micro_batch: int, multiple: int = 1, *, documents_apart: bool = False
) -> list[MicroBatch]:
    """Cut rows of tokens and marks into the micro-batches of a decoder."""
    fields = causal_fields(torch.from_numpy(tokens), torch.from_numpy(marks), documents_apart=documents_apart)
    return cut(fields, micro_batch, multiple)


def train(
    engine: Engine, run: RunConfig, steps: range, before_update: Callable[[], None] = lambda: None
) -> list[tuple[float, float]]:
    """Give (loss, gradient norm) of each step, the same on every rank."""
    runtime, curve = engine.runtime, []
    for step in steps:
        batches, num_tokens = micro_batches_of(step, run, slice(runtime.dp_rank, None, runtime.dp_size))
        processes.seed_step(run.run.seed, step, runtime)
        total = engine.forward_backward(batches, {"next_token": num_tokens})
        dist.all_reduce(total)
        before_update()
        norm = engine.update(LR)
        curve.append((float(total) / num_tokens, norm))
    return curve


def held_out_loss(engine: Engine, run: RunConfig) -> float:
    """Give the loss of a batch that no step trains on, in a number of micro-batches that no schedule likes."""
    tokens, weights = batch_of(1000)
    mine = slice(engine.runtime.dp_rank, 6, engine.runtime.dp_size)
    batches = causal_batches(tokens[mine], weights[mine], 2, engine.micro_batch_multiple)
    sums = engine.evaluate(batches).double()
    dist.all_reduce(sums)
    return float(sums[0, 0]) / float(weights[:6].sum())


def curve_of(run: RunConfig, steps: int) -> list[tuple[float, float]]:
    """Train from the initial weights."""
    return train(make_engine(run), run, range(steps))


def relative_difference(curve: list[tuple[float, ...]], reference: list[tuple[float, ...]]) -> float:
    """Give the largest relative difference of losses, norms and held-out sums, of which some may be 0."""
    pairs = [pair for rows in zip(curve, reference, strict=True) for pair in zip(*rows, strict=True)]
    return max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs)
