"""Shards written by the tasks of a datatrove pipeline, under one manifest."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor

from basestone.data.errors import DataConfigError, DataError
from basestone.data.inspect import verify_directory
from basestone.data.prepare import prepare
from basestone.data.preparing.datatrove_writer import ShardMergeStep, ShardWriterStep, merge_ranks
from basestone.data.shards import open_shard_set
from basestone.data.sources import read_documents


def read_share(data: Any, rank: int, world_size: int, *, file: Path) -> Iterator[Document]:
    """Give every task its share of a file's lines, and each an empty document."""
    for number, raw in enumerate(read_documents(file)):
        if number % world_size == rank:
            yield Document(text=str(raw.content), id=raw.origin)
    yield Document(text=" \n", id="empty")
    yield Document(text=f"short {rank}", id="short")


def documents_of(directory: Path) -> list[Any]:
    opened = open_shard_set(directory)
    found = [document for chunk in range(opened.num_chunks) for document in opened.read_documents(chunk)]
    return [document if isinstance(document, str) else document.tolist() for document in found]


@pytest.fixture()
def lines(documents: list[str], tmp_path: Path) -> Path:
    """The documents without copies: finding them is other steps' work in a pipeline."""
    distinct = {" ".join(text.split()): text for text in documents}
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in distinct.values()))
    return file


def write(folder: Path, file: Path, **settings: Any) -> Path:
    """Run the pipeline as two tasks of two processes, then the merge as one that waits for them."""
    out = folder / "shards"
    shards = ShardWriterStep(out, heldout_fraction=0.15, shard_bytes=60_000, chunk_bytes=4096, **settings)
    writing = LocalPipelineExecutor(
        [partial(read_share, file=file), shards], tasks=2, logging_dir=str(folder / "logs" / "write")
    )
    LocalPipelineExecutor(
        [ShardMergeStep(out, num_ranks=2)], tasks=1, depends=writing, logging_dir=str(folder / "logs" / "merge")
    ).run()
    return out


def test_two_tasks_give_one_shard_set(lines: Path, tmp_path: Path) -> None:
    """The same documents as `prepare` gives, the same ones held out, and every chunk sound."""
    out = write(tmp_path, lines)
    prepare([str(lines)], tmp_path / "alone", heldout_fraction=0.15)
    for part in ("train", "heldout"):
        opened, alone = open_shard_set(out / part), open_shard_set(tmp_path / "alone" / part)
        assert sorted(documents_of(out / part)) == sorted(documents_of(tmp_path / "alone" / part))
        assert (opened.num_documents, opened.text_bytes) == (alone.num_documents, alone.text_bytes)
        assert {Path(file).parent.name for file in opened.files} == {"rank_00000", "rank_00001"}
        assert verify_directory(out / part) == [] and not list((out / part).glob("*.tar"))
    assert len(open_shard_set(out / "train").files) > 3
    moved = out.rename(tmp_path / "moved")  # names are relative
    assert (
        open_shard_set(moved / "train").num_documents
        == open_shard_set(tmp_path / "alone" / "train").num_documents
    )


def test_token_blocks(lines: Path, model: Path, tmp_path: Path) -> None:
    out = write(tmp_path, lines, tokenizer=model)
    prepare([str(lines)], tmp_path / "alone", heldout_fraction=0.15, tokenizer=model)
    opened, alone = open_shard_set(out / "train"), open_shard_set(tmp_path / "alone" / "train")
    assert sorted(documents_of(out / "train")) == sorted(documents_of(tmp_path / "alone" / "train"))
    assert (opened.num_tokens, opened.tokenizer_sha256) == (alone.num_tokens, alone.tokenizer_sha256)
    assert opened.text_bytes == alone.text_bytes


def long(*words: str) -> list[str]:
    """Give texts that are not too short to be kept."""
    return [f"{word} and some more words, so that it is kept" for word in words]


def run_task(step: ShardWriterStep, texts: list[str], rank: int) -> None:
    for _ in step.run((Document(text=text, id="") for text in texts), rank, 2):
        pass


def test_tasks_that_are_missing_or_run_again(tmp_path: Path, model: Path, other_model: Path) -> None:
    step = ShardWriterStep(tmp_path / "out", heldout_fraction=0)
    run_task(step, long("one", "two"), 0)
    with pytest.raises(
        DataError, match=r"lacks the shards of 1 of 2 tasks \(rank_00001\); start the writing job"
    ):
        merge_ranks(tmp_path / "out" / "train", 2)
    stopped = step.run((Document(text=text, id="") for text in long("lost", "lost")), 1, 2)
    next(stopped)  # killed here
    assert not (tmp_path / "out" / "train" / "rank_00001").exists()
    run_task(step, long("three"), 1)
    run_task(step, long("three", "four"), 1)
    ShardMergeStep(tmp_path / "out", 2).run(None, 1, 2)  # not its task
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    ShardMergeStep(tmp_path / "out", 2).run()
    assert documents_of(tmp_path / "out" / "train") == long("one", "two", "three", "four")
    assert documents_of(tmp_path / "out" / "heldout") == []
    shutil.rmtree(tmp_path / "out")
    for rank, tokenizer in enumerate((model, other_model)):
        run_task(ShardWriterStep(tmp_path / "out", heldout_fraction=0, tokenizer=tokenizer), long("text"), rank)
    with pytest.raises(DataError, match="used different tokenizers; write all of them with one"):
        merge_ranks(tmp_path / "out" / "train", 2)


def test_documents_that_cannot_be_tokenised_are_left_out(tmp_path: Path) -> None:
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (tmp_path / "cl100k_base.tiktoken").write_text("".join(lines))
    (tmp_path / "cl100k_base.tiktoken.toml").write_text(
        'preset = "cl100k_base"\n[specials]\n"<|endoftext|>" = 256\n'
    )
    step = ShardWriterStep(tmp_path / "out", heldout_fraction=0, tokenizer=tmp_path / "cl100k_base.tiktoken")
    run_task(step, ["x" + " " * 1_000_000 + "y", *long("one"), "short"], 0)
    assert open_shard_set(tmp_path / "out" / "train" / "rank_00000").num_documents == 1
    assert step.stats["dropped_not_tokenised"].total == step.stats["dropped_too_short"].total == 1


def test_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "basestone.data.preparing.datatrove_writer")
    monkeypatch.setitem(sys.modules, "datatrove.pipeline.base", None)
    with pytest.raises(DataConfigError, match=r"needs the package datatrove.*'basestone\[scale\]'"):
        import basestone.data.preparing.datatrove_writer  # noqa: F401
