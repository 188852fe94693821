"""What Llama and its kin share: the table of their tensors, and the fields of their config.json."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from ..presets import FAMILIES
from . import rope
from .rules import Halves, QueryGroups, Row, Rule, Vocabulary, refuse_unless

# What the class fixes; the head may be tied or not.
STYLE: dict[str, object] = {name: value for name, value in FAMILIES["llama"].items() if name != "tied"}


def rows(config: ModelConfig) -> list[Row]:
    """Make the table, in the order of the forward pass."""
    assert config.vocab_size is not None
    vocabulary = Vocabulary(config.vocab_size, config.padded_vocab_size)
    table = [Row("embed.word.weight", ("model.embed_tokens.weight",), vocabulary)]
    for layer in range(config.num_layers):
        table += _layer_rows(config, f"layers.{layer}.", f"model.layers.{layer}.")
    table.append(Row("norm.weight", ("model.norm.weight",), Rule()))
    if not config.tied:
        table.append(Row("head.weight", ("lm_head.weight",), vocabulary))
    return table


def _layer_rows(config: ModelConfig, ours: str, theirs: str) -> list[Row]:
    heads = QueryGroups(config.num_attention_heads, config.num_query_groups, config.head_dim)
    attention, mlp = theirs + "self_attn.", theirs + "mlp."
    qkv = ours + "self_attention.linear_qkv."
    table = [
        Row(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",), Rule()),
        Row(qkv + "weight", tuple(f"{attention}{part}_proj.weight" for part in "qkv"), heads),
    ]
    if config.qkv_bias:
        table.append(Row(qkv + "bias", tuple(f"{attention}{part}_proj.bias" for part in "qkv"), heads))
    if config.qk_norm:
        table += [
            Row(f"{ours}self_attention.{part}_layernorm.weight", (f"{attention}{part}_norm.weight",), Rule())
            for part in "qk"
        ]
    return [
        *table,
        Row(ours + "self_attention.linear_proj.weight", (attention + "o_proj.weight",), Rule()),
        Row(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",), Rule()),
        Row(ours + "mlp.linear_fc1.weight", (mlp + "gate_proj.weight", mlp + "up_proj.weight"), Halves()),
        Row(ours + "mlp.linear_fc2.weight", (mlp + "down_proj.weight",), Rule()),
    ]


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """Say the shape in transformers' words; RoPE in the spelling of version 4 and of version 5."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_epsilon,
        **rope.to_hf(config),
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied,
    }


def read_fields(kind: str, hf: dict[str, Any], refused_unless: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Read the shape of a model called `kind`; refuse by name what these models are not.

    Args:
        refused_unless: more fields of config.json, each with (what it says, what it must say).
    """
    subject = f"config.json describes a {kind} that this package cannot hold"
    layers = set(hf.get("layer_types") or ())
    said = {
        "hidden_act": (hf.get("hidden_act", "silu"), "silu"),
        "partial_rotary_factor": (hf.get("partial_rotary_factor", 1.0), 1.0),
        "layer_types": (sorted(layers | {"full_attention"}), ["full_attention"]),
        "quantization_config": (hf.get("quantization_config"), None),
        "is_causal": (hf.get("is_causal", True), True),
        **refused_unless,
    }
    found, needed = ({name: pair[side] for name, pair in said.items()} for side in (0, 1))
    refuse_unless(subject, found, needed)
    heads = hf["num_attention_heads"]
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_query_groups": hf["num_key_value_heads"] or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "max_sequence_length": hf["max_position_embeddings"],
        "init_std": hf.get("initializer_range", 0.02),
        "norm_epsilon": hf["rms_norm_eps"],
        **rope.from_hf(hf, subject),
        "dropout": hf.get("attention_dropout", 0.0),
        "tied": hf.get("tie_word_embeddings", False),
    }
