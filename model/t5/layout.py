"""T5's parameters and FLOPs. Imports no torch.

`encoder.*` and `decoder.*` are two trunks, each with its layers, its `relative.weight` and its `norm.weight`; both read
`embed.word.weight`, and `head.weight` stands behind the decoder. Cross attention has Megatron-core's names: `linear_q`
holds the query heads, `linear_kv` head after head [its key | its value].
"""

from __future__ import annotations

from ..config import ModelConfig
from ..layout import Macs, Parameter, layer_macs, norm_rows


def t5_layout(config: ModelConfig) -> dict[str, Parameter]:
    """Make the table: global name -> Parameter, in the order of the forward pass."""
    hidden, vocab, std = config.hidden_size, config.padded_vocab_size, config.init_std
    rows = [Parameter("embed.word.weight", (vocab, hidden), "embedding", 0, init_std=std)]
    for trunk, num_layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        shape = (config.relative_buckets, config.num_attention_heads)
        rows.append(
            Parameter(
                f"{trunk}.relative.weight",
                shape,
                "embedding",
                1,
                init_std=std * hidden**-0.5,
                per_stage=True,
            )
        )
        for layer in range(num_layers):
            rows += _layer_rows(config, f"{trunk}.layers.{layer}.", cross=trunk == "decoder")
        rows += norm_rows(config, f"{trunk}.norm.")
    # As in T5X. transformers' std of 1 begins at a loss of ten times ln(vocabulary) and more.
    rows.append(Parameter("head.weight", (vocab, hidden), "weight", 0, init_std=std * hidden**-0.5))
    return {row.name: row for row in rows}


def _layer_rows(config: ModelConfig, prefix: str, *, cross: bool) -> list[Parameter]:
    """Make the rows of one layer.

    The first values of queries are smaller by sqrt(head_dim), which T5's attention does not divide by (T5X, and
    transformers' T5PreTrainedModel).
    """
    hidden, ffn, width = config.hidden_size, config.ffn_hidden_size, config.head_dim
    heads, gate = config.num_attention_heads * width, 2 if config.gated else 1
    std = config.init_std * hidden**-0.5
    query_std, back_std = std * width**-0.5, config.init_std * heads**-0.5
    turns = ((width, width**-0.5), (2 * width, 1.0))
    attention, other, mlp = prefix + "self_attention.", prefix + "cross_attention.", prefix + "mlp."
    rows = [
        *norm_rows(config, prefix + "input_layernorm."),
        Parameter(
            attention + "linear_qkv.weight",
            (3 * heads, hidden),
            "weight",
            0,
            init_std=std,
            init_turns=turns,
        ),
        Parameter(attention + "linear_proj.weight", (hidden, heads), "weight", 1, init_std=back_std),
    ]
    if cross:
        rows += [
            *norm_rows(config, prefix + "pre_cross_attn_layernorm."),
            Parameter(other + "linear_q.weight", (heads, hidden), "weight", 0, init_std=query_std),
            Parameter(other + "linear_kv.weight", (2 * heads, hidden), "weight", 0, init_std=std),
            Parameter(other + "linear_proj.weight", (hidden, heads), "weight", 1, init_std=back_std),
        ]
    return [
        *rows,
        *norm_rows(config, prefix + "pre_mlp_layernorm."),
        Parameter(mlp + "linear_fc1.weight", (gate * ffn, hidden), "weight", 0, gate, init_std=std),
        Parameter(mlp + "linear_fc2.weight", (hidden, ffn), "weight", 1, init_std=config.init_std * ffn**-0.5),
    ]


def t5_macs(config: ModelConfig, sequence_length: int, target_length: float, causal_share: float) -> Macs:
    """Count the multiply-adds of a forward for one token of the inputs, those of the targets laid on them."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    targets = target_length / sequence_length
    encoder = layer_macs(config, sequence_length, share=1.0)
    cross_target = 2 * hidden * heads + 2 * heads * sequence_length
    decoder = targets * (layer_macs(config, target_length, share=causal_share) + cross_target)
    decoder += 2 * hidden * heads  # keys and values of the inputs, in every layer
    return Macs(
        layers=config.num_layers * encoder + config.num_decoder_layers * decoder,
        heads=targets * hidden * config.padded_vocab_size,
    )
