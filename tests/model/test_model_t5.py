"""T5's shape, its table of parameters, its initial weights and its buckets of distances."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from basestone.model.config import ModelConfig
from basestone.model.families import layout_of
from basestone.model.flops import num_parameters
from basestone.model.initial import initial_piece
from basestone.model.pipeline import chunks_of_ranks, held_by, pipeline_problems
from basestone.model.t5.chunk import bucket_of
from basestone.model.t5.config import PRESETS

# d_model, d_ff, layers, heads of google/t5-v1_1-small, -base, -large, -xl, -xxl
PUBLISHED = {
    "t5-small": (512, 1024, 8, 6),
    "t5-base": (768, 2048, 12, 12),
    "t5-large": (1024, 2816, 24, 16),
    "t5-3b": (2048, 5120, 24, 32),
    "t5-11b": (4096, 10240, 24, 64),
}
SHAPE = {
    "family": "t5",
    "num_layers": 3,
    "num_decoder_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "head_dim": 20,
    "ffn_hidden_size": 100,
    "max_sequence_length": 64,
    "vocab_size": 300,
    "vocab_multiple": 1,
}


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **changes})


def transformers_model(width: int, ffn: int, layers: tuple[int, int], heads: int, head_dim: int, vocab: int):
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocab,
            d_model=width,
            d_kv=head_dim,
            d_ff=ffn,
            num_layers=layers[0],
            num_decoder_layers=layers[1],
            num_heads=heads,
            feed_forward_proj="gated-gelu",
        )
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_parameters_of_transformers(preset):
    width, ffn, layers, heads = PUBLISHED[preset]
    made = ModelConfig(preset=preset, vocab_size=32128)
    with torch.device("meta"):
        model = transformers_model(width, ffn, (layers, layers), heads, 64, 32128)
    tied = 32128 * width  # transformers' count has the head once, with the embedding
    assert num_parameters(made) == sum(parameter.numel() for parameter in model.parameters()) + tied


def test_a_decoder_has_as_many_layers_as_the_encoder_unless_told():
    shape = {name: value for name, value in SHAPE.items() if name != "num_decoder_layers"}
    assert ModelConfig(**shape).num_decoder_layers == 3
    assert config().total_layers == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_decoder_layers": 0}, "num_decoder_layers = 0: a T5 has 1 at least"),
        (
            {"relative_max_distance": 16},
            "relative_max_distance must be above relative_buckets / 2 = 16, got 16",
        ),
        ({"relative_buckets": 30}, "relative_buckets"),
        ({"tied": True, "bias": True}, "bias, tied cannot be set so in family 't5'; take it out"),
        ({"num_query_groups": 2}, "num_query_groups cannot be set so in family 't5'"),
        ({"backend": "te"}, "backend cannot be set so in family 't5'"),
        ({"position": "rope"}, "position cannot be set so in family 't5'"),
        (
            {"family": "llama", "relative_buckets": 64},
            "num_decoder_layers, relative_buckets: for family 't5' alone, got 'llama'; take them out",
        ),
        (
            {"family": "llama", "num_decoder_layers": 0, "position": "relative"},
            "position = 'relative' is for family 't5'; take it out",
        ),
    ],
)
def test_what_t5_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        config(**changes)


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("num_buckets", "most"), [(32, 128), (16, 20), (64, 500), (4, 3)])
def test_buckets_are_those_of_transformers(both_ways, num_buckets, most):
    distances = torch.arange(-3000, 3001)
    theirs = T5Attention._relative_position_bucket(distances, both_ways, num_buckets, most)
    assert torch.equal(bucket_of(distances, num_buckets, most, both_ways=both_ways), theirs)


def test_initial_weights_are_spread_as_those_of_transformers():
    """But for the head, and in the sizes where a sample of them tells."""
    made = config(hidden_size=160, ffn_hidden_size=600, vocab_size=2000, head_dim=24)
    theirs = dict(transformers_model(160, 600, (3, 2), 4, 24, 2000).named_parameters())
    table = layout_of(made)

    def spread(name: str) -> torch.Tensor:
        return initial_piece(table[name], 1, 0, 1)

    qkv = spread("encoder.layers.1.self_attention.linear_qkv.weight").view(4, 3, 24, 160)
    kv = spread("decoder.layers.1.cross_attention.linear_kv.weight").view(4, 2, 24, 160)
    gate, up = spread("decoder.layers.0.mlp.linear_fc1.weight").chunk(2)
    own, cross = "encoder.block.1.layer.0.SelfAttention.", "decoder.block.1.layer.1.EncDecAttention."
    mlp = "decoder.block.0.layer.2.DenseReluDense."
    pairs = [
        (spread("embed.word.weight"), "shared.weight"),
        *((qkv[:, number], f"{own}{name}.weight") for number, name in enumerate("qkv")),
        (spread("encoder.layers.1.self_attention.linear_proj.weight"), own + "o.weight"),
        (spread("decoder.layers.1.cross_attention.linear_q.weight"), cross + "q.weight"),
        *((kv[:, number], f"{cross}{name}.weight") for number, name in enumerate("kv")),
        (spread("decoder.layers.1.cross_attention.linear_proj.weight"), cross + "o.weight"),
        (gate, mlp + "wi_0.weight"),
        (up, mlp + "wi_1.weight"),
        (spread("decoder.layers.0.mlp.linear_fc2.weight"), mlp + "wo.weight"),
    ]
    for mine, name in pairs:
        assert mine.std() == pytest.approx(float(theirs[name].detach().std()), rel=0.04), name
    assert spread("head.weight").std() == pytest.approx(160**-0.5, rel=0.02)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert spread("encoder.relative.weight").std() == pytest.approx(float(theirs[bias].detach().std()), rel=0.4)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_every_parameter_is_on_a_stage_and_relative_positions_where_their_layers_are(
    encoder, decoder, pipeline, virtual
):
    made = config(num_layers=encoder, num_decoder_layers=decoder)
    if pipeline_problems(made.total_layers, pipeline, virtual):
        return
    table, ranks = layout_of(made), chunks_of_ranks(made.total_layers, pipeline, virtual)
    held = [{row.name for row in held_by(table, chunks, tied=False)} for chunks in ranks]
    assert set().union(*held) == set(table)
    for (one, names), (other, more) in itertools.combinations(enumerate(held), 2):
        assert {name for name in names & more if not table[name].per_stage} == set(), (one, other)
    for chunks, names in zip(ranks, held, strict=True):
        numbers = {number for chunk in chunks for number in chunk.layers}
        assert ("encoder.relative.weight" in names) == (min(numbers) < encoder)
        assert ("decoder.relative.weight" in names) == (max(numbers) >= encoder)
        assert ("encoder.norm.weight" in names) == (encoder - 1 in numbers)
        assert (
            ("decoder.norm.weight" in names) == ("head.weight" in names) == (encoder + decoder - 1 in numbers)
        )


def test_a_pipeline_of_too_many_stages_names_both_keys():
    (problem,) = pipeline_problems(5, 6, key="model.num_layers + model.num_decoder_layers")
    assert problem == (
        "parallel.pipeline = 6 stages for model.num_layers + model.num_decoder_layers = 5; legal values: up to 5"
    )
