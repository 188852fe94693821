"""Read what a run wrote about itself, as far as it is there and whole. Imports no torch.

A reader goes on where it stopped, so that a run of any length can be watched.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError
from ..meters.ledger import KINDS, Ledger
from ..sections import MeterSection

Record = dict[str, Any]
Curve = list[tuple[float, float]]
SIGNS = ("metrics.jsonl", "run.toml", "events.jsonl", "ledger.json", "run_id", "lock")
"""A directory that has one of these was made by a run."""
LARGEST = 10**100  # sums and squares of what is smaller are finite
MAX_STEP = 10**15
ENDS = ("COMPLETE", "RESUME", "FAILED")


@dataclass(frozen=True)
class RunRecords:
    """A run directory's files. `steps` is in order of step; `evals` gives by name lines in order of step.

    `end` is the marker that the last attempt left and its text, `problems` say what of the files cannot be read.
    """

    name: str
    steps: list[Record]
    evals: dict[str, list[Record]]
    events: list[Record]
    ledger: Record
    config: str
    quarantine: list[Record] = field(default_factory=list)
    end: tuple[str, str] | None = None
    problems: tuple[str, ...] = ()

    def curve(self, field: str) -> Curve:
        """Give (step, value) of a field, where it is a finite number."""
        return [
            (float(record["step"]), value)
            for record in self.steps
            if (value := number(record, field)) is not None
        ]

    def heldout(self, field: str = "loss") -> dict[str, Curve]:
        """Give by held-out set (step, value) of a field, sorted by name."""
        return {
            name: [(float(line["step"]), value) for line in lines if (value := number(line, field)) is not None]
            for name, lines in sorted(self.evals.items())
        }

    def settings(self) -> Record:
        """Give the run file's sections; {} where it is not there or cannot be read."""
        try:
            return tomllib.loads(self.config)
        except (tomllib.TOMLDecodeError, RecursionError):
            return {}

    def task(self) -> str | None:
        """Name the task that the run file says; None where it is not there or cannot be read."""
        settings = self.settings()
        section = settings.get("task", {})
        name = section.get("name", "causal") if isinstance(section, dict) else None
        return str(name) if settings and name is not None else None


