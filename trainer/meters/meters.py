"""Throughput, FLOP/s, memory and energy of a run, from one log line to the next."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import psutil
import torch

from ...model.flops import recomputed_flops_per_token
from ..config import ResolvedRun
from ..plan import token_flops
from ..runtime import Runtime, visible_gpus
from .energy import MEANING, EnergyMeter, Source
from .ledger import Ledger
from .peaks import peak_tflops
from .tariff import Tariff

GIB = 1 << 30
BEST_FIRST = list(MEANING)
OUTSIDE_STEPS = ("checkpoint", "evaluate")


class _Reading(NamedTuple):
    """What one rank brings to a log line."""

    host: str
    gpus: tuple[str, ...]
    joules: dict[str, float]
    power_limits_w: dict[str, float]
    source: Source
    elapsed_s: float
    phases_s: dict[str, float]
    memory_gib: tuple[float | None, float | None, float]  # allocated, reserved, of the host


class Meters:
    """Counts between log lines; every rank has one, and they meet when a line is due."""

    def __init__(self, resolved: ResolvedRun, runtime: Runtime) -> None:
        run, section = resolved.run, resolved.run.meter
        self._resolved, self._runtime, self.gpus = resolved, runtime, tuple(visible_gpus())
        self._counted_s = psutil.Process().create_time()  # the start of the process costs, too
        age_s = time.time() - self._counted_s
        self._energy = EnergyMeter(gpus=self.gpus, watts=section.watts, age_s=age_s)
        self.tariff = Tariff(section)
        has_causal_layers = run.model.causal or run.model.num_decoder_layers > 0
        self._where_causal = " in the decoder" if run.model.num_decoder_layers else ""
        self._looks_first = run.model.pooling is not None  # for the vectors of all micro-batches
        self._convention = section.attention_flops if has_causal_layers else "full"
        self.flops_per_token = {length: token_flops(resolved, length) for length in run.lengths.values()}
        self._recomputed_flops = {
            length: recomputed_flops_per_token(
                run.model, length, section.attention_flops, target_length=resolved.num_predicted(length)
            )
            if run.train.recompute
            else 0.0
            for length in self.flops_per_token
        }
        self._dtype = run.train.dtype
        self._peak, self.peak_note = self._find_peak(resolved)
        self._joules: dict[str, float] = {}
        self._begin(time.perf_counter())

    def _find_peak(self, resolved: ResolvedRun) -> tuple[float | None, str]:
        """Give the peak TFLOP/s of a device, and whose figure it is or why there is none."""
        dtype, given = resolved.run.train.dtype, resolved.run.meter.peak_tflops
        if given is not None:
            return given, "given in the run file"
        if self._runtime.on_cpu:
            return None, "no MFU: a CPU has no peak to go by; meter.peak_tflops sets one"
        name = torch.cuda.get_device_name()
        if found := peak_tflops(name, dtype):
            return found
        return None, f"no MFU: no peak is known for {name} in {dtype}; meter.peak_tflops sets one"

    @property
    def reads_nothing(self) -> bool:
        """Tell whether this rank has no source of joules."""
        return self._energy.source == "none"

    @property
    def energy_note(self) -> str:
        """Say where this rank's joules come from, or why there are none."""
        source = self._energy.source
        return source if not self._energy.note else f"{source} ({self._energy.note})"

    @property
    def flops_note(self) -> str:
        """Say how FLOPs are counted, and what MFU is a share of."""
        peak = self.peak_note if self._peak is None else f"peak {self._peak:g} TFLOP/s ({self.peak_note})"
        (_, longest), *others = self.flops_per_token.items()
        shorter = "".join(f" ({flops:.4g} in sequences of {length})" for length, flops in others)
        attention = f"{self._convention}{self._where_causal if self._convention == 'causal' else ''}"
        return f"{longest:.4g} a token{shorter}, attention {attention}; {peak}"

    @property
    def dtype_note(self) -> str | None:
        """Say that the run's dtype is slow on this CPU, where it is."""
        if not self._runtime.on_cpu or self._dtype != "bf16" or _multiplies_bf16():
            return None
        return "this CPU multiplies bf16 many times slower than fp32; set train.dtype = 'fp32'"

    def measure_idle(self, seconds: float) -> float | None:
        """Wait so long, and give the watts that all devices drew; None where nothing can be read."""
        before = self._gather()
        time.sleep(seconds)
        used = _used(_merged(before), _merged(self._gather()))
        return sum(used.values()) / seconds if used else None

    def _begin(self, start_s: float) -> None:
        """Begin a new interval: what the next line speaks of."""
        self._start_s = start_s
        self._phases_s: dict[str, float] = {}
        self._steps, self._tokens = 0, 0
        self._flops, self._hardware_flops = 0.0, 0.0
        self._drawn: float | None = None  # joules of it that were booked, as the next two
        self._booked_tokens, self._booked_s = 0, 0.0

    def step(self, step: int, tokens: int, phases_s: dict[str, float]) -> None:
        """Count a finished step, its tokens, and seconds by phase since the one before."""
        batches = self._resolved.batches
        sequence_length = batches.sequence_length(step)
        num_micro_batches = self._resolved.num_micro_batches(batches.global_batch(step))
        self._steps += 1
        self._tokens += tokens
        flops = tokens * self.flops_per_token[sequence_length]
        self._flops += flops
        self._hardware_flops += flops + tokens * self._recomputed_flops[sequence_length]
        if self._looks_first and num_micro_batches > 1:
            self._hardware_flops += flops / 3  # a forward more; the backward takes two thirds
        for name, seconds in phases_s.items():
            self._phases_s[name] = self._phases_s.get(name, 0.0) + seconds

    def restart(self, ledger: Ledger | None) -> None:
        """Book what was no training, before the first step or after the last line, and begin a new interval."""
        self._book(ledger, self._gather(), training=False)
        self._begin(self._read_s)

    def book(self, ledger: Ledger | None) -> None:
        """Bring the ledger up to date, with the interval going on; after a step, on every rank."""
        self._book(ledger, self._gather(), training=True)

    def line(self, ledger: Ledger | None) -> dict[str, Any]:
        """Close the interval: give its figures on every rank, and book them in the ledger where there is one.

        Rates are those of the steps, without evaluations and what a save kept them from.
        """
        readings, steps = self._gather(), max(1, self._steps)
        self._book(ledger, readings, training=True)
        elapsed_s, in_steps_s, phases_s = _mean_seconds(readings)
        rate = self._tokens / in_steps_s
        tflops, hardware = (
            flops / in_steps_s / self._runtime.world_size / 1e12
            for flops in (self._flops, self._hardware_flops)
        )
        joules = self._drawn
        figures = {
            "tokens_per_s": rate,
            "tokens_per_s_per_device": rate / self._runtime.world_size,
            "step_s": in_steps_s / steps,
            "phase_s": {name: seconds / steps for name, seconds in phases_s.items()},
            "tflops_per_device": tflops,
            "mfu": tflops / self._peak if self._peak else None,
            "hfu": hardware / self._peak if self._peak else None,
            "watts": joules / elapsed_s if joules is not None else None,
            "power_limit_w": _lowest_limit(readings),
            "joules_per_token": joules / self._tokens if joules is not None and self._tokens else None,
            **_memory(readings),
            **self._totals(ledger),
        }
        self._begin(self._read_s)  # what a line itself takes is the next one's
        return figures

    def _gather(self) -> list[_Reading]:
        self._read_s = time.perf_counter()
        return self._runtime.gather_all(
            _Reading(
                socket.gethostname(),
                self.gpus,
                self._energy.read(),
                self._energy.power_limits_w(),
                self._energy.source,
                self._read_s - self._start_s,
                self._phases_s,
                self._memory_gib(),
            )
        )

    def _book(self, ledger: Ledger | None, readings: Sequence[_Reading], *, training: bool) -> None:
        """Book what came since the last time; every rank keeps count, rank 0 has the ledger."""
        now, now_s = _merged(readings), time.time()
        used, self._joules = _used(self._joules, now), {**self._joules, **now}
        elapsed_s, self._counted_s = max(0.0, now_s - self._counted_s), now_s
        in_steps_s = _mean_seconds(readings)[1] if training else self._booked_s
        train_s, self._booked_s = in_steps_s - self._booked_s, in_steps_s
        tokens, self._booked_tokens = self._tokens - self._booked_tokens, self._tokens
        if used:
            self._drawn = (self._drawn or 0.0) + sum(used.values())
        if ledger is None:
            return
        ledger.wall_s += elapsed_s
        ledger.gpu_s += elapsed_s * len({gpu for reading in readings for gpu in reading.gpus})
        ledger.train_s += train_s
        ledger.tokens += tokens
        ledger.hosts = len({reading.host for reading in readings if reading.joules})
        ledger.all_hosts = len({reading.host for reading in readings})
        if used:
            ledger.draw(used, _weakest(readings, ledger.joules_source), tokens)

    def _totals(self, ledger: Ledger | None) -> dict[str, Any]:
        """Give what the run has come to, over all its attempts."""
        if ledger is None:
            return {}
        footprint = self.tariff.footprint(ledger.joules, ledger.gpu_s)
        return {
            "joules": ledger.joules,
            "g_co2e": footprint.g_co2e,
            "cost": footprint.cost,
            "goodput": ledger.goodput,
        }

    def _memory_gib(self) -> tuple[float | None, float | None, float]:
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        if self._runtime.on_cpu:
            return None, None, host
        return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB, host

    def close(self) -> None:
        """Stop sampling."""
        self._energy.close()


