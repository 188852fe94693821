"""RoPE's frequencies are transformers' own, to the last bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basestone.model.config import ModelConfig
from basestone.model.decoder import rotary_embedding
from basestone.model.presets import PRESETS

transformers = pytest.importorskip("transformers")


def theirs(model: ModelConfig) -> torch.Tensor:
    """Compute the inverse frequencies by transformers' functions alone."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = model.rope_scaling
    parameters = {"rope_type": "default", "rope_theta": model.rope_base}
    if scaling is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_sequence_length,
        }
    config = transformers.LlamaConfig(
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_sequence_length,
        rope_parameters=parameters,
    )
    if scaling is None:
        return transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    frequencies, factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert factor == 1
    return frequencies


@pytest.mark.parametrize("preset", [name for name, values in PRESETS.items() if "rope_base" in values])
def test_a_presets_frequencies_are_transformers(preset):
    model = ModelConfig(preset=preset)
    ours = rotary_embedding(model).inv_freq
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs(model))


@settings(deadline=None, max_examples=40)
@given(
    half=st.integers(1, 64),
    base=st.floats(100, 1e7),
    factor=st.floats(1, 64),
    low=st.floats(0.1, 4),
    width=st.floats(0.1, 8),
    original=st.integers(8, 8192),
)
def test_any_scaling_is_transformers(half, base, factor, low, width, original):
    model = ModelConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        head_dim=2 * half,
        max_sequence_length=8192,
        rope_base=base,
        rope_scaling={
            "factor": factor,
            "low_frequency_factor": low,
            "high_frequency_factor": low + width,
            "original_max_sequence_length": original,
        },
    )
    assert torch.equal(rotary_embedding(model).inv_freq, theirs(model))


def test_each_of_the_four_numbers_counts():
    def frequencies(**changes: float) -> torch.Tensor:
        return rotary_embedding(ModelConfig(**{**base, "rope_scaling": {**scaling, **changes}})).inv_freq

    base = ModelConfig(preset="llama-3.2-1b").model_dump()
    scaling = base["rope_scaling"]
    published = frequencies()
    assert not torch.equal(published, rotary_embedding(ModelConfig(preset="llama-1b")).inv_freq)
    for name, value in scaling.items():
        assert not torch.equal(published, frequencies(**{name: 2 * value})), name
