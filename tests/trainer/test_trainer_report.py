"""The report: whole with whole files, still there with torn and missing ones, and safe to open."""

import json
import math
import os
import re
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import made_run, step_line, write_run
from read_pages import Page, notes, rows_of, tiles

from basestone.trainer.errors import ConfigError
from basestone.trainer.report.figures import duration, money
from basestone.trainer.report.page import write_report
from basestone.trainer.report.records import RunReader, read_records


@pytest.fixture
def run_dir(tmp_path):
    """Two attempts: the first reaches step 120, the second goes on from 100; the last line is torn."""
    lines = []
    for attempt, steps in ((1, range(1, 121)), (2, range(101, 151))):
        for step in steps:
            later = {"loss": 1.5, "tokens_per_s": 80_000} if attempt == 2 else {}
            lines.append(step_line(step, attempt=attempt, **later))
            if step % 50 == 0:
                evaluation = {
                    "loss": 3.0 - step / 300,
                    "perplexity": 12.0,
                    "bits_per_byte": 1.1,
                    "tokens": 65536,
                }
                lines.append({"kind": "eval", "attempt": attempt, "step": step, "name": "python", **evaluation})
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
    path = write_report([run_dir])
    assert path == run_dir / "report.html"
    text = path.read_text()
    Page(text)
    shown = tiles(text)
    assert shown["steps"] == "150"
    assert shown["training loss"] == "1.5000"
    assert shown["held-out loss, python"] == "2.5000"
    assert shown["metered energy, kWh"] == "2"
    assert shown["metered joules per token"] == "11.72"  # 7.2e6 J over 614,400 tokens
    assert shown["training time"] == "1h 02m"
    assert shown["lost to restarts"] == "1m 01s"
    assert shown["attempts"] == "2"
    assert "MFU, median" not in shown
    assert "Source: nvml-samples (measured: GPU boards only, by samples of their power;" in text
    assert "Lost to restarts: 0.1 kWh." in text and "Restarts lost 81,920 tokens, 1m 01s of training." in text


def test_the_last_line_of_a_step_counts(run_dir):
    records = read_records(run_dir)
    assert [record["step"] for record in records.steps] == list(range(1, 151))
    assert {record["attempt"] for record in records.steps[100:]} == {2}
    assert records.curve("loss")[109] == (110.0, 1.5)


def eval_line(step, loss, attempt):
    return {"kind": "eval", "attempt": attempt, "step": step, "name": "web", "loss": loss}


def gone_back(path):
    """A run of 22 steps that had been to 25, with the best held-out loss there, and went back to 15."""
    lines = [step_line(step, joules=100.0 * step) for step in range(1, 26)]
    lines[20:20] = [eval_line(20, 2.5, 1)]
    lines.append(eval_line(25, 1.0, 1))
    lines += [step_line(step, attempt=2, loss=2.0, joules=2600.0 + 100 * (step - 15)) for step in range(16, 23)]
    lines.append(eval_line(22, 2.0, 2))
    ledger = {"attempts": 2, "joules": 3300.0, "joules_source": "nvml-counter", "wasted_joules": 1000.0}
    return write_run(path, lines, ledger=ledger, config="[train]\nsteps = 22\n")


def test_a_branch_that_was_left_is_not_the_run(tmp_path):
    run = gone_back(tmp_path / "run")
    records = read_records(run)
    assert [line["step"] for line in records.steps] == list(range(1, 23))
    assert [line["attempt"] for line in records.steps] == [1] * 15 + [2] * 7
    assert records.heldout() == {"web": [(22.0, 2.0)]}
    joules = [value for _, value in records.curve("joules")]
    assert joules == sorted(joules), "what the left branch used is in the sum, and no sum falls"
    shown = tiles(write_report([run]).read_text())
    assert shown["steps"] == "22" and shown["held-out loss, web"] == "2.0000" and shown["tokens"] == "90.11k"


