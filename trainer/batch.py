"""One batch: its names, dtypes and axes, and how it gets from the reader to the ranks of a model replica.

What the fields are is the task's affair (data/tasks/). Between reader and ranks each is int32 [samples, columns], all
of them side by side in one buffer. In a micro-batch they are int64, but for the weights of predictions, fp32. Those of
the causal task are

field     dtype   axes
tokens    int64   [micro-batch, sequence]
labels    int64   [micro-batch, sequence]   the next token
weights   fp32    [micro-batch, sequence]   1 where the prediction counts
starts    bool    [micro-batch, sequence]   true where a document begins; missing where attention crosses documents

and travel as tokens, one more than the sequence has, and one number a place, its mark: 1 where the prediction counts,
and 2 more where a document begins.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .runtime import Runtime

MicroBatch = dict[str, Tensor]
WEIGHTS = frozenset({"weights", "real"})  # fields that say which predictions, or whole samples, count


def share(
    fields: Mapping[str, np.ndarray] | None, widths: Mapping[str, int], num_samples: int, runtime: Runtime
) -> dict[str, Tensor]:
    """Give every rank of a model replica what its reader has read.

    Args:
        fields: integers [num_samples, columns] by name on the reader, None elsewhere.
        widths: the columns of each field.

    Returns:
        The same as int32 tensors on the device of training.
    """
    buffer = torch.empty(num_samples, sum(widths.values()), dtype=torch.int32)
    if runtime.reads_data:
        assert fields is not None
        for name, part in zip(widths, buffer.split(list(widths.values()), dim=1), strict=True):
            part.copy_(torch.from_numpy(fields[name]))
    buffer = buffer.to(runtime.device, non_blocking=True)
    if dist.get_world_size(runtime.model_group) > 1:
        source = dist.get_process_group_ranks(runtime.model_group)[0]
        dist.broadcast(buffer, src=source, group=runtime.model_group)
    return dict(zip(widths, buffer.split(list(widths.values()), dim=1), strict=True))


def model_fields(fields: dict[str, Tensor], *, documents_apart: bool) -> dict[str, Tensor]:
    """Turn the fields of a task into those of its model; only those of the causal task differ."""
    return causal_fields(**fields, documents_apart=documents_apart) if "marks" in fields else fields


def causal_fields(tokens: Tensor, marks: Tensor, *, documents_apart: bool = False) -> dict[str, Tensor]:
    """Turn tokens [samples, sequence + 1] and marks [samples, sequence] into the fields of a causal model.

    With `documents_apart` they say where documents begin, and attention keeps to them.
    """
    fields = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "weights": marks % 2}
    return fields | {"starts": marks >= 2} if documents_apart else fields


def num_tokens_of(fields: Mapping[str, Tensor]) -> float:
    """Count the tokens that the model is trained on: those that are not padding, else those that are predicted.

    A text that is its own partner counts twice, as it passes through the model.
    """
    if "length" not in fields:
        return float(fields["weights"].sum())
    lengths = [fields["length"]]
    if "labels" not in fields:
        lengths.append(fields.get("other_length", fields["length"]))
    return float(sum(int(length.sum()) for length in lengths))


def passed_length(batch: MicroBatch) -> int:
    """Count the places of what one pipeline stage sends to the next for a sequence: its inputs and its targets."""
    return sum(batch[name].shape[1] for name in ("tokens", "decoder_tokens") if name in batch)


def cut(fields: Mapping[str, Tensor], micro_batch: int, multiple: int = 1) -> list[MicroBatch]:
    """Cut a rank's samples into micro-batches, a multiple of `multiple`; samples that do not count fill them up."""
    columns = {}
    for name, field in fields.items():
        if missing := -len(field) % (micro_batch * multiple):
            field = torch.cat((field, field.new_zeros(missing, field.shape[1])))
        if field.dtype != torch.bool:
            field = field.float() if name in WEIGHTS else field.long()
        columns[name] = field.split(micro_batch)
    return [
        {name: part.contiguous() for name, part in zip(columns, parts, strict=True)}
        for parts in zip(*columns.values(), strict=True)
    ]
