"""Figures for people: numbers, durations, and means over a noisy curve. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..meters.tariff import JOULES_PER_KWH

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
NO_VALUE = "n/a"


def format_number(value: float, digits: int = 4) -> str:
    """Write a number for people: thousands by prefix, `digits` significant digits, no trailing zeros."""
    if value == 0:
        return "0"
    for factor, prefix in PREFIXES:
        if abs(value) >= factor * (10 if prefix == "k" else 1):
            return f"{value / factor:.{digits}g}{prefix}"
    return f"{value:.{digits}g}"


def shown(value: float | None, form: str | None = None) -> str:
    """Write a number, by a format where one is given; what is unknown is n/a."""
    if value is None:
        return NO_VALUE
    return form.format(value) if form else format_number(value)


def duration(seconds: float | None) -> str:
    """Write seconds as hours, minutes and seconds."""
    if seconds is None:
        return NO_VALUE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def energy(joules: float | None) -> str:
    """Write joules, from a tenth of a kWh on as kWh."""
    if joules is None:
        return NO_VALUE
    if joules >= JOULES_PER_KWH / 10:
        return f"{format_number(joules / JOULES_PER_KWH)} kWh"
    return f"{format_number(joules)} J"


def ratio(part: float | None, whole: float | None) -> float | None:
    """Divide, where both are known and there is something to divide by."""
    return part / whole if part is not None and whole else None


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Give the exponential mean of each value and those before it; `span` values make up most of it.

    At the beginning, where curves are steep, it is a fifth of those that there are.
    """
    mean, means = 0.0, []
    for i, value in enumerate(values):
        share = 1 - math.exp(-1 / max(1.0, min(span, i / 5)))
        mean += max(share, 1 / (i + 1)) * (value - mean) if i < 10 else share * (value - mean)
        means.append(mean)
    return means