def test_a_branch_is_left_by_its_first_line_of_any_kind(tmp_path):
    lines = [step_line(step) for step in range(1, 26)] + [eval_line(25, 1.0, 1)]
    run = write_run(tmp_path / "run", [*lines, eval_line(15, 3.0, 2)])
    records = read_records(run)
    assert [line["step"] for line in records.steps] == list(range(1, 16)), "evaluated where it went on"
    assert records.heldout() == {"web": [(15.0, 3.0)]}


def test_a_branch_is_left_where_attempts_count_anew(tmp_path):
    """The ledger, which counts them, was lost."""
    run = write_run(tmp_path / "run", [step_line(step) for step in (*range(1, 26), *range(16, 19))])
    reader = RunReader(run)
    assert [line["step"] for line in reader.read().steps] == list(range(1, 19))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_line(6, attempt=2)) + "\n")
    assert [line["step"] for line in reader.read().steps] == list(range(1, 7))


def test_charts_are_there_and_well_formed(run_dir):
    text = write_report([run_dir]).read_text()
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    labels = [chart.get("aria-label") for chart in charts]
    assert labels == [
        "nats per token over step",
        "learning rate over step",
        "gradient norm over step",
        "tokens per second over step",
        "TFLOP/s per device over step",
        "% of the time over step",
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


def test_batch_and_length_are_drawn_where_they_change(tmp_path):
    def labels_of(name: str, shapes: list[tuple[int, int]]) -> set[str]:
        lines = [
            step_line(step, global_batch=batch, sequence_length=length)
            for step, (batch, length) in enumerate(shapes, start=1)
        ]
        text = write_report([write_run(tmp_path / name, lines)]).read_text()
        return set(re.findall(r'aria-label="(sequences over step|tokens over step)"', text))

    assert labels_of("same", [(8, 32)] * 4) == set()
    assert labels_of("batch", [(4, 32), (8, 32)]) == {"sequences over step"}
    assert labels_of("both", [(16, 8), (8, 32)]) == {"sequences over step", "tokens over step"}


def test_nothing_is_loaded_and_nothing_runs(run_dir):
    page = Page(write_report([run_dir]).read_text())
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
    text = write_report([run]).read_text()
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in text
    assert evil in "".join(page.text)  # shown as what it is


def test_a_run_that_never_logged_gives_a_report(tmp_path):
    (tmp_path / "lock").touch()
    text = write_report([tmp_path], tmp_path / "other.html").read_text()
    Page(text)
    assert "no step has been recorded" in text
    assert tiles(text) == {} and "<svg" not in text and "<figure" not in text
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_was_refused_says_why(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / "FAILED").write_text("step 0: there is <no> GPU; leave it out\n")
    text = write_report([tmp_path]).read_text()
    assert notes(text)[0] == (
        "warning",
        "The run failed before its first step",
        "step 0: there is &lt;no&gt; GPU; leave it out",
    )
    assert "n/a" not in re.sub(r"<ul.*?</ul>", "", text)


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
    text = write_report([run]).read_text()
    Page(text)
    assert tiles(text)["MFU, median"] == "42.0%"
    assert "nan" not in text.lower()


def test_unmeasured_energy_is_not_zero(tmp_path):
    ledger = {"joules": None, "joules_source": "none", "wasted_joules": 0.0}
    run = write_run(tmp_path / "run", [step_line(1, joules=None), step_line(2, joules=None)], ledger=ledger)
    text = write_report([run]).read_text()
    assert not [name for name in tiles(text) if "energy" in name or "joules" in name or "CO2e" in name]
    assert "Energy was not measured: n/a." in text
    assert "kWh over step" not in text and "Lost to restarts:" not in text


def test_given_watts_are_not_metered(tmp_path):
    ledger = {"joules": 7.2e6, "joules_source": "user-watts"}
    shown = tiles(write_report([write_run(tmp_path / "run", [step_line(1)], ledger=ledger)]).read_text())
    assert shown["estimated energy, kWh"] == "2" and "metered energy, kWh" not in shown


def test_long_runs_stay_small(tmp_path):
    run = write_run(tmp_path / "run", [step_line(step) for step in range(1, 20_001)])
    path = write_report([run])
    assert path.stat().st_size < 600_000
    longest = max(len(points.split()) for points in re.findall(r'points="([^"]*)"', path.read_text()))
    assert 500 <= longest <= 1000


def test_a_missing_run_directory_is_said(tmp_path):
    with pytest.raises(
        ConfigError, match=r"is no run directory \(there is no such directory\); give the directory"
    ) as caught:
        write_report([tmp_path / "nowhere"])
    assert caught.value.exit_code == 64


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"is no run directory \(has none of metrics.jsonl, run.toml, "):
        write_report([tmp_path])
    with pytest.raises(
        ConfigError, match=f"file: is a file; give the run directory that it lies in: {tmp_path}$"
    ):
        write_report([tmp_path / "file"])
    assert not (tmp_path / "report.html").exists()


