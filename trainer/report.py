"""report.html of a run: one file without network or script, drawn from the files of the run directory.

Reads nothing but those files, so it can be made while the run goes on, after it, and on another machine.
Imports no torch.
"""

from __future__ import annotations

import statistics
from html import escape
from pathlib import Path
from typing import Any

from ..data.storage import storage_errors, write_atomic
from .chart import Marker, Point, Series, format_number, line_chart
from .errors import ConfigError
from .run_records import RunRecords, number, read_records

JOULES_PER_KWH = 3.6e6
MAX_EVENT_ROWS = 500
USUAL_EVENTS = ("save", "export", "remote")
NO_VALUE = "n/a"
STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2127; --soft: #5c6773; --rule: #e3e7eb;
  --panel: #f6f8fa; --c0: #1f6fd6; --c1: #c9501c; --c2: #12855f; --c3: #8648c9; --c4: #9a7400; --c5: #c2306f; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e4e8ec; --soft: #98a4b0; --rule: #2b323a;
  --panel: #1b2027; --c0: #6cabff; --c1: #ff9a66; --c2: #4fcf9f; --c3: #c39bff; --c4: #e2bb4a; --c5: #ff86b4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 22px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 25px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 34px 0 10px; }
p { margin: 4px 0 10px; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 10px; }
.tile { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px; }
.tile b { display: block; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 14px; }
figure { margin: 0; border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px; }
figcaption { font-weight: 600; font-size: 14px; } svg { width: 100%; height: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--soft); }
.key { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin: 0 5px 4px 0; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.label { fill: var(--soft); font-size: 12px; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .hover { fill: transparent; }
.mark { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 4 3; } .faint { opacity: .22; }
.table { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
"""
COLOURS = "".join(
    f".line.c{i} {{ stroke: var(--c{i}); }} .dot.c{i} {{ fill: var(--c{i}); }} .k{i} {{ background: var(--c{i}); }}"
    for i in range(6)
)


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run directory to `out`, by default its report.html; gives the path.

    What is missing in the run's files is missing in the report. Raises ConfigError where `run_dir` is no
    directory, DataStorageError where `out` cannot be written.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"report: {run_dir} is not a run directory; give the directory that `train` made")
    out = run_dir / "report.html" if out is None else out
    page = render_report(read_records(run_dir))
    with storage_errors(f"writing the report {out}"):
        write_atomic(out, page.encode("utf-8", errors="replace"))
    return out


def render_report(records: RunRecords) -> str:
    """Make the page."""
    body = [
        f"<h1>{escape(records.name)}</h1>",
        f'<p class="soft">{escape(_period(records))}</p>',
        _tiles(records),
        _loss_section(records),
        _optimisation_section(records),
        _throughput_section(records),
        _memory_section(records),
        _energy_section(records),
        _events_section(records),
        _config_section(records),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(records.name)}: training report</title><style>{STYLE}{COLOURS}</style></head>\n"
        f"<body>\n{chr(10).join(part for part in body if part)}\n</body></html>\n"
    )


def _period(records: RunRecords) -> str:
    times = [record["time"] for record in records.steps if isinstance(record.get("time"), str)]
    return f"{times[0]} to {times[-1]}" if times else "no step has been recorded"


def _tiles(records: RunRecords) -> str:
    last = records.steps[-1] if records.steps else {}
    ledger = records.ledger
    joules, tokens = _total_joules(records), number(last, "tokens")
    tiles = [
        ("steps", _number(number(last, "step"), "{:,.0f}")),
        ("tokens", _number(tokens)),
        ("training loss", _number(number(last, "loss"), "{:.4f}")),
        *[
            (f"held-out loss, {name}", _number(number(lines[-1], "loss"), "{:.4f}"))
            for name, lines in _evals(records)
        ],
        ("tokens/s, median", _number(_median(records, "tokens_per_s"))),
        ("TFLOP/s per device, median", _number(_median(records, "tflops_per_device"))),
        ("MFU, median", _number(_median(records, "mfu"), "{:.1%}")),
        ("peak memory, GiB", _number(max((y for _, y in records.curve("memory_gib")), default=None))),
        ("training time", _duration(number(ledger, "train_s"))),
        ("attempts", _number(number(ledger, "attempts") or number(last, "attempt"), "{:.0f}")),
        ("lost to restarts", _duration(number(ledger, "wasted_s"))),
        ("energy, kWh", _number(None if joules is None else joules / JOULES_PER_KWH)),
        ("joules per token", _number(joules / tokens if joules is not None and tokens else None)),
    ]
    cells = [
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _loss_section(records: RunRecords) -> str:
    series = [Series("training", records.curve("loss"))]
    for name, lines in _evals(records):
        points = [(float(line["step"]), y) for line in lines if (y := number(line, "loss")) is not None]
        series.append(Series(f"held-out: {name}", points, dotted=True))
    figure = _figure(
        "Loss", line_chart(series, x_label="step", y_label="nats per token", markers=_markers(records))
    )
    rows = []
    for name, lines in _evals(records):
        line = lines[-1]
        values = [_number(number(line, field), "{:.4f}") for field in ("loss", "perplexity", "bits_per_byte")]
        steps_and_tokens = [_number(number(line, field), "{:,.0f}") for field in ("step", "tokens")]
        rows.append([name, *values, *steps_and_tokens])
    titles = ["held-out set", "loss", "perplexity", "bits per byte", "at step", "tokens"]
    note = (
        "Dashed lines are events: point at one for its text. Faint ones are saves." if _markers(records) else ""
    )
    return _section("Loss", f"<div>{figure}</div>" + (_table(titles, rows) if rows else ""), note)


def _optimisation_section(records: RunRecords) -> str:
    gradient = records.curve("grad_norm")
    positive = [y for _, y in gradient if y > 0]
    wide = bool(positive) and max(positive) > 50 * min(positive)
    chart = line_chart([Series("gradient norm", gradient)], x_label="step", y_label="gradient norm", log=wide)
    rate = line_chart([Series("learning rate", records.curve("lr"))], x_label="step", y_label="learning rate")
    return _section(
        "Optimisation", _figure("Learning rate", rate) + _figure("Gradient norm, before clipping", chart)
    )


def _throughput_section(records: RunRecords) -> str:
    tokens = line_chart(
        [Series("tokens/s", records.curve("tokens_per_s"))], x_label="step", y_label="tokens per second"
    )
    flops = line_chart(
        [Series("TFLOP/s", records.curve("tflops_per_device"))], x_label="step", y_label="TFLOP/s per device"
    )
    names = {name: None for record in records.steps for name in _phases(record)}
    shares = [Series(name.replace("_", " "), _phase_share(records, name)) for name in names]
    phases = line_chart(shares, x_label="step", y_label="% of the step")
    utilisation = [(step, 100 * share) for step, share in records.curve("mfu")]
    mfu = line_chart([Series("MFU", utilisation)], x_label="step", y_label="MFU, %")
    return _section(
        "Throughput",
        _figure("Tokens per second", tokens)
        + _figure("Model FLOPs", flops)
        + _figure("Where a step's time goes", phases)
        + (_figure("Model FLOPs utilisation", mfu) if mfu else ""),
    )


def _memory_section(records: RunRecords) -> str:
    chart = line_chart([Series("memory", records.curve("memory_gib"))], x_label="step", y_label="GiB")
    return _section("Memory", _figure("Peak memory of a rank", chart))


def _energy_section(records: RunRecords) -> str:
    source = records.ledger.get("joules_source")
    label = (
        f"Source: {source}."
        if isinstance(source, str) and source != "none"
        else "Energy was not measured: n/a."
    )
    wasted = number(records.ledger, "wasted_joules")
    if _total_joules(records) is not None and wasted is not None:
        label += f" Lost to restarts: {format_number(wasted / JOULES_PER_KWH)} kWh."
    curve = records.curve("joules")
    scale, unit = (JOULES_PER_KWH, "kWh") if curve and curve[-1][1] > JOULES_PER_KWH / 10 else (1.0, "J")
    points: list[Point] = [(step, joules / scale) for step, joules in curve]
    chart = line_chart([Series("energy", points)], x_label="step", y_label=unit)
    return _section("Energy", _figure(f"Energy since the start, {unit}", chart) if chart else "", label)


def _events_section(records: RunRecords) -> str:
    fields = ("time", "attempt", "step", "event", "message")
    rows = [[_text(event.get(field)) for field in fields] for event in records.events[-MAX_EVENT_ROWS:]]
    note = ""
    if len(records.events) > MAX_EVENT_ROWS:
        note = f"The last {MAX_EVENT_ROWS} of {len(records.events)}."
    return _section("Events", _table(list(fields), rows) if rows else "", note or ("" if rows else "None."))


def _config_section(records: RunRecords) -> str:
    text = f"<pre>{escape(records.config)}</pre>" if records.config else ""
    return _section("Configuration", text, "" if text else "run.toml is not there.")


def _markers(records: RunRecords) -> list[Marker]:
    markers = []
    for event in records.events[-MAX_EVENT_ROWS:]:
        step, kind = number(event, "step"), event.get("event")
        if step is not None and kind != "start":
            text = f"{_text(kind)} at step {step:,.0f}: {_text(event.get('message'))}"
            markers.append(Marker(step, text, faint=kind in USUAL_EVENTS))
    return markers


def _evals(records: RunRecords) -> list[tuple[str, list[dict[str, Any]]]]:
    return sorted(records.evals.items())


def _phases(record: dict[str, Any]) -> dict[str, float]:
    phases = record.get("phase_s")
    if not isinstance(phases, dict):
        return {}
    return {str(name): value for name in phases if (value := number(phases, name)) is not None}


def _phase_share(records: RunRecords, name: str) -> list[Point]:
    """Give (step, percent of the step's phases) of one phase."""
    points = []
    for record in records.steps:
        phases = _phases(record)
        total = sum(phases.values())
        if name in phases and total > 0:
            points.append((float(record["step"]), 100 * phases[name] / total))
    return points


def _total_joules(records: RunRecords) -> float | None:
    """Give the ledger's joules, which outlive restarts, else the last step's; None where none were measured."""
    total = number(records.ledger, "joules")
    if total is not None:
        return total
    curve = records.curve("joules")
    return curve[-1][1] if curve else None


def _median(records: RunRecords, field: str) -> float | None:
    values = [value for _, value in records.curve(field)]
    return statistics.median(values) if values else None


def _number(value: float | None, form: str | None = None) -> str:
    if value is None:
        return NO_VALUE
    return form.format(value) if form else format_number(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NO_VALUE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _section(title: str, content: str, note: str = "") -> str:
    figures = content.startswith("<figure")
    head = f"<h2>{escape(title)}</h2>" + (f'<p class="soft">{escape(note)}</p>' if note else "")
    return head + (f'<div class="charts">{content}</div>' if figures else content)


def _figure(title: str, chart: str) -> str:
    shown = chart or f'<p class="soft">{NO_VALUE}</p>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{shown}</figure>"


def _table(titles: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
