"""Load filters of one's own: Python callables named MODULE:FUNCTION."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DataConfigError

Filter = Callable[[str], str | None]


@functools.cache
def load_filter(name: str) -> Filter:
    """Import a filter ``MODULE:FUNCTION``; it takes a text and returns None, or the reason to drop it.

    Raises DataConfigError where the name is not of that form, or leads to nothing that can be called.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise DataConfigError(f"filter {name!r} is not of the form MODULE:FUNCTION, like my_filters:is_english")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
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
    except (Exception, SystemExit) as error:
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
    """Hash the file that names a filter and the one that it is written in, to know a changed one.

    Raises DataConfigError where one cannot be found: its changes would go unnoticed.
    """
    found = load_filter(name)
    module = importlib.import_module(name.partition(":")[0])  # holds what a partial or an instance is made with
    digest = hashlib.sha256()
    for part in (module, _written_part(found)):
        try:
            digest.update(Path(inspect.getsourcefile(part) or "").read_bytes())
        except (OSError, TypeError) as error:
            raise DataConfigError(
                f"filter {name!r}: its source cannot be found, so that changes to it would go unnoticed; give a plain "
                "function that stands in a .py file"
            ) from error
    return digest.hexdigest()


def _written_part(found: Any) -> Any:
    """Return the function or class behind partials, wrappers, bound methods and instances that can be called."""
    while not inspect.isfunction(found) or hasattr(found, "__wrapped__"):
        if isinstance(found, functools.partial):
            found = found.func
        elif inspect.ismethod(found):
            found = found.__func__
        elif hasattr(found, "__wrapped__"):
            found = found.__wrapped__
        else:
            return found if inspect.isclass(found) else type(found)
    return found
