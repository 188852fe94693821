"""From a TOML file and `--set a.b=value` to a RunConfig, with every error in one message. Imports no torch."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ..data.config import BUILTIN_PREFIX
from ..data.reading.transport import is_local, shown
from .config import RunConfig
from .errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

# Keys of sections that are places: relative to the file they stand in.
PATHS = {
    "parallel": ("ds_config", "nvme_path"),
    "reading": ("cache",),
    "train": ("init_from",),
    "checkpoint": ("remote",),
}
# Keys of a section of which a run has one.
EXCLUSIVE = {"train": ({"steps", "tokens"},), "data": ({"train", "sources"},)}


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file.

    Args:
        path: the TOML file; paths in it are relative to it.
        overrides: `section.key=value` strings; the value is a TOML value, or a plain word. They win over the file,
            and paths in them are relative to the working directory.

    Raises:
        ConfigError: the file cannot be read, or keys or values are wrong: all of them at once.
    """
    values = read_toml(path, "run file")
    values = resolve_paths(values, path.resolve().parent)
    given = resolve_paths(parse_overrides(overrides), Path.cwd())
    for section, fields in given.items():
        if isinstance(fields, dict) and isinstance(values.get(section, {}), dict):
            values[section] = _merged(values.get(section, {}), fields)
            for pair in EXCLUSIVE.get(section, ()):
                if len(pair & set(fields)) == 1:  # what is given replaces what stands in the file
                    values[section].pop((pair - set(fields)).pop(), None)
        else:
            values[section] = fields
    return validate_run(values, str(path))


def read_toml(path: Path, kind: str) -> dict[str, Any]:
    """Parse a file; `kind` names it in the error.

    Raises:
        ConfigError: it is not there, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such {kind}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error


def resolve_paths(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """Make the paths of a parsed run file absolute: they are relative to the file they stand in."""

    def absolute(path: Any) -> Any:
        if not isinstance(path, str) or not path or path.startswith(BUILTIN_PREFIX) or not is_local(path):
            return path
        return str((base / Path(path).expanduser()).resolve())

    def several(paths: Any) -> Any:
        return [absolute(path) for path in paths] if isinstance(paths, (list, tuple)) else absolute(paths)

    resolved = {
        name: dict(section) if isinstance(section, dict) else section for name, section in values.items()
    }
    data = resolved.get("data")
    if isinstance(data, dict):
        if "train" in data:
            data["train"] = several(data["train"])
        if isinstance(data.get("sources"), dict):
            data["sources"] = {
                name: {**source, "path": several(source["path"])}
                if isinstance(source, dict) and "path" in source
                else source
                for name, source in data["sources"].items()
            }
        if isinstance(data.get("heldout"), dict):
            data["heldout"] = {name: absolute(path) for name, path in data["heldout"].items()}
        if "tokenizer" in data:
            data["tokenizer"] = absolute(data["tokenizer"])
    for section, keys in PATHS.items():
        fields = resolved.get(section)
        if isinstance(fields, dict):
            fields.update({key: absolute(fields[key]) for key in keys if fields.get(key)})
    return resolved


def _merged(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Lay `given` over `base`; tables in tables are joined."""
    merged = dict(base)
    for name, value in given.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def validate_run(values: dict[str, Any], origin: str) -> RunConfig:
    """Check parsed values; `origin` stands in front of the error message."""
    return validated(RunConfig, values, origin)


def validated(model: type[Model], values: dict[str, Any], origin: str) -> Model:
    """Check the parsed values of a file of any kind.

    Raises:
        ConfigError: with all errors at once, each by its dotted path.
    """
    try:
        return model(**values)
    except ValidationError as error:
        lines = list(_describe(error, model))
        raise ConfigError(
            f"{origin}: {len(lines)} error(s)\n" + "\n".join(f"  {line}" for line in lines)
        ) from error


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `a.b=value` strings into nested dictionaries."""
    values: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        parts = name.strip().split(".")
        if not equals or len(parts) < 2 or not all(parts):
            raise ConfigError(f"--set {override}: expected section.key=value, e.g. --set train.steps=100")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()  # a plain word
        node = values
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f"--set {override}: {part} was given a value before; it cannot be a table, too"
                )
        node[parts[-1]] = value
    return values


# Filled from the other keys of [model]: missing only because one of those is.
FOLLOWS = {"model.num_query_groups", "model.head_dim", "model.ffn_hidden_size"}


def _describe(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    for item in error.errors(include_url=False):
        location = [str(part) for part in item["loc"]]
        dotted = ".".join(location)
        if item["type"] == "missing" and dotted in FOLLOWS:
            continue
        if item["type"] == "extra_forbidden":
            known = list(_fields_at(root, location[:-1]))
            near = difflib.get_close_matches(location[-1], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            yield f"{dotted}: unknown key; {hint}"
        elif item["type"] == "missing":
            yield f"{dotted}: is missing"
        else:
            message = item["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
            got = item.get("input")
            value = "" if isinstance(got, (dict, BaseModel)) else f" (got {_showable(got)!r})"
            yield f"{dotted}: {message}{value}" if dotted else message


def _showable(value: Any) -> Any:
    """Take out of URLs what may be secret."""
    if isinstance(value, (list, tuple)):
        return type(value)(_showable(item) for item in value)
    return shown(value) if isinstance(value, str) else value


def _fields_at(root: type[BaseModel], location: Sequence[str]) -> Iterator[str]:
    model: Any = root
    for part in location:
        if part.isdigit() and get_args(model):  # a row of a list of tables
            model = get_args(model)[0]
            continue
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return
        model, choices = field.annotation, get_args(field.annotation)
        if type(None) in choices:  # a table, or none
            model = choices[0]
    yield from getattr(model, "model_fields", {})


def fixed_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Compare two dumped run configs; list each field marked fixed on resume whose value differs.

    A field that the old one has not heard of has its default there, and in a row of a list None.
    """
    differences = []
    for section_name, section in RunConfig.model_fields.items():
        before, after = old.get(section_name, {}), new.get(section_name, {})
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            extra = field.json_schema_extra
            fixed = isinstance(extra, dict) and extra.get("on_resume") == "fixed"
            then = before.get(name, None if field.is_required() else field.default)
            if fixed and _plain(then) != _plain(after.get(name)):
                differences.append(
                    f"{section_name}.{name}: {then!r} in the checkpoint, {after.get(name)!r} now"
                )
    return differences


def _plain(value: Any) -> Any:
    def given(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if value is not None}

    return json.loads(json.dumps(value, default=str), object_pairs_hook=given)


def run_to_toml(values: dict[str, Any], comments: Sequence[str] = ()) -> str:
    """Write dumped sections as a TOML text that `load_run` reads back; fields that are None are left out."""
    lines = [f"# {comment}" for comment in comments]
    for section, fields in values.items():
        plain = {
            name: value for name, value in fields.items() if value is not None and not isinstance(value, dict)
        }
        lines += ["", f"[{section}]", *(f"{name} = {_toml_value(value)}" for name, value in plain.items())]
        for name, table in fields.items():
            if isinstance(table, dict) and table:
                lines += ["", f"[{section}.{name}]"]
                lines += [f"{json.dumps(key)} = {_toml_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(pairs) + " }"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML forbids what JSON allows
