"""A small corpus, tokenizers and shards that the data tests share."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from existing_tokenizers import train_ranks, write_hf_directory, write_ranks
from task_streams import CASES

from basestone.data.prepare import prepare
from basestone.data.tiktoken_ranks import PRESETS
from basestone.data.tokenizer import Tokenizer, train_tokenizer


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


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """Tokens and their ranks."""
    return train_ranks(PRESETS["cl100k_base"].pattern, 1500)


@pytest.fixture(scope="session")
def rank_file(tmp_path_factory: pytest.TempPathFactory, ranks: dict[bytes, int]) -> Path:
    """The ranks as a file of tiktoken."""
    return write_ranks(tmp_path_factory.mktemp("ranks") / "cl100k_base.tiktoken", ranks)


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE as it is published: tokenizer.json beside a configuration."""
    return write_hf_directory(tmp_path_factory.mktemp("hf"))


@pytest.fixture(params=["hf_directory", "rank_file"])
def existing(request: pytest.FixtureRequest) -> Path:
    """A tokenizer of each kind."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Tokenizer:
    """A tokenizer that knows <mask>."""
    path = tmp_path_factory.mktemp("masks") / "masks.model"
    train_tokenizer(iter(documents), path, vocab_size=700, user_symbols=("<mask>",))
    return Tokenizer(path)


@pytest.fixture(scope="session")
def texts(tokenizer: Tokenizer) -> list[np.ndarray]:
    """Python's documentation topics as tokens."""
    return [tokenizer.encode(text) for text in topics.values()]


@pytest.fixture(scope="session")
def symbols_model(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """A tokenizer with all that tasks need."""
    out = tmp_path_factory.mktemp("symbols") / "tokenizer.model"
    sentinels = tuple(f"<extra_id_{number}>" for number in reversed(range(30)))
    train_tokenizer(iter(documents), out, vocab_size=700, specials=("[CLS]", "[SEP]", "[MASK]", *sentinels))
    return out


@pytest.fixture(scope="session")
def pair_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of documents that are two texts each, with U+001F between them."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = [f"{name} is a topic of Python\x1f{text}" for name, text in topics.items()]
    (folder / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in pairs))
    prepare([str(folder)], folder / "shards", heldout_fraction=0.15, chunk_bytes=4096)
    return folder / "shards"


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> str:
    """Each task by its name in task_streams."""
    return request.param


@pytest.fixture
def shards(case: str, text_shards: Path, pair_shards: Path) -> Path:
    """What the case trains on."""
    return (pair_shards if case == "given" else text_shards) / "train"
