"""Export: whole or not at all, and never wrong."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from basestone.data.errors import DataStorageError
from basestone.data.tokenizer import train_tokenizer
from basestone.model.config import ModelConfig
from basestone.model.hf.adapter import adapter_for
from basestone.model.layout import decoder_layout
from basestone.trainer import export as export_module
from basestone.trainer.card import CardFacts
from basestone.trainer.errors import ConfigError
from basestone.trainer.export import ExportError, export_checkpoint

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

    def read(self, name):
        return self.tensors[name]


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


def hf_reference(config, weights, dtype=torch.bfloat16):
    """Build the class in memory from the rounded weights: a forward that never touches the directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    adapter = adapter_for(config)
    fields = adapter.hf_config(config, dtype=torch.float32, bos=1, eos=2, pad=3)
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval().float()
    state = {t.name: adapter.read(t, weights.read).to(dtype).float() for t in adapter.tensors(config)}
    model.load_state_dict(state)

    def reference(ids):
        assert ids.dtype == torch.int64
        with torch.no_grad():
            return model(ids).logits

    return reference


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
            "reference": None,
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
    reference = hf_reference(config, weights, torch_dtype)
    report = export(dtype=dtype, reference=reference, samples=SAMPLES, tolerance=1e-5)
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
    report = export(reference=hf_reference(config, weights), samples=SAMPLES, max_shard_bytes=20_000)
    assert sum(name.endswith(".safetensors") for name in report.files) > 1
    assert "model.safetensors.index.json" in report.files


def test_the_card_states_the_facts(export, config, weights):
    report = export(reference=hf_reference(config, weights), samples=SAMPLES)
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


@pytest.mark.parametrize("fault", ["epsilon", "gate_up", "unrounded", "nan", "shape"])
def test_a_difference_to_the_reference_leaves_nothing(export, config, weights, tmp_path, fault):
    other, dtype = config, torch.bfloat16
    spoilt = Weights(config)
    if fault == "epsilon":
        other = config.model_copy(update={"norm_epsilon": 1e-3})
    elif fault == "gate_up":
        for name, tensor in spoilt.tensors.items():
            if name.endswith("linear_fc1.weight"):
                spoilt.tensors[name] = torch.cat(tensor.chunk(2)[::-1])
    elif fault == "unrounded":
        dtype = torch.float32
    right = hf_reference(other, spoilt, dtype)

    def reference(ids):
        logits = right(ids)
        if fault == "nan":
            logits[0, 3, 7] = float("nan")
        return logits[..., :-1] if fault == "shape" else logits

    with pytest.raises(ExportError) as caught:
        export(reference=reference, samples=SAMPLES)
    assert caught.value.exit_code == 76
    expected = "logits of shape" if fault == "shape" else "more than 1.0e-04"
    assert expected in str(caught.value)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("value", [0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_fault_in_one_batch_alone_is_found(export, config, weights, tmp_path, batch_size, value):
    """The random sequence is a batch of 1, the samples are one of 2."""
    right = hf_reference(config, weights)

    def reference(ids):
        logits = right(ids)
        if ids.shape[0] == batch_size:
            logits[-1, -1, -1] += value
        return logits

    with pytest.raises(ExportError, match="differ from the trainer's by"):
        export(reference=reference, samples=SAMPLES)
    assert_nothing_left(tmp_path)


def test_tensors_that_transformers_does_not_know_are_refused(export, config, weights, tmp_path, monkeypatch):
    write = export_module.write_safetensors

    def with_one_more(out_dir, plan, produce, max_shard_bytes):
        more = [*plan, ("model.extra.weight", (1,), torch.bfloat16)]
        extra = torch.zeros(1, dtype=torch.bfloat16)
        return write(out_dir, more, lambda n: extra if "extra" in n else produce(n), max_shard_bytes)

    monkeypatch.setattr(export_module, "write_safetensors", with_one_more)
    with pytest.raises(
        ExportError, match=r"does not take the exported weights as they are: .*model.extra.weight"
    ):
        export(reference=hf_reference(config, weights))
    assert_nothing_left(tmp_path)


def test_a_damaged_file_is_caught_from_disk(export, config, weights, tmp_path, monkeypatch):
    """Verification reads what was written: flip a byte on its way to the disk."""
    write = export_module.write_safetensors

    def damaging(out_dir, *arguments):
        written = write(out_dir, *arguments)
        path = out_dir / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 0x40
        path.write_bytes(content)
        return written

    monkeypatch.setattr(export_module, "write_safetensors", damaging)
    with pytest.raises(ExportError):
        export(reference=hf_reference(config, weights), samples=SAMPLES)
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
    right = hf_reference(config, weights)

    def reference(ids):
        (tmp_path / "out").mkdir(exist_ok=True)
        return right(ids)

    with pytest.raises(ConfigError, match="exists already"):
        export(reference=reference)
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
        def read(self, name):
            if name == "norm.weight":
                raise OSError(28, "No space left on device")
            return super().read(name)

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
from basestone.trainer.export import export_checkpoint
try:
    export_checkpoint(None, ModelConfig.model_validate_json(sys.argv[1]), Path({str(tokenizer)!r}),
        Path({str(tmp_path / "out")!r}), facts=None, sequence_length=8, reference=lambda ids: ids, samples=None)
except ValueError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    root = Path(export_module.__file__).resolve().parents[1]
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
from basestone.trainer.export import export_checkpoint
config = ModelConfig.model_validate_json(sys.argv[1])
class Killed(Weights):
    def read(self, name):
        if name == "layers.1.mlp.linear_fc1.weight":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(name)
export_checkpoint(Killed(config), config, Path({str(tokenizer)!r}), Path({str(tmp_path / "out")!r}), facts=FACTS,
    sequence_length=8, reference=None, samples=None)
"""
    root = Path(export_module.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, config.model_dump_json()], cwd=root, capture_output=True
    )
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists()
    assert [path.name.endswith(".partial") for path in tmp_path.iterdir()] == [True]
    assert os.listdir(next(tmp_path.iterdir())) != []


def test_without_samples_a_random_sequence_is_compared(export, config, weights):
    seen = []
    right = hf_reference(config, weights)

    def reference(ids):
        seen.append(ids)
        return right(ids)

    export(reference=reference, samples=None)
    assert [tuple(ids.shape) for ids in seen] == [(1, 48)]
    assert int(seen[0].min()) >= 0
    assert int(seen[0].max()) < 400
