"""Export: whole or not at all, and never wrong."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from basestone.data.errors import DataStorageError
from basestone.data.tokenizer import train_tokenizer
from basestone.model.config import ModelConfig
from basestone.model.hf.adapter import adapter_for
from basestone.model.layout import decoder_layout
from basestone.trainer import runtime as processes
from basestone.trainer.errors import ConfigError
from basestone.trainer.hub import compare
from basestone.trainer.hub import export as export_module
from basestone.trainer.hub.card import CardFacts
from basestone.trainer.hub.export import export_checkpoint
from basestone.trainer.hub.weights import ExportError, write_weights
from basestone.trainer.reference import trace_of

TEXT = "".join(f"def function_{i}(value):\n\treturn value + {i}\n" for i in range(300))
FACTS = CardFacts(
    name="tiny | <model>",
    step=1200,
    tokens=1_572_864,
    heldout={"python": {"loss": 2.5, "perplexity": 12.1825, "bits_per_byte": 1.25, "tokens": 65536}},
    hardware="2 x test device",
    joules=7.2e6,
    joules_source="nvml-counter",
    g_co2e=739.0,
    licence="apache-2.0",
    data="Documentation and sources.",
    loss_curve=[(step, 9.0 - step / 200) for step in range(1, 1201)],
    versions={"torch": "2.x"},
)


class Weights:
    """A source of random weights, which can be spoilt."""

    def __init__(self, config: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tensors = {
            name: torch.randn(row.shape, generator=generator) * 0.2 + (row.kind == "norm")
            for name, row in decoder_layout(config).items()
        }

    def names(self):
        return self.tensors.keys()

    def read(self, name, dtype=torch.float32):
        return self.tensors[name].to(dtype)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(iter([TEXT]), path, vocab_size=400)
    return path


@pytest.fixture(scope="module")
def config(tokenizer) -> ModelConfig:
    return ModelConfig(
        family="llama",
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        max_sequence_length=64,
        vocab_size=400,
    )


@pytest.fixture(scope="module")
def weights(config) -> Weights:
    return Weights(config)


def hf_trace(config, weights, dtype=torch.bfloat16, parts=None):
    """Build the class in memory from the rounded weights: a forward that never touches the directory.

    `parts` may change what is traced.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    adapter = adapter_for(config)
    fields = adapter.hf_config(config, dtype=torch.float32, bos=1, eos=2, pad=3)
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval().float()
    state = {t.name: adapter.read(t, weights.read).to(dtype).float() for t in adapter.tensors(config)}
    model.load_state_dict(state)

    def trace(ids):
        assert ids.dtype == torch.int64
        seen = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in model.model.layers
        ]
        with torch.no_grad():
            logits = model(ids).logits
        for hook in hooks:
            hook.remove()
        rows = [("the embedding", model.model.embed_tokens(ids))]
        rows += [(f"layer {number}", out) for number, out in enumerate(seen)]
        rows = [*rows, ("the logits", logits)]
        yield from rows if parts is None else parts(rows)

    return trace


@pytest.fixture
def export(config, tokenizer, weights, tmp_path):
    """Export with what a test changes; gives the report."""

    def run(**changes):
        arguments = {
            "source": weights,
            "config": config,
            "tokenizer": tokenizer,
            "out": tmp_path / "out",
            "facts": FACTS,
            "sequence_length": 48,
            "trace": None,
            "samples": None,
            **changes,
        }
        return export_checkpoint(**arguments)

    return run


SAMPLES = torch.randint(400, (2, 48), generator=torch.Generator().manual_seed(5))


def assert_nothing_left(tmp_path):
    assert [path.name for path in tmp_path.iterdir()] == []


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


