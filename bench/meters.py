"""What the meters cost a step: steps with and without them, in turns, and the seconds in their calls.

    python bench/meters.py [--rounds 20] [--steps 5] [--processes 2]

Every round runs a block of steps plainly (no timers in the schedule, no phases, no lines), one with phases and a line
at its end, and one with a line after every step, in an order that turns. A line gathers what every rank read: phases,
memory, joules (here from given watts), and books them. The model is the quickstart's, data parallel, on random ids.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from basestone.trainer import runtime as processes
from basestone.trainer.batch import causal_fields, cut
from basestone.trainer.config import RunConfig
from basestone.trainer.engine import Engine
from basestone.trainer.forks import run_ranks
from basestone.trainer.meters.ledger import Ledger
from basestone.trainer.meters.meters import Meters
from basestone.trainer.meters.phases import ScheduleTimers

VOCAB, SEQUENCE, MICRO_BATCH = 4096, 256, 4
VARIANTS = ("plain", "a line a block", "a line a step")


class _NoPhases:
    """Times nothing."""

    @contextlib.contextmanager
    def device(self, name: str) -> Iterator[None]:
        yield

    host = device

    def take(self) -> dict[str, float]:
        return {}


def rank_figures(rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Give seconds a step, and seconds a step in the meters' own calls, of every block by variant."""
    size = processes.world_size()
    run = RunConfig(
        model={
            "family": "llama",
            "num_layers": 8,
            "hidden_size": 256,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "ffn_hidden_size": 704,
            "max_sequence_length": 512,
        },
        data={"train": "none", "tokenizer": "none", "sequence_length": SEQUENCE},
        train={"steps": 1, "global_batch": MICRO_BATCH * size, "micro_batch": MICRO_BATCH},
        optimizer={"lr": 3e-4},
        meter={"watts": 100},
    )
    runtime = processes.start()
    resolved = run.resolve(size, VOCAB)
    engine = Engine(resolved, runtime)
    meters, ledger, phases = Meters(resolved, runtime), Ledger(), engine.phases
    weights = torch.ones(MICRO_BATCH, SEQUENCE, dtype=torch.int32)
    generator = torch.Generator().manual_seed(runtime.rank)
    tokens = torch.randint(0, VOCAB, (MICRO_BATCH, SEQUENCE + 1), generator=generator)

    def step() -> None:
        total = engine.forward_backward(
            cut(causal_fields(tokens, weights), MICRO_BATCH),
            {"next_token": float(MICRO_BATCH * SEQUENCE * size)},
        )
        dist.all_reduce(total)
        float(total)
        engine.update(3e-4)

    def block(variant: str) -> tuple[float, float]:
        timers: Any = None if variant == "plain" else ScheduleTimers(phases)
        engine.phases = _NoPhases() if variant == "plain" else phases  # type: ignore[assignment]
        for chunk in engine.module.chunks:
            chunk.config.timers = timers
        own_s, started_s = 0.0, time.perf_counter()
        for number in range(steps):
            step()
            if variant == "plain":
                continue
            dist.barrier()  # what follows is the meters' own, and no waiting for the other rank
            before_s = time.perf_counter()
            meters.step(number, MICRO_BATCH * SEQUENCE * size, engine.phases.take())
            if variant == "a line a step" or number == steps - 1:
                meters.line(ledger)
            own_s += time.perf_counter() - before_s
        return (time.perf_counter() - started_s) / steps, own_s / steps

    figures: dict[str, dict[str, list[float]]] = {name: {"step": [], "own": []} for name in VARIANTS}
    for _ in range(3):
        step()
    for number in range(rounds):
        for place in range(len(VARIANTS)):
            variant = VARIANTS[(place + number) % len(VARIANTS)]
            dist.barrier()
            step_s, own_s = block(variant)
            figures[variant]["step"].append(step_s)
            figures[variant]["own"].append(own_s)
    return figures


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="in a block")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    measured = partial(rank_figures, arguments.rounds, arguments.steps)
    figures = run_ranks(measured, arguments.processes, timeout_s=3600, num_threads=1)[0]
    plain_s = statistics.median(figures["plain"]["step"])
    print("| steps | ms a step, median | to plain | ms in the meters' calls | of a step |")
    print("|---|---|---|---|---|")
    for name, found in figures.items():
        step_s, own_s = statistics.median(found["step"]), statistics.median(found["own"])
        print(
            f"| {name} | {1e3 * step_s:.1f} | {step_s / plain_s:.4f} | {1e3 * own_s:.2f} | {own_s / plain_s:.2%} |"
        )


if __name__ == "__main__":
    main()
