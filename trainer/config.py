"""The run file as typed, frozen sections, and the one place that derives numbers from it. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..data.config import DataConfig, ReadingConfig
from ..data.division import num_lanes, samples_per_reader
from ..model.config import ModelConfig
from ..model.pipeline import pipeline_problems
from .errors import ConfigError
from .ramp import BatchSchedule, Phase

FIXED: dict[str, Any] = {"on_resume": "fixed"}
FREE: dict[str, Any] = {"on_resume": "free"}
OFFLOAD_STAGES = {"none": 0, "cpu": 2, "nvme": 3}  # the lowest ZeRO stage that each goes with


class Section(BaseModel):
    """Base of every section: immutable; an unknown key is an error, and so is `true` or "8" for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RunSection(Section):
    """`[run]`: identity and processes."""

    seed: int = Field(
        1234, ge=0, description="seed of weights, data order and dropout", json_schema_extra=FIXED
    )
    processes: int | None = Field(
        None, gt=0, description="local workers; by default one per GPU, else 1", json_schema_extra=FREE
    )
    deterministic: bool = Field(
        False, description="bit-reproducible kernels on a GPU, at some speed", json_schema_extra=FREE
    )


class ParallelSection(Section):
    """`[parallel]`: the layout. All of it may change at a resume."""

    tensor: int = Field(1, gt=0, description="tensor-parallel ranks", json_schema_extra=FREE)
    pipeline: int = Field(1, gt=0, description="pipeline-parallel ranks", json_schema_extra=FREE)
    virtual_pipeline: int = Field(
        1,
        gt=0,
        description="stages that a pipeline rank holds; above 1 they are interleaved",
        json_schema_extra=FREE,
    )
    pipeline_layers: tuple[Annotated[int, Field(gt=0, strict=True)], ...] | None = Field(
        None,
        strict=False,  # TOML has lists
        description="layers of every stage in the model's order; by default spread evenly",
        json_schema_extra=FREE,
    )
    sequence: bool = Field(
        False, description="Megatron sequence parallel: norms and dropout on slices", json_schema_extra=FREE
    )
    zero: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage", json_schema_extra=FREE)
    ds_config: str | None = Field(
        None, description="DeepSpeed JSON in place of ds_configs/zero<stage>.json", json_schema_extra=FREE
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="where optimizer states lie, and weights from ZeRO-3 on: on the GPU, in host memory or in files",
        json_schema_extra=FREE,
    )
    nvme_path: str | None = Field(
        None, description='directory on a local disk for `offload = "nvme"`', json_schema_extra=FREE
    )


class RampPhase(Section):
    """A row of `train.ramp`: a global batch, and the step or the number of tokens at which it ends."""

    global_batch: int = Field(gt=0)
    until_step: int | None = Field(None, gt=0)
    until_tokens: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_end(self) -> RampPhase:
        if (self.until_step is None) == (self.until_tokens is None):
            raise ValueError("give either until_step or until_tokens")
        return self


