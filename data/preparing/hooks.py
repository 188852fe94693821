"""Load filters of one's own: Python callables named MODULE:FUNCTION."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ..errors import DataConfigError

Filter = Callable[[str], str | None]


@cache
def load_filter(name: str) -> Filter:
    """Import a filter ``MODULE:FUNCTION``; it takes a text and returns None, or the reason to drop it.

    Raises DataConfigError where the name is not of that form, or leads to nothing that can be called.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise DataConfigError(f"filter {name!r} is not of the form MODULE:FUNCTION, like my_filters:is_english")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise DataConfigError(
            f"filter {name!r}: importing {module_name} failed ({type(error).__name__}: {error}); if its folder is "
            "not on Python's path, set PYTHONPATH to it"
        ) from error
    found = getattr(module, function_name, None)
    if not callable(found):
        raise DataConfigError(
            f"filter {name!r}: {module_name} has no function {function_name!r}; name one that takes a text"
        )
    return found


def call_filter(name: str, text: str, origin: str) -> str | None:
    """Return a filter's reason to drop a text, or None.

    Raises DataConfigError where it raises, or returns what is no reason.
    """
    try:
        reason = load_filter(name)(text)
    except DataConfigError:
        raise
    except Exception as error:
        raise DataConfigError(
            f"filter {name!r} failed on {origin} with {type(error).__name__}: {error}; repair it so that it returns "
            "None or a reason for every text"
        ) from error
    if reason is not None and (not isinstance(reason, str) or not reason):
        raise DataConfigError(
            f"filter {name!r} returned {reason!r} for {origin}; return None to keep a text, else the reason as a str"
        )
    return reason


def filter_digest(name: str) -> str:
    """Hash the file a filter stands in, to know a changed one; builtin functions have none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(load_filter(name)))
    except TypeError:
        file = None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
