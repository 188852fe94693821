"""BERT's parameters and FLOPs. Imports no torch.

Around the layers stand `embed.*` with a norm of its own, and behind them the two heads: `transform.*`, `norm.*` and
`head.*` predict hidden tokens, `pooler.*` and `next_sentence.*` whether the second sentence follows.
"""

from __future__ import annotations

from ..config import ModelConfig
from ..layout import Macs, Parameter, layer_macs, layer_rows, norm_rows


def trunk_layout(config: ModelConfig) -> list[Parameter]:
    """List the parameters of the embedding and the layers, in the order of the forward pass."""
    hidden, vocab, std = config.hidden_size, config.padded_vocab_size, config.init_std
    rows = [
        Parameter("embed.word.weight", (vocab, hidden), "embedding", 0, init_std=std),
        Parameter("embed.position.weight", (config.max_sequence_length, hidden), "embedding", init_std=std),
    ]
    if config.num_segments:
        rows.append(Parameter("embed.segment.weight", (config.num_segments, hidden), "embedding", init_std=std))
    rows += norm_rows(config, "embed.norm.")
    for layer in range(config.num_layers):
        rows += layer_rows(config, f"layers.{layer}.")
    return rows


def bert_layout(config: ModelConfig) -> dict[str, Parameter]:
    """Make the table: global name -> Parameter, in the order of the forward pass."""
    rows, hidden, std = trunk_layout(config), config.hidden_size, config.init_std
    if not config.predicts_tokens:
        return {row.name: row for row in rows}
    if config.next_sentence:
        rows += linear_rows("pooler.", hidden, hidden, std) + linear_rows("next_sentence.", 2, hidden, std)
    rows += linear_rows("transform.", hidden, hidden, std) + norm_rows(config, "norm.")
    rows.append(Parameter("head.bias", (config.padded_vocab_size,), "bias", 0))
    return {row.name: row for row in rows}


def linear_rows(prefix: str, num_out: int, num_in: int, std: float) -> list[Parameter]:
    """List the weight and the bias of a linear layer that every rank holds whole."""
    return [
        Parameter(prefix + "weight", (num_out, num_in), "weight", init_std=std),
        Parameter(prefix + "bias", (num_out,), "bias"),
    ]


def bert_macs(config: ModelConfig, sequence_length: int, target_length: float, causal_share: float) -> Macs:
    """Count the multiply-adds of a forward for one token of a sequence, of which `target_length` are predicted.

    All scores count; the head over the vocabulary sees what is predicted.
    """
    hidden = config.hidden_size
    trunk = config.num_layers * layer_macs(config, sequence_length, share=1.0)
    if not config.predicts_tokens:
        return Macs(trunk, 0.0)
    heads = target_length * (hidden * hidden + hidden * config.padded_vocab_size)
    if config.next_sentence:
        heads += hidden * hidden + 2 * hidden
    return Macs(trunk, heads / sequence_length)
