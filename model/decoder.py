"""The decoder: Megatron-core layers between our embedding and our head, for any stage of a pipeline.

Shapes: s sequence, b batch, h hidden, v vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from .backend import backend_for
from .config import ModelConfig
from .loss import Outcome, vocab_parallel_cross_entropy
from .pipeline import Chunk, chunks_of_ranks


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
    gated = config.activation == "swiglu"
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_hidden_size,
        normalization="RMSNorm" if config.normalization == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else _gelu_tanh,
        use_te_activation_func=gated,  # means the backend's module: TorchBackend's SwiGLU or Transformer Engine's
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


def layer_spec(
    backend: BackendSpecProvider, *, rms_norm: bool, gated: bool, qk_norm: bool = False
) -> ModuleSpec:
    """Describe one pre-norm decoder layer over a backend."""
    head_norm = backend.layer_norm(rms_norm=rms_norm, for_qk=True) if qk_norm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.layer_norm(rms_norm=rms_norm),
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm(rms_norm=rms_norm),
            mlp=get_mlp_module_spec_for_backend(backend, use_te_activation_func=gated),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _same_draws() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Let a recomputed layer draw what its forward drew: torch keeps its own generator only, not Megatron's."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    before = tracker.get_states()

    @contextmanager
    def again() -> Iterator[None]:
        after = tracker.get_states()
        tracker.set_states(before)
        try:
            yield
        finally:
            tracker.set_states(after)

    return nullcontext(), again()


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


class LearnedPositions(nn.Module):
    """A learned vector for every position, held whole by every rank."""

    def __init__(self, length: int, config: TransformerConfig) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else "cuda"
        self.weight = nn.Parameter(
            torch.empty(length, config.hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, places: Tensor) -> Tensor:
        """Look up places, int64 [b or 1, s], as [s, b or 1, h]."""
        return F.embedding(places, self.weight).transpose(0, 1)


class Embedding(nn.Module):
    """Token ids [b, s] -> [s, b, h], or this rank's slice of s under sequence parallel."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, *, positions: bool) -> None:
        super().__init__()
        self.config = config
        self.word = VocabParallelEmbedding(
            model.padded_vocab_size,
            model.hidden_size,
            init_method=config.init_method,
            config=config,
            reduce_scatter_embeddings=config.sequence_parallel,
        )
        self.position = (
            LearnedPositions(model.max_sequence_length, config)
            if positions and model.position == "learned"
            else None
        )

    def forward(self, tokens_bs: Tensor, starts_bs: Tensor | None = None) -> Tensor:
        """Look up words, add positions (counted from the document's start where these are given), drop out."""
        x = self.word(tokens_bs)
        if not self.config.sequence_parallel:
            x = x.transpose(0, 1).contiguous()
        if self.position is not None:
            rank = parallel_state.get_tensor_model_parallel_rank() if self.config.sequence_parallel else 0
            places = torch.arange(tokens_bs.shape[1], device=tokens_bs.device).unsqueeze(0)
            if starts_bs is not None:
                places = places - torch.where(starts_bs, places, 0).cummax(dim=1).values
            x = x + self.position(places[:, rank * x.shape[0] : (rank + 1) * x.shape[0]])
        if self.config.hidden_dropout and self.training:
            if self.config.sequence_parallel:
                with tensor_parallel.get_cuda_rng_tracker().fork():
                    return F.dropout(x, self.config.hidden_dropout)
            return F.dropout(x, self.config.hidden_dropout)
        return x


