"""What tests of tasks on streams share: each task with its settings, and its samples by their numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from streams import open_stream

from basestone.data.config import TaskConfig
from basestone.data.stream import StreamBatch, TokenStream
from basestone.data.tasks.task import Task, make_task
from basestone.data.tokenizer import Tokenizer

LENGTH = 48
# name of a case -> settings of the task, and data.packing
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "causal": ({"name": "causal"}, "split"),
    "masked": ({"name": "masked"}, "split"),
    "whole documents": ({"name": "masked", "whole_words": True}, "best_fit"),
    "next sentence": ({"name": "masked", "next_sentence": True}, "split"),
    "spans": ({"name": "spans"}, "split"),
    "dropout": ({"name": "contrastive"}, "split"),
    "neighbours": ({"name": "contrastive", "pairs": "neighbours"}, "split"),
    "given": ({"name": "contrastive", "pairs": "given"}, "split"),
}


def case_task(case: str, model: Path, *, length: int = LENGTH, seed: int = 7) -> Task:
    settings, packing = CASES[case]
    return make_task(
        TaskConfig(**settings),
        Tokenizer(model),
        sequence_length=length,
        packing=packing,
        mask_document_start=False,
        seed=seed,
    )


def task_streams(
    task: Task, shards: Path, model: Path, readers: int = 1, *, batch: int = 12, **more: Any
) -> list[TokenStream]:
    arguments = {"sequence_length": task.row_tokens, "packing": task.packing, "seed": 7} | more
    return [
        open_stream([shards], model, reader=reader, num_readers=readers, global_batch=batch, **arguments)
        for reader in range(readers)
    ]


def take_samples(task: Task, streams: Sequence[TokenStream], count: int) -> dict[int, dict[str, list[int]]]:
    """Read global batches: sample id -> field -> row, checking form and filler."""
    samples: dict[int, dict[str, list[int]]] = {}
    for _ in range(count):
        for stream in streams:
            batch = stream.next_batch()
            for row, number in enumerate(batch.ids.tolist()):
                fields = {name: field[row].tolist() for name, field in checked_arrays(task, batch).items()}
                if number >= 0:
                    assert number not in samples
                    samples[number] = fields
    return samples


def checked_arrays(task: Task, batch: StreamBatch) -> dict[str, np.ndarray]:
    """Return the arrays of a batch, whose form is what the task says, and whose filler counts nothing."""
    arrays = task.arrays(batch)
    assert {name: field.shape for name, field in arrays.items()} == {
        name: (len(batch.ids), columns) for name, columns in task.widths.items()
    }
    assert all(field.dtype == np.int32 for field in arrays.values())
    filler = batch.ids < 0
    for name in sorted({"weights", "real", "marks"} & set(task.widths)):
        assert set(np.unique(arrays[name] % 2)) <= {0, 1} and not arrays[name][filler].any()
    assert len(np.unique(arrays["tokens"][filler])) <= 1
    return arrays


def close(streams: Sequence[TokenStream]) -> None:
    for stream in streams:
        stream.close()
