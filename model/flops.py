"""Training FLOPs by closed form. Imports no torch.

Two FLOPs per multiply-add, matrix products only, backward = 2 x forward (Kaplan et al. 2020; Chowdhery et
al. 2022, appendix B). The causal convention counts half of a decoder's attention scores (Megatron-LM), the full one
all of them (PaLM); of attention in both directions all count. The embedding look-up counts nothing; the output product
counts once, tied or not.
"""

from __future__ import annotations

from typing import Literal

from .config import ModelConfig
from .families import family_of, layout_of
from .layout import layer_macs

Convention = Literal["causal", "full"]


def flops_per_token(config: ModelConfig, sequence_length: int, convention: Convention = "causal") -> float:
    """Count the FLOPs of forward and backward for one token at `sequence_length` tokens."""
    if (macs := family_of(config).macs) is not None:
        return 6.0 * macs(config, sequence_length)
    layer = layer_macs(config, sequence_length, share=_share(config, convention))
    head = config.hidden_size * config.padded_vocab_size if config.predicts_tokens else 0
    return 6.0 * (config.num_layers * layer + head)


def recomputed_flops_per_token(
    config: ModelConfig, sequence_length: int, convention: Convention = "causal"
) -> float:
    """Count what activation checkpointing adds for one token: each layer's forward once more.

    Its last product, too, which torch leaves out of its own linear layers; Megatron-core's are one function with it.
    """
    share = _share(config, convention)
    return 2.0 * config.num_layers * layer_macs(config, sequence_length, share=share)


def _share(config: ModelConfig, convention: Convention) -> float:
    """Give the share of a layer's attention scores that counts."""
    return 0.5 if convention == "causal" and config.causal else 1.0


def num_parameters(config: ModelConfig) -> int:
    """Count all parameters, with the padded vocabulary."""
    return sum(row.numel for row in layout_of(config).values())
