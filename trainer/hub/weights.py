"""Write a checkpoint's weights as a Hugging Face directory's, without ever holding more than a few tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...model.config import ModelConfig
from ...model.families import layout_of
from ...model.hf.adapter import Adapter, LastRead
from ...model.hf.safetensors_file import plan_shards, write_safetensors
from .. import runtime as processes
from ..block_file import BlockFile
from ..errors import EXIT_NUMERICS, BasestoneError
from ..forks import run_ranks

BLOCK_BYTES = 8 << 20
READERS = 2  # parameters that are read, checked and rounded at one time
AHEAD_BYTES = 64 << 20  # that wait for their turn, but for one that is larger
TIMEOUT_S = 24 * 3600.0


class ConversionError(BasestoneError, ValueError):
    """Report a model that would not be the same on the other side; nothing is left behind."""

    exit_code = EXIT_NUMERICS


class WeightSource(Protocol):
    """Where the weights come from: whole global tensors by name, with the padded vocabulary."""

    def names(self) -> Iterable[str]:
        """List the global names."""

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give one whole tensor, rounded to `dtype`; several threads may ask at once."""


class ReadAhead:
    """Reads tensors in threads before they are asked for, in an order that is known."""

    def __init__(self, read: Callable[[str], Tensor], order: Iterable[tuple[str, int]]) -> None:
        """Read the first ones already; `order` gives names and bytes."""
        self._read, self._order, self._ahead_bytes = read, deque(order), 0
        self._pool = ThreadPoolExecutor(READERS, "read")
        self._waiting: deque[tuple[str, int, Future[Tensor]]] = deque()
        self._begin()

    def _begin(self) -> None:
        while self._order and (not self._waiting or self._ahead_bytes + self._order[0][1] <= AHEAD_BYTES):
            name, num_bytes = self._order.popleft()
            self._ahead_bytes += num_bytes
            self._waiting.append((name, num_bytes, self._pool.submit(self._read, name)))

    def __call__(self, name: str) -> Tensor:
        """Give the next tensor, which is called `name`."""
        expected, num_bytes, future = self._waiting.popleft()
        assert name == expected, f"{name} is asked for where {expected} comes next"
        tensor = future.result()
        self._ahead_bytes -= num_bytes
        self._begin()
        return tensor

    def close(self) -> None:
        """Read no more."""
        self._pool.shutdown(cancel_futures=True)


def write_weights(
    source: WeightSource,
    adapter: Adapter,
    config: ModelConfig,
    out: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    num_processes: int = 1,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the weights of a model into the directory `out`; give their bytes.

    Args:
        num_processes: that share the files; they are forked from here.
        tell: is told (bytes done, bytes in all) after every tensor of the first process's part.

    Raises:
        ConversionError: a weight is not finite in `dtype`.
        OSError: the disk is full, or fails.
    """
    tensors, table = {tensor.name: tensor for tensor in adapter.tensors(config)}, layout_of(config)
    shards = plan_shards(((tensor.name, tensor.shape, dtype) for tensor in tensors.values()), max_shard_bytes)
    num_parts = min(num_processes, len(shards))

    def write_part() -> None:
        part = processes.rank() if num_parts > 1 else 0
        names = [name for shard in shards[part::num_parts] for name, _, _ in shard.tensors]
        order = _in_turn(tensors[name].source for name in names)
        sizes = ((name, table[name].numel * dtype.itemsize) for name in order)
        ahead = ReadAhead(partial(source.read, dtype=dtype), sizes)
        read, done = LastRead(ahead), 0
        total = sum(shard.num_bytes for shard in shards[part::num_parts])

        def produce(name: str) -> Tensor:
            nonlocal done
            tensor = adapter.read(tensors[name], read)
            if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # without a copy, as isfinite makes
                raise ConversionError(
                    f"export: {name} is not finite in {str(dtype).removeprefix('torch.')}; "
                    "export an earlier checkpoint, or with dtype bf16 or fp32"
                )
            done += tensor.numel() * dtype.itemsize
            tell(done, total)
            return tensor

        try:
            write_safetensors(out, shards, produce, open_file=_past_the_cache, part=part, num_parts=num_parts)
        finally:
            ahead.close()

    if num_parts == 1:
        write_part()
    else:
        run_ranks(write_part, num_parts, timeout_s=TIMEOUT_S)
    return sum(shard.num_bytes for shard in shards)


def _past_the_cache(path: Path) -> BlockFile[None]:
    return BlockFile(path, BLOCK_BYTES, lambda block: None)


def _in_turn(names: Iterable[str]) -> Sequence[str]:
    """Leave out what comes again at once: a parameter that several tensors are made of is read for all of them."""
    kept: list[str] = []
    for name in names:
        if not kept or kept[-1] != name:
            kept.append(name)
    return kept
