"""Tokenizers of every kind in Hugging Face's form: the same ids there."""

from pathlib import Path

import numpy as np
import pytest
from existing_tokenizers import STRINGS, TEXTS, train_ranks, write_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from basestone.data.byte_level import read_spelling, spell_bytes
from basestone.data.errors import DataConfigError
from basestone.data.hf_tokenizer import write_hf_tokenizer
from basestone.data.tiktoken_ranks import PRESETS
from basestone.data.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_hugging_face_ids_are_those_of_ranks(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = write_ranks(tmp_path / f"{name}.tiktoken", train_ranks(PRESETS[name].pattern, 1200))
    write_hf_tokenizer(path, tmp_path / "out", model_max_length=77)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer = Tokenizer(path)
    for text in (*STRINGS, *TEXTS):
        ids = tokenizer.encode(text).tolist()
        assert fast(text, add_special_tokens=False)["input_ids"] == ids, ascii(text)
        assert fast.decode(ids) == text
    for text in STRINGS[:100]:
        assert fast(text)["input_ids"] == [tokenizer.bos, *tokenizer.encode(text).tolist()]
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (1200, 1200, 1200)
    assert len(fast) == 1201 and fast.model_max_length == 77
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from("ab aé\n1'St.") | st.characters(codec="utf-8"), max_size=60))
def test_hugging_face_ids_are_those_of_ranks_on_any_text(text: str, converted: tuple) -> None:
    tokenizer, fast = converted
    assert fast.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).tolist()


@pytest.fixture(scope="module")
def converted(rank_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    out = tmp_path_factory.mktemp("converted")
    write_hf_tokenizer(rank_file, out, model_max_length=10)
    fast = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    fast.encode_special_tokens = True
    return Tokenizer(rank_file), fast


def test_a_token_that_no_merge_reaches_is_taken_as_a_whole(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    assert not {b"qz", b"zx", b"xw"} & set(ranks)
    path = write_ranks(tmp_path / "cl100k_base.tiktoken", {**ranks, b"qzxw": 1500})
    write_hf_tokenizer(path, tmp_path / "out", model_max_length=10)
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert (
        fast.encode("qzxw", add_special_tokens=False).ids == Tokenizer(path).encode("qzxw").tolist() == [1500]
    )
    ids = Tokenizer(path).encode("aqzxw").tolist()
    assert 1500 not in ids and fast.encode("aqzxw", add_special_tokens=False).ids == ids


def test_special_ids_with_holes_stay(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    transformers = pytest.importorskip("transformers")
    path = write_ranks(tmp_path / "own.tiktoken", ranks)
    (tmp_path / "own.tiktoken.toml").write_text(
        'preset = "cl100k_base"\nbos = "<|start|>"\neos = "<|end|>"\n'
        '[specials]\n"<|start|>" = 1502\n"<|end|>" = 1507\n"<|mask|>" = 1600\n'
    )
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (1502, 1507, 1507, 1601)
    write_hf_tokenizer(path, tmp_path / "out", model_max_length=10)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (fast.bos_token_id, fast.eos_token_id, fast.convert_tokens_to_ids("<|mask|>")) == (1502, 1507, 1600)
    assert fast("a<|mask|>b")["input_ids"] == [1502, *tokenizer.encode("a<|mask|>b").tolist()]


def test_a_pattern_that_reads_differently_there_is_not_exported(
    tmp_path: Path, ranks: dict[bytes, int]
) -> None:
    path = write_ranks(tmp_path / "own.tiktoken", ranks)
    sidecar = tmp_path / "own.tiktoken.toml"
    frame = 'bos = "<|e|>"\neos = "<|e|>"\nspecials = {"<|e|>" = 1500}\n'
    sidecar.write_text(r"pattern = '\p{N}{1,3}+|\p{L}++|[^\p{L}\p{N}]'" + "\n" + frame)
    assert Tokenizer(path).vocab_size == 1501
    with pytest.raises(DataConfigError, match="no exact Hugging Face form: the ids differ near"):
        write_hf_tokenizer(path, tmp_path / "out", model_max_length=10)
    assert not (tmp_path / "out").exists()
    sidecar.write_text(r"pattern = '\p{N}{1,3}|\p{L}+|[^\p{L}\p{N}]'" + "\n" + frame)
    write_hf_tokenizer(path, tmp_path / "out", model_max_length=10)


def test_a_tokenizer_json_is_copied_as_it_is(hf_directory: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_hf_tokenizer(hf_directory, tmp_path / "out", model_max_length=55)
    copied = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert copied == (hf_directory / "tokenizer.json").read_bytes()
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer = Tokenizer(hf_directory)
    for text in STRINGS:
        ids = tokenizer.encode(text).tolist()
        assert fast(text, add_special_tokens=False)["input_ids"] == ids, ascii(text)
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (0, 1, 2)
    assert fast.model_max_length == 55 and fast.unk_token is None


def test_our_own_export_is_read_back_with_its_ids(model: Path, tmp_path: Path) -> None:
    write_hf_tokenizer(model, tmp_path / "hf", model_max_length=64)
    ours, exported = Tokenizer(model), Tokenizer(tmp_path / "hf")
    for text in STRINGS:
        assert exported.encode_document(text).tolist() == ours.encode_document(text).tolist(), ascii(text)
    assert (exported.unk, exported.bos, exported.eos, exported.pad) == (0, 1, 2, 3)
    assert exported.pieces() == ours.pieces() and exported.sha256 != ours.sha256


def test_a_tokenizer_as_one_file_is_the_same(existing: Path, model: Path, tmp_path: Path) -> None:
    """A run keeps it as RUN/tokenizer.model, with nothing beside."""
    for number, path in enumerate((existing, model)):
        (tmp_path / str(number)).mkdir()
        copy = tmp_path / str(number) / "tokenizer.model"
        copy.write_bytes(Tokenizer(path).content)
        first, second = Tokenizer(path), Tokenizer(copy)
        assert second.sha256 == first.sha256 and second.content == first.content
        assert (second.bos, second.eos, second.pad, second.unk) == (first.bos, first.eos, first.pad, first.unk)
        for text in STRINGS[:200]:
            assert np.array_equal(first.encode_document(text), second.encode_document(text))
        write_hf_tokenizer(path, tmp_path / f"a{number}", model_max_length=9)
        write_hf_tokenizer(copy, tmp_path / f"b{number}", model_max_length=9)
        for file in (tmp_path / f"a{number}").iterdir():
            assert file.read_bytes() == (tmp_path / f"b{number}" / file.name).read_bytes()
    assert Tokenizer(model).content == model.read_bytes()


@given(st.binary())
def test_bytes_are_spelled_and_read(content: bytes) -> None:
    assert read_spelling(spell_bytes(content)) == content


def test_bytes_are_spelled_as_the_tokenizers_package_does() -> None:
    assert sorted(map(spell_bytes, (bytes([byte]) for byte in range(256)))) == sorted(
        tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    spelled = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in STRINGS[:100]:
        assert "".join(piece for piece, _ in spelled.pre_tokenize_str(text)) == spell_bytes(text.encode())