class TrainSection(Section):
    """`[train]`: how long, in what batches, in what precision."""

    steps: int | None = Field(None, gt=0, description="optimizer steps", json_schema_extra=FREE)
    tokens: int | None = Field(None, gt=0, description="or tokens, rounded up to steps", json_schema_extra=FREE)
    global_batch: int = Field(
        gt=0, description="sequences in one step, over all ranks", json_schema_extra=FIXED
    )
    ramp: tuple[RampPhase, ...] = Field(
        (),
        strict=False,  # TOML has lists
        description="smaller batches to begin with: a list of {global_batch, until_step or until_tokens}",
        json_schema_extra=FIXED,
    )
    micro_batch: int = Field(1, gt=0, description="sequences in one forward of a rank", json_schema_extra=FREE)
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="working precision; masters are fp32", json_schema_extra=FIXED
    )
    clip: float = Field(1.0, ge=0, description="global gradient norm limit; 0 is off", json_schema_extra=FIXED)
    recompute: bool = Field(
        False, description="activation checkpointing: keep a layer's input only", json_schema_extra=FREE
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either steps or tokens, not both and not neither")
        return self


class OptimizerSection(Section):
    """`[optimizer]`: AdamW (Loshchilov & Hutter 2019)."""

    lr: float = Field(gt=0, allow_inf_nan=False, description="peak learning rate", json_schema_extra=FREE)
    betas: tuple[float, float] = Field(
        (0.9, 0.95), strict=False, description="moment decays", json_schema_extra=FREE
    )
    eps: float = Field(
        1e-8, gt=0, allow_inf_nan=False, description="denominator epsilon", json_schema_extra=FREE
    )
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay", json_schema_extra=FREE)
    decay_all: bool = Field(
        False, description="decay norms, biases and embeddings, too", json_schema_extra=FIXED
    )

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both must be at least 0 and below 1")
        return betas


class ScheduleSection(Section):
    """`[schedule]`: the learning rate over steps."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine", description="shape after the warm-up", json_schema_extra=FREE
    )
    warmup_steps: int = Field(0, ge=0, description="linear warm-up from 0", json_schema_extra=FREE)
    final_ratio: float = Field(
        0.1, ge=0, le=1, description="the rate reached when the run ends, over the peak", json_schema_extra=FREE
    )
    decay_steps: int | None = Field(
        None,
        gt=0,
        description="wsd: length of the decay; by default a fifth of the run",
        json_schema_extra=FREE,
    )


class EvaluateSection(Section):
    """`[evaluate]`: held-out loss while training."""

    every_steps: int = Field(0, ge=0, description="0: only at the end", json_schema_extra=FREE)
    max_tokens: int = Field(65536, gt=0, description="tokens of each held-out set", json_schema_extra=FREE)


class CheckpointSection(Section):
    """`[checkpoint]`: when to save and what to keep."""

    every_steps: int = Field(0, ge=0, description="0: only at the end and when stopped", json_schema_extra=FREE)
    keep_last: int = Field(3, gt=0, description="newest checkpoints to keep", json_schema_extra=FREE)


class MeterSection(Section):
    """`[meter]`: logging, throughput and energy."""

    log_every_steps: int = Field(1, gt=0, description="steps between metric lines", json_schema_extra=FREE)
    watts: float | None = Field(
        None, gt=0, description="power of one host, where no counter can be read", json_schema_extra=FREE
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="dense peak of one device, for MFU, where the table has none",
        json_schema_extra=FREE,
    )
    attention_flops: Literal["causal", "full"] = Field(
        "causal", description="how attention is counted in FLOPs", json_schema_extra=FREE
    )
    g_co2e_per_kwh: float | None = Field(None, ge=0, description="grid intensity", json_schema_extra=FREE)
    tensorboard: bool = Field(True, description="write TensorBoard events", json_schema_extra=FREE)


class RunConfig(Section):
    """A whole run file."""

    run: RunSection = RunSection()
    model: ModelConfig
    data: DataConfig
    reading: ReadingConfig = ReadingConfig()
    parallel: ParallelSection = ParallelSection()
    train: TrainSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    meter: MeterSection = MeterSection()

    def resolve(self, world_size: int, vocab_size: int) -> ResolvedRun:
        """Derive everything that follows from the world size and the tokenizer's vocabulary.

        Raises:
            ConfigError: with every violated rule in one message.
        """
        problems: list[str] = []
        parallel, train = self.parallel, self.train
        model = self.model
        if model.vocab_size is None:
            model = ModelConfig(**{**model.model_dump(), "vocab_size": vocab_size})
        elif model.vocab_size < vocab_size:
            problems.append(
                f"model.vocab_size = {model.vocab_size} is smaller than the tokenizer's {vocab_size}; "
                "leave it out to take the tokenizer's"
            )
        problems += model.layout_problems(parallel.tensor)
        problems += pipeline_problems(
            model.num_layers, parallel.pipeline, parallel.virtual_pipeline, parallel.pipeline_layers
        )
        problems += self._problems() + self._offload_problems()
        ranks = parallel.tensor * parallel.pipeline
        if world_size % ranks:
            problems.append(
                f"{world_size} processes cannot be cut into groups of parallel.tensor x parallel.pipeline = "
                f"{parallel.tensor} x {parallel.pipeline}; start a multiple of {ranks}"
            )
        dp = max(1, world_size // ranks)
        batches = BatchSchedule(((Phase(0, train.global_batch)),), self.data.sequence_length)
        try:
            batches = BatchSchedule.of(train.ramp, train.global_batch, self.data.sequence_length)
        except ValueError as error:
            problems.append(str(error))
        sizes = sorted({phase.global_batch for phase in batches.phases})
        lanes = self.data.lanes or num_lanes(*sizes)
        problems += self._lane_problems(sizes, dp, lanes)
        if not any(size % lanes for size in sizes):
            for global_batch in sizes:
                problems += self._batch_problems(global_batch, dp, lanes)
        mix_ends: tuple[int, ...] = ()
        try:
            mix_ends = batches.mix_ends(self.data.mix)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        return ResolvedRun(
            run=self.model_copy(update={"model": model}),
            world_size=world_size,
            data_parallel=dp,
            batches=batches,
            lanes=lanes,
            mix_ends=mix_ends,
            steps=train.steps or batches.steps_for(train.tokens or 0),
        )

    def _lane_problems(self, sizes: list[int], dp: int, lanes: int) -> list[str]:
        """Check that the lanes divide every batch, and feed every data-parallel rank."""
        if uneven := [size for size in sizes if size % lanes]:
            return [
                f"data.lanes = {lanes} does not divide the global batch {uneven[0]}; take a divisor of "
                f"{' and '.join(map(str, sizes))}"
            ]
        if lanes >= dp or dp > sizes[0]:
            return []
        common = math.gcd(*sizes)
        if common >= dp:
            enough = min(count for count in range(dp, common + 1) if common % count == 0)
            return [
                f"the data is dealt into {lanes} lanes, and there are {dp} data-parallel ranks, of which some would "
                f"have none; set data.lanes = {enough}, or more for more ranks later (it is fixed once a run has begun)"
            ]
        return [
            f"the global batch(es) {', '.join(map(str, sizes))} have {common} as their largest common divisor, "
            f"fewer than the {dp} data-parallel ranks, which share data by it: some would have none; "
            f"take multiples of {dp}"
        ]

    def _batch_problems(self, global_batch: int, dp: int, lanes: int) -> list[str]:
        """Check that a global batch gives every rank something, and the interleaved schedule what it can take."""
        parallel, train = self.parallel, self.train
        if dp > global_batch:
            return [
                f"{self._batch_name(global_batch)} is smaller than the {dp} data-parallel ranks; "
                "raise it or start fewer processes"
            ]
        count = -(-samples_per_reader(global_batch, dp, lanes) // train.micro_batch)
        if parallel.virtual_pipeline == 1 or count % parallel.pipeline == 0:  # 1F1B takes any number
            return []
        a_rank = parallel.pipeline * -(-count // parallel.pipeline)
        return [
            f"parallel.virtual_pipeline > 1 takes a multiple of parallel.pipeline = {parallel.pipeline} micro-batches "
            f"a step; {self._batch_name(global_batch)} in micro-batches of {train.micro_batch} on {dp} "
            f"data-parallel rank(s) makes {count}; a batch of {train.micro_batch * dp * a_rank} would do"
        ]

    def _batch_name(self, global_batch: int) -> str:
        """Give the key that a batch stands under, and the batch."""
        own = global_batch == self.train.global_batch
        return f"train.{'' if own else 'ramp: '}global_batch = {global_batch}"

    def _problems(self) -> list[str]:
        """Check the rules that join two sections and need no world size."""
        parallel, problems = self.parallel, []
        if self.data.sequence_length > self.model.max_sequence_length:
            problems.append(
                f"data.sequence_length = {self.data.sequence_length} exceeds model.max_sequence_length = "
                f"{self.model.max_sequence_length}; lower the first or raise the second"
            )
        if parallel.sequence and parallel.tensor == 1:
            problems.append("parallel.sequence = true needs parallel.tensor > 1; set it to false")
        if parallel.sequence and self.data.sequence_length % parallel.tensor:
            problems.append(
                f"parallel.sequence = true needs data.sequence_length = {self.data.sequence_length} to be a "
                f"multiple of parallel.tensor = {parallel.tensor}"
            )
        if parallel.zero == 0 and self.train.dtype != "fp32":
            problems.append(
                f"parallel.zero = 0 accumulates {self.train.dtype} gradients without fp32 masters; "
                "set parallel.zero = 1 (it costs nothing more on one data-parallel rank) or train.dtype = 'fp32'"
            )
        return problems

    def _offload_problems(self) -> list[str]:
        """Check what offload goes with; each message names the nearest legal setting."""
        parallel, problems = self.parallel, []
        given, least = f'parallel.offload = "{parallel.offload}"', OFFLOAD_STAGES[parallel.offload]
        if parallel.zero < least:
            problems.append(
                f"{given} needs parallel.zero {'= 3' if least == 3 else '>= 2'}, got {parallel.zero}; "
                f"set parallel.zero = {least}"
            )
        if parallel.offload == "nvme" and parallel.nvme_path is None:
            problems.append(
                f"{given} needs parallel.nvme_path, a directory on a local disk; "
                'name one, or set parallel.offload = "cpu"'
            )
        if parallel.offload != "nvme" and parallel.nvme_path is not None:
            problems.append(
                f'parallel.nvme_path is for parallel.offload = "nvme", got "{parallel.offload}"; take one of them out'
            )
        if parallel.offload == "none":
            return problems
        if parallel.ds_config is not None:
            problems.append(
                f"{given} chooses a DeepSpeed file, and parallel.ds_config names one; "
                'set parallel.offload = "none" and put the offload sections into that file'
            )
        if parallel.pipeline > 1:
            tensor = parallel.tensor * parallel.pipeline
            more = (
                ""
                if self.model.layout_problems(tensor)
                else f" (parallel.tensor = {tensor} takes as many ranks)"
            )
            problems.append(
                f"{given} needs parallel.pipeline = 1, got {parallel.pipeline}: several stages keep whole gradients on "
                f"the device until one reduction a step; set parallel.pipeline = 1 with more tensor parallel{more}, or "
                'parallel.offload = "none"'
            )
        return problems


@dataclass(frozen=True)
class ResolvedRun:
    """A run with everything derived: `run.model.vocab_size` is set, the layout factors, the steps are known."""

    run: RunConfig
    world_size: int
    data_parallel: int
    batches: BatchSchedule
    lanes: int
    mix_ends: tuple[int, ...]  # the first samples that the rows of data.mix no longer rule
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.batches.tokens_before(self.steps)

    def samples_per_rank(self, global_batch: int) -> int:
        """Samples that a data-parallel rank gets of a global batch; some have weight zero where it does not divide."""
        return samples_per_reader(global_batch, self.data_parallel, self.lanes)

    def num_micro_batches(self, global_batch: int) -> int:
        """Forwards of a rank in a step; the last one is filled up with samples of weight zero."""
        return -(-self.samples_per_rank(global_batch) // self.run.train.micro_batch)

    @property
    def most_micro_batches(self) -> int:
        """Forwards of a rank in the largest step of the run."""
        return max(self.num_micro_batches(phase.global_batch) for phase in self.batches.phases)
