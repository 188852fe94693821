"""A stream whose global batch grows: still one global order, whoever reads it and wherever it is taken up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import open_stream

from basestone.data.division import num_lanes, samples_per_reader
from basestone.data.errors import DataConfigError
from basestone.data.position import merge_states
from basestone.data.stream import TokenStream

LENGTH, LANES = 48, 4
BATCHES = [4, 4, 8, 8, 8, 20, 4, 8]
Samples = list[tuple[list[int], list[int]]]


def open_streams(shards: Path, model: Path, readers: int, **more: Any) -> list[TokenStream]:
    arguments = {"sequence_length": LENGTH, "seed": 7, "global_batch": 8, "lanes": LANES, "workers": 0} | more
    return [
        open_stream([shards / "train"], model, reader=reader, num_readers=readers, **arguments)
        for reader in range(readers)
    ]


def take(streams: Sequence[TokenStream], batches: Sequence[int], first: int = 0) -> Samples:
    """Read batches of these sizes; the samples in the order of their ids, which is checked to have no gap."""
    samples: Samples = []
    for size in batches:
        shares = [stream.next_batch(size) for stream in streams]
        for share in shares:
            assert len(share.ids) == samples_per_reader(size, len(streams), LANES)
            filler = share.ids < 0
            assert not share.weights[filler].any() and share.weights[~filler].all()
        ids = np.concatenate([share.ids for share in shares])
        order = np.argsort(ids)[np.count_nonzero(ids < 0) :]
        begin = first + len(samples)
        assert ids[order].tolist() == list(range(begin, begin + size)), (
            "a batch is the next samples, and all of them"
        )
        tokens = np.concatenate([share.tokens for share in shares])[order]
        weights = np.concatenate([share.weights for share in shares])[order]
        samples += zip(tokens.tolist(), weights.tolist(), strict=True)
        assert {stream.position for stream in streams} == {begin + size}
    return samples


def close(streams: Sequence[TokenStream]) -> None:
    for stream in streams:
        stream.close()


@pytest.fixture(scope="module")
def order(text_shards: Path, model: Path) -> Samples:
    """The first samples of a run of the same lanes without a ramp."""
    return take(open_streams(text_shards, model, 1, global_batch=LANES), [LANES] * (sum(BATCHES) // LANES))


@pytest.mark.parametrize(
    ("readers", "workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (1, 1), (2, 1), (3, 1), (1, 3)]
)
def test_batches_that_grow_deliver_one_global_order(readers, workers, text_shards, model, order):
    streams = open_streams(text_shards, model, readers, workers=workers)
    try:
        assert take(streams, BATCHES) == order
    finally:
        close(streams)


PLACES = [(steps, *readers, 0) for steps in (1, 2, 3, 6) for readers in ((1, 2), (2, 3), (3, 1), (2, 5))]


@pytest.mark.parametrize(("steps", "before", "after", "workers"), [*PLACES, (3, 2, 3, 1), (2, 3, 2, 1)])
def test_any_readers_go_on_in_the_middle_of_a_ramp(steps, before, after, workers, text_shards, model, order):
    streams = open_streams(text_shards, model, before, workers=workers)
    samples = take(streams, BATCHES[:steps])
    state = json.loads(json.dumps(merge_states([stream.state() for stream in streams])))
    assert state["position"] == sum(BATCHES[:steps]) and state["num_lanes"] == LANES
    close(streams)
    streams = open_streams(text_shards, model, after, workers=workers, state=state)
    assert samples + take(streams, BATCHES[steps:], len(samples)) == order
    close(streams)


@settings(max_examples=15, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.integers(1, 6), st.lists(st.integers(1, 4).map(lambda n: n * LANES), min_size=1, max_size=3)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_ramp_in_any_chain_of_resumes(parts, text_shards, model, order):
    state, samples = None, []
    for readers, batches in parts:
        batches = (
            [size for size in batches if len(samples) + size <= len(order)][:1] if samples else batches[:1]
        )
        streams = open_streams(text_shards, model, readers, state=state)
        samples += take(streams, batches, len(samples))
        state = merge_states([stream.state() for stream in streams])
    assert samples == order[: len(samples)]


def test_a_batch_of_another_number_of_lanes_is_refused(text_shards, model, order):
    (stream,) = open_streams(text_shards, model, 1)
    with pytest.raises(DataConfigError, match=r"global batch is 6; it must be a multiple of the run's 4 lanes"):
        stream.next_batch(6)
    assert take([stream], [4]) == order[:4], "nothing was lost by asking"


def test_lanes_of_a_ramp_are_fixed_by_all_of_its_batches(text_shards, model):
    assert num_lanes(4, 8, 12) == 4 and num_lanes(512, 768) == 256 and num_lanes(5, 8) == 1
    state = open_streams(text_shards, model, 1)[0].state()
    with pytest.raises(
        DataConfigError,
        match=r"lanes \(from the global batch, or data.lanes\): the checkpoint has 4, this run 8",
    ):
        open_streams(text_shards, model, 1, lanes=None, state=state)
    with pytest.raises(DataConfigError, match="global batch is 0; it must be at least 1"):
        num_lanes(8, 0)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20))
def test_shares_of_every_batch_hold_all_of_it(small, large, readers):
    lanes = num_lanes(small, large)
    for batch in (small, large):
        share = samples_per_reader(batch, readers, lanes)
        assert batch <= share * readers and share % (batch // lanes) == 0