def test_a_directory_is_no_page(run_dir, tmp_path):
    (tmp_path / "pages").mkdir()
    with pytest.raises(
        ConfigError, match=r"pages: is a directory; give the file to write, e\.g\. .*pages/report.html"
    ):
        write_report([run_dir], tmp_path / "pages")


def refused_place(run_dir, out, said):
    with pytest.raises(ConfigError, match=said) as caught:
        write_report([run_dir], out)
    assert caught.value.exit_code == 64


def test_a_page_replaces_no_pipe_and_no_device(run_dir, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.html").symlink_to("pipe")
    for name in ("pipe", "link.html"):
        refused_place(
            run_dir, tmp_path / name, f"{name}: is a device or a pipe, which a page would replace; give a"
        )
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link.html").is_symlink()
    os.mkfifo(run_dir / "report.html")
    refused_place(run_dir, None, "report.html: is a device or a pipe")


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "run.toml", "latest", "checkpoints/step_00000100/state.json"]
)
def test_a_page_replaces_no_file_of_a_run(run_dir, tmp_path, name):
    other = made_run(tmp_path / "other", 20)
    (tmp_path / "link").symlink_to(other)
    for run in (run_dir, other, tmp_path / "link"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        before = (run / name).read_bytes() if (run / name).exists() else None
        refused_place(run_dir, run / name, r"are its own; give a name that ends in \.html")
        assert ((run / name).read_bytes() if (run / name).exists() else None) == before
    assert write_report([run_dir], run_dir / "checkpoints-now.html").is_file()


def test_a_page_goes_to_a_file_in_a_directory_that_is_there(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused_place(run_dir, Path("-"), r"--out -: a page goes to a file; give its name, e\.g\. report\.html")
    refused_place(
        run_dir, Path("no/page.html"), r"no/page\.html: there is no directory no; make it, or give another"
    )
    (tmp_path / "file").touch()
    refused_place(run_dir, Path("file/page.html"), "there is no directory file")
    (tmp_path / "run.toml").touch()  # of a person, who keeps it beside the runs
    assert write_report([run_dir], Path("page.htm")).is_file() and sorted(
        path.name for path in tmp_path.iterdir()
    ) == ["file", "page.htm", "run-7", "run.toml"]


def test_what_cannot_be_read_is_said(tmp_path):
    run = write_run(
        tmp_path / "run", [step_line(1), step_line(2)], tail='{"kind":"st\n{"kind": "step", "step": 3'
    )
    (run / "run.toml").unlink()
    (run / "events.jsonl").unlink()
    (run / "events.jsonl").mkdir()
    said = {title: evidence for _, title, evidence in notes(write_report([run]).read_text())}
    assert said["Not all files of the run can be read"] == (
        "metrics.jsonl: 1 line(s) are not whole; events.jsonl: Is a directory; ledger.json: is not there; "
        "run.toml: is not there."
    )
    (run / "ledger.json").write_text("{")
    assert "ledger.json: is not a JSON object" in write_report([run]).read_text()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            "[meter\npue = 1.2\n",
            "run.toml: is not TOML (Expected ']' at the end of a table declaration (at line 1, ",
        ),
        ("[meter]\npue = Infinity\n", "run.toml: is not TOML (Invalid value (at line 2, column 7))"),
        ("[meter]\nprice_per_kwh = inf\npue = 1.2\n", "run.toml: meter.price_per_kwh: is no figure"),
        (
            "[meter]\ngrid = 'ATLANTIS'\n",
            "run.toml: meter.grid: value error, no country of the table has the code",
        ),
        ("[optimizer]\nlr = nan\n", "run.toml: optimizer.lr: is no figure"),
        ("meter = 3\n", "run.toml: meter: input should be"),
    ],
)
def test_a_run_file_that_is_not_whole_is_named(tmp_path, config, said):
    run = write_run(tmp_path / "run", [step_line(1)], ledger={"joules": 7.2e6, "gpu_s": 10.0}, config=config)
    evidence = {title: evidence for _, title, evidence in notes(write_report([run]).read_text())}
    assert said in unescape(evidence["Not all files of the run can be read"])


