"""TorchBackend: torch-native parts behind Megatron-core's backend seam, for CPU and GPU alike.

No Apex and no Transformer Engine. With `backend = "te"` Megatron's own Transformer Engine parts are taken instead;
either way the norms stand apart from the linear layers, so parameters have one set of names.

Shapes: s sequence, b batch, n heads of this rank, d head width, h hidden.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from .errors import ModelError


def _norm_parameter(config: TransformerConfig, fill: float, width: int) -> nn.Parameter:
    device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda")
    weight = nn.Parameter(torch.full((width,), fill, dtype=config.params_dtype, device=device))
    # Under sequence parallel each rank sees a slice of the tokens, so this gradient is a partial sum.
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis that accepts sequence parallel."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_parameter(config, 1.0, hidden_size)

    def forward(self, x_sbh: Tensor) -> Tensor:
        """Normalise [s, b, h]."""
        return F.rms_norm(x_sbh, (x_sbh.shape[-1],), self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer norm over the last axis that accepts sequence parallel."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_parameter(config, 1.0, hidden_size)
        self.bias = _norm_parameter(config, 0.0, hidden_size)

    def forward(self, x_sbh: Tensor) -> Tensor:
        """Normalise [s, b, h]."""
        return F.layer_norm(x_sbh, (x_sbh.shape[-1],), self.weight, self.bias, self.eps)


class DotProductAttention(MegatronModule):
    """Core attention through torch's scaled_dot_product_attention (flash or cuDNN kernels on a GPU)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """Attend. query [s, b, n, d]; key and value [s, b, groups, d] -> [s, b, n * d].

        `attention_mask` is Megatron's: bool [b or 1, 1, s, s], True where attention is forbidden. Without one, a
        causal layer is causal. `attention_bias` is added to the scores, [b or 1, n, s, s].
        """
        assert packed_seq_params is None, "packed sequences come as a mask"
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, d]
        mask_type = self.mask_type if attn_mask_type is None else attn_mask_type
        mask = None if attention_mask is None else ~attention_mask
        if attention_bias is not None:
            mask = attention_bias if mask is None else attention_bias.masked_fill(~mask, float("-inf"))
        dropout = self.dropout if self.training else 0.0
        # Heads are cut over tensor-parallel ranks, so masks differ. Under sequence parallel the whole layer draws
        # from the rank's own generator already (Decoder.forward), and a fork within a fork would repeat draws.
        own = dropout and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if own else contextlib.nullcontext():
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and mask_type == AttnMaskType.causal,
                scale=self.scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        context = context.permute(2, 0, 1, 3)
        return context.reshape(*context.shape[:2], -1)


class _SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        out_gate, out_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=out_up)
        out_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


class SwiGLU(nn.Module):
    """silu(gate) * up over the halves [gate; up] of the last axis (Shazeer 2020).

    Keeps its input alone for the backward pass; Megatron's own keeps the product's factors, too, and adds an offset
    of zero.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 f] -> [..., f]."""
        return _SwiGLUFunction.apply(x)


class TorchBackend(BackendSpecProvider):
    """What Megatron-core's spec builders ask for, filled with the parts above."""

    def column_parallel_linear(self) -> type:
        """Give the column-parallel linear layer."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Give the row-parallel linear layer."""
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Keep norms and linear layers apart."""
        return False

    def column_parallel_layer_norm_linear(self) -> None:
        """There is no fused norm and linear layer here."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Give the norm."""
        return RMSNorm if rms_norm else LayerNorm

    def core_attention(self) -> type:
        """Give the attention between projections."""
        return DotProductAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules | None]:
        """Give the experts: one MLP after another."""
        return SequentialMLP, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    def activation_func(self) -> type:
        """Give the gated activation; others come from the configuration."""
        return SwiGLU


def backend_for(name: str) -> BackendSpecProvider:
    """Give the backend called `name`; ModelError where Transformer Engine is asked for and not installed."""
    if name == "torch":
        return TorchBackend()
    try:
        import transformer_engine  # noqa: F401
    except ImportError as error:
        raise ModelError(
            'model.backend = "te" needs Transformer Engine, which is not installed here; use backend = "torch"'
        ) from error
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    class UnfusedTransformerEngine(TESpecProvider):
        """Transformer Engine's parts with norms apart, so that parameter names do not depend on the backend."""

        def fuse_layernorm_and_linear(self) -> bool:
            return False

    return UnfusedTransformerEngine()
