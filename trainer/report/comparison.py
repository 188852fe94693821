"""Several runs side by side: headline figures, curves, and what differs between their run files. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.config import TASK_SETTINGS
from .advice import Advice
from .charts import LONG_CURVE, Series, line_chart
from .elements import figures, section, table
from .figures import duration, money, shown, smoothed
from .losses import parts_of, unit_of_loss
from .records import Curve, Record, RunRecords, number
from .sections import advice_list
from .summary import Summary

NOT_SET = "not set"


@dataclass(frozen=True)
class NamedRun:
    """A run under a label that no other run of the page has."""

    label: str
    records: RunRecords
    summary: Summary


def labels_of(run_dirs: Sequence[Path]) -> list[str]:
    """Give each directory the end of its path, as long as it takes to tell it from the others."""
    paths = [path.resolve().parts for path in run_dirs]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(parts[-length:]) for parts in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def comparison(runs: Sequence[NamedRun]) -> str:
    """Give the sections that compare."""
    return _tasks_note(runs) + _figures_section(runs) + _curves_section(runs) + _differences_section(runs)


def _tasks_note(runs: Sequence[NamedRun]) -> str:
    """Say where losses are of different tasks, or of different parts."""
    tasks = {
        run.label: " and ".join(parts_of(run.records)).replace("_", " ") or task
        for run in runs
        if (run.records.steps or run.records.evals) and (task := run.records.task()) is not None
    }
    if len(set(tasks.values())) < 2:
        return ""
    evidence = (
        f"Their tasks are not the same: {', '.join(f'{label} is {task}' for label, task in tasks.items())}."
    )
    action = "Compare losses within a task, and models of different tasks by what they are good for later."
    title = "The losses of these runs do not compare"
    return advice_list([Advice("tasks", title, evidence, action, serious=False)])


def _figures_section(runs: Sequence[NamedRun]) -> str:
    heldout = list(dict.fromkeys(name for run in runs for name in run.records.heldout()))
    rows = [
        ["steps", *(shown(run.summary.step, "{:,.0f}") for run in runs)],
        ["tokens", *(shown(run.summary.tokens) for run in runs)],
        [
            "training loss, smoothed",
            *(shown(_last(_smooth(run.records.curve("loss"))), "{:.4f}") for run in runs),
        ],
        *[[f"best held-out loss, {name}", *(_best(run, name) for run in runs)] for name in heldout],
        ["tokens/s, median", *(shown(run.summary.tokens_per_s) for run in runs)],
        ["MFU, median", *(shown(run.summary.mfu, "{:.1%}") for run in runs)],
        ["peak memory, GiB", *(shown(run.summary.memory_gib) for run in runs)],
        ["training time", *(duration(run.summary.train_s) for run in runs)],
        ["goodput", *(shown(run.summary.goodput, "{:.1%}") for run in runs)],
        ["energy source", *(_energy_source(run) for run in runs)],
        ["joules per token, without PUE", *(shown(run.summary.joules_per_token) for run in runs)],
        ["PUE", *(shown(_pue(run)) for run in runs)],
        ["energy with PUE, kWh", *(shown(run.summary.footprint.kwh) for run in runs)],
        ["g CO2e with PUE", *(shown(run.summary.footprint.g_co2e) for run in runs)],
        ["cost with PUE", *(money(run.summary.footprint.cost, run.summary.currency) for run in runs)],
        ["lost to restarts", *(duration(run.summary.wasted_s) for run in runs)],
    ]
    return section("Comparison", table(["figure", *(run.label for run in runs)], rows))


def _pue(run: NamedRun) -> float | None:
    return None if run.summary.tariff is None else run.summary.tariff.rates.pue


def _energy_source(run: NamedRun) -> str:
    hosts, all_hosts = number(run.records.ledger, "hosts"), number(run.records.ledger, "all_hosts")
    if hosts and all_hosts and hosts < all_hosts:
        return f"{run.summary.source}, {hosts:.0f} of {all_hosts:.0f} hosts metered"
    return run.summary.source


def _best(run: NamedRun, name: str) -> str:
    return shown(min((loss for _, loss in run.records.heldout().get(name, [])), default=None), "{:.4f}")


def _last(curve: Curve) -> float | None:
    return curve[-1][1] if curve else None


def _curves_section(runs: Sequence[NamedRun]) -> str:
    by_tokens = [_by_tokens(run.records.steps) for run in runs]
    loss = [(run.label, _smooth(run.records.curve("loss"))) for run in runs]
    tokens = [(run.label, _smooth(_over(run.records.steps, "loss"))) for run in runs]
    units = {unit_of_loss(run.records) for run in runs if run.records.steps or run.records.evals}
    unit = units.pop() if len(units) == 1 else "nats"
    drawn = [
        ("Training loss over steps", _chart(loss, "step", unit)),
        ("Training loss over tokens", _chart(tokens, "tokens", unit)),
    ]
    if all(len(run.records.steps) >= LONG_CURVE for run in runs):
        settled = [(label, curve[len(curve) // 5 :]) for label, curve in tokens]
        chart = _chart(settled, "tokens", unit)
        drawn.append(("Training loss over tokens, without the first fifth of each", chart))
    for name in dict.fromkeys(name for run in runs for name in run.records.heldout()):
        curves = [
            (
                run.label,
                [(at[step], loss) for step, loss in run.records.heldout().get(name, []) if step in at],
            )
            for run, at in zip(runs, by_tokens, strict=True)
        ]
        chart = _chart(curves, "tokens", unit, dotted=True)
        drawn += [(f"Held-out loss over tokens: {name}", chart)] if chart else []
    for field, title, label in (
        ("tokens_per_s", "Tokens per second", "tokens per second"),
        ("joules_per_token", "Energy per token", "J per token"),
    ):
        curves = [(run.label, _smooth(run.records.curve(field))) for run in runs]
        drawn.append((title, _chart(curves, "step", label)))
    costs = [(_label_of_cost(run, runs), _over(run.records.steps, "cost")) for run in runs]
    drawn.append(("Cost over tokens", _chart(costs, "tokens", _money(runs))))
    note = f"Curves of {LONG_CURVE} lines and more are smoothed. Costs and energy include lost work."
    return section("Curves", figures(*drawn), note)


def _chart(curves: Sequence[tuple[str, Curve]], x_label: str, y_label: str, dotted: bool = False) -> str:
    series = [Series(label, curve, dotted, colour=colour) for colour, (label, curve) in enumerate(curves)]
    return line_chart(series, x_label=x_label, y_label=y_label)


def _money(runs: Sequence[NamedRun]) -> str:
    currencies = {run.summary.currency for run in runs if run.summary.footprint.cost is not None}
    return currencies.pop() if len(currencies) == 1 else "each in its own currency"


def _label_of_cost(run: NamedRun, runs: Sequence[NamedRun]) -> str:
    alike = len({one.summary.currency for one in runs if one.summary.footprint.cost is not None}) < 2
    return run.label if alike else f"{run.label} ({run.summary.currency or 'no currency'})"


def _by_tokens(steps: Sequence[Record]) -> dict[float, float]:
    return {float(line["step"]): tokens for line in steps if (tokens := number(line, "tokens")) is not None}


def _over(steps: Sequence[Record], field: str) -> Curve:
    """Give (tokens, value) of a field."""
    return [
        (tokens, value)
        for line in steps
        if (tokens := number(line, "tokens")) is not None and (value := number(line, field)) is not None
    ]


def _smooth(curve: Curve) -> Curve:
    if len(curve) < LONG_CURVE:
        return curve
    means = smoothed([y for _, y in curve], len(curve) / 100)
    return [(x, y) for (x, _), y in zip(curve, means, strict=True)]


def _differences_section(runs: Sequence[NamedRun]) -> str:
    rows = differences([run.records for run in runs])
    missing = [run.label for run in runs if not run.records.settings()]
    notes = [f"run.toml cannot be read: {', '.join(missing)}."] if missing else []
    notes += [] if rows else ["The run files are alike."]
    titles = ["setting", *(run.label for run in runs)]
    return section("What differs", table(titles, rows), " ".join(notes))


def differences(runs: Sequence[RunRecords]) -> list[list[str]]:
    """Give a row (name, a value for each run) for every setting and version that is not the same in all.

    What belongs to another task than the run's is not set: a run file lists it all the same.
    """
    tables = [{**_flat(run.settings()), **_versions(run.config)} for run in runs]
    names = dict.fromkeys(name for one in tables for name in one)
    rows = [[name, *(one.get(name, NOT_SET) for one in tables)] for name in names]
    foreign = [_foreign(run.task()) for run in runs]
    for row in rows:
        if len(set(row[1:])) > 1:
            row[1:] = [
                NOT_SET if row[0] in of_run else value for value, of_run in zip(row[1:], foreign, strict=True)
            ]
    return [row for row in rows if len(set(row[1:])) > 1]


def _foreign(task: str | None) -> set[str]:
    """Name the settings that belong to other tasks; none where the task is not known."""
    others = TASK_SETTINGS.items() if task is not None else ()
    return {f"task.{key}" for name, keys in others if name != task for key in keys}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _versions(config: str) -> dict[str, str]:
    """Read the versions that stand in the head of a resolved run file: `# torch 2.13.0`."""
    versions = {}
    for line in config.splitlines():
        words = line.removeprefix("#").split()
        if not line.startswith("#"):
            break
        if len(words) == 2:
            versions[f"version of {words[0]}"] = words[1]
    return versions
