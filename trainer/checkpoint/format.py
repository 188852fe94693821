"""Files of a checkpoint: raw little-endian bytes, a JSON index, a sha256 for every block. Imports no torch.

    step_00000400/
      rank_00003.bin   fragments one after another; a fragment's tensors (master, exp_avg, ...) follow each other
      index.json       parameters, tensor names, and for every rank file its fragments and the hashes of its blocks
      state.json       everything that is not a tensor
      MANIFEST.json    written last: names, sizes and the hashes of index.json and state.json

A directory appears under its final name by one rename and is never written to again. Nothing in it is a pickle;
a file that might be one is refused unopened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 1
BLOCK_BYTES = 8 << 20
LEFTOVERS = ".t*-step_*"  # .tmp-step_... of a killed save, .trash-step_... of a killed removal
MANIFEST, INDEX, STATE = "MANIFEST.json", "index.json", "state.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".metadata", ".distcp")
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]


class Strict(BaseModel):
    """Takes no other type for the one it names, and never changes."""

    model_config = ConfigDict(strict=True, frozen=True)


class ParameterShape(Strict):
    """A parameter as index.json names it."""

    name: str
    shape: tuple[Positive, ...]


class RankFile(Strict):
    """What index.json says of one rank's file.

    A fragment is (number of the parameter, first element in the rank's piece, elements, first byte in the file).
    """

    file: str
    bytes: Count
    tp_rank: Count
    tp_size: Positive
    fragments: list[tuple[Count, Count, Positive, Count]]
    blocks: list[str]


class Index(Strict):
    """What index.json holds; `tensors` names what each fragment stores, in this order."""

    parameters: list[ParameterShape]
    tensors: list[str]
    ranks: list[RankFile]


class Manifest(Strict):
    """What MANIFEST.json holds beside the format: the size of every file, and hashes of those that are JSON."""

    files: dict[str, Count]
    sha256: dict[str, str]


def step_name(step: int) -> str:
    """Name the directory of a step."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """Give the step of a step directory's name; None for any other name."""
    number = name.removeprefix("step_")
    return int(number) if number != name and number.isdecimal() else None


def steps_in(checkpoints: Path) -> list[tuple[int, Path]]:
    """List the step directories under their final names, newest first."""
    if not checkpoints.is_dir():
        return []
    steps = ((step_of(path.name), path) for path in checkpoints.iterdir() if path.is_dir())
    return sorted(((step, path) for step, path in steps if step is not None), reverse=True)
