"""Line charts as inline SVG, coloured by the page's style sheet. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 270
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 14, 40
MAX_POINTS = 1000
MAX_HOVER_POINTS = 150
NUM_COLOURS = 6
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve: (x, y) in order of x. `dotted` marks the points, for curves of few."""

    name: str
    points: Sequence[Point]
    dotted: bool = False


@dataclass(frozen=True)
class Marker:
    """A vertical line at `x` whose text shows on hovering; a faint one is for what is usual."""

    x: float
    text: str
    faint: bool = False


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, markers: Sequence[Marker] = (), log: bool = False
) -> str:
    """Draw curves over one x axis; gives "" where there is nothing finite to draw.

    `y_label` carries the unit. `log` takes a logarithmic y axis, and leaves out what is not positive.
    """
    shown = [Series(one.name, _drawable(one.points, log), one.dotted) for one in series]
    shown = [one for one in shown if one.points]
    if not shown:
        return ""
    x_axis = _Axis.over(
        [x for one in shown for x, _ in one.points], LEFT, WIDTH - RIGHT, num_ticks=8, whole=True
    )
    y_axis = _Axis.over(
        [y for one in shown for _, y in one.points], HEIGHT - BOTTOM, TOP, num_ticks=5, log=log, pad=True
    )
    parts = [_grid(x_axis, y_axis, x_label, y_label)]
    parts += [_marker(marker, x_axis) for marker in markers if x_axis.low <= marker.x <= x_axis.high]
    for index, one in enumerate(shown):
        parts.append(_curve(one, index % NUM_COLOURS, x_axis, y_axis, x_label, y_label))
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">'
        f"{''.join(parts)}</svg>"
    )
    return (_legend(shown) if len(shown) > 1 else "") + svg


def format_number(value: float, digits: int = 4) -> str:
    """Write a number for people: thousands by prefix, `digits` significant digits, no trailing zeros."""
    if value == 0:
        return "0"
    for factor, prefix in PREFIXES:
        if abs(value) >= factor * (10 if prefix == "k" else 1):
            return f"{value / factor:.{digits}g}{prefix}"
    return f"{value:.{digits}g}"


def nice_ticks(low: float, high: float, num_ticks: int) -> list[float]:
    """Give multiples of 1, 2 or 5 times a power of ten inside [low, high], about `num_ticks` of them."""
    raw = (high - low) / max(num_ticks, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [0.0 if i == 0 else i * step for i in range(first, last + 1)]


def thin(points: Sequence[Point], max_points: int) -> list[Point]:
    """Keep at most `max_points`: the ends, and of each run between them the lowest and the highest point.

    So a curve keeps its span and its spikes.
    """
    if len(points) <= max_points:
        return list(points)
    inner = points[1:-1]
    num_runs = max_points // 2 - 1
    kept = [points[0]]
    for run in range(num_runs):
        part = range(run * len(inner) // num_runs, (run + 1) * len(inner) // num_runs)
        lowest = min(part, key=lambda i: inner[i][1])
        highest = max(part, key=lambda i: inner[i][1])
        kept += [inner[i] for i in sorted({lowest, highest})]
    return [*kept, points[-1]]


@dataclass(frozen=True)
class _Axis:
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
    ) -> _Axis:
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
        return _Axis(low, high, start, end, log, kept)

    def place(self, value: float) -> float:
        scaled = math.log10(value) if self.log else value
        return self.start + (scaled - self.low) / (self.high - self.low) * (self.end - self.start)


def _log_ticks(low: float, high: float) -> list[float]:
    """Give powers of ten, or 1-2-5 where they are few, between 10^low and 10^high."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 3 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return inside or [10.0 ** ((low + high) / 2)]


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]
    return thin(finite, MAX_POINTS)


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
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


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """Write the ticks with as many digits as tell them apart."""
    for digits in range(4, 10):
        labels = [format_number(tick, digits) for tick in ticks]
        if len(set(labels)) == len(ticks):
            break
    return labels


def _marker(marker: Marker, x_axis: _Axis) -> str:
    x = x_axis.place(marker.x)
    style = "mark faint" if marker.faint else "mark"
    return (
        f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        f"<title>{escape(marker.text)}</title></line>"
    )


def _curve(series: Series, colour: int, x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    placed = [(x_axis.place(x), y_axis.place(y)) for x, y in series.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts = [f'<polyline class="line c{colour}" points="{line}"/>']
    every = 1 if series.dotted else max(1, len(placed) // MAX_HOVER_POINTS)
    style = f"dot c{colour}" if series.dotted or len(placed) == 1 else "hover"
    radius = 3 if style != "hover" else 6
    for i in range(0, len(placed), every):
        x, y = series.points[i]
        text = f"{series.name}: {format_number(y)} ({y_label}) at {x_label} {x:,.0f}"
        parts.append(
            f'<circle class="{style}" cx="{placed[i][0]:.1f}" cy="{placed[i][1]:.1f}" r="{radius}">'
            f"<title>{escape(text)}</title></circle>"
        )
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    items = [
        f'<span><i class="key k{index % NUM_COLOURS}"></i>{escape(one.name)}</span>'
        for index, one in enumerate(series)
    ]
    return f'<div class="legend">{"".join(items)}</div>'
