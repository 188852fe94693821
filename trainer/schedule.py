"""Learning rate over steps: pure functions. Imports no torch."""

from __future__ import annotations

import math

from .sections import ScheduleSection


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleSection) -> float:
    """Give the learning rate of optimizer step `step` (from 0) in a run of `steps`.

    Warm-up is linear and reaches the peak after `warmup_steps`. Cosine: Loshchilov & Hutter 2017; wsd
    (warm-up, stable, decay): Hu et al. 2024, with a linear decay.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    low, span = schedule.final_ratio, max(1, steps - warmup)
    progress = min(1.0, (step - warmup) / span)
    if schedule.kind == "cosine":
        return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule.kind == "linear":
        return peak * (1 - (1 - low) * progress)
    if schedule.kind == "wsd":
        decay = schedule.decay_steps or max(1, steps // 5)
        remaining = min(1.0, max(0.0, (steps - step) / decay))
        return peak * (low + (1 - low) * remaining)
    return peak
