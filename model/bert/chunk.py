"""BERT for any stage of a pipeline: post-norm layers that see both ways, and heads for hidden tokens and sentences.

Shapes: s sequence, b batch, h hidden, p predicted tokens, v vocabulary rows of this rank.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ..backend import backend_for
from ..config import ModelConfig
from ..layers import Embedding, StageChunk, WholeLinear, layer_spec, padding_mask
from ..loss import Outcome
from ..pipeline import Chunk


class Bert(StageChunk):
    """One chunk of a BERT: its layers, the embedding in the first, the heads in the last.

    Parameter names are the global names of `model/bert/layout.py`.
    """

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, chunk: Chunk, *, recompute: bool = False
    ) -> None:
        """Build the parts that `chunk` names."""
        super().__init__(model, config, chunk, recompute=recompute)
        if self.first or (self.last and model.tied_head):  # the head has a copy of the word embedding
            self.embed = Embedding(model, config, whole=self.first)
        spec = layer_spec(model, config, AttnMaskType.no_mask)
        self.layers = self.build_layers(spec, chunk.layers, config)
        if self.last and model.predicts_tokens:
            self.build_heads(model, config)

    def build_heads(self, model: ModelConfig, config: TransformerConfig) -> None:
        """Build what stands behind the last layer."""
        hidden = model.hidden_size
        if model.next_sentence:
            self.pooler = WholeLinear(hidden, hidden, config)
            self.next_sentence = WholeLinear(hidden, 2, config)
        self.transform = WholeLinear(hidden, hidden, config)
        heads = copy.copy(config)
        heads.sequence_parallel = False  # they see whole sequences, of which they pick what is predicted
        norm = backend_for(model.backend).layer_norm(rms_norm=model.normalization == "rmsnorm")
        self.norm = norm(config=heads, hidden_size=hidden, eps=model.norm_epsilon)
        self.head = ColumnParallelLinear(
            hidden,
            model.padded_vocab_size,
            config=heads,
            init_method=config.init_method,
            bias=True,
            gather_output=False,
            skip_weight_param_allocation=True,
        )

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor] | dict[str, Outcome]:
        """Run the stage on `tokens` int64 [b, s], with `segments` like it, and `length` [b, 1] of what is no padding.

        Returns [s, b, h] for the next stage. The last stage with `labels` and `weights` [b, s] gives the losses
        `masked` [b, s], 0 where a weight is, and, with `next_label` [b, 1] (0 where the second sentence follows),
        `next_sentence` [b, 1]; without labels the logits by the same names, [b, s, v] of this rank's part of the padded
        vocabulary and [b, 2].
        """
        texts = self.texts_of(batch)
        tokens_bs = texts["tokens"]
        if self.first:
            x_sbh = self.embed(tokens_bs, segments_bs=texts.get("segments"))
        else:
            assert self.received is not None, "the schedule hands a later stage its input"
            x_sbh = self.received
        x_sbh = self.run_layers(self.layers, x_sbh, padding_mask(tokens_bs, texts.get("length")))
        if not self.last:
            return x_sbh
        if not self.model.predicts_tokens:
            return self.embeddings(x_sbh, batch)
        if self.config.sequence_parallel:
            # Every rank computes the same with it, so each keeps its own slice of the gradient.
            x_sbh = tensor_parallel.gather_from_sequence_parallel_region(
                x_sbh, tensor_parallel_output_grad=False
            )
        return self.predictions(x_sbh.transpose(0, 1), batch)

    def predictions(self, x_bsh: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | dict[str, Outcome]:
        """Give what the heads make of the last states, [b, s, h]: losses where the batch has labels, else logits."""
        if "labels" in batch:
            return self._outcomes(x_bsh, batch)
        logits = {"masked": self._token_logits(x_bsh)}
        if not self.model.next_sentence:
            return logits
        return logits | {"next_sentence": self._sentence_logits(x_bsh[:, 0])}

    def _token_logits(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., v]."""
        x = self.norm(self.config.activation_func(self.transform(x)))
        logits, _ = self.head(x, weight=self.embed.word.weight)
        return logits

    def _sentence_logits(self, first_bh: Tensor) -> Tensor:
        return self.next_sentence(torch.tanh(self.pooler(first_bh)))

    def _outcomes(self, x_bsh: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Outcome]:
        weights_bs = batch["weights"]
        # A head over the vocabulary costs as much as some layers: it sees what is predicted, 15 % by default.
        picked = weights_bs.flatten().nonzero()[:, 0]
        logits_pv = self._token_logits(x_bsh.flatten(0, 1)[picked])
        losses_p, right_p = self.token_outcome(logits_pv, batch["labels"].flatten()[picked])

        def placed(found_p: Tensor) -> Tensor:
            everywhere = found_p.new_zeros(weights_bs.numel())
            return everywhere.index_put((picked,), found_p).view(weights_bs.shape)

        outcomes = {"masked": Outcome(placed(losses_p), None if right_p is None else placed(right_p))}
        if (next_label := batch.get("next_label")) is not None:
            scores, label = self._sentence_logits(x_bsh[:, 0]).float(), next_label[:, 0]
            losses = F.cross_entropy(scores, label, reduction="none")
            right = None if self.training else (scores.argmax(-1) == label).float()[:, None]
            outcomes["next_sentence"] = Outcome(losses[:, None], right)
        return outcomes
