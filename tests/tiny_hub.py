"""Small directories as `basestone export` writes them, with random weights, and examples to tune them on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from basestone.data.hf_tokenizer import write_hf_tokenizer
from basestone.data.tokenizer import Tokenizer, train_tokenizer
from basestone.model.config import ModelConfig
from basestone.model.embedding.hf import sentence_files
from basestone.model.hf.adapter import adapter_for

TEXT = "".join(f"What is {i} plus {i + 1}? The sum is {2 * i + 1}, and a colour is blue.\n" for i in range(400))
COLOURS = ["red", "blue", "green", "black", "white", "pink", "grey", "brown"]
FRUITS = ["apple", "melon", "grape", "lemon", "peach", "mango", "plum", "cherry"]


def make_tokenizer(path: Path) -> Path:
    """Train a tokenizer of 400 pieces."""
    train_tokenizer(iter([TEXT, " ".join([*COLOURS, *FRUITS]) * 20]), path, vocab_size=400)
    return path


def make_directory(
    out: Path, tokenizer: Path, *, family: str = "llama", dtype: str = "fp32", **keys: Any
) -> Path:
    """Write a model, its tokenizer and a card with a licence; with `pooling`, an encoder of texts."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    model = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "max_sequence_length": 64, **keys}
    model |= {"family": family, "vocab_size": 400, "dropout": 0.0} | (
        {"num_query_groups": 2} if family == "llama" else {}
    )
    config = ModelConfig(**model)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    read = Tokenizer(tokenizer)
    fields = adapter_for(config).hf_config(config, dtype=torch_dtype, bos=read.bos, eos=read.eos, pad=read.pad)
    framing = "document" if config.pooling is None else "texts"
    write_hf_tokenizer(tokenizer, out, model_max_length=64, framing=framing)
    (out / "config.json").write_text(json.dumps(fields, indent=2))
    ids = {f"{name}_token_id": getattr(read, name) for name in ("bos", "eos", "pad")}
    (out / "generation_config.json").write_text(json.dumps(ids))
    torch.manual_seed(5)
    made: Any = AutoModelForCausalLM if config.pooling is None else AutoModel
    state = made.from_config(AutoConfig.from_pretrained(out)).state_dict()
    wanted = [tensor.name for tensor in adapter_for(config).tensors(config)]
    tensors = {name: state[name].to(torch_dtype).clone() for name in wanted}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    if config.pooling is not None:
        for name, content in sentence_files(config, 64, adapter_for(config).options).items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(json.dumps(content))
    (out / "README.md").write_text("---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n# tiny\n")
    return out


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(count: int = 12) -> list[dict[str, str]]:
    """Prompts with one right answer each, of different lengths."""
    kinds = [*FRUITS, *(f"small {fruit}" for fruit in FRUITS)]
    return [
        {"prompt": f"What colour is the {kind}?", "answer": f" {colour}" + " and more" * (index % 3)}
        for index, (kind, colour) in enumerate(zip(kinds, COLOURS + COLOURS[::-1], strict=True))
    ][:count]


def labelled(count: int, start: int = 0) -> list[dict[str, str]]:
    """Texts of three classes: those with a colour, with a fruit, with neither."""
    rows = []
    for number in range(start, start + count):
        kind = ("colour", "fruit", "neither")[number * 7 % 3]
        word = {"colour": COLOURS, "fruit": FRUITS, "neither": ["sum"]}[kind]
        rows.append(
            {
                "text": f"What is {number}? The {word[number * 5 % len(word)]} is {number * 3 % 11}.",
                "label": kind,
            }
        )
    return rows