def test_a_ledger_with_what_is_no_figure_is_named(tmp_path):
    run = write_run(
        tmp_path / "run", [step_line(1)], ledger={"joules": math.inf, "hosts": "two", "wall_s": 3.0}
    )
    evidence = {title: evidence for _, title, evidence in notes(write_report([run]).read_text())}
    assert evidence["Not all files of the run can be read"] == (
        "ledger.json: hosts: is no figure; ledger.json: joules: is no figure."
    )


def test_numbers_of_any_size_do_no_harm(tmp_path):
    big = 10**400
    lines = [
        step_line(1, loss=big, tokens=big, step_s=-1, phase_s={"data": -5.0, "forward": big}),
        step_line(2, loss=1e308, tokens=1e308, watts=1e308, joules_per_token=1e-308, step_s=1e308),
        step_line(3, loss=-1e308, data_shares={"web": 1e308, "code": None}, power_limit_w=0),
        {"kind": "step", "step": -4, "loss": 1.0},
        {"kind": "eval", "step": 2, "name": None, "loss": 1e308, "perplexity": big},
    ]
    ledger = {"joules": 1e308, "hosts": "two", "joules_by_device": {"": 5.0, "a/": -1.0, "b": {}}, "wall_s": 0}
    deep = "[" * 100_000
    run = write_run(tmp_path / "run", lines, ledger=ledger, config="meter = 3", tail=deep)
    text = write_report([run]).read_text()
    Page(text)
    assert tiles(text)["steps"] == "3"
    assert "nan" not in text.lower() and ">inf" not in text


def test_lines_are_read_once_and_a_file_begun_anew_is_seen(tmp_path):
    run = write_run(tmp_path / "run", [step_line(1)], tail='{"kind": "step", "step": 2, "lo')
    reader = RunReader(run)
    assert len(reader.read().steps) == 1
    with (run / "metrics.jsonl").open("a") as file:
        file.write('ss": 7.0}\n')
    assert reader.read().curve("loss") == [(1.0, 11.0), (2.0, 7.0)]
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "save", "step": 2}')  # whole, without its end of line
    assert [event["event"] for event in reader.read().events] == ["save"]
    with (run / "events.jsonl").open("a") as file:
        file.write('\n{"event": "stop", "step": 2}\n')
    assert [event["event"] for event in reader.read().events] == ["save", "stop"]
    write_run(run, [step_line(9)])
    records = reader.read()
    assert records.curve("loss") == [(9.0, 3.0)] and records.events == []


@given(st.binary(max_size=400), st.integers(0, 400))
def test_a_file_in_pieces_is_the_file_at_once(tmp_path_factory, noise, cut):
    whole = b"".join(json.dumps(step_line(step)).encode() + b"\n" for step in (1, 2)) + noise
    run = tmp_path_factory.mktemp("run")
    (run / "metrics.jsonl").write_bytes(whole[: len(whole) - cut])
    reader = RunReader(run)
    reader.read()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(whole[len(whole) - cut :])
    assert reader.read().steps == read_records(run).steps


