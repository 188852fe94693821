"""How many workers fit on this machine's GPUs, and which keys of a run file that changes. Imports no torch."""

from __future__ import annotations

from ..trainer.config import RunConfig
from ..trainer.errors import ConfigError
from .environ import num_gpus


def fitting_keys(run: RunConfig, num_workers: int) -> list[str]:
    """Give the `section.key=value` that a run needs for this number of workers, where it differs from its file."""
    parallel = run.parallel
    keys = [] if run.run.processes == num_workers else [f"run.processes={num_workers}"]
    if num_workers % (parallel.tensor * parallel.pipeline) == 0:
        return keys
    if num_workers % parallel.pipeline:
        keys.append("parallel.pipeline=1")
        keys += ["parallel.virtual_pipeline=1"] if parallel.virtual_pipeline > 1 else []
        keys += [f"parallel.pipeline_layers=[{run.model.total_layers}]"] if parallel.pipeline_layers else []
    stages = 1 if num_workers % parallel.pipeline else parallel.pipeline
    if num_workers % (parallel.tensor * stages):
        keys.append("parallel.tensor=1")
        keys += ["parallel.sequence=false"] if parallel.sequence else []
    return keys


def check_gpus(run: RunConfig, num_workers: int) -> None:
    """Refuse more workers than there are GPUs: each has one to itself.

    Raises:
        ConfigError: with the keys to change.
    """
    gpus = num_gpus()
    if num_workers > gpus > 0:
        keys = " ".join(f"--set {key}" for key in fitting_keys(run, gpus))
        raise ConfigError(
            f"run.processes = {num_workers}, but this machine has {gpus} GPU(s) and every process needs its own; "
            f"give {keys}, or CUDA_VISIBLE_DEVICES= to train on the CPU"
        )


def check_ranks(num_ranks: int) -> None:
    """Refuse `verify` more ranks than there are GPUs.

    Raises:
        ConfigError: with the option to change.
    """
    gpus = num_gpus()
    if num_ranks > gpus > 0:
        raise ConfigError(
            f"--processes {num_ranks}, but this machine has {gpus} GPU(s) and every process needs its own; "
            f"give --processes {gpus}, or CUDA_VISIBLE_DEVICES= to compare on the CPU"
        )


def quickstart_keys(run: RunConfig) -> list[str]:
    """Give the keys that lay the quickstart's recipe out over this machine's GPUs; none on a CPU."""
    gpus = num_gpus()
    return fitting_keys(run, min(gpus, run.train.global_batch)) if gpus else []
