"""Axes of a chart: ticks at round numbers, linear or logarithmic, and the grid behind the curves. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .figures import format_number

WIDTH, HEIGHT = 600, 250
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 14, 40


def nice_ticks(low: float, high: float, num_ticks: int) -> list[float]:
    """Give multiples of 1, 2 or 5 times a power of ten inside [low, high], about `num_ticks` of them."""
    raw = (high - low) / max(num_ticks, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [0.0 if i == 0 else i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class Axis:
    """Places the values from `low` to `high` between the pixels `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    @staticmethod
    def over(
        values: Sequence[float],
        start: float,
        end: float,
        *,
        num_ticks: int,
        log: bool = False,
        pad: bool = False,
        whole: bool = False,
    ) -> Axis:
        """Span values: with a margin (`pad`), by powers of ten (`log`), with ticks at whole numbers alone (`whole`)."""
        scaled = [math.log10(value) for value in values] if log else values
        low, high = min(scaled), max(scaled)
        if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):  # a constant, or a single point
            spread = abs(high) * 0.1 or 1.0
            low, high = low - spread, high + spread
        elif pad:
            margin = (high - low) * 0.05
            low, high = (max(low - margin, 0.0) if low >= 0 and not log else low - margin), high + margin
        ticks = _log_ticks(low, high) if log else nice_ticks(low, high, num_ticks)
        kept = tuple(tick for tick in ticks if not whole or tick == round(tick))
        return Axis(low, high, start, end, log, kept)

    def place(self, value: float) -> float:
        """Give the pixel of a value."""
        scaled = math.log10(value) if self.log else value
        return self.start + (scaled - self.low) / (self.high - self.low) * (self.end - self.start)


def draw_grid(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    """Draw grid lines, ticks and what the axes are."""
    parts = []
    for tick, text in zip(y_axis.ticks, _tick_labels(y_axis.ticks), strict=True):
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    floor = HEIGHT - BOTTOM
    for tick, text in zip(x_axis.ticks, _tick_labels(x_axis.ticks), strict=True):
        x = x_axis.place(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    centre = (TOP + floor) / 2
    parts.append(
        f'<text class="label" transform="translate(13 {centre}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _log_ticks(low: float, high: float) -> list[float]:
    """Give powers of ten, or 1-2-5 where they are few, between 10^low and 10^high."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 3 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return inside or [10.0 ** ((low + high) / 2)]


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """Write the ticks with as many digits as tell them apart."""
    for digits in range(4, 10):
        labels = [format_number(tick, digits) for tick in ticks]
        if len(set(labels)) == len(ticks):
            break
    return labels
