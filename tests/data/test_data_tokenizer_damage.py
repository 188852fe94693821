"""Damaged and foreign tokenizers: each fault is named in one message, and what can be read is read right."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from existing_tokenizers import write_ranks

from basestone.data.errors import DataConfigError, DataError
from basestone.data.hf_tokenizer import write_hf_tokenizer
from basestone.data.tokenizer import Tokenizer
from basestone.data.tokenizer_inspect import inspect_tokenizer

tokenizers = pytest.importorskip("tokenizers")
tiktoken = pytest.importorskip("tiktoken")

BYTES = {bytes([byte]): byte for byte in range(256)}
FRAME = 'preset = "cl100k_base"\n'


def refused(path: Path, out: Path, match: str) -> None:
    """Check that loading, inspecting and exporting say the same; the message is short."""
    for use in (Tokenizer, lambda at: inspect_tokenizer(at, ["a"]), lambda at: export(at, out)):
        with pytest.raises(DataConfigError, match=match) as caught:
            use(path)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    assert not out.exists()


def export(path: Path, out: Path) -> None:
    write_hf_tokenizer(path, out, model_max_length=9)


def write_json(folder: Path, vocabulary: dict[str, int], **parts: Any) -> Path:
    """Write a tokenizer.json with the special <e>, changed by hand."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.add_special_tokens(["<e>"])
    definition = json.loads(fast.to_str())
    definition["model"]["vocab"] = {"<e>": 0, **vocabulary}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**definition, **parts}))
    (folder / "tokenizer.json.toml").write_text('bos = "<e>"\neos = "<e>"')
    return path


def test_a_vocabulary_is_neither_empty_nor_endless(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))
    refused(path, tmp_path / "out", r"has ids up to -1; a vocabulary has 1 to 16,777,216")
    write_json(tmp_path, {"a": 2_000_000_000})
    refused(path, tmp_path / "out", r"has ids up to 2000000000; a vocabulary has 1 to 16,777,216")
    write_json(tmp_path, {"a": 9})
    assert Tokenizer(path).vocab_size == 10


