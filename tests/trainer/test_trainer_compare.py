"""Before it is called done, an export is compared with the trainer: faults are caught, and their place is named."""

import stat
from logging import Handler, getLogger

import pytest
import torch
from hf_models import random_weights, write_directory
from safetensors.torch import load_file, save_file
from small_export import SAMPLES, Weights, assert_nothing_left, hf_trace

from basestone.model.config import ModelConfig
from basestone.model.families import layout_of
from basestone.model.hf.adapter import adapter_for
from basestone.trainer import runtime as processes
from basestone.trainer.hub import compare
from basestone.trainer.hub import export as export_module
from basestone.trainer.hub.weights import ConversionError, write_weights
from basestone.trainer.reference import trace_of

pytestmark = pytest.mark.usefixtures("own_group")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_verified_export_loads_and_says_so(export, config, weights, tmp_path, dtype):
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    trace = hf_trace(config, weights, torch_dtype)
    report = export(dtype=dtype, trace=trace, samples=SAMPLES, tolerance=1e-5)
    assert report.verification.relative_error < 1e-5
    assert report.verification.num_positions == 2 * 48 + 48
    assert set(report.files) == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert stat.S_IMODE(report.path.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in report.path.iterdir()} == {0o644}

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(report.path)
    assert model.dtype == torch_dtype
    assert model.config.vocab_size == 400
    ids = AutoTokenizer.from_pretrained(report.path)("def function", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 1
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_shards_are_verified_too(export, config, weights):
    report = export(trace=hf_trace(config, weights), samples=SAMPLES, max_shard_bytes=20_000)
    assert sum(name.endswith(".safetensors") for name in report.files) > 1
    assert "model.safetensors.index.json" in report.files


def logits_spoilt(fault):
    """Give a change of the traced logits."""

    def parts(rows):
        name, logits = rows[-1]
        if fault == "shape":
            logits = logits[..., :-1]
        else:
            row, value = fault
            logits[row, -1, -1] += value
        return [*rows[:-1], (name, logits)]

    return parts


# A fault of the trainer's side, and the part of the model that the message names. The attention of layer 0 reads norms.
FAULTS = {
    "epsilon": "depart at layer 0 ",
    "rope_base": "depart at layer 0 ",
    "query_key": "depart at layer 1 ",
    "gate_up": "depart at layer 1 ",
    "norm": "depart at the logits after the final norm",
    "embedding": "depart at the embedding already",
    "unrounded": "depart at the embedding already",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_leaves_nothing_and_names_its_place(export, config, weights, tmp_path, fault):
    other, dtype, spoilt = config, torch.bfloat16, Weights(config)
    tensors = spoilt.tensors
    if fault == "epsilon":
        other = config.model_copy(update={"norm_epsilon": 1e-3})
    elif fault == "rope_base":
        other = config.model_copy(update={"rope_base": 500_000.0})
    elif fault == "query_key":
        rows = tensors["layers.1.self_attention.linear_qkv.weight"]
        rows[:] = torch.cat((rows[8:16], rows[:8], rows[16:]))  # two heads change places
    elif fault == "gate_up":
        name = "layers.1.mlp.linear_fc1.weight"
        tensors[name] = torch.cat(tensors[name].chunk(2)[::-1])
    elif fault == "norm":
        tensors["norm.weight"][3] += 1
    elif fault == "embedding":
        tensors["embed.word.weight"][SAMPLES["tokens"][0, 0]] += 1
    else:
        dtype = torch.float32
    with pytest.raises(ConversionError, match="more than 1.0e-04; they " + FAULTS[fault]) as caught:
        export(trace=hf_trace(other, spoilt, dtype), samples=SAMPLES)
    assert caught.value.exit_code == 76
    assert_nothing_left(tmp_path)


def test_zeros_on_both_sides_are_equal_and_on_one_are_not(export, config, weights, tmp_path):
    nothing, other = Weights(config), Weights(config)
    nothing.tensors = {name: torch.zeros_like(tensor) for name, tensor in nothing.tensors.items()}
    report = export(source=nothing, trace=hf_trace(config, nothing), samples=SAMPLES)
    assert report.verification.relative_error == 0
    with pytest.raises(ConversionError, match="differ from the trainer's by inf relative"):
        export(source=other, trace=hf_trace(config, nothing), samples=SAMPLES, out=tmp_path / "other")


def test_memory_of_a_container_counts(tmp_path, monkeypatch):
    host = compare._available_bytes()
    monkeypatch.setattr(compare, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert compare._available_bytes() > host / 2
    (tmp_path / "memory.max").write_text("5000\n")
    assert compare._available_bytes() == 4000


def test_other_shapes_are_refused(export, config, weights, tmp_path):
    with pytest.raises(ConversionError, match=r"the logits of the Hugging Face model has shape \(3, 48, 400\)"):
        export(trace=hf_trace(config, weights, parts=logits_spoilt("shape")), samples=SAMPLES)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("value", [0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 2])
def test_a_fault_in_one_sequence_alone_is_found(export, config, weights, tmp_path, row, value):
    """The random sequence is the first of the batch, then come the samples."""
    with pytest.raises(ConversionError, match="differ from the trainer's by"):
        export(trace=hf_trace(config, weights, parts=logits_spoilt((row, value))), samples=SAMPLES)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("family", ["llama", "tied llama", "gpt2"])
def test_a_model_larger_than_memory_is_compared_a_module_at_a_time(
    export, config, weights, tmp_path, monkeypatch, family
):
    """Its parameters are on no device but while their module runs, and the verdict is the same."""
    monkeypatch.setattr(compare, "_available_bytes", lambda: 1000)
    if family != "llama":
        name, tied = ("gpt2", True) if family == "gpt2" else ("llama", True)
        fields = config.model_dump(include={"num_layers", "hidden_size", "num_attention_heads", "vocab_size"})
        config = ModelConfig(family=name, tied=tied, max_sequence_length=64, **fields)
        weights = Weights(config)
    trace, held = trace_of(config, weights, processes.start(), rounded_to=torch.bfloat16), []
    real = compare.Comparison.take

    def take(self, got):
        held.append(sum(p.numel() for p in model[0].parameters() if p.device.type != "meta"))
        return real(self, got)

    model, lazily = [], compare.load_lazily
    monkeypatch.setattr(compare, "load_lazily", lambda *args: model.append(lazily(*args)) or model[0])
    monkeypatch.setattr(compare.Comparison, "take", take)
    report = export(config=config, source=weights, trace=trace, samples=SAMPLES, tolerance=1e-5)
    assert report.verification.loaded_whole is False and len(held) == config.num_layers + 2
    assert max(held) < max(row.numel for row in layout_of(config).values())
    assert "a module at a time" in (report.path / "README.md").read_text()
    spoilt = Weights(config)
    spoilt.tensors["layers.1.mlp.linear_fc2.weight"][0] += 1
    trace, model[:] = trace_of(config, spoilt, processes.start(), rounded_to=torch.bfloat16), []
    with pytest.raises(ConversionError, match="depart at layer 1 "):
        export(config=config, source=weights, trace=trace, samples=SAMPLES, out=tmp_path / "second")


def test_of_sentence_embeddings_the_last_states_are_compared(export, config, tmp_path):
    """They may be wider than the vocabulary."""
    config = config.model_copy(update={"pooling": "last", "hidden_size": 416})
    weights, spoilt = Weights(config), Weights(config)
    trace = trace_of(config, weights, processes.start(), rounded_to=torch.bfloat16)
    report = export(config=config, source=weights, trace=trace, samples=SAMPLES)
    assert report.verification.compared == "last states"
    assert "and its last states compared with the trainer's" in (report.path / "README.md").read_text()
    spoilt.tensors["norm.weight"][410] += 1
    trace = trace_of(config, spoilt, processes.start(), rounded_to=torch.bfloat16)
    with pytest.raises(ConversionError, match=r"model's last states differ .* they depart at the last states "):
        export(config=config, source=weights, trace=trace, samples=SAMPLES, out=tmp_path / "second")


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("change", ["more", "fewer"])
def test_other_tensors_than_transformers_wants_are_refused(
    export, config, weights, tmp_path, monkeypatch, change, lazily
):
    def written(source, adapter, config, out, **more):
        write_weights(source, adapter, config, out, **more)
        tensors = load_file(out / "model.safetensors")
        if change == "more":
            tensors["model.extra.weight"] = torch.zeros(1)
        else:
            del tensors["model.norm.weight"]
        save_file(tensors, out / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(export_module, "write_weights", written)
    if lazily:
        monkeypatch.setattr(compare, "_available_bytes", lambda: 1000)
    name = "model.extra.weight" if change == "more" else "model.norm.weight"
    with pytest.raises(ConversionError, match=f"does not take the weights as they are: .*{name}"):
        export(trace=hf_trace(config, weights))
    assert_nothing_left(tmp_path)


def test_a_t5_with_a_head_of_its_own_is_loaded_without_a_warning(tmp_path):
    """transformers' T5 takes each config.json for one with tied embeddings, and advises what stands there."""
    from transformers import T5ForConditionalGeneration
    from transformers.utils import logging

    shape = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "max_sequence_length": 32}
    t5 = ModelConfig(family="t5", **shape, num_decoder_layers=1, vocab_size=131)
    write_directory(t5, random_weights(t5), tmp_path)
    written = []
    handler = Handler()
    handler.emit = lambda record: written.append(record.getMessage())
    getLogger("transformers").addHandler(handler)
    try:
        before = logging.get_verbosity()
        compare.load_whole(tmp_path, adapter_for(t5), "export")
        assert written == [] and logging.get_verbosity() == before
        T5ForConditionalGeneration.from_pretrained(tmp_path)
        assert any("tie_word_embeddings" in text for text in written), "it warns no more: the silence may go"
    finally:
        getLogger("transformers").removeHandler(handler)


def test_a_damaged_file_is_caught_from_disk(export, config, weights, tmp_path, monkeypatch):
    """Verification reads what was written: flip a byte on its way to the disk."""

    def damaging(source, adapter, config, out, **more):
        written = write_weights(source, adapter, config, out, **more)
        path = out / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 0x40
        path.write_bytes(content)
        return written

    monkeypatch.setattr(export_module, "write_weights", damaging)
    with pytest.raises(ConversionError):
        export(trace=hf_trace(config, weights), samples=SAMPLES)
    assert_nothing_left(tmp_path)


def test_without_samples_a_random_sequence_is_compared(export, config, weights):
    seen = []
    right = hf_trace(config, weights)

    def trace(batch):
        seen.append(batch["tokens"])
        return right(batch)

    export(trace=trace, samples=None)
    assert [tuple(ids.shape) for ids in seen] == [(1, 48)]
    assert int(seen[0].min()) >= 0
    assert int(seen[0].max()) < 400