def test_phases_are_stacked_and_what_no_phase_has_is_other(tmp_path):
    phases = {"data": 0.01, "forward": 0.03, "backward": 0.05, "new_one": 0.004}
    lines = [step_line(step, phase_s=phases) for step in range(2, 400, 2)]
    lines.append(step_line(400, phase_s={**phases, "checkpoint": 9.9}))
    text = write_report([write_run(tmp_path / "run", lines)]).read_text()
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert rows["data"] == ["0m 04s", "6.7%", "10.0% at step 2"]
    assert rows["checkpoint"] == ["0m 20s", "33.1%", "99.0% at step 400"]
    assert rows["other"][0] == "0m 02s" and rows["new one"][0] == "0m 02s"


def test_the_accounts_of_energy_and_cost(tmp_path):
    text = write_report([made_run(tmp_path / "run", 600)]).read_text()
    rows = {row[0]: row[1:] for row in rows_of(text) if len(row) == 3}
    assert rows["hosts"][0] == "1 of 2 hosts metered"
    assert rows["metered energy"] == [
        "0.15 kWh",
        "measured: GPU boards only, by their energy counters; not CPUs, network, fans or power supplies",
    ]
    assert rows["energy at the building"][0] == "0.18 kWh"  # PUE 1.2
    assert rows["idle draw"][0] == "130 W" and rows["PUE"][0] == "1.2"
    assert rows["lost to restarts"][0] == "4.0%" and rows["goodput"][0] == "79.2%"
    grams, where = rows["grid intensity"]
    assert re.fullmatch(r"mean of France in 20\d\d: Ember, .*", where)
    assert float(rows["CO2e"][0].split()[0]) == pytest.approx(0.18 * float(grams.split()[0]))
    assert rows["cost of energy"] == ["0.04 EUR", "0.2 EUR per kWh"]
    assert rows["cost of GPU hours"] == ["2.00 EUR", "48m 00s of GPUs; 2.5 EUR per GPU hour"]
    assert rows["cost"][0] == "2.04 EUR"
    assert rows["energy per token"][0] == "0.01373 J" and rows["tokens per kWh"][0] == "262.1M"
    devices = [row for row in rows_of(text) if row[0] == "node-1"]
    assert devices == [
        ["node-1", "GPU-aaaa", "GPU board", "280.8k J", "52.0%"],
        ["node-1", "GPU-bbbb", "GPU board", "259.2k J", "48.0%"],
        ["node-1", "all", "", "0.15 kWh", "100.0%"],
    ]
    limits = [row for row in rows_of(text) if row[0] in ("500 W", "700 W")]
    assert [row[1] for row in limits] == ["301", "299"]
    assert float(limits[0][4]) > 1.15 * float(limits[1][4])  # tokens per joule


def test_a_run_without_prices_has_no_costs(tmp_path):
    run = write_run(tmp_path / "run", [step_line(1), step_line(2)], ledger={"joules": 4e6, "gpu_s": 7200.0})
    (run / "run.toml").write_text("[meter]\npue = 1.1\n")
    text = write_report([run]).read_text()
    rows = {row[0]: row[1:] for row in rows_of(text) if len(row) == 3}
    assert rows["metered energy"][0] == "1.111 kWh" and rows["PUE"][0] == "1.1"
    assert (
        "Not known (n/a): hosts, mean power, idle draw (meter.idle_s), lost to restarts, goodput, grid intensity "
        "(meter.grid), CO2e, cost of energy (meter.price_per_kwh), cost of GPU hours (meter.price_per_gpu_hour), cost.<"
    ) in text
    assert not rows.keys() & {"hosts", "CO2e", "cost"}


def test_what_costs_something_never_reads_0(tmp_path):
    """A run of seconds: a few hundred joules, cents of cents."""
    config = '[meter]\nprice_per_kwh = 0.2\nprice_per_gpu_hour = 0.0\ncurrency = "EUR"\n'
    ledger = {"joules": 648.0, "joules_source": "rapl", "gpu_s": 9.0}
    runs = [write_run(tmp_path / name, [step_line(1)], ledger=ledger, config=config) for name in ("a", "b")]
    text = write_report(runs[:1]).read_text()
    rows = {row[0]: row[1] for row in rows_of(text) if len(row) == 3}
    assert tiles(text)["cost, EUR, with PUE 1"] == "0.000036"
    assert rows["cost"] == rows["cost of energy"] == "0.000036 EUR" and rows["cost of GPU hours"] == "0 EUR"
    assert ["cost with PUE", "0.000036 EUR", "0.000036 EUR"] in rows_of(
        write_report(runs, tmp_path / "c.html").read_text()
    )


