"""Hugging Face adapters: the exported directory gives the logits of a straightforward forward, and comes back."""

import json
import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from basestone.model.config import ModelConfig
from basestone.model.hf.adapter import LastRead, adapter_for, adapter_for_hf
from basestone.model.hf.rules import AdapterError, Halves
from basestone.model.hf.safetensors_file import SafetensorsReader, plan_shards, write_safetensors
from basestone.model.layout import decoder_layout

LLAMA = {
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
GPT2 = {
    "family": "gpt2",
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "max_sequence_length": 32,
    "vocab_size": 131,
}
CONFIGS = {
    "llama-untied": ModelConfig(**LLAMA, tied=False),
    "llama-tied": ModelConfig(**LLAMA, tied=True),
    "llama-one-group": ModelConfig(**{**LLAMA, "num_query_groups": 1}),
    "gpt2": ModelConfig(**GPT2),
    "gpt2-untied": ModelConfig(**GPT2, tied=False),
}


def random_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Draw every global parameter at random, norms and biases too; the vocabulary's padding is zeros."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, row in decoder_layout(config).items():
        weights[name] = torch.randn(row.shape, generator=generator) * 0.2
        if row.kind == "norm":
            weights[name] += 1.0
    for name in ("embed.word.weight", "head.weight"):
        if name in weights:
            weights[name][config.vocab_size :] = 0
    return weights


def plain_forward(config: ModelConfig, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Compute logits [batch, sequence, vocabulary] with plain tensor operations, from the layout's words alone."""
    sequence = ids.shape[1]
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.head_dim

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[name + ".weight"].T + (weights[name + ".bias"] if config.bias else 0)

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
        frequencies = config.rope_base ** -(torch.arange(0, width, 2) / width)
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

            scores = rotate(piece(place)) @ rotate(piece(block - 2)).transpose(1, 2) / math.sqrt(width)
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


def write_directory(config, weights, path, max_shard_bytes=10**9):
    adapter = adapter_for(config)
    tensors = {tensor.name: tensor for tensor in adapter.tensors(config)}
    plan = [(name, tensor.shape, torch.float32) for name, tensor in tensors.items()]
    read = LastRead(weights.__getitem__)
    write_safetensors(path, plan_shards(plan, max_shard_bytes), lambda name: adapter.read(tensors[name], read))
    hf = adapter.hf_config(config, dtype=torch.float32, bos=1, eos=2, pad=3)
    (path / "config.json").write_text(json.dumps(hf))


def logits_from_disk(path, ids):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(ids).logits


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


IDS = torch.randint(131, (2, 32), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CONFIGS)
def test_exported_logits_equal_a_plain_forward(name, tmp_path):
    config = CONFIGS[name]
    weights = random_weights(config)
    write_directory(config, weights, tmp_path)
    assert relative_error(logits_from_disk(tmp_path, IDS), plain_forward(config, weights, IDS)) < 1e-5


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama-untied", "norm_epsilon", 1e-2),
        ("llama-untied", "rope_base", 1e4),
        ("gpt2", "norm_epsilon", 1e-2),
    ],
)
def test_a_wrong_configuration_is_seen(name, field, value, tmp_path):
    """The comparison is not blind: a plain forward under another setting is far away."""
    config = CONFIGS[name]
    weights = random_weights(config)
    write_directory(config, weights, tmp_path)
    other = config.model_copy(update={field: value})
    assert relative_error(logits_from_disk(tmp_path, IDS), plain_forward(other, weights, IDS)) > 1e-3


@pytest.mark.parametrize("fault", ["gate_up", "qkv"])
def test_swapped_parts_are_seen(fault, tmp_path):
    config = CONFIGS["llama-untied"]
    weights = random_weights(config)
    broken = dict(weights)
    for name, tensor in weights.items():
        if fault == "gate_up" and name.endswith("linear_fc1.weight"):
            broken[name] = Halves().join(Halves().split(tensor)[::-1])
        if fault == "qkv" and name.endswith("linear_qkv.weight"):
            broken[name] = tensor.roll(config.head_dim, 0)
    write_directory(config, broken, tmp_path)
    assert relative_error(logits_from_disk(tmp_path, IDS), plain_forward(config, weights, IDS)) > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_round_trip_is_bit_identical(name, max_shard_bytes, tmp_path):
    config = CONFIGS[name]
    weights = random_weights(config)
    write_directory(config, weights, tmp_path, max_shard_bytes)
    reader = SafetensorsReader(tmp_path)
    back = dict(adapter_for(config).to_global(config, reader.read))
    assert list(back) == list(decoder_layout(config))
    for parameter, tensor in weights.items():
        assert torch.equal(back[parameter], tensor), parameter


@pytest.mark.parametrize("name", CONFIGS)
def test_config_comes_back(name):
    config = CONFIGS[name]
    hf = adapter_for(config).hf_config(config, dtype=torch.bfloat16, bos=1, eos=2, pad=None)
    assert adapter_for_hf(hf).model_config(json.loads(json.dumps(hf))) == config
    assert hf["dtype"] == hf["torch_dtype"] == "bfloat16"


