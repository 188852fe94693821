"""Records in which every figure is known."""

from __future__ import annotations

from typing import Any

from basestone.trainer.meters.ledger import Ledger

STEP: dict[str, Any] = {
    "kind": "step",
    "step": 7,
    "loss": 2.5,
    "grad_norm": 0.75,
    "lr": 3e-4,
    "global_batch": 8,
    "sequence_length": 128,
    "tokens": 4500,
    "tokens_per_s": 1000.5,
    "tokens_per_s_per_device": 500.25,
    "step_s": 0.5,
    "phase_s": {"data": 0.1, "forward": 0.4},
    "tflops_per_device": 250.0,
    "mfu": 0.25,
    "hfu": 0.3,
    "watts": 1100.0,
    "power_limit_w": 650.0,
    "joules_per_token": 1.1,
    "memory_gib": 2.0,
    "reserved_gib": 3.0,
    "host_gib": 0.5,
    "joules": 5500.0,
    "g_co2e": 1.5,
    "cost": 0.25,
    "goodput": 0.9,
    "data_bytes_read": 4096,
    "data_retries": 1,
    "data_bad_bytes": 0,
}
EVALUATION: dict[str, Any] = {
    "kind": "eval",
    "step": 6,
    "name": "topics",
    "loss": 2.75,
    "perplexity": 15.64,
    "bits_per_byte": 1.25,
    "tokens": 2000,
}
LEDGER = Ledger(
    attempts=2,
    tokens=5000,
    wasted_tokens=500,
    wall_s=60.0,
    joules=5500.0,
    joules_source="nvml-counter",
    wasted_joules=100.0,
    joules_by_device={"a/GPU-0": 5000.0, "b/rapl:package-0/dram": 500.0},
)
