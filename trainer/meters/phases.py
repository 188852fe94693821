"""Where a step's time goes: seconds by phase, from device events where there is a device.

An event is a mark in the device's queue: recording it waits for nothing, and the seconds between two are asked for
once both have passed. What the host waits for (data, a save) is timed by its clock. Phases:

    data            waiting for the readers and the broadcast
    forward         of all micro-batches
    backward        of all micro-batches, with what ZeRO reduces meanwhile
    bubble          waiting for neighbouring pipeline stages, and sending to them
    gradient_sync   reductions after the last backward
    optimizer       clipping, the update, and gathering the new weights
    checkpoint      what a save keeps training from
    evaluate        held-out losses
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What Megatron-core's schedules call their parts.
COMPUTE = {"forward-compute": "forward", "backward-compute": "backward"}
WHOLE = "forward-backward"  # the sum of the others
MILLI = 1e3  # events count ms


class Phases:
    """Adds up seconds by phase."""

    def __init__(self, *, on_cpu: bool) -> None:
        """Start at nothing."""
        self._mark: Callable[[], Any] = time.perf_counter if on_cpu else _record
        self._pending: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = {}
        self._whole: str | None = None

    @contextmanager
    def device(self, name: str) -> Iterator[None]:
        """Time what the device does; inside `host` it counts to that phase."""
        start = self._mark()
        yield
        self.span(name, start)

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Time what the host waits for, and everything in it, as one phase."""
        outer, self._whole = self._whole, name
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._whole = outer
            if outer is None:
                self._add(name, time.perf_counter() - start_s)

    def mark(self) -> Any:
        """Give a mark of now."""
        return self._mark()

    def span(self, name: str, start: Any) -> None:
        """Count from a mark until now, but for what lies in a `host` phase."""
        if self._whole is None:
            self._pending.append((name, start, self._mark()))

    def take(self) -> dict[str, float]:
        """Give the seconds of what was done since the last call; what a device is still at comes with the next."""
        pending, self._pending = self._pending, []
        for name, start, end in pending:
            if isinstance(end, float):
                self._add(name, end - start)
            elif end.query():
                self._add(name, start.elapsed_time(end) / MILLI)
            else:
                self._pending.append((name, start, end))
        taken, self._seconds = self._seconds, {}
        return taken

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


class ScheduleTimers:
    """What Megatron-core's schedules take for their `timers`; marks in place of its own, which stop the device."""

    def __init__(self, phases: Phases) -> None:
        """Book to `phases`."""
        self._phases = phases
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        """Give the timer of a part; everything but computing is waiting for a neighbour or sending to it."""
        if name not in self._timers:
            self._timers[name] = _Timer(self._phases, None if name == WHOLE else COMPUTE.get(name, "bubble"))
        return self._timers[name]


class _Timer:
    def __init__(self, phases: Phases, phase: str | None) -> None:
        self._phases, self._phase = phases, phase
        self._start: Any = None

    def start(self, barrier: bool = False) -> None:
        """Begin; nobody is waited for."""
        if self._phase is not None:
            self._start = self._phases.mark()

    def stop(self, barrier: bool = False) -> None:
        """End."""
        if self._phase is not None:
            self._phases.span(self._phase, self._start)


def _record() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
