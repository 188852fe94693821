"""The embedded corpus prepares itself once, whoever asks."""

import ast
import inspect
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from streams import open_stream

from basestone.data.builtin import prepare_builtin
from basestone.data.errors import DataConfigError
from basestone.data.heldout import load_heldout
from basestone.data.passages import TEXT_SEPARATOR
from basestone.data.shards import open_shard_set
from basestone.data.tasks.causal import CausalTask
from basestone.data.tokenizer import Tokenizer

SMALL = {"max_files": 60, "vocab_size": 512}
PREPARE = f"""
import sys
from pathlib import Path
from basestone.data.builtin import prepare_builtin
print(prepare_builtin("builtin:python", Path(sys.argv[1]), print, **{SMALL!r}).train)
"""


def test_a_small_corpus_is_whole_and_found_again(tmp_path: Path) -> None:
    said: list[str] = []
    corpus = prepare_builtin("builtin:python", tmp_path, said.append, **SMALL)
    assert any("preparing builtin:python" in line for line in said)
    train, heldout = open_shard_set(corpus.train), open_shard_set(corpus.heldout)
    assert (train.num_documents, heldout.num_documents) == (
        corpus.report["train_documents"],
        corpus.report["heldout_documents"],
    )
    assert train.text_bytes > 300_000 and heldout.num_documents > 0
    assert list(corpus.report["sources"]) == ["topics", "library"]
    tokenizer = Tokenizer(corpus.tokenizer)
    assert tokenizer.vocab_size == 512 and tokenizer.sha256 == corpus.report["tokenizer_sha256"]
    stream = open_stream(
        [corpus.train],
        corpus.tokenizer,
        sequence_length=64,
        global_batch=4,
        seed=0,
    )
    assert stream.next_batch().weights.all()
    task = CausalTask(64, "split")
    assert load_heldout(corpus.heldout, corpus.tokenizer, task, max_tokens=1 << 20).num_bytes > 1000

    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    said.clear()
    assert prepare_builtin("builtin:python", tmp_path, said.append, **SMALL) == corpus
    assert said == [] and before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}


def test_the_whole_corpus_is_ten_megabytes_of_code_and_english() -> None:
    """The sources alone, without training a tokenizer."""
    from basestone.data.builtin import _python_documents
    from basestone.data.cleaning import CleanDocument, clean_document

    kept = {raw.origin: clean_document(raw.content, 32) for raw in _python_documents(None)}
    texts = {origin: found.text for origin, found in kept.items() if isinstance(found, CleanDocument)}
    assert sum(len(text.encode()) for text in texts.values()) > 8_000_000
    assert {"topics/assert", "argparse.py", "asyncio/events.py"} <= set(texts)
    assert not any("site-packages" in origin or origin.startswith(("test/", "encodings/")) for origin in texts)


def test_a_copy_made_elsewhere_has_the_same_bytes(tmp_path: Path) -> None:
    first, second = (prepare_builtin("builtin:python", tmp_path / name, **SMALL) for name in "ab")
    assert first.report == second.report and first.tokenizer.read_bytes() == second.tokenizer.read_bytes()


def test_settings_have_a_copy_each(tmp_path: Path) -> None:
    first = prepare_builtin("builtin:python", tmp_path, **SMALL)
    second = prepare_builtin("builtin:python", tmp_path, **{**SMALL, "vocab_size": 600})
    assert first.train != second.train and Tokenizer(first.tokenizer).vocab_size == 512


def test_a_tokenizer_with_symbols_has_the_same_pieces_and_corpus(tmp_path: Path) -> None:
    said: list[str] = []
    with_symbols = prepare_builtin("builtin:python-symbols", tmp_path, said.append, **SMALL)
    assert any("preparing builtin:python-symbols" in line for line in said)
    said.clear()
    plain = prepare_builtin("builtin:python", tmp_path, said.append, **SMALL)
    assert (
        said == [] and prepare_builtin("builtin:python-symbols", tmp_path, said.append, **SMALL) == with_symbols
    )
    assert said == []
    assert (with_symbols.train, with_symbols.heldout) == (plain.train, plain.heldout)
    ours, theirs = Tokenizer(with_symbols.tokenizer), Tokenizer(plain.tokenizer)
    assert ours.vocab_size == theirs.vocab_size + 103 == with_symbols.report["vocab_size"]
    assert (
        ours.pieces()[4 + 103 :] == theirs.pieces()[4:]
        and ours.sha256 == with_symbols.report["tokenizer_sha256"]
    )
    assert [ours.token_id(piece) for piece in ("[CLS]", "[SEP]", "[MASK]")] == [4, 5, 6]
    assert [ours.token_id(f"<extra_id_{number}>") for number in range(100)] == list(range(106, 6, -1))
    text = "[MASK] is text in a document"
    assert 6 not in ours.encode(text) and ours.decode(ours.encode(text)) == text


def test_pairs_are_docstrings_and_the_code_under_them(tmp_path: Path) -> None:
    pairs = prepare_builtin("builtin:python-pairs", tmp_path, **SMALL)
    assert pairs.tokenizer == prepare_builtin("builtin:python-symbols", tmp_path, **SMALL).tokenizer
    opened = [open_shard_set(place) for place in (pairs.train, pairs.heldout)]
    texts = [text for one in opened for chunk in range(one.num_chunks) for text in one.read_documents(chunk)]
    found = dict(text.split(TEXT_SEPARATOR) for text in texts)
    assert len(found) == len(texts) == pairs.report["documents_kept"] > 100
    assert 0.05 < opened[1].num_documents / len(texts) < 0.2
    code = found[inspect.getdoc(ast.get_docstring)]
    assert code.startswith("if not isinstance(node,") and code.rstrip().endswith("return text")


@pytest.mark.faults
def test_processes_that_ask_together_share_one_copy(tmp_path: Path) -> None:
    asked = [
        subprocess.Popen([sys.executable, "-c", PREPARE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=60)[0].splitlines() for process in asked]
    assert [process.returncode for process in asked] == [0, 0, 0]
    assert len({lines[-1] for lines in said}) == 1
    assert sum(any("preparing builtin" in line for line in lines) for lines in said) == 1


@pytest.mark.faults
def test_a_kill_in_the_middle_is_made_good(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", PREPARE, str(tmp_path)], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not list(tmp_path.glob(".*.unfinished/corpus/train/*.tar")) and time.monotonic() < end:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("python-*"))
    corpus = prepare_builtin("builtin:python", tmp_path, **SMALL)
    assert open_shard_set(corpus.train).num_documents == corpus.report["train_documents"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".builtin.lock", corpus.train.parent.name]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataConfigError, match="no embedded corpus is called 'builtin:perl'; there are: builtin:python"
    ):
        prepare_builtin("builtin:perl", tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        DataConfigError, match=r"preparing builtin:python in .* failed: .*; choose another path"
    ):
        prepare_builtin("builtin:python", tmp_path / "file", **SMALL)
