"""Say how long the rows of a stream are: a function of the global sample id alone."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class RowLengths:
    """Hold the tokens of a row, counted without the one that rows share.

    ``phases`` are rows ``(first sample that they no longer rule, tokens)`` in order; then ``last`` holds.
    """

    phases: tuple[tuple[int, int], ...]
    last: int

    def at(self, sample: int) -> int:
        """Return the tokens of global sample ``sample``."""
        number = bisect_right(self.phases, sample, key=lambda phase: phase[0])
        return self.phases[number][1] if number < len(self.phases) else self.last

    def next_change(self, sample: int) -> int | None:
        """Return the first sample behind ``sample`` whose rows have another length, None where there is none."""
        return next((until for until, _ in self.phases if until > sample), None)
