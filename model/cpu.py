"""Everything that lets Megatron-core run without CUDA. Each shim says why it is there.

Megatron-core asks `torch.cuda` for its device and keeps a tracker of CUDA generators. On a machine with a GPU
nothing here is installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random


class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's tracker of named generators over torch's one CPU generator.

    Megatron forks a named generator around every dropout that differs between tensor-parallel ranks. The class it
    ships stores CUDA states; this one stores CPU states.
    """

    def add(self, name: str, seed: int) -> None:
        """Register generator `name`, seeded with `seed`."""
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from generator `name` inside the block."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


class _TorchOnCpu(ModuleType):
    """The torch module as Megatron's schedules see it: what they make on "cuda" is made on the CPU.

    They hard-code the device of their token counter. A mode over all of torch would do the same at the price of a
    Python call for every operation of the model.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        """Make zeros on the CPU, whatever device is asked for."""
        return torch.zeros(*size, device="cpu", **options)


def install_shims() -> None:
    """Point Megatron-core at the CPU; call it once, before any process group of Megatron's exists."""
    # Megatron places rotary tables, gathers and the memory buffer on "the current CUDA device".
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    # The pipeline schedule waits for the device around its sends and receives.
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    schedules.torch = _TorchOnCpu("torch")
    megatron_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
