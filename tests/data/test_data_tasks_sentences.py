"""Sentences and pairs of them: where they end, what follows what, how they are framed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rates import SPECIALS, assert_rate

from basestone.data.errors import DataConfigError
from basestone.data.tasks.sample_random import SampleRandom
from basestone.data.tasks.sentences import (
    SentencePair,
    frame_pair,
    sentence_pairs,
)
from basestone.data.tasks.vocabulary import sentence_ends, split_sentences, word_starts
from basestone.data.tokenizer import Tokenizer


def _sentences(tokenizer: Tokenizer, texts: list[np.ndarray]) -> list[list[np.ndarray]]:
    pieces = tokenizer.pieces()
    starts, ends = word_starts(pieces), sentence_ends(pieces)
    return [split_sentences(tokens, starts, ends) for tokens in texts]


def test_sentences_end_where_they_do(tokenizer: Tokenizer) -> None:
    text = "It is 3.14 here. Is it so? Yes!\nA new line\n\nx = 1"
    (sentences,) = _sentences(tokenizer, [tokenizer.encode(text)])
    assert [tokenizer.decode(sentence) for sentence in sentences] == [
        "It is 3.14 here.",
        " Is it so?",
        " Yes!\n",
        "A new line\n\n",
        "x = 1",
    ]


def test_sentences_join_to_the_text(tokenizer: Tokenizer, texts: list[np.ndarray]) -> None:
    for tokens, sentences in zip(texts, _sentences(tokenizer, texts), strict=True):
        assert np.array_equal(np.concatenate(sentences), tokens)
    assert np.mean([len(s) for s in _sentences(tokenizer, texts)]) > 10


def _find(part: np.ndarray, whole: np.ndarray) -> bool:
    return part.astype(np.int32).tobytes() in whole.astype(np.int32).tobytes()


def test_half_of_the_pairs_follow(tokenizer: Tokenizer, texts: list[np.ndarray]) -> None:
    documents = [sentences for sentences in _sentences(tokenizer, texts) if len(sentences) > 30]
    assert len(documents) > 40
    num_next = trials = short = 0
    for number, document in enumerate(documents):
        others = documents[:number] + documents[number + 1 :]
        pairs = sentence_pairs(document, others[:3], SampleRandom(6, number), max_tokens=125)
        whole = np.concatenate(document)
        for pair in pairs[:-1]:
            size = len(pair.first) + len(pair.second)
            assert size <= 125 and len(pair.first) and len(pair.second)
            if pair.is_next:
                assert _find(pair.first, whole) and _find(pair.second, whole)
                num_next += 1
            else:
                assert any(_find(pair.second, np.concatenate(other)) for other in others[:3])
            trials += 1
            short += size < 60
    # pairs of one sentence, at most as many as begin with a target that one sentence fills, never follow
    assert trials > 1000 and 0.3 < num_next / trials < 0.5
    assert 0.02 < short / trials < 0.25


def test_half_of_the_pairs_follow_exactly_where_sentences_are_many() -> None:
    documents = [[np.array([10 * n + k]) for k in range(10)] * 60 for n in (1, 2)]
    follows = []
    for sample in range(60):
        pairs = sentence_pairs(
            documents[0], documents[1:], SampleRandom(8, sample), max_tokens=20, short_fraction=0
        )
        follows += [pair.is_next for pair in pairs[:-2]]
        for pair in pairs:
            assert set(pair.second // 10) == ({1} if pair.is_next else {2})
    assert_rate(sum(follows), len(follows), 0.5)


def test_each_sentence_of_a_document_is_used() -> None:
    document = [np.arange(10 * n, 10 * n + 7) for n in range(40)]
    pairs = sentence_pairs(document, [[np.array([999])]], SampleRandom(1, 1), max_tokens=1000)
    used = np.concatenate([np.concatenate([p.first, p.second] if p.is_next else [p.first]) for p in pairs])
    assert used.tolist() == np.concatenate(document).tolist()


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [(90, 10, (40, 10)), (10, 90, (10, 40)), (60, 60, (25, 25)), (60, 30, (25, 25)), (30, 60, (25, 25))],
)
def test_the_longer_part_is_cut(first: int, second: int, left: tuple[int, int]) -> None:
    for sample in range(20):
        (pair,) = sentence_pairs(
            [np.arange(first)],
            [[np.arange(1000, 1000 + second)]],
            SampleRandom(3, sample),
            max_tokens=50,
            short_fraction=0,
        )
        assert (len(pair.first), len(pair.second)) == left


def test_pairs_are_framed() -> None:
    pair = SentencePair(np.array([10, 11]), np.array([12]), True)
    row = frame_pair(pair, 9, SPECIALS)
    assert row.tokens.tolist() == [1, 10, 11, 2, 12, 2, 3, 3, 3]
    assert row.segments.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0] and row.num_tokens == 6


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(2, 50),
    st.integers(0, 1 << 30),
)
def test_pair_properties(lengths: list[int], other: list[int], limit: int, sample: int) -> None:
    places = np.split(np.arange(1000, 1000 + sum(lengths)), np.cumsum(lengths)[:-1])
    elsewhere = np.split(np.arange(5000, 5000 + sum(other)), np.cumsum(other)[:-1])
    pairs = sentence_pairs(places, [elsewhere], SampleRandom(2, sample), max_tokens=limit)
    for pair in pairs:
        assert len(pair.first) and len(pair.second) and len(pair.first) + len(pair.second) <= limit
        assert (np.diff(pair.first) == 1).all() and (np.diff(pair.second) == 1).all()
        assert (pair.second[0] < 5000) == pair.is_next and pair.first[0] < 5000
        row = frame_pair(pair, limit + 3, SPECIALS)
        assert np.array_equal(row.tokens[1 : len(pair.first) + 1], pair.first)
        assert (row.tokens[row.num_tokens :] == SPECIALS.pad).all()


def test_sentence_mistakes_are_named() -> None:
    document = [np.array([10])]
    with pytest.raises(DataConfigError, match="pairs need a second document"):
        sentence_pairs(document, [], SampleRandom(0, 0), max_tokens=10)
    with pytest.raises(DataConfigError, match="room for 1 tokens"):
        sentence_pairs(document, [document], SampleRandom(0, 0), max_tokens=1)
