"""Directories of Hugging Face models: they come in whole, go out as they were, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from basestone.data.tokenizer import Tokenizer
from basestone.trainer.checkpoint.inspection import problems_of
from basestone.trainer.errors import ConfigError
from basestone.trainer.hub import from_directory
from basestone.trainer.hub.from_directory import RUN_FILE, import_directory
from basestone.trainer.inference import OpenCheckpoint
from basestone.trainer.load import load_run
from basestone.trainer.reference import generate

VOCAB = 320
ROOT = Path(from_directory.__file__).resolve().parents[2]
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MORE: dict[str, dict[str, Any]] = {
    "llama 3.1": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, **SCALING},
    },
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 12},
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE as transformers saves it."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    fast.train_from_iterator(["def function(value): return value " * 20], trainer)
    fast.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(
    directory: Path, family: str, dtype: torch.dtype, *, tied: bool, max_shard_size: str = "5GB"
) -> None:
    """Save a model of transformers with random weights, as its own `save_pretrained` does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = GPT2 if family == "gpt2" else LLAMA | MORE.get(family, {})
    model_type = family.removesuffix(" 3.1")
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, tie_word_embeddings=tied, **fields)
    model: Any = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    write_tokenizer(directory)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "tiny-llama"
    write_model(directory, "llama", torch.bfloat16, tied=False)
    return directory


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "tiny-llama"))


def bring_in(directory: Path, out: Path, tokenizer: Path | None = None) -> Path:
    import_directory(directory, out, tokenizer=tokenizer, versions={"basestone": "1"})
    return out


def refused(directory: Path, *words: str, kind: type[Exception] = ConfigError, **arguments: Any) -> str:
    """Check that nothing is left of a refused import, and give the message."""
    out = directory.parent / "out"
    before = sorted(path.name for path in directory.parent.iterdir())
    with pytest.raises(kind) as caught:
        bring_in(directory, out, **arguments)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert caught.value.exit_code == 64  # type: ignore[attr-defined]
    assert sorted(path.name for path in directory.parent.iterdir()) == before
    return text


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


# ---- what comes in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "max_shard_size"),
    [
        ("llama", False, "bf16", "5GB"),
        ("llama", True, "fp32", "20KB"),
        ("gpt2", True, "fp16", "5GB"),
        ("gpt2", False, "fp32", "30KB"),
        ("llama 3.1", False, "bf16", "5GB"),
        ("mistral", False, "bf16", "5GB"),
        ("qwen2", True, "bf16", "20KB"),
        ("qwen3", False, "fp32", "5GB"),
    ],
)
def test_what_comes_in_goes_out_bit_for_bit(tmp_path, family, tied, dtype, max_shard_size):
    directory = tmp_path / "hub"
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    write_model(directory, family, torch_dtype, tied=tied, max_shard_size=max_shard_size)
    assert (len(list(directory.glob("*.safetensors"))) > 1) is (max_shard_size != "5GB")
    out = bring_in(directory, tmp_path / "in")
    opened = OpenCheckpoint(out)
    assert problems_of(out / "checkpoints" / "step_00000000") == []
    line = opened.export(
        tmp_path / "back", dtype=dtype, verify=True, licence="", name="", max_shard_bytes=10**9, num_processes=1
    )
    assert "logits equal the trainer's within" in line
    before, after = weights_of(directory), weights_of(tmp_path / "back")
    if not tied:
        assert "lm_head.weight" in before
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    card = (tmp_path / "back" / "README.md").read_text()
    assert "The weights of hub, converted with Basestone" in card and "from scratch" not in card


