"""What a task needs and does not find is named in one line, with what to do."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from task_streams import CASES, case_task, task_streams

from basestone.data.config import TaskConfig
from basestone.data.errors import DataConfigError, DataError
from basestone.data.mixing import SourceSettings
from basestone.data.prepare import CorpusSettings, write_corpus
from basestone.data.sources import RawDocument
from basestone.data.stream_settings import StreamSettings
from basestone.data.tasks.special_pieces import find_frame, find_mask, find_sentinels, special_table
from basestone.data.tasks.task import Task, make_task
from basestone.data.tokenizer import Tokenizer, train_tokenizer


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "translation"}, "Input should be 'causal', 'masked', 'spans' or 'contrastive'"),
        ({"predicted": 0.0}, "greater than 0"),
        ({"masked": 0.9, "replaced": 0.2}, r"masked is 0\.9 and replaced 0\.2; together they are at most 1"),
        ({"max_predictions": 0}, "greater than 0"),
        ({"short_fraction": 1.5, "next_sentence": True}, "less than or equal to 1"),
        (
            {"short_fraction": 0.2, "next_sentence": False},
            "is that of sentence pairs; set next_sentence = true",
        ),
        ({"noise": 1.0}, "less than 1"),
        ({"mean_span": 0.5}, "greater than or equal to 1"),
        ({"mean_span": float("nan")}, "finite number"),
        ({"pairs": "same"}, "Input should be 'dropout', 'given' or 'neighbours'"),
        ({"whole_words": 1}, "valid boolean"),
        ({"word": True}, "Extra inputs are not permitted"),
        (
            {"name": "spans", "predicted": 0.3, "whole_words": True},
            "predicted, whole_words belongs to the task masked, and this is spans; leave it out",
        ),
        ({"name": "causal", "noise": 0.3}, "noise belongs to the task spans, and this is causal"),
        ({"name": "masked", "pairs": "given"}, "pairs belongs to the task contrastive, and this is masked"),
    ],
)
def test_mistakes_in_the_section_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskConfig(**section)


def test_a_section_is_read_again_from_its_record() -> None:
    for settings, _ in CASES.values():
        section = TaskConfig(**settings)
        assert TaskConfig(**section.model_dump()) == section
    assert TaskConfig(whole_words=True, noise=0.2).name is None
    assert all(
        field.description and field.json_schema_extra == {"on_resume": "fixed"}
        for field in TaskConfig.model_fields.values()
    )


def make(model: Path, *, length: int = 48, packing: str = "split", **settings: Any) -> Task:
    apart = settings.pop("mask_document_start", False)
    name = settings.pop("filled_in", None)
    config = TaskConfig(**settings)
    if name:
        config = config.model_copy(update={"name": name})
    return make_task(
        config,
        Tokenizer(model),
        sequence_length=length,
        packing=packing,
        mask_document_start=apart,
        seed=0,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "masked", "length": 2}, r"sequence_length is 2; masked tokens need at least 3 tokens"),
        ({"name": "masked", "length": 3, "packing": "best_fit"}, r"masked tokens need at least 4"),
        ({"name": "masked", "next_sentence": True, "length": 4}, r"sentence pairs need at least 5 tokens"),
        ({"name": "spans", "length": 2}, r"sequence_length is 2; spans need at least 3 tokens"),
        ({"name": "contrastive", "length": 2}, "texts in their frames need at least 3"),
        (
            {"name": "masked", "next_sentence": True, "packing": "best_fit"},
            r'data\.packing is "best_fit", and task\.next_sentence makes pairs; leave data\.packing out',
        ),
        ({"name": "spans", "packing": "best_fit"}, "the task spans lays out its own rows; leave data.packing"),
        ({"name": "contrastive", "packing": "best_fit"}, "the task contrastive lays out its own rows"),
        (
            {"name": "masked", "mask_document_start": True},
            "mask_document_start is for predicting the next token, and the task is masked; leave it out",
        ),
        (
            {"whole_words": True, "filled_in": "spans"},
            "task: whole_words belongs to the task masked, and this is spans",
        ),
        (
            {"name": "spans", "length": 1024},
            r"inputs of 1024 tokens have 57 spans, and tokenizer .* has 30 sentinels; train it with `--sentinels 57`",
        ),
    ],
)
def test_what_does_not_go_together_is_named(
    settings: dict[str, Any], message: str, symbols_model: Path
) -> None:
    with pytest.raises(DataConfigError, match=message) as caught:
        make(symbols_model, **settings)
    assert "\n" not in str(caught.value)


def test_shortest_lengths_work(symbols_model: Path, text_shards: Path) -> None:
    for case, least in {
        "masked": 3,
        "whole documents": 4,
        "next sentence": 16,  # few sentences are shorter
        "spans": 3,
        "dropout": 3,
        "neighbours": 3,
    }.items():
        task = case_task(case, symbols_model, length=least)
        (stream,) = task_streams(task, text_shards / "train", symbols_model)
        arrays = [task.arrays(stream.next_batch()) for _ in range(5)]
        assert all(found["tokens"].shape == (12, least) for found in arrays)
        assert any(
            found[name].any() for name in {"weights", "real", "marks"} & set(task.widths) for found in arrays
        )


def test_symbols_that_a_tokenizer_lacks_are_named(model: Path) -> None:
    with pytest.raises(
        DataConfigError, match=r"has no \[MASK\] or <mask>, which masked tokens need; train one with"
    ):
        make(model, name="masked")
    with pytest.raises(
        DataConfigError, match=r"has no sentinel <extra_id_0>, which spans need; train one with"
    ):
        make(model, name="spans")
    assert make(model, name="contrastive").widths["tokens"] == 48


def test_symbols_are_found(symbols_model: Path, tokenizer: Tokenizer, model: Path) -> None:
    ours = Tokenizer(symbols_model)
    frame, sentinels = find_frame(ours), find_sentinels(ours)
    assert (frame.cls, frame.sep, frame.pad, find_mask(ours)) == (4, 5, 3, 6)
    assert (sentinels.first, sentinels.count) == (36, 30)
    assert np.flatnonzero(special_table(ours)).tolist() == list(range(37))
    plain = find_frame(tokenizer)  # without [CLS] and [SEP]
    assert (plain.cls, plain.sep, plain.pad) == (tokenizer.bos, tokenizer.eos, tokenizer.pad)
    assert (
        find_mask(tokenizer) == tokenizer.token_id("<mask>") and special_table(tokenizer)[find_mask(tokenizer)]
    )


@pytest.mark.parametrize("names", [("<extra_id_0>", "<extra_id_1>"), ("<extra_id_1>", "<x>", "<extra_id_0>")])
def test_sentinels_in_another_order_are_refused(
    names: tuple[str, ...], documents: list[str], tmp_path: Path
) -> None:
    train_tokenizer(iter(documents), tmp_path / "up.model", vocab_size=600, specials=names)
    with pytest.raises(
        DataConfigError, match=r"from <extra_id_0> on have the ids \d, \d, ...; they must go down"
    ):
        make(tmp_path / "up.model", name="spans")


# --- documents of which nothing can be made


def shards_of(texts: list[str], folder: Path, chunk_bytes: int = 4096) -> Path:
    folder.mkdir()
    documents = (RawDocument(f"text {number}", text, source="test") for number, text in enumerate(texts))
    settings = CorpusSettings(heldout_fraction=0, chunk_bytes=chunk_bytes, min_chars=1)
    write_corpus(documents, folder, folder, settings)
    return folder / "train"


WORDS = " ".join(topics["assert"].split()[:40]).replace(".", "").replace("!", "").replace("?", "")


@pytest.mark.parametrize(
    ("case", "texts", "error", "message"),
    [
        (
            "next sentence",
            ["One. Two. Three."],
            DataConfigError,
            "pairs need a second document, and a whole pass",
        ),
        (
            "next sentence",
            [f"{number} {WORDS}" for number in range(20)],
            DataConfigError,
            r"pairs need a document of two sentences, the first of less than 45 tokens, .* set task\.next",
        ),
        (
            "next sentence",
            [f"{number} {WORDS}. It goes on." for number in range(20)],
            DataConfigError,
            "two sentences, the first of less than 45 tokens",
        ),
        (
            "neighbours",
            [f"{number} {WORDS}" for number in range(20)],
            DataError,
            "a whole pass over the data gave nothing to train on: no document has two sentences",
        ),
        (
            "given",
            ["one\x1ftwo", "no separator here"],
            DataConfigError,
            r"two texts with U\+001F between them; the one that begins with 'no separator here' has 1 in 1 parts",
        ),
        ("given", ["one\x1f"], DataConfigError, r"begins with 'one.*' has 1 in 2 parts"),
        ("given", ["one\x1ftwo\x1fthree"], DataConfigError, "has 3 in 3 parts"),
    ],
)
def test_documents_that_give_nothing_are_named(
    case: str, texts: list[str], error: type, message: str, symbols_model: Path, tmp_path: Path
) -> None:
    shards = shards_of(texts, tmp_path / "shards")
    task = case_task(case, symbols_model)
    (stream,) = task_streams(task, shards, symbols_model)
    with pytest.raises(error, match=message) as caught:
        for _ in range(3):
            stream.next_batch()
    assert "\n" not in str(caught.value)


def test_given_pairs_need_text(token_shards: Path, model: Path) -> None:
    (stream,) = task_streams(case_task("given", model), token_shards / "train", model)
    with pytest.raises(
        DataConfigError, match="needs shards of text, and these hold tokens; prepare them without"
    ):
        stream.next_batch()


def test_a_document_of_one_sentence_gets_a_random_second(symbols_model: Path, tmp_path: Path) -> None:
    """Each document is a chunk of its own, and few have a second sentence."""
    long = " ".join([WORDS] * 6)
    assert len(long) > 1024
    texts = [f"Number {number} has {long}" + ". It goes on." * (number % 5 == 0) for number in range(20)]
    shards = shards_of(texts, tmp_path / "shards", chunk_bytes=1024)
    task = case_task("next sentence", symbols_model, length=800)
    (stream,) = task_streams(task, shards, symbols_model)
    labels = np.concatenate([task.arrays(stream.next_batch())["next_label"][:, 0] for _ in range(20)])
    assert 0.5 < labels.mean() < 1


def test_copies_of_a_document_are_no_others(symbols_model: Path, tmp_path: Path) -> None:
    """With two chunks for twelve lanes a window holds each document many times: a random part is the other's."""
    texts = [" ".join([word] * 90) for word in ("apple apple.", "banana banana.")]
    shards = shards_of(texts, tmp_path / "shards", chunk_bytes=1024)
    task = case_task("next sentence", symbols_model, length=40)
    (stream,) = task_streams(task, shards, symbols_model, short_fraction=0.0)
    tokenizer = Tokenizer(symbols_model)
    for _ in range(10):
        found = task.arrays(stream.next_batch())
        for labels, segments, label in zip(
            found["labels"], found["segments"], found["next_label"][:, 0], strict=True
        ):
            parts = [tokenizer.decode(labels[segments == part]) for part in (0, 1)]
            assert ("nan" in parts[0]) == (("nan" in parts[1]) != bool(label)), parts


def test_an_unknown_packing_is_named() -> None:
    with pytest.raises(DataConfigError, match="packing is 'tight'; it is one of split, best_fit, pairs"):
        StreamSettings((SourceSettings("a", ("b",)),), "t", 8, 1, 0, packing="tight").check()
