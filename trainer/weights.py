"""Tensors of a checkpoint by global name: any piece for any layout, or the whole.

A saved fragment is a flat range of one rank's piece, hence a few boxes of the global tensor; so is a wanted one.
Loading intersects the two. Where the layouts agree the boxes do too, and whole ranges are read in one go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.layout import Box, Parameter, boxes, intersect
from .errors import CheckpointError
from .storage import Reader

FP32_BYTES = 4


class _Saved(NamedTuple):
    box: Box
    file: str
    first_byte: int  # of the fragment's first tensor
    numel: int  # of the fragment


class CheckpointTensors:
    """Reads masters and optimizer states from a step directory."""

    def __init__(self, reader: Reader, table: dict[str, Parameter]) -> None:
        """Check that the checkpoint's parameters are the table's.

        Raises:
            CheckpointError: listing every parameter that is missing, unknown or of another shape.
        """
        self._reader, self._table = reader, table
        self.keys: list[str] = reader.index["tensors"]
        saved = {row["name"]: tuple(row["shape"]) for row in reader.index["parameters"]}
        problems = [f"{name} is missing" for name in table if name not in saved]
        problems += [f"{name} is not in this model" for name in saved if name not in table]
        problems += [
            f"{name} has shape {saved[name]} there and {row.shape} here"
            for name, row in table.items()
            if name in saved and saved[name] != row.shape
        ]
        if problems:
            raise CheckpointError(f"{reader.path} holds another model: {'; '.join(problems[:8])}")
        self._saved = self._index()

    def _index(self) -> dict[str, list[_Saved]]:
        names = [row["name"] for row in self._reader.index["parameters"]]
        saved: dict[str, list[_Saved]] = defaultdict(list)
        for rank in self._reader.index["ranks"]:
            for parameter, start, numel, first_byte in rank["fragments"]:
                row = self._table[names[parameter]]
                for box in boxes(row, rank["tp_rank"], rank["tp_size"], start, numel):
                    saved[row.name].append(_Saved(box, rank["file"], first_byte, numel))
        for name, row in self._table.items():
            covered = sum(item.box.num_rows * item.box.num_cols for item in saved[name])
            if covered != row.numel:
                raise CheckpointError(
                    f"{self._reader.path}: {name}: {covered} of {row.numel} elements are there"
                )
        return saved

    def fill(self, key: str, name: str, target: Tensor, tp_rank: int, tp_size: int, start: int) -> None:
        """Fill a 1-D fp32 tensor with a flat range of one rank's piece.

        Args:
            key: "master" or an optimizer state.
            name: global parameter name.
            target: written to; its length is the range's.
            tp_rank, tp_size: whose piece, in which layout.
            start: first element of the range in the piece.
        """
        row, which = self._table[name], self.keys.index(key)
        for wanted in boxes(row, tp_rank, tp_size, start, target.numel()):
            size = wanted.num_rows * wanted.num_cols
            view = target.narrow(0, wanted.offset, size).view(wanted.num_rows, wanted.num_cols)
            for item in self._saved[name]:
                shared = intersect(wanted, item.box)
                if shared is not None:
                    self._copy(view, wanted, item, shared, which)

    def _copy(
        self, view: Tensor, wanted: Box, item: _Saved, shared: tuple[int, int, int, int], which: int
    ) -> None:
        row, col, num_rows, num_cols = shared
        box = item.box
        # Whole rows of the saved box are read: contiguous bytes; columns outside the share are left behind.
        first = box.offset + (row - box.row) * box.num_cols
        start = item.first_byte + (which * item.numel + first) * FP32_BYTES
        data = self._reader.read(item.file, start, num_rows * box.num_cols * FP32_BYTES)
        source = torch.frombuffer(data, dtype=torch.float32).view(num_rows, box.num_cols)
        source = source.narrow(1, col - box.col, num_cols)
        view[row - wanted.row : row - wanted.row + num_rows, col - wanted.col : col - wanted.col + num_cols] = (
            source
        )

    def names(self) -> Iterable[str]:
        """Give the global names in the order of the forward pass."""
        return self._table.keys()

    def read(self, name: str) -> Tensor:
        """Give a parameter's whole fp32 master, in its global shape."""
        row = self._table[name]
        out = torch.empty(row.numel)
        self.fill("master", name, out, 0, 1, 0)
        return out.view(row.shape)


def index_of(table: dict[str, Parameter], tensors: list[str], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the index of a step directory from what every rank reports of its file."""
    parameters = [{"name": row.name, "shape": list(row.shape)} for row in table.values()]
    return {"parameters": parameters, "tensors": tensors, "ranks": ranks}
