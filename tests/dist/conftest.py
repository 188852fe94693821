"""Verifications of small runs, whose references are recorded once."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from proofs import GROUPS, RUN_TOML, Proof

from basestone.data.prepare import prepare
from basestone.data.tokenizer import train_tokenizer
from basestone.trainer import verify
from basestone.trainer.forks import run_ranks


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a tokenizer and a run file for each family."""
    out = tmp_path_factory.mktemp("verify")
    texts = [text for _, text in sorted(topics.items())][:40]
    (out / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(out / "all.jsonl")], out / "shards", heldout_fraction=0.1)
    sentinels = tuple(f"<extra_id_{number}>" for number in reversed(range(4)))
    train_tokenizer(iter(texts), out / "tokenizer.model", vocab_size=400)
    train_tokenizer(iter(texts), out / "sentinels.model", vocab_size=400, specials=sentinels)
    for family, groups in GROUPS.items():
        tokenizer = "sentinels" if family == "t5" else "tokenizer"
        text = RUN_TOML.format(family=family, groups=groups, tokenizer=tokenizer)
        (out / f"{family}.toml").write_text(text)
    return out


@pytest.fixture
def proof(recorded: Callable[..., Proof], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Proof]:
    """Verifications by (family, processes, dtype); a layout that hangs is over after a minute."""
    monkeypatch.setattr(verify, "run_ranks", functools.partial(run_ranks, timeout_s=60))
    return recorded


@pytest.fixture(scope="session")
def recorded(folder: Path) -> Iterator[Callable[..., Proof]]:
    """Verifications as above, for all files."""
    made: list[Proof] = []

    @functools.cache
    def make(family: str, processes: int, dtype: str = "fp32") -> Proof:
        made.append(Proof(folder, family, processes, dtype))
        return made[-1]

    yield make
    for one in made:
        one.close()
