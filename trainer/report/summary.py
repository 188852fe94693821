"""What a run has come to: its headline figures, each None where it is not known. Imports no torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from pydantic import ValidationError

from ..meters.tariff import JOULES_PER_KWH, Footprint, Tariff
from ..sections import MeterSection
from .figures import ratio
from .phases import OUTSIDE_STEPS
from .records import Record, RunRecords, number, numbers


@dataclass(frozen=True)
class Totals:
    """What a run has used over all its attempts.

    `joules` are as metered, `kwh` and what follows from it with the building's share (PUE); energy per token counts
    lost work, too. The tariff is None where the run file's `[meter]` cannot be read.
    """

    tokens: float | None
    train_s: float | None
    wall_s: float | None
    wasted_s: float | None
    goodput: float | None
    tariff: Tariff | None
    source: str
    joules: float | None
    metered_share: float
    wasted_joules: float | None
    footprint: Footprint

    @property
    def joules_per_token(self) -> float | None:
        """Give the metered joules of a token that the present weights have seen, of those that were metered."""
        return None if self.tokens is None else ratio(self.joules, self.tokens * self.metered_share)

    @property
    def tokens_per_kwh(self) -> float | None:
        """Give its inverse by the kWh, as metered."""
        return None if self.joules_per_token is None else ratio(JOULES_PER_KWH, self.joules_per_token)

    @property
    def currency(self) -> str:
        """Name the unit of the costs."""
        return self.tariff.rates.currency if self.tariff is not None else ""

    @property
    def how(self) -> str:
        """Tell what was read from what follows from watts that were given."""
        return "estimated" if self.source == "user-watts" else "metered"

    @property
    def with_pue(self) -> str:
        """Name the base of CO2e and of the cost of energy."""
        return "with PUE" if self.tariff is None else f"with PUE {self.tariff.rates.pue:g}"


@dataclass(frozen=True)
class Summary(Totals):
    """Totals, the last figures, and medians of a run."""

    step: float | None
    loss: float | None
    tokens_per_s: float | None
    tflops_per_device: float | None
    mfu: float | None
    hfu: float | None
    memory_gib: float | None
    attempts: float | None
    watts: float | None


def totals_of(records: RunRecords) -> Totals:
    """Work them out, from the ledger where it has them, for it outlives restarts, else from the last step."""
    last, ledger = (records.steps[-1] if records.steps else {}), records.ledger
    train_s, wall_s, wasted_s = (number(ledger, name) for name in ("train_s", "wall_s", "wasted_s"))
    goodput = number(last, "goodput")
    if train_s is not None and wall_s:
        goodput = (train_s - (wasted_s or 0.0)) / wall_s
    joules = number(ledger, "joules")
    if joules is None:
        joules = _last(records, "joules")
    source = ledger.get("joules_source")
    tariff = tariff_of(records)
    return Totals(
        tokens=number(last, "tokens"),
        train_s=train_s,
        wall_s=wall_s,
        wasted_s=wasted_s,
        goodput=goodput,
        tariff=tariff,
        source=source if isinstance(source, str) and source else "none",
        joules=joules,
        metered_share=metered_share(ledger),
        wasted_joules=number(ledger, "wasted_joules") if joules is not None else None,
        footprint=_footprint(records, tariff, joules),
    )


def summarise(records: RunRecords) -> Summary:
    """Work out the totals, and what it takes all lines for."""
    last = records.steps[-1] if records.steps else {}
    return Summary(
        **vars(totals_of(records)),
        step=number(last, "step"),
        loss=number(last, "loss"),
        tokens_per_s=_median(records, "tokens_per_s"),
        tflops_per_device=_median(records, "tflops_per_device"),
        mfu=_median(records, "mfu"),
        hfu=_median(records, "hfu"),
        memory_gib=max((value for _, value in records.curve("memory_gib")), default=None),
        attempts=number(records.ledger, "attempts") or number(last, "attempt"),
        watts=_mean_watts(records),
    )


def metered_share(ledger: Record) -> float:
    """Give the share of the trained tokens in whose time something was metered; 1 where the ledger does not say."""
    share = ratio(number(ledger, "metered_tokens"), number(ledger, "tokens"))
    return 1.0 if share is None else share


def tariff_of(records: RunRecords) -> Tariff | None:
    """Give the rates of the run file; None where it is not there or its `[meter]` is not whole."""
    if not records.config:
        return None
    section = records.settings().get("meter", {})
    try:
        return Tariff(MeterSection.model_validate(section))
    except ValidationError:
        return None


def _footprint(records: RunRecords, tariff: Tariff | None, joules: float | None) -> Footprint:
    gpu_s = number(records.ledger, "gpu_s")
    if tariff is not None and gpu_s is not None:
        return tariff.footprint(joules, gpu_s)
    return Footprint(None, _last(records, "g_co2e"), None, None, _last(records, "cost"))


def _last(records: RunRecords, field: str) -> float | None:
    return next((value for line in reversed(records.steps) if (value := number(line, field)) is not None), None)


def _median(records: RunRecords, field: str) -> float | None:
    values = [value for _, value in records.curve(field)]
    return statistics.median(values) if values else None


def _mean_watts(records: RunRecords) -> float | None:
    """Give the mean over the time in which something was metered."""
    joules = seconds = before = 0.0
    for record in records.steps:
        num_steps, before = max(record["step"] - before, 1.0), float(record["step"])
        watts, step_s = number(record, "watts"), number(record, "step_s")
        if watts is None or step_s is None:
            continue
        outside = numbers(record, "phase_s")
        elapsed_s = num_steps * (step_s + sum(outside.get(name, 0.0) for name in OUTSIDE_STEPS))
        joules, seconds = joules + watts * elapsed_s, seconds + elapsed_s
    return joules / seconds if seconds > 0 else None
