"""Every family by the command line: train, go on in another layout, evaluate, export, and open what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import losses_of
from small_families import write_run

pytestmark = pytest.mark.dist

ACCURACIES = {
    "bert": {"masked", "next_sentence"},
    "t5": {"spans"},
    "bert-sentences": {"contrastive"},
    "llama-sentences": {"contrastive"},
}


CONTINUES_NOTHING = {
    "bert": "bert predicts no next token",
    "t5": "t5 continues no prompt, for it reads a text first",
    "bert-sentences": "bert with model.pooling makes vectors, and no tokens",
    "llama-sentences": "llama with model.pooling makes vectors, and no tokens",
}


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"]


@pytest.mark.parametrize("kind", ACCURACIES)
def test_a_family_from_training_to_the_exported_directory(kind, forked, corpus, symbols, tmp_path):
    run = write_run(tmp_path, kind, corpus, symbols)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run_dir, more in (
        (whole, ("parallel.tensor=2",)),
        (cut, ("parallel.tensor=2", "train.steps=3")),
        (cut, ("parallel.pipeline=2", "parallel.zero=2")),
    ):
        settings = [part for setting in more for part in ("--set", setting)]
        done = forked("train", run, "--run-dir", run_dir, *settings)
        assert done.returncode == 0, done.stderr
    assert losses_of(cut) == pytest.approx(losses_of(whole), rel=1e-5)
    last = evaluations(cut)[-1]
    assert {name.removesuffix("_accuracy") for name in last if name.endswith("_accuracy")} == ACCURACIES[kind]
    assert "bits_per_byte" not in last and ("perplexity" in last) == ("contrastive" not in ACCURACIES[kind])
    if "contrastive" in ACCURACIES[kind]:
        assert last["contrastive_accuracy"] <= last["contrastive_recall_at_10"] <= 1
        assert f"contrastive recall at 10 {last['contrastive_recall_at_10']:.4f}" in done.stdout + done.stderr

    done = forked("evaluate", cut, "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout).values()
    assert found == pytest.approx({name: last[name] for name in found}, rel=1e-4)

    done = forked("generate", cut, "--prompt", "a list")
    assert (
        done.returncode == 64 and f"generate: {CONTINUES_NOTHING[kind]}; `basestone export` it" in done.stderr
    )

    out = tmp_path / "out"
    done = forked("export", cut, out, "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    compared = "last states" if "contrastive" in ACCURACIES[kind] else "logits"
    assert f"fp32, {compared} equal the trainer's within" in done.stdout
    assert f"and its {compared} compared with the trainer's" in (out / "README.md").read_text()
    assert "tie_word_embeddings" not in done.stderr
    opened = OPEN[kind](out)
    assert bool(torch.isfinite(opened).all())
    if "contrastive" in ACCURACIES[kind]:
        lines = [json.dumps({"text": f"list {number}", "other": f"a list of {number}"}) for number in range(12)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
        done = forked("similarity", out, tmp_path / "pairs.jsonl", "--json")
        assert done.returncode == 0, done.stderr
        assert 0 <= json.loads(done.stdout)["recall_at_1"] <= json.loads(done.stdout)["recall_at_10"] <= 1
    done = forked("import", out, tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert f"{compared} equal transformers'" in done.stdout


def open_bert(out: Path) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForPreTraining

    tokenizer = AutoTokenizer.from_pretrained(out)
    encoded = tokenizer("a list", "the second [MASK]", return_tensors="pt")
    names = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    assert names[0] == "[CLS]" and names[-1] == "[SEP]" and names.count("[SEP]") == 2 and "[MASK]" in names
    assert encoded["token_type_ids"][0].tolist() == [0] * (names.index("[SEP]") + 1) + [1] * (
        len(names) - names.index("[SEP]") - 1
    )
    model, info = BertForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    _, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert {name.partition(".")[0] for name in info["missing_keys"]} == {"classifier"}
    return model(**encoded).prediction_logits


def open_t5(out: Path) -> torch.Tensor:
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(out)
    encoded = tokenizer("a list of <extra_id_0> items", return_tensors="pt")
    names = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    assert names[-1] == "</s>" and names[0] != "<s>" and "<extra_id_0>" in names
    model = T5ForConditionalGeneration.from_pretrained(out)
    program = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(program.replace("PATH", str(out)), {})
    answer = model.generate(**encoded, max_new_tokens=4, do_sample=False)
    assert answer[0, 0] == tokenizer.pad_token_id, "the decoder begins as in training"
    return model(**encoded, decoder_input_ids=answer).logits


def open_sentences(out: Path) -> torch.Tensor:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(out), device="cpu")
    texts = ["a list of items", "another text, and a longer one than the first", "x"]
    together = model.encode(texts, convert_to_tensor=True)
    alone = torch.stack([model.encode(text, convert_to_tensor=True) for text in texts])
    assert together.shape == (3, 64) and torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=-1), torch.ones(3))
    assert model.tokenizer("x")["input_ids"][0] == model.tokenizer.cls_token_id
    return together


OPEN = {"bert": open_bert, "t5": open_t5, "bert-sentences": open_sentences, "llama-sentences": open_sentences}
