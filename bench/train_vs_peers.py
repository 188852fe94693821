"""The same Llama under Hugging Face + DeepSpeed ZeRO-1 and under Basestone, in turns, on this machine.

    python bench/train_vs_peers.py [--rounds 2] [--steps 8] [--processes 2]

27 M parameters (vocabulary 8192, hidden 512, 6 layers, 8 heads in 4 groups, ffn 1536), sequences of 512, 4 on each
process, data parallel, bf16 with fp32 masters, AdamW, clipping. Every variant runs in processes of its own, A B A B,
so that a machine that slows down slows both. Prints tokens/s, the median of the steps after the second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VOCAB, HIDDEN, LAYERS, HEADS, GROUPS, FFN, SEQUENCE, MICRO_BATCH = 8192, 512, 6, 8, 4, 1536, 512, 4
VARIANTS = {
    "hf": "transformers LlamaForCausalLM (sdpa) + DeepSpeed ZeRO-1",
    "hf-compile": "the same, each layer compiled",
    "basestone": "basestone",
    "basestone-compile": "basestone, model.compile = true",
}


def batch(step: int, rank: int):  # type: ignore[no-untyped-def]
    """Give random ids, int64 [micro-batch, sequence + 1]."""
    import torch

    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, VOCAB, (MICRO_BATCH, SEQUENCE + 1), generator=generator)


def hugging_face(steps: int, compiled: bool) -> list[float]:
    """Train the usual way; give seconds a step."""
    import deepspeed
    import deepspeed.ops
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ["BASESTONE_RENDEZVOUS"], size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            max_position_embeddings=SEQUENCE,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "steps_per_print": 1 << 60,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    engine, *_ = deepspeed.initialize(model=model.bfloat16(), optimizer=optimizer, config=config)
    times = []
    for step in range(steps):
        tokens = batch(step, rank)
        started = time.perf_counter()
        loss = engine(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
        engine.backward(loss)
        engine.step()
        float(loss)
        times.append(time.perf_counter() - started)
    return times


def basestone(steps: int, compiled: bool) -> list[float]:
    """Train through our engine, as the loop does; give seconds a step."""
    import torch
    import torch.distributed as dist

    from basestone.trainer import runtime as processes
    from basestone.trainer.batch import causal_fields, cut
    from basestone.trainer.config import RunConfig
    from basestone.trainer.engine import Engine

    size = int(os.environ["WORLD_SIZE"])
    run = RunConfig(
        model={
            "family": "llama",
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_query_groups": GROUPS,
            "ffn_hidden_size": FFN,
            "max_sequence_length": SEQUENCE,
            "compile": compiled,
        },
        data={"train": "none", "tokenizer": "none", "sequence_length": SEQUENCE},
        train={"steps": steps, "global_batch": MICRO_BATCH * size, "micro_batch": MICRO_BATCH},
        optimizer={"lr": 3e-4},
    )
    runtime = processes.start()
    engine = Engine(run.resolve(size, VOCAB), runtime)
    weights = torch.ones(MICRO_BATCH, SEQUENCE, dtype=torch.int32)
    times = []
    for step in range(steps):
        tokens = batch(step, runtime.rank)
        started = time.perf_counter()
        processes.seed_step(0, step, runtime)
        loss = engine.forward_backward(
            cut(causal_fields(tokens, weights), MICRO_BATCH),
            {"next_token": float(MICRO_BATCH * SEQUENCE * size)},
        )
        dist.all_reduce(loss)
        float(loss)
        engine.update(3e-4)
        times.append(time.perf_counter() - started)
    return times


def worker(variant: str, steps: int) -> None:
    """Run one rank of a variant; rank 0 prints its step times."""
    import torch

    torch.set_num_threads(1)
    function = hugging_face if variant.startswith("hf") else basestone
    times = function(steps, variant.endswith("compile"))
    if os.environ["RANK"] == "0":
        print("TIMES", json.dumps(times), flush=True)
    os._exit(0)


def measure(variant: str, processes: int, steps: int) -> float:
    """Give tokens/s of one run of a variant."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(processes):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_RANK": str(rank),
                "BASESTONE_RENDEZVOUS": str(Path(folder) / "store"),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
            }
            line = [sys.executable, "-W", "ignore", __file__, "--worker", variant, "--steps", str(steps)]
            children.append(
                subprocess.Popen(
                    line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
            )
        output, *_ = [child.communicate()[0] for child in children]
    found = [line for line in output.splitlines() if line.startswith("TIMES")]
    if not found:
        raise SystemExit(f"{variant} failed; run it by hand with --worker to see why")
    times = json.loads(found[0].removeprefix("TIMES "))
    return processes * MICRO_BATCH * SEQUENCE / statistics.median(times[2:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--worker", choices=list(VARIANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.steps)
    rates: dict[str, list[float]] = {variant: [] for variant in arguments.variants}
    for _ in range(arguments.rounds):
        for variant, seen in rates.items():
            seen.append(measure(variant, arguments.processes, arguments.steps))
    base = statistics.mean(rates[arguments.variants[0]])
    print(f"| {'what':55} | tokens/s a round | against the first |\n|{'-' * 57}|---|---|")
    for variant, seen in rates.items():
        shown = ", ".join(f"{rate:,.0f}" for rate in seen)
        print(f"| {VARIANTS[variant]:55} | {shown} | {statistics.mean(seen) / base:.2f} |")


if __name__ == "__main__":
    main()
