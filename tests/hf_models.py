"""Tiny models of every family: random weights, Hugging Face directories, and a forward in plain operations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from basestone.model.config import ModelConfig
from basestone.model.families import layout_of
from basestone.model.hf.adapter import LastRead, adapter_for, adapter_for_hf
from basestone.model.hf.safetensors_file import plan_shards, write_safetensors

LLAMA: dict[str, Any] = {
    "family": "llama",
    "num_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "head_dim": 10,  # not hidden / heads
    "ffn_hidden_size": 72,
    "max_sequence_length": 32,
    "vocab_size": 131,
    "rope_base": 5e4,
    "norm_epsilon": 3e-5,
}
GPT2: dict[str, Any] = {
    "family": "gpt2",
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "max_sequence_length": 32,
    "vocab_size": 131,
}
BERT: dict[str, Any] = {**GPT2, "family": "bert", "ffn_hidden_size": 80, "norm_epsilon": 3e-5}
# Of the five frequencies of a head, one is kept, one divided, and the others are mixed.
SCALING: dict[str, Any] = {
    "factor": 4.0,
    "low_frequency_factor": 0.01,
    "high_frequency_factor": 2.0,
    "original_max_sequence_length": 16,
}
CONFIGS = {
    "llama-untied": ModelConfig(**LLAMA, tied=False),
    "llama-tied": ModelConfig(**LLAMA, tied=True),
    "llama-one-group": ModelConfig(**{**LLAMA, "num_query_groups": 1}),
    "llama-many-groups": ModelConfig(**{**LLAMA, "num_query_groups": 6}),
    "llama-scaled": ModelConfig(**LLAMA, rope_scaling=SCALING),
    "mistral": ModelConfig(**{**LLAMA, "family": "mistral"}),
    "qwen2": ModelConfig(**{**LLAMA, "family": "qwen2"}),
    "qwen2-tied": ModelConfig(**{**LLAMA, "family": "qwen2"}, tied=True),
    "qwen3": ModelConfig(**{**LLAMA, "family": "qwen3"}),
    "qwen3-scaled": ModelConfig(**{**LLAMA, "family": "qwen3"}, tied=True, rope_scaling=SCALING),
    "gpt2": ModelConfig(**GPT2),
    "gpt2-untied": ModelConfig(**GPT2, tied=False),
}
ENCODERS = {
    "bert": ModelConfig(**BERT),
    "bert-masked": ModelConfig(**BERT, next_sentence=False, activation="gelu"),
}


def random_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Draw every global parameter at random, norms and biases too; the vocabulary's padding is zeros."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, row in layout_of(config).items():
        weights[name] = torch.randn(row.shape, generator=generator) * 0.2
        if row.kind == "norm":
            weights[name] += 1.0
    for name in ("embed.word.weight", "head.weight", "head.bias"):
        if name in weights:
            weights[name][config.vocab_size :] = 0
    return weights


def plain_frequencies(config: ModelConfig) -> list[float]:
    """Compute RoPE's inverse frequencies one by one, by the words of Llama 3.1's rule."""
    frequencies = [config.rope_base ** -(place / config.head_dim) for place in range(0, config.head_dim, 2)]
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    low, high, scaled = scaling.low_frequency_factor, scaling.high_frequency_factor, []
    for frequency in frequencies:
        turns = scaling.original_max_sequence_length * frequency / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append(frequency * kept + frequency / scaling.factor * (1 - kept))
    return scaled


def plain_forward(config: ModelConfig, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Compute logits [batch, sequence, vocabulary] with plain tensor operations, from the layout's words alone."""
    sequence = ids.shape[1]
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.head_dim

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if config.normalization == "rmsnorm":
            return (
                x * (x.pow(2).mean(-1, keepdim=True) + config.norm_epsilon).rsqrt() * weights[name + ".weight"]
            )
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + config.norm_epsilon).rsqrt()
        return centred * scale * weights[name + ".weight"] + weights[name + ".bias"]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        if config.position != "rope":
            return x
        frequencies = torch.tensor(plain_frequencies(config))
        angles = torch.arange(sequence)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        first, second = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    x = weights["embed.word.weight"][ids]
    if config.position == "learned":
        x = x + weights["embed.position.weight"][:sequence]
    causal = torch.full((sequence, sequence), -math.inf).triu(1)
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        qkv = linear(norm(x, prefix + "input_layernorm"), prefix + "self_attention.linear_qkv")
        block = heads // groups + 2
        outputs = []
        for head in range(heads):
            group, place = divmod(head, heads // groups)
            start = group * block * width

            def piece(index: int, qkv: torch.Tensor = qkv, start: int = start) -> torch.Tensor:
                return qkv[..., start + index * width : start + (index + 1) * width]

            query, key = piece(place), piece(block - 2)
            if config.qk_norm:
                query = norm(query, prefix + "self_attention.q_layernorm")
                key = norm(key, prefix + "self_attention.k_layernorm")
            scores = rotate(query) @ rotate(key).transpose(1, 2) / math.sqrt(width)
            outputs.append((scores + causal).softmax(-1) @ piece(block - 1))
        x = x + linear(torch.cat(outputs, -1), prefix + "self_attention.linear_proj")
        hidden = linear(norm(x, prefix + "pre_mlp_layernorm"), prefix + "mlp.linear_fc1")
        if config.activation == "swiglu":
            gate, up = hidden[..., : config.ffn_hidden_size], hidden[..., config.ffn_hidden_size :]
            hidden = gate * gate.sigmoid() * up
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        x = x + linear(hidden, prefix + "mlp.linear_fc2")
    head = weights["embed.word.weight" if config.tied else "head.weight"][: config.vocab_size]
    return norm(x, "norm") @ head.T


def write_directory(
    config: ModelConfig, weights: dict[str, torch.Tensor], path: Path, max_shard_bytes: int = 10**9
) -> dict[str, Any]:
    """Write weights and config.json as an export does; give the latter."""
    adapter = adapter_for(config)
    tensors = {tensor.name: tensor for tensor in adapter.tensors(config)}
    plan = [(name, tensor.shape, torch.float32) for name, tensor in tensors.items()]
    read = LastRead(weights.__getitem__)
    write_safetensors(path, plan_shards(plan, max_shard_bytes), lambda name: adapter.read(tensors[name], read))
    hf = adapter.hf_config(config, dtype=torch.float32, bos=1, eos=2, pad=3)
    (path / "config.json").write_text(json.dumps(hf))
    return hf


def logits_from_disk(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Load a directory into transformers' class, with nothing missing or left over; give its fp32 logits."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(ids).logits


def all_logits_from_disk(path: Path) -> list[torch.Tensor]:
    """Load a directory into the class that it names, with nothing missing or left over; give its logits of BATCH."""
    import transformers

    hf = json.loads((path / "config.json").read_text())
    adapter, made = adapter_for_hf(hf), getattr(transformers, hf["architectures"][0])
    model, info = made.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found = model.eval()(**{theirs: BATCH[ours] for ours, theirs in adapter.inputs.items()})
    return [found[name] for name in adapter.outputs]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


IDS = torch.randint(131, (2, 32), generator=torch.Generator().manual_seed(2))
BATCH = {"tokens": IDS, "segments": (torch.arange(32) > torch.tensor([[11], [20]])).long()}
