"""Sentence embeddings: the contrastive loss of a whole batch, however many ranks and micro-batches share it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small import GLOBAL_BATCH, LR, SEQUENCE, VOCAB, make_engine, relative_difference, run_config

from basestone.data.config import TaskConfig
from basestone.model.embedding.pooling import contrast, pooled
from basestone.trainer import runtime as processes
from basestone.trainer.batch import cut
from basestone.trainer.config import RunConfig
from basestone.trainer.evaluate import held_out_loss
from basestone.trainer.forks import run_ranks
from basestone.trainer.layouts import parse_layout
from basestone.trainer.objective import LossOf, Pairs, Reports, named_sums

pytestmark = pytest.mark.dist
STEPS, TEMPERATURE = 5, 0.05


def vectors(num_pairs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    first, second = (F.normalize(torch.randn(num_pairs, 16, generator=generator), dim=-1) for _ in range(2))
    return first, F.normalize(first + 3 * second, dim=-1), (torch.arange(num_pairs) % 5 != 3).float()


def plain(num_pairs: int) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give the loss of the whole batch and its gradients by torch's own operations and autograd."""
    first, second, real = (field.double() for field in vectors(num_pairs))
    first.requires_grad_(), second.requires_grad_()
    scores = (first @ second.T / TEMPERATURE).masked_fill(real == 0, float("-inf"))
    there = real > 0
    losses = F.cross_entropy(scores[there], torch.arange(num_pairs)[there], reduction="sum")
    losses.backward()
    assert first.grad is not None and second.grad is not None
    order = scores.argsort(-1, descending=True)
    ahead = (order == torch.arange(num_pairs)[:, None]).nonzero()[:, 1].float()
    return float(losses.detach()), first.grad, second.grad, ahead


