"""transformers' T5ForConditionalGeneration, in the form of T5 1.1: a gate, and a head of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import ModelConfig
from ..hf.rules import Halves, QueryGroups, Row, Rule, Vocabulary, refuse_unless

MODEL_TYPE = "t5"
ARCHITECTURE = "T5ForConditionalGeneration"
TRUNKS = ("encoder.block", "decoder.block")
INPUTS = {"tokens": "input_ids", "decoder_tokens": "decoder_input_ids"}


@dataclass(frozen=True)
class KeysAndValues(Rule):
    """Rows of [the head's key | its value], head after head, against k and v."""

    num_heads: int

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give (k, v), each with its heads in order along the rows."""
        heads = tensor.reshape(self.num_heads, 2, -1, tensor.shape[1])
        return heads[:, 0].reshape(-1, tensor.shape[1]), heads[:, 1].reshape(-1, tensor.shape[1])

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Interleave k and v head by head."""
        heads = [part.reshape(self.num_heads, 1, -1, part.shape[1]) for part in parts]
        return torch.cat(heads, dim=1).reshape(-1, parts[0].shape[1])


def needed(config: ModelConfig) -> dict[str, object]:
    """Say what fields must be."""
    return {"position": "relative", "activation": "geglu"}


def rows(config: ModelConfig) -> list[Row]:
    """Make the table, in the order of the forward pass.

    transformers makes one weight of `shared` and `lm_head` unless it finds both in the directory, so both stand there.
    """
    assert config.vocab_size is not None
    vocabulary = Vocabulary(config.vocab_size, config.padded_vocab_size)
    table = [Row("embed.word.weight", ("shared.weight",), vocabulary)]
    for trunk, num_layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        bias = f"{trunk}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table.append(Row(f"{trunk}.relative.weight", (bias,), Rule()))
        for layer in range(num_layers):
            ours, theirs = f"{trunk}.layers.{layer}.", f"{trunk}.block.{layer}.layer."
            table += _layer_rows(config, ours, theirs, cross=trunk == "decoder")
        table.append(Row(f"{trunk}.norm.weight", (f"{trunk}.final_layer_norm.weight",), Rule()))
    table.append(Row("head.weight", ("lm_head.weight",), vocabulary))
    return table


def _layer_rows(config: ModelConfig, ours: str, theirs: str, *, cross: bool) -> list[Row]:
    num_heads = config.num_attention_heads
    heads = QueryGroups(num_heads, num_heads, config.head_dim)
    own, mlp = theirs + "0.", theirs + ("2." if cross else "1.")
    attention = own + "SelfAttention."
    table = [
        Row(ours + "input_layernorm.weight", (own + "layer_norm.weight",), Rule()),
        Row(
            ours + "self_attention.linear_qkv.weight",
            tuple(f"{attention}{part}.weight" for part in "qkv"),
            heads,
        ),
        Row(ours + "self_attention.linear_proj.weight", (attention + "o.weight",), Rule()),
    ]
    if cross:
        other = theirs + "1.EncDecAttention."
        table += [
            Row(ours + "pre_cross_attn_layernorm.weight", (theirs + "1.layer_norm.weight",), Rule()),
            Row(ours + "cross_attention.linear_q.weight", (other + "q.weight",), Rule()),
            Row(
                ours + "cross_attention.linear_kv.weight",
                (other + "k.weight", other + "v.weight"),
                KeysAndValues(num_heads),
            ),
            Row(ours + "cross_attention.linear_proj.weight", (other + "o.weight",), Rule()),
        ]
    gate = tuple(f"{mlp}DenseReluDense.{part}.weight" for part in ("wi_0", "wi_1"))
    return [
        *table,
        Row(ours + "pre_mlp_layernorm.weight", (mlp + "layer_norm.weight",), Rule()),
        Row(ours + "mlp.linear_fc1.weight", gate, Halves()),
        Row(ours + "mlp.linear_fc2.weight", (mlp + "DenseReluDense.wo.weight",), Rule()),
    ]


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """Say the shape in transformers' words."""
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_dim,
        "d_ff": config.ffn_hidden_size,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_attention_heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "n_positions": config.max_sequence_length,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_factor": config.init_std,
        "dropout_rate": config.dropout,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
    }


def model_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Read the shape back; refuse a variant of T5 that ours is not, such as the first, which shares its weights."""
    found = {
        "feed_forward_proj": hf.get("feed_forward_proj", "relu"),
        "tie_word_embeddings": hf.get("tie_word_embeddings", True),
        "is_encoder_decoder": hf.get("is_encoder_decoder", True),
        "quantization_config": hf.get("quantization_config"),
    }
    must_be = {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "is_encoder_decoder": True,
        "quantization_config": None,
    }
    refuse_unless("config.json describes a T5 that this package cannot hold", found, must_be)
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["d_model"],
        "head_dim": hf["d_kv"],
        "ffn_hidden_size": hf["d_ff"],
        "num_layers": hf["num_layers"],
        "num_decoder_layers": hf.get("num_decoder_layers") or hf["num_layers"],
        "num_attention_heads": hf["num_heads"],
        "relative_buckets": hf.get("relative_attention_num_buckets", 32),
        "relative_max_distance": hf.get("relative_attention_max_distance", 128),
        "max_sequence_length": hf.get("n_positions", 512),
        "norm_epsilon": hf.get("layer_norm_epsilon", 1e-6),
        "init_std": hf.get("initializer_factor", 1.0),
        "dropout": hf.get("dropout_rate", 0.1),
    }
