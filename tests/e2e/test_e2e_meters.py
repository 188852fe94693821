"""What whole runs cost: phases that add up to the steps, joules over restarts, money, and budgets that end a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import losses_of
from fake_nvml import FakeNvml, install
from faults import before, kill_self
from whole_run import killed, train

from basestone.trainer import accounts, engine
from basestone.trainer.errors import ConfigError, Stopped
from basestone.trainer.meters import energy, meters

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def unmetered(tmp_path_factory, corpus) -> Path:
    """The corpus with a run file that gives no watts."""
    folder = tmp_path_factory.mktemp("unmetered") / "corpus"
    shutil.copytree(corpus, folder)
    text = (corpus / "run.toml").read_text()
    assert "watts = 100\n" in text
    (folder / "run.toml").write_text(text.replace("watts = 100\n", ""))
    return folder


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "step"]


def ledger_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "ledger.json").read_text())


@pytest.mark.parametrize(
    ("changes", "phases"),
    [
        (("parallel.zero=1",), {"data", "forward", "backward", "checkpoint", "optimizer"}),
        (
            ("parallel.zero=0", "train.dtype=fp32"),
            {"data", "forward", "backward", "gradient_sync", "checkpoint", "optimizer"},
        ),
        (
            ("parallel.zero=1", "parallel.pipeline=2", "parallel.tensor=1"),
            {"data", "forward", "backward", "bubble", "gradient_sync", "checkpoint", "optimizer"},
        ),
    ],
    ids=["zero1", "zero0", "pipeline"],
)
def test_phases_add_up_to_the_steps(tmp_path, corpus, changes, phases):
    train(corpus, tmp_path / "run", *changes, "data.heldout={}")
    lines = lines_of(tmp_path / "run")
    for line in lines[1:]:
        in_steps = {name: s for name, s in line["phase_s"].items() if name not in ("checkpoint", "evaluate")}
        assert set(line["phase_s"]) == phases
        assert all(seconds > 0 for seconds in line["phase_s"].values())
        assert sum(in_steps.values()) <= line["step_s"] * 1.001  # timers of one clock; the rest is between them
    whole = [sum(line["phase_s"].values()) / line["step_s"] for line in lines[2:]]
    assert max(whole) > 0.5, "most of a step is in a phase"


@pytest.mark.parametrize(
    ("dtype", "multiplies", "told"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_a_cpu_without_instructions_for_bf16_is_told_of(
    tmp_path, corpus, capfd, monkeypatch, dtype, multiplies, told
):
    monkeypatch.setattr(meters, "_multiplies_bf16", lambda: multiplies)
    train(
        corpus, tmp_path / "run", f"train.dtype={dtype}", "train.steps=1", "parallel.zero=1", "data.heldout={}"
    )
    said = capfd.readouterr().err
    assert "FLOPs: " in said
    assert ("this CPU multiplies bf16 many times slower than fp32; set train.dtype = 'fp32'" in said) == told


def test_joules_hours_and_money_add_up_over_a_kill(tmp_path, corpus):
    run_dir = tmp_path / "run"
    prices = ("meter.price_per_kwh=0.36", "meter.grid=FRA", "meter.pue=1.5")

    def prepare(rank: int) -> None:
        if rank == 0:
            before(engine.Engine, "update", kill_self, 6)

    assert killed(corpus, run_dir, *prices, fault=prepare)
    first = ledger_of(run_dir)
    assert first["wasted_tokens"] == 0 and first["joules_source"] == "user-watts"
    train(corpus, run_dir, *prices)
    lines, last = lines_of(run_dir), ledger_of(run_dir)
    assert last["attempts"] == 2
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    (resumed,) = [event["step"] for event in events if event["event"] == "resume"]
    assert last["wasted_tokens"] == lines[4]["tokens"] - lines[resumed - 1]["tokens"] > 0
    assert 0 < last["wasted_joules"] < first["joules"] < last["joules"]
    assert 0 < last["wasted_s"] < first["train_s"] < last["train_s"] < last["wall_s"]
    assert last["joules"] == pytest.approx(sum(last["joules_by_device"].values()))
    assert all(name.endswith("/user-watts") for name in last["joules_by_device"])
    assert (last["hosts"], last["all_hosts"], last["gpu_s"]) == (1, 1, 0.0)
    line = lines[-1]
    kwh = 1.5 * line["joules"] / 3.6e6
    assert line["cost"] == pytest.approx(0.36 * kwh)
    assert line["g_co2e"] == pytest.approx(56.0 * kwh)
    assert 0 < line["goodput"] < 1
    assert line["watts"] == pytest.approx(100, rel=0.4)
    assert line["mfu"] is line["hfu"] is line["reserved_gib"] is None, "not known on a CPU, and not 0"


def test_given_watts_count_from_the_start_and_no_rate_has_the_beginning_in_it(tmp_path, corpus):
    train(corpus, tmp_path / "run", "meter.idle_s=1")
    ledger = ledger_of(tmp_path / "run")
    assert ledger["joules"] == pytest.approx(100 * ledger["wall_s"], rel=0.02)
    assert ledger["metered_tokens"] == ledger["tokens"]
    for line in lines_of(tmp_path / "run"):
        assert line["watts"] == pytest.approx(100, rel=0.05)


def test_a_stop_wastes_nothing(tmp_path, corpus, reference):
    def prepare(rank: int) -> None:
        if rank == 0:
            before(engine.Engine, "update", lambda: os.kill(os.getpid(), signal.SIGTERM), 5)

    with pytest.raises(Stopped):
        train(corpus, tmp_path / "run", "evaluate.every_steps=1", fault=prepare)
    stopped = ledger_of(tmp_path / "run")
    train(corpus, tmp_path / "run", "evaluate.every_steps=1")
    ledger = ledger_of(tmp_path / "run")
    assert ledger["joules"] > stopped["joules"] > 0
    assert ledger["wasted_joules"] == ledger["wasted_s"] == ledger["wasted_tokens"] == 0
    assert losses_of(tmp_path / "run") == reference


def test_attempts_that_metered_nothing_do_not_make_the_others_cheaper(tmp_path, unmetered):
    run_dir = tmp_path / "run"
    for steps, changes in ((2, ()), (4, ("meter.watts=100",)), (6, ())):
        train(unmetered, run_dir, f"train.steps={steps}", *changes)
    ledger = ledger_of(run_dir)
    assert ledger["joules_source"] == "user-watts" and ledger["joules"] > 0
    assert ledger["metered_tokens"] == ledger["tokens"] // 3 > 0


def test_the_books_are_kept_between_lines(tmp_path, corpus, monkeypatch):
    """Lines are rare here, a kill comes before the second, and a budget before the third."""
    monkeypatch.setattr(accounts, "BOOK_EVERY_S", 0.0)  # the ranks are forked from here
    rare = ("meter.log_every_steps=1000", "checkpoint.every_steps=0")

    def prepare(rank: int) -> None:
        if rank == 0:
            before(engine.Engine, "update", kill_self, 6)

    assert killed(corpus, tmp_path / "killed", *rare, fault=prepare)
    first, ledger = lines_of(tmp_path / "killed"), ledger_of(tmp_path / "killed")
    assert [line["step"] for line in first] == [1]
    assert ledger["tokens"] >= 4 * first[0]["tokens"] and ledger["joules"] > first[0]["joules"]
    with pytest.raises(Stopped, match=r"stopped after step [2-7], saved: budget\.hours"):
        train(corpus, tmp_path / "run", *rare, f"budget.hours={(ledger['wall_s'] * 0.6) / 3600}")
    train(corpus, tmp_path / "whole", *rare)
    whole, line = ledger_of(tmp_path / "whole"), lines_of(tmp_path / "whole")[-1]
    assert whole["tokens"] == line["tokens"] and whole["train_s"] < whole["wall_s"]
    assert line["step_s"] * 7 < whole["train_s"], (
        "seconds of steps are booked once, and the line has all since the first"
    )
    assert line["watts"] == pytest.approx(100, rel=0.05)


def test_a_budget_that_the_last_step_reaches_lets_the_run_be_complete(tmp_path, corpus):
    train(corpus, tmp_path / "run", "train.steps=2", "budget.hours=1e-6")
    assert (tmp_path / "run" / "COMPLETE").exists()


def test_what_is_not_known_is_null(tmp_path, unmetered):
    train(unmetered, tmp_path / "run", "train.steps=2", "meter.peak_tflops=0.5", "train.recompute=true")
    line = lines_of(tmp_path / "run")[-1]
    for name in ("joules", "watts", "joules_per_token", "g_co2e", "cost"):
        assert line[name] is None
    assert line["mfu"] < line["hfu"] < 4 / 3 * line["mfu"]


def test_the_first_pass_over_pairs_is_work_of_the_hardware(tmp_path, unmetered):
    """A forward more where a rank has several micro-batches: a third of forward and backward."""
    words = ["train.steps=2", "meter.peak_tflops=0.5", "model.pooling=mean", "task.pairs=neighbours"]
    for name, micro_batch, more in (("whole", 8, 0), ("parts", 4, 1 / 3)):
        train(unmetered, tmp_path / name, *words, f"train.micro_batch={micro_batch}", "parallel.tensor=2")
        line = lines_of(tmp_path / name)[-1]
        assert line["hfu"] == pytest.approx((1 + more) * line["mfu"], rel=1e-9)


def test_a_budget_ends_a_run_and_a_larger_one_goes_on(tmp_path, corpus, reference):
    run_dir, few = tmp_path / "run", 1e-6  # kWh: 3.6 J, which no step can do without
    with pytest.raises(
        Stopped, match=r"stopped after step \d, saved: budget\.kwh = 1e-06 is used up: .* raise it"
    ):
        train(corpus, run_dir, f"budget.kwh={few}")
    assert (run_dir / "RESUME").exists()
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert any(event["event"] == "budget" and event["step"] < 8 for event in events)
    with pytest.raises(ConfigError, match=r"budget\.kwh = 1e-06 is used up: .*raise it to go on"):
        train(corpus, run_dir, f"budget.kwh={few}")
    assert (run_dir / "RESUME").exists(), "still where it stopped"
    train(corpus, run_dir, "budget.kwh=1")
    assert losses_of(run_dir) == reference


def test_a_budget_that_nothing_measures_is_refused(tmp_path, unmetered):
    with pytest.raises(ConfigError, match=r"\[budget\] needs joules, and nothing here reads any"):
        train(unmetered, tmp_path / "run", "budget.kwh=1")
    with pytest.raises(ConfigError, match=r"budget\.cost = 1: there is no GPU whose hours would cost anything"):
        train(unmetered, tmp_path / "run", "budget.cost=1", "meter.price_per_gpu_hour=2")


def test_the_idle_draw_is_measured_before_the_first_step(tmp_path, corpus):
    train(corpus, tmp_path / "run", "train.steps=1", "meter.idle_s=0.5")
    assert ledger_of(tmp_path / "run")["idle_w"] == pytest.approx(100, rel=0.05)


def _gpus_of(*names: str, **errors: int) -> Callable[[int], None]:
    """Give rank i the GPU of the i-th name, under a driver whose counters are those of the machine's clock."""

    def prepare(rank: int) -> None:
        library = FakeNvml(time.monotonic, [300.0, 400.0])
        install(library)
        meters.visible_gpus = lambda: [names[rank]]
        if errors:
            library.errors.update(
                {(name.replace("_", " "), device): code for name, code in errors.items() for device in (0, 1)}
            )

    return prepare


