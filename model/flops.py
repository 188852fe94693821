"""Training FLOPs by closed form. Imports no torch.

Two FLOPs per multiply-add, matrix products only, backward = 2 x forward (Kaplan et al. 2020; Chowdhery et
al. 2022, appendix B). The causal convention counts half of the attention scores (Megatron-LM), the full one
all of them (PaLM). The embedding look-up counts nothing; the output product counts once, tied or not.
"""

from __future__ import annotations

from typing import Literal

from .config import ModelConfig
from .layout import decoder_layout

Convention = Literal["causal", "full"]


def decoder_flops_per_token(
    config: ModelConfig, sequence_length: int, convention: Convention = "causal"
) -> float:
    """Count the FLOPs of forward and backward for one token at `sequence_length` tokens."""
    layer = _layer_macs(config, sequence_length, convention)
    return 6.0 * (config.num_layers * layer + config.hidden_size * config.padded_vocab_size)


def recomputed_flops_per_token(
    config: ModelConfig, sequence_length: int, convention: Convention = "causal"
) -> float:
    """Count what activation checkpointing adds for one token: each layer's forward once more.

    Its last product, too, which torch leaves out of its own linear layers; Megatron-core's are one function with it.
    """
    return 2.0 * config.num_layers * _layer_macs(config, sequence_length, convention)


def _layer_macs(config: ModelConfig, sequence_length: int, convention: Convention) -> float:
    """Count the multiply-adds of one layer's forward for one token."""
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_query_groups
    projections = hidden * heads * head_dim + 2 * hidden * groups * head_dim + heads * head_dim * hidden
    share = 0.5 if convention == "causal" else 1.0
    scores = share * 2 * heads * head_dim * sequence_length
    mlp = (3 if config.activation == "swiglu" else 2) * hidden * config.ffn_hidden_size
    return projections + scores + mlp


def num_parameters(config: ModelConfig) -> int:
    """Count all parameters, with the padded vocabulary."""
    return sum(row.numel for row in decoder_layout(config).values())
