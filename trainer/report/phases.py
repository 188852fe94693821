"""Where the time of a run went, by phase. Imports no torch.

A line of metrics has the mean seconds of a step since the line before; a line counts for as many steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .records import Record, number, numbers

PHASES = (
    "forward",
    "data",
    "backward",
    "gradient_sync",
    "optimizer",
    "bubble",
    "evaluate",
    "checkpoint",
)
"""In the order of the palette's colours."""
OTHER = "other"
OUTSIDE_STEPS = ("checkpoint", "evaluate")
MAX_COLUMNS = 80


@dataclass(frozen=True)
class Interval:
    """One line: the steps since the line before, their seconds in all and by phase."""

    first_step: float
    step: float
    seconds: float
    phases_s: dict[str, float]


@dataclass(frozen=True)
class PhaseShares:
    """Shares of the time by phase in columns of lines: `edges` has one step more than there are columns."""

    edges: list[float]
    shares: dict[str, list[float]]


def intervals(steps: Sequence[Record]) -> Iterator[Interval]:
    """Give every line with its seconds; those without any are left out. What no phase has is `other`."""
    before = 0.0
    for record in steps:
        step = float(record["step"])
        num_steps, first, before = max(step - before, 1.0), before, step
        phases_s = {name: max(0.0, value) for name, value in numbers(record, "phase_s").items()}
        step_s = number(record, "step_s")
        known_s = sum(phases_s.values())
        all_s = max(known_s, (step_s or 0.0) + sum(phases_s.get(name, 0.0) for name in OUTSIDE_STEPS))
        if phases_s and all_s > known_s:
            phases_s[OTHER] = phases_s.get(OTHER, 0.0) + all_s - known_s
        if all_s > 0:
            seconds = {name: value * num_steps for name, value in phases_s.items()}
            yield Interval(first, step, all_s * num_steps, seconds)


def phase_names(lines: Sequence[Interval]) -> list[str]:
    """List the phases that took time: the known ones, others by name, and what no phase has."""
    found = {name for line in lines for name, seconds in line.phases_s.items() if seconds > 0}
    others = sorted(found - {*PHASES, OTHER})
    return [name for name in (*PHASES, *others, OTHER) if name in found]


def phase_shares(lines: Sequence[Interval]) -> PhaseShares | None:
    """Give the shares over the steps, each column that of its seconds; None where no phase is known."""
    lines = [line for line in lines if line.phases_s]
    names = phase_names(lines)
    if not names:
        return None
    num_columns = min(MAX_COLUMNS, len(lines))
    edges, shares = [lines[0].first_step], {name: list[float]() for name in names}
    for column in range(num_columns):
        part = lines[column * len(lines) // num_columns : (column + 1) * len(lines) // num_columns]
        seconds = sum(sum(line.phases_s.values()) for line in part)
        edges.append(part[-1].step)
        for name in names:
            used = sum(line.phases_s.get(name, 0.0) for line in part)
            shares[name].append(used / seconds if seconds > 0 else 0.0)
    return PhaseShares(edges, shares)
