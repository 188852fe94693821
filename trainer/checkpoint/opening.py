"""Open a finished checkpoint: a step directory, or the newest good one of a run directory. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from ...data.reading.reader import RangeReader
from ...data.reading.transport import join
from ..errors import CheckpointError
from .format import MANIFEST, step_of, steps_in
from .places import RemoteDirectory, directory_at, local_path
from .reader import Reader

CHECKPOINTS = "checkpoints"


def steps_at(checkpoints: Path | str, reader: RangeReader | None = None) -> list[tuple[int, str]]:
    """List step directories as (step, place), newest first, at a path or a URL; none where nothing lies.

    At a URL a directory without a manifest is a copy that is not whole, and is not listed.

    Raises:
        CheckpointError: the place cannot be listed.
    """
    return list(_newest_first(checkpoints, reader))


def _newest_first(checkpoints: Path | str, reader: RangeReader | None) -> Iterator[tuple[int, str]]:
    """Give what `steps_at` lists, and ask for each only when it is wanted."""
    path = local_path(checkpoints)
    if path is not None:
        yield from ((step, str(found)) for step, found in steps_in(path))
        return
    base = RemoteDirectory(str(checkpoints), reader)
    numbers = {step: name for name in base.sizes() if (step := step_of(name)) is not None}
    for step, name in sorted(numbers.items(), reverse=True):
        place = join(base.place, name)
        if MANIFEST in RemoteDirectory(place, reader).sizes():
            yield step, place


def newest_good(run: Path | str, reader: RangeReader | None = None, attempts: int = 5) -> Reader:
    """Open the newest checkpoint of a run directory whose structure is good, for reading only.

    Raises:
        CheckpointError: there is none.
    """
    directory = directory_at(run, reader)
    problems: list[str] = []
    for _ in range(attempts):  # a training run may prune the one that we are about to open
        problems = []
        for _, place in _newest_first(join(directory.place, CHECKPOINTS), reader):
            try:
                return Reader(place, reader)
            except (OSError, CheckpointError) as error:
                problems.append(str(error))
        if not problems:
            break
        time.sleep(0.2)
    reason = "\n  ".join(problems) or "it holds none"
    raise CheckpointError(f"{directory}: no good checkpoint: {reason}")


def open_checkpoint(place: Path | str, reader: RangeReader | None = None) -> Reader:
    """Open a step directory, or the newest good one of a run directory, at a path or a URL."""
    if CHECKPOINTS in directory_at(place, reader).sizes():
        return newest_good(place, reader)
    return Reader(place, reader)
