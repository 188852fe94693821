"""`basestone finetune`: what it hands to its workers."""

from __future__ import annotations

import json

import pytest
from in_process import refused

from basestone.trainer.finetuning.settings import FinetuneSettings


def test_options_reach_the_workers(basestone, asked):
    words = ("finetune", "model", "data.jsonl", "--out", "out")
    assert basestone(*words).code == 7
    (name, text), num_workers, logs = asked[0][0], *asked[0][1:]
    assert (name, num_workers) == ("finetune", 1) and not logs.exists()
    assert FinetuneSettings(**json.loads(text)) == FinetuneSettings(
        source="model", data="data.jsonl", out="out"
    )
    more = (
        "--task",
        "classify",
        "--eval",
        "e.jsonl",
        "--lora",
        "8",
        "--keep-adapter",
        "--epochs",
        "2",
        "--steps",
        "9",
    )
    more += ("--lr", "1e-3", "--batch", "32", "--micro-batch", "4", "--warmup", "0.1", "--weight-decay", "0.01")
    more += ("--clip", "0.5", "--max-length", "128", "--dtype", "bf16", "--zero", "3", "--seed", "5")
    basestone(*words, *more, "--processes", "2", "--json", "--debug")
    arguments, num_workers, _ = asked[1]
    assert num_workers == 2 and arguments[2:] == ["--json", "--debug"]
    found = FinetuneSettings(**json.loads(arguments[1])).model_dump(mode="json")
    assert found == {
        "source": "model",
        "data": "data.jsonl",
        "out": "out",
        "heldout": "e.jsonl",
        "task": "classify",
        "lora": 8,
        "keep_adapter": True,
        "zero": 3,
        "epochs": 2,
        "steps": 9,
        "lr": 1e-3,
        "batch": 32,
        "micro_batch": 4,
        "warmup": 0.1,
        "weight_decay": 0.01,
        "clip": 0.5,
        "max_length": 128,
        "dtype": "bf16",
        "seed": 5,
    }


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("model", "data.jsonl"), "out"),
        (("model", "--out", "o"), "Missing argument"),
        (("model", "d", "--out", "o", "--task", "translate"), "task"),
        (("model", "d", "--out", "o", "--zero", "4"), "zero"),
        (("model", "d", "--out", "o", "--lora", "0"), "lora"),
        (("model", "d", "--out", "o", "--dtype", "fp8"), "dtype"),
        (("model", "d", "--out", "o", "--seed", str(1 << 32)), "seed"),
        (("model", "d", "--out", "o", "--lr", "0"), "lr"),
    ],
)
def test_a_wrong_option_is_named(basestone, asked, words, text):
    refused(basestone("finetune", *words), 64, text)
    assert asked == []


def test_more_processes_than_gpus(basestone, asked, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    refused(basestone("finetune", "m", "d", "--out", "o", "--processes", "2"), 64, "this machine has 1 GPU(s)")
    assert asked == []