@pytest.mark.parametrize("opening", ['{"model":', '{"basestone_tokenizer":1,"settings":'])
def test_deep_nesting_is_refused(opening: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(opening + "[" * 200_000)
    refused(path, tmp_path / "out", r"is JSON, and no tokenizer\.json")


def test_deep_nesting_beside_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path, {"a": 1})
    (tmp_path / "tokenizer_config.json").write_text("[" * 200_000)
    refused(path, tmp_path / "out", r"tokenizer_config\.json cannot be read as a configuration")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json.toml").write_text("bos = " + "[" * 200_000)
    refused(path, tmp_path / "out", r"tokenizer\.json\.toml cannot be read")


def test_ranks_and_specials_are_bounded(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "own.tiktoken", {**BYTES, b"ab": 1 << 40})
    (tmp_path / "own.tiktoken.toml").write_text(FRAME)
    refused(path, tmp_path / "out", "rank 1099511627776 is not below 16,777,216; the file is cut, damaged")
    write_ranks(path, BYTES)
    (tmp_path / "own.tiktoken.toml").write_text(f'{FRAME}[specials]\n"<|endoftext|>" = 99999999999\n')
    refused(path, tmp_path / "out", r"special '<\|endoftext\|>' has id 99999999999, which is taken or no id")


@pytest.mark.parametrize(
    "change",
    [
        {"settings": 5},
        {"settings": {"bos": 5}},
        {"settings": {"speed": "x"}},
        {"settings": {"bos": "<|endoftext|>", "specials": {}}},
        {"settings": {"pattern": "."}},
        {"kind": "magic"},
        {"kind": ["tiktoken"]},
        {"content": None},
        {"content": "\ud800"},
    ],
)
def test_a_damaged_whole_file_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    source = write_ranks(tmp_path / "cl100k_base.tiktoken", BYTES)
    whole = json.loads(Tokenizer(source).content)
    path = tmp_path / "tokenizer.model"
    path.write_text(json.dumps(whole))
    assert Tokenizer(path).vocab_size == 257
    path.write_text(json.dumps({**whole, **change}))
    refused(path, tmp_path / "out", r"is JSON, and no tokenizer\.json")


def test_a_whole_file_with_a_special_out_of_bounds_is_refused(tmp_path: Path) -> None:
    source = write_ranks(tmp_path / "cl100k_base.tiktoken", BYTES)
    whole = json.loads(Tokenizer(source).content)
    whole["settings"]["specials"]["<|x|>"] = 1 << 40
    path = tmp_path / "tokenizer.model"
    path.write_text(json.dumps(whole))
    refused(path, tmp_path / "out", r"special '<\|x\|>' has id 1099511627776")


def test_a_sentencepiece_model_with_damaged_pieces_is_refused(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    path = tmp_path / "m.model"
    place = content.index("\u2581the".encode())
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    refused(path, tmp_path / "out", "is no SentencePiece model")
    path.write_bytes(content.replace(b"<pad>", b"<s>\xff\xff"))  # twice the same but for the damage
    refused(path, tmp_path / "out", "is no SentencePiece model")


def test_a_model_whose_unknown_piece_is_not_marked_has_no_exact_form(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    size = content[1]
    assert content[:9] == bytes([0x0A, size, 0x0A, 5]) + b"<unk>" and size < 100
    # a second type in another wire form: SentencePiece passes over it
    entry = content[2 : 2 + size] + b"\x1d\0\0\0\0"
    path = tmp_path / "m.model"
    path.write_bytes(bytes([0x0A, len(entry)]) + entry + content[2 + size :])
    assert Tokenizer(path).unk == 0
    with pytest.raises(DataConfigError, match="has no exact Hugging Face form: it has no unknown piece"):
        export(path, tmp_path / "out")


def test_pieces_that_do_not_fit_their_decoder_are_taken_as_it_takes_them(tmp_path: Path) -> None:
    for decoder, vocabulary in (
        ({"type": "ByteLevel"}, {"\u2581the": 1, "Ġthe": 2}),
        (
            {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            {"<0xZZ>": 1, "<0x41>": 2},
        ),
        (
            {"type": "Sequence", "decoders": [{"type": "WordPiece", "prefix": "@@", "cleanup": False}]},
            {"the": 1, "@@re": 2},
        ),
    ):
        extra = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        path = write_json(tmp_path, vocabulary, decoder={**decoder, **extra} if len(decoder) == 1 else decoder)
        tokenizer = Tokenizer(path)
        pieces = tokenizer.pieces()
        for first, second in ((1, 2), (1, 1)):
            text = b"".join(pieces[token] for token in (first, second)).decode()
            assert tokenizer.decode([first, second]).lstrip() == text.lstrip()
        assert inspect_tokenizer(path, ["x"])["pieces"] == 2


def test_a_text_that_a_tokenizer_fails_on_is_named(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "cl100k_base.tiktoken", {**BYTES, b"  ": 256})
    tokenizer = Tokenizer(path)
    text = "x" + " " * 1_000_000 + "y"
    message = (
        r"a text of 1,000,002 characters .* cannot be tokenised by tiktoken: .*StackOverflow.*; drop the doc"
    )
    with pytest.raises(DataError, match=message) as caught:
        tokenizer.encode_document(text)
    assert not isinstance(caught.value, DataConfigError) and len(str(caught.value)) < 500
    assert tokenizer.decode(tokenizer.encode(text[:10_000])) == text[:10_000]
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 1, "<e>": 0}, unk_token="none"))
    fast.add_special_tokens(["<e>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json.toml").write_text('bos = "<e>"\neos = "<e>"')
    with pytest.raises(DataError, match=re.escape("begins with 'b' cannot be tokenised by tokenizers: ")):
        Tokenizer(tmp_path).encode("b")


def test_a_request_to_end_is_no_failure_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(write_ranks(tmp_path / "cl100k_base.tiktoken", BYTES))

    class Stopped:
        def encode_ordinary(self, text: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer._engine, "_encoding", Stopped())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")
