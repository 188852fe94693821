"""Run directories with every field that a run writes, of any length, without a run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TOKENS_PER_STEP = 65536
PHASES_S = {"data": 0.02, "forward": 0.25, "backward": 0.5, "gradient_sync": 0.05, "optimizer": 0.08}
CONFIG = """# resolved by basestone
# basestone 0.1.0
# torch 2.13.0

[model]
family = "llama"
hidden_size = 1024

[train]
steps = {steps}
global_batch = 32

[optimizer]
lr = {lr}

[meter]
pue = 1.2
grid = "FRA"
price_per_kwh = 0.2
price_per_gpu_hour = 2.5
currency = "EUR"
"""


def write_lines(path: Path, records: Iterable[dict[str, Any]], tail: str = "") -> None:
    """Write a file of JSON lines, with what a killed process left after them."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    """Give a line with the fields that runs have had from the first."""
    return {
        "kind": "step",
        "attempt": 1,
        "step": step,
        "time": f"2026-01-01T00:00:{step % 60:02d}Z",
        "loss": 9.0 / step + 2,
        "grad_norm": 1.0 + 1 / step,
        "lr": 1e-4,
        "tokens": step * 4096,
        "tokens_per_s": 50_000 + step,
        "step_s": 0.1,
        "tflops_per_device": 1.25,
        "mfu": None,
        "phase_s": {"data": 0.01, "forward_backward": 0.07, "optimizer": 0.02},
        "memory_gib": 3.5,
        "joules": step * 36_000.0,
        **changes,
    }


def write_run(
    path: Path,
    lines: Iterable[dict[str, Any]],
    *,
    events: Iterable[dict[str, Any]] = (),
    ledger: dict[str, Any] | None = None,
    config: str = "",
    tail: str = "",
) -> Path:
    """Write the files of a run directory; `tail` is what a killed process left of metrics.jsonl."""
    path.mkdir(exist_ok=True)
    write_lines(path / "metrics.jsonl", lines, tail)
    write_lines(path / "events.jsonl", events)
    if ledger is not None:
        (path / "ledger.json").write_text(json.dumps(ledger))
    (path / "run.toml").write_text(config)
    return path


def made_run(
    path: Path, num_steps: int, *, lr: float = 6e-4, seed: int = 1, num_events: int = 40, every: int = 50
) -> Path:
    """Write a run of two GPUs on two hosts, one of them metered; its power limit goes down halfway."""
    path.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    write_lines(path / "metrics.jsonl", _metrics(num_steps, lr, draw, every))
    steps = [1 + i * num_steps // num_events for i in range(num_events)]
    kinds = ["save"] * 8 + ["resume"]
    events = [
        {"attempt": 1, "step": step, "event": kinds[i % 9], "message": f"step_{step:08d}"}
        for i, step in enumerate(steps)
    ]
    write_lines(path / "events.jsonl", [{"time": "2026-01-01T00:00:00Z", **event} for event in events])
    problems = [
        {"time": "t", "step": 7 + i, "source": "web", "chunk": i, "bytes": 4096, "problem": "crc differs"}
        for i in range(3)
    ]
    write_lines(path / "quarantine.jsonl", problems)
    joules = num_steps * 900.0
    ledger = {
        "attempts": 3,
        "joules": joules,
        "joules_source": "nvml-counter",
        "wasted_joules": 0.04 * joules,
        "wall_s": 1.2 * num_steps,
        "train_s": 1.0 * num_steps,
        "wasted_s": 0.05 * num_steps,
        "gpu_s": 4.8 * num_steps,
        "tokens": num_steps * TOKENS_PER_STEP,
        "wasted_tokens": num_steps * TOKENS_PER_STEP // 20,
        "idle_w": 130.0,
        "hosts": 1,
        "all_hosts": 2,
        "joules_by_device": {"node-1/GPU-aaaa": 0.52 * joules, "node-1/GPU-bbbb": 0.48 * joules},
    }
    (path / "ledger.json").write_text(json.dumps(ledger))
    (path / "run.toml").write_text(CONFIG.format(steps=num_steps, lr=lr))
    (path / "COMPLETE").write_text(f"step {num_steps}\n")
    return path


def _metrics(num_steps: int, lr: float, draw: random.Random, every: int) -> Iterator[dict[str, Any]]:
    joules = 0.0
    for step in range(1, num_steps + 1):
        warm = min(1.0, step / max(1.0, num_steps / 50))
        watts = (700.0 if step < num_steps // 2 else 520.0) + draw.gauss(0, 8)
        rate = TOKENS_PER_STEP / (0.95 if step < num_steps // 2 else 1.05) * draw.gauss(1, 0.01)
        joules += watts * 0.95
        loss = 2.4 + 8 * (1 + 2000 * step / num_steps) ** -0.45 + draw.gauss(0, 0.03)
        yield {
            "kind": "step",
            "step": step,
            "loss": loss + (2.0 if step == num_steps * 2 // 3 else 0.0),
            "grad_norm": 0.6 + 4 / step + abs(draw.gauss(0, 0.1)),
            "lr": lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / num_steps))),
            "global_batch": 32,
            "tokens": step * TOKENS_PER_STEP,
            "tokens_per_s": rate,
            "step_s": 0.95,
            "phase_s": {**PHASES_S, **({"checkpoint": 1.5, "evaluate": 4.0} if step % every == 1 else {})},
            "tflops_per_device": rate / 400,
            "mfu": rate / 190_000,
            "hfu": rate / 145_000,
            "watts": watts,
            "power_limit_w": 700.0 if step < num_steps // 2 else 500.0,
            "joules_per_token": watts / rate,
            "memory_gib": 41.0 + draw.random(),
            "reserved_gib": 48.0,
            "host_gib": 9.0 + 3 * step / num_steps,
            "joules": joules,
            "g_co2e": joules / 3.6e6 * 1.2 * 56,
            "cost": joules / 3.6e6 * 1.2 * 0.2 + step * 4.8 / 3600 * 2.5,
            "goodput": 0.79,
            "data_bytes_read": step * 300_000,
            "data_retries": 2,
            "data_cache_hits": step,
            "data_bad_chunks": 3,
            "data_bad_bytes": 12288,
            "data_shares": {
                "web": 0.7 - 0.2 * step / num_steps,
                "code": 0.2,
                "books": 0.1 + 0.2 * step / num_steps,
            },
            "attempt": 1,
            "time": f"2026-01-01T{step // 3600 % 24:02d}:{step // 60 % 60:02d}:{step % 60:02d}.000+00:00",
        }
        if step % every == 0:
            for name, offset in (("web", 0.1), ("code", -0.6), ("books", 0.3)):
                rise = max(0.0, step / num_steps - 0.6) if name == "code" else 0.0
                heldout = 2.4 + 8 * (1 + 2000 * step / num_steps) ** -0.45 + offset + rise
                yield {
                    "kind": "eval",
                    "step": step,
                    "name": name,
                    "loss": heldout,
                    "perplexity": math.exp(heldout),
                    "bits_per_byte": heldout / 3,
                    "tokens": 65536,
                    "attempt": 1,
                }
