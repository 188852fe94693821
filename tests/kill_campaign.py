"""Kill saves and whole runs at random moments, hundreds of times, and see that nothing is lost but the newest save.

    python tests/kill_campaign.py OUT [--storage 200] [--runs 30] [--seed 1]

Each finished kill of a saving process, and each whole run, is a line of OUT/campaign.jsonl. The program itself may be
killed at any moment: the same command goes on after the last line. It ends with a summary, and with code 1 where
anything was wrong; what was found wrong stays in OUT/bad-*.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from storage_kills import AIMS, draw, one_life

from basestone.data.storage import write_atomic

Record = dict[str, Any]
# Of each kind of line: the folder that lives on, and how one more is made.
FOLDERS = {"storage": "storage", "run": "runs"}


class Campaign:
    """Lines of finished work, and how to go on from them."""

    def __init__(self, out: Path, seed: int) -> None:
        """Read what is done, and remove what a killed campaign left in its temporary directory."""
        self.out, self._seed, self._file = out, seed, out / "campaign.jsonl"
        self._lines = self._file.read_text().splitlines() if self._file.exists() else []
        temporary = out / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tempfile.tempdir = str(temporary)

    @property
    def records(self) -> list[Record]:
        """Give what is done with this seed."""
        return [record for record in map(json.loads, self._lines) if record["seed"] == self._seed]

    def go_on(self, kind: str, number: int) -> None:
        """Do what is not done yet, up to `number` of a kind."""
        done = {record["number"] for record in self.records if record["kind"] == kind}
        for place in range(number):
            if place not in done:
                self._add(kind, place)

    def _add(self, kind: str, place: int) -> None:
        chance = random.Random(f"{self._seed}/{kind}/{place}")
        folder = self.out / FOLDERS[kind]
        result = one_life(folder, draw(chance)) if kind == "storage" else _one_run(folder, chance)
        if result["problems"]:
            print(f"{kind} {place}: {result}", flush=True)
            folder.rename(self.out / f"bad-{kind}-{self._seed}-{place}")
        self._lines.append(json.dumps({"kind": kind, "number": place, "seed": self._seed, **result}))
        write_atomic(self._file, "".join(f"{line}\n" for line in self._lines).encode())


def _one_run(folder: Path, chance: random.Random) -> Record:
    from run_kills import one_run  # not above: it imports all of the trainer, which takes seconds

    return one_run(folder, chance)


def summary(records: Iterable[Record]) -> list[str]:
    """Say in a line for each kind what was killed, and what was wrong."""
    of = {kind: [record for record in records if record["kind"] == kind] for kind in FOLDERS}
    lives, runs, lines = of["storage"], of["run"], []
    if lives:
        during = ", ".join(f"{sum(aim in record['during'] for record in lives)} in {aim}" for aim in AIMS)
        lines.append(
            f"{len(lives)} storage kills: {_count(lives, 'in_flight')} with a save in flight ({during}); "
            f"{_count(lives, 'asynchronous')} of asynchronous saves, {_count(lives, 'went_back')} after going back; "
            f"{_count(lives, 'problems')} with problems"
        )
    if runs:
        lines.append(
            f"{len(runs)} whole runs with {sum(record['kills'] for record in runs)} kills: "
            f"{sum(record['in_flight'] for record in runs)} with a save in flight, "
            f"{sum(record['in_prune'] for record in runs)} inside a prune; {_count(runs, 'reshaped')} runs in another "
            f"layout after every kill, {len(runs) - _count(runs, 'reshaped')} bit for bit in the same one; "
            f"{_count(runs, 'problems')} with problems"
        )
    return lines


def _count(records: list[Record], key: str) -> int:
    return sum(bool(record[key]) for record in records)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; give its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--storage", type=int, default=200, help="kills of a process that only saves")
    parser.add_argument("--runs", type=int, default=30, help="whole runs, each killed several times")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    campaign = Campaign(given.out.resolve(), given.seed)
    campaign.go_on("storage", given.storage)
    campaign.go_on("run", given.runs)
    for line in summary(campaign.records):
        print(line, flush=True)
    return int(any(record["problems"] for record in campaign.records))


if __name__ == "__main__":
    sys.exit(main())
