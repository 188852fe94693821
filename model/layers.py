"""What every family is made of: Megatron-core layers over our backend, the embedding before them, and a stage's frame.

Shapes: s sequence, b batch, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from .backend import backend_for
from .config import ModelConfig
from .draws import own_masks, same_draws
from .embedding.pooling import both_texts, pooled
from .loss import Outcome, vocab_parallel_cross_entropy, vocab_parallel_right
from .pipeline import Chunk


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def megatron_config(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool,
    on_cpu: bool,
    deterministic: bool = False,
) -> TransformerConfig:
    """Translate a model section into Megatron-core's configuration of one layer.

    Its pipeline size is always 1: layers here carry their global number, and Megatron would add a stage's offset.
    """
    tp = parallel_state.get_tensor_model_parallel_world_size()
    activation, module = ACTIVATIONS[config.activation]
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        softmax_scale=1.0
        if config.position == "relative"
        else None,  # T5's initial weights stand for the scale
        ffn_hidden_size=config.ffn_hidden_size,
        normalization="RMSNorm" if config.normalization == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=config.gated,
        activation_func=activation,
        use_te_activation_func=module,  # means the backend's module: TorchBackend's SwiGLU or Transformer Engine's
        add_bias_linear=config.bias,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        hidden_dropout=config.dropout,
        attention_dropout=config.dropout,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        pipeline_dtype=dtype,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel and tp > 1,
        deterministic_mode=deterministic,
        # Every fusion below needs Apex or Transformer Engine.
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # The interleaved schedule at two stages mixes up batched messages without an error.
        batch_p2p_comm=False,
    )


# By name: the function, and whether it is a module of the backend instead.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "swiglu": (F.silu, True),
    "geglu": (_gelu_tanh, False),
    "gelu": (_gelu_tanh, False),
    "gelu_erf": (F.gelu, False),
}


class AddThenNorm(nn.Module):
    """What a post-norm layer does behind attention and MLP: add to the residual stream, then normalise it."""

    def __init__(self, norm: type, config: TransformerConfig, eps: float) -> None:
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=eps)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Give the function of (output and bias, residual, dropout) that Megatron-core's layer calls."""
        add = get_bias_dropout_add(training, fused)
        return lambda output_with_bias, residual, dropout: self.norm(add(output_with_bias, residual, dropout))


def layer_spec(
    model: ModelConfig, config: TransformerConfig, mask_type: AttnMaskType, *, cross: bool = False
) -> ModuleSpec:
    """Describe one layer of a model over its backend; with `cross` it attends to another trunk, too."""
    backend: BackendSpecProvider = backend_for(model.backend)
    rms_norm = model.normalization == "rmsnorm"
    norm = backend.layer_norm(rms_norm=rms_norm)
    head_norm = backend.layer_norm(rms_norm=rms_norm, for_qk=True) if model.qk_norm else IdentityOp
    before, after = norm, get_bias_dropout_add
    if model.norm_position == "post":
        before = IdentityOp
        after = ModuleSpec(
            module=AddThenNorm, params={"norm": norm, "config": config, "eps": model.norm_epsilon}
        )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask_type},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    if cross:
        other: Any = ModuleSpec(
            module=CrossAttention,
            params={"attn_mask_type": AttnMaskType.no_mask},
            submodules=CrossAttentionSubmodules(
                linear_q=backend.column_parallel_linear(),
                linear_kv=backend.column_parallel_linear(),
                core_attention=backend.core_attention(),
                linear_proj=backend.row_parallel_linear(),
            ),
        )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=attention,
            self_attn_bda=after,
            **(
                {"pre_cross_attn_layernorm": before, "cross_attention": other, "cross_attn_bda": after}
                if cross
                else {}
            ),
            pre_mlp_layernorm=before,
            mlp=get_mlp_module_spec_for_backend(
                backend, use_te_activation_func=ACTIVATIONS[model.activation][1]
            ),
            mlp_bda=after,
        ),
    )


