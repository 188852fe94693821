"""Verifications of small runs, to which layouts are put one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from basestone.trainer import verify
from basestone.trainer.layouts import SERIAL, Layout, parse_layout
from basestone.trainer.load import load_run
from basestone.trainer.places import locate
from basestone.trainer.verify import TOLERANCES, Verdict, Verification

STEPS = 2

RUN_TOML = """
[model]
family = "{family}"
num_layers = 4
hidden_size = 64
num_attention_heads = 8
{groups}
dropout = 0.1
max_sequence_length = 32
[data]
train = "shards/train"
tokenizer = "{tokenizer}.model"
sequence_length = 32
[train]
steps = 50
global_batch = 8
dtype = "bf16"
[optimizer]
lr = 1e-3
"""
GROUPS = {  # gpt2 ties its embeddings
    "llama": "num_query_groups = 4",
    "gpt2": "",
    "qwen2": "num_query_groups = 4\ntied = true",
    "qwen3": "num_query_groups = 2\nhead_dim = 12",
    "t5": "num_decoder_layers = 3",
}


class Proof:
    """A verification whose reference is recorded once, and layouts that are put to it one by one."""

    def __init__(self, folder: Path, family: str, processes: int, dtype: str) -> None:
        run = load_run(folder / f"{family}.toml")
        self.processes = processes
        self.verification = Verification(
            run, locate(run.data, run.reading, folder), num_processes=processes, steps=STEPS, dtype=dtype
        )
        self._asked = [SERIAL]
        self._verdicts = self.verification.run(iter(self._queue, None))  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.verification, "_compare", lambda *arguments: None)
            next(self._verdicts)  # the reference is there before any fault is

    def _queue(self) -> Layout | None:
        return self._asked.pop() if self._asked else None

    def __call__(self, name: str) -> Verdict:
        """Give the verdict on a layout, under what is patched at this moment."""
        layout = parse_layout(name, self.processes)
        assert self.verification.problems(layout) == ""
        self._asked.append(layout)
        verdict = next(self._verdicts)
        assert verdict.layout == str(layout)
        return verdict

    def close(self) -> None:
        self._verdicts.close()  # type: ignore[attr-defined]


def assert_equal(verdict: Verdict, dtype: str = "fp32") -> None:
    assert verdict.equal and verdict.first == "", verify.row(verdict)
    limits = TOLERANCES[dtype]
    assert verdict.loss <= limits.loss and verdict.norm <= limits.norm
    assert max(verdict.gradient, verdict.update) <= limits.tensor
    assert verdict.seconds > 0


def named(verdict: Verdict, *words: str) -> None:
    """Check that a layout differs, and that what was seen first is said."""
    assert not verdict.equal, verify.row(verdict)
    for word in words:
        assert word in verdict.first, verdict.first
