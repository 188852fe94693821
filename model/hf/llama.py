"""The Llama family: transformers' LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from . import llama_like
from .llama_like import rows as rows

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"


def needed(config: ModelConfig) -> dict[str, object]:
    """Say what fields must be; the class takes no width that its heads do not divide, whatever their own."""
    heads = config.num_attention_heads
    return {**llama_like.STYLE, "hidden_size": -(-config.hidden_size // heads) * heads}


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """Say the shape in transformers' words."""
    return {**llama_like.hf_fields(config), "attention_bias": False, "mlp_bias": False}


def model_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Read the shape back; refuse a variant of Llama that ours is not."""
    biases = {name: (hf.get(name, False), False) for name in ("attention_bias", "mlp_bias")}
    # The first Llamas had no groups, and their files say nothing of any.
    return llama_like.read_fields("Llama", {"num_key_value_heads": None, **hf}, biases)