class LearnedVectors(nn.Module):
    """A learned vector for every position or segment, held whole by every rank."""

    def __init__(self, count: int, config: TransformerConfig) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else "cuda"
        self.weight = nn.Parameter(
            torch.empty(count, config.hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, places: Tensor) -> Tensor:
        """Look up places, int64 [b or 1, s], as [s, b or 1, h]."""
        return F.embedding(places, self.weight).transpose(0, 1)


class WholeLinear(nn.Module):
    """A linear layer that every rank holds whole and applies to the same, [..., in] -> [..., out]."""

    def __init__(self, num_in: int, num_out: int, config: TransformerConfig) -> None:
        super().__init__()
        device = torch.device("cpu" if config.use_cpu_initialization else "cuda")
        self.weight = nn.Parameter(torch.empty(num_out, num_in, dtype=config.params_dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(num_out, dtype=config.params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Token ids [b, s] -> [s, b, h], or this rank's slice of s under sequence parallel.

    Without `whole` it is the word embedding alone, the copy that a later stage has for its head.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, *, whole: bool) -> None:
        super().__init__()
        self.config = config
        self.word = VocabParallelEmbedding(
            model.padded_vocab_size,
            model.hidden_size,
            init_method=config.init_method,
            config=config,
            reduce_scatter_embeddings=config.sequence_parallel,
        )
        learned = whole and model.position == "learned"
        self.position = LearnedVectors(model.max_sequence_length, config) if learned else None
        self.segment = LearnedVectors(model.num_segments, config) if whole and model.num_segments else None
        self.norm = None
        if whole and model.norm_position == "post":  # the first layer expects what all others get
            norm = backend_for(model.backend).layer_norm(rms_norm=model.normalization == "rmsnorm")
            self.norm = norm(config=config, hidden_size=model.hidden_size, eps=model.norm_epsilon)

    def forward(
        self, tokens_bs: Tensor, starts_bs: Tensor | None = None, segments_bs: Tensor | None = None
    ) -> Tensor:
        """Look up words, add positions (counted from the document's start where these are given), drop out."""
        x = self.word(tokens_bs)
        if not self.config.sequence_parallel:
            x = x.transpose(0, 1).contiguous()
        if self.position is not None:
            places = torch.arange(tokens_bs.shape[1], device=tokens_bs.device).unsqueeze(0)
            if starts_bs is not None:
                places = places - torch.where(starts_bs, places, 0).cummax(dim=1).values
            x = x + self.position(self._own(places, x))
        if self.segment is not None:
            segments_bs = torch.zeros_like(tokens_bs) if segments_bs is None else segments_bs
            x = x + self.segment(self._own(segments_bs, x))
        if self.norm is not None:
            x = self.norm(x)
        return drop_out(x, self.config, self.training)

    def _own(self, places_bs: Tensor, x_sbh: Tensor) -> Tensor:
        """Give this rank's slice of the sequence."""
        rank = parallel_state.get_tensor_model_parallel_rank() if self.config.sequence_parallel else 0
        return places_bs[:, rank * x_sbh.shape[0] : (rank + 1) * x_sbh.shape[0]]


def drop_out(x_sbh: Tensor, config: TransformerConfig, training: bool) -> Tensor:
    """Drop out in training, outside of layers, which do so themselves."""
    if not (config.hidden_dropout and training):
        return x_sbh
    with own_masks(config):
        return F.dropout(x_sbh, config.hidden_dropout)


def padding_mask(tokens_bs: Tensor, length_b1: Tensor | None) -> Tensor | None:
    """Say what attention may not see: bool [b, 1, 1, s], true for padding.

    A sample without tokens, which fills a batch up, sees its first place: a softmax over nothing is no number.
    """
    if length_b1 is None:
        return None
    places = torch.arange(tokens_bs.shape[1], device=tokens_bs.device)
    return (places >= length_b1.clamp(min=1))[:, None, None]


def parts_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Give a module's children, its layers one by one, by their names behind a prefix.

    A head without a weight of its own is among them: what is in no tree is not seen by DeepSpeed, which gathers for it.
    """
    for name, part in module.named_children():
        if name == "layers":
            yield from ((f"{prefix}layers.{number}", layer) for number, layer in part.named_children())
        else:
            yield prefix + name, part


class StageChunk(MegatronModule):
    """The frame of a chunk of any family: what Megatron-core's schedules ask of it, and how its layers run."""

    embed: Embedding
    layers: nn.ModuleDict

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, chunk: Chunk, *, recompute: bool = False
    ) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.model, self.first, self.last, self.recompute = model, chunk.first, chunk.last, recompute
        self.received: Tensor | None = None

    def set_input_tensor(self, tensor: Tensor | list[Tensor] | None) -> None:
        """Take what the previous stage sent; Megatron's schedules call this."""
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def build_layers(self, spec: ModuleSpec, numbers: range, config: TransformerConfig) -> nn.ModuleDict:
        """Build the layers with these global numbers."""
        return nn.ModuleDict(
            {str(layer): build_module(spec, config=config, layer_number=layer + 1) for layer in numbers}
        )

    def texts_of(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Give what passes through the layers: of pairs of texts, both side by side."""
        return both_texts(batch) if self.model.pooling is not None and "real" in batch else batch

    def embeddings(self, x_sbh: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the unit vectors of a micro-batch's texts, [2 b, h], as `contrastive`.

        Of a batch that is no task's (without `real`), give the states themselves as `states`, [b, s, h].
        """
        if self.config.sequence_parallel:
            # Every rank computes the same with it, so each keeps its own slice of the gradient.
            x_sbh = tensor_parallel.gather_from_sequence_parallel_region(
                x_sbh, tensor_parallel_output_grad=False
            )
        if "real" not in batch:
            return {"states": x_sbh.transpose(0, 1)}
        assert self.model.pooling is not None
        return {"contrastive": pooled(x_sbh, both_texts(batch)["length"], self.model.pooling)}

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Give what a chunk is made of, by the name that its parameters begin with in `model/layout.py`."""
        yield from parts_of(self)

    def weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Give the parameters by their global names."""
        for name, part in self.parts():
            yield from ((f"{name}.{own}", parameter) for own, parameter in part.named_parameters())

    def share(self, earlier: Sequence[StageChunk]) -> None:
        """Take over what this chunk and an earlier one of the same rank both have; most have nothing."""

    def token_outcome(self, logits: Tensor, labels: Tensor, *, told: bool = True) -> Outcome:
        """Give the losses of predictions, like `labels`, from this rank's part of the logits; z-loss in training alone.

        Out of training they come with what was right, where it is to be `told`.
        """
        vocab = self.model.vocab_size
        assert vocab is not None
        place = {
            "first_row": parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1],
            "vocab_size": vocab,
            "group": parallel_state.get_tensor_model_parallel_group(),
        }
        right = vocab_parallel_right(logits, labels, **place) if told and not self.training else None
        z_loss = self.model.z_loss if self.training else 0.0
        return Outcome(vocab_parallel_cross_entropy(logits, labels, z_loss=z_loss, **place), right)

    def traced(self) -> Iterator[tuple[str, nn.Module]]:
        """Give what another implementation is compared by: (name, module), in the order of the forward pass.

        A module's output, or the first of several, is [s, b, h].
        """
        if self.first:
            yield "the embedding", self.embed
        for number, layer in self.layers.items():
            yield f"layer {number}", layer

    def run_layers(self, layers: nn.ModuleDict, x_sbh: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
        """Pass [s, b, h] through layers; `mask` and `more` are what each of them takes besides."""
        with own_masks(self.config) if self.training else nullcontext():
            for layer in layers.values():
                if self.recompute and self.training:
                    x_sbh, _ = torch.utils.checkpoint.checkpoint(
                        layer, x_sbh, attention_mask=mask, use_reentrant=False, context_fn=same_draws, **more
                    )
                else:
                    x_sbh, _ = layer(x_sbh, attention_mask=mask, **more)
        return x_sbh
