"""Directories of Hugging Face models that are refused; nothing in them is executed, and nothing is left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import killed_before
from hub_directories import VOCAB, bring_in, refused, write_model
from safetensors.torch import load_file, save_file

from basestone.trainer import importing
from basestone.trainer.hub import from_directory
from basestone.trainer.hub.weights import ConversionError
from basestone.trainer.inference import OpenCheckpoint

pytestmark = pytest.mark.usefixtures("own_group")


def change_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    file = directory / "model.safetensors"
    tensors = {**load_file(file), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


def test_every_difference_is_in_one_message(copied):
    change_weights(
        copied,
        model__norm__weight=None,
        model__extra__weight=torch.zeros(3),
        lm_head__weight=torch.zeros(7, 32),
        model__embed_tokens__weight=torch.zeros(VOCAB, 32, dtype=torch.int32),
    )
    text = refused(copied, f"{copied}: holds another model than {copied / 'config.json'}: ")
    assert "model.norm.weight is missing" in text
    assert "model.extra.weight is not in this model" in text
    assert f"lm_head.weight has shape (7, 32) there and ({VOCAB}, 32) here" in text
    assert "model.embed_tokens.weight has dtype int32" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(copied, value):
    change_weights(copied, model__norm__weight=torch.full((32,), value, dtype=torch.bfloat16))
    refused(copied, "model.norm.weight holds values that are not finite")


def test_a_tied_head_that_differs_is_refused(tmp_path):
    directory = tmp_path / "hub"
    write_model(directory, "llama", torch.float32, tied=True)
    change_weights(directory, lm_head__weight=torch.zeros(VOCAB, 32))
    refused(directory, "lm_head.weight differs from model.embed_tokens.weight, and model.tied = true")


@pytest.mark.faults
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"]
)
def test_pickles_are_refused_unopened(copied, name):
    class Planted:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(copied.parent / "executed"),)

    (copied / "model.safetensors").unlink()
    torch.save(Planted(), copied / name)
    refused(copied, f"its weights are pickles ({name})", "take the model's safetensors files")


@pytest.mark.faults
def test_code_in_the_directory_is_not_run(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "planted.Model", "AutoConfig": "planted.Config"}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "planted.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    out = bring_in(copied, tmp_path / "in")
    OpenCheckpoint(out).export(
        tmp_path / "back",
        dtype="bf16",
        verify=True,
        licence="",
        name="",
        max_shard_bytes=10**9,
        num_processes=1,
    )
    assert not (tmp_path / "executed").exists()


@pytest.mark.faults
@pytest.mark.parametrize("keep", [0, 1, 7, 100, -1])
def test_truncated_weights_are_refused(copied, keep):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(copied, str(file))


@pytest.mark.faults
@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "missing.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(copied, place):
    names = list(load_file(copied / "model.safetensors"))
    (copied / "model.safetensors").rename(copied.parent / "outside.safetensors")
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, place)})
    )
    refused(copied, f"names the file {place!r}, which is not in")


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}", '{"weight_map": {}}']
)
def test_a_damaged_index_is_refused(copied, content):
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(content)
    refused(copied, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": "x"},
        {"rope_parameters": [1]},
        {"layer_types": 5},
        {"layer_types": [1, 2]},
        {"hidden_size": None, "head_dim": None},
        {"vocab_size": None},
        {"model_type": "mistral", "sliding_window": "8"},
        {"model_type": "mistral", "max_position_embeddings": None, "sliding_window": 64},
    ],
)
def test_values_of_another_kind_are_refused(copied, fields):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | fields))
    refused(copied, str(copied / "config.json"))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"is_causal": False}, "is_causal = False"),
        (
            {
                "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16},
                "original_max_position_embeddings": 32,
            },
            "original_max_position_embeddings = 32",
        ),
    ],
)
def test_fields_that_change_the_model_are_refused(copied, fields, words):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | fields))
    refused(copied, words)


def test_a_field_that_nobody_knows_of_is_found_by_the_logits(copied, monkeypatch):
    """The adapter is made blind for a field; what transformers computes is not."""
    from basestone.model.hf import llama_like

    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    blind = llama_like.read_fields
    monkeypatch.setattr(
        llama_like, "read_fields", lambda kind, hf, more: blind(kind, {**hf, "is_causal": True}, more)
    )
    with pytest.raises(
        ConversionError, match=r"import: .* they depart at layer 0 .*; nothing was imported"
    ) as caught:
        bring_in(copied, copied.parent / "out")
    assert caught.value.exit_code == 76
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


def test_a_tensor_under_two_names_is_refused(tmp_path):
    directory = tmp_path / "hub"
    write_model(directory, "gpt2", torch.float32, tied=True)
    change_weights(directory, wpe__weight=torch.zeros(64, 32))
    refused(directory, "holds transformer.wpe.weight twice")


def test_dropouts_that_differ_are_refused(tmp_path):
    directory = tmp_path / "hub"
    write_model(directory, "gpt2", torch.float32, tied=True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"attn_pdrop": 0.7}))
    refused(directory, "attn_pdrop = 0.7 (needs 0.1)")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "config.json cannot be read as JSON"),
        ("[1]", "config.json is no JSON object, but list"),
        ("{}", "has model_type None"),
        ('{"model_type": "swin"}', "has model_type 'swin'"),
        ('{"model_type": "llama"}', "has no field"),
    ],
)
def test_a_config_that_says_too_little_is_refused(copied, content, words):
    (copied / "config.json").write_text(content)
    refused(copied, str(copied / "config.json"), words)


def test_shapes_that_config_json_denies_are_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    refused(copied, "model.layers.0.mlp.gate_proj.weight has shape (48, 32) there and (40, 32) here")


def test_a_tokenizer_with_more_pieces_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    refused(copied, "has 281 pieces and the model of", "a vocabulary of 200", "--tokenizer")


def test_other_directories_are_refused(good, copied, tmp_path):
    (tmp_path / "a" / "empty").mkdir(parents=True)
    refused(tmp_path / "a" / "empty", "holds no config.json")
    imported = bring_in(copied, tmp_path / "b" / "in")
    refused(imported, "is a run directory, and needs no import")
    (copied.parent / "out").mkdir()
    refused(copied, "out: exists already; remove it or name another")


@pytest.mark.faults
def test_a_killed_import_leaves_no_target(good, tmp_path):
    def work() -> None:
        from_directory.import_directory(good, tmp_path / "out", tokenizer=None, versions={})

    assert killed_before(importing.RankWriter, "write", 9, work)
    assert not (tmp_path / "out").exists()
    bring_in(good, tmp_path / "out")
