"""Tasks on a stream: the same samples for any readers, workers and resumes, and what is in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_streams import LENGTH, case_task, checked_arrays, close, take_samples, task_streams

from basestone.data.position import merge_states
from basestone.data.shards import open_shard_set
from basestone.data.tasks.task import Task
from basestone.data.tokenizer import Tokenizer

BATCHES = 8


@pytest.fixture
def task(case: str, symbols_model: Path) -> Task:
    return case_task(case, symbols_model)


def one_reader(task: Task, shards: Path, model: Path, count: int = BATCHES) -> dict[int, dict[str, list[int]]]:
    return take_samples(task, task_streams(task, shards, model), count)


def check_readers(task: Task, shards: Path, model: Path, readers: int, workers: int) -> None:
    expected = one_reader(task, shards, model)
    streams = task_streams(task, shards, model, readers, workers=workers)
    try:
        assert take_samples(task, streams, BATCHES // 2) == {n: expected[n] for n in range(BATCHES // 2 * 12)}
        state = json.loads(json.dumps(merge_states([stream.state() for stream in streams])))
    finally:
        close(streams)
    resumed = task_streams(task, shards, model, 5 - readers, state=state)
    rest = {n: expected[n] for n in range(BATCHES // 2 * 12, BATCHES * 12)}
    assert take_samples(task, resumed, BATCHES // 2) == rest


@pytest.mark.parametrize(("readers", "workers"), [(2, 0), (4, 0), (1, 1)])
def test_samples_are_the_same_for_any_readers_and_after_a_resume(
    readers: int, workers: int, task: Task, shards: Path, symbols_model: Path
) -> None:
    check_readers(task, shards, symbols_model, readers, workers)


@pytest.mark.slow
@pytest.mark.parametrize(("readers", "workers"), [(1, 3), (2, 1), (2, 3), (4, 1), (4, 3)])
def test_samples_are_the_same_for_many_workers_and_after_a_resume(
    readers: int, workers: int, task: Task, shards: Path, symbols_model: Path
) -> None:
    check_readers(task, shards, symbols_model, readers, workers)


def test_a_resume_may_come_after_any_batch(task: Task, shards: Path, symbols_model: Path) -> None:
    expected = one_reader(task, shards, symbols_model)
    samples, state = {}, None
    for _ in range(BATCHES):
        (stream,) = task_streams(task, shards, symbols_model, state=state)
        samples |= take_samples(task, [stream], 1)
        state = stream.state()
    assert samples == expected


def test_the_seed_decides_what_is_drawn(case: str, task: Task, shards: Path, symbols_model: Path) -> None:
    (stream,) = task_streams(task, shards, symbols_model)
    batch = stream.next_batch()
    ours, again, other = (made.arrays(batch) for made in (task, task.reseeded(7), task.reseeded(8)))
    assert all(np.array_equal(ours[name], again[name]) for name in ours)
    drawn = case in ("masked", "whole documents", "next sentence", "spans")
    assert drawn != all(np.array_equal(ours[name], other[name]) for name in ours)


def test_filler_is_padding_that_counts_nothing(task: Task, shards: Path, symbols_model: Path) -> None:
    pad = Tokenizer(symbols_model).pad
    streams = task_streams(task, shards, symbols_model, 8, batch=6)
    filled = 0
    for stream in streams:
        batch = stream.next_batch()
        arrays = checked_arrays(task, batch)
        for row in np.flatnonzero(batch.ids < 0):
            filled += 1
            for name, field in arrays.items():
                assert (field[row] == (pad if "tokens" in name or name == "labels" else 0)).all(), name
    assert filled == 2


# --- what is in the samples


def raw_rows(
    shards: Path, model: Path, task: Task, count: int = BATCHES
) -> dict[int, tuple[list[int], list[bool]]]:
    """The rows that a task was given, without padding, and where documents begin in them."""
    (stream,) = task_streams(task, shards, model)
    rows = {}
    for _ in range(count):
        batch = stream.next_batch()
        for row, number in enumerate(batch.ids.tolist()):
            length = int(batch.lengths[row])
            assert length == int(batch.weights[row].sum()) + 1
            rows[number] = batch.tokens[row, :length].tolist(), batch.starts[row].tolist()
    return rows


def unpadded(sample: dict[str, list[int]], name: str = "labels") -> list[int]:
    length = sample["length" if not name.startswith("other") else "other_length"][0]
    return sample[name][:length]


def document_tokens(shards: Path, tokenizer: Tokenizer) -> list[bytes]:
    """Every document's tokens, as bytes to look for a run of tokens in."""
    opened = open_shard_set(shards)
    texts = [text for chunk in range(opened.num_chunks) for text in opened.read_documents(chunk)]
    return [tokenizer.encode(text).astype("<u4").tobytes() for text in texts]


