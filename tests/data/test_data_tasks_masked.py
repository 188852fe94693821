"""Masking: published rates on real text, whole words, mistakes named."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rates import SPECIALS, assert_rate

from basestone.data.errors import DataConfigError
from basestone.data.tasks.masked import MaskRates, MaskVocabulary, mask_tokens
from basestone.data.tasks.sample_random import SampleRandom
from basestone.data.tasks.vocabulary import word_starts
from basestone.data.tokenizer import Tokenizer


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
