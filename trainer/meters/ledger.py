"""What a run has used over all its attempts; it outlives every checkpoint. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """Totals over all attempts; `wasted_*` is the part whose work was lost.

    `wall_s` is time in which processes of the run were there, `train_s` the part of it in training steps, `gpu_s` the
    wall time of each GPU, added up. `joules` are as metered; None where nothing was, and `joules_by_device` names the
    devices; `joules_source` is the weakest kind of source that any of them comes from, and `metered_tokens` are those
    that were trained on while there was one. `hosts` had a reading in the last attempt, of `all_hosts`.
    """

    attempts: int = 0
    joules: float | None = None
    joules_source: str = "none"
    wasted_joules: float = 0.0
    wall_s: float = 0.0
    train_s: float = 0.0
    wasted_s: float = 0.0
    gpu_s: float = 0.0
    tokens: int = 0
    metered_tokens: int = 0
    wasted_tokens: int = 0
    idle_w: float | None = None
    hosts: int = 0
    all_hosts: int = 0
    joules_by_device: dict[str, float] = field(default_factory=dict)

    @property
    def goodput(self) -> float | None:
        """Give the share of the wall time that trained the present weights; None before there is any."""
        return (self.train_s - self.wasted_s) / self.wall_s if self.wall_s > 0 else None

    def draw(self, joules_by_device: dict[str, float], source: str, tokens: int) -> None:
        """Book what devices drew while so many tokens were trained on."""
        self.joules = (self.joules or 0.0) + sum(joules_by_device.values())
        self.joules_source = source
        self.metered_tokens += tokens
        for device, joules in joules_by_device.items():
            self.joules_by_device[device] = self.joules_by_device.get(device, 0.0) + joules

    def useful(self) -> dict[str, float]:
        """Give what led to the present weights; a checkpoint carries it."""
        return {
            "joules": (self.joules or 0.0) - self.wasted_joules,
            "train_s": self.train_s - self.wasted_s,
            "tokens": self.tokens - self.wasted_tokens,
        }

    def resume_from(self, useful: dict[str, float]) -> None:
        """Book everything after the checkpoint, whose `useful()` this is, as wasted.

        Where no step was lost nothing is: what was drawn after the checkpoint evaluated and saved. Where the ledger was
        lost, or the checkpoint comes from another run directory, the totals begin there.
        """
        if useful.get("joules", 0.0) > (self.joules or 0.0):
            self.joules, self.metered_tokens = useful["joules"], int(useful.get("tokens", 0))
        self.train_s = max(self.train_s, useful.get("train_s", 0.0))
        self.wall_s = max(self.wall_s, self.train_s)
        self.tokens = max(self.tokens, int(useful.get("tokens", 0)))
        if self.tokens - int(useful.get("tokens", 0)) == self.wasted_tokens:
            return
        self.wasted_joules = max(0.0, (self.joules or 0.0) - useful.get("joules", 0.0))
        self.wasted_s = max(0.0, self.train_s - useful.get("train_s", 0.0))
        self.wasted_tokens = max(0, int(self.tokens - useful.get("tokens", 0)))

    @staticmethod
    def misfits(values: dict[str, Any]) -> list[str]:
        """Name what of a ledger's file cannot stand in a ledger."""
        return [name for name, kind in KINDS.items() if name in values and not _fits(values[name], kind)]


KINDS: dict[str, str] = {one.name: str(one.type) for one in dataclasses.fields(Ledger)}


def _fits(value: Any, kind: str) -> bool:
    if kind == "str":
        return isinstance(value, str)
    if kind.startswith("dict"):
        return isinstance(value, dict) and all(_fits(one, "float") for one in value.values())
    if value is None:
        return kind.endswith("None")
    return isinstance(value, int if kind == "int" else (int, float)) and not isinstance(value, bool)
