"""Export: whole or not at all, and never wrong."""

import importlib.util
import os
import shutil
from dataclasses import replace

import pytest
from faults import killed_before
from small_export import FACTS, SAMPLES, Weights, assert_nothing_left, hf_trace

from basestone.data.errors import DataConfigError, DataStorageError
from basestone.model.config import ModelConfig
from basestone.model.hf.adapter import adapter_for
from basestone.trainer.errors import ConfigError
from basestone.trainer.hub import weights as weights_module
from basestone.trainer.hub.card import CardFacts, model_card
from basestone.trainer.hub.weights import ConversionError


def test_the_card_states_the_facts(export, config, weights):
    report = export(trace=hf_trace(config, weights), samples=SAMPLES)
    card = (report.path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'license: "apache-2.0"' in card
    assert "  emissions: 739.00\n" in card
    assert "# tiny \\| &lt;model>" in card
    assert "| training tokens | 1,572,864 |" in card
    assert "| python | 2.5000 | 12.1825 | 1.2500 | 65,536 |" in card
    assert (
        "Energy: 2 kWh (measured: GPU boards only, by their energy counters; not CPUs, network, fans or power supplies)"
        in card
    )
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


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_card_shows_what_stands_for_a_hidden_span(family):
    shape = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "max_sequence_length": 32}
    shape |= {"num_decoder_layers": 1} if family == "t5" else {}
    config = ModelConfig(family=family, **shape, vocab_size=400)
    card = model_card(adapter_for(config), config, FACTS, dtype="bf16", verification=None)
    program = card.split("```python\n")[1].split("```")[0]
    compile(program, "card", "exec")
    call = 'encoded = tokenizer("A text with <extra_id_0> in it.", return_tensors="pt")\n'
    assert (call in program) == (family == "t5")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {},
            "CO2e: 739.00 g, from the metered energy above, a PUE of 1.2, 56 g CO2e per kWh (mean of France in 2023: "
            "Ember \\| CC BY); operational only.",
        ),
        (
            {"joules_source": "user-watts", "g_co2e": 0.0065},
            "CO2e: 0.0065 g, from the estimated energy above, a PUE",
        ),
        (
            {"joules": None, "joules_source": "none"},
            "Energy: not measured.\n\nCO2e: 739.00 g, from a PUE of 1.2, 56 g",
        ),
        ({"g_co2e": None}, "CO2e: not known (no carbon intensity was given)."),
        (
            {"g_co2e": None, "joules": None},
            "Energy: not measured.\n\nCO2e: not known (the energy is not known).",
        ),
    ],
)
def test_co2e_says_what_it_follows_from(config, changes, said):
    facts = replace(FACTS, pue=1.2, grid=(56.0, "mean of France in 2023: Ember | CC BY"), **changes)
    assert said in model_card(adapter_for(config), config, facts, dtype="bf16", verification=None)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (
            {"loss": 2.5, "perplexity": 12.0, "bits_per_byte": 1.0, "tokens": 9},
            "| loss (nats per prediction) | perplexity | bits per byte | predictions |",
        ),
        (
            {"loss": 4.5, "tokens": 9, "contrastive_accuracy": 0.5},
            "| loss (nats per prediction) | contrastive accuracy | predictions |",
        ),
        (
            {"loss": 8.5, "perplexity": 12.0, "tokens": 9, "masked_loss": 8.0, "next_sentence_loss": 0.5},
            "| loss (nats) | perplexity | masked loss | next sentence loss | predictions |",
        ),
    ],
)
def test_the_card_shows_what_the_task_has(config, figures, said):
    facts = replace(FACTS, heldout={"python": figures})
    assert f"| held-out set {said}\n" in model_card(
        adapter_for(config), config, facts, dtype="bf16", verification=None
    )


def test_front_matter_is_what_the_hub_reads(export):
    import yaml

    facts = CardFacts(
        *("x", 1, 100, {}, 'a "device": {', 1.0, "user-watts", 0.0001, "My: own licence", "", []),
    )
    text = (export(facts=facts).path / "README.md").read_text().split("---")[1]
    parsed = yaml.safe_load(text)
    assert parsed["license"] == "other"
    assert parsed["license_name"] == "My: own licence"
    assert "\n  emissions: 0.00010\n" in text and parsed["co2_eq_emissions"]["emissions"] == 0.0001
    assert parsed["co2_eq_emissions"]["hardware_used"] == 'a "device": {'
    assert parsed["co2_eq_emissions"]["source"].startswith("estimated")


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

    with pytest.raises(DataConfigError, match="exists already"):
        export(trace=trace)
    assert list((tmp_path / "out").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_missing_parameters_are_named(export, config, tmp_path):
    lacking = Weights(config)
    del lacking.tensors["layers.1.mlp.linear_fc2.weight"]
    with pytest.raises(ConversionError, match=r"lacks 1 of .* the first layers.1.mlp.linear_fc2.weight"):
        export(source=lacking)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "bf16"), (1e6, "fp16")])
def test_weights_that_are_not_finite_are_refused(export, config, tmp_path, value, dtype):
    spoilt = Weights(config)
    spoilt.tensors["norm.weight"][3] = value
    with pytest.raises(ConversionError, match=r"model.norm.weight is not finite in (bfloat16|float16)"):
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


def test_missing_transformers_is_said_before_anything_is_read(export, tmp_path, monkeypatch):
    """As where transformers cannot be found."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "transformers" else find(name, *rest),
    )
    with pytest.raises(ConfigError, match=r"pip install 'basestone\[hf\]'") as caught:
        export(source=None, facts=None, trace=lambda ids: ids)
    assert caught.value.exit_code == 64
    assert_nothing_left(tmp_path)


@pytest.mark.faults
def test_a_killed_export_leaves_no_target(export, tmp_path):
    """Kill -9 in the middle of the weights: what lies there does not bear the name."""
    assert killed_before(weights_module.BlockFile, "write", 9, export)
    assert not (tmp_path / "out").exists()
    assert [path.name.endswith(".partial") for path in tmp_path.iterdir()] == [True]
    assert os.listdir(next(tmp_path.iterdir())) != []


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
    with pytest.raises(ConversionError, match=r"model.layers.1.mlp.down_proj.weight is not finite"):
        export(source=spoilt, max_shard_bytes=20_000, num_processes=3)
    assert_nothing_left(tmp_path)
