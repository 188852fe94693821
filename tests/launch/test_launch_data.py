"""The commands that need no torch, on small real files: prepare, tokenizer, data."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path

import pytest
from in_process import refused

from basestone.data.preparing.settings import CorpusSettings
from basestone.launch import data_commands


def test_prepare_says_in_words_what_it_did(basestone, tmp_path, jsonl):
    (tmp_path / "texts.jsonl").write_bytes(jsonl)
    done = basestone("prepare", tmp_path / "texts.jsonl", "--out", tmp_path / "shards", "--workers", "0")
    assert done.code == 0 and len(done.out.splitlines()) == 1 and "no document was held out" in done.err
    assert "documents to train on" in done.out and "dropped: 1 " in done.out
    refused(
        basestone("prepare", tmp_path / "texts.jsonl", "--out", tmp_path / "shards", "--workers", "0"),
        64,
        "shards",
    )


def test_sizes_of_chunks_and_shards_are_given_in_kib_and_mib(basestone, tmp_path, texts):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text * 5}) + "\n" for text in texts))
    counts = []
    for words in (("--chunk-kib", "2"), ("--chunk-kib", "32", "--shard-mib", "1")):
        out = tmp_path / f"out{len(counts)}"
        done = basestone("prepare", tmp_path / "in.jsonl", "--out", out, "--workers", "0", *words)
        assert done.code == 0, done.err
        manifest = json.loads((out / "train" / "manifest.json").read_text())
        counts.append(sum(len(shard["chunks"]) for shard in manifest["shards"]))
    assert counts[0] > 2 * counts[1] > 2
    done = basestone("data", "index", tmp_path / "out0" / "train", "--chunk-kib", "32", "--json")
    assert done.code == 0 and json.loads(done.out)["chunks"] == counts[1]
    refused(
        basestone("prepare", tmp_path / "in.jsonl", "--out", tmp_path / "o", "--chunk-kib", "70000"),
        64,
        "no larger",
    )


def test_prepare_refuses_what_is_not_there(basestone, tmp_path):
    refused(basestone("prepare", tmp_path / "no.txt", "--out", tmp_path / "out"), 64, "no.txt' names no file")
    (tmp_path / "empty").mkdir()
    refused(basestone("prepare", tmp_path / "empty", "--out", tmp_path / "out"), 64, "holds no text files")
    assert not (tmp_path / "out").exists()


def test_the_help_and_the_docs_of_prepare_tell_the_defaults(basestone):
    told = " ".join(basestone("prepare", "--help").out.replace("│", " ").split())
    defaults = CorpusSettings()
    table = (Path(__file__).parents[2] / "docs" / "prepare.md").read_text()
    for option, value in (("min-chars", defaults.min_chars), ("heldout-fraction", defaults.heldout_fraction)):
        assert re.search(rf"--{option} [^-]*Default: {re.escape(str(value))}\.", told)
        assert f"| `--{option}` ({value}) |" in table


def test_prepare_hands_every_option_on(basestone, tmp_path, texts, monkeypatch):
    (tmp_path / "own_filters.py").write_text(
        "def short(text):\n    return 'no_nine' if 'Document 9' in text else None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = [text + " Ask me@example.org." for text in texts] + [
        "<b>never</b>",
        texts[30] + "Ask you@example.org.",
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    (tmp_path / "test.txt").write_text(texts[20].split(":")[0] + " the quick brown fox jumps over the lazy")
    (tmp_path / "page.html").write_text("<p>kept with its markup, and long enough for that")
    words = ["--text-field", "body", "--keep-html", "--min-chars", "20", "--filter", "own_filters:short"]
    words += [
        "--decontaminate",
        tmp_path / "test.txt",
        "--ngram",
        "9",
        "--scrub",
        "--fix-text",
        "--workers",
        "0",
    ]
    words += ["--near-duplicates", "--heldout-fraction", "0"]
    sources = (tmp_path / "in.jsonl", tmp_path / "page.html")
    done = basestone("prepare", *sources, "--out", tmp_path / "shards", *words, "--json")
    report = json.loads(done.out)
    assert {"no_nine", "too_short", "contaminated", "near_duplicate"} <= set(report["dropped"])
    assert report["scrubbed"]["email"] == report["documents_kept"] - 1 and report["heldout_documents"] == 0
    assert report["sources"][str(tmp_path / "page.html")]["documents_kept"] == 1
    in_words = basestone("prepare", *sources, "--out", tmp_path / "again", *words)
    assert f"; replaced: {report['scrubbed']['email']} email" in in_words.out
    strict = basestone("prepare", *sources, "--out", tmp_path / "no", "--rules", "gopher, c4", "--workers", "0")
    refused(strict, 64, "no document is left to train on", "no_text_field: 62", "name the right text_field")


def test_prepare_says_all_that_is_wrong_at_once(basestone, tmp_path):
    words = ("--rules", "gofer", "--filter", "nocolon", "--ngram", "1")
    done = basestone("prepare", tmp_path / "none.txt", "--out", tmp_path / "out", *words)
    assert done.code == 64 and done.out == "" and len(done.err.splitlines()) == 4
    for text in ("names no file", "rules 'gofer'", "filter 'nocolon'", "ngram is 1"):
        assert text in done.err


def test_prepare_shows_a_bar_with_rates_on_a_terminal(monkeypatch):
    from rich.console import Console

    from basestone.data.prepare import PrepareProgress
    from basestone.launch import prepare_progress

    shown = io.StringIO()
    terminal = lambda **_: Console(file=shown, force_terminal=True, width=160)  # noqa: E731
    monkeypatch.setattr("rich.console.Console", terminal)
    with prepare_progress.show_progress() as progress:
        progress(PrepareProgress("cleaning", 500, 400, 3_000_000, 0, 3))
        time.sleep(0.05)
        progress(PrepareProgress("cleaning", 1000, 900, 9_000_000, 2, 3))
        progress(PrepareProgress("writing", 300, 200, 1_000_000, 300, 1000))
    for text in ("2/3", "files, 1,000 documents read, 900 kept", "documents/s", "MB/s", "300/1000", "writing"):
        assert text in shown.getvalue()
    monkeypatch.undo()
    with prepare_progress.show_progress(io.StringIO()) as progress:
        assert progress is None  # no terminal


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("builtin:ruby",), "no embedded corpus is called 'builtin:ruby'; there are: builtin:python"),
        (
            ("builtin:python", "more.txt"),
            "builtin:python more.txt: an embedded corpus brings its own tokenizer",
        ),
        (("builtin:python", "--tokenizer", "t.model"), "give it alone, with --out only"),
        (("builtin:python", "--min-chars", "5"), "give it alone, with --out only"),
        (("builtin:python", "--heldout-fraction", "0.5"), "give it alone, with --out only"),
        (("builtin:python", "--workers", "3"), "give it alone, with --out only"),
        (("builtin:python", "--scrub"), "give it alone, with --out only"),
        (("builtin:python", "--rules", "gopher"), "give it alone, with --out only"),
        (("builtin:python", "--ngram", "9"), "give it alone, with --out only"),
    ],
)
def test_an_embedded_corpus_has_a_name_and_no_settings(basestone, tmp_path, words, text):
    refused(basestone("prepare", *words, "--out", tmp_path / "out"), 64, text)
    assert not (tmp_path / "out").exists()


def test_prepare_builtin_prints_where_everything_is(basestone, tmp_path, monkeypatch):
    from basestone.data import builtin

    whole = builtin.prepare_builtin
    small = lambda name, out, log: whole(name, out, log, max_files=20, vocab_size=400)  # noqa: E731
    monkeypatch.setattr(builtin, "prepare_builtin", small)
    done = basestone("prepare", "builtin:python", "--out", tmp_path / "out")
    assert done.code == 0 and "preparing builtin:python" in done.err
    found = list((tmp_path / "out").glob("python-*/tokenizer.model"))
    assert len(found) == 1 and str(found[0]) in done.out and str(found[0].parent / "train") in done.out
    again = basestone("prepare", "builtin:python", "--out", tmp_path / "out", "--json")
    assert json.loads(again.out)["vocab_size"] == 400 and again.err == ""


def test_tokenizers_see_the_text_of_tables_and_pages(basestone, tmp_path, tokenizer, texts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": texts[:9]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("".join(texts[:9]))
    rows, whole = (
        json.loads(basestone("tokenizer", "inspect", tokenizer, tmp_path / name, "--json").out)
        for name in ("a.parquet", "b.txt")
    )
    assert rows["bytes"] == whole["bytes"] > 0


def test_tokenizer_inspect_and_export(basestone, tmp_path, shards, tokenizer):
    result = json.loads(basestone("tokenizer", "inspect", tokenizer, shards / "heldout", "--json").out)
    words = basestone("tokenizer", "inspect", tokenizer, shards / "heldout")
    assert words.code == 0 and [line.split(": ")[0] for line in words.out.splitlines()] == list(result)
    assert result["vocab_size"] == 400
    done = basestone("tokenizer", "export", tokenizer, tmp_path / "hf", "--model-max-length", "77")
    assert done == (0, f"{tmp_path / 'hf'}\n", "")
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["model_max_length"] == 77
    assert len(json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]["vocab"]) == 400


def test_an_output_on_or_below_a_file_is_refused(basestone, tmp_path, shards, tokenizer):
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "below"):
        refused(
            basestone("tokenizer", "export", tokenizer, out), 64, f"tokenizer into {out} failed", "another path"
        )
    words = ("tokenizer", "train", shards / "train", "--vocab-size", "400", "--out")
    refused(basestone(*words, file / "below"), 64, "failed", "choose another path")
    refused(basestone(*words, tmp_path), 64, "failed", "choose another path")
    assert file.read_text() == "kept"


def test_tokenizer_commands_refuse_what_is_no_model(basestone, tmp_path):
    (tmp_path / "not.model").write_text("not a model")
    (tmp_path / "text.txt").write_text("text")
    for name in ("not.model", "no.model"):
        refused(basestone("tokenizer", "inspect", tmp_path / name, tmp_path / "text.txt"), 64, name)
        refused(basestone("tokenizer", "export", tmp_path / name, tmp_path / "hf"), 64, name)


def test_data_inspect_and_index(basestone, tmp_path, shards, tokenizer):
    result = json.loads(basestone("data", "inspect", shards / "train", "--json", "--documents", "2").out)
    assert result["kind"] == "text" and len(result["examples"]) == 2
    done = basestone("data", "inspect", shards / "train", "--tokenizer", tokenizer, "--documents", "1")
    assert done.code == 0 and "Document " in done.out and " tokens, " in done.out
    before = json.loads((shards / "train" / "manifest.json").read_text())
    for path in shards.glob("train/*"):
        if path.suffix != ".tar":
            path.unlink()
    done = basestone("data", "index", shards / "train", "--json")
    assert done.code == 0 and isinstance(json.loads(done.out), dict)
    assert json.loads((shards / "train" / "manifest.json").read_text())["shards"] == before["shards"]
    refused(basestone("data", "index", tmp_path / "nowhere"), 64, "nowhere")
    refused(basestone("data", "inspect", tmp_path), 64, str(tmp_path))


@pytest.mark.faults
def test_data_verify_of_a_damaged_shard_is_76(basestone, shards):
    done = basestone("data", "verify", shards / "train")
    assert done == (0, f"{shards / 'train'}: every chunk matches its checksum\n", "")
    assert basestone("data", "verify", shards / "train", "--json") == (0, "[]\n", "")
    shard = next(shards.glob("train/*.tar"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    done = basestone("data", "verify", shards / "train")
    assert done.code == 76 and shard.name in done.out and len(done.out.splitlines()) == 1
    done = basestone("data", "verify", shards / "train", "--json")
    assert done.code == 76 and shard.name in json.loads(done.out)[0]["problem"]


def test_text_of_both_kinds_trains_a_tokenizer(tmp_path, shards, texts):
    """A shard directory and a plain file give their documents to the tokenizer."""
    (tmp_path / "more.txt").write_text("more words")
    found = list(data_commands._texts([str(shards / "heldout"), str(tmp_path / "more.txt")]))
    assert found[-1] == "more words" and set(found[:-1]) < set(texts) and len(found) > 1
