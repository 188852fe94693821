"""What joules come to, against figures worked out by hand; what is not known stays unknown."""

from __future__ import annotations

import dataclasses

import pytest
from pydantic import ValidationError
from run_files import run_of

from basestone.trainer.errors import ConfigError
from basestone.trainer.meters.budget import used_up
from basestone.trainer.meters.grid import grid_intensity
from basestone.trainer.meters.ledger import Ledger
from basestone.trainer.meters.tariff import Footprint, Tariff
from basestone.trainer.sections import BudgetSection, MeterSection


def test_a_gigajoule_in_france_worked_out_by_hand():
    """1e9 J are 277.78 kWh; 333.33 with a PUE of 1.2; 18.7 kg at 56.0 g; 100 GPU hours at 2.5."""
    section = MeterSection(pue=1.2, grid="FRA", price_per_kwh=0.15, price_per_gpu_hour=2.5, currency="EUR")
    used = Tariff(section).footprint(1e9, 100 * 3600.0)
    assert used.kwh == pytest.approx(333.3333, abs=1e-3)
    assert used.g_co2e == pytest.approx(18_666.7, abs=0.1)
    assert used.energy_cost == pytest.approx(50.0)
    assert used.gpu_cost == pytest.approx(250.0)
    assert used.cost == pytest.approx(300.0)


def test_nothing_given_is_nothing_known():
    assert Tariff(MeterSection()).footprint(None, 3600.0) == Footprint(None, None, None, None, None)
    assert Tariff(MeterSection()).footprint(3.6e6, 3600.0) == Footprint(1.0, None, None, None, None)


def test_a_sum_with_an_unknown_part_is_unknown():
    tariff = Tariff(MeterSection(price_per_kwh=0.15, price_per_gpu_hour=2.5))
    used = tariff.footprint(None, 3600.0)
    assert (used.gpu_cost, used.energy_cost, used.cost) == (2.5, None, None)
    assert Tariff(MeterSection(price_per_gpu_hour=2.5)).footprint(None, 3600.0).cost == 2.5


def test_a_free_kwh_is_known_to_cost_nothing():
    assert Tariff(MeterSection(price_per_kwh=0.0)).footprint(3.6e6, 0.0).cost == 0.0


def test_the_intensity_says_whose_figure_it_is():
    assert Tariff(MeterSection(grid="DEU")).intensity == (
        380.9,
        "mean of Germany in 2023: Ember, by way of Our World in Data (CC BY 4.0)",
    )
    assert Tariff(MeterSection(g_co2e_per_kwh=12.5)).intensity == (12.5, "given in the run file")
    assert Tariff(MeterSection()).intensity is None


def test_the_table_is_whole():
    table = grid_intensity()
    assert len(table) > 200
    for code, (country, year, grams) in table.items():
        assert len(code) == 3 and code.isupper() and country
        assert 2021 <= year <= 2026 and 0 < grams < 1500


def test_an_unknown_country_is_refused_by_name():
    with pytest.raises(ValidationError, match=r"no country of the table has the code 'GER' \(ISO 3166 alpha-3"):
        MeterSection(grid="GER")


def test_two_intensities_are_refused():
    with pytest.raises(ValidationError, match="grid and g_co2e_per_kwh are both given"):
        MeterSection(grid="DEU", g_co2e_per_kwh=1.0)


@pytest.mark.parametrize(
    ("limits", "reached"),
    [
        ({}, None),
        ({"kwh": 1.3, "cost": 13.0, "hours": 2.1}, None),
        ({"kwh": 1.2}, "budget.kwh = 1.2 is used up: 1.2 kWh"),
        ({"hours": 1.5}, "budget.hours = 1.5 is used up: 2 h"),
        ({"cost": 12.0, "hours": 2.0}, "budget.cost = 12 is used up: 12 EUR; budget.hours = 2 is used up: 2 h"),
    ],
)
def test_a_budget_names_what_is_used_up(limits, reached):
    tariff = Tariff(MeterSection(pue=1.2, price_per_gpu_hour=3.0, currency="EUR"))
    ledger = Ledger(joules=3.6e6, wall_s=7200.0, gpu_s=4 * 3600.0)
    assert used_up(BudgetSection(**limits), ledger, tariff) == reached


def test_a_budget_of_what_is_unknown_is_never_reached():
    limits = BudgetSection(kwh=0.001, cost=0.001)
    assert used_up(limits, Ledger(wall_s=1e6), Tariff(MeterSection(price_per_kwh=1.0))) is None


def test_a_budget_of_money_without_a_price_is_refused():
    with pytest.raises(ConfigError, match=r"budget\.cost needs a price; set meter\.price_per_kwh"):
        run_of(budget__cost=5.0).resolve(1, 100)
    run_of(budget__cost=5.0, meter__price_per_gpu_hour=2.0).resolve(1, 100)


def test_goodput_is_the_share_that_trained_the_present_weights():
    assert Ledger().goodput is None
    assert Ledger(wall_s=100.0, train_s=80.0, wasted_s=20.0).goodput == 0.6


@pytest.mark.parametrize(
    ("values", "bad"),
    [
        (dataclasses.asdict(Ledger()), []),
        (dataclasses.asdict(Ledger(joules=1.0, idle_w=3.0, joules_by_device={"a/b": 1})), []),
        (
            {"joules": "1", "tokens": 1.5, "joules_source": None, "wall_s": True},
            ["joules", "joules_source", "wall_s", "tokens"],
        ),
        (
            {"joules_by_device": {"a": "b"}, "idle_w": [], "hosts": None},
            ["idle_w", "hosts", "joules_by_device"],
        ),
    ],
)
def test_what_is_no_ledger_is_named(values, bad):
    assert Ledger.misfits(values) == bad
