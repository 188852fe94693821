"""The report: whole with whole files, still there with torn and missing ones, and safe to open."""

import itertools
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basestone.trainer.chart import Series, format_number, line_chart, nice_ticks, thin
from basestone.trainer.errors import ConfigError
from basestone.trainer.report import write_report
from basestone.trainer.run_records import read_records

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Check that tags are balanced; collect tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def step_line(step, **changes):
    return {
        "kind": "step",
        "attempt": 1,
        "step": step,
        "time": f"2026-01-01T00:00:{step % 60:02d}Z",
        "loss": 9.0 / step + 2,
        "grad_norm": 1.0 + 1 / step,
        "lr": 1e-4,
        "tokens": step * 4096,
        "tokens_per_s": 50_000 + step,
        "step_s": 0.1,
        "tflops_per_device": 1.25,
        "mfu": None,
        "phase_s": {"data": 0.01, "forward_backward": 0.07, "optimizer": 0.02},
        "memory_gib": 3.5,
        "joules": step * 36_000.0,
        **changes,
    }


def write_run(path, lines, *, events=(), ledger=None, config="", tail=""):
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if ledger is not None:
        (path / "ledger.json").write_text(json.dumps(ledger))
    (path / "run.toml").write_text(config)
    return path


def tiles(page_text):
    found = re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span></div>', page_text)
    return {name: value for value, name in found}


@pytest.fixture
def run_dir(tmp_path):
    """Two attempts: the first reaches step 120, the second goes on from 100; the last line is torn."""
    lines = [step_line(step) for step in range(1, 121)]
    lines += [step_line(step, attempt=2, loss=1.5, tokens_per_s=80_000) for step in range(101, 151)]
    for step in (50, 100, 150):
        evaluation = {"loss": 3.0 - step / 300, "perplexity": 12.0, "bits_per_byte": 1.1, "tokens": 65536}
        lines.append({"kind": "eval", "attempt": 1, "step": step, "name": "python", **evaluation})
    events = [
        {"time": "t0", "attempt": 1, "step": 0, "event": "start", "message": "4 ranks"},
        {"time": "t1", "attempt": 1, "step": 100, "event": "save", "message": "step_00000100"},
        {"time": "t2", "attempt": 2, "step": 100, "event": "resume", "message": "from step_00000100"},
    ]
    ledger = {"attempts": 2, "joules": 7.2e6, "joules_source": "nvml-samples", "wasted_joules": 3.6e5}
    ledger |= {"train_s": 3723.0, "wasted_s": 61.0, "tokens": 614400, "wasted_tokens": 81920}
    config = '[run]\nname = "a < b & c"\n'
    return write_run(
        tmp_path / "run-7", lines, events=events, ledger=ledger, config=config, tail='{"kind":"step","st'
    )


