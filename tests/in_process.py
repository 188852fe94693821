"""A command that ran in the test's own process, and how an error must look."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Done(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Done]


def refused(done: Done, code: int, *words: str) -> None:
    """Check that an error is said in one or two lines, and nothing on stdout."""
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("error: ") and len(done.err.splitlines()) <= 2, done.err
    for word in words:
        assert word in done.err