def holds(document: bytes, *parts: list[int]) -> bool:
    """Tell whether the parts stand in a document one after another."""
    place = 0
    for part in parts:
        wanted = np.array(part, "<u4").tobytes()
        while (place := document.find(wanted, place)) % 4 and place >= 0:
            place += 1
        if place < 0:
            return False
        place += len(wanted)
    return True


def test_causal_samples_are_the_stream_as_it_is(text_shards: Path, symbols_model: Path) -> None:
    task = case_task("causal", symbols_model)
    assert task.widths == {"tokens": LENGTH + 1, "marks": LENGTH}
    (stream,) = task_streams(task, text_shards / "train", symbols_model, mask_document_start=True)
    for _ in range(4):
        batch = stream.next_batch()
        arrays = task.arrays(batch)
        assert (arrays["tokens"] == batch.tokens).all()
        assert (arrays["marks"] % 2 == batch.weights).all() and (arrays["marks"] // 2 == batch.starts).all()


def test_masked_rows_hold_every_token_once(text_shards: Path, symbols_model: Path) -> None:
    tokenizer, task = Tokenizer(symbols_model), case_task("masked", symbols_model)
    cls, sep, mask = (tokenizer.token_id(piece) for piece in ("[CLS]", "[SEP]", "[MASK]"))
    samples = one_reader(task, text_shards / "train", symbols_model, 20)
    causal = case_task("causal", symbols_model, length=LENGTH - 2)
    stream = raw_rows(text_shards / "train", symbols_model, causal, 20)
    borders = 0
    for number, sample in samples.items():
        text = [sep if t in (tokenizer.bos, tokenizer.eos) else t for t in stream[number][0][:-1]]
        assert sample["labels"] == [cls, *text, sep] and sample["length"] == [LENGTH]
        borders += text.count(sep)
        for token, label, weight in zip(sample["tokens"], sample["labels"], sample["weights"], strict=True):
            assert token == label or weight
            assert not (weight and label in (cls, sep, mask))
    assert borders > 10
    assert any(s["tokens"].count(mask) for s in samples.values())


def test_whole_documents_get_the_frame_of_a_single_text(text_shards: Path, symbols_model: Path) -> None:
    tokenizer, task = Tokenizer(symbols_model), case_task("whole documents", symbols_model)
    cls, sep = tokenizer.token_id("[CLS]"), tokenizer.token_id("[SEP]")
    samples = one_reader(task, text_shards / "train", symbols_model, 20)
    rows = raw_rows(text_shards / "train", symbols_model, task, 20)
    alone = 0
    for number, sample in samples.items():
        row, _ = rows[number]
        assert len(row) <= LENGTH - 2
        row = row[row[0] == tokenizer.bos :]
        row = row[: -1 if row[-1] == tokenizer.eos else None]
        found = unpadded(sample)
        assert found == [cls, *(sep if t in (tokenizer.bos, tokenizer.eos) else t for t in row), sep]
        assert set(sample["labels"][len(found) :]) <= {tokenizer.pad} and not any(
            sample["weights"][len(found) :]
        )
        alone += found.count(sep) == 1
    assert alone


def test_pairs_follow_where_the_label_says(text_shards: Path, symbols_model: Path) -> None:
    tokenizer, task = Tokenizer(symbols_model), case_task("next sentence", symbols_model)
    cls, sep = tokenizer.token_id("[CLS]"), tokenizer.token_id("[SEP]")
    documents = document_tokens(text_shards / "train", tokenizer)
    samples = one_reader(task, text_shards / "train", symbols_model, 40)
    labels = [sample["next_label"][0] for sample in samples.values()]
    assert set(labels) == {0, 1} and 0.2 < np.mean(labels) < 0.75
    apart = 0
    for sample in samples.values():
        tokens = unpadded(sample)
        cut = tokens.index(sep)
        first, second = tokens[1:cut], tokens[cut + 1 : -1]
        assert tokens[0] == cls and tokens[-1] == sep and first and second and sep not in second
        assert sample["segments"] == [0] * (cut + 1) + [1] * (len(second) + 1) + [0] * (LENGTH - len(tokens))
        assert sample["real"] == [1]
        together = any(holds(document, first, second) for document in documents)
        if sample["next_label"] == [0]:
            assert together
        else:
            apart += not together
            assert any(holds(document, first) for document in documents)
            assert any(holds(document, second) for document in documents)
    # short parts, such as one newline, stand in many documents
    assert apart > 0.7 * sum(labels)


def rebuilt(inputs: list[int], targets: list[int], sentinels: set[int]) -> list[int]:
    """Put the spans of the targets in the places of the inputs' sentinels."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [part for token in inputs for part in (spans[token] if token in sentinels else [token])]


def test_spans_put_back_give_the_text(text_shards: Path, symbols_model: Path) -> None:
    tokenizer, task = Tokenizer(symbols_model), case_task("spans", symbols_model)
    sentinels = {tokenizer.token_id(f"<extra_id_{number}>") for number in range(30)}
    samples = one_reader(task, text_shards / "train", symbols_model, 20)
    rows = raw_rows(text_shards / "train", symbols_model, task, 20)
    shorter = 0
    for number, sample in samples.items():
        row, starts = rows[number]
        text = [token for token, begins in zip(row[:-1], starts, strict=True) if not begins]
        inputs = unpadded(sample, "tokens")
        count = sum(sample["weights"])
        targets = sample["labels"][:count]
        assert sample["weights"] == [1] * count + [0] * (len(sample["weights"]) - count)
        assert inputs[-1] == targets[-1] == tokenizer.eos and targets[0] == max(sentinels)
        assert rebuilt(inputs[:-1], targets[:-1], sentinels) == text
        assert tokenizer.bos not in inputs + targets
        assert sample["decoder_tokens"][:count] == [tokenizer.pad, *targets[:-1]]
        assert set(sample["tokens"][len(inputs) :] + sample["labels"][count:]) <= {tokenizer.pad}
        shorter += len(inputs) < LENGTH
        assert (len(inputs) == LENGTH) == (True not in starts) or len(inputs) in (LENGTH - 1, LENGTH)
    assert shorter and task.widths["labels"] == len(sample["labels"])


def test_the_published_lengths_of_spans(symbols_model: Path, text_shards: Path) -> None:
    task = case_task("spans", symbols_model, length=512)
    assert (task.row_tokens, task.widths["labels"]) == (568, 114)


def framed_text(sample: dict[str, list[int]], tokenizer: Tokenizer, name: str = "tokens") -> list[int]:
    tokens = unpadded(sample, name)
    assert tokens[0] == tokenizer.token_id("[CLS]") and tokens[-1] == tokenizer.token_id("[SEP]")
    assert set(sample[name][len(tokens) :]) <= {tokenizer.pad}
    return tokens[1:-1]


def test_passages_are_of_one_document_and_neighbours_follow(text_shards: Path, symbols_model: Path) -> None:
    tokenizer = Tokenizer(symbols_model)
    documents = document_tokens(text_shards / "train", tokenizer)
    for sample in one_reader(
        case_task("dropout", symbols_model), text_shards / "train", symbols_model
    ).values():
        text = framed_text(sample, tokenizer)
        assert 0 < len(text) <= LENGTH - 2 and any(holds(document, text) for document in documents)
        assert sample["real"] == [1] and set(sample) == {"tokens", "length", "real"}
    task = case_task("neighbours", symbols_model)
    for sample in one_reader(task, text_shards / "train", symbols_model).values():
        texts = [framed_text(sample, tokenizer, name) for name in ("tokens", "other_tokens")]
        assert all(texts) and any(holds(document, texts[0] + texts[1]) for document in documents)


def test_given_pairs_are_the_two_texts(pair_shards: Path, symbols_model: Path) -> None:
    tokenizer = Tokenizer(symbols_model)
    opened = open_shard_set(pair_shards / "train")
    texts = [text for chunk in range(opened.num_chunks) for text in opened.read_documents(chunk)]
    wanted = {
        tuple(tuple(tokenizer.encode(part)[: LENGTH - 2].tolist()) for part in text.split("\x1f"))
        for text in texts
    }
    task = case_task("given", symbols_model)
    samples = one_reader(task, pair_shards / "train", symbols_model, -(-3 * len(texts) // 12))
    found = {
        tuple(tuple(framed_text(sample, tokenizer, name)) for name in ("tokens", "other_tokens"))
        for sample in samples.values()
    }
    assert found == wanted and len(wanted) > 40


def rate_arrays(case: str, shards: Path, model: Path, length: int, num_tokens: int) -> dict[str, Any]:
    task = case_task(case, model, length=length)
    batch = 256
    (stream,) = task_streams(task, shards, model, batch=batch)
    parts = [task.arrays(stream.next_batch()) for _ in range(-(-num_tokens // (batch * (length - 2))))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_a_million_tokens_are_hidden_at_the_published_rates(text_shards: Path, symbols_model: Path) -> None:
    tokenizer = Tokenizer(symbols_model)
    found = rate_arrays("masked", text_shards / "train", symbols_model, 256, 1_000_000)
    labels, weights = found["labels"], found["weights"].astype(bool)
    specials = [tokenizer.unk, tokenizer.pad, tokenizer.token_id("[CLS]"), tokenizer.token_id("[SEP]")]
    eligible = ~np.isin(labels, specials)
    assert eligible.sum() > 970_000 and not (weights & ~eligible).any()
    predicted = weights.sum()
    assert abs(predicted / eligible.sum() / 0.15 - 1) < 0.005
    hidden = weights & (found["tokens"] == tokenizer.token_id("[MASK]"))
    assert abs(hidden.sum() / predicted / 0.8 - 1) < 0.005
    changed = weights & ~hidden & (found["tokens"] != labels)
    # one in as many as the vocabulary has is replaced by itself
    assert abs(changed.sum() / predicted - 0.1) < 0.005
    assert abs((weights & (found["tokens"] == labels)).sum() / predicted - 0.1) < 0.005


def test_a_million_tokens_are_corrupted_at_the_published_rates(text_shards: Path, symbols_model: Path) -> None:
    tokenizer = Tokenizer(symbols_model)
    found = rate_arrays("spans", text_shards / "train", symbols_model, 512, 1_000_000)
    sentinels = {tokenizer.token_id(f"<extra_id_{number}>") for number in range(30)}
    is_span = np.isin(found["labels"], list(sentinels)) & (found["weights"] == 1)
    num_spans = is_span.sum()
    noise = found["weights"].sum() - num_spans - len(is_span)  # each row has an eos
    kept = found["length"].sum() - num_spans - len(is_span)
    assert noise + kept > 1_000_000
    assert abs(noise / (noise + kept) / 0.15 - 1) < 0.005
    # the published rule rounds 85 / 3 to 28 spans
    assert abs(noise / num_spans / (85 / 28) - 1) < 0.005
