"""What joules and GPU hours come to: kWh at the building, grams of CO2e, money. Imports no torch.

    E_facility = PUE x E;  kWh = J / 3.6e6;  g CO2e = kWh x intensity;  cost = kWh x price + GPU hours x price

Location-based and operational only: no certificates, nothing of the hardware's making. What is not known is None,
and so is every sum with it.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import NamedTuple, Protocol

JOULES_PER_KWH = 3.6e6
GRID_SOURCE = "Ember, by way of Our World in Data (CC BY 4.0)"


class Rates(Protocol):
    """The fields of `[meter]` that say what things cost."""

    pue: float
    grid: str | None
    g_co2e_per_kwh: float | None
    price_per_kwh: float | None
    price_per_gpu_hour: float | None
    currency: str


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

    rates: Rates

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


@cache
def grid_intensity() -> dict[str, tuple[str, int, float]]:
    """Give (country, year, g CO2e a kWh) by ISO 3166 alpha-3 code: yearly means over the life cycle of the plants."""
    with resources.files(__package__).joinpath("grid_intensity.csv").open(encoding="utf-8") as file:
        return {
            row["code"]: (row["country"], int(row["year"]), float(row["g_co2e_per_kwh"]))
            for row in csv.DictReader(file)
        }


def _times(amount: float | None, rate: float | None) -> float | None:
    return None if amount is None or rate is None else amount * rate
