"""`[preflight]` of the cluster file: what nodes are held to before training. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from ..sections import Section

CHECKED = "check/CHECKED"  # in the run directory: the mark of a launch that was only checked, and passed


class PreflightSection(Section):
    """Limits of the checks before training."""

    report_s: float = Field(30.0, gt=0, description="seconds in which every rank must report")
    clock_s: float = Field(1.0, gt=0, description="seconds by which clocks of nodes may differ")
    collective_s: float = Field(20.0, gt=0, description="seconds that one all-reduce may take")
    min_all_reduce_gb_per_s: float = Field(
        0.0, ge=0, description="refuse to train where an all-reduce is slower than this (bus bandwidth)"
    )
