"""Initial weights: the same in every layout, bit for bit, and distributed as they should be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basestone.model.config import ModelConfig
from basestone.model.families import layout_of
from basestone.model.initial import BLOCK, initial_piece
from basestone.model.layout import Parameter
from basestone.model.presets import FAMILIES

SEED = 7


def config(family: str) -> ModelConfig:
    return ModelConfig(
        family=family,
        num_layers=2,
        hidden_size=48,
        num_attention_heads=8,
        num_query_groups=8 if family == "t5" else 4,
        head_dim=10,  # 4 ranks get 40 rows of linear_qkv: blocks are cut in their midst
        ffn_hidden_size=100,
        max_sequence_length=16,
        vocab_size=300,
    )


def joined(parameter: Parameter, size: int, seed: int = SEED) -> torch.Tensor:
    """Put the ranks' pieces together again, part after part along the axis."""
    pieces = [initial_piece(parameter, seed, rank, size) for rank in range(size)]
    for piece in pieces:
        assert tuple(piece.shape) == parameter.local_shape(size) and piece.dtype == torch.float32
    if parameter.axis is None:
        assert all(torch.equal(piece, pieces[0]) for piece in pieces)
        return pieces[0]
    parts = [piece.chunk(parameter.parts, dim=parameter.axis) for piece in pieces]
    order = [part[index] for index in range(parameter.parts) for part in parts]
    return torch.cat(order, dim=parameter.axis)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [2, 4])
def test_pieces_make_the_same_tensor_in_every_layout(family, size):
    for parameter in layout_of(config(family)).values():
        whole = initial_piece(parameter, SEED, 0, 1)
        assert torch.equal(joined(parameter, size), whole), parameter.name


@settings(deadline=None)
@given(
    axis=st.sampled_from([0, 1]),
    size=st.sampled_from([2, 3, 4]),
    piece=st.integers(1, 2 * BLOCK + 1),
    parts=st.integers(1, 2),
    other=st.integers(1, 5),
)
def test_block_borders_do_not_show(axis, size, piece, parts, other):
    long = piece * size * parts
    shape = (long, other) if axis == 0 else (other, long)
    parameter = Parameter("p", shape, "weight", axis, parts, init_std=1.0)
    whole = joined(parameter, size)
    assert torch.equal(whole, initial_piece(parameter, SEED, 0, 1))
    assert torch.isfinite(whole).all() and whole.unique().numel() > 0.99 * whole.numel()  # no block twice


@pytest.mark.parametrize("axis", [0, 1, None])
def test_mean_and_std(axis):
    parameter = Parameter("w", (700, 300), "weight", axis, init_std=0.02)
    values = initial_piece(parameter, SEED, 0, 1).double()
    count = values.numel()
    assert abs(values.mean()) < 5 * 0.02 / math.sqrt(count)
    assert values.std() == pytest.approx(0.02, rel=5 / math.sqrt(2 * count))
    assert (values.abs() > 3 * 0.02).double().mean() == pytest.approx(0.0027, abs=0.0006)  # a normal's tails


def test_rows_columns_and_blocks_are_independent():
    values = initial_piece(Parameter("w", (4 * BLOCK, 400), "weight", 0, init_std=1.0), SEED, 0, 1)
    correlation = torch.corrcoef(values)
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(400)


def test_seeds_names_and_nothing_else_choose_the_values():
    def draw(name: str, seed: int) -> torch.Tensor:
        return initial_piece(Parameter(name, (BLOCK, 40), "weight", 0, init_std=1.0), seed, 0, 1)

    base = draw("layers.0.w", 1)
    assert torch.equal(base, draw("layers.0.w", 1))
    for other in (draw("layers.0.w", 2), draw("layers.1.w", 1)):
        assert abs(torch.corrcoef(torch.stack((base.ravel(), other.ravel())))[0, 1]) < 0.1
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(base, draw("layers.0.w", 1))  # torch's own generator plays no part


def test_drawing_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    initial_piece(Parameter("w", (100, 10), "weight", 0, init_std=1.0), SEED, 0, 1)
    assert torch.equal(torch.rand(4), expected)


def test_a_rank_draws_its_piece_and_little_more(monkeypatch):
    """Ranks of a wide model must not each draw the whole."""
    drawn = []
    empty = torch.empty

    def counted(*args, **kwargs):
        made = empty(*args, **kwargs)
        drawn.append(made.numel())
        return made

    monkeypatch.setattr(torch, "empty", counted)
    parameter = Parameter("w", (32 * BLOCK, 8), "weight", 0, init_std=1.0)
    piece = initial_piece(parameter, SEED, 3, 8)
    assert sum(drawn) == piece.numel()
    drawn.clear()
    initial_piece(
        Parameter("w", (30 * BLOCK, 8), "weight", 0, 2, init_std=1.0), SEED, 1, 4
    )  # ragged in both parts
    assert sum(drawn) <= 30 * BLOCK * 8 // 4 + 4 * BLOCK * 8


def test_norms_begin_at_one_and_biases_at_zero():
    for name, row in layout_of(config("gpt2")).items():
        if row.kind == "norm":
            assert (initial_piece(row, SEED, 0, 2) == 1).all(), name
        elif row.kind == "bias":
            assert (initial_piece(row, SEED, 0, 2) == 0).all(), name
        else:
            assert initial_piece(row, SEED, 0, 2).std() > 0, name
