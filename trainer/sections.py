"""The sections of the run file that are the trainer's own, typed and frozen. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from ..data.reading.transport import shown
from .meters.grid import grid_intensity

FIXED: dict[str, Any] = {"on_resume": "fixed"}
FREE: dict[str, Any] = {"on_resume": "free"}
OFFLOAD_STAGES = {"none": 0, "cpu": 2, "nvme": 3}  # the lowest ZeRO stage that each goes with


def _without_secrets(place: str) -> str:
    """Refuse a URL with more than may be read by everybody who reads the run's files."""
    if "://" in place and shown(place) != place:
        raise ValueError(
            "holds a user, a password or a query, which would be written down in run.toml and every checkpoint; give "
            "credentials by the environment"
        )
    return place


Place = Annotated[str, AfterValidator(_without_secrets)]  # a path or a URL


class Section(BaseModel):
    """Base of every section: immutable; an unknown key is an error, and so is `true` or "8" for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSection(Section):
    """`[run]`: identity and processes."""

    seed: int = Field(
        1234, ge=0, description="seed of weights, data order and dropout", json_schema_extra=FIXED
    )
    processes: int | None = Field(
        None, gt=0, description="local workers; by default one per GPU, else 1", json_schema_extra=FREE
    )
    timeout_s: float = Field(
        1800.0,
        ge=1,
        description="a rank that waits for the others for longer gives up; longer than any save or evaluation takes",
        json_schema_extra=FREE,
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
    """A row of `train.ramp`: a batch, a length or both, and the step or the number of tokens at which it ends."""

    global_batch: int | None = Field(None, gt=0)
    sequence_length: int | None = Field(None, ge=2)
    until_step: int | None = Field(None, gt=0)
    until_tokens: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_end(self) -> RampPhase:
        if (self.until_step is None) == (self.until_tokens is None):
            raise ValueError("give either until_step or until_tokens")
        if self.global_batch is self.sequence_length is None:
            raise ValueError("give global_batch, sequence_length or both; what is left out is the run's own")
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
        description="smaller batches or shorter sequences to begin with: a list of {global_batch, sequence_length or "
        "both, until_step or until_tokens}; lengths grow up to `data.sequence_length`",
        json_schema_extra=FIXED,
    )
    micro_batch: int = Field(1, gt=0, description="sequences in one forward of a rank", json_schema_extra=FREE)
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="working precision; masters are fp32", json_schema_extra=FIXED
    )
    clip: float = Field(1.0, ge=0, description="global gradient norm limit; 0 is off", json_schema_extra=FIXED)
    init_from: Place | None = Field(
        None,
        description="checkpoint or run directory whose weights a new run begins with (no optimizer state, step 0)",
        json_schema_extra=FREE,
    )
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
    """`[checkpoint]`: when to save, what to keep, and where copies go."""

    every_steps: int = Field(
        0,
        ge=0,
        description="0: only at the end and when stopped, unless `every_minutes` is set",
        json_schema_extra=FREE,
    )
    every_minutes: float | None = Field(
        None,
        gt=0,
        description="save when so much time has passed since the last save, too",
        json_schema_extra=FREE,
    )
    asynchronous: bool | None = Field(
        None,
        description="write while training goes on, from a copy in host memory; by default unless offloaded",
        json_schema_extra=FREE,
    )
    keep_last: int = Field(3, gt=0, description="newest checkpoints to keep", json_schema_extra=FREE)
    keep_every_steps: int = Field(
        0, ge=0, description="also keep those of steps that this divides; 0: none", json_schema_extra=FREE
    )
    keep_best: int = Field(
        0, ge=0, description="also keep so many with the lowest held-out loss", json_schema_extra=FREE
    )
    rollback_steps: int = Field(
        0,
        ge=0,
        description="also keep the newest that is at least so many steps behind, to go back to; 0: none",
        json_schema_extra=FREE,
    )
    remote: Place | None = Field(
        None, description="place (s3://..., a path) that every checkpoint is copied to", json_schema_extra=FREE
    )
    max_failed_saves: int = Field(
        3, gt=0, description="saves that may fail in a row before the run stops", json_schema_extra=FREE
    )


class ExportSection(Section):
    """`[export]`: Hugging Face directories while training goes on."""

    every_steps: int = Field(
        0,
        ge=0,
        description="export the checkpoints of steps that this divides, and the last one; 0: none",
        json_schema_extra=FREE,
    )
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="of the weights", json_schema_extra=FREE)
    licence: str = Field("", description="for the model card, e.g. apache-2.0", json_schema_extra=FREE)


class MeterSection(Section):
    """`[meter]`: logging, throughput and energy."""

    log_every_steps: int = Field(
        1,
        gt=0,
        description="steps between metric lines; the first, the last and saved steps have one, too",
        json_schema_extra=FREE,
    )
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
    power_limit_w: float | None = Field(
        None, gt=0, description="what a GPU may draw while the run lasts; needs root", json_schema_extra=FREE
    )
    power_limit_from_step: int = Field(
        0,
        ge=0,
        description="set the limit after the first log line from this step on, to compare with the lines before",
        json_schema_extra=FREE,
    )
    idle_s: float = Field(
        0.0,
        ge=0,
        description="measure what the devices draw idle, so long, before the first step",
        json_schema_extra=FREE,
    )
    pue: float = Field(
        1.0, ge=1, description="what the building draws over what its computers draw", json_schema_extra=FREE
    )
    grid: str | None = Field(
        None,
        description="country whose mean grid intensity counts, as an ISO 3166 alpha-3 code, e.g. FRA",
        json_schema_extra=FREE,
    )
    g_co2e_per_kwh: float | None = Field(
        None, ge=0, description="grid intensity, in place of a country's", json_schema_extra=FREE
    )
    price_per_kwh: float | None = Field(None, ge=0, description="of electricity", json_schema_extra=FREE)
    price_per_gpu_hour: float | None = Field(None, ge=0, description="of one GPU", json_schema_extra=FREE)
    currency: str = Field("USD", min_length=1, description="of the prices", json_schema_extra=FREE)
    tensorboard: bool = Field(True, description="write TensorBoard events", json_schema_extra=FREE)
    wandb_project: str | None = Field(
        None,
        pattern=r"^[^/\\#?%:]{1,128}$",
        description="project of Weights & Biases that the run shows in",
        json_schema_extra=FREE,
    )
    prometheus_port: int | None = Field(
        None, ge=1, le=65535, description="serve the last figures to Prometheus here", json_schema_extra=FREE
    )
    prometheus_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="address to listen on; any but a loopback one shows the figures to the network",
        json_schema_extra=FREE,
    )

    @field_validator("grid")
    @classmethod
    def _known_country(cls, code: str | None) -> str | None:
        if code is not None and code not in grid_intensity():
            raise ValueError(
                f"no country of the table has the code {code!r} (ISO 3166 alpha-3, e.g. DEU, USA); or give "
                "meter.g_co2e_per_kwh"
            )
        return code

    @model_validator(mode="after")
    def _one_intensity(self) -> MeterSection:
        if self.grid is not None and self.g_co2e_per_kwh is not None:
            raise ValueError("grid and g_co2e_per_kwh are both given; give one of them")
        return self


class ProfileSection(Section):
    """`[profile]`: a trace of some optimizer steps, by torch.profiler."""

    first_step: int | None = Field(
        None, gt=0, description="first step to trace, counted from 1", json_schema_extra=FREE
    )
    num_steps: int = Field(3, gt=0, description="steps to trace", json_schema_extra=FREE)
    ranks: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = Field(
        (0,),
        strict=False,  # TOML has lists
        min_length=1,
        description="ranks that trace; each writes a file",
        json_schema_extra=FREE,
    )


class BudgetSection(Section):
    """`[budget]`: the run stops, saved, within seconds of reaching one; over all attempts."""

    kwh: float | None = Field(
        None, gt=0, description="energy, with the building's share (meter.pue)", json_schema_extra=FREE
    )
    cost: float | None = Field(None, gt=0, description="money, in meter.currency", json_schema_extra=FREE)
    hours: float | None = Field(None, gt=0, description="wall time", json_schema_extra=FREE)
