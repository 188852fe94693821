"""What `basestone finetune` is asked to do. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

FULL_LR, LORA_LR = 2e-5, 2e-4
MOST_IN_MICRO_BATCH = 8


class FinetuneSettings(BaseModel):
    """One fine-tuning, as the command line gives it; bounds of single options are checked there.

    `batch` counts the examples of a step over all processes and `micro_batch` those of one forward pass of one of
    them. None lets the program choose: see the properties. `warmup` is a share of the steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    data: Path
    out: Path
    heldout: Path | None = None
    task: Literal["sft", "classify"] = "sft"
    lora: int | None = None
    keep_adapter: bool = False
    zero: Literal[0, 1, 2, 3] = 0
    epochs: int = 3
    steps: int | None = None
    lr: float | None = None
    batch: int = 16
    micro_batch: int | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    max_length: int | None = None
    dtype: Literal["fp32", "bf16"] | None = None
    seed: int = 0

    @property
    def learning_rate(self) -> float:
        """Give the rate that was asked for, else a usual one: adapters take a higher one than whole models."""
        return self.lr or (FULL_LR if self.lora is None else LORA_LR)

    def micro_batch_of(self, num_processes: int) -> int:
        """Give the examples of one forward pass: by default the largest number up to 8 that divides a rank's share."""
        share = max(1, self.batch // num_processes)
        return self.micro_batch or max(
            n for n in range(1, min(share, MOST_IN_MICRO_BATCH) + 1) if share % n == 0
        )

    def accumulation_of(self, num_processes: int) -> int:
        """Give the micro-batches of a rank in a step."""
        return self.batch // (num_processes * self.micro_batch_of(num_processes))

    def problems(self, num_processes: int, *, on_cpu: bool) -> list[str]:
        """Say which options do not go together, and an output that is there already."""
        found = []
        if self.out.exists() or self.out.is_symlink():
            found.append(f"{self.out} exists already; remove it or give another --out")
        if self.keep_adapter and self.lora is None:
            found.append("--keep-adapter without --lora; give --lora RANK, or leave it out")
        least = num_processes * (self.micro_batch or 1)
        if self.batch % least:
            found.append(
                f"--batch {self.batch} is no multiple of {least} = {num_processes} processes x "
                f"{self.micro_batch or 1} examples; change --batch, --micro-batch or --processes"
            )
        if on_cpu and self.zero and self.dtype == "bf16":
            found.append("--dtype bf16 with --zero needs a GPU, and there is none; give --dtype fp32")
        return found
