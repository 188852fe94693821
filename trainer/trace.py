"""What a serial run computed, tensor by tensor, kept on disk so that ranks of any layout can compare their pieces.

A step's file holds, for every parameter in the table's order, its fp32 gradient, its update and the root of AdamW's
second moment, each in the parameter's global 2-D view. No rank ever holds the whole model: it maps the files and
looks at the boxes of its own fragments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model.layout import Parameter, boxes
from .engine_state import MASTER, EngineState
from .sections import OptimizerSection

KINDS = ("gradient", "update", "root")
FP32_EPSILON = 2.0**-23


class Piece(NamedTuple):
    """What one fragment went through in one step; 1-D fp32 tensors on the CPU.

    Both are differences of stored fp32 values, and no finer than those: `gradient_grain`, `update_grain`.
    """

    name: str
    start: int
    gradient: Tensor
    update: Tensor
    root: Tensor
    gradient_grain: Tensor
    update_grain: Tensor


class Difference(NamedTuple):
    """How a rank's piece of a parameter differs from the reference.

    The largest differences, of updates times the root of the second moment, and the elements that were compared.
    """

    gradient: float
    update: float
    numel: int


class PieceWatch:
    """Tells what each step did to a rank's fragments, from the optimizer's state before and after it.

    The gradient is the one that AdamW was given, clipped, read back from its first moment:
    m' = b m + (1 - b) g (Kingma & Ba 2015, algorithm 1). So one code serves every optimizer class of DeepSpeed.
    """

    def __init__(self, state: EngineState, optimizer: OptimizerSection) -> None:
        self._state, self._betas = state, optimizer.betas
        self._before = {f.name: self._copy(f.tensors) for f in state.fragments()}

    @staticmethod
    def _copy(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return tensors[MASTER].detach().clone().cpu(), tensors["exp_avg"].detach().clone().cpu()

    def pieces(self) -> Iterable[Piece]:
        """Give the pieces of the step that was just made."""
        beta = self._betas[0]
        for fragment in self._state.fragments():
            master, moment = self._copy(fragment.tensors)
            old_master, old_moment = self._before[fragment.name]
            root = fragment.tensors["exp_avg_sq"].detach().cpu().sqrt()
            gradient = (moment.double() - beta * old_moment.double()) / (1 - beta)
            yield Piece(
                fragment.name,
                fragment.start,
                gradient.float(),
                master - old_master,
                root,
                gradient_grain=(moment.abs() + old_moment.abs()) * (FP32_EPSILON / (1 - beta)),
                update_grain=master.abs() * FP32_EPSILON,
            )
            self._before[fragment.name] = master, moment


class Trace:
    """The reference's files in a directory."""

    def __init__(self, folder: Path, table: dict[str, Parameter]) -> None:
        self._folder, self._table = folder, table
        self._offsets: dict[str, int] = {}
        self._numel = 0
        for row in table.values():
            self._offsets[row.name] = self._numel
            self._numel += row.numel

    def _map(self, step: int, mode: str) -> np.ndarray:
        path = self._folder / f"step_{step:08d}.f32"
        return np.memmap(path, np.float32, mode=mode, shape=(len(KINDS), self._numel))  # type: ignore[call-overload]

    def write(self, step: int, pieces: Iterable[Piece]) -> dict[str, tuple[float, float]]:
        """Keep a serial run's step; give each parameter's largest gradient and root."""
        stored, largest = self._map(step, "w+"), {}
        for piece in pieces:
            begin = self._offsets[piece.name] + piece.start
            for kind, values in enumerate((piece.gradient, piece.update, piece.root)):
                stored[kind, begin : begin + values.numel()] = values.numpy()
            largest[piece.name] = float(piece.gradient.abs().max()), float(piece.root.max())
        return largest

    def differences(
        self, step: int, pieces: Iterable[Piece], tp_rank: int, tp_size: int
    ) -> dict[str, Difference]:
        """Compare a rank's pieces of a step with the reference.

        Adam divides by the root of the second moment, so it turns the rounding noise of a small gradient into a
        whole step: a difference of updates counts in proportion to that root.
        """
        stored, found = self._map(step, "r"), {}
        for piece in pieces:
            row = self._table[piece.name]
            rows, cols = row.view2d
            begin = self._offsets[piece.name]
            whole = stored[:, begin : begin + row.numel].reshape(len(KINDS), rows, cols)
            gradient = update = 0.0
            for box in boxes(row, tp_rank, tp_size, piece.start, piece.gradient.numel()):
                cut = slice(box.row, box.row + box.num_rows), slice(box.col, box.col + box.num_cols)
                size = box.num_rows * box.num_cols
                expected = torch.from_numpy(np.array(whole[(slice(None), *cut)])).reshape(len(KINDS), size)
                span = slice(box.offset, box.offset + size)
                apart = (piece.gradient[span] - expected[0]).abs() - piece.gradient_grain[span]
                gradient = _worse(gradient, apart)
                apart = (piece.update[span] - expected[1]).abs() - piece.update_grain[span]
                update = _worse(update, apart * expected[2])
            found[piece.name] = Difference(gradient, update, piece.gradient.numel())
        return found


def _worse(largest: float, values: Tensor) -> float:
    """Give the larger one; what is not a number is worse than any."""
    value = float(values.max())
    return largest if value <= largest or math.isnan(largest) else value
