"""The sections of one run but its loss: optimisation, throughput, memory, data, events, configuration. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..meters.tariff import JOULES_PER_KWH
from .advice import Advice
from .charts import Layer, Marker, Series, line_chart, stacked_chart, with_mean
from .costs import wasted_text
from .elements import figures, part, section, table, text, tiles
from .figures import date, duration, money, shown
from .phases import MAX_COLUMNS, OTHER, PHASES, Interval, intervals, phase_names, phase_shares
from .records import Record, RunRecords, number, numbers
from .summary import Summary

MAX_EVENT_ROWS = 500
MAX_QUARANTINE_ROWS = 100
MAX_USUAL_MARKS = 80
MANY_ROWS = 15
USUAL_EVENTS = ("save", "export", "remote")
GIB = 1 << 30


def period(records: RunRecords) -> str:
    """Say from when to when the run logged, and how it ended."""
    times = [at for record in (*records.steps[:1], *records.steps[-1:]) if (at := date(record.get("time")))]
    logged = f"{times[0]} to {times[-1]}" if times else "no step has been recorded"
    return f"{logged}; {records.end[0]}: {records.end[1]}" if records.end else logged


def advice_list(found: Sequence[Advice]) -> str:
    """Give the findings, each with its evidence and what to do; "" without any."""
    items = [
        f'<li class="{"warning" if one.serious else "note"}"><b>{escape(one.title)}</b>{escape(one.evidence)} '
        f'<span class="soft">{escape(one.action)}</span></li>'
        for one in found
    ]
    return f'<ul class="advice">{"".join(items)}</ul>' if items else ""


def headline(records: RunRecords, summary: Summary) -> str:
    """Give the tiles."""
    footprint = summary.footprint
    heldout = {name: curve[-1][1] if curve else None for name, curve in records.heldout().items()}
    return tiles(
        [
            ("steps", shown(summary.step, "{:,.0f}")),
            ("tokens", shown(summary.tokens)),
            ("training loss", shown(summary.loss, "{:.4f}")),
            *[(f"held-out loss, {name}", shown(loss, "{:.4f}")) for name, loss in heldout.items()],
            ("tokens/s, median", shown(summary.tokens_per_s)),
            ("TFLOP/s per device, median", shown(summary.tflops_per_device)),
            ("MFU, median", shown(summary.mfu, "{:.1%}")),
            ("peak memory, GiB", shown(summary.memory_gib)),
            ("training time", duration(summary.train_s)),
            ("goodput", shown(summary.goodput, "{:.1%}")),
            ("attempts", shown(summary.attempts, "{:.0f}")),
            ("lost to restarts", duration(summary.wasted_s)),
            (
                f"{summary.how} energy, kWh",
                shown(None if summary.joules is None else summary.joules / JOULES_PER_KWH),
            ),
            (f"{summary.how} joules per token", shown(summary.joules_per_token)),
            (f"g CO2e {summary.with_pue}", shown(footprint.g_co2e)),
            (", ".join(filter(None, ("cost", summary.currency, summary.with_pue))), money(footprint.cost)),
        ]
    )


def optimisation_section(records: RunRecords) -> str:
    """Draw learning rate, gradient norm, and batch and sequence length where they change."""
    gradient = records.curve("grad_norm")
    positive = [y for _, y in gradient if y > 0]
    wide = bool(positive) and max(positive) > 50 * min(positive)
    norm = line_chart(with_mean("gradient norm", gradient), x_label="step", y_label="gradient norm", log=wide)
    rate = line_chart([Series("learning rate", records.curve("lr"))], x_label="step", y_label="learning rate")
    drawn = [("Learning rate", rate), ("Gradient norm, before clipping", norm)]
    for field, name, unit in (
        ("global_batch", "Global batch", "sequences"),
        ("sequence_length", "Sequence length", "tokens"),
    ):
        curve = records.curve(field)
        if len({size for _, size in curve}) > 1:
            drawn.append((name, line_chart([Series(name.lower(), curve)], x_label="step", y_label=unit)))
    return section("Optimisation", figures(*drawn))


def throughput_section(records: RunRecords) -> str:
    """Draw the rates, and the phases of a step as shares of its time."""
    rate = line_chart(
        with_mean("tokens/s", records.curve("tokens_per_s")), x_label="step", y_label="tokens per second"
    )
    flops = line_chart(
        with_mean("TFLOP/s", records.curve("tflops_per_device")), x_label="step", y_label="TFLOP/s per device"
    )
    lines = list(intervals(records.steps))
    drawn = [("Tokens per second", rate), ("Model FLOPs", flops), ("Where the time goes", _phase_chart(lines))]
    used = [
        Series(name.upper(), [(step, 100 * share) for step, share in records.curve(name)], colour=colour)
        for colour, name in enumerate(("mfu", "hfu"))
    ]
    if any(one.points for one in used):
        chart = line_chart(used, x_label="step", y_label="% of the peak")
        drawn.append(("FLOPs utilisation: of the model's, and with recomputed ones (HFU)", chart))
    return section("Throughput", figures(*drawn) + _phase_table(lines))


def _phase_chart(lines: Sequence[Interval]) -> str:
    found = phase_shares(lines)
    if found is None:
        return ""
    layers = [Layer(_words(name), shares, _colour(name)) for name, shares in found.shares.items()]
    return stacked_chart(found.edges, layers, x_label="step", y_label="% of the time")


def _colour(name: str) -> int:
    if name == OTHER:
        return 8
    return PHASES.index(name) if name in PHASES else 0


def _phase_table(lines: Sequence[Interval]) -> str:
    """Give a row for each phase: what it took in all, and where it took most of a line."""
    all_s = sum(line.seconds for line in lines)
    rows = []
    for name in phase_names(lines):
        seconds = sum(line.phases_s.get(name, 0.0) for line in lines)
        most = max(lines, key=lambda line: line.phases_s.get(name, 0.0) / line.seconds)
        share = most.phases_s.get(name, 0.0) / most.seconds
        rows.append(
            [_words(name), duration(seconds), f"{seconds / all_s:.1%}", f"{share:.1%} at step {most.step:,.0f}"]
        )
    note = f"The chart has at most {MAX_COLUMNS} columns, each the share of its seconds; ranks are averaged."
    return (
        part("Phases", table(["phase", "time", "share", "largest share of a line"], rows), note) if rows else ""
    )


def memory_section(records: RunRecords) -> str:
    """Draw what ranks held at most: on their device, allocated and reserved, and on the host."""
    named = {"memory_gib": "allocated", "reserved_gib": "reserved", "host_gib": "host"}
    if not records.curve("reserved_gib"):  # a CPU: what is allocated is the host's
        named = {"memory_gib": "host"}
    series = [Series(name, records.curve(field)) for field, name in named.items()]
    chart = line_chart(series, x_label="step", y_label="GiB")
    rows = [
        [name, shown(max((y for _, y in records.curve(field)), default=None))] for field, name in named.items()
    ]
    if "allocated" not in named.values():
        rows = [["device, allocated", shown(None)], ["device, reserved", shown(None)], *rows]
    return section(
        "Memory", figures(("Peak of the rank that held most", chart)) + table(["kind", "peak, GiB"], rows)
    )


def data_section(records: RunRecords) -> str:
    """Draw the shares of the sources, and count what was read and what was passed over."""
    last = records.steps[-1] if records.steps else {}
    lines = [(float(line["step"]), numbers(line, "data_shares")) for line in records.steps]
    lines = [(step, shares) for step, shares in lines if shares]
    drawn = ""
    if lines:
        names = list(dict.fromkeys(name for _, shares in lines for name in shares))
        kept = (
            [lines[i * len(lines) // MAX_COLUMNS] for i in range(MAX_COLUMNS)]
            if len(lines) > MAX_COLUMNS
            else lines
        )
        layers = [
            Layer(name, [shares.get(name, 0.0) for _, shares in kept], colour)
            for colour, name in enumerate(names)
        ]
        edges = [0.0, *(step for step, _ in kept[:-1]), lines[-1][0]]
        chart = stacked_chart(edges, layers, x_label="step", y_label="% of the samples so far")
        drawn = figures(("Shares of the sources", chart))
    read = number(last, "data_bytes_read")
    rows = [
        ["read since the last start, GiB", shown(None if read is None else read / GIB)],
        ["reads tried again", shown(number(last, "data_retries"), "{:,.0f}")],
        ["chunks that the cache had", shown(number(last, "data_cache_hits"), "{:,.0f}")],
        ["chunks in quarantine", shown(number(last, "data_bad_chunks"), "{:,.0f}")],
        ["bytes in quarantine", shown(number(last, "data_bad_bytes"), "{:,.0f}")],
    ]
    return section("Data", drawn + table(["data", "so far"], rows) + _quarantine(records.quarantine))


def _quarantine(found: Sequence[Record]) -> str:
    if not found:
        return ""
    by_source: dict[str, list[Record]] = {}
    for record in found:
        by_source.setdefault(text(record.get("source")) or "?", []).append(record)
    rows = []
    for source, records in sorted(by_source.items()):
        known = [value for record in records if (value := number(record, "bytes")) is not None]
        rows.append([source, f"{len(records):,}", shown(sum(known) if known else None, "{:,.0f}")])
    fields = ("time", "step", "source", "chunk", "bytes", "problem")
    newest = [_cells(record, fields) for record in found[-MAX_QUARANTINE_ROWS:]]
    note = f"The last {MAX_QUARANTINE_ROWS} of {len(found):,}." if len(found) > MAX_QUARANTINE_ROWS else ""
    return part(
        "Quarantine: chunks that were passed over",
        table(["source", "chunks", "bytes"], rows) + table(fields, newest, scrolls=len(newest) > MANY_ROWS),
        note,
    )


def events_section(records: RunRecords) -> str:
    """List what happened."""
    fields = ("time", "attempt", "step", "event", "message")
    rows = [_cells(event, fields) for event in records.events[-MAX_EVENT_ROWS:]]
    notes = [] if rows else ["None."]
    if len(records.events) > MAX_EVENT_ROWS:
        notes.append(f"The last {MAX_EVENT_ROWS} of {len(records.events):,}.")
    notes += wasted_text(records.ledger)
    return section("Events", table(fields, rows, scrolls=len(rows) > MANY_ROWS), " ".join(notes))


def _cells(record: Record, fields: Sequence[str]) -> list[str]:
    return [(date if field == "time" else text)(record.get(field)) for field in fields]


def config_section(records: RunRecords) -> str:
    """Show the run file, with the versions in its head."""
    shown_file = f"<pre>{escape(records.config)}</pre>" if records.config else ""
    return section("Configuration", shown_file, "" if shown_file else "run.toml is not there.")


def event_markers(records: RunRecords) -> list[Marker]:
    """Give a line for each event but a start; usual ones are faint, and left out where they are many."""
    markers = []
    for event in records.events[-MAX_EVENT_ROWS:]:
        step, kind = number(event, "step"), event.get("event")
        if step is not None and kind != "start":
            label = f"{text(kind)} at step {step:,.0f}: {text(event.get('message'))}"
            markers.append(Marker(step, label, faint=kind in USUAL_EVENTS))
    usual = sum(marker.faint for marker in markers)
    return [marker for marker in markers if usual <= MAX_USUAL_MARKS or not marker.faint]


def _words(name: str) -> str:
    return name.replace("_", " ")
