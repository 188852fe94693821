"""What is wrong with a launch, from the reports of its ranks: a table of cases, and invariants."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basestone.trainer.preflight.judge import (
    GPUS,
    SOURCES,
    Outcome,
    Report,
    clock_problems,
    collective_problems,
    judge,
    named,
    shown_ranks,
    slow_nodes,
    unshared_problems,
)

FACTS = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "megatron-core": "0.16.1",
    "CUDA": "13.0",
    "NCCL": "2.28.9",
    "driver": "580.1",
    GPUS: "8 x H100",
    SOURCES: "0123456789ab",
    "run file [train]": "ba9876543210",
}


def two_nodes() -> list[Report]:
    return [Report(rank, f"n{rank // 2}", rank % 2, [], FACTS) for rank in range(4)]


def with_fact(name: str, value: str) -> list[str]:
    """The verdict where node n1 has another value."""
    reports = [
        dataclasses.replace(report, facts={**FACTS, name: value}) if report.host == "n1" else report
        for report in two_nodes()
    ]
    return judge(reports, 4, 30)


def test_nodes_that_are_the_same_have_no_problem():
    assert judge(two_nodes(), 4, 30) == []


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("torch", "2.12.0", "torch differs: 2.13.0 on n0; 2.12.0 on n1: install the same everywhere"),
        ("driver", "570.9", "driver differs: 580.1 on n0; 570.9 on n1: install the same everywhere"),
        (GPUS, "none", "GPUs differ: 8 x H100 on n0; none on n1: take nodes of one kind"),
        (
            SOURCES,
            "ffff",
            "the sources of basestone differ: 0123456789ab on n0; ffff on n1: install the same everywhere, or start "
            "every node from one checkout",
        ),
        (
            "run file [train]",
            "0000",
            "run file [train] differs: ba9876543210 on n0; 0000 on n1: give every node the same file and the same "
            "--set",
        ),
    ],
)
def test_a_difference_names_values_nodes_and_the_fix(name, value, told):
    assert with_fact(name, value) == [told]


def test_silent_ranks_are_told_from_those_that_hang_in_their_checks():
    (told,) = judge(two_nodes()[:2], 4, 30)
    assert told == (
        "rank(s) 2-3 of 4 did not report within 30 s (n0 did): look whether their nodes are up and started the launch, "
        "and reach this one"
    )
    (told,) = judge(two_nodes()[:2], 4, 30, {0: "n0", 1: "n0", 2: "n1", 3: "n1"})
    assert told == (
        "n1: rank(s) 2-3 began and did not end their checks within 30 s: its disks, its data or its GPUs do not answer"
    )
    both = judge(two_nodes()[:2], 4, 30, {3: "n1"})
    assert [line.split(" ", 2)[:2] for line in both] == [["rank(s)", "2"], ["n1:", "rank(s)"]]


def test_a_problem_of_many_nodes_is_told_once():
    reports = [Report(rank, f"n{rank}", 0, ["ulimit -n is 5"] if rank else [], FACTS) for rank in range(20)]
    (told,) = judge(reports, 20, 30)
    assert told == "n1, n2, n3, n4, n5, n6, n7, n8 and 11 more: ulimit -n is 5"


def test_all_problems_come_together():
    reports = [Report(0, "n0", 0, ["a", "b"], FACTS), Report(1, "n1", 0, ["c"], {**FACTS, "torch": "2"})]
    assert [line.split(":")[0] for line in judge(reports, 3, 30)] == [
        "rank(s) 2 of 3 did not report within 30 s (n0, n1 did)",
        *("n0", "n0", "n1"),
        "torch differs",
    ]


def test_a_rank_that_could_not_open_its_run_differs_in_nothing_by_that():
    reports = two_nodes()
    facts = {name: value for name, value in FACTS.items() if not name.startswith("run file")}
    reports[3] = Report(3, "n1", 1, ["run.toml: there is no such run file"], facts)
    assert judge(reports, 4, 30) == ["n1: run.toml: there is no such run file"]


@given(st.sets(st.integers(0, 60)))
def test_ranges_of_ranks_say_just_these_ranks(ranks):
    said = shown_ranks(sorted(ranks))
    back = set()
    for part in filter(None, said.split(", ")):
        first, _, last = part.partition("-")
        back |= set(range(int(first), int(last or first) + 1))
    assert back == ranks


def test_hosts_are_named_once():
    assert named(["n0", "n1", "n0"]) == "n0, n1"


def test_a_report_survives_the_store():
    report = Report(3, "n1", 1, ["ein Umlaut: ä"], FACTS)
    assert Report.of_json(report.as_json()) == report
    outcome = Outcome("n1", [1.5, 2.5], "an all-reduce of 1 MiB", "x")
    assert Outcome.of_json(outcome.as_json()) == outcome


# ---- clocks and directories -------------------------------------------------------------------------------------


def test_a_clock_is_off_only_beyond_doubt():
    offsets = {"n1": (7.5, 0.001), "n2": (-3.25, 0.001), "n3": (1.5, 0.6), "n4": (0.9, 0.0)}
    assert clock_problems(offsets, 1.0, "n0") == [
        "n1: its clock is 7.5 s ahead of n0's: start chrony there",
        "n2: its clock is 3.2 s behind n0's: start chrony there",
    ]


def test_a_directory_that_is_not_shared_is_told():
    assert unshared_problems("/runs/a", []) == []
    assert unshared_problems("/runs/a", ["n1", "n2"]) == [
        "/runs/a is another directory on n1, n2: put it on a disk that all nodes share"
    ]


# ---- collectives ------------------------------------------------------------------------------------------------


def test_sizes_that_pass_on_all_ranks_are_no_problem():
    assert collective_problems({0: Outcome("n0", [1.0]), 1: Outcome("n1", [1.0])}, 2, 20) == []


def test_small_messages_that_pass_and_large_ones_that_hang_point_at_the_mtu():
    said = {rank: Outcome(f"n{rank}", [1.0], "an all-reduce of 1 MiB") for rank in range(2)}
    assert collective_problems(said, 2, 20) == [
        "n0, n1: an all-reduce of 1 MiB hung for 20 s: small messages pass and large ones hang: look at the MTU along "
        "the path"
    ]


def test_a_rank_with_a_reason_comes_before_those_that_wait_for_it():
    said = {rank: Outcome(f"n{rank}", [], "connecting the ranks") for rank in range(3)}
    said[1] = Outcome("n1", [], "connecting the ranks", "Connection refused")
    (told,) = collective_problems(said, 3, 20)
    assert told.startswith("n1: connecting the ranks failed: Connection refused: open all TCP ports")


def test_the_first_size_that_failed_counts():
    said = {
        0: Outcome("n0", [1.0, 1.0], "an all-reduce of 16 MiB"),
        1: Outcome("n1", [1.0], "an all-reduce of 1 MiB", "its sums are wrong"),
    }
    (told,) = collective_problems(said, 2, 20)
    assert told.startswith("n1: an all-reduce of 1 MiB failed: its sums are wrong")


def test_ranks_that_fell_silent_are_named():
    assert collective_problems({0: Outcome("n0")}, 3, 20) == [
        "rank(s) 1-2 did not tell how the collectives went: look whether they are still there"
    ]


def test_the_slow_node_is_the_one_that_is_slow_with_both_neighbours():
    assert slow_nodes({"n0": [10.0, 0.5], "n1": [0.5, 0.4], "n2": [10.0, 0.4]}) == ["n1"]
    assert slow_nodes({"n0": [1.0, 1.2], "n1": [1.0, 0.9], "n2": [1.2, 0.9]}) == [], "slow all over"
    assert slow_nodes({"n0": [10.0], "n1": [0.1]}) == [], "of two nodes nobody knows which"
