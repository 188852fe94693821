"""From a run to a file and back, and what a resume may change in it."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_files import run_of

from basestone.trainer.config import RunConfig
from basestone.trainer.load import fixed_differences, load_run, run_to_toml


def rich_run() -> RunConfig:
    return run_of(
        data__train=['/a b/"quoted"', "/ü\\x\ty"],
        data__heldout={"one.two": "/h", "zwei": "builtin:python"},
        train__steps=None,
        train__tokens=10**9,
        optimizer__eps=1e-12,
        meter__watts=12.5,
        model__tied=True,
        parallel__tensor=2,
    )


def test_a_resolved_run_is_written_as_toml_and_read_back(tmp_path):
    run = rich_run().resolve(2, 200).run
    path = tmp_path / "run.toml"
    path.write_text(run_to_toml(run.model_dump(mode="json"), ["resolved", "torch 2"]))
    assert path.read_text().startswith("# resolved\n# torch 2\n")
    assert load_run(path) == run


NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,8}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x7f"), max_size=9)


@settings(deadline=None)
@given(st.dictionaries(NAMES, TEXTS))
def test_any_text_survives_in_toml(heldout):
    values = {"data": {"x": 1.5e300, "y": False, "z": [1, "a"], "heldout": heldout}}
    expected = values if heldout else {"data": {name: values["data"][name] for name in "xyz"}}
    assert tomllib.loads(run_to_toml(values)) == expected


def test_a_delete_character_survives_in_toml():
    values = {"data": {"tokenizer": "/a\x7fb"}}
    assert tomllib.loads(run_to_toml(values)) == values


def test_equal_runs_have_no_differences():
    dumped = rich_run().model_dump(mode="json")
    assert fixed_differences(dumped, rich_run().model_dump()) == []  # a tuple and a list are one thing in JSON


def test_fixed_fields_are_listed_and_free_ones_pass():
    old = run_of().model_dump(mode="json")
    free = run_of(
        train__steps=99,
        optimizer__lr=5.0,
        parallel__zero=3,
        parallel__tensor=4,
        run__processes=4,
        checkpoint__keep_last=9,
    )
    assert fixed_differences(old, free.model_dump(mode="json")) == []
    fixed = run_of(run__seed=5, train__global_batch=4, model__num_layers=2)
    assert fixed_differences(old, fixed.model_dump(mode="json")) == [
        "run.seed: 1234 in the checkpoint, 5 now",
        "model.num_layers: 3 in the checkpoint, 2 now",
        "train.global_batch: 8 in the checkpoint, 4 now",
    ]


@pytest.mark.parametrize("section", ["model", "data", "train"])
def test_a_checkpoint_without_a_section_differs_in_its_fixed_fields(section):
    new = run_of().model_dump(mode="json")
    old = {name: fields for name, fields in new.items() if name != section}
    assert any(line.startswith(f"{section}.") for line in fixed_differences(old, new))


def test_a_field_that_a_checkpoint_has_not_heard_of_had_its_default():
    new = run_of(model__qk_norm=True).model_dump(mode="json")
    old = run_of().model_dump(mode="json")
    for name in ("qk_norm", "qkv_bias", "rope_scaling"):
        del old["model"][name]
    assert fixed_differences(old, run_of().model_dump(mode="json")) == []
    assert fixed_differences(old, new) == ["model.qk_norm: False in the checkpoint, True now"]