def _merged(readings: Sequence[_Reading]) -> dict[str, float]:
    """Give the joules by device: one that several ranks, or containers of a host, read counts once."""
    merged: dict[str, tuple[str, float]] = {}
    for reading in readings:
        for key, joules in reading.joules.items():
            device = key.partition("/")[2]
            identity = device if device.startswith("GPU-") else key
            name, most = merged.get(identity, (key, 0.0))
            merged[identity] = name, max(most, joules)
    return dict(merged.values())


def _used(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    return {device: max(0.0, joules - before.get(device, 0.0)) for device, joules in now.items()}


def _mean_seconds(readings: Sequence[_Reading]) -> tuple[float, float, dict[str, float]]:
    """Give seconds of the interval, those in steps, and those of each phase, as means over the ranks.

    A phase that a rank does not have took it none.
    """
    elapsed_s = sum(reading.elapsed_s for reading in readings) / len(readings)
    names = dict.fromkeys(name for reading in readings for name in reading.phases_s)
    phases_s = {
        name: sum(reading.phases_s.get(name, 0.0) for reading in readings) / len(readings) for name in names
    }
    return elapsed_s, elapsed_s - sum(phases_s.get(name, 0.0) for name in OUTSIDE_STEPS), phases_s


def _weakest(readings: Sequence[_Reading], before: str) -> str:
    """Give the weakest source that any joule of the run comes from."""
    sources = {before, *(reading.source for reading in readings)} - {"none"}
    return max(sources, key=BEST_FIRST.index, default="none")


def _lowest_limit(readings: Sequence[_Reading]) -> float | None:
    return min((watts for reading in readings for watts in reading.power_limits_w.values()), default=None)


def _memory(readings: Sequence[_Reading]) -> dict[str, float | None]:
    """Give the most that a rank held, in GiB: what counts on its device first, of a CPU the host's."""
    allocated, reserved, host = (
        max((value for value in column if value is not None), default=None)
        for column in zip(*(reading.memory_gib for reading in readings), strict=True)
    )
    return {
        "memory_gib": host if allocated is None else allocated,
        "reserved_gib": reserved,
        "host_gib": host,
    }


def _multiplies_bf16() -> bool:
    """Tell whether oneDNN has kernels for bf16 on this CPU (on x86 from AVX-512 on)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
