"""The Mistral family: transformers' MistralForCausalLM, with attention to the whole sequence."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from . import llama_like
from .llama_like import rows as rows

MODEL_TYPE = "mistral"
ARCHITECTURE = "MistralForCausalLM"
DEFAULT_WINDOW = 4096  # transformers', where config.json says nothing


def needed(config: ModelConfig) -> dict[str, object]:
    """Say what fields must be."""
    return llama_like.STYLE


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """Say the shape in transformers' words."""
    return {**llama_like.hf_fields(config), "sliding_window": None}


def model_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Read the shape back; refuse a window that a sequence would feel."""
    window = hf.get("sliding_window", DEFAULT_WINDOW)
    felt = window is not None and window < hf["max_position_embeddings"]
    return llama_like.read_fields("Mistral", hf, {"sliding_window": (window if felt else None, None)})
