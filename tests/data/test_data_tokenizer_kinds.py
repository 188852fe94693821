"""Existing tokenizers: Hugging Face directories, tiktoken ranks; the same ids wherever they are read."""

import base64
import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torture import torture_strings

from basestone.data.byte_level import read_spelling, spell_bytes
from basestone.data.errors import DataConfigError
from basestone.data.hf_tokenizer import write_hf_tokenizer
from basestone.data.tasks.vocabulary import word_starts
from basestone.data.tiktoken_ranks import PRESETS
from basestone.data.tokenizer import Tokenizer
from basestone.data.tokenizer_inspect import inspect_tokenizer

tokenizers = pytest.importorskip("tokenizers")
tiktoken = pytest.importorskip("tiktoken")

STRINGS = torture_strings(1000, seed=31)
TEXTS = [*topics.values()][:30]


def train_ranks(pattern: str, num_ranks: int) -> dict[bytes, int]:
    """Train byte-level BPE on real text; its ids are ranks."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num_ranks,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator([*TEXTS, *torture_strings(300, seed=32)], trainer)
    return {read_spelling(piece): rank for piece, rank in fast.get_vocab().items()}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return train_ranks(PRESETS["cl100k_base"].pattern, 1500)


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory: pytest.TempPathFactory, ranks: dict[bytes, int]) -> Path:
    return write_ranks(tmp_path_factory.mktemp("ranks") / "cl100k_base.tiktoken", ranks)


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE as it is published: tokenizer.json beside a configuration."""
    folder = tmp_path_factory.mktemp("hf")
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator(TEXTS, vocab_size=900, special_tokens=["<bos>", "<eos>", "<pad>", "<|im_start|>"])
    fast.enable_truncation(16)
    fast.enable_padding(length=16)
    fast.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<bos>",
        "eos_token": {"content": "<eos>", "__type": "AddedToken"},
        "pad_token": "<pad>",
        "tokenizer_class": "GPT2Tokenizer",
        "auto_map": {"AutoTokenizer": ["own_code.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text("raise SystemExit('code of a tokenizer was run')")
    return folder


@pytest.fixture(params=["hf_directory", "rank_file"])
def existing(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


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
