"""One batch: its names, dtypes and axes, and how it gets from the reader to the ranks of a model replica.

field     dtype   axes
tokens    int64   [micro-batch, sequence]
labels    int64   [micro-batch, sequence]   the next token
weights   fp32    [micro-batch, sequence]   1 where the prediction counts
starts    bool    [micro-batch, sequence]   true where a document begins; None where attention crosses documents

Between reader and ranks the last two travel as one number a place, its mark: 1 where the prediction counts, and 2
more where a document begins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .runtime import Runtime


class MicroBatch(NamedTuple):
    """What one forward takes."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    starts: Tensor | None = None


def marks_of(weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Join weights (0 or 1) and starts, both [num_samples, sequence_length], into marks, uint8."""
    return weights.astype(np.uint8) + 2 * starts.astype(np.uint8)


def share(
    tokens: np.ndarray | None,
    marks: np.ndarray | None,
    num_samples: int,
    sequence_length: int,
    runtime: Runtime,
) -> tuple[Tensor, Tensor]:
    """Give every rank of a model replica what its reader has read.

    Args:
        tokens: int32 [num_samples, sequence_length + 1] on the reader, None elsewhere.
        marks: uint8 [num_samples, sequence_length] on the reader, None elsewhere.

    Returns:
        The same two as int32 tensors on the device of training.
    """
    width = 2 * sequence_length + 1
    buffer = torch.empty(num_samples, width, dtype=torch.int32)
    if runtime.reads_data:
        assert tokens is not None and marks is not None
        buffer[:, : sequence_length + 1] = torch.from_numpy(tokens)
        buffer[:, sequence_length + 1 :] = torch.from_numpy(marks)
    buffer = buffer.to(runtime.device, non_blocking=True)
    if dist.get_world_size(runtime.model_group) > 1:
        source = dist.get_process_group_ranks(runtime.model_group)[0]
        dist.broadcast(buffer, src=source, group=runtime.model_group)
    return buffer[:, : sequence_length + 1], buffer[:, sequence_length + 1 :]


def cut(
    tokens: Tensor, marks: Tensor, micro_batch: int, multiple: int = 1, *, documents_apart: bool = False
) -> list[MicroBatch]:
    """Cut a rank's samples into micro-batches, a multiple of `multiple`; samples that do not count fill them up.

    With `documents_apart` the micro-batches say where documents begin, and attention keeps to them.
    """
    missing = -len(tokens) % (micro_batch * multiple)
    if missing:
        tokens = torch.cat((tokens, tokens.new_zeros(missing, tokens.shape[1])))
        marks = torch.cat((marks, marks.new_zeros(missing, marks.shape[1])))
    tokens = tokens.long()
    return [
        MicroBatch(
            part[:, :-1].contiguous(),
            part[:, 1:].contiguous(),
            (mark % 2).float(),
            mark >= 2 if documents_apart else None,
        )
        for part, mark in zip(tokens.split(micro_batch), marks.split(micro_batch), strict=True)
    ]
