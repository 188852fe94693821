"""The `[model]` section: presets against published sizes, what is derived, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from basestone.model.config import ModelConfig
from basestone.model.flops import num_parameters
from basestone.model.presets import FAMILIES, PRESETS

SHAPE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "max_sequence_length": 64}


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **changes})


def refusal(**changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        config(**changes)
    return str(caught.value)


# vocabulary, then the parameters as published (in millions) with the true vocabulary
PUBLISHED = {
    "gpt2-124m": (50257, 124.44),
    "gpt2-355m": (50257, 354.82),
    "gpt2-774m": (50257, 774.0),
    "gpt2-1.5b": (50257, 1557.6),
    "llama-1b": (128256, 1235.8),
    "llama-3b": (128256, 3212.7),
    "llama-8b": (128256, 8030.3),
    "llama2-7b": (32000, 6738.4),
    "llama2-13b": (32000, 13015.9),
    "llama-70b": (128256, 70553.7),
    "gpt3-2.7b": (50257, 2650.0),
    "gpt3-6.7b": (50257, 6660.0),
    "gpt3-13b": (50257, 12850.0),
    "llama-3.1-8b": (128256, 8030.261248),
    "llama-3.1-70b": (128256, 70553.706496),
    "llama-3.1-405b": (128256, 405853.3888),
    "llama-3.2-1b": (128256, 1235.8144),
    "llama-3.2-3b": (128256, 3212.749824),
    "mistral-7b-v0.3": (32768, 7248.023552),
    "qwen2.5-0.5b": (151936, 494.032768),
    "qwen2.5-1.5b": (151936, 1543.714304),
    "qwen2.5-3b": (151936, 3085.938688),
    "qwen2.5-7b": (152064, 7615.616512),
    "qwen3-0.6b": (151936, 596.04992),
    "qwen3-1.7b": (151936, 1720.574976),
    "qwen3-4b": (151936, 4022.468096),
    "qwen3-8b": (151936, 8190.73536),
    "qwen3-14b": (151936, 14768.3072),
    "qwen3-32b": (151936, 32762.123264),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(preset):
    vocab, millions = PUBLISHED[preset]
    made = ModelConfig(preset=preset, vocab_size=vocab, vocab_multiple=1)
    tolerance = 0.01 if preset.startswith("gpt3") else 1e-4  # the GPT-3 paper rounds
    assert num_parameters(made) / 1e6 == pytest.approx(millions, rel=tolerance)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_legal_shape(preset):
    made = ModelConfig(preset=preset, vocab_size=50257)
    assert made.preset == preset
    own = 64 if made.family == "t5" else 128
    assert made.head_dim == own or made.hidden_size == made.num_attention_heads * made.head_dim
    assert made.layout_problems(1) == []


def test_a_given_field_wins_over_the_preset_and_the_family():
    made = ModelConfig(preset="llama-8b", num_layers=3, tied=True, normalization="layernorm")
    assert (made.num_layers, made.tied, made.normalization) == (3, True, "layernorm")
    assert (made.hidden_size, made.rope_base, made.bias) == (4096, 5e5, False)
    assert ModelConfig(preset="llama-8b", family="gpt2").position == "learned"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_sets_the_style(family):
    made = config(family=family)
    assert {name: getattr(made, name) for name in FAMILIES[family]} == FAMILIES[family]


def test_the_default_family_is_llama():
    assert config() == config(family="llama")


@pytest.mark.parametrize(
    ("changes", "ffn"),
    [
        ({"family": "gpt2"}, 256),
        ({"family": "llama"}, 192),  # 8 * 64 / 3 = 170.7, up to a multiple of 64
        ({"family": "llama", "hidden_size": 96}, 256),  # exactly 256
        ({"family": "llama", "activation": "gelu"}, 256),
        ({"ffn_hidden_size": 100}, 100),
    ],
)
def test_the_width_of_the_mlp(changes, ffn):
    assert config(**changes).ffn_hidden_size == ffn


def test_groups_and_head_dim_follow_from_the_heads():
    made = config()
    assert (made.num_query_groups, made.head_dim) == (8, 8)
    assert config(num_attention_heads=7, head_dim=10).head_dim == 10


@pytest.mark.parametrize("preset", ["llama-1b", "llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_a_dumped_section_makes_the_same_section(preset):
    made = ModelConfig(preset=preset, vocab_size=1000)
    assert ModelConfig(**made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    ("vocab", "multiple", "padded"), [(1, 128, 128), (128, 128, 128), (129, 128, 256), (50257, 1, 50257)]
)
def test_the_vocabulary_is_padded_up(vocab, multiple, padded):
    assert config(vocab_size=vocab, vocab_multiple=multiple).padded_vocab_size == padded


def test_an_unknown_preset_is_refused():
    assert "preset: no preset is called 'gpt5'; there are bert-base" in refusal(preset="gpt5")


def test_heads_that_do_not_divide_the_width_are_refused():
    text = refusal(num_attention_heads=5)
    assert "num_attention_heads = 5 does not divide hidden_size = 64; choose heads that divide it" in text


def test_groups_that_do_not_divide_the_heads_are_refused():
    assert "num_query_groups must divide num_attention_heads (8), got 3" in refusal(num_query_groups=3)


SCALING = {
    "factor": 8.0,
    "low_frequency_factor": 1,
    "high_frequency_factor": 4,
    "original_max_sequence_length": 32,
}


def test_rope_scaling_is_a_table_of_four_numbers():
    made = config(rope_scaling=SCALING)
    assert made.rope_scaling is not None and made.rope_scaling.model_dump() == SCALING
    assert config().rope_scaling is None
    assert made != config(rope_scaling={**SCALING, "factor": 4})


@pytest.mark.parametrize("name", SCALING)
def test_each_number_of_rope_scaling_must_be_given(name):
    text = refusal(rope_scaling={key: value for key, value in SCALING.items() if key != name})
    assert f"rope_scaling.{name}\n  Field required" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"high_frequency_factor": 1}, "high_frequency_factor must be above low_frequency_factor (1), got 1"),
        ({"factor": 0.5}, "greater than or equal to 1"),
        ({"low_frequency_factor": 0}, "greater than 0"),
        ({"original_max_sequence_length": 32.5}, "valid integer"),
        ({"type": "yarn"}, "rope_scaling.type"),
        (
            {"original_max_sequence_length": 65},
            "rope_scaling.original_max_sequence_length = 65 exceeds max_sequence_length = 64; to train on shorter "
            "sequences, lower data.sequence_length instead",
        ),
    ],
)
def test_rope_scaling_that_makes_no_sense_is_refused(changes, message):
    assert message in refusal(rope_scaling={**SCALING, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": SCALING, "position": "learned"},
            "rope_scaling needs position = 'rope', got 'learned'; take it out, or change the position",
        ),
        (
            {"bias": True, "qkv_bias": True},
            "qkv_bias = true is for models without other biases; with bias = true, queries, keys and values have "
            "theirs: set qkv_bias to false",
        ),
        (
            {"qk_norm": True, "normalization": "layernorm"},
            "qk_norm = true is an RMSNorm and goes with normalization = 'rmsnorm' alone, got 'layernorm'; set either",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(changes, message):
    assert message in refusal(**changes)


def test_rope_needs_even_heads():
    assert "head_dim must be even for RoPE, got 7" in refusal(head_dim=7)
    assert config(head_dim=7, position="learned").head_dim == 7


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_attention_heads", "max_sequence_length"])
@pytest.mark.parametrize("value", [0, -1, "many", None])
def test_sizes_are_positive_integers(name, value):
    assert name in refusal(**{name: value})


def test_an_unknown_key_is_refused():
    assert "num_layer" in refusal(num_layer=3)


# ---- tensor parallel ----------------------------------------------------------------------------------------


def test_every_row_that_a_tensor_size_does_not_divide_is_named_with_the_legal_sizes():
    made = config(num_query_groups=2, ffn_hidden_size=60, vocab_size=100, vocab_multiple=100)
    assert made.layout_problems(8) == [
        "parallel.tensor = 8 does not divide model.num_query_groups = 2; legal values: [1, 2]",
        "parallel.tensor = 8 does not divide model.ffn_hidden_size = 60; "
        "legal values: [1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60]",
        "parallel.tensor = 8 does not divide the padded vocabulary 100; set model.vocab_multiple to a multiple of 8",
    ]
    assert made.layout_problems(3)[0] == (
        "parallel.tensor = 3 does not divide model.num_attention_heads = 8; legal values: [1, 2, 4, 8]"
    )
    assert made.layout_problems(2) == []


def test_the_vocabulary_is_not_judged_before_it_is_known():
    assert config(vocab_multiple=1).layout_problems(8) == []
    assert len(config(vocab_multiple=1, vocab_size=9).layout_problems(8)) == 1
