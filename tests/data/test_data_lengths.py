"""A stream whose rows get longer: no token is lost, and it is the same for any readers, workers and resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streams import open_stream, stream_settings
from task_streams import case_task, checked_arrays, close, task_streams

from basestone.data.errors import DataConfigError
from basestone.data.lengths import RowLengths
from basestone.data.position import merge_states
from basestone.data.stream import TokenStream
from basestone.data.tasks.task import Task

LANES = 4
# steps of (global batch, sequence length): the batch changes at a border, too, and one of the lengths lasts a step
STEPS = [(12, 24), (12, 24), (4, 36), (8, 48), (8, 48), (12, 48)]
SAMPLES = [0, *accumulate(batch for batch, _ in STEPS)]
Samples = dict[int, dict[str, list[int]]]


def lengths_of(steps: Sequence[tuple[int, int]], row_tokens: dict[int, int]) -> tuple[tuple[int, int], ...]:
    """Give the rows of StreamSettings.lengths."""
    ends = accumulate(batch for batch, _ in steps)
    pairs = zip(ends, steps, steps[1:], strict=False)
    return tuple((end, row_tokens[one[1]]) for end, one, other in pairs if one[1] != other[1])


@pytest.fixture
def tasks(case: str, symbols_model: Path) -> dict[int, Task]:
    return {length: case_task(case, symbols_model, length=length) for _, length in STEPS}


def open_all(
    tasks: dict[int, Task], shards: Path, model: Path, readers: int = 1, **more: Any
) -> list[TokenStream]:
    lengths = lengths_of(STEPS, {length: task.row_tokens for length, task in tasks.items()})
    return task_streams(tasks[48], shards, model, readers, batch=8, lanes=LANES, lengths=lengths, **more)


def take(tasks: dict[int, Task], streams: Sequence[TokenStream], first: int, last: int) -> Samples:
    """Read steps from ``first`` up to ``last``: sample id -> field -> row; their form is checked."""
    samples: Samples = {}
    for batch_size, length in STEPS[first:last]:
        for stream in streams:
            batch = stream.next_batch(batch_size)
            arrays = checked_arrays(tasks[length], batch)
            samples |= {
                number: {name: field[row].tolist() for name, field in arrays.items()}
                for row, number in enumerate(batch.ids.tolist())
                if number >= 0
            }
    assert sorted(samples) == list(range(SAMPLES[first], SAMPLES[last]))
    return samples


@pytest.mark.parametrize(("readers", "workers"), [(3, 0), (6, 0), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_any_readers_and_workers_go_on_at_before_and_after_a_border(
    readers: int, workers: int, tasks: dict[int, Task], shards: Path, symbols_model: Path
) -> None:
    expected = take(tasks, open_all(tasks, shards, symbols_model), 0, len(STEPS))
    for stop in (1, 2, 3, 4) if workers == 0 else (2,):
        streams = open_all(tasks, shards, symbols_model, readers, workers=workers)
        try:
            samples = take(tasks, streams, 0, stop)
            state = json.loads(json.dumps(merge_states([stream.state() for stream in streams])))
        finally:
            close(streams)
        resumed = open_all(tasks, shards, symbols_model, max(1, 5 - readers), workers=workers, state=state)
        try:
            samples |= take(tasks, resumed, stop, len(STEPS))
        finally:
            close(resumed)
        assert samples == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_lanes_go_on_where_the_shorter_rows_ended(workers: int, text_shards: Path, model: Path) -> None:
    """Rows laid end to end give every lane's text, whatever their lengths; a worker reads beyond the border."""
    places = [text_shards / "train"], model

    def text(steps: Sequence[tuple[int, int]], workers: int) -> list[list[int]]:
        lengths = lengths_of(steps, {length: length for _, length in steps})
        longest = steps[-1][1]
        stream = open_stream(
            *places,
            sequence_length=longest,
            lengths=lengths,
            seed=7,
            global_batch=8,
            lanes=LANES,
            workers=workers,
        )
        lanes: list[list[int]] = [[] for _ in range(LANES)]
        for batch_size, length in steps:
            batch = stream.next_batch(batch_size)
            assert batch.tokens.shape == (batch_size, length + 1) and batch.weights.all()
            for number, row in zip(batch.ids.tolist(), batch.tokens.tolist(), strict=True):
                lanes[number % LANES] += row[:-1]
        stream.close()
        return lanes

    plain = text([(LANES, 24)] * 40, 0)
    odd = [(4, 16), (400, 17), (4, 18), (8, 100)], [(4, 1), (8, 2), (4, 3), (4, 250)]
    for steps in (STEPS, *odd) if workers == 0 else (odd[0],):
        for got, want in zip(text(steps, workers), plain, strict=True):
            assert min(len(got), len(want)) > 100
            assert got[: len(want)] == want[: len(got)]


