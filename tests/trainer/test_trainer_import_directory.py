"""Directories of Hugging Face models: they come in whole, go out as they were, and nothing in them is executed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_directories import VOCAB, bring_in, refused, write_model
from safetensors.torch import load_file, save_file

from basestone.data.tokenizer import Tokenizer
from basestone.trainer.checkpoint.inspection import problems_of
from basestone.trainer.hub.from_directory import RUN_FILE
from basestone.trainer.inference import OpenCheckpoint
from basestone.trainer.load import load_run
from basestone.trainer.reference import generate

pytestmark = pytest.mark.usefixtures("own_group")


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


def test_of_one_file_and_an_index_the_file_counts_as_it_does_for_transformers(copied, tmp_path):
    tensors = load_file(copied / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 3}, copied / "other.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "other.safetensors")}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = OpenCheckpoint(bring_in(copied, tmp_path / "in"))
    assert torch.equal(opened.tensors.read("head.weight")[:VOCAB], tensors["lm_head.weight"].float())


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
