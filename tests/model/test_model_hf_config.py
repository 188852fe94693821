"""config.json in both directions: hub files as they were published, both spellings, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hf_models import CONFIGS, GPT2, LLAMA, SCALING

from basestone.model.config import ModelConfig
from basestone.model.hf.adapter import adapter_for, adapter_for_hf
from basestone.model.hf.rules import AdapterError

SHARED = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True}
LLAMA_3 = {
    **SHARED,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MISTRAL = {
    **SHARED,
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN = {
    **SHARED,
    "bos_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}
HUB: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rope_scaling": LLAMA_3_SCALING,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        **LLAMA_3,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "rope_scaling": {**LLAMA_3_SCALING, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "mistral-7b-v0.3": {**MISTRAL, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
    "qwen2.5-0.5b": {
        **QWEN,
        "architectures": ["Qwen2ForCausalLM"],
        "eos_token_id": 151643,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "vocab_size": 151936,
    },
    "qwen2.5-7b": {
        **QWEN,
        "architectures": ["Qwen2ForCausalLM"],
        "eos_token_id": 151643,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_mrope": False,
        "vocab_size": 152064,
    },
    "qwen3-0.6b": {
        **QWEN,
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "gpt2-124m": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
}


def hf_of(name: str) -> dict[str, Any]:
    """Give the config.json of a tiny model."""
    return adapter_for(CONFIGS[name]).hf_config(CONFIGS[name], dtype=torch.float32, bos=1, eos=2, pad=3)


def preset(name: str) -> ModelConfig:
    """Give what a hub file must be read as."""
    dropout = 0.1 if name.startswith("gpt2") else 0.0
    made = ModelConfig(preset=name, vocab_size=HUB[name]["vocab_size"], dropout=dropout)
    return made.model_copy(update={"preset": None})


@pytest.mark.parametrize("name", HUB)
def test_a_hub_file_is_read_as_the_preset(name):
    assert adapter_for_hf(HUB[name]).model_config(HUB[name]) == preset(name)


@pytest.mark.parametrize("name", HUB)
def test_the_same_file_written_by_transformers_5_is_read_as_the_preset(name):
    from transformers import AutoConfig

    written = json.loads(AutoConfig.for_model(**HUB[name]).to_json_string())
    assert "rope_theta" not in written  # its place is in rope_parameters
    assert adapter_for_hf(written).model_config(written) == preset(name)


@pytest.mark.parametrize("name", HUB)
def test_transformers_5_reads_ours_as_it_reads_the_hubs(name):
    """All that a layer's forward depends on: what our file says beyond the hub's changes nothing."""
    from transformers import AutoConfig

    model = preset(name)
    ours = adapter_for(model).hf_config(model, dtype=torch.bfloat16, bos=1, eos=2, pad=None)
    read, expected = (AutoConfig.for_model(**one).to_dict() for one in (ours, HUB[name]))
    unlike = {key for key in read.keys() | expected.keys() if read.get(key) != expected.get(key)}
    harmless = {"bos_token_id", "eos_token_id", "dtype", "head_dim", "n_ctx", "n_inner", "pretraining_tp"}
    harmless |= {"use_mrope", "task_specific_params"}
    assert unlike <= harmless, {key: (read.get(key), expected.get(key)) for key in unlike}


def test_both_spellings_are_written():
    hf = hf_of("llama-scaled")
    scaling = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 0.01,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 16,
    }
    assert (hf["rope_theta"], hf["rope_scaling"]) == (5e4, scaling)
    assert hf["rope_parameters"] == {**scaling, "rope_theta": 5e4}
    assert (hf_of("qwen3")["rope_scaling"], hf_of("qwen3")["rope_theta"]) == (None, 5e4)
    assert hf_of("qwen3")["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e4}


@pytest.mark.parametrize("name", ["llama-untied", "llama-scaled", "mistral", "qwen2", "qwen3-scaled"])
@pytest.mark.parametrize("dropped", [("rope_theta", "rope_scaling"), ("rope_parameters",)])
def test_either_spelling_is_enough(name, dropped):
    one_spelling = {key: value for key, value in hf_of(name).items() if key not in dropped}
    assert adapter_for_hf(one_spelling).model_config(one_spelling) == CONFIGS[name]


def test_the_old_word_for_the_type_is_read():
    hf = hf_of("llama-scaled")
    del hf["rope_parameters"]
    hf["rope_scaling"]["type"] = hf["rope_scaling"].pop("rope_type")
    assert adapter_for_hf(hf).model_config(hf) == CONFIGS["llama-scaled"]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e4},
        {"rope_scaling": None},
        {"rope_scaling": {**hf_of("llama-scaled")["rope_scaling"], "factor": 8.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    ],
)
def test_spellings_that_say_different_things_are_refused(changes):
    hf = {**hf_of("llama-scaled"), **changes}
    with pytest.raises(
        AdapterError, match=r"config\.json says two things about RoPE, and versions of transf"
    ) as caught:
        adapter_for_hf(hf).model_config(hf)
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        assert f"{key} = {hf[key]!r}" in str(caught.value)


def test_a_first_llama_has_as_many_groups_as_heads_and_a_base_of_ten_thousand():
    hf = {key: value for key, value in hf_of("llama-untied").items() if not key.startswith("rope")}
    del hf["num_key_value_heads"]
    read = adapter_for_hf(hf).model_config(hf)
    assert (read.num_query_groups, read.rope_base) == (6, 10000.0)


def test_a_mistral_window_that_no_sequence_feels_is_none():
    for window in (32, 4096):
        hf = {**hf_of("mistral"), "sliding_window": window}
        assert adapter_for_hf(hf).model_config(hf) == CONFIGS["mistral"]


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (LLAMA, {"normalization": "layernorm"}, "normalization = 'layernorm' (needs 'rmsnorm')"),
        (LLAMA, {"bias": True}, "bias = True (needs False)"),
        (LLAMA, {"position": "learned", "activation": "gelu"}, "activation = 'gelu'"),
        (LLAMA, {"qkv_bias": True}, "qkv_bias = True (needs False); family qwen2 can"),
        (LLAMA, {"qk_norm": True}, "qk_norm = True (needs False); family qwen3 can"),
        (LLAMA, {"hidden_size": 50}, "hidden_size = 50 (needs 54); family mistral can"),
        (LLAMA, {"qk_norm": True, "qkv_bias": True}, "no family's class can; change these fields"),
        (
            {**LLAMA, "family": "mistral"},
            {"qkv_bias": True},
            "MistralForCausalLM cannot hold this model: qkv_bias",
        ),
        ({**LLAMA, "family": "qwen2"}, {"qkv_bias": False}, "(needs True); family llama or mistral can"),
        ({**LLAMA, "family": "qwen3"}, {"qk_norm": False}, "(needs True); family llama or mistral can"),
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
        ("llama-untied", {"mlp_bias": True}, "mlp_bias = True (needs False)"),
        ("llama-untied", {"hidden_act": "gelu"}, "hidden_act = 'gelu' (needs 'silu')"),
        ("llama-untied", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 (needs 1.0)"),
        (
            "llama-untied",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config = {'quant_method'",
        ),
        (
            "llama-untied",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling.rope_type = 'linear' (needs 'default' or 'llama3')",
        ),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}},
            "rope_parameters.rope_type = 'yarn' (needs 'default' or 'llama3'); rope_parameters.beta_fast = 32",
        ),
        (
            "qwen2",
            {"rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor = 0.5",
        ),
        ("mistral", {"sliding_window": 31}, "sliding_window = 31 (needs None)"),
        (
            "mistral",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types = ['full_attention', 'sliding_attention'] (needs ['full_attention'])",
        ),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True (needs False)"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types = "),
        ("gpt2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function = 'gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ],
)
def test_foreign_variants_are_refused(name, changes, named):
    with pytest.raises(AdapterError, match=r"config\.json describes a") as caught:
        adapter_for(CONFIGS[name]).model_config({**hf_of(name), **changes})
    assert named in str(caught.value)


def test_incomplete_and_unknown_configurations_are_refused():
    with pytest.raises(AdapterError, match="this package can read llama, mistral, qwen2, qwen3, gpt2"):
        adapter_for_hf({"model_type": "mamba"})
    with pytest.raises(AdapterError, match="no field 'num_attention_heads'"):
        adapter_for_hf({"model_type": "llama"}).model_config({})
    hf = hf_of("llama-scaled")
    for table in ("rope_scaling", "rope_parameters"):
        hf[table] = {key: value for key, value in hf[table].items() if key != "high_freq_factor"}
    with pytest.raises(AdapterError, match="no field 'high_freq_factor', which LlamaForCausalLM needs"):
        adapter_for_hf(hf).model_config(hf)


def test_the_first_mistral_is_refused_for_its_window():
    hf = {**MISTRAL, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000}
    with pytest.raises(
        AdapterError, match=r"a Mistral that this package cannot hold: sliding_window = 4096 \(needs"
    ):
        adapter_for_hf(hf).model_config(hf)
    del hf["sliding_window"]  # transformers' own default
    with pytest.raises(AdapterError, match="sliding_window = 4096"):
        adapter_for_hf(hf).model_config(hf)


def test_values_that_no_model_has_are_refused_by_the_names_of_our_fields():
    hf = {**hf_of("qwen2"), "rms_norm_eps": "1e-5", "num_key_value_heads": 4}
    with pytest.raises(
        AdapterError, match=r"describes no model of family qwen2: norm_epsilon: .* valid number"
    ):
        adapter_for_hf(hf).model_config(hf)
    hf["rms_norm_eps"] = 1e-5
    with pytest.raises(
        AdapterError, match=r"model: num_query_groups must divide num_attention_heads \(6\), got 4"
    ):
        adapter_for_hf(hf).model_config(hf)


def test_scaling_that_is_wrong_in_itself_is_refused():
    assert SCALING["high_frequency_factor"] == 2.0
    hf = hf_of("llama-scaled")
    for table in ("rope_scaling", "rope_parameters"):
        hf[table]["low_freq_factor"] = 2.0
    with pytest.raises(
        AdapterError, match="rope_scaling: high_frequency_factor must be above low_frequency_factor"
    ):
        adapter_for_hf(hf).model_config(hf)
