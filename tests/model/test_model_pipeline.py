"""Which layers and parameters a pipeline stage holds."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from basestone.model.config import ModelConfig
from basestone.model.families import layout_of
from basestone.model.layout import Parameter
from basestone.model.pipeline import Chunk, chunks_of_ranks, held_by, pipeline_problems, spread_layers


@pytest.mark.parametrize(
    ("num_layers", "num_chunks", "spread"),
    [
        (4, 1, (4,)),
        (4, 2, (2, 2)),
        (4, 4, (1, 1, 1, 1)),
        (5, 3, (2, 2, 1)),  # two too many: the middle has one, an end the other
        (7, 3, (2, 3, 2)),
        (6, 4, (1, 2, 2, 1)),
        (7, 4, (2, 2, 2, 1)),
        (22, 4, (5, 6, 6, 5)),
        (10, 8, (1, 1, 1, 2, 2, 1, 1, 1)),
    ],
)
def test_layers_are_spread_by_hand(num_layers, num_chunks, spread):
    assert spread_layers(num_layers, num_chunks) == spread


@given(st.integers(1, 200), st.integers(1, 64))
def test_layers_are_spread_evenly_and_the_ends_have_the_fewest(num_layers, num_chunks):
    assume(num_chunks <= num_layers)
    spread = spread_layers(num_layers, num_chunks)
    assert len(spread) == num_chunks and sum(spread) == num_layers
    assert min(spread) >= 1 and max(spread) - min(spread) <= 1
    most = [chunk for chunk, count in enumerate(spread) if count > min(spread)]
    assert most == list(range(min(most, default=0), max(most, default=-1) + 1)), "those in the middle"
    if most:
        assert abs(most[0] - (num_chunks - 1 - most[-1])) <= 1


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4))
def test_chunks_make_up_the_model_in_its_order(num_layers, pipeline, virtual):
    assume(pipeline * virtual <= num_layers)
    ranks = chunks_of_ranks(num_layers, pipeline, virtual)
    assert len(ranks) == pipeline and {len(chunks) for chunks in ranks} == {virtual}
    ordered = [ranks[chunk % pipeline][chunk // pipeline] for chunk in range(pipeline * virtual)]
    assert [layer for chunk in ordered for layer in chunk.layers] == list(range(num_layers))
    assert [chunk.first for chunk in ordered] == [True, *[False] * (len(ordered) - 1)]
    assert [chunk.last for chunk in ordered] == [*[False] * (len(ordered) - 1), True]
    assert ranks[0][0].first and ranks[-1][-1].last


def test_chunks_by_hand():
    assert chunks_of_ranks(3, 1) == [[Chunk(range(3), True, True)]]
    assert chunks_of_ranks(6, 2, 1, (4, 2)) == [
        [Chunk(range(4), True, False)],
        [Chunk(range(4, 6), False, True)],
    ]
    assert chunks_of_ranks(6, 2, 2, (1, 1, 3, 1)) == [
        [Chunk(range(1), True, False), Chunk(range(2, 5), False, False)],
        [Chunk(range(1, 2), False, False), Chunk(range(5, 6), False, True)],
    ]


@pytest.mark.parametrize("counts", [(4, 3), (2, 2, 2), ()])
def test_counts_that_do_not_fit_never_get_here(counts):
    if counts:
        with pytest.raises(AssertionError):
            chunks_of_ranks(6, 2, 1, counts)
    else:
        assert chunks_of_ranks(6, 2, 1, counts) == chunks_of_ranks(6, 2)


# ---- parameters ---------------------------------------------------------------------------------------------------


def table_of(family: str, tied: bool, num_layers: int = 4) -> dict[str, Parameter]:
    model = ModelConfig(
        family=family,
        num_layers=num_layers,
        hidden_size=64,
        num_attention_heads=4,
        max_sequence_length=64,
        vocab_size=200,
        tied=tied,
    )
    return layout_of(model)


def names(rows: Iterable[Parameter]) -> set[str]:
    return {row.name for row in rows}


@pytest.mark.parametrize("tied", [True, False])
def test_ends_hold_what_is_around_the_layers(tied):
    table = table_of("gpt2", tied)
    first, middle, last = (names(held_by(table, chunks, tied=tied)) for chunks in chunks_of_ranks(4, 3))
    embedding = {"embed.word.weight", "embed.position.weight"}
    head = {"norm.weight", "norm.bias"} | ({"embed.word.weight"} if tied else {"head.weight"})
    around = {name for name in table if not name.startswith("layers.")}
    assert (first & around, middle & around, last & around) == (embedding, set(), head)
    layers = [
        {int(name.split(".")[1]) for name in held if name.startswith("layers.")}
        for held in (first, middle, last)
    ]
    assert layers == [set(chunk.layers) for (chunk,) in chunks_of_ranks(4, 3)]


@settings(deadline=None)
@given(
    st.sampled_from(["llama", "gpt2"]), st.booleans(), st.integers(1, 12), st.integers(1, 4), st.integers(1, 3)
)
def test_every_parameter_is_held_once_and_a_tied_embedding_at_both_ends(
    family, tied, num_layers, pipeline, virtual
):
    assume(pipeline * virtual <= num_layers)
    table = table_of(family, tied, num_layers)
    held = [held_by(table, chunks, tied=tied) for chunks in chunks_of_ranks(num_layers, pipeline, virtual)]
    for rows in held:
        assert [row.name for row in rows] == [name for name in table if name in names(rows)], (
            "the table's order"
        )
    for name in table:
        holders = [rank for rank, rows in enumerate(held) if name in names(rows)]
        shared = tied and name == "embed.word.weight" and pipeline > 1
        assert holders == ([0, pipeline - 1] if shared else holders[:1]) and holders


def test_layers_are_told_by_their_whole_number():
    table = table_of("llama", False, 12)
    (second,) = [chunks for chunks in chunks_of_ranks(12, 2, 1, (1, 11)) if not chunks[0].first]
    held = names(held_by(table, second, tied=False))
    assert "layers.11.mlp.linear_fc1.weight" in held and "layers.1.mlp.linear_fc1.weight" in held
    assert not any(name.startswith("layers.0.") for name in held)


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        ((4, 1), []),
        ((4, 4), []),
        ((4, 2, 2), []),
        ((4, 2, 1, (3, 1)), []),
        ((4, 1, 1, (4,)), []),
        ((4, 5), ["parallel.pipeline = 5 stages for model.num_layers = 4; legal values: up to 4"]),
        (
            (4, 2, 3),
            [
                "parallel.pipeline x parallel.virtual_pipeline = 6 stages for model.num_layers = 4; "
                "legal values: up to 4"
            ],
        ),
        (
            (4, 1, 2),
            ["parallel.virtual_pipeline = 2 needs parallel.pipeline > 1; leave it out, or give both"],
        ),
        (
            (4, 1, 8),
            [
                "parallel.virtual_pipeline = 8 needs parallel.pipeline > 1; leave it out, or give both",
                "parallel.pipeline x parallel.virtual_pipeline = 8 stages for model.num_layers = 4; "
                "legal values: up to 4",
            ],
        ),
        (
            (4, 2, 1, (2, 1, 1)),
            [
                "parallel.pipeline_layers names 3 stages; parallel.pipeline x parallel.virtual_pipeline = "
                "2 are needed"
            ],
        ),
        ((4, 2, 1, (2, 3)), ["parallel.pipeline_layers adds up to 5 layers; model.num_layers = 4"]),
        (
            (4, 1, 3, (2, 3)),
            [
                "parallel.virtual_pipeline = 3 needs parallel.pipeline > 1; leave it out, or give both",
                "parallel.pipeline_layers names 2 stages; parallel.pipeline x parallel.virtual_pipeline = "
                "3 are needed",
                "parallel.pipeline_layers adds up to 5 layers; model.num_layers = 4",
            ],
        ),
    ],
)
def test_every_rule_says_what_is_wrong(arguments, problems):
    assert pipeline_problems(*arguments) == problems