class RunReader:
    """Reads a run directory again and again, and each line once."""

    def __init__(self, run_dir: Path) -> None:
        """Read nothing yet."""
        self._run_dir = run_dir
        self._metrics = _Lines(run_dir / "metrics.jsonl")
        self._events = _Lines(run_dir / "events.jsonl")
        self._quarantine = _Lines(run_dir / "quarantine.jsonl")
        self._steps: dict[int, Record] = {}
        self._evals: dict[str, dict[int, Record]] = {}
        self._attempt: float | None = None
        self._last_step = -1

    def read(self) -> RunRecords:
        """Give what is there now.

        Of an attempt that a later one went back behind, the lines from there on do not count; torn lines never do.
        """
        new, begun_anew = self._metrics.take()
        if begun_anew:
            self._steps, self._evals, self._attempt, self._last_step = {}, {}, None, -1
        for record in new:
            self._add(record)
        self._metrics.lines.clear()  # kept by step
        for lines in (self._events, self._quarantine):
            lines.take()
        problems = [one.problem for one in (self._metrics, self._events, self._quarantine)]
        ledger, config = self._text("ledger.json", problems), self._text("run.toml", problems)
        problems += [*_config_problems(config), *_ledger_problems(ledger)]
        return RunRecords(
            name=self._run_dir.resolve().name,
            steps=[self._steps[step] for step in sorted(self._steps)],
            evals={name: [lines[step] for step in sorted(lines)] for name, lines in self._evals.items()},
            events=list(self._events.lines),
            ledger=_json_object(ledger),
            config=config,
            quarantine=list(self._quarantine.lines),
            end=_end(self._run_dir),
            problems=tuple(problem for problem in problems if problem),
        )

    def _text(self, name: str, problems: list[str]) -> str:
        try:
            return (self._run_dir / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            problems.append(f"{name}: is not there")
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
        return ""

    def _add(self, record: Record) -> None:
        value, kind = number(record, "step"), record.get("kind")
        if value is None or not 0 <= value <= MAX_STEP or kind not in ("step", "eval"):
            return
        step = int(value)
        self._begin_attempt(record, step, is_step=kind == "step")
        if kind == "step":
            self._steps[step] = record
            self._last_step = step
        else:
            self._evals.setdefault(str(record.get("name")), {})[step] = record

    def _begin_attempt(self, record: Record, step: int, *, is_step: bool) -> None:
        """Where a record is the first of an attempt, drop what earlier ones did from its step on."""
        attempt = number(record, "attempt")
        # Attempts count from 1 again where the ledger was lost; steps of one only go up.
        is_new = attempt not in (None, self._attempt) or (is_step and step <= self._last_step)
        self._attempt = self._attempt if attempt is None else attempt
        if not is_new:
            return
        # A run that goes on behind its last step only evaluates: the line of that step is of the same weights.
        _drop_from(step if is_step else step + 1, self._steps)
        for lines in self._evals.values():
            _drop_from(step, lines)
        self._evals = {name: lines for name, lines in self._evals.items() if lines}


class _Lines:
    """A file of JSON lines; what follows the last newline is a line where it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: list[Record] = []
        self._begin()

    def _begin(self) -> None:
        self.lines.clear()
        self.problem = ""
        self._torn = 0
        self._file: int | None = None
        self._offset = 0

    def take(self) -> tuple[list[Record], bool]:
        """Read what was added; give the new records, and whether the file is another one than before."""
        begun_anew = False
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if self._file not in (None, status.st_ino) or status.st_size < self._offset:
                    self._begin()
                    begun_anew = True
                self._file = status.st_ino
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return [], False
        except OSError as error:
            self.problem = f"{self._path.name}: {error.strerror}"
            return [], False
        *whole, tail = added.split(b"\n")
        last = _json_object(_decoded(tail))
        if last:
            whole.append(tail)
            self._offset += len(added)
        else:
            self._offset += len(added) - len(tail)
        records = []
        for line in whole:
            if record := _json_object(_decoded(line)):
                records.append(record)
            elif line.strip():
                self._torn += 1
                self.problem = f"{self._path.name}: {self._torn:,} line(s) are not whole"
        self.lines += records
        return records, begun_anew


def _config_problems(config: str) -> list[str]:
    """Say what in a run file cannot stand there; what is left of it is not taken for the whole in silence."""
    try:
        settings = tomllib.loads(config)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        return [f"run.toml: is not TOML ({error or 'nested too deep'})"]
    problems = {path: "is no figure" for path, value in _leaves(settings) if not _is_finite(value)}
    try:
        MeterSection.model_validate(settings.get("meter", {}))
    except ValidationError as error:
        for one in error.errors():
            path = ".".join(("meter", *map(str, one["loc"])))
            problems.setdefault(path, one["msg"][:1].lower() + one["msg"][1:])
    return [f"run.toml: {path}: {problem}" for path, problem in problems.items()]


def _leaves(table: Record, prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for name, value in table.items():
        leaves += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return leaves


def _ledger_problems(text: str) -> list[str]:
    ledger = _json_object(text)
    if text and not ledger:
        return ["ledger.json: is not a JSON object"]
    no_figures = [name for name in KINDS if not _is_finite(ledger.get(name))]
    return [
        f"ledger.json: {name}: is no figure" for name in dict.fromkeys([*Ledger.misfits(ledger), *no_figures])
    ]


def _is_finite(value: Any) -> bool:
    """Tell whether a value is none of the numbers that no run has."""
    return not isinstance(value, float) or math.isfinite(value)


def _drop_from(step: int, lines: dict[int, Record]) -> None:
    for later in [at for at in lines if at >= step]:
        del lines[later]


def read_records(run_dir: Path) -> RunRecords:
    """Read a run directory once."""
    return RunReader(run_dir).read()


def require_run(run_dir: Path) -> None:
    """See that a run made a directory.

    Raises:
        ConfigError: none did.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: is a file; give the run directory that it lies in: {run_dir.parent}")
    if not run_dir.is_dir() or not any((run_dir / name).exists() for name in SIGNS):
        what = f"has none of {', '.join(SIGNS)}" if run_dir.is_dir() else "there is no such directory"
        raise ConfigError(f"{run_dir}: is no run directory ({what}); give the directory that `train` made")


def number(record: Any, field: str) -> float | None:
    """Give a field's value where the record has it and it is a number, finite and of a size that runs have."""
    value = record.get(field) if isinstance(record, dict) else None
    if type(value) is not float:  # nearly all are: a report asks for millions
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LARGEST:
            return None
        value = float(value)
    return value if -LARGEST <= value <= LARGEST else None


def numbers(record: Any, field: str) -> dict[str, float]:
    """Give by name the finite numbers of a field that is a table."""
    table = record.get(field) if isinstance(record, dict) else None
    if not isinstance(table, dict):
        return {}
    return {str(name): value for name in table if (value := number(table, name)) is not None}


def _end(run_dir: Path) -> tuple[str, str] | None:
    for name in ENDS:
        if (run_dir / name).exists():
            with suppress(OSError):
                return name, (run_dir / name).read_text(encoding="utf-8", errors="replace").strip()
    return None


def _decoded(line: bytes) -> str:
    return line.decode("utf-8", errors="replace")


def _json_object(text: str) -> Record:
    """Parse an object; gives {} for what a cut-off run left torn."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
