"""Initial weights that depend on the seed, the parameter's global name and the place in it: on no layout.

A parameter is drawn in blocks along its tensor-parallel axis, each from a generator of its own, so a rank draws
its piece (and at most one partial block at either end) and no rank ever holds the whole.
"""

from __future__ import annotations

import hashlib

import torch

from .layout import Parameter

BLOCK = 64  # rows (or columns) that share a generator


def initial_piece(parameter: Parameter, seed: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Draw one rank's piece of a parameter, fp32, on the CPU."""
    shape = parameter.local_shape(tp_size)
    if parameter.init_std is None:
        return torch.full(shape, 1.0 if parameter.kind == "norm" else 0.0)
    axis = parameter.axis or 0
    part = parameter.shape[axis] // parameter.parts
    piece = part if parameter.axis is None else part // tp_size
    offset = 0 if parameter.axis is None else tp_rank * piece
    spans = [(index * part + offset, piece) for index in range(parameter.parts)]
    return torch.cat([_draw(parameter, seed, axis, first, length) for first, length in spans], dim=axis)


def _draw(parameter: Parameter, seed: int, axis: int, first: int, length: int) -> torch.Tensor:
    """Draw indices [first, first + length) along `axis`."""
    size = parameter.shape[axis]
    blocks = []
    for block in range(first // BLOCK, -(-(first + length) // BLOCK)):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, size)
        shape = list(parameter.shape)
        shape[axis] = stop - start
        digest = hashlib.sha256(f"{seed}/{parameter.name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.empty(shape).normal_(0.0, parameter.init_std or 0.0, generator=generator)
        if parameter.init_turns:
            factors = torch.cat([torch.full((rows, 1), factor) for rows, factor in parameter.init_turns])
            values *= factors[torch.arange(start, stop) % len(factors)]
        low, high = max(first, start) - start, min(first + length, stop) - start
        blocks.append(values.narrow(axis, low, high - low))
    return torch.cat(blocks, dim=axis)
