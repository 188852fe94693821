"""The decoder: Megatron-core layers between our embedding and our head, for any stage of a pipeline.

Shapes: s sequence, b batch, h hidden, v vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from .backend import backend_for
from .config import ModelConfig
from .layers import Embedding, StageChunk, layer_spec
from .loss import Outcome
from .pipeline import Chunk


def rotary_embedding(model: ModelConfig) -> RotaryEmbedding:
    """Make the table of RoPE's angles, with the frequencies of `model.rope_scaling`, fp32."""
    rotary = RotaryEmbedding(
        model.head_dim,
        rotary_percent=1.0,
        rotary_base=model.rope_base,  # type: ignore[arg-type]
        use_cpu_initialization=True,
    )
    if (scaling := model.rope_scaling) is not None:
        # The constructor takes the factor alone; the method takes all four numbers.
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            scaling.factor,
            scaling.low_frequency_factor,
            scaling.high_frequency_factor,
            scaling.original_max_sequence_length,
        )
    return rotary


class Decoder(StageChunk):
    """One chunk of a decoder: its layers, the embedding in the first, norm and head in the last.

    Parameter names are the global names of `model/layout.py`.
    """

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, chunk: Chunk, *, recompute: bool = False
    ) -> None:
        """Build the parts that `chunk` names."""
        super().__init__(model, config, chunk, recompute=recompute)
        if self.first or (self.last and model.tied_head):  # a tied head has a copy of the word embedding
            self.embed = Embedding(model, config, whole=self.first)
        self.rotary = rotary_embedding(model) if model.position == "rope" else None
        self.layers = self.build_layers(layer_spec(model, config, AttnMaskType.causal), chunk.layers, config)
        if self.last:
            norm = backend_for(model.backend).layer_norm(rms_norm=model.normalization == "rmsnorm")
            self.norm = norm(config=config, hidden_size=model.hidden_size, eps=model.norm_epsilon)
        if self.last and model.predicts_tokens:
            self.head = ColumnParallelLinear(
                model.hidden_size,
                model.padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=model.tied,
            )

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor] | dict[str, Outcome]:
        """Run the stage on `tokens` int64 [b, s].

        With `starts`, bool [b, s], true where a document begins, attention keeps to documents.

        Returns [s, b, h] for the next stage; on the last stage `next_token`: with `labels`, int64 [b, s], the loss of
        every position [b, s], without them the logits [b, s, v] of this rank's part of the padded vocabulary.
        """
        tokens_bs, starts_bs = self.texts_of(batch)["tokens"], batch.get("starts")
        if self.first:
            x_sbh = self.embed(tokens_bs, starts_bs)
        else:
            assert self.received is not None, "the schedule hands a later stage its input"
            x_sbh = self.received
        # Rotary angles count on over documents: attention sees differences of places alone.
        rope = self.rotary(tokens_bs.shape[1]) if self.rotary is not None else None
        mask = None if starts_bs is None else document_mask(starts_bs)
        x_sbh = self.run_layers(self.layers, x_sbh, mask, rotary_pos_emb=rope)
        if not self.last:
            return x_sbh
        x_sbh = self.norm(x_sbh)
        if not self.model.predicts_tokens:
            return self.embeddings(x_sbh, batch)
        weight = self.embed.word.weight if self.model.tied else None
        logits_sbv, _ = self.head(x_sbh, weight=weight)
        if (labels_bs := batch.get("labels")) is None:
            return {"next_token": logits_sbv.transpose(0, 1)}
        losses_sb, _ = self.token_outcome(logits_sbv, labels_bs.transpose(0, 1), told=False)
        return {"next_token": Outcome(losses_sb.transpose(0, 1))}


def document_mask(starts_bs: Tensor) -> Tensor:
    """Say what attention may not see: bool [b, 1, s, s], true for later tokens and for those of other documents.

    `starts_bs` bool [b, s], true where a document begins.
    """
    document_bs = starts_bs.cumsum(dim=1)
    apart = document_bs.unsqueeze(2) != document_bs.unsqueeze(1)
    later = torch.ones(apart.shape[1:], dtype=torch.bool, device=apart.device).triu(1)
    return (apart | later).unsqueeze(1)
