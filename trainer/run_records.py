"""Read what a run wrote about itself, as far as it is there and whole. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class RunRecords:
    """A run directory's files. `steps` is in order of step; `evals` gives by name lines in order of step."""

    name: str
    steps: list[Record]
    evals: dict[str, list[Record]]
    events: list[Record]
    ledger: Record
    config: str

    def curve(self, field: str) -> list[tuple[float, float]]:
        """Give (step, value) of a field, where it is a finite number."""
        return [
            (float(record["step"]), value)
            for record in self.steps
            if (value := number(record, field)) is not None
        ]


def read_records(run_dir: Path) -> RunRecords:
    """Read a run directory. The last line of a step counts, for a resumed run repeats steps; torn lines do not."""
    steps: dict[int, Record] = {}
    evals: dict[str, dict[int, Record]] = {}
    for record in _json_lines(run_dir / "metrics.jsonl"):
        step = number(record, "step")
        if step is None:
            continue
        if record.get("kind") == "step":
            steps[int(step)] = record
        elif record.get("kind") == "eval":
            evals.setdefault(str(record.get("name")), {})[int(step)] = record
    return RunRecords(
        name=run_dir.resolve().name,
        steps=[steps[step] for step in sorted(steps)],
        evals={name: [lines[step] for step in sorted(lines)] for name, lines in evals.items()},
        events=list(_json_lines(run_dir / "events.jsonl")),
        ledger=_json_object(_text(run_dir / "ledger.json")),
        config=_text(run_dir / "run.toml"),
    )


def number(record: Any, field: str) -> float | None:
    """Give a field's value where the record has it and it is a finite number."""
    value = record.get(field) if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json_lines(path: Path) -> Iterator[Record]:
    for line in _text(path).split("\n"):
        if record := _json_object(line):
            yield record


def _json_object(text: str) -> Record:
    """Parse an object; gives {} for what a cut-off run left torn."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
