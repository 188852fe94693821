"""Existing tokenizers: Hugging Face directories, tiktoken ranks; the same ids wherever they are read."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
from existing_tokenizers import STRINGS, TEXTS, train_ranks, write_ranks

from basestone.data.errors import DataConfigError
from basestone.data.hf_tokenizer import write_hf_tokenizer
from basestone.data.tasks.vocabulary import word_starts
from basestone.data.tiktoken_ranks import PRESETS
from basestone.data.tokenizer import Tokenizer
from basestone.data.tokenizer_inspect import inspect_tokenizer

tokenizers = pytest.importorskip("tokenizers")
tiktoken = pytest.importorskip("tiktoken")


def test_any_text_comes_back(existing: Path) -> None:
    tokenizer = Tokenizer(existing)
    pieces = tokenizer.pieces()
    for text in (*STRINGS, *TEXTS):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(pieces[token] for token in ids) == text.encode()
        if len(ids):
            assert 0 <= ids.min() and ids.max() < tokenizer.vocab_size  # noqa: SIM300


def test_documents_are_framed_and_specials_in_a_text_are_text(existing: Path) -> None:
    tokenizer = Tokenizer(existing)
    text = "x <bos> y <|endoftext|> z <|im_start|> <pad>"
    document = tokenizer.encode_document(text)
    assert document.dtype == "int32"
    assert document[0] == tokenizer.bos and document[-1] == tokenizer.eos
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(document[1:-1].tolist())
    assert tokenizer.decode(document) == text
    assert [tokenizer.pieces()[token] for token in (tokenizer.bos, tokenizer.eos, tokenizer.pad)] == [b""] * 3


def test_specials_of_a_directory(hf_directory: Path) -> None:
    tokenizer = Tokenizer(hf_directory)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk) == (0, 1, 2, -1)
    assert tokenizer.vocab_size == 900 and tokenizer.kind == "huggingface"
    assert Tokenizer(hf_directory / "tokenizer.json").sha256 == tokenizer.sha256
    assert len(tokenizer.encode("word " * 50)) > 16  # the file's truncation and padding are for others


def test_specials_of_ranks(rank_file: Path, ranks: dict[bytes, int]) -> None:
    tokenizer = Tokenizer(rank_file)
    assert tokenizer.vocab_size == 1501 and tokenizer.kind == "tiktoken"
    assert tokenizer.bos == tokenizer.eos == tokenizer.pad == 1500 and tokenizer.unk == -1
    assert tokenizer.token_id("<|endoftext|>") == 1500 and tokenizer.token_id(" the") == ranks[b" the"]
    with pytest.raises(DataConfigError, match="has no piece '<mask>'; train one with"):
        tokenizer.token_id("<mask>")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_split_text_as_published(name: str) -> None:
    """Compare ids with those of the published pattern, on real text and torture."""
    import tiktoken_ext.openai_public as published

    ranks = train_ranks(PRESETS[name].pattern, 600)
    with (
        mock.patch.object(published, "load_tiktoken_bpe", lambda *_, **__: {}),
        mock.patch.object(published, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {}),
    ):
        definition = published.ENCODING_CONSTRUCTORS[name]()
    theirs = tiktoken.Encoding("a", pat_str=definition["pat_str"], mergeable_ranks=ranks, special_tokens={})
    ours = tiktoken.Encoding("b", pat_str=PRESETS[name].pattern, mergeable_ranks=ranks, special_tokens={})
    for text in (*STRINGS, *TEXTS):
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text), ascii(text)
    assert PRESETS[name].specials == definition["special_tokens"]


def test_the_hash_covers_what_decides_ids(
    tmp_path: Path, hf_directory: Path, rank_file: Path, ranks: dict[bytes, int]
) -> None:
    hashes = {Tokenizer(hf_directory).sha256, Tokenizer(rank_file).sha256}
    folder = shutil.copytree(hf_directory, tmp_path / "hf")
    assert Tokenizer(folder).sha256 in hashes
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "x"}))
    assert Tokenizer(folder).sha256 in hashes
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_start|>"}))
    assert Tokenizer(folder).eos == 3 and Tokenizer(folder).sha256 not in hashes
    other = write_ranks(tmp_path / "o.tiktoken", ranks)
    seen = set(hashes)
    for sidecar in (
        'preset = "gpt2"',
        'preset = "o200k_base"',
        'preset = "gpt2"\nspecials = {"<|endoftext|>" = 1600}',
    ):
        (tmp_path / "o.tiktoken.toml").write_text(sidecar)
        assert Tokenizer(other).sha256 not in seen
        seen.add(Tokenizer(other).sha256)


def test_bos_and_eos_are_a_choice(tmp_path: Path, hf_directory: Path) -> None:
    path = tmp_path / "tokenizer.json"
    shutil.copyfile(hf_directory / "tokenizer.json", path)
    with pytest.raises(
        DataConfigError,
        match=r'for the beginning of a document; name a special token, bos = "...", in tokenizer\.json\.toml beside',
    ):
        Tokenizer(tmp_path)
    sidecar = tmp_path / "tokenizer.json.toml"
    sidecar.write_text('bos = "<bos>"\n')
    with pytest.raises(DataConfigError, match=r'for the end of a document; name a special token, eos = "..."'):
        Tokenizer(tmp_path)
    sidecar.write_text('bos = "<bos>"\neos = "the"\n')
    with pytest.raises(
        DataConfigError, match=r"eos is 'the', which is none of its special tokens \(<bos>, <eos>, <pad>"
    ):
        Tokenizer(tmp_path)
    sidecar.write_text('bos = "<eos>"\neos = "<eos>"\n')
    assert Tokenizer(tmp_path).bos == Tokenizer(tmp_path).eos == Tokenizer(tmp_path).pad == 1
    sidecar.write_text('bos = "<bos>"\neos = "<eos>"\n')
    first = Tokenizer(tmp_path).sha256
    sidecar.write_text('eos = "<eos>"\nbos = "<bos>"\n')
    assert Tokenizer(tmp_path).sha256 == first


def test_ids_that_no_piece_has_count(tmp_path: Path) -> None:
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<e>": 0, "a": 3, "b": 9}, unk_token="a"))
    fast.add_special_tokens(["<e>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json.toml").write_text('bos = "<e>"\neos = "<e>"')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == 10 and tokenizer.unk == 3
    assert tokenizer.pieces() == [b"", b"", b"", b"a", *[b""] * 5, b"b"]


def test_names_come_from_the_map_then_the_configuration_then_the_sidecar(
    tmp_path: Path, hf_directory: Path
) -> None:
    shutil.copyfile(hf_directory / "tokenizer.json", tmp_path / "tokenizer.json")
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": {"content": "<pad>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<|im_start|>"}')
    assert (Tokenizer(tmp_path).bos, Tokenizer(tmp_path).eos) == (0, 3)
    (tmp_path / "tokenizer.json.toml").write_text('eos = "<eos>"\npad = "<bos>"')
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 0)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(
        DataConfigError, match=r"tokenizer_config\.json cannot be read as a configuration; correct"
    ):
        Tokenizer(tmp_path)


def test_an_unknown_piece_is_found_by_its_id(tmp_path: Path) -> None:
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    fast.add_special_tokens(["<e>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json.toml").write_text('bos = "<e>"\neos = "<e>"')
    assert Tokenizer(tmp_path).unk == 0
    assert inspect_tokenizer(tmp_path, ["ab"])["unknown_tokens"] == 1


def test_word_starts_of_each_kind(existing: Path, tmp_path: Path) -> None:
    pieces = Tokenizer(existing).pieces()
    starts = word_starts(pieces)
    assert starts[pieces.index(b" the")] and not starts[pieces.index(b"the")]
    fast = tokenizers.BertWordPieceTokenizer()
    fast.train_from_iterator(TEXTS, vocab_size=500)
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json.toml").write_text('bos = "[CLS]"\neos = "[SEP]"\npad = "[PAD]"\nunk = "[UNK]"')
    tokenizer = Tokenizer(tmp_path)
    starts = word_starts(tokenizer.pieces())
    assert starts[tokenizer.token_id("the")] and not starts[tokenizer.token_id("##s")]
    assert not starts[[tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk]].any()


def test_inspection_finds_what_is_lost(tmp_path: Path, existing: Path) -> None:
    found = inspect_tokenizer(existing, [*TEXTS, *STRINGS])
    assert found["round_trip_failures"] == 0 and found["unknown_tokens"] == 0
    assert 0 < found["byte_tokens_share"] < 0.5 and 1 < found["bytes_per_token"] < 4
    assert found["tokens_per_word"] == found["tokens"] / found["words"] > 1
    few = inspect_tokenizer(existing, ["the"])
    assert few["unused_pieces"] == few["pieces"] - 1 and len(few["unused_examples"]) == 5
    fast = tokenizers.BertWordPieceTokenizer(lowercase=True)
    fast.train_from_iterator(TEXTS, vocab_size=500)
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json.toml").write_text('bos = "[CLS]"\neos = "[SEP]"\nunk = "[UNK]"')
    lossy = inspect_tokenizer(tmp_path, ["the name", "the " * 40 + "The name", "敏捷"])
    assert lossy["round_trip_failures"] == 2 and lossy["unknown_tokens"] == 2
    assert lossy["round_trip_examples"][0] == {
        "text": "the " * 5 + "The name",
        "decoded": "the " * 5 + "the name",
    }


def test_mistakes_are_named(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    def refused(match: str, path: Path) -> None:
        with pytest.raises(DataConfigError, match=match):
            Tokenizer(path)

    (tmp_path / "empty").mkdir()
    refused("is a directory without tokenizer.json", tmp_path / "empty")
    broken = tmp_path / "broken.json"
    broken.write_text('{"model": ')
    refused("is JSON, and no tokenizer.json", broken)
    broken.write_text('{"a": 1}')
    refused("is JSON, and no tokenizer.json", broken)
    broken.write_text('{"model": {"type": "Magic"}}')
    refused("no tokenizer.json that this version of tokenizers reads", broken)
    broken.write_text('{"basestone_tokenizer": 9}')
    refused("has format 9, this version reads 1", broken)
    path = write_ranks(tmp_path / "own.tiktoken", ranks)
    refused(r"says not how text is split; write preset = .* into own\.tiktoken\.toml", path)
    sidecar = tmp_path / "own.tiktoken.toml"
    for content, match in (
        ("preset = ", "cannot be read"),
        ("preset = 3", r"got preset = 3; the keys are bos \(str\)"),
        ('speed = "fast"', "got speed = 'fast'"),
        ('preset = "gpt9"', "no preset is called 'gpt9'; there are gpt2"),
        ('preset = "gpt2"\nspecials = {"<x>" = 5}', "special '<x>' has id 5, which is taken"),
        (
            'preset = "gpt2"\nspecials = {"<x>" = 1500, "<y>" = 1500}',
            "special '<y>' has id 1500, which is taken",
        ),
        ("pattern = '('", "its pattern is none"),
        (
            "pattern = '.'\nspecials = {\"<x>\" = 1500}",
            'name a special token, bos = "...", in own.tiktoken.toml',
        ),
    ):
        sidecar.write_text(content)
        refused(match, path)
    cut = write_ranks(
        tmp_path / "gpt2.tiktoken", {token: rank for token, rank in ranks.items() if token != b"!"}
    )
    refused("byte 33 has no rank", cut)
    write_ranks(cut, {**ranks, b"zzzzzzzz": 7})
    refused("a rank is given twice", cut)
    cut.write_text("!!! 1\n")
    refused(r"line 1: b'!!! 1' is no `BASE64 RANK`", cut)


def test_missing_packages_are_named(
    existing: Path, rank_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Tokenizer(existing).kind
    name, extra = {"huggingface": ("tokenizers", "hf"), "tiktoken": ("tiktoken", "tiktoken")}[kind]
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(DataConfigError, match=rf"needs the package {name}; pip install 'basestone\[{extra}\]'"):
        Tokenizer(existing)
    if kind == "huggingface":
        with pytest.raises(DataConfigError, match=r"export needs the package tokenizers; pip install"):
            write_hf_tokenizer(rank_file, tmp_path / "out", model_max_length=9)
