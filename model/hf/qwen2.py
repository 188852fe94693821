"""The Qwen2 and Qwen2.5 family: transformers' Qwen2ForCausalLM, with biases of queries, keys and values alone."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from . import llama_like
from .llama_like import rows as rows

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"


def needed(config: ModelConfig) -> dict[str, object]:
    """Say what fields must be."""
    return {**llama_like.STYLE, "qkv_bias": True}


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """Say the shape in transformers' words: no layer attends through a window."""
    windows = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}
    return {**llama_like.hf_fields(config), **windows}


def model_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Read the shape back; refuse windows."""
    windows = {"use_sliding_window": (hf.get("use_sliding_window", False), False)}
    return llama_like.read_fields("Qwen2", hf, windows)
