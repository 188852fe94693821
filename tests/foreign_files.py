"""A small run whose weights come from a file of torch.save, and how an import is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import run_of

from basestone.model.families import layout_of
from basestone.trainer.config import ResolvedRun
from basestone.trainer.errors import ConfigError

VOCAB = 300  # padded to a multiple, in our own shapes

Import = Callable[..., Path]


def resolved_run(family: str = "llama", **changes: Any) -> ResolvedRun:
    if family == "gpt2":
        changes = {"model__family": "gpt2", "model__num_query_groups": None, **changes}
    return run_of(**changes).resolve(1, VOCAB)


def own_states(resolved: ResolvedRun) -> dict[str, torch.Tensor]:
    return {name: torch.randn(row.shape) for name, row in layout_of(resolved.run.model).items()}


def refused(bring_in: Import, saved: Any, *words: str, resolved: ResolvedRun | None = None) -> str:
    """Check that nothing is left of a refused import, and give the message."""
    with pytest.raises(ConfigError) as caught:
        bring_in(saved, resolved)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert caught.value.exit_code == 64
    return text
