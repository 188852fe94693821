"""BERT in every layout: losses and gradient norms equal one process's, and what padding holds is never seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small import GLOBAL_BATCH, LR, SEQUENCE, VOCAB, make_engine, relative_difference, run_config
from torch.utils.flop_counter import FlopCounterMode

from basestone.model.flops import flops_per_token
from basestone.trainer import runtime as processes
from basestone.trainer.batch import MicroBatch, cut
from basestone.trainer.config import RunConfig
from basestone.trainer.engine import Engine
from basestone.trainer.forks import run_ranks
from basestone.trainer.layouts import parse_layout

pytestmark = pytest.mark.dist
STEPS = 5
PARTS = {"masked": "weights", "next_sentence": "real"}
CELLS = [
    "tp2-z1",
    "tp2-sp-z1",
    "dp2-z2",
    "dp2-z3",
    "tp2-z3",
    "tp2-sp-pp2-z1",
    "pp2-z2",
    "pp2-vp2-z1",
    "tp2-dp2-z2",
]


def bert(**changes: Any) -> RunConfig:
    return run_config("bert", **{"model__dropout": 0.0, **changes})


def fields_of(step: int, parts: dict[str, str]) -> dict[str, torch.Tensor]:
    """Give a global batch: rows of uneven lengths, the last of which fills up and counts nothing."""
    generator = np.random.default_rng(step)
    lengths = generator.integers(8, SEQUENCE + 1, (GLOBAL_BATCH, 1))
    lengths[-1] = 0
    inside = np.arange(SEQUENCE) < lengths
    start = generator.integers(0, VOCAB, (GLOBAL_BATCH, 1))
    labels = (start + np.arange(SEQUENCE) * generator.integers(1, 4, (GLOBAL_BATCH, 1))) % VOCAB
    weights = (generator.random(labels.shape) < 0.2) & inside
    fields = {
        "tokens": np.where(weights, 4, labels),
        "labels": labels,
        "weights": weights,
        "length": lengths,
        "segments": inside & (np.arange(SEQUENCE) > lengths // 2),
        "next_label": generator.integers(0, 2, (GLOBAL_BATCH, 1)),
        "real": lengths > 0,
    }
    if "next_sentence" not in parts:
        fields = {name: fields[name] for name in ("tokens", "labels", "weights", "length")}
    return {
        name: torch.from_numpy(np.ascontiguousarray(field).astype(np.int32)) for name, field in fields.items()
    }


def batches_of(engine: Engine, run: RunConfig, step: int) -> tuple[list[MicroBatch], dict[str, float]]:
    fields = fields_of(step, engine.parts)
    counts = {name: float(fields[weights].sum()) for name, weights in engine.parts.items()}
    own = {name: field[engine.runtime.dp_rank :: engine.runtime.dp_size] for name, field in fields.items()}
    return cut(own, run.train.micro_batch, engine.micro_batch_multiple), counts


def curve_of(run: RunConfig) -> list[tuple[float, ...]]:
    """Give each part's loss and the gradient norm of some steps, then losses and right predictions held out."""
    engine = make_engine(run)
    curve = []
    for step in range(STEPS):
        batches, counts = batches_of(engine, run, step)
        processes.seed_step(run.run.seed, step, engine.runtime)
        sums = engine.forward_backward(batches, counts)
        dist.all_reduce(sums)
        losses = [total / counts[name] for name, total in zip(engine.parts, sums.tolist(), strict=True)]
        curve.append((*losses, engine.update(LR)))
    sums = engine.evaluate(batches_of(engine, run, 1000)[0]).double()
    dist.all_reduce(sums)
    return [*curve, tuple(sums.flatten().tolist())]


@pytest.fixture(scope="module")
def serial() -> list[tuple[float, ...]]:
    return run_ranks(curve_of, 1, bert(parallel__zero=0))[0]


@pytest.mark.parametrize("name", CELLS)
def test_a_layout_equals_one_process(serial, name):
    layout = parse_layout(name)
    assert relative_difference(run_ranks(curve_of, layout.processes, layout.of(bert()))[0], serial) < 1e-5


def test_it_learns(serial):
    assert serial[-2][0] < serial[0][0]


def test_without_next_sentences():
    one = bert(model__next_sentence=False, model__num_segments=1, parallel__zero=0)
    reference = run_ranks(curve_of, 1, one)[0]
    layout = parse_layout("tp2-sp-pp2-z2")
    many = layout.of(bert(model__next_sentence=False, model__num_segments=1))
    assert relative_difference(run_ranks(curve_of, layout.processes, many)[0], reference) < 1e-5


def test_recomputing_changes_nothing(serial):
    assert relative_difference(run_ranks(curve_of, 1, bert(train__recompute=True))[0], serial) < 1e-5


def _flops(run: RunConfig) -> tuple[float, float]:
    """Count a step's forward and backward; give it beside the closed form, both for one place of the batch."""
    engine = make_engine(run)
    batches, counts = batches_of(engine, run, 0)
    processes.seed_step(run.run.seed, 0, engine.runtime)
    with FlopCounterMode(display=False) as counter:
        engine.forward_backward(batches, counts)
    expected = flops_per_token(engine.model, SEQUENCE, target_length=counts["masked"] / GLOBAL_BATCH)
    return counter.get_total_flops() / (GLOBAL_BATCH * SEQUENCE), expected


def test_flops_are_those_that_torch_counts():
    """With dropout torch counts the attention's products one by one."""
    counted, expected = run_ranks(_flops, 1, bert(model__dropout=0.1))[0]
    assert counted == pytest.approx(expected, rel=1e-6)


def _seen(run: RunConfig) -> float:
    """Give how far the losses move when the padding holds something else."""
    engine = make_engine(run)
    fields = fields_of(0, engine.parts)
    other = dict(fields)
    padding = torch.arange(SEQUENCE) >= fields["length"]
    other["tokens"] = torch.where(padding, 7, fields["tokens"]).to(torch.int32)
    sums = [engine.evaluate(cut(one, 2)) for one in (fields, other)]
    return float((sums[0] - sums[1]).abs().max())


def test_padding_is_not_seen():
    assert run_ranks(_seen, 1, bert())[0] == 0.0
