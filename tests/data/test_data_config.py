"""The [data] section says plainly what is wrong with it, and reading it needs no torch."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from basestone.data.config import DataConfig

GOOD = {"train": "shards/train", "tokenizer": "builtin:python", "sequence_length": 512}


def test_one_directory_may_be_a_plain_string() -> None:
    assert DataConfig(**GOOD).train == ("shards/train",)
    assert DataConfig(**{**GOOD, "train": ["a", "builtin:python"]}).train == ("a", "builtin:python")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": []}, "got an empty list"),
        ({"train": ["a", "a"]}, "a is given more than once"),
        ({"train": " "}, "got an empty path"),
        ({"train": "builtin:perl"}, "the embedded corpora are: builtin:python"),
        ({"heldout": {"a b": "x"}}, "got the name 'a b'"),
        ({"heldout": {"a": ""}}, "got an empty path"),
        ({"tokenizer": ""}, "got an empty path"),
        ({"sequence_length": 1}, "got 1; a sequence needs at least 2 tokens"),
        ({"workers": -1}, "got -1; use 0"),
        ({"worker": 1}, "Extra inputs are not permitted"),
        ({"tokenizer": "builtin:perl"}, "embedded tokenizers are: builtin:python, builtin:python-symbols"),
        (
            {"tokenizer": "builtin:python-pairs"},
            "embedded tokenizers are: builtin:python, builtin:python-symbols",
        ),
        (
            {"train": "builtin:python-symbols"},
            "the embedded corpora are: builtin:python, builtin:python-pairs .type",
        ),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**{**GOOD, **change})


def test_a_tokenizer_may_be_embedded() -> None:
    for name in ("builtin:python", "builtin:python-symbols"):
        assert DataConfig(**{**GOOD, "tokenizer": name}).tokenizer == name


def sources(**changes: dict) -> dict:
    """A section of two sources; a change is to the first, or to the section."""
    first = {"path": "a"} | changes.pop("first", {})
    return {
        "train": None,
        "sources": {"web": first, "code": {"path": ["b", "c"]} | changes.pop("second", {})},
    } | changes


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"train": "a", "sources": {"web": {"path": "b"}}},
            "is given beside train; give train, a list of shards",
        ),
        (sources(first={"weight": 0.5}), "web has weight, code not; give it to all or to none"),
        (
            sources(first={"weight": 0.0}, second={"weight": 0.0}),
            "every source has the weight 0; give one more",
        ),
        (
            sources(first={"weight": 1.0, "epochs": 1.0}, second={"weight": 1.0, "epochs": 1.0}),
            "both given; one of them",
        ),
        (sources(first={"weight": -1.0}), "greater than or equal to 0"),
        (sources(first={"epochs": 0.0}), "greater than 0"),
        (sources(first={"path": []}), "got an empty list"),
        (sources(first={"path": ["a", "a"]}), "a is given more than once"),
        (sources(first={"paths": "a"}), "Extra inputs are not permitted"),
        ({"train": None, "sources": {"a b": {"path": "a"}}}, "got the name 'a b'"),
        (
            sources(first={"weight": 1.0}, second={"weight": 1.0}, temperature=2.0),
            "mixes by size, and the sources have weight or epochs; take one of them out",
        ),
        (sources(temperature=0.0), "greater than or equal to 0.1"),
        (sources(mix=[{"weights": {"web": 1.0}}]), "needs one of until_step and until_tokens"),
        (
            sources(mix=[{"weights": {"web": 1.0}, "until_step": 1, "until_tokens": 5}]),
            "needs one of until_step",
        ),
        (sources(mix=[{"weights": {"web": 0.0}, "until_step": 1}]), "gives every source the weight 0"),
        (
            sources(mix=[{"weights": {"books": 1.0}, "until_step": 1}]),
            "names books; the sources are: code, web",
        ),
        ({"mix": [{"weights": {"web": 1.0}, "until_step": 1}]}, "names web; the sources are: none"),
        ({"packing": "best"}, "Input should be 'split' or 'best_fit'"),
        ({"attention": "all"}, "Input should be 'sequence' or 'document'"),
        ({"lanes": 0}, "greater than 0"),
    ],
)
def test_mistakes_in_the_mix_are_named(section: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**{**GOOD, **section})


def test_sources_are_read_as_given() -> None:
    data = DataConfig(**{**GOOD, **sources(first={"weight": 1}, second={"weight": 0.0})})
    assert data.sources["web"].path == ("a",) and data.sources["code"].path == ("b", "c")
    assert data.places == ("a", "b", "c") and DataConfig(**GOOD).places == ("shards/train",)
    phases = [{"weights": {"web": 1.0}, "until_step": 5}, {"weights": {"code": 1.0}, "until_tokens": 5_000}]
    assert len(DataConfig(**{**GOOD, **sources(mix=phases)}).mix) == 2


def test_every_field_says_whether_it_may_change_on_resume() -> None:
    marks = {name: field.json_schema_extra["on_resume"] for name, field in DataConfig.model_fields.items()}
    assert {name for name, mark in marks.items() if mark == "free"} == {
        "train",
        "sources",
        "temperature",
        "mix",
        "workers",
        "heldout",
    }
    assert set(marks.values()) == {"free", "fixed"}
    assert all(field.description for field in DataConfig.model_fields.values())


def test_config_imports_no_torch() -> None:
    code = "import sys, basestone.data.config; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_imports_torch() -> None:
    code = """
import importlib, pkgutil, sys
import basestone.data
names = [module.name for module in pkgutil.iter_modules(basestone.data.__path__)]
assert len(names) > 15
for name in names:
    importlib.import_module(f"basestone.data.{name}")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
