"""Which layers a pipeline stage holds. Imports no torch.

A model is cut into `pipeline x virtual` chunks in the order of its layers, those of an encoder before those of its
decoder; chunk c lies on pipeline rank c mod `pipeline`. The first chunk holds the embedding, too, the last one the
final norm and the head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .layout import Parameter

LAYER = re.compile(r"(?:\w+\.)?layers\.\d+\.")


class Chunk(NamedTuple):
    """A contiguous part of the model: its layers, and whether it begins or ends the model."""

    layers: range
    first: bool
    last: bool


def spread_layers(num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Spread layers over chunks as evenly as they go; those in the middle, without embedding and head, get more."""
    base, extra = divmod(num_layers, num_chunks)
    inward = sorted(range(num_chunks), key=lambda chunk: abs(2 * chunk - (num_chunks - 1)))
    return tuple(base + (chunk in inward[:extra]) for chunk in range(num_chunks))


def chunks_of_ranks(
    num_layers: int, pipeline: int, virtual: int = 1, counts: Sequence[int] | None = None
) -> list[list[Chunk]]:
    """Give the chunks of each pipeline rank, in the order of its virtual stages.

    Args:
        counts: layers of every chunk in the model's order; by default they are spread evenly.
    """
    sizes = tuple(counts or spread_layers(num_layers, pipeline * virtual))
    assert len(sizes) == pipeline * virtual and sum(sizes) == num_layers
    starts = [sum(sizes[:chunk]) for chunk in range(len(sizes))]
    return [
        [
            Chunk(range(starts[c], starts[c] + sizes[c]), first=c == 0, last=c == len(sizes) - 1)
            for c in range(rank, len(sizes), pipeline)
        ]
        for rank in range(pipeline)
    ]


def held_by(table: dict[str, Parameter], chunks: Sequence[Chunk], *, tied: bool) -> list[Parameter]:
    """Give the parameters that a rank with these chunks holds, the second copy of a tied embedding among them."""
    first, last = any(chunk.first for chunk in chunks), any(chunk.last for chunk in chunks)
    held = {layer for chunk in chunks for layer in chunk.layers}
    names = dict.fromkeys(found[0] for name in table if (found := LAYER.match(name)))
    numbers = {
        name: number for number, name in enumerate(names)
    }  # the table is in the order of the forward pass

    def holds(row: Parameter) -> bool:
        if layer := LAYER.match(row.name):
            return numbers[layer[0]] in held
        if row.name == "embed.word.weight":
            return first or (last and tied)
        part = row.name.partition(".")[0]
        trunk = [number for name, number in numbers.items() if name.startswith(f"{part}.layers")]
        if not trunk:
            return first if part == "embed" else last
        return not held.isdisjoint(trunk) if row.per_stage else trunk[-1] in held

    return [row for row in table.values() if holds(row)]


def pipeline_problems(
    num_layers: int,
    pipeline: int,
    virtual: int = 1,
    counts: Sequence[int] | None = None,
    *,
    key: str = "model.num_layers",
) -> list[str]:
    """Say everything that forbids a pipeline for so many layers, which `key` gives; an empty list when it is legal."""
    problems, num_chunks = [], pipeline * virtual
    if virtual > 1 and pipeline == 1:
        problems.append(
            f"parallel.virtual_pipeline = {virtual} needs parallel.pipeline > 1; leave it out, or give both"
        )
    if counts is None:
        if num_chunks > num_layers:
            cut = "parallel.pipeline" if virtual == 1 else "parallel.pipeline x parallel.virtual_pipeline"
            problems.append(
                f"{cut} = {num_chunks} stages for {key} = {num_layers}; legal values: up to {num_layers}"
            )
        return problems
    if len(counts) != num_chunks:
        problems.append(
            f"parallel.pipeline_layers names {len(counts)} stages; parallel.pipeline x parallel.virtual_pipeline = "
            f"{num_chunks} are needed"
        )
    if sum(counts) != num_layers:
        problems.append(f"parallel.pipeline_layers adds up to {sum(counts)} layers; {key} = {num_layers}")
    return problems
