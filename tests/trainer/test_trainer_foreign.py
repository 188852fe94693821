"""Files of torch.save: real models of transformers come in whole, and what is planted in a file is never executed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from foreign_files import VOCAB, own_states, refused, resolved_run

from basestone.model.families import layout_of
from basestone.model.hf.adapter import adapter_for
from basestone.trainer.checkpoint.inspection import problems_of
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.checkpoint.tensors import CheckpointTensors
from basestone.trainer.config import ResolvedRun


def transformers_model(resolved: ResolvedRun) -> torch.nn.Module:
    """The family's class with random weights, biases and norms."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    model = resolved.run.model
    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "gpt2": (GPT2Config, GPT2LMHeadModel)}
    config, kind = classes[model.family]
    fields = adapter_for(model).hf_config(model, dtype=torch.float32, bos=1, eos=2, pad=3)
    out = kind(config(**fields)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return out


def states(resolved: ResolvedRun) -> dict[str, torch.Tensor]:
    return dict(transformers_model(resolved).state_dict())


def tensors_of(out: Path, resolved: ResolvedRun) -> CheckpointTensors:
    return CheckpointTensors(Reader(out), layout_of(resolved.run.model))


# ---- what comes in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("gpt2", True)], ids=["llama", "tied", "gpt2"]
)
def test_a_model_of_transformers_comes_in_whole(tmp_path, bring_in, family, tied, wrapper):
    resolved = resolved_run(family, model__tied=tied)
    model = transformers_model(resolved)
    saved = model.state_dict()
    assert ("lm_head.weight" in saved) is True, "transformers saves the tied head, too"
    out = bring_in({wrapper: saved, "epoch": 3} if wrapper else saved, resolved)
    assert problems_of(out) == [] and sorted(path.name for path in tmp_path.iterdir()) == ["out", "weights.pt"]
    tensors = tensors_of(out, resolved)
    adapter = adapter_for(resolved.run.model)
    for tensor in adapter.tensors(resolved.run.model):
        assert torch.equal(adapter.read(tensor, tensors.read), saved[tensor.name]), tensor.name
    padding = tensors.read("embed.word.weight")[VOCAB:]
    assert len(padding) and not padding.any()


def test_the_state_is_of_a_run_that_has_not_begun(bring_in):
    resolved = resolved_run()
    reader = Reader(bring_in(own_states(resolved), resolved))
    state = reader.state()
    assert reader.index.tensors == ["master"]
    assert (state["step"], state["tokens"], state["optimizer_steps"]) == (
        0,
        0,
        0,
    ) and "weights_only" not in state
    assert state["tokenizer_sha256"] == "abc" and state["imported_from"] == "weights.pt"
    assert state["run"] == resolved.run.model_dump(mode="json") and state["run"]["model"]["vocab_size"] == VOCAB


