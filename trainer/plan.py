"""What a run will be, before anything starts: `--dry-run`. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.reading.transport import shown
from ..model.config import ModelConfig
from ..model.families import layout_of
from ..model.flops import flops_per_token
from ..model.layout import Parameter, has_weight_decay
from ..model.pipeline import Chunk, chunks_of_ranks, held_by
from .config import ResolvedRun
from .ds_config import deepspeed_config, device_of, largest_partition
from .ramp import Phase
from .sections import ExportSection

GIB = 1 << 30
WORKING_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER_AND_MOMENTS_BYTES = 12
BUCKET = 500_000_000  # DeepSpeed's own default, in elements


def describe(resolved: ResolvedRun, run_dir: Path) -> list[tuple[str, str]]:
    """Give (label, text) lines."""
    run = resolved.run
    model, train, parallel = run.model, run.train, run.parallel
    rows = layout_of(model).values()
    total = sum(row.numel for row in rows)
    decayed = sum(row.numel for row in rows if run.optimizer.decay_all or has_weight_decay(row))
    memories = [memory_bytes(resolved, rank) for rank in range(parallel.pipeline)]
    memory = max(memories, key=lambda kinds: sum(kinds.values()))
    schedule = run.schedule
    return [
        ("run directory", str(run_dir)),
        (
            "model",
            f"{model.family}, {_layers(model)}, hidden {model.hidden_size}, "
            f"{model.num_attention_heads} heads in {model.num_query_groups} groups, "
            f"vocabulary {model.vocab_size} (padded to {model.padded_vocab_size})",
        ),
        (
            "parameters",
            f"{total:,}, {max(local_parameters(resolved, rank) for rank in range(parallel.pipeline)):,} on a rank",
        ),
        (
            "layout",
            f"{resolved.world_size} process(es) = tensor {parallel.tensor} x pipeline {parallel.pipeline} "
            f"x data {resolved.data_parallel}; ZeRO-{parallel.zero}, {train.dtype}"
            + (f", {_stages(resolved)}" if parallel.pipeline > 1 else "")
            + (", sequence parallel" if parallel.sequence else "")
            + (", activation checkpointing" if train.recompute else ""),
        ),
        (
            "batch",
            f"{_batches(resolved)}; {resolved.lanes} data lanes",
        ),
        (
            "length",
            f"{resolved.steps:,} steps, {resolved.tokens:,} tokens ({resolved.tokens / total:.1f} a parameter), "
            f"{total_flops(resolved):.2e} FLOPs",
        ),
        (
            "optimizer",
            f"AdamW, lr {run.optimizer.lr:g}, betas {run.optimizer.betas}, weight decay "
            f"{run.optimizer.weight_decay:g} on {decayed:,} of {total:,} parameters"
            + ("" if run.optimizer.decay_all else " (not on norms, biases, embeddings)")
            + f", clip {train.clip:g}",
        ),
        (
            "schedule",
            f"{schedule.kind}, {schedule.warmup_steps} warm-up steps, "
            f"down to {schedule.final_ratio * run.optimizer.lr:g}",
        ),
        ("memory a rank", _sizes(memory)),
        *_offload_lines(resolved),
        ("checkpoints", _checkpoints(resolved, total)),
        *_exports(run.export, total),
        ("evaluation", f"{_every(run.evaluate.every_steps)} on {', '.join(run.data.heldout) or 'nothing'}"),
    ]


def _layers(model: ModelConfig) -> str:
    if not model.num_decoder_layers:
        return f"{model.num_layers} layers"
    return f"{model.num_layers} layers of the encoder and {model.num_decoder_layers} of the decoder"


def _exports(section: ExportSection, num_parameters: int) -> list[tuple[str, str]]:
    if not section.every_steps:
        return []
    size = num_parameters * (4 if section.dtype == "fp32" else 2) / GIB
    return [
        (
            "exports",
            f"every {section.every_steps} steps and at the end, {section.dtype}, {size:.2f} GiB each; all are kept",
        )
    ]


def _sizes(kinds: dict[str, float]) -> str:
    parts = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in kinds.items())
    return f"{parts}: about {sum(kinds.values()) / GIB:.2f} GiB"


def _offload_lines(resolved: ResolvedRun) -> list[tuple[str, str]]:
    host, swapped = host_memory_bytes(resolved), swapped_bytes(resolved)
    lines = [("host memory a rank", _sizes(host))] if host else []
    return lines + ([("in files a rank", f"about {swapped / GIB:.2f} GiB")] if swapped else [])


def _checkpoints(resolved: ResolvedRun, num_parameters: int) -> str:
    section = resolved.run.checkpoint
    when = [f"every {section.every_steps} steps"] if section.every_steps else []
    when += [f"every {section.every_minutes:g} minutes"] if section.every_minutes else []
    kept = [f"the last {section.keep_last}"]
    kept += [f"every {section.keep_every_steps}th step"] if section.keep_every_steps else []
    kept += [f"the best {section.keep_best}"] if section.keep_best else []
    kept += [f"one {section.rollback_steps} steps back"] if section.rollback_steps else []
    return (
        f"{', '.join([*when, 'at the end'])}; kept are {', '.join(kept)}, "
        f"{num_parameters * MASTER_AND_MOMENTS_BYTES / GIB:.2f} GiB each; "
        + (
            f"written beside training from a copy of {staged_bytes(resolved) / GIB:.2f} GiB in host memory a rank"
            if resolved.saves_asynchronously
            else "training waits for them"
        )
        + (f"; copied to {shown(section.remote)}" if section.remote else "")
    )


def staged_bytes(resolved: ResolvedRun) -> float:
    """Count the host memory of a rank's copy of masters and moments, from which a save is written."""
    parallel = resolved.run.parallel
    local = max(local_parameters(resolved, rank) for rank in range(parallel.pipeline))
    return local * MASTER_AND_MOMENTS_BYTES / (resolved.data_parallel if parallel.zero else 1)


