"""The trainer's own model in one process, from a checkpoint: what an export is compared with, and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.layers import StageChunk, megatron_config
from ..model.pipeline import Chunk, chunks_of_ranks
from ..model.stage import chunk_class
from .batch import MicroBatch
from .objective import named_sums, objective_of
from .runtime import Runtime


class Weights(Protocol):
    """Global tensors by name."""

    def names(self) -> Iterable[str]:
        """Give the global names."""
        ...

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give one whole tensor, rounded to `dtype`."""
        ...


def load_model(
    model: ModelConfig,
    weights: Weights,
    runtime: Runtime,
    *,
    rounded_to: torch.dtype,
    chunk: Chunk | None = None,
) -> StageChunk:
    """Build an fp32 model, or a chunk of it, whose weights were rounded to `rounded_to` on the way."""
    config = megatron_config(model, dtype=torch.float32, sequence_parallel=False, on_cpu=runtime.on_cpu)
    chunk = chunk or chunks_of_ranks(model.total_layers, pipeline=1)[0][0]
    built = chunk_class(model)(model, config, chunk)
    for name, parameter in built.weights():
        parameter.data.copy_(weights.read(name, rounded_to))
    return built.eval()


Trace = Callable[[Mapping[str, Tensor]], Iterator[tuple[str, Tensor]]]


def trace_of(model: ModelConfig, weights: Weights, runtime: Runtime, *, rounded_to: torch.dtype) -> Trace:
    """Give a function from a batch to what the model makes of it, part by part.

    It takes fields, int64 [batch, sequence], and gives (name, fp32 tensor) of the embedding and of every layer's
    output, [batch, sequence, hidden], then of all logits, [batch, sequence, true vocabulary] the first, or of the last
    states that a text's vector is made of. Only one layer is held.
    """

    @torch.no_grad()
    def trace(batch: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        fields = {name: field.to(runtime.device) for name, field in batch.items()}
        last = model.total_layers - 1
        seen: list[tuple[str, Tensor]] = []

        def see(name: str, x_sbh: Tensor) -> None:
            seen.append((name, x_sbh.transpose(0, 1).float().cpu()))

        received: Any = None
        for number in range(model.total_layers):
            chunk = Chunk(range(number, number + 1), first=number == 0, last=number == last)
            built = load_model(model, weights, runtime, rounded_to=rounded_to, chunk=chunk)
            for name, module in built.traced():
                module.register_forward_hook(
                    lambda _, __, out, name=name: see(name, out[0] if isinstance(out, tuple) else out)
                )
            built.set_input_tensor(received)
            received = built(fields)
            yield from seen
            seen.clear()
            del built, module
        if model.pooling is not None:
            yield "the last states", received["states"].float().cpu()
            return
        for number, (name, logits) in enumerate(received.items()):
            named = f"the logits of {name.replace('_', ' ')}" if number else "the logits"
            yield named, logits[..., : model.vocab_size].float().cpu()

    return trace


def logits_of(decoder: StageChunk, runtime: Runtime) -> Callable[..., Tensor]:
    """Give a function from ids, int64 [batch, sequence], to fp32 logits [batch, sequence, true vocabulary].

    Its second argument, bool [batch, sequence], may say where documents begin: attention then keeps to them.
    """

    @torch.no_grad()
    def logits(ids: Tensor, starts: Tensor | None = None) -> Tensor:
        batch = {"tokens": ids} if starts is None else {"tokens": ids, "starts": starts}
        scores = decoder({name: field.to(runtime.device) for name, field in batch.items()})["next_token"]
        return scores[..., : decoder.model.vocab_size].float().cpu()

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


@torch.no_grad()
def sums_of(
    model: StageChunk, batches: Sequence[MicroBatch], parts: Mapping[str, str], runtime: Runtime
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Give what a whole model makes of batches: by part the sum of each figure, and how many predictions count."""
    here = [{name: field.to(runtime.device) for name, field in batch.items()} for batch in batches]
    objective = objective_of(model.model, parts, runtime.dp_group)
    objective.prepare(here, lambda loss: [loss(model(batch), batch)[1] for batch in here])
    scales = dict.fromkeys(parts, 1.0)
    sums = sum(objective.loss(model(batch), batch, scales)[1]["sums"].double() for batch in here)
    counts = {name: sum(float(batch[weights].sum()) for batch in here) for name, weights in parts.items()}
    assert isinstance(sums, Tensor)
    return named_sums(sums, parts, objective.figures), counts
