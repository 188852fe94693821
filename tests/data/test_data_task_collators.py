"""What is hidden is what Hugging Face's collator hides, given the same draws."""

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from task_streams import take_samples, task_streams

from basestone.data.config import TaskConfig
from basestone.data.prepare import prepare
from basestone.data.tasks.task import make_task
from basestone.data.tokenizer import Tokenizer

LENGTH = 64


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of BERT's kind, which tells its specials by name."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.BertWordPieceTokenizer(lowercase=True)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trained.train_from_iterator(topics.values(), vocab_size=900, special_tokens=specials)
    folder = tmp_path_factory.mktemp("pieces")
    trained.save(str(folder / "tokenizer.json"))
    names = {"bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
    config = {f"{name}_token": piece for name, piece in names.items()}
    config |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("topics")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in topics.values())
    (folder / "all.jsonl").write_text(lines)
    prepare([str(folder)], folder / "shards", heldout_fraction=0, chunk_bytes=4096)
    return folder / "shards" / "train"


class GivenDraws:
    """A generator that gives what was drawn elsewhere: for each choice between two, and for random tokens."""

    def __init__(self, choices: list[np.ndarray], tokens: np.ndarray) -> None:
        self._choices: Iterator[np.ndarray] = iter(choices)
        self._tokens = tokens

    def binomial(self, trials: int, probability: object, size: tuple[int, ...]) -> np.ndarray:
        choice = next(self._choices)
        assert choice.shape == size
        return choice.astype(int)

    def integers(self, low: int, high: int, size: int, dtype: type) -> np.ndarray:
        assert size == len(self._tokens) and low == 0 and self._tokens.max(initial=0) < high
        return self._tokens


def offsets_of(tokens: np.ndarray, pieces: list[bytes]) -> np.ndarray:
    """Where each token stands in the text: pieces that go on with a word touch the one before."""
    offsets = np.zeros((len(tokens), 2), int)
    place = 0
    for number, token in enumerate(tokens.tolist()):
        if not pieces[token]:
            continue
        place += pieces[token].startswith(b" ")
        size = len(pieces[token].strip())
        offsets[number] = place, place + size
        place += size
    return offsets


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_the_collator_hides_the_same(whole_words: bool, packing: str, word_pieces: Path, shards: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(word_pieces)
    path = word_pieces / "tokenizer.json"
    ours = Tokenizer(path)
    # the collator puts no random tokens into whole words
    rates = {"masked": 1.0, "replaced": 0.0} if whole_words else {}
    config = TaskConfig(name="masked", whole_words=whole_words, **rates)
    task = make_task(config, ours, sequence_length=LENGTH, packing=packing, mask_document_start=False, seed=3)
    samples = take_samples(task, task_streams(task, shards, path), 15)
    fields = {
        name: np.array([sample[name] for sample in samples.values()])
        for name in ("tokens", "labels", "weights")
    }
    tokens, labels, weights = (fields[name] for name in ("tokens", "labels", "weights"))
    chosen = weights.astype(bool)
    masked = chosen & (tokens == theirs.mask_token_id)
    swapped = chosen & ~masked & (tokens != labels)
    drawn = chosen
    if whole_words:  # one token of each word draws it whole
        drawn = chosen & ~_goes_on(chosen, labels, ours)
        assert drawn.sum() < chosen.sum()
    collator = transformers.DataCollatorForLanguageModeling(
        theirs,
        return_tensors="np",
        whole_word_mask=whole_words,
        mask_replace_prob=config.masked,
        random_replace_prob=config.replaced,
    )
    collator.generator = GivenDraws([drawn, masked, swapped], tokens[swapped])
    special = np.array(
        [theirs.get_special_tokens_mask(row, already_has_special_tokens=True) for row in labels.tolist()]
    )
    offsets = np.stack([offsets_of(row, ours.pieces()) for row in labels]) if whole_words else None
    inputs, their_labels = collator.numpy_mask_tokens(labels.copy(), special, offsets)
    assert (inputs == tokens).all()
    assert (their_labels == np.where(chosen, labels, -100)).all()
    assert (swapped.sum() > 50) != whole_words and masked.sum() > 500 and (special == 0).sum() > 8000


def _goes_on(chosen: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Tell which of the chosen tokens go on with a word whose beginning is chosen, too."""
    begins = np.array([piece.startswith(b" ") for piece in tokenizer.pieces()])[labels]
    return chosen & ~begins & np.pad(chosen, ((0, 0), (1, 0)))[:, :-1]
