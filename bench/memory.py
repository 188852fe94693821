"""Memory of a rank, while the model is built and between steps, against the formula that `--dry-run` prints.

    python bench/memory.py [--hidden 1024] [--layers 8]

Resident memory of the process over what it had before the model was built, as the kernel counts it (VmRSS, and VmHWM
for the highest), on CPU processes of this machine. "share" is what the rank holds of weights, gradients and optimizer
by the formula; the most while building stays near it where no rank holds more than its share.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch

import basestone.trainer.engine
from basestone.trainer import runtime as processes
from basestone.trainer.batch import causal_fields, cut
from basestone.trainer.config import ResolvedRun, RunConfig
from basestone.trainer.forks import run_ranks
from basestone.trainer.layouts import Layout, parse_layout
from basestone.trainer.plan import memory_bytes

LAYOUTS = (
    "dp1-z1",
    "dp2-z1",
    "dp2-z2",
    "dp2-z3",
    "dp4-z3",
    "tp2-z1",
    "tp2-dp2-z3",
    "pp2-z1",
    "pp2-dp2-z1",
    "pp4-z1",
)
MIB, SEQUENCE, VOCAB = 1 << 20, 128, 1024


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(resolved: ResolvedRun) -> tuple[int, int, int]:
    """Give bytes over the start: the most while building, what is left then, and what is left after two steps."""
    parallel = resolved.run.parallel
    runtime = processes.start(tensor=parallel.tensor, pipeline=parallel.pipeline)
    gc.collect()
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins anew
    engine = basestone.trainer.engine.Engine(resolved, runtime)
    peak = _status_bytes("VmHWM") - before
    gc.collect()
    built = _status_bytes("VmRSS") - before
    tokens = torch.randint(0, VOCAB, (2, SEQUENCE + 1), dtype=torch.int32)
    for _ in range(2):
        batches = cut(causal_fields(tokens, torch.ones(2, SEQUENCE)), 1)
        engine.forward_backward(batches, {"next_token": 2.0 * SEQUENCE})
        engine.update(1e-4)
    gc.collect()
    return peak, built, _status_bytes("VmRSS") - before


def run_of(layout: Layout, hidden: int, layers: int) -> RunConfig:
    """Make the run of one layout."""
    run = RunConfig(
        model={
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": 8,
            "max_sequence_length": SEQUENCE,
            "vocab_size": VOCAB,
        },
        data={"train": "nowhere", "tokenizer": "nowhere", "sequence_length": SEQUENCE},
        train={"steps": 1, "global_batch": 2 * layout.data, "dtype": "bf16"},
        optimizer={"lr": 1e-3},
    )
    return layout.of(run)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    print(f"{'MiB on the fullest rank':<26}{'share':>8}{'building':>10}{'built':>8}{'trained':>9}")
    for name in LAYOUTS:
        layout = parse_layout(name)
        size = layout.processes
        resolved = run_of(layout, arguments.hidden, arguments.layers).resolve(size, VOCAB)
        kinds = [memory_bytes(resolved, rank) for rank in range(layout.pipeline)]
        share = max(kind["weights"] + kind["gradients"] + kind["optimizer"] for kind in kinds)
        figures = [max(ranks) for ranks in zip(*run_ranks(measure, size, resolved), strict=True)]
        peak, built, trained = (figure / MIB for figure in figures)
        print(f"{layout!s:<26}{share / MIB:>8.0f}{peak:>10.0f}{built:>8.0f}{trained:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
