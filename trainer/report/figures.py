"""Figures for people: numbers, durations, and means over a noisy curve. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from ..meters.tariff import JOULES_PER_KWH

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
NO_VALUE = "n/a"
LARGEST_FORMATTED = 1e15  # from here on a format would write long rows of digits
LONGEST_S = 1e11  # 3,000 years: no time of a run


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
    return form.format(value) if form and abs(value) < LARGEST_FORMATTED else format_number(value)


def plain_decimal(value: float) -> str:
    """Write two places, and of what is below 0.01 two significant digits: never an exponent, 0 for 0 alone."""
    if value == 0:
        return "0"
    places = 2 if abs(value) >= 0.01 else 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{places}f}"


def money(value: float | None, currency: str = "") -> str:
    """Write a cost and its unit; what costs something never reads 0."""
    if value is None:
        return NO_VALUE
    if 1e-9 <= abs(value) < 0.01:
        text = plain_decimal(value)
    else:
        text = shown(value, "{:,.2f}" if abs(value) >= 0.01 else None)
    return f"{text} {currency}".rstrip()


def moment(value: object) -> datetime | None:
    """Read a record's time, in UTC; None where it is none."""
    try:
        at = datetime.fromisoformat(value) if isinstance(value, str) else None
        return at if at is None else (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def date(value: object) -> str:
    """Write a record's time to the second; "" where it is none."""
    at = moment(value)
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S} UTC"


def duration(seconds: float | None) -> str:
    """Write seconds as hours, minutes and seconds; n/a for what no run can have taken."""
    if seconds is None or not 0 <= seconds < LONGEST_S:
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
