"""The environment, read in one place on this side; trainer/runtime.py is the other reader. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path


def inside_launcher() -> bool:
    """Tell whether torchrun, the deepspeed launcher, srun or our own launcher started this process as a worker."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def adopt_srun() -> None:
    """Give a process that srun started the names that the others use."""
    if "SLURM_PROCID" in os.environ and "SLURM_NTASKS" in os.environ and "MASTER_ADDR" in os.environ:
        os.environ.setdefault("RANK", os.environ["SLURM_PROCID"])
        os.environ.setdefault("WORLD_SIZE", os.environ["SLURM_NTASKS"])
        os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))


def num_gpus() -> int:
    """Count the GPUs that a process here would see, without loading a driver library."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def worker_environment(rank: int, num_workers: int, rendezvous: Path) -> dict[str, str]:
    """Make the environment of one local worker."""
    environment = dict(os.environ)
    environment.update(
        RANK=str(rank),
        WORLD_SIZE=str(num_workers),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(num_workers),
        BASESTONE_RENDEZVOUS=str(rendezvous),
    )
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # local workers need no other interface to listen on
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_workers)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Asking the driver whether there is a GPU would take CUDA from the ranks that `verify` forks.
    environment.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if num_gpus() == 0:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def cache_dir() -> Path:
    """Give the directory for what can be made again: $XDG_CACHE_HOME/basestone, else ~/.cache/basestone."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "basestone"


def child_environment() -> dict[str, str]:
    """Give the environment for a command that this one starts: its own, without a launcher's names."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "BASESTONE_RENDEZVOUS")
    return {name: value for name, value in os.environ.items() if name not in launcher}
