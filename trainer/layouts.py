"""Layouts by name, as `verify` takes and prints them: `tp2-sp-pp2-vp2-dp1-z1`. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from .config import RunConfig
from .errors import ConfigError
from .sections import OFFLOAD_STAGES

GRAMMAR = (
    "tensor tpN, sequence parallel sp, pipeline ppN, virtual stages vpN, data dpN, ZeRO zN; e.g. tp2-sp-pp2-z1"
)
PART = re.compile(r"(tp|pp|vp|dp|z)(\d{1,6})|sp")
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Layout:
    """How a run lies over processes."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    zero: int = 1

    def __str__(self) -> str:
        parts = [f"tp{self.tensor}", "sp" if self.sequence else "", f"pp{self.pipeline}"]
        parts += [
            f"vp{self.virtual_pipeline}" if self.virtual_pipeline > 1 else "",
            f"dp{self.data}",
            f"z{self.zero}",
        ]
        return "-".join(part for part in parts if part)

    @property
    def processes(self) -> int:
        """How many it takes."""
        return self.tensor * self.pipeline * self.data

    def of(self, run: RunConfig) -> RunConfig:
        """Lay a run out like this.

        A map of its layers to stages is kept where the number of stages agrees, offload where it goes with the layout.
        """
        values: dict[str, Any] = run.parallel.model_dump()
        values |= {
            "tensor": self.tensor,
            "sequence": self.sequence,
            "pipeline": self.pipeline,
            "virtual_pipeline": self.virtual_pipeline,
            "zero": self.zero,
        }
        if len(values["pipeline_layers"] or ()) != self.pipeline * self.virtual_pipeline:
            values["pipeline_layers"] = None
        if self.zero != run.parallel.zero:
            values["ds_config"] = None  # its stage is another
        if self.pipeline > 1 or self.zero < OFFLOAD_STAGES[run.parallel.offload]:
            values |= {"offload": "none", "nvme_path": None}
        return run.model_copy(update={"parallel": type(run.parallel)(**values)})


SERIAL = Layout(zero=0)


def parse_layout(text: str, processes: int | None = None) -> Layout:
    """Read a layout's name; data-parallel ranks that it does not name are those that are left of the processes.

    Without a number of processes the name decides how many there are.

    Raises:
        ConfigError: it is no name, names a part twice, or takes another number of processes.
    """
    values: dict[str, int] = {}
    for part in text.strip().split("-"):
        match = PART.fullmatch(part)
        key = (match[1] or "sp") if match else ""
        if match is None or key in values:
            raise ConfigError(f"--layouts {text}: cannot read {part!r}; a layout is {GRAMMAR}")
        values[key] = int(match[2] or 1)
    tensor, pipeline = values.get("tp", 1), values.get("pp", 1)
    ranks = max(1, tensor * pipeline)
    layout = Layout(
        tensor,
        "sp" in values,
        pipeline,
        values.get("vp", 1),
        values.get("dp", 1 if processes is None else processes // ranks),
        values.get("z", 1),
    )
    processes = layout.processes if processes is None else processes
    if min(layout.tensor, layout.pipeline, layout.virtual_pipeline) < 1 or layout.processes != processes:
        raise ConfigError(
            f"--layouts {text}: takes {layout.processes} processes, and --processes is {processes}; change either"
        )
    if layout.zero not in ZERO_STAGES:
        raise ConfigError(f"--layouts {text}: ZeRO stage {layout.zero}; there are 0, 1, 2 and 3")
    return layout


def all_layouts(processes: int) -> Iterator[Layout]:
    """Give every factorisation of the processes with every ZeRO stage.

    Tensor parallel comes with sequence parallel but for stage 2, so both occur. Each pipeline comes interleaved, too.
    """
    for tensor, pipeline in product(_divisors(processes), repeat=2):
        if processes % (tensor * pipeline):
            continue
        data = processes // (tensor * pipeline)
        for zero in ZERO_STAGES:
            yield Layout(tensor, tensor > 1 and zero != 2, pipeline, 1, data, zero)
        if pipeline > 1:
            yield Layout(tensor, tensor > 1, pipeline, 2, data, 1)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