def test_logits_and_ids_are_those_of_transformers(good, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = OpenCheckpoint(bring_in(good, tmp_path / "in"))
    text = "def function(value): return value"
    ids = AutoTokenizer.from_pretrained(good)(text)["input_ids"]
    assert ids == Tokenizer(opened.tokenizer).encode(text).tolist()
    batch = torch.tensor([ids])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(good, dtype=torch.float32)(batch).logits
    got = opened._logits(torch.bfloat16)(batch)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_goes_through(copied, tmp_path, place):
    """It decides no ids, so the tokenizer's fingerprint stays; special tokens that it writes are special tokens."""
    from transformers import AutoTokenizer

    template = "{% for message in messages %}<s>{{ message.content }}</s>{% endfor %}"
    plain = Tokenizer(copied / "tokenizer.json").sha256
    if place.endswith(".json"):
        config = json.loads((copied / place).read_text())
        (copied / place).write_text(json.dumps(config | {"chat_template": template}))
    else:
        (copied / place).write_text(template)
    assert Tokenizer(copied / "tokenizer.json").sha256 == plain
    opened = OpenCheckpoint(bring_in(copied, tmp_path / "in"))
    opened.export(
        tmp_path / "hf", dtype="bf16", verify=False, licence="", name="", max_shard_bytes=10**9, num_processes=1
    )
    conversation = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "return"}]
    before, after = (AutoTokenizer.from_pretrained(path) for path in (copied, tmp_path / "hf"))
    ids = before.apply_chat_template(conversation)["input_ids"]
    assert ids == after.apply_chat_template(conversation)["input_ids"]
    assert ids.count(before.bos_token_id) == ids.count(before.eos_token_id) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_greedy_continuations_are_those_of_transformers(tmp_path, family):
    """Of 50 prompts: random weights say something else to each, where a model of few steps repeats itself."""
    from transformers import AutoModelForCausalLM

    directory = tmp_path / "hub"
    write_model(directory, family, torch.float32, tied=False)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    opened = OpenCheckpoint(bring_in(directory, tmp_path / "in"))
    logits, generator = opened._logits(torch.float32), torch.Generator().manual_seed(1)
    said = set()
    for ids in torch.randint(VOCAB, (50, 1, 7), generator=generator):
        ours = generate(
            logits,
            ids,
            max_new_tokens=10,
            temperature=0.0,
            top_k=0,
            eos=-1,
            max_sequence_length=64,
            seed=0,
        )
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=None
        )
        assert ours.tolist() == theirs.tolist()
        said.add(tuple(ours[0, 7:].tolist()))
    assert len(said) > 25, "a model that always says the same proves little"


def test_the_run_file_loads_and_names_what_lies_beside_it(good, tmp_path):
    out = bring_in(good, tmp_path / "in")
    run = load_run(out / RUN_FILE, ["data.train=builtin:python"])
    assert run.train.init_from == str(out) and run.data.tokenizer == str(out / "tokenizer.model")
    assert run.model == OpenCheckpoint(out).model
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", RUN_FILE, "tokenizer.model"]
    assert Tokenizer(out / "tokenizer.model").encode("def f").tolist()


def test_names_without_the_trunk_and_old_constants_come_in(tmp_path):
    """As the hub's gpt2 has them: those of the base class, with the causal masks that old versions saved."""
    directory = tmp_path / "hub"
    write_model(directory, "gpt2", torch.float32, tied=True)
    file = directory / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
    save_file(tensors | masks, file, {"format": "pt"})
    tensors_in = OpenCheckpoint(bring_in(directory, tmp_path / "in")).tensors
    assert torch.equal(tensors_in.read("embed.position.weight"), tensors["wpe.weight"])


def test_another_tokenizer_may_be_named(copied, tmp_path):
    (tmp_path / "own").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).rename(tmp_path / "own" / name)
    refused(copied, "holds neither tokenizer.json nor tokenizer.model; name one by --tokenizer")
    out = bring_in(copied, tmp_path / "in", tmp_path / "own" / "tokenizer.json")
    assert OpenCheckpoint(out).tokenizer == out / "tokenizer.model"


# ---- what is refused ----------------------------------------------------------------------------------------------


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
    shutil.copy(copied / "model.safetensors", copied.parent / "outside.safetensors")
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, place)})
    )
    refused(copied, f"names the file {place!r}, which is not in")


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}", '{"weight_map": {}}']
)
def test_a_damaged_index_is_refused(copied, content):
    (copied / "model.safetensors.index.json").write_text(content)
    refused(copied, "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "config.json: cannot be read"),
        ("[1]", "config.json: holds no object, but list"),
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
    script = f"""
import os, signal, sys
from pathlib import Path
from basestone.trainer import importing
from basestone.trainer.hub.from_directory import import_directory
write, count = importing.RankWriter.write, 0
def die(self, data):
    global count
    count += 1
    if count == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, data)
importing.RankWriter.write = die
import_directory(Path({str(good)!r}), Path({str(tmp_path / "out")!r}), tokenizer=None, versions={{}})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists()
    bring_in(good, tmp_path / "out")
