"""The section of a run's losses, and of what else its held-out sets tell. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from ..sinks.sink import OF_PARTS, SHARES
from .charts import LONG_CURVE, Marker, Series, line_chart, with_mean
from .elements import figures, section, table
from .figures import shown
from .records import Curve, Record, RunRecords, number
from .sections import event_markers

# By part of the loss, or task; all others predict tokens. What a pair is found among depends on the batch.
UNITS = {"masked": "nats per hidden token", "next_sentence": "nats", "contrastive": "nats"}
PER_TOKEN = "nats per token"
OF_PART = "_loss"


def parts_of(records: RunRecords) -> list[str]:
    """Name the parts of a run's loss where there are several, and [] where it is one."""
    return [field.removesuffix(OF_PART) for field in _fields(_lasts(records), (OF_PART,))]


def unit_of_loss(records: RunRecords) -> str:
    """Name what a run's loss is in: nats alone where parts that count other things are added up."""
    return "nats" if parts_of(records) else UNITS.get(records.task() or "", PER_TOKEN)


def _lasts(records: RunRecords) -> list[Record]:
    """Give the last step's line, and that of every held-out set."""
    return [*records.steps[-1:], *(lines[-1] for lines in records.evals.values())]


def _fields(lines: Sequence[Record], endings: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(field for line in lines for field in line if field.endswith(endings)))


def loss_section(records: RunRecords) -> str:
    """Draw the losses over the steps, with the events, and shares of right predictions; a row for each held-out set."""
    train, heldout = records.curve("loss"), records.heldout()
    markers, unit = event_markers(records), unit_of_loss(records)
    drawn = [("Loss", _loss_chart(train, heldout, unit, markers))]
    if len(train) >= LONG_CURVE:
        start = train[len(train) // 5][0]
        later = {name: [point for point in curve if point[0] >= start] for name, curve in heldout.items()}
        settled = _loss_chart([point for point in train if point[0] >= start], later, unit, markers)
        drawn.append(("Loss, without the first fifth", settled))
    drawn += [
        (title, chart) for title, chart in (_shares(records), *_losses_of_parts(records, markers)) if chart
    ]
    note = "Dashed lines are events: point at one for its text. Faint ones are saves." if markers else ""
    return section("Loss", figures(*drawn) + _heldout_table(records), note)


def _loss_chart(train: Curve, heldout: dict[str, Curve], unit: str, markers: Sequence[Marker]) -> str:
    series = with_mean("training", train)
    series += [
        Series(f"held-out: {name}", curve, dotted=True, colour=colour)
        for colour, (name, curve) in enumerate(heldout.items(), 1)
    ]
    return line_chart(series, x_label="step", y_label=unit, markers=markers)


def _losses_of_parts(records: RunRecords, markers: Sequence[Marker]) -> list[tuple[str, str]]:
    """Draw each part by itself: one is often many times the other."""
    return [
        (
            f"Loss of a part: {_words(part)}",
            _loss_chart(
                records.curve(part + OF_PART),
                records.heldout(part + OF_PART),
                UNITS.get(part, PER_TOKEN),
                markers,
            ),
        )
        for part in parts_of(records)
    ]


def _shares(records: RunRecords) -> tuple[str, str]:
    """Draw what share of its predictions the model got right in each held-out set."""
    fields = _fields(_lasts(records), SHARES)
    curves = {
        f"{name}: {_words(field)}": [(step, 100 * share) for step, share in curve]
        for field in fields
        for name, curve in records.heldout(field).items()
    }
    series = [
        Series(name, curve, dotted=True, colour=colour)
        for colour, (name, curve) in enumerate(curves.items(), 1)
    ]
    title = "Held-out accuracy" + (" and recall" if any("_recall_" in field for field in fields) else "")
    return title, line_chart(series, x_label="step", y_label="% of the predictions")


def _heldout_table(records: RunRecords) -> str:
    lasts = {name: lines[-1] for name, lines in sorted(records.evals.items())}
    titles = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    titles |= {field: _words(field) for field in _fields(list(lasts.values()), OF_PARTS)}
    given = [field for field in titles if field == "loss" or any(field in line for line in lasts.values())]
    heldout, rows = records.heldout(), []
    for name, line in lasts.items():
        best = min(heldout[name], key=lambda point: point[1], default=None)
        values = [shown(number(line, field), "{:.4f}") for field in given]
        steps_and_tokens = [shown(number(line, field), "{:,.0f}") for field in ("step", "tokens")]
        rows.append(
            [name, *values, *steps_and_tokens, f"{best[1]:.4f} at {best[0]:,.0f}" if best else shown(None)]
        )
    counted = "tokens" if records.task() in ("causal", None) else "predictions"
    return table(["held-out set", *(titles[field] for field in given), "at step", counted, "best loss"], rows)


def _words(name: str) -> str:
    return name.replace("_", " ")
