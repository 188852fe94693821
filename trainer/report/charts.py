"""Line charts and stacked shares as inline SVG, coloured by the page's style sheet. Imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, draw_grid
from .figures import format_number, smoothed

MAX_POINTS = 1000
MAX_HOVER_POINTS = 150
NUM_COLOURS = 9
MAX_DOTS = 40
LONG_CURVE = 300  # points; from here on a noisy curve needs its mean

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve: (x, y) in order of x. `dotted` marks the points where they are few; `faint` draws a thin pale line.

    `colour` is a number of the palette, by default the next one.
    """

    name: str
    points: Sequence[Point]
    dotted: bool = False
    faint: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Layer:
    """One part of a whole over x: a share from 0 to 1 for each x."""

    name: str
    shares: Sequence[float]
    colour: int


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
    coloured = [
        (one, index if one.colour is None else one.colour, _drawable(one.points, log))
        for index, one in enumerate(series)
    ]
    coloured = [(one, colour, points) for one, colour, points in coloured if points]
    if not coloured:
        return ""
    every = [point for _, _, points in coloured for point in points]
    x_axis = Axis.over([x for x, _ in every], LEFT, WIDTH - RIGHT, num_ticks=6, whole=True)
    y_axis = Axis.over([y for _, y in every], HEIGHT - BOTTOM, TOP, num_ticks=5, log=log, pad=True)
    parts = [draw_grid(x_axis, y_axis, x_label, y_label)]
    parts += [_marker(marker, x_axis) for marker in markers if x_axis.low <= marker.x <= x_axis.high]
    for one, colour, points in coloured:
        parts.append(_curve(one, points, colour, x_axis, y_axis, x_label, y_label))
    names = [(one.name, _key(colour, one.faint)) for one, colour, _ in coloured]
    return (_legend(names) if len(names) > 1 else "") + _svg(parts, x_label, y_label)


def stacked_chart(
    edges: Sequence[float],
    layers: Sequence[Layer],
    *,
    x_label: str,
    y_label: str,
    markers: Sequence[Marker] = (),
) -> str:
    """Draw shares of a whole on top of each other, one column between two edges; "" where there is nothing.

    There is one edge more than there are shares in a layer.
    """
    layers = [layer for layer in layers if any(share > 0 for share in layer.shares)]
    if not layers:
        return ""
    x_axis = Axis.over(edges, LEFT, WIDTH - RIGHT, num_ticks=6, whole=True)
    y_axis = Axis.over([0.0, 100.0], HEIGHT - BOTTOM, TOP, num_ticks=5)
    places = [x_axis.place(edge) for edge in edges]
    parts = [draw_grid(x_axis, y_axis, x_label, y_label)]
    below = [0.0] * len(layers[0].shares)
    for layer in layers:
        above = [low + 100 * share for low, share in zip(below, layer.shares, strict=True)]
        outline = [*_steps(places, above, y_axis), *reversed(_steps(places, below, y_axis))]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
        parts.append(f'<polygon class="layer f{layer.colour % NUM_COLOURS}" points="{points}"/>')
        below = above
    for column, (left, right) in enumerate(itertools.pairwise(places)):
        shares = ", ".join(f"{layer.name} {layer.shares[column]:.1%}" for layer in layers)
        text = f"{x_label} {edges[column]:,.0f} to {edges[column + 1]:,.0f}: {shares}"
        parts.append(
            f'<rect class="hover" x="{left:.1f}" y="{TOP}" width="{max(right - left, 0.5):.1f}" '
            f'height="{HEIGHT - BOTTOM - TOP}"><title>{escape(text)}</title></rect>'
        )
    parts += [_marker(marker, x_axis) for marker in markers if x_axis.low <= marker.x <= x_axis.high]
    names = [(layer.name, f"key square k{layer.colour % NUM_COLOURS}") for layer in layers]
    return _legend(names) + _svg(parts, x_label, y_label)


def with_mean(name: str, points: Sequence[Point], colour: int = 0) -> list[Series]:
    """Give a noisy curve for drawing: a long one as a pale line with its mean over it."""
    if len(points) < LONG_CURVE:
        return [Series(name, points, colour=colour)]
    means = smoothed([y for _, y in points], len(points) / 100)
    mean = [(x, y) for (x, _), y in zip(points, means, strict=True)]
    return [
        Series(name, points, faint=True, colour=colour),
        Series(f"{name}, smoothed", mean, colour=colour),
    ]


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


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]
    return thin(finite, MAX_POINTS)


def _steps(places: Sequence[float], heights: Sequence[float], y_axis: Axis) -> list[tuple[float, float]]:
    outline = []
    for column, height in enumerate(heights):
        y = y_axis.place(height)
        outline += [(places[column], y), (places[column + 1], y)]
    return outline


def _svg(parts: Sequence[str], x_label: str, y_label: str) -> str:
    name = escape(f"{y_label} over {x_label}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _marker(marker: Marker, x_axis: Axis) -> str:
    x = x_axis.place(marker.x)
    style = "mark faint" if marker.faint else "mark"
    return (
        f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        f"<title>{escape(marker.text)}</title></line>"
    )


def _curve(
    series: Series,
    points: Sequence[Point],
    colour: int,
    x_axis: Axis,
    y_axis: Axis,
    x_label: str,
    y_label: str,
) -> str:
    placed = [(x_axis.place(x), y_axis.place(y)) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    number = colour % NUM_COLOURS
    dashed = f" dash{min(colour // NUM_COLOURS, 2)}" if colour >= NUM_COLOURS else ""
    parts = [f'<polyline class="line c{number}{dashed}{" pale" if series.faint else ""}" points="{line}"/>']
    if series.faint:
        return parts[0]
    every = max(1, len(placed) // MAX_HOVER_POINTS)
    visible = (series.dotted and len(placed) <= MAX_DOTS) or len(placed) == 1
    style, radius = (f"dot f{number}", 3) if visible else ("hover", 6)
    for i in range(0, len(placed), every):
        x, y = points[i]
        text = f"{series.name}: {format_number(y)} ({y_label}) at {x_label} {x:,.0f}"
        parts.append(
            f'<circle class="{style}" cx="{placed[i][0]:.1f}" cy="{placed[i][1]:.1f}" r="{radius}">'
            f"<title>{escape(text)}</title></circle>"
        )
    return "".join(parts)


def _key(colour: int, faint: bool) -> str:
    dashed = f" dashed{min(colour // NUM_COLOURS, 2)}" if colour >= NUM_COLOURS else ""
    return f"key k{colour % NUM_COLOURS}{dashed}{' pale' if faint else ''}"


def _legend(names: Sequence[tuple[str, str]]) -> str:
    items = [f'<span><i class="{style}"></i>{escape(name)}</span>' for name, style in names]
    return f'<div class="legend">{"".join(items)}</div>'