def test_the_card_states_the_facts(export, config, weights):
    report = export(trace=hf_trace(config, weights), samples=SAMPLES)
    card = (report.path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'license: "apache-2.0"' in card
    assert "  emissions: 739.00\n" in card
    assert "# tiny \\| &lt;model>" in card
    assert "| training tokens | 1,572,864 |" in card
    assert "| python | 2.5000 | 12.1825 | 1.2500 | 65,536 |" in card
    assert "Energy: 2 kWh (measured: the GPUs' energy counters (GPU boards only))" in card
    assert f"relative error {report.verification.relative_error:.2e}" in card
    assert "| 1,200 | 3.0000 |" in card


def test_unknowns_are_said_to_be_unknown(export):
    facts = CardFacts(
        *("bare", 1, 100, {}, "one CPU", None, "none", None, "", "", []),
    )
    card = (export(facts=facts).path / "README.md").read_text()
    assert "This export was not verified." in card
    assert "Energy: not measured." in card
    assert "CO2e: not known" in card
    assert "co2_eq_emissions" not in card
    assert "license" not in card.split("---")[1]


def test_front_matter_is_what_the_hub_reads(export):
    import yaml

    facts = CardFacts(
        *("x", 1, 100, {}, 'a "device": {', 1.0, "user-watts", 0.0001, "My: own licence", "", []),
    )
    text = (export(facts=facts).path / "README.md").read_text().split("---")[1]
    parsed = yaml.safe_load(text)
    assert parsed["license"] == "other"
    assert parsed["license_name"] == "My: own licence"
    assert parsed["co2_eq_emissions"]["emissions"] == 0.01
    assert parsed["co2_eq_emissions"]["hardware_used"] == 'a "device": {'
    assert parsed["co2_eq_emissions"]["source"].startswith("estimated")


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
        tensors["embed.word.weight"][SAMPLES[0, 0]] += 1
    else:
        dtype = torch.float32
    with pytest.raises(ExportError, match="more than 1.0e-04; they " + FAULTS[fault]) as caught:
        export(trace=hf_trace(other, spoilt, dtype), samples=SAMPLES)
    assert caught.value.exit_code == 76
    assert_nothing_left(tmp_path)


def test_other_shapes_are_refused(export, config, weights, tmp_path):
    with pytest.raises(ExportError, match=r"the logits of the exported model has shape \(3, 48, 400\)"):
        export(trace=hf_trace(config, weights, parts=logits_spoilt("shape")), samples=SAMPLES)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("value", [0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 2])
def test_a_fault_in_one_sequence_alone_is_found(export, config, weights, tmp_path, row, value):
    """The random sequence is the first of the batch, then come the samples."""
    with pytest.raises(ExportError, match="differ from the trainer's by"):
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
    monkeypatch.setattr(compare, "load_lazily", lambda path: model.append(lazily(path)) or model[0])
    monkeypatch.setattr(compare.Comparison, "take", take)
    report = export(config=config, source=weights, trace=trace, samples=SAMPLES, tolerance=1e-5)
    assert report.verification.loaded_whole is False and len(held) == config.num_layers + 2
    assert max(held) < max(row.numel for row in decoder_layout(config).values())
    assert "a module at a time" in (report.path / "README.md").read_text()
    spoilt = Weights(config)
    spoilt.tensors["layers.1.mlp.linear_fc2.weight"][0] += 1
    trace, model[:] = trace_of(config, spoilt, processes.start(), rounded_to=torch.bfloat16), []
    with pytest.raises(ExportError, match="depart at layer 1 "):
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
    with pytest.raises(ExportError, match=f"does not take the exported weights as they are: .*{name}"):
        export(trace=hf_trace(config, weights))
    assert_nothing_left(tmp_path)


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
    with pytest.raises(ExportError):
        export(trace=hf_trace(config, weights), samples=SAMPLES)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_an_existing_target_is_refused(export, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already; remove it or name another") as caught:
        export()
    assert caught.value.exit_code == 64
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_made_meanwhile_is_not_touched(export, config, weights, tmp_path):
    right = hf_trace(config, weights)

    def trace(ids):
        (tmp_path / "out").mkdir(exist_ok=True)
        yield from right(ids)

    with pytest.raises(ConfigError, match="exists already"):
        export(trace=trace)
    assert list((tmp_path / "out").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_missing_parameters_are_named(export, config, tmp_path):
    lacking = Weights(config)
    del lacking.tensors["layers.1.mlp.linear_fc2.weight"]
    with pytest.raises(ExportError, match=r"lacks 1 of .* the first layers.1.mlp.linear_fc2.weight"):
        export(source=lacking)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "bf16"), (1e6, "fp16")])
def test_weights_that_are_not_finite_are_refused(export, config, tmp_path, value, dtype):
    spoilt = Weights(config)
    spoilt.tensors["norm.weight"][3] = value
    with pytest.raises(ExportError, match=r"model.norm.weight is not finite in (bfloat16|float16)"):
        export(source=spoilt, dtype=dtype)
    assert_nothing_left(tmp_path)


