"""Tensors of a checkpoint by name: any saved layout read in any other, and an index that lies is refused."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_files import use_small_blocks

from basestone.model.layout import Parameter
from basestone.trainer.checkpoint import format
from basestone.trainer.checkpoint import tensors as module
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.checkpoint.tensors import CheckpointTensors, index_of
from basestone.trainer.checkpoint.writer import RankWriter, commit
from basestone.trainer.errors import CheckpointError

KEYS = ["master", "exp_avg"]


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Make blocks and pieces small, so that ranges cross them, and hold some whole."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch, 32)
        patch.setattr(module, "PIECE_ELEMENTS", 7)
        patch.setattr(module, "LARGE_ELEMENTS", 20)
        yield


def values(table: dict[str, Parameter], name: str, key: str) -> np.ndarray:
    """Numbers that tell where they belong."""
    row = table[name]
    first = 10_000 * (1 + list(table).index(name)) * (1 if key == "master" else -1)
    return (first + np.arange(row.numel, dtype=np.float32)).reshape(row.shape)


def piece(whole: np.ndarray, row: Parameter, tp_rank: int, tp_size: int) -> np.ndarray:
    """One rank's piece, flat, cut by numpy."""
    if row.axis is None:
        return whole.ravel()
    blocks = np.split(whole, row.parts, axis=row.axis)
    return np.concatenate(
        [np.split(block, tp_size, axis=row.axis)[tp_rank] for block in blocks], row.axis
    ).ravel()


Cuts = dict[tuple[str, int], list[int]]


def save(folder: Path, table: dict[str, Parameter], tp_size: int, num_shares: int, cuts: Cuts) -> Path:
    """Write a step as tp_size * num_shares ranks; each piece is cut, and the parts are dealt to its shares."""
    temporary, final = folder / ".tmp", folder / "step_00000001"
    temporary.mkdir()
    ranks = []
    for tp_rank in range(tp_size):
        for share in range(num_shares):
            fragments = []
            with RankWriter(temporary / f"rank_{len(ranks):05d}.bin") as writer:
                for number, (name, row) in enumerate(table.items()):
                    if row.axis is None and tp_rank:
                        continue
                    data = {key: piece(values(table, name, key), row, tp_rank, tp_size) for key in KEYS}
                    edges = [0, *cuts.get((name, tp_rank), []), data["master"].size]
                    for place, (start, end) in enumerate(pairwise(edges)):
                        if place % num_shares == share and end > start:
                            fragments.append([number, start, end - start, writer.written])
                            for key in KEYS:
                                writer.write(memoryview(data[key][start:end].tobytes()))
            ranks.append(
                {
                    "file": writer.path.name,
                    "bytes": writer.written,
                    "tp_rank": tp_rank,
                    "tp_size": tp_size,
                    "fragments": fragments,
                    "blocks": writer.blocks,
                }
            )
    commit(temporary, final, index_of(table, KEYS, ranks), {})
    return final


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Parameter]:
    rows = []
    for number in range(draw(st.integers(1, 3))):
        axis = draw(st.sampled_from([None, 0, 1]))
        parts = draw(st.sampled_from([1, 2])) if axis == 0 else 1
        small = st.integers(1, 5)
        shape = [draw(small), draw(small)]
        if axis is not None:
            shape[axis] = 4 * parts * draw(st.integers(1, 2))
        if axis != 1 and draw(st.booleans()):
            shape.pop()
        rows.append(Parameter(f"p{number}", tuple(shape), "weight", axis, parts))
    return {row.name: row for row in rows}


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_layout_reads_any_other(data):
    table = data.draw(tables())
    tp_size, num_shares = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 3))
    cuts: Cuts = {}
    for name, row in table.items():
        for tp_rank in range(tp_size):
            size = piece(values(table, name, "master"), row, tp_rank, tp_size).size
            cuts[name, tp_rank] = sorted(data.draw(st.lists(st.integers(0, size), max_size=4)))
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(save(Path(folder), table, tp_size, num_shares, cuts))
        assert reader.verify() == []
        tensors = CheckpointTensors(reader, table)
        assert list(tensors.names()) == list(table)
        for name, row in table.items():
            np.testing.assert_array_equal(tensors.read(name).numpy(), values(table, name, "master"))
            for wanted_size in (1, 2, 4):
                tp_rank, key = data.draw(st.integers(0, wanted_size - 1)), data.draw(st.sampled_from(KEYS))
                whole = piece(values(table, name, key), row, tp_rank, wanted_size)
                start = data.draw(st.integers(0, whole.size - 1))
                dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
                target = torch.full((data.draw(st.integers(1, whole.size - start)),), torch.nan, dtype=dtype)
                tensors.fill(key, name, target, tp_rank, wanted_size, start)
                assert target.equal(torch.from_numpy(whole[start : start + len(target)]).to(dtype))


