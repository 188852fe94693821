"""The run directory: its lock, its records, and the ledger that outlives every checkpoint. Imports no torch.

RUN/  run.toml  run_id  metrics.jsonl  events.jsonl  ledger.json  tokenizer.model  lock  latest
      COMPLETE | RESUME | FAILED   STOP   checkpoints/   logs/   tensorboard/   launch/
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..data.storage import naming, write_atomic
from .errors import EXIT_FAULT, ConfigError, exit_code_of, message_of
from .meters.ledger import Ledger
from .run_lock import RunLock, is_held, open_lock

log = logging.getLogger(__name__)
MARKERS = ("COMPLETE", "RESUME", "FAILED")
LOOK_S = 1.0  # between two looks for it
STOP = "STOP"  # whoever makes this file asks the run to save and stop
FILES = (
    "run.toml",
    "metrics.jsonl",
    "events.jsonl",
    "quarantine.jsonl",
    "ledger.json",
    "tokenizer.model",
    "run_id",
    "latest",
    *MARKERS,
)


def make_run_directory(path: Path) -> None:
    """Make the folders of a run and check that they can be written.

    Raises:
        ConfigError: they cannot, a folder lies where a file of the run belongs, or the lock is a link.
    """
    try:
        for folder in (path, path / "checkpoints", path / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        os.close(open_lock(path))
    except OSError as error:
        raise ConfigError(f"run directory {path}: cannot be written ({error}); choose another") from error
    if folders := [name for name in FILES if (path / name).is_dir()]:
        raise ConfigError(
            f"run directory {path}: {', '.join(folders)} must be a file and is a directory; move it away, or choose "
            "another run directory"
        )


def forget_old_stop(run_dir: Path, before_s: float) -> None:
    """Take back a request to stop from before a command began: it was for another one; a run that goes on keeps it.

    Ranks never do so themselves: a request that comes while they start is for them.
    """
    with suppress(FileNotFoundError):
        if not is_held(run_dir) and (run_dir / STOP).stat().st_mtime < before_s:
            (run_dir / STOP).unlink()


class RunDirectory:
    """Holds the lock of a run directory and writes its records; one process of a run owns it."""

    def __init__(self, path: Path) -> None:
        """Create the directory where needed, check that it can be written, take the lock.

        Raises:
            ConfigError: it cannot be written, another run holds it, or what lies in it is no run's.
        """
        self.path = path
        make_run_directory(path)
        self._lock = RunLock(path)
        try:
            self.ledger = self._load_ledger()
            self.ledger.attempts += 1
            self._old_failure = _identity(path / "FAILED")
            self._looked_s = 0.0
            self._metrics = _Lines(path / "metrics.jsonl")
            self._events = _Lines(path / "events.jsonl")
            self._quarantine: _Lines | None = None
        except Exception:
            self._lock.close()
            raise

    def _load_ledger(self) -> Ledger:
        """Read the ledger; one that is not there or torn begins anew, from the checkpoint's figures.

        Raises:
            ConfigError: it holds something else than figures: it was edited, and is not thrown away silently.
        """
        path = self.path / "ledger.json"
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError):
            return Ledger()
        if not isinstance(values, dict):
            return Ledger()
        known = {field.name: values[field.name] for field in dataclasses.fields(Ledger) if field.name in values}
        if bad := [f"{name} = {json.dumps(known[name])}" for name in Ledger.misfits(known)]:
            raise ConfigError(
                f"{path}: {', '.join(bad)} is no figure of a ledger; put it right, or move the file away: the totals "
                "then begin at the checkpoint's"
            )
        return Ledger(**known)

    @property
    def attempt(self) -> int:
        """Which start of this run this is, from 1."""
        return self.ledger.attempts

    @property
    def run_id(self) -> str | None:
        """What tells this run from others, wherever its checkpoints are copied; None before its first start."""
        path = self.path / "run_id"
        return path.read_text().strip() or None if path.exists() else None

    def identify(self, run_id: str) -> None:
        """Write the run's identity, once."""
        if self.run_id is None:
            write_atomic(self.path / "run_id", f"{run_id}\n".encode())

    def metric(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self._metrics.append({**record, "attempt": self.attempt, "time": _now()})

    def event(self, step: int, event: str, message: str = "") -> None:
        """Append one line to events.jsonl."""
        record = {"time": _now(), "attempt": self.attempt, "step": step, "event": event, "message": message}
        self._events.append(record)

    def quarantine(self, record: dict[str, Any]) -> None:
        """Append one line to quarantine.jsonl, which is there once a chunk was passed over."""
        if self._quarantine is None:
            self._quarantine = _Lines(self.path / "quarantine.jsonl")
        self._quarantine.append({"time": _now(), "attempt": self.attempt, **record})

    def save_ledger(self, durable: bool = False) -> None:
        """Write the ledger; `durable` waits for the disk."""
        body = json.dumps(dataclasses.asdict(self.ledger), indent=1).encode()
        path = self.path / "ledger.json"
        if durable:
            write_atomic(path, body)
            return
        temporary = path.with_name(".ledger.json")
        with naming(path):
            temporary.write_bytes(body)  # a killed process leaves the old or the new one
            os.replace(temporary, path)

    @property
    def is_unused(self) -> bool:
        """Tell whether no attempt has come to a step here, nor any checkpoint."""
        begun = os.fstat(self._metrics.descriptor).st_size > 0 or any((self.path / "checkpoints").iterdir())
        return not begun and not any((self.path / name).exists() for name in MARKERS if name != "FAILED")

    def mark(self, marker: str | None, text: str = "") -> None:
        """Leave exactly one of COMPLETE, RESUME, FAILED behind, or with None none of an earlier attempt."""
        for name in MARKERS:
            # Another rank may have failed while this one was still beginning.
            if name != marker and not (marker is None and name == "FAILED" and self._another_rank_failed()):
                (self.path / name).unlink(missing_ok=True)
        if marker is not None:
            write_atomic(self.path / marker, f"{text}\n".encode())

    def asked_to_stop(self) -> bool:
        """Look for RUN/STOP once a second: the way to ask a run whose processes are elsewhere."""
        if time.monotonic() - self._looked_s < LOOK_S:
            return False
        self._looked_s = time.monotonic()
        return (self.path / STOP).exists()

    def forget_stop(self) -> None:
        """Take the request back: it was followed."""
        (self.path / STOP).unlink(missing_ok=True)

    def _another_rank_failed(self) -> bool:
        """Tell whether FAILED was written since this attempt began, which `tell_failure` does."""
        return _identity(self.path / "FAILED") not in (None, self._old_failure)

    def fail(self, step: int, error: Exception) -> None:
        """Record a failure as far as the disk still lets it: never raises over the error that is on its way.

        Where another rank has said why, this one only lost contact with it, and its words count.
        """
        reason, marker = message_of(error), self.path / "FAILED"
        if exit_code_of(error) == EXIT_FAULT and self._another_rank_failed():
            reason = _text_of(marker).partition(": ")[2] or reason
        with warned_of("the failure was not recorded in events.jsonl"):
            self.event(step, "fail", reason)
        try:
            self.mark("FAILED", f"step {step}: {reason}")
        except OSError:
            with warned_of("the failure was not marked"):
                (self.path / "FAILED").touch()  # a full disk often still takes a name

    def close(self) -> None:
        """Save the ledger where the disk lets it, release the lock and the files."""
        with warned_of("the ledger was not saved"):
            self.save_ledger()
        lines = [lines for lines in (self._metrics, self._events, self._quarantine) if lines is not None]
        for one in lines:
            os.close(one.descriptor)
        self._lock.close()


def tell_failure(run_dir: Path, rank: int, step: int, error: Exception) -> None:
    """Say in FAILED why a rank other than 0 fails, before rank 0 loses contact with it; never raises."""
    if exit_code_of(error) != EXIT_FAULT:
        with warned_of("the failure was not marked"):
            write_atomic(run_dir / "FAILED", f"step {step}: rank {rank}: {message_of(error)}\n".encode())


def _identity(path: Path) -> tuple[int, int] | None:
    """Tell one writing of a file from another; None where it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


class _Lines:
    """A file of JSON lines, open for appending; a line that a killed attempt left torn is closed first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self.descriptor).st_size
        if size and os.pread(self.descriptor, 1, size - 1) != b"\n":
            self._write(b"\n")

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, by one write: lines never mix."""
        self._write(json.dumps(record, allow_nan=True).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        with naming(self._path):
            while data:  # a disk that fills up takes a part, and says so at the next write only
                data = data[os.write(self.descriptor, data) :]


@contextmanager
def warned_of(loss: str) -> Iterator[None]:
    """Let an OSError cost no more than a warning that begins with `loss`."""
    try:
        yield
    except OSError as error:
        log.warning("%s: %s", loss, message_of(error))


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
