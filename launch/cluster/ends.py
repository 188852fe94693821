"""How ranks ended: each failing one leaves a file in the run directory, and one of them is the cause.

Imports no torch.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ...data.storage import write_atomic
from ..local import EXITS_THAT_SAY_WHY, innocence

NUM_LINES = 20  # of its last words that a failing rank leaves
FOLDER, START = "ends", "start"


@dataclass(frozen=True)
class End:
    """How a rank ended; a negative `code` is the number of the signal that killed it, `time_s` seconds since 1970."""

    rank: int
    host: str
    code: int
    time_s: float
    last_words: list[str]

    @property
    def exit_code(self) -> int:
        """Give what a process that stands for the rank leaves with."""
        return self.code if self.code > 0 else 1

    def tell(self) -> str:
        """Say it to people."""
        killed = (
            f"was killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"left with {self.code}"
        )
        words = "".join(f"\n  {line}" for line in self.last_words)
        return f"rank {self.rank} on {self.host} {killed}" + (f"; its last words:{words}" if words else "")


def leave(folder: Path, rank: int, host: str, code: int, output: Path) -> None:
    """Write down how a rank ended."""
    end = End(rank, host, code, time.time(), _last_lines(output))
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FOLDER / _name(rank), json.dumps(asdict(end)).encode())


def clear(folder: Path, from_rank: int = 0) -> None:
    """Forget how the ranks of an earlier start ended, from this one on."""
    for path in (folder / FOLDER).glob("rank_*.json"):
        if path.name >= _name(from_rank):
            path.unlink(missing_ok=True)


def clear_own(folder: Path, rank: int, world_size: int) -> None:
    """Forget how this rank ended at an earlier start; rank 0 does it for those that there are no more."""
    (folder / FOLDER / _name(rank)).unlink(missing_ok=True)
    if rank == 0:
        clear(folder, world_size)


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def cause(folder: Path) -> End | None:
    """Give the end that explains the others, as far as can be seen: None where no rank left one in this start.

    Of ranks that say why the first counts, else the one that ended first.
    """
    paths = [path for path in sorted((folder / FOLDER).glob("rank_*.json")) if is_of_this_start(path, folder)]
    ends = [end for path in paths if (end := _read(path)) is not None]

    def suspicion(end: End) -> tuple[int, float]:
        return innocence(end.code), end.rank if end.code in EXITS_THAT_SAY_WHY else end.time_s

    return min(ends, key=suspicion, default=None)


def begin(folder: Path) -> None:
    """Begin a start: marks and ends from before it speak of another one."""
    write_atomic(folder / START, b"")


def is_of_this_start(path: Path, folder: Path) -> bool:
    """Tell whether a file was written since the last `begin`."""
    try:
        return path.stat().st_mtime_ns >= (folder / START).stat().st_mtime_ns
    except OSError:
        return False


def _read(path: Path) -> End | None:
    try:
        return End(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # being written, or cut short by a full disk
        return None


def _last_lines(output: Path) -> list[str]:
    try:
        with output.open("rb") as file:
            file.seek(max(0, output.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[-NUM_LINES:]
