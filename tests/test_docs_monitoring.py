"""docs/monitoring.md and docs/grafana.json name what the endpoint gives, and what they show can be loaded."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import shlex
import socket
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from full_record import EVALUATION, LEDGER, STEP
from prometheus_client.parser import text_string_to_metric_families
from run_files import VALUES, run_values

from basestone.trainer.config import RunConfig
from basestone.trainer.load import load_run, run_to_toml
from basestone.trainer.sinks.prometheus import PrometheusSink

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "monitoring.md").read_text(encoding="utf-8")
BOARD: dict[str, Any] = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
NAME = re.compile(r"\bbasestone_\w+")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


@pytest.fixture(scope="module")
def metrics() -> dict[str, set[str]]:
    """Labels by name of everything that a real endpoint gives where every figure is known."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    sink = PrometheusSink("127.0.0.1", port, LEDGER, "EUR")
    sink.begin("r1", 0)
    try:
        sink.evaluation(EVALUATION)
        sink.step(STEP)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
    finally:
        sink.close()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def expressions() -> list[tuple[str, str]]:
    """What the dashboard asks for, and how it names the answer."""
    return [
        (target["expr"], target["legendFormat"]) for panel in BOARD["panels"] for target in panel["targets"]
    ]


def test_every_metric_of_the_dashboard_is_given(metrics):
    asked = [expression for expression, _ in expressions()]
    asked += [variable["query"]["query"] for variable in BOARD["templating"]["list"]]
    for expression in asked:
        assert NAME.search(expression), f"asks for nothing of ours: {expression}"
        assert set(NAME.findall(expression)) <= set(metrics), expression
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), expression


def test_every_label_of_a_legend_is_there(metrics):
    for expression, legend in expressions():
        (first, *_) = NAME.findall(expression)
        assert set(re.findall(r"{{(\w+)}}", legend)) <= metrics[first] | {"instance", "job"}, legend


def test_the_dashboard_can_be_imported():
    (given,) = BOARD["__inputs"]
    assert (given["type"], given["pluginId"]) == ("datasource", "prometheus")
    source = {"type": "prometheus", "uid": f"${{{given['name']}}}"}
    panels = BOARD["panels"]
    for part in [*panels, *(target for panel in panels for target in panel["targets"])]:
        assert part["datasource"] == source
    assert all(variable["datasource"] == source for variable in BOARD["templating"]["list"])
    assert BOARD["id"] is None and BOARD["schemaVersion"] == 42
    assert len({panel["id"] for panel in panels}) == len(panels)
    required = {one["id"] for one in BOARD["__requires"] if one["type"] == "panel"}
    assert {panel["type"] for panel in panels} == required


def test_no_two_panels_of_the_dashboard_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def test_the_page_lists_every_metric_with_its_labels(metrics):
    told = {}
    for names, labels in re.findall(r"^\| (`basestone_.*?) \| (.*?) ?\|", PAGE, re.M):
        told.update({name: set(re.findall(r"`(\w+)`", labels)) for name in NAME.findall(names)})
    assert told == metrics


def test_commands_of_the_page_can_be_given(tmp_path):
    (tmp_path / "run.toml").write_text(run_to_toml(VALUES))
    lines = [shlex.split(line) for text in blocks("bash") for line in text.splitlines()]
    trains = [words for words in lines if words[:2] == ["basestone", "train"]]
    given = {}
    for words in trains:
        changes = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
        load_run(tmp_path / words[2], changes)
        given.update(change.split("=") for change in changes)
    assert set(given) == {"meter.wandb_project", "meter.prometheus_port", "profile.first_step"}
    (curl,) = [words for words in lines if words[0] == "curl"]
    scrapes, alarms = map(yaml.safe_load, blocks("yaml"))
    (target,) = scrapes["scrape_configs"][0]["static_configs"][0]["targets"]
    assert curl[-1] == f"http://{target}/metrics" and target.endswith(f":{given['meter.prometheus_port']}")
    assert alarms["groups"][0]["rules"][0]["expr"].startswith(
        "time() - basestone_last_record_timestamp_seconds"
    )


def test_settings_of_the_page_are_those_of_a_run():
    for text in blocks("toml"):
        RunConfig(**{**run_values(), **tomllib.loads(text)})
    for key in set(re.findall(r"`((?:meter|profile)\.\w+)", PAGE)):
        section, _, name = key.partition(".")
        assert name in type(getattr(RunConfig(**run_values()), section)).model_fields, key
