"""When a run has cost enough. Imports no torch."""

from __future__ import annotations

from ..sections import BudgetSection
from .ledger import Ledger
from .tariff import Tariff


def used_up(limits: BudgetSection, ledger: Ledger, tariff: Tariff) -> str | None:
    """Say which limit a run has reached, over all its attempts; None while there is some left."""
    used = tariff.footprint(ledger.joules, ledger.gpu_s)
    rows = (
        ("kwh", limits.kwh, used.kwh, "kWh"),
        ("cost", limits.cost, used.cost, tariff.rates.currency),
        ("hours", limits.hours, ledger.wall_s / 3600, "h"),
    )
    reached = [
        f"budget.{name} = {limit:g} is used up: {amount:.4g} {unit}"
        for name, limit, amount, unit in rows
        if limit is not None and amount is not None and amount >= limit
    ]
    return "; ".join(reached) or None
