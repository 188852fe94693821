"""Ranks that report by a store and connect, as forked processes, with differences planted in one of them."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from basestone.trainer import runtime as processes
from basestone.trainer.errors import BasestoneError
from basestone.trainer.forks import run_ranks
from basestone.trainer.preflight import collectives
from basestone.trainer.preflight.collectives import Collectives
from basestone.trainer.preflight.judge import Report
from basestone.trainer.preflight.limits import PreflightSection
from basestone.trainer.preflight.meeting import Meeting

pytestmark = pytest.mark.dist
LIMITS = PreflightSection(report_s=1.0, collective_s=2.5)


@dataclass(frozen=True)
class Plan:
    """What rank `rank` of a test does differently from the others."""

    run_dir: Path
    rank: int = -1
    problems: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    ahead_s: float = 0.0
    other_dir: Path | None = None
    stays_away: bool = False
    hangs: bool = False


def _report(plan: Plan) -> tuple[int, str]:
    """Be a node of one rank: give the exit code and the message, or what was agreed on."""
    rank, is_other = processes.rank(), processes.rank() == plan.rank
    if is_other and plan.stays_away:
        time.sleep(LIMITS.report_s + 1)
        return 0, "away"
    store = dist.PrefixStore("preflight", processes.open_store())
    ahead_s = plan.ahead_s if is_other else 0.0
    world_size = processes.world_size()
    meeting = Meeting(store, rank, world_size, f"n{rank}", LIMITS, clock=lambda: time.time() + ahead_s)
    if is_other and plan.hangs:
        time.sleep(LIMITS.report_s + 1)
        return 0, "hung"
    report = Report(rank, f"n{rank}", 0, [], {"torch": "2.13.0"})
    run_dir = plan.run_dir
    if is_other:
        report = dataclasses.replace(report, problems=plan.problems, facts={**report.facts, **plan.facts})
        run_dir = plan.other_dir or run_dir
    try:
        agreed = meeting.agree(report, run_dir)
    except BasestoneError as error:
        return error.exit_code, str(error)
    assert agreed.skew_s < 1.0
    return 0, ", ".join(host for _, host in agreed.nodes)


def report(size: int, plan: Plan) -> list[tuple[int, str]]:
    return run_ranks(_report, size, plan, timeout_s=30, num_threads=1)


def refusal(size: int, plan: Plan) -> str:
    """See that every rank is refused with the same words, and give them."""
    (told,) = set(report(size, plan))
    assert told[0] == 64
    return told[1]


def test_ranks_that_are_the_same_agree_and_leave_no_mark(tmp_path):
    assert report(3, Plan(tmp_path)) == [(0, "n0, n1, n2")] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_problem_of_one_rank_is_every_ranks(tmp_path):
    plan = Plan(tmp_path, 2, problems=["GPU 0 is on fire"], facts={"torch": "2.12.0"})
    assert refusal(3, plan) == (
        "preflight: 2 problem(s)\n"
        "  n2: GPU 0 is on fire\n"
        "  torch differs: 2.13.0 on n0, n1; 2.12.0 on n2: install the same everywhere"
    )


@pytest.mark.parametrize("ahead_s", [7.5, -7.5])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_clock_that_is_off_is_named(tmp_path, ahead_s, rank):
    said = refusal(2, Plan(tmp_path, rank, ahead_s=ahead_s))
    word = "ahead of" if (ahead_s > 0) == (rank == 1) else "behind"
    assert f"n1: its clock is 7.5 s {word} n0's: start chrony there" in said


def test_a_clock_within_the_limit_passes(tmp_path):
    assert {code for code, _ in report(2, Plan(tmp_path, 1, ahead_s=0.4))} == {0}


def test_another_run_directory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("basestone.trainer.preflight.meeting.SEEN_S", 0.3)
    said = refusal(3, Plan(tmp_path / "run", 2, other_dir=tmp_path / "elsewhere"))
    assert said.splitlines()[1:] == [
        f"  {tmp_path / 'run'} is another directory on n2: put it on a disk that all nodes share"
    ]


def test_a_rank_that_stays_away_is_named(tmp_path):
    *others, away = report(3, Plan(tmp_path, 2, stays_away=True))
    assert away == (0, "away")
    assert {code for code, _ in others} == {69}, "another start may do without it"
    assert {"rank(s) 2 of 3 did not report within 1 s (n0, n1 did)" in told for _, told in others} == {True}


def test_what_people_must_mend_counts_more_than_a_rank_that_stays_away():
    reports = {0: Report(0, "n0", 0, facts={"torch": "1"}), 1: Report(1, "n1", 0, facts={"torch": "2"})}
    for facts, silent in (("2", False), ("1", True)):
        reports[1] = Report(1, "n1", 0, facts={"torch": facts})
        store = dist.HashStore()
        meeting = Meeting(store, 0, 3, "n0", PreflightSection(report_s=0.2))
        for rank, report in reports.items():
            store.set(f"report/{rank}", report.as_json())
            store.add("report/count", 1)
        assert meeting._judge_reports(Path("/nowhere"))["silent"] == silent


def test_a_rank_that_hangs_in_its_checks_is_named_with_its_host(tmp_path):
    said = report(3, Plan(tmp_path, 1, hangs=True))
    assert said[0][0] == said[2][0] == 69
    assert "n1: rank(s) 1 began and did not end their checks" in said[0][1]


def test_where_rank_0_does_not_answer_the_others_say_so_and_may_be_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr("basestone.trainer.preflight.meeting.MORE_S", 0.0)
    _, (code, told), _ = report(3, Plan(tmp_path, 0, hangs=True))
    assert code == 69
    assert told == "preflight: n1, rank 1: rank 0 did not answer for 1 s; look at its node"


def _sign_of_life(run_dir: Path) -> str:
    rank = processes.rank()
    meeting = Meeting(dist.PrefixStore("preflight", processes.open_store()), rank, 2, f"n{rank}", LIMITS)
    for _ in range(3 * (rank == 1)):  # more than the limit
        time.sleep(LIMITS.report_s * 0.75)
        meeting.sign()
    return str(meeting.agree(Report(rank, f"n{rank}", 0), run_dir).nodes)


def test_a_rank_that_prepares_its_data_is_waited_for(tmp_path):
    assert run_ranks(_sign_of_life, 2, tmp_path, timeout_s=30) == ["[(0, 'n0'), (1, 'n1')]"] * 2


# ---- collectives ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What goes wrong on rank `rank` once messages have `from_bytes`."""

    kind: str = ""
    rank: int = -1
    from_bytes: int = 0


