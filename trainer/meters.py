"""Throughput, FLOP/s, memory and energy of a run, from one log line to the next."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from ..model.flops import decoder_flops_per_token
from .config import ResolvedRun
from .energy import EnergyMeter
from .peaks import peak_tflops
from .rundir import Ledger
from .runtime import Runtime, visible_gpus

GIB = 1 << 30


class Meters:
    """Counts between log lines; every rank has one, and they meet when a line is due."""

    def __init__(self, resolved: ResolvedRun, runtime: Runtime) -> None:
        section = resolved.run.meter
        self._runtime = runtime
        self._energy = EnergyMeter(gpus=visible_gpus(), watts=section.watts)
        self.flops_per_token = decoder_flops_per_token(
            resolved.run.model, resolved.run.data.sequence_length, section.attention_flops
        )
        self._peak = self._peak_tflops(resolved)
        self._joules = 0.0
        self.restart()

    def _peak_tflops(self, resolved: ResolvedRun) -> float | None:
        if resolved.run.meter.peak_tflops is not None:
            return resolved.run.meter.peak_tflops
        if self._runtime.on_cpu:
            return None
        found = peak_tflops(torch.cuda.get_device_name(), resolved.run.train.dtype)
        return found[0] if found else None

    @property
    def energy_note(self) -> str:
        """Say where this rank's joules come from, or why there are none."""
        source = self._energy.source
        return source if not self._energy.note else f"{source} ({self._energy.note})"

    def restart(self) -> None:
        """Begin a new interval."""
        self._start_s = time.perf_counter()
        self._phases_s: dict[str, float] = {}
        self._steps, self._tokens = 0, 0

    def phase(self, name: str, seconds: float) -> None:
        """Book time of a phase."""
        self._phases_s[name] = self._phases_s.get(name, 0.0) + seconds

    def step(self, tokens: int) -> None:
        """Count a finished step."""
        self._steps += 1
        self._tokens += tokens

    def line(self, ledger: Ledger | None) -> dict[str, Any]:
        """Close the interval: give its figures on every rank, and book them in the ledger where there is one."""
        elapsed_s = time.perf_counter() - self._start_s
        readings = self._runtime.gather_all((self._energy.read(), self._energy.source))
        merged: dict[str, float] = {}
        for by_key, _ in readings:
            for key, joules in by_key.items():  # ranks that share a device report the same key
                merged[key] = max(merged.get(key, 0.0), joules)
        total, source = sum(merged.values()), readings[0][1]
        if ledger is not None:
            ledger.train_s += elapsed_s
            ledger.tokens += self._tokens
            ledger.joules_source = source
            if merged:
                ledger.joules = (ledger.joules or 0.0) + total - self._joules
        self._joules = total
        rate = self._tokens / elapsed_s
        tflops = rate * self.flops_per_token / self._runtime.world_size / 1e12
        figures = {
            "tokens_per_s": rate,
            "step_s": elapsed_s / max(1, self._steps),
            "tflops_per_device": tflops,
            "mfu": tflops / self._peak if self._peak else None,
            "phase_s": {name: seconds / max(1, self._steps) for name, seconds in self._phases_s.items()},
            "memory_gib": self._memory_bytes() / GIB,
            "joules": ledger.joules if ledger is not None else None,
        }
        self.restart()
        return figures

    def _memory_bytes(self) -> float:
        if self._runtime.on_cpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        return float(torch.cuda.max_memory_allocated())

    def close(self) -> None:
        """Stop sampling."""
        self._energy.close()