TABLE = {
    row.name: row
    for row in (
        Parameter("embed", (8, 3), "embedding", 0),
        Parameter("fc1", (16, 3), "weight", 0, 2),
        Parameter("fc2", (3, 8), "weight", 1),
        Parameter("norm", (6,), "norm"),
    )
}
CUTS: Cuts = {("embed", 0): [5], ("fc1", 1): [7, 20], ("norm", 0): [2]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, small_blocks: None) -> Path:
    """A step of two tensor-parallel ranks with two shares each."""
    return save(tmp_path_factory.mktemp("saved"), TABLE, 2, 2, CUTS)


def test_every_difference_of_the_tables_is_listed(saved):
    table = {name: row for name, row in TABLE.items() if name != "embed"}
    table["norm"] = Parameter("norm", (7,), "norm")
    table["bias"] = Parameter("bias", (6,), "bias")
    with pytest.raises(CheckpointError) as caught:
        CheckpointTensors(Reader(saved), table)
    text = str(caught.value)
    assert f"{saved} holds another model" in text
    assert "bias is missing" in text and "embed is not in this model" in text
    assert "norm has shape (6,) there and (7,) here" in text
    assert "fc1" not in text and "fc2" not in text


def test_tensors_that_were_not_saved_are_refused_by_name(saved):
    tensors = CheckpointTensors(Reader(saved), TABLE)
    with pytest.raises(CheckpointError, match="holds no 'exp_avg_sq', only master, exp_avg"):
        tensors.fill("exp_avg_sq", "norm", torch.empty(6), 0, 1, 0)


def test_damaged_bytes_are_found_where_they_are_read(saved):
    path = saved / "rank_00000.bin"
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        tensors = CheckpointTensors(Reader(saved), TABLE)
        with pytest.raises(CheckpointError, match=r"rank_00000\.bin: bytes .* do not match their sha256"):
            for name in TABLE:
                tensors.fill("exp_avg", name, torch.empty(TABLE[name].numel), 0, 1, 0)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_damaged_block_is_found(saved, dtype):
    """Those that go straight to where they are wanted, and those of which a part is."""
    path = saved / "rank_00000.bin"
    good = path.read_bytes()
    try:
        for at in range(0, len(good), 32):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            tensors = CheckpointTensors(Reader(saved), TABLE)
            with pytest.raises(CheckpointError, match=rf"bytes {at}\.\.{min(at + 32, len(good))} do not match"):
                for name in TABLE:
                    for key in KEYS:
                        target = torch.empty(TABLE[name].numel, dtype=dtype)
                        tensors.fill(key, name, target, 0, 1, 0)
    finally:
        path.write_bytes(good)


class EditedReader(Reader):
    """A reader whose index was edited and whose hashes were made to fit."""

    def __init__(self, path: Path, change: Callable[[dict[str, Any]], object]) -> None:
        super().__init__(path)
        index = json.loads((path / "index.json").read_text())
        change(index)
        self.index = format.Index.model_validate_json(json.dumps(index))
        self._ranks = {rank.file: rank for rank in self.index.ranks}


