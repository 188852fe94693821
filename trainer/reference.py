"""The trainer's own model in one process, from a checkpoint: logits to compare an export with, and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.decoder import Decoder, megatron_config
from .runtime import Runtime


class Weights(Protocol):
    """Global tensors by name."""

    def names(self) -> Iterable[str]:
        """Give the global names."""
        ...

    def read(self, name: str) -> Tensor:
        """Give one whole tensor, fp32."""
        ...


def load_decoder(model: ModelConfig, weights: Weights, runtime: Runtime, *, rounded_to: torch.dtype) -> Decoder:
    """Build a whole fp32 decoder whose weights were rounded to `rounded_to` on the way."""
    config = megatron_config(model, dtype=torch.float32, sequence_parallel=False, on_cpu=runtime.on_cpu)
    decoder = Decoder(model, config)
    for name, parameter in decoder.named_parameters():
        parameter.data.copy_(weights.read(name).to(rounded_to))
    return decoder.eval()


def logits_of(decoder: Decoder, runtime: Runtime) -> Callable[..., Tensor]:
    """Give a function from ids, int64 [batch, sequence], to fp32 logits [batch, sequence, true vocabulary].

    Its second argument, bool [batch, sequence], may say where documents begin: attention then keeps to them.
    """

    @torch.no_grad()
    def logits(ids: Tensor, starts: Tensor | None = None) -> Tensor:
        starts = None if starts is None else starts.to(runtime.device)
        return decoder(ids.to(runtime.device), None, starts)[..., : decoder.model.vocab_size].float().cpu()

    return logits


def generate(
    logits: Callable[[Tensor], Tensor],
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    eos: int,
    max_sequence_length: int,
    seed: int,
) -> Tensor:
    """Continue `ids`, int64 [1, sequence]; temperature 0 takes the most likely token.

    The whole text so far passes through the model for every token: right for a look at a model in training, while
    serving belongs to the exported directory.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        last = logits(ids[:, -max_sequence_length:])[:, -1]
        if temperature > 0:
            # From the largest downwards, in fp64: however small the temperature, the likeliest stays finite.
            scaled = (last - last.amax()).double() / temperature
            if top_k:
                scaled[scaled < scaled.topk(min(top_k, scaled.shape[-1])).values[:, -1:]] = float("-inf")
            token = torch.multinomial(scaled.softmax(-1), 1, generator=generator)
        else:
            token = last.argmax(-1, keepdim=True)
        ids = torch.cat((ids, token), dim=1)
        if int(token) == eos:
            break
    return ids
