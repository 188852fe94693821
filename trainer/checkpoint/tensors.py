"""Tensors of a checkpoint by global name: any piece for any layout, or the whole.

A saved fragment is a flat range of one rank's piece, hence a few boxes of the global tensor; so is a wanted one.
Loading intersects the two. Where the layouts agree the boxes do too, and whole ranges are read in one go.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...model.layout import Box, Parameter, boxes, intersect
from ..errors import CheckpointError
from .format import BLOCK_BYTES, INDEX, RankFile
from .reader import Reader

FP32_BYTES = 4
SHOWN_PROBLEMS = 3  # of a checkpoint of another model
PIECE_ELEMENTS = BLOCK_BYTES // FP32_BYTES
LARGE_ELEMENTS = 8 * PIECE_ELEMENTS  # of a parameter that several threads read
THREADS = 2


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
            CheckpointError: listing every parameter that is missing, unknown or of another shape; or the first
                whose fragments leave its pieces, or do not cover them exactly.
        """
        self._reader, self._table = reader, table
        self._kept = threading.local()  # each thread's own block, for what cannot be read straight to its place
        self.keys: list[str] = reader.index.tensors
        if problem := model_problem(reader, table):
            raise CheckpointError(problem)
        self._saved = self._index()

    def _index(self) -> dict[str, list[_Saved]]:
        names = [row.name for row in self._reader.index.parameters]
        tp_size = self._check_layout()
        saved: dict[str, list[_Saved]] = defaultdict(list)
        spans: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for rank in self._reader.index.ranks:
            for parameter, start, numel, first_byte in rank.fragments:
                if parameter >= len(names):
                    raise self._damage(f"{rank.file} holds parameter {parameter} of {len(names)}")
                row = self._table[names[parameter]]
                self._check_fragment(row, rank, start, numel, first_byte)
                spans[row.name, rank.tp_rank].append((start, numel))
                for box in boxes(row, rank.tp_rank, tp_size, start, numel):
                    saved[row.name].append(_Saved(box, rank.file, first_byte, numel))
        self._check_cover(spans, tp_size)
        return saved

    def _check_layout(self) -> int:
        """Give the tensor-parallel size that all ranks were saved in, one that the shapes can be cut by."""
        ranks = self._reader.index.ranks
        tp_size = ranks[0].tp_size if ranks else 1
        for rank in ranks:
            if rank.tp_size != tp_size or rank.tp_rank >= tp_size:
                raise self._damage(
                    f"{rank.file} is of rank {rank.tp_rank} of {rank.tp_size}, others of {tp_size}"
                )
        for row in self._table.values():
            if row.axis is not None and row.shape[row.axis] % (tp_size * row.parts):
                raise self._damage(f"{row.name} of shape {row.shape} cannot be cut over {tp_size} ranks")
        return tp_size

    def _check_fragment(self, row: Parameter, rank: RankFile, start: int, numel: int, first_byte: int) -> None:
        piece, num_bytes = math.prod(row.local_shape(rank.tp_size)), numel * len(self.keys) * FP32_BYTES
        if start + numel > piece:
            raise self._damage(f"{row.name}: elements {start}..{start + numel} of a piece of {piece}")
        if first_byte % FP32_BYTES or first_byte + num_bytes > rank.bytes:
            raise self._damage(f"{row.name}: bytes {first_byte}..{first_byte + num_bytes} of {rank.file}")

    def _check_cover(self, spans: dict[tuple[str, int], list[tuple[int, int]]], tp_size: int) -> None:
        """Check that the fragments of every piece follow each other without a gap or an overlap."""
        for row in self._table.values():
            piece = math.prod(row.local_shape(tp_size))
            for tp_rank in range(1 if row.axis is None else tp_size):
                position = 0
                for start, numel in sorted(spans.pop((row.name, tp_rank), [])):
                    if start != position:
                        break
                    position += numel
                if position != piece:
                    raise self._damage(
                        f"{row.name}: tensor-parallel piece {tp_rank}: {position} of {piece} elements are there, "
                        "then comes a gap or an overlap"
                    )
        if spans:
            name, tp_rank = next(iter(spans))
            raise self._damage(f"{name}: saved once more by tensor-parallel rank {tp_rank}")

    def _damage(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self._reader.at(INDEX)}: is damaged: {text}")

    def fill(self, key: str, name: str, target: Tensor, tp_rank: int, tp_size: int, start: int) -> None:
        """Fill a 1-D tensor with a flat range of one rank's piece, rounded to its dtype.

        Args:
            key: "master" or an optimizer state.
            name: global parameter name.
            target: written to; its length is the range's.
            tp_rank, tp_size: whose piece, in which layout.
            start: first element of the range in the piece.

        Raises:
            CheckpointError: the checkpoint has no such tensors, or bytes do not match their hashes.
        """
        if key not in self.keys:
            raise CheckpointError(f"{self._reader.at()}: holds no {key!r}, only {', '.join(self.keys)}")
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
        box, (row, col, num_rows, num_cols) = item.box, shared
        target = view.narrow(0, row - wanted.row, num_rows).narrow(1, col - wanted.col, num_cols)
        # Of several rows whole ones are read, as their bytes follow each other; other columns are left behind.
        left, width = (col, num_cols) if num_rows == 1 else (box.col, box.num_cols)
        start = which * item.numel + box.offset + (row - box.row) * box.num_cols + left - box.col
        first_byte = item.first_byte + start * FP32_BYTES
        if width == num_cols and target.is_contiguous():
            self._read_flat(item.file, first_byte, target.view(-1))
        else:
            self._read_rows(item.file, first_byte, width, col - left, target)

    def _read_flat(self, file: str, first_byte: int, target: Tensor) -> None:
        """Read elements that follow each other in the file and in `target`: straight there, if nothing is rounded."""
        if target.dtype == torch.float32:
            self._reader.read_into(file, first_byte, _bytes_of(target))
            return
        while target.numel():  # up to a block's end each time: whole blocks are read at once
            in_block = (BLOCK_BYTES - first_byte % BLOCK_BYTES) // FP32_BYTES
            source = self._read_kept(file, first_byte, min(in_block, PIECE_ELEMENTS, target.numel()))
            target[: source.numel()].copy_(source)
            first_byte, target = first_byte + source.nbytes, target[source.numel() :]

    def _read_rows(self, file: str, first_byte: int, width: int, skipped: int, target: Tensor) -> None:
        """Read rows of `width` elements, of which `target` has some columns, from the one after `skipped` on."""
        rows_at_once = PIECE_ELEMENTS // width
        if not rows_at_once:
            for number, row in enumerate(target):
                self._read_flat(file, first_byte + (number * width + skipped) * FP32_BYTES, row)
            return
        for part in target.split(rows_at_once):
            source = self._read_kept(file, first_byte, len(part) * width)
            part.copy_(source.view(len(part), width).narrow(1, skipped, part.shape[1]))
            first_byte += source.nbytes

    def _read_kept(self, file: str, first_byte: int, numel: int) -> Tensor:
        """Read to this thread's kept block, which the next call reads over."""
        if not hasattr(self._kept, "block"):
            self._kept.block = torch.empty(PIECE_ELEMENTS)
        block: Tensor = self._kept.block[:numel]
        self._reader.read_into(file, first_byte, _bytes_of(block))
        return block

    def names(self) -> Iterable[str]:
        """Give the global names in the order of the forward pass."""
        return self._table.keys()

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give a parameter's whole fp32 master, rounded to `dtype`, in its global shape; threads may share this."""
        row = self._table[name]
        out = _empty(row.numel, dtype)
        if row.numel < LARGE_ELEMENTS:
            self.fill("master", name, out, 0, 1, 0)
            return out.view(row.shape)
        parts = out.chunk(THREADS)

        def fill(number: int) -> None:
            self.fill("master", name, parts[number], 0, 1, number * parts[0].numel())

        with ThreadPoolExecutor(THREADS, "part") as pool:
            list(pool.map(fill, range(len(parts))))
        return out.view(row.shape)