def _every(steps: int) -> str:
    return f"every {steps} steps and at the end" if steps else "at the end"


def total_flops(resolved: ResolvedRun) -> float:
    """Count the FLOPs of the whole run."""
    return sum(
        token_flops(resolved, phase.sequence_length) * steps * phase.tokens
        for phase, steps in resolved.batches.steps_by_phase(resolved.steps)
    )


def token_flops(resolved: ResolvedRun, sequence_length: int) -> float:
    """Count the FLOPs of a token, forward and backward, in sequences of a length of the run."""
    predicted = resolved.num_predicted(sequence_length)
    run = resolved.run
    return flops_per_token(run.model, sequence_length, run.meter.attention_flops, target_length=predicted)


def _piece(row: Parameter, tp: int) -> int:
    return row.numel if row.axis is None else row.numel // tp


def _batches(resolved: ResolvedRun) -> str:
    """Describe every phase that the run reaches, and say where it ends before its ramp."""
    phases = resolved.batches.phases
    texts = [_batch(resolved, phase) for phase in phases if phase.first_step < resolved.steps]
    if len(texts) < len(phases):
        texts.append(f"the run ends before train.ramp does, at step {phases[-1].first_step:,}")
    return "; ".join(texts)


def _batch(resolved: ResolvedRun, phase: Phase) -> str:
    targets = resolved.run.target_length(phase.sequence_length)
    since = f"from step {phase.first_step} " if phase.first_step else ""
    count, size = resolved.num_micro_batches(phase.global_batch), resolved.run.train.micro_batch
    return (
        f"{since}{phase.global_batch} {'sequences of' if phase.texts == 1 else f'pairs of {phase.texts} x'} "
        f"{phase.sequence_length} = {phase.tokens:,} tokens a step, "
        + (f"each with {targets} targets, " if targets else "")
        + f"{count} micro-batch(es) of {size} on a rank"
    )


def _stages(resolved: ResolvedRun) -> str:
    ranks = _chunks(resolved)
    layers = " | ".join("+".join(str(len(chunk.layers)) for chunk in chunks) for chunks in ranks)
    virtual = resolved.run.parallel.virtual_pipeline
    micro_batches = resolved.num_micro_batches(resolved.run.train.global_batch)
    bubble = bubble_share(len(ranks), virtual, micro_batches)
    return f"{'1F1B' if virtual == 1 else 'interleaved'} over layers {layers}, bubble {bubble:.0%}"


def bubble_share(pipeline: int, virtual: int, micro_batches: int) -> float:
    """Give the share of a step in which a pipeline rank waits (Narayanan et al. 2021, section 2.2).

    Idle over useful time is (p - 1) / (v m) for p ranks, v virtual stages on each and m micro-batches.
    """
    idle = (pipeline - 1) / (virtual * micro_batches)
    return idle / (1 + idle)


