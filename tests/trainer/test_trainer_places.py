"""Where a run's data lies: all that is missing at once, and nothing asked for that is not wanted."""

from __future__ import annotations

import json
from pydoc_data.topics import topics

import pytest
from run_files import run_of

from basestone.data.errors import DataConfigError
from basestone.data.prepare import prepare
from basestone.data.tokenizer import train_tokenizer
from basestone.trainer.errors import ConfigError
from basestone.trainer.places import locate, locate_heldout, open_run, tasks_of

SPECIALS = ("[CLS]", "[SEP]", "[MASK]")
NOTHING = (
    "holds no manifest.json and no .tar files; make shards with `basestone prepare`, or give .tar or "
    "Megatron .bin files"
)


def test_everything_that_is_missing_is_listed(tmp_path):
    run = run_of(data__train=[str(tmp_path / "a")], data__heldout={"h": str(tmp_path / "b")})
    with pytest.raises(DataConfigError) as caught:
        locate(run.data, run.reading, tmp_path / "cache")
    assert str(caught.value).splitlines() == [
        "/shards/t.model is not there; make one with `basestone tokenizer train`",
        f"{tmp_path / 'a'} {NOTHING}",
        f"{tmp_path / 'b'} {NOTHING}",
    ]


def test_held_out_sets_are_found_without_the_rest(tmp_path):
    run = run_of(data__heldout={"h": str(tmp_path / "b")})
    model = tmp_path / "t.model"
    with pytest.raises(DataConfigError) as caught:
        locate_heldout(run.data, run.reading, tmp_path / "cache", model)
    assert str(caught.value) == f"{tmp_path / 'b'} {NOTHING}"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").touch()
    assert locate_heldout(run.data, run.reading, tmp_path / "cache", model) == {"h": str(tmp_path / "b")}
    assert locate_heldout(run_of().data, run.reading, tmp_path / "cache", model) == {}


def test_pairs_by_dropout_need_dropout(tmp_path):
    """The two vectors of a text would be one."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    prepare([str(tmp_path / "text.jsonl")], tmp_path / "shards")
    bert = {"model__family": "bert", "model__num_query_groups": None, "model__next_sentence": False}
    run = {**bert, "model__pooling": "mean", "data__train": str(tmp_path / "shards/train")}
    run["data__tokenizer"] = str(tmp_path / "symbols.model")
    train_tokenizer(
        iter(list(topics.values())[:10]), tmp_path / "symbols.model", vocab_size=400, specials=SPECIALS
    )
    with pytest.raises(
        ConfigError, match=r"^task.pairs = 'dropout' .* model.dropout = 0: .* set model.dropout = 0.1, or"
    ):
        open_run(run_of(**run, model__dropout=0.0), 1, tmp_path / "cache")
    for more in ({"model__dropout": 0.1}, {"model__dropout": 0.0, "task__pairs": "neighbours"}):
        assert open_run(run_of(**run, **more), 1, tmp_path / "cache")[0].run.task.name == "contrastive"


def test_a_task_for_every_length_and_a_row_that_is_too_short_is_named(tmp_path):
    path = tmp_path / "tokenizer.model"
    train_tokenizer(iter(list(topics.values())[:10]), path, vocab_size=400, specials=SPECIALS)
    bert = {"model__family": "bert", "model__num_query_groups": None, "model__next_sentence": True}

    def rows(*lengths: int) -> list[dict[str, int]]:
        return [{"sequence_length": length, "until_step": step} for step, length in enumerate(lengths, start=1)]

    tasks = tasks_of(run_of(**bert, train__ramp=rows(8, 16)), path)
    assert {length: task.widths["tokens"] for length, task in tasks.items()} == {8: 8, 16: 16, 32: 32}
    assert {task.packing for task in tasks.values()} == {"pairs"}
    with pytest.raises(DataConfigError) as caught:
        tasks_of(run_of(**bert, train__ramp=rows(4, 16)), path)
    assert str(caught.value) == (
        "train.ramp[0].sequence_length: sequence_length is 4; sentence pairs need at least 5 tokens"
    )
    with pytest.raises(DataConfigError, match=r"^sequence_length is 4; sentence pairs need at least 5 tokens"):
        tasks_of(run_of(**bert, data__sequence_length=4), path)
