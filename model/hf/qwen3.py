"""The Qwen3 family: transformers' Qwen3ForCausalLM, with a norm over each head of queries and keys."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from . import llama_like, qwen2
from .llama_like import rows as rows

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
DEFAULT_HEAD_DIM = 128  # transformers', where config.json says nothing


def needed(config: ModelConfig) -> dict[str, object]:
    """Say what fields must be."""
    return {**llama_like.STYLE, "qk_norm": True}


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """Say the shape in transformers' words; windows are spelt as in Qwen2."""
    return {**qwen2.hf_fields(config), "attention_bias": False}


def model_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Read the shape back; refuse windows, and biases of the attention."""
    refused = {name: (hf.get(name, False), False) for name in ("use_sliding_window", "attention_bias")}
    return llama_like.read_fields("Qwen3", {"head_dim": DEFAULT_HEAD_DIM, **hf}, refused)
