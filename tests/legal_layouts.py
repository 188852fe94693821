"""Every layout of a run over a few processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from basestone.trainer.config import RunConfig
from basestone.trainer.ds_config import deepspeed_config
from basestone.trainer.errors import ConfigError
from basestone.trainer.layouts import ZERO_STAGES, Layout

SIZES = (1, 2, 4)


def laid_out(run: RunConfig, vocab_size: int) -> Iterator[tuple[int, RunConfig]]:
    """Give (processes, run) of every legal layout of 1, 2 and 4 processes, with offload to host memory and without."""
    for tensor, sequence, pipeline, virtual in product(SIZES, (False, True), SIZES, (1, 2)):
        for data, zero, offload in product(SIZES, ZERO_STAGES, ("none", "cpu")):
            layout = Layout(tensor, sequence, pipeline, virtual, data, zero)
            laid = layout.of(run)
            laid = laid.model_copy(update={"parallel": laid.parallel.model_copy(update={"offload": offload})})
            if layout.processes <= max(SIZES) and _is_legal(laid, layout.processes, vocab_size):
                yield layout.processes, laid


def _is_legal(run: RunConfig, processes: int, vocab_size: int) -> bool:
    try:
        deepspeed_config(run.resolve(processes, vocab_size))
    except ConfigError:
        return False
    return run.parallel.virtual_pipeline == 1 or run.parallel.pipeline > 1
