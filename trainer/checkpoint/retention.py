"""Which checkpoints of a run stay, by their step numbers and held-out losses; never by time. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..sections import CheckpointSection


class StepFacts(NamedTuple):
    """What decides whether a checkpoint stays."""

    step: int
    heldout_loss: float | None  # nats


def policies(steps: Iterable[StepFacts], section: CheckpointSection, newest: int) -> dict[int, list[str]]:
    """Say for each step that stays which keys of `[checkpoint]` keep it, newest first.

    `keep_last` counts the newest. Of two with the same loss `keep_best` prefers the newer. `rollback_steps` keeps the
    newest that is so far behind, and the oldest after it: the next one to take that place, without which the first
    would stay for ever.

    Args:
        newest: the step that the run goes on from. It stays; later ones, which are of a line that was left, do not.
    """
    found = sorted((facts for facts in steps if facts.step <= newest), key=lambda facts: -facts.step)
    numbers = [facts.step for facts in found]
    scored = [facts for facts in found if facts.heldout_loss is not None and math.isfinite(facts.heldout_loss)]
    scored.sort(key=lambda facts: facts.heldout_loss or 0.0)  # stable: of equal ones the newer comes first
    every, margin = section.keep_every_steps, section.rollback_steps
    behind = [step for step in numbers if step <= newest - margin]
    within = [step for step in numbers if step > newest - margin]
    keeps = {
        "keep_last": numbers[: section.keep_last],
        "keep_every_steps": [step for step in numbers if step % every == 0] if every else [],
        "keep_best": [facts.step for facts in scored[: section.keep_best]],
        "rollback_steps": [*behind[:1], *within[-1:]] if margin else [],
    }
    reasons = {step: [key for key, kept_steps in keeps.items() if step in kept_steps] for step in numbers}
    return {step: keys for step, keys in reasons.items() if keys}


def kept(steps: Iterable[StepFacts], section: CheckpointSection, newest: int) -> set[int]:
    """Give the numbers of the steps that stay: see `policies`."""
    return set(policies(steps, section, newest))


def heldout_loss(state: dict[str, Any]) -> float | None:
    """Give the mean held-out loss that a checkpoint's state carries, in nats; None where it has none."""
    losses = state.get("heldout")
    if not isinstance(losses, dict) or not losses:
        return None
    values = list(losses.values())
    if not all(isinstance(value, float) for value in values):
        return None
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None
