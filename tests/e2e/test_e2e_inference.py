"""evaluate, generate and export, from a run that the command line has trained."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytestmark = pytest.mark.dist


def test_evaluate_equals_the_training_runs_own(trained, basestone):
    done = basestone("evaluate", trained, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["topics"]
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert result["tokens"] == last["tokens"]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert result[name] == pytest.approx(last[name], rel=1e-5)


def test_evaluate_needs_the_held_out_shards_alone(trained, corpus, forked):
    shards = corpus / "shards" / "train"
    shards.rename(corpus / "away")
    try:
        done = forked("evaluate", trained, "--max-tokens", "500")
    finally:
        (corpus / "away").rename(shards)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("topics: loss ")


def test_generate_continues_a_prompt(trained, basestone, forked):
    words = ("generate", trained, "--prompt", "The following", "--max-new-tokens", "12")
    first, again = basestone(*words), forked(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("The following") and first.stdout == again.stdout
    assert forked(*words, "--seed", "5").stdout != first.stdout


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_export_is_what_transformers_loads(tmp_path, trained, basestone, forked, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "hf"
    export = {"bf16": basestone, "fp32": forked}[dtype]
    done = export("export", trained, out, "--dtype", dtype, "--licence", "apache-2.0")
    assert done.returncode == 0, done.stderr
    error = float(done.stdout.split("within ")[1].split()[0])
    assert error < 1e-5
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[dtype])
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("The following", return_tensors="pt")
    text = tokenizer.decode(
        model.generate(**inputs, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True
    )
    assert text.startswith("The following")
    card = (out / "README.md").read_text()
    assert ("apache-2.0" in card and "joule" in card.lower()) or "kWh" in card
    assert forked("export", trained, out).returncode == 64, "an existing directory must be refused"


def test_export_refuses_another_tokenizer(tmp_path, trained, corpus, forked):
    other = tmp_path / "other.model"
    done = forked("tokenizer", "train", corpus / "shards/train", "--out", other, "--vocab-size", "520")
    assert done.returncode == 0, done.stderr
    done = forked("export", trained, tmp_path / "hf", "--tokenizer", other)
    assert done.returncode == 64
    assert "is not the tokenizer" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "hf").exists()


def test_report_and_checkpoint_commands(trained, forked):
    done = forked("report", trained)
    assert done.returncode == 0 and (trained / "report.html").stat().st_size > 5000
    listed = json.loads(forked("checkpoint", "ls", trained, "--json").stdout)
    assert [row["step"] for row in listed] == [16, 12, 8] and all(row["problem"] is None for row in listed)
    verified = forked("checkpoint", "verify", trained, "--all")
    assert verified.returncode == 0 and verified.stdout.count("every byte matches") == 3
    facts = json.loads(forked("checkpoint", "show", trained, "--json").stdout)
    layout = {"processes": 2, "tensor": 2, "pipeline": 1, "zero": 1}
    assert (facts["step"], facts["optimizer_steps"], facts["layout"]) == (16, 16, layout)
    assert not facts["weights_only"] and facts["parameters"] > 0 and "torch" in facts["versions"]


def test_a_pruned_run_goes_on_from_what_is_left(tmp_path, trained, forked):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    done = forked("checkpoint", "prune", run_dir, "--keep-last", "1")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000016"]
    done = forked("train", run_dir / "run.toml", "--run-dir", run_dir, "--set", "train.steps=18")
    assert done.returncode == 0 and "resuming at step 16" in done.stdout + done.stderr
    steps = [row["step"] for row in json.loads(forked("checkpoint", "ls", run_dir, "--json").stdout)]
    assert steps == [18, 16]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_torch_file_comes_in_and_leaves_as_what_it_was(tmp_path, corpus, basestone, forked, family):
    """transformers -> torch.save -> import -> export -> transformers: the same logits."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    if family == "llama":
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 256, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).eval()
        keys = ["model.ffn_hidden_size=256", "model.norm_epsilon=1e-5"]
    else:
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=512, **sizes)).eval()
        keys = ["model.ffn_hidden_size=256"]
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    text = (corpus / "run.toml").read_text()
    if family == "gpt2":
        text = text.replace('"llama"', '"gpt2"').replace("num_query_groups = 2\n", "")
    section = "\n".join(key.removeprefix("model.").replace("=", " = ") for key in keys)
    (corpus / f"{family}.toml").write_text(text.replace("[model]\n", f"[model]\n{section}\n"))
    imported, out = tmp_path / "imported", tmp_path / "hf"
    done = {"llama": basestone, "gpt2": forked}[family](
        *("checkpoint", "import", tmp_path / "pytorch_model.bin", imported, "--run", corpus / f"{family}.toml")
    )
    assert done.returncode == 0, done.stderr
    tokenizer = corpus / "tokenizer.model"
    assert done.stdout == f"{imported}: weights of pytorch_model.bin; its tokenizer is {tokenizer}\n"
    assert "every byte matches" in forked("checkpoint", "verify", imported).stdout
    done = forked("export", imported, out, "--dtype", "fp32", "--tokenizer", tokenizer)
    assert done.returncode == 0, done.stderr
    ids = torch.arange(64)[None] * 7 % 512
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, model(ids).logits)
    done = forked("generate", imported, "--prompt", "The", "--max-new-tokens", "2", "--tokenizer", tokenizer)
    assert done.returncode == 0 and done.stdout.startswith("The"), done.stderr