def fragment(rank: int, place: int, **changes: int) -> Callable[[dict[str, Any]], None]:
    """Add to the fields of a fragment."""

    def change(index: dict[str, Any]) -> None:
        row = index["ranks"][rank]["fragments"][place]
        for name, value in changes.items():
            row[("number", "start", "numel", "first_byte").index(name)] += value

    return change


def again(rank: int, place: int) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["ranks"][rank]["fragments"].append(
        copy.copy(index["ranks"][rank]["fragments"][place])
    )


def gone(rank: int, place: int) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["ranks"][rank]["fragments"].pop(place)


def overlap_as_large_as_the_gap(index: dict[str, Any]) -> None:
    """The number of elements is right, yet some are there twice and others not at all."""
    embed = index["ranks"][1]["fragments"][0]
    assert embed[:3] == [0, 5, 7]
    embed[1] -= 3


def replica_of_another_rank(index: dict[str, Any]) -> None:
    norm = [row for row in index["ranks"][0]["fragments"] if row[0] == 3]
    index["ranks"][2]["fragments"].append([3, norm[0][1], norm[0][2], 0])


def every_rank(**values_: int) -> Callable[[dict[str, Any]], None]:
    return lambda index: [rank.update(values_) for rank in index["ranks"]] and None


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a fragment twice": (again(0, 0), "embed: .* gap or an overlap"),
    "a fragment missing": (gone(0, 0), "embed: .*piece 0: 0 of 12 elements are there"),
    "the last fragment missing": (gone(1, 0), "embed: .*piece 0: 5 of 12 elements are there"),
    "no fragments": (lambda index: [rank["fragments"].clear() for rank in index["ranks"]], "0 of 12 elements"),
    "an overlap as large as the gap": (overlap_as_large_as_the_gap, "embed: .* gap or an overlap"),
    "a replica of another rank": (replica_of_another_rank, "norm: saved once more by tensor-parallel rank 1"),
    "behind the end of the piece": (fragment(1, 0, numel=1), "embed: elements 5..13 of a piece of 12"),
    "an absurd number of elements": (fragment(1, 0, numel=1 << 62), "of a piece of 12"),
    "an absurd start": (fragment(1, 0, start=1 << 62), "of a piece of 12"),
    "an absurd place in the file": (fragment(1, 0, first_byte=1 << 62), "embed: bytes .* of rank_00001.bin"),
    "one byte behind the file": (fragment(0, -1, first_byte=1), "norm: bytes .* of rank_00000.bin"),
    "between two numbers": (fragment(0, 0, first_byte=2), "embed: bytes .* of rank_00000.bin"),
    "no such parameter": (fragment(0, 0, number=4), "rank_00000.bin holds parameter 4 of 4"),
    "another rank": (lambda index: index["ranks"][0].update(tp_rank=1), "gap or an overlap"),
    "no such rank": (lambda index: index["ranks"][3].update(tp_rank=2), "rank 2 of 2, others of 2"),
    "two layouts": (lambda index: index["ranks"][3].update(tp_size=4), "rank 1 of 4, others of 2"),
    "a layout that cuts nothing": (every_rank(tp_size=3), "embed of shape .* cannot be cut over 3 ranks"),
    "an absurd layout": (every_rank(tp_size=1 << 62), "cannot be cut over"),
    "a tensor more": (lambda index: index["tensors"].append("exp_avg_sq"), "bytes .* of rank_0000"),
}


@pytest.mark.parametrize("kind", LIES)
def test_an_index_that_lies_is_refused(saved, kind):
    change, words = LIES[kind]
    reader = EditedReader(saved, change)
    with pytest.raises(CheckpointError, match=words) as caught:
        CheckpointTensors(reader, TABLE)
    assert f"{saved / 'index.json'}: is damaged: " in str(caught.value)


def test_an_index_that_does_not_lie_is_accepted(saved):
    CheckpointTensors(EditedReader(saved, lambda index: None), TABLE)