@pytest.mark.parametrize(
    ("names", "watts", "num_gpus"),
    [(("GPU-0", "GPU-1"), 700, 2), (("GPU-1", "GPU-1"), 400, 1)],
    ids=["two", "shared"],
)
def test_every_gpu_of_two_ranks_counts_once(tmp_path, corpus, names, watts, num_gpus):
    run_dir = tmp_path / "run"
    train(corpus, run_dir, "meter.price_per_gpu_hour=3.6", fault=_gpus_of(*names))
    lines, ledger = lines_of(run_dir), ledger_of(run_dir)
    assert ledger["joules_source"] == "nvml-counter" and len(ledger["joules_by_device"]) == num_gpus
    assert ledger["gpu_s"] == pytest.approx(num_gpus * ledger["wall_s"])
    for line in lines[1:]:
        assert line["watts"] == pytest.approx(watts, rel=0.4)
        assert line["power_limit_w"] == 700.0
    assert lines[-1]["cost"] == pytest.approx(0.001 * num_gpus * ledger["wall_s"], rel=0.5)


def test_a_gpu_that_two_containers_of_a_host_see_counts_once(tmp_path, corpus):
    def prepare(rank: int) -> None:
        _gpus_of("GPU-1", "GPU-1")(rank)
        name = f"container{rank}"
        energy.socket = meters.socket = SimpleNamespace(gethostname=lambda: name)

    train(corpus, tmp_path / "run", fault=prepare)
    ledger = ledger_of(tmp_path / "run")
    assert list(ledger["joules_by_device"]) == ["container0/GPU-1"]
    assert ledger["gpu_s"] == pytest.approx(ledger["wall_s"])


def test_a_power_limit_is_set_at_its_step_and_given_back(tmp_path, corpus):
    run_dir = tmp_path / "run"
    limits = ("meter.power_limit_w=450", "meter.power_limit_from_step=4")
    train(corpus, run_dir, *limits, fault=_gpus_of("GPU-0", "GPU-1"))
    seen = {line["step"]: line["power_limit_w"] for line in lines_of(run_dir)}
    assert seen[4] == 700.0 and seen[5] == seen[8] == 450.0
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    ((step, message),) = [(event["step"], event["message"]) for event in events if event["event"] == "power"]
    assert step == 4 and message.startswith("power limit 450 W, was 700 W")


def test_a_power_limit_that_one_rank_may_not_set_is_refused_by_all(tmp_path, corpus):
    with pytest.raises(ConfigError, match=r"power_limit_w = 450: Insufficient Permissions; run as root"):
        train(
            corpus, tmp_path / "run", "meter.power_limit_w=450", fault=_gpus_of("GPU-0", "GPU-1", set_limit=4)
        )
    with pytest.raises(ConfigError, match=r"power_limit_w = 450: there is no GPU; leave it out"):
        train(corpus, tmp_path / "other", "meter.power_limit_w=450")
