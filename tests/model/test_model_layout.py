"""The parameter table against a slow computation of where every element of every rank lies."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basestone.model.config import ModelConfig
from basestone.model.families import layout_of
from basestone.model.layout import Box, Parameter, boxes, has_weight_decay, intersect
from basestone.model.presets import FAMILIES


def piece_of(parameter: Parameter, rank: int, size: int) -> np.ndarray:
    """Cut the global numbering of elements with numpy: part after part along the axis."""
    whole = np.arange(parameter.numel).reshape(parameter.shape)
    if parameter.axis is None:
        return whole
    parts = np.split(whole, parameter.parts, axis=parameter.axis)
    return np.concatenate(
        [np.split(part, size, axis=parameter.axis)[rank] for part in parts], axis=parameter.axis
    )


def elements(parameter: Parameter, rank: int, size: int, start: int, numel: int) -> np.ndarray:
    """Give the global element under each place of a flat range, as `boxes` says."""
    view = np.arange(parameter.numel).reshape(parameter.view2d)
    out = np.full(numel, -1)
    for box in boxes(parameter, rank, size, start, numel):
        assert box.num_rows > 0 and box.num_cols > 0
        part = view[box.row : box.row + box.num_rows, box.col : box.col + box.num_cols]
        assert part.shape == (box.num_rows, box.num_cols)  # inside the tensor
        place = out[box.offset : box.offset + part.size]
        assert (place == -1).all()  # no place twice
        place[:] = part.ravel()
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[Parameter, int, list[int]]:
    """Draw a parameter, the tensor-parallel ranks, and cuts of each rank's piece into fragments."""
    size = draw(st.sampled_from([1, 2, 3, 4]))
    axis = draw(st.sampled_from([None, 0, 1]))
    parts = draw(st.integers(1, 3)) if axis == 0 else 1
    vector = axis != 1 and draw(st.booleans())
    rows = draw(st.integers(1, 5)) * (size * parts if axis == 0 else 1)
    cols = draw(st.integers(1, 5)) * (size if axis == 1 else 1)
    shape = (rows,) if vector else (rows, cols)
    if not vector and draw(st.booleans()):
        shape = (*shape, draw(st.integers(1, 3)))
    parameter = Parameter("p", shape, "weight", axis, parts)
    local = parameter.numel // (size if axis is not None else 1)
    cuts = sorted(draw(st.sets(st.integers(0, local), max_size=6)) | {0, local})
    return parameter, size, cuts


@settings(deadline=None)
@given(cases())
def test_boxes_cover_every_element_once_and_agree_with_a_slow_computation(case):
    parameter, size, cuts = case
    seen = []
    for rank in range(size):
        piece = piece_of(parameter, rank, size)
        assert piece.shape == parameter.local_shape(size)
        for start, stop in pairwise(cuts):
            got = elements(parameter, rank, size, start, stop - start)
            assert got.tolist() == piece.ravel()[start:stop].tolist()
        seen.append(piece.ravel())
    # a replicated parameter is whole on every rank, a cut one once over all
    everything = np.concatenate(seen if parameter.axis is not None else seen[:1])
    assert sorted(everything.tolist()) == list(range(parameter.numel))


@settings(deadline=None)
@given(cases())
def test_boxes_are_few(case):
    """Two ragged ends and one body for each part: an index of a checkpoint stays small."""
    parameter, size, cuts = case
    for start, stop in pairwise(cuts):
        assert len(list(boxes(parameter, 0, size, start, stop - start))) <= parameter.parts + 2


def test_an_empty_range_has_no_box():
    assert list(boxes(Parameter("p", (4, 4), "weight", 0), 1, 2, 3, 0)) == []


def test_boxes_by_hand():
    parameter = Parameter("p", (4, 6), "weight", 1)
    # rank 1 of 2 has columns 3, 4, 5; its elements 2..8 are the end of row 0, row 1, row 2
    assert list(boxes(parameter, 1, 2, 2, 7)) == [Box(0, 5, 1, 1, 0), Box(1, 3, 2, 3, 1)]
    # elements 1..4: two ragged ends
    assert list(boxes(parameter, 0, 2, 1, 4)) == [Box(0, 1, 1, 2, 0), Box(1, 0, 1, 2, 2)]


RECTANGLES = st.builds(Box, *[st.integers(0, 6)] * 2, *[st.integers(1, 5)] * 2, st.just(0))


@settings(deadline=None)
@given(RECTANGLES, RECTANGLES)
def test_intersect_agrees_with_sets_of_cells(a, b):
    def cells(row: int, col: int, num_rows: int, num_cols: int) -> set[tuple[int, int]]:
        return {(row + i, col + j) for i in range(num_rows) for j in range(num_cols)}

    shared = intersect(a, b)
    assert shared == intersect(b, a)
    common = cells(*a[:4]) & cells(*b[:4])
    assert (cells(*shared) if shared else set()) == common
    assert (shared is None) == (not common)  # a touching edge is no share


# ---- the decoder's table ------------------------------------------------------------------------------------


