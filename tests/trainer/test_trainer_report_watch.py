"""The live view: what a frame says of a run that goes on, was stopped, failed, was killed or is complete."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import threading
import time

import pytest
from commands import command, environment
from made_runs import made_run, step_line, write_run
from read_pages import tiles
from rich.console import Console

from basestone.trainer.report.figures import duration
from basestone.trainer.report.live import LiveView, seconds_per_step, sparkline, total_steps, watch
from basestone.trainer.report.page import write_report
from basestone.trainer.report.records import read_records
from basestone.trainer.run_lock import RunLock


def shown(view, width=200, **options):
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(view.frame(**options))
    return console.file.getvalue()


@pytest.fixture
def going(tmp_path):
    """A run of 200 steps at step 60, one step a second, whose lock this process holds."""
    lines = [step_line(step, cost=0.5, watts=300.0, g_co2e=12.5) for step in range(1, 61)]
    for line in lines:
        line["time"] = f"2026-01-01T00:{line['step'] // 60:02d}:{line['step'] % 60:02d}+00:00"
    lines.append({"kind": "eval", "step": 50, "name": "python", "loss": 3.25})
    config = '[train]\nsteps = 200\n[meter]\ncurrency = "EUR"\n'
    events = [{"time": f"2026-01-01T00:00:{i:02d}Z", "step": i, "event": "save"} for i in range(9)]
    run = write_run(tmp_path / "run", lines, events=events, config=config, tail='{"kind": "ste')
    lock = RunLock(run)
    yield run
    lock.close()


def test_a_frame_of_a_run_that_goes_on(going):
    text = shown(LiveView(going))
    assert f"run  going: pid {os.getpid()} on " in text
    assert "60/200 steps, 30.0%, 2m 20s left" in text
    assert "loss      2.1552, 2.1525, 2.1500  █" in text and "▁" in text
    assert "python 3.2500 (best 3.2500 at step 50)" in text
    assert "50.06k tokens/s, 0.1 s a step, 300 W, MFU n/a, goodput n/a" in text
    assert "data 10%, optimizer 20%, forward backward 70%" in text
    assert "0.6 kWh metered, 8.789 J/token; with PUE 1 12.5 g CO2e, cost 0.50 EUR" in text
    assert "memory    host 3.5 GiB" in text
    assert text.count(" save") == 5 and "00:00:08 step 8 save" in text
    assert "- MFU is not known" in text and "Not all files" in text and "ledger.json: is not there." in text


def test_longer_sequences_take_longer(going):
    """60 of 100 steps of 128 tokens, one a second, and then 100 of 512."""
    config = (
        (going / "run.toml")
        .read_text()
        .replace(
            "steps = 200\n",
            "steps = 200\nglobal_batch = 8\nramp = [{ sequence_length = 128, until_step = 100 }]\n",
        )
    )
    model = "[model]\nnum_layers = 1\nhidden_size = 8\nnum_attention_heads = 1\nmax_sequence_length = 512\n"
    data = '[data]\ntrain = "a"\ntokenizer = "b"\nsequence_length = 512\n[optimizer]\nlr = 1e-3\n'
    (going / "run.toml").write_text(config + model + data)
    assert f"60/200 steps, 30.0%, {duration(40 + 4 * 100)} left" in shown(LiveView(going))


def test_the_next_frame_has_what_was_added(going):
    view = LiveView(going)
    shown(view)
    with (going / "metrics.jsonl").open("a") as file:
        file.write(
            "\n"
            + json.dumps(step_line(61, loss=float("nan")))
            + "\n"
            + json.dumps(step_line(62, loss=7.5))
            + "\n"
        )
    text = shown(view)
    assert "62/200 steps" in text and "7.5000" in text


@pytest.mark.parametrize(
    ("marker", "said"),
    [("COMPLETE", "complete: step 60"), ("RESUME", "stopped, can go on: s"), ("FAILED", "failed: step 60")],
)
def test_how_a_run_ended_is_said(tmp_path, marker, said):
    run = write_run(tmp_path / "run", [step_line(60)], config="[train]\nsteps = 60\n")
    (run / marker).write_text("step 60: why\n")
    view = LiveView(run)
    text = shown(view)
    assert said in text and view.is_complete == (marker == "COMPLETE")
    assert "60/60 steps, 100.0%" in text and "left" not in text


def test_a_run_has_the_same_figures_here_and_on_its_page(tmp_path):
    """What came after the last line (an evaluation, a save) is in the ledger alone."""
    run = made_run(tmp_path / "run", 600)
    page, text = tiles(write_report([run]).read_text()), shown(LiveView(run))
    energy, grams, cost = (
        page[name] for name in ("metered energy, kWh", "g CO2e with PUE 1.2", "cost, EUR, with PUE 1.2")
    )
    per_token = page["metered joules per token"]
    assert f"{energy} kWh metered, {per_token} J/token; with PUE 1.2 {grams} g CO2e, cost {cost} EUR" in text
    assert f"goodput {page['goodput']}" in text and page["goodput"] == "79.2%"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-4])
    assert last["kind"] == "step" and f"{last['joules'] / 3.6e6:.4g}" != energy, "the line has other figures"


def test_a_killed_run_is_not_going(tmp_path):
    run = write_run(tmp_path / "run", [step_line(1)])
    ended = subprocess.Popen(["true"])
    ended.wait()
    lock = RunLock(run)
    lock.close()
    held = json.loads((run / "lock").read_text())
    (run / "lock").write_text(json.dumps({**held, "pid": ended.pid}))
    assert "not going: no process holds it and it left no mark" in shown(LiveView(run))


def test_a_run_that_has_not_logged_yet(tmp_path):
    (tmp_path / "run.toml").write_text("[train]\nsteps = 10\n")
    text = shown(LiveView(tmp_path))
    assert "0/10 steps, 0.0%, n/a left" in text and "loss      n/a" in text
    assert "step 0 of n/a" in shown(
        LiveView(write_run(tmp_path / "other", [], config="[train]\nsteps = true\n"))
    )


def test_a_run_that_was_refused_says_why(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / "FAILED").write_text("step 0: there is no GPU; leave it out\n")
    text = shown(LiveView(tmp_path))
    assert "failed: step 0: there is no GPU; leave it out" in text and "n/a" not in text.partition("Not all")[0]


def test_what_would_steer_a_terminal_is_taken_out(tmp_path):
    evil = "\x1b]0;owned\x07[bold]\u202e"
    events = [{"event": evil, "step": 1, "message": evil, "time": evil * 4}]
    run = write_run(tmp_path / "run", [step_line(1, phase_s={evil: 1.0})], events=events)
    (run / "FAILED").write_text(evil)
    text = shown(LiveView(run))
    assert "[bold]" in text and not {"\x1b", "\x07", "\u202e"} & set(text)


def test_a_terminal_without_unicode_gets_ascii(going):
    (going / "events.jsonl").write_text(json.dumps({"event": "grün", "step": 1}) + "\n")
    text = shown(LiveView(going), plain=True)
    lines = [line for line in text.splitlines() if "60/200" not in line]  # rich draws the bar by the encoding
    assert "gr?n" in text and all(line.isascii() for line in lines)


def test_a_time_that_is_none_is_left_out_and_a_cost_is_never_0(tmp_path):
    events = [{"time": "2026-01-01T00:00:0", "step": 3, "event": "save"}]
    run = write_run(tmp_path / "run", [step_line(1, cost=0.0005, time="9" * 90)], events=events)
    text = shown(LiveView(run))
    assert "cost 0.00050" in text and "\n step 3 save" in text


def test_steps_follow_from_tokens(tmp_path):
    config = (
        '[model]\npreset = "gpt2-124m"\n[data]\ntrain = "/d"\ntokenizer = "/t"\nsequence_length = 1024\n'
        "[train]\ntokens = 1_000_000\nglobal_batch = 64\nmicro_batch = 4\n[optimizer]\nlr = 6e-4\n"
    )
    run = write_run(tmp_path / "run", [], config=config)
    assert total_steps(read_records(run)) == 16
    (run / "run.toml").write_text("[train\n")
    assert total_steps(read_records(run)) is None


def test_the_pace_is_that_of_this_attempt():
    lines = [{"step": i, "attempt": 1, "time": f"2026-01-01T00:00:{i:02d}"} for i in range(10)]
    assert seconds_per_step(lines) == 1.0
    assert seconds_per_step([*lines, {"step": 10, "attempt": 2, "time": "2026-02-01", "step_s": 4.0}]) == 4.0
    assert seconds_per_step([]) is None and seconds_per_step([{"step": 1, "time": 5}]) is None


def test_sparks_span_the_values():
    assert sparkline([0, 1, 2, 3], "abcd") == "abcd"
    assert sparkline([5.0, 5.0], "abcd") == "aa" and sparkline([], "abcd") == ""


def test_a_pipe_gets_one_frame(tmp_path, capsys):
    watch(made_run(tmp_path / "run", 200))
    out = capsys.readouterr().out
    assert out.count("200/200 steps") == 1 and "\x1b" not in out


@pytest.mark.faults
def test_a_terminal_is_refreshed_until_ctrl_c(going):
    """The command itself on a terminal of its own: it shows a new line, and Ctrl-C leaves with 0."""
    master, slave = pty.openpty()
    variables = {**environment(), "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
    line = command("watch", str(going), "--every", "0.1")
    process = subprocess.Popen(
        line, stdin=slave, stdout=slave, stderr=slave, env=variables, start_new_session=True
    )
    os.close(slave)
    seen = bytearray()

    def until(words):
        deadline = time.monotonic() + 60
        while words not in seen and time.monotonic() < deadline:
            if select.select([master], [], [], 0.2)[0]:
                seen.extend(os.read(master, 65536))
        assert words in seen, seen[-2000:]

    try:
        until(b"60/200 steps")
        with (going / "metrics.jsonl").open("a") as file:
            file.write("\n" + json.dumps(step_line(99)) + "\n")
        until(b"99/200 steps")
        process.send_signal(signal.SIGINT)
        drained = threading.Thread(target=_drain, args=(master,), daemon=True)
        drained.start()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def _drain(master):
    try:
        while os.read(master, 65536):
            pass
    except OSError:
        return
