"""What a person sees of a run: lines in a file, a bar on a terminal, nothing on the other ranks."""

from __future__ import annotations

import io
import sys

import pytest

from basestone.trainer.console import RunConsole, short_line, step_line

RECORD = {
    "step": 7,
    "loss": 3.14159,
    "grad_norm": 0.5,
    "lr": 3e-4,
    "tokens_per_s": 12_345.0,
    "tflops_per_device": 1.25,
    "mfu": 0.4219,
    "memory_gib": 2.04,
    "joules": 1_500_000.0,
}


def test_a_line_says_everything_that_is_known():
    assert step_line(RECORD) == (
        "loss 3.1416 | gnorm 0.50 | lr 3.0e-04 | 12.3k tok/s | 1.25 TF/dev | mfu 42.2% | mem 2.0 GiB | 1.5MJ"
    )


@pytest.mark.parametrize(("name", "word"), [("mfu", "mfu"), ("joules", "J")])
def test_what_is_unknown_is_left_out(name, word):
    assert word in step_line(RECORD)
    assert word not in step_line(RECORD | {name: None})
    assert step_line({key: value for key, value in RECORD.items() if key != name}) == step_line(
        RECORD | {name: None}
    )


@pytest.mark.parametrize(
    ("joules", "text"), [(0.0, "| 0J"), (999.0, "| 999J"), (1e3, "| 1.0kJ"), (2.5e9, "| 2.5GJ")]
)
def test_large_numbers_are_short(joules, text):
    assert step_line(RECORD | {"joules": joules}).endswith(text)


def test_beside_a_bar_there_is_room_for_little():
    assert short_line(RECORD) == "loss 3.142 | 12.3k tok/s | 1.5MJ"
    assert short_line(RECORD | {"joules": None}) == "loss 3.142 | 12.3k tok/s"
    assert len(short_line(RECORD | {"loss": 12.3456, "tokens_per_s": 999_900.0})) < 36


def test_numbers_that_are_not_finite_are_shown():
    assert step_line(RECORD | {"loss": float("nan"), "grad_norm": float("inf")}).startswith(
        "loss nan | gnorm inf"
    )


def test_plain_lines_go_to_stderr_whole_and_as_they_are(capsys):
    console = RunConsole(20, 0)
    console.step(RECORD)
    console.say("[bold]x[/bold] " + "long " * 100)
    console.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"step 7/20 | {step_line(RECORD)}", ("[bold]x[/bold] " + "long " * 100)]


def test_other_ranks_are_silent(capsys):
    console = RunConsole(20, 0, silent=True)
    console.step(RECORD)
    console.say("hello")
    console.close()
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_and_gets_its_cursor_back(monkeypatch):
    terminal = Terminal()
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", terminal)
    console = RunConsole(20, 3)
    console.step(RECORD)
    console.say("a line of its own")
    console.close()
    text = terminal.getvalue()
    assert "3/20" in text and "7/20" in text and short_line(RECORD) in text and "a line of its own" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is hidden once and shown once"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
