"""The environment, read in one place on this side; trainer/runtime.py is the other reader. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..trainer.errors import ConfigError

# What launchers call a rank's number, the world's size, the number on the node, and the ranks of the node.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
NAMES = {
    "mpi": (
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",)),
    ),
}


@dataclass(frozen=True)
class RankIdentity:
    """Which of a launch's processes this one is."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def inside_launcher() -> bool:
    """Tell whether torchrun, the deepspeed launcher, srun or our own launcher started this process as a worker."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_rank() -> bool:
    """Tell whether a launcher made this process its rank 0."""
    return os.environ.get("RANK") == "0"


def adopt_srun() -> None:
    """Give a process that srun started the names that the others use.

    Raises:
        ConfigError: it is one of several that could not find each other, and would each train on their own.
    """
    num_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if num_tasks != "1" and "MASTER_ADDR" not in os.environ and not inside_launcher():
        raise ConfigError(
            f"this is one of {num_tasks} tasks of srun, and MASTER_ADDR does not say where they meet; let `basestone "
            "launch --on slurm` start them, or export MASTER_ADDR (the first node) before srun"
        )
    if "SLURM_PROCID" in os.environ and "SLURM_NTASKS" in os.environ and "MASTER_ADDR" in os.environ:
        os.environ.setdefault("RANK", os.environ["SLURM_PROCID"])
        os.environ.setdefault("WORLD_SIZE", os.environ["SLURM_NTASKS"])
        os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))


def rank_of_launcher(backend: str) -> RankIdentity:
    """Read which rank the launcher of this kind made this process.

    Raises:
        ConfigError: the environment does not say.
    """
    kinds = NAMES.get(backend, (TORCHRUN,))
    for rank, world_size, local_rank, local_sizes in kinds:
        found = [os.environ.get(name) for name in (rank, world_size, local_rank)]
        found.append(next((os.environ[name] for name in local_sizes if name in os.environ), None))
        if all(value is not None and value.isdigit() for value in found):
            return RankIdentity(*(int(value) for value in found if value is not None))
    wanted = " or ".join(", ".join((*kind[:3], kind[3][0])) for kind in kinds)
    raise ConfigError(f"{os.uname().nodename}: this is no rank of {backend}: the environment lacks {wanted}")


def rank_environment(identity: RankIdentity, given: dict[str, str], interface: str | None) -> dict[str, str]:
    """Make the environment of a worker of a launch: this one, what the launch gives, and what ranks need."""
    environment = {**os.environ, **given}
    environment.update(
        RANK=str(identity.rank),
        WORLD_SIZE=str(identity.world_size),
        LOCAL_RANK=str(identity.local_rank),
        LOCAL_WORLD_SIZE=str(identity.local_world_size),
    )
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        environment.setdefault("NCCL_SOCKET_IFNAME", interface)
    _add_defaults(environment, identity.local_world_size)
    return environment


def agent_environment(given: dict[str, str]) -> dict[str, str]:
    """Make the environment of torchrun on a node.

    With the store that agents share by default, nodes that come back never join, and a restart in place may meet the
    ranks of the one before.
    """
    own = {name: value for name, value in child_environment().items() if not name.startswith("PET_")}
    return {**own, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **given}


def clean_environment(kept: tuple[str, ...], prefixes: tuple[str, ...] = ()) -> dict[str, str]:
    """Give a few variables of this environment, for a launcher that shows or sends on what it has."""
    return {name: value for name, value in os.environ.items() if name in kept or name.startswith(prefixes)}


def variables(names: tuple[str, ...]) -> dict[str, str]:
    """Read variables that are to be there.

    Raises:
        ConfigError: some are not; it names all of them.
    """
    if missing := [name for name in names if name not in os.environ]:
        raise ConfigError(
            f"secrets: {', '.join(missing)} not set here; export them, or take them out of the list"
        )
    return {name: os.environ[name] for name in names}


def slurm() -> dict[str, str]:
    """Give what Slurm says of the job that this process belongs to."""
    return {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}


def endpoint() -> str | None:
    """Give where nodes meet, as whoever started this node says; None where nobody does."""
    if found := os.environ.get("BASESTONE_ENDPOINT"):
        return found
    host, port = os.environ.get("PET_MASTER_ADDR"), os.environ.get("PET_MASTER_PORT")
    return f"{host}:{port}" if host and port else None


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
    _add_defaults(environment, num_workers)
    return environment


def _add_defaults(environment: dict[str, str], num_local: int) -> None:
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_local)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Asking the driver whether there is a GPU would take CUDA from the ranks that `verify` forks.
    environment.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if num_gpus() == 0:
        environment.setdefault("DS_ACCELERATOR", "cpu")


def cache_dir() -> Path:
    """Give the directory for what can be made again: $XDG_CACHE_HOME/basestone, else ~/.cache/basestone."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "basestone"


def child_environment() -> dict[str, str]:
    """Give the environment for a command that this one starts: its own, without a launcher's names."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "BASESTONE_RENDEZVOUS")
    return {name: value for name, value in os.environ.items() if name not in launcher}
