"""config.json of a Hugging Face directory, and what the directory is called. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError

CACHED = "models--"  # a repository's folder in the Hub's cache: models--OWNER--NAME/snapshots/REVISION


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json. Raises ConfigError where it is no JSON object in UTF-8, as transformers takes it."""
    return read_object(directory / "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object in UTF-8. Raises ConfigError where there is none."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is no JSON object, but {type(config).__name__}")
    return config


def read_json(path: Path) -> Any:
    """Read JSON in UTF-8. Raises ConfigError where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error


def name_of(directory: Path) -> str:
    """Give what a directory is called: its own name, or of a snapshot in the Hub's cache the repository's."""
    directory = directory.resolve()
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith(CACHED):
        return repository.removeprefix(CACHED).replace("--", "/")
    return directory.name
