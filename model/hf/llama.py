"""The Llama family: transformers' LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from .rules import Halves, QueryGroups, Row, Rule, Vocabulary, refuse_unless

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"


def check(config: ModelConfig) -> None:
    """Refuse a model that LlamaForCausalLM cannot hold."""
    needed = {"normalization": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False}
    found = {name: getattr(config, name) for name in needed}
    refuse_unless(f"{ARCHITECTURE} cannot hold this model", found, needed)


def rows(config: ModelConfig) -> list[Row]:
    """Make the table, in the order of the forward pass."""
    assert config.vocab_size is not None
    vocabulary = Vocabulary(config.vocab_size, config.padded_vocab_size)
    heads = QueryGroups(config.num_attention_heads, config.num_query_groups, config.head_dim)
    table = [Row("embed.word.weight", ("model.embed_tokens.weight",), vocabulary)]
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        attention = theirs + "self_attn."
        mlp = theirs + "mlp."
        table += [
            Row(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",), Rule()),
            Row(
                ours + "self_attention.linear_qkv.weight",
                tuple(f"{attention}{part}_proj.weight" for part in "qkv"),
                heads,
            ),
            Row(ours + "self_attention.linear_proj.weight", (attention + "o_proj.weight",), Rule()),
            Row(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",), Rule()),
            Row(ours + "mlp.linear_fc1.weight", (mlp + "gate_proj.weight", mlp + "up_proj.weight"), Halves()),
            Row(ours + "mlp.linear_fc2.weight", (mlp + "down_proj.weight",), Rule()),
        ]
    table.append(Row("norm.weight", ("model.norm.weight",), Rule()))
    if not config.tied:
        table.append(Row("head.weight", ("lm_head.weight",), vocabulary))
    return table


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Say the shape in transformers' words; RoPE's base in the spelling of version 4 and of version 5."""
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
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied,
    }


def model_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Read the shape back; refuse a variant of Llama that ours is not."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    found = {
        "hidden_act": hf.get("hidden_act", "silu"),
        "attention_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
    }
    needed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_type": "default"}
    refuse_unless("config.json describes a Llama that this package cannot hold", found, needed)
    heads = hf["num_attention_heads"]
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "max_sequence_length": hf["max_position_embeddings"],
        "init_std": hf.get("initializer_range", 0.02),
        "norm_epsilon": hf["rms_norm_eps"],
        "rope_base": rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
        "dropout": hf.get("attention_dropout", 0.0),
        "tied": hf.get("tie_word_embeddings", False),
    }