def _reduce(fault: Fault, limits: PreflightSection) -> tuple[int, str]:
    rank, world_size = processes.rank(), processes.world_size()
    store = processes.open_store()
    if rank == fault.rank:
        _plant(fault)
    meeting = Meeting(dist.PrefixStore("preflight", store), rank, world_size, f"n{rank}", limits)
    device = torch.device("cpu")
    group = Collectives(
        dist.PrefixStore("preflight", store), meeting, device, rank, world_size, f"n{rank}", limits
    )
    try:
        rate = group.check([(one, f"n{one}") for one in range(world_size)])
    except BasestoneError as error:
        return error.exit_code, str(error)
    group.close()
    meeting.end()
    assert rate > 0
    runtime = processes.start(store=store)  # the same store serves the run
    return 0, str(runtime.gather_all(rank))


def _plant(fault: Fault) -> None:
    """Spoil the all-reduces of this rank."""
    all_reduce = dist.all_reduce

    def spoilt(tensor, group=None):
        if tensor.nbytes >= fault.from_bytes:
            if fault.kind == "hang":
                time.sleep(600)
            if fault.kind == "wrong":
                tensor[-1] += 1
            if fault.kind == "error":
                raise RuntimeError("the card fell out")
            if fault.kind == "slow":
                time.sleep(0.2)
        all_reduce(tensor, group=group)

    collectives.dist.all_reduce = spoilt


def reduce(size: int, fault: Fault, limits: PreflightSection = LIMITS) -> list[tuple[int, str]]:
    return run_ranks(_reduce, size, fault, limits, timeout_s=60, num_threads=1)


def test_all_reduces_pass_and_leave_the_store_to_the_run():
    assert reduce(3, Fault()) == [(0, "[0, 1, 2]")] * 3


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (
            Fault("hang", 1, 1 << 20),
            "an all-reduce of 1 MiB hung for 2.5 s: small messages pass and large ones hang: look at the MTU along the "
            "path",
        ),
        (Fault("wrong", 1, 16 << 20), "an all-reduce of 16 MiB failed: its sums are wrong"),
        (Fault("error", 1, 0), "n1: an all-reduce of 4 KiB failed: the card fell out"),
    ],
)
def test_what_goes_wrong_is_said_on_every_rank(fault, told):
    (said,) = set(reduce(2, fault))
    assert said[0] == 64 and told in said[1]


def test_a_slow_node_is_named():
    limits = PreflightSection(report_s=1.0, collective_s=10.0, min_all_reduce_gb_per_s=0.2)
    (said,) = set(reduce(3, Fault("slow", 1, 16 << 20), limits))
    assert said[0] == 64
    assert "and min_all_reduce_gb_per_s is 0.2: n1 under half as fast as the others" in said[1]


def test_of_two_slow_nodes_none_is_named():
    limits = PreflightSection(report_s=1.0, collective_s=10.0, min_all_reduce_gb_per_s=0.2)
    (said,) = set(reduce(2, Fault("slow", 1, 16 << 20), limits))
    assert "look at the links and at `interface` in the cluster file, or lower the limit" in said[1]
