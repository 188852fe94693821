"""What DeepSpeed is given: a file, ours or the user's, joined with what the run file decides. Imports no DeepSpeed."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from ..model.families import layout_of
from .config import ResolvedRun
from .errors import ConfigError
from .sections import OFFLOAD_STAGES

# What the run file decides: in a DeepSpeed file they would be a second source of truth.
DERIVED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "bfloat16",
    "fp16",
    "amp",
    "torch_autocast",
    "data_types",
    "optimizer",
    "scheduler",
    "steps_per_print",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
# What DeepSpeed's ZeRO section may hold. Others move what the optimizer stores, and a checkpoint would be wrong without
# a word (round_robin_gradients), or partition weights in ways that initial values do not reach.
ZERO_KEYS = (
    "stage",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "sub_group_size",
    "offload_optimizer",
    "offload_param",
)
OFFLOAD_SECTIONS = ("offload_optimizer", "offload_param")
# Of an optimizer in files: master, two moments and gradient of a sub-group; read-ahead and write-behind hold as many
# each, and the first step makes the moments beside them.
SWAP_BUFFERS, PIPELINED_SWAP_BUFFERS = 4, 12
# They would hold more partitions of parameters at a time than there are buffers for.
NO_READ_AHEAD = ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance")


def deepspeed_config(resolved: ResolvedRun, *, pin_memory: bool = False) -> dict[str, Any]:
    """Join a DeepSpeed file (ours for the ZeRO stage and the offload, or the user's) with the derived keys.

    Args:
        pin_memory: lock offloaded host memory for copies to a GPU, where the file does not say.

    Raises:
        ConfigError: the file cannot be read, holds keys that the run file decides (all of them at once), or offloads
            what cannot be.
    """
    parallel, train = resolved.run.parallel, resolved.run.train
    name, base = _read_file(resolved)
    if conflicts := [key for key in DERIVED_KEYS if key in base]:
        raise ConfigError(f"{name}: take out {', '.join(conflicts)}: the run file decides them")
    section = base.get("zero_optimization", {})
    if unknown := [key for key in section if key not in ZERO_KEYS]:
        raise ConfigError(
            f"{name}: zero_optimization: take out {', '.join(unknown)}: checkpoints do not follow; "
            f"it may hold {', '.join(ZERO_KEYS)}"
        )
    stage = section.get("stage", 0)
    if stage != parallel.zero:
        raise ConfigError(
            f"{name}: its zero_optimization.stage is {stage}, but parallel.zero = {parallel.zero}"
        )
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # the schedule counts micro-batches; DeepSpeed sees one a step
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if parallel.zero == 0 else train.clip,
        "steps_per_print": 1 << 60,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload works with torch's AdamW, which needs no compiler
    }
    if train.dtype != "fp32":
        derived[train.dtype] = {"enabled": True}
        # One micro-batch adds nothing up, and DeepSpeed then reduces half the bytes.
        if resolved.most_micro_batches > 1:
            derived["data_types"] = {"grad_accum_dtype": "fp32"}
    if train.dtype == "bf16":
        derived["bf16"]["immediate_grad_update"] = True
    if parallel.pipeline > 1 and parallel.zero:
        section = {**section, "stage": max(2, parallel.zero)}
        if parallel.zero == 3:
            # The norm takes one reduction over the stages for every sub-group: they need equally many.
            section["sub_group_size"] = 1 << 60
        derived["zero_optimization"] = section
    if offloads := [key for key in OFFLOAD_SECTIONS if device_of(base, key) != "none"]:
        filled = {key: _filled(resolved, key, section[key], pin_memory) for key in offloads}
        derived["zero_optimization"] = {**section, **filled}
        if problems := _offload_problems(resolved, {**section, **filled}):
            raise ConfigError("\n".join(f"{name}: {problem}" for problem in problems))
    return {**base, **derived}


def finetune_config(stage: int, *, accumulates: bool) -> dict[str, Any]:
    """Make what transformers' Trainer hands to DeepSpeed: our file for the ZeRO stage, the rest left to its arguments.

    Args:
        accumulates: a step has more than one micro-batch; their gradients then add up in fp32.
    """
    base = json.loads(resources.files("basestone.ds_configs").joinpath(f"zero{stage}.json").read_text())
    if stage == 3:
        base["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if accumulates:
        base["data_types"] = {"grad_accum_dtype": "fp32"}
    return {
        **base,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "steps_per_print": 1 << 60,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def device_of(config: dict[str, Any], key: str) -> str:
    """Give where a section of OFFLOAD_SECTIONS puts its tensors: "none", "cpu" or "nvme"."""
    section = config.get("zero_optimization", {}).get(key) or {}
    return str(section.get("device", "none"))


def nvme_sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Give the sections that swap to files; their `nvme_path` may be changed in place."""
    return [config["zero_optimization"][key] for key in OFFLOAD_SECTIONS if device_of(config, key) == "nvme"]


def largest_partition(resolved: ResolvedRun) -> int:
    """Count the elements of the largest piece that ZeRO-3 makes of a parameter."""
    tp, dp = resolved.run.parallel.tensor, resolved.data_parallel
    rows = layout_of(resolved.run.model).values()
    return max(-(-(row.numel if row.axis is None else row.numel // tp) // dp) for row in rows)


def _read_file(resolved: ResolvedRun) -> tuple[str, dict[str, Any]]:
    parallel = resolved.run.parallel
    if parallel.ds_config is None:
        suffix = {"none": "", "cpu": "_offload", "nvme": "_nvme"}[parallel.offload]
        name = f"zero{parallel.zero}{suffix}.json"
        return name, json.loads(resources.files("basestone.ds_configs").joinpath(name).read_text())
    name = parallel.ds_config
    try:
        base = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"parallel.ds_config: {name} cannot be read as JSON: {error}") from error
    if not isinstance(base, dict) or not isinstance(base.get("zero_optimization", {}), dict):
        raise ConfigError(
            f"parallel.ds_config: {name} is no DeepSpeed configuration: it and its sections are tables"
        )
    zero = base.get("zero_optimization", {})
    for key in OFFLOAD_SECTIONS:
        if not isinstance(zero.get(key) or {}, dict):
            raise ConfigError(f"parallel.ds_config: {name} is no DeepSpeed configuration: {key} is a table")
    return name, base


def _filled(resolved: ResolvedRun, key: str, given: dict[str, Any], pin_memory: bool) -> dict[str, Any]:
    """Give an offload section with what follows from the run and the machine."""
    section = {"pin_memory": pin_memory, **given}
    if section["device"] == "nvme":
        path = resolved.run.parallel.nvme_path or given.get("nvme_path")
        section |= {} if path is None else {"nvme_path": path}
        if key == "offload_param":  # a buffer holds one partition of a parameter
            section["buffer_size"] = max(section.get("buffer_size", 0), largest_partition(resolved))
        else:
            pipelined = section.get("pipeline_read") or section.get("pipeline_write")
            least = PIPELINED_SWAP_BUFFERS if pipelined else SWAP_BUFFERS
            section["buffer_count"] = max(section.get("buffer_count", 0), least)
    return section


def _offload_problems(resolved: ResolvedRun, section: dict[str, Any]) -> list[str]:
    """Check the offload sections of a DeepSpeed file; in our own there is nothing to find."""
    parallel, problems = resolved.run.parallel, []
    if parallel.pipeline > 1:
        problems.append(
            f"offload needs parallel.pipeline = 1, got {parallel.pipeline}; set it, or take the offload sections out"
        )
    for key in OFFLOAD_SECTIONS:
        given = section.get(key) or {}
        device = str(given.get("device", "none"))
        if device == "none":
            continue
        least = 3 if key == "offload_param" or device == "nvme" else 1
        if device not in OFFLOAD_STAGES:
            problems.append(f'{key}.device is "{device}"; choose "none", "cpu" or "nvme"')
        elif parallel.zero < least:
            problems.append(
                f'{key} to "{device}" needs ZeRO stage {least} or higher, got {parallel.zero}; raise stage and '
                "parallel.zero, or take the section out"
            )
        if device == "nvme" and not isinstance(given.get("nvme_path"), str):
            problems.append(f'{key} to "nvme" needs an nvme_path, a directory on a local disk; name one')
        if (
            device == "nvme"
            and key == "offload_param"
            and any(section.get(name) != 0 for name in NO_READ_AHEAD)
        ):
            problems.append(f'{key} to "nvme" needs {" = 0 and ".join(NO_READ_AHEAD)} = 0; set both')
        if given.get("ratio", 1) != 1 or given.get("super_offload") or given.get("fast_init"):
            problems.append(
                f"{key}: ratio and super_offload need DeepSpeed's own Adam, and fast_init weights that are there at "
                "the start; take them out"
            )
    return problems
