"""What joules and GPU hours come to: kWh at the building, grams of CO2e, money. Imports no torch.

    E_facility = PUE x E;  kWh = J / 3.6e6;  g CO2e = kWh x intensity;  cost = kWh x price + GPU hours x price

Location-based and operational only: no certificates, nothing of the hardware's making. What is not known is None,
and so is every sum with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..sections import MeterSection
from .grid import GRID_SOURCE, grid_intensity

JOULES_PER_KWH = 3.6e6


class Footprint(NamedTuple):
    """What a run has come to; `kwh` and what follows from it with the building's share (PUE)."""

    kwh: float | None
    g_co2e: float | None
    energy_cost: float | None
    gpu_cost: float | None
    cost: float | None


@dataclass(frozen=True)
class Tariff:
    """Turns joules and GPU seconds into kWh, grams and money."""

    rates: MeterSection

    @property
    def intensity(self) -> tuple[float, str] | None:
        """Give the grid's grams of CO2e a kWh, and whose figure it is; None where neither was given."""
        if self.rates.g_co2e_per_kwh is not None:
            return self.rates.g_co2e_per_kwh, "given in the run file"
        if self.rates.grid is None:
            return None
        country, year, grams = grid_intensity()[self.rates.grid]
        return grams, f"mean of {country} in {year}: {GRID_SOURCE}"

    def footprint(self, joules: float | None, gpu_s: float) -> Footprint:
        """Give what so many metered joules and GPU seconds come to."""
        rates, intensity = self.rates, self.intensity
        kwh = None if joules is None else rates.pue * joules / JOULES_PER_KWH
        energy_cost = _times(kwh, rates.price_per_kwh)
        gpu_cost = _times(gpu_s / 3600, rates.price_per_gpu_hour)
        parts = [(rates.price_per_kwh, energy_cost), (rates.price_per_gpu_hour, gpu_cost)]
        priced = [part for price, part in parts if price is not None]
        known = [part for part in priced if part is not None]
        return Footprint(
            kwh=kwh,
            g_co2e=_times(kwh, intensity[0] if intensity else None),
            energy_cost=energy_cost,
            gpu_cost=gpu_cost,
            cost=sum(known) if priced and len(known) == len(priced) else None,
        )


def _times(amount: float | None, rate: float | None) -> float | None:
    return None if amount is None or rate is None else amount * rate
