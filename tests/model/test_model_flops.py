"""The closed form of training FLOPs against torch's counter, on meta tensors and with eager attention.

Real CPU tensors would not do: the counter knows no flash attention for the CPU and counts it as nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from basestone.model.config import ModelConfig
from basestone.model.flops import flops_per_token, num_parameters

transformers = pytest.importorskip("transformers")

BATCH, SEQUENCE = 3, 40


def config(**changes: Any) -> ModelConfig:
    values = {
        "num_layers": 3,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "max_sequence_length": 64,
        "ffn_hidden_size": 200,
        "vocab_size": 250,
    }
    return ModelConfig(**{**values, **changes})


def hugging_face(made: ModelConfig) -> torch.nn.Module:
    """Make transformers' model of the same shape on the meta device."""
    shared = {
        "vocab_size": made.padded_vocab_size,
        "tie_word_embeddings": made.tied,
        "attn_implementation": "eager",
    }
    with torch.device("meta"):
        if made.family != "gpt2":
            kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[made.family]
            return getattr(transformers, f"{kind}ForCausalLM")(
                getattr(transformers, f"{kind}Config")(
                    hidden_size=made.hidden_size,
                    intermediate_size=made.ffn_hidden_size,
                    num_hidden_layers=made.num_layers,
                    num_attention_heads=made.num_attention_heads,
                    num_key_value_heads=made.num_query_groups,
                    head_dim=made.head_dim,
                    **shared,
                )
            )
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=made.hidden_size,
                n_inner=made.ffn_hidden_size,
                n_layer=made.num_layers,
                n_head=made.num_attention_heads,
                n_positions=made.max_sequence_length,
                **shared,
            )
        )


def counted(model: torch.nn.Module) -> float:
    """Count forward and backward by torch, for one token.

    Llama's table of angles is an outer product of positions and frequencies, which torch does as a matrix product:
    no work of the layers, and left out of the closed form.
    """
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    counts = counter.get_flop_counts()
    angles = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith(".rotary_emb"))
    return (counter.get_total_flops() - angles) / (BATCH * SEQUENCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "gpt2"},
        {
            "family": "gpt2",
            "num_layers": 1,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 256,
        },
        {"family": "llama"},
        {"family": "llama", "num_query_groups": 2},
        {"family": "llama", "num_query_groups": 1, "tied": True},
        {"family": "llama", "head_dim": 24, "num_query_groups": 3},
        {"family": "mistral", "head_dim": 24, "num_query_groups": 3},
        {"family": "qwen2", "num_query_groups": 2, "tied": True},
        {"family": "qwen3", "head_dim": 24, "num_query_groups": 2},
    ],
    ids=str,
)
def test_the_closed_form_equals_torchs_count(changes):
    made = config(**changes)
    model = hugging_face(made)
    assert counted(model) / flops_per_token(made, SEQUENCE, "full") == pytest.approx(1, abs=1e-6)
    # the shapes are the same ones, and so is the number of parameters
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(made)


def test_causal_counts_half_of_the_attention_scores():
    made = config()
    full, causal = (flops_per_token(made, SEQUENCE, how) for how in ("full", "causal"))
    # 2 FLOPs x 3 passes x (scores and values) x heads x head_dim x sequence x layers
    scores = 6 * 2 * 6 * 16 * SEQUENCE * 3
    assert full - causal == scores / 2
    assert flops_per_token(made, SEQUENCE) == causal


def test_six_per_parameter_for_a_large_model():
    """Kaplan et al. 2020: 6 N, where attention is small beside the matrices."""
    made = ModelConfig(preset="llama-70b", vocab_size=128256)
    embedding = made.padded_vocab_size * made.hidden_size
    assert flops_per_token(made, 128) == pytest.approx(6 * (num_parameters(made) - embedding), rel=0.002)
