"""Published sizes by name, and what makes a style: plain tables. Imports no torch.

Sources: GPT-2 (Radford et al. 2019, table 2), GPT-3 (Brown et al. 2020, table 2.1), Llama 2 (Touvron et
al. 2023), Llama 3 (Dubey et al. 2024, table 3), Llama 3.2 (its model cards).
"""

from __future__ import annotations

from typing import Any

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "normalization": "layernorm",
        "activation": "gelu",
        "position": "learned",
        "bias": True,
        "tied": True,
    },
    "llama": {
        "normalization": "rmsnorm",
        "activation": "swiglu",
        "position": "rope",
        "bias": False,
        "tied": False,
    },
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
}
