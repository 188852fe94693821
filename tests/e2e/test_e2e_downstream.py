"""docs/downstream.md as it stands, and the programs that open what was exported: large ones, so all of it is slow."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import command, environment
from tiny_hub import COLOURS, labelled, make_directory, make_tokenizer, questions, write_lines

pytestmark = [pytest.mark.slow, pytest.mark.dist]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "downstream.md").read_text()
LLAMA_CPP = "llama-cpp-python==0.3.36"
NOT_THERE = ("No matching distribution", "Could not find a version", "Connection", "Temporary failure")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [text for name, text in re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.S | re.M) if name == language]


def run(words: list[str], cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        words, cwd=cwd, env=environment() | variables, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*words: str) -> None:
    """Ask the package registry; skip where there is none."""
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=900)
    if done.returncode and any(text in done.stderr for text in NOT_THERE):
        pytest.skip(f"the package registry does not give {words[-1]}: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory) -> Path:
    """A folder with runs/run and every file that the page speaks of."""
    folder = tmp_path_factory.mktemp("downstream")
    (folder / "runs").mkdir()
    (folder / "runs" / "run").symlink_to(trained)
    write_lines(folder / "questions.jsonl", questions(16))
    write_lines(folder / "held_out.jsonl", questions(4))
    write_lines(folder / "texts.jsonl", labelled(60))
    write_lines(
        folder / "held_out_text.jsonl", ({"text": row["prompt"] + row["answer"]} for row in questions(8))
    )
    choices = [f" {colour}" for colour in COLOURS]
    answers = [row for row in questions(8) if row["answer"] in choices]
    rows = [
        {"question": row["prompt"], "choices": choices, "answer": choices.index(row["answer"])}
        for row in answers
    ]
    write_lines(folder / "colours.jsonl", rows)
    pairs = [{"text": row["prompt"], "other": row["answer"]} for row in questions(16)]
    write_lines(folder / "pairs.jsonl", pairs)
    write_lines(folder / "sts.jsonl", ({**row, "score": score} for score, row in enumerate(pairs)))
    make_directory(folder / "my-encoder", make_tokenizer(folder / "tokenizer.model"), pooling="mean")
    return folder


@pytest.fixture(scope="module")
def done(place) -> Path:
    """The folder once `basestone` commands of the page ran in it."""
    for line in "\n".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "basestone":
            run(command(*words[1:]), place)
    return place


def test_the_commands_write_what_the_page_says(done):
    for name in ("my-model", "my-answers", "my-lora", "my-classifier"):
        assert (done / name / "config.json").exists() and (done / name / "model.safetensors").exists()
    assert (done / "my-adapter" / "adapter_model.safetensors").exists()
    figures = json.loads((done / "my-classifier" / "metrics.json").read_text())
    assert set(figures["heldout"]) == {"accuracy", "macro", "classes", "examples"}


def test_trl_tunes_and_merges(done):
    if not importlib.util.find_spec("trl"):
        pytest.skip("TRL is not installed: pip install 'basestone[downstream]'")
    (program,) = blocks("python")
    (done / "sft.py").write_text(program)
    run([sys.executable, "sft.py"], done, HF_HUB_OFFLINE="1")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(done / "my-model", dtype=torch.float32)
    ids = torch.arange(40)[None] * 11 % 512
    with torch.no_grad():
        untuned = base(ids).logits
        adapter = PeftModel.from_pretrained(base, done / "trl-adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(done / "trl-merged", dtype=torch.float32)(ids).logits
    assert (merged - adapter).abs().max() < 1e-5 * adapter.abs().max() < (untuned - adapter).abs().max()


def test_lm_eval_measures_what_a_forward_pass_gives(done):
    if not importlib.util.find_spec("lm_eval"):
        pytest.skip("lm-eval is not installed: pip install 'basestone[downstream]'")
    (done / "tasks").mkdir()
    for text in blocks("yaml"):
        name = re.match(r"# (tasks/\w+\.yaml)\n", text)
        assert name
        (done / name[1]).write_text(text)
    results: dict[str, Any] = {}
    for line in "\n".join(blocks("sh")).splitlines():
        if line.startswith("lm_eval "):
            words = [sys.executable, "-m", *shlex.split(line)]
            run(words, done, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(done / "hf_home"))
    for report in (done / "lm-eval").rglob("results_*.json"):
        results |= json.loads(report.read_text())["results"]
    texts = [row["text"] for row in read_lines(done / "held_out_text.jsonl")]
    nats = sum(nats_of(done / "my-answers", "", text) for text in texts)
    bits_per_byte = nats / np.log(2) / sum(len(text.encode()) for text in texts)
    assert results["heldout_text"]["bits_per_byte,none"] == pytest.approx(bits_per_byte, rel=1e-5)
    right = 0
    rows = read_lines(done / "colours.jsonl")
    for row in rows:
        costs = [nats_of(done / "my-answers", row["question"], choice) for choice in row["choices"]]
        right += costs.index(min(costs)) == row["answer"]
    assert results["colours"]["acc,none"] == pytest.approx(right / len(rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def nats_of(directory: Path, context: str, text: str) -> float:
    """A text's loss after a context, summed over its tokens; the token that starts every document is in front."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    before = tokenizer(context)["input_ids"]
    ids = torch.tensor([before + tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
    first = len(before)
    return float(torch.nn.functional.cross_entropy(logits[0, first - 1 : -1], ids[0, first:], reduction="sum"))


def test_llama_cpp_converts_every_tensor(done, tmp_path):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    pip("download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(tmp_path), LLAMA_CPP)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    (converter,) = tmp_path.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    (done / "llama.cpp").symlink_to(converter.parent)
    (line,) = [line for line in "\n".join(blocks("sh")).splitlines() if "convert_hf_to_gguf" in line]
    run([sys.executable, *shlex.split(line)[1:]], done)
    import gguf
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(
        done, gguf_file="my-answers.gguf", dtype=torch.float32
    ).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(done / "my-answers", dtype=torch.float32).state_dict()
    assert set(read) == set(ours) and all(torch.equal(read[name], ours[name]) for name in ours)
    fields = gguf.GGUFReader(done / "my-answers.gguf").fields
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 1


# ---- transformers 4 -----------------------------------------------------------------------------------------------

OPEN = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
found = {"version": transformers.__version__}
for directory in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = transformers.AutoConfig.from_pretrained(directory)
    classifies = config.architectures[0].endswith("ForSequenceClassification")
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model, info = kind.from_pretrained(directory, torch_dtype=torch.float32, output_loading_info=True)
    texts = ["The following words", "def f(x):\\n\\treturn x", "What colour is it?"]
    texts.append(" \\u00e9t\\u00e9 <s> </s>  \\u4e2d 12345")
    rows = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model.eval()(ids).logits
        more = [] if classifies else model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
        rows.append([ids.tolist(), tokenizer.decode(ids[0]), logits.tolist(), more])
    labels = [config.id2label[index] for index in sorted(config.id2label)] if classifies else []
    found[directory] = {"rows": rows, "labels": labels, "lacking": sorted(info["missing_keys"])}
with open(sys.argv[1], "w") as out:
    json.dump(found, out)
"""


@pytest.fixture(scope="module")
def transformers4(tmp_path_factory) -> Path:
    """A folder to put before the others: transformers 4 and what it needs in other versions than 5 does."""
    folder = tmp_path_factory.mktemp("transformers4")
    requirements = ROOT / "tests" / "transformers4.txt"
    pip("install", "-q", "--no-deps", "--target", str(folder), "-r", str(requirements))
    return folder


@pytest.fixture(scope="module")
def gpt2(corpus, basestone, tmp_path_factory) -> Path:
    """An exported GPT-2."""
    folder = tmp_path_factory.mktemp("gpt2")
    changes = ("model.family=gpt2", "model.num_query_groups=4", "train.steps=4")
    words = [word for change in changes for word in ("--set", change)]
    for arguments in (
        ("train", corpus / "run.toml", "--run-dir", folder / "run", *words),
        ("export", folder / "run", folder / "hf", "--dtype", "fp32"),
    ):
        finished = basestone(*arguments)
        assert finished.returncode == 0, finished.stderr
    return folder / "hf"


def test_transformers_4_opens_what_5_does(done, gpt2, transformers4, tmp_path):
    directories = [str(done / name) for name in ("my-model", "my-answers", "my-lora", "my-classifier")] + [
        str(gpt2)
    ]
    opened: list[dict[str, Any]] = []
    for number, path in ((5, ""), (4, str(transformers4))):
        out = tmp_path / f"{number}.json"
        paths = os.pathsep.join(filter(None, (path, environment().get("PYTHONPATH", ""))))
        run([sys.executable, "-c", OPEN, str(out), *directories], tmp_path, PYTHONPATH=paths)
        opened.append(json.loads(out.read_text()))
    five, four = opened
    assert five["version"].startswith("5.") and four["version"] == "4.57.6"
    for directory in directories:
        assert five[directory]["lacking"] == four[directory]["lacking"] == []
        assert five[directory]["labels"] == four[directory]["labels"]
        for new, old in zip(five[directory]["rows"], four[directory]["rows"], strict=True):
            assert (new[0], new[1], new[3]) == (old[0], old[1], old[3]), directory
            difference = np.abs(np.array(new[2]) - np.array(old[2])).max()
            assert difference < 1e-5 * np.abs(new[2]).max(), directory
    assert five[directories[3]]["labels"] == ["colour", "fruit", "neither"]
