"""Figures of whole runs beside metrics.jsonl: TensorBoard, Weights & Biases, Prometheus; and traces."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import losses_of
from faults import before, kill_self
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_files import offline_runs
from whole_run import killed, train

from basestone.trainer import engine
from basestone.trainer.errors import ConfigError, Stopped
from basestone.trainer.sinks.tensorboard import TensorBoardSink

BEGIN = TensorBoardSink.begin
pytestmark = pytest.mark.dist


def events_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def lines_of(run_dir: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_tensorboard_has_the_figures_by_name(tmp_path, corpus):
    run_dir = tmp_path / "run"
    train(corpus, run_dir, "meter.tensorboard=true", "train.steps=2", "meter.grid=FRA", "meter.price_per_kwh=1")
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    lines = lines_of(run_dir)
    for name in ("loss", "lr", "watts", "joules_per_token", "g_co2e", "cost", "goodput", "host_gib"):
        shown = [(event.step, event.value) for event in board.Scalars(f"train/{name}")]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert board.Scalars("phase/forward")[1].value == pytest.approx(lines[1]["phase_s"]["forward"])
    (heldout,) = lines_of(run_dir, "eval")
    assert board.Scalars("heldout/topics/loss")[0].value == pytest.approx(heldout["loss"])
    assert not {"train/mfu", "train/hfu", "train/reserved_gib"} & set(board.Tags()["scalars"]), "not known"


def board_steps(run_dir: Path, name: str) -> list[int]:
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return [event.step for event in board.Scalars(name)]


def _with_every_step_on_disk(sink: TensorBoardSink, run_id: str, step: int) -> None:
    """Flush after every step: what a kill leaves is then not a matter of time."""
    BEGIN(sink, run_id, step)
    writer, write = sink._writer, sink.evaluation

    def evaluation(record: dict[str, Any]) -> None:
        write(record)
        writer.flush()

    sink.evaluation = evaluation  # type: ignore[method-assign]


def test_tensorboard_has_no_step_twice(tmp_path, corpus):
    """A run that is killed at its sixth step, resumed from the fourth, and goes back from its last to the second."""
    run_dir, options = (
        tmp_path / "run",
        ("meter.tensorboard=true", "evaluate.every_steps=1", "checkpoint.keep_last=9"),
    )

    def prepare(rank: int) -> None:
        if rank == 0:
            before(engine.Engine, "update", kill_self, 6)
            TensorBoardSink.begin = _with_every_step_on_disk  # type: ignore[method-assign]

    assert killed(corpus, run_dir, *options, fault=prepare)
    assert board_steps(run_dir, "train/loss") == [1, 2, 3, 4, 5]
    train(corpus, run_dir, *options)
    for name in ("train/loss", "heldout/topics/loss"):
        assert board_steps(run_dir, name) == list(range(1, 9))
    train(corpus, run_dir, *options, "train.steps=5", resume=run_dir / "checkpoints" / "step_00000002")
    for name in ("train/loss", "heldout/topics/loss"):
        assert board_steps(run_dir, name) == list(range(1, 6))


def _stop_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_wandb_goes_on_in_the_same_run(tmp_path, corpus, reference, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "run"

    def prepare(rank: int) -> None:
        if rank == 0:
            before(engine.Engine, "update", _stop_self, 5)

    with pytest.raises(Stopped):
        train(corpus, run_dir, "meter.wandb_project=small", fault=prepare)
    train(corpus, run_dir, "meter.wandb_project=small")
    assert losses_of(run_dir) == reference
    run_id = (run_dir / "run_id").read_text().strip()
    first, second = sorted(offline_runs(run_dir), key=lambda run: run.history[0]["_step"])
    assert (first.run_id, second.run_id) == (run_id, run_id)
    assert (first.project, first.resumes, first.exit_code, second.exit_code) == ("small", True, 1, 0)
    assert first.config["optimizer"]["lr"] == 3e-3 and first.config["meter"]["wandb_project"] == "small"
    rows, lines = [*first.history, *second.history], lines_of(run_dir)
    assert [row["_step"] for row in rows] == [line["step"] for line in lines]
    for row, line in zip(rows, lines, strict=True):
        assert row["train/loss"] == line["loss"] and row["phase/forward"] == line["phase_s"]["forward"]
    assert rows[-1]["heldout/topics/loss"] == lines_of(run_dir, "eval")[-1]["loss"]


def test_a_killed_run_leaves_no_process_of_wandb(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "run"

    def prepare(rank: int) -> None:
        if rank == 0:
            before(engine.Engine, "update", note_helpers_and_die, 3)

    def note_helpers_and_die() -> None:
        (tmp_path / "helpers").write_text(" ".join(str(one.pid) for one in psutil.Process().children()))
        kill_self()

    assert killed(corpus, run_dir, "meter.wandb_project=small", fault=prepare)
    helpers = [int(word) for word in (tmp_path / "helpers").read_text().split()]
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, helpers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert helpers and not any(map(psutil.pid_exists, helpers))


def _scraping_at(port: int, page: Path) -> None:
    """Fetch the page in rank 0 before its sixth update, through a real connection."""

    def fetch(*_: object) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/metrics")
        page.write_text(connection.getresponse().read().decode())
        connection.close()

    before(engine.Engine, "update", fetch, 6)


def test_prometheus_is_there_while_a_run_is(tmp_path, corpus):
    run_dir, page, port = tmp_path / "run", tmp_path / "page", free_port()

    def prepare(rank: int) -> None:
        if rank == 0:
            _scraping_at(port, page)

    train(corpus, run_dir, f"meter.prometheus_port={port}", "evaluate.every_steps=4", fault=prepare)
    values = {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page.read_text())
        for sample in family.samples
    }
    line, host = lines_of(run_dir)[4], socket.gethostname()
    assert values["basestone_step",] == 5
    assert values["basestone_loss",] == line["loss"]
    assert values["basestone_tokens_total",] == line["tokens"]
    assert values["basestone_phase_duration_seconds", "forward"] == line["phase_s"]["forward"]
    assert values["basestone_device_energy_joules_total", "user-watts", host, "user-watts"] == line["joules"]
    assert values["basestone_heldout_loss", "topics"] == lines_of(run_dir, "eval")[0]["loss"]
    assert ("basestone_run_info", (run_dir / "run_id").read_text().strip()) in values
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_port_that_is_taken_is_refused_before_training(tmp_path, corpus):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"prometheus_port = {port}: cannot listen on 127.0.0.1: Address al"
        ):
            train(corpus, tmp_path / "run", f"meter.prometheus_port={port}")
    assert f"prometheus_port = {port}: cannot listen" in (tmp_path / "run" / "FAILED").read_text()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def _fail(*_: object) -> None:
    raise OSError(28, "No space left on device", "events.tfevents")


@pytest.mark.faults
def test_a_sink_that_fails_costs_an_event_and_not_the_run(tmp_path, corpus, reference):
    run_dir = tmp_path / "run"

    def prepare(rank: int) -> None:
        before(TensorBoardSink, "step", _fail, 3)

    train(corpus, run_dir, "meter.tensorboard=true", fault=prepare)
    assert losses_of(run_dir) == reference
    (event,) = [event for event in events_of(run_dir) if event["event"] == "sink_failed"]
    assert event["step"] == 3 and event["message"].startswith(
        "TensorBoard failed and gets nothing more: storage"
    )


def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, corpus, reference):
    run_dir = tmp_path / "run"
    train(corpus, run_dir, "profile.first_step=3", "profile.num_steps=2", "profile.ranks=[0, 1]")
    assert losses_of(run_dir) == reference
    told = {event["message"] for event in events_of(run_dir) if event["event"] == "trace"}
    paths = [run_dir / "traces" / f"rank_{rank}_step_3.json.gz" for rank in (0, 1)]
    assert told == {f"rank {rank}: steps 3 to 4: {path}" for rank, path in enumerate(paths)}
    assert sorted(os.listdir(run_dir / "traces")) == [path.name for path in paths], "and nothing unfinished"
    for path in paths:
        names = [event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
        assert sorted(name for name in names if name.startswith("optimizer step")) == [
            "optimizer step 3",
            "optimizer step 4",
        ]
        assert {"aten::mm", "LinearWithGradAccumulationAndAsyncCommunication"} <= set(names)
        assert any("allreduce" in name for name in names), "of the tensor-parallel ranks"


def test_a_run_that_ends_early_leaves_the_trace_so_far(tmp_path, corpus):
    run_dir = tmp_path / "run"
    train(corpus, run_dir, "profile.first_step=7", "profile.num_steps=100")
    (told,) = [event["message"] for event in events_of(run_dir) if event["event"] == "trace"]
    assert told == f"rank 0: steps 7 to 8: {run_dir / 'traces' / 'rank_0_step_7.json.gz'}"
