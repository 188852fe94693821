"""What a run file may say together, and the numbers that follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from run_files import run_of, run_values

from basestone.trainer.config import RunConfig
from basestone.trainer.errors import ConfigError
from basestone.trainer.load import resolve_paths, validate_run
from basestone.trainer.plan import total_flops

VOCAB = 200


def refusal(run: RunConfig, world_size: int = 1, vocab_size: int = VOCAB) -> str:
    with pytest.raises(ConfigError) as caught:
        run.resolve(world_size, vocab_size)
    assert caught.value.exit_code == 64
    return str(caught.value)


def sections() -> list[tuple[str, type[BaseModel]]]:
    return [(name, field.annotation) for name, field in RunConfig.model_fields.items()]  # type: ignore[misc]


@pytest.mark.parametrize(("name", "section"), sections())
def test_every_field_is_described_and_says_whether_a_resume_may_change_it(name, section):
    for key, field in section.model_fields.items():
        assert field.description, f"{name}.{key}"
        extra = field.json_schema_extra
        assert isinstance(extra, dict) and extra["on_resume"] in ("fixed", "free"), f"{name}.{key}"


@pytest.mark.parametrize(("name", "section"), sections())
def test_sections_are_frozen_and_refuse_unknown_keys(name, section):
    assert section.model_config["frozen"] is True
    assert section.model_config["extra"] == "forbid"


def test_a_run_cannot_be_changed():
    run = run_of()
    with pytest.raises(ValidationError):
        run.train.steps = 5
    with pytest.raises(ValidationError):
        run.train = run.train


# ---- what is derived ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "tensor", "data_parallel"),
    [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2), (8, 4, 2), (8, 1, 8)],
)
def test_data_parallel_is_what_is_left(world_size, tensor, data_parallel):
    resolved = run_of(parallel__tensor=tensor).resolve(world_size, VOCAB)
    assert (resolved.world_size, resolved.data_parallel) == (world_size, data_parallel)


def test_tokens_are_rounded_up_to_steps():
    batch = 8 * 32
    for tokens, steps in ((1, 1), (batch, 1), (batch + 1, 2), (10 * batch - 1, 10), (10 * batch, 10)):
        resolved = run_of(train__steps=None, train__tokens=tokens).resolve(1, VOCAB)
        assert (resolved.steps, resolved.tokens) == (steps, steps * batch)


def test_steps_are_taken_as_given():
    assert run_of(train__steps=7).resolve(2, VOCAB).steps == 7


def test_the_vocabulary_is_the_tokenizers_unless_given_larger():
    run = run_of()
    resolved = run.resolve(1, 200)
    assert resolved.run.model.vocab_size == 200
    assert resolved.run.model.padded_vocab_size == 256
    assert run.model.vocab_size is None  # deriving changes no given object
    assert run_of(model__vocab_size=300).resolve(1, 200).run.model.vocab_size == 300


def test_micro_batches_are_filled_up():
    resolved = run_of(train__micro_batch=3).resolve(1, VOCAB)
    assert [resolved.num_micro_batches(samples) for samples in (8, 16, 24)] == [3, 6, 8]


# ---- what is refused ----------------------------------------------------------------------------------------


def test_a_vocabulary_under_the_tokenizers_is_refused():
    text = refusal(run_of(model__vocab_size=100), vocab_size=200)
    assert "model.vocab_size = 100" in text and "200" in text and "leave it out" in text


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 2), (3, 2), (6, 4), (2, 4)])
def test_a_world_that_does_not_factor_is_refused(world_size, tensor):
    text = refusal(run_of(parallel__tensor=tensor), world_size)
    assert text == (
        f"{world_size} processes cannot be cut into groups of parallel.tensor x parallel.pipeline = "
        f"{tensor} x 1; start a multiple of {tensor}"
    )


def test_more_readers_than_sequences_are_refused():
    text = refusal(run_of(train__global_batch=4), 8)
    assert "train.global_batch = 4" in text and "8 data-parallel ranks" in text
    assert run_of(train__global_batch=4).resolve(4, VOCAB).data_parallel == 4


def test_a_tensor_size_that_does_not_divide_names_the_legal_ones():
    assert refusal(run_of(parallel__tensor=3), 3).splitlines() == [
        "parallel.tensor = 3 does not divide model.num_attention_heads = 8; legal values: [1, 2, 4, 8]",
        "parallel.tensor = 3 does not divide model.num_query_groups = 4; legal values: [1, 2, 4]",
        "parallel.tensor = 3 does not divide the padded vocabulary 256; set model.vocab_multiple to a multiple of 3",
    ]


def test_sequence_parallel_needs_tensor_parallel():
    assert "parallel.sequence = true needs parallel.tensor > 1" in refusal(run_of(parallel__sequence=True))


def test_sequence_parallel_needs_slices_of_equal_length():
    run = run_of(parallel__sequence=True, parallel__tensor=4, data__sequence_length=30)
    text = refusal(run, 4)
    assert "data.sequence_length = 30" in text and "multiple of parallel.tensor = 4" in text
    run_of(parallel__sequence=True, parallel__tensor=2, data__sequence_length=30).resolve(2, VOCAB)


def test_a_sequence_longer_than_the_model_is_refused():
    text = refusal(run_of(data__sequence_length=65))
    assert "data.sequence_length = 65" in text and "model.max_sequence_length = 64" in text
    run_of(data__sequence_length=64).resolve(1, VOCAB)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_stage_0_in_half_precision_is_refused_with_advice(dtype):
    text = refusal(run_of(parallel__zero=0, train__dtype=dtype))
    assert dtype in text and "set parallel.zero = 1" in text
    run_of(parallel__zero=0, train__dtype="fp32").resolve(1, VOCAB)
    run_of(parallel__zero=1, train__dtype=dtype).resolve(1, VOCAB)


@pytest.mark.parametrize(
    ("offload", "zero", "message"),
    [
        ("cpu", 0, 'parallel.offload = "cpu" needs parallel.zero >= 2, got 0; set parallel.zero = 2'),
        ("cpu", 1, 'parallel.offload = "cpu" needs parallel.zero >= 2, got 1; set parallel.zero = 2'),
        ("nvme", 1, 'parallel.offload = "nvme" needs parallel.zero = 3, got 1; set parallel.zero = 3'),
        ("nvme", 2, 'parallel.offload = "nvme" needs parallel.zero = 3, got 2; set parallel.zero = 3'),
    ],
)
def test_offload_needs_a_stage_that_cuts(offload, zero, message):
    path = "/disk" if offload == "nvme" else None
    changes = {"parallel__offload": offload, "parallel__nvme_path": path}
    assert refusal(run_of(parallel__zero=zero, **changes)) == message
    least = int(message[-1])
    for legal in range(least, 4):
        run_of(parallel__zero=legal, **changes).resolve(1, VOCAB)


def test_nvme_and_its_path_go_together():
    assert refusal(run_of(parallel__offload="nvme", parallel__zero=3)) == (
        'parallel.offload = "nvme" needs parallel.nvme_path, a directory on a local disk; name one, or set '
        'parallel.offload = "cpu"'
    )
    for offload in ("none", "cpu"):
        text = refusal(run_of(parallel__offload=offload, parallel__zero=3, parallel__nvme_path="/disk"))
        assert text == (
            f'parallel.nvme_path is for parallel.offload = "nvme", got "{offload}"; take one of them out'
        )


def test_offload_needs_one_stage_and_names_tensor_parallel_where_it_can():
    legal = refusal(run_of(parallel__offload="cpu", parallel__zero=2, parallel__pipeline=2), 2)
    assert legal == (
        'parallel.offload = "cpu" needs parallel.pipeline = 1, got 2: several stages keep whole gradients on the '
        "device until one reduction a step; set parallel.pipeline = 1 with more tensor parallel (parallel.tensor = 2 "
        'takes as many ranks), or parallel.offload = "none"'
    )
    run_of(parallel__offload="cpu", parallel__zero=2, parallel__tensor=2).resolve(2, VOCAB)
    run = run_of(parallel__offload="cpu", parallel__zero=2, parallel__pipeline=3)
    assert "with more tensor parallel, or" in refusal(run, 3)  # 3 divides no heads


def test_offload_and_a_users_file_are_two_sources():
    run = run_of(parallel__offload="cpu", parallel__zero=2, parallel__ds_config="/mine.json")
    assert refusal(run) == (
        'parallel.offload = "cpu" chooses a DeepSpeed file, and parallel.ds_config names one; set parallel.offload = '
        '"none" and put the offload sections into that file'
    )


def test_everything_that_offload_does_not_go_with_comes_at_once():
    run = run_of(
        parallel__offload="nvme",
        parallel__pipeline=3,
        parallel__ds_config="/mine.json",
        data__sequence_length=65,
    )
    text = refusal(run, 3)
    for part in ("zero = 3, got 1", "nvme_path", "ds_config", "pipeline = 1, got 3", "max_sequence_length"):
        assert part in text
    assert len(text.splitlines()) == 5


def test_all_violated_rules_come_at_once():
    run = run_of(
        parallel__tensor=3,
        parallel__sequence=True,
        parallel__zero=0,
        train__dtype="bf16",
        data__sequence_length=100,
    )
    text = refusal(run, 4)
    for part in (
        "num_attention_heads",
        "num_query_groups",
        "padded vocabulary",
        "max_sequence_length",
        "multiple of parallel.tensor",
        "parallel.zero = 0",
        "4 processes",
    ):
        assert part in text


# ---- paths --------------------------------------------------------------------------------------------------


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    return resolve_paths(values, Path("/base/dir"))


def test_every_path_of_a_file_is_relative_to_it():
    values = {
        "data": {"train": "a", "tokenizer": "../t.model", "heldout": {"x": "b/c", "y": "/abs"}},
        "parallel": {"ds_config": "ds.json", "nvme_path": "../disk"},
    }
    assert resolved(values) == {
        "data": {
            "train": "/base/dir/a",
            "tokenizer": "/base/t.model",
            "heldout": {"x": "/base/dir/b/c", "y": "/abs"},
        },
        "parallel": {"ds_config": "/base/dir/ds.json", "nvme_path": "/base/disk"},
    }
    assert values["data"]["train"] == "a"  # the argument is left as it was


def test_a_list_of_directories_and_embedded_corpora():
    got = resolved({"data": {"train": ["a", "builtin:python"], "tokenizer": "builtin:python"}})
    assert got["data"] == {"train": ["/base/dir/a", "builtin:python"], "tokenizer": "builtin:python"}


def test_the_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert resolved({"data": {"train": "~/shards"}})["data"]["train"] == "/home/somebody/shards"


@pytest.mark.parametrize("values", [{}, {"data": {}}, {"data": 3, "parallel": "x"}, {"data": {"train": 3}}])
def test_what_is_no_path_is_left_for_the_check_of_types(values):
    assert resolved(values) == values


# ---- types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train__steps", True, "train.steps: Input should be a valid integer (got True)"),
        ("train__steps", "20", "train.steps: Input should be a valid integer (got '20')"),
        ("train__steps", 20.0, "train.steps: Input should be a valid integer (got 20.0)"),
        ("train__clip", True, "train.clip: Input should be a valid number (got True)"),
        ("train__recompute", 1, "train.recompute: Input should be a valid boolean (got 1)"),
        ("train__recompute", "yes", "train.recompute: Input should be a valid boolean (got 'yes')"),
        ("optimizer__betas", [True, 0.9], "optimizer.betas.0: Input should be a valid number (got True)"),
        ("data__sequence_length", "32", "data.sequence_length: Input should be a valid integer (got '32')"),
        ("data__train", [1], "data.train.0: Input should be a valid string (got 1)"),
        ("model__dropout", "0.1", "model.dropout: Input should be a valid number (got '0.1')"),
        ("model__tied", 1, "model.tied: Input should be a valid boolean (got 1)"),
    ],
)
def test_a_value_of_another_type_is_not_guessed_at(name, value, message):
    with pytest.raises(ConfigError) as caught:
        validate_run(run_values(**{name: value}), "run.toml")
    assert str(caught.value) == f"run.toml: 1 error(s)\n  {message}"


def test_an_integer_is_a_number_and_a_list_is_what_toml_has():
    changes = {"optimizer__lr": 1, "optimizer__betas": [0, 0.5], "train__clip": 1, "data__train": ["/a", "/b"]}
    run = validate_run(run_values(**changes), "run.toml")
    assert (run.optimizer.lr, run.optimizer.betas, run.train.clip) == (1.0, (0.0, 0.5), 1.0)
    assert run.data.train == ("/a", "/b")
    assert validate_run(run.model_dump(mode="json"), "state.json") == run, (
        "what a checkpoint keeps is read back"
    )


BERT = {"model__family": "bert", "model__num_query_groups": None}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {**BERT, "task__pairs": "given"},
            "task.pairs: of task 'contrastive', and family 'bert' is trained on 'masked'; leave it out, or train a "
            "model with model.pooling",
        ),
        (
            {**BERT, "task__name": "spans"},
            "task.name: of task 'spans', and family 'bert' is trained on 'masked'; leave it out, or train "
            'family = "t5"',
        ),
        (
            {**BERT, "model__pooling": "mean", "model__next_sentence": False, "task__name": "masked"},
            "task.name: of task 'masked', and family 'bert' with model.pooling is trained on 'contrastive'; leave it "
            'out, or train family = "bert"',
        ),
        (
            {"task__noise": 0.3, "task__mean_span": 5},
            "task.noise, task.mean_span: of task 'spans', and family 'llama' is trained on 'causal'; leave it out, or "
            'train family = "t5"',
        ),
    ],
)
def test_a_task_of_other_models_is_refused_with_what_it_trains(changes, text):
    with pytest.raises(ConfigError) as caught:
        run_of(**changes).resolve(1, 600)
    assert str(caught.value) == text


def test_pairs_of_texts_are_two_sequences_in_tokens_steps_and_ramps():
    pairs = {"model__pooling": "mean", "task__pairs": "neighbours"}
    one, two = (run_of(**more).resolve(1, 600) for more in ({}, pairs))
    assert two.tokens == 2 * one.tokens == 2 * 20 * 8 * 32
    assert total_flops(two) > 1.5 * total_flops(one)
    budget = run_of(**pairs, train__steps=None, train__tokens=2 * 8 * 32 * 5).resolve(1, 600)
    assert budget.steps == 5
    ramp = [{"global_batch": 4, "until_tokens": 2 * 4 * 32 * 3}]
    assert run_of(**pairs, train__ramp=ramp).resolve(1, 600).batches.phases[1].first_step == 3