def index_of(
    table: dict[str, Parameter], tensors: Sequence[str], ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    """Make the index of a step directory from what every rank reports of its file."""
    parameters = [{"name": row.name, "shape": list(row.shape)} for row in table.values()]
    return {"parameters": parameters, "tensors": list(tensors), "ranks": ranks}


def model_problem(reader: Reader, table: dict[str, Parameter], left_out: Collection[str] = ()) -> str | None:
    """Say which parameters of a checkpoint, but for those `left_out`, are not the table's, if any."""
    saved = {row.name: row.shape for row in reader.index.parameters if row.name not in left_out}
    problems = [f"{name} is missing" for name in table if name not in saved]
    problems += [f"{name} is not in this model" for name in saved if name not in table]
    problems += [
        f"{name} has shape {saved[name]} there and {row.shape} here"
        for name, row in table.items()
        if name in saved and saved[name] != row.shape
    ]
    if not problems:
        return None
    more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return (
        f"{reader.at()} holds another model than [model] says: {'; '.join(problems[:SHOWN_PROBLEMS])}{more}; "
        "give both the same family, layers and widths"
    )


def _empty(numel: int, dtype: torch.dtype) -> Tensor:
    """Make a 1-D tensor in pages of its own: large ones, as each costs time, and given back once it is dropped."""
    pages = mmap.mmap(-1, numel * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().numpy().data.cast("B")
