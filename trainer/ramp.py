"""The global batch and the sequence length over the steps of a run. Imports no torch.

A ramp is a list of phases with batches and lengths of their own before the run's own begin. Everything here is a
function of the step alone, so a resumed run, in whatever layout, takes the samples that an uninterrupted one takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

ENDLESS = 1 << 62  # steps


class Phase(NamedTuple):
    """Steps from `first_step` on take `global_batch` samples of `texts` sequences of `sequence_length` tokens each."""

    first_step: int
    global_batch: int
    sequence_length: int
    texts: int = 1

    @property
    def tokens(self) -> int:
        """Count the tokens of a step."""
        return self.global_batch * self.texts * self.sequence_length


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
    def global_batch(self) -> int | None:
        """Sequences of its steps, where they are not the run's own."""
        ...

    @property
    def sequence_length(self) -> int | None:
        """Tokens of their sequences, where they are not the run's own."""
        ...


@dataclass(frozen=True)
class BatchSchedule:
    """What each step takes; `phases` are in order, and the last one goes on for ever."""

    phases: tuple[Phase, ...]

    @classmethod
    def of(
        cls, ramp: Sequence[RampRow], global_batch: int, sequence_length: int, texts: int = 1
    ) -> BatchSchedule:
        """Make it from a run's ramp, its own batch and its own length.

        Raises:
            ValueError: a phase ends before it begins.
        """
        phases: list[Phase] = []
        step = tokens = 0
        for number, row in enumerate(ramp):
            batch, length = row.global_batch or global_batch, row.sequence_length or sequence_length
            phase = Phase(step, batch, length, texts)
            end = (
                row.until_step
                if row.until_step is not None
                else step - (tokens - (row.until_tokens or 0)) // phase.tokens
            )
            if end <= step:
                raise ValueError(
                    f"train.ramp[{number}] ends at step {end}, but begins at step {step}; "
                    "order the phases by their ends"
                )
            phases.append(phase)
            tokens += (end - step) * phase.tokens
            step = end
        return cls((*phases, Phase(step, global_batch, sequence_length, texts)))

    @property
    def length_ends(self) -> tuple[tuple[int, int], ...]:
        """Give each length that another one follows, behind the first sample after it, counted over the run."""
        return tuple(
            (self.samples_before(after.first_step), phase.sequence_length)
            for phase, after in pairwise(self.phases)
            if phase.sequence_length != after.sequence_length
        )

    def mix_ends(self, rows: Sequence[End]) -> tuple[int, ...]:
        """Give for each row of `data.mix` the first sample after it, counted over the run.

        Raises:
            ValueError: a row ends before it begins.
        """
        ends: list[int] = []
        for number, row in enumerate(rows):
            step = row.until_step if row.until_step is not None else self.steps_for(row.until_tokens or 0)
            sample = self.samples_before(step)
            if sample <= (ends[-1] if ends else 0):
                raise ValueError(
                    f"data.mix[{number}] ends at step {step}, before it begins; order the rows by their ends"
                )
            ends.append(sample)
        return tuple(ends)

    def global_batch(self, step: int) -> int:
        """Give the sequences of a step, over all ranks."""
        return self._phase(step).global_batch

    def sequence_length(self, step: int) -> int:
        """Give the tokens of a step's sequences."""
        return self._phase(step).sequence_length

    def samples_before(self, step: int) -> int:
        """Count the sequences of all steps before `step`."""
        return sum(count * phase.global_batch for phase, count in self.steps_by_phase(step))

    def tokens_before(self, step: int) -> int:
        """Count the tokens of all steps before `step`."""
        return sum(count * phase.tokens for phase, count in self.steps_by_phase(step))

    def steps_by_phase(self, step: int) -> Iterator[tuple[Phase, int]]:
        """Give every phase, and how many steps before `step` it has."""
        for phase, end in self._spans():
            yield phase, max(0, min(step, end) - phase.first_step)

    def steps_for(self, tokens: int) -> int:
        """Count the steps that take at least so many tokens."""
        for phase, end in self._spans():
            before = self.tokens_before(phase.first_step)
            step = phase.first_step - (before - tokens) // phase.tokens  # rounded up
            if step <= end:
                return step
        raise AssertionError("the last phase goes on for ever")

    def _phase(self, step: int) -> Phase:
        return next(phase for phase in reversed(self.phases) if phase.first_step <= step)

    def _spans(self) -> Iterator[tuple[Phase, int]]:
        """Give every phase with the first step after it."""
        ends = [*(phase.first_step for phase in self.phases[1:]), ENDLESS]
        return zip(self.phases, ends, strict=True)