def _contrast(num_pairs: int, chunk: int, dtype: torch.dtype) -> tuple[np.ndarray, ...]:
    runtime = processes.start()
    rows = slice(
        runtime.dp_rank * num_pairs // runtime.dp_size, (runtime.dp_rank + 1) * num_pairs // runtime.dp_size
    )
    own = [field[rows].to(dtype) for field in vectors(num_pairs)]
    found = contrast(*own, temperature=TEMPERATURE, group=runtime.dp_group, chunk=chunk)
    return tuple(field.numpy() for field in found)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_loss_and_gradients_equal_one_process_on_the_whole_batch(size, chunk):
    loss, first, second, ahead = plain(24)
    ranks = run_ranks(_contrast, size, 24, chunk, torch.float64)
    losses, places, firsts, seconds = (np.concatenate(parts) for parts in zip(*ranks, strict=True))
    real = vectors(24)[2].numpy()
    assert losses.sum() == pytest.approx(loss, rel=1e-12)
    assert (losses[real == 0] == 0).all() and (places[real > 0] == ahead.numpy()[real > 0]).all()
    assert len(set(places[real > 0])) > 2
    for got, expected in ((firsts, first.numpy()), (seconds, second.numpy())):
        assert np.abs(got - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("size", [2, 4])
def test_in_fp32_ranks_and_chunks_change_rounding_alone(size):
    (whole,) = run_ranks(_contrast, 1, 24, 1024, torch.float32)
    ranks = run_ranks(_contrast, size, 24, 5, torch.float32)
    for got, expected in zip((np.concatenate(parts) for parts in zip(*ranks, strict=True)), whole, strict=True):
        assert np.abs(got - expected).max() < 1e-6 * np.abs(expected).max()


def test_a_text_that_is_as_near_as_the_partner_is_ahead_of_it():
    same = F.normalize(torch.ones(4, 16), dim=-1)
    found = contrast(same, same, torch.tensor([1.0, 1.0, 1.0, 0.0]), temperature=TEMPERATURE)
    assert found.ahead[:3].tolist() == [2, 2, 2], "what does not count is not ahead"


def test_nothing_is_found_by_vectors_that_are_no_numbers():
    first, second, real = (part.float() for part in vectors(12))
    found = contrast(first * torch.nan, second, real, temperature=TEMPERATURE)
    assert (found.ahead >= 10).all()


@pytest.mark.parametrize("size", [60, 6])
def test_recall_is_among_the_ten_nearest_of_the_whole_set(size):
    """By the places of all partners; micro-batches change nothing."""
    first, second, real = vectors(60)
    places = plain(60)[3][real > 0]
    expected = [float((places < among).sum()) for among in (1, 10)]
    assert 0 < expected[0] < expected[1] < len(places)
    pairs, halves = Pairs(TEMPERATURE, None), zip(first.split(size), second.split(size), strict=True)
    outputs = [{"contrastive": torch.cat(both)} for both in halves]
    batches = [{"real": part[:, None]} for part in real.split(size)]

    def run(loss: LossOf) -> Reports:
        return [loss(*one)[1] for one in zip(outputs, batches, strict=True)]

    pairs.prepare(batches, run)
    sums = sum(report["sums"] for report in run(lambda *one: pairs.loss(*one, {"contrastive": 1.0})))
    found = named_sums(sums, ["contrastive"], pairs.figures)["contrastive"]
    assert [found["accuracy"], found["recall_at_10"]] == expected


def test_a_rank_with_nothing_that_counts_adds_nothing():
    first, second, _ = vectors(6)
    found = contrast(first, second, torch.zeros(6), temperature=TEMPERATURE)
    assert all(bool(field.isfinite().all()) for field in found)
    assert not found.losses.any() and not found.first_gradient.any() and not found.second_gradient.any()


def test_scores_are_there_for_a_chunk_alone(monkeypatch):
    """No tensor of the batch's square is ever made."""
    seen: list[tuple[int, ...]] = []
    original = torch.Tensor.__matmul__

    def watched(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        made = original(self, other)
        seen.append(tuple(made.shape))
        return made

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    contrast(*vectors(200), temperature=TEMPERATURE, chunk=8)
    assert max(rows * columns for rows, columns in seen) <= 200 * 16 and (200, 8) in seen


def embedder(family: str = "bert", pooling: str = "mean", **changes: Any) -> RunConfig:
    own = {"model__next_sentence": False} if family == "bert" else {}
    return run_config(
        family,
        **{"model__pooling": pooling, "model__dropout": 0.0, "model__temperature": 0.5, **own, **changes},
    )


def fields_of(step: int, *, partners: bool) -> dict[str, torch.Tensor]:
    """Give a global batch of texts, the last of which fills up; a partner begins as its text does."""
    generator = np.random.default_rng(step)
    lengths = generator.integers(8, SEQUENCE + 1, (GLOBAL_BATCH, 1))
    lengths[-1] = 0
    tokens = generator.integers(0, VOCAB, (GLOBAL_BATCH, SEQUENCE))
    fields = {"tokens": tokens, "length": lengths, "real": lengths > 0}
    if partners:
        other = np.where(np.arange(SEQUENCE) < 6, tokens, generator.integers(0, VOCAB, tokens.shape))
        fields |= {"other_tokens": other, "other_length": np.roll(lengths, 1)}
    return {
        name: torch.from_numpy(np.ascontiguousarray(field).astype(np.int32)) for name, field in fields.items()
    }


def curve_of(run: RunConfig, partners: bool = True) -> list[tuple[float, ...]]:
    """Give loss and gradient norm of some steps, then the sums of a batch that is not trained on."""
    engine = make_engine(run)
    runtime, curve = engine.runtime, []
    for step in (*range(STEPS), 1000):
        fields = fields_of(step, partners=partners)
        count = float(fields["real"].sum())
        own = {name: field[runtime.dp_rank :: runtime.dp_size] for name, field in fields.items()}
        batches = cut(own, run.train.micro_batch, engine.micro_batch_multiple)
        processes.seed_step(run.run.seed, step, runtime)
        if step == 1000:
            sums = engine.evaluate(batches)
            dist.all_reduce(sums)
            curve.append(tuple(sums.flatten().tolist()))
            continue
        sums = engine.forward_backward(batches, {"contrastive": count})
        dist.all_reduce(sums)
        curve.append((float(sums) / count, engine.update(LR)))
    return curve


def serial(family: str, pooling: str) -> list[tuple[float, ...]]:
    """One process, the whole batch in one micro-batch."""
    return run_ranks(curve_of, 1, embedder(family, pooling, parallel__zero=0, train__micro_batch=GLOBAL_BATCH))[
        0
    ]


@pytest.fixture(scope="module")
def whole() -> list[tuple[float, ...]]:
    return serial("bert", "mean")


@pytest.mark.parametrize(
    "name",
    ["z0", "dp2-z1", "dp2-z3", "tp2-z2", "tp2-sp-z1", "pp2-z1", "tp2-sp-pp2-z2", "tp2-dp2-z3", "pp2-vp2-z1"],
)
def test_a_layout_equals_one_process(whole, name):
    """Micro-batches of two: the vectors of all are found before any is taken back."""
    layout = parse_layout(name)
    assert relative_difference(run_ranks(curve_of, layout.processes, layout.of(embedder()))[0], whole) < 1e-5


@pytest.mark.parametrize(("family", "pooling"), [("llama", "last"), ("gpt2", "mean"), ("bert", "cls")])
def test_other_trunks_and_poolings(family, pooling):
    layout = parse_layout("tp2-sp-pp2-z1")
    many = run_ranks(curve_of, layout.processes, layout.of(embedder(family, pooling)))[0]
    assert relative_difference(many, serial(family, pooling)) < 1e-5


def _learn(run: RunConfig) -> list[float]:
    engine, fields, losses = make_engine(run), fields_of(0, partners=True), []
    count = float(fields["real"].sum())
    for step in range(20):
        processes.seed_step(run.run.seed, step, engine.runtime)
        losses.append(float(engine.forward_backward(cut(fields, 2), {"contrastive": count})) / count)
        engine.update(LR)
    return losses


def test_it_learns():
    losses = run_ranks(_learn, 1, embedder(model__temperature=TEMPERATURE))[0]
    assert losses[-1] < 0.2 * losses[0]


def test_two_passes_draw_the_same_dropout():
    """With dropout alone a text is its own partner: one micro-batch needs no first pass, and several do."""
    curves = [
        run_ranks(
            curve_of, 1, embedder(model__dropout=0.1, train__micro_batch=size, train__recompute=again), False
        )[0]
        for size, again in ((2, False), (2, True))
    ]
    assert relative_difference(*curves) < 1e-5
    assert curves[0][0][0] > 1e-3, "the two views would be the same"


def test_held_out_texts_that_are_their_own_partners_have_a_loss_alone():
    sums = {"contrastive": {"loss": 2.0, "accuracy": 3.0}}
    for pairs, shares in (("dropout", {}), ("given", {"contrastive_accuracy": 0.75})):
        found = held_out_loss(sums, {"contrastive": 4.0}, 10, TaskConfig(name="contrastive", pairs=pairs))
        assert (found.loss, found.shares) == (0.5, shares)


def test_pooling_by_its_definition():
    x_sbh, length = torch.randn(6, 2, 4), torch.tensor([[3], [6]])
    for how, expected in (
        ("mean", torch.stack((x_sbh[:3, 0].mean(0), x_sbh[:, 1].mean(0)))),
        ("cls", x_sbh[0]),
        ("last", torch.stack((x_sbh[2, 0], x_sbh[5, 1]))),
    ):
        assert torch.allclose(pooled(x_sbh, length, how), F.normalize(expected, dim=-1), atol=1e-6)
