"""The closed forms of FLOPs against torch's count of what our own layers do, recomputed or not.

With dropout attention is eager here; without, it is a fused kernel for CPUs that torch's counter does not see, and the
forms at a length of 0 leave the scores out.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from small import GLOBAL_BATCH, SEQUENCE, make_engine, micro_batches_of, run_config
from torch.utils.flop_counter import FlopCounterMode

from basestone.model.flops import flops_per_token, recomputed_flops_per_token
from basestone.trainer import runtime as processes
from basestone.trainer.forks import run_ranks

pytestmark = pytest.mark.dist


def _flops_per_token(family: str, changes: dict[str, Any]) -> tuple[float, float, float]:
    """Count a step's forward and backward; give it beside the closed forms."""
    run = run_config(family, **changes)
    engine = make_engine(run)
    processes.seed_step(run.run.seed, 0, engine.runtime)
    with FlopCounterMode(display=False) as counter:
        batches, num_tokens = micro_batches_of(0, run, slice(None))
        engine.forward_backward(batches, {"next_token": num_tokens})
    shape = (engine.model, SEQUENCE if engine.model.dropout else 0, "full")
    return (
        counter.get_total_flops() / (GLOBAL_BATCH * SEQUENCE),
        flops_per_token(*shape),
        recomputed_flops_per_token(*shape),
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_what_our_layers_do_is_what_the_forms_say(family, dropout):
    count = functools.partial(_flops_per_token, family)
    ((plain, form, _),) = run_ranks(count, 1, {"model__dropout": dropout})
    assert plain / form == pytest.approx(1, abs=1e-6)
    ((with_recompute, form, again),) = run_ranks(
        count, 1, {"model__dropout": dropout, "train__recompute": True}
    )
    assert (with_recompute - plain) / again == pytest.approx(1, abs=1e-6)