def test_a_window_that_is_open_at_a_border_is_handed_out_as_it_is(text_shards: Path, model: Path) -> None:
    """Its rows are those of a run without the border; the lane's next window is made for the longer rows."""
    places = [text_shards / "train"], model
    more = {"packing": "best_fit", "seed": 7, "global_batch": LANES, "lanes": LANES}
    plain = open_stream(*places, sequence_length=16, **more)
    grown = open_stream(*places, sequence_length=64, lengths=((3 * LANES, 16),), **more)
    begun = [plain.next_batch() for _ in range(3)]
    for want in begun:
        assert np.array_equal(grown.next_batch().tokens, want.tokens)
    first = grown.state()["sources"][0]["cursors"]
    assert [row[3] for row in first] == [17] * LANES, "the tokens that the window is made for"
    still = set(range(LANES))
    pad = int(grown._pad)
    for _ in range(3000):
        ours, theirs = grown.next_batch(), plain.next_batch()
        places_now = {row[0]: row[1:] for row in grown.state()["sources"][0]["cursors"]}
        for lane in range(LANES):
            if lane in still and places_now[lane][2] == 17:
                assert ours.tokens[lane, :17].tolist() == theirs.tokens[lane].tolist()
                assert (ours.tokens[lane, 17:] == pad).all() and not ours.weights[lane, 16:].any()
            else:
                still.discard(lane)
                assert places_now[lane][2] == 65
        if not still:
            break
    assert not still and ours.lengths.max() > 17


def test_without_other_lengths_states_are_as_they_were(text_shards: Path, model: Path) -> None:
    more = {"sequence_length": 16, "seed": 7, "global_batch": 4}
    for packing in ("split", "best_fit"):
        stream = open_stream([text_shards / "train"], model, packing=packing, **more)
        stream.next_batch()
        state = stream.state()
        assert "lengths" not in state
        if packing == "best_fit":
            assert [row[3] for row in state["sources"][0]["cursors"]] == [0] * 4


@pytest.mark.parametrize(
    "lengths",
    [((8, 48),), ((8, 64),), ((8, 0),), ((6, 16),), ((0, 16),), ((8, 16), (8, 24)), ((8, 24), (16, 16))],
)
def test_lengths_that_cannot_be_meant(lengths: tuple[tuple[int, int], ...]) -> None:
    settings = stream_settings([Path("x")], Path("t"), sequence_length=48, lanes=LANES, seed=1, lengths=lengths)
    with pytest.raises(
        DataConfigError, match=r"lengths are .* before 48; samples and tokens must grow .* 4 lanes"
    ):
        settings.check()


def test_a_batch_over_a_border_is_refused(text_shards: Path, model: Path) -> None:
    stream = open_stream(
        [text_shards / "train"], model, sequence_length=48, seed=7, global_batch=4, lengths=((8, 16),)
    )
    stream.next_batch()
    with pytest.raises(
        DataConfigError, match=r"batch of 8 from sample 4 on .* two lengths; end it at sample 8"
    ):
        stream.next_batch(8)
    assert stream.next_batch(4).tokens.shape == (4, 17) and stream.next_batch(8).tokens.shape == (8, 49)


def test_the_length_of_every_sample() -> None:
    lengths = RowLengths(((8, 16), (12, 24)), 48)
    assert [lengths.at(sample) for sample in (0, 7, 8, 11, 12, 10**9)] == [16, 16, 24, 24, 48, 48]
    assert [lengths.next_change(sample) for sample in (0, 7, 8, 11, 12)] == [8, 8, 12, 12, None]
    assert RowLengths((), 48).at(0) == 48 and RowLengths((), 48).next_change(0) is None
