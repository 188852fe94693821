"""transformers' BertForPreTraining, and BertForMaskedLM for a model without next sentences."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from ..hf.rules import QueryGroups, Row, Rule, Vocabulary, refuse_unless

MODEL_TYPE = "bert"
PRE_TRAINING, MASKED_LM = "BertForPreTraining", "BertForMaskedLM"
INPUTS = {"tokens": "input_ids", "segments": "token_type_ids"}
OUTPUTS = {PRE_TRAINING: ("prediction_logits", "seq_relationship_logits"), MASKED_LM: ("logits",)}
LINEAR = ("weight", "bias")


def needed(config: ModelConfig, architecture: str) -> dict[str, object]:
    """Say what fields must be."""
    return {
        "normalization": "layernorm",
        "activation": ("gelu", "gelu_erf"),
        "position": "learned",
        "bias": True,
        "num_query_groups": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "next_sentence": architecture == PRE_TRAINING,
    }


def trunk_rows(config: ModelConfig, trunk: str) -> list[Row]:
    """List the rows of the embedding and the layers; `trunk` is what the class calls its encoder."""
    assert config.vocab_size is not None
    vocabulary = Vocabulary(config.vocab_size, config.padded_vocab_size)
    heads = QueryGroups(config.num_attention_heads, config.num_query_groups, config.head_dim)
    embeddings = f"{trunk}.embeddings."
    table = [
        Row("embed.word.weight", (embeddings + "word_embeddings.weight",), vocabulary),
        Row("embed.position.weight", (embeddings + "position_embeddings.weight",), Rule()),
        Row("embed.segment.weight", (embeddings + "token_type_embeddings.weight",), Rule()),
        *same("embed.norm", embeddings + "LayerNorm"),
    ]
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"{trunk}.encoder.layer.{layer}."
        for kind in LINEAR:
            qkv = tuple(f"{theirs}attention.self.{part}.{kind}" for part in ("query", "key", "value"))
            table.append(Row(f"{ours}self_attention.linear_qkv.{kind}", qkv, heads))
        for source, target in (
            ("self_attention.linear_proj", "attention.output.dense"),
            ("self_attn_bda.norm", "attention.output.LayerNorm"),
            ("mlp.linear_fc1", "intermediate.dense"),
            ("mlp.linear_fc2", "output.dense"),
            ("mlp_bda.norm", "output.LayerNorm"),
        ):
            table += same(ours + source, theirs + target)
    return table


def rows(config: ModelConfig) -> list[Row]:
    """Make the table, in the order of the forward pass."""
    assert config.vocab_size is not None
    vocabulary = Vocabulary(config.vocab_size, config.padded_vocab_size)
    table = trunk_rows(config, "bert")
    if config.next_sentence:
        table += same("pooler", "bert.pooler.dense") + same("next_sentence", "cls.seq_relationship")
    table += same("transform", "cls.predictions.transform.dense")
    table += same("norm", "cls.predictions.transform.LayerNorm")
    table.append(Row("head.bias", ("cls.predictions.bias",), vocabulary))
    return table


def same(ours: str, theirs: str) -> list[Row]:
    """Give the rows of a linear layer or a norm, which are the same on both sides."""
    return [Row(f"{ours}.{kind}", (f"{theirs}.{kind}",), Rule()) for kind in LINEAR]


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """Say the shape in transformers' words."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size,
        "hidden_act": "gelu" if config.activation == "gelu_erf" else "gelu_new",
        "max_position_embeddings": config.max_sequence_length,
        "type_vocab_size": config.num_segments,
        "layer_norm_eps": config.norm_epsilon,
        "initializer_range": config.init_std,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": config.tied,
    }


def model_fields(hf: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Read the shape back; refuse a variant of BERT that ours is not."""
    dropout = hf.get("hidden_dropout_prob", 0.1)
    found = {
        "hidden_act": hf.get("hidden_act", "gelu"),
        "position_embedding_type": hf.get("position_embedding_type", "absolute"),
        "attention_probs_dropout_prob": hf.get("attention_probs_dropout_prob", 0.1),
        "is_decoder": hf.get("is_decoder", False),
        "add_cross_attention": hf.get("add_cross_attention", False),
        "chunk_size_feed_forward": hf.get("chunk_size_feed_forward", 0),
        "quantization_config": hf.get("quantization_config"),
    }
    must_be = {
        "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
        "position_embedding_type": "absolute",
        "attention_probs_dropout_prob": dropout,
        "is_decoder": False,
        "add_cross_attention": False,
        "chunk_size_feed_forward": 0,
        "quantization_config": None,
    }
    refuse_unless("config.json describes a BERT that this package cannot hold", found, must_be)
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_attention_heads": hf["num_attention_heads"],
        "max_sequence_length": hf["max_position_embeddings"],
        "num_segments": hf.get("type_vocab_size", 2),
        "activation": "gelu_erf" if found["hidden_act"] == "gelu" else "gelu",
        "norm_epsilon": hf.get("layer_norm_eps", 1e-12),
        "init_std": hf.get("initializer_range", 0.02),
        "dropout": dropout,
        "tied": hf.get("tie_word_embeddings", True),
        "next_sentence": architecture == PRE_TRAINING,
    }
