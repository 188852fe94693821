"""Which generator a draw comes from, and how draws come twice: generators are put back to where they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig


@contextmanager
def draws_again(device: torch.device) -> Iterator[None]:
    """Leave every generator as it was before the block: what follows it draws the same."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states, plain = tracker.get_states(), torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        tracker.set_states(states)
        torch.set_rng_state(plain)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)


def same_draws() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
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


def own_masks(config: TransformerConfig) -> AbstractContextManager[None]:
    """Draw dropout from the rank's own generator under sequence parallel, where each rank holds other tokens."""
    fork = tensor_parallel.get_cuda_rng_tracker().fork
    return fork() if config.sequence_parallel else nullcontext()
