"""Open token streams on shards for tests, with a short spelling of the settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from basestone.data.division import num_lanes
from basestone.data.mixing import SourceSettings
from basestone.data.stream import TokenStream
from basestone.data.stream_settings import StreamSettings


def stream_settings(shards: Sequence[Path | str], model: Path, **more: Any) -> StreamSettings:
    """One source called "train" of these shard directories, or those given as ``sources``."""
    sources = (SourceSettings("train", tuple(map(str, shards))),)
    return StreamSettings(**{"sources": sources, "tokenizer": str(model), **more})


def open_stream(
    shards: Sequence[Path | str],
    model: Path,
    *,
    global_batch: int,
    reader: int = 0,
    num_readers: int = 1,
    workers: int = 0,
    lanes: int | None = None,
    state: dict[str, Any] | None = None,
    **more: Any,
) -> TokenStream:
    """Open one reader's stream; ``more`` are settings."""
    return TokenStream(
        stream_settings(shards, model, lanes=lanes or num_lanes(global_batch), **more),
        global_batch=global_batch,
        reader=reader,
        num_readers=num_readers,
        workers=workers,
        state=state,
    )