def _chunks(resolved: ResolvedRun) -> list[list[Chunk]]:
    parallel = resolved.run.parallel
    return chunks_of_ranks(
        resolved.run.model.total_layers, parallel.pipeline, parallel.virtual_pipeline, parallel.pipeline_layers
    )


def local_parameters(resolved: ResolvedRun, pipeline_rank: int) -> int:
    """Count the elements of a pipeline rank's tensor-parallel pieces, before ZeRO."""
    model, tp = resolved.run.model, resolved.run.parallel.tensor
    rows = held_by(layout_of(model), _chunks(resolved)[pipeline_rank], tied=model.tied_head)
    return sum(_piece(row, tp) for row in rows)


def memory_bytes(resolved: ResolvedRun, pipeline_rank: int) -> dict[str, float]:
    """Estimate a rank's memory by kind.

    Weights, gradients (fp32 accumulation) and optimizer follow the ZeRO stage (Rajbhandari et al. 2020, figure 1).
    What is offloaded is elsewhere: `host_memory_bytes`, `swapped_bytes`. Of offloaded weights the largest parameter is
    here, gathered; gradients of an offloaded stage-3 optimizer pass through one bucket.
    With several pipeline stages gradients stay whole until the one reduction of a step. Activations follow
    Korthikanti et al. 2022, equation 2 without the attention scores, which SDPA does not keep, for as many
    micro-batches as the schedule has in flight.
    """
    run, parallel = resolved.run, resolved.run.parallel
    stage, dp = parallel.zero, resolved.data_parallel
    local = local_parameters(resolved, pipeline_rank)
    working = WORKING_BYTES[run.train.dtype]
    activations = _activation_bytes(resolved, pipeline_rank)
    weights: float = local * working / (dp if stage == 3 else 1)
    gradients: float = local * 4 / (dp if stage >= 2 and parallel.pipeline == 1 else 1)
    optimizer: float = local * (MASTER_AND_MOMENTS_BYTES if stage >= 1 else 8) / (dp if stage >= 1 else 1)
    config = deepspeed_config(resolved)
    if device_of(config, "offload_optimizer") != "none":
        optimizer = 0
        if stage == 3:
            bucket = config["zero_optimization"].get("reduce_bucket_size", BUCKET)
            gradients = min(local, bucket) * working
    if device_of(config, "offload_param") != "none":
        weights = min(local, largest_partition(resolved) * dp) * working
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "activations": activations}


def host_memory_bytes(resolved: ResolvedRun) -> dict[str, float]:
    """Estimate what a rank keeps in host memory by offload, by kind; nothing without offload.

    An optimizer in files has buffers for a sub-group's master, moments and gradient; weights in files have as many
    buffers of the largest partition as the DeepSpeed file says, beside those that it allows in host memory.
    """
    config, run = deepspeed_config(resolved), resolved.run
    section = config.get("zero_optimization", {})
    optimizer, weights = (device_of(config, key) for key in ("offload_optimizer", "offload_param"))
    if (optimizer, weights) == ("none", "none"):
        return {}
    owned = local_parameters(resolved, 0) / resolved.data_parallel
    working, largest = WORKING_BYTES[run.train.dtype], largest_partition(resolved)
    copy = {"none": 0.0, "cpu": owned}
    if run.parallel.zero < 3:
        copy["none"] = owned  # updated weights on their way to the GPU
    if weights == "nvme":
        given = section["offload_param"]
        buffers = given.get("buffer_count", 5) * min(owned, given["buffer_size"])
        copy["nvme"] = min(owned, given.get("max_in_cpu", 1e9)) + buffers
    states = {"none": 0.0, "cpu": owned * MASTER_AND_MOMENTS_BYTES}
    if optimizer == "nvme":
        sub_group = min(owned, section.get("sub_group_size", 1e9) + largest)
        states["nvme"] = section["offload_optimizer"]["buffer_count"] * sub_group * 4
    added_up = 4 if run.parallel.zero == 3 else 0  # over micro-batches: stage 3 does it on the host
    gradients = {"none": 0.0, "cpu": owned * (added_up + 4), "nvme": owned * added_up}
    return {
        "weights": copy[weights] * working,
        "gradients": gradients[optimizer],
        "optimizer": states[optimizer],
    }


