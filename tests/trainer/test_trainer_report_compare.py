"""Several runs on one page: what is compared, what differs, and names that are alike."""

import re

import pytest
from made_runs import made_run, step_line, write_run
from read_pages import Page, rows_of

from basestone.trainer.errors import ConfigError
from basestone.trainer.report.comparison import differences, labels_of
from basestone.trainer.report.page import write_report
from basestone.trainer.report.records import RunRecords


@pytest.fixture
def runs(tmp_path):
    """Two runs of one name; the second is shorter, with another learning rate."""
    return [made_run(tmp_path / "a" / "run", 900), made_run(tmp_path / "b" / "run", 600, lr=3e-4, seed=2)]


def test_two_runs_of_one_name_are_told_apart(runs, tmp_path):
    text = write_report(runs, tmp_path / "page.html").read_text()
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags} and "http" not in text
    assert re.findall(r"<summary>(.*?)</summary>", text) == ["a/run", "b/run"]
    rows = {row[0]: row[1:] for row in rows_of(text.partition("<details>")[0])}
    assert rows["steps"] == ["900", "600"] and rows["tokens"] == ["58.98M", "39.32M"]
    assert rows["energy source"] == ["nvml-counter, 1 of 2 hosts metered"] * 2
    assert rows["cost with PUE"] == ["3.05 EUR", "2.04 EUR"]
    assert rows["optimizer.lr"] == ["0.0006", "0.0003"] and rows["train.steps"] == ["900", "600"]
    assert "model.hidden_size" not in rows and "version of torch" not in rows


def test_all_curves_are_there_and_each_run_has_its_own(runs, tmp_path):
    top = write_report(runs, tmp_path / "page.html").read_text().partition("<details>")[0]
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", top)
    assert titles == [
        "Training loss over steps",
        "Training loss over tokens",
        "Training loss over tokens, without the first fifth of each",
        *(f"Held-out loss over tokens: {name}" for name in ("books", "code", "web")),
        "Tokens per second",
        "Energy per token",
        "Cost over tokens",
    ]
    for svg in re.findall(r"<svg.*?</svg>", top, re.DOTALL):
        assert re.findall(r'class="line (c\d)', svg) == ["c0", "c1"]
        assert "a/run: " in svg and "b/run: " in svg


def test_the_warnings_of_all_runs_stand_at_the_top(runs, tmp_path):
    text = write_report(runs, tmp_path / "page.html").read_text()
    assert text.index("<h2>Warnings</h2>") < text.index("<h2>Comparison</h2>")
    found = {row[0] for row in rows_of(text.partition("<h2>Comparison")[0])}
    assert found == {"a/run", "b/run"}


def test_a_page_of_several_lies_in_the_current_directory(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_report(runs).resolve() == tmp_path / "comparison.html"
    assert not list(tmp_path.glob("*/run/*.html"))


def test_a_run_that_is_given_twice_is_refused(runs, tmp_path):
    (tmp_path / "link").symlink_to(runs[0])
    with pytest.raises(ConfigError, match="link: is given twice; give each run directory once"):
        write_report([*runs, tmp_path / "link"])


def test_runs_of_other_fields_and_currencies_go_together(runs, tmp_path):
    old = write_run(tmp_path / "old", [step_line(step) for step in range(1, 50)])
    empty = write_run(tmp_path / "empty", [], config="[train\n")
    dollars = made_run(tmp_path / "c" / "run", 600)
    (dollars / "run.toml").write_text((dollars / "run.toml").read_text().replace("EUR", "USD"))
    text = write_report([*runs, dollars, old, empty], tmp_path / "page.html").read_text()
    Page(text)
    assert "run.toml cannot be read: " in text and "each in its own currency" in text
    rows = {row[0]: row[1:] for row in rows_of(text.partition("<details>")[0])}
    assert rows["cost with PUE"][2:] == ["2.04 USD", "n/a", "n/a"] and rows["steps"][4] == "n/a"
    assert "a/run (EUR): " in text and "c/run (USD): " in text


def test_labels_are_as_long_as_it_takes(tmp_path):
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "other"]
    assert [label.split("/")[-2:] for label in labels_of(paths)[:2]] == [["x", "run"], ["y", "run"]]
    assert labels_of(paths[1:]) == ["run", "other"]


def test_settings_and_versions_that_differ():
    configs = [
        '# resolved by basestone\n# torch 2.13.0\n[a]\nx = 1\ny = ["p"]\n',
        '# torch 2.14.0\n[a]\nx = 1\ny = ["q"]\nz = "new"\n',
    ]
    runs = [RunRecords("run", [], {}, [], {}, config) for config in configs]
    assert differences(runs) == [
        ["a.y", '["p"]', '["q"]'],
        ["version of torch", "2.13.0", "2.14.0"],
        ["a.z", "not set", "new"],
    ]
    assert differences([runs[0], runs[0]]) == []


def task_run(path, task, **parts):
    return write_run(path, [step_line(1, **parts), step_line(2, **parts)], config=f"[task]\n{task}\n")


def top_of(runs, out):
    return write_report(runs, out).read_text().partition("<details>")[0]


def test_losses_of_different_tasks_are_said_not_to_compare(tmp_path):
    parts = {"masked_loss": 8.0, "next_sentence_loss": 0.7}
    bert = task_run(tmp_path / "bert", 'name = "masked"', **parts)
    hidden = task_run(tmp_path / "hidden", 'name = "masked"')
    pairs, other = (task_run(tmp_path / name, 'name = "contrastive"') for name in ("pairs", "other"))
    lost = write_run(tmp_path / "lost", [step_line(1)])
    text = top_of([bert, hidden, pairs], tmp_path / "page.html")
    assert (
        "<b>The losses of these runs do not compare</b>Their tasks are not the same: bert is masked and next sentence, "
        "hidden is masked, pairs is contrastive."
    ) in text
    assert text.index("do not compare") < text.index("<h2>Comparison</h2>")
    assert 'aria-label="nats over step"' in text and "nats per" not in text
    assert "do not compare" not in top_of([pairs, other, lost], tmp_path / "alike.html")
    text = top_of([hidden, write_run(tmp_path / "new", [], config="[task]\n")], tmp_path / "begun.html")
    assert "do not compare" not in text and 'aria-label="nats per hidden token over step"' in text


def test_settings_of_another_task_are_no_difference():
    configs = [
        '[task]\nname = "masked"\npredicted = 0.2\nmean_span = 3.0\npairs = "dropout"\n',
        '[task]\nname = "contrastive"\npredicted = 0.15\npairs = "given"\n',
        '[task]\nname = "masked"\npredicted = 0.2\n',
    ]
    runs = [RunRecords("run", [], {}, [], {}, config) for config in configs]
    assert differences(runs[:2]) == [
        ["task.name", "masked", "contrastive"],
        ["task.predicted", "0.2", "not set"],
        ["task.pairs", "not set", "given"],
    ]
    assert differences([runs[0], runs[2]]) == []
