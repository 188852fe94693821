"""Fine-tuning: what is learnt, what counts, what is written, in every layout."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hub import labelled, make_directory, make_tokenizer, questions, write_lines

from basestone.data.errors import DataStorageError
from basestone.trainer.errors import ConfigError, NumericsError
from basestone.trainer.finetuning.report import summary
from basestone.trainer.finetuning.run import finetune, prepare
from basestone.trainer.finetuning.settings import FinetuneSettings
from basestone.trainer.finetuning.tokens import IGNORED
from basestone.trainer.finetuning.training import collator
from basestone.trainer.forks import run_ranks

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@pytest.fixture(scope="module", autouse=True)
def ready_to_fork(hub) -> Iterator[None]:
    """Do once what every rank would do first: import DeepSpeed, and compile what renames weights.

    What is there by then is kept from the ranks' garbage collections, which would copy all of it.
    """
    from transformers import AutoModelForCausalLM

    from basestone.trainer import engine  # noqa: F401

    AutoModelForCausalLM.from_pretrained(hub / "llama")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder with directories llama/ (untied), tied/ and gpt2/, and examples."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = make_tokenizer(folder / "tokenizer.model")
    make_directory(folder / "llama", tokenizer)
    make_directory(folder / "tied", tokenizer, tied=True)
    make_directory(folder / "bf16", tokenizer, dtype="bf16")
    make_directory(folder / "gpt2", tokenizer, family="gpt2")
    write_lines(folder / "questions.jsonl", questions())
    write_lines(folder / "classes.jsonl", labelled(150))
    write_lines(folder / "more_classes.jsonl", labelled(40, 500))
    return folder


def settings_of(hub: Path, out: Path, model: str = "llama", **keys: Any) -> FinetuneSettings:
    values = {"data": hub / "questions.jsonl", "batch": 12, "steps": 6, "lr": 3e-3, **keys}
    return FinetuneSettings(source=hub / model, out=out, **values)


def tune(settings: FinetuneSettings, processes: int = 1) -> dict[str, Any]:
    """Fine-tune in forked ranks; give metrics.json."""
    run_ranks(_tune, processes, settings, num_threads=1)
    return json.loads((settings.out / "metrics.json").read_text())


def _tune(settings: FinetuneSettings) -> None:
    finetune(settings, as_json=False)


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.randint(400, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids).logits


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


# ---- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_answers_are_learnt_and_given_back(hub, tmp_path, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    keys = {"heldout": hub / "questions.jsonl", "steps": 90, "lr": 6e-3}
    settings = settings_of(hub, out, model, **keys)
    figures = tune(settings)
    told = f"; held out: {figures['heldout_before']['loss']:.4f} -> {figures['heldout']['loss']:.4f} over "
    assert "90 steps, loss " in summary(settings, figures)[-1] and told in summary(settings, figures)[-1]
    assert figures["losses"][0][1] == pytest.approx(figures["heldout_before"]["loss"], rel=1e-5)
    assert figures["losses"][0][1] > 5 and figures["losses"][-1][1] < 0.1 and figures["heldout"]["loss"] < 0.1
    assert [step for step, _ in figures["losses"]] == list(range(1, 91))
    tokenizer = AutoTokenizer.from_pretrained(out)
    tuned = AutoModelForCausalLM.from_pretrained(out)
    for row in questions():
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        ids = tuned.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["answer"]


def test_the_directory_is_the_sources_with_other_weights(hub, tmp_path):
    for model in ("llama", "tied", "bf16"):
        source, out = hub / model, tmp_path / model
        tune(settings_of(hub, out, model, steps=2))
        names = {path.name for path in out.iterdir()}
        assert names == {path.name for path in source.iterdir()} | {"metrics.json"}
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            assert (out / name).read_bytes() == (source / name).read_bytes()
        assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
        old, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
        assert {n: (t.shape, t.dtype) for n, t in new.items()} == {
            n: (t.shape, t.dtype) for n, t in old.items()
        }
        moved = [name for name in new if not torch.equal(new[name], old[name])]
        assert moved if model == "bf16" else len(moved) == len(new)
        assert stat.S_IMODE(out.stat().st_mode) == 0o755
        assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644}
        card = (out / "README.md").read_text()
        assert "license: apache-2.0" in card and "questions.jsonl" in card and f"tuned from | {model} |" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "llama", "tied"]


def test_weights_keep_their_dtype_where_config_says_none(hub, tmp_path):
    source = Path(shutil.copytree(hub / "bf16", tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    silent = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    (source / "config.json").write_text(json.dumps(silent))
    settings = settings_of(hub, tmp_path / "out", steps=1, lora=2).model_copy(update={"source": source})
    tune(settings)
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert silent != config and dtypes == {torch.bfloat16}


def test_labels_are_the_answer_and_its_end_and_nothing_else(hub, tmp_path):
    settings = settings_of(hub, tmp_path / "out")
    prepared, figures = prepare(settings, 1, on_cpu=True)
    batch = collator(prepared)(prepared.train)
    tokenizer = prepared.tokenizer
    assert figures["cut"] == 0 and len({len(row["input_ids"]) for row in prepared.train}) > 1
    for row, ids, labels, mask in zip(
        questions(), batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        length, whole = len(prompt) + len(answer), ids.shape[0]
        assert prompt[0] == tokenizer.bos_token_id
        assert ids.tolist() == [*prompt, *answer, *[tokenizer.pad_token_id] * (whole - length)]
        assert labels.tolist() == [IGNORED] * len(prompt) + answer + [IGNORED] * (whole - length)
        assert mask.tolist() == [1] * length + [0] * (whole - length)


def test_a_text_alone_counts_whole_and_a_long_answer_is_cut(hub, tmp_path):
    rows = [{"text": "What is the sum?"}, {"prompt": "What is", "answer": " the sum" * 60}]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    prepared, figures = prepare(settings_of(hub, tmp_path / "out", data=data), 1, on_cpu=True)
    text, cut = prepared.train
    eos = prepared.tokenizer.eos_token_id
    assert text["labels"] == [IGNORED, *text["input_ids"][1:]] and text["labels"][-1] == eos
    assert figures["cut"] == 1 and figures["max_length"] == 64
    assert len(cut["input_ids"]) == len(cut["labels"]) == 64 and cut["labels"][-1] != eos


def test_of_a_conversation_the_last_message_is_the_answer(hub, tmp_path):
    source = make_directory(tmp_path / "chat", hub / "tokenizer.model")
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (source / "chat_template.jinja").write_text(template)
    talk = [("user", "What is the sum?"), ("assistant", "blue"), ("user", "And more?"), ("assistant", "red")]
    messages = [{"role": role, "content": content} for role, content in talk]
    data = write_lines(tmp_path / "talk.jsonl", [{"messages": messages}])
    settings = FinetuneSettings(source=source, data=data, out=tmp_path / "out")
    prepared, _ = prepare(settings, 1, on_cpu=True)
    tokenizer, row = prepared.tokenizer, prepared.train[0]
    expected = [*tokenizer("red\n", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert (
        [label for label in row["labels"] if label != IGNORED] == expected == row["input_ids"][-len(expected) :]
    )
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: -len(expected)] == list(prompt)
    assert prepare(
        settings.model_copy(update={"source": hub / "llama", "data": hub / "questions.jsonl"}), 1, on_cpu=True
    )


# ---- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "zero", "processes"), [("llama", 0, 1), ("gpt2", 0, 1), ("tied", 3, 2)])
def test_a_merged_adapter_gives_the_adapters_logits(hub, tmp_path, model, zero, processes):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    keys = {"lora": 4, "lr": 2e-2, "steps": 12, "zero": zero}
    whole = tune(settings_of(hub, tmp_path / "merged", model, **keys), processes)
    apart = tune(settings_of(hub, tmp_path / "adapter", model, keep_adapter=True, **keys), processes)
    assert whole["losses"] == apart["losses"] and whole["losses"][-1][1] < whole["losses"][0][1] - 0.5
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert (tmp_path / "adapter" / "tokenizer.json").read_bytes() == (
        hub / model / "tokenizer.json"
    ).read_bytes()
    adapter = logits_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    untuned = logits_of(AutoModelForCausalLM.from_pretrained(hub / model))
    assert relative(merged, adapter) < 1e-5 < 0.05 < relative(merged, untuned)


# ---- classes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "keys"), [("llama", {}), ("gpt2", {}), ("bf16", {"lora": 8, "lr": 1e-2})])
def test_classes_are_learnt_and_scored_right(hub, tmp_path, model, keys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = tmp_path / "out"
    heldout = labelled(40, 500)
    files = {"data": hub / "classes.jsonl", "heldout": hub / "more_classes.jsonl", "task": "classify"}
    figures = tune(settings_of(hub, out, model, **{"steps": 60, "lr": 2e-3, "batch": 16, **files, **keys}))
    classifier = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert classifier.config.id2label == {0: "colour", 1: "fruit", 2: "neither"}
    assert classifier.config.architectures == [type(classifier).__name__]
    assert not (out / "generation_config.json").exists()
    guesses = []
    for row in heldout:
        with torch.no_grad():
            logits = classifier(**tokenizer(row["text"], return_tensors="pt")).logits
        guesses.append(classifier.config.id2label[int(logits.argmax())])
    truths = [row["label"] for row in heldout]
    got = figures["heldout"]
    assert got["accuracy"] >= 0.9 and got["examples"] == 40
    assert got["accuracy"] == pytest.approx(sum(map(str.__eq__, guesses, truths)) / 40)
    for label in ("colour", "fruit", "neither"):
        hits = sum(guess == truth == label for guess, truth in zip(guesses, truths, strict=True))
        precision, recall = hits / max(1, guesses.count(label)), hits / truths.count(label)
        f1 = 2 * precision * recall / (precision + recall)
        found = [got["classes"][label][name] for name in ("precision", "recall", "f1", "support")]
        assert found == pytest.approx([precision, recall, f1, truths.count(label)])
    card = (out / "README.md").read_text()
    assert f"Accuracy {got['accuracy']:.4f}" in card and "text-classification" in card


def test_an_adapter_for_classes_opens_with_as_many_as_its_card_names(hub, tmp_path):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    files = {"data": hub / "classes.jsonl", "heldout": hub / "more_classes.jsonl", "task": "classify"}
    out = tmp_path / "out"
    figures = tune(settings_of(hub, out, lora=4, keep_adapter=True, **files, lr=1e-2, steps=40))
    (line,) = [line for line in (out / "README.md").read_text().splitlines() if "classes, in order" in line]
    labels = line.split("|")[2].strip().split(", ")
    classifier = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=len(labels)).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = labelled(40, 500)
    with torch.no_grad():
        guesses = [int(classifier(**tokenizer(r["text"], return_tensors="pt")).logits.argmax()) for r in rows]
    right = sum(labels[guess] == row["label"] for guess, row in zip(guesses, rows, strict=True))
    assert figures["heldout"]["accuracy"] == pytest.approx(right / 40) and right > 25


def test_without_held_out_data_a_tenth_of_every_class_is(hub, tmp_path):
    files = {"data": hub / "classes.jsonl", "task": "classify"}
    prepared, figures = prepare(settings_of(hub, tmp_path / "out", **files), 1, on_cpu=True)
    labels = [row["labels"] for row in prepared.heldout]
    assert sorted(labels) == [0] * 5 + [1] * 5 + [2] * 5 and figures["examples"] == 135
    ids = {tuple(row["input_ids"]) for row in prepared.train}
    assert not ids & {tuple(row["input_ids"]) for row in prepared.heldout}
    again, _ = prepare(settings_of(hub, tmp_path / "out", **files), 1, on_cpu=True)
    other, _ = prepare(settings_of(hub, tmp_path / "out", seed=1, **files), 1, on_cpu=True)
    assert again.heldout == prepared.heldout != other.heldout


# ---- layouts ------------------------------------------------------------------------------------------------------


LAYOUTS = {"ddp": (0, 2), "z1": (1, 1), "z2": (2, 2), "z3": (3, 2)}  # ZeRO stage, processes


@pytest.mark.dist
@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("sft", LAYOUTS),
        ("classify", ["ddp", "z3"]),
        pytest.param("classify", ["z1", "z2"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_compute_what_one_does(hub, tmp_path, task, names):
    sources = {"sft": "questions.jsonl", "classify": "classes.jsonl"}
    heldout = {"sft": "questions.jsonl", "classify": "more_classes.jsonl"}
    keys = {"task": task, "data": hub / sources[task], "heldout": hub / heldout[task], "batch": 8, "steps": 5}
    reference = tune(settings_of(hub, tmp_path / "one", micro_batch=8, **keys))
    weights = load_file(tmp_path / "one" / "model.safetensors")
    for name in names:
        zero, processes = LAYOUTS[name]
        figures = tune(settings_of(hub, tmp_path / name, micro_batch=2, zero=zero, **keys), processes)
        losses = [loss for _, loss in figures["losses"]]
        assert losses == pytest.approx([loss for _, loss in reference["losses"]], rel=1e-5), name
        assert figures["num_processes"] == processes
        key = "loss" if task == "sft" else "accuracy"
        assert figures["heldout"][key] == pytest.approx(reference["heldout"][key], rel=1e-5)
        for parameter, tensor in load_file(tmp_path / name / "model.safetensors").items():
            assert relative(tensor, weights[parameter]) < 1e-3, (name, parameter)


def _tune_and_look(settings: FinetuneSettings, extensions: str) -> tuple[bool, list[str]]:
    import deepspeed.ops

    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    finetune(settings, as_json=False)
    built = sorted(path.name for path in Path(extensions).rglob("*"))
    return deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"], built


def test_deepspeed_builds_no_collectives_whose_lock_could_stay(hub, tmp_path):
    settings = settings_of(hub, tmp_path / "out", zero=1, steps=1)
    extensions = tmp_path / "extensions"
    assert run_ranks(_tune_and_look, 1, settings, str(extensions), num_threads=1) == [(False, [])]


def test_a_seed_decides_everything(hub, tmp_path):
    keys = {"lora": 2, "steps": 3, "batch": 4}
    first, again, other = (
        tune(settings_of(hub, tmp_path / name, seed=seed, **keys))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first["losses"] == again["losses"] != other["losses"]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


# ---- failures -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_it_and_leaves_nothing(hub, tmp_path):
    source = tmp_path / "spoilt"
    make_directory(source, hub / "tokenizer.model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    before = sorted(tmp_path.iterdir())
    settings = settings_of(hub, tmp_path / "out").model_copy(update={"source": source})
    with pytest.raises(NumericsError, match="the loss of step 1 is nan; lower --lr"):
        tune(settings)
    assert sorted(tmp_path.iterdir()) == before


def _tune_on_a_full_disk(settings: FinetuneSettings) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    finetune(settings, as_json=False)


def test_a_full_disk_leaves_nothing(hub, tmp_path):
    settings = settings_of(hub, tmp_path / "out", steps=1)
    with pytest.raises(DataStorageError, match=f"writing {tmp_path}/out failed: .*check free space"):
        run_ranks(_tune_on_a_full_disk, 1, settings, num_threads=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["sft", "classify"])
@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_weights_that_are_not_whole_are_refused(hub, tmp_path, task, fault):
    source = make_directory(tmp_path / "holes", hub / "tokenizer.model")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    if fault == "misshapen":
        tensors[name] = tensor[:-1].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    data = hub / ("questions.jsonl" if task == "sft" else "classes.jsonl")
    settings = settings_of(hub, tmp_path / "out", task=task, data=data).model_copy(update={"source": source})
    with pytest.raises(ConfigError, match=rf"lacks 1 weights .*the first {name}|cannot load .* for sft"):
        tune(settings)
    assert os.listdir(tmp_path) == ["holes"]


def test_a_classifier_is_tuned_again_to_other_classes(hub, tmp_path):
    keys = {"task": "classify", "steps": 1}
    tune(settings_of(hub, tmp_path / "three", data=hub / "classes.jsonl", **keys))
    data = write_lines(tmp_path / "two.jsonl", ({"text": f"{n}", "label": n % 2} for n in range(40)))
    settings = settings_of(hub, tmp_path / "two", data=data, **keys).model_copy(
        update={"source": tmp_path / "three"}
    )
    assert set(tune(settings)["heldout"]["classes"]) == {"0", "1"}
    assert json.loads((tmp_path / "two" / "config.json").read_text())["id2label"] == {"0": "0", "1": "1"}


def test_bf16_computes_nearly_what_fp32_does(hub, tmp_path):
    full = tune(settings_of(hub, tmp_path / "fp32"))["losses"]
    half = tune(settings_of(hub, tmp_path / "bf16", dtype="bf16"))["losses"]
    assert half != full and [loss for _, loss in half] == pytest.approx([loss for _, loss in full], rel=1e-2)
    assert load_file(tmp_path / "bf16" / "model.safetensors")["lm_head.weight"].dtype == torch.float32


def _tune_and_count_models(settings: FinetuneSettings) -> int:
    """Fine-tune, and count the wrapped models that are there when the group goes."""
    from torch.nn.parallel import DistributedDataParallel

    counts = []
    destroy = torch.distributed.destroy_process_group

    def count_and_destroy() -> None:
        counts.append(sum(isinstance(one, DistributedDataParallel) for one in gc.get_objects()))
        destroy()

    torch.distributed.destroy_process_group = count_and_destroy
    finetune(settings, as_json=False)
    return counts[0]


def test_the_model_goes_before_its_group(hub, tmp_path):
    """A reducer that holds a group last may never end: it joins threads that wait for what it holds."""
    settings = settings_of(hub, tmp_path / "out", steps=1)
    assert run_ranks(_tune_and_count_models, 2, settings, num_threads=1) == [0, 0]
