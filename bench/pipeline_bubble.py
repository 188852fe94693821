"""The bubble of a pipeline, measured against the schedule's formula, on two processes of this machine.

    python bench/pipeline_bubble.py [--repeats 3]

A Llama whose stages cost the same (a tiny vocabulary), two stages, one thread each. With p stages, v virtual stages on
a rank and m micro-batches a step takes (m + (p - 1) / v) micro-batch times, so (p - 1) / v / (m + (p - 1) / v) of it is
the bubble (Narayanan et al. 2021, section 2.2). The micro-batch time is the slope between two large m; every m runs in
turn with the others. Prints the median over the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from basestone.model.config import ModelConfig
from basestone.model.layers import megatron_config
from basestone.model.pipeline import chunks_of_ranks
from basestone.model.stage import Stage, prepare_parameters
from basestone.trainer import runtime as processes
from basestone.trainer.batch import causal_fields, cut
from basestone.trainer.forks import run_ranks
from basestone.trainer.plan import bubble_share

PIPELINE, MICRO_BATCHES, SEQUENCE, VOCAB = 2, (2, 4, 8, 16), 256, 256


MODEL = ModelConfig(
    num_layers=8, hidden_size=512, num_attention_heads=8, max_sequence_length=SEQUENCE, vocab_size=VOCAB
)


def seconds(virtual: int, repeats: int) -> dict[int, float]:
    """Give the median seconds of the schedule alone for each number of micro-batches, on this rank."""
    runtime = processes.start(pipeline=PIPELINE, virtual_pipeline=virtual)
    config = megatron_config(MODEL, dtype=torch.float32, sequence_parallel=False, on_cpu=runtime.on_cpu)
    chunks = chunks_of_ranks(MODEL.num_layers, PIPELINE, virtual)[runtime.pp_rank]
    stage = Stage(MODEL, config, chunks)
    prepare_parameters(stage, MODEL, seed=0)
    tokens = torch.randint(0, VOCAB, (max(MICRO_BATCHES), SEQUENCE + 1), dtype=torch.int32)
    batches = cut(causal_fields(tokens, torch.ones(max(MICRO_BATCHES), SEQUENCE)), 1)

    def forward_step(iterator, chunk):  # type: ignore[no-untyped-def]
        batch = next(iterator)
        return chunk(batch), lambda outcomes: (outcomes["next_token"].losses.mean(), {})

    taken: dict[int, list[float]] = {count: [] for count in MICRO_BATCHES}
    for repeat in range(repeats + 1):
        for count in MICRO_BATCHES:
            torch.distributed.barrier()
            started_s = time.perf_counter()
            processes.run_schedule(
                forward_step, stage.chunks, batches[:count], sequence_length=SEQUENCE, micro_batch=1
            )
            torch.distributed.barrier()
            if repeat:  # the first round warms up
                taken[count].append(time.perf_counter() - started_s)
    return {count: statistics.median(values) for count, values in taken.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print(f"{'schedule':<20}{'micro-batches':>14}{'seconds':>9}{'bubble':>9}{'formula':>9}")
    for virtual in (1, 2, 4):
        taken = run_ranks(seconds, PIPELINE, virtual, repeats)[0]
        less, most = MICRO_BATCHES[-2:]
        one = (taken[most] - taken[less]) / (most - less)
        name = "1F1B" if virtual == 1 else f"interleaved, v = {virtual}"
        for count in MICRO_BATCHES:
            bubble = 1 - count * one / taken[count]
            expected = bubble_share(PIPELINE, virtual, count)
            print(f"{name:<20}{count:>14}{taken[count]:>9.3f}{bubble:>9.1%}{expected:>9.1%}")


if __name__ == "__main__":
    main()
