"""The global batch over the steps of a run. Imports no torch.

A ramp is a list of phases with batches of their own before the run's own batch begins. Everything here is a
function of the step alone, so a resumed run, in whatever layout, takes the samples that an uninterrupted one takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

ENDLESS = 1 << 62  # steps


class Phase(NamedTuple):
    """Steps from `first_step` on take `global_batch` sequences each."""

    first_step: int
    global_batch: int


class End(Protocol):
    """Where a row of a schedule ends: one of the two is given."""

    @property
    def until_step(self) -> int | None:
        """The first step after it."""
        ...

    @property
    def until_tokens(self) -> int | None:
        """Or the tokens of the run at which it ends, rounded up to a step."""
        ...


class RampRow(End, Protocol):
    """A row of `train.ramp`."""

    @property
    def global_batch(self) -> int:
        """Sequences of its steps."""
        ...


@dataclass(frozen=True)
class BatchSchedule:
    """Which global batch each step takes; `phases` are in order, and the last one goes on for ever."""

    phases: tuple[Phase, ...]
    sequence_length: int

    @classmethod
    def of(cls, ramp: Sequence[RampRow], global_batch: int, sequence_length: int) -> BatchSchedule:
        """Make it from a run's ramp and its own batch.

        Raises:
            ValueError: a phase ends before it begins.
        """
        phases: list[Phase] = []
        step = tokens = 0
        for number, row in enumerate(ramp):
            a_step = row.global_batch * sequence_length
            end = (
                row.until_step
                if row.until_step is not None
                else step - (tokens - (row.until_tokens or 0)) // a_step
            )
            if end <= step:
                raise ValueError(
                    f"train.ramp[{number}] ends at step {end}, but begins at step {step}; "
                    "order the phases by their ends"
                )
            phases.append(Phase(step, row.global_batch))
            tokens += (end - step) * a_step
            step = end
        return cls((*phases, Phase(step, global_batch)), sequence_length)

    def mix_ends(self, rows: Sequence[End]) -> tuple[int, ...]:
        """Give for each row of `data.mix` the first sample after it, counted over the run.

        Raises:
            ValueError: a row ends before it begins.
        """
        ends: list[int] = []
        for number, row in enumerate(rows):
            step = row.until_step if row.until_step is not None else self.steps_for(row.until_tokens or 0)
            sample = self.tokens_before(step) // self.sequence_length
            if sample <= (ends[-1] if ends else 0):
                raise ValueError(
                    f"data.mix[{number}] ends at step {step}, before it begins; order the rows by their ends"
                )
            ends.append(sample)
        return tuple(ends)

    def global_batch(self, step: int) -> int:
        """Give the sequences of a step, over all ranks."""
        return next(phase.global_batch for phase in reversed(self.phases) if phase.first_step <= step)

    def tokens_before(self, step: int) -> int:
        """Count the tokens of all steps before `step`."""
        return sum((min(step, end) - first) * a_step for first, end, a_step in self._spans() if first < step)

    def steps_for(self, tokens: int) -> int:
        """Count the steps that take at least so many tokens."""
        for first, end, a_step in self._spans():
            before = self.tokens_before(first)
            step = first - (before - tokens) // a_step  # rounded up
            if step <= end:
                return step
        raise AssertionError("the last phase goes on for ever")

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        ends = [*(phase.first_step for phase in self.phases[1:]), ENDLESS]
        for phase, end in zip(self.phases, ends, strict=True):
            yield phase.first_step, end, phase.global_batch * self.sequence_length
