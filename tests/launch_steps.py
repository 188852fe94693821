"""A run directory of small steps to list, verify and prune, and how they are found and damaged."""

from __future__ import annotations

from pathlib import Path

LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 4.5}


def step(run_dir: Path, number: int) -> Path:
    return run_dir / "checkpoints" / f"step_{number:08d}"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def steps_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def size_of(path: Path) -> int:
    return sum(entry.stat().st_size for entry in path.iterdir())
