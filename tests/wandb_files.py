"""What wandb wrote offline: records of its protocol in blocks of 32 KiB, each record in one or more pieces."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

FILE_HEAD, BLOCK = 7, 32768
PIECE = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, LAST = 1, 4


@dataclass
class OfflineRun:
    """What a file says; `history` has a row for every step."""

    run_id: str = ""
    project: str = ""
    resumes: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


def offline_runs(run_dir: Path) -> list[OfflineRun]:
    """Read the files of a run directory, in the order of their beginning."""
    paths = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.parent.name)
    return [_read(path) for path in paths]


def _read(path: Path) -> OfflineRun:
    found = OfflineRun()
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found.run_id, found.project, found.resumes = run.run_id, run.project, run.resume
            found.config = {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            found.history.append({name: json.loads(value) for name, value in items.items()})
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _records(data: bytes) -> Iterator[Record]:
    at, parts = FILE_HEAD, b""
    while at + PIECE.size <= len(data):
        left = BLOCK - at % BLOCK
        if left < PIECE.size:
            at += left
            continue
        _, length, kind = PIECE.unpack_from(data, at)
        at += PIECE.size
        parts += data[at : at + length]
        at += length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