def test_rope_base_is_read_in_both_spellings():
    config = CONFIGS["llama-untied"]
    adapter = adapter_for(config)
    hf = adapter.hf_config(config, dtype=torch.float32, bos=1, eos=2, pad=3)
    for dropped in ("rope_theta", "rope_parameters"):
        one_spelling = {key: value for key, value in hf.items() if key != dropped}
        assert adapter.model_config(one_spelling).rope_base == config.rope_base


def test_transformers_own_checkpoint_is_read(tmp_path):
    """Import what transformers itself wrote: a GPT-2 with its own names and orders."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=131, n_positions=32, n_embd=48, n_layer=2, n_head=4)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    adapter = adapter_for_hf(hf)
    config = adapter.model_config(hf)
    weights = dict(adapter.to_global(config, SafetensorsReader(tmp_path).read))
    with torch.no_grad():
        assert relative_error(plain_forward(config, weights, IDS), model(IDS).logits) < 1e-5


def test_names_without_the_leading_part_are_found(tmp_path):
    """The hub's first GPT-2 files say `h.0...` where the class says `transformer.h.0...`."""
    config = CONFIGS["gpt2"]
    weights = random_weights(config)
    adapter = adapter_for(config)
    tensors = {tensor.name.removeprefix("transformer."): tensor for tensor in adapter.tensors(config)}
    plan = [(name, tensor.shape, torch.float32) for name, tensor in tensors.items()]
    write_safetensors(
        tmp_path, plan_shards(plan, 10**9), lambda name: adapter.read(tensors[name], weights.__getitem__)
    )
    back = dict(adapter.to_global(config, SafetensorsReader(tmp_path).read))
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_each_parameter_is_read_once(tmp_path):
    config = CONFIGS["llama-untied"]
    weights = random_weights(config)
    reads = Counter()

    class Source:
        def __getitem__(self, name):
            reads[name] += 1
            return weights[name]

        __call__ = __getitem__

    adapter = adapter_for(config)
    read = LastRead(Source())
    for tensor in adapter.tensors(config):
        assert adapter.read(tensor, read).shape == tensor.shape
    assert reads == Counter(dict.fromkeys(decoder_layout(config), 1))


def test_vocabulary_padding_is_cut():
    config = CONFIGS["llama-untied"]
    shapes = {tensor.name: tensor.shape for tensor in adapter_for(config).tensors(config)}
    assert config.padded_vocab_size == 256
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (131, 48)


def test_tied_models_have_no_head():
    names = [tensor.name for tensor in adapter_for(CONFIGS["llama-tied"]).tensors(CONFIGS["llama-tied"])]
    assert "lm_head.weight" not in names


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (LLAMA, {"normalization": "layernorm"}, "normalization = 'layernorm' (needs 'rmsnorm')"),
        (LLAMA, {"bias": True}, "bias = True (needs False)"),
        (LLAMA, {"position": "learned", "activation": "gelu"}, "activation = 'gelu'"),
        (GPT2, {"num_query_groups": 2}, "num_query_groups = 2 (needs 4)"),
        (GPT2, {"head_dim": 16}, "head_dim = 16 (needs 12)"),
        (GPT2, {"bias": False}, "bias = False (needs True)"),
    ],
)
def test_what_the_class_cannot_hold_is_refused(base, changes, named):
    with pytest.raises(AdapterError) as caught:
        adapter_for(ModelConfig(**{**base, **changes}))
    assert named in str(caught.value)
    assert caught.value.exit_code == 64


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("llama-untied", {"attention_bias": True}, "attention_bias = True"),
        (
            "llama-untied",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            "rope_type = 'llama3'",
        ),
        ("gpt2", {"activation_function": "gelu"}, "activation_function = 'gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ],
)
def test_foreign_variants_are_refused(name, changes, named):
    adapter = adapter_for(CONFIGS[name])
    hf = adapter.hf_config(CONFIGS[name], dtype=torch.float32, bos=1, eos=2, pad=3)
    with pytest.raises(AdapterError, match=r"config\.json describes a") as caught:
        adapter.model_config({**hf, **changes})
    assert named in str(caught.value)


def test_incomplete_and_unknown_configurations_are_refused():
    with pytest.raises(AdapterError, match="model_type 'mamba'; this package can read llama, gpt2"):
        adapter_for_hf({"model_type": "mamba"})
    with pytest.raises(AdapterError, match="no field 'num_attention_heads'"):
        adapter_for_hf({"model_type": "llama"}).model_config({})


def test_weights_of_another_shape_are_refused():
    config = CONFIGS["llama-untied"]
    with pytest.raises(AdapterError, match=r"model.embed_tokens.weight has shape \(3,\) where config.json"):
        dict(adapter_for(config).to_global(config, lambda name: torch.zeros(3)))
