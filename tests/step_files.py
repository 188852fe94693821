"""A small step directory without tensors, what is wrong with one, and how someone would edit one."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from basestone.trainer.checkpoint import reader, tensors, writer
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.checkpoint.writer import RankWriter, commit
from basestone.trainer.errors import CheckpointError

BLOCK_BYTES = 64
RANK_BYTES = (0, 150, 128)  # nothing, a last block that is not full, whole blocks
FILES = ["MANIFEST.json", "index.json", "state.json", "rank_00001.bin", "rank_00002.bin"]


def use_small_blocks(patch: pytest.MonkeyPatch, num_bytes: int = BLOCK_BYTES) -> None:
    """Make blocks small, so that small files have several."""
    for module in (reader, tensors, writer):
        patch.setattr(module, "BLOCK_BYTES", num_bytes)


def read_range(opened: Reader, name: str, start: int, num_bytes: int) -> bytearray:
    """Read a range of a rank file into memory of its own."""
    out = bytearray(num_bytes)
    opened.read_into(name, start, memoryview(out))
    return out


def payload(rank: int) -> bytes:
    return random.Random(rank).randbytes(RANK_BYTES[rank])


def write_ranks(temporary: Path) -> dict[str, Any]:
    """Write rank files into a new directory; give their index."""
    temporary.mkdir(parents=True)
    ranks = []
    for rank, size in enumerate(RANK_BYTES):
        with RankWriter(temporary / f"rank_{rank:05d}.bin") as out:
            for start in range(0, size, 50):  # pieces that are no blocks
                out.write(memoryview(payload(rank))[start : start + 50])
        ranks.append(
            {
                "file": out.path.name,
                "bytes": out.written,
                "tp_rank": 0,
                "tp_size": 1,
                "fragments": [[0, 0, 4, 0]],
                "blocks": out.blocks,
            }
        )
    return {"parameters": [{"name": "w", "shape": [4, 3]}], "tensors": ["master"], "ranks": ranks}


def save(checkpoints: Path, step: int = 1, **state: Any) -> Path:
    temporary, final = checkpoints / ".tmp-step", checkpoints / f"step_{step:08d}"
    commit(temporary, final, write_ranks(temporary), {"step": step, **state})
    return final


def problem(path: Path) -> str:
    """What is wrong with a directory, by its structure or by all its bytes; nothing where it is good."""
    try:
        return "\n".join(Reader(path).verify())
    except CheckpointError as error:
        return str(error)


def reseal(path: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Make sizes and hashes of the manifest fit what lies there, as someone who edits a checkpoint would."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = (path / name).stat().st_size
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    manifest = change(manifest) or manifest
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
