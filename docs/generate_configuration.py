"""Write docs/configuration.md from the fields of the run file: `python docs/generate_configuration.py`."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from basestone.launch.cluster.config import ClusterConfig
from basestone.model.presets import FAMILIES, PRESETS
from basestone.trainer.config import RunConfig

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# The run file

<!-- written by docs/generate_configuration.py from the fields themselves; do not edit -->

A run is one TOML file. `basestone train run.toml --dry-run` prints what follows from it and starts nothing.

* `--set section.key=value` overrides a key; it may be given many times. The value is a TOML value, or a plain word.
  Setting one of `train.steps` and `train.tokens`, or of `data.train` and `data.sources`, replaces the other.
* Paths in the file are relative to the file, paths in `--set` to the working directory. `builtin:python` is no path
  but the embedded corpus, which prepares itself on first use.
* An unknown key or a wrong value is refused before anything starts: all errors at once, each with its dotted name.
* *Fixed* keys must be the checkpoint's when a run is resumed; differences are refused, all in one message. *Free*
  keys may change, and the file given to the resume wins. Shards and tokenizer are compared by content:
  their places may change.
* The resolved file lies in the run directory as `run.toml` and is itself a run file.
"""
NAMES = {int: "integer", float: "number", bool: "true or false", str: "text"}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
# Left out, these follow from other keys of [model].
FOLLOWS = {
    "num_query_groups": "`num_attention_heads`",
    "head_dim": "`hidden_size / num_attention_heads`",
    "ffn_hidden_size": "swiglu: 8/3 `hidden_size`, up to a multiple of 64; gelu: 4 `hidden_size`",
}


def type_text(annotation: Any) -> str:
    """Say a type in the words of TOML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value!r}`".replace("'", '"') for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(one) for one in arguments if one is not type(None))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {type_text(arguments[0])}" + (", or one" if arguments[0] is str else "")
        return f"list of {len(arguments)} {type_text(arguments[0])}s"
    if origin is Annotated:
        return type_text(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{ " + ", ".join(f"`{name}`" for name in annotation.model_fields) + " }"
    if origin is dict:
        return f"table of {type_text(arguments[1])}"
    return NAMES[annotation]


def limits_text(field: FieldInfo) -> str:
    """Say the bounds of a number."""
    found = [
        (SIGNS[name], getattr(bound, name))
        for bound in field.metadata
        for name in SIGNS
        if hasattr(bound, name)
    ]
    return "".join(f", {sign} {value}" for sign, value in found)


def default_text(section: str, name: str, field: FieldInfo) -> str:
    """Say what holds where the key is left out."""
    if section == "model" and name in FOLLOWS:
        return FOLLOWS[name]
    if section == "model" and all(name in style for style in FAMILIES.values()):
        texts = {family: f"`{_toml(style[name])}`" for family, style in FAMILIES.items()}
        usual = max(texts.values(), key=list(texts.values()).count)
        own = [f"{family}: {text}" for family, text in texts.items() if text != usual]
        return "; ".join([*own, f"others: {usual}"])
    if field.is_required():
        return "required, or the preset's" if section == "model" else "required"
    return "none" if field.default is None else f"`{_toml(field.default)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        items = ", ".join(f"{key} = {_toml(item)}" for key, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    return str(value)


def section_text(name: str, section: type[BaseModel]) -> str:
    """Make the table of one section."""
    title = (section.__doc__ or "").partition("\n")[0].partition(": ")
    intro = title[2] or title[0]
    lines = [f"## [{name}]", "", intro[:1].upper() + intro[1:], ""]
    lines += ["| key | type | default | on resume | |", "|---|---|---|---|---|"]
    for key, field in section.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        kind = type_text(field.annotation) + limits_text(field)
        text = (field.description or "").replace("|", "\\|").replace("<", "\\<")
        lines.append(f"| `{key}` | {kind} | {default_text(name, key, field)} | {extra['on_resume']} | {text} |")
    return "\n".join(lines)


def cluster_text() -> str:
    """Make the tables of a cluster file."""
    lines = [
        "## cluster.toml",
        "",
        "What `basestone launch --cluster` reads ([clusters.md](clusters.md)). All of it is free.",
    ]
    tables: dict[str, type[BaseModel]] = {"at the top": ClusterConfig}
    for name, field in ClusterConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            tables[f"[{name}]"] = field.annotation
    for title, section in tables.items():
        lines += ["", f"### {title}", "", "| key | type | default | |", "|---|---|---|---|"]
        for key, field in section.model_fields.items():
            if f"[{key}]" not in tables:
                kind = type_text(field.annotation) + limits_text(field)
                default = default_text("cluster", key, field)
                lines.append(f"| `{key}` | {kind} | {default} | {field.description} |")
    return "\n".join(lines)


def presets_text() -> str:
    """Make the table of presets."""
    keys = ("family", "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim")
    lines = [
        "### Presets",
        "",
        "A key given in the file wins over the preset. `-`: what follows from the other keys.",
        "",
    ]
    columns = (
        *keys,
        "ffn_hidden_size",
        "max_sequence_length",
        "rope_base",
        "norm_epsilon",
        "tied",
        "rope_scaling",
    )
    lines += [f"| `preset` | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, values in PRESETS.items():
        cells = [_toml(values[key]).strip('"') if key in values else "-" for key in columns]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    """Make the whole page."""
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        parts.append(section_text(name, field.annotation) + "\n")
        if name == "model":
            parts.append(presets_text() + "\n")
    parts.append(cluster_text() + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
