"""Small directories as transformers writes them, and their import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from basestone.trainer.errors import ConfigError
from basestone.trainer.hub.from_directory import import_directory

VOCAB = 320
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MORE: dict[str, dict[str, Any]] = {
    "llama 3.1": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, **SCALING},
    },
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 12},
}

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE as transformers saves it."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    fast.train_from_iterator(["def function(value): return value " * 20], trainer)
    fast.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(
    directory: Path, family: str, dtype: torch.dtype, *, tied: bool, max_shard_size: str = "5GB"
) -> None:
    """Save a model of transformers with random weights, as its own `save_pretrained` does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = GPT2 if family == "gpt2" else LLAMA | MORE.get(family, {})
    model_type = family.removesuffix(" 3.1")
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, tie_word_embeddings=tied, **fields)
    model: Any = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    write_tokenizer(directory)


def bring_in(directory: Path, out: Path, tokenizer: Path | None = None) -> Path:
    import_directory(directory, out, tokenizer=tokenizer, versions={"basestone": "1"})
    return out


def refused(directory: Path, *words: str, kind: type[Exception] = ConfigError, **arguments: Any) -> str:
    """Check that nothing is left of a refused import, and give the message."""
    out = directory.parent / "out"
    before = sorted(path.name for path in directory.parent.iterdir())
    with pytest.raises(kind) as caught:
        bring_in(directory, out, **arguments)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert caught.value.exit_code == 64  # type: ignore[attr-defined]
    assert sorted(path.name for path in directory.parent.iterdir()) == before
    return text
