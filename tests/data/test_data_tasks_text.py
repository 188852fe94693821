"""Span tasks on text: the original rebuilt, randomness from the sample's number alone."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rates import assert_rate

from basestone.data.errors import DataConfigError
from basestone.data.tasks.sample_random import SampleRandom
from basestone.data.tasks.spans import (
    Sentinels,
    SpanRates,
    corrupt_spans,
    corrupted_lengths,
    count_spans,
    raw_length,
)

# --- randomness


def test_golden_numbers() -> None:
    random = SampleRandom(7, 123456789)
    assert random.integers(1000, 6).tolist() == [72, 722, 209, 520, 891, 359]
    assert random.permutation(8).tolist() == [0, 5, 7, 2, 6, 3, 4, 1]
    assert random.uniform() == 0.4071373711929046


def test_streams_differ_by_seed_and_sample() -> None:
    first = [
        SampleRandom(seed, sample).uniform()
        for seed in (0, 1, -1, 1 << 63)
        for sample in (0, 1, 2, 1 << 40, -1)
    ]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("integer", [np.int8, np.int32, np.int64, np.uint32, np.uint64])
def test_integers_of_any_type_begin_the_same_stream(integer: type) -> None:
    assert SampleRandom(integer(0), integer(5)).uniform() == SampleRandom(0, 5).uniform()
    assert SampleRandom(0, integer(5)).uniform() != SampleRandom(0, 6).uniform()
    if integer in (np.int32, np.int64):
        assert SampleRandom(integer(-3), integer(-1)).uniform() == SampleRandom(-3, (1 << 64) - 1).uniform()


def test_ids_of_the_whole_range_are_taken() -> None:
    large = [SampleRandom(0, number).uniform() for number in (1 << 63, (1 << 63) + 1, (1 << 64) - 1, 0, 1)]
    assert len(set(large)) == len(large)
    for number in (1 << 63, (1 << 63) + 1, (1 << 64) - 1):
        assert (
            SampleRandom(np.uint64(number), np.uint64(number)).uniform()
            == SampleRandom(number, number).uniform()
        )
    with pytest.raises(TypeError):
        SampleRandom(0, 5.0)  # type: ignore[arg-type]


def test_numbers_are_uniform() -> None:
    draws = np.concatenate([SampleRandom(3, sample).integers(10, 100) for sample in range(1000)])
    for value in range(10):
        assert_rate(int((draws == value).sum()), len(draws), 0.1)
    first_places = [int(SampleRandom(4, sample).permutation(5)[0]) for sample in range(20_000)]
    for value in range(5):
        assert_rate(first_places.count(value), 20_000, 0.2)
    assert SampleRandom(0, 0).uniforms(0).shape == (0,)
    numbers = SampleRandom(5, 0).uniforms(100_000)
    assert numbers.min() >= 0 and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 5 / math.sqrt(12 * 100_000)


def test_a_process_with_another_hash_seed_draws_the_same() -> None:
    code = (
        "from basestone.data.tasks.sample_random import SampleRandom as R;"
        "print([R(11, i).permutation(50).tolist() for i in range(20)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{[SampleRandom(11, i).permutation(50).tolist() for i in range(20)]}\n"}


# --- spans


def _rebuild(inputs: np.ndarray, targets: np.ndarray, sentinels: Sentinels, eos: int) -> list[int]:
    """Put each span of the targets in the place of its sentinel in the inputs."""
    assert inputs[-1] == eos and targets[-1] == eos
    lowest = sentinels.first - sentinels.count + 1
    spans: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if lowest <= token <= sentinels.first:
            spans[token] = []
            current = token
        else:
            spans[current].append(token)
    assert list(spans) == list(range(sentinels.first, sentinels.first - len(spans), -1))
    rebuilt: list[int] = []
    for token in inputs[:-1].tolist():
        rebuilt += spans.pop(token) if lowest <= token <= sentinels.first else [token]
    assert not spans
    return rebuilt


@settings(deadline=None)
@given(
    st.lists(st.integers(2, 500), min_size=2, max_size=400),
    st.integers(0, 1 << 50),
    st.sampled_from([0.1, 0.15, 0.5, 0.9]),
    st.sampled_from([1.0, 2.0, 3.0, 10.0]),
)
def test_spans_rebuild_the_text(tokens: list[int], sample: int, noise: float, mean: float) -> None:
    rates, sentinels = SpanRates(noise, mean), Sentinels(999, 400)
    found = corrupt_spans(np.array(tokens), sentinels, 1, SampleRandom(3, sample), rates)
    assert _rebuild(found.inputs, found.targets, sentinels, 1) == tokens
    assert (len(found.inputs), len(found.targets)) == corrupted_lengths(len(tokens), rates)
    again = corrupt_spans(np.array(tokens), sentinels, 1, SampleRandom(3, sample), rates)
    assert again.inputs.tolist() == found.inputs.tolist()


def test_published_lengths() -> None:
    """Inputs of 512 take 568 tokens and give targets of 114, as published; shorter ones likewise by its formula."""
    rates = SpanRates()
    assert raw_length(512, rates) == (568, 114)
    assert corrupted_lengths(568, rates) == (512, 114)
    for inputs_length in (3, 10, 128, 256, 1024, 2048):
        num_tokens, targets_length = raw_length(inputs_length, rates)
        assert (
            corrupted_lengths(num_tokens, rates)[0]
            <= inputs_length
            < corrupted_lengths(num_tokens + 1, rates)[0]
        )
        assert targets_length == corrupted_lengths(num_tokens, rates)[1]


def test_published_noise_on_real_text(texts: list[np.ndarray]) -> None:
    joined = np.concatenate(texts)
    blocks = joined[: len(joined) // 568 * 568].reshape(-1, 568)
    sentinels = Sentinels(5000, 100)
    noise_places = np.zeros(568, int)
    for number, block in enumerate(blocks):
        found = corrupt_spans(block, sentinels, 2, SampleRandom(4, number))
        assert found.inputs.shape == (512,) and found.targets.shape == (114,)
        kept, noise = (
            np.diff(np.flatnonzero(part > 4900), **border) - 1
            for part, border in ((found.inputs, {"prepend": -1}), (found.targets[:-1], {"append": 113}))
        )
        assert len(kept) == len(noise) == 28 and noise.sum() == 85  # 15 % of 568, in spans of 3
        noise_places += np.repeat(np.tile([0, 1], 28), np.stack([kept, noise], axis=1).ravel())
    # in the middle each place is noise with the same probability; the first never is, the last always
    assert noise_places[0] == 0 and noise_places[-1] == len(blocks)
    assert_rate(int(noise_places[100:468].sum()), 368 * len(blocks), 85 / 568)


def test_every_cut_is_as_likely() -> None:
    """Six tokens, half noise, spans of 1.5: 3 kept in 2 parts and 3 noise in 2 parts, two ways each."""
    rates = SpanRates(0.5, 1.5)
    assert count_spans(6, rates) == (3, 2)
    seen = [
        tuple(corrupt_spans(np.arange(6), Sentinels(99, 9), 50, SampleRandom(0, n), rates).inputs)
        for n in range(8000)
    ]
    assert len(set(seen)) == 4
    for pattern in set(seen):
        assert_rate(seen.count(pattern), len(seen), 0.25)


def test_span_mistakes_are_named() -> None:
    with pytest.raises(DataConfigError, match=r"noise 1\.5 and mean span 3"):
        SpanRates(1.5)
    for rates in ((math.nan, 3.0), (0.15, math.nan), (0.15, math.inf)):
        with pytest.raises(DataConfigError, match=r"span rates are noise .* at least 1, and finite"):
            SpanRates(*rates)
    with pytest.raises(DataConfigError, match="5 sentinels cannot go down from id 3"):
        Sentinels(3, 5)
    with pytest.raises(DataConfigError, match="200 tokens have 10 spans, the tokenizer 4 sentinels"):
        corrupt_spans(np.arange(200), Sentinels(900, 4), 1, SampleRandom(0, 0))
    with pytest.raises(DataConfigError, match="inputs of 2 tokens hold no text"):
        raw_length(2, SpanRates())