@given(st.floats(1e-9, 1e300))
def test_money_is_near_to_what_it_was(amount):
    text = money(amount)
    assert len(text) < 24 and text.strip("0.,") != ""
    if amount < 1e15:
        assert "e" not in text and abs(float(text.replace(",", "")) - amount) <= max(0.05 * amount, 0.005)


def test_times_have_one_readable_form_and_garbage_none(tmp_path):
    lines = [
        step_line(1, time="2026-01-01T00:00:07.123+00:00"),
        step_line(2, time="2026-01-01T02:00:08.987654+01:00"),
    ]
    events = [
        {"time": time, "step": 1, "attempt": 1, "event": "save", "message": f"at {i}"}
        for i, time in enumerate(
            ["2026-01-01T00:00:07.123Z", "yesterday", 1767225607, "9" * 90, "0001-01-01T00:00+23:00"]
        )
    ]
    text = write_report([write_run(tmp_path / "run", lines, events=events)]).read_text()
    assert ">2026-01-01 00:00:07 UTC to 2026-01-01 01:00:08 UTC<" in text
    assert [row[0] for row in rows_of(text) if row[-1].startswith("at ")] == [
        "2026-01-01 00:00:07 UTC",
        "",
        "",
        "",
        "",
    ]


def test_figures_that_no_run_has_take_little_room(tmp_path):
    ledger = {
        "joules": 1e99,
        "wall_s": 1e99,
        "train_s": 1e99,
        "wasted_s": -5.0,
        "gpu_s": 1e99,
        "attempts": 1e99,
    }
    config = "[meter]\nprice_per_kwh = 1.0\nprice_per_gpu_hour = 2.0\n"
    line = step_line(1, watts=1e99, step_s=1e99, phase_s={"data": 1e99}, mfu=1e99)
    text = write_report([write_run(tmp_path / "run", [line], ledger=ledger, config=config)]).read_text()
    assert not re.search(r"[0-9,]{25}", "".join(Page(text).text))
    assert duration(1e99) == duration(-5.0) == duration(math.nan) == "n/a" and duration(1e10) == "115740d 17h"


def test_memory_data_and_quarantine(tmp_path):
    text = write_report([made_run(tmp_path / "run", 300)]).read_text()
    assert all(f">{name}</span>" in text for name in ("allocated", "reserved", "host", "web", "code", "books"))
    assert ["web", "3", "12,288"] in rows_of(text)
    assert ["", "8", "web", "1", "4096", "crc differs"] in rows_of(text), "t is no time"
    on_cpu = write_report([write_run(tmp_path / "cpu", [step_line(1)])]).read_text()
    assert ["device, allocated", "n/a"] in rows_of(on_cpu) and ["host", "3.5"] in rows_of(on_cpu)
    assert ["chunks in quarantine", "n/a"] in rows_of(on_cpu)


def test_a_very_long_run_keeps_its_spike(tmp_path):
    path = write_report([made_run(tmp_path / "run", 12_000, num_events=2000, every=200)])
    text = path.read_text()
    assert path.stat().st_size < 1_000_000
    assert "The last 500 of 2,000." in text
    loss = ElementTree.fromstring(re.search(r"<svg.*?</svg>", text, re.DOTALL)[0])
    pale = next(line for line in loss.iter("polyline") if "pale" in line.get("class"))
    spike = min((pair.split(",") for pair in pale.get("points").split()[200:]), key=lambda pair: float(pair[1]))
    ticks = [float(tick.get("x")) for tick in loss.iter("text") if tick.text == "8000"]
    assert float(spike[0]) == pytest.approx(ticks[0], abs=0.5)  # step 8,000 of 12,000
