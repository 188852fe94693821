"""What bad input to a fine-tuning gets: every problem in one message, before any long work."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_hub import labelled, questions, write_lines

from basestone.trainer.errors import ConfigError
from basestone.trainer.finetuning.directory import licence_lines, stored_dtype, tuned_config
from basestone.trainer.finetuning.examples import parse_labelled, parse_sft, shuffled, split_tenth
from basestone.trainer.finetuning.run import prepare
from basestone.trainer.finetuning.scores import classification_scores
from basestone.trainer.finetuning.settings import FinetuneSettings
from basestone.trainer.finetuning.tokens import IGNORED


def message(tmp_path: Path, source: Path, rows: Any = None, processes: int = 1, **keys: Any) -> str:
    """What preparing says; rows are written as the data, text as it is."""
    data = tmp_path / "data.jsonl"
    if isinstance(rows, str):
        data.write_text(rows)
    elif not data.exists():
        write_lines(data, questions() if rows is None else rows)
    settings = FinetuneSettings(**{"source": source, "data": data, "out": tmp_path / "out", **keys})
    with pytest.raises(ConfigError) as caught:
        prepare(settings, processes, on_cpu=True)
    assert caught.value.exit_code == 64 and str(caught.value).startswith("finetune: ")
    return str(caught.value)


# ---- the directory ------------------------------------------------------------------------------------------------


def test_what_is_no_model_directory(tmp_path):
    assert "no is no directory; give what `basestone export` wrote" in message(tmp_path, tmp_path / "no")
    (tmp_path / "empty").mkdir()
    assert "empty has no config.json: it is no Hugging Face model directory" in message(
        tmp_path, tmp_path / "empty"
    )


@pytest.mark.parametrize("name", ["run.toml", "MANIFEST.json"])
def test_a_run_or_a_checkpoint_must_be_exported_first(tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_text("")
    assert f"export it first: basestone export {run} OUT" in message(tmp_path, run)


def test_a_pickle_is_refused_and_not_opened(tmp_path, copy):
    (copy / "model.safetensors").unlink()
    assert "has no weights (*.safetensors)" in message(tmp_path, copy)
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert "a pickle alone (pytorch_model.bin), which would run code" in message(tmp_path, copy)


def test_code_in_the_directory_is_refused(tmp_path, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    assert "names code of its own (auto_map), which is never run" in message(tmp_path, copy)


def test_a_config_that_cannot_be_read(tmp_path, copy):
    (copy / "config.json").write_text("{")
    assert "config.json cannot be read as JSON" in message(tmp_path, copy)
    (copy / "config.json").write_text("[]")
    assert "config.json is no JSON object" in message(tmp_path, copy)


@pytest.mark.parametrize("dtype", ["float64", 3, {"a": 1}])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_is_not_written_is_refused_first(tmp_path, copy, key, dtype):
    config = json.loads((copy / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    (copy / "config.json").write_text(json.dumps({**kept, key: dtype}))
    text = message(tmp_path, copy, '{"prompt": "a"}')
    assert f"config.json has dtype {dtype!r}; it may be bfloat16, float16, float32" in text
    assert "line 1 has no" in text
    assert "has dtype" not in message(tmp_path, copy, lora=2, keep_adapter=True)


def test_the_dtype_of_most_weights_counts_where_config_says_none(tmp_path, copy):
    (copy / "config.json").write_text("{}")
    tensors = {"a": torch.zeros(5, 5, dtype=torch.bfloat16), "b": torch.zeros(9), "c": torch.zeros(9)}
    save_file({**tensors, "ids": torch.zeros(99, dtype=torch.int64)}, copy / "model.safetensors")
    assert stored_dtype(copy) == "bfloat16"
    save_file({"d": torch.zeros(9)}, copy / "model-2.safetensors")
    assert stored_dtype(copy) == "float32", "the weights of all files"
    save_file({"d": torch.zeros(99, dtype=torch.float64)}, copy / "model-2.safetensors")
    assert "most weights of" in message(tmp_path, copy) and "have dtype 'F64'" in message(tmp_path, copy)
    (copy / "model-2.safetensors").write_bytes(b"no such file")
    assert "model-2.safetensors cannot be read as safetensors" in message(tmp_path, copy)


def test_a_directory_without_a_tokenizer(tmp_path, copy):
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        (copy / name).unlink()
    assert "has no tokenizer (tokenizer.json)" in message(tmp_path, copy)


def test_a_tokenizer_without_an_end_or_that_is_broken(tmp_path, copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert "its tokenizer has no end-of-sequence token" in message(tmp_path, copy)
    (copy / "tokenizer.json").write_text("{}")
    assert f"the tokenizer of {copy} cannot be loaded" in message(tmp_path, copy)


# ---- the data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{nonsense", "line 2 is no JSON"),
        ("[1]", "line 2 is no JSON object"),
        (r'{"prompt": "\ud800x", "answer": "b"}', "line 2 has half of a surrogate pair"),
        (r'{"messages": [{"role": "assistant", "content": "\udc00"}]}', "line 2 has half of a surrogate pair"),
        ('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}", "line 2 is nested too deeply"),
        ('{"question": "a"}', 'line 2 has no "text"; give {"prompt", "answer"}, {"messages"} or {"text"}'),
        ('{"prompt": "a"}', 'line 2 has no "answer"'),
        ('{"answer": "a"}', 'line 2 has no "prompt"'),
        ('{"prompt": "a", "answer": " "}', "line 2 has an empty answer"),
        ('{"prompt": "a", "answer": 3}', 'line 2 has no text in "answer" but 3'),
        ('{"text": ""}', "line 2 has an empty text"),
        (
            '{"text": "a", "label": "x"}',
            'line 2 has the key "label", which --task sft does not read; leave it out: give {"prompt", "answer"}, ',
        ),
        ('{"prompt": "a", "answer": "b", "text": "c"}', 'line 2 has the key "text", which --task sft does not'),
        (
            '{"messages": [{"role": "user", "content": "a", "tool_calls": []}]}',
            'line 2 has the key "tool_calls", which --task sft does not read; leave it out: give {"role", "content"}',
        ),
        ('{"messages": []}', 'line 2 has no list of messages, each {"role", "content"}'),
        (
            '{"messages": [{"role": "user"}]}',
            'line 2 has a message that is not {"role": text, "content": text}',
        ),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'line 2 ends with a message of "user"'),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "line 2 has an empty answer"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2 has an answer alone; the messages"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]}',
            "line 2 has messages, and",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path, model, line, text):
    assert text in message(tmp_path, model, '{"prompt": "a", "answer": "b"}\n' + line + "\n")


def test_wrong_lines_come_together_the_first_ten_by_number(tmp_path, model):
    rows = '{"prompt": "a", "answer": "b"}\n\n' + '{"prompt": "a"}\n' * 13
    lines = message(
        tmp_path, model, rows, lora=None, keep_adapter=True, heldout=tmp_path / "none.jsonl"
    ).splitlines()
    assert len(lines) == 1 + 10 + 1 + 1
    assert "--keep-adapter without --lora" in lines[0]
    assert "line 3 has" in lines[1] and "line 12 has" in lines[10] and lines[11].endswith("and 3 more lines")
    assert "none.jsonl cannot be read (No such file or directory)" in lines[12]


def test_data_without_examples(tmp_path, model):
    assert "data.jsonl holds no examples" in message(tmp_path, model, "\n\n")


def test_prompts_that_leave_no_room(tmp_path, model):
    rows = [
        {"prompt": "word " * 200, "answer": "a"},
        {"prompt": "a", "answer": "b"},
        {"prompt": "is " * 99, "answer": "a"},
    ]
    text = message(tmp_path, model, rows)
    assert "line 1 has a prompt of" in text and "line 3 has a prompt of" in text and "line 2" not in text
    assert "and 64 hold prompt and answer; shorten it" in text


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"text": "a"}', 'line 1 has no "label"; give {"text", "label"} with or without "text_pair"'),
        ('{"label": "a"}', 'line 1 has no "text"'),
        ('{"text": " ", "label": "a"}', "line 1 has an empty text"),
        ('{"text": "a", "label": 1.5}', "line 1 has the label 1.5; give a text or a whole number"),
        ('{"text": "a", "label": true}', "line 1 has the label true"),
        ('{"text": "a", "text_pair": 1, "label": 1}', 'line 1 has no text in "text_pair" but 1'),
        (
            '{"text": "a", "label": 1, "other": "b"}',
            'line 1 has the key "other", which --task classify does not',
        ),
        ('{"text": "a", "label": "x"}', 'every label is "x"; classification needs two or more'),
    ],
)
def test_a_wrong_line_of_a_classification(tmp_path, model, line, text):
    assert text in message(tmp_path, model, line + "\n", task="classify")


def test_labels_of_half_characters_and_endless_numbers(tmp_path, model):
    rows = [{"text": "a", "label": "\ud800"}, {"text": "a", "label": "b"}]
    text = message(tmp_path, model, rows, task="classify", heldout=tmp_path / "none.jsonl")
    assert "line 1 has half of a surrogate pair" in text and "none.jsonl cannot be read" in text
    rows = [{"text": "a", "label": label} for label in ("9" * 5000, "12", "-3", "x")]
    data = write_lines(tmp_path / "endless.jsonl", rows)
    settings = FinetuneSettings(source=model, data=data, heldout=data, out=tmp_path / "out", task="classify")
    assert prepare(settings, 1, on_cpu=True)[0].labels == ["-3", "12", "9" * 5000, "x"]


def test_a_whole_surrogate_pair_is_text(tmp_path, model):
    data = tmp_path / "pair.jsonl"
    data.write_text(r'{"text": "\ud83d\ude00"}')
    prepared, _ = prepare(FinetuneSettings(source=model, data=data, out=tmp_path / "out"), 1, on_cpu=True)
    assert len(prepared.train) == 1


def test_held_out_labels_must_be_known_and_be_there(tmp_path, model):
    heldout = write_lines(
        tmp_path / "held.jsonl", [{"text": "a", "label": "plum"}, {"text": "a", "label": "fruit"}]
    )
    text = message(tmp_path, model, labelled(30), task="classify", heldout=heldout)
    assert "held.jsonl: labels that the training data lacks: plum" in text
    write_lines(tmp_path / "data.jsonl", labelled(12))
    assert "no class has ten examples" in message(tmp_path, model, task="classify")


def test_a_template_that_refuses_is_named(tmp_path, copy):
    (copy / "chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    rows = [{"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert "line 1 does not go with the chat template: no system message" in message(tmp_path, copy, rows)

    (copy / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    assert "line 1 does not go with the chat template: can only concatenate str" in message(
        tmp_path, copy, rows
    )


def test_the_answer_of_a_conversation_ends_with_its_end(tmp_path, copy):
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    talk = [{"role": "user", "content": "What is blue?"}, {"role": "assistant", "content": "The sum"}]
    text = message(tmp_path, copy, [{"messages": talk}])
    assert "its chat template writes special tokens, and its tokenizer would read them as text; set" in text
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "split_special_tokens": False}))
    settings = FinetuneSettings(source=copy, data=tmp_path / "data.jsonl", out=tmp_path / "out")
    prepared, _ = prepare(settings, 1, on_cpu=True)
    tokenizer, (row,) = prepared.tokenizer, prepared.train
    assert tokenizer.decode(row["input_ids"]) == "<user>What is blue?</s>\n<assistant>The sum</s>"
    answer = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(answer) == "The sum</s>" and answer.count(tokenizer.eos_token_id) == 1


def test_pairs_are_encoded_as_the_tokenizer_does_and_long_texts_cut(tmp_path, model):
    rows = [{"text": f"What {n}", "text_pair": "is blue", "label": n} for n in (10, 2, -1)]
    rows.append({"text": "What " * 90, "text_pair": "red", "label": 2})
    data, held = write_lines(tmp_path / "data.jsonl", rows), write_lines(tmp_path / "held.jsonl", rows[:1])
    settings = FinetuneSettings(source=model, data=data, heldout=held, out=tmp_path / "out", task="classify")
    prepared, figures = prepare(settings, 1, on_cpu=True)
    assert prepared.labels == ["-1", "2", "10"] and [row["labels"] for row in prepared.train] == [2, 1, 0, 1]
    ids = prepared.train[0]["input_ids"]
    assert ids == prepared.tokenizer("What 10", "is blue")["input_ids"] and ids.count(1) == 2
    assert figures["cut"] == 1 and len(prepared.train[3]["input_ids"]) == 64


# ---- the options --------------------------------------------------------------------------------------------------


def test_options_that_do_not_go_together(tmp_path, model):
    (tmp_path / "out").mkdir()
    text = message(tmp_path, model, processes=3, keep_adapter=True, batch=16, zero=2, dtype="bf16")
    assert len(text.splitlines()) == 4
    assert "out exists already; remove it or give another --out" in text
    assert "--keep-adapter without --lora" in text
    assert "--batch 16 is no multiple of 3 = 3 processes x 1 examples" in text
    assert "--dtype bf16 with --zero needs a GPU" in text


def test_a_length_beyond_the_models(tmp_path, model):
    assert "--max-length 65, but the model of" in message(tmp_path, model, max_length=65)


def test_the_micro_batch_divides_a_ranks_share():
    paths = {"source": Path("a"), "data": Path("b"), "out": Path("c")}
    for batch, processes, expected in ((16, 1, 8), (12, 1, 6), (12, 2, 6), (7, 1, 7), (22, 2, 1), (2, 4, 1)):
        settings = FinetuneSettings(batch=batch, **paths)
        assert settings.micro_batch_of(processes) == expected
    assert FinetuneSettings(batch=24, micro_batch=3, **paths).accumulation_of(2) == 4
    assert (FinetuneSettings(**paths).learning_rate, FinetuneSettings(lora=2, **paths).learning_rate) == (
        2e-5,
        2e-4,
    )


# ---- pieces -------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_scores_equal_a_count_by_hand(pairs):
    truths, guesses = [list(column) for column in zip(*pairs, strict=True)]
    scores = classification_scores(truths, guesses, ["a", "b", "c", "d"])
    f1s = []
    for index, label in enumerate("abcd"):
        predicted = [truth for truth, guess in pairs if guess == index]
        real = [guess for truth, guess in pairs if truth == index]
        precision = predicted.count(index) / len(predicted) if predicted else 0.0
        recall = real.count(index) / len(real) if real else 0.0
        f1s.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
        row = scores["classes"][label]
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx([precision, recall, f1s[-1]])
        assert row["support"] == len(real)
    assert scores["macro"]["f1"] == pytest.approx(sum(f1s) / 4)
    assert scores["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_scores_equal_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = random.Random(3)
    truths = [generator.randrange(3) for _ in range(200)]
    guesses = [truth if generator.random() < 0.7 else generator.randrange(3) for truth in truths]
    scores = classification_scores(truths, guesses, ["x", "y", "z"])
    names = ("precision", "recall", "f1", "support")
    columns = metrics.precision_recall_fscore_support(truths, guesses)
    for index, row in enumerate(scores["classes"].values()):
        assert [row[name] for name in names] == pytest.approx([column[index] for column in columns])
    macro = metrics.precision_recall_fscore_support(truths, guesses, average="macro")[:3]
    assert list(scores["macro"].values()) == pytest.approx(list(macro))


@given(st.integers(1, 500), st.integers(0, 2**32), st.integers(0, 9))
def test_an_order_holds_every_example_once(count, seed, epoch):
    assert sorted(shuffled(count, seed, epoch)) == list(range(count))


def test_a_split_takes_a_tenth_of_each_class():
    from basestone.trainer.finetuning.examples import LabelledText

    examples = [LabelledText(n, "t", None, "ab"[n % 4 == 0]) for n in range(100)] + [
        LabelledText(100, "t", None, "c")
    ]
    train, held = split_tenth(examples, 7)
    assert sorted(example.label for example in held) == ["a"] * 7 + ["b"] * 2
    assert sorted(example.line for example in train + held) == list(range(101))


def test_a_config_keeps_both_spellings():
    config = {
        "rope_theta": 1e4,
        "rope_parameters": {},
        "torch_dtype": "float32",
        "architectures": ["A"],
        "id2label": {},
    }
    tuned = tuned_config(config, architecture="B", pad_id=3, labels=["no", "yes"])
    kept = {"rope_theta": 1e4, "rope_parameters": {}, "torch_dtype": "float32"}
    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    problem = {"problem_type": "single_label_classification"}
    assert tuned == {**kept, "architectures": ["B"], "pad_token_id": 3, **labels, **problem}


def test_the_licence_goes_over(tmp_path):
    assert licence_lines(tmp_path) == []
    (tmp_path / "README.md").write_text("---\ntags: x\nlicense: other\nlicense_name: mine\n---\nlicense: no\n")
    assert licence_lines(tmp_path) == ["license: other", "license_name: mine"]


def test_a_lines_other_keys_may_be_there():
    line = {"id": 7, "source": "here"}
    assert parse_sft(1, {**line, "prompt": "a", "answer": "b"}).answer == "b"
    assert parse_sft(1, {**line, "text": "a"}).answer == "a"
    assert parse_labelled(1, {**line, "text": "a", "label": 1}).label == "1"