class Decoder(MegatronModule):
    """One chunk of a decoder: its layers, the embedding in the first, norm and head in the last.

    Parameter names are the global names of `model/layout.py`.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        chunk: Chunk | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        """Build the parts that `chunk` names, by default the whole model."""
        super().__init__(config=config)
        chunk = chunk or chunks_of_ranks(model.num_layers, pipeline=1)[0][0]
        self.model_type = ModelType.encoder_or_decoder
        self.model, self.first, self.last, self.recompute = model, chunk.first, chunk.last, recompute
        self.received: Tensor | None = None
        backend = backend_for(model.backend)
        rms_norm = model.normalization == "rmsnorm"
        gated = model.activation == "swiglu"
        spec = layer_spec(backend, rms_norm=rms_norm, gated=gated, qk_norm=model.qk_norm)
        if self.first or (self.last and model.tied):  # a tied head has a copy of the word embedding
            self.embed = Embedding(model, config, positions=self.first)
        self.rotary = rotary_embedding(model) if model.position == "rope" else None
        self.layers = nn.ModuleDict(
            {str(layer): build_module(spec, config=config, layer_number=layer + 1) for layer in chunk.layers}
        )
        if self.last:
            self.norm = backend.layer_norm(rms_norm=rms_norm)(
                config=config, hidden_size=model.hidden_size, eps=model.norm_epsilon
            )
            self.head = ColumnParallelLinear(
                model.hidden_size,
                model.padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=model.tied,
            )

    def set_input_tensor(self, tensor: Tensor | list[Tensor] | None) -> None:
        """Take what the previous stage sent; Megatron's schedules call this."""
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def _run_layer(self, layer: nn.Module, x_sbh: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
        if self.recompute and self.training:
            x_sbh, _ = torch.utils.checkpoint.checkpoint(
                layer,
                x_sbh,
                attention_mask=mask,
                rotary_pos_emb=rope,
                use_reentrant=False,
                context_fn=_same_draws,
            )
        else:
            x_sbh, _ = layer(x_sbh, attention_mask=mask, rotary_pos_emb=rope)
        return x_sbh

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor | dict[str, Outcome]:
        """Run the stage on `tokens` int64 [b, s].

        With `starts`, bool [b, s], true where a document begins, attention keeps to documents.

        Returns [s, b, h] for the next stage; on the last stage with `labels`, int64 [b, s], the loss of every position
        as `next_token` [b, s], without them the logits [b, s, v] of this rank's part of the padded vocabulary.
        """
        tokens_bs, starts_bs = batch["tokens"], batch.get("starts")
        if self.first:
            x_sbh = self.embed(tokens_bs, starts_bs)
        else:
            assert self.received is not None, "the schedule hands a later stage its input"
            x_sbh = self.received
        # Rotary angles count on over documents: attention sees differences of places alone.
        rope = self.rotary(tokens_bs.shape[1]) if self.rotary is not None else None
        mask = None if starts_bs is None else document_mask(starts_bs)
        # Under sequence parallel each rank holds other tokens: their dropout masks are the rank's own.
        own_masks = self.config.sequence_parallel and self.training
        with tensor_parallel.get_cuda_rng_tracker().fork() if own_masks else nullcontext():
            for layer in self.layers.values():
                x_sbh = self._run_layer(layer, x_sbh, mask, rope)
        if not self.last:
            return x_sbh
        weight = self.embed.word.weight if self.model.tied else None
        logits_sbv, _ = self.head(self.norm(x_sbh), weight=weight)
        if (labels_bs := batch.get("labels")) is None:
            return logits_sbv.transpose(0, 1)
        rank, vocab = parallel_state.get_tensor_model_parallel_rank(), self.model.vocab_size
        assert vocab is not None
        losses_sb = vocab_parallel_cross_entropy(
            logits_sbv,
            labels_bs.transpose(0, 1),
            first_row=rank * logits_sbv.shape[-1],
            vocab_size=vocab,
            z_loss=self.model.z_loss if self.training else 0.0,
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        return {"next_token": Outcome(losses_sb.transpose(0, 1))}


def document_mask(starts_bs: Tensor) -> Tensor:
    """Say what attention may not see: bool [b, 1, s, s], true for later tokens and for those of other documents.

    `starts_bs` bool [b, s], true where a document begins.
    """
    document_bs = starts_bs.cumsum(dim=1)
    apart = document_bs.unsqueeze(2) != document_bs.unsqueeze(1)
    later = torch.ones(apart.shape[1:], dtype=torch.bool, device=apart.device).triu(1)
    return (apart | later).unsqueeze(1)
