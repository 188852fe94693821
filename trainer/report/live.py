"""`basestone watch`: one frame about a run for a terminal, made anew from its files alone. Imports no torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError
from ..load import validate_run
from ..ramp import BatchSchedule
from ..run_lock import holder_of
from .advice import UNREAD, Advice, advise
from .figures import NO_VALUE, duration, energy, moment, money, shown
from .phases import intervals, phase_names
from .records import Record, RunReader, RunRecords, number, require_run
from .summary import Totals, totals_of

NEWEST_LINES = 60
NEWEST_EVENTS = 5
BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
ENDS = {
    "COMPLETE": ("complete", "green"),
    "RESUME": ("stopped, can go on", "yellow"),
    "FAILED": ("failed", "red"),
}


def watch(run_dir: Path, *, once: bool = False, every_s: float = 2.0) -> None:
    """Show a run until it is complete or Ctrl-C; one frame where `once`, or where stdout is no terminal.

    Raises:
        ConfigError: it is no run directory.
    """
    require_run(run_dir)
    console, view = Console(highlight=False), LiveView(run_dir)
    if once or not console.is_terminal:
        console.print(view.frame(plain=console.options.ascii_only))
        return
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                live.update(view.frame(plain=console.options.ascii_only), refresh=True)
                if view.is_complete:
                    return
                time.sleep(every_s)
    except KeyboardInterrupt:
        return


class LiveView:
    """Reads what is new at every frame; warnings are worked out again once the run is a hundredth longer."""

    def __init__(self, run_dir: Path) -> None:
        """Read nothing yet."""
        self._run_dir, self._reader = run_dir, RunReader(run_dir)
        self._advice: list[Advice] = []
        self._advised_at = -1
        self.is_complete = False

    def frame(self, *, plain: bool = False) -> RenderableType:
        """Give what is known now; `plain` uses ASCII alone."""
        records = self._reader.read()
        self.is_complete = records.end is not None and records.end[0] == "COMPLETE"
        if self.is_complete or len(records.steps) > self._advised_at + self._advised_at // 100:
            self._advice, self._advised_at = advise(records), len(records.steps)
        clean = _ascii if plain else _printable
        parts: list[RenderableType] = [_head(records, self._run_dir)]
        if records.steps or records.end is None:  # a run that ended before its first step has nothing to show
            grid = Table.grid(padding=(0, 2))
            for name, value in _figures(records, PLAIN_BLOCKS if plain else BLOCKS):
                grid.add_row(Text(name, "dim"), Text(clean(value)))
            parts += [_progress(records), grid]
        parts += [
            Text(clean(f"{_time(event)} {_event(event)}"), "dim") for event in records.events[-NEWEST_EVENTS:]
        ]
        for one in self._advice:
            title = f"{'!' if one.serious else '-'} {one.title}"
            line = Text(clean(title), "bold red" if one.serious else "dim")
            told = one.serious or one.kind == UNREAD
            parts.append(line.append(clean(f"  {one.evidence}"), "not bold default") if told else line)
        return Group(*parts)


def _figures(records: RunRecords, blocks: str) -> list[tuple[str, str]]:
    totals = totals_of(records)
    return [
        ("loss", _losses(records, blocks)),
        ("held out", _heldout(records)),
        ("rate", _rate(records, totals)),
        ("phases", _phases(records)),
        ("energy", _energy(totals)),
        ("memory", _memory(records)),
    ]


def _printable(text: str) -> str:
    """Take out what would steer the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _ascii(text: str) -> str:
    return _printable(text).encode("ascii", "replace").decode()


def total_steps(records: RunRecords) -> int | None:
    """Give the steps that the run file asks for; None where it does not say."""
    settings = records.settings()
    if steps := number(settings.get("train"), "steps"):
        return max(1, int(steps))
    found = _schedule(settings)
    return None if found is None else found[0].steps_for(found[1])


def _schedule(settings: dict[str, Any]) -> tuple[BatchSchedule, int] | None:
    """Give the batches of a run, and the tokens that it asks for; None where the run file does not hold."""
    try:
        run = validate_run(settings, "run.toml")
    except (ConfigError, TypeError):
        return None
    return run.schedule_batches(run.train.ramp), run.train.tokens or 0


def _steps_left(records: RunRecords, step: int, total: int) -> float:
    """Count what is left in steps of the size of the last one: a ramp makes later ones larger."""
    found = _schedule(records.settings())
    if found is None or not 0 < step < total:
        return max(0, total - step)
    tokens_before = found[0].tokens_before
    return (tokens_before(total) - tokens_before(step)) / (tokens_before(step) - tokens_before(step - 1))