def test_another_tokenizer_is_refused(export, config, tmp_path):
    small = config.model_copy(update={"vocab_size": 390})
    with pytest.raises(ConfigError, match="has 400 pieces and the model a vocabulary of 390"):
        export(config=small, source=Weights(small))
    assert_nothing_left(tmp_path)


def test_a_storage_failure_is_named_and_leaves_nothing(export, config, weights, tmp_path):
    class FullDisk(Weights):
        def read(self, name, dtype):
            if name == "norm.weight":
                raise OSError(28, "No space left on device")
            return super().read(name, dtype)

    with pytest.raises(DataStorageError, match="No space left on device") as caught:
        export(source=FullDisk(config))
    assert caught.value.exit_code == 74
    assert_nothing_left(tmp_path)


def test_missing_transformers_is_said_before_anything_is_read(config, tokenizer, tmp_path):
    """Run where transformers cannot be found."""
    script = f"""
import importlib.util, sys, torch
from pathlib import Path
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "transformers" else find(name, *rest)
from basestone.model.config import ModelConfig
from basestone.trainer.hub.export import export_checkpoint
try:
    export_checkpoint(None, ModelConfig.model_validate_json(sys.argv[1]), Path({str(tokenizer)!r}),
        Path({str(tmp_path / "out")!r}), facts=None, sequence_length=8, trace=lambda ids: ids, samples=None)
except ValueError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    root = Path(export_module.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, config.model_dump_json()], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 64, done.stderr
    assert "pip install 'basestone[hf]'" in done.stdout
    assert_nothing_left(tmp_path)


@pytest.mark.faults
def test_a_killed_export_leaves_no_target(config, tokenizer, tmp_path):
    """Kill -9 in the middle of the weights: what lies there does not bear the name."""
    script = f"""
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_trainer_export import FACTS, Weights
from basestone.model.config import ModelConfig
from basestone.trainer.hub.export import export_checkpoint
config = ModelConfig.model_validate_json(sys.argv[1])
class Killed(Weights):
    def read(self, name, dtype):
        if name == "layers.1.mlp.linear_fc1.weight":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(name, dtype)
export_checkpoint(Killed(config), config, Path({str(tokenizer)!r}), Path({str(tmp_path / "out")!r}), facts=FACTS,
    sequence_length=8, trace=None, samples=None)
"""
    root = Path(export_module.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, config.model_dump_json()], cwd=root, capture_output=True
    )
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists()
    assert [path.name.endswith(".partial") for path in tmp_path.iterdir()] == [True]
    assert os.listdir(next(tmp_path.iterdir())) != []


def test_without_samples_a_random_sequence_is_compared(export, config, weights):
    seen = []
    right = hf_trace(config, weights)

    def trace(ids):
        seen.append(ids)
        return right(ids)

    export(trace=trace, samples=None)
    assert [tuple(ids.shape) for ids in seen] == [(1, 48)]
    assert int(seen[0].min()) >= 0
    assert int(seen[0].max()) < 400


def test_too_little_space_is_said_before_anything_is_written(export, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50 << 20))
    with pytest.raises(ConfigError, match=r"out needs 0.07 GB and 0.05 GB are free there; free some"):
        export()
    assert_nothing_left(tmp_path)


@pytest.mark.dist
def test_processes_share_the_files(export, config, weights, tmp_path):
    one = export(out=tmp_path / "one", max_shard_bytes=20_000)
    shared = export(out=tmp_path / "shared", max_shard_bytes=20_000, num_processes=3)
    assert shared.files == one.files and len(one.files) > 8
    for name in one.files:
        if name != "README.md":
            assert (shared.path / name).read_bytes() == (one.path / name).read_bytes()


@pytest.mark.dist
def test_what_fails_in_one_process_fails_the_export(export, config, tmp_path):
    spoilt = Weights(config)
    spoilt.tensors["layers.1.mlp.linear_fc2.weight"][0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"model.layers.1.mlp.down_proj.weight is not finite"):
        export(source=spoilt, max_shard_bytes=20_000, num_processes=3)
    assert_nothing_left(tmp_path)
