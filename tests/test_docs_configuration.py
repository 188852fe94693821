"""docs/configuration.md is what the fields say today, and says something about each."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from basestone.model.config import ModelConfig
from basestone.trainer.config import RunConfig

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "generate_configuration.py"))
PAGE = (DOCS / "configuration.md").read_text(encoding="utf-8")
KEYS = [
    (section, key)
    for section, field in RunConfig.model_fields.items()
    for key in field.annotation.model_fields  # type: ignore[union-attr]
]


def test_the_page_is_current():
    assert SCRIPT["page"]() == PAGE, "run: python docs/generate_configuration.py"


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_every_key_stands_in_the_table_of_its_section(section, key):
    table = PAGE.partition(f"\n## [{section}]\n")[2].partition("\n##")[0]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| `{key}` | ")]
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert len(cells) == 5 and all(cells)
    assert cells[3] in ("fixed", "free")


def test_keys_called_required_are_the_ones_that_must_be_given():
    """Told from the outside: a model is made of these keys alone."""
    table = PAGE.partition("\n## [model]\n")[2].partition("\n### ")[0]
    required = [line.split("`")[1] for line in table.splitlines() if "| required" in line]
    values = {name: 64 if name == "hidden_size" else 8 for name in required}
    assert ModelConfig(**values).family == "llama"
    for key in required:
        with pytest.raises(ValueError, match=key):
            ModelConfig(**{name: value for name, value in values.items() if name != key})


ROOT = DOCS.parent
PAGES = [*DOCS.rglob("*.md"), *(ROOT / "ds_configs").glob("*.md"), *ROOT.glob("*.md")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []
