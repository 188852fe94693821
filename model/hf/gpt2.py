"""The GPT-2 family: transformers' GPT2LMHeadModel."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from .rules import QueryGroups, Row, Rule, StackedHeads, Transposed, Vocabulary, refuse_unless

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"
DROPOUTS = ("attn_pdrop", "embd_pdrop")  # as ours, which has one number for all
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # transformers' two names of the tanh form


def needed(config: ModelConfig) -> dict[str, object]:
    """Say what fields must be."""
    return {
        "normalization": "layernorm",
        "activation": "gelu",
        "position": "learned",
        "bias": True,
        "num_query_groups": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }


def rows(config: ModelConfig) -> list[Row]:
    """Make the table, in the order of the forward pass."""
    assert config.vocab_size is not None
    vocabulary = Vocabulary(config.vocab_size, config.padded_vocab_size)
    heads = QueryGroups(config.num_attention_heads, config.num_query_groups, config.head_dim)
    table = [
        Row("embed.word.weight", ("transformer.wte.weight",), vocabulary),
        Row("embed.position.weight", ("transformer.wpe.weight",), Rule()),
    ]
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"transformer.h.{layer}."
        for source, target, rule in (
            ("input_layernorm.weight", "ln_1.weight", Rule()),
            ("input_layernorm.bias", "ln_1.bias", Rule()),
            ("self_attention.linear_qkv.weight", "attn.c_attn.weight", StackedHeads(heads)),
            ("self_attention.linear_qkv.bias", "attn.c_attn.bias", StackedHeads(heads)),
            ("self_attention.linear_proj.weight", "attn.c_proj.weight", Transposed()),
            ("self_attention.linear_proj.bias", "attn.c_proj.bias", Rule()),
            ("pre_mlp_layernorm.weight", "ln_2.weight", Rule()),
            ("pre_mlp_layernorm.bias", "ln_2.bias", Rule()),
            ("mlp.linear_fc1.weight", "mlp.c_fc.weight", Transposed()),
            ("mlp.linear_fc1.bias", "mlp.c_fc.bias", Rule()),
            ("mlp.linear_fc2.weight", "mlp.c_proj.weight", Transposed()),
            ("mlp.linear_fc2.bias", "mlp.c_proj.bias", Rule()),
        ):
            table.append(Row(ours + source, (theirs + target,), rule))
    table.append(Row("norm.weight", ("transformer.ln_f.weight",), Rule()))
    table.append(Row("norm.bias", ("transformer.ln_f.bias",), Rule()))
    if not config.tied:
        table.append(Row("head.weight", ("lm_head.weight",), vocabulary))
    return table


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """Say the shape in transformers' words."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_sequence_length,
        "n_ctx": config.max_sequence_length,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_hidden_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_range": config.init_std,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": config.tied,
    }


def model_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Read the shape back; refuse a variant of GPT-2 that ours is not."""
    found = {
        "activation_function": hf.get("activation_function", "gelu_new"),
        "scale_attn_weights": hf.get("scale_attn_weights", True),
        "scale_attn_by_inverse_layer_idx": hf.get("scale_attn_by_inverse_layer_idx", False),
        "add_cross_attention": hf.get("add_cross_attention", False),
        "quantization_config": hf.get("quantization_config"),
        "is_causal": hf.get("is_causal", True),
        **{name: hf.get(name, 0.1) for name in DROPOUTS},
    }
    needed = {
        "activation_function": TANH_GELU,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "quantization_config": None,
        "is_causal": True,
        **dict.fromkeys(DROPOUTS, hf.get("resid_pdrop", 0.1)),
    }
    refuse_unless("config.json describes a GPT-2 that this package cannot hold", found, needed)
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["n_embd"],
        "ffn_hidden_size": hf.get("n_inner") or 4 * hf["n_embd"],
        "num_layers": hf["n_layer"],
        "num_attention_heads": hf["n_head"],
        "max_sequence_length": hf["n_positions"],
        "init_std": hf.get("initializer_range", 0.02),
        "norm_epsilon": hf.get("layer_norm_epsilon", 1e-5),
        "dropout": hf.get("resid_pdrop", 0.1),
        "tied": hf.get("tie_word_embeddings", True),
    }
