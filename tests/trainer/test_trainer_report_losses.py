"""The losses on a report's page: each in its unit, parts by themselves, and what else held-out sets tell."""

import re

import pytest
from made_runs import step_line, write_run
from read_pages import rows_of

from basestone.trainer.report.page import write_report


def evaluation(step, name="topics", **figures):
    return {"kind": "eval", "attempt": 1, "step": step, "name": name, "loss": 1.5, "tokens": 9, **figures}


def loss_part(text):
    return text.partition("<h2>Loss</h2>")[2].partition("<h2>")[0]


def charts_of(text):
    """Give by title each chart's axis and what its points say."""
    drawn = re.findall(r"<figcaption>(.*?)</figcaption>.*?aria-label=\"(.*?)\"(.*?)</svg>", text, re.DOTALL)
    return {title: (axis, re.findall(r"<title>(.*?)</title>", svg)) for title, axis, svg in drawn}


def test_the_table_of_held_out_sets_has_what_the_parts_of_a_loss_gave(tmp_path):
    figures = {"contrastive_accuracy": 0.25, "contrastive_recall_at_10": 0.75}
    lines = [step_line(1), step_line(2), evaluation(2, "pairs", **figures), evaluation(2, "plain")]
    run = write_run(tmp_path / "run", lines, config='[task]\nname = "contrastive"\n')
    text = loss_part(write_report([run]).read_text())
    assert re.findall(r"<th>(.*?)</th>", text) == [
        *("held-out set", "loss", "contrastive accuracy", "contrastive recall at 10"),
        *("at step", "predictions", "best loss"),
    ]
    rows = {row[0]: row for row in rows_of(text)}
    assert rows["pairs"][2:4] == ["0.2500", "0.7500"] and rows["plain"][2:4] == ["n/a", "n/a"]


def test_a_decoder_has_one_chart_of_its_loss_and_the_usual_table(tmp_path):
    lines = [step_line(1), evaluation(1, perplexity=4.5, bits_per_byte=1.0)]
    text = loss_part(write_report([write_run(tmp_path / "run", lines, config="[task]\n")]).read_text())
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == ["Loss"]
    assert charts_of(text)["Loss"][0] == "nats per token over step"
    assert re.findall(r"<th>(.*?)</th>", text)[1:] == [
        *("loss", "perplexity", "bits per byte", "at step", "tokens", "best loss"),
    ]


def test_accuracies_and_recall_are_drawn_by_held_out_set(tmp_path):
    lines = [step_line(step) for step in range(1, 5)]
    for step in (2, 4):
        shares = {"contrastive_accuracy": step / 10, "contrastive_recall_at_10": step / 5}
        lines += [evaluation(step, "one", **shares), evaluation(step, "two", contrastive_accuracy=0.5)]
    run = write_run(tmp_path / "run", lines, config='[task]\nname = "contrastive"\n')
    charts = charts_of(write_report([run]).read_text())
    assert charts["Loss"][0] == "nats over step"
    axis, said = charts["Held-out accuracy and recall"]
    assert axis == "% of the predictions over step"
    assert [line.replace(" (% of the predictions) at step", "") for line in said] == [
        *("one: contrastive accuracy: 20 2", "one: contrastive accuracy: 40 4"),
        *("two: contrastive accuracy: 50 2", "two: contrastive accuracy: 50 4"),
        *("one: contrastive recall at 10: 40 2", "one: contrastive recall at 10: 80 4"),
    ]


def test_the_parts_of_a_loss_are_drawn_each_by_itself(tmp_path):
    parts = {"masked_loss": 7.0, "next_sentence_loss": 0.5}
    lines = [step_line(1, **parts), step_line(2, **parts), evaluation(2, masked_accuracy=0.5, **parts)]
    run = write_run(tmp_path / "run", lines, config='[task]\nname = "masked"\nnext_sentence = true\n')
    charts = charts_of(loss_part(write_report([run]).read_text()))
    assert {title: axis for title, (axis, _) in charts.items()} == {
        "Loss": "nats over step",
        "Held-out accuracy": "% of the predictions over step",
        "Loss of a part: masked": "nats per hidden token over step",
        "Loss of a part: next sentence": "nats over step",
    }
    assert charts["Loss of a part: next sentence"][1] == [
        "training: 0.5 (nats) at step 1",
        "training: 0.5 (nats) at step 2",
        "held-out: topics: 0.5 (nats) at step 2",
    ]


@pytest.mark.parametrize(
    ("task", "unit"),
    [("masked", "nats per hidden token"), ("spans", "nats per token"), ("contrastive", "nats")],
)
def test_a_loss_is_in_the_unit_of_its_task(tmp_path, task, unit):
    run = write_run(tmp_path / "run", [step_line(1), step_line(2)], config=f'[task]\nname = "{task}"\n')
    assert charts_of(write_report([run]).read_text())["Loss"][0] == f"{unit} over step"
