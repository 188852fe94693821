"""What a run will be, before anything starts: `--dry-run`. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from ..data.stream import num_lanes, samples_per_reader
from ..model.flops import decoder_flops_per_token
from ..model.layout import Parameter, decoder_layout, has_weight_decay
from .config import ResolvedRun

GIB = 1 << 30
WORKING_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER_AND_MOMENTS_BYTES = 12


def describe(resolved: ResolvedRun, run_dir: Path) -> list[tuple[str, str]]:
    """Give (label, text) lines."""
    run = resolved.run
    model, train, parallel = run.model, run.train, run.parallel
    rows = decoder_layout(model).values()
    total = sum(row.numel for row in rows)
    decayed = sum(row.numel for row in rows if run.optimizer.decay_all or has_weight_decay(row))
    samples = samples_per_reader(train.global_batch, resolved.data_parallel)
    memory = memory_bytes(resolved)
    schedule = run.schedule
    return [
        ("run directory", str(run_dir)),
        (
            "model",
            f"{model.family}, {model.num_layers} layers, hidden {model.hidden_size}, "
            f"{model.num_attention_heads} heads in {model.num_query_groups} groups, "
            f"vocabulary {model.vocab_size} (padded to {model.padded_vocab_size})",
        ),
        ("parameters", f"{total:,}, {local_parameters(resolved):,} on a rank"),
        (
            "layout",
            f"{resolved.world_size} process(es) = tensor {parallel.tensor} x pipeline {parallel.pipeline} "
            f"x data {resolved.data_parallel}; ZeRO-{parallel.zero}, {train.dtype}"
            + (", sequence parallel" if parallel.sequence else "")
            + (", activation checkpointing" if train.recompute else ""),
        ),
        (
            "batch",
            f"{train.global_batch} sequences of {run.data.sequence_length} = {resolved.tokens_per_step:,} "
            f"tokens a step; {resolved.num_micro_batches(samples)} micro-batch(es) of {train.micro_batch} "
            f"on a rank; {num_lanes(train.global_batch)} data lanes",
        ),
        (
            "length",
            f"{resolved.steps:,} steps, {resolved.steps * resolved.tokens_per_step:,} tokens "
            f"({resolved.steps * resolved.tokens_per_step / total:.1f} a parameter), "
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
        (
            "memory a rank",
            ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in memory.items())
            + f": about {sum(memory.values()) / GIB:.2f} GiB",
        ),
        (
            "checkpoints",
            f"{_every(run.checkpoint.every_steps)}, the last {run.checkpoint.keep_last} are kept, "
            f"{total * MASTER_AND_MOMENTS_BYTES / GIB:.2f} GiB each",
        ),
        ("evaluation", f"{_every(run.evaluate.every_steps)} on {', '.join(run.data.heldout) or 'nothing'}"),
    ]


def _every(steps: int) -> str:
    return f"every {steps} steps and at the end" if steps else "at the end"


def total_flops(resolved: ResolvedRun) -> float:
    """Count the FLOPs of the whole run."""
    run = resolved.run
    convention = run.meter.attention_flops
    a_token = decoder_flops_per_token(run.model, run.data.sequence_length, convention)
    return a_token * resolved.steps * resolved.tokens_per_step


def _piece(row: Parameter, tp: int) -> int:
    return row.numel if row.axis is None else row.numel // tp


def local_parameters(resolved: ResolvedRun) -> int:
    """Count the elements of one tensor-parallel rank's pieces, before ZeRO."""
    tp = resolved.run.parallel.tensor
    return sum(_piece(row, tp) for row in decoder_layout(resolved.run.model).values())


def memory_bytes(resolved: ResolvedRun) -> dict[str, float]:
    """Estimate a rank's memory by kind.

    Weights, gradients (fp32 accumulation) and optimizer follow the ZeRO stage (Rajbhandari et al. 2020, figure 1);
    activations follow Korthikanti et al. 2022, equation 2 without the attention scores, which SDPA does not keep.
    """
    run = resolved.run
    model, stage, dp = run.model, run.parallel.zero, resolved.data_parallel
    local = local_parameters(resolved)
    tokens = run.train.micro_batch * run.data.sequence_length
    working = WORKING_BYTES[run.train.dtype]
    tp = run.parallel.tensor
    cut = tp if run.parallel.sequence else 1
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    gates = 3 if model.activation == "swiglu" else 2
    inner = (2 * model.num_attention_heads * model.head_dim + 2 * model.num_query_groups * model.head_dim) / tp
    a_layer = tokens * working * (4 * hidden / cut + inner + gates * ffn / tp)
    kept = tokens * working * hidden / cut
    layers = model.num_layers * kept + a_layer if run.train.recompute else model.num_layers * a_layer
    return {
        "weights": local * working / (dp if stage == 3 else 1),
        "gradients": local * 4 / (dp if stage >= 2 else 1),
        "optimizer": local * (MASTER_AND_MOMENTS_BYTES if stage >= 1 else 8) / (dp if stage >= 1 else 1),
        "activations": layers + 2 * tokens * working * model.padded_vocab_size / tp,
    }
