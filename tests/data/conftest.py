"""A small corpus, a tokenizer and shards that the data tests share."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from basestone.data.prepare import prepare
from basestone.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Some 120 documents of differing length, with code, other scripts and one that is very long."""
    texts = [text[: 200 + 37 * number] for number, text in enumerate(topics.values())]
    texts += [
        f"Satz {number}: žluťoučký kůň 敏捷的棕色狐狸 👍🏽\n\tif x:\n        y = {number}\n"
        for number in range(40)
    ]
    return [*texts, "\n\n".join(sorted(topics.values()))[:30_000]]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "all.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(iter(documents), out, vocab_size=600)
    return out


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    out = tmp_path_factory.mktemp("other") / "tokenizer.model"
    train_tokenizer(iter(documents), out, vocab_size=610)
    return out


@pytest.fixture(scope="session")
def text_shards(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Path:
    """Shards of text: several of them, with chunks of some documents each."""
    out = tmp_path_factory.mktemp("text") / "shards"
    prepare([str(sources)], out, heldout_fraction=0.15, shard_bytes=120_000, chunk_bytes=4096)
    return out


@pytest.fixture(scope="session")
def token_shards(tmp_path_factory: pytest.TempPathFactory, sources: Path, model: Path) -> Path:
    """The same documents as blocks of tokens."""
    out = tmp_path_factory.mktemp("tokens") / "shards"
    prepare([str(sources)], out, heldout_fraction=0.15, tokenizer=model, shard_bytes=60_000, chunk_bytes=4096)
    return out