def test_our_own_names_come_in(bring_in):
    resolved = resolved_run()
    saved = own_states(resolved)
    tensors = tensors_of(bring_in(saved, resolved), resolved)
    assert all(torch.equal(tensors.read(name), value) for name, value in saved.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_become_fp32(bring_in, dtype):
    resolved = resolved_run()
    saved = {name: value.to(dtype) for name, value in own_states(resolved).items()}
    tensors = tensors_of(bring_in(saved, resolved), resolved)
    assert all(torch.equal(tensors.read(name), value.float()) for name, value in saved.items())


def test_views_and_parameters_come_in(bring_in):
    resolved = resolved_run()
    saved = own_states(resolved)
    name = "layers.0.mlp.linear_fc2.weight"
    turned = saved[name].t().contiguous()
    tensors = tensors_of(
        bring_in(
            {**saved, name: turned.t(), "norm.weight": torch.nn.Parameter(saved["norm.weight"])}, resolved
        ),
        resolved,
    )
    assert torch.equal(tensors.read(name), saved[name])
    assert torch.equal(tensors.read("norm.weight"), saved["norm.weight"])


def test_constants_of_old_versions_are_left_out(bring_in):
    for family, name in (
        ("gpt2", "transformer.h.0.attn.bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ):
        resolved = resolved_run(family)
        saved = {**states(resolved), name: torch.ones(1, 1, 64, 64)}
        out = bring_in(saved, resolved)
        assert problems_of(out) == []
        out.rename(out.with_name(family))


# ---- another model ------------------------------------------------------------------------------------------------


def test_every_difference_is_in_one_message(tmp_path, bring_in):
    saved = states(resolved_run())
    saved["model.norm.weight"] = torch.ones(65)
    saved["model.layers.7.mlp.up_proj.weight"] = torch.ones(2)
    saved["model.layers.0.mlp.up_proj.weight"] = torch.ones(256, 64, dtype=torch.int8)
    saved["model.layers.1.mlp.up_proj.weight"] = 3.5
    del saved["lm_head.weight"]
    text = refused(
        bring_in,
        saved,
        *("weights.pt: holds another model than the run file's [model]: lm_head.weight is missing; ",),
        "model.norm.weight has shape (65,) there and (64,) here",
        "model.layers.7.mlp.up_proj.weight is not in this model",
        "model.layers.0.mlp.up_proj.weight has dtype int8",
        "model.layers.1.mlp.up_proj.weight is a float",
    )
    assert len(text.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


def test_a_whole_other_model_is_said_in_short(bring_in):
    text = refused(
        bring_in,
        {f"x.{number}": torch.ones(1) for number in range(500)},
        "model.embed_tokens.weight is missing",
    )
    assert re.search(r"; and \d{3} more$", text) and len(text) < 2000


def test_a_tied_head_that_differs_is_refused(bring_in):
    resolved = resolved_run(model__tied=True)
    saved = states(resolved)
    head = saved["lm_head.weight"].clone()
    head[7, 7] += 1
    refused(
        bring_in,
        {**saved, "lm_head.weight": head},
        "lm_head.weight differs from model.embed_tokens.weight, and model.tied = true",
        resolved=resolved,
    )
    refused(bring_in, {**saved, "lm_head.weight": head[:-1]}, "lm_head.weight has shape", resolved=resolved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("names", [states, own_states], ids=["transformers", "own"])
def test_what_is_not_finite_is_refused_and_leaves_nothing(tmp_path, bring_in, names, value):
    saved = names(resolved_run())
    name = list(saved)[-2]
    saved[name] = saved[name].double()
    saved[name].view(-1)[-1] = value
    refused(bring_in, saved, f"{name} holds values that are not finite in fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(1).expand(300, 64), "repeats 4 stored bytes"),
        (torch.ones(1).expand(10**6, 10**6), "has shape (1000000, 1000000) there and (300, 64) here"),
        (torch.eye(300, 64).to_sparse(), "is no dense tensor in memory (torch.sparse_coo, cpu)"),
        (torch.empty(300, 64, device="meta"), "is no dense tensor in memory (torch.strided, meta)"),
        (torch.ones(300, 64, dtype=torch.complex64), "has dtype complex64"),
        (torch.ones(300, 64).to(torch.float8_e4m3fn), "has dtype float8_e4m3fn"),
        ({"a": torch.ones(1)}, "is a dict"),
        (None, "is a NoneType"),
    ],
    ids=["stride 0", "10^12 elements", "sparse", "meta", "complex", "float8", "dict", "None"],
)
def test_what_is_no_dense_tensor_is_refused_before_it_is_copied(tmp_path, bring_in, value, words):
    saved = {**states(resolved_run()), "model.embed_tokens.weight": value}
    refused(bring_in, saved, f"model.embed_tokens.weight {words}")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
    assert (tmp_path / "weights.pt").stat().st_size < 10**7


@pytest.mark.parametrize(
    "saved", [torch.ones(3), [torch.ones(3)], 7, "text"], ids=["tensor", "list", "int", "str"]
)
def test_what_is_no_state_dict_is_refused(bring_in, saved):
    refused(bring_in, saved, "where a state dict belongs")


def test_an_existing_target_is_refused(tmp_path, bring_in):
    (tmp_path / "out").mkdir()
    refused(bring_in, own_states(resolved_run()), "out: exists already; remove it or name another")
    (tmp_path / "out").rmdir()
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    refused(bring_in, own_states(resolved_run()), "exists already")
