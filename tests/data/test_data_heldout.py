"""Held-out sets: every token predicted once, and the size of their text known."""

from pathlib import Path

import numpy as np
import pytest

from basestone.data.errors import DataConfigError
from basestone.data.heldout import load_heldout
from basestone.data.shards import open_shard_set
from basestone.data.tokenizer import Tokenizer


def all_texts(directory: Path) -> list[str]:
    opened = open_shard_set(directory)
    return [text for chunk in range(opened.num_chunks) for text in opened.read_documents(chunk)]


@pytest.mark.parametrize("length", [7, 64, 100_000])
def test_every_token_but_the_first_is_predicted_once(length: int, text_shards: Path, model: Path) -> None:
    tokenizer = Tokenizer(model)
    texts = all_texts(text_shards / "heldout")
    flat = np.concatenate([tokenizer.encode_document(text) for text in texts])
    found = load_heldout(text_shards / "heldout", model, sequence_length=length, max_tokens=1 << 20)
    assert found.tokens.dtype == np.int32 and found.weights.dtype == np.uint8
    assert found.tokens.shape == (found.weights.shape[0], length + 1) and found.weights.shape[1] == length
    assert found.tokens[:, 1:][found.weights == 1].tolist() == flat[1:].tolist()
    assert found.tokens[:, :-1][found.weights == 1].tolist() == flat[:-1].tolist()
    assert (found.tokens[:, 1:][found.weights == 0] == tokenizer.pad).all()
    assert (found.num_documents, found.num_bytes) == (len(texts), sum(len(text.encode()) for text in texts))


def test_whole_documents_up_to_the_limit(text_shards: Path, model: Path) -> None:
    tokenizer = Tokenizer(model)
    sizes = [len(tokenizer.encode_document(text)) for text in all_texts(text_shards / "heldout")]
    limit = 3 * max(sizes[:4])
    found = load_heldout(text_shards / "heldout", model, sequence_length=32, max_tokens=limit)
    predicted = int(found.weights.sum()) + 1
    assert predicted <= limit and predicted in np.cumsum([size for size in sizes if size <= limit])
    assert 3 <= found.num_documents < len(sizes)


def test_documents_that_can_never_fit_are_passed_over(text_shards: Path, model: Path) -> None:
    tokenizer = Tokenizer(model)
    sizes = [len(tokenizer.encode_document(text)) for text in all_texts(text_shards / "heldout")]
    smallest = min(sizes)
    found = load_heldout(text_shards / "heldout", model, sequence_length=16, max_tokens=smallest)
    assert found.num_documents == 1 and int(found.weights.sum()) == smallest - 1
    with pytest.raises(DataConfigError, match=f"no document fits into {smallest - 1} tokens; allow more"):
        load_heldout(text_shards / "heldout", model, sequence_length=16, max_tokens=smallest - 1)
    with pytest.raises(DataConfigError, match="sequence length is 0 and the most tokens 9"):
        load_heldout(text_shards / "heldout", model, sequence_length=0, max_tokens=9)


def test_blocks_give_the_same_set(
    text_shards: Path, token_shards: Path, model: Path, other_model: Path
) -> None:
    text, blocks = (
        load_heldout(shards / "heldout", model, sequence_length=32, max_tokens=1 << 20)
        for shards in (text_shards, token_shards)
    )
    assert (text.tokens == blocks.tokens).all() and (text.weights == blocks.weights).all()
    assert (text.num_bytes, text.num_documents) == (blocks.num_bytes, blocks.num_documents)
    with pytest.raises(DataConfigError, match="was tokenised with tokenizer"):
        load_heldout(token_shards / "heldout", other_model, sequence_length=32, max_tokens=100)
