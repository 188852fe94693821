"""Hugging Face adapters: the exported directory gives the logits of a straightforward forward, and comes back."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hf_models import (
    CONFIGS,
    ENCODERS,
    IDS,
    logits_from_disk,
    plain_forward,
    random_weights,
    relative_error,
    write_directory,
)

from basestone.model.families import layout_of
from basestone.model.hf.adapter import LastRead, adapter_for, adapter_for_hf
from basestone.model.hf.rules import AdapterError, Row, Rule
from basestone.model.hf.safetensors_file import SafetensorsReader, plan_shards, write_safetensors
from basestone.model.layout import Parameter

ALL = {**CONFIGS, **ENCODERS}


@pytest.mark.parametrize("name", CONFIGS)
def test_exported_logits_equal_a_plain_forward(name, tmp_path):
    config = CONFIGS[name]
    weights = random_weights(config)
    write_directory(config, weights, tmp_path)
    assert relative_error(logits_from_disk(tmp_path, IDS), plain_forward(config, weights, IDS)) < 1e-5


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_round_trip_is_bit_identical(name, max_shard_bytes, tmp_path):
    config = ALL[name]
    weights = random_weights(config)
    write_directory(config, weights, tmp_path, max_shard_bytes)
    reader = SafetensorsReader(tmp_path)
    back = dict(adapter_for(config).to_global(config, reader.read))
    assert list(back) == list(layout_of(config))
    for parameter, tensor in weights.items():
        assert torch.equal(back[parameter], tensor), parameter


@pytest.mark.parametrize("name", ALL)
def test_config_comes_back(name):
    config = ALL[name]
    hf = adapter_for(config).hf_config(config, dtype=torch.bfloat16, bos=1, eos=2, pad=None)
    assert adapter_for_hf(hf).model_config(json.loads(json.dumps(hf))) == config
    assert hf["dtype"] == hf["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["gpt2", "llama-scaled", "mistral", "qwen2-tied", "qwen3"])
def test_transformers_own_checkpoint_is_read(name, tmp_path):
    """Import what transformers itself wrote: its own names, orders and spelling."""
    from transformers import AutoConfig, AutoModelForCausalLM

    expected = CONFIGS[name]
    hf = adapter_for(expected).hf_config(expected, dtype=torch.float32, bos=1, eos=2, pad=3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf)).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    adapter = adapter_for_hf(hf)
    config = adapter.model_config(hf)
    assert config == expected
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


def test_an_adapter_brings_its_own_table_of_parameters(tmp_path):
    """A family with parameters that no decoder of ours has needs no change of the adapter."""
    config, more = CONFIGS["llama-tied"], Parameter("scorer.weight", (1, 48), "weight")
    plain = adapter_for(config)
    adapter = replace(
        plain,
        layout=lambda config: {**layout_of(config), more.name: more},
        rows=lambda config: [*plain.rows(config), Row(more.name, ("score.weight",), Rule())],
    )
    tensor = list(adapter.tensors(config))[-1]
    assert (tensor.name, tensor.shape) == ("score.weight", (1, 48))
    weights = {**random_weights(config), more.name: torch.ones(more.shape)}
    there = {one.name: adapter.read(one, weights.__getitem__) for one in adapter.tensors(config)}
    back = dict(adapter.to_global(config, there.__getitem__))
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in back)


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
    assert reads == Counter(dict.fromkeys(layout_of(config), 1))


def test_vocabulary_padding_is_cut():
    config = CONFIGS["llama-untied"]
    shapes = {tensor.name: tensor.shape for tensor in adapter_for(config).tensors(config)}
    assert config.padded_vocab_size == 256
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (131, 48)


def test_tied_models_have_no_head():
    names = [tensor.name for tensor in adapter_for(CONFIGS["llama-tied"]).tensors(CONFIGS["llama-tied"])]
    assert "lm_head.weight" not in names


def test_weights_of_another_shape_are_refused():
    config = CONFIGS["llama-untied"]
    with pytest.raises(AdapterError, match=r"model.embed_tokens.weight has shape \(3,\) where config.json"):
        dict(adapter_for(config).to_global(config, lambda name: torch.zeros(3)))
