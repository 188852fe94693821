"""Peak dense TFLOP/s of accelerators by the name that the driver gives them. Imports no torch.

Numbers are the vendors' dense figures (no structured sparsity), as collected with one source a row in
github.com/stas00/ml-engineering, compute/accelerator; B200 and B300 are those of HGX boards, MI250X is one of
the board's two dies. A device that is not here has no peak: a guess would make an MFU that means nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DTYPE_COLUMNS = {"tf32": "tf32", "bf16": "bf16", "fp16": "bf16", "fp8": "fp8"}
OTHER_DEVICES = ("MIG ", "LAPTOP", "MAX-Q", "4090 D")
"""Marks of a slice of a device or of a smaller one that carries its name."""


@dataclass(frozen=True)
class _Peak:
    """A row: the label, the words that must stand in the name, those that must not, and the TFLOP/s."""

    label: str
    words: tuple[str, ...]
    without: tuple[str, ...] = ()
    tf32: float | None = None
    bf16: float | None = None
    fp8: float | None = None


TABLE = (
    _Peak("GB300", ("GB300",), tf32=1250, bf16=2500, fp8=5000),
    _Peak("GB200", ("GB200",), tf32=1250, bf16=2500, fp8=5000),
    _Peak("B300", ("B300",), tf32=1125, bf16=2250, fp8=4500),
    _Peak("B200", ("B200",), tf32=1125, bf16=2250, fp8=4500),
    _Peak("GH200", ("GH200",), tf32=494.7, bf16=989.4, fp8=1979),
    _Peak("H200 NVL", ("H200", "NVL"), bf16=835.5),
    _Peak("H200 SXM", ("H200",), ("PCIE",), tf32=494.7, bf16=989.4, fp8=1979),
    _Peak("H100 NVL", ("H100", "NVL"), bf16=835.5),
    _Peak("H100 PCIe", ("H100", "PCIE"), tf32=378, bf16=756, fp8=1513),
    _Peak("H100 SXM", ("H100",), ("HBM2E",), tf32=494.7, bf16=989.4, fp8=1979),
    _Peak("L40S", ("L40S",), tf32=183, bf16=362, fp8=733),
    _Peak("A100", ("A100",), tf32=156, bf16=312),
    _Peak("RTX 4090", ("RTX", "4090"), tf32=82.6, bf16=165.2, fp8=330.3),
    _Peak("MI355X", ("MI355X",), bf16=2500, fp8=5000),
    _Peak("MI325X", ("MI325X",), tf32=653.7, bf16=1307.4, fp8=2614.9),
    _Peak("MI300X", ("MI300X",), tf32=653.7, bf16=1307.4, fp8=2614.9),
    _Peak("MI250X, one die", ("MI250X",), bf16=191.5),
)


def peak_tflops(device_name: str, dtype: str) -> tuple[float, str] | None:
    """Give the peak dense TFLOP/s of one device and where the figure comes from, or None where it is not known.

    `device_name` is torch's or NVML's name; `dtype` one of tf32, bf16, fp16, fp8. Words are matched whole, so
    that an H20 is no H200 and an L40 no L40S; the first row that matches counts.
    """
    name = device_name.upper()
    column = DTYPE_COLUMNS.get(dtype)
    if column is None or any(mark in f"{name} " for mark in OTHER_DEVICES):
        return None
    words = set(re.split(r"[^A-Z0-9]+", name))
    for row in TABLE:
        if words.issuperset(row.words) and words.isdisjoint(row.without):
            value = getattr(row, column)
            return None if value is None else (value, f"table: {row.label} {dtype} dense")
    return None
