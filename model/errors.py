"""What goes wrong in a model, in words for the user. Imports no torch."""

from __future__ import annotations


class ModelError(ValueError):
    """A model that cannot be built here, by the user's input."""

    exit_code = 64
