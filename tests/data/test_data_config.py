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
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**{**GOOD, **change})


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
