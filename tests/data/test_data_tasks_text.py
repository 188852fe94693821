"""Tasks on text: published rates on real text, the original rebuilt, randomness from the sample's number alone."""

import math
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basestone.data.errors import DataConfigError
from basestone.data.tasks.causal import causal_sample, document_positions
from basestone.data.tasks.masked import MaskRates, MaskVocabulary, mask_tokens
from basestone.data.tasks.sample_random import SampleRandom
from basestone.data.tasks.sentences import (
    EncoderSpecials,
    SentencePair,
    frame_pair,
    full_sentences,
    sentence_pairs,
)
from basestone.data.tasks.spans import (
    Sentinels,
    SpanRates,
    corrupt_spans,
    corrupted_lengths,
    count_spans,
    raw_length,
)
from basestone.data.tasks.vocabulary import sentence_ends, split_sentences, word_starts
from basestone.data.tokenizer import Tokenizer, train_tokenizer

SPECIALS = EncoderSpecials(cls=1, sep=2, pad=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Tokenizer:
    path = tmp_path_factory.mktemp("masks") / "masks.model"
    train_tokenizer(iter(documents), path, vocab_size=700, user_symbols=("<mask>",))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def texts(tokenizer: Tokenizer) -> list[np.ndarray]:
    """Python's documentation topics as tokens."""
    return [tokenizer.encode(text) for text in topics.values()]


@pytest.fixture(scope="module")
def rows(texts: list[np.ndarray]) -> np.ndarray:
    """Some 500 sequences of 256 tokens of real text, each [CLS] text [SEP] and four of padding."""
    joined = np.concatenate(texts)
    blocks = joined[: len(joined) // 250 * 250].reshape(-1, 250)
    ends = np.full((len(blocks), 5), SPECIALS.pad)
    ends[:, 0] = SPECIALS.sep
    return np.concatenate([np.full((len(blocks), 1), SPECIALS.cls), blocks, ends], axis=1)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> MaskVocabulary:
    special = np.zeros(tokenizer.vocab_size, bool)
    special[[tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.pad]] = True
    mask = int(tokenizer.encode("<mask>")[0])
    return MaskVocabulary(mask, special, word_starts(tokenizer.pieces()))


def assert_rate(hits: int, trials: int, rate: float) -> None:
    """Ask that a binomial count lies within five standard deviations: a false alarm in 1.7 million."""
    assert abs(hits - trials * rate) <= 5 * math.sqrt(trials * rate * (1 - rate)), (hits / trials, rate)


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


def test_a_process_with_another_hash_seed_draws_the_same(rows: np.ndarray, vocabulary: MaskVocabulary) -> None:
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


# --- causal


def test_labels_are_one_further_on() -> None:
    sample = causal_sample(np.arange(10, 17))
    assert sample.tokens.tolist() == [10, 11, 12, 13, 14, 15] and sample.labels.tolist() == [
        11,
        12,
        13,
        14,
        15,
        16,
    ]
    assert sample.weights.tolist() == [1] * 6 and sample.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert sample.segments.tolist() == [1] * 6
    assert sample.tokens.dtype == sample.labels.dtype == sample.positions.dtype == "int32"


def test_documents_and_padding_in_a_row() -> None:
    row = np.array([5, 6, 7, 8, 9, 0, 0])
    sample = causal_sample(row, [2, 3], across_documents=False)
    assert sample.segments.tolist() == [1, 1, 2, 2, 2, 0]
    assert sample.positions.tolist() == [0, 1, 0, 1, 2, 0]
    assert sample.weights.tolist() == [1, 0, 1, 1, 0, 0]
    assert causal_sample(row, [2, 3]).weights.tolist() == [1, 1, 1, 1, 0, 0]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.booleans())
def test_weights_count_what_can_be_predicted(lengths: list[int], padding: int, across: bool) -> None:
    row = np.arange(sum(lengths) + padding)
    sample = causal_sample(row, lengths, across_documents=across)
    assert sample.weights.sum() == (sum(lengths) - 1 if across else sum(lengths) - len(lengths))
    assert document_positions(lengths, len(row)).tolist() == [
        place for length in [*lengths, padding] for place in range(length)
    ]
    for number, length in enumerate(lengths, start=1):
        assert (sample.segments == number).sum() == length


# --- masked


def test_published_rates(rows: np.ndarray, vocabulary: MaskVocabulary) -> None:
    eligible = ~vocabulary.special[rows]
    samples = [mask_tokens(row, vocabulary, SampleRandom(1, number)) for number, row in enumerate(rows)]
    tokens, weights = np.stack([s.tokens for s in samples]), np.stack([s.weights for s in samples]).astype(bool)
    # the count of each row is its mean rounded up or down, so the sum varies by at most 1/2 a row (one deviation)
    wanted = 0.15 * eligible.sum()
    assert abs(weights.sum() - wanted) <= 5 * 0.5 * math.sqrt(len(rows))
    assert not (weights & ~eligible).any()
    predicted = int(weights.sum())
    assert predicted > 15_000
    masked = weights & (tokens == vocabulary.mask)
    changed = weights & (tokens != vocabulary.mask) & (tokens != rows)
    assert_rate(int(masked.sum()), predicted, 0.8)
    # a random token is the old one once in a vocabulary
    share = 1 - 1 / len(vocabulary.replacements)
    assert_rate(int(changed.sum()), predicted, 0.1 * share)
    assert_rate(int((weights & (tokens == rows)).sum()), predicted, 0.2 - 0.1 * share)
    assert (tokens[~weights] == rows[~weights]).all()
    assert not vocabulary.special[tokens[changed]].any()
    # every token and every place is as likely as any other
    by_place = weights[:, 1:251].sum(axis=0)
    for place in (0, 124, 249):
        assert_rate(int(by_place[place]), int(eligible[:, place + 1].sum()), 0.15)


def test_rates_are_those_of_hugging_face(
    rows: np.ndarray, vocabulary: MaskVocabulary, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Two shares of the same numbers: their difference lies within five deviations of a difference."""
    transformers = pytest.importorskip("transformers")
    from basestone.data.hf_tokenizer import write_hf_tokenizer

    write_hf_tokenizer(tokenizer.path, tmp_path / "hf", model_max_length=256)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", mask_token="<mask>")
    collator = transformers.DataCollatorForLanguageModeling(theirs, return_tensors="np", seed=5)
    batch = collator([{"input_ids": row.tolist()} for row in rows])
    samples = [mask_tokens(row, vocabulary, SampleRandom(2, number)) for number, row in enumerate(rows)]
    ours_tokens = np.stack([s.tokens for s in samples])
    ours_weights = np.stack([s.weights for s in samples]).astype(bool)
    their_weights = batch["labels"] != -100
    eligible = int((~vocabulary.special[rows]).sum())
    assert not (their_weights & vocabulary.special[rows]).any()

    def compare(ours: np.ndarray, theirs: np.ndarray, our_trials: int, their_trials: int) -> None:
        rates = ours.sum() / our_trials, theirs.sum() / their_trials
        middle = sum(rates) / 2
        deviation = math.sqrt(middle * (1 - middle) * (1 / our_trials + 1 / their_trials))
        assert abs(rates[0] - rates[1]) <= 5 * deviation, rates

    compare(ours_weights, their_weights, eligible, eligible)
    ours_n, theirs_n = int(ours_weights.sum()), int(their_weights.sum())
    mask = vocabulary.mask
    compare(
        ours_weights & (ours_tokens == mask), their_weights & (batch["input_ids"] == mask), ours_n, theirs_n
    )
    compare(
        ours_weights & (ours_tokens == rows), their_weights & (batch["input_ids"] == rows), ours_n, theirs_n
    )


def _words(row: np.ndarray, vocabulary: MaskVocabulary) -> np.ndarray:
    """Number the words of a row; specials have -1."""
    numbers, number, after_special = [], -1, True
    for token in row:
        if vocabulary.special[token]:
            numbers.append(-1)
            after_special = True
            continue
        if after_special or vocabulary.word_starts[token]:
            number += 1
        after_special = False
        numbers.append(number)
    return np.array(numbers)


def test_whole_words_are_hidden_or_not(rows: np.ndarray, vocabulary: MaskVocabulary) -> None:
    rates = MaskRates(whole_words=True)
    share = []
    for number, row in enumerate(rows[:200]):
        weights = mask_tokens(row, vocabulary, SampleRandom(3, number), rates).weights.astype(bool)
        words = _words(row, vocabulary)
        for word in set(words[weights]):
            assert word >= 0 and weights[words == word].all()
        wanted = 0.15 * (words >= 0).sum()
        assert weights.sum() <= wanted + 1
        share.append(weights.sum() / wanted)
    # what is missing is less than the shortest word that was passed over
    assert np.mean(share) > 0.97


def test_whole_words_need_their_table(rows: np.ndarray, vocabulary: MaskVocabulary) -> None:
    plain = MaskVocabulary(vocabulary.mask, vocabulary.special)
    with pytest.raises(DataConfigError, match="whole words need the table"):
        mask_tokens(rows[0], plain, SampleRandom(0, 0), MaskRates(whole_words=True))


def test_word_starts_are_blanks(tokenizer: Tokenizer) -> None:
    starts = word_starts(tokenizer.pieces())
    tokens = tokenizer.encode("the function calls\n\tx = 1")
    words = "".join("|" * bool(starts[t]) + tokenizer.pieces()[t].decode() for t in tokens)
    assert words == "the| function| calls|\n|\tx| =| 1"


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 49), min_size=1, max_size=80),
    st.integers(0, 1 << 40),
    st.booleans(),
    st.none() | st.integers(1, 6),
)
def test_masking_properties(tokens: list[int], sample: int, whole: bool, limit: int | None) -> None:
    special = np.arange(50) < 5
    vocabulary = MaskVocabulary(5, special, np.arange(50) % 3 == 0)
    rates = MaskRates(whole_words=whole, max_predictions=limit)
    row = np.array(tokens)
    found = mask_tokens(row, vocabulary, SampleRandom(9, sample), rates)
    again = mask_tokens(row, vocabulary, SampleRandom(9, sample), rates)
    assert found.tokens.tolist() == again.tokens.tolist() and found.weights.tolist() == again.weights.tolist()
    assert found.labels.tolist() == tokens and row.tolist() == tokens
    assert (found.tokens[found.weights == 0] == row[found.weights == 0]).all()
    eligible = int((row > 5).sum())
    assert not found.weights[row <= 5].any()
    assert found.weights.sum() <= min(limit or eligible, max(1, math.ceil(0.15 * eligible)))
    if eligible and not whole:
        assert found.weights.sum() >= 1


def test_a_mask_in_the_text_is_left_alone_and_never_drawn() -> None:
    vocabulary = MaskVocabulary(5, np.arange(8) < 5)
    row = np.array([5, 6, 5, 7] * 30)
    for sample in range(200):
        found = mask_tokens(row, vocabulary, SampleRandom(4, sample), MaskRates(masked=0, replaced=1))
        assert not found.weights[row == 5].any() and set(found.tokens[row != 5]) <= {6, 7}


def test_a_word_ends_at_a_special() -> None:
    """Tokens 6 to 9 continue a word; behind the special in the middle another begins."""
    vocabulary = MaskVocabulary(5, np.arange(10) < 5, np.zeros(10, bool))
    row = np.array([6, 7, 1, 8, 9])
    seen = {
        tuple(mask_tokens(row, vocabulary, SampleRandom(4, n), MaskRates(0.5, whole_words=True)).weights)
        for n in range(50)
    }
    assert seen == {(1, 1, 0, 0, 0), (0, 0, 0, 1, 1)}


def test_mask_mistakes_are_named() -> None:
    with pytest.raises(DataConfigError, match=r"predicted 0\.15, masked 0\.9, replaced 0\.2; .* at most 1"):
        MaskRates(masked=0.9, replaced=0.2)
    with pytest.raises(DataConfigError, match="max_predictions is 0"):
        MaskRates(max_predictions=0)
    for name in ("predicted", "masked", "replaced"):
        with pytest.raises(DataConfigError, match=r"mask rates are .*nan"):
            MaskRates(**{name: math.nan})
    with pytest.raises(DataConfigError, match="mask's id is 9, the vocabulary has 4 tokens; train"):
        MaskVocabulary(9, np.zeros(4, bool))
    with pytest.raises(DataConfigError, match="word starts has 3 entries, the vocabulary 4"):
        MaskVocabulary(1, np.zeros(4, bool), np.zeros(3, bool))
    with pytest.raises(DataConfigError, match="every token of the vocabulary is special"):
        MaskVocabulary(1, np.ones(4, bool))


# --- sentences and pairs


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


@given(
    st.lists(st.lists(st.integers(1, 15), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(3, 20)
)
def test_full_sentences_keep_every_token(documents: list[list[int]], length: int) -> None:
    counter = iter(range(10, 10_000))
    built = [[np.array([next(counter) for _ in range(n)]) for n in sentences] for sentences in documents]
    rows = list(full_sentences(built, length, SPECIALS))
    text = np.concatenate([row.tokens[row.tokens >= 10] for row in rows])
    assert text.tolist() == list(range(10, 10 + sum(map(sum, documents))))
    for row in rows:
        tokens = row.tokens[: row.num_tokens]
        assert tokens[0] == SPECIALS.cls and tokens[-1] == SPECIALS.sep and tokens[-2] != SPECIALS.sep
        assert (row.tokens[row.num_tokens :] == SPECIALS.pad).all() and not row.segments.any()


def test_full_sentences_mark_documents() -> None:
    documents = [[np.array([10, 11]), np.array([12])], [np.array([20, 21])], [np.array([30, 31, 32])]]
    rows = list(full_sentences(documents, 8, SPECIALS))
    assert [row.tokens.tolist() for row in rows] == [
        [1, 10, 11, 12, 2, 20, 21, 2],
        [1, 30, 31, 32, 2, 3, 3, 3],
    ]


def test_empty_documents_leave_no_trace() -> None:
    document, empty = [np.array([10])], []
    wanted = [row.tokens.tolist() for row in full_sentences([document, document], 8, SPECIALS)]
    assert wanted == [[1, 10, 2, 10, 2, 3, 3, 3]]
    for documents in (
        [document, empty, empty, document],
        [empty, document, document, empty, empty],
        [document, empty, document],
    ):
        assert [row.tokens.tolist() for row in full_sentences(documents, 8, SPECIALS)] == wanted
    assert not list(full_sentences([empty, empty], 8, SPECIALS))


def test_sentence_mistakes_are_named() -> None:
    document = [np.array([10])]
    with pytest.raises(DataConfigError, match="pairs need a second document"):
        sentence_pairs(document, [], SampleRandom(0, 0), max_tokens=10)
    with pytest.raises(DataConfigError, match="room for 1 tokens"):
        sentence_pairs(document, [document], SampleRandom(0, 0), max_tokens=1)
    with pytest.raises(DataConfigError, match="rows have 2 tokens; at least 3"):
        list(full_sentences([document], 2, SPECIALS))


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
