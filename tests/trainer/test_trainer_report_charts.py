"""Charts: ticks, thinning, and SVG that any reader takes."""

import itertools
import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from basestone.trainer.report.axes import nice_ticks
from basestone.trainer.report.charts import (
    NUM_COLOURS,
    Layer,
    Marker,
    Series,
    line_chart,
    stacked_chart,
    thin,
    with_mean,
)
from basestone.trainer.report.figures import duration, energy, format_number, shown, smoothed


@given(
    low=st.floats(-1e9, 1e9, allow_nan=False),
    spread=st.floats(1e-6, 1e9, allow_nan=False),
    num_ticks=st.integers(2, 10),
)
def test_ticks_are_inside_and_round(low, spread, num_ticks):
    high = low + spread
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high, num_ticks)
    slack = spread * 1e-6
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert len(ticks) <= num_ticks + 1
    steps = {f"{(b - a):.3g}" for a, b in itertools.pairwise(ticks)}
    assert all(re.sub(r"[.0]|e.*", "", step) in {"1", "2", "5"} for step in steps) or spread < 1e-5 * abs(low)


def test_ticks_by_hand():
    assert nice_ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(1.5, 4.2, 5) == [2, 3, 4]
    assert nice_ticks(-3, 3, 3) == [-2, 0, 2]


def test_thinning_keeps_spikes_ends_and_order():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[3333] = (3333.0, 50.0)
    points[7777] = (7777.0, -50.0)
    kept = thin(points, 1000)
    assert len(kept) <= 1000
    assert (3333.0, 50.0) in kept and (7777.0, -50.0) in kept
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert thin(points[:1000], 1000) == points[:1000]


def test_numbers_for_people():
    values = {0.0: "0", 3e-4: "0.0003", 2e-7: "2e-07", 2.5: "2.5", 1500.0: "1500", 12_000.0: "12k"}
    values |= {2.5e6: "2.5M", 1.2e9: "1.2G", -4e12: "-4T"}
    assert {value: format_number(value) for value in values} == values


def test_a_logarithmic_axis_takes_powers_of_ten():
    svg = line_chart([Series("g", [(1, 0.01), (2, 1e4), (3, 0.0)])], x_label="step", y_label="norm", log=True)
    ticks = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert ticks == ["0.01", "0.1", "1", "10", "100", "1000", "10k"]


def test_a_constant_and_a_single_point_can_be_drawn():
    for points in ([(1.0, 3.0)], [(1.0, 0.0), (2.0, 0.0)], [(5.0, -2.0)] * 2):
        ElementTree.fromstring(line_chart([Series("x", points)], x_label="step", y_label="y"))
    assert line_chart([Series("x", [(1.0, float("nan"))])], x_label="step", y_label="y") == ""


def test_tick_labels_tell_near_values_apart():
    points = [(1.0, 1_000_000.0), (2.0, 1_000_400.0)]
    svg = line_chart([Series("x", points)], x_label="step", y_label="tokens per second")
    ticks = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert len(ticks) > 3 and len(set(ticks)) == len(ticks)


def test_steps_have_whole_ticks():
    svg = line_chart([Series("x", [(1.0, 1.0), (3.0, 2.0)])], x_label="step", y_label="y")
    assert re.findall(r'text-anchor="middle">([0-9.]+)<', svg) == ["1", "2", "3"]


def chart_of(*series, **options):
    return ElementTree.fromstring(
        re.search(r"<svg.*</svg>", line_chart(series, x_label="step", y_label="y", **options), re.S)[0]
    )


def test_the_mean_of_a_noisy_curve_lies_over_its_pale_line():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    pale, mean = with_mean("loss", points)
    assert pale.faint and pale.points is points and not mean.faint
    assert all(abs(y - 0.5) < 0.1 for _, y in mean.points[100:])
    assert with_mean("loss", points[:50]) == [Series("loss", points[:50], colour=0)]
    lines = [line.get("class") for line in chart_of(pale, mean).iter("polyline")]
    assert lines == ["line c0 pale", "line c0"]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.floats(0.5, 100))
def test_a_mean_stays_between_the_least_and_the_most(values, span):
    means = smoothed(values, span)
    assert len(means) == len(values) and means[0] == values[0]
    assert all(min(values) - 1e-6 <= mean <= max(values) + 1e-6 for mean in means)


def test_a_mean_follows_a_steep_beginning():
    values = [2 + 8 / (1 + i) for i in range(1000)]
    assert all(
        abs(mean - value) < 0.25 * value for mean, value in zip(smoothed(values, 50), values, strict=True)
    )


def test_more_curves_than_colours_are_dashed():
    series = [Series(str(i), [(0.0, i), (1.0, i)]) for i in range(NUM_COLOURS + 2)]
    styles = [line.get("class") for line in chart_of(*series).iter("polyline")]
    assert len(set(styles)) == len(series)
    assert styles[NUM_COLOURS] == "line c0 dash1"


def test_shares_are_stacked_to_the_whole():
    layers = [Layer("a", [0.25, 0.5], 0), Layer("none", [0.0, 0.0], 3), Layer("b", [0.75, 0.5], 1)]
    text = stacked_chart([0, 10, 20], layers, x_label="step", y_label="%", markers=[Marker(10, "here")])
    assert "none" not in text
    chart = ElementTree.fromstring(text[text.index("<svg") :])
    low, high = chart.iter("polygon")
    corners = [
        [tuple(map(float, pair.split(","))) for pair in one.get("points").split()] for one in (low, high)
    ]
    tops, floor = {y for _, y in corners[1][:4]}, max(y for _, y in corners[0])
    assert len(tops) == 1  # both columns reach 100 %
    (ceiling,) = tops
    heights = [floor - y for _, y in corners[0][:4]]
    assert [round(height / (floor - ceiling), 2) for height in heights] == [0.25, 0.25, 0.5, 0.5]
    titles = [title.text for title in chart.iter("title")]
    assert titles[:2] == ["step 0 to 10: a 25.0%, b 75.0%", "step 10 to 20: a 50.0%, b 50.0%"]
    assert stacked_chart([0, 1], [], x_label="step", y_label="%") == ""


def test_what_is_unknown_is_not_a_number():
    assert [shown(None), duration(None), energy(None)] == ["n/a"] * 3
    assert [duration(59), duration(3723), duration(90000)] == ["0m 59s", "1h 02m", "1d 01h"]
    assert [energy(120.0), energy(7.2e6)] == ["120 J", "2 kWh"]
