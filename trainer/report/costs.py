"""The energy of a run: what was metered, where, and what it comes to. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..meters.energy import MEANING
from ..meters.tariff import JOULES_PER_KWH
from .charts import Series, line_chart
from .elements import figures, part, section, table
from .figures import NO_VALUE, duration, energy, format_number, money, ratio, shown
from .phases import OUTSIDE_STEPS
from .records import Record, RunRecords, number, numbers
from .summary import Summary

SETTINGS = {  # what makes an account known
    "idle draw": "meter.idle_s",
    "grid intensity": "meter.grid",
    "cost of energy": "meter.price_per_kwh",
    "cost of GPU hours": "meter.price_per_gpu_hour",
}


@dataclass(frozen=True)
class LimitRow:
    """What came of a power limit: over the lines that had it; `train_s` is the part of `elapsed_s` in steps."""

    limit_w: float | None
    num_lines: int
    tokens: float
    joules: float
    train_s: float
    elapsed_s: float


def energy_section(records: RunRecords, summary: Summary) -> str:
    """Draw energy and power over the steps, and give the accounts."""
    source = summary.source
    if summary.joules is None:
        note = "Energy was not measured: n/a."
    else:
        note = f"Source: {source} ({MEANING.get(source, 'not a source that this report knows')})."
        if summary.wasted_joules is not None:
            note += f" Lost to restarts: {format_number(summary.wasted_joules / JOULES_PER_KWH)} kWh."
    drawn = ""
    if summary.joules is not None:
        curve = records.curve("joules")
        large = bool(curve) and curve[-1][1] > JOULES_PER_KWH / 10
        scale, unit = (JOULES_PER_KWH, "kWh") if large else (1.0, "J")
        total = line_chart(
            [Series("energy", [(step, joules / scale) for step, joules in curve])], x_label="step", y_label=unit
        )
        charts = [(f"Energy since the start, {unit}", total)]
        for field, title, label in (
            ("watts", "Power of all that is metered", "W"),
            ("joules_per_token", "Energy per token", "J per token"),
        ):
            chart = line_chart([Series(title, records.curve(field))], x_label="step", y_label=label)
            charts += [(title, chart)] if chart else []
        drawn = figures(*charts)
    rows = _account(records, summary)
    content = drawn + table(["account", "value", "how"], [row for row in rows if row[1] != NO_VALUE])
    if unknown := [name for name, value, _ in rows if value == NO_VALUE]:
        content += f"<p>Not known ({NO_VALUE}): {', '.join(map(_with_setting, unknown))}.</p>"
    content += _limits(records) + _devices(records.ledger)
    return section("Energy and cost", content, note)


def _account(records: RunRecords, summary: Summary) -> list[list[str]]:
    ledger, footprint, tariff = records.ledger, summary.footprint, summary.tariff
    rates, intensity = (tariff.rates, tariff.intensity) if tariff is not None else (None, None)
    hosts, all_hosts = number(ledger, "hosts"), number(ledger, "all_hosts")
    per_kwh = None if rates is None else rates.price_per_kwh
    per_hour = None if rates is None else rates.price_per_gpu_hour
    gpu_s, currency = number(ledger, "gpu_s"), summary.currency
    metered = hosts and all_hosts
    return [
        ["metered energy", energy(summary.joules), MEANING.get(summary.source, summary.source)],
        ["hosts", f"{hosts:.0f} of {all_hosts:.0f} hosts metered" if metered else NO_VALUE, ""],
        ["mean power", _with(summary.watts, "{:,.0f}", " W"), "of all that is metered, while it trained"],
        [
            "idle draw",
            _with(number(ledger, "idle_w"), "{:,.0f}", " W"),
            "measured before the first step (meter.idle_s); not subtracted from anything",
        ],
        ["energy per token", _with(summary.joules_per_token, None, " J"), "metered, lost work included"],
        ["tokens per kWh", shown(summary.tokens_per_kwh), "metered, lost work included"],
        [
            "lost to restarts",
            shown(ratio(summary.wasted_joules, summary.joules), "{:.1%}"),
            "of the metered energy",
        ],
        ["goodput", shown(summary.goodput, "{:.1%}"), "of the wall time trained the present weights"],
        [
            "PUE",
            shown(None if rates is None else rates.pue),
            "the building's draw over its computers' (meter.pue)",
        ],
        ["energy at the building", _with(footprint.kwh, None, " kWh"), "PUE x metered energy"],
        [
            "grid intensity",
            _with(intensity and intensity[0], None, " g CO2e/kWh"),
            intensity[1] if intensity else "",
        ],
        ["CO2e", _with(footprint.g_co2e, None, " g"), "location-based, operation only"],
        ["cost of energy", money(footprint.energy_cost, currency), _price(per_kwh, currency, "kWh")],
        [
            "cost of GPU hours",
            money(footprint.gpu_cost, currency),
            f"{duration(gpu_s)} of GPUs; {_price(per_hour, currency, 'GPU hour')}",
        ],
        ["cost", money(footprint.cost, currency), "of all that has a price"],
    ]


def _with(value: float | None, form: str | None, unit: str) -> str:
    return NO_VALUE if value is None else shown(value, form) + unit


def _with_setting(account: str) -> str:
    return f"{account} ({SETTINGS[account]})" if account in SETTINGS else account


def _price(price: float | None, currency: str, unit: str) -> str:
    return "" if price is None else " ".join(f"{price:g} {currency} per {unit}".split())


def _devices(ledger: Record) -> str:
    """Give what each device drew, and each host's sum where it has several."""
    found = numbers(ledger, "joules_by_device")
    total = sum(found.values())
    hosts: dict[str, list[tuple[str, float]]] = {}
    for key, joules in found.items():
        host, _, device = key.partition("/")
        hosts.setdefault(host, []).append((device, joules))
    rows = []
    for host, devices in sorted(hosts.items()):
        for device, joules in sorted(devices):
            share = ratio(joules, total)
            rows.append([host, device, _kind(device), energy(joules), shown(share, "{:.1%}")])
        if len(devices) > 1:
            whole = sum(joules for _, joules in devices)
            rows.append([host, "all", "", energy(whole), shown(ratio(whole, total), "{:.1%}")])
    return part("By device", table(["host", "device", "kind", "energy", "share"], rows)) if rows else ""


