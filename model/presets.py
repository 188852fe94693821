"""Published sizes by name, and what makes a style: plain tables. Imports no torch.

Sources: GPT-2 (Radford et al. 2019, table 2), GPT-3 (Brown et al. 2020, table 2.1), Llama 2 (Touvron et
al. 2023), Llama 3 (Dubey et al. 2024, table 3); Llama 3.1 and 3.2, Mistral, Qwen2.5 and Qwen3: the config.json that
each was published with.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from .bert import config as bert
from .t5 import config as t5

_LLAMA: dict[str, Any] = {
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "position": "rope",
    "bias": False,
    "qkv_bias": False,
    "qk_norm": False,
    "tied": False,
}

# Families that are no decoders: each has a folder with its style, its sizes, and what its module cannot be.
SHAPES: dict[str, ModuleType] = {"bert": bert, "t5": t5}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "normalization": "layernorm",
        "activation": "gelu",
        "position": "learned",
        "bias": True,
        "qkv_bias": False,
        "qk_norm": False,
        "tied": True,
    },
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": {**_LLAMA, "qkv_bias": True},
    "qwen3": {**_LLAMA, "qk_norm": True},
    **{name: shape.STYLE for name, shape in SHAPES.items()},
}


def _gpt2(layers: int, hidden: int, heads: int, sequence: int = 1024) -> dict[str, Any]:
    return {
        "family": "gpt2",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "max_sequence_length": sequence,
    }


def _llama(
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    ffn: int,
    sequence: int,
    base: float,
    tied: bool = False,
) -> dict[str, Any]:
    return {
        "family": "llama",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": ffn,
        "max_sequence_length": sequence,
        "rope_base": base,
        "tied": tied,
    }


def _llama3(
    layers: int, hidden: int, heads: int, ffn: int, factor: float, tied: bool = False
) -> dict[str, Any]:
    """Give a Llama 3.1 or 3.2, whose RoPE was stretched from 8,192 to 131,072 tokens."""
    scaling = {
        "factor": factor,
        "low_frequency_factor": 1.0,
        "high_frequency_factor": 4.0,
        "original_max_sequence_length": 8192,
    }
    return {**_llama(layers, hidden, heads, 8, ffn, 131072, 5e5, tied), "rope_scaling": scaling}


def _qwen2(
    layers: int, hidden: int, heads: int, groups: int, ffn: int, sequence: int, tied: bool
) -> dict[str, Any]:
    shape = _llama(layers, hidden, heads, groups, ffn, sequence, 1e6, tied)
    return {**shape, "family": "qwen2", "norm_epsilon": 1e-6}


def _qwen3(layers: int, hidden: int, heads: int, ffn: int, tied: bool) -> dict[str, Any]:
    shape = _llama(layers, hidden, heads, 8, ffn, 40960, 1e6, tied)
    return {**shape, "family": "qwen3", "head_dim": 128, "norm_epsilon": 1e-6}


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-5m": _gpt2(6, 256, 8, 512),
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    "gpt3-2.7b": _gpt2(32, 2560, 32, 2048),
    "gpt3-6.7b": _gpt2(32, 4096, 32, 2048),
    "gpt3-13b": _gpt2(40, 5120, 40, 2048),
    "llama-7m": _llama(8, 256, 8, 4, 704, 512, 1e4),
    "llama-27m": _llama(6, 512, 8, 4, 1536, 512, 1e4),
    "llama-110m": _llama(12, 768, 12, 4, 2048, 1024, 1e4),
    "llama-1b": _llama(16, 2048, 32, 8, 8192, 8192, 5e5, tied=True),
    "llama-3b": _llama(28, 3072, 24, 8, 8192, 8192, 5e5, tied=True),
    "llama-8b": _llama(32, 4096, 32, 8, 14336, 8192, 5e5),
    "llama2-7b": _llama(32, 4096, 32, 32, 11008, 4096, 1e4),
    "llama2-13b": _llama(40, 5120, 40, 40, 13824, 4096, 1e4),
    "llama-70b": _llama(80, 8192, 64, 8, 28672, 8192, 5e5),
    "llama-3.1-8b": _llama3(32, 4096, 32, 14336, 8.0),
    "llama-3.1-70b": _llama3(80, 8192, 64, 28672, 8.0),
    "llama-3.1-405b": _llama3(126, 16384, 128, 53248, 8.0),
    "llama-3.2-1b": _llama3(16, 2048, 32, 8192, 32.0, tied=True),
    "llama-3.2-3b": _llama3(28, 3072, 24, 8192, 32.0, tied=True),
    "mistral-7b-v0.3": {**_llama(32, 4096, 32, 8, 14336, 32768, 1e6), "family": "mistral"},
    "qwen2.5-0.5b": _qwen2(24, 896, 14, 2, 4864, 32768, tied=True),
    "qwen2.5-1.5b": _qwen2(28, 1536, 12, 2, 8960, 131072, tied=True),
    "qwen2.5-3b": _qwen2(36, 2048, 16, 2, 11008, 32768, tied=True),
    "qwen2.5-7b": _qwen2(28, 3584, 28, 4, 18944, 131072, tied=False),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288, tied=False),
    "qwen3-14b": _qwen3(40, 5120, 40, 17408, tied=False),
    "qwen3-32b": _qwen3(64, 5120, 64, 25600, tied=False),
    **{name: preset for shape in SHAPES.values() for name, preset in shape.PRESETS.items()},
}
