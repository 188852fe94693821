"""Ranks report to rank 0 by the store alone, before any of them connects to another.

So a rank that would only be waited for can say what is wrong with it, and one that says nothing can be named.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ..errors import ConfigError
from .judge import Report, SilentRanks, clock_problems, judge, silent_problems, unshared_problems
from .limits import PreflightSection

POLL_S = 0.02
SEEN_S = 5.0  # in which a new file must be seen by other nodes
READ_S = 5.0  # that rank 0 keeps the store open, for a verdict to be read
MORE_S = 20.0  # that the others wait for a verdict beyond what rank 0 waits for them
NUM_ROUNDS = 3  # of comparing two clocks
BEGUN, REPORT = "begun", "report"


@dataclass(frozen=True)
class Agreement:
    """What all ranks know once none has a problem.

    `nodes` are rank and host of one rank of each node, `skew_s` is the largest difference of two nodes' clocks.
    """

    nodes: list[tuple[int, str]]
    skew_s: float


class Meeting:
    """The ranks of one start, over a store that none of its earlier starts has used."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        host: str,
        limits: PreflightSection,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Tell the others that this rank is there."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._host, self._limits, self._clock = host, limits, clock
        self._store.set(f"{BEGUN}/{rank}", host)
        self.sign()

    def sign(self) -> None:
        """Give a sign of life: whoever waits for this rank goes on waiting."""
        self._store.add("signs", 1)

    def agree(self, report: Report, run_dir: Path) -> Agreement:
        """Give this rank's report and take the verdict on all of them.

        Raises:
            ConfigError: the same on every rank, with all that is wrong.
            SilentRanks: nothing is wrong but that ranks say nothing.
        """
        self._give(REPORT, report.as_json())
        if self._rank == 0:
            verdict = self._judge_reports(run_dir)
            self._publish(REPORT, verdict["problems"], verdict)
        else:
            verdict = self._answer(run_dir) if report.local_rank == 0 else self._verdict(REPORT)
        _refuse(verdict)
        return Agreement([(rank, host) for rank, host in verdict["nodes"]], verdict["skew_s"])

    def conclude(self, topic: str, own: str, judge: Callable[[Mapping[int, str]], list[str]]) -> None:
        """Give what this rank has to say to a topic and take rank 0's verdict, made by `judge` from all of it.

        Raises:
            ConfigError: the same on every rank, with all that is wrong.
            SilentRanks: nothing is wrong but that ranks say nothing.
        """
        self._give(topic, own)
        if self._rank == 0:
            said = self._collect(topic)
            verdict: dict = {"problems": judge(said), "silent": len(said) < self._world_size}
            self._publish(topic, verdict["problems"], verdict)
        else:
            verdict = self._verdict(topic)
        _refuse(verdict)

    def choose(self, topic: str, value: bool) -> bool:
        """Give every rank what rank 0 chose."""
        if self._rank == 0:
            self._publish(topic, [], {"chosen": value})
            return value
        return bool(self._verdict(topic)["chosen"])

    def end(self) -> None:
        """Let rank 0, whose store it is, wait until nobody has a question left."""
        self._store.add("ended", 1)
        if self._rank == 0:
            self._wait_count("ended", self._world_size)

    # ---- every rank -----------------------------------------------------------------------------------------

    def _give(self, topic: str, text: str) -> None:
        self._store.set(f"{topic}/{self._rank}", text)
        self._store.add(f"{topic}/count", 1)
        self.sign()

    def _verdict(self, topic: str) -> dict:
        self._wait_for(f"{topic}/verdict")
        verdict: dict = json.loads(self._store.get(f"{topic}/verdict"))
        self._store.add(f"{topic}/read", 1)
        return verdict

    def _wait_for(self, *keys: str) -> None:
        """Wait for one of the keys, as long as ranks give signs of life."""
        limit_s = self._limits.report_s + MORE_S
        signs, since_s = 0, time.monotonic()
        while not any(self._store.check([key]) for key in keys):
            if (now := self._store.add("signs", 0)) != signs:
                signs, since_s = now, time.monotonic()
            if time.monotonic() - since_s > limit_s:
                raise SilentRanks(
                    f"preflight: {self._host}, rank {self._rank}: rank 0 did not answer for {limit_s:g} s; look at its "
                    "node"
                )
            time.sleep(POLL_S)

    def _answer(self, run_dir: Path) -> dict:
        """Say what rank 0 asks of one rank of each node, then take the verdict."""
        self._wait_for("ask", f"{REPORT}/verdict")
        if self._store.check(["ask"]):
            mark = self._store.get("ask").decode()
            for number in range(NUM_ROUNDS):
                self._store.wait([f"clock/{self._rank}/{number}"], timedelta(seconds=self._limits.report_s))
                self._store.set(f"time/{self._rank}/{number}", repr(self._clock()))
            self._store.set(f"seen/{self._rank}", "yes" if not mark or _sees(run_dir / mark) else "no")
        return self._verdict(REPORT)

    # ---- rank 0 ---------------------------------------------------------------------------------------------

    def _collect(self, topic: str) -> dict[int, str]:
        """Give what ranks said, once all did or no sign of life came for too long."""
        signs, since_s = 0, time.monotonic()
        while self._store.add(f"{topic}/count", 0) < self._world_size:
            if (now := self._store.add("signs", 0)) != signs:
                signs, since_s = now, time.monotonic()
            if time.monotonic() - since_s > self._limits.report_s:
                break
            time.sleep(POLL_S)
        return self._said(topic)

    def _said(self, topic: str) -> dict[int, str]:
        return {
            rank: self._store.get(f"{topic}/{rank}").decode()
            for rank in range(self._world_size)
            if self._store.check([f"{topic}/{rank}"])
        }

    def _publish(self, topic: str, problems: list[str], verdict: dict) -> None:
        self._store.set(f"{topic}/verdict", json.dumps(verdict))
        if problems:  # the store ends with this process
            self._wait_count(f"{topic}/read", self._store.add(f"{topic}/count", 0) - 1)

    def _wait_count(self, key: str, count: int) -> None:
        end_s = time.monotonic() + READ_S
        while self._store.add(key, 0) < count and time.monotonic() < end_s:
            time.sleep(POLL_S)

    def _judge_reports(self, run_dir: Path) -> dict:
        reports = [Report.of_json(text) for text in self._collect(REPORT).values()]
        begun = self._said(BEGUN)
        problems = judge(reports, self._world_size, self._limits.report_s, begun)
        silent = len(reports) < self._world_size
        unheard = silent_problems(reports, self._world_size, self._limits.report_s, begun)
        others_wrong = len(problems) > len(unheard)
        others = [report for report in reports if report.local_rank == 0 and report.rank]
        skew_s = 0.0
        if len(reports) == self._world_size:
            asked, skew_s, silent = self._ask_nodes(others, run_dir)
            problems += asked
        nodes = [(report.rank, report.host) for report in reports if report.local_rank == 0]
        return {"problems": problems, "nodes": nodes, "skew_s": skew_s, "silent": silent and not others_wrong}

    def _ask_nodes(self, others: list[Report], run_dir: Path) -> tuple[list[str], float, bool]:
        """Compare the clocks of nodes and see whether they share the run directory.

        Give problems, the skew, and whether all that is wrong is a node that fell silent.
        """
        name = _leave_mark(run_dir)
        problems = []
        offsets: dict[str, tuple[float, float]] = {}
        blind = []
        try:
            self._store.set("ask", name)
            for report in others:
                try:
                    offsets[report.host] = self._offset_of(report.rank)
                    self._store.wait([f"seen/{report.rank}"], timedelta(seconds=self._limits.report_s))
                    if self._store.get(f"seen/{report.rank}") == b"no":
                        blind.append(report.host)
                except dist.DistStoreError:
                    problems.append(
                        f"{report.host}: rank {report.rank} reported and then fell silent: look at its log"
                    )
                    break
        finally:
            if name:
                (run_dir / name).unlink(missing_ok=True)
        wrong = clock_problems(offsets, self._limits.clock_s, self._host) + unshared_problems(
            str(run_dir), blind
        )
        ahead = [0.0, *(offset for offset, _ in offsets.values())]
        return problems + wrong, max(ahead) - min(ahead), bool(problems) and not wrong

    def _offset_of(self, rank: int) -> tuple[float, float]:
        """Measure how far a rank's clock is ahead of this one's, and the doubt: half a round trip.

        The best of some rounds: Cristian 1989, Probabilistic clock synchronization.
        """
        found = []
        for number in range(NUM_ROUNDS):
            sent_s, from_s = self._clock(), time.perf_counter()
            self._store.set(f"clock/{rank}/{number}", "")
            self._store.wait([f"time/{rank}/{number}"], timedelta(seconds=self._limits.report_s))
            theirs_s = float(self._store.get(f"time/{rank}/{number}"))
            trip_s = time.perf_counter() - from_s
            found.append((trip_s / 2, theirs_s - sent_s - trip_s / 2))
        doubt_s, offset_s = min(found)
        return offset_s, doubt_s


def _leave_mark(folder: Path) -> str:
    """Make a file that no node has looked for before, which NFS would remember; give its name, "" where none can be."""
    name = f".preflight-{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except OSError:  # the write of the local checks has failed, too, and told
        return ""
    return name


def _sees(path: Path) -> bool:
    end_s = time.monotonic() + SEEN_S
    while not path.exists():
        if time.monotonic() > end_s:
            return False
        time.sleep(POLL_S)
    return True


def _refuse(verdict: dict) -> None:
    if problems := verdict["problems"]:
        raise (SilentRanks if verdict["silent"] else ConfigError)(
            f"preflight: {len(problems)} problem(s)\n" + "\n".join(f"  {problem}" for problem in problems)
        )