def test_headline_numbers(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = path.read_text()
    Page(text)
    shown = tiles(text)
    assert shown["steps"] == "150"
    assert shown["training loss"] == "1.5000"
    assert shown["held-out loss, python"] == "2.5000"
    assert shown["energy, kWh"] == "2"
    assert shown["joules per token"] == "11.72"  # 7.2e6 J over 614,400 tokens
    assert shown["training time"] == "1h 02m"
    assert shown["lost to restarts"] == "1m 01s"
    assert shown["attempts"] == "2"
    assert shown["MFU, median"] == "n/a"
    assert "Source: nvml-samples. Lost to restarts: 0.1 kWh." in text


def test_the_last_line_of_a_step_counts(run_dir):
    records = read_records(run_dir)
    assert [record["step"] for record in records.steps] == list(range(1, 151))
    assert {record["attempt"] for record in records.steps[100:]} == {2}
    assert records.curve("loss")[109] == (110.0, 1.5)


def test_charts_are_there_and_well_formed(run_dir):
    text = write_report(run_dir).read_text()
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    labels = [chart.get("aria-label") for chart in charts]
    assert labels == [
        "nats per token over step",
        "learning rate over step",
        "gradient norm over step",
        "tokens per second over step",
        "TFLOP/s per device over step",
        "% of the step over step",
        "GiB over step",
        "kWh over step",
    ]
    titles = [title.text for title in charts[0].iter("title")]
    assert "held-out: python: 2.5 (nats per token) at step 150" in titles
    assert "resume at step 100: from step_00000100" in titles
    marks = [line.get("class") for line in charts[0].iter("line") if "mark" in line.get("class")]
    assert marks == ["mark faint", "mark"]
    for chart in charts:
        for circle in chart.iter("circle"):
            assert 0 <= float(circle.get("cx")) <= 720 and 0 <= float(circle.get("cy")) <= 270


def test_nothing_is_loaded_and_nothing_runs(run_dir):
    page = Page(write_report(run_dir).read_text())
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "onload", "onclick"} & set(attributes)
    text = (run_dir / "report.html").read_text()
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>\"&"
    lines = [step_line(1, time=evil, phase_s={evil: 1.0, "b": 1.0}), step_line(2, time=evil)]
    lines.append({"kind": "eval", "step": 2, "name": evil, "loss": 1.0})
    events = [{"time": evil, "step": 1, "attempt": evil, "event": evil, "message": evil}]
    run = write_run(tmp_path / "a<b>&", lines, events=events, ledger={"joules_source": evil}, config=evil)
    text = write_report(run).read_text()
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in text
    assert evil in "".join(page.text)  # shown as what it is


def test_an_empty_directory_gives_a_report(tmp_path):
    text = write_report(tmp_path, tmp_path / "other.html").read_text()
    Page(text)
    assert "no step has been recorded" in text
    assert set(tiles(text).values()) == {"n/a"}
    assert "<svg" not in text
    assert "Energy was not measured: n/a." in text
    assert not (tmp_path / "report.html").exists()


def test_odd_records_do_no_harm(tmp_path):
    lines = [
        {"kind": "step"},
        {"kind": "step", "step": "seven"},
        {"kind": "step", "step": True},
        {"kind": "step", "step": 1, "loss": None, "phase_s": [1], "tokens": "many", "lr": {}},
        step_line(2, loss=float("nan"), grad_norm=float("inf"), phase_s={"data": None}),
        step_line(3, joules=None, mfu=0.41, grad_norm=0.0),
        step_line(4, phase_s={"data": 0.0}, mfu=0.43),
        {"kind": "eval", "step": 3},
        {"kind": "other", "step": 3},
    ]
    run = write_run(tmp_path / "run", lines, events=[{"event": None}, {"step": 2}], tail='[1]\n"x"\nnull\n')
    (run / "ledger.json").write_bytes(b'{"joules": 1e\xff')
    text = write_report(run).read_text()
    Page(text)
    assert tiles(text)["MFU, median"] == "42.0%"
    assert "nan" not in text.lower()


def test_unmeasured_energy_is_not_zero(tmp_path):
    ledger = {"joules": None, "joules_source": "none", "wasted_joules": 0.0}
    run = write_run(tmp_path / "run", [step_line(1, joules=None), step_line(2, joules=None)], ledger=ledger)
    text = write_report(run).read_text()
    assert tiles(text)["energy, kWh"] == tiles(text)["joules per token"] == "n/a"
    assert "kWh over step" not in text and "Lost to restarts:" not in text


def test_long_runs_stay_small(tmp_path):
    run = write_run(tmp_path / "run", [step_line(step) for step in range(1, 20_001)])
    path = write_report(run)
    assert path.stat().st_size < 600_000
    longest = max(len(points.split()) for points in re.findall(r'points="([^"]*)"', path.read_text()))
    assert 500 <= longest <= 1000


def test_a_missing_run_directory_is_said(tmp_path):
    with pytest.raises(
        ConfigError, match="is not a run directory; give the directory that `train` made"
    ) as caught:
        write_report(tmp_path / "nowhere")
    assert caught.value.exit_code == 64


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
