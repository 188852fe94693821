"""How much CO2e a kWh of a country's electricity comes with. Imports no torch."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources

GRID_SOURCE = "Ember, by way of Our World in Data (CC BY 4.0)"


@cache
def grid_intensity() -> dict[str, tuple[str, int, float]]:
    """Give (country, year, g CO2e a kWh) by ISO 3166 alpha-3 code: yearly means over the life cycle of the plants."""
    with resources.files(__package__).joinpath("grid_intensity.csv").open(encoding="utf-8") as file:
        return {
            row["code"]: (row["country"], int(row["year"]), float(row["g_co2e_per_kwh"]))
            for row in csv.DictReader(file)
        }
