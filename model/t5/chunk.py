"""T5 for any stage of a pipeline: an encoder and a decoder side by side, with relative positions and cross attention.

The pipeline cuts one row of layers, the encoder's and then the decoder's. From stage to stage goes one tensor: the
encoder's states and, behind them along the sequence, the decoder's.

Shapes: s inputs, t targets, b batch, h hidden, n heads of this rank, v vocabulary rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ..backend import backend_for
from ..config import ModelConfig
from ..layers import Embedding, StageChunk, drop_out, layer_spec, padding_mask, parts_of
from ..loss import Outcome
from ..pipeline import Chunk


def bucket_of(distances: Tensor, num_buckets: int, max_distance: int, *, both_ways: bool) -> Tensor:
    """Give the bucket of each distance, int64, key's place - query's (Raffel et al. 2020, section 2.1).

    Half of the buckets hold one distance each, the others logarithmically more, and the last all from `max_distance`
    on. Keys behind the query have buckets of their own where attention looks both ways, else they count as distance 0.
    """
    if both_ways:
        num_buckets //= 2
    behind = (distances > 0) * num_buckets if both_ways else 0
    near = distances.abs() if both_ways else (-distances).clamp(min=0)
    num_exact = num_buckets // 2
    growth = torch.log(near.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    far = (num_exact + (growth * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return torch.where(near < num_exact, near, far) + behind


class RelativePositions(nn.Module):
    """What attention adds to its scores: a learned number for each head and bucket of distances."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, *, both_ways: bool) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = model.relative_buckets, model.relative_max_distance
        self.both_ways = both_ways
        heads = model.num_attention_heads // parallel_state.get_tensor_model_parallel_world_size()
        device = "cpu" if config.use_cpu_initialization else "cuda"
        self.weight = nn.Parameter(
            torch.empty(self.num_buckets, heads, dtype=config.params_dtype, device=device)
        )

    def forward(self, mask: Tensor) -> Tensor:
        """Give the bias [b or 1, n, s, s], -inf where `mask`, bool [b or 1, 1, 1 or s, s], forbids attention."""
        places = torch.arange(mask.shape[-1], device=mask.device)
        buckets = bucket_of(
            places[None] - places[:, None], self.num_buckets, self.max_distance, both_ways=self.both_ways
        )
        bias_nss = F.embedding(buckets, self.weight).permute(2, 0, 1)
        return bias_nss.unsqueeze(0).masked_fill(mask, float("-inf"))


class Trunk(nn.Module):
    """A chunk's layers of the encoder or the decoder, their relative positions, and the norm behind the last layer."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, layers: nn.ModuleDict, *, encodes: bool, ends: bool
    ) -> None:
        super().__init__()
        self.relative = RelativePositions(model, config, both_ways=encodes)
        self.layers = layers
        self.norm: nn.Module | None = None
        if ends:
            norm = backend_for(model.backend).layer_norm(rms_norm=True)
            self.norm = norm(config=config, hidden_size=model.hidden_size, eps=model.norm_epsilon)


class T5(StageChunk):
    """One chunk of a T5: layers of the encoder, the decoder or both, the embedding in the first, the head in the last.

    Parameter names are, but for the trunks', the global names of `model/t5/layout.py`.
    """

    trunks: dict[str, Trunk]

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, chunk: Chunk, *, recompute: bool = False
    ) -> None:
        """Build the parts that `chunk` names."""
        super().__init__(model, config, chunk, recompute=recompute)
        if self.first:
            self.embed = Embedding(model, config, whole=True)
        border = model.num_layers
        # An attribute "decoder" would mean something to Megatron's schedules.
        self.trunks = nn.ModuleDict()  # type: ignore[assignment]
        for name, start, stop in (("encoder", 0, border), ("decoder", border, model.total_layers)):
            inside = range(max(chunk.layers.start, start), min(chunk.layers.stop, stop))
            if not inside:
                continue
            spec = layer_spec(model, config, AttnMaskType.no_mask, cross=name == "decoder")
            layers = self.build_layers(spec, range(inside.start - start, inside.stop - start), config)
            encodes, ends = name == "encoder", inside.stop == stop
            self.trunks[name] = Trunk(model, config, layers, encodes=encodes, ends=ends)
        if self.last:
            self.head = ColumnParallelLinear(
                model.hidden_size,
                model.padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
            )

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """See StageChunk."""
        yield from (part for part in parts_of(self) if part[0] != "trunks")
        for name, trunk in self.trunks.items():
            yield from parts_of(trunk, f"{name}.")

    def share(self, earlier: Sequence[StageChunk]) -> None:
        """Take the relative positions of a rank's earlier chunk, where both have layers of a trunk."""
        for chunk in earlier:
            assert isinstance(chunk, T5)
            for name, trunk in self.trunks.items():
                if name in chunk.trunks:
                    trunk.relative = chunk.trunks[name].relative

    def traced(self) -> Iterator[tuple[str, nn.Module]]:
        """See StageChunk; the embedding is not there, which runs once for each trunk."""
        for trunk, module in self.trunks.items():
            for number, layer in module.layers.items():
                yield f"{trunk} layer {number}", layer

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor] | dict[str, Outcome]:
        """Run the stage on `tokens` int64 [b, s], `length` [b, 1] of what is no padding, `decoder_tokens` [b, t].

        Returns [s + t, b, h] for the next stage; on the last stage `spans`: with `labels` [b, t] the loss of every
        target [b, t], without them the logits [b, t, v] of this rank's part of the padded vocabulary.
        """
        tokens_bs, targets_bt = batch["tokens"], batch["decoder_tokens"]
        if self.first:
            x_sbh, y_tbh = self.embed(tokens_bs), self.embed(targets_bt)
        else:
            assert self.received is not None, "the schedule hands a later stage its input"
            cut = parallel_state.get_tensor_model_parallel_world_size() if self.config.sequence_parallel else 1
            x_sbh, y_tbh = self.received.split((tokens_bs.shape[1] // cut, targets_bt.shape[1] // cut))
        padding = padding_mask(tokens_bs, batch.get("length"))
        if padding is None:
            padding = torch.zeros_like(tokens_bs, dtype=torch.bool)[:, None, None]
        if "encoder" in self.trunks:
            x_sbh = self._through(self.trunks["encoder"], x_sbh, padding)
        if "decoder" in self.trunks:
            later = torch.ones(
                targets_bt.shape[1], targets_bt.shape[1], dtype=torch.bool, device=targets_bt.device
            )
            y_tbh = self._through(
                self.trunks["decoder"], y_tbh, later.triu(1)[None, None], context=x_sbh, context_mask=padding
            )
        if not self.last:
            return torch.cat((x_sbh, y_tbh))
        logits_tbv, _ = self.head(y_tbh)
        return self._outcome(logits_tbv.transpose(0, 1), batch)

    def _through(self, trunk: Trunk, x_sbh: Tensor, mask: Tensor, **more: Tensor) -> Tensor:
        bias = trunk.relative(mask)
        x_sbh = self.run_layers(trunk.layers, x_sbh, None, attention_bias=bias, **more)
        return x_sbh if trunk.norm is None else drop_out(trunk.norm(x_sbh), self.config, self.training)

    def _outcome(
        self, logits_btv: Tensor, batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | dict[str, Outcome]:
        if (labels_bt := batch.get("labels")) is None:
            return {"spans": logits_btv}
        return {"spans": self.token_outcome(logits_btv, labels_bt)}