def swapped_bytes(resolved: ResolvedRun) -> float:
    """Estimate what a rank swaps to files: fp32 master, moments and gradient, and working weights."""
    config = deepspeed_config(resolved)
    owned = local_parameters(resolved, 0) / resolved.data_parallel
    states = MASTER_AND_MOMENTS_BYTES + 4 if device_of(config, "offload_optimizer") == "nvme" else 0
    weights = WORKING_BYTES[resolved.run.train.dtype] if device_of(config, "offload_param") == "nvme" else 0
    return owned * (states + weights)


def _activation_bytes(resolved: ResolvedRun, rank: int) -> float:
    """Estimate what a pipeline rank keeps for its backward passes, over the micro-batches in flight."""
    run, model, tensor = resolved.run, resolved.run.model, resolved.run.parallel.tensor
    chunks, working = _chunks(resolved)[rank], WORKING_BYTES[run.train.dtype]
    cut = tensor if run.parallel.sequence else 1
    layers = [number for chunk in chunks for number in chunk.layers]
    in_flight = _layers_in_flight(resolved, rank)
    largest, kept = 0.0, 0.0
    for number in layers:
        a_layer = _layer_bytes(resolved, number)
        largest = max(largest, a_layer)
        input_bytes = _places(resolved, number) * working * model.hidden_size / cut
        kept += (input_bytes if run.train.recompute else a_layer) / len(layers)
    activations = in_flight * kept + (largest if run.train.recompute else 0.0)
    if any(chunk.last for chunk in chunks):
        predictions = run.train.micro_batch * (resolved.target_length or run.data.sequence_length)
        activations += 2 * predictions * working * model.padded_vocab_size / tensor
    return activations + in_flight / len(layers) * _bias_bytes(resolved, chunks)


def _places(resolved: ResolvedRun, layer: int) -> int:
    """Count the places of a micro-batch that pass through a layer: inputs, or in a decoder of two trunks targets."""
    run = resolved.run
    of_decoder = resolved.target_length and layer >= run.model.num_layers
    return run.train.micro_batch * (resolved.target_length if of_decoder else run.data.sequence_length)


def _bias_bytes(resolved: ResolvedRun, chunks: Sequence[Chunk]) -> float:
    """Count what relative positions add to the scores of a micro-batch, which all layers of a trunk share."""
    run, model = resolved.run, resolved.run.model
    if model.position != "relative":
        return 0.0
    layers = {layer for chunk in chunks for layer in chunk.layers}
    inputs = run.train.micro_batch * run.data.sequence_length**2 if min(layers) < model.num_layers else 0
    targets = resolved.target_length**2 if max(layers) >= model.num_layers else 0
    heads = model.num_attention_heads / run.parallel.tensor
    return (inputs + targets) * heads * WORKING_BYTES[run.train.dtype]


def _layers_in_flight(resolved: ResolvedRun, rank: int) -> int:
    """Count the layers whose activations a pipeline rank keeps at a time, over its micro-batches."""
    parallel, chunks = resolved.run.parallel, _chunks(resolved)[rank]
    micro_batches, ahead = resolved.most_micro_batches, parallel.pipeline - rank - 1
    if parallel.virtual_pipeline == 1:
        return len(chunks[0].layers) * min(ahead + 1, micro_batches)
    # Warm-up of the interleaved schedule: Narayanan et al. 2021, section 2.2, as Megatron-core counts it.
    warm_up = 2 * ahead + (len(chunks) - 1) * parallel.pipeline
    chunk_layers = max(len(chunk.layers) for chunk in chunks)
    return chunk_layers * min(warm_up + 1, micro_batches * len(chunks))


def _layer_bytes(resolved: ResolvedRun, layer: int) -> float:
    """Estimate what one layer keeps of one micro-batch for its backward pass."""
    run, model, tp = resolved.run, resolved.run.model, resolved.run.parallel.tensor
    places, inputs = _places(resolved, layer), run.train.micro_batch * run.data.sequence_length
    cut = tp if run.parallel.sequence else 1
    gates = 3 if model.gated else 2
    heads = (model.num_attention_heads + model.num_query_groups) * model.head_dim
    inner = (3 if model.qk_norm else 2) * heads / tp
    elements = places * (4 * model.hidden_size / cut + inner + gates * model.ffn_hidden_size / tp)
    if (
        layer >= model.num_layers
    ):  # cross attention: its norm and queries of the targets, keys and values of the inputs
        elements += places * (2 * model.hidden_size / cut + heads / tp) + inputs * heads / tp
    return WORKING_BYTES[run.train.dtype] * elements
