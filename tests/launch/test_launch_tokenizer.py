"""The tokenizer commands, on real text: training with symbols, measuring, and tokenizers of other origin."""

from __future__ import annotations

import json
import shutil
import sys
from pydoc_data.topics import topics

import pytest
from in_process import refused

from basestone.launch import data_commands


@pytest.fixture
def notes(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in topics.values())
    (tmp_path / "notes.jsonl").write_text(lines)
    return tmp_path / "notes.jsonl"


def test_training_measures_on_text_held_back(basestone, tmp_path, notes):
    out = tmp_path / "notes.model"
    words = ("tokenizer", "train", notes, "--out", out, "--vocab-size", "700")
    done = basestone(*words)
    assert done.code == 0 and done.err == ""
    first, second = done.out.splitlines()
    assert first.startswith(f"{out}: 700 pieces from 0.") and "documents held back" in second
    assert second.endswith("all come back") and " bytes/token, " in second and " tokens/word, " in second
    report = json.loads(basestone(*words, "--json").out)
    held_back = report["held_back"]
    assert held_back["texts"] + report["num_documents"] == len(topics) and 0 < held_back["texts"] < 10
    assert f"{held_back['bytes_per_token']:.2f} bytes/token" in second


def test_training_takes_symbols_specials_and_sizes(basestone, tmp_path, notes):
    from basestone.data.tokenizer import Tokenizer

    out = tmp_path / "s.model"
    options = (
        "--symbol",
        "<b>",
        "--symbol",
        "<i>",
        "--special",
        "<mask>",
        "--sentinels",
        "3",
        "--no-split-digits",
    )
    done = basestone("tokenizer", "train", notes, "--out", out, "--vocab-size", "600", *options, "--json")
    tokenizer = Tokenizer(out)
    assert done.code == 0 and len(tokenizer.encode("<b><i>")) == 2
    names = ("<mask>", "<extra_id_2>", "<extra_id_1>", "<extra_id_0>")
    assert [tokenizer.token_id(name) for name in names] == [4, 5, 6, 7]
    refused(
        basestone("tokenizer", "train", notes, "--out", out, "--special", "<s>"), 64, "symbols '<s>' are taken"
    )
    long = tmp_path / "long.jsonl"
    texts = [change(text) for change in (str.upper, str.swapcase) for text in topics.values()]
    long.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ("tokenizer", "train", notes, long, "--out", out, "--vocab-size", "600", "--json")
    whole = json.loads(basestone(*words).out)
    assert whole["sample_bytes"] > 1 << 20
    part = json.loads(basestone(*words, "--training-megabytes", "1").out)
    assert part["sample_bytes"] <= 1 << 20 and part["num_documents"] < whole["num_documents"]


def test_documents_that_are_not_utf8_are_passed_over(basestone, tmp_path, notes):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text":"bad \\ud800 surrogate"}\n' * 3)
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    words = ("tokenizer", "train", notes, "--out", tmp_path / "a.model", "--vocab-size", "500", "--json")
    plain = basestone(*words)
    done = basestone(*words[:3], bad, tmp_path / "latin.txt", *words[3:])
    assert done.code == 0 and done.out == plain.out
    assert done.err == "passed over 4 documents that are not UTF-8, as `prepare` does\n"
    seen = basestone("tokenizer", "inspect", tmp_path / "a.model", bad, notes, "--json")
    assert seen.code == 0 and json.loads(seen.out)["texts"] == len(topics)
    assert seen.err == "passed over 3 documents that are not UTF-8, as `prepare` does\n"
    none = basestone("tokenizer", "train", bad, "--out", tmp_path / "b.model")
    assert none.code == 64 and "error: no text to train" in none.err and "passed over 3" in none.err


def test_a_symbol_that_is_no_text_is_refused(basestone, tmp_path, notes):
    words = ("tokenizer", "train", notes, "--out", tmp_path / "a.model")
    refused(basestone(*words, "--symbol", "\udcff"), 64, "is not UTF-8 or holds a NUL")
    refused(basestone(*words, "--symbol", "a"), 64, "is a piece of every tokenizer already", "leave it out")


def test_a_single_document_is_not_held_back(basestone, tmp_path):
    (tmp_path / "one.txt").write_text(topics["formatstrings"])
    done = basestone(
        "tokenizer", "train", tmp_path / "one.txt", "--out", tmp_path / "o.model", "--vocab-size", "400"
    )
    assert done.code == 0 and "no document was held back, there are so few" in done.out


def test_progress_is_shown_on_a_terminal_alone(capsys, monkeypatch):
    texts = [f"{number:04}" for number in range(250)]
    assert list(data_commands._with_progress(iter(texts))) == texts
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(data_commands._with_progress(iter(texts))) == texts
    lines = capsys.readouterr().err.split("\r")
    assert lines[1:] == [
        "100 documents read, 0.0 M characters",
        "200 documents read, 0.0 M characters",
        "all documents read; training\n",
    ]


def test_inspect_and_export_take_other_kinds(basestone, tmp_path, notes):
    model = tmp_path / "n.model"
    basestone("tokenizer", "train", notes, "--out", model, "--vocab-size", "400")
    assert basestone("tokenizer", "export", model, tmp_path / "hf").code == 0
    found = json.loads(basestone("tokenizer", "inspect", tmp_path / "hf", notes, "--json").out)
    own = json.loads(basestone("tokenizer", "inspect", model, notes, "--json").out)
    assert found["kind"] == "huggingface" and own["kind"] == "sentencepiece"
    for name in ("tokens", "bytes_per_token", "unused_pieces", "byte_tokens_share", "round_trip_failures"):
        assert found[name] == own[name]
    assert basestone("tokenizer", "export", tmp_path / "hf", tmp_path / "again").code == 0
    copied = (tmp_path / "again" / "tokenizer.json").read_bytes()
    assert copied == (tmp_path / "hf" / "tokenizer.json").read_bytes()
    (tmp_path / "bare").mkdir()
    shutil.copyfile(tmp_path / "hf" / "tokenizer.json", tmp_path / "bare" / "tokenizer.json")
    for words in (("inspect", tmp_path / "bare", notes), ("export", tmp_path / "bare", tmp_path / "out")):
        refused(basestone("tokenizer", *words), 64, 'bos = "..."', "tokenizer.json.toml")
    assert not (tmp_path / "out").exists()
