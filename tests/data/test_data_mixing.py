"""The mix: shares as asked, a function of the sample alone, and free to change at a resume."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import open_stream

from basestone.data.errors import DataConfigError
from basestone.data.mixing import Mix, MixPhase, SourceSettings, comparable_sizes, mix_weights
from basestone.data.position import merge_states

LENGTH = 48


def sources_of(text_shards: Path, token_shards: Path, **weights: float) -> tuple[SourceSettings, ...]:
    places = {"text": text_shards / "train", "tokens": token_shards / "train", "more": text_shards / "heldout"}
    return tuple(SourceSettings(name, (str(places[name]),), weight=weight) for name, weight in weights.items())


def shares(mix: Mix, first: int, last: int) -> dict[int, float]:
    counts = Counter(mix.source_of(sample) for sample in range(first, last))
    return {source: count / (last - first) for source, count in counts.items()}


def test_shares_are_those_asked_for_and_change_where_asked() -> None:
    mix = Mix([MixPhase(0, (0.7, 0.2, 0.1)), MixPhase(20_000, (0.0, 3.0, 1.0))], seed=5)
    early, late = shares(mix, 0, 20_000), shares(mix, 20_000, 40_000)
    # three standard deviations of a binomial of 20,000 draws are at most 0.011
    assert early == {number: pytest.approx(share, abs=0.011) for number, share in enumerate((0.7, 0.2, 0.1))}
    assert late == {1: pytest.approx(0.75, abs=0.011), 2: pytest.approx(0.25, abs=0.011)}
    assert [mix.source_of(sample) for sample in range(50)] != [
        Mix([MixPhase(0, (0.7, 0.2, 0.1))], seed=6).source_of(sample) for sample in range(50)
    ]


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=6).filter(any), st.integers(0, 1 << 62))
def test_a_weight_of_zero_is_never_drawn(weights: list[float], sample: int) -> None:
    mix = Mix([MixPhase(0, tuple(weights))], seed=1)
    assert all(weights[mix.source_of(sample + number)] > 0 for number in range(20))


def test_weights_by_epochs_and_by_temperature() -> None:
    def named(**changes: float) -> list[SourceSettings]:
        return [SourceSettings(name, ("x",), **changes) for name in "ab"]

    assert mix_weights(named(), [100, 400], None) == (0.25, 1.0)
    assert mix_weights(named(), [100, 400], 2.0) == pytest.approx((0.5, 1.0))
    assert mix_weights(named(), [1, 10**15], 0.1) == pytest.approx((0.0, 1.0))
    assert {Mix([MixPhase(0, (1e308, 1e308))], 1).source_of(sample) for sample in range(20)} == {0, 1}
    assert mix_weights(named(epochs=3.0), [100, 400], None) == (300.0, 1200.0)
    assert mix_weights(named(weight=0.5), [100, 400], None) == (0.5, 0.5)
    assert comparable_sizes([None, 7], [10, 20], "ab") == [10, 20]
    assert comparable_sizes([5, 7], [10, 20], "ab") == [5, 7]
    with pytest.raises(DataConfigError, match=r"sizes of a, b cannot be compared.*give each source a weight"):
        comparable_sizes([None, 7], [10, None], "ab")


def test_epochs_read_each_source_as_often_as_asked(text_shards: Path, token_shards: Path, model: Path) -> None:
    """After samples for one pass over "more" and three over "text", each chunk was opened about so often."""
    sources = tuple(
        SourceSettings(name, (str(text_shards / folder),), epochs=epochs)
        for name, folder, epochs in (("more", "heldout", 1.0), ("text", "train", 3.0))
    )
    stream = open_stream([], model, sources=sources, sequence_length=LENGTH, global_batch=8, seed=3)
    for _ in range(200):
        stream.next_batch()
    sizes = [source.text_bytes for source in stream_sources(sources, model)]
    got, _ = stream.take_counts()
    expected = np.array([sizes[0], 3 * sizes[1]]) / (sizes[0] + 3 * sizes[1])
    assert got / got.sum() == pytest.approx(expected, abs=3 * np.sqrt(0.25 / 1600))


def stream_sources(sources: tuple[SourceSettings, ...], model: Path) -> list:
    from basestone.data.stream_settings import OpenedSources, StreamSettings

    return OpenedSources(StreamSettings(sources, str(model), LENGTH, 8, 0)).sources


@pytest.mark.parametrize(("readers", "workers"), [(1, 0), (1, 2), (3, 0), (5, 1)])
def test_any_readers_draw_the_same_mix(
    readers: int, workers: int, text_shards: Path, token_shards: Path, model: Path
) -> None:
    arguments = {
        "sources": sources_of(text_shards, token_shards, text=0.5, tokens=0.3, more=0.2),
        "phases": ((30, {"more": 1.0}),),
        "sequence_length": LENGTH,
        "global_batch": 12,
        "seed": 3,
    }
    single = open_stream([], model, **arguments)
    expected = [single.next_batch() for _ in range(6)]
    assert set(expected[0].sources) == {2} and set(expected[5].sources) == {0, 1, 2}
    streams = [
        open_stream([], model, reader=reader, num_readers=readers, workers=workers, **arguments)
        for reader in range(readers)
    ]
    for want in expected:
        batches = [stream.next_batch() for stream in streams]
        rows = {
            int(number): (batch.sources[row], batch.tokens[row].tolist())
            for batch in batches
            for row, number in enumerate(batch.ids)
            if number >= 0
        }
        assert [rows[int(number)][1] for number in want.ids] == want.tokens.tolist()
        assert [rows[int(number)][0] for number in want.ids] == want.sources.tolist()
    for stream in streams:
        stream.close()


def documents_from(samples: list[list[int]]) -> list[int]:
    """Join a lane's sequences, which share one token each."""
    return [token for number, row in enumerate(samples) for token in (row if not number else row[1:])]


