"""What is wrong with a launch, judged from the reports of its ranks. Pure functions; imports no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

from ..errors import BasestoneError

MOST_NAMED = 8
EXIT_SILENT = 69  # sysexits.h: unavailable
MTU_HINT = "small messages pass and large ones hang: look at the MTU along the path"
# How differences are mended, by the kind of what differs.
SOURCES, GPUS, RUN = "the sources of basestone", "GPUs", "run file"


class SilentRanks(BasestoneError):
    """Ranks say nothing, and nothing else is wrong: another start may have them, or do without them."""

    exit_code = EXIT_SILENT


@dataclass(frozen=True)
class Report:
    """What one rank found: `problems` of its own, and `facts` that must be the same on all."""

    rank: int
    host: str
    local_rank: int
    problems: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        """Write it down."""
        return json.dumps(asdict(self))

    @staticmethod
    def of_json(text: str | bytes) -> Report:
        """Read what `as_json` wrote."""
        return Report(**json.loads(text))


@dataclass(frozen=True)
class Outcome:
    """How the collectives of one rank went.

    `rates` are the bus bandwidths in bytes/s of the sizes that passed, `failed` what did not, `reason` why: "" where it
    hung.
    """

    host: str
    rates: list[float] = field(default_factory=list)
    failed: str | None = None
    reason: str = ""

    def as_json(self) -> str:
        """Write it down."""
        return json.dumps(asdict(self))

    @staticmethod
    def of_json(text: str | bytes) -> Outcome:
        """Read what `as_json` wrote."""
        return Outcome(**json.loads(text))


def named(hosts: Iterable[str]) -> str:
    """Name hosts, each once, in order; of many the first."""
    names = list(dict.fromkeys(hosts))
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def shown_ranks(ranks: Sequence[int]) -> str:
    """Write ranks as ranges: `1, 4-7`."""
    starts = [rank for before, rank in pairwise([-2, *ranks]) if rank != before + 1]
    ends = [rank for rank, after in pairwise([*ranks, -2]) if after != rank + 1]
    return ", ".join(
        str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True)
    )


def judge(
    reports: Sequence[Report], world_size: int, waited_s: float, begun: Mapping[int, str] | None = None
) -> list[str]:
    """List everything that keeps a launch from training.

    Args:
        reports: of the ranks that reported, in their order.
        world_size: ranks that should have.
        waited_s: seconds without a new report.
        begun: host by rank, of those that began their checks.
    """
    return [
        *silent_problems(reports, world_size, waited_s, begun or {}),
        *_own_problems(reports),
        *_differences(reports),
    ]


def silent_problems(
    reports: Sequence[Report], world_size: int, waited_s: float, begun: Mapping[int, str]
) -> list[str]:
    """Name the ranks that did not report; the arguments are those of `judge`."""
    there = {report.rank for report in reports}
    silent = [rank for rank in range(world_size) if rank not in there and rank not in begun]
    lines = []
    if silent:
        lines.append(
            f"rank(s) {shown_ranks(silent)} of {world_size} did not report within {waited_s:g} s "
            f"({named([report.host for report in reports])} did): look whether their nodes are up and started the "
            "launch, and reach this one"
        )
    for host in dict.fromkeys(host for rank, host in begun.items() if rank not in there):
        ranks = [rank for rank in sorted(begun) if begun[rank] == host and rank not in there]
        lines.append(
            f"{host}: rank(s) {shown_ranks(ranks)} began and did not end their checks within {waited_s:g} s: its "
            "disks, its data or its GPUs do not answer"
        )
    return lines


def _own_problems(reports: Sequence[Report]) -> list[str]:
    hosts: dict[str, list[str]] = {}
    for report in reports:
        for problem in report.problems:
            hosts.setdefault(problem, []).append(report.host)
    return [f"{named(found)}: {problem}" for problem, found in hosts.items()]


def _differences(reports: Sequence[Report]) -> list[str]:
    lines = []
    for name in dict.fromkeys(name for report in reports for name in report.facts):
        hosts: dict[str, list[str]] = {}
        for report in reports:
            if name in report.facts:  # a rank that could not open its run says so, and has no hash of it
                hosts.setdefault(report.facts[name], []).append(report.host)
        if len(hosts) > 1:
            told = "; ".join(f"{value} on {named(found)}" for value, found in hosts.items())
            verb = "differ" if name in (SOURCES, GPUS) else "differs"
            lines.append(f"{name} {verb}: {told}: {_fix(name)}")
    return lines


def _fix(name: str) -> str:
    if name == SOURCES:
        return "install the same everywhere, or start every node from one checkout"
    if name == GPUS:
        return "take nodes of one kind"
    if name.startswith(RUN):
        return "give every node the same file and the same --set"
    return "install the same everywhere"


def clock_problems(offsets_s: Mapping[str, tuple[float, float]], limit_s: float, own_host: str) -> list[str]:
    """List the hosts whose clock is off.

    Args:
        offsets_s: by host, seconds by which its clock is ahead of this one's, and by how much that may be wrong.
        limit_s: seconds that are let pass.
        own_host: whose clock the others are compared with.
    """
    return [
        f"{host}: its clock is {abs(offset_s):.1f} s {'ahead of' if offset_s > 0 else 'behind'} {own_host}'s: start "
        "chrony there"
        for host, (offset_s, doubt_s) in offsets_s.items()
        if abs(offset_s) - doubt_s > limit_s
    ]


def unshared_problems(run_dir: str, blind: Sequence[str]) -> list[str]:
    """Say on which hosts the run directory is another one."""
    if not blind:
        return []
    return [f"{run_dir} is another directory on {named(blind)}: put it on a disk that all nodes share"]


def collective_problems(outcomes: Mapping[int, Outcome], world_size: int, limit_s: float) -> list[str]:
    """Say what went wrong with the collectives: the first thing that did, and where it was seen.

    A rank that has a reason comes before those that wait for it.
    """
    if absent := [rank for rank in range(world_size) if rank not in outcomes]:
        return [
            f"rank(s) {shown_ranks(absent)} did not tell how the collectives went: look whether they are still there"
        ]
    failed = [outcome for outcome in outcomes.values() if outcome.failed is not None]
    if not failed:
        return []
    first = min(len(outcome.rates) for outcome in failed)
    failed = [outcome for outcome in failed if len(outcome.rates) == first]
    what = failed[0].failed
    reasons: dict[str, list[str]] = {}
    for outcome in failed:
        reasons.setdefault(outcome.reason, []).append(outcome.host)
    hung = reasons.pop("", [])
    lines = [f"{named(hosts)}: {what} failed: {reason}" for reason, hosts in reasons.items()]
    if hung and not lines:
        lines.append(f"{named(hung)}: {what} hung for {limit_s:g} s")
    if first:
        return [f"{line}: {MTU_HINT}" for line in lines]
    hint = "open all TCP ports between the nodes, and see that `interface` in the cluster file joins them"
    return [f"{line}: {hint}" for line in lines]


def slow_nodes(rates: Mapping[str, Sequence[float]]) -> list[str]:
    """Name the hosts that are slow with each neighbour: under half of what is usual.

    Args:
        rates: by host, bytes/s with its neighbours.
    """
    best = {host: max(found) for host, found in rates.items() if found}
    if len(best) < 3:
        return []
    usual = statistics.median(best.values())
    return [host for host, rate in best.items() if rate < usual / 2]
