"""Held-out sets: every token predicted once, and the size of their text known."""

from pathlib import Path

import numpy as np
import pytest

from basestone.data.errors import DataConfigError
from basestone.data.heldout import HeldOutSet, load_heldout
from basestone.data.shards import ShardWriter, open_shard_set
from basestone.data.tasks.causal import CausalTask
from basestone.data.tokenizer import Tokenizer


def all_texts(directory: Path) -> list[str]:
    opened = open_shard_set(directory)
    return [text for chunk in range(opened.num_chunks) for text in opened.read_documents(chunk)]


def load(shards: Path, model: Path, *, length: int, max_tokens: int = 1 << 20) -> HeldOutSet:
    return load_heldout(shards / "heldout", model, CausalTask(length, "best_fit"), max_tokens=max_tokens)


def weights_of(found: HeldOutSet) -> np.ndarray:
    return found.arrays["marks"] & 1


@pytest.mark.parametrize("length", [7, 64, 100_000])
def test_every_token_but_the_first_is_predicted_once(length: int, text_shards: Path, model: Path) -> None:
    tokenizer = Tokenizer(model)
    texts = all_texts(text_shards / "heldout")
    flat = np.concatenate([tokenizer.encode_document(text) for text in texts])
    found = load(text_shards, model, length=length)
    tokens, weights = found.arrays["tokens"], weights_of(found)
    assert tokens.dtype == weights.dtype == np.int32
    assert tokens.shape == (len(weights), length + 1) and weights.shape[1] == length
    assert len(weights) == -(-(len(flat) - 1) // length)
    assert tokens[:, 1:][weights == 1].tolist() == flat[1:].tolist()
    assert tokens[:, :-1][weights == 1].tolist() == flat[:-1].tolist()
    assert (tokens[:, 1:][weights == 0] == tokenizer.pad).all()
    assert (tokens[:, :-1][found.arrays["marks"] > 1] == tokenizer.bos).all()
    assert (found.arrays["marks"] > 1).sum() == len(texts)
    assert (found.num_documents, found.num_bytes) == (len(texts), sum(len(text.encode()) for text in texts))


def test_whole_documents_up_to_the_limit(text_shards: Path, model: Path) -> None:
    tokenizer = Tokenizer(model)
    sizes = [len(tokenizer.encode_document(text)) for text in all_texts(text_shards / "heldout")]
    limit = 3 * max(sizes[:4])
    found = load(text_shards, model, length=32, max_tokens=limit)
    predicted = int(weights_of(found).sum()) + 1
    assert predicted <= limit and predicted in np.cumsum([size for size in sizes if size <= limit])
    assert 3 <= found.num_documents < len(sizes)


def test_documents_that_can_never_fit_are_passed_over(text_shards: Path, model: Path) -> None:
    tokenizer = Tokenizer(model)
    sizes = [len(tokenizer.encode_document(text)) for text in all_texts(text_shards / "heldout")]
    smallest = min(sizes)
    found = load(text_shards, model, length=16, max_tokens=smallest)
    assert found.num_documents == 1 and int(weights_of(found).sum()) == smallest - 1
    with pytest.raises(DataConfigError, match=f"no document fits into {smallest - 1} tokens; allow more"):
        load(text_shards, model, length=16, max_tokens=smallest - 1)


@pytest.mark.parametrize("sizes", [(4, 4, 1), (4, 1), (1, 1), (1,)])
def test_documents_of_one_token(sizes: tuple[int, ...], tmp_path: Path, model: Path) -> None:
    """Files of other programs have such: an empty text with its end."""
    tokenizer = Tokenizer(model)
    writer = ShardWriter(
        tmp_path / "heldout",
        shard_bytes=1 << 20,
        chunk_bytes=1 << 12,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
    )
    for size in sizes:
        writer.write_tokens(np.full(size, tokenizer.eos), 0)
    writer.finish()
    if sum(sizes) == 1:
        with pytest.raises(
            DataConfigError, match="nothing to measure on, for it has one token; give other text"
        ):
            load(tmp_path, model, length=4)
        return
    found = load(tmp_path, model, length=4)
    assert weights_of(found).sum() == sum(sizes) - 1
    assert len(found.arrays["tokens"]) == -(-(sum(sizes) - 1) // 4)


def test_blocks_give_the_same_set(
    text_shards: Path, token_shards: Path, model: Path, other_model: Path
) -> None:
    text, blocks = (load(shards, model, length=32) for shards in (text_shards, token_shards))
    assert all(np.array_equal(text.arrays[name], blocks.arrays[name]) for name in ("tokens", "marks"))
    assert (text.num_bytes, text.num_documents) == (blocks.num_bytes, blocks.num_documents)
    with pytest.raises(DataConfigError, match="was tokenised with tokenizer"):
        load(token_shards, other_model, length=32, max_tokens=100)
