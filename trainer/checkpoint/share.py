"""A rank's share of a checkpoint: which fragments it writes, and a copy of them that outlives the step.

Masters and optimizer states change in the optimizer's update alone. So a copy that begins after an update may run
beside the next forward and backward; it has to be whole before the next update.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine_state import MASTER, STATE_KEYS, EngineState, Fragment
from ..runtime import Runtime
from .tensors import PIECE_ELEMENTS
from .writer import RankWriter

TENSORS = (MASTER, *STATE_KEYS)


class Share:
    """What one rank writes: fragments, each as its master and states, one after another."""

    def __init__(self, engine_state: EngineState, runtime: Runtime, parameters: Iterable[str]) -> None:
        """Take the fragments that this rank owns; the index counts `parameters` in their order."""
        self._state = engine_state
        self._numbers = {name: number for number, name in enumerate(parameters)}
        self._idle = engine_state.is_replicated and runtime.dp_rank != 0

    def fragments(self) -> Iterator[Fragment]:
        """Give the fragments; each is valid until the next one is asked for."""
        if not self._idle:
            yield from (fragment for fragment in self._state.fragments() if fragment.owned)

    def write(self, path: Path, fragments: Iterable[Fragment], moved: Callable[[], None]) -> dict[str, Any]:
        """Write a rank file of fragments wherever they lie, through a few blocks in host memory.

        Args:
            moved: is called before every block.

        Returns:
            What the index says of the file, without the rank's place in the layout.
        """
        rows = []
        with RankWriter(path) as writer:
            for fragment in fragments:
                rows.append([self._numbers[fragment.name], fragment.start, fragment.numel, writer.written])
                for key in TENSORS:
                    for piece in fragment.tensors[key].split(PIECE_ELEMENTS):
                        moved()
                        writer.write(_bytes_of(piece.cpu()))
        return {"file": path.name, "bytes": writer.written, "fragments": rows, "blocks": writer.blocks}


class Staging:
    """A kept copy of a rank's share in host memory.

    It is made once, and its pages are touched then: fresh memory costs more than the copy.
    """

    def __init__(self, share: Share, device: torch.device) -> None:
        """Reserve 4 bytes for every element, pinned where the tensors are on a GPU."""
        self._share, self._device = share, device
        self._on_gpu = device.type == "cuda"
        elements = sum(fragment.numel for fragment in share.fragments()) * len(TENSORS)
        self._buffer = torch.zeros(elements, dtype=torch.float32, pin_memory=self._on_gpu)
        self._copied = threading.Event()
        self._copied.set()

    def begin(self) -> Callable[[], list[Fragment]]:
        """Note what to copy, after an update; a thread calls what this gives, for the copy."""
        fragments = list(self._share.fragments())
        updated = torch.cuda.current_stream(self._device).record_event() if self._on_gpu else None
        self._copied.clear()

        def copy() -> list[Fragment]:
            try:
                return self._copy(fragments, updated)
            finally:
                self._copied.set()

        return copy

    def wait(self) -> None:
        """Return once the tensors may change again: before an update."""
        self._copied.wait()

    def _copy(self, fragments: list[Fragment], updated: torch.cuda.Event | None) -> list[Fragment]:
        stream = torch.cuda.Stream(self._device) if updated is not None else None
        if stream is not None and updated is not None:
            stream.wait_event(updated)
        copies, position = [], 0
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            for fragment in fragments:
                tensors: dict[str, Tensor] = {}
                for key in TENSORS:
                    tensors[key] = self._buffer.narrow(0, position, fragment.numel)
                    tensors[key].copy_(fragment.tensors[key], non_blocking=True)
                    position += fragment.numel
                copies.append(fragment._replace(tensors=tensors))
        if stream is not None:
            stream.synchronize()
        return copies


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