def config(**changes: Any) -> ModelConfig:
    values = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 6,
        "ffn_hidden_size": 12,
        "max_sequence_length": 8,
        "vocab_size": 100,
    }
    return ModelConfig(**{**values, **changes})


def test_query_groups_stay_whole_on_a_rank():
    """A rank's piece of linear_qkv holds whole groups: [the group's queries | its key | its value]."""
    row = layout_of(config())["layers.0.self_attention.linear_qkv.weight"]
    group_rows = (4 // 2 + 2) * 6
    assert row.shape == (2 * group_rows, 16)
    for rank in range(2):
        got = elements(row, rank, 2, 0, row.numel // 2) // 16
        assert got.min() == rank * group_rows and got.max() == (rank + 1) * group_rows - 1


def test_gate_and_up_are_cut_one_by_one():
    row = layout_of(config())["layers.1.mlp.linear_fc1.weight"]
    assert (row.shape, row.parts) == ((24, 16), 2)
    rows = [sorted(set((elements(row, rank, 3, 0, row.numel // 3) // 16).tolist())) for rank in range(3)]
    assert rows == [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 16, 17, 18, 19], [8, 9, 10, 11, 20, 21, 22, 23]]


def test_a_plain_mlp_has_one_part():
    row = layout_of(config(family="gpt2"))["layers.1.mlp.linear_fc1.weight"]
    assert (row.shape, row.parts) == ((12, 16), 1)


def test_names_of_a_llama_table():
    names = list(layout_of(config(num_layers=1)))
    assert names == [
        "embed.word.weight",
        "layers.0.input_layernorm.weight",
        "layers.0.self_attention.linear_qkv.weight",
        "layers.0.self_attention.linear_proj.weight",
        "layers.0.pre_mlp_layernorm.weight",
        "layers.0.mlp.linear_fc1.weight",
        "layers.0.mlp.linear_fc2.weight",
        "norm.weight",
        "head.weight",
    ]


def test_a_gpt2_table_adds_positions_and_biases_and_ties_the_head():
    table = layout_of(config(family="gpt2", num_layers=1))
    assert table["embed.position.weight"].axis is None
    assert "head.weight" not in table
    layer = "layers.0."
    axes = {name.removeprefix(layer): row.axis for name, row in table.items() if name.endswith(".bias")}
    assert axes == {
        "input_layernorm.bias": None,
        "self_attention.linear_qkv.bias": 0,
        "self_attention.linear_proj.bias": None,  # added once, after the sum over ranks
        "pre_mlp_layernorm.bias": None,
        "mlp.linear_fc1.bias": 0,
        "mlp.linear_fc2.bias": None,
        "norm.bias": None,
    }


def test_qkv_biases_alone_lie_like_the_rows_of_their_weight():
    plain, table = (layout_of(config(family=family)) for family in ("llama", "qwen2"))
    added = [name for name in table if name not in plain]
    assert added == [f"layers.{layer}.self_attention.linear_qkv.bias" for layer in range(2)]
    bias, weight = table[added[0]], table[added[0].removesuffix("bias") + "weight"]
    assert (bias.shape, bias.axis, bias.per_head) == (weight.shape[:1], 0, False)


def test_norms_of_heads_are_whole_on_every_rank_and_see_its_own_heads():
    plain, table = (layout_of(config(family=family)) for family in ("llama", "qwen3"))
    added = {name: row for name, row in table.items() if name not in plain}
    assert list(added)[:2] == [f"layers.0.self_attention.{part}_layernorm.weight" for part in "qk"]
    assert all(
        (row.shape, row.axis, row.kind, row.per_head) == ((6,), None, "norm", True) for row in added.values()
    )
    assert not any(row.per_head for row in plain.values())


def test_weight_decay_falls_on_matrices_alone():
    table = layout_of(config(family="gpt2"))
    decayed = {name.rsplit(".", 2)[-2] for name, row in table.items() if has_weight_decay(row)}
    assert decayed == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert all(row.kind != "weight" or len(row.shape) == 2 for row in table.values())
    assert has_weight_decay(layout_of(config())["head.weight"])


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"t5"}))
def test_projections_into_the_residual_stream_start_smaller(family):
    table = layout_of(config(family=family, num_layers=8, init_std=0.04))
    for name, row in table.items():
        if row.kind in ("norm", "bias"):
            assert row.init_std is None
        elif "linear_proj" in name or "linear_fc2" in name:
            smaller = 0.04 if family == "bert" else 0.01  # 0.04 / sqrt(2 * 8), but in a post-norm layer
            assert row.init_std == pytest.approx(smaller)
        else:
            assert row.init_std == 0.04


@pytest.mark.parametrize("family", FAMILIES)
def test_legal_tensor_sizes_cut_every_row_evenly(family):
    made = config(family=family, num_query_groups=4 if family == "t5" else 2)
    for size in (1, 2):
        assert made.layout_problems(size) == []
        for row in layout_of(made).values():
            whole = np.prod(row.local_shape(size)) * (1 if row.axis is None else size)
            assert whole == row.numel
