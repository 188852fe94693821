"""A run on tokens of a tiktoken file: trained on; without the file, generated from and exported."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from commands import losses_of
from small_corpus import RUN_TOML

from basestone.data.byte_level import read_spelling
from basestone.data.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path, corpus: Path) -> Path:
    """A folder with the corpus's shards, 600 ranks and run.toml."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train([str(corpus / "topics.jsonl")], vocab_size=600, show_progress=False)
    ranks = {read_spelling(piece): rank for piece, rank in fast.get_vocab().items()}
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "gpt2.tiktoken").write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    )
    (tmp_path / "shards").symlink_to(corpus / "shards")
    (tmp_path / "run.toml").write_text(RUN_TOML.replace("tokenizer.model", "ranks/gpt2.tiktoken"))
    return tmp_path


@pytest.mark.slow
def test_a_run_takes_its_tokenizer_along(forked, folder: Path) -> None:
    changes = ("--set", "train.steps=4", "--set", "run.processes=1", "--set", "parallel.tensor=1")
    done = forked("train", folder / "run.toml", "--run-dir", folder / "run", *changes)
    assert done.returncode == 0, done.stderr
    assert len(losses_of(folder / "run")) == 4
    original = Tokenizer(folder / "ranks/gpt2.tiktoken")
    (folder / "ranks/gpt2.tiktoken").unlink()
    kept = Tokenizer(folder / "run/tokenizer.model")
    assert kept.sha256 == original.sha256 and kept.vocab_size == 601

    done = forked("generate", folder / "run", "--prompt", "The for statement", "--max-new-tokens", "3")
    assert done.returncode == 0 and "The for statement" in done.stdout, done.stderr
    done = forked("export", folder / "run", folder / "hf")
    assert done.returncode == 0, done.stderr
    transformers = pytest.importorskip("transformers")
    exported = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    text = "for i in range(10):\n\tprint(i)  # naïve 敏捷"
    assert exported(text)["input_ids"] == [600, *original.encode(text).tolist()]
    assert json.loads((folder / "hf/config.json").read_text())["bos_token_id"] == 600
