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
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_query_groups
    projections = hidden * heads * head_dim + 2 * hidden * groups * head_dim + heads * head_dim * hidden
    share = 0.5 if convention == "causal" else 1.0
    scores = share * 2 * heads * head_dim * sequence_length
    mlp = (3 if config.activation == "swiglu" else 2) * hidden * config.ffn_hidden_size
    layers = config.num_layers * (projections + scores + mlp)
    return 6.0 * (layers + hidden * config.padded_vocab_size)


def num_parameters(config: ModelConfig) -> int:
    """Count all parameters, with the padded vocabulary."""
    return sum(row.numel for row in decoder_layout(config).values())
