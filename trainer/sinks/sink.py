"""Where a run's figures go beside metrics.jsonl: what every such place does, and how it calls the figures."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Protocol

from ..errors import ConfigError

STEP_SCALARS = (
    "loss",
    "grad_norm",
    "lr",
    "sequence_length",
    "tokens_per_s",
    "tflops_per_device",
    "mfu",
    "hfu",
    "memory_gib",
    "reserved_gib",
    "host_gib",
    "joules",
    "watts",
    "joules_per_token",
    "g_co2e",
    "cost",
    "goodput",
)
EVAL_SCALARS = ("loss", "perplexity", "bits_per_byte")
# how held-out figures of a part of the loss end, shares of right predictions among them
SHARES = ("_accuracy", "_recall_at_10")
OF_PARTS = ("_loss", *SHARES)


class Sink(Protocol):
    """Takes records of metrics.jsonl, on rank 0. Whatever it raises ends it, and not the run."""

    @property
    def name(self) -> str:
        """What people call it."""

    def begin(self, run_id: str, step: int) -> str | None:
        """Open it for a run that goes on from a step; give what the user should know."""

    def step(self, record: dict[str, Any]) -> None:
        """Take a line of kind `step`."""

    def evaluation(self, record: dict[str, Any]) -> None:
        """Take a line of kind `eval`."""

    def close(self) -> None:
        """Write what is left and let everything go, whether or not it has begun."""


def step_scalars(record: dict[str, Any]) -> dict[str, float]:
    """Name the figures of a step; what is not known has no name."""
    known = {f"train/{name}": record[name] for name in STEP_SCALARS if record.get(name) is not None}
    return known | {f"phase/{name}": seconds for name, seconds in record.get("phase_s", {}).items()}


def evaluation_scalars(record: dict[str, Any]) -> dict[str, float]:
    """Name the figures of a held-out set."""
    of_parts = (name for name in record if name.endswith(OF_PARTS))
    wanted = (name for name in (*EVAL_SCALARS, *of_parts) if name in record)
    return {f"heldout/{record['name']}/{name}": record[name] for name in wanted}


def load_extra(module: str, *, extra: str, key: str) -> ModuleType:
    """Import what an extra brings.

    Raises:
        ConfigError: it is not installed; the message says how, and that `key` asks for it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{key} needs the package {module}; pip install 'basestone[{extra}]', or leave {key} out"
        ) from error