def _kind(device: str) -> str:
    if device.startswith("rapl:"):
        return "memory" if device.endswith("/dram") else "CPU package"
    return "given watts" if device == "user-watts" else "GPU board"


def limit_rows(records: RunRecords) -> list[LimitRow]:
    """Add up tokens and joules by power limit, over the lines that know both; in order of the limit."""
    sums: dict[float | None, list[float]] = {}
    tokens_before = step_before = 0.0
    for line in records.steps:
        tokens, per_token = number(line, "tokens"), number(line, "joules_per_token")
        num_steps, step_before = max(line["step"] - step_before, 1.0), float(line["step"])
        new = tokens - tokens_before if tokens is not None else 0.0
        tokens_before = tokens_before if tokens is None else tokens
        if per_token is None or new <= 0:
            continue
        step_s, phases_s = number(line, "step_s") or 0.0, numbers(line, "phase_s")
        elapsed_s = step_s + sum(phases_s.get(name, 0.0) for name in OUTSIDE_STEPS)
        row = sums.setdefault(number(line, "power_limit_w"), [0.0] * 5)
        for i, value in enumerate((1, new, new * per_token, step_s * num_steps, elapsed_s * num_steps)):
            row[i] += value
    ordered = sorted(sums.items(), key=lambda item: (item[0] is None, item[0] or 0.0))
    return [LimitRow(limit, int(row[0]), *row[1:]) for limit, row in ordered]


def _limits(records: RunRecords) -> str:
    found = limit_rows(records)
    if len(found) < 2:
        return ""
    rows = [
        [
            _with(row.limit_w, None, " W"),
            f"{row.num_lines:,}",
            _with(ratio(row.joules, row.elapsed_s), "{:,.0f}", " W"),
            shown(ratio(row.tokens, row.train_s)),
            shown(ratio(row.tokens, row.joules)),
            shown(ratio(row.joules, row.tokens)),
        ]
        for row in found
    ]
    titles = ["power limit", "lines", "drew", "tokens/s", "tokens per joule", "joules per token"]
    return part("By power limit", table(titles, rows), "What a limit did to the energy of a token.")


def wasted_text(ledger: Record) -> list[str]:
    """Say what restarts lost; nothing where they lost nothing."""
    tokens, seconds = number(ledger, "wasted_tokens"), number(ledger, "wasted_s")
    if not tokens or seconds is None:
        return []
    return [f"Restarts lost {tokens:,.0f} tokens, {duration(seconds)} of training."]
