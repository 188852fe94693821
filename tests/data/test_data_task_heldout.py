"""Held-out sets of tasks: every document once, and the same draws whatever the run's seed."""

from pathlib import Path

import numpy as np
import pytest
from task_streams import CASES, LENGTH, case_task

from basestone.data.errors import DataConfigError
from basestone.data.heldout import HeldOutSet, load_heldout
from basestone.data.shards import open_shard_set
from basestone.data.tokenizer import Tokenizer

MANY = 1 << 20


@pytest.fixture
def texts(text_shards: Path) -> list[str]:
    opened = open_shard_set(text_shards / "heldout")
    return [text for chunk in range(opened.num_chunks) for text in opened.read_documents(chunk)]


def load(case: str, shards: Path, model: Path, *, seed: int = 7, length: int = LENGTH) -> HeldOutSet:
    return load_heldout(
        shards / "heldout", model, case_task(case, model, seed=seed, length=length), max_tokens=MANY
    )


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_evaluation_draws_the_same(
    case: str, text_shards: Path, pair_shards: Path, symbols_model: Path
) -> None:
    shards = pair_shards if case == "given" else text_shards
    found, again = (load(case, shards, symbols_model, seed=seed) for seed in (7, 8))
    task = case_task(case, symbols_model)
    rows = len(found.arrays["tokens"])
    assert {name: field.shape for name, field in found.arrays.items()} == {
        name: (rows, columns) for name, columns in task.widths.items()
    }
    assert all(field.dtype == np.int32 for field in found.arrays.values()) and rows > 5
    assert all(np.array_equal(found.arrays[name], again.arrays[name]) for name in found.arrays)
    assert all(found.arrays[name].any() for name in {"weights", "real", "marks"} & set(task.widths))


def test_masked_sets_hold_every_token_once(texts: list[str], text_shards: Path, symbols_model: Path) -> None:
    tokenizer = Tokenizer(symbols_model)
    sep = tokenizer.token_id("[SEP]")
    found = load("masked", text_shards, symbols_model)
    framed = np.concatenate([tokenizer.encode_document(text) for text in texts])
    framed[(framed == tokenizer.bos) | (framed == tokenizer.eos)] = sep
    parts = [
        row[1 : length - 1]
        for row, (length,) in zip(found.arrays["labels"], found.arrays["length"], strict=True)
    ]
    assert np.concatenate(parts).tolist() == framed.tolist()
    assert (found.num_bytes, found.num_documents) == (sum(len(t.encode()) for t in texts), len(texts))
    assert {len(part) for part in parts[:-1]} == {LENGTH - 2} and 0 < len(parts[-1]) <= LENGTH - 2
    assert 0.13 < found.arrays["weights"].sum() / len(framed) < 0.17


def test_whole_documents_are_all_there(texts: list[str], text_shards: Path, symbols_model: Path) -> None:
    tokenizer = Tokenizer(symbols_model)
    found = load("whole documents", text_shards, symbols_model)
    specials = [tokenizer.pad, tokenizer.token_id("[CLS]"), tokenizer.token_id("[SEP]")]
    text = found.arrays["labels"][~np.isin(found.arrays["labels"], specials)]
    expected = np.concatenate([tokenizer.encode(text) for text in texts])
    assert sorted(text.tolist()) == sorted(expected.tolist())


def test_spans_hold_every_token_once(texts: list[str], text_shards: Path, symbols_model: Path) -> None:
    tokenizer = Tokenizer(symbols_model)
    found = load("spans", text_shards, symbols_model).arrays
    sentinels = [tokenizer.token_id(f"<extra_id_{number}>") for number in range(30)]
    inputs = np.concatenate(
        [row[: length - 1] for row, (length,) in zip(found["tokens"], found["length"], strict=True) if length]
    )
    targets = np.concatenate(
        [row[: weights.sum() - 1] for row, weights in zip(found["labels"], found["weights"], strict=True)]
    )
    both = np.concatenate([inputs, targets])
    expected = np.concatenate([tokenizer.encode_document(text)[1:] for text in texts])
    # of the last row one token may be left, which predicts nothing
    missing = len(expected) - int((~np.isin(both, sentinels)).sum())
    assert missing in (0, 1)
    assert sorted(both[~np.isin(both, sentinels)].tolist()) == sorted(
        expected[: len(expected) - missing].tolist()
    )


def test_passages_in_order_are_the_documents(texts: list[str], text_shards: Path, symbols_model: Path) -> None:
    tokenizer = Tokenizer(symbols_model)
    found = load("dropout", text_shards, symbols_model).arrays
    parts = [row[1 : length - 1] for row, (length,) in zip(found["tokens"], found["length"], strict=True)]
    expected = np.concatenate([tokenizer.encode(text) for text in texts])
    assert np.concatenate(parts).tolist() == expected.tolist() and found["real"].all()


def test_pairs_of_a_held_out_set(text_shards: Path, symbols_model: Path) -> None:
    task = case_task("next sentence", symbols_model)
    found, never = (
        load_heldout(
            text_shards / "heldout", symbols_model, task, max_tokens=MANY, short_fraction=fraction
        ).arrays
        for fraction in (0.9, 0.0)
    )
    assert 0.2 < found["next_label"].mean() < 0.8 and found["real"].all()
    assert found["length"].mean() < never["length"].mean()


def test_sets_that_give_nothing_are_named(pair_shards: Path, text_shards: Path, symbols_model: Path) -> None:
    task = case_task("masked", symbols_model)
    with pytest.raises(DataConfigError, match="no document fits into 2 tokens; allow more"):
        load_heldout(text_shards / "heldout", symbols_model, task, max_tokens=2)
    with pytest.raises(DataConfigError, match=r"two texts with U\+001F between them"):
        load("given", text_shards, symbols_model)
    sizes = {
        len(Tokenizer(symbols_model).encode_document(text))
        for text in open_shard_set(text_shards / "heldout").read_documents(0)
    }
    with pytest.raises(DataConfigError, match="sentence pairs need a second document"):
        load_heldout(
            text_shards / "heldout",
            symbols_model,
            case_task("next sentence", symbols_model),
            max_tokens=min(sizes),
        )
