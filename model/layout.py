"""The parameter table: every parameter's global name, global shape, and how a rank's piece lies in it.

Checkpoints, Hugging Face adapters, initial weights, weight decay and memory estimates all read this table.
Imports no torch.

Names inside a layer are Megatron-core's; around it `embed.*`, `layers.<id>.*`, `norm.*`, `head.*`. Where there are two
trunks, the names of each one's own begin with it: `encoder.layers.<id>.*`.

Layouts worth knowing:
* `linear_qkv` holds, query group after query group, [the group's query heads | its key head | its value head],
  so a tensor-parallel piece is a plain slice of rows as long as the ranks divide the groups.
* a gated `linear_fc1` is [gate; up] globally, and [gate_r; up_r] on rank r: two parts, each cut over the ranks.
* the norms of query and key heads are whole on every rank, but see the rank's own heads alone.
* the vocabulary is padded to a fixed multiple, so its shape does not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .config import ModelConfig

Kind = Literal["embedding", "weight", "bias", "norm"]


@dataclass(frozen=True)
class Parameter:
    """One row of the table.

    `axis` is the tensor-parallel axis (None: every rank holds the whole), `parts` the number of equal blocks
    along it that are cut one by one, `init_std` the std of the initial normal draw (None: ones for a norm's
    weight, zeros for a bias). `per_head`: whole on every rank and applied to the rank's own heads alone, so that each
    rank's gradient is a part of a sum. `per_stage`: held by every pipeline stage that has layers of its trunk, each of
    which has a part of its gradient. `init_turns`: (rows, factor on `init_std`), which take turns along the first axis.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    axis: int | None = None
    parts: int = 1
    init_std: float | None = None
    per_head: bool = False
    per_stage: bool = False
    init_turns: tuple[tuple[int, float], ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def view2d(self) -> tuple[int, int]:
        """(rows, columns) of the two-dimensional view that boxes refer to; a vector is one column."""
        return self.shape[0], math.prod(self.shape[1:])

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape of one tensor-parallel rank's piece."""
        if self.axis is None:
            return self.shape
        return tuple(n // tp_size if i == self.axis else n for i, n in enumerate(self.shape))


TRUNK = ("embed.", "layers.", "encoder.", "decoder.")  # how the names of its parameters begin


class Macs(NamedTuple):
    """Multiply-adds of a forward for one token: all layers', and those of the heads behind them."""

    layers: float
    heads: float


class Box(NamedTuple):
    """A rectangle of a parameter's global 2-D view, stored row by row from `offset` in a flat fragment."""

    row: int
    col: int
    num_rows: int
    num_cols: int
    offset: int


def decoder_layout(config: ModelConfig) -> dict[str, Parameter]:
    """Make the table of a decoder: global name -> Parameter, in the order of the forward pass."""
    hidden, vocab = config.hidden_size, config.padded_vocab_size
    rows = [Parameter("embed.word.weight", (vocab, hidden), "embedding", 0, init_std=config.init_std)]
    if config.position == "learned":
        shape = (config.max_sequence_length, hidden)
        rows.append(Parameter("embed.position.weight", shape, "embedding", init_std=config.init_std))
    for layer in range(config.num_layers):
        rows += layer_rows(config, f"layers.{layer}.")
    rows += norm_rows(config, "norm.")
    if config.predicts_tokens and not config.tied:
        rows.append(Parameter("head.weight", (vocab, hidden), "weight", 0, init_std=config.init_std))
    return {row.name: row for row in rows}


def decoder_macs(config: ModelConfig, sequence_length: int, target_length: float, causal_share: float) -> Macs:
    """Count a decoder's multiply-adds; it has no targets of their own."""
    layer = layer_macs(config, sequence_length, share=causal_share)
    head = config.hidden_size * config.padded_vocab_size if config.predicts_tokens else 0
    return Macs(config.num_layers * layer, head)


def layer_rows(config: ModelConfig, prefix: str) -> list[Parameter]:
    """Make the rows of one layer, whose names begin with `prefix`."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    queries = config.num_attention_heads * config.head_dim
    qkv = queries + 2 * config.num_query_groups * config.head_dim
    gate = 2 if config.gated else 1
    std, post = config.init_std, config.norm_position == "post"
    # GPT-2, section 2.3; a post-norm layer normalises what has been added up.
    residual_std = std if post else std / math.sqrt(2 * config.num_layers)
    attention, mlp = prefix + "self_attention.", prefix + "mlp."
    rows = [
        *([] if post else norm_rows(config, prefix + "input_layernorm.")),
        Parameter(attention + "linear_qkv.weight", (qkv, hidden), "weight", 0, init_std=std),
        Parameter(attention + "linear_qkv.bias", (qkv,), "bias", 0),
        Parameter(attention + "q_layernorm.weight", (config.head_dim,), "norm", per_head=True),
        Parameter(attention + "k_layernorm.weight", (config.head_dim,), "norm", per_head=True),
        Parameter(attention + "linear_proj.weight", (hidden, queries), "weight", 1, init_std=residual_std),
        Parameter(attention + "linear_proj.bias", (hidden,), "bias"),
        *norm_rows(config, prefix + ("self_attn_bda.norm." if post else "pre_mlp_layernorm.")),
        Parameter(mlp + "linear_fc1.weight", (gate * ffn, hidden), "weight", 0, gate, init_std=std),
        Parameter(mlp + "linear_fc1.bias", (gate * ffn,), "bias", 0, gate),
        Parameter(mlp + "linear_fc2.weight", (hidden, ffn), "weight", 1, init_std=residual_std),
        Parameter(mlp + "linear_fc2.bias", (hidden,), "bias"),
        *(norm_rows(config, prefix + "mlp_bda.norm.") if post else []),
    ]
    return [row for row in rows if _is_in(config, row)]


def _is_in(config: ModelConfig, row: Parameter) -> bool:
    if row.per_head:
        return config.qk_norm
    if row.kind != "bias" or "norm." in row.name:
        return True
    return config.bias or (config.qkv_bias and "linear_qkv" in row.name)


def norm_rows(config: ModelConfig, prefix: str) -> list[Parameter]:
    """Make the rows of one norm over the residual stream."""
    rows = [Parameter(prefix + "weight", (config.hidden_size,), "norm")]
    if config.normalization == "layernorm":
        rows.append(Parameter(prefix + "bias", (config.hidden_size,), "bias"))
    return rows


def layer_macs(config: ModelConfig, sequence_length: float, *, share: float) -> float:
    """Count the multiply-adds of one layer's forward for one token; `share` is that of the scores that count."""
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_query_groups
    projections = hidden * heads * head_dim + 2 * hidden * groups * head_dim + heads * head_dim * hidden
    scores = share * 2 * heads * head_dim * sequence_length
    mlp = (3 if config.gated else 2) * hidden * config.ffn_hidden_size
    return projections + scores + mlp


def boxes(parameter: Parameter, tp_rank: int, tp_size: int, start: int, numel: int) -> Iterator[Box]:
    """Cut a flat range of one rank's piece into boxes of the parameter's global 2-D view.

    `start` and `numel` count elements of the piece in row-major order. Offsets in the boxes count from `start`.
    """
    rows, cols = parameter.view2d
    shard = parameter.axis is not None and tp_size > 1
    local_cols = cols // tp_size if shard and parameter.axis == 1 else cols
    first_col = tp_rank * local_cols if shard and parameter.axis == 1 else 0
    part_rows = rows // parameter.parts  # rows of one part, all ranks
    cut_rows = part_rows // tp_size if shard and parameter.axis == 0 else part_rows
    first_row = tp_rank * cut_rows if shard and parameter.axis == 0 else 0
    position, end = start, start + numel
    while position < end:
        local_row, col = divmod(position, local_cols)
        part, row_in_part = divmod(local_row, cut_rows)
        if col or end - position < local_cols:
            num_rows, num_cols = 1, min(local_cols - col, end - position)
        else:
            num_rows, num_cols = min((end - position) // local_cols, cut_rows - row_in_part), local_cols
        row = part * part_rows + first_row + row_in_part
        yield Box(row, first_col + col, num_rows, num_cols, position - start)
        position += num_rows * num_cols


def intersect(a: Box, b: Box) -> tuple[int, int, int, int] | None:
    """Give (row, col, num_rows, num_cols) of the part that two boxes share, or None."""
    row, col = max(a.row, b.row), max(a.col, b.col)
    last_row = min(a.row + a.num_rows, b.row + b.num_rows)
    last_col = min(a.col + a.num_cols, b.col + b.num_cols)
    if last_row <= row or last_col <= col:
        return None
    return row, col, last_row - row, last_col - col


def is_head(name: str) -> bool:
    """Tell whether a parameter stands behind the trunk: another model may have the same trunk and not this."""
    return not name.startswith(TRUNK)


def has_weight_decay(parameter: Parameter) -> bool:
    """Tell whether weight decay applies by default: matrices yes; norms, biases and embeddings no."""
    return parameter.kind == "weight"