def test_a_mix_may_change_at_a_resume_and_each_source_goes_on_where_it_was(
    text_shards: Path, token_shards: Path, model: Path
) -> None:
    """Weights change, a source goes, another comes, the first comes back: each lane's text has no gap, no repeat."""
    common = {"sequence_length": LENGTH, "global_batch": 6, "seed": 3}
    chain = [{"text": 1.0, "tokens": 1.0}, {"text": 0.2, "tokens": 0.8}, {"tokens": 1.0, "more": 1.0}]
    chain.append({"more": 0.3, "text": 0.5, "tokens": 0.2})
    state, got, names_of_changes = None, {}, []
    for number, weights in enumerate(chain):
        sources = sources_of(text_shards, token_shards, **weights)
        readers = 1 + number
        streams = [
            open_stream([], model, sources=sources, reader=reader, num_readers=readers, state=state, **common)
            for reader in range(readers)
        ]
        names_of_changes.append(streams[0].changes)
        for _ in range(5):
            for stream in streams:
                batch = stream.next_batch()
                for sample, source, row in zip(batch.ids, batch.sources, batch.tokens, strict=True):
                    if sample >= 0:
                        got.setdefault((list(weights)[source], int(sample) % 6), []).append(row.tolist())
        state = json.loads(json.dumps(merge_states([stream.state() for stream in streams])))
    assert names_of_changes == [[], [], ["source more is new", "source text is left out"], []]
    assert state["position"] == 6 * 20
    assert sum(source["samples"] for source in state["sources"]) == 120
    for name in ("text", "tokens", "more"):
        alone = open_stream([], model, sources=sources_of(text_shards, token_shards, **{name: 1.0}), **common)
        lanes: dict[int, list[list[int]]] = {}
        for _ in range(30):
            batch = alone.next_batch()
            for sample, row in zip(batch.ids, batch.tokens, strict=True):
                lanes.setdefault(int(sample) % 6, []).append(row.tolist())
        for (source, lane), rows in got.items():
            if source == name:
                assert documents_from(rows) == documents_from(lanes[lane][: len(rows)])


def test_a_source_is_known_again_under_another_name_but_not_with_other_content(
    text_shards: Path, token_shards: Path, model: Path
) -> None:
    common = {"sequence_length": LENGTH, "global_batch": 6, "seed": 3}
    first = open_stream([text_shards / "train"], model, **common)
    want = [first.next_batch().tokens.tolist() for _ in range(4)]
    again = open_stream([text_shards / "train"], model, **common)
    assert [again.next_batch().tokens.tolist() for _ in range(2)] == want[:2]
    sources = sources_of(text_shards, token_shards, text=1.0, more=0.0)
    renamed = open_stream([], model, sources=sources, state=again.state(), **common)
    assert [renamed.next_batch().tokens.tolist() for _ in range(2)] == want[2:]
    assert renamed.changes == ["source more is new"]
    changed = (SourceSettings("text", (str(text_shards / "heldout"),)),)
    with pytest.raises(
        DataConfigError, match=r"content of the source 'text'.*needs another name in data.sources"
    ):
        open_stream([], model, sources=changed, state=renamed.state(), **common)


def test_the_state_stays_small_with_many_lanes_and_sources(text_shards: Path, model: Path) -> None:
    """2,048 lanes in 10 sources, each far along: under 1 MB, and joined in well under a second."""
    from basestone.data.position import StreamPosition
    from basestone.data.stream_settings import StreamSettings

    names = [f"source-{number}" for number in range(10)]
    settings = StreamSettings(tuple(SourceSettings(name, ("x",)) for name in names), "t", 2048, 2048, 1)
    parts = []
    for reader in range(64):
        lanes = np.arange(reader, 2048, 64)
        position = StreamPosition(settings, names, "sha", lanes, is_first=reader == 0)
        position._cursors[:] = [12_345, 678, 9_012]
        position.sample = 2048 * 1_000_000
        parts.append(position.state())
    merged = merge_states(parts)
    size = len(json.dumps(merged, separators=(",", ":")))
    assert all(len(source["cursors"]) == 2048 for source in merged["sources"]) and 300_000 < size < 1_000_000
