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
from .layout import Macs

Convention = Literal["causal", "full"]


def flops_per_token(
    config: ModelConfig, sequence_length: int, convention: Convention = "causal", *, target_length: float = 0
) -> float:
    """Count the FLOPs of forward and backward for one token at `sequence_length` tokens.

    Where not every token is predicted, `target_length` are: the targets of an encoder-decoder, the hidden tokens of a
    BERT. What they take is laid on the tokens of the inputs.
    """
    return 6.0 * sum(_macs(config, sequence_length, convention, target_length))


def recomputed_flops_per_token(
    config: ModelConfig, sequence_length: int, convention: Convention = "causal", *, target_length: float = 0
) -> float:
    """Count what activation checkpointing adds for one token: each layer's forward once more.

    Its last product, too, which torch leaves out of its own linear layers; Megatron-core's are one function with it.
    """
    return 2.0 * _macs(config, sequence_length, convention, target_length).layers


def _macs(config: ModelConfig, sequence_length: int, convention: Convention, target_length: float) -> Macs:
    share = 0.5 if convention == "causal" else 1.0
    return family_of(config).macs(config, sequence_length, target_length, share)


def num_parameters(config: ModelConfig) -> int:
    """Count all parameters, with the padded vocabulary."""
    return sum(row.numel for row in layout_of(config).values())