def seconds_per_step(steps: Sequence[Record]) -> float | None:
    """Give the wall time of a step over the newest lines of this attempt, evaluations and saves included."""
    newest = list(steps[-NEWEST_LINES:])
    newest = [line for line in newest if line.get("attempt") == newest[-1].get("attempt")]
    times = [(line["step"], at.timestamp()) for line in newest if (at := moment(line.get("time"))) is not None]
    if len(times) > 1 and times[-1][1] > times[0][1]:
        return float((times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0]))
    known = [value for line in newest if (value := number(line, "step_s")) is not None]
    return statistics.fmean(known) if known else None


def sparkline(values: Sequence[float], blocks: str) -> str:
    """Draw values as a row of blocks, the lowest as the first of them."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((value - low) * scale)] for value in values)


def _head(records: RunRecords, run_dir: Path) -> Text:
    text = Text(_printable(records.name), "bold")
    if records.end is not None:
        words, style = ENDS[records.end[0]]
        return text.append(f"  {words}", style).append(_printable(f": {records.end[1]}"), "not bold")
    holder = holder_of(run_dir)
    if holder is not None:
        return text.append("  going", "green").append(_printable(f": {holder}"), "not bold")
    return text.append("  not going", "yellow").append(": no process holds it and it left no mark", "not bold")


def _progress(records: RunRecords) -> RenderableType:
    step = int(records.steps[-1]["step"]) if records.steps else 0
    total = total_steps(records)
    if total is None:
        return Text(f"step {step:,} of {NO_VALUE}")
    per_step = seconds_per_step(records.steps)
    left = duration(per_step * _steps_left(records, step, total)) if per_step is not None else NO_VALUE
    words = f"{step:,}/{total:,} steps, {step / total:.1%}" + (f", {left} left" if step < total else "")
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(total=total, completed=min(step, total), width=32), Text(words))
    return row


def _losses(records: RunRecords, blocks: str) -> str:
    newest = [value for line in records.steps[-NEWEST_LINES:] if (value := number(line, "loss")) is not None]
    if not newest:
        return NO_VALUE
    last = ", ".join(f"{loss:.4f}" for loss in newest[-3:])
    return f"{last}  {sparkline(newest[-32:], blocks)}"


def _heldout(records: RunRecords) -> str:
    parts = []
    for name, curve in records.heldout().items():
        if curve:
            best = min(curve, key=lambda point: point[1])
            parts.append(f"{name} {curve[-1][1]:.4f} (best {best[1]:.4f} at step {best[0]:,.0f})")
    return ", ".join(parts) or NO_VALUE


def _newest(records: RunRecords) -> Record:
    return records.steps[-1] if records.steps else {}


def _rate(records: RunRecords, totals: Totals) -> str:
    last = _newest(records)
    return (
        f"{shown(number(last, 'tokens_per_s'))} tokens/s, {shown(number(last, 'step_s'))} s a step, "
        f"{shown(number(last, 'watts'), '{:,.0f} W')}, MFU {shown(number(last, 'mfu'), '{:.1%}')}, "
        f"goodput {shown(totals.goodput, '{:.1%}')}"
    )


def _phases(records: RunRecords) -> str:
    # The line before the newest ones only tells where they begin.
    lines = list(intervals(records.steps[-NEWEST_LINES - 1 :]))[-NEWEST_LINES:]
    all_s = sum(sum(line.phases_s.values()) for line in lines)
    parts = [
        f"{name.replace('_', ' ')} {sum(line.phases_s.get(name, 0.0) for line in lines) / all_s:.0%}"
        for name in phase_names(lines)
    ]
    return ", ".join(parts) or NO_VALUE


def _energy(totals: Totals) -> str:
    footprint = totals.footprint
    return (
        f"{energy(totals.joules)} {totals.how}, {shown(totals.joules_per_token)} J/token; {totals.with_pue} "
        f"{shown(footprint.g_co2e)} g CO2e, cost {money(footprint.cost, totals.currency)}"
    )


def _memory(records: RunRecords) -> str:
    last = _newest(records)
    names = {"memory_gib": "allocated", "reserved_gib": "reserved", "host_gib": "host"}
    if number(last, "reserved_gib") is None:  # a CPU: what is allocated is the host's
        names = {"memory_gib": "host"}
    return ", ".join(f"{name} {shown(number(last, field), '{:.1f} GiB')}" for field, name in names.items())


def _time(event: Record) -> str:
    at = moment(event.get("time"))
    return "" if at is None else f"{at:%H:%M:%S}"


def _event(event: Record) -> str:
    step = shown(number(event, "step"), "{:,.0f}")
    return f"step {step} {event.get('event')}: {event.get('message') or ''}".rstrip(": ")
