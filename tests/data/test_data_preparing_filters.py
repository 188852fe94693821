"""Filters of one's own: what they may be, what they may answer, and how a changed one is known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from basestone.data.errors import DataConfigError
from basestone.data.prepare import prepare

PROSE = "The harbour lies where the river meets the sea, and the old town climbs the hill behind it."


FILTERS = """
def no_german(text):
    return "german" if " und " in text else None
def wrong(text):
    return True
def failing(text):
    return 1 / 0
value = 3
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_filter_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "my_text_filters.py").write_text(FILTERS)
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    (tmp_path / "a.txt").write_text(PROSE)
    (tmp_path / "b.txt").write_text("Das Haus und die Zimmer darin haben viele Fenster.")
    given = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]

    def run(*names: str) -> dict[str, int]:
        out = tmp_path / f"out-{'-'.join(names)}"
        return prepare(given, out, heldout_fraction=0, workers=workers, filters=names).dropped

    assert run("my_text_filters:no_german") == {"german": 1}
    for name, message in {
        "my_text_filters:wrong": "'my_text_filters:wrong' returned True for .*a.txt; return None to keep",
        "my_text_filters:failing": "failed on .*a.txt with ZeroDivisionError",
        "my_text_filters:missing": "my_text_filters has no function 'missing'",
        "my_text_filters:value": "my_text_filters has no function 'value'",
        "my_missing_filters:f": "importing my_missing_filters failed .*set PYTHONPATH to it",
        "my_text_filters": "is not of the form MODULE:FUNCTION",
    }.items():
        with pytest.raises(DataConfigError, match=message) as caught:
            run(name)
        assert caught.value.exit_code == 64
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == [
        "out-my_text_filters:no_german"
    ]


CALLABLES = """
import functools
from written_elsewhere import Elsewhere, by_length
class Shortest:
    def __init__(self, least):
        self.least = least
    def __call__(self, text):
        return "short" if len(text) < self.least else None
    def bound(self, text):
        return self(text)
@functools.cache
def cached(text):
    return None
instance = Shortest(40)
method = instance.bound
partial = functools.partial(by_length, 40)
other = Elsewhere()
"""
ELSEWHERE = """
def by_length(least, text):
    return "short" if len(text) < least else None
class Elsewhere:
    def __call__(self, text):
        return None
"""


def test_a_changed_filter_of_any_kind_is_known(tmp_path: Path) -> None:
    """Each digest in a process of its own, as a preparation is that goes on."""

    def digest(name: str) -> str:
        code = f"from basestone.data.preparing.hooks import filter_digest; print(filter_digest('my_callables:{name}'))"
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    names = {
        "cached": False,
        "instance": False,
        "method": False,
        "partial": True,
        "by_length": True,
        "other": True,
    }
    (tmp_path / "my_callables.py").write_text(CALLABLES)
    (tmp_path / "written_elsewhere.py").write_text(ELSEWHERE)
    first = {name: digest(name) for name in names}
    assert all(first.values())
    (tmp_path / "my_callables.py").write_text(CALLABLES.replace("40", "4000"))
    second = {name: digest(name) for name in names}
    assert not set(first.values()) & set(second.values())
    (tmp_path / "written_elsewhere.py").write_text(ELSEWHERE.replace("None", "'no'"))
    assert {name: digest(name) != second[name] for name in names} == names


@pytest.mark.parametrize("name", ["length", "search"])
def test_a_filter_without_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sourceless_callables.py").write_text(
        "import re\nlength = len\nsearch = re.compile('a').search\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    (tmp_path / "a.txt").write_text(PROSE)
    with pytest.raises(
        DataConfigError, match=r"its source cannot be found.*give a plain function that stands in"
    ):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", filters=(f"sourceless_callables:{name}",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "own"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_filter_that_ends_the_process_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "ending_filters.py").write_text("import sys\ndef f(text):\n    sys.exit(0)\n")
    (tmp_path / "own" / "ending_import.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    (tmp_path / "a.txt").write_text(PROSE)
    for name, message in {
        "ending_filters:f": "'ending_filters:f' failed on .*a.txt with SystemExit: 0",
        "ending_import:f": "importing ending_import failed .SystemExit: 0",
    }.items():
        with pytest.raises(DataConfigError, match=message) as caught:
            prepare([str(tmp_path / "a.txt")], tmp_path / "out", filters=(name,), workers=workers)
        assert caught.value.exit_code == 64
