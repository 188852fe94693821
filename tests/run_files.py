"""A small run as plain values, for tests that need no torch."""

from __future__ import annotations

import copy
from typing import Any

from basestone.trainer.config import RunConfig

VALUES: dict[str, Any] = {
    "model": {
        "family": "llama",
        "num_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "max_sequence_length": 64,
    },
    "data": {"train": "/shards/train", "tokenizer": "/shards/t.model", "sequence_length": 32},
    "train": {"steps": 20, "global_batch": 8, "micro_batch": 2, "dtype": "fp32"},
    "optimizer": {"lr": 1e-3},
}


def run_values(**changes: Any) -> dict[str, Any]:
    """Give a run's sections; `changes` are `section__key=value`, and None takes the key out."""
    values = copy.deepcopy(VALUES)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if value is None:
            values.setdefault(section, {}).pop(key, None)
        else:
            values.setdefault(section, {})[key] = value
    return values


def run_of(**changes: Any) -> RunConfig:
    """Make a checked run of `run_values`."""
    return RunConfig(**run_values(**changes))
