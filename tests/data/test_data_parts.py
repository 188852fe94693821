"""Parts of long documents: their tokens are those of the whole, and others than ours are left whole."""

from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from torture import torture_strings

from basestone.data import parts
from basestone.data.parts import DocumentPart, PartCutter
from basestone.data.tokenizer import Tokenizer


def train_foreign(path: Path, documents: list[str], **option: object) -> Path:
    settings: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 400,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "hard_vocab_limit": False,
        "character_coverage": 0.98,
    }
    lines = [line for text in documents[:40] for line in text.splitlines() if line]
    with open(path, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=stream, minloglevel=2, **{**settings, **option}
        )
    return path


def joined(cutter: PartCutter, text: str) -> list[int]:
    return np.concatenate([cutter.tokenize(part) for part in cutter.cut(text)]).tolist()


def test_parts_give_the_tokens_of_the_whole(
    model: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(model)
    cutter, torture = PartCutter(tokenizer), torture_strings(600, 3)
    assert cutter.cuts
    long = "".join(islice(cycle(f"{text} " for text in torture), 3000))
    for part_chars in (1, 7, 100, 1024):
        monkeypatch.setattr(parts, "PART_CHARS", part_chars)
        for text in (*documents[:40], *torture[:300], long, "", " ", "a b", "a  b", " a b "):
            assert joined(cutter, text) == tokenizer.encode_document(text).tolist()
            found = cutter.cut(text)
            assert "".join(part.text for part in found) == text
            assert [part.first for part in found] == [True] + [False] * (len(found) - 1)
            assert [part.last for part in found] == [False] * (len(found) - 1) + [True]
    monkeypatch.setattr(parts, "PART_CHARS", 1)
    assert [part.text for part in cutter.cut("ab cd  ef\n gh\u2581 ij k")] == [
        "ab",
        " cd  ef\n gh\u2581 ij",
        " k",
    ]


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from("ab1. \n\t\u2581é敏👍"), max_size=60), part_chars=st.integers(1, 9))
def test_any_text_of_odd_letters(text: str, part_chars: int, model: Path) -> None:
    cutter = PartCutter(Tokenizer(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_CHARS", part_chars)
        assert joined(cutter, text) == Tokenizer(model).encode_document(text).tolist()


@pytest.mark.parametrize(
    "option",
    [
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"split_by_whitespace": False},
        {"model_type": "unigram"},
        {"byte_fallback": False},
    ],
)
def test_models_that_a_cut_could_change_get_whole_documents(
    option: dict, documents: list[str], tmp_path: Path
) -> None:
    cutter = PartCutter(Tokenizer(train_foreign(tmp_path / "m.model", documents, **option)))
    assert not cutter.cuts
    text = "word " * 10_000
    assert cutter.cut(text) == [DocumentPart(text, True, True)]


@pytest.mark.parametrize(
    "option",
    [
        {"user_defined_symbols": [" x", "x ", "<m>", "a b", "\u2581the", "\u2581\u2581"]},
        {"control_symbols": ["the", "\u2581a", "a"]},
        {"treat_whitespace_as_suffix": True, "vocab_size": 330},
        {"allow_whitespace_only_pieces": True, "split_by_unicode_script": False, "split_by_number": False},
    ],
)
def test_odd_models_of_which_some_may_be_cut(
    option: dict, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(train_foreign(tmp_path / "m.model", documents, byte_fallback=True, **option))
    cutter = PartCutter(tokenizer)
    monkeypatch.setattr(parts, "PART_CHARS", 1)
    odd = ("xa bc x x d", "the x <m> a ba b", "a\u2581b \x00 a\x00 b", " the the  x  ", "<s> a <0x41> b</s> c")
    for text in (*documents[:20], *torture_strings(300, 5), *odd):
        assert joined(cutter, text) == tokenizer.encode_document(text).tolist()


def test_tokens_are_one_part(model: Path) -> None:
    tokens = np.arange(100_000)
    cutter = PartCutter(Tokenizer(model))
    (part,) = cutter.cut(tokens)
    assert cutter.tokenize(part) is tokens
